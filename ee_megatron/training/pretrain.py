"""Before stage 0: a model trained on the task's worked problems, from random weights (the size ladder) or from those of
a pretrained one, which learns the ways to answer that it is to choose from.

texts <- question and worked answer of every training problem
maximise log p(text), every weight, full depth                              (learner)
loss <- mean -log p over the tokens of the validation texts
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from ..config.schema import PretrainConfig, RunConfig
from ..learner.batch import ReplayBatch, pack
from ..learner.learner import Learner
from ..objectives.schedules import schedule
from ..objectives.weights import text_likelihood
from ..tasks import Split
from .context import StageContext

FIGURES = "pretrain.json"
"""In the stage's directory: {"loss", "answer_loss"} in nats per token of the validation texts, {"tokens",
"sequences", "length"} trained on: predicted tokens, sequences, and the mean number of tokens of one."""


def pretrain(cfg: RunConfig, initial: Path) -> Path:
    """Run or resume the stage from the model at `initial`; returns the trained model's Hugging Face directory."""
    p = cfg.pretrain
    assert p is not None
    with StageContext(cfg, "pretrain", initial, learner=True, full=True) as context:
        done, checkpoint = context.checkpoints.latest()
        policy = context.checkpoints.read_policy(checkpoint, checked=True)[1] if checkpoint else context.start(p.seed)
        learner = context.make_learner(policy, checkpoint)
        texts = [tokens for tokens, _ in tokenised(context, "train")]
        order = plan(len(texts), p)
        lengths = np.array([len(tokens) for tokens in texts])
        context.open_metrics(resume_step=done)
        with context.progress(p.steps, done) as bar:
            for step in range(done, p.steps):
                context.stop_if_told(learner, step)
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
        out = context.write_model(learner)
        if context.directory is not None:
            context.directory.write_atomic(FIGURES, json.dumps(figures) + "\n")
            print(f"pretrain: {figures['tokens']} tokens, loss {figures['loss']:.4f}, {figures['answer_loss']:.4f} "
                  "nats per token of held-out texts, of their answers")  # fmt: skip
        context.finish()
        return out


def plan(count: int, p: PretrainConfig) -> np.ndarray:
    """Which texts make up each update, int64 [steps, batch_size]: all of them before any comes again, shuffled anew
    each time."""
    generator = np.random.default_rng(p.seed)
    wanted = p.steps * p.batch_size
    order = np.concatenate([generator.permutation(count) for _ in range(-(-wanted // count))])
    return order[:wanted].reshape(p.steps, p.batch_size)


def tokenised(context: StageContext, split: Split) -> list[tuple[np.ndarray, int]]:
    """The texts of a split as int64 tokens, and how many of these are the question's."""
    tokenizer = AutoTokenizer.from_pretrained(str(context.model_path), local_files_only=True)

    def tokens(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    rows = context.make_task().worked(split)
    asked = tokens([prompt.text for prompt, _ in rows])
    # Apart, as rollouts have it: no token spans the question's end.
    answers = tokens([f"{answer}\n" for _, answer in rows])
    return [(np.array(q + a, dtype=np.int64), len(q)) for q, a in zip(asked, answers, strict=True)]


def make_batch(texts: list[np.ndarray], num_layers: int) -> ReplayBatch:
    """Every token but the first is predicted; no gate is asked."""
    batch = pack([text[:1] for text in texts], [text[1:] for text in texts], None, num_layers)
    return replace(batch, asked=torch.zeros_like(batch.asked))


def held_out(context: StageContext, learner: Learner) -> dict[str, float]:
    """Mean -log p per token of the validation texts, and of their answers alone, in nats."""
    rows = tokenised(context, "validation")
    assert context.cfg.pretrain is not None
    size = context.cfg.pretrain.batch_size
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        batch = make_batch([text for text, _ in part], context.spec.num_layers)
        losses = -learner.score(batch).token_logprobs.double() * batch.counts
        # Position p predicts token p + 1: the answer's first token is predicted by the question's last.
        first = torch.tensor([asked - 1 for _, asked in part]).unsqueeze(1)
        answer = batch.counts & (torch.arange(batch.tokens.size(1)) >= first)
        sums += torch.stack([losses.sum(), batch.counts.sum(), (losses * answer).sum(), answer.sum()])
    return {"loss": float(sums[0] / sums[1]), "answer_loss": float(sums[2] / sums[3])}
