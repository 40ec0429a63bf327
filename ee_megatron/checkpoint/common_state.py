"""common.pt of a Megatron checkpoint: what is not a tensor. Megatron-LM keeps its arguments there.

It is a pickle that names classes of whatever wrote it. Ours names `argparse.Namespace`; what others wrote is read here
without importing or calling anything that it names.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

COMMON = "common.pt"
# A plain container that may hold what is asked for.
_KNOWN = {("collections", "OrderedDict"): OrderedDict}


class Inert:
    """Stands for an object of any other class: its attributes, and none of its behaviour.

    `Inert.of` is the name of its class; `arguments` what it was made of, which for an enum is its value.
    """

    of = ""
    arguments: tuple[Any, ...]

    def __new__(cls, *arguments: Any, **named: Any) -> Inert:
        made = super().__new__(cls)
        made.arguments = (*arguments, *named.values())
        return made

    def __setstate__(self, state: Any) -> None:
        # Objects with slots have a pair of dictionaries.
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update(part)

    def __call__(self, *_: Any, **__: Any) -> Inert:
        """A method, fetched by name and called: another object of which nothing is known."""
        return Inert()

    def append(self, item: Any) -> None:
        """Nothing, like the two below: what a subclass of a container contains isn't needed."""

    def extend(self, items: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _KNOWN.get((module, name)) or type("Inert", (Inert,), {"of": f"{module}.{name}"})

    def persistent_load(self, _: Any) -> None:
        """A tensor's numbers: nothing that is asked for."""


def write_common(folder: Path, content: dict[str, Any]) -> None:
    torch.save(content, folder / COMMON)


def read_common(folder: Path) -> dict[str, Any]:
    """What common.pt holds, objects being `Inert`; nothing if there is none. Raises ValueError, one line: damaged."""
    path = folder / COMMON
    if not path.is_file():
        return {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            with archive.open(names[0]) as file:
                content = _Unpickler(file).load()
    # An unpickler of damaged bytes raises whatever its operations raise.
    except Exception as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: cannot be read ({text}); the checkpoint is damaged, save it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dict; the checkpoint is damaged")
    return content
