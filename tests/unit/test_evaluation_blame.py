"""Whose fault a wrong token is: built so that only one of the two can be."""

from __future__ import annotations

import pytest

from ee_megatron.exit_rules import Prescribed
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout import GenerationRequest, LocalPool, SamplingParams
from ee_megatron.types import Prompt
from tests.tiny import tiny_hf
from tools.blame_exits import partings

LAYERS, LENGTH, AT = 6, 12, 6
SPEC = PolicySpec(LAYERS, (1, 3, 4), rank=0)
PROMPTS = [Prompt(id=f"p{i}", text=f"Question {i}: {i * 7 % 13} x {i}", answer="", task="") for i in range(24)]
GREEDY = SamplingParams(0.0, LENGTH)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> LocalPool:
    return LocalPool(tiny_hf("llama", tmp_path_factory.mktemp("model")), SPEC, rows=8, threads=1)


def answers(pool: LocalPool, depths: list[int]):
    exits = Prescribed({(p.id, 0): depths for p in PROMPTS})
    return [group[0] for group in pool.generate(GenerationRequest(PROMPTS, 1, GREEDY, exits, 0))]


@pytest.mark.parametrize("where", ["own", "context"])
def test_the_exit_that_was_made_is_the_one_that_is_blamed(pool: LocalPool, where: str) -> None:
    full, depths = answers(pool, [LAYERS] * LENGTH), [LAYERS] * LENGTH
    if where == "own":
        depths[AT] = 1
    else:
        depths[1:AT] = [1] * (AT - 1)
    exited = answers(pool, depths)
    found = {p.prompt_id: p for p in partings(pool, PROMPTS, full, exited, GREEDY, LAYERS, SPEC.exit_depths)}
    apart = [i for i, (a, b) in enumerate(zip(full, exited, strict=True)) if a.tokens.tolist() != b.tokens.tolist()]
    assert apart and set(found) == {PROMPTS[i].id for i in apart}
    for i in apart:
        p = found[PROMPTS[i].id]
        same = full[i].tokens[: p.at].tolist() == exited[i].tokens[: p.at].tolist()
        assert same and (p.full, p.wrote) == (full[i].tokens[p.at], exited[i].tokens[p.at]) and p.full != p.wrote
        assert p.depth == depths[p.at]
        # Nothing left anywhere but at the first exit.
        assert p.mended == (True, p.own, p.own)
        # What is written at full depth itself can only have read something that was not.
        if p.depth == LAYERS:
            assert not p.own
        elif where == "own":
            assert p.own
    assert partings(pool, PROMPTS, full, full, GREEDY, LAYERS) == []
    blamed = [p for p in found.values() if p.own == (where == "own")]
    assert blamed and all((p.at == AT) == p.own for p in blamed if p.at >= AT)
