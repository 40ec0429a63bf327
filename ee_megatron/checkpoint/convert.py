"""The converter's command line: Hugging Face <-> Megatron, exports, inspection.

    convert import --hf DIR --out DIR [--tp N --pp N] [--exit-depths 7,14,21] [--policy DIR] [--dtype bf16|fp32]
    convert export --checkpoint DIR [--hf BASE] --out DIR [--adapters merge|keep] [--gates embed|sidecar|drop]
    convert inspect DIR
    convert roundtrip --hf DIR

Anything that does not fit is one line on stderr and exit code 2, and nothing half-written stays behind.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..exits import ExitLayout
from ..families import ModelDims
from ..families.hf_directory import HFDirectory
from ..policy import PolicySpec, initial_policy, load_policy, save_policy
from .hf_export import check_policy, export_hf
from .manifest import (
    MANIFEST,
    Ledger,
    copy_tokenizer,
    entry,
    read_manifest,
    tensor_sha256,
    whole_directory,
    write_manifest,
)
from .mapping import load_base
from .megatron_io import KIND, WEIGHTS, MegatronDirectory, build_whole, save_weights, single_process, whole_entries

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command; returns the exit code: 0, 1 (roundtrip found a difference) or 2 (an error, one line)."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def import_hf(
    source: HFDirectory,
    out: Path,
    policy: tuple[PolicySpec, dict[str, Tensor]],
    dtype: torch.dtype | None = None,
    tensor: int = 1,
    pipeline: int = 1,
) -> Path:
    """Hugging Face model and policy -> Megatron checkpoint directory (see megatron_io), whole or not at all.

    The weights can be loaded under any layout; `tensor` and `pipeline` name the one that is intended and must fit the
    model. dtype None: as the embedding is stored. Raises ValueError for a layout or policy that does not fit.
    """
    spec, tensors = policy
    check_policy(source.dims, spec, tensors)
    check_degrees(source.dims, tensor)
    stages = spec.layout.stage_sizes(pipeline)
    dtype = dtype or source.tensor("model.embed_tokens.weight").dtype
    ledger = Ledger(base=source.names())
    with whole_directory(out) as folder:
        (folder / WEIGHTS).mkdir()
        with single_process():
            model = build_whole(source.dims, dtype)
            load_base(model, source)
            parameters = dict(model.named_parameters())
            lines = {}
            for item in whole_entries(source.dims):
                sources = ledger.take(*(f"base:{name}" for name in item.names))
                lines[item.parameter] = entry(parameters[item.parameter], sources, WEIGHTS)
            ledger.close()
            save_weights(model, folder / WEIGHTS)
        save_policy(folder, spec, tensors)
        lines |= {name: entry(value, [f"policy:{name}"], "policy.safetensors") for name, value in tensors.items()}
        (folder / "config.json").write_text(json.dumps(source.config, indent=2) + "\n")
        copied = copy_tokenizer(source.path, folder)
        layout = {"tensor": tensor, "pipeline": pipeline, "stage_layers": list(stages)}
        write_manifest(folder, KIND, lines, exit_depths=list(spec.exit_depths), layout=layout, copied=copied)
    return out


def check_degrees(dims: ModelDims, tensor: int) -> None:
    """Raises ValueError unless heads, key-value heads and the MLP divide by the tensor-parallel degree."""
    if tensor < 1:
        raise ValueError(f"--tp {tensor}: must be at least 1")
    for field, size in (
        ("num_attention_heads", dims.heads),
        ("num_key_value_heads", dims.kv_heads),
        ("intermediate_size", dims.intermediate),
    ):
        if size % tensor:
            fits = [n for n in range(1, dims.kv_heads + 1) if not (dims.kv_heads % n or dims.intermediate % n)]
            raise ValueError(f"--tp {tensor}: {field}={size} does not divide by it; choose one of {fits}")


def _import(args: argparse.Namespace) -> int:
    source = HFDirectory(args.hf)
    if args.policy:
        if args.exit_depths or args.rank:
            raise ValueError("--policy brings its own exit depths and adapters; leave --exit-depths and --rank out")
        policy = load_policy(args.policy)
    else:
        layers = source.dims.num_layers
        if args.pp < 1:
            raise ValueError(f"--pp {args.pp}: must be at least 1")
        layout = ExitLayout(layers, args.exit_depths) if args.exit_depths else ExitLayout.default(layers, args.pp)
        spec = PolicySpec(layers, layout.depths, rank=args.rank, alpha=float(args.alpha or 2 * args.rank))
        policy = (spec, initial_policy(source.dims, spec, args.seed))
    out = import_hf(source, Path(args.out), policy, DTYPES.get(args.dtype), args.tp, args.pp)
    print(f"{out}: {source.dims.family}, {source.dims.num_layers} layers, exits at {list(policy[0].exit_depths)}")
    return 0


def _export(args: argparse.Namespace) -> int:
    checkpoint = Path(args.checkpoint)
    policy = load_policy(checkpoint)
    base: HFDirectory | MegatronDirectory
    if (checkpoint / WEIGHTS).is_dir():
        base = MegatronDirectory(checkpoint)
        if args.hf and HFDirectory(args.hf).dims != base.dims:
            raise ValueError(
                f"{args.hf} has other dimensions than {checkpoint}, which holds its own base; leave --hf out"
            )
    elif args.hf:
        base = HFDirectory(args.hf)
    else:
        raise ValueError(f"{checkpoint} holds a policy without its base model; add --hf BASE")
    out = export_hf(base, policy, Path(args.out), args.adapters, args.gates, args.dtype)
    manifest = read_manifest(out)
    print(f"{out}: adapters {args.adapters}, gates {manifest['gates']}, {len(manifest['tensors'])} tensors")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    folder = Path(args.directory)
    kind, rows, facts = describe(folder)
    width = max((len(name) for name, _, _ in rows), default=0)
    print(f"{folder}: {kind}")
    for name, shape, dtype in rows:
        print(f"{name:<{width}}  {dtype:<9} {shape}")
    numbers = sum(torch.Size(shape).numel() for _, shape, _ in rows)
    print(f"{len(rows)} tensors, {numbers:,} numbers" + "".join(f", {name} {value}" for name, value in facts.items()))
    return 0


def describe(folder: Path) -> tuple[str, list[tuple[str, list[int], str]], dict[str, object]]:
    """Kind of a directory, its tensors (name, shape, dtype) and facts about it. Raises ValueError if it is of no kind.

    A Megatron checkpoint is read whole and compared with its manifest; other kinds are read from their headers.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such directory")
    facts: dict[str, object] = {}
    if (folder / WEIGHTS).is_dir() or (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        if manifest["kind"] == KIND:
            MegatronDirectory(folder)
            load_policy(folder)
        rows = [(name, line["shape"], line["dtype"]) for name, line in manifest["tensors"].items()]
        keys = ("exit_depths", "layout", "adapters", "gates")
        return manifest["kind"], rows, {key: manifest[key] for key in keys if key in manifest}
    if (folder / "policy.json").is_file():
        spec, tensors = load_policy(folder)
        facts = {"exit_depths": list(spec.exit_depths), "rank": spec.rank, "alpha": spec.alpha}
        return "policy", [_row(name, tensor) for name, tensor in tensors.items()], facts
    source = HFDirectory(folder)
    rows = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            rows += [_row(name, handle.get_tensor(name)) for name in handle.keys()]  # noqa: SIM118
    if "exit_depths" in source.config:
        facts["exit_depths"] = source.config["exit_depths"]
    return f"hugging face {source.config['model_type']}", rows, facts


def _row(name: str, tensor: Tensor) -> tuple[str, list[int], str]:
    return name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def _roundtrip(args: argparse.Namespace) -> int:
    source = HFDirectory(args.hf)
    layout = ExitLayout.default(source.dims.num_layers)
    spec = PolicySpec(source.dims.num_layers, layout.depths, rank=0)
    work = Path(tempfile.mkdtemp(prefix="roundtrip."))
    try:
        import_hf(source, work / "megatron", (spec, initial_policy(source.dims, spec, 0)))
        base = MegatronDirectory(work / "megatron")
        export_hf(base, load_policy(work / "megatron"), work / "hf", gates="drop")
        back = HFDirectory(work / "hf")
        names = source.names()
        wrong = [name for name in names if tensor_sha256(source.tensor(name)) != tensor_sha256(back.tensor(name))]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if wrong or sorted(names) != sorted(back.names()):
        print(f"error: {len(wrong)} of {len(names)} tensors differ after the round trip: {wrong[:3]}", file=sys.stderr)
        return 1
    print(f"{args.hf}: {len(names)} tensors came back equal, bit for bit")
    return 0


def _depths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected numbers with commas between them, as in 7,14,21"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ee-megatron convert", description="Convert between Hugging Face and Megatron checkpoints."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("import", help="Hugging Face model -> Megatron checkpoint")
    command.add_argument("--hf", required=True, help="Hugging Face model directory")
    command.add_argument("--out", required=True, help="directory to make")
    command.add_argument("--tp", type=int, default=1, help="intended tensor-parallel degree; checked against the model")
    command.add_argument(
        "--pp", type=int, default=1, help="intended pipeline-parallel degree; checked against the exits"
    )
    command.add_argument("--exit-depths", type=_depths, help="for example 7,14,21; default: every fifth layer")
    command.add_argument("--policy", help="policy checkpoint whose adapters and gates are taken along")
    command.add_argument("--rank", type=int, default=0, help="rank of fresh adapters; 0: none")
    command.add_argument("--alpha", type=float, help="scale of fresh adapters; default: twice the rank")
    command.add_argument("--seed", type=int, default=0, help="seed of fresh gates and adapters")
    command.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    command.set_defaults(run=_import)

    command = commands.add_parser("export", help="policy or Megatron checkpoint -> Hugging Face model or PEFT adapter")
    command.add_argument("--checkpoint", required=True, help="policy checkpoint or Megatron checkpoint")
    command.add_argument("--hf", help="base model; not needed with a Megatron checkpoint")
    command.add_argument("--out", required=True, help="directory to make")
    command.add_argument("--adapters", choices=("merge", "keep"), default="merge")
    command.add_argument("--gates", choices=("auto", "embed", "sidecar", "drop"), default="auto")
    command.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    command.set_defaults(run=_export)

    command = commands.add_parser("inspect", help="table of tensors, shapes, dtypes; exit depths")
    command.add_argument("directory")
    command.set_defaults(run=_inspect)

    command = commands.add_parser("roundtrip", help="import and export again; every tensor must come back equal")
    command.add_argument("--hf", required=True, help="Hugging Face model directory")
    command.set_defaults(run=_roundtrip)
    return parser
