"""What was converted, on real gloo ranks: of ours, and of megatron-core's own GPTModel, which loads an import strictly
and whose checkpoints `import --megatron` reads."""

from __future__ import annotations

import os
from unittest import TestCase

import pytest
import torch
import torch.distributed as dist
from layout_cases import split
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from ranks import Ranks
from transformers import AutoModelForCausalLM

from ee_megatron.checkpoint.sources import WEIGHTS
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.parallel.groups import Degrees
from tests.conversion import hashes, made
from tests.covering import EXTENDED
from tests.tiny import MEGATRON_MODELS, MEGATRON_ONE_EACH, tiny_hf

# 133 is odd: under two and four tensor ranks the vocabulary is padded.
SIZES = {"vocab": 133, "hidden": 64}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with Ranks(4, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


# How megatron-core may be asked to store layers, and gate and up: by the pipeline stages that do.
FORMS = {1: {"single": {"non_homogeneous_layers": True}}, 2: {"stacked": {}, "apart": {"singleton_local_shards": True}}}


def own_model(args, tensor: int, pipeline: int) -> GPTModel:
    """megatron-core's model as Megatron-LM's arguments describe it, with random weights."""
    same = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    same += ("normalization", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "hidden_dropout", "attention_dropout")
    fusions = ("bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion", "gradient_accumulation_fusion")
    config = TransformerConfig(
        **{name: getattr(args, name) for name in same}, **dict.fromkeys(fusions, False), batch_p2p_sync=False,
        layernorm_epsilon=args.norm_epsilon, gated_linear_unit=args.swiglu, activation_func=torch.nn.functional.silu,
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, pipeline_dtype=torch.float32,
        use_cpu_initialization=True, no_rope_freq=getattr(args, "no_rope_freq", None),
    )  # fmt: skip
    rank = parallel_state.get_pipeline_model_parallel_rank()
    return GPTModel(
        config, get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization),
        vocab_size=-(-args.vocab_size // tensor) * tensor, max_sequence_length=args.max_position_embeddings,
        pre_process=rank == 0, post_process=rank == pipeline - 1, parallel_output=False,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type, rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
    ).eval()  # fmt: skip


@torch.no_grad()
def logits(model: GPTModel, tokens, pipeline: int):
    """[B, S, padded vocabulary] on the last stage, else None: the stages one after the other."""
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks, rank = dist.get_process_group_ranks(group), dist.get_rank(group)
    if rank:
        hidden = torch.empty(tokens.size(1), len(tokens), model.config.hidden_size)
        dist.recv(hidden, ranks[rank - 1], group)
        model.set_input_tensor(hidden)
    hidden_later = torch.ones(1, 1, tokens.size(1), tokens.size(1)).triu(1).bool()
    out = model(tokens, torch.arange(tokens.size(1)).expand_as(tokens), hidden_later)
    if rank < pipeline - 1:
        dist.send(out, ranks[rank + 1], group)
        return None
    return out


def load_run_and_save(tensor: int, pipeline: int, cases, tokens):
    """On every rank: load each import into megatron-core's own model, run it, save it in every form."""
    split(Degrees(tensor, pipeline, int(os.environ["WORLD_SIZE"]) // (tensor * pipeline)))
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    found = {}
    for name, (imported, saved) in cases.items():
        weights = imported / WEIGHTS
        common = dist_checkpointing.load_common_state_dict(str(weights))
        model = own_model(common["args"], tensor, pipeline)
        content = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
        asked = model.sharded_state_dict(metadata=content | {"dp_cp_group": group})
        with TestCase().assertNoLogs(level="WARNING"):
            loaded, missing, unexpected = dist_checkpointing.load(asked, str(weights), strict="return_all")
            model.load_state_dict({key: loaded[key] for key in asked}, strict=True)
        found[name] = missing, unexpected, logits(model, tokens, pipeline)
        for form, metadata in FORMS[pipeline].items():
            out = saved / form / "iter_0000010"
            if dist.get_rank() == 0:
                out.mkdir(parents=True)
                (saved / form / "latest_checkpointed_iteration.txt").write_text("10")
            dist.barrier()
            state = model.sharded_state_dict(metadata={**metadata, "dp_cp_group": group})
            extra = {"args": common["args"], "iteration": 10, "checkpoint_version": 3.0}
            dist_checkpointing.save(state | extra, str(out), content_metadata=metadata)
    return found


@pytest.mark.parametrize(
    ("layout", "models"),
    [
        ((2, 2), MEGATRON_ONE_EACH),
        pytest.param((2, 2), [m for m in MEGATRON_MODELS if m not in MEGATRON_ONE_EACH], marks=EXTENDED),
        pytest.param((1, 1), MEGATRON_MODELS, marks=EXTENDED),
    ],
    ids=["2x2", "2x2, the others", "1x1"],
)
def test_megatron_cores_own_model_takes_an_import_and_what_it_saves_is_imported(tmp_path, ranks, layout, models):
    tensor, pipeline = layout
    names = {f"{family}-{tied}": (family, tied) for family, tied in models}
    bases = {n: tiny_hf(family, tmp_path / n, tied=tied, layers=4, **SIZES) for n, (family, tied) in names.items()}
    tokens = torch.randint(0, 133, (2, 20), generator=torch.Generator().manual_seed(1))
    cases = {name: (tmp_path / f"{name}-mc", tmp_path / "saved" / name) for name in bases}
    for name, base in bases.items():
        # Cut for another layout than the one that loads it, and gates beside it.
        made("import --tp 2 --exit-depths 2 --hf", base, "--out", cases[name][0])
    target = "test_conversion_ranks:load_run_and_save"
    found = ranks.call(target, tensor=tensor, pipeline=pipeline, cases=cases, tokens=tokens)
    for name, base in bases.items():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            expected = model(tokens).logits
        results = [rank[name] for rank in found]
        for missing, unexpected, _ in results:
            # Only Transformer Engine's norms ask for these.
            assert {key.rsplit("layernorm", 1)[-1] for key in missing} == {"._extra_state"}
            assert not unexpected
        given = [logits for *_, logits in results if logits is not None]
        assert len(given) == 4 // pipeline
        for logits_ in given:
            assert (logits_[..., :133] - expected).norm() <= 1e-6 * expected.norm(), name
        for form in FORMS[pipeline]:
            saved, here = cases[name][1] / form, tmp_path / "back" / form / name
            # Dimensions from the arguments in common.pt, or from a directory that also has the tokenizer.
            config = ("--config", base) if form == "single" else ()
            made("import --tp 2 --exit-depths 1,2 --megatron", saved, *config, "--out", here / "mc")
            made("export --gates drop --checkpoint", here / "mc", "--out", here / "hf")
            assert hashes(here / "hf") == hashes(base)
            assert (here / "hf" / "tokenizer.json").is_file() == bool(config)
            assert HFDirectory(here / "hf").dims == HFDirectory(base).dims
