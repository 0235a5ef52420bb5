"""Networks whose width may be cut: which, how many bytes a unit holds, and reasons for the rest."""

from __future__ import annotations

import pytest
import torch

from fxpress.passes.planning.networks import find_networks
from fxpress.passes.structured.amounts import Limits
from fxpress.passes.structured.groups import cut

from ...tiny import fresh_program
from .nets import two_layers


@pytest.mark.parametrize("name", ["llama", "mlp"])
def test_bytes_of_a_width_are_those_of_the_cut_program(name: str) -> None:
    program = fresh_program(name)
    networks, _ = find_networks(program, Limits(min_keep=0.1), (0.25, 0.5))
    assert len(networks) == (1 if name == "mlp" else 2)
    network = networks[0]
    assert all(k < network.group.size for k in network.counts) and len(network.counts) == 2
    kept, smaller = network.counts[0], program.clone()
    cut(smaller, {network.group: torch.arange(kept)}, "test", "test")
    assert smaller.nbytes + network.new_bias - program.nbytes == network.nbytes(kept) - network.nbytes(network.group.size)


def test_overlapping_and_pinned_networks_are_left_with_reasons() -> None:
    networks, skips = find_networks(two_layers()[0], Limits(), (0.5,))
    assert [n.name for n in networks] == ["enter.weight[0]"]
    assert [s.why for s in skips] == ["its width is not cut: mlp.up belongs to the larger network of enter.weight[0]"]
