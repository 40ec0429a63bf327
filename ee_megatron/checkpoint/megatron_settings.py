"""Model settings in Megatron checkpoints: dimensions as Megatron-LM and Megatron-Bridge record them, read and written.

common.pt         Megatron-LM's arguments, an argparse.Namespace. It is a pickle that names classes of whatever wrote
                  it; it is read without importing or calling anything that it names
run_config.yaml   Megatron-Bridge's settings; `model` has the fields of megatron-core's TransformerConfig
"""

from __future__ import annotations

import pickle
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from ..families import FAMILIES, ModelDims, features, padded_vocab

COMMON = "common.pt"
RUN_CONFIG = "run_config.yaml"
# megatron-core's llama3 scaling takes a factor; the rest is fixed there.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA3_ON = ("use_rope_scaling", "rope_scaling")
# Settings that change the mathematics, and the values under which ours is the same. One that isn't there is neutral.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("swiglu", "gated_linear_unit"), (True,)),
    **dict.fromkeys(("num_experts", "num_moe_experts", "mtp_num_layers"), (None, 0)),
    **dict.fromkeys(
        (
            *("rotary_interleaved", "apply_layernorm_1p", "layernorm_zero_centered_gamma", "multi_latent_attention"),
            *("apply_residual_connection_post_layernorm", "qk_l2_norm", "attention_output_gate", "is_hybrid_model"),
        ),
        (False,),
    ),
    **dict.fromkeys(("window_size", "heterogeneous_layers_config_path", "experimental_attention_variant"), (None,)),
    "normalization": ("RMSNorm",),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "softmax_type": ("vanilla",),
}
# What `arguments` says of every model. `add_position_embedding` is an old spelling that every reader compares. There is
# no optimizer and no state of random numbers to resume from.
_FIXED: dict[str, Any] = dict(
    position_embedding_type="rope", add_position_embedding=True, rotary_percent=1.0, rotary_interleaved=False,
    normalization="RMSNorm", apply_layernorm_1p=False, swiglu=True, squared_relu=False,
    attention_dropout=0.0, hidden_dropout=0.0, apply_query_key_layer_scaling=False,
    tokenizer_type="HuggingFaceTokenizer", make_vocab_size_divisible_by=1, ckpt_format="torch_dist",
    no_save_optim=True, no_save_rng=True, consumed_train_samples=0, consumed_valid_samples=0,
)  # fmt: skip
# Dimension -> what it is called; the first that is there counts.
_NAMES = {
    "num_layers": ("num_layers",),
    "hidden": ("hidden_size",),
    "intermediate": ("ffn_hidden_size",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_query_groups",),
    "head_dim": ("kv_channels",),
    "max_positions": ("max_position_embeddings", "seq_length"),
    "rms_eps": ("norm_epsilon", "layernorm_epsilon"),
    "rope_theta": ("rotary_base",),
}
# Every field of ModelDims that `arguments` writes, and the family, which `config_of` reads off the layers. What
# other fields say would be lost.
CARRIED = {*_NAMES, "family", "vocab", "rope_scaling", "tied", "qkv_bias", "out_bias", "mlp_bias", "qk_norm", "no_rope"}


def refuse_lost(dims: ModelDims) -> None:
    """Raises ValueError, naming the field, for a model property that a Megatron checkpoint can't record."""
    lost = [name for name in features(dims) if name not in CARRIED]
    if lost:
        raise ValueError(
            f"{dims.family}: {lost[0]}={getattr(dims, lost[0])!r} has no place in a Megatron checkpoint's arguments; "
            "export to Hugging Face instead"
        )


def arguments(dims: ModelDims, layout: Mapping[str, Any], dtype: torch.dtype) -> Namespace:
    """Megatron-LM's arguments for a model. `layout`: degrees "tensor", "pipeline". Raises as `refuse_lost`."""
    refuse_lost(dims)
    scaling = dict(dims.rope_scaling)
    kind = scaling.get("rope_type")
    # Megatron-LM before there was such a setting doesn't know its name.
    still = {"no_rope_freq": [int(layer in dims.no_rope) for layer in range(dims.num_layers)]} if dims.no_rope else {}
    return Namespace(
        **_FIXED,
        **still,
        num_layers=dims.num_layers,
        hidden_size=dims.hidden,
        ffn_hidden_size=dims.intermediate,
        num_attention_heads=dims.heads,
        group_query_attention=dims.kv_heads < dims.heads,
        num_query_groups=dims.kv_heads,
        kv_channels=dims.head_dim,
        max_position_embeddings=dims.max_positions,
        rotary_base=int(dims.rope_theta),
        rotary_seq_len_interpolation_factor=int(float(scaling["factor"])) if kind == "linear" else None,
        use_rope_scaling=kind == "llama3",
        rope_scaling_factor=float(scaling["factor"]) if kind == "llama3" else 8.0,
        norm_epsilon=dims.rms_eps,
        add_bias_linear=dims.out_bias and dims.mlp_bias,
        add_qkv_bias=dims.qkv_bias,
        qk_layernorm=dims.qk_norm,
        untie_embeddings_and_output_weights=not dims.tied,
        vocab_size=dims.vocab,
        padded_vocab_size=padded_vocab(dims.vocab, layout["tensor"]),
        tensor_model_parallel_size=layout["tensor"],
        pipeline_model_parallel_size=layout["pipeline"],
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
    )


def common_state(dims: ModelDims, layout: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Content that Megatron-LM expects in common.pt: format version, iteration, arguments, and one entry per layer."""
    facts = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": {"non_homogeneous_layers": True}}
    return {"args": arguments(dims, layout, dtype), **facts}


class Inert:
    """Replaces unpickled objects of any other class: has their attributes, and none of their behaviour."""

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        # Objects with slots have a pair of dictionaries.
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update(part)

    def ignore(self, *_: Any, **__: Any) -> Inert:
        """A method of the replaced object, or what fills a subclass of a container: does nothing."""
        return Inert()

    __call__ = append = extend = __setitem__ = ignore


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # The one container class that may hold needed values.
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else Inert

    def persistent_load(self, _: Any) -> None:
        """A tensor's numbers, which are not needed."""


def read_common(folder: Path) -> dict[str, Any]:
    """Read common.pt with objects as `Inert`; empty if there is none. Raises ValueError, one line, if it is damaged."""
    path = folder / COMMON
    if not path.is_file():
        return {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            with archive.open(names[0]) as file:
                content = _Unpickler(file).load()
    # An unpickler of damaged bytes raises whatever its operations raise.
    except Exception as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: cannot be read ({text}); the checkpoint is damaged, save it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dict; the checkpoint is damaged")
    return content


def read_settings(folder: Path) -> dict[str, Any]:
    """Settings by name, from run_config.yaml or the arguments in common.pt; empty without either.

    Raises ValueError, one line: damaged.
    """
    file = folder / RUN_CONFIG
    if file.is_file():
        try:
            model = yaml.safe_load(file.read_text()).get("model", {})
        except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
            text = " ".join(str(error).split())
            raise ValueError(f"{file}: cannot be read ({text}); the checkpoint is damaged, save it again") from None
        return dict(model)
    return dict(getattr(read_common(folder).get("args"), "__dict__", {}))


def trained_for(folder: Path) -> dict[str, int]:
    """Training length as {"iteration", "tokens"}: updates, and positions of their sequences, as Megatron-LM counts
    them; values that are not recorded, or 0 as in the output of `convert import`, are left out. Raises ValueError, one
    line: damaged."""
    state = read_common(folder)
    arguments = getattr(state.get("args"), "__dict__", {})
    counts = {"iteration": state.get("iteration")}
    if arguments.get("consumed_train_samples") and arguments.get("seq_length"):
        counts["tokens"] = arguments["consumed_train_samples"] * arguments["seq_length"]
    return {name: int(count) for name, count in counts.items() if isinstance(count, int) and count > 0}


def refuse_settings(settings: Mapping[str, Any], where: Path) -> None:
    """Raises ValueError, naming the setting, for a setting that changes the mathematics and is not supported."""
    for name, neutral in _NEUTRAL.items():
        if name in settings and settings[name] not in neutral:
            raise ValueError(f"{where}: {name}={settings[name]!r} is not supported; expected {neutral[0]!r}")


def compare_settings(settings: Mapping[str, Any], dims: ModelDims, where: Path, config: Path) -> None:
    """Raises ValueError for the first recorded dimension that contradicts `config`."""
    # Positions may be fewer in training than what the model can do.
    pairs = {names: getattr(dims, field) for field, names in _NAMES.items() if field != "max_positions"}
    pairs[_LLAMA3_ON] = dict(dims.rope_scaling).get("rope_type") == "llama3"
    for names, wanted in pairs.items():
        recorded = _setting(settings, names)
        if recorded is not None and float(recorded) != float(wanted):
            raise ValueError(
                f"{where}: {names[0]}={recorded} is recorded there, {wanted} in {config}; give its own --config"
            )
    # Where other settings are recorded, one that isn't says that all layers rotate.
    if settings and _no_rope(settings, dims.num_layers, where) != dims.no_rope:
        raise ValueError(
            f"{where}: no_rope_freq={settings.get('no_rope_freq')!r} is recorded there, layers without RoPE are "
            f"{list(dims.no_rope)} in {config}; give its own --config"
        )


def config_of(settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: Path) -> dict[str, Any]:
    """Build a Hugging Face config from recorded settings and the shapes of stored parameters.

    shapes: whole parameters by their stored names. The vocabulary is the recorded one, else as many rows as are stored,
    padding included. Raises ValueError for a dimension that isn't recorded.
    """
    values = {field: _setting(settings, names) for field, names in _NAMES.items()}
    heads, hidden = values["heads"], values["hidden"]
    values["kv_heads"] = values["kv_heads"] or heads
    values["head_dim"] = values["head_dim"] or (hidden // heads if heads and hidden else None)
    missing = [_NAMES[field][0] for field, value in values.items() if value is None]
    if missing:
        raise ValueError(f"{where}: records no {', '.join(missing)}; add --config with its Hugging Face directory")
    layer = "decoder.layers.0."
    qk_norm = f"{layer}self_attention.q_layernorm.weight" in shapes
    out_bias, qkv_bias = (f"{layer}self_attention.linear_{part}.bias" in shapes for part in ("proj", "qkv"))
    no_rope = _no_rope(settings, values["num_layers"], where)
    family = "qwen3" if qk_norm else "qwen2" if qkv_bias and not out_bias else "smollm3" if no_rope else "llama"
    if no_rope and family != "smollm3":
        raise ValueError(f"{where}: no_rope_freq={settings['no_rope_freq']!r} is not supported in a {family}")
    config = {
        "model_type": family,
        "architectures": [FAMILIES[family].architecture],
        "hidden_act": "silu",
        "num_hidden_layers": values["num_layers"],
        "hidden_size": hidden,
        "intermediate_size": values["intermediate"],
        "num_attention_heads": heads,
        "num_key_value_heads": values["kv_heads"],
        "head_dim": values["head_dim"],
        "max_position_embeddings": values["max_positions"],
        "rms_norm_eps": values["rms_eps"],
        "rope_theta": float(values["rope_theta"]),
        "rope_scaling": _rope_scaling(settings),
        "vocab_size": settings.get("vocab_size") or shapes.get("embedding.word_embeddings.weight", (None,))[0],
        "tie_word_embeddings": "output_layer.weight" not in shapes,
    }
    if family != "qwen2":
        config["attention_bias"] = qkv_bias
    if family in ("llama", "smollm3"):
        config["mlp_bias"] = f"{layer}mlp.linear_fc1.bias" in shapes
    if family == "smollm3":
        config["no_rope_layers"] = [int(layer not in no_rope) for layer in range(values["num_layers"])]
    return config


def _no_rope(settings: Mapping[str, Any], layers: int, where: Path) -> tuple[int, ...]:
    """The layers without RoPE, from a list with 1 for each of them, or from n: every n-th is one."""
    given = settings.get("no_rope_freq")
    marks = given or [0] * layers
    if isinstance(marks, int):
        marks = [int((layer + 1) % marks == 0) for layer in range(layers)]
    if not isinstance(marks, list | tuple) or len(marks) != layers or any(mark not in (0, 1) for mark in marks):
        raise ValueError(f"{where}: no_rope_freq={given!r}, expected a number or 0 or 1 for each of {layers} layers")
    return tuple(layer for layer in range(layers) if marks[layer])


def _setting(settings: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((settings[name] for name in names if settings.get(name) is not None), None)


def _rope_scaling(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    if _setting(settings, _LLAMA3_ON):
        return {"rope_type": "llama3", "factor": float(settings.get("rope_scaling_factor") or 8.0), **LLAMA3}
    linear = _setting(settings, ("rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor"))
    return {"rope_type": "linear", "factor": float(linear)} if linear else None
