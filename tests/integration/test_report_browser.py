"""The report in a real browser: it draws, it logs no error, it fetches nothing, its tooltips and keys work."""

import pytest
from report_browser import EXECUTABLE, Browser, barriers, drawn
from report_samples import write_run

from ee_megatron.report.inputs import ReportRun
from ee_megatron.report.page import write_report
from tests.covering import EXTENDED

pytestmark = [
    EXTENDED,
    pytest.mark.skipif(EXECUTABLE is None, reason="no chromium on PATH (Debian: apt-get install chromium)"),
]
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
def test_it_draws_without_errors_requests_or_overflow_and_axe_finds_no_barrier(browser, report, width, dark):
    """axe-core: names, roles, contrast in both modes, reading order, what the keyboard reaches."""
    drawn(browser, report, width, dark)
    assert barriers(browser, report, width, dark) == []


def pointed(browser, chosen):
    """What the page tells of an element that the pointer rests on."""
    browser.evaluate(f"{chosen}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    box = browser.evaluate(
        f"(() => {{ const b = {chosen}.getClientRects()[0]; return [b.left + b.width / 2, b.top + b.height / 2] }})()"
    )
    browser.point(*box)
    return browser.evaluate(TIP)


def test_pointing_at_a_token_shows_its_figures_inside_the_window(browser, report):
    browser.open(report, 390, 800, False)
    assert browser.evaluate(TIP) is None
    chosen = "[...document.querySelectorAll('#answers .t')].find(t => /exit 15: .*hazard/.test(t.dataset.tip))"
    shown = pointed(browser, chosen)
    assert shown == browser.evaluate(f"{chosen}.dataset.tip")
    assert all(word in shown for word in ("depth", "\nprobability", "\nexit probability", "\nentropy", "\nteacher: "))
    assert 'exit 10: " the" 0.82, hazard 0.02' in shown
    inside = "(() => { const b = document.getElementById('tip').getBoundingClientRect();"
    assert browser.evaluate(f"{inside} return b.left >= 0 && b.right <= innerWidth && b.top >= 0 }})()")
    browser.point(2, 2)
    assert browser.evaluate(TIP) is None


def test_keys_walk_an_answers_tokens_and_tab_goes_to_the_next_answer(browser, report):
    browser.open(report, 1180, 900, False)
    browser.evaluate("document.querySelector('#answers .t').focus()")
    seen = [browser.evaluate(TIP)]
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "Home"):
        browser.press(key)
        seen.append(browser.evaluate(TIP))
    tips = browser.evaluate(
        "[...document.querySelector('#answers .tokens').querySelectorAll('.t')].map(t => t.dataset.tip)"
    )
    assert seen == [tips[i] for i in (0, 1, 2, 1, len(tips) - 1, 0)]
    assert browser.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    browser.press("Tab")
    second = "document.querySelectorAll('#answers .tokens')[1].contains(document.activeElement)"
    assert browser.evaluate(second) is True
    browser.press("Escape")
    assert browser.evaluate(TIP) is None


def test_a_chart_mark_answers_the_pointer(browser, report):
    browser.open(report, 1180, 900, False)
    assert "0.86 [0.825, 0.893]" in pointed(browser, "document.querySelector('#results use[data-tip]')")


def count(browser):
    return browser.evaluate("document.getElementById('d-count').textContent")


def choose(browser, name, value, event="change"):
    field = f"document.getElementById('d-{name}')"
    browser.evaluate(f"{field}.value = '{value}'; {field}.dispatchEvent(new Event('{event}'))")
    return count(browser)


def test_what_changed_is_filtered_searched_and_turned_in_pages(browser, report):
    browser.open(report, 1180, 900, False)
    # Of 35 problems calibrated is wrong on 0, 5, 10, …, reinforced on 1, 8, 15, …; 15 they share.
    assert count(browser) == "35 of 35 problems; 1 to 10 below"
    assert choose(browser, "right", "won") == "6 of 35 problems; 1 to 6 below"
    assert choose(browser, "right", "lost") == "4 of 35 problems; 1 to 4 below"
    assert choose(browser, "right", "none") == "1 of 35 problems; 1 to 1 below"
    assert browser.evaluate("document.querySelector('#d-list h3').textContent") == "Question: What is 15 x 8?"
    assert choose(browser, "right", "both").startswith("24 of 35")
    # Every third answer is as long as before, the others are shorter.
    assert choose(browser, "length", "less").startswith("15 of 35")
    assert choose(browser, "right", "any") == "23 of 35 problems; 1 to 10 below"
    choose(browser, "length", "any")
    for turns, words in ((1, "11 to 20"), (1, "21 to 30"), (1, "31 to 35")):
        browser.evaluate("document.getElementById('d-after').click()")
        assert count(browser) == f"35 of 35 problems; {words} below", turns
    assert browser.evaluate("document.getElementById('d-after').disabled") is True
    assert choose(browser, "search", "What is 3 x", "input") == "1 of 35 problems; 1 to 1 below"
    assert choose(browser, "search", "nowhere", "input") == "0 of 35 problems"
    assert browser.evaluate("document.querySelectorAll('#d-list article').length") == 0
    choose(browser, "search", "", "input")
    choose(browser, "order", "deeper")
    depths = "[...document.querySelectorAll('#d-list article')].map(a => [...a.querySelectorAll('h4 .note')].map("
    depths = browser.evaluate(f"{depths} n => parseFloat(n.textContent.slice(6))))")
    changes = [round(after - before, 2) for before, after in depths]
    assert changes == sorted(changes, reverse=True) and changes[0] > 0
    choose(browser, "first", "teacher, full depth")
    assert "teacher, full depth" in browser.evaluate("document.querySelector('#d-list h4').textContent")


def test_the_first_token_at_which_answers_part_is_marked(browser, report):
    browser.open(report, 1180, 900, False)
    choose(browser, "length", "less")
    marked = browser.evaluate(
        "[...document.querySelector('#d-list article').querySelectorAll('.tokens')].map(p => "
        "[...p.querySelectorAll('.t')].findIndex(t => t.classList.contains('parts')))"
    )
    # The second answer is the first one without its last token.
    assert marked == [12, -1]
