"""The language of sweeps: what is an axis and what is one value; ranges, zips, exclusions, files, budgets."""

from __future__ import annotations

import itertools
import math
import re
import tracemalloc
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st

from ee_megatron.config.load import load
from ee_megatron.sweeps import grid as language
from ee_megatron.sweeps.grid import check, combine, excluded, from_settings, parse, span, zipped
from ee_megatron.sweeps.grid_file import from_file, written


def plains(*arguments: str) -> list[dict]:
    return [{key: value.plain for key, value in point.items()} for point in from_settings(arguments).points()]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a.b=1,2", [1, 2]),
        ("a.b=0,0.1,1e-3", [0, 0.1, 0.001]),
        ("a.b=[1,2],[3]", [[1, 2], [3]]),
        ("a.b='x,y',z", ["x,y", "z"]),
        ("a.b=models/x,models/y", ["models/x", "models/y"]),
        ("a.b=true,false", [True, False]),
        ("a.b=1:4:1", [1, 2, 3, 4]),
        ("a.b=0:1:0.25,7", [0.0, 0.25, 0.5, 0.75, 1.0, 7]),
        ("a.b=1e-4:1e-2:log3", [0.0001, 0.001, 0.01]),
        ("a.b=5:1:-2", [5, 3, 1]),
        ("a.b=range(0,3)", [0, 1, 2]),
        ("a.b=range(3)", [0, 1, 2]),
        ("a.b=range(10, 40, 10)", [10, 20, 30]),
        ("a.b=range(0,1,0.25)", [0.0, 0.25, 0.5, 0.75]),
        ("a.b=range(3,0,-1)", [3, 2, 1]),
    ],
)
def test_several_values_make_an_axis(text: str, values: list) -> None:
    key, found, several = parse(text)
    assert (key, [value.plain for value in found], several) == ("a.b", values, True)


@pytest.mark.parametrize(
    ("text", "value"),
    [("a=[1,2]", [1, 2]), ("a='x,y'", "x,y"), ('a="x,y"', "x,y"), ("a='1:2:3'", "1:2:3"), ("a=x:y", "x:y"),
     ("a={x:1,y:2}", {"x": 1, "y": 2}), ("a=", "")],
)  # fmt: skip
def test_brackets_and_quotes_make_one_value(text: str, value: object) -> None:
    _, (found,), several = parse(text)
    assert not several and found.plain == value and found.text == text[2:]


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["a=1,"], "a=1,"),
        (["a"], "key=value"),
        (["~a"], "~a"),
        (["a=glob(*)"], "a=glob(*)"),
        (["a=range(3,0)"], "a=range(3,0)"),
        (["a=range(0,3,0)"], "a=range(0,3,0)"),
        (["a=7,range(0,3)"], "a=7,range(0,3)"),
        (["a=shuffle(range(0,3))"], "range(start,stop,step)"),
        (["a=range(0,3)", "a=4"], "twice"),
        (["a=1:2:0"], "a=1:2:0"),
        (["a=1:2:-1"], "a=1:2:-1"),
        (["a=0:2:log3"], "a=0:2:log3"),
        (["a=1:2:log1"], "a=1:2:log1"),
        (["a=1,2", "a=3,4"], "twice"),
        (["a=1,2", "a=3"], "twice"),
        (["a=1,2,1"], "a=1: "),
        (["name=x,y"], "name"),
        (["experiment=x,y"], "experiment"),
        (["budget=0,1"], "budget"),
        (["seed=1,2", "rl.seed=4"], "rl.seed"),
        (["budget=1e9", "rl.steps=4"], "budget"),
    ],
)
def test_what_is_wrong_with_a_grid_is_said(texts: list[str], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(from_settings(texts))
    assert says in str(caught.value)


def test_the_product_runs_its_last_axis_fastest_and_a_later_single_value_counts() -> None:
    assert plains("a=1,2", "b=x,y", "c=1", "c=2") == [
        {"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"},
    ]  # fmt: skip
    assert from_settings(["c=1", "c=2"]).fixed == {"c": "c=2"}


def test_seed_is_everything_that_is_trained_and_the_data_stay() -> None:
    grid = from_settings(["seed=1,2", "x=1"])
    assert [grid.overrides(point) for point in grid.points()] == [
        ["x=1", "calibrate.seed=1", "rl.seed=1"], ["x=1", "calibrate.seed=2", "rl.seed=2"],
    ]  # fmt: skip
    assert from_settings(["seed=3"]).overrides({}) == ["calibrate.seed=3", "rl.seed=3"]


def test_zipped_axes_run_together_and_may_repeat_a_value() -> None:
    grid = from_settings(["a=1,2,1", "b=x,y,z", "c=0,1"])
    zipped(grid, ["a", "b"])
    check(grid)
    found = [[v.plain for v in point.values()] for point in grid.points()]
    assert found == [[1, "x", 0], [1, "x", 1], [2, "y", 0], [2, "y", 1], [1, "z", 0], [1, "z", 1]]
    for keys, says in [(["a", "q"], r"--zip a,q\b.*\bq\b"), (["a"], r"--zip a\b")]:
        with pytest.raises(ValueError, match=says):
            zipped(from_settings(["a=1,2", "b=1,2"]), keys)
    with pytest.raises(ValueError, match=r"\ba\b.*\b2\b.*\bb\b.*\b3\b"):
        zipped(from_settings(["a=1,2", "b=1,2,3"]), ["a", "b"])
    twice = from_settings(["a=1,1", "b=x,x"])
    zipped(twice, ["a", "b"])
    with pytest.raises(ValueError, match="a=1 b=x"):
        check(twice)


def test_exclusions_leave_out_points_and_must_match_one() -> None:
    grid = from_settings(["a=0,1", "b=1,2,3"])
    grid.exclude = [excluded("a=0 b=2,3")]
    assert [[v.plain for v in p.values()] for p in grid.points()] == [[0, 1], [1, 1], [1, 2], [1, 3]]
    for rule, says in [("a=7", "a=7"), ("c=1", r"\bc\b.*\ba, b"), ("a=0,1", r"exclude.*\b6\b")]:
        grid.exclude = [excluded(rule)]
        with pytest.raises(ValueError, match=says):
            check(grid)
            grid.points()


@given(st.integers(-50, 50), st.integers(1, 20), st.integers(1, 12))
def test_ranges_hold_both_ends(start: int, step: int, count: int) -> None:
    stop = start + step * (count - 1)
    assert span("k", str(start), str(stop), str(step)) == [start + i * step for i in range(count)]
    # Tenths have no exact binary form: the stop must not be lost.
    tenths = span("k", str(start / 10), str(stop / 10), str(step / 10))
    assert len(tenths) == count and tenths[-1] == pytest.approx(stop / 10, abs=1e-9)


@given(st.floats(1e-8, 1e8), st.floats(1e-8, 1e8), st.integers(2, 9))
def test_logarithmic_ranges_have_equal_ratios_and_exact_ends(low: float, high: float, count: int) -> None:
    low, high = float(f"{low:.3g}"), float(f"{high:.3g}")
    found = span("k", repr(low), repr(high), f"log{count}")
    whole = repr(low).isdigit()
    assert not whole and len(found) == count and (found[0], found[-1]) == (low, high)
    ratios = [math.log(b / a) for a, b in itertools.pairwise(found)]
    assert max(ratios) - min(ratios) < 1e-4


def test_hydras_range_has_the_values_of_hydras_own_sweeps_and_is_an_axis_of_files_too(tmp_path: Path) -> None:
    for text in ("range(0,5)", "range(0,1,0.1)", "range(1.5,-1,-0.5)", "range(2,3)"):
        hydras = list(OverridesParser.create().parse_override(f"a={text}").sweep_iterator())
        assert [value.plain for value in parse(f"a={text}")[1]] == hydras
    file = tmp_path / "grid.yaml"
    file.write_text("axes: {a: 'range(0,3)'}")
    assert [point["a"].plain for point in from_file(file).points()] == [0, 1, 2]
    assert parse("a='range(0,3)'")[1][0].plain == "range(0,3)"


def test_whole_ends_make_whole_numbers() -> None:
    assert span("k", "1", "1000", "log4") == [1, 10, 100, 1000]
    assert span("k", "1", "3", "log5") == [1, 2, 3]


plain_values = st.one_of(
    st.booleans(), st.integers(-1000, 1000), st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12),
)  # fmt: skip


@example(".0")
@given(st.one_of(plain_values, st.lists(plain_values, max_size=3)))
def test_what_a_file_says_arrives_as_it_was_written(value: object) -> None:
    """YAML value -> setting text -> Hydra's parser -> the same value, whatever characters it has."""
    _, (found,), several = parse(f"key={written('key', value)}")
    assert not several and found.plain == value and type(found.plain) is type(value)


@given(st.lists(st.one_of(st.integers(-9, 9), st.floats(-5, 5), st.text("ab,[]:'\" =", max_size=6)),
                min_size=2, max_size=5, unique_by=repr))  # fmt: skip
def test_an_axis_of_any_values_survives_the_command_line(values: list) -> None:
    _, found, several = parse(f"key={','.join(written('key', value) for value in values)}")
    assert several and [value.plain for value in found] == values
    again = [parse(f"key={value.text}")[1][0].plain for value in found]
    assert again == values


FILE = """\
settings: {experiment: demo_cpu, task.families: [sum, word]}
axes:
  rl.depth_penalty.weight: 0:1:0.5
  seed: [1, 2]
zip:
  - {model.path: [a, b], rl.steps: [5, 10]}
exclude:
  - {rl.depth_penalty.weight: 0, seed: [2]}
isoflop: {set: rl.steps, mean_depth: 0.8}
"""


def test_a_file_says_the_same_as_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(FILE)
    grid = from_file(file)
    check(grid)
    points = grid.points()
    assert len(points) == 10 and grid.isoflop.mean_depth == 0.8
    assert grid.overrides(points[0]) == [
        "experiment=demo_cpu", "task.families=[sum,word]", "rl.depth_penalty.weight=0.0", "calibrate.seed=1",
        "rl.seed=1",
        "model.path=a", "rl.steps=5",
    ]  # fmt: skip
    file.write_text(
        FILE.replace(
            "{model.path: [a, b], rl.steps: [5, 10]}", "{keys: [model.path, rl.steps], rows: [[a, 5], [b, 10]]}"
        )
    )
    assert from_file(file) == grid
    changed = combine(grid, from_settings(["rl.depth_penalty.weight=0,7", "experiment=rl_7b"]))
    assert {p["rl.depth_penalty.weight"].plain for p in changed.points()} == {0, 7} and changed.fixed[
        "experiment"
    ] == "experiment=rl_7b"
    with pytest.raises(ValueError, match=r"rl\.steps.*zip"):
        combine(grid, from_settings(["rl.steps=3"]))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("axis: {a: [1]}", "axes"),
        ("axes: {a: 3}", r"\ba\b.*\b3\b"),
        ("axes: {a: [1, {b: 2}]}", r"\ba\b.*\{'b': 2\}"),
        ("axes: {rl: {steps: [1]}}", r"axes.*\brl\."),
        ("settings: {a: 1}\naxes: {a: [1, 2]}", r"\ba\b.*twice"),
        ("zip: [{a: [1], b: [1, 2]}]", r"zip.*\ba\b.*\b1\b.*\bb\b.*\b2\b"),
        ("zip: {a: [1]}", "zip.*dict"),
        ("zip: [{keys: [a, b], rows: [[1, 2], [3]]}]", r"zip.*\b2\b.*\[3\]"),
        ("zip: [{keys: a, rows: [[1]]}]", r"zip.*'keys': 'a'"),
        ("isoflop: {sett: x}", r"isoflop\.sett\b"),
        ("isoflop: {set: rl.kl_penalty.weight}", r"isoflop\.set=rl\.kl_penalty\.weight.*calibrate\.epochs"),
        ("- a", "axes.*list"),
        ("a: [", "line 1"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        from_file(file)
    where, said = str(caught.value).split(": ", 1)
    assert where == str(file) and re.search(says, said), said


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "configs" / "sweep").glob("*.yaml")), ids=str)
def test_every_grid_that_comes_along_is_a_grid(file: Path) -> None:
    grid = from_file(file)
    check(grid)
    seen: set[tuple[str, str]] = set()
    for point in grid.points():
        # Of a thousand points as many as show every value once.
        if new := {(key, value.text) for key, value in point.items()} - seen:
            seen |= new
            load(grid.overrides(point))


@pytest.mark.parametrize("name", ["ladder_front", "ladder_loss"])
def test_what_a_laptop_runs_is_a_part_of_the_whole_study(name: str) -> None:
    """So that either finds what the other has made."""
    folder = Path(__file__).parents[2] / "configs" / "sweep"
    whole, part = (from_file(folder / f"{file}.yaml") for file in (name, f"{name}_laptop"))
    every = [whole.overrides(point) for point in whole.points()]
    assert 0 < len(part.points()) < len(every)
    assert all(part.overrides(point) in every for point in part.points())


def test_the_words_of_the_language_are_no_settings_of_the_schema() -> None:
    with pytest.raises(ValueError, match="seed"):
        load(["experiment=demo_cpu", "seed=1"])
    assert set(language.SEEDS) <= {"calibrate.seed", "rl.seed"}


@pytest.mark.parametrize(
    "text",
    ["a=0:1:lin1000000000", "a=1:10:log1000001", "a=1:1000000000000:1", "a=0:1:1e-300", "a=0:1e300:1e-300",
     "a=range(1000000001)", "a=range(0,1,1e-9)"],
)  # fmt: skip
def test_a_range_of_too_many_values_is_refused_before_it_is_made(text: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="1000000"):
            from_settings([text])
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


def test_so_is_a_grid_of_too_many_points() -> None:
    grid = from_settings(["a=1:1000:1", "b=0:1.0:lin1001"])
    with pytest.raises(ValueError, match=r"\b1001000\b.*\b1000000\b"):
        grid.points()
    with pytest.raises(ValueError, match="a=0:1e999:lin3"):
        from_settings(["a=0:1e999:lin3"])


def test_twice_the_same_value_is_found_among_many_at_once() -> None:
    check(from_settings(["a=1:20000:1", "b=1,true,[1],[true]"]))
    for text in ("a=1,2,1.0", "a=[1,2],[1,2]", "a=x,y,x"):
        with pytest.raises(ValueError, match="twice"):
            check(from_settings([text]))
