"""Both ways between ours and megatron-core's own GPTModel, on gloo ranks: what `import` writes it loads strictly, and
what it saves `import --megatron` reads."""

from __future__ import annotations

import logging
import os

import pytest
import torch
import torch.distributed as dist
from layout_cases import split
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from ranks import Ranks
from test_convert_layouts import hashes, run
from transformers import AutoModelForCausalLM

from ee_megatron.checkpoint.megatron_io import WEIGHTS, cuda_optional
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.parallel.groups import Degrees
from tests.tiny import MODELS, tiny_hf

# 133 is odd: under two tensor ranks the vocabulary is padded.
SIZES = {"vocab": 133, "layers": 4, "hidden": 64}
LAYOUTS = [(1, 1), (2, 2)]
# How megatron-core may be asked to store layers, and gate and up: by the layout that does.
FORMS = {
    "1x1": {"single": {"non_homogeneous_layers": True}},
    "2x2": {"stacked": {}, "apart": {"singleton_local_shards": True}},
}


def own_model(args, tensor: int, pipeline: int) -> GPTModel:
    """megatron-core's model as Megatron-LM's arguments describe it, with random weights."""
    fusions = ("bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion", "gradient_accumulation_fusion")
    config = TransformerConfig(
        num_layers=args.num_layers, hidden_size=args.hidden_size, ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads, num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels, normalization=args.normalization, layernorm_epsilon=args.norm_epsilon,
        gated_linear_unit=args.swiglu, activation_func=torch.nn.functional.silu, add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias, qk_layernorm=args.qk_layernorm, hidden_dropout=args.hidden_dropout,
        attention_dropout=args.attention_dropout, tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline, pipeline_dtype=torch.float32, use_cpu_initialization=True,
        batch_p2p_sync=False, **dict.fromkeys(fusions, False),
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


class Warnings(logging.Handler):
    """What is logged as a warning or worse while it is on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger().addHandler(self)
        return self.found

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)


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
        with cuda_optional(), Warnings() as warned:
            loaded, missing, unexpected = dist_checkpointing.load(asked, str(weights), strict="return_all")
            model.load_state_dict({key: loaded[key] for key in asked}, strict=True)
        found[name] = warned, missing, unexpected, logits(model, tokens, pipeline)
        for form, metadata in FORMS[f"{tensor}x{pipeline}"].items():
            out = saved / form / "iter_0000010"
            if dist.get_rank() == 0:
                out.mkdir(parents=True)
                (saved / form / "latest_checkpointed_iteration.txt").write_text("10")
            dist.barrier()
            state = model.sharded_state_dict(metadata={**metadata, "dp_cp_group": group})
            extra = {"args": common["args"], "iteration": 10, "checkpoint_version": 3.0}
            with cuda_optional():
                dist_checkpointing.save(state | extra, str(out), content_metadata=metadata)
    return found


@pytest.fixture(scope="module")
def there_and_back(tmp_path_factory):
    """Every model imported, loaded and saved by megatron-core's ranks: (folder, Hugging Face models, tokens, found)."""
    tmp = tmp_path_factory.mktemp("megatron")
    names = {f"{family}-{tied}": (family, tied) for family, tied in MODELS}
    bases = {name: tiny_hf(family, tmp / name, tied=tied, **SIZES) for name, (family, tied) in names.items()}
    tokens = torch.randint(0, 133, (2, 20), generator=torch.Generator().manual_seed(1))
    found = {}
    for name, base in bases.items():
        # Cut for another layout than the one that loads it, and adapters and gates beside it.
        options = ("--tp", 2, "--rank", 2, "--exit-depths", "2")
        assert run("import", "--hf", base, "--out", tmp / f"{name}-mc", *options) == 0
    with Ranks(4, tmp / "ranks") as ranks:
        for tensor, pipeline in LAYOUTS:
            layout = f"{tensor}x{pipeline}"
            cases = {name: (tmp / f"{name}-mc", tmp / "saved" / layout / name) for name in bases}
            target = "test_convert_megatron:load_run_and_save"
            found[layout] = ranks.call(target, tensor=tensor, pipeline=pipeline, cases=cases, tokens=tokens)
    return tmp, bases, tokens, found


def test_megatron_cores_own_model_loads_an_import_strictly_and_gives_its_logits(there_and_back):
    _, bases, tokens, found = there_and_back
    for name, base in bases.items():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            expected = model(tokens).logits
        for layout, ranks in found.items():
            results = [rank[name] for rank in ranks]
            for warned, missing, unexpected, _ in results:
                # Only Transformer Engine's norms ask for these.
                assert {key.rsplit("layernorm", 1)[-1] for key in missing} == {"._extra_state"}
                assert (warned, unexpected) == ([], set())
            given = [logits for *_, logits in results if logits is not None]
            assert len(given) == {"1x1": 4, "2x2": 2}[layout]
            for logits_ in given:
                error = (logits_[..., :133] - expected).norm() / expected.norm()
                assert error <= 1e-6, (name, layout, error)


@pytest.mark.parametrize(("layout", "form"), [(layout, form) for layout, forms in FORMS.items() for form in forms])
def test_what_megatron_cores_own_model_saves_becomes_the_same_hugging_face_model(there_and_back, layout, form):
    tmp, bases, *_ = there_and_back
    for name, base in bases.items():
        saved, here = tmp / "saved" / layout / name / form, tmp / "back" / form / name
        # Dimensions from the arguments in common.pt, or from a directory that also has the tokenizer.
        config = ("--config", base) if form == "single" else ()
        assert run("import", "--megatron", saved, *config, "--out", here / "mc", "--tp", 2, "--exit-depths", "1,2") == 0
        assert run("export", "--checkpoint", here / "mc", "--out", here / "hf", "--gates", "drop") == 0
        assert hashes(here / "hf") == hashes(base)
        assert (here / "hf" / "tokenizer.json").is_file() == bool(config)
        assert HFDirectory(here / "hf").dims == HFDirectory(base).dims
