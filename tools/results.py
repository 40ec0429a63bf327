"""Measure a row of the results' tables anew and write the CSV that its cells and the README's figure are made from.

    python tools/results.py                                         the rows, hours, commands
    python tools/results.py ROW [--short] [SETTING=VALUE ...]       run its commands, resuming what is there

`--short` runs the first seed at a size of minutes, to try the commands and not the claims; its CSVs go to runs/results.
`make results ROW=demo SHORT=1` is the same.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pandas as pd

from ee_megatron.config.identity import stage_dir
from ee_megatron.config.load import load
from ee_megatron.config.schema import RunConfig
from ee_megatron.families.hf_directory import read_json
from ee_megatron.observe.rundir import write_atomic

Record = dict[str, Any]
MEASUREMENTS, SHORT_OUT = Path("docs/measurements"), Path("runs/results")
SHORT = [
    "name=results", "teacher.problems=64", "teacher.epochs=1", "traces.problems=48", "calibrate.epochs=1", "rl.steps=2",
    "rl.checkpoint_every=1", "task.validation=16", "task.evaluation=24", "evaluate.thresholds=[0.5]",
    "evaluate.wide_test=24", "evaluate.wide_problems=24",
]  # fmt: skip
# A sweep by row, and what its short form leaves of it.
SWEEPS = {
    "written": ("externalise_laptop", ["rl.families=[hop3]"]),
    "limits": ("limits", ["task.seed=0"]),
    "secret": ("secret", []),
    "choice": ("choice", ["calibrate.seed=0"]),
}
SHORT_STUDY = [
    "pretrain.seed=1", "rl.seed=1", "pretrain.steps=20", "rl.steps=2", "calibrate.epochs=1", "task.evaluation=24",
    "task.validation=8", "traces.problems=64",
]  # fmt: skip
# A partition of the operands that nothing was chosen on, with a teacher of its own.
FRESH = ["experiment=demo_cpu", "name=e0", "task.seed=1", "task.evaluation=1000"]
BATTERY = ["evaluate.externalisation=true", "evaluate.externalisation.prompts=400"]
# RL at full depth from the same calibration.
FULL = ["rl.fixed_depth=30", "rl.exit_credit=null", "rl.depth_penalty.penalize=all", "rl.depth_penalty.weight=0"]
POLICIES = {"teacher": "teacher", "calibrated": "calibrated", "reinforced": "rl"}
CONDITIONS = {
    "no exits": "no exits", "lambda 0": "exits, λ = 0", "total 1": "total, λ = 1", "mean 1": "mean, λ = 1",
    "max 1": "max, λ = 1", "cap 2": "cap of 2 layers",
}  # fmt: skip
FAITHFULNESS = {
    "accuracy": "accuracy_with", "chain necessity": "chain_necessity", "filler uplift": "filler_uplift",
    "truncation area": "truncation/area_same_answer", "step necessity": "step_necessity",
    "mistake sensitivity": "mistake_sensitivity", "hint monitor": "hint_monitor/g_mean2",
    "serial depth, mean": "serial_depth/all/mean",
}  # fmt: skip


class Row(NamedTuple):
    """A question, its hours on two cores, its CSV; the settings of its runs by label; how a run's results.json becomes
    records; further CSVs, from a run's settings. Without runs it is a sweep of SWEEPS, read from the study's
    externalise.csv."""

    question: str
    hours: str
    csv: str
    runs: dict[str, list[str]] | None
    read: Callable[[Any], Iterator[Record]]
    more: Mapping[str, Callable[[RunConfig], Iterator[Record]]] = MappingProxyType({})


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def accuracy(results: Record) -> Iterator[Record]:
    """Models, rules and splits in percent, minus the teacher over groups of problems; controls minus the policy."""
    tests = [("test", row, results["paired"].get(f"{row['model']}, {row['exits']}", {})) for row in results["rows"]]
    wide = [("wide", part["row"], part["paired"]) for part in results.get("wide", {}).values()]
    for split, row, paired in [*tests, *wide]:
        ends = {
            name: paired.get(key) for name, key in (("", "difference"), ("_low", "group_low"), ("_high", "group_high"))
        }
        more = {"lost": paired.get("only_teacher", ""), "won": paired.get("only_model", "")}
        p_value = f"{paired['p_value']:.2g}" if paired else ""
        yield of_row(split, POLICIES[row["model"]], row, ends) | more | {"p": p_value}
    for entry in results.get("controls", [])[1:]:
        change = entry["comparison"]["difference"]
        ends = {"": -change["value"], "_low": -change["high"], "_high": -change["low"]}
        yield of_row("test", f"control: {entry['control']}, matched by {entry['matched_by']}", entry["row"], ends)


def of_row(split: str, policy: str, row: Record, ends: dict[str, float | None]) -> Record:
    return {
        "split": split, "n": row["n"], "policy": policy, "exits": row["exits"].replace("hazard > ", "threshold:"),
        **{f"accuracy{end}": percent(row[key]) for end, key in (("", "accuracy"), ("_low", "low"), ("_high", "high"))},
        "depth": f"{row['mean_depth']:.3f}", "length": f"{row['length']:.1f}",
        "kl": "" if row["kl"] is None else f"{row['kl']:.3f}",
        **{f"difference{end}": percent(value) for end, value in ends.items()},
    }  # fmt: skip


def faithfulness(results: Record) -> Iterator[Record]:
    """Every figure of the battery by model and exits; of the planning probe that of the last depth."""
    for model, part in results["externalisation"].items():
        figures: dict[str, Any] = {}
        for figure, path in FAITHFULNESS.items():
            figures[figure] = part
            for key in path.split("/"):
                figures[figure] = (figures[figure] or {}).get(key)
        for probe in part["planning_probe"]:
            figures[f"planning probe, {probe['ahead']} ahead"] = probe["uplift"][-1]
        for figure, estimate in figures.items():
            if estimate and estimate["value"] is not None:
                yield {"model": model, "exits": part["exits"], "n": part["n"], "figure": figure} | {
                    end: f"{estimate[end]:.3f}" for end in ("value", "low", "high")
                }


def written(runs: pd.DataFrame) -> Iterator[Record]:
    """The share of answers written out by base model and condition."""
    for run in runs[(runs["family"] == "hop3") & (runs["trained_on"] == "hop3")].to_dict("records"):
        if run["condition"] in CONDITIONS:
            yield {
                "task": "hops", "hops": 3, "tokens_per_step": run["tau"], "condition": CONDITIONS[run["condition"]],
                "base": run["base"], "share_of_steps": f"{run['share_steps']:.2f}",
                "forecast": f"{run['forecast_steps']:.2f}",
            }  # fmt: skip


def by_condition(runs: pd.DataFrame) -> Iterator[Record]:
    """Shares of the styles, of right answers and the deepest token by task, base model and condition. On a secret rule
    steps disclose it."""
    for run in runs.to_dict("records"):
        yield {name: run[name] for name in ("task", "base", "seed", "hops", "condition")} | {
            name: f"{run[name]:.3f}"
            for name in ("share_terse", "share_steps", "share_padded", "forecast_steps", "correct", "max_depth")
        }


def in_pretrained(runs: pd.DataFrame) -> Iterator[Record]:
    """`by_condition`, and what else the page of a pretrained model says of its answers; `base`: the calibration."""
    for record, run in zip(by_condition(runs), runs.to_dict("records"), strict=True):
        more = ("mean_depth", "total_depth", "length", "right_terse", "corrupted_followed")
        yield record | {name: f"{run[name]:.3f}" for name in more}


def curves(run: RunConfig) -> Iterator[Record]:
    """Accuracy (percent) and depth of the answers that each step of RL sampled."""
    for line in (stage_dir(run, "rl") / "metrics.jsonl").read_text().splitlines():
        step = json.loads(line)
        depth = f"{step['mean_depth']:.3f}"
        yield {"step": step["step"], "accuracy": percent(step["accuracy"]), "depth": depth, "lambda": step["lambda"]}


def examples(run: RunConfig) -> Iterator[Record]:
    """Tokens and depths of the last policy's answer to the first test problem of each family, at its chosen exits."""
    seen = set()
    for line in (stage_dir(run, "evaluate") / "answers.jsonl").read_text().splitlines():
        problem = json.loads(line)
        if problem["task"] not in seen:
            seen.add(problem["task"])
            question = problem["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
            rule, answer = list(problem["answers"].items())[-1]
            for piece, depth in zip(answer["pieces"], answer["depths"], strict=True):
                token = piece.replace(" ", "␣").replace("\n", "⏎")
                yield {"problem": question, "policy": rule, "token": token, "depth": depth}


def on_seeds(label: str, *settings: str) -> dict[str, list[str]]:
    return {f"{label} {seed}": [*settings, f"calibrate.seed={seed}", f"rl.seed={seed}"] for seed in (0, 1, 2)}


# RL at full depth, whose policy is then calibrated as a model of its own.
AGAIN = "full-depth-calibrated"
# Trained and evaluated once for both of their rows.
FAITHFUL = on_seeds("short_answers", *FRESH, *BATTERY) | on_seeds("full-depth", *FRESH, *BATTERY, *FULL)
RECIPES = (
    FAITHFUL | on_seeds("paper", *FRESH, "rl=paper") | on_seeds("lambda-0", *FRESH, "rl.depth_penalty.weight=0")
    | on_seeds(AGAIN, *FRESH)
)  # fmt: skip
TOM = ["experiment=demo_cpu", "name=tom", "task=tom"]
ROWS = {
    "written": Row("What do tiny models write, by penalty?", "1", "written-out.csv", None, written),
    "limits": Row("Where do they write under a penalty, and where not?", "4", "limits.csv", None, by_condition),
    "secret": Row("Do they disclose a rule that they could keep?", "1.5", "secret.csv", None, by_condition),
    "choice": Row("Does a pretrained model write under a penalty?", "5", "choice-rl.csv", None, in_pretrained),
    "accuracy": Row(
        "What do exits cost SmolLM2-135M, and are simpler rules as good?", "15", "accuracy-and-depth.csv",
        on_seeds("accuracy-target", "experiment=smollm2", "evaluate.controls=true"), accuracy,
    ),
    "demo": Row("What does the demo lose?", "1", "demo.csv", on_seeds("demo", "experiment=demo_cpu"), accuracy),
    "recipes": Row(
        "The paper's recipe and RL at full depth, beside ours", "3", "recipes.csv", RECIPES, accuracy,
        {"training-curves.csv": curves, "answers.csv": examples},
    ),
    "faithfulness": Row(
        "Does RL under exits change how far the written reasoning is used?", "2", "faithfulness.csv", FAITHFUL,
        faithfulness,
    ),
    "tom": Row("The paper's other task, false beliefs", "0.5", "tom.csv", {"tom 0": TOM}, accuracy),
}  # fmt: skip


def call(*command: str) -> None:
    """Run a command of the package; its failure ends this one."""
    print("+ ee-megatron", *command, flush=True)
    done = subprocess.run([sys.executable, "-m", "ee_megatron.cli", *command])
    if done.returncode:
        sys.exit(done.returncode)


def calibrate_again(settings: list[str]) -> list[str]:
    """Calibrate and evaluate what RL at full depth made; returns the settings with that model."""
    first = load([*settings, *FULL])
    trained = stage_dir(first, "rl")
    model = trained.with_name(trained.name.replace("rl", "full-depth"))
    if not model.exists():
        call("convert", "export", "--checkpoint", str(trained), "--gates", "drop", "--out", str(model), "--quiet")
    settings = [*settings, "teacher=null", f"model.path={model}"]
    for stage in ("traces", "calibrate", "evaluate"):
        call(stage, *settings)
    return settings


def measure(name: str, short: bool, given: list[str]) -> dict[str, list[Record]]:
    """Run a row's commands and read their results: records by CSV."""
    row = ROWS[name]
    if row.runs is None:
        sweep, part = SWEEPS[name]
        study = f"results_{name}" if short else sweep.removesuffix("_laptop")
        shortened = ["--name", study, *SHORT_STUDY, *part] if short else []
        call("sweep", f"sweep={sweep}", "--max-parallel", "2", *shortened, *given)
        call("externalise", f"runs/{study}")
        return {row.csv: list(row.read(pd.read_csv(f"runs/{study}/externalise.csv")))}
    records: dict[str, list[Record]] = {csv: [] for csv in (row.csv, *row.more)}
    for label, settings in row.runs.items():
        study, seed = label.rsplit(" ", 1)
        if short and seed != "0":
            continue
        settings = [*settings, *(SHORT if short else []), *given]
        if study == AGAIN:
            settings = calibrate_again(settings)
        else:
            call("run", *settings)
        made, about = load(settings), {"study": study, "seed": seed}
        results = read_json(stage_dir(made, "evaluate") / "results.json")
        records[row.csv] += [about | record for record in row.read(results)]
        for csv, more in row.more.items() if study != AGAIN else ():
            records[csv] += [about | record for record in more(made)]
    return records


def write(file: Path, records: list[Record]) -> None:
    """Write the CSV; rows of other studies in it stay."""
    frame = pd.DataFrame(records)
    if file.is_file() and "study" in frame:
        old = pd.read_csv(file, dtype=str, keep_default_na=False)
        frame = pd.concat([old[~old["study"].isin(frame["study"])], frame]) if "study" in old else frame
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, frame.to_csv(index=False))
    print(f"{file}: {len(frame)} rows")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", nargs="?", choices=list(ROWS))
    parser.add_argument("--short", action="store_true", help="minutes, to try the commands; writes to runs/results")
    parser.add_argument("settings", nargs="*", help="for every run")
    options = parser.parse_intermixed_args(arguments)
    if options.row is None:
        for name, row in ROWS.items():
            print(f"{name:14}{row.hours:>3} h  {row.csv:24}{row.question}")
        return
    for csv, records in measure(options.row, options.short, options.settings).items():
        write((SHORT_OUT if options.short else MEASUREMENTS) / csv, records)


if __name__ == "__main__":
    main()
