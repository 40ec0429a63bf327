"""How sequences are dealt out to ranks and micro-batches, and which keys the positions in them see."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ee_megatron.learner.batch import ReplayBatch, pack
from ee_megatron.learner.packing import MicroBatchPlan, deal, padded
from ee_megatron.model.packed import PackedSequences

LAYERS = 4
# (prompt, tokens of the answer): few different tokens, so that prompts are alike.
ROWS = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=6), st.integers(1, 9)), min_size=1, max_size=12
)


def batch_of(rows: list[tuple[list[int], int]]) -> ReplayBatch:
    prompts = [np.array(prompt) for prompt, _ in rows]
    return pack(prompts, [np.arange(2, 2 + length) for _, length in rows], None, LAYERS)


def lognormal(mean: int, cap: int, prompts: int, group: int, prompt: int = 100, seed: int = 0) -> ReplayBatch:
    generator = np.random.default_rng(seed)
    lengths = np.minimum(cap, generator.lognormal(np.log(mean) - 0.32, 0.8, prompts * group).astype(int) + 1)
    heads = [generator.integers(0, 1000, prompt) for _ in range(prompts)]
    answers = [generator.integers(0, 1000, n) for n in lengths]
    return pack([heads[i // group] for i in range(prompts * group)], answers, None, LAYERS)


def tokens_seen(batch: ReplayBatch, dealt: MicroBatchPlan) -> dict[int, list[int]]:
    """The tokens of the keys that each row sees, by row."""
    found: dict[int, list[int]] = {}
    for rows in (rows for part in dealt.ranks for rows in part):
        packed = rows.packed()
        tokens = batch.tokens.flatten()[rows.places(batch.tokens.size(1))]
        seen, positions = tokens[packed.keys].tolist(), packed.positions[packed.keys].tolist()
        for row, first, stop in zip(rows.rows, packed.key_bounds, packed.key_bounds[1:], strict=False):
            assert row not in found and positions[first:stop] == list(range(stop - first))
            found[row] = seen[first:stop]
    return found


@given(ROWS, st.integers(1, 40), st.integers(1, 3))
def test_every_sequence_is_dealt_once_and_sees_its_own_tokens(rows, tokens, ranks) -> None:
    batch = batch_of(rows)
    dealt = deal(batch, tokens, ranks)
    lengths = batch.lengths().tolist()
    assert tokens_seen(batch, dealt) == {row: batch.tokens[row, :n].tolist() for row, n in enumerate(lengths)}
    assert len({len(part) for part in dealt.ranks}) == 1 and len(dealt.ranks) == ranks
    assert dealt.stats.largest <= max(tokens, *lengths)
    assert dealt == deal(batch, tokens, ranks)


@given(ROWS)
def test_a_position_is_computed_once_for_all_sequences_of_a_micro_batch_that_have_it(rows) -> None:
    batch = batch_of(rows)
    ((one,),) = deal(batch, 1000, 1).ranks
    prefixes = {tuple(prompt[:at]) for prompt, _ in rows for at in range(1, len(prompt))}
    assert one.positions == len(prefixes) + sum(length for _, length in rows)


@pytest.mark.parametrize(("mean", "cap", "tokens"), [(600, 900, 8192), (2000, 4096, 16384), (6000, 16384, 32768)])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_micro_batches_are_full_and_alike(mean, cap, tokens, ranks) -> None:
    batch = lognormal(mean, cap, prompts=32, group=8)
    dealt = deal(batch, tokens, ranks)
    positions = [rows.positions for part in dealt.ranks for rows in part]
    slots = padded(dealt.stats.largest) * len(positions)
    sums = [sum(rows.positions for rows in part) for part in dealt.ranks]
    assert slots <= 1.05 * dealt.stats.positions and max(sums) <= 1.02 * dealt.stats.positions / ranks
    # Prompts may cost more than once, but never as often as there are sequences that begin with them.
    assert dealt.stats.positions <= int(batch.lengths().sum()) and dealt.stats.largest <= max(tokens, cap + 100)
    # No more micro-batches than the sum asks for, and one for the rest.
    assert len(positions) <= (-(-int(batch.lengths().sum()) // (tokens * ranks)) + 1) * ranks


def test_groups_with_long_prompts_stay_together_and_few_shot_examples_are_in_every_micro_batch() -> None:
    generator = np.random.default_rng(0)
    examples = generator.integers(0, 99, 300)
    prompts = [np.concatenate([examples, [i], generator.integers(0, 99, 39)]) for i in range(16)]
    batch = pack([prompts[i // 4] for i in range(64)], [generator.integers(0, 99, 20)] * 64, None, LAYERS)
    dealt = deal(batch, 1024, 2)
    # The examples, and per group what is left of its prompt but for the last position, then four answers from there on.
    each = [rows.positions for part in dealt.ranks for rows in part]
    assert sum(each) == len(each) * 300 + 16 * (39 + 4 * 20) and max(each) <= 1024
    rows = [{row // 4 for row in rows.rows} for part in dealt.ranks for rows in part]
    assert sum(len(groups) for groups in rows) == 16


def test_what_no_sequence_has_is_padding() -> None:
    packed = PackedSequences.of([3, 4], [0, 2], width=8)
    assert packed.length == 5 and packed.positions.tolist() == [0, 1, 2, 2, 3, 0, 0, 0]
    assert packed.keys.tolist() == [0, 1, 2, 0, 1, 3, 4] and PackedSequences.of([3, 4]).keys.tolist() == list(range(7))
    # The first and the last sequence that sees a slot.
    assert packed.slots[1:, :5].tolist() == [[0, 0, 0, 1, 1], [1, 1, 0, 1, 1]]


def test_data_ranks_without_a_sequence_have_empty_micro_batches() -> None:
    dealt = deal(batch_of([([1, 2], 3)]), 100, 3)
    assert [[s.positions for s in part] for part in dealt.ranks] == [[4], [0], [0]] and padded(0) > 0
