"""Paged key/value cache of the decoder: a row's pages may lie anywhere in the pool, and rows with a common beginning
may share pages. `Slots` assigns slots to rows."""

from __future__ import annotations

import heapq
import math
import mmap
import sys
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...config.derive import position_bytes
from ...families import ModelDims
from ...kernels import LANES
from ...tensors import to_device

if TYPE_CHECKING:
    from .request import Row

# Positions of a page: what the compiled attention reads at a time, so that none of its steps crosses pages.
PAGE = LANES
# The pool grows by 1/SPARE of the pages in use, and shrinks once more than twice that is free.
SPARE = 32
# Columns before the pages in the result of `where`: slot, position, and the position's page and offset.
TABLE = 4


def pages_for(positions: int) -> int:
    """Number of pages that so many positions take."""
    return -(-positions // PAGE)


def pages_in(gib: float, dims: ModelDims, item: int) -> int:
    """Number of pages that fit so much memory, with elements of `item` bytes."""
    return int(gib * 2**30 / (PAGE * position_bytes(dims, item)))


def pool_pages(held: int) -> int:
    """Pages to allocate for a pool that is to hold so many."""
    return held + held // SPARE


class KVCache:
    """Paged cache. layers: one tensor [P, 2, PAGE, KVH, hd] of keys and values per layer; table int64 [R, most]: the
    pages of each row in the order of its positions, of which the first held[r] count.

    Entries past a row's length are finite leftovers (zeros or an earlier row's) that attention never reads or masks.
    `limit`: pages that the pool may have at most; None: no limit.
    """

    def __init__(self, dims: ModelDims, rows: int, dtype: torch.dtype, device: torch.device, limit: int | None = None):
        self.device, self.dtype, self.limit, self.pages = device, dtype, limit, 0
        self._reserved = False
        self.table = np.zeros((rows, 1), dtype=np.int64)
        self.held = np.zeros(rows, dtype=np.int64)
        # Rows that hold each page.
        self._holders = np.zeros(0, dtype=np.int64)
        self._shape = (2, PAGE, dims.kv_heads, dims.head_dim)
        # A heap: the lowest are taken first, so that the pool's end becomes free.
        self._free: list[int] = []
        # Linux moves a mapping by its page tables: growing costs no copy and never takes the memory twice.
        mapped = device.type == "cpu" and sys.platform == "linux"
        self._maps = [_map(mmap.PAGESIZE) for _ in range(dims.num_layers)] if mapped else []
        self.layers = [torch.zeros(0, *self._shape, dtype=dtype, device=device) for _ in range(dims.num_layers)]
        self.addresses = np.zeros(dims.num_layers, dtype=np.int64)
        """Of each layer's tensor, for the compiled kernels."""

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return len(self.layers) * math.prod(self._shape) * self.dtype.itemsize

    @property
    def used(self) -> int:
        """Number of pages that rows hold; shared pages count once."""
        return self.pages - len(self._free)

    def reserve(self) -> None:
        """Allocate all that `limit` allows, and keep it, so that nothing else in this process can take it later. On
        Linux's CPUs that is address space, and memory only once a page is used. Raises OSError or torch's error."""
        assert self.limit is not None
        self._resize(self.limit)
        self._reserved = True

    def hold(self, rows: Sequence[int], positions: Sequence[int]) -> None:
        """Allocate pages to rows (distinct) for so many positions each. ValueError past the limit, nothing changed."""
        wanted = [(row, n) for row, p in zip(rows, positions, strict=True) if (n := pages_for(p)) > self.held[row]]
        if not wanted:
            return
        needed = self.used + sum(n - int(self.held[row]) for row, n in wanted)
        if needed > self.pages:
            if self.limit is not None and needed > self.limit:
                raise ValueError(f"{needed} pages of {PAGE} positions requested of a cache of {self.limit}; enlarge it")
            self._resize(min(pool_pages(needed), self.limit or sys.maxsize))
        most, width = max(n for _, n in wanted), self.table.shape[1]
        if most > width:
            self.table = np.pad(self.table, ((0, 0), (0, max(most, 2 * width) - width)))
        for row, n in wanted:
            for block in range(self.held[row], n):
                page = self.table[row, block] = heapq.heappop(self._free)
                self._holders[page] = 1
            self.held[row] = n

    def share(self, source: int, row: int, pages: int) -> None:
        """Let a row without pages share another's first ones, whole ones that neither writes again."""
        assert not self.held[row] and pages <= self.held[source], (source, row, pages)
        self.table[row, :pages], self.held[row] = self.table[source, :pages], pages
        self._holders[self.table[row, :pages]] += 1

    def release(self, row: int) -> None:
        """Free a row's pages, except those that other rows share."""
        pages = self.table[row, : self.held[row]]
        self._holders[pages] -= 1
        for page in pages[self._holders[pages] == 0].tolist():
            heapq.heappush(self._free, page)
        # Gathers read whole tables, and what is past a row's pages must lie in the pool.
        self.table[row], self.held[row] = 0, 0

    def trim(self) -> None:
        """Free memory if much of it is unused; the pages at the pool's end move, so tables read before are void."""
        used = self.used
        if self._reserved:
            return
        keep = max(1, pool_pages(used))
        if self.pages <= used + 2 * (used // SPARE) + 1:
            return
        moved = (np.arange(self.table.shape[1]) < self.held[:, None]) & (self.table >= keep)
        source, which = np.unique(self.table[moved], return_inverse=True)
        free = sorted(page for page in self._free if page < keep)
        target, self._free = np.array(free[: len(source)], dtype=np.int64), free[len(source) :]
        if len(source):
            self.table[moved] = target[which]
            self._holders[target] = self._holders[source]
            old, new = to_device((torch.from_numpy(source), torch.from_numpy(target)), self.device)
            for layer in self.layers:
                layer[new] = layer[old]
        self._resize(keep)

    def where(self, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Locations of one position of each row, which has pages for it: int64 [A, TABLE + blocks] on the cache's
        device: row, position, page, offset, then the row's pages up to that of the furthest position of all. Raises
        ValueError for a position without a page."""
        slots, at = np.asarray(rows, dtype=np.int64), np.asarray(positions, dtype=np.int64)
        blocks = at // PAGE
        lacking = blocks >= self.held[slots]
        if lacking.any():
            raise ValueError(f"position {int(at[lacking][0])} has no page in the cache; call `hold` first")
        places = np.empty((len(slots), TABLE + 1 + int(blocks.max())), dtype=np.int64)
        places[:, 0], places[:, 1], places[:, 2], places[:, 3] = slots, at, self.table[slots, blocks], at % PAGE
        places[:, TABLE:] = self.table[slots, : places.shape[1] - TABLE]
        return to_device(torch.from_numpy(places), self.device)

    @torch.inference_mode()
    def fill(self, row: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Write keys, values [L, T, KVH, hd] of a sequence at positions start..start+T-1 of a row that has the
        pages."""
        positions = np.arange(start, start + keys.shape[1])
        index = np.stack([self.table[row, positions // PAGE], positions % PAGE])
        pages, offsets = to_device(torch.from_numpy(index), self.device)
        for layer, pair in zip(self.layers, torch.stack([keys, values], dim=2), strict=True):
            layer[pages, :, offsets] = pair

    def _resize(self, pages: int) -> None:
        """Make the pool's size `pages`; the first ones stay as they are, new ones are zeros. Where there is no memory
        for all layers it raises; some have grown then, and nothing else has changed."""
        shape, retained = (pages, *self._shape), min(self.pages, pages)
        count = math.prod(shape)
        for i, old in enumerate(self.layers):
            if self._maps:
                # The old tensor points to where the mapping was; it goes with this assignment.
                self._maps[i].resize(count * self.dtype.itemsize)
                self.layers[i] = torch.frombuffer(self._maps[i], dtype=self.dtype, count=count).view(shape)
            else:
                self.layers[i] = torch.zeros(shape, dtype=self.dtype, device=self.device)
                self.layers[i][:retained] = old[:retained]
            if self.device.type == "cpu":
                self.addresses[i] = self.layers[i].data_ptr()
        # Ascending after the others, all of which are lower: still a heap.
        self._free.extend(range(self.pages, pages))
        self._holders = np.pad(self._holders[:retained], (0, pages - retained))
        self.pages = pages


def _map(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@dataclass
class Prefilled:
    """A prefilled sequence: keys, values [L, T, KVH, hd] from `start` on; hidden [D] of the last position."""

    keys: Tensor
    values: Tensor
    hidden: Tensor
    start: int

    @property
    def length(self) -> int:
        return self.keys.shape[1]


class Slots:
    """Assigns `count` slots of a cache to rows. A row with a slot may use pages up to `row.longest` positions."""

    def __init__(self, cache: KVCache, count: int):
        self.cache = cache
        self._free = list(range(count))[::-1]
        # Slots of rows that share the whole pages of a prefilled prompt, by its tokens.
        self._together: dict[tuple[int, ...], list[int]] = {}

    @property
    def free(self) -> int:
        """Slots without a row."""
        return len(self._free)

    @property
    def together(self) -> Set[tuple[int, ...]]:
        """Prefilled prompts whose whole pages are in the cache: another row of such a prompt needs none for it."""
        return self._together.keys()

    def room(self, inside: Iterable[Row]) -> float:
        """Pages that no row in flight can need later."""
        if self.cache.limit is None:
            return math.inf
        own = sum(pages_for(row.longest) - common_pages(row) for row in inside)
        return self.cache.limit - own - sum(len(read) // PAGE for read in self._together)

    def enter(self, entering: Sequence[tuple[Row, Sequence[Prefilled]]], coming: int = 0) -> None:
        """Assign slots to rows, with their prefilled parts in order, and pages for `coming` positions more."""
        first: list[Row] = []
        others: list[Row] = []
        for row, _ in entering:
            row.slot = self._free.pop()
            alike = self._together.setdefault(row.read, []) if common_pages(row) else []
            (others if alike else first).append(row)
            alike.append(row.slot)
        self.hold(first, coming)
        for row in others:
            self.cache.share(self._together[row.read][0], row.slot, common_pages(row))
        self.hold(others, coming)
        shared = {row.slot: PAGE * common_pages(row) for row in others}
        for row, parts in entering:
            for part in parts:
                there = max(0, shared.get(row.slot, 0) - part.start)
                if there < part.keys.shape[1]:
                    self.cache.fill(row.slot, part.start + there, part.keys[:, there:], part.values[:, there:])

    def hold(self, rows: list[Row], coming: int = 0) -> None:
        """Allocate pages for the rows' tokens: the last token's keys and values are computed next."""
        self.cache.hold([row.slot for row in rows], [row.length + coming for row in rows])

    def leave(self, row: Row) -> None:
        """Free a row's slot, and the pages that it alone holds."""
        self._free.append(row.slot)
        self.cache.release(row.slot)
        if common_pages(row):
            alike = self._together[row.read]
            alike.remove(row.slot)
            if not alike:
                del self._together[row.read]
        row.slot = -1


def common_pages(row: Row) -> int:
    """Whole pages of a row's prefilled prompt, which are never written again."""
    return len(row.read) // PAGE
