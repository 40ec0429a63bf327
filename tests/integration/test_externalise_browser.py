"""The externalisation study's page in a real browser, wide and narrow, light and dark."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_browser import EXECUTABLE, Browser, barriers, drawn

from ee_megatron import cli
from tests.covering import EXTENDED
from tests.externalise_samples import records, write

pytestmark = [
    EXTENDED,
    pytest.mark.skipif(EXECUTABLE is None, reason="no chromium on PATH (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    for made in records(bases=(1, 2), seeds=(1,), taus=(1,)):
        write(root, made)
    # A second length of step, of which little is there.
    for made in records(bases=(1,), seeds=(1,), taus=(4,), hops=(3,))[:2]:
        write(root, made)
    cli.main(["externalise", str(root)])
    return root / "externalise.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1180, 390])
def test_it_draws_and_bars_nobody(browser: Browser, page: Path, width: int, dark: bool) -> None:
    drawn(browser, page, width, dark)
    assert barriers(browser, page, width, dark) == []


def test_a_mark_tells_its_mean_interval_and_bases(browser: Browser, page: Path) -> None:
    browser.open(page, 1180, 900, False)
    mark = "document.querySelector('#steps-1 .mark[data-tip*=\"max 1, 3 hops\"]')"
    browser.evaluate(f"{mark}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    box = browser.evaluate(f"(() => {{ const b = {mark}.getBoundingClientRect();"
                           " return [b.left + b.width / 2, b.top + b.height / 2] })()")  # fmt: skip
    browser.point(*box)
    tip = browser.evaluate("document.getElementById('tip').innerText")
    assert tip.startswith("max 1, 3 hops\n1.00 [") and "base 1: 1.00\nbase 2: 1.00" in tip
