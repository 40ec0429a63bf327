"""The report in a real browser: it draws, it logs no error, it fetches nothing, its tooltips and keys work."""

import pytest
from report_browser import EXECUTABLE, Browser, barriers, drawn
from report_samples import write_run

from ee_megatron.report.data import ReportRun
from ee_megatron.report.page import write_report

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no chromium on PATH (Debian: apt-get install chromium)")
TIP = "(() => { const t = document.getElementById('tip'); return t.hidden ? null : t.innerText })()"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    return write_report([ReportRun(write_run(root / "run"))], root / "report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    page = Browser(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1180, 390])
def test_it_draws_without_errors_requests_or_overflow(browser, report, width, dark):
    drawn(browser, report, width, dark)


def test_pointing_at_a_token_shows_its_figures_inside_the_window(browser, report):
    browser.open(report, 390, 800, False)
    assert browser.evaluate(TIP) is None
    browser.evaluate("document.querySelectorAll('.t')[15].scrollIntoView({block: 'center', behavior: 'instant'})")
    box = browser.evaluate("(() => { const b = document.querySelectorAll('.t')[15].getClientRects()[0];"
                           " return [b.left + b.width / 2, b.top + b.height / 2] })()")  # fmt: skip
    browser.point(*box)
    shown = browser.evaluate(TIP)
    assert shown == browser.evaluate("document.querySelectorAll('.t')[15].dataset.tip")
    assert all(word in shown for word in ("depth", "\nprobability", "\nexit probability", "\nentropy"))
    inside = "(() => { const b = document.getElementById('tip').getBoundingClientRect();"
    assert browser.evaluate(f"{inside} return b.left >= 0 && b.right <= innerWidth && b.top >= 0 }})()")
    browser.point(2, 2)
    assert browser.evaluate(TIP) is None


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1180, 390])
def test_axe_finds_no_barrier(browser, report, width, dark):
    """Every rule of axe-core: names, roles, contrast in both modes, reading order, what the keyboard reaches."""
    assert barriers(browser, report, width, dark) == []


def test_a_token_tells_what_each_exit_on_the_way_would_have_written(browser, report):
    browser.open(report, 1180, 900, False)
    chosen = "[...document.querySelectorAll('.t')].find(t => /exit 15: .*hazard/.test(t.dataset.tip))"
    browser.evaluate(f"{chosen}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    box = browser.evaluate(f"(() => {{ const b = {chosen}.getClientRects()[0];"
                           " return [b.left + b.width / 2, b.top + b.height / 2] })()")  # fmt: skip
    browser.point(*box)
    shown = browser.evaluate(TIP)
    assert 'exit 10: " the" 0.82, hazard 0.02' in shown and "\nteacher: " in shown


def test_keys_walk_an_answers_tokens_and_tab_goes_to_the_next_answer(browser, report):
    browser.open(report, 1180, 900, False)
    browser.evaluate("document.querySelector('.t').focus()")
    seen = [browser.evaluate(TIP)]
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "Home"):
        browser.press(key)
        seen.append(browser.evaluate(TIP))
    tips = browser.evaluate("[...document.querySelector('.tokens').querySelectorAll('.t')].map(t => t.dataset.tip)")
    assert seen == [tips[i] for i in (0, 1, 2, 1, len(tips) - 1, 0)]
    assert browser.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    browser.press("Tab")
    second = "document.querySelectorAll('.tokens')[1].contains(document.activeElement)"
    assert browser.evaluate(second) is True
    browser.press("Escape")
    assert browser.evaluate(TIP) is None


def test_a_chart_mark_answers_the_pointer(browser, report):
    browser.open(report, 1180, 900, False)
    browser.evaluate("document.querySelector('.mark[data-tip]').scrollIntoView({block: 'center', behavior: 'instant'})")
    box = browser.evaluate("(() => { const b = document.querySelector('.mark[data-tip]').getBoundingClientRect();"
                           " return [b.left + b.width / 2, b.top + b.height / 2] })()")  # fmt: skip
    browser.point(*box)
    assert "accuracy 86.0 [82.5, 89.3] %" in browser.evaluate(TIP)
