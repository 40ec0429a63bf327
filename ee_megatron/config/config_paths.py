"""Path of the shipped configs. Without Hydra, which vLLM's own environment doesn't have."""

from __future__ import annotations

import os
from pathlib import Path

ENVIRONMENT_VARIABLE = "EE_CONFIG_DIR"


def find_config_dir(config_dir: Path | None = None) -> Path:
    """The directory that holds config.yaml, absolute. Raises FileNotFoundError with the places that were searched."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    directory = config_dir or (Path(named) if named else _own_configs())
    directory = Path(directory).resolve()
    if not (directory / "config.yaml").is_file():
        raise FileNotFoundError(
            f"{directory}: no config.yaml there; install the package anew, or set {ENVIRONMENT_VARIABLE} "
            "to the configs directory of a checkout"
        )
    return directory


def _own_configs() -> Path:
    """Inside an installed package, beside that of a checkout (setup.py)."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.with_name("configs")


def shipped(path: str | Path) -> Path:
    """Resolve a setting's path: configs/... is the package's own if the working directory has none."""
    given = Path(path)
    if given.parts[:1] != ("configs",) or given.exists():
        return given
    packaged = find_config_dir().joinpath(*given.parts[1:])
    return packaged if packaged.exists() else given


def list_groups(directory: Path) -> dict[str, list[str]]:
    """Config groups and the choices of each: {"experiment": ["demo_cpu", ...], ...}."""
    folders = sorted(path for path in directory.iterdir() if path.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}
