"""Configuration of a decoder whose tokens may leave it early. Needs transformers only."""

from __future__ import annotations

import re

from transformers import CONFIG_MAPPING, PretrainedConfig, __version__

VERSION, OLDEST = tuple(int(part) for part in re.findall(r"\d+", __version__)[:2]), (4, 46)
if VERSION < OLDEST:
    raise ImportError(
        f"transformers {__version__} is too old for a model with early exits, which needs "
        f"{'.'.join(map(str, OLDEST))} or newer; pip install -U transformers"
    )

# What this version calls the rotary embedding's settings, and what others do.
ROPE = ("rope_parameters",), ("rope_theta", "rope_scaling")
OWN_ROPE, OTHER_ROPE = ROPE if VERSION >= (5,) else ROPE[::-1]

BASE_MODEL_TYPES = ("llama", "qwen2", "qwen3", "smollm3", "olmo2")
OWN_FIELDS = ("base_model_type", "exit_depths", "gate_width", "gate_input", "first_token", "exit_policy")
POLICY_KINDS = ("threshold", "sample", "off", "fixed", "speculate")


def read_exit_policy(policy: dict | str) -> dict:
    """A policy in full from its short form: "off", "sample", "threshold" (0.5), "threshold:0.7", "fixed:12",
    "speculate:12".

    Raises ValueError for what is neither. `check_exit_policy` looks at kind and value.
    """
    if isinstance(policy, dict):
        return dict(policy)
    kind, colon, value = policy.partition(":") if isinstance(policy, str) else ("", "", "")
    try:
        number = float(value) if colon else 0.5 if kind == "threshold" else None
    except ValueError:
        kind, number = "", None
    if kind not in POLICY_KINDS or (colon and kind in ("off", "sample")):
        raise ValueError(
            f'exit_policy {policy!r}: expected "off", "sample", "threshold:0.7", "fixed:12", "speculate:12" or a '
            "dictionary with kind and value"
        )
    if number is None:
        return {"kind": kind}
    return {"kind": kind, "value": int(number) if kind in ("fixed", "speculate") and number.is_integer() else number}


def check_exit_policy(policy: dict, exit_depths: list[int], num_layers: int) -> None:
    """Raise ValueError unless `policy` is one of

    {"kind": "threshold", "value": s}  exit at the first gate whose hazard is above s (0 <= s <= 1)
    {"kind": "sample"}                 exit at a gate with the probability that is its hazard
    {"kind": "fixed", "value": depth}  every generated position exits at that depth
    {"kind": "off"}                    never exit: the plain model
    {"kind": "speculate", "value": depth}  the tokens of "off": drafted at that exit, checked by all layers
    """
    kind, value = policy.get("kind"), policy.get("value")
    if kind not in POLICY_KINDS:
        raise ValueError(f"exit_policy kind {kind!r} is unknown; choose one of {', '.join(POLICY_KINDS)}")
    if kind == "threshold" and not (isinstance(value, (int, float)) and 0 <= value <= 1):
        raise ValueError(f"exit_policy threshold needs a value between 0 and 1, got {value!r}")
    depths = [*exit_depths, num_layers] if kind == "fixed" else exit_depths
    if kind in ("fixed", "speculate") and value not in depths:
        raise ValueError(f"exit_policy {kind} needs a value out of {depths}, got {value!r}")


class EarlyExitConfig(PretrainedConfig):
    """The base model's own fields, flat, and where and how tokens exit.

    base_model_type: one of BASE_MODEL_TYPES, whose layers are used unchanged. exit_depths: layers that have run at each
    exit, increasing. gate_width: a gate's hidden width in units of hidden_size. gate_input: "normalised" (the residual
    stream over its root mean square) or "raw". first_token: whether the prompt's last position, which predicts the
    first generated token, may exit. exit_policy: the default of `generate`, see `check_exit_policy`.
    """

    model_type = "early_exit"
    # Trainer's evaluation gathers a model's outputs from all devices; a cache can't be.
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(
        self,
        base_model_type: str = "llama",
        exit_depths: list[int] | None = None,
        gate_width: float = 2,
        gate_input: str = "normalised",
        first_token: bool = False,
        exit_policy: dict | str | None = None,
        **kwargs,
    ):
        if base_model_type not in BASE_MODEL_TYPES:
            raise ValueError(f"base_model_type {base_model_type!r} is unknown; choose one of {BASE_MODEL_TYPES}")
        if base_model_type not in CONFIG_MAPPING:
            raise ImportError(f"transformers {__version__} has no {base_model_type}; pip install -U transformers")
        kwargs.pop("model_type", None)
        # The base's class fills in its defaults and brings older spellings of fields into its own form.
        fields = CONFIG_MAPPING[base_model_type](**kwargs).to_dict()
        fields.pop("model_type", None)
        given = {**fields, **kwargs, **{name: fields[name] for name in OWN_ROPE}}
        super().__init__(**{name: value for name, value in given.items() if name not in OTHER_ROPE})
        self.use_cache = fields.get("use_cache", True)
        self.base_model_type = base_model_type
        self.exit_depths = [int(depth) for depth in exit_depths or []]
        self.gate_width = gate_width
        self.gate_input = gate_input
        self.first_token = first_token
        self.exit_policy = read_exit_policy(exit_policy or "threshold")
        # Files of full-attention Qwen models may name a window that is switched off; the cache must not follow it.
        self.sliding_window = None
        self.layer_types = ["full_attention"] * self.num_hidden_layers
        increasing = sorted({depth for depth in self.exit_depths if 1 <= depth < self.num_hidden_layers})
        if increasing != self.exit_depths:
            raise ValueError(f"exit_depths {self.exit_depths} must increase within 1..{self.num_hidden_layers - 1}")
        if gate_input not in ("normalised", "raw"):
            raise ValueError(f"gate_input {gate_input!r} is unknown; choose normalised or raw")
        check_exit_policy(self.exit_policy, self.exit_depths, self.num_hidden_layers)

    def base_config(self) -> PretrainedConfig:
        """The configuration of the base model whose modules are used."""
        fields = {name: value for name, value in self.to_dict().items() if name not in OWN_FIELDS}
        for name in ("model_type", "auto_map", "architectures", "transformers_version"):
            fields.pop(name, None)
        return CONFIG_MAPPING[self.base_model_type](**fields)


__all__ = ["EarlyExitConfig"]
