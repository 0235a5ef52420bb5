"""Inputs of a weight site with their mean taken off: `W h + b` written as `W (h - m) + (b + W m)`, which is the same whatever the constant m is.

Cut down to some of its columns, the second form still adds what the missing ones add on average, at every width and with nothing stored for it. Ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from .edit import Editor, record
from .nodes import get_tensor
from .shapes import take_place
from .site_calls import why_no_bias
from .sites import SiteKind, WeightSite

aten = torch.ops.aten
_LEAF = "centre"


def why_not_centred(site: WeightSite) -> str | None:
    """Reason why the site's inputs cannot be centred, or None."""
    if site.compressed or site.kind not in (SiteKind.LINEAR, SiteKind.ADDMM):
        return "only plain linear layers are"
    if centre_of(site) is not None:
        return "its inputs are centred already"
    return why_no_bias(site, torch.zeros(site.rows, dtype=site.dtype))


def centre_of(site: WeightSite) -> str | None:
    """Name of the constant that is taken off the site's inputs, or None."""
    data = site.data
    taken = data.args[1] if data.target is aten.sub.Tensor and len(data.args) > 1 else None
    named = isinstance(taken, fx.Node) and taken.op == "get_attr" and str(taken.target).endswith(f".{_LEAF}")
    return str(taken.target) if named and isinstance(taken, fx.Node) else None


def centre(editor: Editor, site: WeightSite, mean: Tensor, why: str) -> None:
    """Take `mean: [K]` off the site's inputs and add what it made to the bias; the sums are made in float64."""
    old = site.data
    with editor.program.graph.inserting_before(site.node):
        taken = editor.stored(f"{site.name}.{_LEAF}", mean.to(site.dtype), like=old)
        node = editor.program.graph.call_function(aten.sub.Tensor, (old, taken))
    take_place(node, site.node)
    site.node.replace_input_with(old, node)
    editor.added(record(node), why)
    _shift(editor, site, mean.to(site.dtype).double(), why)


def fold_centre(editor: Editor, site: WeightSite, why: str) -> None:
    """Undo `centre` on the columns that are left: what the constant still makes goes back into the bias, and the subtraction out of the graph."""
    name = centre_of(site)
    if name is None:
        return
    node = site.data
    mean = get_tensor(editor.program.graph_module, name).detach().double()
    editor.bypass(node, node.args[0], why)  # type: ignore[arg-type]
    _shift(editor, site, -mean, why)


def _shift(editor: Editor, site: WeightSite, mean: Tensor, why: str) -> None:
    """Add `W mean` to the bias."""
    editor.set_bias(site, (site.bias_vector() + site.matrix().double() @ mean).to(site.dtype), why)
