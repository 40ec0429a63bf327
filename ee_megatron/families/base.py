"""What every family shares: the dimensions of a dense decoder, its tensor names and shapes, its RoPE frequencies.

The Hugging Face names are the project's canonical names: learner, decoder and converter all speak them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ModelDims:
    """Dimensions of a pre-norm decoder with RMSNorm, RoPE, grouped-query attention and a SwiGLU MLP."""

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

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads={self.heads} is not a multiple of num_key_value_heads={self.kv_heads}"
            )

    @property
    def q_size(self) -> int:
        """Rows of the query projection: H hd."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection and of the value projection: KVH hd."""
        return self.kv_heads * self.head_dim

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one block by their name within it -> (out, in). The possible LoRA targets."""
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
        """Tensors of one block by their name within it -> shape."""
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (self.hidden,),
            "post_attention_layernorm.weight": (self.hidden,),
        }
        for name, (rows, columns) in self.linear_shapes().items():
            shapes[f"{name}.weight"] = (rows, columns)
            if self.has_bias(name):
                shapes[f"{name}.bias"] = (rows,)
        if self.qk_norm:
            shapes["self_attn.q_norm.weight"] = (self.head_dim,)
            shapes["self_attn.k_norm.weight"] = (self.head_dim,)
        return shapes

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the Hugging Face checkpoint -> shape. Tied models have no lm_head.weight."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        block = self.block_shapes()
        for layer in range(self.num_layers):
            shapes.update({f"model.layers.{layer}.{name}": shape for name, shape in block.items()})
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        return shapes


def padded_vocab(vocab: int, tensor: int) -> int:
    """The vocabulary, rounded up to a multiple of the tensor-parallel degree; rows beyond `vocab` are never trained."""
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


def read_common(config: dict, family: str, **overrides: Any) -> ModelDims:
    """The fields that all families name alike, from a config.json in the transformers 4 or 5 form.

    Raises ValueError, naming the field, for what would change the mathematics and is not implemented.
    """
    refuse_common(config, family)
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    rope = rope_parameters(config, family)
    values: dict[str, Any] = dict(
        family=family,
        num_layers=int(config["num_hidden_layers"]),
        hidden=hidden,
        intermediate=int(config["intermediate_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        vocab=int(config["vocab_size"]),
        max_positions=int(config.get("max_position_embeddings", 2048)),
        rms_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.pop("rope_theta")),
        rope_scaling=tuple(sorted(rope.items())) if rope.get("rope_type", "default") != "default" else (),
        tied=bool(config.get("tie_word_embeddings", False)),
    )
    values.update(overrides)
    return ModelDims(**values)


def rope_parameters(config: dict, family: str) -> dict:
    """rope_theta, rope_type and the scaling's fields, from `rope_parameters` (transformers 5) or the older pair."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise ValueError(
            f"{family}: rope_type={rope['rope_type']!r} is not supported; supported: default, linear, llama3"
        )
    needed = {"linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}.get(
        rope["rope_type"], []
    )
    if rope["rope_type"] == "llama3":
        rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    missing = [key for key in needed if key not in rope]
    if missing:
        raise ValueError(f"{family}: rope_type={rope['rope_type']!r} needs {missing} in the model's config.json")
    return rope


# Fields that, when present with another value than these, change the mathematics of the forward pass.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, 0.0, None),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "n_routed_experts": (0, None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
    "logits_scaling": (1, 1.0, None),
    "residual_multiplier": (1, 1.0, None),
    "embedding_multiplier": (1, 1.0, None),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "no_rope_layers": (None, []),
    "quantization_config": (None,),
}


def refuse_common(config: dict, family: str) -> None:
    for key, neutral in _NEUTRAL.items():
        if key in config and config[key] not in neutral:
            raise ValueError(f"{family}: {key}={config[key]!r} is not supported; expected {neutral[0]!r}")
    types = set(config.get("layer_types") or ["full_attention"])
    if types != {"full_attention"}:
        raise ValueError(f"{family}: layer_types {sorted(types)} are not supported; expected only 'full_attention'")
    needed = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size")
    missing = [key for key in needed if key not in config]
    if missing:
        raise ValueError(f"{family}: config.json lacks {missing}")
    for key in (*needed, *(key for key in ("num_key_value_heads", "head_dim") if config.get(key) is not None)):
        size = config[key]
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{family}: {key}={size!r}, expected a whole number of at least 1")
