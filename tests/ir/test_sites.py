"""`WeightSite`: every kind, tied and grouped weights, stable unique names, the matrix view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpress.ir.capture import capture
from fxpress.ir.edit import Editor
from fxpress.ir.errors import EditError
from fxpress.ir.nodes import get_tensor
from fxpress.ir.program import Program
from fxpress.ir.sites import SiteKind, site_named

from ..checks import assert_same
from ..tiny import BUILDERS, randn


class Products(nn.Module):
    """A weight in every operator that multiplies by one, and some that are not sites."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(randn(4, 6))
        self.b = nn.Parameter(randn(6))
        self.batched = nn.Parameter(randn(2, 4, 4))
        self.vector = nn.Parameter(randn(4))

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        """`x: [2, 3, 4]`."""
        flat = x[0]
        return (
            torch.addmm(self.b, flat, self.w),
            torch.mm(flat, self.w),
            x @ self.w,
            F.embedding(ids, self.w),
            x @ self.batched,  # a stack of matrices: no site
            flat @ self.vector,  # a vector: no site
            self.w @ flat.new_ones(6, 2),  # the weight on the left: no site
            F.linear(flat, flat),  # data by data: no site
        )


def test_products_with_a_stored_matrix_are_sites() -> None:
    sites = capture(Products().eval(), (randn(2, 3, 4), torch.tensor([0, 3]))).sites()
    assert [s.kind for s in sites] == [SiteKind.ADDMM, SiteKind.MM, SiteKind.MM, SiteKind.EMBEDDING]
    assert [s.name for s in sites] == ["w", "w#2", "w#3", "w#4"]
    assert sites[0].bias == "b"
    assert [(s.rows, s.columns) for s in sites] == [(6, 4), (6, 4), (6, 4), (4, 6)]
    assert sites[0].tied == ("w#2", "w#3", "w#4")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("mlp", ["up linear 20x12 g1", "down linear 6x20 g1"]),
        ("conv", ["conv1 conv2d 8x27 g1", "conv2 conv2d 8x72 g1", "head linear 5x8 g1"]),
        ("grouped", ["conv1 conv2d 8x27 g1", "conv2 conv2d 8x36 g2", "head linear 5x8 g1"]),
        ("depthwise", ["conv1 conv2d 8x27 g1", "conv2 conv2d 8x9 g8", "head linear 5x8 g1"]),
        ("conv1d", ["conv1 conv1d 6x10 g1", "conv2 conv1d 4x18 g1", "head linear 3x4 g1"]),
        ("repeated", ["step linear 4x4 g1", "step#2 linear 4x4 g1", "step#3 linear 4x4 g1"]),
        ("embedding", ["embed embedding 24x8 g1", "mix linear 8x8 g1", "head linear 24x8 g1"]),
    ],
)
def test_small_models(model: str, expected: list[str], captured: Callable[[str], Program]) -> None:
    sites = captured(model).sites()
    assert [f"{s.name} {s.kind.value} {s.rows}x{s.columns} g{s.groups}" for s in sites] == expected


@pytest.mark.parametrize("model", BUILDERS)
def test_every_site_of_every_model(model: str, captured: Callable[[str], Program]) -> None:
    program = captured(model)
    sites = program.sites()
    assert len({s.name for s in sites}) == len(sites)
    for site in sites:
        weight = get_tensor(program.graph_module, site.tensors[0])
        matrix = site.to_matrix(weight)
        assert matrix.shape == (site.rows, site.columns)
        assert site.from_matrix(matrix).is_contiguous()
        assert_same(site.from_matrix(matrix), weight.detach())
        assert (weight.shape[site.out_axis], site.parameters) == (site.rows, weight.numel())
        assert site.nbytes == weight.nbytes
        assert not site.compressed
        assert site_named(program, site.name) == site


def test_matrix_rows_are_outputs(captured: Callable[[str], Program]) -> None:
    program = captured("gpt2")
    site = next(s for s in program.sites() if s.kind is SiteKind.ADDMM)
    assert site.transposed
    x, bias = randn(3, site.columns), get_tensor(program.graph_module, str(site.bias))
    expected = torch.addmm(bias, x, get_tensor(program.graph_module, site.tensors[0]))
    torch.testing.assert_close(F.linear(x, site.matrix(), bias), expected)


@pytest.mark.parametrize(("model", "names"), [("llama_tied", ("model.embed_tokens", "lm_head")), ("gpt2", ("transformer.wte", "lm_head"))])
def test_tied_sites_name_each_other_before_and_after_an_edit(model: str, names: tuple[str, str], captured: Callable[[str], Program]) -> None:
    program = captured(model)
    before = [s.name for s in program.sites()]
    with Editor(program, "test"):
        pass  # leaving an editor drops the name that no node reads
    assert [s.name for s in program.sites()] == before
    for name, other in (names, names[::-1]):
        assert site_named(program, name).tied == (other,)


class Slices(nn.Module):
    """Two weights that are disjoint slices of one buffer."""

    def __init__(self) -> None:
        super().__init__()
        flat = randn(2, 4, 4)
        self.q, self.k = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.q.weight, self.k.weight = nn.Parameter(flat[0]), nn.Parameter(flat[1])

    def forward(self, x: Tensor) -> Tensor:
        """`[N, 4] -> [N, 4]`."""
        return self.q(x) * self.k(x)


def test_slices_of_one_buffer_are_not_tied() -> None:
    program = capture(Slices(), randn(2, 4))
    q, k = program.sites()
    assert (q.tied, k.tied) == ((), ())
    kept = k.matrix().clone()
    with Editor(program, "test") as editor:
        editor.set_matrix(q, torch.zeros(4, 4), "test")
    assert_same(site_named(program, "k").matrix(), kept)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_repeated_sites_keep_their_names_while_they_are_compressed_one_by_one(first: int, captured: Callable[[str], Program]) -> None:
    program = captured("repeated")
    names = ["step", "step#2", "step#3"]
    assert [s.name for s in program.sites()] == names
    expected = program.run_examples()
    for name in [names[first], *(n for n in names if n != names[first])]:
        site = site_named(program, name)
        with Editor(program, "test") as editor:
            editor.compress(site, site.format, site.payload(), "test")
        assert [s.name for s in program.sites()] == names
    assert_same(program.run_examples(), expected)


class Borrowed(nn.Module):
    """A child's weight used by its parent, and an embedding's as output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.inner = nn.ModuleDict({"low": nn.Linear(4, 4)})

    def forward(self, ids: Tensor) -> Tensor:
        """`[N] -> [N, 6]`."""
        return F.linear(F.linear(self.table(ids), self.inner.get_parameter("low.weight")), self.table.weight)


def test_names_of_weights_used_outside_their_module() -> None:
    sites = capture(Borrowed(), torch.tensor([0, 5])).sites()
    assert [(s.name, s.tied) for s in sites] == [("table", ("table#2",)), ("inner.low", ()), ("table#2", ("table",))]


def test_unknown_names_are_refused(captured: Callable[[str], Program]) -> None:
    with pytest.raises(EditError, match="no weight site is called 'nothing'"):
        site_named(captured("mlp"), "nothing")


def test_sites_print_name_kind_and_shape(captured: Callable[[str], Program]) -> None:
    site = captured("mlp").sites()[0]
    assert str(site) == "up (linear [20, 12])"
    assert str(replace(site, name="other")) == "other (linear [20, 12])"
