"""Errors in settings, collected so that all of them are reported at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ..arguments import printable


class Faults(ValueError):
    """All faults of the settings as one error: `lines`, each once. As text: all lines, with semicolons between."""

    def __init__(self, lines: Iterable[str]):
        self.lines = list(dict.fromkeys(lines))
        super().__init__("; ".join(self.lines))


def refuse(lines: Iterable[str]) -> None:
    """Raises Faults if there are any lines."""
    faults = list(lines)
    if faults:
        raise Faults(faults)


def faults_of(check: Callable[[], object]) -> Iterator[str]:
    """Error lines of a check that raises for its first fault, or for all of them (Faults)."""
    try:
        check()
    except (ValueError, FileNotFoundError) as error:
        yield from lines_of(error)


def lines_of(error: BaseException) -> list[str]:
    """An error as printable lines, whatever it quotes."""
    texts = error.lines if isinstance(error, Faults) else [str(error)]
    return [printable(text) or type(error).__name__ for text in texts]
