"""Common parts of all families: dimensions of a dense decoder, its tensor names and shapes, its RoPE frequencies.

The Hugging Face names are the project's canonical names: learner, decoder and converter all use them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ModelDims:
    """Dimensions of a decoder with RMSNorm, RoPE, grouped-query attention and a SwiGLU MLP.

    qk_norm: RMSNorm of queries and keys, of each head or, with qk_norm_whole, of all heads together. no_rope: layers
    that don't rotate queries and keys, counted from 0. norm_after: attention and MLP read the stream as it is, and what
    they add to it is normed.
    """

    family: str
    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    rms_eps: float
    rope_theta: float
    rope_scaling: tuple[tuple[str, float | str], ...] = ()
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    no_rope: tuple[int, ...] = ()
    norm_after: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads={self.heads} is not a multiple of num_key_value_heads={self.kv_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: expected an even number, since RoPE rotates pairs")

    @property
    def q_size(self) -> int:
        """Rows of the query projection: H hd."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection and of the value projection: KVH hd."""
        return self.kv_heads * self.head_dim

    @property
    def block_norms(self) -> tuple[str, str]:
        """Names of the norms that belong to a block's attention and to its MLP."""
        after = "post_attention_layernorm"
        return (after, "post_feedforward_layernorm") if self.norm_after else ("input_layernorm", after)

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes (out, in) of the linear layers of one block by their name within it. The possible LoRA targets."""
        return {
            "self_attn.q_proj": (self.q_size, self.hidden),
            "self_attn.k_proj": (self.kv_size, self.hidden),
            "self_attn.v_proj": (self.kv_size, self.hidden),
            "self_attn.o_proj": (self.hidden, self.q_size),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def has_bias(self, linear: str) -> bool:
        """Whether a linear of `linear_shapes` has a bias."""
        if linear.startswith("mlp."):
            return self.mlp_bias
        return self.out_bias if linear.endswith("o_proj") else self.qkv_bias

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor shapes of one block by their name within it."""
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (self.hidden,) for name in self.block_norms}
        for name, (rows, columns) in self.linear_shapes().items():
            shapes[f"{name}.weight"] = (rows, columns)
            if self.has_bias(name):
                shapes[f"{name}.bias"] = (rows,)
        if self.qk_norm:
            shapes["self_attn.q_norm.weight"] = (self.q_size if self.qk_norm_whole else self.head_dim,)
            shapes["self_attn.k_norm.weight"] = (self.kv_size if self.qk_norm_whole else self.head_dim,)
        return shapes

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor shapes of the Hugging Face checkpoint by name. Tied models have no lm_head.weight."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        block = self.block_shapes()
        for layer in range(self.num_layers):
            shapes.update({f"model.layers.{layer}.{name}": shape for name, shape in block.items()})
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        return shapes


def features(dims: ModelDims) -> list[str]:
    """Names of the fields that differ from their default."""
    return [field.name for field in fields(dims) if getattr(dims, field.name) != field.default]


def padded_vocab(vocab: int, tensor: int) -> int:
    """Vocabulary size rounded up to a multiple of the tensor-parallel degree; rows beyond `vocab` are never trained."""
    return (vocab + tensor - 1) // tensor * tensor


def inverse_frequencies(dims: ModelDims) -> torch.Tensor:
    """RoPE inverse frequencies, float32 [head_dim / 2], with the model's scaling ("linear" or "llama3") applied.

    The llama3 rule interpolates between scaled and unscaled frequencies by wavelength, as in the Llama 3.1 release.
    """
    import torch

    exponent = torch.arange(0, dims.head_dim, 2, dtype=torch.int64).float() / dims.head_dim
    inv = 1.0 / (dims.rope_theta**exponent)
    scaling = dict(dims.rope_scaling)
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        return inv / float(scaling["factor"])
    if kind == "llama3":
        factor = float(scaling["factor"])
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        original = float(scaling["original_max_position_embeddings"])
        wavelength = 2 * math.pi / inv
        blend = (original / wavelength - low) / (high - low)
        mixed = (1 - blend) * inv / factor + blend * inv
        scaled = torch.where(wavelength > original / low, inv / factor, inv)
        middle = (wavelength <= original / low) & (wavelength >= original / high)
        return torch.where(middle, mixed, scaled)
    return inv


def read_common(config: dict, family: str, implements: Collection[str] = (), **overrides: Any) -> ModelDims:
    """Read the fields that all families share from a config.json in the transformers 4 or 5 form.

    implements: fields of `_NEUTRAL` that the family reads itself. Raises ValueError, naming the field, for what would
    change the mathematics and is not implemented, and for a value that is of no use: of another type, not finite.
    """
    _refuse_unknown(config, family, implements)
    _check_sizes(config, family)
    eos_ids(config, config["vocab_size"])
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rope = rope_parameters(config, family)
    values: dict[str, Any] = dict(
        family=family,
        num_layers=config["num_hidden_layers"],
        hidden=hidden,
        intermediate=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocab=config["vocab_size"],
        max_positions=config.get("max_position_embeddings") or 2048,
        rms_eps=_number(config.get("rms_norm_eps", 1e-6), "rms_norm_eps", family),
        rope_theta=float(rope.pop("rope_theta")),
        rope_scaling=tuple(sorted(rope.items())) if rope["rope_type"] != "default" else (),
        tied=flag(config, "tie_word_embeddings", family),
    )
    values.update(overrides)
    return ModelDims(**values)


def flag(config: dict, name: str, family: str) -> bool:
    """A boolean of config.json; missing or null is False. Raises ValueError, naming the field."""
    value = config.get(name)
    if not isinstance(value, bool | None):
        raise ValueError(f"{family}: {name}={value!r}, expected true or false")
    return bool(value)


# rope_theta where config.json names none: transformers' default of the family, 10000 unless it is here.
_THETA = {"smollm3": 2_000_000.0}
# What a rope_type takes beside rope_theta; all of it numbers.
_ROPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rope_parameters(config: dict, family: str) -> dict:
    """RoPE settings (rope_theta, rope_type, scaling), from `rope_parameters` (transformers 5) or the older pair.

    Raises ValueError, naming the field: not supported, missing, or not a finite number above 0.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise ValueError(f"{family}: rope_parameters={given!r}, expected an object of numbers and a rope_type")
    rope = dict(given)
    if rope.get("rope_theta") is None:
        theta = config.get("rope_theta")
        rope["rope_theta"] = _THETA.get(family, 10000.0) if theta is None else theta
    kind = rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    if not isinstance(kind, str) or kind not in _ROPE:
        raise ValueError(f"{family}: rope_type={kind!r} is not supported; supported: {', '.join(_ROPE)}")
    if kind == "llama3":
        rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    missing = [key for key in _ROPE[kind] if rope.get(key) is None]
    if missing:
        raise ValueError(f"{family}: rope_type={kind!r} needs {missing} in the model's config.json")
    for key in ("rope_theta", *_ROPE[kind]):
        _number(rope[key], key, family)
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(
            f"{family}: low_freq_factor={rope['low_freq_factor']!r}, expected less than "
            f"high_freq_factor={rope['high_freq_factor']!r}"
        )
    return rope


def _number(value: Any, name: str, family: str) -> float:
    """Raises ValueError, naming the field, unless it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{family}: {name}={value!r}, expected a finite number above 0")
    return float(value)


# Fields of any family that, when present with another value than these, change the mathematics of the forward pass.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish", None),
    "attention_dropout": (0, 0.0, None),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "n_routed_experts": (0, None),
    "use_sliding_window": (False, None),
    "attention_chunk_size": (None,),
    "partial_rotary_factor": (1, 1.0, None),
    "rotary_pct": (1, 1.0, None),
    "rope_interleave": (False, None),
    "position_embedding_type": ("rope", "rotary", None),
    "alibi": (False, None),
    "logits_scaling": (1, 1.0, None),
    "logit_scale": (1, 1.0, None),
    "residual_multiplier": (1, 1.0, None),
    "embedding_multiplier": (1, 1.0, None),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "scale_emb": (1, 1.0, None),
    "scale_depth": (None,),
    "dim_model_base": (None,),
    "clip_qkv": (None,),
    "use_qk_norm": (False, None),
    "use_parallel_residual": (False, None),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "no_rope_layers": (None, []),
    "quantization_config": (None,),
}


def eos_ids(config: dict, vocab: int) -> list[int]:
    """End-of-sequence ids that a config.json or generation_config.json states. Raises ValueError for what is none."""
    given = config.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if any(type(one) is not int or not 0 <= one < vocab for one in ids):
        raise ValueError(f"eos_token_id={given!r}, expected ids of tokens, below vocab_size={vocab}")
    return ids


SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size")


def _refuse_unknown(config: dict, family: str, implements: Collection[str]) -> None:
    given = config.get("rope_parameters")
    turned = given.get("partial_rotary_factor") if isinstance(given, dict) else None
    # transformers 5 has it among those of RoPE.
    config = config if turned is None else {**config, "partial_rotary_factor": turned}
    for key, neutral in _NEUTRAL.items():
        if key in config and key not in implements and config[key] not in neutral:
            raise ValueError(f"{family}: {key}={config[key]!r} is not supported; expected {neutral[0]!r}")
    types = config.get("layer_types") or ["full_attention"]
    if "layer_types" not in implements and (
        not isinstance(types, list) or any(kind != "full_attention" for kind in types)
    ):
        raise ValueError(f"{family}: layer_types={types!r} are not supported; expected only 'full_attention'")


def _check_sizes(config: dict, family: str) -> None:
    missing = [key for key in SIZES if key not in config]
    if missing:
        raise ValueError(f"{family}: config.json lacks {missing}")
    optional = ("num_key_value_heads", "head_dim", "max_position_embeddings")
    for key in (*SIZES, *(key for key in optional if config.get(key) is not None)):
        size = config[key]
        # A hundred times what there is: the names of all tensors are held in memory.
        most = 10_000 if key.startswith("num_") else 2**31 - 1
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
            raise ValueError(f"{family}: {key}={size!r}, expected a whole number from 1 to {most}")
