"""The report: everything in the files is in the page, escaped; what is missing is named; nothing is fetched."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from matplotlib import rc_context
from report_samples import PIECES, RULES, write_run

from ee_megatron.report.answers import differences, embedded
from ee_megatron.report.figures import (
    ACCURACY,
    SERIES,
    STYLE,
    ChartLine,
    Point,
    figure,
    figure_png,
    figure_svg,
    ink,
    line_chart,
    luminance,
    scale,
)
from ee_megatron.report.inputs import ReportRun, read_inputs
from ee_megatron.report.page import verdict, write_report
from tests.snapshot import assert_as_stored, page_text

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\x01$\\frac{'


class Page(HTMLParser):
    """Tags with attributes, visible text, and unclosed elements of a page."""

    VOID = frozenset({"meta", "link", "br", "img", "input"})

    def __init__(self, stages: dict[str, Path], *more: ReportRun) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        folder = Path(next(iter(stages.values()))).parent.parent
        runs = more or [ReportRun(stages)]
        self.source = write_report(runs, folder / "report.html").read_text()
        self.feed(self.source)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def of(self, name: str, css: str = "") -> list[dict[str, str | None]]:
        return [a for tag, a in self.tags if tag == name and (not css or css in (a.get("class") or "").split())]


@pytest.fixture
def stages(tmp_path: Path) -> dict[str, Path]:
    return write_run(tmp_path / "run")


def edit(stages: dict[str, Path], change) -> None:
    path = stages["evaluate"] / "results.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_every_row_metric_and_token_of_the_files_is_in_the_page(stages, tmp_path):
    page = Page(stages)
    assert page.open == []
    data = json.loads((stages["evaluate"] / "results.json").read_text())
    tokens = page.of("span", "t")
    assert len(tokens) == sum(len(a["tokens"]) for a in data["answers"]) + 3 * 2 * len(PIECES)
    first = data["answers"][1]["tokens"][1]
    tip = tokens[len(data["answers"][0]["tokens"]) + 1]["data-tip"]
    assert f"depth {first['depth']} of 30" in tip and f"entropy {first['entropy']:.3f} nats" in tip
    for reading in first["readings"]:
        who = f"exit {reading['depth']}" if reading["depth"] else "teacher"
        assert f'{who}: "{reading["text"]}" {math.exp(reading["logprob"]):.2f}' in tip
    # One tab stop per answer.
    assert [a["tabindex"] for a in tokens].count("0") == 12 + 6
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {
        f"{name}.png"
        for name in (
            "accuracy_depth", "depth_entropy", "exit_histogram", "pareto", "gates", "kl_by_exit", "controls",
            "truncation", "planning_probe",
        )
    }  # fmt: skip
    # A chart each, and a panel for each metric that changes: 1 + 4 + 8.
    drawings = page.of("svg")
    assert len(drawings) == 9 + 13 and all(a["role"] == "img" and a["aria-label"] for a in drawings)
    assert "Never changed: lambda 1, actors alive 2" in page.text
    marks = [tip for a in page.of("use") if (tip := a.get("data-tip"))]
    assert any("reinforced" in tip and "[" in tip for tip in marks)


def test_the_page_says_what_is_stored(stages, tmp_path):
    """Every table of the evaluation, and the words around the answers."""
    assert_as_stored(page_text(write_report([ReportRun(stages)], tmp_path / "report.html")), "report.txt")


def test_runs_are_compared_on_one_page_and_what_they_share_stands_once(stages, tmp_path):
    two = write_run(tmp_path / "two") | {stage: stages[stage] for stage in ("teacher", "traces", "calibrate")}
    edit(two, lambda data: [row.update(mean_depth=row["mean_depth"] - 0.01) for row in data["rows"]])
    settings = ({"lambda_exit": "0"}, {"lambda_exit": "0.5"})
    runs = [ReportRun(of, f"lambda_exit={s['lambda_exit']}", s) for of, s in zip((stages, two), settings, strict=True)]
    page = Page(stages, *runs)
    assert page.open == []
    heads = [a["aria-label"] for a in page.of("div", "answer")]
    assert heads[:4] == ["teacher, full depth", "calibrated, hazard > 0.9", "reinforced (lambda_exit=0), hazard > 0.9",
                         "reinforced (lambda_exit=0.5), hazard > 0.9"]  # fmt: skip
    assert "0.640" in page.text and page.text.count("teacher: config.yaml") == 1
    assert "rl, lambda_exit=0.5: config.yaml" in page.text
    assert (tmp_path / "plots" / "front_runs.png").is_file() and (tmp_path / "plots" / "controls_1.png").is_file()
    assert [a["aria-label"] for a in page.of("svg")].count("rl: reward over steps") == 1, "one chart for both"
    edit(two, lambda data: data["meta"].update(num_layers=12))
    with pytest.raises(ValueError, match="layers"):
        write_report(runs, tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_answers_stand_by_prompt_a_column_for_each_model(stages):
    long = "Example. " * 100 + "What is 3 x 8?"

    def change(data):
        data["answers"] += [{**a, "exits": "sampled"} for a in data["answers"] if a["model"] == "reinforced"]
        for answer in data["answers"]:
            answer["prompt"] = answer["prompt"].replace("Question: What is 3 x 8?", long)

    edit(stages, change)
    page = Page(stages)
    labels = [a["aria-label"].split(",")[0] for a in page.of("div", "answer")]
    assert labels == [*RULES, "reinforced"] * 4
    first = page.source[page.source.index('<div class="answers">') : page.source.index("</article>")]
    assert len(re.split(r"<div>", first)) == 1 + 3, "a model's exit rules share its column"
    assert page.text.count("What is 3 x 8?") == 2 and page.text.count(long) == 1, "headed by its end, kept whole"


def test_hostile_text_stays_text(stages):
    def poison(data):
        data["meta"]["name"] = data["meta"]["machine"] = EVIL
        for row in data["rows"]:
            row["exits"] = EVIL
        for answer in data["answers"]:
            answer.update(prompt=EVIL, reference=EVIL, exits=EVIL, text=EVIL)
            answer["tokens"][0]["text"] = EVIL
        data["exit_histogram"] = {EVIL: {"10": 3}}
        data["depth_by_entropy"] = {EVIL: {"bins": [{"entropy": 0.1, "depth": 3, "tokens": 5}]}}

    edit(stages, poison)
    (stages["rl"] / "config.yaml").write_text(EVIL)
    (stages["rl"] / "metrics.jsonl").write_text(json.dumps({"step": 1, EVIL: 1.0}) + "\n")
    page = Page(stages)
    assert [script.get("type") for script in page.of("script")] == ["application/json", None] and not page.of("img")
    assert page.text.count("<script>alert(1)") > 20
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    evil = "</script><!--<script>\u2028&"
    assert not set("<>&\u2028") & set(embedded([evil])) and json.loads(embedded([evil])) == [evil]


def test_the_page_needs_nothing_but_itself_and_links_to_the_stages_files(stages, tmp_path):
    page = Page(stages)
    own = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "srcset", "action") and v]
    own = [v for v in own if not v.startswith(("#", "data:"))]
    assert len(own) == 6 and all(v.startswith("./run/") and (tmp_path / unquote(v)).is_file() for v in own)
    assert not re.search(r"@import|url\((?!#)|https?://", page.source)
    assert any("default-src 'none'" in (a.get("content") or "") for a in page.of("meta"))


def test_missing_and_damaged_files_are_named_and_the_rest_is_shown(stages, tmp_path):
    (stages["teacher"] / "config.yaml").unlink()
    (stages["calibrate"] / "metrics.jsonl").unlink()
    (stages["rl"] / "metrics.jsonl").write_text("rubbish\n")
    (stages["rl"] / "timings.jsonl").write_text("no clock\n")
    (stages["evaluate"] / "answers.jsonl").write_text("{}\n")
    text = Page(stages).text
    for file, times in {
        "teacher: config.yaml": 1,
        "calibrate: metrics.jsonl": 1,
        "answers.jsonl": 2,
    }.items():
        assert text.count(file) == times, "among what is missing; what is damaged has a link, too"
    assert "rl: metrics.jsonl" in text and "line 1" in text and "time goes" not in text
    (stages["evaluate"] / "results.json").write_text("[]")
    del stages["traces"]
    text = Page(stages).text
    assert "evaluate: results.json" in text and "traces: " in text and "Training" in text
    for none in ({}, {"rl": tmp_path / "none"}):
        with pytest.raises(ValueError, match="report"):
            write_report([ReportRun(none)], tmp_path / "other.html")
    assert not (tmp_path / "other.html").exists()


def test_the_verdict_gives_effect_interval_and_whether_it_differs_from_none():
    changes = {"accuracy": (-0.027, -0.05, -0.004), "depth": (0.006, -0.004, 0.016), "length": (1.0, None, None)}
    found = {key: dict(zip(("value", "low", "high"), change, strict=True)) for key, change in changes.items()}
    table = verdict({"reinforced, hazard > 0.8": {"against": "calibrated", "n": 400, "p_value": 0.03, **found}})
    accuracy, depth, total, length = (dict(zip(table.heads, row, strict=True)) for row in table.rows)
    assert (accuracy["effect"], accuracy["95 % interval"], accuracy["status"]) == ("-2.7%", "[-5.0%, -0.4%]", "lower")
    assert (accuracy["n"], accuracy["p"], accuracy["against"]) == ("400", "0.03", "calibrated")
    assert (depth["effect"], depth["status"], depth["p"]) == ("+0.006", "no measurable effect", "–")
    assert total["effect"] == "–" and (length["effect"], length["status"]) == ("+1.0", "no interval")


def test_answers_are_paired_by_problem_and_long_ones_lose_their_middle(stages):
    inputs = read_inputs([ReportRun(stages)])
    found = differences(inputs.results, inputs.problems)
    assert found is not None and (found["count"], found["cut"]) == (35, 0)
    assert (found["first"], found["second"]) == ("calibrated, hazard > 0.9", "reinforced, hazard > 0.9")
    long = {"correct": True, "pieces": [f"w{i}" for i in range(5000)], "depths": [10] * 5000}
    problem = {
        "prompt": "p",
        "reference": "",
        "answers": {found["first"]: long, found["second"]: {**long, "correct": False}},
    }
    cut = differences(inputs.results, [problem])
    assert cut is not None and cut["cut"] == 400
    right, tokens, depth, pieces, places, gap = json.loads(cut["data"])["problems"][0][2][0]
    assert (right, tokens, depth, gap) == (1, 5000, 0.3333, 200) and len(pieces) == len(places) == 400
    assert pieces[199:201] == ["w199", "w4800"] and pieces[-1] == "w4999" and set(places) == {0}
    assert differences(inputs.results, [{"prompt": "p", "answers": {found["first"]: long}}]) is None


def test_a_figure_keeps_its_text_and_survives_hostile_labels():
    def drawn() -> tuple[str, bytes]:
        with rc_context(STYLE):
            made, (axes,) = figure()
            (line,) = axes.plot([1, 100], [1e-3, 10], "o-", color=SERIES[1], label=EVIL)
            axes.set(xlabel=EVIL, title="plain title")
            axes.legend()
            return figure_svg(made, EVIL, {line: ["first", EVIL]}), figure_png(made)

    svg, png = drawn()
    assert (svg, png) == drawn(), "the same bytes"
    assert png[:4] == b"\x89PNG" and ">plain title</text>" in svg
    assert svg.count('data-tip="') == 2 and "\x01" not in svg and "<script" not in svg and "http" not in svg


@pytest.mark.filterwarnings("error")
def test_values_of_a_wide_range_get_a_logarithmic_axis_though_their_intervals_reach_zero():
    points = [Point(0, 0.001, -0.01, 0.01), Point(1, 1.0, 0.5, 2.0)]
    with rc_context(STYLE):
        (chart,) = line_chart("n", "title", [ChartLine("a", 0, points)], "x", "y")
        (shares,) = line_chart("n", "title", [ChartLine("a", 0, [Point(0, 0.5), Point(1, 0.75)])], "x", ACCURACY)
    assert ">0.001</text>" in chart.svg and ">70%</text>" in shares.svg


def test_the_depth_scale_is_ordered_by_lightness_and_its_text_is_legible():
    for count in (2, 6, 31):
        levels = [luminance(c) for c in scale(count)]
        assert levels == sorted(levels, reverse=True) and len(set(levels)) == count
        for colour in scale(count):
            high, low = sorted((luminance(colour), luminance(ink(colour))), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5
