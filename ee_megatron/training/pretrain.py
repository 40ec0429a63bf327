"""Stage before stage 0: train a model on the task's worked problems, from random weights (the size ladder) or from a
pretrained model, which learns the answer styles that it later chooses from.

texts <- question and worked answer of every training problem
maximise log p(text), every weight, full depth                              (learner)
loss <- mean -log p over the tokens of the validation texts
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..config.derive import model_dir, read_dims, shape_config
from ..config.schema import PretrainConfig, RunConfig
from ..families import ModelDims
from ..families.hf_directory import HFDirectory
from ..learner.batch import ReplayBatch, pack
from ..objectives.schedules import schedule
from ..objectives.weights import text_likelihood
from ..observe.rundir import atomic_directory
from ..tasks import Split, task_of
from .context import StageContext

if TYPE_CHECKING:
    from ..learner.learner import Learner

FIGURES = "pretrain.json"
"""In the stage's directory: {"loss", "answer_loss"} in nats per token of the validation texts, {"tokens",
"sequences", "length"} trained on: predicted tokens, sequences, and the mean number of tokens of one."""
END = "<|end|>"
OUTWARD = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
"""Weights that write into the residual stream."""


def pretrain(cfg: RunConfig, initial: Path) -> None:
    """Run or resume the stage from the model at `initial`."""
    p = cfg.pretrain
    assert p is not None
    with StageContext(cfg, "pretrain", initial, learner=True, full=True) as context:
        done, checkpoint = context.checkpoints.latest()
        policy = context.checkpoints.read_policy(checkpoint) if checkpoint else context.start(p.seed)
        learner = context.make_learner(policy, checkpoint)
        texts = [tokens for tokens, _ in tokenised(context, "train")]
        order = plan(len(texts), p)
        lengths = np.array([len(tokens) for tokens in texts])
        context.open_metrics(resume_step=done)
        with context.progress(p.steps, done) as bar:
            for step in range(done, p.steps):
                context.stop_if_requested(learner, step)
                batch = make_batch([texts[i] for i in order[step]], context.spec.num_layers)
                rate = p.learning_rate * schedule(step, p.steps)
                context.fit(learner, batch, text_likelihood(batch), rate, step, bar)
                if (step + 1) % p.checkpoint_every == 0 or step + 1 == p.steps:
                    context.checkpoints.save(learner, step + 1)
        used = lengths[order.ravel()]
        figures = held_out(context, learner) | {
            "tokens": int((used - 1).sum()),
            "sequences": int(order.size),
            "length": float(used.mean()),
        }
        context.write_model(learner)
        if context.directory is not None:
            context.directory.write_atomic(FIGURES, json.dumps(figures) + "\n")
            print(f"pretrain: {figures['tokens']} tokens, loss {figures['loss']:.4f}, {figures['answer_loss']:.4f} "
                  "nats per token of held-out texts, of their answers")  # fmt: skip
        context.finish()


def plan(count: int, p: PretrainConfig) -> np.ndarray:
    """Assign texts to updates, int64 [steps, batch_size]: passes over all texts, each shuffled anew."""
    generator = np.random.default_rng(p.seed)
    wanted = p.steps * p.batch_size
    order = np.concatenate([generator.permutation(count) for _ in range(-(-wanted // count))])
    return order[:wanted].reshape(p.steps, p.batch_size)


def tokenised(context: StageContext, split: Split) -> list[tuple[np.ndarray, int]]:
    """Tokenise the texts of a split, int64 each, and count the question's tokens."""

    def tokens(texts: list[str]) -> list[list[int]]:
        return context.tokenizer(texts, add_special_tokens=False)["input_ids"]

    rows = context.make_task().worked(split)
    questions = tokens([prompt.text for prompt, _ in rows])
    # Tokenized separately, as in rollouts: no token spans the end of the question.
    answers = tokens([f"{answer}\n" for _, answer in rows])
    return [(np.array(q + a, dtype=np.int64), len(q)) for q, a in zip(questions, answers, strict=True)]


def make_batch(texts: list[np.ndarray], num_layers: int) -> ReplayBatch:
    """Batch of texts in which every token but the first is predicted; no gate decides."""
    batch = pack([text[:1] for text in texts], [text[1:] for text in texts], None, num_layers)
    return replace(batch, gate_mask=torch.zeros_like(batch.gate_mask))


def held_out(context: StageContext, learner: Learner) -> dict[str, float]:
    """Mean -log p per token of the validation texts, and of their answers alone, in nats."""
    rows = tokenised(context, "validation")
    assert context.cfg.pretrain is not None
    size = context.cfg.pretrain.batch_size
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        batch = make_batch([text for text, _ in part], context.spec.num_layers)
        losses = -learner.score(batch).token_logprobs.double() * batch.loss_mask
        # Position p predicts token p + 1: the answer's first token is predicted by the question's last.
        first = torch.tensor([length - 1 for _, length in part]).unsqueeze(1)
        answer = batch.loss_mask & (torch.arange(batch.tokens.size(1)) >= first)
        sums += torch.stack([losses.sum(), batch.loss_mask.sum(), (losses * answer).sum(), answer.sum()])
    return {"loss": float(sums[0] / sums[1]), "answer_loss": float(sums[2] / sums[3])}


# -- random weights, and a tokenizer that fits the task's text ---------------------------------------------------------


def draw_model(cfg: RunConfig, path: Path) -> Path:
    """Make `path`, if it does not exist, from model.path/config.json: weights by pretrain.seed and, unless model.path
    has one, a tokenizer trained on the training problems. Returns `path`.

    Raises FileNotFoundError or ValueError: a shape that is not supported, a vocabulary too small for all bytes.
    """
    if path.is_dir():
        return path
    shape, dims = model_dir(cfg), read_dims(cfg)
    assert cfg.pretrain is not None
    with atomic_directory(path) as folder:
        (folder / "config.json").write_text(json.dumps(shape_config(cfg), indent=2) + "\n", encoding="utf-8")
        save_file(draw_weights(dims, cfg.pretrain.seed), folder / "model.safetensors", metadata={"format": "pt"})
        if (shape / "tokenizer.json").is_file():
            for file in shape.glob("*token*.json"):
                shutil.copyfile(file, folder / file.name)
        else:
            write_tokenizer(worked_texts(cfg), dims.vocab, folder)
        HFDirectory(folder)
    return path


def draw_weights(dims: ModelDims, seed: int) -> dict[str, Tensor]:
    """Draw float32 weights by Hugging Face name: normal, deviation sqrt(2 / (5 D)) (Nguyen and Salazar 2019, arXiv
    1910.05895), over sqrt(2 L) where they write into the residual stream (Radford et al. 2019); norms 1, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    deviation = math.sqrt(2 / (5 * dims.hidden))
    tensors: dict[str, Tensor] = {}
    for name, dimensions in dims.tensor_shapes().items():
        if len(dimensions) == 1:
            tensors[name] = torch.zeros(dimensions) if name.endswith("bias") else torch.ones(dimensions)
            continue
        scale = deviation / math.sqrt(2 * dims.num_layers) if name.endswith(OUTWARD) else deviation
        tensors[name] = torch.randn(dimensions, generator=generator) * scale
    return tensors


def worked_texts(cfg: RunConfig) -> list[str]:
    """Question and worked answer of every training problem, ended by a line break, at which rollouts stop."""
    task = task_of(cfg, model_dir(cfg))
    return [f"{prompt.text}{answer}\n" for prompt, answer in task.worked("train")]


def write_tokenizer(texts: Iterable[str], vocab: int, folder: Path) -> None:
    """Write a trained byte-level BPE tokenizer of at most `vocab` tokens, digits one by one: all bytes, so that it can
    write anything, merges by frequency (Sennrich et al. 2016), an end of text. Raises ValueError below 257."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab <= len(alphabet):
        raise ValueError(f"vocab_size={vocab} in config.json: a byte-level tokenizer needs {len(alphabet) + 1} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=sorted(alphabet), special_tokens=[END], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
