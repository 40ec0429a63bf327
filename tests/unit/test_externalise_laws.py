"""The laws of a ladder of models: by hand, and of a study of two shapes whose runs must not be mixed."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from ee_megatron import cli
from ee_megatron.config.load import load
from ee_megatron.externalise.command import main
from ee_megatron.externalise.laws import Law, crossing, laws, laws_rows, laws_table
from ee_megatron.externalise.shape import Shape, shape_of
from ee_megatron.externalise.study import Record, Study, read_study
from tests.externalise_samples import BETA, LAYERS, MODEL, OBJECTIVES, config, record, with_share, write

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 6, "intermediate_size": 96, "vocab_size": 20, "tie_word_embeddings": False,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
}  # fmt: skip


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({0: 0.3, 1: 0.7}, 0.5),
        ({0: 0.1, 1: 0.2, 2: 0.6, 4: 0.9}, 1.75),
        # The first of two; and where one price has exactly half.
        ({0: 0.4, 1: 0.6, 2: 0.3, 3: 0.8}, 0.5),
        ({0: 0.4, 0.25: 0.5, 1: 0.6}, 0.25),
        ({2: 0.9, 0: 0.1, 1: 0.5}, 1.0),
        ({0: 0.5, 1: 0.9}, 0.0),
        ({0: 0.3, 1: 0.4}, None),
        ({0: 0.4, 1: 0.3, 2: 0.2}, None),
        # Somewhere below the lowest price that was tried.
        ({0.5: 0.6, 1: 0.9}, None),
        ({0.5: 0.6, 1: 0.4, 2: 0.9}, None),
        ({1: 0.3, 2: 0.7}, 1.5),
        ({0: 0.3}, None),
        ({}, None),
    ],
)
def test_the_observed_price_is_where_straight_lines_reach_half(
    shares: Mapping[float, float], expected: float | None
) -> None:
    found = crossing(shares, 0.5)
    assert found is None if expected is None else found == pytest.approx(expected)


def at(price: float, steps: float, base: int = 1, seed: int = 1) -> Record:
    """A run that paid so much for its deepest token, and wrote so many steps."""
    run = record("max 1" if price else "lambda 0", base, seed)
    if price:
        run = replace(run, objective=replace(run.objective, lambda_exit=price))
    return with_share(run, steps=steps)


def only(found: list[Law], **wanted: object) -> Law:
    (law,) = (law for law in found if all(getattr(law, name) == value for name, value in wanted.items()))
    return law


def test_a_bases_laws_by_hand() -> None:
    """A terse answer's deepest token takes 2.1 layers at 1 hop and 5.1 at 3, a written one's 1; .4 of the teacher's
    answers are steps and all others as deep as each other, so that the excess times lambda / 6 is beta ln 1.5."""
    runs = [at(0, 0.4), at(0.5, 0.45, seed=1), at(0.5, 0.35, seed=2), at(2, 0.7), record("lambda 0", hops=1)]
    found = laws(Study([*runs, record("cap 2"), record("length 0.5")]))
    assert {(law.cost, law.family) for law in found} == {
        (c, f) for c in ("mean", "total", "max") for f in ("hop1", "hop3")
    }
    law = only(found, family="hop3", cost="max")
    assert law.layers == pytest.approx({"terse": 5.1, "steps": 1, "padded": 5.1}) and law.right["terse"] == 0.98
    assert (law.per_hop, law.at_no_hop) == pytest.approx((1.5, 0.6))
    assert law.forecast == pytest.approx(BETA * math.log(1.5) / ((5.1 - 1) / LAYERS))
    # Seeds are averaged: .4 at .5, so that half is reached at a third of the way from there to 2.
    assert law.shares == pytest.approx({0: 0.4, 0.5: 0.4, 2: 0.7}) and law.observed == pytest.approx(1.0)
    assert law.runs == 4
    assert only(found, family="hop1", cost="max").forecast == pytest.approx(BETA * math.log(1.5) / (1.1 / LAYERS))
    # Nobody paid the mean; without a price 40 % are steps.
    mean = only(found, family="hop3", cost="mean")
    assert mean.shares == {0: pytest.approx(0.4)} and mean.observed is None and mean.runs == 1
    # Under the total of one token a step, steps of three hops cost 5 layers, terse answers 7.1, padded ones 10.1.
    total = only(found, family="hop3", cost="total")
    assert total.forecast is not None
    odds = [w / 0.4 * math.exp(-total.forecast * saved / 3 / LAYERS / BETA) for w, saved in ((0.4, 2.1), (0.2, 5.1))]
    assert sum(odds) == pytest.approx(1)


def test_rows_have_a_column_for_every_price_and_prices_per_layer() -> None:
    found = laws(Study([at(0, 0.4), at(2, 0.8), record("mean 1")]))
    rows = laws_rows(found)
    assert len({row["model"] for row in rows}) == len({(law.shape, law.base) for law in found})
    assert [name for name in rows[0] if name.startswith("share_steps")] == [f"share_steps_{p}" for p in (0, 1, 2)]
    (row,) = (row for row in rows if row["cost"] == "max")
    assert (row["share_steps_0"], row["share_steps_1"], row["share_steps_2"]) == (pytest.approx(0.4), None, 0.8)
    assert row["price_observed"] == pytest.approx(0.5) and row["price_observed_per_layer"] == pytest.approx(0.5 / 6)
    assert (row["layers"], row["width"], row["parameters"]) == (6, None, None)
    assert (row["layers_terse"], row["depth_terse"]) == (pytest.approx(5.1), pytest.approx(5.1 / 6))
    # Of one family alone there is no line.
    assert math.isnan(row["layers_per_hop"])


def test_what_a_model_could_do_stands_beside_what_its_exits_let_it_do() -> None:
    """Gates that leave too early cost silent answers; how many hops a model can follow is seen at full depth."""
    run = at(0, 0.4)
    start = run.models["start"]["hop3"]
    hasty = replace(start, forced={**start.forced, "terse": replace(start.forced["terse"], correct=0.5)})
    study = Study([replace(run, models={**run.models, "start": {"hop3": hasty}})])
    row = next(row for row in laws_rows(laws(study)) if row["cost"] == "max")
    assert (row["right_terse"], row["right_terse_full"], row["right_steps_full"]) == (0.5, 0.98, 0.98)
    assert laws_table(laws(study))[1].rows[0][7] == "0.98"
    # Full depth has no gates, so that a run under a cap may have measured it.
    bare = replace(run, models={"reinforced": run.models["reinforced"]})
    capped = record("cap 2")
    capped = replace(capped, models={**capped.models, "start": {"hop3": start}})
    row = next(row for row in laws_rows(laws(Study([bare, capped]))) if row["cost"] == "max")
    assert (row["right_terse"], row["right_terse_full"]) == (None, 0.98)


def test_a_base_that_was_trained_on_all_families_has_what_was_measured_before() -> None:
    """Its run is no place on the line of the family alone, so that it has no prices; layers were measured all the same.
    Where no base was trained on the family alone, the run is one."""
    parts = [record("lambda 0", base=2, hops=hops) for hops in (1, 3)]
    models = {model: parts[0].models[model] | parts[1].models[model] for model in parts[0].models}
    both = replace(parts[0], families=("hop1", "hop3"), models=models)
    found = laws(Study([at(0, 0.4), at(1, 0.6), both]))
    alone, other = only(found, base=1, family="hop3", cost="max"), only(found, base=2, family="hop3", cost="max")
    assert (alone.runs, alone.observed) == (2, pytest.approx(0.5)) and (other.runs, other.observed) == (0, None)
    assert other.layers == alone.layers and other.forecast == alone.forecast and other.shares == {}
    assert laws_rows([other])[0]["price_observed"] is None
    assert only(found, base=2, family="hop1", cost="max").runs == 1


def test_prices_are_those_of_the_level_that_is_asked_for() -> None:
    study = Study([at(0, 0.4), at(2, 0.8), record("mean 1")])
    half, most = (only(laws(study, level), cost="max") for level in (0.5, 0.7))
    assert (half.observed, most.observed) == (pytest.approx(0.5), pytest.approx(1.5))
    assert half.forecast is not None and most.forecast is not None and half.forecast < most.forecast
    assert laws_rows([most])[0]["level"] == 0.7 and "have 70% of" in laws_table([most])[0]


@pytest.mark.parametrize("level", ["0", "1", "-1"])
def test_a_level_that_is_no_share_is_refused(level: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"level.*{level}"):
        main([str(tmp_path), f"--level={level}"])


def test_what_was_not_measured_leaves_its_cells_empty() -> None:
    bare = [replace(run, models={"reinforced": run.models["reinforced"]}) for run in (at(0, 0.4), at(1, 0.6))]
    law = only(laws(Study(bare)), cost="max")
    assert law.layers == {} and law.forecast is None and math.isnan(law.per_hop) and law.observed == pytest.approx(0.5)
    (row,) = laws_table([law])[1].rows
    assert row[4:10] == ("–", "–", "–", "–", "–", "0.50")
    # A study of fixed depths, or of a price of length, has no price of depth.
    assert laws(Study([record("cap 2"), record("no exits"), record("length 0.5")])) == []


def test_the_table_says_how_many_bases_have_a_price() -> None:
    runs = [at(0, 0.4), at(1, 0.6), at(0, 0.4, base=2), at(1, 0.45, base=2)]
    _, table = laws_table([law for law in laws(Study(runs)) if law.cost == "max"])
    (row,) = table.rows
    assert row[4] == "5.10 [5.10, 5.10]" and row[9] == "0.50 (1 of 2)" and row[10] == "2"


def test_a_shape_is_what_the_settings_and_config_json_say(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    cfg = load(["name=t", f"model.path={tmp_path}", "exits.depths=[2,4]", "pretrain=true"])
    block = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64
    shape = shape_of(cfg, 6)
    assert shape == Shape(6, 64, 6 * block + 64) and re.findall(r"[\d,]*\d", shape.label) == [
        "6",
        "64",
        f"{6 * block + 64:,}",
    ]
    cfg.pretrain.layers, cfg.pretrain.width = 8, 128
    block = 128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 192 + 2 * 128
    assert shape_of(cfg, 8) == Shape(8, 128, 8 * block + 128)
    cfg.pretrain.layers = cfg.pretrain.width = 0
    # What was measured counts: the file there now is another.
    assert shape_of(cfg, 12) == Shape(12, 0, 0, str(tmp_path))
    cfg.model.path, cfg.pretrain.width = "gone", 128
    gone = shape_of(cfg, 6)
    assert gone == Shape(6, 128, 0, "gone") and re.search(r"6.*128.*gone", gone.label)
    assert (
        len({Shape(6, 64, 9).slug, Shape(6, 64, 8).slug, Shape(6, 0, 0, "a/b").slug, Shape(6, 0, 0, "a/c").slug}) == 4
    )


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shapes, of 6 and 12 layers, with the same seeds; the deeper one has a learning rate of its own."""
    root = tmp_path_factory.mktemp("ladder")
    for layers, share in ((LAYERS, 0.8), (12, 0.6)):
        for made in (record("lambda 0", layers=layers), record("no exits", layers=layers)):
            write(root, made, settings_of(made))
        made = with_share(record("max 1", layers=layers), steps=share)
        write(root, made, settings_of(made))
    return root


def settings_of(made: Record):
    cfg = config(made)
    cfg.exits.depths = list(range(1, made.num_layers))
    cfg.pretrain.learning_rate = 1e-3 if made.num_layers == 12 else 3e-3
    return cfg


def test_shapes_are_read_apart_and_what_else_differs_is_said(ladder: Path) -> None:
    study = read_study(ladder)
    assert study.shapes == [Shape(6, path=MODEL), Shape(12, path=MODEL)] and len(study.records) == 6
    (remark,) = study.remarks
    assert "pretrain.learning_rate: 0.001, 0.003" in remark
    assert [r.condition.label for r in study.of_shape(study.shapes[1]).records] == ["lambda 0", "max 1", "no exits"]
    assert OBJECTIVES["no exits"].condition(12).label == "cap 6"
    found = {law.shape.layers: law for law in laws(study) if law.cost == "max"}
    # The same shares of twice the layers.
    assert found[12].layers["terse"] == pytest.approx(10.2) == 2 * found[6].layers["terse"]
    assert found[6].shares[1] == pytest.approx(0.8) and found[12].shares[1] == pytest.approx(0.6)
    assert found[6].observed is not None and found[12].observed is not None
    assert found[6].observed < found[12].observed


def test_a_ladders_page_has_a_part_for_each_shape_and_the_laws_of_all(
    ladder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["externalise", str(ladder), "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\b6 runs\D*\b2\b\D*\b2\b", shown)
    assert all(re.search(rf"^ *{layers} layers, {MODEL} +3 ", shown, re.MULTILINE) for layers in (6, 12)), shown
    page = (tmp_path / "externalise.html").read_text()
    heads = [f"{layers} layers, {MODEL}: " for layers in (6, 12)]
    assert (
        page.index(heads[0])
        < page.index(heads[1])
        < page.index('<section id="laws"')
        < page.index('<section id="steps-1')
    )
    answers = [re.findall(r"\d+%", page[page.index(head) :])[0] for head in heads]
    assert answers == ["80%", "60%"]
    assert f": 6 layers, {MODEL}</h2>" in page and page.count(f"<h3>12 layers, {MODEL}</h3>") == 1
    assert f"12 layers, {MODEL}. " in page and ">layers</th>" in page
    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    assert plots == {f"{what}_hop3_tau1_{n}x0-0-no-such-model.png" for what in ("steps", "padding") for n in (6, 12)}
    with (tmp_path / "laws.csv").open() as file:
        rows = {(row["layers"], row["cost"]): row for row in csv.DictReader(file)}
    assert len(rows) == 6 and float(rows["12", "max"]["layers_terse"]) == pytest.approx(10.2)
    assert float(rows["6", "max"]["share_steps_1"]) == pytest.approx(0.8) and rows["6", "mean"]["share_steps_1"] == ""
    with (tmp_path / "externalise.csv").open() as file:
        assert [row["layers"] for row in csv.DictReader(file)] == ["6"] * 3 + ["12"] * 3
    data = json.loads((tmp_path / "externalise.json").read_text())
    assert [found["layers"] for found in data["shapes"]] == [6, 12] and "points" not in data
    assert [[p["passed"] for p in found["points"]][1:3] for found in data["shapes"]] == [[True, True]] * 2
