"""A frontier of widths as a picture: loss against what is left, the search beside equal shares. PNG, SVG, or a page of its own with the table."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from ..ir.errors import MissingExtraError, PassError
from ..ir.files import atomic_file


def plot_frontier(rows: Sequence[Mapping[str, Any]], path: str | Path, *, title: str = "Widths under a budget") -> Path:
    """Draw what `passes.search_widths.frontier` returned into a `.png`, `.svg` or `.html` file; needs matplotlib (`pip install fxpress[plot]`)."""
    target = Path(path)
    kind = target.suffix.removeprefix(".").lower()
    if kind not in ("png", "svg", "html"):
        raise PassError(f"plot_frontier: expected a name that ends in .png, .svg or .html, got {target.name}")
    if not rows:
        raise PassError("plot_frontier: there is no row to draw; pass what frontier() returned")
    drawn = _drawn(rows, "svg" if kind == "html" else kind, title)
    if kind == "html":
        drawn = _page(rows, title, drawn.decode()).encode()
    with atomic_file(target) as scratch:
        scratch.write_bytes(drawn)
    return target


def _page(rows: Sequence[Mapping[str, Any]], title: str, picture: str) -> str:
    template = resources.files(__package__).joinpath("frontier.html.jinja").read_text(encoding="utf-8")
    return Environment(autoescape=True).from_string(template).render(title=title, rows=rows, picture=Markup(picture[picture.index("<svg") :]))


def _drawn(rows: Sequence[Mapping[str, Any]], kind: str, title: str) -> bytes:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "drawing a frontier") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for share, loss, label, style in (("share", "measured", "search", "o-"), ("equal_share", "equal_measured", "equal shares", "s--")):
        axes.plot([100 * r[share] for r in rows], [r[loss] for r in rows], style, label=label)
    axes.set(xlabel=f"% of the program's {rows[0]['unit']}", ylabel="distance from the full model", title=title, yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    out = io.BytesIO()
    figure.savefig(out, format=kind, dpi=130)
    return out.getvalue()
