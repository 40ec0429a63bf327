"""The converter's command line: Hugging Face <-> Megatron, exports, layouts, inspection, comparison.

Weights pass through block by block, on one CPU process, whatever the model's size. Anything that does not fit is one
line on stderr and exit code 2, and nothing half-written stays behind. Exit code 1: `verify` or `roundtrip` found a
difference, `inspect` numbers that aren't finite.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from .arguments import Parser
from .checkpoint.workspace import check_output, partial_of
from .config import hub
from .config.errors import lines_of
from .interrupts import interruptible

# torch, transformers and megatron-core take seconds to import: each command does when it has read its arguments.
if TYPE_CHECKING:
    import torch

    from .checkpoint.policy_files import Policy
    from .exits import ExitLayout
    from .tensors import ModelSource

DTYPES = ("float32", "bfloat16", "float16")
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
# What errors of the training configuration call by the names of its settings has flags here.
FLAGS = {"parallel.pipeline=": "--pp x --vpp = ", "exits.depths": "--exit-depths"}
# Arguments that may name a run or a stage of one.
NAMED = ("checkpoint", "policy", "hf", "config", "a", "b", "directory")


def _command(words: list[str]) -> str:
    """The command for a model card, without what makes no difference to the result."""
    shown: list[str] = []
    for before, word in pairwise(["", *words]):
        if word not in ("--resume", "--quiet", "--out") and before != "--out" and not word.startswith("--out="):
            shown.append(word)
    return shlex.join(["ee-megatron", "convert", *shown])


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command; returns the exit code: 0, 1 (a difference or damage was found), 2 (an error, one line) or
    130 (interrupted)."""
    args = _parser().parse_args(argv)
    args.command = _command(sys.argv[1:] if argv is None else argv)
    out = Path(args.out) if "out" in args else None
    try:
        with interruptible():
            if out is not None:
                check_output(out)
            for name in NAMED:
                if given := vars(args).get(name):
                    # Policies and Megatron checkpoints are local.
                    at_hub = name not in ("checkpoint", "policy")
                    given = hub.pin(f"--{name}", given, whole=name != "config") if at_hub else given
                    setattr(args, name, _named(hub.directory(given)))
            return args.run(args)
    except KeyboardInterrupt:
        left = partial_of(out) if out else None
        more = f"; finished parts are in {left}; the same command with --resume continues"
        print(f"interrupted{more if left and left.is_dir() else ''}", file=sys.stderr)
        return 130
    except (OSError, ValueError, SafetensorError) as error:
        text = "; ".join(lines_of(error))
        for setting, flag in FLAGS.items():
            text = text.replace(setting, flag)
        print(f"error: {text}", file=sys.stderr)
        return 2


def _named(path: Path) -> Path:
    """The directory that a path stands for: of a stage, or of a run's furthest stage, the model that it made or its
    newest policy checkpoint; any other path itself. Raises FileNotFoundError for a run that has no policy yet."""
    itself = any((path / name).exists() for name in ("config.json", "policy.json", "weights"))
    if itself or not ((path / "config.yaml").is_file() or any(path.glob("*/config.yaml"))):
        return path
    from .inference.model_resolver import stage_of
    from .training.stages import policy_at

    stage = stage_of(path)
    assert stage is not None, "path holds no policy itself"
    made = stage / "model"
    return made if (made / "config.json").is_file() else policy_at(str(path), str(stage))


def _base_of(policy: Path) -> Path:
    """The model that a policy checkpoint of a run was made on. Raises FileNotFoundError or ValueError for any other."""
    from .inference.model_resolver import stage_of
    from .policy import read_policy_json
    from .training.stages import trained

    # First, because it raises for a directory that holds no policy.
    read_policy_json(policy)
    stage = stage_of(policy)
    if stage is None:
        raise ValueError(f"{policy} holds a policy without its base model; add --hf BASE")
    return trained(stage)[1]


def _import(args: argparse.Namespace) -> int:
    from .checkpoint.megatron_read import ForeignMegatron
    from .checkpoint.sources import HFSource

    if not (args.hf or args.megatron or args.policy):
        raise ValueError("nothing to import; give --hf or --megatron, or --policy with a run's policy")
    if not (args.hf or args.megatron):
        args.hf = _base_of(args.policy)
    if args.config and not args.megatron:
        raise ValueError(f"--config {args.config}: only with --megatron; --hf has its own config.json")
    source: ModelSource = HFSource(args.hf) if args.hf else ForeignMegatron(args.megatron, args.config)
    return _write(args, source, _import_policy(args, source))


def _import_policy(args: argparse.Namespace, source: ModelSource) -> Policy:
    """Adapters and gates of an import: from --policy, from the directory, fresh if requested, or none."""
    from .checkpoint.policy_files import no_policy, policy_on
    from .checkpoint.sources import gates_of
    from .exits import ExitLayout
    from .policy import PolicySpec, initial_policy

    layers, fresh = source.dims.num_layers, args.exit_depths or args.gates == "fresh"
    if args.gates == "drop":
        if args.exit_depths or args.policy:
            raise ValueError("--gates drop makes a plain checkpoint; remove --exit-depths and --policy")
        return no_policy(layers)
    given = policy_on(source, args.policy, args.base_unchecked) if args.policy else gates_of(source)
    if given is not None and fresh:
        raise ValueError(
            f"{args.policy or args.hf} brings its own exit depths and gates; remove --exit-depths and --gates fresh"
        )
    if given is not None or not fresh:
        return given or no_policy(layers)
    exits = ExitLayout(layers, args.exit_depths) if args.exit_depths else ExitLayout.default(layers, args.pp * args.vpp)
    spec = PolicySpec(layers, exits.depths, rank=0)
    return spec, initial_policy(source.dims, spec, seed=0)


def _reshard(args: argparse.Namespace) -> int:
    from .checkpoint.megatron_read import MegatronDirectory
    from .checkpoint.policy_files import policy_beside

    source = MegatronDirectory(args.checkpoint)
    return _write(args, source, policy_beside(source, args.base_unchecked))


def _write(args: argparse.Namespace, source: ModelSource, policy: Policy) -> int:
    from .checkpoint.megatron_write import CheckpointLayout, write_megatron

    exits = _boundaries(source.dims.num_layers, policy, args.pp, args.vpp)
    layout = CheckpointLayout.plan(source.dims, exits, args.tp, args.pp, args.vpp)
    dtype = _torch_dtype(args.dtype)
    meter = write_megatron(source, Path(args.out), policy, layout, dtype, resume=args.resume, quiet=args.quiet)
    degrees = f"TP {layout.tensor} x PP {layout.pipeline}" + (f" x VPP {layout.virtual}" if layout.virtual > 1 else "")
    dims, depths = source.dims, list(policy[0].exit_depths)
    gates = f"exits at {depths}" if depths else "no gates"
    print(f"{args.out}: {dims.family}, {dims.num_layers} layers, {gates}, {degrees}")
    if len(layout.stage_layers) > 1:
        print(f"layers per stage: {list(layout.stage_layers)}")
    print(meter.line())
    return 0


def _boundaries(layers: int, policy: Policy, pipeline: int, virtual: int) -> ExitLayout:
    """Possible stage boundaries: the model's exits; even cuts for a plain model."""
    from .exits import ExitLayout

    if policy[0].exit_depths:
        return policy[0].layout
    stages = pipeline * virtual
    if stages > layers:
        raise ValueError(f"--pp {pipeline} --vpp {virtual}: {stages} stages, but the model has {layers} layers")
    return ExitLayout(layers, tuple(round(layers * stage / stages) for stage in range(1, stages)))


def _export(args: argparse.Namespace) -> int:
    from .checkpoint.hf_export import SHARD_BYTES, export_hf
    from .checkpoint.model_card import Provenance
    from .checkpoint.store import read_manifest
    from .inference.model_resolver import chosen_exits, evaluation_of
    from .policy import untrained_gates

    checkpoint, gates = Path(args.checkpoint), args.gates
    base, policy = _export_parts(args)
    exits = policy[0].exit_depths
    if gates == "auto" and untrained_gates(*policy):
        raise ValueError(
            f"{checkpoint}: its gates were never trained; train them, or use --gates drop for the plain model or "
            "--gates embed for the gates as they are"
        )
    if gates in ("embed", "sidecar") and not exits:
        raise ValueError(f"{checkpoint} has no gates, but --gates {gates} requires them; use --gates drop")
    out = export_hf(
        base,
        policy,
        Path(args.out),
        args.adapters,
        gates if exits else "drop",
        args.dtype,
        shard_bytes=args.max_shard_size or SHARD_BYTES,
        base_name=args.base_name,
        resume=args.resume,
        quiet=args.quiet,
        exit_policy=chosen_exits(checkpoint).to_json(),
        made=Provenance(args.command, *evaluation_of(checkpoint)),
    )
    manifest = read_manifest(out)
    print(f"{out}: adapters {args.adapters}, gates {manifest['gates']}, {len(manifest['tensors'])} tensors")
    print(manifest["speed"])
    return 0


def _export_parts(args: argparse.Namespace) -> tuple[ModelSource, Policy]:
    """Base and policy of an export: both from a Megatron checkpoint, or a policy and its base (--hf or its run's)."""
    from .checkpoint.describe import open_base
    from .checkpoint.megatron_read import MegatronDirectory, refuse_foreign
    from .checkpoint.policy_files import base_identity, policy_beside, policy_on
    from .checkpoint.sources import is_megatron

    checkpoint = Path(args.checkpoint)
    if not is_megatron(checkpoint):
        refuse_foreign(checkpoint)
        base = open_base(args.hf or _base_of(checkpoint))
        return base, policy_on(base, checkpoint, args.base_unchecked)
    base = MegatronDirectory(checkpoint)
    if args.hf and not base_identity(open_base(args.hf)).same(base_identity(base)):
        raise ValueError(f"{args.hf} is another model than {checkpoint}, which has its own base; remove --hf")
    return base, policy_beside(base, args.base_unchecked)


def _inspect(args: argparse.Namespace) -> int:
    import torch

    from .checkpoint.describe import describe

    kind, rows, facts = describe(Path(args.directory), not args.no_hash)
    wide = max((len(row.name) for row in rows), default=0)
    stored = max((len(row.stored) for row in rows), default=0)
    differ = any(row.name != row.stored for row in rows)
    print(f"{args.directory}: {kind}")
    for row in rows:
        where = f"  {row.stored if row.stored != row.name else '':<{stored}}" if differ else ""
        says = row.sha256[:16] + ("" if row.finite else "  NaN or infinite")
        print(f"{row.name:<{wide}}{where}  {row.dtype:<9} {row.shape!s:<16} {says}".rstrip())
    numbers = sum(torch.Size(row.shape).numel() for row in rows)
    print(f"{len(rows)} tensors, {numbers:,} numbers" + "".join(f", {name} {value}" for name, value in facts.items()))
    if damaged := [row.name for row in rows if not row.finite]:
        more = f" and {len(damaged) - 1} more of {len(rows)} tensors" if len(damaged) > 1 else ""
        print(
            f"{args.directory}: NaN or infinite numbers in {damaged[0]}{more}; expected finite ones; make the model "
            "again, with --dtype bfloat16 or float32 if a cast to float16 did it",
            file=sys.stderr,
        )
    return 1 if damaged else 0


def _verify(args: argparse.Namespace) -> int:
    from .checkpoint.describe import open_checkpoint, verify
    from .checkpoint.sources import is_megatron

    policies = [path for path in (args.a, args.b) if (path / "policy.json").is_file() and not is_megatron(path)]
    bases = {path: args.hf or _base_of(path) for path in policies}
    a, b = (open_checkpoint(path, bases.get(path), args.base_unchecked) for path in (args.a, args.b))
    same, lines = verify(a, b, logits=not args.no_logits)
    for line in lines:
        print(line, file=sys.stdout if same else sys.stderr)
    print(f"{args.a} and {args.b} are {'the same model' if same else 'DIFFERENT'}")
    return 0 if same else 1


def _roundtrip(args: argparse.Namespace) -> int:
    from .checkpoint.hf_export import export_hf
    from .checkpoint.megatron_read import MegatronDirectory
    from .checkpoint.megatron_write import CheckpointLayout, write_megatron
    from .checkpoint.policy_files import no_policy
    from .checkpoint.sources import HFSource
    from .checkpoint.store import tensor_sha256

    source = HFSource(args.hf)
    policy = no_policy(source.dims.num_layers)
    exits = _boundaries(source.dims.num_layers, policy, args.pp, 1)
    layout = CheckpointLayout.plan(source.dims, exits, args.tp, args.pp)
    with tempfile.TemporaryDirectory(prefix="roundtrip.", dir=args.work, ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        write_megatron(source, work / "megatron", policy, layout, quiet=args.quiet)
        export_hf(MegatronDirectory(work / "megatron"), policy, work / "hf", gates="drop", quiet=args.quiet)
        back = HFSource(work / "hf")
        wrong = [name for name in source if tensor_sha256(source.tensor(name)) != tensor_sha256(back.tensor(name))]
    if wrong:
        print(f"error: {len(wrong)} of {len(source)} tensors differ after the round trip: {wrong[:3]}", file=sys.stderr)
        return 1
    print(f"{args.hf}: {len(source)} tensors came back equal, bit for bit, by TP {args.tp} x PP {args.pp}")
    return 0


def _depths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers with commas between, as in 7,14,21") from None


def _torch_dtype(name: str) -> torch.dtype | None:
    """None: as each tensor is stored."""
    import torch

    return None if name == "auto" else getattr(torch, name)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    unit = UNITS.get(match.group(2)) if match else None
    if match is None or unit is None or not 1 <= float(match.group(1)) * unit < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size, as in 5GB or 500MB")
    return int(float(match.group(1)) * unit)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="ee-megatron convert", description="Convert between Hugging Face and Megatron checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, text: str, run: Callable[..., int], *examples: str) -> argparse.ArgumentParser:
        shown = "".join(f"\n  ee-megatron convert {name} {example}" for example in examples)
        form = argparse.RawDescriptionHelpFormatter
        made = commands.add_parser(name, help=text, description=text, epilog=f"examples:{shown}", formatter_class=form)
        made.set_defaults(run=run)
        return made

    def policies(add: Any) -> None:
        add("--base-unchecked", action="store_true", help="accept a policy that was trained on another base model")

    def writes(add: Any) -> None:
        add("--out", required=True, help="output directory, which must not exist")
        words = f"or {', '.join(SHORT)}; auto: each tensor's stored dtype (default: auto)"
        add("--dtype", type=lambda text: SHORT.get(text, text), choices=("auto", *DTYPES), default="auto", help=words)
        add("--resume", action="store_true", help="continue an interrupted conversion")
        add("--quiet", action="store_true", help="no lines of progress")

    def layout(add: Any) -> None:
        add("--tp", type=int, default=1, help="tensor-parallel degree of the checkpoint (default: 1)")
        add("--pp", type=int, default=1, help="pipeline-parallel degree; stages end at exits (default: 1)")
        add("--vpp", type=int, default=1, help="virtual stages per pipeline rank (default: 1)")

    shown = "--hf models/SmolLM2-135M-Instruct --pp 2 --out ours", "--megatron theirs --config hf --out ours"
    made = command("import", "Hugging Face, Megatron-LM or -Bridge model -> Megatron checkpoint", _import, *shown)
    base, add = made.add_mutually_exclusive_group(), made.add_argument
    base.add_argument("--hf", help="Hugging Face model directory or hub id, or an early-exit export")
    base.add_argument("--megatron", help="checkpoint of Megatron-LM or Megatron-Bridge (torch_dist)")
    add("--config", help="with --megatron: directory with the model's config.json and tokenizer")
    writes(add)
    layout(add)
    words = "auto: those of --policy or the model, if any; fresh: untrained ones; drop: none (default: auto)"
    add("--gates", choices=("auto", "fresh", "drop"), default="auto", help=words)
    add("--exit-depths", type=_depths, help="depths of fresh gates, for example 7,14,21 (default: every fifth layer)")
    words = "policy checkpoint, stage or run whose adapters and gates are included; without --hf a run's base, too"
    add("--policy", help=words)
    policies(add)

    shown = "--checkpoint runs/demo_cpu --out exported", "--checkpoint runs/demo_cpu --adapters keep --out adapter"
    words = "policy or Megatron checkpoint -> Hugging Face model or PEFT adapter"
    add = command("export", words, _export, *shown).add_argument
    words = "run (runs/NAME), stage of one, policy checkpoint, or Megatron checkpoint"
    add("--checkpoint", required=True, help=words)
    add("--hf", help="base model of a policy checkpoint (default: its run's)")
    policies(add)
    writes(add)
    add("--adapters", choices=("merge", "keep"), default="merge", help="default: merge; keep: a PEFT adapter")
    words = "embed: in the model; sidecar: a file beside it; drop: none; auto: embed, with --adapters keep sidecar"
    add("--gates", choices=("auto", "embed", "sidecar", "drop"), default="auto", help=words)
    add("--max-shard-size", type=_size, help="largest weight file, as in 5GB (default: 4GiB)")
    add("--base-name", help="the base model's name in a PEFT adapter and in README.md: on the hub, or its directory")

    words = "Megatron checkpoint -> the same for another parallel layout"
    add = command("reshard", words, _reshard, "--checkpoint megatron --tp 2 --pp 2 --out resharded").add_argument
    add("--checkpoint", required=True, help="Megatron checkpoint")
    policies(add)
    writes(add)
    layout(add)

    add = command("verify", "check whether two models are the same", _verify, "runs/demo_cpu exported").add_argument
    add("a", help="Hugging Face model, early-exit export, Megatron or policy checkpoint, stage or run")
    add("b", help="another one")
    add("--hf", help="base model of policy checkpoints (default: their run's)")
    policies(add)
    add("--no-logits", action="store_true", help="compare tensors only; needs little memory")

    add = command("inspect", "print a model's tensors, layout and exit depths", _inspect, "runs/demo_cpu").add_argument
    add("directory")
    add("--no-hash", action="store_true", help="read headers only; values are not checked")

    add = command("roundtrip", "import, export again, compare all tensors", _roundtrip, "--hf hf --pp 2").add_argument
    add("--hf", required=True, help="Hugging Face model directory or hub id")
    add("--tp", type=int, default=1, help="tensor-parallel degree in between (default: 1)")
    add("--pp", type=int, default=1, help="pipeline-parallel degree in between (default: 1)")
    add("--work", help="directory for the copies, twice the model's size (default: a temporary one)")
    add("--quiet", action="store_true", help="no lines of progress")
    return parser
