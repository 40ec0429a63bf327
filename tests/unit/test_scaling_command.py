"""`ee-megatron scaling`, run as a user runs it: tables and files, refusals as one line with exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ee_megatron import cli
from ee_megatron.scaling.table import observations, read_table
from tests.scaling_samples import isoflop_runs, noisy, table, write_csv

FAST = ["--bootstrap", "200"]
GOOD = {"params": ["1e8", "2e8"], "tokens": ["1e9", "2e9"], "loss": ["3.5", "3.1"]}


@pytest.fixture
def losses(tmp_path: Path) -> Path:
    obs = noisy(0, 5, 6, 0.01)
    return write_csv(tmp_path / "runs.csv", {name: obs[name] for name in ("params", "tokens", "loss")})


@pytest.fixture
def depths(tmp_path: Path) -> Path:
    sizes, penalty = np.repeat(np.geomspace(1e7, 1e9, 5), 5), np.tile([0.0, 0.1, 0.2, 0.4, 0.8], 5)
    depth = 0.8 - 0.05 * np.log10(sizes / 1e7) - 0.3 * penalty + np.random.default_rng(0).normal(0, 0.01, 25)
    return write_csv(tmp_path / "depth.csv", {"params": sizes, "lambda": penalty, "mean_depth": depth})


def test_fit_prints_and_saves_every_method_that_the_data_carry(losses: Path, tmp_path: Path, capsys) -> None:
    assert cli.main(["scaling", "fit", str(losses), *FAST, "--out", str(tmp_path / "out")]) == 0
    text, out = capsys.readouterr().out, tmp_path / "out"
    saved = json.loads((out / "fit.json").read_text())
    alpha = saved["huber"]["parameters"]["alpha"]
    assert alpha["low"] < 0.34 < alpha["high"] and f"{alpha['value']:.5g}" in text
    assert saved["refused"].keys() == {"isoflop"} and saved["table"] == "runs.csv"
    assert sorted(p.name for p in out.iterdir()) == ["fit.json", "fit.txt"]
    assert (out / "fit.txt").read_text() in text and str(tmp_path) not in (out / "fit.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["fit", "--method", "isoflop"], "isoflop"),
        (["fit", "--loss", "los"], "'loss'"),
        (["fit", "--bootstrap", "20"], "--bootstrap"),
        (["fit", "--bootstrap", "1000000000000"], "--bootstrap"),
        (["plot", "--out", __file__], "--out"),
        (["fit", "--seed", "-1"], "--seed"),
        (["compare", "--metric", "loss", "--against", "loss"], "--against"),
        (["compare"], "--metric"),
        (["plot"], "--out"),
    ],
)
def test_bad_input_is_one_line_and_code_2_and_writes_nothing(losses: Path, tmp_path, arguments, names, capsys) -> None:
    command, *options = arguments
    out = ["--out", str(tmp_path / "out")] if command == "fit" else []
    assert cli.main(["scaling", command, str(losses), *FAST, *options, *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and names in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_compare_prints_and_saves_its_verdict(depths: Path, tmp_path: Path, capsys) -> None:
    arguments = ["scaling", "compare", str(depths), *FAST, "--metric", "mean_depth", "--against", "params,lambda"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    text, saved = capsys.readouterr().out, json.loads((tmp_path / "compare.json").read_text())
    assert saved["forms"]["linear"]["beats_constant"] is True and saved["verdict"] in text
    slope = saved["slopes of linear, c + Σ b t"]["lambda"]
    assert slope["low"] < -0.3 < slope["high"]


def test_plot_draws_the_fits_the_isoflop_curves_and_a_metric(depths: Path, tmp_path: Path, capsys) -> None:
    out, obs = tmp_path / "plots", isoflop_runs(0, 4, 7)
    path = write_csv(tmp_path / "iso.csv", {name: obs[name] for name in ("params", "flops", "loss")})
    assert cli.main(["scaling", "plot", str(path), *FAST, "--out", str(out)]) == 0
    arguments = ["--metric", "mean_depth", "--against", "params,lambda", "--out", str(out)]
    assert cli.main(["scaling", "plot", str(depths), *FAST, *arguments]) == 0
    for name in ("huber", "isoflop", "metric"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_help_names_the_commands(capsys) -> None:
    for arguments in ([], ["predict"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(["scaling", *arguments, "--help"])
        assert caught.value.code == 0 and "%%" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("condition", "rows"),
    [("params<1e9", 18), ("params>=1e9", 12), ("loss!=nothing", 30), ("tokens<=1e9", 5)],
)
def test_rows_are_chosen_by_text_and_number(losses: Path, condition: str, rows: int) -> None:
    assert len(read_table(losses).where([condition]).frame) == rows


@pytest.mark.parametrize("condition", ["params<many", "params", "params=none", "other=1"])
def test_a_condition_that_chooses_nothing_is_refused(losses: Path, condition: str) -> None:
    with pytest.raises(ValueError, match=condition if condition != "other=1" else "'other'"):
        read_table(losses).where([condition])


@pytest.mark.parametrize(
    ("column", "cell"),
    [("loss", "nan"), ("loss", ""), ("params", "0"), ("tokens", "2B"), ("loss", "inf")],
)
def test_a_cell_that_is_not_a_positive_number_is_named_with_its_row(column: str, cell: str) -> None:
    with pytest.raises(ValueError, match=f"row 2, column {column}"):
        observations(table({**GOOD, column: [GOOD[column][0], cell]}), {})


def test_a_missing_column_names_the_nearest_and_the_option() -> None:
    renamed = table({"n params": GOOD["params"], "tokens": GOOD["tokens"], "Loss": GOOD["loss"]})
    with pytest.raises(ValueError, match=r"'params'.*'n params'.*--params"):
        observations(renamed, {})
    with pytest.raises(ValueError, match=r"'loss'.*'Loss'"):
        observations(renamed, {"params": "n params"})


def test_tokens_and_flops_come_from_one_another_and_given_flops_stay() -> None:
    obs, notes = observations(table({**GOOD, "flops": ["6e17", "2.4e18"]} | {"tokens": ["1e9", "2e9"]}), {})
    assert len(notes) == 1 and obs["flops"].tolist() == [6e17, 2.4e18]
    without = {"params": GOOD["params"], "loss": GOOD["loss"]}
    obs, notes = observations(table({**without, "flops": ["6e17", "2.4e18"]}), {})
    assert obs["tokens"].tolist() == pytest.approx([1e9, 2e9]) and len(notes) == 2
    assert observations(table(GOOD), {})[0]["flops"].tolist() == pytest.approx([6e17, 2.4e18])
    obs, notes = observations(table({**GOOD, "flops": ["1e18", "2.4e18"]}), {})
    assert obs["flops"][0] == 1e18 and "1.67 times 6ND" in notes[1]
    with pytest.raises(ValueError, match="'tokens'"):
        observations(table(without), {})


def test_runs_come_from_their_column_or_are_rows() -> None:
    assert observations(table({**GOOD, "run": ["a", "a"]}), {})[0]["run"].tolist() == [0, 0]
    assert observations(table(GOOD), {})[0]["run"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="--run"):
        observations(table(GOOD), {"run": "seed"})


@pytest.mark.parametrize("text", ["", "params,loss\n", "params,loss\n1,2,3\n", "loss,loss\n1,2\n"])
def test_a_file_that_is_not_a_table_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"runs\.csv"):
        read_table(path)
    path.write_text("params,tokens,loss\n1\n")
    with pytest.raises(ValueError, match="row 1, column loss"):
        observations(read_table(path), {})
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        read_table(tmp_path / "none.csv")


def test_csv_and_parquet_give_the_same_observations(tmp_path: Path) -> None:
    columns = {name: noisy(0, 4, 4)[name] for name in ("params", "tokens", "loss")}
    pd.DataFrame(columns).to_parquet(tmp_path / "runs.parquet")
    write_csv(tmp_path / "runs.csv", columns)
    first, second = (observations(read_table(tmp_path / f"runs.{kind}"), {})[0] for kind in ("csv", "parquet"))
    assert first.equals(second)
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"bad\.parquet"):
        read_table(tmp_path / "bad.parquet")
