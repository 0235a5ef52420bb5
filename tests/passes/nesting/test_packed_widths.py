"""Nested models with packed weights: slices and views of 4-bit, table and composite weights, and every width that would cut a group in two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxpress
from fxpress.ir.errors import EditError, FormatError, PassError
from fxpress.ir.formats.base import parse_format
from fxpress.runtime.elastic import Elastic

from ...masking import difference, outputs
from ...runtime.test_elastic import shared_bytes
from .nets import nested

FORMATS = {
    "groups": "quantize_rtn{bits=4,group_size=16}",
    "channels": "quantize_rtn{bits=3,symmetric=true}",
    "tensor": "quantize_rtn{bits=8,granularity=tensor}",
    "tables": "quantize_lut{bits=3}",
}


@pytest.mark.parametrize("spec", ["affine{bits=3,group_size=16}", "affine{bits=4,symmetric=true}", "affine{bits=5,granularity=tensor}", "lut{entries=8}",
                                  "lut{entries=4,rows_per_table=4}", "lut{entries=6,rows_per_table=none}", "dense",
                                  "composite{parts=['affine{bits=2,group_size=16}','affine{bits=2,group_size=32}']}"])  # fmt: skip
@pytest.mark.parametrize("rows", [torch.arange(8), torch.tensor([0, 1, 4, 5, 12, 13])], ids=["first", "some"])
def test_a_part_decodes_to_the_part(spec: str, rows: torch.Tensor) -> None:
    fmt, matrix = parse_format(spec), torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    payload = fmt.encode(matrix)
    if spec.endswith("rows_per_table=4}") and len(rows) == 6:
        with pytest.raises(FormatError, match="6 of its rows are no first rows with whole tables; use rows_per_table=1"):
            fmt.take(payload, 16, 96, rows, 32)
        return
    for width in (32, 64, 96):
        part = fmt.take(payload, 16, 96, rows, width)
        fmt.check_payload(part, len(rows), width, torch.float32, "here")
        assert torch.equal(fmt.decode(part, len(rows), width, torch.float32), fmt.decode(payload, 16, 96, torch.float32)[rows, :width])
        if len(rows) == 8:
            assert all(t.untyped_storage().data_ptr() == payload[n].untyped_storage().data_ptr() for n, t in part.items())


@pytest.mark.parametrize(("name", "form"), [*(("vit", form) for form in FORMATS), ("gpt2", "groups"), ("llama", "groups")])
def test_prefixes_of_packed_layers_are_the_packed_prefixes(name: str, form: str) -> None:
    """Cutting what was quantized gives what the quantized model gives with the units behind the prefix masked, out of the same bytes."""
    program, ctx = nested(name)
    packed = fxpress.optimize(program, FORMATS[form], calibration=[c[1] or c[0] for c in ctx.calibration]).program
    small = fxpress.optimize(packed, "slice{widths=[32],multiple_of=16}").program
    twin = fxpress.optimize(decoded(packed), "slice{widths=[32],multiple_of=16}").program
    assert difference(outputs(small), outputs(twin)) < 1e-5 and small.nbytes < packed.nbytes
    view = Elastic(packed, multiple_of=16).at(32)
    shared, held = shared_bytes(packed, view)
    assert shared == held and difference(outputs(view), outputs(small)) < 1e-5
    assert difference(outputs(packed), outputs(decoded(packed))) < 1e-5, "the packed model itself is as it was"


def decoded(program: fxpress.Program) -> fxpress.Program:
    from fxpress.ir.edit import Editor

    plain = program.clone()
    with Editor(plain, "decode") as editor:
        for site in [s for s in plain.sites() if s.compressed]:
            editor.decompress(site, "decode")
    return plain


def test_a_smaller_file_and_an_export(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    packed = fxpress.optimize(nested("llama")[0], FORMATS["groups"]).program
    result = fxpress.optimize(packed, "slice{ratio=0.5,multiple_of=16}")
    result.save(tmp_path / "small")
    assert difference(outputs(fxpress.load(tmp_path / "small").program), outputs(result.program)) == 0
    assert result.export_onnx(tmp_path / "small.onnx").max_error < 1e-4


def test_refusals() -> None:
    packed = fxpress.optimize(nested("llama")[0], "quantize_rtn{bits=4,group_size=32}").program
    with pytest.raises(EditError, match=r"24 columns end inside a group of 32; use widths that are multiples of 32 \(multiple_of=32\)"):
        fxpress.optimize(packed, "slice{widths=[24]}")
    with pytest.raises(EditError, match="24 columns end inside a group of 32"):
        Elastic(packed).at(24)
    sparse = fxpress.optimize(nested("llama")[0], ["prune_magnitude{sparsity=0.5}", "store_sparse"]).program
    with pytest.raises(PassError, match=r"would touch nothing: .*holds a compressed weight; prune before quantizing"):
        fxpress.optimize(sparse, "slice{widths=[32]}")
