"""What a part found, written to its file as it comes: a part that is ended half-way keeps what it had."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ee_megatron.report.numbers import strict_json


class Findings:
    """Checks can fail, figures and tables only tell. `device`: cpu or cuda."""

    def __init__(self, file: Path, device: str):
        self.file, self.device = file, device
        self.content: dict[str, list[dict[str, Any]]] = {"checks": [], "figures": [], "tables": []}

    def check(
        self, name: str, value: float, *, at_most: float | None = None, at_least: float | None = None,
        unit: str = "", why: str = "",
    ) -> None:  # fmt: skip
        """A value with the limit that it has to keep and where the limit comes from. What is no number fails."""
        passed = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
        limits = {"at_most": at_most, "at_least": at_least}
        self._add("checks", name=name, value=value, unit=unit, **limits, why=why, status=("failed", "passed")[passed])

    def only_on_cuda(self, name: str) -> bool:
        """Whether there is CUDA; if not, the check `name` is noted as not applicable."""
        if self.device != "cuda":
            self._add("checks", name=name, status="not applicable on cpu")
        return self.device == "cuda"

    def figure(self, name: str, value: float | str, unit: str = "") -> None:
        self._add("figures", name=name, value=value, unit=unit)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._add("tables", title=title, columns=list(columns), rows=[list(row) for row in rows])

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [check["name"] for check in self.content["checks"] if check["status"] == "failed"]

    def _add(self, kind: str, **entry: Any) -> None:
        self.content[kind].append(strict_json(entry))
        temporary = self.file.with_suffix(".new")
        temporary.write_text(json.dumps(self.content, allow_nan=False))
        os.replace(temporary, self.file)
