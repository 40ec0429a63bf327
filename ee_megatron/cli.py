"""`ee-megatron <command>`: parses, checks the configuration, calls; the work is in training/ and checkpoint/.

torch is imported by what is called, never here: help and wrong settings answer at once.
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import importlib
import json
import os
import select
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import exit_rules
from .arguments import Parser, current
from .config.errors import lines_of
from .config.schema import RunConfig
from .interrupts import interruptible
from .training.ranks import check_variables, is_rank

STAGES = {
    "import-checkpoint": "convert a Megatron checkpoint (model.checkpoint) to the model that other stages start from",
    "pretrain": "train a small model from random weights on the task's worked problems (size ladder)",
    "teacher": "stage 0: sample answers with examples in the prompt, keep the right ones, fine-tune and merge",
    "traces": "stage 1a: generate the teacher's answers and store each exit's divergence from the last layer",
    "calibrate": "stage 1b: train adapters and gates on the traces (self-distillation)",
    "rl": "stage 2: reinforcement learning with a penalty on depth",
    "evaluate": "measure accuracy and depth of the teacher, the calibrated and the reinforced model",
}
COMMANDS = {
    "run": "the whole method: every stage in order, then the report; finished stages are skipped",
    **STAGES,
    "report": "write one HTML file (and PNG plots) of a run's results, or a comparison of several runs, named by their "
    "directories (runs/<name>: every evaluation in it)",
    "generate": "answer one prompt and print each token with its exit depth",
    "serve": "HTTP server with OpenAI's API, with exit depths as extra fields",
    "plan": "layout, parameters, memory, FLOPs and time of an RL run, before anything starts; refuses what will not "
    "fit",
    "slurm-spec": "check a stage's inputs and print the Slurm resources that it needs, as key=value lines",
}
HANDED_ON = {
    "sweep": (
        ".sweeps.command",
        "run a grid of settings on this machine or as a Slurm job array: shared stages run once, results in one table",
    ),
    "convert": (
        ".convert",
        "convert between Hugging Face models, Megatron checkpoints and policies; reshard, verify, inspect",
    ),
    "scaling": (
        ".scaling.command",
        "fit scaling laws to a table of runs: intervals, forecasts, comparison of functional forms, plots",
    ),
    "externalise": (
        ".externalise.command",
        "does a depth penalty make a model write out its reasoning? One page and tables from a study's runs",
    ),
}
"""Commands whose module reads their arguments itself, in its `main`."""

EPILOG = """\
examples:
  ee-megatron run experiment=demo_cpu
  ee-megatron rl experiment=demo_cpu rl.depth_penalty.weight=0.3 rl.steps=5
  ee-megatron rl experiment=rl_7b --dry-run
  ee-megatron plan experiment=rl_7b --dims DeepSeek-R1-Distill-Qwen-7B
  ee-megatron report experiment=demo_cpu
  ee-megatron sweep experiment=demo_cpu rl.depth_penalty.weight=0,0.3,1 seed=1,2,3 --name front
  ee-megatron convert export --checkpoint runs/demo_cpu --out exported
  ee-megatron externalise runs

`ee-megatron <command> --help` has each command's options. Settings are key=value; `--dry-run` prints all of them.
EE_DEBUG=1 shows the full traceback of an error.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, 1 (it failed while running), 2 (bad input), 130 (interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments:
        arguments[0] = current(arguments[0])
    if arguments and arguments[0] in HANDED_ON:
        return _guarded(lambda: _hand_on(*arguments))
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    wrong = [text for text in rest if text.startswith("-")]
    if wrong or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(wrong or rest)}")
    # argparse stops collecting settings at the first option; what follows it arrives in `rest`.
    options.overrides = [*options.overrides, *rest]
    return _guarded(lambda: options.handler(options))


def build_parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = Parser(
        prog="ee-megatron",
        description="Early-exit transformers: calibration and reinforcement learning.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="<command>", required=True)
    for name in ("run", *STAGES):
        command = _add(commands, name, _run)
        command.set_defaults(command=name)
        text = "check and print settings, ranks, directories and missing inputs; start nothing"
        command.add_argument("--dry-run", action="store_true", help=text)
    page = _add(commands, "report", _report, example="\n  ee-megatron report runs/one runs/two --out both.html")
    page.usage = "ee-megatron report [-h] [--out FILE] (key=value ... | RUN ...)"
    text = "with RUN: output file (default: report.html in the directory above the runs)"
    page.add_argument("--out", type=Path, metavar="FILE", help=text)
    _add_generate(commands)
    serve = _add(commands, "serve", _serve, example="--port 8000 --exits threshold:0.7")
    _add_model(serve)
    _options(
        serve,
        ("--exits", None, "RULE", "exit rule of requests without exit_policy (default: as in generate)"),
        ("--host", "127.0.0.1", None, "address to listen on (default: 127.0.0.1)"),
        ("--port", 8000, None, "port; 0: any free one (default: 8000)"),
        ("--rows", 32, None, "sequences generated at the same time (default: 32)"),
        ("--queue", 256, None, "requests that may wait; further ones get HTTP 429 (default: 256)"),
        ("--cache-gib", 0.0, None, "memory of the key-value cache (default: all that is free)"),
        ("--max-length", 0, None, "most tokens of prompt plus answer (default: the model's limit)"),
        ("--max-new-tokens", 256, None, "for requests without max_tokens (default: 256)"),
        ("--grace", 30.0, "SECONDS", "time that running requests get after a stop signal (default: 30)"),
    )
    origins = "web origin that may send requests; *: any (repeatable)"
    serve.add_argument("--allow-origin", action="append", default=[], metavar="ORIGIN", help=origins)
    plan = _add(commands, "plan", _plan, example="--on cpu")
    _options(
        plan,
        ("--dims", "", "NAME", "a published model instead of model.path"),
        ("--on", "", "DEVICE", "H100, H200, A100 or cpu (default: that of the settings)"),
    )
    plan.add_argument("--tflops", type=float, help="dense peak of the device (default: its data sheet's)")
    plan.add_argument("--memory-gib", type=float, help="memory of the device (default: its data sheet's)")
    _options(
        plan,
        ("--prompt-tokens", 200, "N", "tokens of a prompt (default: 200)"),
        ("--answer-tokens", 0, "N", "tokens of an answer (default: rollout.max_new_tokens)"),
        ("--mean-depth", 0.7, "SHARE", "mean exit depth as a share of the layers (default: 0.7)"),
    )
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    _add(commands, "slurm-spec", _slurm_spec)
    # Only for the list of commands: main() hands their arguments on unread.
    for name, (_, text) in HANDED_ON.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    handler: Callable[[argparse.Namespace], int],
    example: str = "",
) -> argparse.ArgumentParser:
    stage = "rl " if name == "slurm-spec" else ""
    parser = commands.add_parser(
        name,
        help=COMMANDS[name],
        description=COMMANDS[name],
        epilog=f"example:\n  ee-megatron {name} {stage}experiment=demo_cpu {example}".rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if stage:
        parser.add_argument("stage", type=current, choices=list(STAGES), help="the stage that the job runs")
    text = "experiment=NAME and single settings (configs/)"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=text)
    parser.set_defaults(handler=handler)
    return parser


def _options(parser: argparse.ArgumentParser, *rows: tuple[str, str | int | float | None, str | None, str]) -> None:
    """Rows: option, default (it determines the type), metavar, help."""
    for option, default, metavar, text in rows:
        kind = str if default is None else type(default)
        parser.add_argument(option, type=kind, default=default, metavar=metavar, help=text)


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    # A run's model reads the prompt as it stands, so it has to look as in training, up to where the answer begins.
    example = r"--exits threshold:0.7 --prompt $'Question: What is 7 times 8?\nAnswer:'"
    example += "\n  ee-megatron generate --model models/SmolLM2-135M-Instruct --prompt 'What is the capital of France?'"
    generate = _add(commands, "generate", _generate, example=example)
    generate.add_argument("--prompt", required=True, help="text to continue or answer")
    _options(
        generate,
        (
            "--exits",
            None,
            "RULE",
            f"{exit_rules.usage()} (default: the export's, or what the run's evaluation chose, else threshold:0.5)",
        ),
        ("--temperature", 0.0, None, "sampling temperature; 0: the most probable token (default: 0)"),
    )
    text = "most tokens of the answer (default: rollout.max_new_tokens; 256 without a run)"
    generate.add_argument("--max-new-tokens", type=int, metavar="N", help=text)
    text = "put the prompt into the model's chat template as a user's message (default: as in the run's training; "
    text += "without a run, if the model has a template and no gates)"
    generate.add_argument("--chat", action=argparse.BooleanOptionalAction, default=None, help=text)
    _add_model(generate)


def _add_model(parser: argparse.ArgumentParser) -> None:
    _options(
        parser,
        (
            "--model", None, "DIR",
            "a Hugging Face model or hub id, export with gates, run or Megatron checkpoint; needs no experiment",
        ),
        ("--policy", None, "DIR", "a policy checkpoint or stage directory (default: the newest)"),
    )  # fmt: skip
    text = "accept a policy that was trained on another base model"
    parser.add_argument("--base-unchecked", action="store_true", help=text)
    text = "variables of the chat template, as '{\"enable_thinking\": false}' of Qwen3's (default: the run's)"
    parser.add_argument("--chat-template-kwargs", type=_json_object, default={}, metavar="JSON", help=text)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r}: expected a JSON object, as {{"enable_thinking": false}}')
    return value


def _configured(options: argparse.Namespace, *, with_model: bool = False, whole: bool = False) -> RunConfig:
    """The settings, checked, `with_model` against the model too; `whole`: as in `config.load.pin_ids`."""
    from .config.derive import read_dims
    from .config.errors import refuse
    from .config.load import load, pin_ids
    from .config.validate import validate

    cfg = load(options.overrides)
    validate(cfg, None)
    refuse(pin_ids(cfg, options.overrides, whole=whole).values())
    if with_model:
        validate(cfg, read_dims(cfg))
    return cfg


def _ready(overrides: list[str], command: str, *, starts_here: bool = True, whole: bool = False) -> RunConfig:
    """The settings of a stage, or of all of them ("run"), after checking their inputs, and this machine too if it
    `starts_here`. What is wrong is reported before gigabytes are fetched (`whole`). Raises Faults."""
    from .config import hub
    from .config.errors import refuse

    cfg, wrong, missing = _look(overrides, command, overrides if starts_here else None, whole)
    refuse([*wrong, *missing])
    assert cfg is not None
    left = not whole and any(map(hub.pending.get, (cfg.model.path, cfg.task.path)))
    return _ready(overrides, command, starts_here=starts_here, whole=True) if left else cfg


def _look(
    overrides: list[str], command: str, here: list[str] | None, whole: bool
) -> tuple[RunConfig | None, list[str], list[str]]:
    """The settings, their faults by themselves, and their faults on this machine, as Preflight reports them. `whole`,
    and `overrides`: as in `config.load.pin_ids`."""
    from .config.identity import stage_order
    from .config.load import Attempt, attempt, pin_ids
    from .training.preflight import Preflight

    result = attempt(overrides)
    if result.cfg is not None:
        faults = pin_ids(result.cfg, overrides, whole=whole)
        result = Attempt(result.cfg, [*result.faults, *faults.values()], result.without | faults.keys())
    wanted = [command] if command != "run" else stage_order(result.cfg) if result.cfg else []
    return result.cfg, *Preflight().look(result, wanted, inputs=command != "run", here=here)


def _run(options: argparse.Namespace) -> int:
    """A stage, or all of them."""
    if options.dry_run:
        return _dry_run(options.overrides, options.command)
    from .training import launch

    # For several ranks, the process that started them has checked their inputs.
    cfg = _configured(options, whole=True) if is_rank(os.environ) else _ready(options.overrides, options.command)

    if options.command == "run":
        launch.run_method(cfg, options.overrides)
    else:
        launch.run_stage(options.command, cfg, options.overrides)
    return 0


def _dry_run(overrides: list[str], command: str) -> int:
    """Print the settings and a plan. Inputs that this machine lacks are remarks, not errors."""
    from .config.errors import refuse
    from .config.identity import to_yaml
    from .training.preflight import remarks

    cfg, wrong, missing = _look(overrides, command, None, whole=False)
    refuse(wrong)
    assert cfg is not None
    lines = remarks(cfg, command, overrides, missing)
    print(to_yaml(cfg) + "".join(f"# {line}\n" for line in lines), end="")
    return 0


def _plan(options: argparse.Namespace) -> int:
    cfg = _configured(options)
    _quiet_megatron()
    from .planning.plan import run_plan

    return run_plan(cfg, options)


def _slurm_spec(options: argparse.Namespace) -> int:
    cfg = _ready(options.overrides, options.stage, starts_here=False)
    from .training.launch import describe_job

    job = describe_job(cfg, options.stage, os.environ)
    print("\n".join(f"{key}={value}" for key, value in job.items()))
    return 0


def _report(options: argparse.Namespace) -> int:
    # A word without "=" is a directory: nothing else that a report takes is one.
    named = [Path(text) for text in options.overrides if "=" not in text]
    settings = [text for text in options.overrides if "=" in text]
    if named and settings:
        raise ValueError(
            f"{named[0]} with {settings[0]}: settings name one run, directories any number; give one kind or the other"
        )
    from .report.page import report_directories, report_run

    print(report_directories(named, options.out) if named else report_run(_configured(options)))
    return 0


def _answering(options: argparse.Namespace) -> RunConfig:
    """The configuration that `generate` and `serve` go by; with --model it needs no experiment."""
    if options.model is None:
        cfg = _configured(options, with_model=True, whole=True)
    else:
        from .training.stages import model_at

        model_at("--model", options.model)
        if not options.overrides:
            cfg = RunConfig()
            cfg.rollout.stop, cfg.rollout.max_new_tokens = [], 256
        else:
            from .config.load import load

            cfg = load(["name=given", "model.path=given", *options.overrides])
        cfg.model.path = options.model
    cfg.rollout.chat_template_kwargs |= options.chat_template_kwargs
    return cfg


def _generate(options: argparse.Namespace) -> int:
    cfg = _answering(options)
    if not 0 <= options.temperature < float("inf"):
        raise ValueError(f"--temperature {options.temperature}: expected a number >= 0")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {options.max_new_tokens}: expected a number >= 1")
    rule = _exit_rule(options)
    from .training import launch

    launch.quiet_libraries()
    start = time.monotonic()
    print(f"loading {options.model or cfg.name} ...", end="", file=sys.stderr, flush=True)
    try:
        from .inference.answering import load, rule_for, stream_answer, wants_chat
        from .rollout.engine.sampling import SamplingParams

        answering = load(cfg, options.model, options.policy, options.base_unchecked)
    except BaseException:
        print(file=sys.stderr)
        raise
    print(f" {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    # Of a run that is named by its directory: its own settings, unless there are others.
    rollout = cfg.rollout if options.overrides or answering.settings is None else answering.settings.rollout
    tokens = rollout.max_new_tokens if options.max_new_tokens is None else options.max_new_tokens
    rule, chat = rule_for(answering, rule), wants_chat(answering, options.chat)
    sampling = SamplingParams(options.temperature, tokens, () if chat else tuple(rollout.stop))
    stream_answer(answering, options.prompt, rule, sampling, chat)
    return 0


def _exit_rule(options: argparse.Namespace) -> exit_rules.ExitRule | None:
    """Parsed before torch is imported, which takes its time."""
    return None if options.exits is None else exit_rules.parse_option("--exits", options.exits)


def _serve(options: argparse.Namespace) -> int:
    cfg, rule = _answering(options), _exit_rule(options)
    from .training import launch

    launch.quiet_libraries()
    from .inference.answering import serve
    from .rollout.server.run import ServerSettings

    serve(cfg, ServerSettings.of(vars(options)), rule, options.model, options.policy, options.base_unchecked)
    return 0


def _hand_on(command: str, *arguments: str) -> int:
    _quiet_megatron()
    return importlib.import_module(HANDED_ON[command][0], __package__).main(arguments)


def _quiet_megatron() -> None:
    """megatron-core names at import every accelerator library that it does without."""
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")


def _guarded(action: Callable[[], int]) -> int:
    """Run `action`; print an error as one line and return the exit code.

    With several ranks the line names the rank and follows its traceback (none for bad input), all in one write, because
    other ranks may be writing too.
    """
    name = ""
    try:
        check_variables(os.environ)
        rank, world = os.environ.get("RANK"), int(os.environ.get("WORLD_SIZE", "1"))
        if rank is not None and world > 1:
            name = f"rank {rank} of {world}"
            faulthandler.enable()
        with interruptible():
            return action()
    except KeyboardInterrupt:
        if not name:
            print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        bad_input = isinstance(error, ValueError | FileNotFoundError)
        bad_input |= isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
        if name:
            where = "" if bad_input else f"{name} failed here:\n{traceback.format_exc()}"
            sys.stderr.write(f"{where}error: {name}: {'; '.join(lines_of(error))}\n")
            sys.stderr.flush()
            return 2 if bad_input else 1
        if os.environ.get("EE_DEBUG") == "1" or not isinstance(
            error, ValueError | RuntimeError | OSError | ImportError
        ):
            raise
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 0
        print("".join(f"error: {line}\n" for line in lines_of(error)), end="", file=sys.stderr)
        return 2 if bad_input else 1


def _nobody_reads() -> bool:
    """Whether the pipe that broke is stdout's: `head` or a pager has seen enough. What is left goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


if __name__ == "__main__":
    sys.exit(main())
