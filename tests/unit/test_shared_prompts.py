"""Which positions take over the keys and values of another sequence that begins with the same prompt."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from ee_megatron.learner.batch import pack
from ee_megatron.model.active import Keys

LAYERS = 4


def test_all_but_the_last_position_of_a_common_prompt_is_taken_from_the_first_sequence() -> None:
    prompts = [[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 9, 9, 9], [5, 6, 9, 9, 1], [1, 2]]
    batch = pack([np.array(p) for p in prompts], [np.array([3, 3])] * 5, None, LAYERS)
    # The last token of each sequence is read by nobody: -1, as padding is.
    assert batch.sources().tolist() == [
        [0, 0, 0, 0, 0, -1, -1, -1],
        [0, 0, 0, 1, 1, -1, -1, -1],
        [0, 0, 2, 2, 2, 2, -1, -1],
        [0, 0, 2, 2, 3, 3, -1, -1],
        [4, 4, 4, -1, -1, -1, -1, -1],
    ]
    depths = batch.control().channels[..., 0].t()
    assert torch.equal(depths > 0, batch.sources() == torch.arange(5)[:, None])


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=6), st.integers(1, 3)), min_size=1, max_size=6)
)
def test_a_position_is_run_once_for_all_sequences_that_have_it(rows: list[tuple[list[int], int]]) -> None:
    prompts = [np.array(prompt) for prompt, _ in rows]
    answers = [np.zeros(length, dtype=np.int64) for _, length in rows]
    batch = pack(prompts, answers, None, LAYERS)
    sources, seen = batch.sources(), dict[tuple[int, ...], int]()
    for row, (prompt, length) in enumerate(rows):
        for at in range(batch.tokens.size(1)):
            source = int(sources[row, at])
            if at >= len(prompt) + length - 1:
                assert source == -1
            elif at >= len(prompt) - 1:
                assert source == row
            else:
                assert source == seen.setdefault(tuple(prompt[: at + 1]), row)


def test_keys_travel_to_where_they_are_taken() -> None:
    sources = torch.tensor([[0, 0, -1], [0, 1, 2]])
    keys = Keys.of(sources)
    shared = keys.share(torch.arange(10.0, 10 + len(keys.own))[:, None])[..., 0]
    assert keys.own.tolist() == [0, 3, 4, 5] and keys.positions.tolist() == [0, 1, 1, 1]
    assert shared[:, :2].tolist() == [[10, 10], [11, 12]] and shared[1, 2] == 13
    alone = Keys.of(torch.arange(3).repeat(2, 1))
    assert alone.source is None and alone.share(torch.zeros(6, 5)).shape == (2, 3, 5)


def test_padding_takes_no_key_more_often_than_its_share() -> None:
    sources = torch.zeros(100, 2, dtype=torch.int64)
    sources[:, 1] = 1
    sources[20:] = -1
    keys = Keys.of(sources)
    assert torch.bincount(keys.source).max() == 5
    keys.share(torch.zeros(len(keys.own), 1))
