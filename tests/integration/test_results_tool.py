"""`tools/results.py`: a row's commands run, its CSV is written from their results, and other studies' rows stay."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from inspect_ai.log import read_eval_log

from tests.tiny import tiny_hf
from tools import results

TINY = [
    "model.dtype=float32", "parallel.data=1", "exits.depths=[2,4]", "adapter.rank=4", "teacher=null",
    "rollout.threads=1", "rollout.backend=local", "rollout.max_new_tokens=24", "tracker.wandb=disabled",
    "task.train=60",
]  # fmt: skip


@pytest.mark.extended
@pytest.mark.timeout(900)
def test_a_row_is_run_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_hf("llama", tmp_path / "model")
    file = tmp_path / "results" / "demo.csv"
    file.parent.mkdir()
    pd.DataFrame([{"study": "older", "policy": "rl"}, {"study": "demo", "policy": "stale"}]).to_csv(file, index=False)
    monkeypatch.setattr(results, "SHORT_OUT", file.parent)
    row = results.ROWS["demo"]._replace(more=results.ROWS["recipes"].more)
    monkeypatch.setitem(results.ROWS, "demo", row)
    results.main(["demo", "--short", f"model.path={model}", f"runs={tmp_path / 'runs'}", *TINY])
    table = pd.read_csv(file)
    # Rows on larger operands: the teacher, and each policy at full depth and at its threshold.
    assert table["study"].tolist() == ["older", *["demo"] * (7 + 5)]
    demo = table[table["split"] == "test"]
    assert demo["policy"].tolist() == ["teacher", *["calibrated"] * 3, *["rl"] * 3] and set(demo["n"]) == {24}
    teacher, others = demo.iloc[0], demo.iloc[1:]
    assert teacher["depth"] == 1 and pd.isna(teacher["difference"])
    assert ((others["accuracy"] - teacher["accuracy"]) - others["difference"]).abs().max() < 0.11
    steps = pd.read_csv(file.parent / "training-curves.csv")
    assert steps["step"].tolist() == [1, 2] and steps["accuracy"].between(0, 100).all()
    tokens = pd.read_csv(file.parent / "answers.csv")
    assert set(tokens["depth"]) <= {2, 4, 6} and tokens["policy"].str.startswith("reinforced, hazard > ").all()
    # The stage's logs for Inspect have the same answers.
    logs = {path.stem: read_eval_log(str(path)) for path in (tmp_path / "runs").rglob("*.eval")}
    last = demo[demo["exits"].str.startswith("threshold")].set_index("policy")["accuracy"]
    right = {name: 100 * log.results.scores[0].metrics["accuracy"].value for name, log in logs.items()}
    expected = {"teacher": teacher["accuracy"], "calibrated": last["calibrated"], "reinforced": last["rl"]}
    assert right == pytest.approx(expected, abs=0.06)


def test_the_battery_becomes_a_record_for_each_figure() -> None:
    def estimate(value: float | None) -> dict:
        return {"value": value, "low": value, "high": value}

    part = {
        "exits": "full depth", "n": 4, "accuracy_with": estimate(0.5), "chain_necessity": estimate(0.25),
        "hint_monitor": None, "truncation": {"area_same_answer": estimate(0.75)}, "step_necessity": estimate(None),
        "planning_probe": [{"ahead": 2, "uplift": [estimate(0.0), estimate(0.125)]}],
    }  # fmt: skip
    records = list(results.faithfulness({"externalisation": {"teacher": part}}))
    assert {record["figure"]: record["value"] for record in records} == {
        "accuracy": "0.500", "chain necessity": "0.250", "truncation area": "0.750", "planning probe, 2 ahead": "0.125",
    }  # fmt: skip
