"""The report: everything in the files is in the page, escaped; what is missing is named; nothing is fetched."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_samples import PIECES, RULES, write_run

from ee_megatron.report import charts, svg
from ee_megatron.report.data import ReportRun
from ee_megatron.report.page import write_report
from ee_megatron.report.palette import DARK, LIGHT, ink, luminance, scale
from ee_megatron.report.results import binned
from tests.snapshot import assert_as_stored, page_text


class Page(HTMLParser):
    """Tags with attributes, visible text, and unclosed elements of a page."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "circle", "rect", "line", "path", "polyline"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text())
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


def _edit(stages: dict[str, Path], change) -> None:
    path = stages["evaluate"] / "results.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def _problems(page: Page) -> int:
    return sum((a.get("aria-labelledby") or "").startswith("p") for a in page.of("article"))


def test_every_row_metric_and_token_of_the_files_is_in_the_page(tmp_path):
    stages = write_run(tmp_path / "run")
    page = Page(write_report([ReportRun(stages)], tmp_path / "report.html"))
    assert page.open == []
    data = json.loads((stages["evaluate"] / "results.json").read_text())
    tokens = page.of("span", "t")
    rollouts = 3 * 2 * len(PIECES)
    assert len(tokens) == sum(len(a["tokens"]) for a in data["answers"]) + rollouts
    first = data["answers"][1]["tokens"][1]
    tip = tokens[len(data["answers"][0]["tokens"]) + 1]["data-tip"]
    assert f"depth {first['depth']} of 30" in tip and f"entropy {first['entropy']:.3f} nats" in tip
    assert re.search(r"\nprobability 0\.\d{3}\nexit probability 0\.\d{3}\n", tip)
    for reading in first["readings"]:
        who = f"exit {reading['depth']}" if reading["depth"] else "teacher"
        assert f'{who}: "{reading["text"]}" {math.exp(reading["logprob"]):.2f}' in tip
    assert len(page.of("svg")) > 12 and "learning_rate: 1.0e-3" in page.text and "megatron-core 0.16.1" in page.text
    names = {p.name for p in (tmp_path / "plots").iterdir()}
    assert names == {f"training_{s}.png" for s in ("teacher", "calibrate", "rl")} | {
        f"{name}.png"
        for name in (
            "accuracy_depth", "depth_entropy", "exit_histogram", "pareto", "gates", "kl_by_exit", "controls",
            "truncation", "planning_probe",
        )
    }  # fmt: skip
    assert all((tmp_path / "plots" / n).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for n in names)


def test_the_page_says_what_is_stored(tmp_path):
    """Every table of the evaluation, the verdict, the legends and the glossary."""
    page = write_report([ReportRun(write_run(tmp_path / "run"))], tmp_path / "report.html")
    assert_as_stored(page_text(page), "report.txt")
    assert len(Page(page).of("circle", "hollow")) == 1, "the control that missed its depth"


def test_the_time_of_a_step_stands_by_phase(tmp_path):
    """Medians, so that a slow first step doesn't count; what no phase has is the rest."""
    stages = write_run(tmp_path / "run")
    page = Page(write_report([ReportRun(stages)], tmp_path / "report.html"))
    for row in ("4 40% 1,234 – –", "2 20% – – –", "3 30% – 321 32.5%", "0.4 4%", "10 100%"):
        assert f" {row} " in page.text, row
    # Clocks are nobody's metrics, and their file may be missing or damaged.
    assert "seconds_score" not in page.text
    (stages["rl"] / "timings.jsonl").write_text("no clock\n")
    assert "4 40% 1,234" not in Page(write_report([ReportRun(stages)], tmp_path / "report.html")).text


def test_runs_are_compared_on_one_page_and_what_they_share_stands_once(tmp_path):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    two |= {stage: one[stage] for stage in ("teacher", "traces", "calibrate")}

    def deeper(data):
        for row in data["rows"]:
            row["mean_depth"] -= 0.01

    _edit(two, deeper)
    runs = [
        ReportRun(one, "lambda_exit=0", {"lambda_exit": "0"}),
        ReportRun(two, "lambda_exit=0.5", {"lambda_exit": "0.5"}),
    ]
    page = Page(write_report(runs, tmp_path / "report.html"))
    assert page.open == []
    heads = [a["aria-label"] for a in page.of("div", "answer")]
    assert heads[:4] == ["teacher, full depth", "calibrated, hazard > 0.9", "reinforced (lambda_exit=0), hazard > 0.9",
                         "reinforced (lambda_exit=0.5), hazard > 0.9"]  # fmt: skip
    assert "0.640" in page.text and "2 early-exit runs" in page.text and "lambda_exit=0.5. " in page.text
    assert page.text.count("teacher: config.yaml") == 1 and "rl, lambda_exit=0.5: config.yaml" in page.text
    assert (tmp_path / "plots" / "front_runs.png").is_file() and (tmp_path / "plots" / "controls_1.png").is_file()
    # One panel per metric of RL, with a line for each run.
    rl = (tmp_path / "report.html").read_text().split("<h3>rl ")[1]
    assert rl.count("<polyline") == 2 * 8


def test_runs_of_different_sizes_are_not_compared(tmp_path):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    _edit(two, lambda data: data["meta"].update(num_layers=12))
    with pytest.raises(ValueError, match=r"a: 30, b: 12"):
        write_report([ReportRun(one, "a"), ReportRun(two, "b")], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_same_prompt_stands_side_by_side_in_the_order_of_the_method(tmp_path):
    stages = write_run(tmp_path / "run")
    _edit(stages, lambda data: data["answers"].reverse())
    page = Page(write_report([ReportRun(stages)], tmp_path / "report.html"))
    labels = [a["aria-label"] for a in page.of("div", "answer")]
    assert [label.split(",")[0] for label in labels] == list(RULES) * 4
    assert _problems(page) == 4


def test_a_models_exit_rules_share_its_column(tmp_path):
    stages = write_run(tmp_path / "run")

    def second_rule(data):
        data["answers"] += [{**a, "exits": "sampled"} for a in data["answers"] if a["model"] == "reinforced"]

    _edit(stages, second_rule)
    page = (write_report([ReportRun(stages)], tmp_path / "report.html")).read_text()
    first = page[page.index('<div class="answers">') : page.index("</article>")]
    columns = [
        re.findall(r'class="answer" role="group" aria-label="([^"]*)"', part) for part in re.split(r"<div>", first)[1:]
    ]
    assert columns == [["teacher, full depth"], ["calibrated, hazard &gt; 0.9"],
                       ["reinforced, hazard &gt; 0.9", "reinforced, sampled"]]  # fmt: skip


def test_an_answer_is_one_tab_stop(tmp_path):
    page = Page(write_report([ReportRun(write_run(tmp_path / "run"))], tmp_path / "report.html"))
    stops = [a["tabindex"] for a in page.of("span", "t")]
    assert stops.count("0") == 12 + 6 and set(stops) == {"0", "-1"}


def test_hostile_text_stays_text(tmp_path):
    stages, evil = write_run(tmp_path / "run"), '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'

    def poison(data):
        data["meta"]["name"] = data["meta"]["machine"] = evil
        for row in data["rows"]:
            row["exits"] = evil
        for answer in data["answers"]:
            answer.update(prompt=evil, reference=evil, exits=evil, text=evil)
            answer["tokens"][0]["text"] = evil
        data["exit_histogram"] = {evil: {"10": 3}}
        data["depth_by_entropy"] = {evil: {"spearman": 0.1, "low": 0.0, "high": 0.2}}

    _edit(stages, poison)
    (stages["rl"] / "config.yaml").write_text(evil)
    (stages["rl"] / "metrics.jsonl").write_text(json.dumps({"step": 1, evil: 1.0}) + "\n")
    page = Page(write_report([ReportRun(stages)], tmp_path / "report.html"))
    kinds = [script.get("type") for script in page.of("script")]
    assert kinds == ["application/json", None] and not page.of("img") and page.text.count("<script>alert(1)") > 20
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_the_page_needs_nothing_but_itself(tmp_path):
    path = write_report([ReportRun(write_run(tmp_path / "run"))], tmp_path / "report.html")
    page = Page(path)
    sources = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "srcset", "action")]
    own = [s for s in sources if not s.startswith(("#", "data:"))]
    # The files that the stages left, where they are.
    assert len(own) == 7 and all(s.startswith("./run/") and (tmp_path / s).is_file() for s in own)
    assert not re.search(r"@import|url\(|https?://", path.read_text())
    assert any("default-src 'none'" in (a.get("content") or "") for a in page.of("meta"))


@pytest.mark.parametrize("stage", ["teacher", "calibrate", "rl", "evaluate"])
def test_a_missing_stage_is_named_and_the_rest_is_shown(tmp_path, stage):
    stages = write_run(tmp_path / "run")
    del stages[stage]
    page = Page(write_report([ReportRun(stages)], tmp_path / "report.html"))
    assert f"{stage}: " in page.text and f"{stage}: config.yaml" not in page.text
    assert "Training" in page.text


def test_missing_and_damaged_files_are_named(tmp_path):
    stages = write_run(tmp_path / "run")
    (stages["teacher"] / "config.yaml").unlink()
    (stages["calibrate"] / "metrics.jsonl").unlink()
    (stages["rl"] / "metrics.jsonl").write_text("rubbish\n")
    (stages["evaluate"] / "results.json").write_text("{")
    text = Page(write_report([ReportRun(stages)], tmp_path / "report.html")).text
    for file in ("teacher: config.yaml", "calibrate: metrics.jsonl"):
        assert text.count(file) == 1, "among what is missing, not among what is shown"
    assert "results.json" in text
    assert "rl: metrics.jsonl, line 1" in text


def test_rows_without_optional_figures_and_answers_without_tokens_are_shown(tmp_path):
    stages = write_run(tmp_path / "run")

    def strip(data):
        data["rows"] = [{"model": "teacher", "exits": "off", "accuracy": 0.5}, {"model": "other", "mean_depth": None}]
        data["answers"] = [{"prompt": "p", "model": "teacher", "correct": True, "text": "plain answer", "tokens": []}]
        for part in ("meta", "depth_by_entropy", "exit_histogram", "paired"):
            del data[part]

    _edit(stages, strip)
    text = Page(write_report([ReportRun(stages)], tmp_path / "report.html")).text
    assert "50.0 %" in text and "plain answer" in text and "exit_histogram" in text


def test_a_long_prompt_is_headed_by_its_end_and_kept_whole(tmp_path):
    stages, long = write_run(tmp_path / "run"), "Example. " * 100 + "What is 3 x 8?"
    _edit(stages, lambda data: [answer.update(prompt=long) for answer in data["answers"]])
    page = Page(write_report([ReportRun(stages)], tmp_path / "report.html"))
    assert page.text.count("What is 3 x 8?") == 2 and page.text.count(long) == 1 and _problems(page) == 1


def test_no_stage_at_all_is_an_error_of_one_line(tmp_path):
    for stages in ({}, {"rl": tmp_path / "none"}):
        with pytest.raises(ValueError, match="report") as caught:
            write_report([ReportRun(stages)], tmp_path / "report.html")
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_curves_keep_their_spikes_and_break_at_gaps():
    points = [(s, 100.0 if s == 777 else 1.0) for s in range(2000)]
    assert len(charts.thin(points)) <= 240 and (777, 100.0) in charts.thin(points)
    gap = charts.curve("x", [("", 0, [(1, 1.0), (2, 2.0), (3, float("nan")), (4, 1.0), (5, 3.0)])])
    assert gap.count("<polyline") == 2 and "nan" not in gap
    assert charts.curve("x", [("", 0, [(1, 1.0)])]).count('class="lone"') == 1


def test_ticks_are_round_and_inside():
    assert svg.ticks(0.0, 1.06) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert svg.ticks(3, 3) == [3]
    for low, high in ((0.0, 1e-7), (-5.0, 12345.0), (0.81, 0.93)):
        found = svg.ticks(low, high)
        assert 3 <= len(found) <= 11 and low <= found[0] and found[-1] <= high


def test_bins_hold_equal_counts_and_recover_a_planted_trend():
    bins = binned([(x / 10, 2.0 * x) for x in range(60)])
    assert [n for *_, n in bins] == [10] * 6
    assert all(abs(y - 20 * x) < 1e-9 for x, y, _, _ in bins)


@pytest.mark.parametrize("stops", [LIGHT, DARK])
def test_the_depth_scale_is_ordered_by_lightness_and_its_text_is_legible(stops):
    for count in (2, 6, 31):
        levels = [luminance(c) for c in scale(count, stops)]
        assert levels == sorted(levels, reverse=stops is LIGHT) and len(set(levels)) == count
        for colour in scale(count, stops):
            high, low = sorted((luminance(colour), luminance(ink(colour))), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5
