"""Goldens: what users see of a version of this project, as text that can be compared, to prove a refactoring.

Stage hashes and dry runs of every experiment, help of every command, figures and weights of tiny runs of every stage,
files of conversions. Numbers depend on processor and torch: sets are made where they are compared, and not stored.

One process imports the package of a source tree, and each command is that package's `main(argv)` in a fork of it. Old
trees run under the newest version of this file: it uses only the command line, settings, and what INTERFACES names.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import importlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import pkgutil
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
INTERFACES = {
    "main": ("ee_megatron.cli:main",),
    "load": ("ee_megatron.config.load:load",),
    "stage_dir": ("ee_megatron.config.identity:stage_dir",),
    "stage_order": ("ee_megatron.config.identity:stage_order",),
    "lean_imports": ("ee_megatron.parallel.cpu_shims:lean_imports",),
}
"""What is imported from the tree: the newest name first, then the names that older trees have for it."""
DROPPED = {"tokens_per_s", "date", "machine", "versions", "speed"}
"""Keys of JSON files: clocks, speeds, and the machine and environment that made them."""
CLOCKS = re.compile(r"^.*\bGB/s\b.*\n|(?<=RL step on cpu: ).*|(?<=\.\d{4}) +\d+$| \d+\.\d s$", re.MULTILINE)
"""In text: speed of a conversion; estimates from a measurement of this processor; tok/s, last in a table; loading."""
CORES, LINES = 2, 20  # processes at a time; lines that are shown of a file's diff

# A model of 6 layers and 20 tokens. 60 updates teach it enough for some answers to be right, and gates to be unsure.
SETTINGS = (
    "experiment=ladder", "name=golden", "model.path=configs/hops", "exits.depths=[2,3,4]", "adapter.rank=4",
    "parallel.tokens_per_micro_batch=128", "task=hops", "task.families=[hop1,hop2]", "task.slots=2", "task.train=0",
    "task.validation=8", "task.evaluation=16", "pretrain.steps=60", "pretrain.batch_size=16", "teacher.enabled=true",
    "teacher.problems=48", "teacher.samples=2", "teacher.batch_size=8", "teacher.epochs=1", "teacher.shots=0",
    "traces.problems=24", "calibrate.epochs=4", "calibrate.batch_size=8", "calibrate.kl_factor=0.5",
    "calibrate.gate_lr=6e-3", "rl.steps=4", "rl.prompts_per_step=4", "rl.group_size=4", "rl.checkpoint_every=1",
    "rollout.max_new_tokens=8", "evaluate.thresholds=[0.3,0.6]", "evaluate.answers=4",
)  # fmt: skip
TP2, PP2, DP2 = (f"parallel.{way}=2" for way in ("tensor", "pipeline", "data"))
FULL = ("adapter.full=true", "calibrate.keep=0.75", "calibrate.settle=0.5", "calibrate.teacher=full", DP2)
LONG = ("rl=long_answers", "rl.accuracy_window=2", "rl.exit_divergence=all", "parallel.sequence_parallel=true", TP2)
TOKEN = ("rl.credit=token", "rl.minibatches=2", "rollout=ray", "deepspeed=zero2", DP2)
CHOICE = ("rl=paper", "evaluate.controls=true", "evaluate.choice=all", "evaluate.choice_answers=8")
# What only this task has: problems on wide operands, and prompts that reasoning can be taken from. Its model is random.
WORDS = (
    "task=arithmetic", "task.families=[sum]", "task.train=200", "task.slots=4", "model.path=configs/ladder/100k",
    "exits.depths=[2,4,6]", "pretrain.steps=2", "teacher.enabled=false", "traces.problems=8", "rl.steps=2",
    "traces.wide_operands=0.25", "calibrate.patterns=1", "rl.wide_operands=0.5", "evaluate.wide_test=4",
    "evaluate.wide_problems=4", "evaluate.externalisation=true", "evaluate.externalisation_prompts=2",
)  # fmt: skip


class Run(NamedTuple):
    """A stage as users run it. `after`: runs that have to be done; `ranks`: processes, as torchrun would start them;
    `resumed`: the stage has finished before, and now looks as if it had been killed in its last step."""

    stage: str
    settings: tuple[str, ...] = ()
    after: str = ""
    ranks: int = 1
    resumed: bool = False


# Every objective, credit, kind of adapter, layout and pool at least once, not their product.
RUNS = {
    "pretrain": Run("pretrain"),
    "teacher": Run("teacher", (), "pretrain"),
    "traces": Run("traces", (), "teacher"),
    "calibrate": Run("calibrate", (PP2,), "traces", 2),
    "rl_paper": Run("rl", ("rl=paper", PP2), "calibrate", 2),
    "evaluate": Run("evaluate", CHOICE, "rl_paper"),
    "rl_long": Run("rl", LONG, "calibrate", 2),
    "rl_long_resumed": Run("rl", LONG, "rl_long", 2, resumed=True),
    "rl_token": Run("rl", TOKEN, "calibrate", 2),
    "full_teacher": Run("teacher", FULL, "pretrain", 2),
    "full_traces": Run("traces", FULL, "full_teacher"),
    "full_calibrate": Run("calibrate", FULL, "full_traces", 2),
    "full_rl": Run("rl", (*FULL, "rollout.max_staleness=1", "rl.kl=loss"), "full_calibrate", 2),
    "words_pretrain": Run("pretrain", WORDS),
    "words_traces": Run("traces", WORDS, "words_pretrain"),
    "words_calibrate": Run("calibrate", WORDS, "words_traces"),
    "words_rl": Run("rl", WORDS, "words_calibrate"),
    "words_evaluate": Run("evaluate", WORDS, "words_rl"),
}
FIGURES = ("metrics.jsonl", "results.json", "answers.jsonl", "pretrain.json", "table.txt")


def write(out: Path, tree: Path) -> None:
    """Make the set of a tree, whole or not at all. Raises RuntimeError if a command of the tree fails."""
    unfinished = out.with_name(out.name + ".partial").resolve()
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ} | {
        "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "COLUMNS": "100", "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu", "PYTHONDONTWRITEBYTECODE": "1", "WANDB_MODE": "disabled",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="goldens.") as scratch:
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "_make", str(unfinished), str(tree)]
        if subprocess.run(command, cwd=scratch, env=environment, check=False).returncode:
            raise RuntimeError(f"{tree}: a command failed; the goldens made before it are in {unfinished}")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(unfinished, out)


def make(out: Path, tree: Path) -> int:
    """`write`, in the process that imports the tree's package. A job starts when the job that it comes after is done
    and enough cores are free. Returns the exit code."""
    preload(tree)
    waiting: dict[str, tuple[str, int, Callable[[], list[Any]]]] = {
        "texts": ("", 1, lambda: [fork("texts.0.log", texts, out, tree)]),
        **{label: (run.after, run.ranks, partial(start, label, run)) for label, run in RUNS.items()},
        "conversions": ("evaluate", 1, lambda: [fork("conversions.0.log", conversions, out)]),
    }
    running, done, failed = dict[str, list[Any]](), {""}, list[str]()
    while running or (waiting and not failed):
        for label, (after, cores, begin) in list(waiting.items()):
            if after in done and not failed and cores + sum(map(len, running.values())) <= CORES:
                running[label] = begin()
                del waiting[label]
        # All may have ended since: nothing would wake it then.
        wait([process.sentinel for processes in running.values() for process in processes if process.is_alive()], 0.5)
        for label, processes in list(running.items()):
            if any(process.exitcode for process in processes):
                failed += [label] if label not in failed else []
                for process in processes:
                    process.kill()
            if all(process.exitcode is not None for process in processes):
                del running[label]
                done.add(label)
                if label in RUNS and label not in failed:
                    stage = stage_of(RUNS[label])
                    for path in (path for name in FIGURES if (path := stage / name).is_file()):
                        save(out / "runs" / label / path.name, readable(path))
                    save_files(stage, out / "runs" / label, "**/*.safetensors")
    for log in (log for label in failed for log in sorted(Path.cwd().glob(f"{label}.*.log"))):
        print(f"--- {log.name}\n{log.read_text()[-3000:]}", file=sys.stderr)
    return 1 if failed else 0


def preload(tree: Path) -> None:
    """Import what the commands import, once for all forks. Only speed depends on it."""
    warnings.filterwarnings("ignore")
    package = importlib.import_module("ee_megatron")
    if Path(package.__file__ or "").parents[1] != tree:
        raise SystemExit(f"error: ee_megatron was imported from {package.__file__}, expected it in {tree}")
    with contextlib.suppress(ImportError), interface("lean_imports")():
        importlib.import_module("megatron.core.models.gpt.gpt_model")
        importlib.import_module("deepspeed")
    for module in pkgutil.walk_packages(package.__path__, "ee_megatron.", onerror=lambda name: None):
        if not re.search(r"vllm|export_files|__main__", module.name):
            with contextlib.suppress(Exception):
                importlib.import_module(module.name)


def interface(name: str) -> Any:
    """What the tree has under one of the names of an interface."""
    for place in INTERFACES[name]:
        module, attribute = place.split(":")
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module), attribute)
    raise SystemExit(f"error: {name}: the tree has none of {', '.join(INTERFACES[name])}; add its name to INTERFACES")


def fork(log: str, function: Callable[..., Any], *arguments: Any, **variables: Any) -> Any:
    """A process that has these environment variables, writes what it says to `log`, and ends with what is returned."""

    def work() -> None:
        os.environ.update({name: str(value) for name, value in variables.items()})
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.exit(function(*arguments))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def start(label: str, run: Run) -> list[Any]:
    """The processes of a run."""
    if run.resumed:
        stage = stage_of(run)
        (stage / "DONE").unlink()
        shutil.rmtree(max(stage.glob("checkpoints/step_*")))
        with (stage / "metrics.jsonl").open("a") as file:
            file.write('{"step": 9, "rew')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": run.ranks, "LOCAL_WORLD_SIZE": run.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(run.ranks)] if run.ranks > 1 else [{}]
    main, argv = interface("main"), [run.stage, *SETTINGS, *run.settings]
    return [fork(f"{label}.{rank}.log", main, argv, **variables) for rank, variables in enumerate(ranks)]


def stage_of(run: Run) -> Path:
    return Path(interface("stage_dir")(interface("load")([*SETTINGS, *run.settings]), run.stage))


def texts(out: Path, tree: Path) -> None:
    """Stage hashes and dry runs of every experiment, help of every command."""
    load, stage_dir, order = (interface(name) for name in ("load", "stage_dir", "stage_order"))
    hashes, dry = list[str](), out / "dry_run"
    for experiment in sorted(path.stem for path in (tree / "configs" / "experiment").glob("*.yaml")):
        cfg = load([f"experiment={experiment}", "name=pinned", "model.path=no/such/model"])
        hashes += [f"{experiment}.{stage}: {stage_dir(cfg, stage).name}\n" for stage in order(cfg)]
        command(["run", f"experiment={experiment}", "--dry-run"], dry / f"{experiment}.txt", settings=True)
    save(out / "stage_hashes.txt", "".join(hashes))
    command(["plan", "experiment=rl_7b", "--dims", "DeepSeek-R1-Distill-Qwen-7B"], dry / "plan.txt")
    command(["sweep", "experiment=ladder", "seed=1,2", "--name", "grid", "--dry-run"], dry / "sweep.txt")
    # Wide enough for a line each: another name is to wrap nothing else.
    os.environ["COLUMNS"] = "1000"
    add_parser, commands = argparse._SubParsersAction.add_parser, [[], ["sweep", "status"], ["sweep", "collect"]]

    def noted(self: Any, name: str, **options: Any) -> Any:
        argv = [*self._prog_prefix.split()[1:], name]
        commands.extend([argv] if argv not in commands else [])
        return add_parser(self, name, **options)

    argparse._SubParsersAction.add_parser = noted  # type: ignore[method-assign,assignment]
    for argv in commands:
        command([*argv, "--help"], out / "help" / f"{'_'.join(['ee-megatron', *argv])}.txt")


def conversions(out: Path) -> None:
    """What conversions of the tiny model write: there, back, for another layout, with and without a policy; and what
    the exported model answers, and the runs' report."""
    policy, base = max(stage_of(RUNS["rl_paper"]).glob("checkpoints/step_*")), stage_of(RUNS["teacher"]) / "model"
    for name, *argv in (
        ("imported", "import", "--hf", base),
        ("imported_policy", "import", "--hf", base, "--policy", policy, "--pp", "2"),
        ("resharded", "reshard", "--checkpoint", "imported_policy", "--tp", "2"),
        ("exported", "export", "--checkpoint", "imported"),
        ("exported_policy", "export", "--checkpoint", "resharded"),
        ("exported_adapter", "export", "--checkpoint", policy, "--hf", base, "--adapters", "keep"),
    ):
        command(["convert", *map(str, argv), "--out", name, "--quiet"], out / "convert" / f"{name}.txt")
        save_files(Path(name), out / "convert" / name)
    save_files(policy, out / "convert" / "policy")
    rule = ["--prompt", "ab0", "--exits", "threshold:0.3", "--max-new-tokens", "8"]
    command(["generate", "--model", "exported_policy", *rule], out / "generate.txt")
    # The page shows clocks, which are in these files.
    for path in Path("runs/golden").glob("*/timings.jsonl"):
        path.unlink()
    results = stage_of(RUNS["evaluate"]) / "results.json"
    results.write_text(re.sub(r'("tokens_per_s": )[\d.e+-]+', r"\1null", results.read_text()))
    command(["report", *SETTINGS, *CHOICE], out / "report.txt")
    save(out / "report.html", Path("runs/golden/report.html").read_text())


def command(argv: list[str], out: Path, settings: bool = False) -> None:
    """What a command prints, and its exit code. `settings`: it prints them as YAML, which gets a file of its own."""
    printed, wrong, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(wrong):
        try:
            code = interface("main")(argv)
        except SystemExit as end:
            code = end.code
    text = printed.getvalue()
    if settings:
        save(out.with_suffix(".json"), flat(yaml.safe_load(text) or {}))
        text = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    save(out, f"{text}{wrong.getvalue()}exit code {code}\n")


def save(out: Path, text: str) -> None:
    """Write a golden file, without places and clocks."""
    for place, name in ((os.getcwd(), "SCRATCH"), (os.environ["PYTHONPATH"], "TREE"), (socket.gethostname(), "HOST")):
        text = text.replace(place, name)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(CLOCKS.sub("", text))


def save_files(folder: Path, out: Path, pattern: str = "**/*") -> None:
    """The files of a folder: JSON as text, SHA-256 of all others."""
    lines = list[str]()
    for path in sorted(path for path in folder.glob(pattern) if path.is_file()):
        if path.suffix == ".json":
            save(out / path.relative_to(folder), readable(path))
        else:
            lines.append(f"{path.relative_to(folder)}: {hashlib.sha256(path.read_bytes()).hexdigest()}\n")
    save(out / "files.txt", "".join(lines))


def readable(path: Path) -> str:
    """A file's text; JSON as a line for each key."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        return flat([json.loads(line) for line in text.splitlines()])
    return flat(json.loads(text)) if path.suffix == ".json" else text


def flat(value: Any) -> str:
    """JSON as sorted lines "path: value", without the keys in DROPPED; a list of plain values is one value."""

    def lines(value: Any, path: str) -> Iterator[str]:
        if isinstance(value, list) and any(isinstance(part, dict | list) for part in value):
            value = {f"{i:03}": part for i, part in enumerate(value)}
        if not isinstance(value, dict) or not value:
            yield f"{path}: {json.dumps(value, ensure_ascii=False)}\n"
            return
        for key, part in value.items():
            if key not in DROPPED:
                yield from lines(part, f"{path}.{key}" if path else str(key))

    return "".join(sorted(lines(value, "")))


def compare(a: Path, b: Path, renamed: Path | None = None) -> list[str]:
    """What differs: a line for each file that one set lacks, a short diff for each other one. `renamed`: a file of
    lines "old new", names in `a` (of settings, metrics, commands) and what they are in `b`; then neither spaces nor the
    order of keys count. Raises ValueError for other lines in it."""
    lines = [line.partition("#")[0].split() for line in renamed.read_text().splitlines()] if renamed else []
    if wrong := [" ".join(words) for words in lines if len(words) not in (0, 2)]:
        raise ValueError(f"{renamed}: {wrong[0]!r}: expected an old and a new name on each line")
    renames: dict[str, str] = dict(words for words in lines if words)
    names = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, sorted(renames, key=len, reverse=True)))})(?!\w)")

    def read(folder: Path, changed: dict[str, str]) -> dict[str, list[str]]:
        found = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            parts = [str(path.relative_to(folder)), path.read_text()]
            name, text = (names.sub(lambda match: changed[match[1]], part) for part in parts) if changed else parts
            lines = (re.sub(r"[ \t]+", " ", text) if renames else text).splitlines()
            found[name] = sorted(lines) if renames and path.suffix in (".json", ".jsonl") else lines
        return found

    old, new, said = read(a, renames), read(b, {}), list[str]()
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            said.append(f"{name}: only in {a if name in old else b}")
        elif old[name] != new[name]:
            diff = [f"  {line[:300]}" for line in difflib.unified_diff(old[name], new[name], lineterm="", n=0)][2:]
            more = [f"  ... {len(diff) - LINES} more lines"] if len(diff) > LINES else []
            said += [f"{name}: differs", *diff[:LINES], *more]
    return said


def check_sets(base: str) -> tuple[Path, Path]:
    """The sets of a commit, which is made once, and of the working tree. Raises ValueError: no such commit."""
    git = ["git", "-C", str(ROOT)]
    asked = subprocess.run([*git, "rev-parse", "--verify", f"{base}^{{commit}}"], capture_output=True, text=True)
    if asked.returncode:
        raise ValueError(f"BASE={base}: no such commit; give one, as in BASE=HEAD~3")
    commit, goldens = asked.stdout.strip(), ROOT / "runs" / "goldens"
    made_by = f"{Path(__file__).read_text()} {importlib.metadata.version('torch')} {socket.gethostname()}"
    old, new = goldens / f"{commit[:12]}-{hashlib.sha256(made_by.encode()).hexdigest()[:8]}", goldens / "working"
    if not old.is_dir():
        print(f"goldens of {base}, {commit[:12]} ...", flush=True)
        with tempfile.TemporaryDirectory(prefix="base.") as tree:
            archive = subprocess.run([*git, "archive", commit], stdout=subprocess.PIPE, check=True).stdout
            subprocess.run(["tar", "-x", "-C", tree], input=archive, check=True)
            write(old, Path(tree).resolve())
    print("goldens of the working tree ...", flush=True)
    write(new, ROOT)
    return old, new


def main() -> int:
    if sys.argv[1:2] == ["_make"]:
        return make(*map(Path, sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("write", help="make the set of this tree").add_argument("out", type=Path)
    checked = commands.add_parser("check", help="what differs between a commit and the working tree")
    checked.add_argument("--base", default="HEAD", help="a commit (default: HEAD)")
    checked.add_argument("--renames", type=Path, help='a file of lines "old new"')
    options = parser.parse_args()
    try:
        if options.command == "write":
            write(options.out, ROOT)
            return 0
        said = compare(*check_sets(options.base), options.renames)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(said) or "no difference")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
