"""A synthetic run's files: invented numbers of a plausible shape, for the report's tests only."""

import json
import math
import random
from pathlib import Path

LAYERS, DEPTHS = 30, [10, 15, 20, 25]
PIECES = [" 3", " x", " 8", " =", " 2", "4", ".", " The", " answer", " is", " 2", "4", "\n"]
RULES = {"teacher": ["full depth"], "calibrated": ["sampled", "hazard > 0.5", "hazard > 0.9"]}
RULES["reinforced"] = RULES["calibrated"]


def write_run(root: Path, steps: int = 40) -> dict[str, Path]:
    """Files of all five stages under `root`; returns the stage directories as `write_report` takes them."""
    rng = random.Random(1)
    stages = {name: root / name for name in ("teacher", "traces", "calibrate", "rl", "evaluate")}
    for name, path in stages.items():
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(f"name: demo\nstage: {name}\nlearning_rate: 1.0e-3\n")
    names = {
        "teacher": ["loss"],
        "calibrate": ["loss", "kl", "gate_nll", "mean_depth_target"],
        "rl": ["reward", "accuracy", "mean_depth", "total_depth", "length", "kl", "seconds", "odd_name"],
    }
    for stage, metrics in names.items():
        rows = [
            {"step": s} | {m: round(math.exp(-s / 15) + 0.1 * rng.random() + i / 4, 4) for i, m in enumerate(metrics)}
            for s in range(1, steps + 1)
        ]
        (stages[stage] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (stages["evaluate"] / "results.json").write_text(json.dumps(results(rng)))
    return stages


def results(rng: random.Random) -> dict:
    rows, histogram, answers = [], {}, []
    for m, (model, rules) in enumerate(RULES.items()):
        for r, rule in enumerate(rules):
            accuracy, depth = 0.86 - 0.03 * (2 - r) * (m > 0), (1.0, 0.76, 0.55)[m] + 0.05 * r
            rows.append(
                {"model": model, "exits": rule, "n": 400, "correct": round(400 * accuracy), "accuracy": accuracy}
                | {"low": accuracy - 0.035, "high": accuracy + 0.033, "mean_depth": depth, "length": 13.2 + m}
                | {"total_depth": depth * 30 * 13, "kl": 0.05 * m if m else None, "tokens_per_s": 310 + 90 * m}
            )
            counts = {30: 5200} if model == "teacher" else {d: rng.randint(200, 1500) for d in (*DEPTHS, 30)}
            histogram[f"{model}, {rule}"] = {str(depth): count for depth, count in counts.items()}
    for p in range(4):
        for m, model in enumerate(RULES):
            tokens = []
            for i, piece in enumerate(PIECES):
                entropy = rng.expovariate(1.0) * (0.1 if i in (1, 3, 6, 7, 8, 9) else 1.0)
                early = min(4, int(entropy * 2.2) + (2 - m))
                depth = 30 if m == 0 or i == 0 else (*DEPTHS, 30)[early]
                exit_logprob = 0.0 if i == 0 else -rng.random()
                tokens.append({"text": piece, "depth": depth, "logprob": -entropy / 3, "exit_logprob": exit_logprob})
                tokens[-1]["entropy"] = entropy
            answers.append(
                {
                    "prompt": f"Question: What is {p + 3} x 8?",
                    "reference": "24",
                    "model": model,
                    "exits": RULES[model][-1],
                }
                | {"correct": not (p == 1 and m == 1), "text": "".join(PIECES), "tokens": tokens}
            )
    meta = {"name": "demo: SmolLM2-135M", "num_layers": LAYERS, "exit_depths": DEPTHS, "date": "2026-03-01"}
    meta |= {"command": "ee-megatron run experiment=demo_cpu", "versions": {"torch": "2.13", "megatron-core": "0.16.1"}}
    labels = [label for label in histogram if not label.startswith("teacher")]
    correlation = {}
    for i, label in enumerate(labels):
        bins = [{"entropy": 0.1 + 0.4 * b, "depth": 18.0 - 1.5 * i + 2.8 * b, "tokens": 387} for b in range(5)]
        correlation[label] = {"spearman": 0.5 - i / 50, "low": 0.3, "high": 0.6, "tokens": 3100, "bins": bins}
    paired = {label: {"n": 400, "only_teacher": 21, "only_model": 14, "p_value": 0.3105} for label in labels}
    return {
        "meta": meta,
        "rows": rows,
        "answers": answers,
        "depth_by_entropy": correlation,
        "exit_histogram": histogram,
        "paired": paired,
    }
