"""The converter's command line: Hugging Face <-> Megatron, exports, layouts, inspection, comparison.

Weights pass through block by block, on one CPU process, whatever the model's size. Anything that does not fit is one
line on stderr and exit code 2, and nothing half-written stays behind. Exit code 1: `verify` or `roundtrip` found a
difference.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..arguments import Parser
from ..exits import ExitLayout
from ..policy import PolicySpec, initial_policy
from .describe import describe, open_checkpoint
from .hf_export import DTYPES, SHARD_BYTES, export_hf
from .manifest import read_manifest, tensor_sha256
from .megatron_directory import CheckpointLayout, MegatronDirectory
from .megatron_import import gates_of, write_megatron
from .megatron_io import WEIGHTS
from .policy_files import Policy, open_policy, policy_beside
from .sources import HFSource, TensorSource

SHORT = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command; returns the exit code: 0, 1 (a difference was found) or 2 (an error, one line)."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (OSError, ValueError, SafetensorError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _import(args: argparse.Namespace) -> int:
    source = HFSource(args.hf)
    return _write(args, source, _import_policy(args, source))


def _import_policy(args: argparse.Namespace, source: HFSource) -> Policy:
    """Adapters and gates of an import: given, brought along by the directory, or fresh."""
    given = open_policy(args.policy) if args.policy else gates_of(source)
    if given is not None:
        if args.exit_depths or args.rank:
            raise ValueError(
                f"{args.policy or args.hf} brings its own exit depths and gates; leave --exit-depths and --rank out"
            )
        return given
    layers = source.dims.num_layers
    if args.pp < 1 or args.vpp < 1:
        raise ValueError(f"--pp {args.pp} --vpp {args.vpp}: must be at least 1")
    exits = ExitLayout(layers, args.exit_depths) if args.exit_depths else ExitLayout.default(layers, args.pp * args.vpp)
    spec = PolicySpec(layers, exits.depths, rank=args.rank, alpha=float(args.alpha or 2 * args.rank))
    return spec, initial_policy(source.dims, spec, args.seed)


def _reshard(args: argparse.Namespace) -> int:
    source = MegatronDirectory(args.checkpoint)
    return _write(args, source, policy_beside(source))


def _write(args: argparse.Namespace, source: TensorSource, policy: Policy) -> int:
    layout = CheckpointLayout.plan(source.dims, policy[0].layout, args.tp, args.pp, args.vpp)
    meter = write_megatron(
        source, Path(args.out), policy, layout, SHORT.get(args.dtype), resume=args.resume, quiet=args.quiet
    )
    degrees = f"TP {layout.tensor} x PP {layout.pipeline}" + (f" x VPP {layout.virtual}" if layout.virtual > 1 else "")
    dims, exits = source.dims, list(policy[0].exit_depths)
    print(f"{args.out}: {dims.family}, {dims.num_layers} layers, exits at {exits}, {degrees}")
    print(meter.line())
    return 0


def _export(args: argparse.Namespace) -> int:
    checkpoint, gates = Path(args.checkpoint), args.gates
    base: TensorSource | str
    if (checkpoint / WEIGHTS).is_dir():
        base = MegatronDirectory(checkpoint)
        if args.hf and HFSource(args.hf).dims != base.dims:
            raise ValueError(
                f"{args.hf} has other dimensions than {checkpoint}, which holds its own base; leave --hf out"
            )
        policy = policy_beside(base)
        if gates == "auto" and not (checkpoint / "policy.json").is_file():
            gates = "drop"
    else:
        policy = open_policy(checkpoint)
        if not args.hf:
            raise ValueError(f"{checkpoint} holds a policy without its base model; add --hf BASE")
        base = args.hf
    out = export_hf(
        base,
        policy,
        Path(args.out),
        args.adapters,
        gates,
        args.dtype,
        shard_bytes=args.max_shard_size,
        resume=args.resume,
        quiet=args.quiet,
    )
    manifest = read_manifest(out)
    print(f"{out}: adapters {args.adapters}, gates {manifest['gates']}, {len(manifest['tensors'])} tensors")
    print(manifest["speed"])
    return 0


def _inspect(args: argparse.Namespace) -> int:
    kind, rows, facts = describe(Path(args.directory), not args.no_hash)
    wide, stored = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
    differ = any(row[0] != row[1] for row in rows)
    print(f"{args.directory}: {kind}")
    for name, place, shape, dtype, sha256 in rows:
        where = f"  {place if place != name else '':<{stored}}" if differ else ""
        print(f"{name:<{wide}}{where}  {dtype:<9} {shape!s:<16} {sha256[:16]}".rstrip())
    numbers = sum(torch.Size(row[2]).numel() for row in rows)
    print(f"{len(rows)} tensors, {numbers:,} numbers" + "".join(f", {name} {value}" for name, value in facts.items()))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from .verify import verify

    a, b = (open_checkpoint(Path(path), args.hf) for path in (args.a, args.b))
    same, lines = verify(a, b, logits=not args.no_logits)
    for line in lines:
        print(line, file=sys.stdout if same else sys.stderr)
    print(f"{args.a} and {args.b} are {'the same model' if same else 'DIFFERENT'}")
    return 0 if same else 1


def _roundtrip(args: argparse.Namespace) -> int:
    source = HFSource(args.hf)
    exits = ExitLayout.default(source.dims.num_layers, args.pp)
    spec = PolicySpec(source.dims.num_layers, exits.depths, rank=0)
    layout = CheckpointLayout.plan(source.dims, exits, args.tp, args.pp)
    with tempfile.TemporaryDirectory(prefix="roundtrip.", dir=args.work, ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        policy = spec, initial_policy(source.dims, spec, 0)
        write_megatron(source, work / "megatron", policy, layout, quiet=args.quiet)
        export_hf(MegatronDirectory(work / "megatron"), policy, work / "hf", gates="drop", quiet=args.quiet)
        back = HFSource(work / "hf")
        wrong = []
        for name in source.names():
            if tensor_sha256(source.tensor(name)) != tensor_sha256(back.tensor(name)):
                wrong.append(name)
            source.release()
            back.release()
    if wrong:
        total = len(source.names())
        print(f"error: {len(wrong)} of {total} tensors differ after the round trip: {wrong[:3]}", file=sys.stderr)
        return 1
    print(f"{args.hf}: {len(source.names())} tensors came back equal, bit for bit, by TP {args.tp} x PP {args.pp}")
    return 0


def _depths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected numbers with commas between them, as in 7,14,21"
        ) from None


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    unit = UNITS.get(match.group(2)) if match else None
    if match is None or unit is None or float(match.group(1)) * unit < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size, as in 5GB or 500MB")
    return int(float(match.group(1)) * unit)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="ee-megatron convert", description="Convert between Hugging Face and Megatron checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = _command(commands, "import", "Hugging Face model -> Megatron checkpoint", _import)
    command.add_argument("--hf", required=True, help="Hugging Face model directory, or an early-exit export")
    _writes(command, SHORT)
    _layout(command)
    command.add_argument("--exit-depths", type=_depths, help="for example 7,14,21; default: every fifth layer")
    command.add_argument("--policy", help="policy checkpoint whose adapters and gates are taken along")
    command.add_argument("--rank", type=int, default=0, help="rank of fresh adapters; 0: none")
    command.add_argument("--alpha", type=float, help="scale of fresh adapters; default: twice the rank")
    command.add_argument("--seed", type=int, default=0, help="seed of fresh gates and adapters")

    command = _command(
        commands, "export", "policy or Megatron checkpoint -> Hugging Face model or PEFT adapter", _export
    )
    command.add_argument("--checkpoint", required=True, help="policy checkpoint or Megatron checkpoint")
    command.add_argument("--hf", help="base model; not needed with a Megatron checkpoint")
    _writes(command, DTYPES)
    command.add_argument("--adapters", choices=("merge", "keep"), default="merge")
    command.add_argument("--gates", choices=("auto", "embed", "sidecar", "drop"), default="auto")
    command.add_argument(
        "--max-shard-size", type=_size, default=SHARD_BYTES, help="largest weight file, as in 5GB (default: 4GiB)"
    )

    command = _command(commands, "reshard", "Megatron checkpoint -> the same for another parallel layout", _reshard)
    command.add_argument("--checkpoint", required=True, help="Megatron checkpoint")
    _writes(command, SHORT)
    _layout(command)

    command = _command(commands, "verify", "whether two checkpoints of any kind are the same model", _verify)
    command.add_argument("a", help="Hugging Face model, early-exit export, Megatron or policy checkpoint")
    command.add_argument("b", help="another one")
    command.add_argument("--hf", help="base model of policy checkpoints")
    command.add_argument("--no-logits", action="store_true", help="compare tensors only; needs little memory")

    command = _command(commands, "inspect", "table of tensors, shapes, dtypes, hashes; layout, exit depths", _inspect)
    command.add_argument("directory")
    command.add_argument("--no-hash", action="store_true", help="read headers only")

    command = _command(commands, "roundtrip", "import and export again; every tensor must come back equal", _roundtrip)
    command.add_argument("--hf", required=True, help="Hugging Face model directory")
    command.add_argument("--tp", type=int, default=1, help="tensor-parallel degree on the way")
    command.add_argument("--pp", type=int, default=1, help="pipeline-parallel degree on the way")
    command.add_argument("--work", help="where the copies are made (needs twice the model's size)")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _command(commands, name: str, text: str, run) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def _writes(command: argparse.ArgumentParser, dtypes: dict[str, torch.dtype]) -> None:
    command.add_argument("--out", required=True, help="directory to make")
    command.add_argument("--dtype", choices=("auto", *dtypes), default="auto", help="default: as each tensor is stored")
    command.add_argument("--resume", action="store_true", help="go on from what a killed run left")
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def _layout(command: argparse.ArgumentParser) -> None:
    command.add_argument("--tp", type=int, default=1, help="tensor-parallel degree that the files are cut for")
    command.add_argument("--pp", type=int, default=1, help="pipeline-parallel degree; checked against the exits")
    command.add_argument("--vpp", type=int, default=1, help="virtual stages per pipeline rank")
