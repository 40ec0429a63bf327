"""Exit formulas against plain probabilities, and stage layouts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ee_megatron.exits import (
    GATE_UNITS,
    ExitLayout,
    exit_distribution,
    gate_log_term,
    gate_units,
    sample_exits,
    target_hazards,
)

LAYOUT = ExitLayout(12, (2, 5, 9))
logits = st.lists(st.floats(-30, 30), min_size=3, max_size=3).map(torch.tensor)


def stick_breaking(z):
    """Gate logits [3] -> q [4] in plain probabilities."""
    s = torch.sigmoid(z.double())
    return torch.stack([s[0], (1 - s[0]) * s[1], (1 - s[0]) * (1 - s[1]) * s[2], (1 - s).prod()])


@given(logits)
@settings(deadline=None)
def test_the_exit_distribution_is_stick_breaking(z):
    q = exit_distribution(torch.sigmoid(z.double()))
    torch.testing.assert_close(q, stick_breaking(z), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(q.sum(), torch.tensor(1.0, dtype=torch.double))


@given(st.floats(0.001, 4), st.integers(1, 8192))
def test_a_gate_s_width_is_whole_or_named_with_the_nearest_that_is(width, hidden):
    try:
        units = gate_units(width, hidden)
    except ValueError as error:
        offered, expected = str(error).split(": ")[2].split(" gives ")
        assert gate_units(float(offered), hidden) == int(expected)
        assert abs(int(expected) - width * hidden) <= GATE_UNITS
    else:
        assert units >= 1 and abs(units - width * hidden) <= 0.5 and (units % GATE_UNITS == 0 or width == int(width))


@given(st.integers(1, 9), st.integers(1, 8192))
def test_whole_multiples_of_any_hidden_size_are_widths(width, hidden):
    assert gate_units(width, hidden) == gate_units(float(width), hidden) == width * hidden


@given(logits, st.sampled_from(LAYOUT.outcomes))
@settings(deadline=None)
def test_terms_of_the_gates_add_up_to_the_log_probability(z, depth):
    """What pipeline stages compute apart is what one process computes whole."""
    total = sum(gate_log_term(z[i].double(), torch.tensor(depth), e) for i, e in enumerate(LAYOUT.depths))
    expected = stick_breaking(z)[LAYOUT.outcomes.index(depth)]
    torch.testing.assert_close(total.exp(), expected, rtol=1e-9, atol=1e-12)


@given(logits, st.lists(st.floats(0, 1), min_size=3, max_size=3).map(torch.tensor))
@settings(deadline=None)
def test_a_gate_s_term_is_the_cross_entropy_to_its_target_hazard(z, hazards):
    anywhere = torch.zeros(3, dtype=torch.int32)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(z, hazards, reduction="none")
    torch.testing.assert_close(-gate_log_term(z, anywhere, 5, hazards), entropy)
    # The prescribed exit is a hazard of 1 at its gate and 0 before it; gates behind it have no target.
    depths, targets = torch.tensor([5, 9, 2]), torch.tensor([1.0, 0.0, -1.0])
    assert torch.equal(gate_log_term(z, depths, 5), gate_log_term(z, anywhere, 5, targets))


def test_certain_gates_stay_finite():
    z = torch.tensor([100.0, -100.0, 100.0])
    for depth in LAYOUT.outcomes:
        terms = [gate_log_term(z[i], torch.tensor(depth), e) for i, e in enumerate(LAYOUT.depths)]
        assert torch.isfinite(torch.stack(terms)).all()


def test_targets_at_their_ends():
    s = target_hazards(torch.tensor([0.0, 50.0, -1e-6]), kl_factor=1.0)
    torch.testing.assert_close(s, torch.tensor([1.0, 0.0, 1.0]))
    d = torch.tensor([0.3])
    torch.testing.assert_close(target_hazards(d, 2.0), 2 * (1 - torch.sigmoid(2 * d)))


def test_samples_follow_the_distribution():
    hazards = torch.tensor([0.3, 0.5, 0.2])
    drawn = sample_exits(hazards.expand(40_000, 3), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / 40_000
    torch.testing.assert_close(shares, exit_distribution(hazards), atol=0.01, rtol=0)


def test_stage_boundaries_are_exits():
    assert ExitLayout(30, (10, 15, 20, 25)).stage_sizes(2) == (15, 15)
    assert ExitLayout(28, (5, 10, 20)).stage_sizes(3) == (10, 10, 8)
    sizes = ExitLayout.default(28, 4).stage_sizes(4)
    assert sum(sizes) == 28 and len(sizes) == 4


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ExitLayout(12, (0, 5)), r"\[0\].*1\.\.11"),
        (lambda: ExitLayout(12, (5, 12)), r"\[12\].*1\.\.11"),
        (lambda: ExitLayout(12, (5, 5)), r"\[5\]"),
        (lambda: LAYOUT.stage_sizes(5), "exits.depths"),
    ],
)
def test_wrong_layouts_say_what_to_set(call, says):
    with pytest.raises(ValueError, match=says):
        call()
