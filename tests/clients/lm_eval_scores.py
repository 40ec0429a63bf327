"""Run in lm-eval's environment: scores of one model on the tasks of a directory, as JSON.

python lm_eval_scores.py TASKS OUT MODEL MODEL_ARGS_JSON GEN_KWARGS_JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager


def main(tasks: str, out: str, model: str, model_args: str, gen_kwargs: str) -> None:
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=json.loads(model_args),
        tasks=["local_choice", "local_text"],
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        gen_kwargs=json.loads(gen_kwargs) or None,
        log_samples=True,
        bootstrap_iters=0,
    )
    scores = {name: {k: v for k, v in values.items() if "," in k} for name, values in found["results"].items()}
    answers = {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()}
    Path(out).write_text(json.dumps({"scores": scores, "answers": answers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
