"""Frontiers as pictures: every kind of file, names that reach the page escaped, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fxpress.ir.errors import PassError
from fxpress.runtime.frontier import plot_frontier

ROWS: list[dict[str, Any]] = [
    {"budget": b, "unit": "bytes", "share": b - 0.01, "predicted": 1 - b, "measured": 1.1 - b, "start": "<the knapsack>", "widths": [8, 16],
     "equal_share": b - 0.02, "equal_measured": 1.3 - b} for b in (0.9, 0.8)
]  # fmt: skip


@pytest.mark.parametrize(("name", "start"), [("f.png", b"\x89PNG"), ("f.svg", b"<?xml"), ("f.html", b"<!doctype html>")])
def test_every_kind_is_written(name: str, start: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = plot_frontier(ROWS, tmp_path / name, title="A < B")
    assert path.read_bytes().startswith(start)
    if name.endswith("html"):
        text = path.read_text(encoding="utf-8")
        assert "&lt;the knapsack&gt;" in text and "<title>A &lt; B</title>" in text and "<svg" in text and "90.0 %" in text and "<script" not in text


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"ends in \.png, \.svg or \.html, got f\.jpg"):
        plot_frontier(ROWS, tmp_path / "f.jpg")
    with pytest.raises(PassError, match="no row to draw"):
        plot_frontier([], tmp_path / "f.png")
    assert not list(tmp_path.iterdir())
