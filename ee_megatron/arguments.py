"""Option parsing of every command: errors are one line, and numbers are finite."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

LARGEST = 2**63
OLDER = {"imported": "import-checkpoint", "job": "slurm-spec"}
"""Commands and stages by their names of version 0.1, which are accepted until 0.3."""


LONGEST_LINE = 2000


def printable(text: str) -> str:
    """A text as one line of an error, whatever it quotes, and however much."""
    text = " ".join(text.split())
    text = text if len(text) <= LONGEST_LINE else f"{text[: LONGEST_LINE // 2]} ... {text[-LONGEST_LINE // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def current(word: str) -> str:
    """Today's name of a command or stage; warns on stderr about an older one."""
    if word in OLDER:
        print(f"warning: {word} is called {OLDER[word]} now; version 0.3 refuses the older name", file=sys.stderr)
    return OLDER.get(word, word)


class Parser(argparse.ArgumentParser):
    """argparse's parser, but an error is one line and exit code 2, without the usage; and no option accepts a number
    that is infinite, nan, or beyond 64 bits."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {printable(message)}; see `{self.prog} --help`", file=sys.stderr)
        raise SystemExit(2)

    # argparse calls this method for subcommands' parsers too, each with its own options.
    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        options, rest = super().parse_known_args(args, namespace)
        for name, value in vars(options).items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and not (math.isfinite(value) and abs(value) < LARGEST):
                self.error(f"--{name.replace('_', '-')} {value}: expected a finite number")
        return options, rest
