"""Fill a folder with the wheels that `make gpu-check` needs beside torch, for a machine without a network.

    python tools/gpu_wheels.py --out wheels --python 3.12

Versions are those of the environment that this runs in, which the tests ran with. What torch brings along, and numpy,
is taken to be on that machine and left out. It is an x86-64 Linux with glibc 2.28 or newer.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# What the check imports itself; tests/integration/test_gpu_check.py runs it with nothing else.
ROOTS = ("transformers", "megatron-core", "deepspeed", "rich")
THERE = ("torch", "numpy")
# Published as a source archive only; without its compiled operations it is plain Python.
FROM_SOURCE = ("deepspeed",)
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(28, 16, -1)] + ["manylinux2014_x86_64"]
LIMIT_MIB = 60


def needed(roots: Iterable[str], python: str, leave_out: frozenset[str] = frozenset()) -> Iterator[str]:
    """Canonical names of `roots` (requirements, with their extras) and of what they need on a Python, each once.

    Raises ValueError for a root that isn't installed here.
    """
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    waiting = [(Requirement(root), "") for root in roots]
    first, seen, done = len(waiting), set(leave_out), set[tuple[str, str]]()
    while waiting:
        (requirement, extra), first = waiting.pop(0), first - 1
        if requirement.marker and not requirement.marker.evaluate({**environment, "extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name in leave_out:
            continue
        if name not in seen:
            yield name
            seen.add(name)
        try:
            lines = distribution(name).requires or []
        except PackageNotFoundError:
            if first >= 0:
                raise ValueError(f"{name} is not installed here; run this in the project's environment") from None
            continue
        for wanted in {"", *requirement.extras} - {extra for known, extra in done if known == name}:
            done.add((name, wanted))
            waiting += [(Requirement(line), wanted) for line in lines]


def pinned(name: str) -> str:
    """The version that is installed here, without a local build's mark; the bare name of what only the other Python
    needs."""
    try:
        return f"{name}=={version(name).split('+')[0]}"
    except PackageNotFoundError:
        return name


def pip(*arguments: str, **environment: str) -> None:
    """Raises ValueError with pip's own last lines."""
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"pip {arguments[0]} failed: " + " ".join(done.stderr.strip().splitlines()[-2:]))


def fill(out: Path, python: str) -> float:
    """Replace what is in `out`; MiB that the wheels take. Raises ValueError if they are too large or can't be had."""
    there = frozenset(needed(THERE, python))
    names = list(needed(ROOTS, python, there))
    with tempfile.TemporaryDirectory() as scratch:
        target = [f"--platform={platform}" for platform in PLATFORMS]
        target += ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
        binary = [pinned(name) for name in names if name not in FROM_SOURCE]
        pip("download", "--dest", scratch, *target, *binary)
        for name in FROM_SOURCE:
            pip("wheel", "--wheel-dir", scratch, "--no-build-isolation", pinned(name), DS_BUILD_OPS="0")
        found = sorted(Path(scratch).glob("*.whl"))
        compiled = [w.name for w in found if w.name.startswith(FROM_SOURCE) and not w.name.endswith("-none-any.whl")]
        if compiled:
            raise ValueError(f"{compiled[0]} was compiled for this machine; expected a wheel of plain Python")
        size = sum(wheel.stat().st_size for wheel in found) / 2**20
        if size > LIMIT_MIB:
            largest = max(found, key=lambda wheel: wheel.stat().st_size)
            raise ValueError(
                f"the wheels take {size:.1f} MiB, more than {LIMIT_MIB}; {largest.name} is the largest: leave it out "
                "of ROOTS in tools/gpu_wheels.py, or add what the machine has to THERE"
            )
        out.mkdir(parents=True, exist_ok=True)
        for old in out.glob("*.whl"):
            old.unlink()
        for wheel in found:
            shutil.copy(wheel, out / wheel.name)
    return size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("wheels"))
    parser.add_argument("--python", default=".".join(map(str, sys.version_info[:2])), help="of the machine, e.g. 3.12")
    options = parser.parse_args()
    if not re.fullmatch(r"3\.\d+", options.python):
        print(f"error: --python {options.python}: expected a version such as 3.12", file=sys.stderr)
        return 2
    try:
        size = fill(options.out, options.python)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    count = len(list(options.out.glob("*.whl")))
    print(f"{options.out}: {count} wheels for Python {options.python}, {size:.1f} MiB of at most {LIMIT_MIB}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
