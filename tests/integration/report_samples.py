"""A synthetic run's files: invented numbers of a plausible shape, for the report's tests only."""

import json
import math
import random
from pathlib import Path

LAYERS, DEPTHS = 30, [10, 15, 20, 25]
PIECES = [" 3", " x", " 8", " =", " 2", "4", ".", " The", " answer", " is", " 2", "4", "\n"]
RULES = {"teacher": ["full depth"], "calibrated": ["sampled", "hazard > 0.5", "hazard > 0.9"]}
RULES["reinforced"] = RULES["calibrated"]


def write_run(root: Path, steps: int = 40, prompts: int = 4) -> dict[str, Path]:
    """Files of all five stages under `root`; returns the stage directories as `ReportRun` takes them."""
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
            {"step": s}
            | {m: round(math.exp(-s / 15) + 0.1 * rng.random() + i / 4, 4) for i, m in enumerate(metrics)}
            | ({"lambda": 1.0, "actors_alive": 2.0} if stage == "rl" else {})
            for s in range(1, steps + 1)
        ]
        (stages[stage] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seconds = {"sync": 0.5, "rollout": 4.0, "verify": 0.1, "score": 2.0, "update": 3.0, "step": 10.0}
    clocks = {f"seconds_{phase}": value for phase, value in seconds.items()}
    clocks |= {"tokens_per_s_device/rollout": 1234.0, "flops_per_s_device/update": 3.21e14, "mfu/update": 0.325}
    rows = [{"step": s} | {k: v * (3 if s == 1 else 1) for k, v in clocks.items()} for s in range(1, steps + 1)]
    (stages["rl"] / "timings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = results(rng, prompts)
    (stages["evaluate"] / "results.json").write_text(json.dumps(found))
    write_records(stages, found, rng)
    return stages


def write_records(stages: dict[str, Path], found: dict, rng: random.Random) -> None:
    """Every answer, the readouts at every exit for one problem, and rollouts of three steps."""
    labels = [f"{model}, {rules[-1]}" for model, rules in RULES.items()]
    lines = []
    for i in range(35):
        answers = {}
        for label in labels:
            length = len(PIECES) - (i % 3 if label == labels[-1] else 0)
            depths = [LAYERS, *(rng.choice([*DEPTHS, LAYERS]) for _ in range(length - 1))]
            depths = [LAYERS] * length if label == labels[0] else depths
            right = not (i % 5 == 0 and label == labels[1]) and not (i % 7 == 1 and label == labels[2])
            answers[label] = {"correct": right, "pieces": PIECES[:length], "depths": depths}
        asked = {"id": f"p{i}", "prompt": f"Question: What is {i} x 8?", "reference": str(8 * i)}
        lines.append({**asked, "task": "arithmetic", "answers": answers})
    (stages["evaluate"] / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    (stages["rl"] / "samples").mkdir()
    for step in (1, 20, 40):
        tokens = [{"text": p, "depth": rng.choice(DEPTHS), "logprob": -0.3, "exit_logprob": -0.2} for p in PIECES]
        asked = {"prompt": "Question: What is 5 x 9?", "reference": "45"}
        rollout = asked | {"correct": step > 1, "reward": float(step > 1), "left_out": 0, "tokens": tokens}
        kept = {"step": step, "rollouts": [rollout] * 2}
        (stages["rl"] / "samples" / f"step_{step}.json").write_text(json.dumps(kept))


def results(rng: random.Random, prompts: int) -> dict:
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
    for p in range(prompts):
        for m, model in enumerate(RULES):
            tokens = []
            for i, piece in enumerate(PIECES):
                entropy = rng.expovariate(1.0) * (0.1 if i in (1, 3, 6, 7, 8, 9) else 1.0)
                early = min(4, int(entropy * 2.2) + (2 - m))
                depth = 30 if m == 0 or i == 0 else (*DEPTHS, 30)[early]
                exit_logprob = 0.0 if i == 0 else -rng.random()
                tokens.append({"text": piece, "depth": depth, "logprob": -entropy / 3, "exit_logprob": exit_logprob})
                tokens[-1]["entropy"] = entropy
                tokens[-1]["readings"] = readings(piece, depth if i else 0, m)
            asked = {"id": f"p{p + 3}", "prompt": f"Question: What is {p + 3} x 8?", "reference": "24"}
            said = {"correct": not (p == 1 and m == 1), "text": "".join(PIECES), "tokens": tokens}
            answers.append({**asked, "model": model, "exits": RULES[model][-1], **said})
    meta = {"name": "demo: SmolLM2-135M", "num_layers": LAYERS, "exit_depths": DEPTHS, "date": "2026-03-01"}
    meta |= {"command": "ee-megatron run experiment=demo_cpu", "versions": {"torch": "2.13", "megatron-core": "0.16.1"}}
    labels = [label for label in histogram if not label.startswith("teacher")]
    correlation = {}
    for i, label in enumerate(labels):
        bins = [{"entropy": 0.1 + 0.4 * b, "depth": 18.0 - 1.5 * i + 2.8 * b, "tokens": 387} for b in range(5)]
        correlation[label] = {"spearman": 0.5 - i / 50, "low": 0.3, "high": 0.6, "tokens": 3100, "bins": bins}
    test = {"n": 400, "only_teacher": 21, "only_model": 14, "p_value": 0.3105, "groups": 120}
    test |= {"difference": -0.0175, "group_low": -0.041, "group_high": 0.006}
    return {
        "meta": meta | {"threshold_calibrated": 0.9, "threshold_reinforced": 0.9},
        "rows": rows,
        "answers": answers,
        "depth_by_entropy": correlation,
        "exit_histogram": histogram,
        "paired": dict.fromkeys(labels, test),
        "compared": {"reinforced, hazard > 0.9 against calibrated, hazard > 0.9": compared()},
        **figures(list(histogram)),
        "controls": controls(),
        "externalisation": {model: externalisation(m) for m, model in enumerate(RULES)},
        "choice": choice(),
    }


def compared() -> dict:
    changes = {"accuracy": estimate(0.0, 0.03), "depth": estimate(-0.21, 0.02)}
    changes |= {"total_depth": estimate(-81, 9), "length": estimate(1.0, 0.4)}
    counts = {"n": 400, "groups": 120, "only_before": 20, "only_after": 20, "p_value": 1.0}
    return {"model": "reinforced, hazard > 0.9", "against": "calibrated, hazard > 0.9", **counts, **changes}


def estimate(value: float, spread: float = 0.04) -> dict[str, float]:
    return {"value": value, "low": value - spread, "high": value + spread}


def readings(piece: str, depth: int, model: int) -> list[dict]:
    """What the exits up to `depth` would have written: the token itself from the one that was taken on."""
    exits = [
        {"depth": d, "text": piece if d == depth else " the", "logprob": -0.2, "hazard": 0.95 if d == depth else 0.02}
        for d in DEPTHS
        if d <= depth
    ]
    if not model:
        exits = [{**e, "hazard": None} for e in exits]
    return [*exits, {"depth": None, "text": piece, "logprob": -0.01, "hazard": None}]


def figures(labels: list[str]) -> dict:
    policies = [label for label in labels if not label.startswith("teacher")]
    kinds = {"digits": (28.0, 900), "operators": (21.0, 300), "words": (14.0, 2000), "other": (11.0, 200)}
    depth = {
        "mean": estimate(19.5, 0.3), "quantiles": {"0.1": 10, "0.25": 10, "0.5": 20, "0.75": 30, "0.9": 30},
        "total": estimate(312, 6), "answer": {**estimate(27, 1), "answers": 388}, "flops": estimate(7.1e9, 1e8),
        "classes": {name: {"depth": d, "tokens": n} for name, (d, n) in kinds.items()},
    }  # fmt: skip
    bins = [{"hazard": h, "target": 0.1 + 0.8 * h, "asked": 400} for h in (0.02, 0.3, 0.6, 0.97)]
    exits = [{"depth": d, "ece": 0.03 + d / 1000, "hazard": 0.3, "target": 0.3, "asked": 400} for d in DEPTHS]
    gates = {"ece": estimate(0.06), "mean_error": estimate(0.11), "asked": 1600, "bins": bins, "exits": exits}
    thresholds = [
        {"threshold": t, "n": 200, "accuracy": 0.7 + 0.15 * t, "low": 0.65 + 0.15 * t, "high": 0.75 + 0.15 * t}
        | {"mean_depth": 0.5 + 0.3 * t, "exits": f"hazard > {t}", "front": t != 0.7}
        for t in (0.3, 0.5, 0.7, 0.9)
    ]
    divergences = {str(d): {"kl": 40 / d**2, "low": 30 / d**2, "high": 50 / d**2} for d in (*DEPTHS, 30)}
    correlations = {group: estimate(0.5) for group in ("all", "digits", "answer")}
    return {
        "depth": {label: depth if label == labels[0] else {**depth, "flops": estimate(5.2e9, 1e8)} for label in labels},
        "by_task": {label: {"sum": by_task(0.9, 18.0), "word": by_task(0.71, 22.0)} for label in labels},
        "wide": {label: on_wide(label) for label in labels},
        "kl_by_exit": dict.fromkeys(policies, divergences),
        "depth_correlations": {label: {"entropy": correlations} for label in policies},
        "gates": {"calibrated": gates, "reinforced": gates},
        "pareto": {
            "calibrated": thresholds,
            "reinforced": [{**t, "accuracy": t["accuracy"] - 0.02} for t in thresholds],
        },
    }


def on_wide(label: str) -> dict:
    row = {"n": 959, "accuracy": 0.444, "low": 0.413, "high": 0.476, "mean_depth": 0.612, "length": 21.8}
    counts = {"only_teacher": 92, "only_model": 81, "groups": 439, "p_value": 0.45}
    test = {"difference": -0.011, "group_low": -0.041, "group_high": 0.02, **counts}
    return {"row": row, "paired": {} if label.startswith("teacher") else test, "by_task": {}}


def by_task(accuracy: float, depth: float) -> dict:
    span = {"low": accuracy - 0.05, "high": accuracy + 0.05}
    return {"n": 200, "accuracy": accuracy, "mean_depth": estimate(depth), **span}


def controls() -> list[dict]:
    def entry(name: str, matched: str, difference: float, within: bool = True) -> dict:
        row = {"accuracy": 0.84 - difference, "low": 0.8 - difference, "high": 0.88 - difference, "mean_depth": 0.65}
        comparison = {"difference": estimate(difference), "p_value": 0.04, "n": 400}
        return {"control": name, "matched_by": matched, "exits": f"{name} rule", "target": 0.65, "within": within} | {
            "row": row,
            "comparison": comparison,
        }

    found = [entry("(reinforced)", "itself", 0.0)]
    for i, name in enumerate(("fixed depth", "random exits", "confidence", "entropy")):
        found += [entry(name, "depth", 0.3 - i / 10, within=i != 2), entry(name, "accuracy", 0.0)]
    return found


def choice() -> dict:
    styles, depths = ["terse", "steps", "padded"], [str(depth) for depth in (*DEPTHS, LAYERS)]
    found = {"n": 300, "correct": 0.912, "length": 4.25, "square": 0.2}
    found |= {"mean_depth": 0.413, "total_depth": 1.755, "max_depth": 0.84}
    each = dict.fromkeys(styles, found)
    entry = {"hops": 3, "free": {**found, "share": {"terse": 0.34, "steps": 0.512, "padded": 0.14, "other": 0.008}}}
    entry |= {"forced": each, "forced_full": each, "corrupted": {"n": 300, "correct": 0.013, "followed": 0.967}}
    start = {"hop3": {**entry, "fixed": dict.fromkeys(depths, each)}}
    reinforced = {"hop1": {**entry, "hops": 1, "corrupted": None}, "hop3": entry}
    models = {name: {"exits": "sampled", "families": f} for name, f in (("start", start), ("reinforced", reinforced))}
    whole = {"styles": styles, "weights": [0.4, 0.4, 0.2], "num_layers": LAYERS, "answers_per_family": 300}
    return {**whole, "models": models}


def externalisation(model: int) -> dict:
    fractions = [0.0, 0.25, 0.5, 0.75, 1.0]
    names = ["chain_necessity", "filler_uplift", "step_necessity", "mistake_sensitivity"]
    names += ["accuracy_with", "accuracy_without"]
    serial = {"mean": estimate(20, 1), "quantiles": {q: estimate(25, 2) for q in ("0.5", "0.9", "1")}, "tokens": 4000}
    probes = [{"ahead": k, "uplift": [estimate(0.1 / k + d / 200) for d in (*DEPTHS, 30)]} for k in (1, 2)]
    return {
        "exits": "full depth" if not model else "hazard > 0.9",
        **{name: estimate(0.3 + 0.1 * model + i / 50) for i, name in enumerate(names)},
        "truncation": {
            "fractions": fractions,
            "same_answer": [estimate(0.2 + 0.8 * f) for f in fractions],
            "area_same_answer": estimate(0.4),
            "area_accuracy": estimate(0.35),
        },
        "hint_monitor": {"g_mean2": {"value": None, "low": None, "high": None}},
        "serial_depth": {"all": serial, "answer": serial},
        "planning_probe": probes,
    }
