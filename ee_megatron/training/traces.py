"""Stage 1, first half: the teacher answers at full depth; each position keeps what every exit would have cost."""

from __future__ import annotations

from pathlib import Path

from ..config.schema import RunConfig
from .context import StageContext
from .problems import training_problems
from .stopping import listener
from .stored import save_traces

SEED = 0
TOP_K = 16
"""Teacher log-probabilities kept per position; the rest is one lumped tail."""


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
        kept = [(a, v.correct) for (_, a), v in zip(flat, verdicts, strict=True) if v.correct or not t.only_correct]
        with context.progress(len(kept), what="divergences") as reading:
            rollouts = [answer for answer, _ in kept]
            traces = pool.trace(rollouts, TOP_K, lambda done, total: reading.advance(done - reading.done))
        for trace, (answer, correct) in zip(traces, kept, strict=True):
            trace.correct, trace.text = bool(correct), answer.text
        save_traces(context.path / "dataset", traces)
        accuracy = sum(v.correct for v in verdicts) / len(verdicts)
        print(f"traces: {len(traces)} answers, {sum(len(t.tokens) for t in traces)} tokens, {accuracy:.3f} right")
        context.finish(f"{len(traces)} traces")
