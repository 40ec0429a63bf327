"""Forecasts of any metric: what the forms say of a run to come, kept with a date, and compared with what came of it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from ee_megatron import __version__, cli
from ee_megatron.scaling.compare import compare
from ee_megatron.scaling.fit import LawFit
from ee_megatron.scaling.forecast import forecast_form, forecast_losses, forecast_metric, noise_of
from ee_megatron.scaling.loss_law import PARAMETERS, predict
from ee_megatron.scaling.table import ColumnNames, Observations, RunTable
from tests.scaling_samples import CHINCHILLA, grid, noisy, write_csv

FAST = ["--bootstrap", "200"]
LAYERS = np.repeat([2.0, 4, 8, 4, 8], 3)
SIZE = np.repeat([98304.0, 196608, 393216, 49152, 786432], 3)
METRIC = ["--metric", "hops", "--against", "layers,size"]
POINT = ["--at", "16,786432"]


def level(layers: float | np.ndarray) -> np.ndarray:
    return 2 + 0.9 * np.log(layers)


def ladder(path: Path, *later: float, seed: int = 3) -> Path:
    """15 runs of five shapes and, of a sixth shape, runs with the metric `later`."""
    metric = [*(level(LAYERS) + np.random.default_rng(seed).normal(0, 0.1, 15)), *later]
    columns = {
        "run": [f"r{i}" for i in range(len(metric))],
        "layers": [*LAYERS, *[16.0] * len(later)],
        "size": [*SIZE, *[786432.0] * len(later)],
        "hops": metric,
    }
    return write_csv(path, columns)


def scaling(*arguments: object) -> int:
    try:
        return cli.main(["scaling", *map(str, arguments)])
    except SystemExit as exit:
        return int(exit.code)  # type: ignore[arg-type]


@pytest.fixture
def forecast(tmp_path: Path, capsys) -> Path:
    """predict.json of the ladder at a shape of twice its layers."""
    table = ladder(tmp_path / "small.csv")
    assert scaling("predict", table, *METRIC, *POINT, *FAST, "--out", tmp_path / "ahead") == 0
    capsys.readouterr()
    return tmp_path / "ahead" / "predict.json"


def judged(metric, columns: dict, against: tuple[str, ...]):
    table = RunTable("runs.csv", "", {**{n: list(v) for n, v in columns.items()}, "metric": list(metric)})
    return compare(table, ColumnNames(), "metric", against, 200, 0)


def test_a_forecast_holds_the_truth_and_says_how_far_beyond_the_table_it_lies(forecast: Path) -> None:
    found = json.loads(forecast.read_text())
    best, *others, any_form = found["forecasts"]
    assert best["method"] == "linear" and [one["method"] for one in others] and any_form["method"] == "any of these"
    assert best["at"] == {"layers": 16, "size": 786432} and best["beyond"] == ["layers 2 × the largest"]
    law, run = best["interval_of_law"], best["interval_of_run"]
    assert run["low"] < law["low"] < level(16.0) < law["high"] < run["high"]
    assert best["value"] == pytest.approx(level(16.0), abs=0.3) and any_form["value"] == best["value"]
    for kind in ("interval_of_law", "interval_of_run"):
        assert any_form[kind]["low"] == min(one[kind]["low"] for one in (best, *others))
        assert any_form[kind]["high"] == max(one[kind]["high"] for one in (best, *others))
    text = (forecast.parent / "predict.txt").read_text()
    assert (
        "not told apart from it: power" in text
        and "layers 2 × the largest" in text
        and "linear, c + Σ b t: noise" in text
    )


def test_it_has_its_date_table_options_and_version(forecast: Path) -> None:
    found = json.loads(forecast.read_text())
    made = datetime.fromisoformat(found["made"])
    assert made.utcoffset() is not None and abs((datetime.now(UTC) - made).total_seconds()) < 600
    assert found["ee_megatron"] == __version__ and len(found["sha256"]) == 64 and found["table"] == "small.csv"
    options = found["options"]
    assert options["metric"] == "hops" and options["at"] == [[16, 786432]] and options["bootstrap"] == 200
    assert len(found["rows"]) == 15 and str(forecast.parent) not in forecast.read_text()


def test_another_forecast_does_not_take_its_place_silently(forecast: Path, capsys) -> None:
    table, out = forecast.parent.parent / "small.csv", forecast.parent
    before = forecast.read_bytes()
    assert scaling("predict", table, *METRIC, "--at", "32,1e6", *FAST, "--out", out) == 2
    error = capsys.readouterr().err
    assert "from other options" in error and "--out" in error and "--again" in error and error.count("\n") == 1
    other = ladder(out.parent / "other.csv", seed=4)
    assert scaling("predict", other, *METRIC, *POINT, *FAST, "--out", out) == 2
    assert "from another table, small.csv" in capsys.readouterr().err and forecast.read_bytes() == before
    assert scaling("predict", other, *METRIC, *POINT, *FAST, "--out", out, "--again") == 0
    assert json.loads(forecast.read_text())["table"] == "other.csv"
    forecast.write_text('{"forecasts": []}')
    assert scaling("predict", other, *METRIC, *POINT, *FAST, "--out", out) == 2
    assert "predict.json: lacks made" in capsys.readouterr().err


def test_the_same_table_and_options_keep_the_first_forecast_and_its_date(forecast: Path, capsys) -> None:
    table = forecast.parent.parent / "small.csv"
    first = json.loads(forecast.read_text())
    first["made"] = "2026-01-02T03:04:05+00:00"
    forecast.write_text(json.dumps(first))
    before = forecast.read_bytes()
    assert scaling("predict", table, *METRIC, *POINT, *FAST, "--out", forecast.parent) == 0
    said = capsys.readouterr().out
    assert "the forecast of 2026-01-02T03:04:05+00:00 stays" in said and "other figures" not in said
    assert forecast.read_bytes() == before
    again = forecast.parent.parent / "again"
    assert scaling("predict", table, *METRIC, *POINT, *FAST, "--out", again) == 0
    second = json.loads((again / "predict.json").read_text())
    assert {**second, "made": ""} == {**first, "made": ""}
    first["forecasts"][0]["value"] += 1
    forecast.write_text(json.dumps(first))
    assert scaling("predict", table, *METRIC, *POINT, *FAST, "--out", forecast.parent) == 0
    assert "with other figures than today's" in capsys.readouterr().out


def test_noise_without_a_trend_is_forecast_as_a_constant() -> None:
    comparison = judged(0.6 + np.random.default_rng(0).normal(0, 0.05, 15), {"layers": LAYERS}, ("layers",))
    best = forecast_metric(comparison, (64.0,))[0]
    assert (
        best.method == "constant" and best.law.low < 0.6 < best.law.high and best.beyond == ("layers 8 × the largest",)
    )


def test_shares_are_forecast_between_nothing_and_all() -> None:
    """The widened interval of a steep logistic curve would reach beyond both."""
    layers = np.repeat([4.0, 8.0, 16.0], 3)
    rng = np.random.default_rng(3)
    comparison = judged(np.clip(0.9 + rng.normal(0, 0.08, 9), 0.01, 0.99), {"layers": layers}, ("layers",))
    logistic, linear = (next(r for r in comparison.results if r.form.name == name) for name in ("logistic", "linear"))
    for point in (1.0, 64.0):
        found, free = (forecast_form(comparison, form, (point,)) for form in (logistic, linear))
        for interval in (found.law, found.run):
            assert 0 <= interval.low <= found.value <= interval.high <= 1
        assert free.run.high > 1


@pytest.mark.parametrize("share", [True, False])
def test_a_runs_noise_is_a_share_where_it_grows_with_the_metric(share: bool) -> None:
    curve = np.exp(0.9 * np.log(np.tile(np.geomspace(1, 64, 6), 4)))
    noise = np.random.default_rng(1).normal(0, 1, 24)
    metric = curve * np.exp(0.1 * noise) if share else curve + 0.1 * (curve.min() + 1) * noise
    comparison = judged(np.abs(metric), {"layers": np.tile(np.geomspace(1, 64, 6), 4)}, ("layers",))
    power = next(r for r in comparison.results if r.form.name == "power")
    found, is_share = noise_of(power, comparison.values)
    assert is_share == share and found == pytest.approx(0.1 if share else 0.2, rel=0.5)


def test_a_combination_that_no_run_has_lies_beyond_the_table_too() -> None:
    layers = np.repeat(np.geomspace(1, 16, 5), 3)
    size = layers * np.exp(np.random.default_rng(2).normal(0, 0.4, 15))
    comparison = judged(layers * 0.1 + 1, {"layers": layers, "size": size}, ("layers", "size"))
    assert forecast_metric(comparison, (4.0, 4.0))[0].beyond == ()
    assert forecast_metric(comparison, (1.0, 14.0))[0].beyond == ("layers, size together",)


def test_lambda_enters_as_in_compare_and_may_be_zero(tmp_path: Path, capsys) -> None:
    price = np.tile([0.0, 0.5, 1, 2], 5)
    sizes = np.repeat(np.geomspace(1e5, 1e7, 5), 4)
    depth = 0.8 - 0.03 * np.log(sizes / 1e5) - 0.1 * price + np.random.default_rng(1).normal(0, 0.01, 20)
    table = write_csv(tmp_path / "runs.csv", {"params": sizes, "price": price, "depth": depth})
    arguments = ["predict", table, "--metric", "depth", "--against", "params", "--lambda", "price", *FAST]
    assert scaling(*arguments, "--at", "2e7,0", "--at", "2e7,4", "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "predict.json").read_text())["forecasts"]
    assert found[0]["at"] == {"params": 2e7, "price": 0} and found[0]["beyond"] == ["params 2 × the largest"]
    assert found[0]["interval_of_law"]["low"] < 0.8 - 0.03 * np.log(200) < found[0]["interval_of_law"]["high"]
    assert found[-1]["beyond"] == ["params 2 × the largest", "price 2 × the largest"]
    capsys.readouterr()
    assert scaling(*arguments, "--at", "0,0.5") == 2 and "expected a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--metric", "hops", *POINT], "--metric and --against: found one of them"),
        ([*METRIC], "expected --at layers,size"),
        ([*METRIC, "--at", "16"], "--at 16: found 1 value; expected layers and size, as in 8,1e6"),
        ([*METRIC, "--at", "16,0"], "expected a number above 0"),
        ([*METRIC, *POINT, "--compute", "1e20"], "--compute with --metric: belong to the law of losses"),
        ([*METRIC, *POINT, "--method", "huber", "--tokens", "t"], "--tokens, --method with --metric"),
        (["--metric", "hopps", "--against", "layers", "--at", "4"], "no column 'hopps'; the nearest is 'hops'"),
    ],
)
def test_what_cannot_be_forecast_is_refused_in_one_line(tmp_path: Path, capsys, extra: list[str], message: str) -> None:
    table = ladder(tmp_path / "small.csv")
    assert scaling("predict", table, *extra, *FAST, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_check_says_that_a_forecast_held_and_by_how_much(forecast: Path, tmp_path: Path, capsys) -> None:
    later = ladder(tmp_path / "later.csv", 4.4, 4.5, 4.6)
    assert scaling("check", forecast, later) == 0
    said = capsys.readouterr().out
    (point,) = json.loads((forecast.parent / "check.json").read_text())["points"]
    assert point["runs"] == {"r15": 4.4, "r16": 4.5, "r17": 4.6} and point["mean"] == pytest.approx(4.5)
    best, law = point["forecasts"][0], point["forecasts"][0]["interval_of_law"]
    half = (law["high"] - law["low"]) / 2
    assert best["error"] == pytest.approx(4.5 - best["value"])
    assert best["error_in_half_widths"]["law"] == pytest.approx(best["error"] / half)
    assert best["verdict"] == "held" and best["runs_inside"] == 3
    assert "mean 4.5 (r15 4.4, r16 4.5, r17 4.6)" in said and "layers 2 × the largest" in said and "FAILED:" in said
    written = (forecast.parent / "check.json").read_bytes()
    assert scaling("check", forecast, later, "--out", tmp_path / "twice") == 0
    assert (tmp_path / "twice" / "check.json").read_bytes() == written
    assert (tmp_path / "twice" / "check.txt").read_text() in said


def test_check_says_plainly_that_a_forecast_failed_and_exits_with_0(forecast: Path, tmp_path: Path, capsys) -> None:
    assert scaling("check", forecast, ladder(tmp_path / "later.csv", 2.0, 2.1)) == 0
    point = json.loads((forecast.parent / "check.json").read_text())["points"][0]
    assert {one["verdict"] for one in point["forecasts"]} == {"FAILED"}
    assert all(one["runs_inside"] == 0 and one["error_in_half_widths"]["run"] < -1 for one in point["forecasts"])
    law = point["forecasts"][0]
    between = (law["interval_of_law"]["high"] + law["interval_of_run"]["high"]) / 2
    assert scaling("check", forecast, ladder(tmp_path / "edge.csv", between)) == 0
    assert "held within a run's noise" in capsys.readouterr().out


def test_rows_that_the_forecast_knew_are_no_forecast(tmp_path: Path, capsys) -> None:
    table = ladder(tmp_path / "old.csv", 4.5)
    assert scaling("predict", table, *METRIC, *POINT, *FAST, "--out", tmp_path) == 0
    capsys.readouterr()
    assert scaling("check", tmp_path / "predict.json", table) == 2
    error = capsys.readouterr().err
    assert "old.csv: is the table that the forecast was made from and has 1 row at layers 16, size 786432" in error
    copy = tmp_path / "copy.csv"
    copy.write_text(table.read_text().replace(",16.0,", ",1.6e1,"))
    assert scaling("check", tmp_path / "predict.json", copy) == 2
    error = capsys.readouterr().err
    assert "has 1 row " in error and "that is no forecast" in error and error.count("\n") == 1
    assert not (tmp_path / "check.json").exists()
    assert scaling("check", tmp_path / "predict.json", ladder(tmp_path / "more.csv", 4.5, 4.6)) == 0
    (point,) = json.loads((tmp_path / "check.json").read_text())["points"]
    assert point["runs"] == {"r16": 4.6} and point["known_rows_left_out"] == 1


def test_rows_of_a_run_count_once_and_where_and_within_choose_rows(forecast: Path, tmp_path: Path, capsys) -> None:
    columns = {
        "run": ["a", "a", "b", "c"],
        "layers": [16, 16, 16, 17],
        "size": [786432, 786432, 786432, 786432],
        "hops": [4.0, 5.0, 4.4, 4.6],
        "status": ["finished", "finished", "failed", "finished"],
    }
    table = write_csv(tmp_path / "later.csv", columns)
    assert scaling("check", forecast, table, "--where", "status=finished") == 0
    assert json.loads((forecast.parent / "check.json").read_text())["points"][0]["runs"] == {"a": 4.5}
    assert scaling("check", forecast, table, "--within", "0.1") == 0
    assert json.loads((forecast.parent / "check.json").read_text())["points"][0]["runs"] == {
        "a": 4.5,
        "b": 4.4,
        "c": 4.6,
    }
    capsys.readouterr()
    assert scaling("check", forecast, table, "--where", "layers>16") == 2
    error = capsys.readouterr().err
    assert "no row within 0.01 of layers 16, size 786432, the nearest is at layers 17, size 786432" in error


def test_what_cannot_be_checked_is_refused_in_one_line(forecast: Path, tmp_path: Path, capsys) -> None:
    later = ladder(tmp_path / "later.csv", 4.5)
    lacking = write_csv(tmp_path / "lacking.csv", {"run": ["a"], "layers": [16], "hops": [4.5]})
    text = tmp_path / "text.json"
    text.write_text("{")
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"table": "t", "sha256": "0", "forecasts": []}))
    for arguments, message in (
        ([tmp_path / "none.json", later], "no such forecast"),
        ([text, later], "expected the forecast of"),
        ([old, later], "lacks made, ee_megatron, options, rows, row_columns"),
        ([forecast, lacking], "no column 'size'; expected the columns of the forecast"),
        ([forecast, later, "--within", "2"], "--within 2: expected a share"),
        ([forecast, later, "--run", "seed"], "no column 'seed'"),
    ):
        assert scaling("check", *arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (forecast.parent / "check.json").exists()


@pytest.mark.parametrize("method", ["huber", "varpro"])
def test_a_runs_noise_in_a_forecast_is_enlarged_by_what_the_fit_took_of_it(method: str) -> None:
    """Nine runs off the law by a hundredth in ln, up or down, of which five fitted numbers took their part: a law
    without any doubt leaves a run's interval from e^-s to e^s of it, s = .01 √(9/4)."""
    n, d = grid(3, 3)
    off = 0.01 * np.array([1, -1, 1, -1, 1, -1, 1, -1, 1])
    obs = Observations(n, d, 6 * n * d, predict(CHINCHILLA, n, d)[0] * np.exp(off), np.arange(9))
    values = dict(zip(PARAMETERS, CHINCHILLA[0].tolist(), strict=True))
    fit = LawFit(method, values, {}, 0.01, [], "", np.repeat(CHINCHILLA, 400, axis=0))
    (found,) = forecast_losses(method, fit, obs, [(1e9, 1e11)], 0)
    assert found.law.low == pytest.approx(found.value) == found.law.high and found.run is not None
    assert np.log([found.run.low / found.value, found.run.high / found.value]) == pytest.approx([-0.015, 0.015])


def test_forecasts_of_losses_are_checked_under_their_lambda(tmp_path: Path, capsys) -> None:
    first, second = noisy(0, 5, 5, 0.003), noisy(1, 5, 5, 0.003)
    columns = {
        "N": np.concatenate([first.params, second.params]),
        "D": np.concatenate([first.tokens, second.tokens]),
        "loss": np.concatenate([first.loss, second.loss + 0.5]),
        "lambda": np.repeat([0.0, 0.3], 25),
    }
    table = write_csv(tmp_path / "runs.csv", columns)
    arguments = ["--params", "N", "--tokens", "D", "--lambda", "lambda", "--method", "varpro", *FAST]
    at = ["--at", "2e10,8e11", "--compute", "1e23"]
    assert scaling("predict", table, *arguments, *at, "--out", tmp_path / "f") == 0
    loss = 1.69 + 406.4 / 2e10**0.34 + 410.7 / 8e11**0.28
    later = write_csv(
        tmp_path / "later.csv", {"N": [2e10, 2e10], "D": [8e11, 8.01e11], "loss": [loss, loss + 1], "lambda": [0, 0.3]}
    )
    capsys.readouterr()
    assert scaling("check", tmp_path / "f" / "predict.json", later) == 0
    said = capsys.readouterr().out
    first_point, second_point = json.loads((tmp_path / "f" / "check.json").read_text())["points"]
    assert first_point["at"].endswith("lambda 0") and first_point["forecasts"][0]["verdict"] == "held"
    assert second_point["at"].endswith("lambda 0.3") and second_point["forecasts"][0]["verdict"] == "FAILED"
    assert "not checked: N_opt at flops 1e+23" in said


def test_best_sizes_alone_cannot_be_checked(tmp_path: Path, capsys) -> None:
    obs = noisy(0, 6, 6, 0.01)
    table = write_csv(tmp_path / "runs.csv", {"params": obs.params, "tokens": obs.tokens, "loss": obs.loss})
    assert scaling("predict", table, "--method", "varpro", *FAST, "--compute", "1e22", "--out", tmp_path / "f") == 0
    capsys.readouterr()
    assert scaling("check", tmp_path / "f" / "predict.json", table) == 2
    assert "no run measures that" in capsys.readouterr().err
