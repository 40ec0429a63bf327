"""Stage 0: make a teacher that reasons in the task's format, by rejection sampling and a short fine-tuning.

answers <- K samples per problem with worked examples in the prompt        (rollout pool, full depth)
keep one right answer per problem                                          (verifier)
maximise log p(answer | problem without examples)                          (learner, adapters, full depth)
merge the adapters -> the model that everything below calls the base

And stage 1, first half: traces of that model's answers at full depth; each position records the divergence of every
exit.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch

from ..config.schema import RunConfig
from ..learner.batch import pack
from ..objectives.schedules import schedule
from ..objectives.weights import answer_likelihood
from .collect import training_problems, verified
from .context import StageContext
from .ranks import listener
from .serialization import save_traces

logger = logging.getLogger(__name__)

SEED, TEMPERATURE = 0, 0.7
"""Seed and temperature of the sampled answers."""
TOP_K = 16
"""Teacher log-probabilities stored per position of a trace; the remaining mass is one lumped tail."""


def train_teacher(cfg: RunConfig, model_path: Path) -> None:
    """Run or resume the stage."""
    with StageContext(cfg, "teacher", model_path, learner=True) as context:
        examples = context.unless_stopped(None, 0, sample_examples, context)
        t = cfg.teacher
        assert t is not None
        start = context.start(SEED)
        learner = context.make_learner(start, adapter_dropout=cfg.adapter.dropout)
        context.open_metrics(resume_step=0)
        order = np.random.default_rng(SEED)
        picks = np.concatenate([order.permutation(len(examples)) for _ in range(t.epochs)])
        updates = -(-len(picks) // t.batch_size)
        with context.progress(updates, what="fine-tuning") as bar:
            for step in range(updates):
                # Fine-tuning is short and writes no checkpoint half-way: a stopped one starts again.
                context.stop_if_requested(None, 0)
                chosen = [examples[i] for i in picks[step * t.batch_size : (step + 1) * t.batch_size]]
                batch = pack([p for p, _ in chosen], [a for _, a in chosen], None, context.spec.num_layers)
                rate = t.learning_rate * schedule(step, updates, 0.1)
                context.fit(learner, batch, answer_likelihood(batch), rate, step, bar)
        context.write_model(learner)
        context.finish(f"{len(examples)} examples")


def sample_examples(context: StageContext) -> list[tuple[np.ndarray, np.ndarray]]:
    """(Prompt tokens without few-shot examples, tokens of one right answer) for every problem with a right answer."""
    t = context.cfg.teacher
    assert t is not None
    task = context.make_task()
    verifier = context.make_verifier(task)
    prompts = task.prompts("train")[: t.problems]
    shown = [task.few_shot(prompt, t.shots, SEED) for prompt in prompts]
    pool = context.make_pool(None)
    answers = context.sample(pool, shown, t.samples, TEMPERATURE, SEED, "sampling")
    pool.close()
    examples, right = [], 0
    for group in verified(verifier, prompts, answers):
        good = group.correct & group.well_formed
        right += int(good.sum())
        answer = next((a for a, fits in zip(group.rollouts, good, strict=True) if fits and a.finished), None)
        if answer is not None:
            tokens = context.tokenizer(group.prompt.text, add_special_tokens=False)["input_ids"]
            examples.append((np.array(tokens, dtype=np.int64), answer.tokens))
    summary = f"{right} of {len(prompts) * t.samples} samples right, {len(examples)} of {len(prompts)} problems kept"
    logger.info("teacher: %s", summary)
    print(f"teacher: {summary}")
    if len(examples) < t.batch_size:
        raise ValueError(
            f"only {len(examples)} problems were answered right, fewer than one batch of {t.batch_size}; "
            "raise teacher.samples or teacher.problems, or choose easier task.families"
        )
    torch.set_num_threads(1)
    return examples


def make_traces(cfg: RunConfig, model_path: Path) -> None:
    """Run the traces stage: an inference job without a learner."""
    t = cfg.traces
    with listener.at_once(), StageContext(cfg, "traces", model_path, learner=False) as context:
        task = context.make_task()
        verifier = context.make_verifier(task)
        prompts = training_problems(cfg, model_path, task, t.wide_operands, t.problems)
        pool = context.make_pool(context.spec)
        answers = context.sample(pool, prompts, 1, t.temperature, SEED, "answers")
        groups = verified(verifier, prompts, answers)
        rollouts = [answer for group in groups for answer in group.rollouts]
        right = np.concatenate([group.correct for group in groups])
        with context.progress(len(rollouts), what="divergences") as reading:
            traces = pool.trace(rollouts, TOP_K, lambda done, total: reading.advance(done - reading.done))
        for trace, answer, correct in zip(traces, rollouts, right, strict=True):
            trace.correct, trace.text = bool(correct), answer.text
        save_traces(context.path / "dataset", traces)
        print(f"traces: {len(traces)} answers, {sum(len(t.tokens) for t in traces)} tokens, {right.mean():.3f} right")
        context.finish(f"{len(traces)} traces")
