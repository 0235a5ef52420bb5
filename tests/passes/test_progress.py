"""Progress bars: silent away from a terminal, and with a status beside the label at one."""

from __future__ import annotations

import io
import sys

import pytest

from fxpress.passes.context import Context


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("items", [range(3), iter(range(3))])
def test_status_stands_beside_the_label(monkeypatch: pytest.MonkeyPatch, items: range) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert list(Context(progress=True).track(items, "recover", total=3, status=lambda: "loss 0.5")) == [0, 1, 2]
    assert "recover loss 0.5" in terminal.getvalue() and "3/3" in terminal.getvalue()


def test_silent_away_from_a_terminal_and_without_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Context(progress=True).track(range(3), "x")) == [0, 1, 2]
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert list(Context().track(range(3), "x")) == [0, 1, 2]
    assert not terminal.getvalue() and not capsys.readouterr().err
