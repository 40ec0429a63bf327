"""`ee-megatron scaling`, run as a user runs it: tables and files, refusals as one line with exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ee_megatron import cli
from ee_megatron.report.numbers import pareto_front
from ee_megatron.scaling.figures import pareto
from ee_megatron.scaling.loss_law import predict
from ee_megatron.scaling.table import read_table
from tests.scaling_samples import CHINCHILLA, EXPONENT_A, isoflop_runs, noisy, write_csv

FAST = ["--bootstrap", "200"]
COMMANDS = ("fit", "predict", "check", "compare", "plot")


@pytest.fixture
def losses(tmp_path: Path) -> Path:
    obs = noisy(0, 6, 6, 0.01)
    return write_csv(tmp_path / "runs.csv", {"params": obs.params, "tokens": obs.tokens, "loss": obs.loss})


@pytest.fixture
def depths(tmp_path: Path) -> Path:
    sizes, penalty = np.repeat(np.geomspace(1e7, 1e9, 5), 5), np.tile([0.0, 0.1, 0.2, 0.4, 0.8], 5)
    depth = 0.8 - 0.05 * np.log10(sizes / 1e7) - 0.3 * penalty + np.random.default_rng(0).normal(0, 0.01, 25)
    accuracy = 0.3 + 0.1 * np.log10(sizes / 1e6) + 0.2 * depth
    columns = {"params": sizes, "lambda": penalty, "mean_depth": depth, "accuracy": accuracy}
    return write_csv(tmp_path / "depth.csv", columns)


def test_fit_prints_every_method_and_why_one_was_refused(losses: Path, tmp_path: Path, capsys) -> None:
    assert cli.main(["scaling", "fit", str(losses), *FAST, "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in ("flops", "36 runs", "huber: ", "varpro: ", "isoflop: refused")), text
    saved = json.loads((tmp_path / "out" / "fit.json").read_text())
    methods = saved["groups"][0]["methods"]
    alpha = methods["varpro"]["parameters"]["alpha"]
    assert alpha["low"] < 0.34 < alpha["high"] and f"{alpha['value']:.4g}" in text
    assert "refused" in methods["isoflop"] and "parameters" in methods["huber"]
    assert saved["table"] == "runs.csv" and saved["bootstrap"] == 200
    assert [h["how"].split(" ")[0] for h in methods["varpro"]["held_out"]] == ["largest", "5"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["fit.json", "fit.txt"]
    assert str(tmp_path) not in (tmp_path / "out" / "fit.json").read_text()


def test_a_refused_method_asked_for_alone_is_an_error(losses: Path, tmp_path: Path, capsys) -> None:
    arguments = ["scaling", "fit", str(losses), *FAST, "--method", "isoflop", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: isoflop: ") and shown.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--loss", "los"], "'loss'"),
        (["--bootstrap", "20"], "--bootstrap 20"),
        (["--seed", "-1"], "--seed -1"),
        (["--lambda", "lam"], "'lam'"),
    ],
)
def test_bad_input_is_one_line_and_code_2(losses: Path, extra: list[str], message: str, capsys) -> None:
    assert cli.main(["scaling", "fit", str(losses), *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_runs_under_each_lambda_get_a_law_of_their_own(tmp_path: Path, capsys) -> None:
    first, second = noisy(0, 5, 5, 0.003), noisy(1, 5, 5, 0.003)
    columns = {
        "params": np.concatenate([first.params, second.params]),
        "tokens": np.concatenate([first.tokens, second.tokens]),
        "loss": np.concatenate([first.loss, second.loss + 0.5]),
        "lambda": np.repeat([0.0, 0.3], 25),
    }
    path = write_csv(tmp_path / "runs.csv", columns)
    arguments = ["scaling", "fit", str(path), *FAST, "--lambda", "lambda", "--method", "varpro", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    groups = json.loads((tmp_path / "fit.json").read_text())["groups"]
    floors = [g["methods"]["varpro"]["parameters"]["E"]["value"] for g in groups]
    assert [g["group"] for g in groups] == ["lambda = 0", "lambda = 0.3"]
    assert floors[1] - floors[0] == pytest.approx(0.5, abs=0.1)


def test_rows_are_chosen_by_a_columns_value_and_the_output_says_so(losses: Path, tmp_path: Path, capsys) -> None:
    lines = losses.read_text().splitlines()
    rows = [lines[0] + ",status", *(line + ",finished" for line in lines[1:]), "1e9,1e10,,failed"]
    path = tmp_path / "sweep.csv"
    path.write_text("\n".join(rows) + "\n")
    fit = ["scaling", "fit", str(path), *FAST, "--method", "varpro"]
    assert cli.main(fit) == 2 and "column loss" in capsys.readouterr().err
    assert cli.main([*fit, "--where", "status=finished"]) == 0
    assert "36 of 37 rows: status=finished" in capsys.readouterr().out
    assert cli.main([*fit, "--where", "status=done"]) == 2
    err = capsys.readouterr().err
    assert "status" in err and "failed, finished" in err


def test_compare_prints_and_saves_its_verdict(depths: Path, tmp_path: Path, capsys) -> None:
    arguments = ["scaling", "compare", str(depths), *FAST, "--metric", "mean_depth", "--against", "params,lambda"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    saved = json.loads((tmp_path / "compare.json").read_text())
    assert "linear" in saved["beats_constant"] and saved["verdict"] in text
    assert (tmp_path / "compare.txt").read_text().splitlines()[0] in text


def test_compare_wants_other_columns_than_the_metric(depths: Path, capsys) -> None:
    arguments = ["scaling", "compare", str(depths), "--metric", "accuracy", "--against", "accuracy"]
    assert cli.main(arguments) == 2 and "--against accuracy" in capsys.readouterr().err


def test_plot_writes_one_page_that_needs_nothing_else(depths: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "plots"
    metric = ["--metric", "mean_depth", "--against", "params,lambda"]
    arguments = ["scaling", "plot", str(depths), *FAST, "--accuracy", "accuracy", "--depth", "mean_depth", *metric]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["metric_0.png", "metric_1.png", "pareto.png", "scaling.html"]
    page = (out / "scaling.html").read_text()
    assert (
        page.count('<img src="data:image/png;base64,') == 3
        and "http://" not in page
        and "https://" not in page
        and "1e+07 parameters" in page
    )
    assert all((out / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in ("pareto", "metric_0"))


def test_plot_draws_the_fits_and_the_isoflop_curves(tmp_path: Path, capsys) -> None:
    obs = isoflop_runs(0, budgets=4, sizes=7)
    path = write_csv(tmp_path / "iso.csv", {"params": obs.params, "flops": obs.flops, "loss": obs.loss})
    assert cli.main(["scaling", "plot", str(path), *FAST, "--out", str(tmp_path / "p")]) == 0
    names = {p.name for p in (tmp_path / "p").iterdir()}
    assert names == {"isoflop.png", "loss_huber.png", "loss_varpro.png", "scaling.html"}
    assert "FLOPs" in (tmp_path / "p" / "scaling.html").read_text()


def test_plot_wants_both_columns_of_a_front(depths: Path, tmp_path: Path, capsys) -> None:
    assert cli.main(["scaling", "plot", str(depths), "--depth", "mean_depth", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "--accuracy" in err and "--depth" in err


def test_a_front_holds_what_nothing_beats() -> None:
    depth = np.array([0.5, 0.4, 0.6, 0.4, 0.7, 0.5])
    accuracy = np.array([0.8, 0.6, 0.8, 0.7, 0.9, 0.7])
    assert "a: 3 of 6" in pareto(accuracy, depth, ["a"] * 6, ("accuracy", "depth")).caption
    assert np.flatnonzero(pareto_front(depth, accuracy)).tolist() == [0, 3, 4]


def test_help_names_the_commands(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["scaling", "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and all(word in text for word in (*COMMANDS, "examples:"))
    for name in COMMANDS:
        with pytest.raises(SystemExit) as caught:
            cli.main(["scaling", name, "--help"])
        assert caught.value.code == 0 and "%%" not in capsys.readouterr().out


def test_predict_gives_intervals_that_hold_the_truth_and_says_what_lies_beyond(
    losses: Path, tmp_path: Path, capsys
) -> None:
    # The table ends at 1e10 parameters and 4e11 tokens.
    arguments = ["scaling", "predict", str(losses), *FAST, "--at", "1e9,1e11", "--at", "7e10,1.4e12"]
    assert cli.main([*arguments, "--compute", "1e22", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "N 7 ×" in text and "D 3.5 ×" in text and "isoflop: refused" in text
    found = json.loads((tmp_path / "out" / "predict.json").read_text())["forecasts"]
    assert [(f["method"], f["quantity"]) for f in found] == [
        (method, quantity) for method in ("huber", "varpro") for quantity in ("loss", "loss", "N_opt")
    ]
    truths = [*predict(CHINCHILLA, np.array([1e9, 7e10]), np.array([1e11, 1.4e12]))[0]]
    _, a, b, alpha, beta = CHINCHILLA[0]
    truths.append((alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (1e22 / 6) ** EXPONENT_A)
    for forecast, truth in zip(found, truths * 2, strict=True):
        law = forecast["interval_of_law"]
        assert law["low"] < truth < law["high"] and law["low"] < forecast["value"] < law["high"]
        if forecast["quantity"] == "loss":
            run = forecast["interval_of_run"]
            assert run["low"] < law["low"] and law["high"] < run["high"]
    assert [f["beyond"] == [] for f in found[:2]] == [True, False]
    # Extrapolation is less certain than interpolation.
    width = [f["interval_of_law"]["high"] - f["interval_of_law"]["low"] for f in found[:2]]
    assert width[1] > 1.5 * width[0]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "--compute"),
        (["--at", "7e9"], "7e9"),
        (["--at", "7e9,nan"], "nan"),
        (["--compute", "-1"], "-1"),
        (["--compute", "1e999"], "1e999"),
    ],
)
def test_a_forecast_of_nothing_is_refused(losses: Path, capsys, extra: list[str], message: str) -> None:
    try:
        code = cli.main(["scaling", "predict", str(losses), *FAST, *extra])
    except SystemExit as exit:
        code = exit.code
    assert code == 2 and message in capsys.readouterr().err


def test_the_optimum_of_isoflop_is_predicted_from_named_budgets(tmp_path: Path, capsys) -> None:
    obs = isoflop_runs(0, budgets=5, sizes=8, ladder="common")
    budget = [f"b{round(np.log10(flops) * 100)}" for flops in obs.flops]
    drift = obs.flops * np.tile(np.geomspace(1, 1.5, 8), 5)
    path = write_csv(
        tmp_path / "runs.csv",
        {"params": obs.params, "tokens": obs.tokens, "flops": drift, "loss": obs.loss, "budget": budget},
    )
    fit = ["scaling", "predict", str(path), *FAST, "--method", "isoflop", "--compute", "1e22"]
    assert cli.main(fit) == 2 and "--budget COLUMN" in capsys.readouterr().err
    assert cli.main([*fit, "--budget", "budget", "--budget-within", "0.5"]) == 2
    err = capsys.readouterr().err
    assert "--budget" in err and "--budget-within" in err
    assert cli.main([*fit, "--budget-within", "0.6"]) == 0
    within = capsys.readouterr().out
    assert cli.main([*fit, "--budget", "budget"]) == 0
    named = capsys.readouterr().out
    assert "×" in named
    table = [text.splitlines()[-1].split() for text in (within, named)]
    assert table[0] == table[1]


@pytest.mark.parametrize(
    ("condition", "rows"),
    [("params<1e9", 18), ("params>=1e9", 18), ("loss!=nothing", 36), ("tokens<=1e9", 6), ("tokens>1e9", 30)],
)
def test_rows_are_chosen_by_number_too(losses: Path, condition: str, rows: int) -> None:
    assert len(read_table(losses).where([condition])) == rows


def test_a_condition_that_compares_with_no_number_is_refused(losses: Path) -> None:
    with pytest.raises(ValueError, match="'many'"):
        read_table(losses).where(["params<many"])
    with pytest.raises(ValueError, match="COLUMN=VALUE"):
        read_table(losses).where(["params"])
