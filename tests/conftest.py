"""With two workers the tests of a file stay on one, and what takes long begins first: both end about together."""

from __future__ import annotations

from fnmatch import fnmatch

import pytest

# By name of file, longest first.
LONG = (
    "test_whole_method", "test_pool_*", "test_updates", "test_pretend_gpu", "test_rank_failure", "test_sweep_local",
    "test_pretrain_ranks",
)  # fmt: skip
# One file of these at a time: their tests look at the clock.
ALONE = "test_pool_*"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((i for i, pattern in enumerate(LONG) if fnmatch(item.path.stem, pattern)), len(LONG))

    items.sort(key=place)
    for item in items:
        group = ALONE if fnmatch(item.path.stem, ALONE) else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
