"""A captured model in its working form: an unlifted `torch.fx.GraphModule`, its inputs and its history."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .inputs import Inputs
from .journal import Journal
from .weights import named_tensors, set_tensor, shallow_tree, unique_bytes, unique_parameters

if TYPE_CHECKING:
    from .sites import WeightSite


class Stage(Enum):
    """Where a program stands; `verify` demands different things of each."""

    CAPTURED = "captured"
    COMPRESSED = "compressed"
    LOWERED = "lowered"


@dataclass(repr=False)
class Program:
    """One model as a graph of ATen and fxpress operators whose weights are `get_attr` nodes.

    Only `ir.edit.Editor` changes the graph or its tensors; tensors are replaced, never written in place, so clones share them.
    """

    graph_module: fx.GraphModule
    inputs: Inputs
    stage: Stage = Stage.CAPTURED
    journal: Journal = field(default_factory=Journal)

    def __repr__(self) -> str:
        return f"<Program: {self.stage.value}, {len(self.graph.nodes)} nodes, {len(self.sites())} weight sites, {self.nbytes / 1e6:.2f} MB>"

    @property
    def graph(self) -> fx.Graph:
        """The FX graph."""
        return self.graph_module.graph

    def sites(self) -> tuple[WeightSite, ...]:
        """Every place where a weight meets data, in graph order."""
        from .sites import find_sites

        return find_sites(self)

    @property
    def cache_nodes(self) -> frozenset[fx.Node]:
        """Placeholders of the caches."""
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        return frozenset(placeholders[i] for i in self.inputs.cache_leaves)

    def clone(self) -> Program:
        """An independent program that shares every tensor with this one."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, about the pytree it copies
            graph = copy.deepcopy(self.graph)
        module = fx.GraphModule(shallow_tree(self.graph_module), graph, type(self.graph_module).__name__)
        module.train(False)
        return Program(module, self.inputs, self.stage, self.journal.copy())

    @property
    def device(self) -> torch.device:
        """Where the weights lie; of a program without any, the first input. Single numbers may lie elsewhere."""
        tensors = [t for _, t in named_tensors(self.graph_module)] + [leaf for leaf in self.inputs.leaves if isinstance(leaf, torch.Tensor)]
        return next((t.device for t in tensors if t.dim()), torch.device("cpu"))

    def to(self, device: torch.device | str) -> Program:
        """An independent program on `device`: weights, example inputs, and what the graph creates by itself."""
        from .shapes import place

        moved = self.clone()
        for node in moved.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = dict(node.kwargs) | {"device": torch.device(device)}
        moved.graph_module.recompile()
        held = list(named_tensors(moved.graph_module))
        there = {id(tensor): tensor.detach().to(device) for _, tensor in held}
        for name, tensor in held:  # `Module.to` would move the tensors that this program shares
            set_tensor(moved.graph_module, name, there[id(tensor)], parameter=isinstance(tensor, torch.nn.Parameter))
        moved = replace(moved, inputs=self.inputs.to(device))
        place(moved, device)
        return moved

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph eagerly without gradients; caches that are left out are empty."""
        with torch.no_grad():
            return self.graph_module(*args, **(self.inputs.completed(kwargs) if self.inputs.caches else kwargs))

    __call__ = run

    def run_inputs(self, inputs: tuple[tuple[Any, ...], Mapping[str, Any]]) -> Any:
        """Run on `(args, kwargs)`."""
        return self.run(*inputs[0], **inputs[1])

    def run_examples(self) -> Any:
        """Run on the example inputs."""
        return self.run(*self.inputs.args, **self.inputs.kwargs)

    def verify(self) -> None:
        """Raise `VerifyError` when an invariant of this stage is broken."""
        from .verify import verify

        verify(self)

    def to_text(self) -> str:
        """Deterministic printed form."""
        from .text import program_text

        return program_text(self)

    def to_exported(self) -> torch.export.ExportedProgram:
        """Re-export: the interchange form, with compressed sites as custom operators."""
        shapes = self.inputs.dynamic_shapes(self.graph_module.forward)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return torch.export.export(self.graph_module, self.inputs.args, self.inputs.kwargs, dynamic_shapes=shapes, strict=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights and buffers, tied ones counted once."""
        return unique_bytes(self.graph_module)

    @property
    def parameters(self) -> int:
        """Stored floating-point elements, tied ones counted once (packed codes are not elements; see `sites`)."""
        return unique_parameters(self.graph_module)
