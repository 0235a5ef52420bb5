"""Names and tensors: tied names, slices of one buffer, counting."""

from __future__ import annotations

import torch
from torch import nn

from fxpress.ir.nodes import get_tensor
from fxpress.ir.weights import alias_classes, delete_tensor, named_tensors, set_tensor, shallow_tree, unique_bytes, unique_parameters

from ..tiny import EmbeddingNet


class Slices(nn.Module):
    """Two parameters that are disjoint slices of one buffer, and a third that is all of it."""

    def __init__(self, *, whole: bool = False) -> None:
        super().__init__()
        flat = torch.arange(32.0).reshape(2, 4, 4)
        self.first, self.second = nn.Parameter(flat[0]), nn.Parameter(flat[1])
        if whole:
            self.whole = nn.Parameter(flat)


def test_tied_names_are_one_class() -> None:
    aliases = alias_classes(EmbeddingNet())
    assert aliases.of("head.weight") == ("embed.weight", "head.weight")
    assert aliases.of("mix.bias") == ("mix.bias",)
    assert aliases.of("unknown") == ("unknown",)


def test_disjoint_slices_of_one_buffer_are_not_tied() -> None:
    assert alias_classes(Slices()).of("first") == ("first",)
    assert unique_parameters(Slices()) == 32


def test_slice_at_the_start_of_a_whole_is_found() -> None:
    assert alias_classes(Slices(whole=True)).of("first") == ("first", "whole")


def test_tied_tensors_count_once() -> None:
    net = EmbeddingNet(vocabulary=24, width=8)
    assert unique_parameters(net) == 24 * 8 + 8 * 8 + 8
    assert unique_bytes(net) == 4 * unique_parameters(net)


def test_integer_buffers_count_as_bytes_but_not_as_parameters() -> None:
    module = nn.Module()
    module.register_buffer("codes", torch.zeros(10, dtype=torch.uint8))
    assert unique_parameters(module) == 0
    assert unique_bytes(module) == 10


def test_empty_tensors_share_nothing() -> None:
    module = nn.Module()
    module.register_buffer("a", torch.zeros(0))
    module.register_buffer("b", torch.zeros(0, 3))
    assert alias_classes(module).groups == (("a",), ("b",))


def test_set_tensor_makes_containers_and_changes_kind() -> None:
    module = nn.Module()
    set_tensor(module, "a.b.weight", torch.ones(2), parameter=True)
    assert isinstance(get_tensor(module, "a.b.weight"), nn.Parameter)
    assert not get_tensor(module, "a.b.weight").requires_grad
    set_tensor(module, "a.b.weight", torch.zeros(3, dtype=torch.uint8), parameter=False)
    assert dict(named_tensors(module)).keys() == {"a.b.weight"}
    delete_tensor(module, "a.b.weight")
    assert not dict(named_tensors(module))


def test_shallow_tree_binds_the_same_tensors_under_every_name() -> None:
    net = EmbeddingNet()
    tree = shallow_tree(net)
    assert {n: id(t) for n, t in named_tensors(tree)} == {n: id(t) for n, t in named_tensors(net)}
    assert not hasattr(tree.embed, "forward") or type(tree.embed) is nn.Module
