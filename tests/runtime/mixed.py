"""A program compressed with several weight formats at once."""

from __future__ import annotations

from fxpress.ir.edit import Editor
from fxpress.ir.formats.base import parse_format
from fxpress.ir.program import Program
from fxpress.ir.site_calls import why_not_compressible

FORMATS = ("affine{bits=4,group_size=8}", "affine{bits=3,symmetric=true}", "dense{storage=float16}", "affine{bits=8}")
LANGUAGE = ("llama", "llama_tied", "opt", "gpt2")
MODELS = ("mlp", "conv", "grouped", "conv1d", "embedding", *LANGUAGE, "bert", "vit", "resnet")


def mixed(program: Program, formats: tuple[str, ...] = FORMATS) -> Program:
    """Every site that can be compressed, in turn with each of `formats` that it can take; the given program is left alone."""
    result = program.clone()
    with Editor(result, "mixed") as editor:
        for i, site in enumerate(result.sites()):
            fmt = parse_format(formats[i % len(formats)])
            if why_not_compressible(site) is None and fmt.why_illegal(site.rows, site.columns) is None:
                editor.compress(site, fmt, fmt.encode(site.matrix()), "for the test", {"site": float(i)})
    result.verify()
    assert any(s.compressed for s in result.sites())
    return result
