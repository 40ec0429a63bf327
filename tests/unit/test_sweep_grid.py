"""Grids: what is an axis and what is one value; ranges, zips, files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ee_megatron.config.load import load
from ee_megatron.sweeps.grid import SEEDS, Grid, _text, parse, read_file, read_grid

CONFIGS = Path(__file__).parents[2] / "configs" / "sweep"


def plains(grid: Grid) -> list[dict]:
    return [{key: value.plain for key, value in point.items()} for point in grid.points()]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a.b=1,2", [1, 2]),
        ("a.b=0,0.1,1e-3", [0, 0.1, 0.001]),
        ("a.b=[1,2],[3]", [[1, 2], [3]]),
        ("a.b='x,y',z", ["x,y", "z"]),
        ("a.b=models/x,models/y", ["models/x", "models/y"]),
        ("a.b=true,false", [True, False]),
        ("a.b=range(3)", [0, 1, 2]),
        ("a.b=range(10, 40, 10)", [10, 20, 30]),
        ("a.b=range(0,1,0.25)", [0.0, 0.25, 0.5, 0.75]),
        ("a.b=choice(4,5)", [4, 5]),
    ],
)
def test_several_values_make_an_axis(text: str, values: list) -> None:
    key, found, several = parse(text)
    assert (key, [value.plain for value in found], several) == ("a.b", values, True)
    assert [parse(f"a.b={value.text}")[1][0].plain for value in found] == values


@pytest.mark.parametrize(
    ("text", "value"),
    [("a=[1,2]", [1, 2]), ("a='x,y'", "x,y"), ('a="x,y"', "x,y"), ("a={x:1,y:2}", {"x": 1, "y": 2}), ("a=", "")],
)
def test_brackets_and_quotes_make_one_value(text: str, value: object) -> None:
    _, (found,), several = parse(text)
    assert not several and found.plain == value and found.text == text[2:]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["a=1,"], "a=1,"),
        (["a"], "key=value"),
        (["~a"], "~a"),
        (["a=glob(*)"], "a=glob"),
        (["a=range(3,0)"], "a=range"),
        (["a=range(nan,1)"], "a=range"),
        (["a=range(0,3,0)"], "a=range"),
        (["a=7,range(0,3)"], "a=7,range"),
        (["a=1,2", "a=3,4"], "twice"),
        (["a=1,2", "a=3"], "twice"),
        (["name=x,y"], "name"),
        (["experiment=x,y"], "experiment"),
        (["seed=1,2", "rl.seed=4"], "rl.seed"),
        (["sweep=none"], "sweep=none"),
        (["sweep=taste", "rl.depth_penalty.weight=2"], "rl.depth_penalty.weight"),
    ],
)
def test_what_is_wrong_with_a_grid_is_said(settings: list[str], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_grid(settings).points()
    assert says in str(caught.value)


def test_the_product_runs_its_last_axis_fastest_and_a_later_single_value_counts() -> None:
    grid = read_grid(["a=1,2", "b=x,y", "c=1", "c=2"])
    assert plains(grid) == [{"a": a, "b": b} for a in (1, 2) for b in "xy"]
    assert [*grid.fixed] == ["c"] and grid.fixed["c"].text == "2"


def test_seed_is_everything_that_is_trained_and_the_data_stay() -> None:
    grid = read_grid(["seed=1,2", "x=1"])
    assert [grid.overrides(point) for point in grid.points()] == [
        ["x=1", *(f"{key}={seed}" for key in SEEDS)] for seed in (1, 2)
    ]
    assert read_grid(["seed=3"]).overrides({}) == ["calibrate.seed=3", "rl.seed=3"]
    with pytest.raises(ValueError, match="seed"):
        load(["experiment=demo_cpu", "seed=1"])


def test_zipped_axes_run_together_in_the_place_of_the_first() -> None:
    grid = read_grid(["a=1,2,1", "c=0,1", "b=x,y,z"], ["a,b"])
    assert [tuple(point.values()) for point in plains(grid)] == [
        (a, b, c) for a, b in ((1, "x"), (2, "y"), (1, "z")) for c in (0, 1)
    ]
    for keys in ("a,q", "a", "a,a", "a,c"):
        with pytest.raises(ValueError, match=f"zip {keys}"):
            read_grid(["a=1,2,1", "c=0,1"], [keys])


FILE = """\
settings: {experiment: demo_cpu, task.families: [sum, word], rl.adapter_lr: 1e-5}
axes:
  rl.depth_penalty.weight: range(0,1.5,0.5)
  seed: [1, 2]
zip:
  - {keys: [model.path, rl.steps], rows: [[a, 5], [b, 10]]}
"""


def test_a_file_says_the_same_as_the_command_line_which_replaces_its_settings(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(FILE)
    line = read_grid(
        ["rl.depth_penalty.weight=range(0,1.5,0.5)", "seed=1,2", "model.path=a,b", "rl.steps=5,10"],
        ["model.path,rl.steps"],
    )
    grid = read_file(file)
    assert plains(grid) == plains(line) and len(plains(grid)) == 12
    assert grid.overrides(grid.points()[0]) == [
        "experiment=demo_cpu", 'task.families=["sum","word"]', "rl.adapter_lr=1e-05", "rl.depth_penalty.weight=0.0",
        "calibrate.seed=1", "rl.seed=1", "model.path=a", "rl.steps=5",
    ]  # fmt: skip
    changed = read_grid([f"sweep={file}", "rl.depth_penalty.weight=0,7", "experiment=rl_7b"])
    assert {point["rl.depth_penalty.weight"] for point in plains(changed)} == {0, 7}
    assert changed.fixed["experiment"].text == "rl_7b"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("axis: {a: [1]}", "axis"),
        ("axes: {a: 3}", r"\ba\b.*\b3\b"),
        ("axes: {a: [1, {b: 2}]}", r"\ba\b"),
        ("axes: {rl: {steps: [1]}}", r"\brl\b"),
        ("settings: {a: 1}\naxes: {a: [1, 2]}", r"\ba\b"),
        ("zip: {a: [1]}", ""),
        ("zip: [{keys: [a, b], rows: [[1, 2], [3]]}]", r"zip.*\[3\]"),
        ("zip: [{keys: [a, b]}]", r"zip.*rows"),
        ("- a", ""),
        ("a: [", "line 1"),
        ("axes: {a: &x [1], b: *x}", "alias"),
        ("axes: " + "[" * 20_000, "deep"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_file(file)
    where, said = str(caught.value).split(": ", 1)
    assert where == str(file) and re.search(says, said), said
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none.yaml")


plain_values = st.one_of(st.booleans(), st.integers(-1000, 1000), st.floats(allow_nan=False, allow_infinity=False))


@given(st.lists(st.one_of(plain_values, st.lists(st.one_of(plain_values, st.text("ab,[]:'\" ="))))))
def test_numbers_and_lists_of_a_file_arrive_as_they_were_written(values: list) -> None:
    """YAML value -> setting text -> Hydra's parser -> the same value, whatever characters are in it."""
    for value in values:
        _, (found,), several = parse(f"key={_text('key', value)}")
        assert not several and found.plain == value and type(found.plain) is type(value)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=str)
def test_every_grid_that_comes_along_is_a_grid(file: Path) -> None:
    grid = read_file(file)
    seen: set[tuple[str, str]] = set()
    for point in grid.points():
        # Of a thousand points as many as show every value once.
        if new := {(key, value.text) for key, value in point.items()} - seen:
            seen |= new
            load(grid.overrides(point))


@pytest.mark.parametrize("name", ["ladder_front", "ladder_loss"])
def test_what_a_laptop_runs_is_a_part_of_the_whole_study(name: str) -> None:
    """So that either finds what the other has made."""
    whole, part = (read_file(CONFIGS / f"{file}.yaml") for file in (name, f"{name}_laptop"))
    every = [whole.overrides(point) for point in whole.points()]
    assert 0 < len(part.points()) < len(every)
    assert all(part.overrides(point) in every for point in part.points())


@pytest.mark.parametrize("text", ["a=range(1000000001)", "a=range(0,1,1e-9)", "a=range(0,inf)"])
def test_too_many_values_or_points_are_refused_before_they_are_made(text: str) -> None:
    with pytest.raises(ValueError, match="a=range"):
        read_grid([text])
    with pytest.raises(ValueError, match=r"\b1000000\b"):
        read_grid(["a=range(1000)", "b=range(1000)"]).points()
