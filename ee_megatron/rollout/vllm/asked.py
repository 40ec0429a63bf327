"""What a request says of its exits and of its tokens: plain values, which vLLM carries from process to process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...exit_rules import RULES, ExitRule, Off, Prescribed
from ..engine.request import Row
from ..engine.sampling import SamplingParams

# The key in vLLM's `SamplingParams.extra_args`.
EXTRA = "early_exit"


@dataclass
class Asked:
    """One request as the model runner knows it.

    - name: comes back with every token
    - prompt: length of the prompt, without what was answered before
    - key: of the answer's random stream
    - rule: decides about exits of tokens of which `prescribed` says nothing
    - prescribed: depth of every token, entry 0 is L; of Prescribed and of answers that go on
    - sampling: temperature, top_k and top_p
    - given: the tokens that the answer is made to begin with
    - depths: of the tokens made so far; read again after a preemption
    """

    name: int
    prompt: int
    key: int
    rule: ExitRule
    prescribed: Sequence[int]
    sampling: SamplingParams
    given: Sequence[int]
    depths: list[int] = field(default_factory=list)

    @staticmethod
    def extra(row: Row) -> dict[str, Any]:
        """What `of` makes the request of."""
        request, rule = row.request, row.request.exits
        prescribed: Sequence[int] = ()
        if isinstance(rule, Prescribed):
            prescribed, rule = rule.depths.get((request.prompt_id, request.sample), ()), Off()
        sampling = request.sampling.distribution
        return {
            "name": row.id,
            "prompt": len(row.prompt_tokens),
            "key": row.key,
            "rule": {"kind": rule.kind, **asdict(rule)},  # type: ignore[call-overload]
            "prescribed": [int(depth) for depth in prescribed],
            "sampling": {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p},
            "given": [int(token) for token in request.prefill],
            "depths": list(row.exit_depths),
        }

    @staticmethod
    def of(extra: dict[str, Any]) -> Asked:
        rule = dict(extra["rule"])
        kind = rule.pop("kind")
        return Asked(**{**extra, "rule": RULES[kind](**rule), "sampling": SamplingParams(**extra["sampling"])})

    def said(self, token: int) -> int:
        """The depth at which this token's position leaves, where that is given. Raises ValueError where it should be
        and isn't."""
        depths = self.depths if token < len(self.depths) else self.prescribed
        if token >= len(depths):
            raise ValueError(
                f"prescribed exits of request {self.name}: {len(depths)} given, token {token} needs one; give more"
            )
        return depths[token]
