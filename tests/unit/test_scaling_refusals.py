"""What the data cannot say is refused in one line: what was found, what was expected, what to do."""

from __future__ import annotations

import numpy as np
import pytest

from ee_megatron.scaling.fit import fit_all, fit_law
from ee_megatron.scaling.isoflop_law import IsoFlopFit
from ee_megatron.scaling.loss_law import predict
from ee_megatron.scaling.refusal import Refused
from ee_megatron.scaling.table import ColumnNames, Observations, RunTable, observations, read_table
from tests.scaling_samples import CHINCHILLA, grid, isoflop_runs, noisy, write_csv


def law(params, tokens, loss) -> Observations:
    n, d, y = (np.asarray(v, dtype=float) for v in (params, tokens, loss))
    return Observations(n, d, 6 * n * d, y, np.arange(len(n)))


@pytest.mark.parametrize("method", ["huber", "varpro"])
@pytest.mark.parametrize(
    ("sizes", "tokens", "message"),
    [
        (2, 8, r"\b2\b.*\bN\b.*\b3\b"),
        (8, 2, r"\b2\b.*\bD\b.*\b3\b"),
        (3, 3, r"\b9 runs.*\b12\b"),
    ],
)
def test_too_few_values_are_named_with_the_minimum_and_its_reason(
    method: str, sizes: int, tokens: int, message: str
) -> None:
    with pytest.raises(Refused, match=message):
        fit_law(noisy(0, sizes, tokens), method, 200, 0)


def test_tokens_in_proportion_to_size_cannot_be_told_apart_from_it() -> None:
    n = np.geomspace(1e7, 1e10, 16)
    with pytest.raises(Refused, match=r"collinear.*1\.0000"):
        fit_law(law(n, 20 * n, predict(CHINCHILLA, n, 20 * n)[0]), "varpro", 200, 0)


@pytest.mark.parametrize("method", ["huber", "varpro"])
def test_a_loss_that_size_does_not_change_has_no_exponent_of_size(method: str) -> None:
    n, d = grid(6, 6)
    loss = (1.7 + 400 * d**-0.28) * np.exp(np.random.default_rng(0).normal(0, 0.01, 36))
    with pytest.raises(Refused, match="not identified"):
        fit_law(law(n, d, loss), method, 200, 0)


@pytest.mark.parametrize("method", ["huber", "varpro"])
def test_a_loss_that_rises_with_size_is_refused_and_not_fitted_with_another_sign(method: str) -> None:
    n, d = grid(6, 6)
    loss = 1.7 + 0.05 * np.log(n / 1e7) + 400 * d**-0.28
    with pytest.raises(Refused, match="not identified"):
        fit_law(law(n, d, loss), method, 200, 0)


def test_noise_that_hides_a_parameter_is_refused_where_its_interval_reaches_the_bound() -> None:
    with pytest.raises(Refused, match=r"bound.*\d+%"):
        fit_law(noisy(1, 4, 4, sd=0.15), "varpro", 200, 0)


def test_one_refused_method_leaves_the_others() -> None:
    found = fit_all(isoflop_runs(0, budgets=2, sizes=9, sd=0.003), ("varpro", "isoflop"), 200, 0)
    assert isinstance(found["isoflop"], Refused) and not isinstance(found["varpro"], Refused)
    found = fit_all(isoflop_runs(0), ("isoflop",), 200, 0)
    assert isinstance(found["isoflop"], IsoFlopFit)


def table(**columns) -> RunTable:
    return RunTable("runs.csv", "", {name.replace("_", " "): list(values) for name, values in columns.items()})


GOOD = {"params": ["1e8", "2e8"], "tokens": ["1e9", "2e9"], "loss": ["3.5", "3.1"]}


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("loss", "nan", "row 2, column loss.*nan"),
        ("loss", "", "row 2, column loss.*empty"),
        ("params", "0", r"row 2, column params.*\b0\b"),
        ("tokens", "-3", "row 2, column tokens.*-3"),
        ("tokens", "2B", "row 2, column tokens.*2B"),
        ("loss", "inf", "row 2, column loss.*inf"),
    ],
)
def test_a_cell_that_is_no_positive_number_is_named_with_its_row(column: str, cell: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        observations(table(**{**GOOD, column: [GOOD[column][0], cell]}), ColumnNames())


def test_a_missing_column_names_the_nearest_and_the_option() -> None:
    renamed = table(n_params=GOOD["params"], tokens=GOOD["tokens"], Loss=GOOD["loss"])
    with pytest.raises(ValueError, match=r"'params'.*'n params'.*--params"):
        observations(renamed, ColumnNames())
    with pytest.raises(ValueError, match=r"'loss'.*'Loss'"):
        observations(renamed, ColumnNames(params="n params"))


def test_tokens_come_from_flops_and_the_notes_say_so() -> None:
    obs = observations(table(params=["1e8", "2e8"], flops=["6e17", "2.4e18"], loss=["3.5", "3.1"]), ColumnNames())
    assert obs.tokens == pytest.approx([1e9, 2e9])
    assert any("D = flops / (6 params)" in note for note in obs.notes)
    direct = observations(table(**GOOD), ColumnNames())
    assert direct.flops == pytest.approx([6e17, 2.4e18]) and any("FLOPs" in note for note in direct.notes)
    with pytest.raises(ValueError, match="'tokens'"):
        observations(table(params=GOOD["params"], loss=GOOD["loss"]), ColumnNames())


def test_flops_that_are_not_6nd_are_kept_and_noted() -> None:
    obs = observations(table(**GOOD, flops=["1e18", "2.4e18"]), ColumnNames())
    assert obs.flops[0] == 1e18 and any("1.00 to 1.67 times 6ND" in note for note in obs.notes)


def test_runs_come_from_their_column_or_are_rows_and_the_notes_say_which() -> None:
    named = observations(table(**GOOD, run=["a", "a"]), ColumnNames())
    assert named.runs.tolist() == [0, 0] and "column run" in named.notes[0]
    assert observations(table(**GOOD), ColumnNames()).runs.tolist() == [0, 1]
    with pytest.raises(ValueError, match="--run"):
        observations(table(**GOOD), ColumnNames(run="seed", given=frozenset({"run"})))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "runs.csv.*rows"),
        ("params,loss\n", "runs.csv.*rows"),
        ("params,loss\n1,2,3\n", r"row 1.*\b3\b.*\b2\b"),
        ("loss,loss\n1,2\n", "'loss'"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(path)


def test_csv_and_parquet_give_the_same_observations(tmp_path) -> None:
    import pyarrow
    import pyarrow.parquet

    obs = noisy(0, 4, 4)
    columns = {"params": obs.params, "tokens": obs.tokens, "loss": obs.loss}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "runs.parquet")
    write_csv(tmp_path / "runs.csv", columns)
    first, second = (observations(read_table(tmp_path / f"runs.{kind}"), ColumnNames()) for kind in ("csv", "parquet"))
    assert np.array_equal(first.loss, second.loss) and np.array_equal(first.params, obs.params)
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"bad\.parquet"):
        read_table(tmp_path / "bad.parquet")


def test_a_missing_file_is_said(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        read_table(tmp_path / "none.csv")
