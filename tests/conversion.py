"""What the tests of the converter share: small models and policies, commands, and what they read and left."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ee_megatron.checkpoint.policy_files import base_identity
from ee_megatron.checkpoint.sources import WEIGHTS
from ee_megatron.checkpoint.store import tensor_sha256
from ee_megatron.convert import main
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec, save_policy
from tests.reference import random_policy
from tests.tiny import tiny_hf

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
LAST = "model-00003-of-00003.safetensors"
SMALL = {"hidden": 32, "intermediate": 48}


class Harm:
    """Where this is unpickled by executing what it names, a file `harm` appears in the working directory."""

    def __reduce__(self):
        return Path.touch, (Path("harm"),)


def run(*words: object) -> int:
    """`ee-megatron convert` with these words, text split at its spaces: its exit code."""
    return main([part for word in words for part in (word.split() if isinstance(word, str) else [str(word)])])


def made(*words: object) -> None:
    assert run(*words) == 0, words


def refused(capsys, *words: object, names: tuple[str, ...]) -> None:
    """Exit code 2 and one line on stderr that has these names in it."""
    capsys.readouterr()
    assert run(*words) == 2, words
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and not shown.out, (words, shown)
    assert all(name in shown.err for name in names), (words, names, shown.err)


def hashes(folder: Path) -> dict[str, str]:
    """Tensor -> digest of a Hugging Face directory."""
    source = HFDirectory(folder)
    return {name: tensor_sha256(source.tensor(name)) for name in source.names()}


def contents(folder: Path) -> dict[str, str | None]:
    """Whatever lies below a directory, files with their digests."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in folder.rglob("*")
    }


def edit(file: Path | str, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Tensors of a safetensors file, changed in place."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def cast(folder: Path, *dtypes: torch.dtype) -> Path:
    """The model there, rounded to one dtype after the other."""
    for dtype in dtypes:
        edit(folder / MODEL, lambda tensors, to=dtype: tensors.update({n: t.to(to) for n, t in tensors.items()}))
    return folder


def fields(file: Path | str, **changes: Any) -> None:
    """Fields of a JSON file, changed in place."""
    Path(file).write_text(json.dumps(json.loads(Path(file).read_text()) | changes))


def in_shards(folder: Path) -> Path:
    """The model there in three files and an index."""
    tensors = load_file(folder / MODEL)
    (folder / MODEL).unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{1 + 3 * i // len(names):05d}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def policy_on(
    base: Path, folder: Path, spec: PolicySpec, size: float = 0.2, owner: Path | None = None, seed: int = 1
) -> Path:
    """A random policy: adapters, or a base that has been trained on; gates with hazards round one half. It says that
    it belongs to `owner`, if that is given."""
    source = HFDirectory(base)
    tensors = random_policy(source.dims, spec, seed, size)
    if spec.full:
        tensors |= {name: source.tensor(name).float() + 0.05 * tensors[name] for name in source.dims.tensor_shapes()}
    folder.mkdir(exist_ok=True)
    record: Mapping[str, str] | None = base_identity(HFDirectory(owner)).to_json() if owner else None
    save_policy(folder, spec, tensors, record)
    return folder


def foreign(tmp: Path, family: str = "qwen3", tied: bool = False) -> tuple[Path, Path]:
    """A model, and the directory that Megatron-LM would have made of it in ten iterations."""
    base = tiny_hf(family, tmp / "foreign", tied=tied, layers=2, vocab=130, **SMALL)
    made("import --exit-depths 1 --hf", base, "--out", tmp / "unsaved")
    saved = tmp / "saved"
    saved.mkdir()
    shutil.move(tmp / "unsaved" / WEIGHTS, saved / "iter_0000010")
    (saved / "latest_checkpointed_iteration.txt").write_text("10\n")
    shutil.rmtree(tmp / "unsaved")
    return base, saved
