"""`GraphDiff` as one self-contained page: the facts as embedded JSON, drawn by the script in `diff.js.jinja` module by module when opened."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader

from .diff import GraphDiff, Kind, NodeDiff, json_safe
from .diff_fold import fold_key
from .diff_snapshot import NodeView
from .diff_text import diff_text, human_bytes, human_count
from .files import atomic_file
from .journal import Change, NodeRecord

_FORMAT_COLORS = 5  # segments of the size bar that have a colour of their own


def diff_html(diff: GraphDiff, *, title: str) -> str:
    """The page. Names reach it as JSON text or through autoescaping only, and its content policy forbids every request."""
    environment = Environment(loader=FunctionLoader(_asset), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "separators": (",", ":"), "allow_nan": False}
    return environment.get_template("diff.html.jinja").render(
        title=title,
        diff=diff,
        kinds=[k for k in Kind if diff.counts[k]],
        bars=(bars := _bars(diff)),
        legend=sorted({(part["color"] or _FORMAT_COLORS + 1, part["color"], part["format"]) for bar in bars for part in bar["parts"]}),
        human_bytes=human_bytes,
        human_count=human_count,
        change=_change(diff),
        text=diff_text(diff, max_rows=200, color=False),
        data=page_data(diff),
    )


def write_html(page: str, path: Path) -> None:
    """Write the page so that a failure leaves nothing half-written."""
    with atomic_file(path) as scratch:
        scratch.write_text(page, encoding="utf-8")


def _asset(name: str) -> str:
    return resources.files(__name__.rpartition(".")[0]).joinpath(name).read_text(encoding="utf-8")


def page_data(diff: GraphDiff) -> dict[str, Any]:
    """What the script reads. Empty fields are left out; `after` is absent where it equals `before`; `fold` is equal for entries that tell the same story."""
    folds: dict[Any, int] = {}
    specs = {spec: i for i, spec in enumerate(diff.passes)}
    return {
        "passes": [{"spec": spec, "nodes": nodes} for spec, nodes in diff.touched.items()],
        "symbols": {k.value: k.symbol for k in Kind},
        "entries": [_entry(e, folds.setdefault(fold_key(e), len(folds)), specs) for e in diff.entries],
    }


def _entry(entry: NodeDiff, fold: int, specs: dict[str, int]) -> dict[str, Any]:
    before, after = _view(entry.before), _view(entry.after)
    data: dict[str, Any] = {"kind": entry.kind.value, "fold": fold, "module": entry.module, "before": before}
    if before != after:
        data["after"] = after
    if entry.steps:
        data["steps"] = [_step(s, specs) for s in entry.steps]
    return data | ({"note": entry.note} if entry.note else {})


def _view(view: NodeView | None) -> dict[str, Any] | None:
    if view is None:
        return None
    facts = {
        "name": view.name, "module": view.module, "op": view.op, "type": view.type, "inputs": list(view.inputs), "constants": view.constants,
        "weight": view.weight, "format": view.format, "parameters": view.stored_parameters, "bytes": view.stored_bytes,
        "shared": view.shared, "tied": list(view.tied),
    }  # fmt: skip
    return {k: v for k, v in facts.items() if v}


def _step(step: Change, specs: dict[str, int]) -> dict[str, Any]:
    facts = {"pass": specs[step.pass_spec], "action": step.action.value, "why": step.why, "facts": json_safe(dict(step.facts))}
    return facts | {"before": _stand(step.before), "after": _stand(step.after)}


def _stand(record: NodeRecord | None) -> dict[str, Any] | None:
    if record is None:
        return None
    return {k: v for k, v in {"op": record.op, "type": record.type, "format": record.format, "bytes": record.nbytes}.items() if v}


def _change(diff: GraphDiff) -> str:
    """The size change in words."""
    before, after = diff.before.nbytes, diff.after.nbytes
    if before == after or not before:
        return "same size" if before == after else ""
    percent = f"{abs(after - before) / before:.1%} {'smaller' if after < before else 'larger'}"
    return f"{percent}, {before / after:.2f}x" if 0 < after < before else percent


def _bars(diff: GraphDiff) -> list[dict[str, Any]]:
    """The size bars: bytes by weight format before and after, formats in order of size."""
    sides = {"before": (diff.before, [e.before for e in diff.entries]), "after": (diff.after, [e.after for e in diff.entries])}
    sizes = {side: _bytes_by_format([v for v in views if v], totals.unread) for side, (totals, views) in sides.items()}
    everything = {f: max(s.get(f, 0) for s in sizes.values()) for f in dict.fromkeys(f for s in sizes.values() for f in s)}
    ranked = sorted(everything, key=lambda f: (not f, -everything[f]))
    scale = max(diff.before.nbytes, diff.after.nbytes, 1)
    return [{"side": side, "bytes": totals.nbytes, "parts": _parts(sizes[side], ranked, scale)} for side, (totals, _) in sides.items()]


def _bytes_by_format(views: list[NodeView], unread: int) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for view in views:
        sizes[view.format] = sizes.get(view.format, 0) + view.stored_bytes
    sizes[""] = sizes.get("", 0) + unread
    return {f: n for f, n in sizes.items() if n}


def _parts(sizes: dict[str, int], ranked: list[str], scale: int) -> list[dict[str, Any]]:
    """Segments with their share of the widest bar; `color` 0 is for everything that is no weight site."""
    colors = {f: min(i, _FORMAT_COLORS) for i, f in enumerate((f for f in ranked if f), start=1)}
    return [
        {"format": f or "norms, biases, constants", "bytes": sizes[f], "share": 100 * sizes[f] / scale, "color": colors.get(f, 0)} for f in ranked if f in sizes
    ]
