"""Sparse weights in ONNX: the codes of zeros come back, because no ONNX runtime gains from leaving them out."""

from __future__ import annotations

from collections.abc import Iterable

from ...ir.edit import Editor
from ...ir.formats.base import parse_format
from ...ir.formats.dense import Dense
from ...ir.formats.sparse import Sparse
from ...ir.program import Program


def without_masks(program: Program) -> Program:
    """`program`, or a clone whose sparse low-bit weights are held by their inner format, where that alone decodes to the same weight.

    Sparse weights of plain floats stay, and are decoded like every format without a fast path.
    """
    sites = [s for s in program.sites() if s.compressed and isinstance(s.format, Sparse) and not isinstance(s.format.inner, Dense)]
    if not sites:
        return program
    clone = program.clone()
    names = {s.name for s in sites}
    with Editor(clone, "onnx") as editor:
        for site in [s for s in clone.sites() if s.name in names]:
            fmt = site.format
            assert isinstance(fmt, Sparse)
            _, inner = fmt.unpack(site.payload(), site.rows, site.columns, site.dtype)
            if bool((fmt.inner.decode(inner, site.rows, site.columns, site.dtype) == site.matrix()).all()):
                editor.recompress(site, fmt.inner, inner, "no ONNX runtime reads masks")
    return clone


def mask_notes(specs: Iterable[str]) -> tuple[str, ...]:
    """Say what became of sparse weights."""
    count = sum(isinstance(parse_format(spec), Sparse) for spec in specs)
    return (f"{count} sparse weights are written with their zeros: no ONNX runtime gains from masks",) if count else ()
