"""Surrogates of the policy gradient against autograd through their definitions, and its means by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ee_megatron.objectives.policy_gradient import KL_TERMS, Clip, Experience, PolicyGradient
from ee_megatron.objectives.weights import AVERAGES

CLIP = 0.2


def answers(lengths: list[int], width: int = 9) -> SimpleNamespace:
    """Answers of these lengths behind prompts of three tokens; the gates decide from their second token on."""
    place = torch.arange(width)
    end = 2 + torch.tensor(lengths)[:, None]
    counts = (place >= 2) & (place < end)
    gate_mask = (place >= 3) & (place < end)
    return SimpleNamespace(loss_mask=counts, gate_mask=gate_mask, exit_depths=torch.where(counts, 4, 0))


def drawn(batch: SimpleNamespace, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p(token), log q(exit), both of the old policy together, an advantage per answer; float64."""
    generator = torch.Generator().manual_seed(seed)
    token, exits, moved = torch.randn(3, *batch.loss_mask.shape, generator=generator, dtype=torch.float64)
    token, exits = token * batch.loss_mask, exits * batch.gate_mask
    advantage = torch.randn(len(batch.loss_mask), generator=generator, dtype=torch.float64)
    return token, exits, (token + exits + 0.5 * moved) * batch.loss_mask, advantage


def experience_of(batch: SimpleNamespace, token: Tensor, exits: Tensor, **more: Tensor) -> Experience:
    """Both advantages given, both importances 1, and the old policy's log-probabilities 0."""
    one = torch.ones_like(token)
    given = {"token_importance": one, "exit_importance": one, "old_tokens": one * 0, "old_exits": one * 0, **more}
    return Experience(token * batch.loss_mask, exits * batch.loss_mask, **given)


def plain(**options: Any) -> PolicyGradient:
    chosen = {"clip": Clip(0.0, 0.0), "beta": 0.0, **options}
    return PolicyGradient(chosen.pop("kl", KL_TERMS["reward"]), **chosen)


# Of answers of four and two tokens, beside one of none.
SHARES = {
    "answer": ([1 / 8] * 4, [1 / 4] * 2),
    "token": ([1 / 6] * 4, [1 / 6] * 2),
    "constant": ([1 / 20] * 4, [1 / 20] * 2),
}


@pytest.mark.parametrize("average", sorted(AVERAGES))
def test_loss_averages_by_hand(average: str) -> None:
    """Over the answers that have tokens; every term of the loss has the same shares."""
    batch = answers([4, 2, 0])
    ones = torch.ones(batch.loss_mask.shape)
    hazard = torch.ones(*batch.loss_mask.shape, 2)
    objective = plain(beta=0.5, kl=KL_TERMS["exact"], average=average, constant=10)
    weights, _ = objective.weights(batch, experience_of(batch, ones, 2 * ones, firing_cost=hazard), ones * 0, ones * 0)
    for row, share in enumerate((*SHARES[average], [])):
        counted, gate_mask = batch.loss_mask[row], batch.gate_mask[row]
        assert weights.token[row][counted].tolist() == pytest.approx(share)
        assert weights.divergence[row][counted].tolist() == pytest.approx([0.5 * s for s in share])
        assert weights.exit[row][gate_mask].tolist() == pytest.approx([2 * s for s in share[1:]])
        assert weights.hazard[row][gate_mask].tolist() == [pytest.approx([s, s]) for s in share[1:]]
        assert not weights.token[row][~counted].any() and not weights.hazard[row][~gate_mask].any()


def test_clip_higher_has_the_gradient_of_the_surrogate_with_two_bounds() -> None:
    batch = answers([6] * 10)
    token, _, old, _ = drawn(batch)
    advantage = torch.randn(old.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    token.requires_grad_()
    ratio = (token - old).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - 0.2, 1 + 0.6) * advantage)
    (-(surrogate * batch.loss_mask).sum() / 60).backward()
    objective, experience = plain(clip=Clip(0.2, 0.6)), experience_of(batch, advantage, 0 * advantage, old_tokens=old)
    weights, _ = objective.weights(batch, experience, token.detach(), 0 * old)
    torch.testing.assert_close(-weights.token, token.grad)
    between = (ratio > 1.2) & (ratio < 1.6) & (advantage > 0) & batch.loss_mask
    assert between.any() and weights.token[between].all()
    same, _ = plain(clip=Clip(0.2, 0.2)).weights(batch, experience, token.detach(), 0 * old)
    assert not same.token[between].any()


def test_ratios_apart_clip_token_and_exit_each_by_its_own() -> None:
    """Against autograd through two surrogates; where one ratio is out of bounds the other still teaches."""
    batch = answers([6] * 10)
    generator = torch.Generator().manual_seed(2)
    token, exits, old_token, old_exits, advantage, of_exits = (
        torch.randn(batch.loss_mask.shape, generator=generator, dtype=torch.float64) for _ in range(6)
    )
    old_token, old_exits = token + 0.4 * old_token, (exits + 0.4 * old_exits) * batch.gate_mask
    exits = exits * batch.gate_mask
    token.requires_grad_()
    exits.requires_grad_()
    loss = 0
    for now, old, worth, where in (
        (token, old_token, advantage, batch.loss_mask),
        (exits, old_exits, of_exits, batch.gate_mask),
    ):
        ratio = (now - old).exp()
        loss = loss - (torch.minimum(ratio * worth, ratio.clamp(0.8, 1.2) * worth) * where).sum() / 60
    loss.backward()
    experience = experience_of(batch, advantage, of_exits, old_tokens=old_token, old_exits=old_exits)
    given = batch, experience, token.detach(), exits.detach()
    apart, left_out = plain(clip=Clip(0.2, 0.2), ratios="apart").weights(*given)
    torch.testing.assert_close(-apart.token, token.grad)
    torch.testing.assert_close(-apart.exit, exits.grad)
    flat_token, flat_exit = apart.token == 0, apart.exit == 0
    assert (flat_token & ~flat_exit)[batch.gate_mask].any() and (~flat_token & flat_exit)[batch.gate_mask].any()
    either = flat_token | (flat_exit & batch.gate_mask)
    assert left_out == pytest.approx(float(either[batch.loss_mask].float().mean()))
    together, _ = plain(clip=Clip(0.2, 0.2)).weights(*given)
    assert not torch.allclose(together.token, apart.token)


def test_costs_at_the_gates_are_not_weighed_by_ratios_but_left_out_where_importance_masks_the_exit() -> None:
    batch = answers([4, 6])
    shape = batch.loss_mask.shape
    generator = torch.Generator().manual_seed(3)
    hazard = torch.randn(*shape, 2, generator=generator)
    ones, moved = torch.ones(shape), torch.randn(shape, generator=generator)
    importance = torch.rand(shape, generator=generator) + 0.5
    masked = batch.gate_mask & (torch.arange(shape[1]) % 2 == 0)
    experience = experience_of(
        batch, ones, ones, firing_cost=hazard, exit_importance=importance.masked_fill(masked, 0.0),
        token_importance=importance,
    )  # fmt: skip
    weights, _ = plain(clip=Clip(0.2, 0.2)).weights(batch, experience, moved, moved)
    share = batch.gate_mask / batch.loss_mask.sum(1, keepdim=True) / 2
    expected = hazard * (share * ~masked)[..., None]
    torch.testing.assert_close(weights.hazard, expected)
    assert masked.any() and not weights.hazard[masked].any() and not weights.exit[masked].any()
    assert weights.hazard[batch.gate_mask & ~masked].all()
    without, _ = plain().weights(batch, experience_of(batch, ones, ones), moved, moved)
    assert without.hazard is None
