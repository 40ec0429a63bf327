"""Stage 0: make a teacher that reasons in the task's format, by rejection sampling and a short fine-tuning.

answers <- K samples per problem with worked examples in the prompt        (rollout pool, full depth)
keep one right answer per problem                                          (verifier)
maximise log p(answer | problem without examples)                          (learner, adapters, full depth)
merge the adapters -> the model that everything below calls the base

And stage 1, first half: traces of that model, which answers at full depth; each position records what every exit would
have cost.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from ..config.schema import RunConfig
from ..learner.batch import pack
from ..objectives.schedules import schedule
from ..objectives.weights import answer_likelihood
from .context import StageContext
from .dataset_mixing import training_problems
from .preemption import listener
from .serialization import save_traces

logger = logging.getLogger(__name__)

SEED, TEMPERATURE = 0, 0.7
"""Of the sampled answers."""
TOP_K = 16
"""Teacher log-probabilities kept per position of a trace; the rest is one lumped tail."""


def train_teacher(cfg: RunConfig, model_path: Path) -> Path:
    """Run or resume the stage; returns the teacher's Hugging Face directory."""
    with StageContext(cfg, "teacher", model_path, learner=True) as context:
        examples = context.ranks.unless_stopped(lambda: sample_examples(context))
        if examples is None:
            context.stop(None, 0)
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
                # Fine-tuning is short and keeps nothing half-way: it begins again.
                context.stop_if_told(None, 0)
                chosen = [examples[i] for i in picks[step * t.batch_size : (step + 1) * t.batch_size]]
                batch = pack([p for p, _ in chosen], [a for _, a in chosen], None, context.spec.num_layers)
                rate = t.learning_rate * schedule(step, updates, 0.1)
                context.fit(learner, batch, answer_likelihood(batch), rate, step, bar)
        out = context.write_model(learner)
        context.finish(f"{len(examples)} examples")
        return out


def sample_examples(context: StageContext) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt tokens without examples, tokens of one right answer) for every problem that was answered right once."""
    t = context.cfg.teacher
    assert t is not None
    task = context.make_task()
    verifier = context.make_verifier(task)
    prompts = task.prompts("train")[: t.problems]
    shown = [task.few_shot(prompt, t.shots, SEED) for prompt in prompts]
    pool = context.make_pool(None)
    groups = context.sample(pool, shown, t.samples, TEMPERATURE, SEED, "sampling")
    pool.close()
    verdicts = verifier.verify_many([(p, a.text) for p, g in zip(prompts, groups, strict=True) for a in g])
    tokenizer = AutoTokenizer.from_pretrained(str(context.model_path), local_files_only=True)
    examples, right, cursor = [], 0, 0
    for prompt, answers in zip(prompts, groups, strict=True):
        marks = [v.correct and v.well_formed for v in verdicts[cursor : cursor + len(answers)]]
        cursor += len(answers)
        right += sum(marks)
        kept = next((a for a, good in zip(answers, marks, strict=True) if good and a.finished), None)
        if kept is not None:
            tokens = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
            examples.append((np.array(tokens, dtype=np.int64), kept.tokens))
    logger.info("teacher: %d of %d samples right, %d of %d problems kept", right, cursor, len(examples), len(prompts))
    print(f"teacher: {right}/{cursor} samples right; one answer kept for {len(examples)} of {len(prompts)} problems")
    if len(examples) < t.batch_size:
        raise ValueError(
            f"only {len(examples)} problems were answered right, fewer than one batch of {t.batch_size}; "
            "raise teacher.samples or teacher.problems, or choose easier task.families"
        )
    torch.set_num_threads(1)
    return examples


def make_traces(cfg: RunConfig, model_path: Path) -> None:
    """Run the stage: an inference job without a learner."""
    t = cfg.traces
    with listener.at_once(), StageContext(cfg, "traces", model_path, learner=False) as context:
        task = context.make_task()
        verifier = context.make_verifier(task)
        prompts = training_problems(cfg, model_path, task, t.wide_operands, t.problems)
        pool = context.make_pool(context.spec)
        answers = context.sample(pool, prompts, 1, t.temperature, SEED, "answers")
        flat = [(p, a) for p, group in zip(prompts, answers, strict=True) for a in group]
        verdicts = verifier.verify_many([(p, a.text) for p, a in flat])
        rollouts = [answer for _, answer in flat]
        with context.progress(len(rollouts), what="divergences") as reading:
            traces = pool.trace(rollouts, TOP_K, lambda done, total: reading.advance(done - reading.done))
        for trace, answer, verdict in zip(traces, rollouts, verdicts, strict=True):
            trace.correct, trace.text = bool(verdict.correct), answer.text
        save_traces(context.path / "dataset", traces)
        accuracy = sum(v.correct for v in verdicts) / len(verdicts)
        print(f"traces: {len(traces)} answers, {sum(len(t.tokens) for t in traces)} tokens, {accuracy:.3f} right")
        context.finish(f"{len(traces)} traces")
