"""The last stage: teacher, calibrated and reinforced model on held-out problems, exits sampled and thresholded.

The threshold of each model is chosen on the validation split; the evaluation split is only measured.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from ..config.schema import RunConfig
from ..evaluation.evaluate import Answer, evaluate_model
from ..evaluation.results import table, write_results
from ..evaluation.summary import Row
from ..evaluation.threshold import choose_threshold
from ..policy import WeightSet, load_policy
from ..rollout.pool import RolloutPool
from ..rollout.sampling import ExitPolicy, SamplingParams
from ..types import Prompt
from . import stages
from .session import Session
from .stopping import listener


def policies(cfg: RunConfig) -> dict[str, Path]:
    """What is there to evaluate besides the teacher, by name: checkpoints."""
    found = {"calibrated": stages.calibrated(cfg)}
    if stages.is_done(cfg, "rl"):
        found["reinforced"] = stages.reinforced(cfg)
    return found


class Evaluation:
    """The evaluation of one configuration: rows and answers as they come."""

    def __init__(self, session: Session, sets: int):
        self.session, cfg = session, session.cfg
        self.task = session.make_task()
        self.verifier = session.make_verifier(self.task)
        self.pool: RolloutPool = session.make_pool(session.spec)
        self.sampling = SamplingParams(0.0, cfg.rollout.max_new_tokens, tuple(cfg.rollout.stop))
        self.test: list[Prompt] = self.task.prompts(cfg.evaluate.split)  # type: ignore[arg-type]
        self.validation: list[Prompt] = self.task.prompts("validation")
        tokenizer = AutoTokenizer.from_pretrained(str(session.model_path), local_files_only=True)
        # What the prompts cost to read; the table of a sweep asks for it.
        lengths = [len(tokenizer(p.text, add_special_tokens=False)["input_ids"]) for p in self.test]
        self.prompt_tokens = sum(lengths) / max(1, len(lengths))
        self.decode = lambda token: str(tokenizer.decode([token]))
        self.rows: list[Row] = []
        self.answers: list[Answer] = []
        self.meta: dict[str, object] = {}
        self.bar = session.stack.enter_context(session.progress(sets))

    def measure(self, model: str, exits: ExitPolicy, prompts: list[Prompt], *, final: bool) -> Row:
        row, answers = evaluate_model(
            self.pool,
            self.task,
            self.verifier,
            prompts,
            self.sampling,
            exits,
            label=model,
            num_layers=self.session.spec.num_layers,
            decode=self.decode,
            with_divergence=final,
            seed=self.session.cfg.evaluate.seed,
            progress=lambda done, total: self.bar.detail(f"{model} answers", done, total),
        )
        if final:
            self.rows.append(row)
            self.answers += answers
        self.bar.advance(1, accuracy=row.accuracy, depth=row.mean_depth)
        return row

    def policy(self, model: str, checkpoint: Path) -> None:
        """Sampled exits, then the threshold that validation chooses, on the test set."""
        e = self.session.cfg.evaluate
        self.pool.load(WeightSet(1, load_policy(checkpoint)[1]))
        tried = [self.measure(model, ExitPolicy("threshold", t), self.validation, final=False) for t in e.thresholds]
        chosen = choose_threshold(tried, e.tolerance)
        threshold = e.thresholds[tried.index(chosen)]
        self.meta[f"threshold_{model}"] = threshold
        self.meta[f"validation_{model}"] = [
            {"threshold": t, "accuracy": r.accuracy, "mean_depth": r.mean_depth, "n": r.n}
            for t, r in zip(e.thresholds, tried, strict=True)
        ]
        for exits in (ExitPolicy("off"), ExitPolicy("sample"), ExitPolicy("threshold", threshold)):
            self.measure(model, exits, self.test, final=True)


def evaluate(cfg: RunConfig, model_path: Path) -> None:
    """Run the stage: results.json for the report, table.txt for the terminal."""
    found = policies(cfg)
    sets = 1 + len(found) * (len(cfg.evaluate.thresholds) + 3)
    with listener.at_once(), Session(cfg, "evaluate", model_path, learner=False) as session:
        work = Evaluation(session, sets)
        work.pool.load(None)
        work.measure("teacher", ExitPolicy("off"), work.test, final=True)
        for model, checkpoint in found.items():
            work.policy(model, checkpoint)
        spec = session.spec
        work.meta |= {
            "num_layers": spec.num_layers,
            "exit_depths": list(spec.exit_depths),
            "prompt_tokens": work.prompt_tokens,
            "split": f"{cfg.evaluate.split}, {len(work.test)} problems, held out",
            "threshold choice": f"on {len(work.validation)} validation problems, tolerance {cfg.evaluate.tolerance}",
            "decoding": "greedy tokens",
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {session.device_type}",
            "versions": f"python {platform.python_version()}, torch {torch.__version__}",
        }
        write_results(session.path / "results.json", work.rows, work.answers, work.meta, cfg.evaluate.answers)
        assert session.directory is not None
        session.directory.write_atomic("table.txt", table(work.rows) + "\n")
        print(table(work.rows))
        session.finish()
