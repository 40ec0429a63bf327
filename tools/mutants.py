"""Plant faults, one at a time, that the fast tests must catch; tools/mutants.toml lists them.

    python tools/mutants.py [--only NAME ...] [--jobs N]
    python tools/mutants.py --list

Each fault replaces one text in a copy of the tree, where the tests of the files that the list names for it run, as in
`make test`, until the first failure. The same tests first run in a copy without a fault. Exits with 1 if these
fail or a fault survives, with 2 if a fault does not fit the code. A change to such code takes its entry in the list
along. --list prints the table in CONTRIBUTING.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_suffix(".toml")
# What a copy shares with the tree: not in git, and not changed by tests.
SHARED = (".venv", "models")
# What `make test` runs, with as many examples.
SELECTED, EXAMPLES = "not slow and not extended", {"EE_TESTS": "quick"}
# Seconds for a fault's tests, or so many times as long as they take without it; later counts as caught.
LIMIT_S, SLOWER = 900.0, 5
RUNNING: set[subprocess.Popen[bytes]] = set()


@dataclass(frozen=True)
class Mutant:
    """A fault: `old`, which is in `file` once, becomes `new`. `fault` says what goes wrong; `rooms` name sets of test
    files in the list's [tests]; `test` is a test in them that has to fail."""

    name: str
    fault: str
    file: str
    old: str
    new: str
    rooms: tuple[str, ...]
    test: str

    def planted(self, text: str) -> str:
        """The file's text with the fault. Raises ValueError unless `old` is in it exactly once and `new` differs."""
        count = text.count(self.old)
        if count != 1 or self.new == self.old:
            raise ValueError(
                f"{LIST.name}, {self.name}: its old text is {count} times in {self.file}, expected once and a new one "
                "that differs; if the code has moved on, write the same fault into today's code"
            )
        return text.replace(self.old, self.new)


class Outcome(NamedTuple):
    """Of a test run. failed: the first test that failed, or its limit where that ended it; "" if all passed."""

    seconds: float
    failed: str = ""


def read_list(path: Path = LIST) -> tuple[dict[str, list[str]], list[Mutant]]:
    """Test files by room, and the faults. Raises ValueError for an entry that is not one."""
    data = tomllib.loads(path.read_text())
    rooms: dict[str, list[str]] = data["tests"]
    mutants = []
    for entry in data["mutant"]:
        try:
            mutants.append(Mutant(**{**entry, "rooms": tuple(entry["rooms"])}))
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path.name}, {entry.get('name', 'an entry without a name')}: {error}") from None
        if unknown := set(mutants[-1].rooms) - set(rooms):
            raise ValueError(f"{path.name}, {mutants[-1].name}: no rooms {sorted(unknown)} in [tests]")
    if len({mutant.name for mutant in mutants}) < len(mutants):
        raise ValueError(f"{path.name}: two faults have one name; expected a name for each")
    return rooms, mutants


def table(mutants: Sequence[Mutant]) -> str:
    rows = [f"| {m.name} | {m.fault} | `{m.file.removeprefix('ee_megatron/')}` | `{m.test}` |" for m in mutants]
    return "\n".join(("| name | fault | in | caught by |", "|---|---|---|---|", *rows))


def copy_tree(to: Path) -> None:
    """The tree as git knows it, files that are not added yet included, with today's contents."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.split("\0"):
        source = ROOT / name
        # Links in the place of shared directories are files to git.
        if name and name not in SHARED and source.is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, to / name)
            shutil.copymode(source, to / name)
    for name in SHARED:
        if (ROOT / name).exists():
            (to / name).symlink_to((ROOT / name).resolve())


def run_tests(files: Sequence[str], limit: float, mutant: Mutant | None = None) -> Outcome:
    """Run test files in a copy of the tree until one test fails. Raises RuntimeError if pytest could not run them."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        tree = Path(name)
        copy_tree(tree)
        if mutant is not None:
            path = tree / mutant.file
            path.write_text(mutant.planted(path.read_text()))
        # What tests start, too, is to import the copy, not the tree that is installed.
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= EXAMPLES
        environment.pop("PYTEST_ADDOPTS", None)
        if mutant is not None and mutant.file.endswith(".c"):
            # Compiled kernels are kept by the hash of their source: no faulty ones where the sound ones are.
            environment["XDG_CACHE_HOME"] = str(tree / ".cache")
        command = [sys.executable, "-m", "pytest", "-x", "-m", SELECTED, "-rfE", "--tb=no", "-p", "no:cacheprovider"]
        with tempfile.TemporaryFile("w+") as output:
            begun, late = time.monotonic(), False
            # A group of its own: what a test leaves running ends with it.
            running = subprocess.Popen(
                [*command, *files], cwd=tree, env=environment, stdout=output, stderr=output, start_new_session=True
            )
            RUNNING.add(running)
            try:
                running.wait(limit)
            except subprocess.TimeoutExpired:
                late = True
            finally:
                end(running)
            output.seek(0)
            said = output.read()
    seconds = time.monotonic() - begun
    if late:
        return Outcome(seconds, f"the limit of {limit:.0f} s")
    if running.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {running.returncode}: {said[-2000:]}")
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", said, re.MULTILINE)
    return Outcome(seconds, found[1] if found else "a test" if running.returncode else "")


def end(running: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    RUNNING.discard(running)


def check(mutants: Sequence[Mutant], rooms: dict[str, list[str]], jobs: int, limit: float = LIMIT_S) -> int:
    """Run all and print what became of each; the number of faults that survived. Raises RuntimeError if tests fail
    without a fault."""
    used = sorted({room for mutant in mutants for room in mutant.rooms})
    survived, sound = 0, dict[str, float]()

    def plant(mutant: Mutant) -> Outcome:
        # On a busy machine a run that is only slow must not be taken for one that hangs.
        longest = max(limit, SLOWER * sum(sound[room] for room in mutant.rooms))
        return run_tests([file for room in mutant.rooms for file in rooms[room]], longest, mutant)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for room, outcome in zip(used, pool.map(lambda room: run_tests(rooms[room], limit), used), strict=True):
                print(f"no fault   {outcome.seconds:5.0f} s  {room}", flush=True)
                sound[room] = outcome.seconds
                if outcome.failed:
                    raise RuntimeError(f"{outcome.failed} stopped the tests of {room} without a fault; mend that first")
            for mutant, outcome in zip(mutants, pool.map(plant, mutants), strict=True):
                survived += not outcome.failed
                verdict, what = ("caught  ", outcome.failed) if outcome.failed else ("SURVIVED", mutant.fault)
                print(f"{verdict}   {outcome.seconds:5.0f} s  {mutant.name}: {what}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for running in list(RUNNING):
                end(running)
            raise
    return survived


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults to plant (default: all)")
    parser.add_argument("--list", action="store_true", help="print the table of faults and plant none")
    parser.add_argument("--jobs", type=int, default=2, help="faults planted at a time, a copy for each (default: 2)")
    options = parser.parse_args(arguments)
    try:
        rooms, mutants = read_list()
        if unknown := set(options.only or ()) - {mutant.name for mutant in mutants}:
            names = ", ".join(mutant.name for mutant in mutants)
            raise ValueError(f"--only {' '.join(sorted(unknown))}: expected one or more of {names}")
        if options.jobs < 1:
            raise ValueError(f"--jobs {options.jobs}: expected 1 or more")
        for mutant in mutants:
            mutant.planted((ROOT / mutant.file).read_text())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.list:
        print(table(mutants))
        return 0
    chosen = [mutant for mutant in mutants if not options.only or mutant.name in options.only]
    try:
        survived = check(chosen, rooms, options.jobs)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"{len(chosen) - survived} of {len(chosen)} faults caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
