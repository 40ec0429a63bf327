"""With two workers the tests of a file stay on one, and what takes long begins first: both end about together."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import PurePath

import pytest

# By name of file, longest first.
LONG = (
    "test_whole_method", "test_pool_*", "test_updates", "test_rank_failure", "test_sweep_local", "test_plan_measured",
    "test_pretrain_ranks", "test_gpu_check", "test_exits_that_answer", "test_choice_of_style",
)  # fmt: skip
# One file of these at a time: their tests look at the clock.
ALONE = "test_pool_*"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((i for i, pattern in enumerate(LONG) if fnmatch(item.path.stem, pattern)), len(LONG))

    items.sort(key=place)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Files, not tests, are dealt out: fixtures of a module are made once."""
    # Here, since the package is only there where tests run on several workers.
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            stem = PurePath(nodeid.split("::", 1)[0]).stem
            return ALONE if fnmatch(stem, ALONE) else stem

    return ByFile(config, log)
