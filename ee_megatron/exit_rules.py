"""Exit rules as values, one class per rule: when a generated position leaves the model.

The scheduler calls a position's rule at every exit that the position reaches. A rule's class also defines its label,
its syntax, what it costs and whether it is a control; a new rule is a class with a place in `RULES`. This module loads
without torch, so that the command line can print its help at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from .exits import ExitLayout

Need = Literal["gates", "readout", "random"]
Tokens = Sequence[tuple[str, int, int]]
"""Per row the prompt's id, the sample's number, the number of the token being made (0 is the first)."""
FIELD = "exit_policy"
"""What users set in a request or an export's config.json."""
NEVER, ALWAYS = 2.0, -1.0
"""Bounds that no hazard passes, and that every hazard does."""
Dial = Callable[[float], "ExitRule"]
"""Maps a setting in 0..1 to a rule; larger settings exit deeper."""


@dataclass(frozen=True)
class AtExit:
    """What a rule may look at: R rows with equal rules at one exit. Callables compute when called.

    - index, depth: the exit's number in 0..M-1, and the layers that have run
    - gate_logits: float32 [R]; 0 where no gates are loaded
    - readout: () -> logits float32 [R, V], as if the rows left here
    - uniform: i -> float64 [R] in [0, 1), the random number that the position has for exit i; the first is also what a
      rule draws that decides once for all exits
    - tokens: () -> which tokens are being made
    - state: float64 [R, `ExitRule.state_size`], the rule's memory: 0 at a position's first exit; what `should_exit`
      writes here it reads at the position's next exit
    """

    index: int
    depth: int
    gate_logits: Tensor
    readout: Callable[[], Tensor]
    uniform: Callable[[int], Tensor]
    tokens: Callable[[], Tokens]
    state: Tensor


@dataclass(frozen=True)
class DialRange:
    """What the ends and the scale of a dial depend on: outcomes, the exit depths and L; the vocabulary's size; the
    share of each outcome [M+1] under the policy that controls are compared with."""

    outcomes: Sequence[int]
    vocab: int
    marginal: Sequence[float]


@dataclass(frozen=True)
class ExitRule:
    """Base class of exit rules. Hashable; rows with equal rules are decided in one batch.

    - kind: the name, wherever it is written down
    - label_format: the label, with the format of `value`, the rule's number, if it has one; "": the kind
    - needs: what `should_exit` looks at, at most
    - state_size: how many numbers it stores per position between exits
    - compares_in_float64: whether it compares hazards in float64 (else in float32)
    - default: its number where none is given
    - usage: syntax on the command line and (the part before the colon) in a request; "" if users can't choose the rule
    - control: its name as a control on the weights of the policy under test; "" if it is none

    Raises ValueError for a number that the rule can't use.
    """

    kind: ClassVar[str]
    label_format: ClassVar[str] = ""
    needs: ClassVar[frozenset[Need]] = frozenset()
    state_size: ClassVar[int] = 0
    compares_in_float64: ClassVar[bool] = False
    default: ClassVar[float] = 0.5
    usage: ClassVar[str] = ""
    control: ClassVar[str] = ""

    @classmethod
    def of(cls, value: float) -> Self:
        """The rule with this number; rules without one ignore it."""
        return cls(**{"value": value} if "value" in cls.__dataclass_fields__ else {})

    def hazard_bound(self, at: AtExit) -> Tensor:
        """float [R], on any device: rows whose hazard is above it exit. Not defined for rules that look at readouts."""
        raise NotImplementedError(f"exit rule {self.kind} needs readouts, so it has no hazard bound")

    def should_exit(self, at: AtExit) -> Tensor:
        """Which rows exit, bool [R], on any device."""
        bound = self.hazard_bound(at)
        if "gates" not in self.needs:
            # NEVER or ALWAYS: must not wait for the device that computes hazards.
            return bound < 0
        logits = at.gate_logits.double() if self.compares_in_float64 else at.gate_logits
        return logits.sigmoid() > bound

    def hazard_bounds(self, uniform: np.ndarray, depths: Sequence[int], tokens: Tokens) -> np.ndarray | None:
        """`hazard_bound` at every exit, before the model runs, float64 [R, M]; None for a rule that looks at readouts.

        uniform float64 [R, M+1]: the positions' random numbers, as `AtExit.uniform` gives them; depths: the M exits.
        For engines that decide on the device, where asking the host at every exit would cost more than the layers.
        """
        if "readout" in self.needs:
            return None
        import torch

        drawn, unknown = torch.from_numpy(uniform), torch.zeros(len(uniform))
        exits = [
            AtExit(i, depth, unknown, lambda: unknown, lambda k: drawn[:, k], lambda: tokens, unknown)
            for i, depth in enumerate(depths)
        ]
        return torch.stack([self.hazard_bound(at) for at in exits], dim=1).double().numpy()

    @property
    def label(self) -> str:
        """The rule's name in tables."""
        return (self.label_format or self.kind).format(getattr(self, "value", None))

    def __str__(self) -> str:
        """As `parse` reads it; a mix can't be written so."""
        return f"{self.kind}:{self.value}" if hasattr(self, "value") else self.kind

    def check(self, layout: ExitLayout, has_gates: bool) -> None:
        """Raises ValueError if a decoder with these exits and gates can't follow the rule."""
        if "gates" in self.needs and not has_gates:
            raise ValueError(
                f"exit policy {self.kind} needs gates, but the teacher is loaded; load a policy or use 'off'"
            )

    def to_json(self) -> dict[str, Any]:
        """The rule as the server and exported models read it."""
        return {"kind": self.kind, "value": getattr(self, "value", self.default)}

    def to_results(self) -> dict[str, Any]:
        """The rule as results.json stores it; fields that a rule lacks have their defaults."""
        return {
            **self.to_json(),
            "shares": list(getattr(self, "shares", ())),
            "other": getattr(self, "other", 0.0),
            "mix": getattr(self, "mix", 0.0),
        }

    @classmethod
    def sweep_curve(cls, span: DialRange) -> Dial:
        """The rules of this kind from shallow to deep. Raises NotImplementedError for kinds without such an order."""
        raise NotImplementedError(f"exit rule {cls.kind} has no dial")

    def mixed(self, deeper: Self, share: float) -> ExitRule:
        """A mixture of two rules of one dial, drawn token by token: `deeper` with probability `share`."""
        raise NotImplementedError(f"exit rule {self.kind} has no dial")


@dataclass(frozen=True)
class Bound(ExitRule):
    """Base class of rules that exit where a measure passes `value`, a number in least..most.

    With probability `mix` a token uses `other` instead of `value`, at all its exits: for mean depths between those of
    two values.
    """

    value: float = 0.5
    other: float = 0.0
    mix: float = 0.0

    least: ClassVar[float] = 0.0
    most: ClassVar[float] = math.inf

    def __post_init__(self) -> None:
        if not self.least <= self.value <= self.most:
            raise ValueError(
                f"exit policy {self.kind}: value {self.value}; expected a number in {self.least:g}..{self.most:g}"
            )
        if not 0 <= self.mix <= 1:
            raise ValueError(f"exit policy {self.kind}: mix {self.mix}; expected a number in 0..1")

    def bounds(self, at: AtExit, like: Tensor) -> Tensor:
        """The rows' bounds, shaped as `like` [R]."""
        bounds = like.new_full(like.shape, self.value)
        return bounds.masked_fill(at.uniform(0) < self.mix, self.other) if self.mix else bounds

    @property
    def label(self) -> str:
        return super().label + (f" (or {self.other:.4g}: {self.mix:.0%})" if self.mix else "")

    def mixed(self, deeper: Self, share: float) -> Self:
        return replace(self, other=float(deeper.value), mix=share)


@dataclass(frozen=True)
class Threshold(Bound):
    """Exit at the first gate whose hazard exceeds `value`. Not itself a control: its dial serves gates of other
    checkpoints."""

    kind = "threshold"
    label_format = "hazard > {:g}"
    needs = frozenset({"gates", "random"})
    usage = "threshold:HAZARD"
    most = 1

    def hazard_bound(self, at: AtExit) -> Tensor:
        return self.bounds(at, at.gate_logits)

    @classmethod
    def sweep_curve(cls, span: DialRange) -> Dial:
        return cls


@dataclass(frozen=True)
class Sample(ExitRule):
    """Gate i fires with probability equal to its hazard, as in training."""

    kind = "sample"
    label_format = "sampled"
    needs = frozenset({"gates", "random"})
    compares_in_float64 = True
    usage = "sample"

    def hazard_bound(self, at: AtExit) -> Tensor:
        return at.uniform(at.index)


@dataclass(frozen=True)
class Fixed(ExitRule):
    """All positions exit at one depth, an exit depth or L. As a control two neighbouring depths are mixed at random."""

    value: float

    kind = "fixed"
    label_format = "fixed {:g}"
    usage = "fixed:DEPTH"
    control = "fixed depth"

    def __post_init__(self) -> None:
        if float(self.value).is_integer():
            object.__setattr__(self, "value", int(self.value))

    def hazard_bound(self, at: AtExit) -> Tensor:
        return everywhere(at, at.depth == self.value)

    def check(self, layout: ExitLayout, has_gates: bool) -> None:
        if self.value not in layout.outcomes:
            raise ValueError(f"fixed exit {self.value} is not an exit depth; expected one of {list(layout.outcomes)}")

    @classmethod
    def sweep_curve(cls, span: DialRange) -> Dial:
        last = len(span.outcomes) - 1

        def rule(position: float) -> ExitRule:
            place = position * last
            low = max(0, min(int(place), last - 1))
            deeper = place - low
            return Random((*[0.0] * low, 1.0 - deeper, deeper, *[0.0] * (last - low - 1))[: last + 1])

        return rule


@dataclass(frozen=True)
class Random(ExitRule):
    """Exit at outcome i with probability shares[i] (M exits, then none), independent of the token."""

    shares: tuple[float, ...] = ()

    kind = "random"
    needs = frozenset({"random"})
    control = "random exits"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(map(float, self.shares)))
        if min(self.shares, default=-1.0) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(
                f"exit policy random: shares {list(self.shares)} are not a distribution; expected numbers >= 0 "
                "that sum to 1"
            )

    def hazard_bound(self, at: AtExit) -> Tensor:
        """Exit with the probability of exit i given that none before it was taken, shares_i / Σ_{j>=i} shares_j."""
        import torch

        left = sum(self.shares[at.index :])
        return torch.where(at.uniform(at.index) < (self.shares[at.index] / left if left > 0 else 0.0), ALWAYS, NEVER)

    @property
    def label(self) -> str:
        return "random " + "/".join(f"{share:.2f}" for share in self.shares)

    def check(self, layout: ExitLayout, has_gates: bool) -> None:
        if len(self.shares) != len(layout.outcomes):
            raise ValueError(
                f"exit policy random: {len(self.shares)} shares for {len(layout.outcomes)} outcomes "
                f"{list(layout.outcomes)}; give one each"
            )

    @classmethod
    def sweep_curve(cls, span: DialRange) -> Dial:
        """The marginal exit distribution, independent of the token; in the middle of the dial it is unchanged.

        Elsewhere it is tilted, p_i ∝ shares_i · exp(τ · depth_i): of all distributions with that mean the nearest to it
        in KL divergence (Csiszár, Annals of Probability 3 (1975), 146-158). τ runs from -∞ to ∞ along the dial.
        """
        import numpy as np

        depths = np.asarray(span.outcomes, dtype=np.float64)
        marginal = np.asarray(span.marginal, dtype=np.float64)
        if len(depths) != len(marginal) or marginal.min() < 0 or marginal.sum() <= 0:
            raise ValueError(
                f"shares {list(span.marginal)} of outcomes {list(span.outcomes)}: "
                "expected one share >= 0 each, not all 0"
            )

        def rule(position: float) -> ExitRule:
            # tan reaches the ends without ever being infinite in floating point.
            tilt = math.tan(math.pi * (min(max(position, 1e-6), 1 - 1e-6) - 0.5)) / (depths[-1] - depths[0] + 1)
            with np.errstate(divide="ignore"):
                logs = np.log(marginal) + tilt * depths
            weights = np.exp(logs - logs.max())
            return cls(tuple(weights / weights.sum()))

        return rule

    def mixed(self, deeper: Self, share: float) -> Self:
        pairs = zip(self.shares, deeper.shares, strict=True)
        return replace(self, shares=tuple((1 - share) * a + share * b for a, b in pairs))


@dataclass(frozen=True)
class Confidence(Bound):
    """Exit at the first readout that gives some token more than the probability `value`: softmax confidence of Schuster
    et al. 2022 (arXiv 2207.07061), without their calibration."""

    kind = "confidence"
    label_format = "confidence > {:.4g}"
    needs = frozenset({"readout", "random"})
    usage = "confidence:PROBABILITY"
    control = "confidence"
    most = 1

    def should_exit(self, at: AtExit) -> Tensor:
        most = at.readout().log_softmax(dim=-1).amax(dim=-1).exp()
        return most > self.bounds(at, most)

    @classmethod
    def sweep_curve(cls, span: DialRange) -> Dial:
        """The dial is finer near certainty, where sharp readouts lie."""
        return lambda position: cls(1.0 - (1.0 - position) ** 3)


@dataclass(frozen=True)
class Entropy(Bound):
    """Exit at the first readout with less entropy than `value`, in nats: Teerapittayanon et al. 2016 (BranchyNet, arXiv
    1709.01686) and DeeBERT (Xin et al. 2020, arXiv 2004.12993)."""

    kind = "entropy"
    label_format = "entropy < {:.3g}"
    needs = frozenset({"readout", "random"})
    control = "entropy"

    def should_exit(self, at: AtExit) -> Tensor:
        logprobs = at.readout().log_softmax(dim=-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return entropy < self.bounds(at, entropy)

    @classmethod
    def sweep_curve(cls, span: DialRange) -> Dial:
        """At 0 every readout passes, at 1 none does."""
        most = math.log(span.vocab) + 1e-3
        return lambda position: cls(most * (1.0 - position) ** 4)


@dataclass(frozen=True)
class Patience(Bound):
    """Exit at the first readout whose most probable token has been the same over the last `value` exits.

    They count from the position's first exit on: with 1 the first exit fires, with 2 the first whose choice is that of
    the exit before it, with M + 1 none. PABEE (Zhou et al. 2020, arXiv 2006.04152), whose patience counts how often the
    choice did not change, value - 1. Two mixed rules are the rule of their mean: a whole number, or two neighbours.
    """

    value: float = 2

    kind = "patience"
    label_format = "patience {}"
    needs = frozenset({"readout", "random"})
    # The last exit's first choice, and over how many exits it has stood.
    state_size = 2
    default = 2
    usage = "patience:EXITS"
    control = "patience"
    least = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for exits in (self.value, self.other) if self.mix else (self.value,):
            if not float(exits).is_integer():
                raise ValueError(f"exit policy patience: {exits}; expected a whole number of exits")
        object.__setattr__(self, "value", int(self.value))

    @classmethod
    def between(cls, mean: float) -> Self:
        low = math.floor(mean)
        return cls(low, other=low + 1, mix=mean - low) if mean > low else cls(low)

    @property
    def mean(self) -> float:
        return self.value + self.mix * (self.other - self.value)

    def should_exit(self, at: AtExit) -> Tensor:
        choice = at.readout().argmax(dim=-1)
        stood = at.state[:, 1] * (at.state[:, 0] == choice) + 1
        at.state[:, 0], at.state[:, 1] = choice, stood
        return stood >= self.bounds(at, stood)

    @classmethod
    def sweep_curve(cls, span: DialRange) -> Dial:
        """The dial runs from 1 to M + 1 exits."""
        return lambda position: cls.between(1 + position * (len(span.outcomes) - 1))

    def mixed(self, deeper: Self, share: float) -> Self:
        return self.between((1 - share) * self.mean + share * deeper.mean)


@dataclass(frozen=True)
class Off(ExitRule):
    """Never exit."""

    kind = "off"
    label_format = "full depth"
    usage = "off"

    def hazard_bound(self, at: AtExit) -> Tensor:
        return everywhere(at, False)


@dataclass(frozen=True)
class Speculate(ExitRule):
    """Full depth's own tokens, sooner: exits up to depth `value` draft some, and the deeper layers check them together
    (rollout/engine/speculation.py). Where nothing drafts, as in vLLM, positions run at full depth: the same tokens."""

    value: float

    kind = "speculate"
    label_format = "speculated from {:g}"
    usage = "speculate:DEPTH"

    def __post_init__(self) -> None:
        if float(self.value).is_integer():
            object.__setattr__(self, "value", int(self.value))

    def hazard_bound(self, at: AtExit) -> Tensor:
        return everywhere(at, False)

    def check(self, layout: ExitLayout, has_gates: bool) -> None:
        if self.value not in layout.depths:
            raise ValueError(f"speculate {self.value} is not an exit depth; expected one of {list(layout.depths)}")


@dataclass(frozen=True)
class Prescribed(ExitRule):
    """Replay recorded exits: `depths` maps (prompt id, sample) to the depth of every generated token. Entry 0 is L
    unless first tokens may exit."""

    depths: Mapping[tuple[str, int], Sequence[int]] = field(default_factory=dict, hash=False)

    kind = "prescribed"

    def hazard_bound(self, at: AtExit) -> Tensor:
        """Raises ValueError for a token without a prescribed depth."""
        import torch

        return torch.tensor([ALWAYS if self.depth(*token) == at.depth else NEVER for token in at.tokens()])

    def depth(self, prompt_id: str, sample: int, token: int) -> int:
        depths = self.depths.get((prompt_id, sample))
        if depths is None or len(depths) <= token:
            count = "none" if depths is None else str(len(depths))
            raise ValueError(
                f"prescribed exits of {(prompt_id, sample)}: {count} given, token {token} needs one; give more"
            )
        return int(depths[token])

    def check(self, layout: ExitLayout, has_gates: bool) -> None:
        for key, depths in self.depths.items():
            wrong = sorted(set(map(int, depths)) - set(layout.outcomes))
            if wrong or (len(depths) and not layout.first_token and int(depths[0]) != layout.num_layers):
                first = "" if layout.first_token else f"{layout.num_layers} first (prompts never exit), then "
                raise ValueError(
                    f"prescribed exits of {key}: {wrong or int(depths[0])} not possible; expected {first}any of "
                    f"{list(layout.outcomes)}"
                )


RULES: dict[str, type[ExitRule]] = {
    rule.kind: rule
    for rule in (Threshold, Sample, Fixed, Random, Confidence, Entropy, Patience, Speculate, Off, Prescribed)
}
OFFERED = tuple(kind for kind, rule in RULES.items() if rule.usage)
CONTROLS = tuple(rule for rule in RULES.values() if rule.control)


def everywhere(at: AtExit, fires: bool) -> Tensor:
    """Bounds of rows that all exit or all stay, on the CPU: a rule that looks at nothing must not wait for a device."""
    import torch

    return torch.full((len(at.gate_logits),), ALWAYS if fires else NEVER)


def forced_bounds(fires: Any, depths: Sequence[int]) -> np.ndarray:
    """Bounds float64 [R, M], as of `ExitRule.hazard_bounds`, for decisions bool [R, M] that ignore the gates."""
    import numpy as np

    return np.where(np.asarray(fires, dtype=bool).reshape(-1, len(depths)), ALWAYS, NEVER)


def make_rule(kind: str, value: float | None = None) -> ExitRule:
    """The rule of this name with this number, or its default. Raises ValueError."""
    if kind not in RULES:
        raise ValueError(f"exit policy {kind!r} is unknown; expected one of {', '.join(RULES)}")
    return RULES[kind].of(RULES[kind].default if value is None else value)


def parse(text: str) -> ExitRule:
    """Parse "threshold:0.5", "sample", "fixed:20", ... as a rule. Raises ValueError."""
    kind, _, value = text.partition(":")
    return make_rule(kind, float(value) if value else None)


def parse_option(option: str, text: str) -> ExitRule:
    """`parse` with the option's name in its errors."""
    try:
        kind, colon, _ = text.partition(":")
        if kind not in OFFERED or (colon and ":" not in RULES[kind].usage):
            raise ValueError(f"expected {usage()}")
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{option} {text!r}: {error}") from None


def read_rule(given: Any) -> ExitRule:
    """`exit_policy` of a request or an export, {"kind": "threshold", "value": 0.7} or "threshold:0.7". Raises
    ValueError, one line that says what is allowed."""
    fields = given
    if isinstance(given, str):
        kind, _, number = given.partition(":")
        try:
            fields = {"kind": kind, "value": float(number) if number else None}
        except ValueError:
            fields = None
    known = isinstance(fields, Mapping) and fields.keys() <= {"kind", "value"} and fields.get("kind") in OFFERED
    if not known or isinstance(fields.get("value"), bool) or not isinstance(fields.get("value"), int | float | None):
        raise ValueError(
            f'{FIELD} {given!r}: expected {usage()}, as a text or as {{"kind": "threshold", "value": 0.5}}'
        )
    return make_rule(fields["kind"], fields.get("value"))


def usage() -> str:
    """Syntax of the rules that users may choose, in one line."""
    forms = [RULES[kind].usage for kind in OFFERED]
    return f"{', '.join(forms[:-1])} or {forms[-1]}"
