"""Forecasts of runs to come: what laws and forms say, kept with a date, and compared with what came of it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ee_megatron import __version__, cli
from ee_megatron.scaling.compare import compare
from ee_megatron.scaling.forecast import forecast_losses, forecast_metric
from ee_megatron.scaling.laws import ScalingFit, predict
from tests.scaling_samples import CHINCHILLA, EXPONENT_A, grid, noisy, observed, table, write_csv

FAST = ["--bootstrap", "200"]
LAYERS = np.repeat([2.0, 4, 8, 4, 8], 3)
SIZE = np.repeat([98304.0, 196608, 393216, 49152, 786432], 3)
METRIC = ["--metric", "hops", "--against", "layers,size"]
POINT = ["--at", "16,786432"]


def level(layers: float | np.ndarray) -> np.ndarray:
    return 2 + 0.9 * np.log(layers)


def ladder(path: Path, *later: float, seed: int = 3) -> Path:
    """15 runs of five shapes or, if given, runs of a sixth shape with the metric `later`."""
    if later:
        columns = {"run": [f"r{i}" for i in range(len(later))], "layers": 16, "size": 786432, "hops": later}
        return write_csv(path, columns)
    metric = level(LAYERS) + np.random.default_rng(seed).normal(0, 0.1, 15)
    return write_csv(path, {"run": range(15), "layers": LAYERS, "size": SIZE, "hops": metric})


def scaling(*arguments: object) -> int:
    return cli.main(["scaling", *map(str, arguments)])


@pytest.fixture
def forecast(tmp_path: Path, capsys) -> Path:
    """predict.json of the ladder at a shape of twice its layers."""
    assert scaling("predict", ladder(tmp_path / "small.csv"), *METRIC, *POINT, *FAST, "--out", tmp_path / "ahead") == 0
    capsys.readouterr()
    return tmp_path / "ahead" / "predict.json"


def checked(forecast: Path) -> list[dict]:
    return json.loads((forecast.parent / "check.json").read_text())["points"]


def test_a_forecast_holds_the_truth_and_its_date_and_says_what_lies_beyond_the_table(forecast: Path) -> None:
    found = json.loads(forecast.read_text())
    made = datetime.fromisoformat(found["made"])
    assert made.utcoffset() is not None and abs((datetime.now(UTC) - made).total_seconds()) < 600
    assert found["ee_megatron"] == __version__ and len(found["sha256"]) == 64 and found["options"]["metric"] == "hops"
    best, *others, any_form = found["forecasts"]
    assert best["method"] == "linear" and others and any_form["method"] == "any of these"
    assert best["at"] == {"layers": 16, "size": 786432} and "layers" in best["beyond"] and "size" not in best["beyond"]
    assert best["run_low"] < best["law_low"] < level(16.0) < best["law_high"] < best["run_high"]
    assert any_form["value"] == best["value"] == pytest.approx(level(16.0), abs=0.3)
    for end, extreme in (("law_low", min), ("law_high", max), ("run_low", min), ("run_high", max)):
        assert any_form[end] == extreme(one[end] for one in (best, *others))


def test_a_forecast_is_replaced_only_on_demand(forecast: Path, capsys) -> None:
    other, before = ladder(forecast.parent.parent / "other.csv", seed=4), forecast.read_bytes()
    assert scaling("predict", other, *METRIC, *POINT, *FAST, "--out", forecast.parent) == 2
    assert "--again" in capsys.readouterr().err and forecast.read_bytes() == before
    assert scaling("predict", other, *METRIC, *POINT, *FAST, "--out", forecast.parent, "--again") == 0
    assert json.loads(forecast.read_text())["table"] == "other.csv"


def test_shares_are_forecast_between_nothing_and_all() -> None:
    share = np.clip(0.9 + np.random.default_rng(3).normal(0, 0.08, 9), 0.01, 0.99)
    cells = table({"layers": np.repeat([4.0, 8.0, 16.0], 3), "metric": share})
    comparison = compare(cells, {}, "metric", ["layers"], 200, 0)
    found = {one["method"]: one for one in forecast_metric(comparison, (64.0,))}
    assert found["constant"]["run_high"] > 1 or found["linear"]["run_high"] > 1
    assert 0 <= found["logistic"]["run_low"] <= found["logistic"]["run_high"] <= 1


def test_losses_and_optima_are_forecast_with_intervals_that_hold_the_truth(tmp_path: Path) -> None:
    obs = noisy(1, 6, 6, 0.01)
    runs = write_csv(tmp_path / "runs.csv", {name: obs[name] for name in ("params", "tokens", "loss")})
    points = ["--at", "1e9,1e11", "--at", "7e10,1.4e12", "--compute", "1e22", "--method", "huber"]
    assert scaling("predict", runs, *FAST, *points, "--out", tmp_path) == 0
    found = json.loads((tmp_path / "predict.json").read_text())["forecasts"]
    _, a, b, alpha, beta = CHINCHILLA[0]
    optimum = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (1e22 / 6) ** EXPONENT_A
    truths = [*predict(CHINCHILLA, np.array([1e9, 7e10]), np.array([1e11, 1.4e12]))[0], optimum]
    assert all(one["law_low"] < truth < one["law_high"] for one, truth in zip(found, truths, strict=True))
    assert found[0]["beyond"] == "" != found[1]["beyond"] and found[2]["run_low"] is None
    later = write_csv(tmp_path / "later.csv", {"params": [7e10], "tokens": [1.4e12], "loss": [truths[1] + 1]})
    assert scaling("check", tmp_path / "predict.json", later) == 0
    assert [one["verdict"] for one in checked(tmp_path / "predict.json")] == ["FAILED"]
    later.write_text("params,tokens,loss\n1e3,1e3,3\n")
    assert scaling("check", tmp_path / "predict.json", later) == 2


def test_a_runs_noise_in_a_forecast_is_enlarged_by_what_the_fit_took_of_it() -> None:
    """Nine runs off the law by a hundredth in ln, up or down, of which five fitted numbers took their part: a law
    without any doubt leaves a run's interval from e^-s to e^s of it, s = .01 √(9/4)."""
    n, d = grid(3, 3)
    obs = observed(n, d, predict(CHINCHILLA, n, d)[0])
    off = 0.01 * np.array([1, -1, 1, -1, 1, -1, 1, -1, 1])
    fit = ScalingFit(pd.DataFrame(), 4, np.empty((0, 2)), {}, np.repeat(CHINCHILLA, 400, axis=0), off)
    (found,) = forecast_losses(fit, obs, [(1e9, 1e11)], 0)
    assert found["law_low"] == pytest.approx(found["value"]) == found["law_high"]
    ends = np.log([found["run_low"] / found["value"], found["run_high"] / found["value"]])
    assert ends == pytest.approx([-0.015, 0.015])


def test_lambda_enters_as_in_compare_and_may_be_zero(tmp_path: Path, capsys) -> None:
    price, sizes = np.tile([0.0, 0.5, 1, 2], 5), np.repeat(np.geomspace(1e5, 1e7, 5), 4)
    depth = 0.8 - 0.03 * np.log(sizes / 1e5) - 0.1 * price + np.random.default_rng(1).normal(0, 0.01, 20)
    runs = write_csv(tmp_path / "runs.csv", {"params": sizes, "price": price, "depth": depth})
    arguments = ["predict", runs, "--metric", "depth", "--against", "params", "--lambda", "price", *FAST]
    assert scaling(*arguments, "--at", "2e7,0", "--out", tmp_path) == 0
    found = json.loads((tmp_path / "predict.json").read_text())["forecasts"][0]
    assert found["at"] == {"params": 2e7, "price": 0}
    assert found["law_low"] < 0.8 - 0.03 * np.log(200) < found["law_high"]
    assert scaling(*arguments, "--at", "0,0.5") == 2 and "--at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "names"),
    [
        (["--metric", "hops", *POINT], "--against"),
        ([*METRIC], "--at"),
        ([*METRIC, "--at", "16"], "--at 16"),
        ([*METRIC, "--at", "16,0"], "--at 16,0"),
        ([*METRIC, "--at", "16,1e999"], "--at 16,1e999"),
        (["--metric", "hopps", "--against", "layers", "--at", "4"], "'hops'"),
        (["--compute", "-1"], "--compute"),
        ([*METRIC, *POINT, "--compute", "1e20"], "--compute"),
    ],
)
def test_what_cannot_be_forecast_is_refused_in_one_line(tmp_path: Path, capsys, extra: list[str], names: str) -> None:
    runs = ladder(tmp_path / "small.csv")
    try:
        code = scaling("predict", runs, *extra, *FAST, "--out", tmp_path / "out")
    except SystemExit as exit:
        code = int(str(exit.code))
    error = capsys.readouterr().err
    assert code == 2 and names in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "verdicts"),
    [((4.4, 4.5, 4.6), {"held"}), ((2.0, 2.1), {"FAILED"}), ((None,), {"held within a run's noise"})],
)
def test_check_says_whether_a_forecast_held(forecast: Path, tmp_path: Path, values, verdicts: set[str]) -> None:
    best = json.loads(forecast.read_text())["forecasts"][0]
    values = [(best["law_high"] + best["run_high"]) / 2 if value is None else value for value in values]
    assert scaling("check", forecast, ladder(tmp_path / "later.csv", *values)) == 0
    first = checked(forecast)[0]
    assert first["verdict"] in verdicts and first["runs"] == len(values)
    assert first["error"] == pytest.approx(np.mean(values) - best["value"])


def test_rows_of_a_run_count_once_and_where_and_within_choose_rows(forecast: Path, tmp_path: Path) -> None:
    columns = {
        "run": ["a", "a", "b", "c"],
        "layers": [16, 16, 16, 17],
        "size": 786432,
        "hops": [4.0, 5.0, 4.4, 4.6],
        "status": ["finished", "finished", "failed", "finished"],
    }
    later = write_csv(tmp_path / "later.csv", columns)
    for options, runs, mean in (
        (["--where", "status=finished"], 1, 4.5),
        (["--within", "0.1"], 3, 4.5),
        (["--within", "0.1", "--run", "status"], 2, (13.6 / 3 + 4.4) / 2),
    ):
        assert scaling("check", forecast, later, *options) == 0
        assert checked(forecast)[0]["runs"] == runs and checked(forecast)[0]["mean"] == pytest.approx(mean)
    assert scaling("check", forecast, later, "--where", "layers>16") == 2


def test_what_cannot_be_checked_is_refused_in_one_line(forecast: Path, tmp_path: Path, capsys) -> None:
    later = ladder(tmp_path / "later.csv", 4.5)
    lacking = write_csv(tmp_path / "lacking.csv", {"run": ["a"], "layers": [16], "hops": [4.5]})
    text, old = tmp_path / "text.json", tmp_path / "old.json"
    text.write_text("{")
    old.write_text(json.dumps({"table": "t", "sha256": "0", "made": "", "options": {}, "forecasts": []}))
    one = {"at": {"size": 1}, "value": 1, "law_low": 0, "law_high": 1, "run_low": 0, "run_high": 1}
    stored = {"table": "t", "sha256": "0", "made": "", "options": {"metric": None}, "forecasts": [one]}
    wrong = ({"forecasts": [one | {"at": "x"}]}, {"forecasts": [one | {"value": "x"}]}, {"options": {"metric": 5}})
    for number, changed in enumerate((*wrong, {"forecasts": []})):
        (tmp_path / f"wrong{number}.json").write_text(json.dumps(stored | changed))
    for arguments, names in (
        *(([tmp_path / f"wrong{number}.json", later], f"wrong{number}.json") for number in range(4)),
        ([tmp_path / "none.json", later], "none.json"),
        ([text, later], "text.json"),
        ([old, later], "old.json"),
        ([forecast, lacking], "'size'"),
        ([forecast, later, "--within", "2"], "--within"),
        ([forecast, later, "--run", "seed"], "'seed'"),
        ([forecast, tmp_path / "small.csv"], "small.csv"),
    ):
        assert scaling("check", *arguments) == 2
        error = capsys.readouterr().err
        assert names in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (forecast.parent / "check.json").exists()
