"""Surrogates of the policy gradient against autograd through their definitions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ee_megatron.objectives.policy_gradient import KL_TERMS, SURROGATES, Clip, Experience, PolicyGradient

CLIP = 0.2


def answers(lengths: list[int], width: int = 9) -> SimpleNamespace:
    """Answers of these lengths behind prompts of three tokens; the gates are asked from their second token on."""
    place = torch.arange(width)
    end = 2 + torch.tensor(lengths)[:, None]
    counts = (place >= 2) & (place < end)
    asked = (place >= 3) & (place < end)
    return SimpleNamespace(counts=counts, asked=asked, exit_depths=torch.where(counts, 4, 0))


def drawn(batch: SimpleNamespace, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p(token), log q(exit), both of the old policy together, an advantage per answer; float64."""
    generator = torch.Generator().manual_seed(seed)
    token, exits, moved = torch.randn(3, *batch.counts.shape, generator=generator, dtype=torch.float64)
    token, exits = token * batch.counts, exits * batch.asked
    advantage = torch.randn(len(batch.counts), generator=generator, dtype=torch.float64)
    return token, exits, (token + exits + 0.5 * moved) * batch.counts, advantage


def weights_of(surrogate: str, batch: SimpleNamespace, clip: float = CLIP, seed: int = 0):
    token, exits, old, advantage = drawn(batch, seed)
    taught, one = advantage[:, None] * batch.counts, torch.ones_like(old)
    experience = Experience(taught, taught, one, one, old, torch.zeros_like(old))
    bounds = Clip(clip, clip)
    objective = PolicyGradient(SURROGATES[surrogate], KL_TERMS["reward"], bounds, beta=0.0, entropy_bonus=0.0)
    return objective.weights(batch, experience, token, exits)


def test_gspo_has_the_gradient_of_the_clipped_ratio_of_whole_answers() -> None:
    batch = answers([1, 2, 3, 4, 5, 6, 6, 6, 3, 2])
    token, exits, old, advantage = drawn(batch)
    token.requires_grad_()
    exits.requires_grad_()
    surrogates = []
    for row, counted in enumerate(batch.counts):
        new = token[row][counted].sum() + exits[row][batch.asked[row]].sum()
        ratio = ((new - old[row][counted].sum()) / counted.sum()).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        surrogates.append(torch.minimum(ratio * advantage[row], clipped * advantage[row]))
    (-torch.stack(surrogates).mean()).backward()
    weights, left_out = weights_of("gspo", batch)
    torch.testing.assert_close(-weights.token, token.grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(-weights.exit, exits.grad, rtol=1e-6, atol=1e-9)
    flat = (token.grad == 0)[batch.counts]
    assert 0 < left_out < 1 and left_out == pytest.approx(float(flat.float().mean()))


def test_gspo_is_ppo_for_answers_of_one_token() -> None:
    batch = answers([1] * 12)
    (ours, left_out), (theirs, same) = weights_of("gspo", batch), weights_of("ppo", batch)
    assert torch.equal(ours.token, theirs.token) and 0 < left_out == same < 1


@pytest.mark.parametrize(("surrogate", "shared"), [("gspo", True), ("ppo", False)])
def test_positions_of_an_answer_share_a_ratio_under_gspo_alone(surrogate: str, shared: bool) -> None:
    batch = answers([4, 6])
    weights, _ = weights_of(surrogate, batch, clip=0.0)
    for row, counted in zip(weights.token, batch.counts, strict=True):
        assert bool(torch.allclose(row[counted], row[counted][0])) is shared
