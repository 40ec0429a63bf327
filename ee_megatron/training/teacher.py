"""Stage 0: make a teacher that reasons in the task's format, by rejection sampling and a short fine-tuning.

answers <- K samples per problem with worked examples in the prompt        (rollout pool, full depth)
keep one right answer per problem                                          (verifier)
maximise log p(answer | problem without examples)                          (learner, adapters, full depth)
merge the adapters -> the model that everything below calls the base
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
from .session import Session

logger = logging.getLogger(__name__)

SEED, TEMPERATURE = 0, 0.7
"""Of the sampled answers."""


def train_teacher(cfg: RunConfig, model_path: Path) -> Path:
    """Run or resume the stage; returns the teacher's Hugging Face directory."""
    with Session(cfg, "teacher", model_path, learner=True) as session:
        examples = session.unless_stopped(lambda: sample_examples(session))
        if examples is None:
            session.stop(None, 0)
        t = cfg.teacher
        assert t is not None
        start = session.start(SEED)
        learner = session.make_learner(start, adapter_dropout=cfg.adapter.dropout)
        session.open_metrics(resume_step=0)
        order = np.random.default_rng(SEED)
        picks = np.concatenate([order.permutation(len(examples)) for _ in range(t.epochs)])
        updates = -(-len(picks) // t.batch_size)
        with session.progress(updates, what="fine-tuning") as bar:
            for step in range(updates):
                # Fine-tuning is short and keeps nothing half-way: it begins again.
                session.stop_if_asked(None, 0)
                chosen = [examples[i] for i in picks[step * t.batch_size : (step + 1) * t.batch_size]]
                batch = pack([p for p, _ in chosen], [a for _, a in chosen], None, session.spec.num_layers)
                rate = t.learning_rate * schedule(step, updates, 0.1)
                session.fit(learner, batch, answer_likelihood(batch), rate, step, bar)
        out = session.write_model(learner)
        session.finish(f"{len(examples)} examples")
        return out


def sample_examples(session: Session) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt tokens without examples, tokens of one right answer) for every problem that was answered right once."""
    t = session.cfg.teacher
    assert t is not None
    task = session.make_task()
    verifier = session.make_verifier(task)
    prompts = task.prompts("train")[: t.problems]
    shown = [task.few_shot(prompt, t.shots, SEED) for prompt in prompts]
    pool = session.make_pool(None)
    groups = session.sample(pool, shown, t.samples, TEMPERATURE, SEED, "sampling")
    pool.close()
    verdicts = verifier.verify_many([(p, a.text) for p, g in zip(prompts, groups, strict=True) for a in g])
    tokenizer = AutoTokenizer.from_pretrained(str(session.model_path), local_files_only=True)
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
