"""One data file for all widths: checked graphs, ranges of the full model's bytes, sessions that agree with the program, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("onnxruntime")

import fxpress
from fxpress.ir.errors import ArtifactError, ExportError
from fxpress.ir.program import Program
from fxpress.runtime.elastic import Elastic
from fxpress.runtime.elastic_onnx import DATA, ElasticSession

from ..passes.nesting.nets import nested


def feeds(program: Program) -> dict[str, object]:
    from fxpress.codegen.onnx_target.signature import input_names

    return {name: program.inputs.leaves[i].numpy() for i, name in input_names(program)}


def data_ranges(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and length of every tensor that a graph file keeps in its data file."""
    import onnx_ir as ir

    held = ((n, v.const_value) for n, v in ir.load(path).graph.initializers.items())
    return {n: (t.offset or 0, t.length or t.nbytes) for n, t in held if isinstance(t, ir.ExternalTensor)}


@pytest.mark.parametrize("name", ["vit", pytest.param("llama", marks=pytest.mark.slow), pytest.param("gpt2", marks=pytest.mark.slow)])
def test_every_width_reads_the_full_models_bytes(name: str, tmp_path: Path) -> None:
    program, _ = nested(name)
    elastic = Elastic(program)
    report = elastic.export_onnx(tmp_path / "out", [1.0, 32, 16])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"elastic.json", *report.files, DATA}
    assert report.data_bytes == (tmp_path / "out" / DATA).stat().st_size and max(report.errors) < 1e-4
    full, *narrow = (data_ranges(tmp_path / "out" / f) for f in report.files)
    for small in narrow:
        assert any(small[n][1] < full[n][1] for n in small if n in full), "some weights are prefixes"
        assert [n for n in small if n not in full or small[n][0] != full[n][0]] == [], "no byte is stored twice"
    session = ElasticSession(tmp_path / "out", threads=1)
    assert session.widths == (1.0, 32, 16)
    for width in session.widths:
        got = torch.from_numpy(session.run(feeds(program), width=width, outputs=["logits"])[0])
        assert torch.allclose(got, elastic.at(width).run_examples().logits, atol=1e-4)
    with pytest.raises(ArtifactError, match=r"holds no width 0.75; there are 1.0, 32, 16"):
        session.at(0.75)


@pytest.mark.slow
def test_packed_weights_are_shared_where_they_are_rows(tmp_path: Path) -> None:
    program = fxpress.optimize(nested("vit")[0], "quantize_rtn{bits=4,group_size=16}").program
    report = Elastic(program, multiple_of=16).export_onnx(tmp_path / "out", [1.0, 32])
    assert max(report.errors) < 1e-4 and report.data_bytes < report.apart_bytes


def test_refusals(tmp_path: Path) -> None:
    elastic = Elastic(nested("vit")[0])
    for widths in ([], [0.5, 1.0]):
        with pytest.raises(ExportError, match="the widest first"):
            elastic.export_onnx(tmp_path / "out", widths)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ArtifactError, match=r"expected a folder that Elastic.export_onnx wrote, with elastic.json"):
        ElasticSession(tmp_path)
