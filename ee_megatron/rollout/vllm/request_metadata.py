"""What a request says of its exits and of its tokens: plain values, which vLLM carries from process to process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...exit_rules import FIELD, RULES, ExitRule, Off, Prescribed, read_rule
from ...exits import ExitLayout
from ..engine.request import Row
from ..engine.sampling import SamplingParams, stream_key

# The key in vLLM's `SamplingParams.extra_args`.
EXTRA = "early_exit"


@dataclass
class RequestMetadata:
    """One request as the model runner knows it.

    - prompt: length of the prompt
    - stream: seed, prompt's id and sample, which name the answer's random stream
    - rule: decides about exits of tokens of which `prescribed` says nothing
    - name: comes back with every token of a rollout
    - prescribed: depth of every token; of Prescribed
    - sampling: without what ends an answer; None: vLLM's sampler decides, with this stream's random numbers
    - given: the tokens that the answer is made to begin with
    - depths: of the tokens made so far; read again after a preemption
    """

    prompt: int
    stream: Sequence[Any]
    rule: ExitRule
    name: int = -1
    prescribed: Sequence[int] = ()
    sampling: SamplingParams | None = None
    given: Sequence[int] = ()
    depths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.key = stream_key(*self.stream)

    @staticmethod
    def extra(row: Row) -> dict[str, Any]:
        """What `of` makes the request of."""
        request, rule = row.request, row.request.exits
        prescribed: Sequence[int] = ()
        if isinstance(rule, Prescribed):
            prescribed, rule = rule.depths.get((request.prompt_id, request.sample), ()), Off()
        sampling = request.sampling.distribution
        return {
            **RequestMetadata.served(rule, len(row.prompt_tokens), (request.seed, request.prompt_id, request.sample)),
            "name": row.id,
            "prescribed": [int(depth) for depth in prescribed],
            "sampling": asdict(sampling),
            "given": [int(token) for token in request.prefill],
        }

    @staticmethod
    def served(rule: ExitRule, prompt: int, stream: Sequence[Any]) -> dict[str, Any]:
        """The same for a request of a user's, whose tokens vLLM chooses."""
        return {"prompt": prompt, "stream": list(stream), "rule": {"kind": rule.kind, **asdict(rule)}}  # type: ignore[call-overload]

    @staticmethod
    def of(extra: dict[str, Any]) -> RequestMetadata:
        rule = dict(extra["rule"])
        kind = rule.pop("kind")
        sampling = SamplingParams(**extra["sampling"]) if "sampling" in extra else None
        return RequestMetadata(**{**extra, "rule": RULES[kind](**rule), "sampling": sampling})

    @staticmethod
    def full_depth(extra: dict[str, Any]) -> bool:
        """Whether every position goes through all layers."""
        return extra["rule"]["kind"] == Off.kind and not extra.get("prescribed")

    def said(self, token: int) -> int:
        """The depth at which this token's position leaves, where that is given. Raises ValueError where it should be
        and isn't."""
        depths = self.depths if token < len(self.depths) else self.prescribed
        if token >= len(depths):
            raise ValueError(
                f"prescribed exits of request {self.name}: {len(depths)} given, token {token} needs one; give more"
            )
        return depths[token]


def exit_layout(config: Any) -> ExitLayout:
    """The exits of the model that vLLM's `config` is of."""
    model = config.model_config.hf_config
    return ExitLayout(model.num_hidden_layers, tuple(model.exit_depths), getattr(model, "first_token", False))


def rule_for(config: Any, given: Any) -> ExitRule:
    """The exit rule of a request to the export that vLLM's `config` is of: `given`, or the export's own for None.
    Raises ValueError."""
    rule = read_rule(config.model_config.hf_config.exit_policy if given is None else given)
    rule.check(exit_layout(config), True)
    return rule


def check_names(names: Iterable[str]) -> None:
    """vLLM ignores fields that it doesn't know; one that was meant for exits is refused here. Raises ValueError."""
    for name in names:
        if name.startswith(("exit", EXTRA)) and name != FIELD:
            raise ValueError(f"{name}: no such field; expected {FIELD}")
