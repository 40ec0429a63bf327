"""Files are dealt out to workers by what they took when last measured (durations.csv), the longest first."""

from __future__ import annotations

import csv
import os
import signal
import sys
from collections import Counter
from pathlib import Path, PurePath

import pytest

DURATIONS = Path(__file__).with_name("durations.csv")
# Files that look at the clock: one of them at a time.
ALONE = "test_pool_"
seconds: Counter[str] = Counter()


def pytest_configure(config: pytest.Config) -> None:
    """`make test` has EE_TESTS=quick: fewer examples, and the same ones every time."""
    from hypothesis import settings

    # Started in the background by a shell, tests ignore interrupts, and those that raise one would wait for ever.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True)
    settings.register_profile("full", deadline=None)
    settings.load_profile(os.environ.get("EE_TESTS", "full"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--measure", action="store_true", help="write what files took into tests/durations.csv")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    known = {}
    if DURATIONS.is_file():
        with DURATIONS.open(newline="") as file:
            known = {row["file"]: float(row["seconds"]) for row in csv.DictReader(file)}
    items.sort(key=lambda item: -known.get(_group(item.nodeid), 0.0))


def pytest_runtest_call(item: pytest.Item) -> None:
    """One thread, whatever an earlier test has set: on shared cores, threads that wait for one another burn them."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    seconds[_group(report.nodeid)] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--measure") and not hasattr(session.config, "workerinput"):
        rows = "".join(f"{name},{took:.1f}\n" for name, took in seconds.most_common() if took >= 1)
        DURATIONS.write_text(f"file,seconds\n{rows}")


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Files, not tests, are dealt out: fixtures of a module are made once."""
    # Here, since the package is only there where tests run on several workers.
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return ByFile(config, log)


def _group(nodeid: str) -> str:
    stem = PurePath(nodeid.split("::", 1)[0]).stem
    return ALONE if stem.startswith(ALONE) else stem
