"""The paged cache by itself: what rows write is theirs wherever their pages lie, and memory comes and goes with it."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ee_megatron.families import ModelDims
from ee_megatron.rollout.engine.cache import PAGE, SPARE, TABLE, KVCache

DIMS = ModelDims("llama", 2, 8, 8, 2, 2, 4, 16, 4096, 1e-6, 1e4)
CPU = torch.device("cpu")
ROWS = 5

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mappings are resized on Linux")


def contents(cache: KVCache, row: int, length: int) -> torch.Tensor:
    """Keys and values [L, length, 2, KVH, hd] of a row, read by its table."""
    pages = cache.table[row, : -(-length // PAGE)]
    return torch.stack([layer[pages].transpose(1, 2).flatten(0, 1)[:length] for layer in cache.layers])


@given(
    steps=st.lists(
        st.tuples(st.integers(0, ROWS - 1), st.integers(0, 150), st.booleans(), st.none() | st.integers(0, ROWS - 1)),
        max_size=40,
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    mapped=st.booleans(),
)
def test_rows_keep_what_they_wrote_through_growth_release_and_moves(steps, dtype, mapped):
    cache = KVCache(DIMS, ROWS, dtype, CPU)
    if not mapped:
        cache._maps = []
    written: dict[int, torch.Tensor] = {}
    for number, (row, more, leaves, source) in enumerate(steps):
        if leaves:
            cache.release(row)
            written.pop(row, None)
        elif source in written and row not in written:
            # Of the whole pages the first half, at least one if there is one.
            pages = (written[source].shape[1] // PAGE + 1) // 2
            cache.share(source, row, pages)
            written[row] = written[source][:, : pages * PAGE]
        elif more:
            before = written.get(row, torch.zeros(2, 0, 2, 2, 4, dtype=dtype))
            new = torch.full((2, more, 2, 2, 4), number + 1.0, dtype=dtype) + torch.arange(2)[:, None].to(dtype)
            start = before.shape[1]
            cache.hold([row], [start + more])
            cache.fill(row, start, new[:, :, 0], -new[:, :, 1])
            new[:, :, 1] *= -1
            written[row] = torch.cat([before, new], 1)
        if number % 3 == 0:
            cache.trim()
            assert cache.pages <= cache.used + 2 * (cache.used // SPARE) + 1
        for other, expected in written.items():
            assert torch.equal(contents(cache, other, expected.shape[1]), expected)
        rows = [cache.table[r, : cache.held[r]].tolist() for r in range(ROWS)]
        assert all(len(set(pages)) == len(pages) for pages in rows)
        held = set().union(*rows)
        assert len(held) == cache.used and sorted([*held, *cache._free]) == list(range(cache.pages))


def test_pages_that_rows_share_are_free_when_the_last_has_left():
    cache = KVCache(DIMS, 3, torch.float32, CPU, limit=5)
    cache.hold([0], [3 * PAGE])
    cache.share(0, 1, 2)
    cache.share(1, 2, 2)
    cache.hold([1, 2], [2 * PAGE + 1, 2 * PAGE + 1])
    assert cache.used == 2 + 3
    for row, left in ((0, 4), (2, 3), (1, 0)):
        cache.release(row)
        assert cache.used == left


def test_the_place_of_a_position_is_its_page_and_the_offset_in_it():
    cache = KVCache(DIMS, 3, torch.float32, CPU)
    for positions in (10, 30, 50):
        cache.hold([0, 2], [positions, positions])
    where = cache.where([2, 0], [40, 3])
    assert where.shape == (2, TABLE + 3) and where[:, :2].tolist() == [[2, 40], [0, 3]]
    assert where[0, 2] == cache.table[2, 2] and where[:, 3].tolist() == [8, 3]
    assert np.array_equal(where[:, TABLE:].numpy(), cache.table[[2, 0], :3])
    with pytest.raises(ValueError, match=r"\b64\b"):
        cache.where([0], [64])


def test_a_limit_holds_and_nothing_is_done_past_it():
    cache = KVCache(DIMS, 3, torch.float32, CPU, limit=4)
    cache.hold([0], [40])
    with pytest.raises(ValueError, match=r"\b5\b.*\b4\b"):
        cache.hold([1, 2], [10, 10])
    cache.hold([1], [16])
    assert cache.pages == cache.used == 4 and not cache.held[2]


def test_memory_that_is_given_back_leaves_the_process():
    def resident() -> int:
        return int(open("/proc/self/statm").read().split()[1]) * 4096

    cache = KVCache(DIMS, 3, torch.float32, CPU)
    before = resident()
    for positions in range(10_000, 400_001, 10_000):
        cache.hold([0], [positions])
        for layer in cache.layers:
            layer.fill_(1)
    size = 400_000 // PAGE * cache.page_bytes
    assert 0.9 * size < resident() - before < 1.15 * size
    cache.release(0)
    cache.trim()
    assert resident() - before < 0.1 * size
