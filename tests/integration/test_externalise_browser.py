"""The externalisation study's page in a real browser, wide and narrow, light and dark."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_browser import EXECUTABLE, Browser, barriers, drawn

from ee_megatron import cli
from tests.covering import EXTENDED
from tests.externalise_samples import OBJECTIVES, run, write

pytestmark = [
    EXTENDED,
    pytest.mark.skipif(EXECUTABLE is None, reason="no chromium on PATH (Debian: apt-get install chromium)"),
]


@pytest.mark.parametrize("width", [1180, 390])
def test_it_draws_and_bars_nobody(tmp_path: Path, width: int) -> None:
    root = tmp_path / "study"
    write(root, *(run(label, base, hops=[hops]) for label in OBJECTIVES for base in (1, 2) for hops in (1, 3)))
    cli.main(["externalise", str(root)])
    browser = Browser(tmp_path / "profile")
    try:
        for dark in (False, True):
            drawn(browser, root / "externalise.html", width, dark)
            assert barriers(browser, root / "externalise.html", width, dark) == []
    finally:
        browser.close()
