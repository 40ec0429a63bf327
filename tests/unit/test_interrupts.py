"""SIGINT ends a command as an interrupt, also where an extension drops it for an error of its own."""

from __future__ import annotations

import signal
import threading

import pytest
import torch

from ee_megatron.checkpoint.workspace import partial_of, workspace
from ee_megatron.convert import main as convert
from ee_megatron.interrupts import interruptible


class Interrupted:
    """A sequence in whose reading SIGINT arrives."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> float:
        signal.raise_signal(signal.SIGINT)
        return 1.0


def read() -> None:
    torch.tensor(Interrupted())


def test_torch_drops_an_interrupt_and_it_is_one_all_the_same() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="could not determine the shape"):
        read()
    with pytest.raises(KeyboardInterrupt) as found, interruptible(), interruptible():
        read()
    assert "could not determine the shape" in str(found.value.__cause__)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_fails_without_an_interrupt_is_said_as_it_was() -> None:
    with pytest.raises(ValueError, match="bad input"), interruptible():
        raise ValueError("bad input")
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGINT)


def test_a_thread_and_a_process_that_ignores_interrupts_are_left_alone() -> None:
    found: list[object] = []

    def inside() -> None:
        with interruptible():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join(timeout=10)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        inside()
    finally:
        signal.signal(signal.SIGINT, before)
    assert found == [before, signal.SIG_IGN]


def test_a_conversion_keeps_what_it_has_then_and_says_how_to_go_on(tmp_path, capsys, monkeypatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("ee_megatron.convert._import", lambda args: interrupted_conversion(out))
    assert convert(["import", "--hf", "x", "--out", str(out)]) == 130
    assert capsys.readouterr().err.count(str(partial_of(out))) == 1 and partial_of(out).is_dir()


def interrupted_conversion(out) -> int:
    with workspace(out, {}):
        read()
    return 0
