"""A weight stored as the cores of a tensor train (matrix product operator) and rebuilt when it is used: a form of storage, not of computation.

Sources: Novikov et al., NeurIPS 2015; CompactifAI (arXiv 2401.14109). Contracting three and more sites with the data, one after another, takes more arithmetic
than the dense product at any bond worth having, so this format decodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..errors import SpecError
from ..trains import contract, decompose, full_bonds
from .base import Payload, TensorSpec, WeightFormat


@dataclass(frozen=True, kw_only=True)
class TensorTrain(WeightFormat):
    """Cores `[r_(k-1), o_k, i_k, r_k]` in the dtype of the weight; the products of the modes may exceed its sizes, zeros then stand behind it."""

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    bonds: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        example = "for example tensor_train{outputs=[4,4],inputs=[4,4],bonds=[8]}"
        if not (len(self.outputs) == len(self.inputs) == len(self.bonds) + 1 >= 2) or min(*self.outputs, *self.inputs, *self.bonds) < 1:
            raise SpecError(f"tensor_train: expected as many outputs as inputs, two at least, and one bond fewer, all positive, {example}; got {self._sizes()}")
        for k, (bond, exact) in enumerate(zip(self.bonds, full_bonds(self.outputs, self.inputs), strict=True)):
            reached = (1, *self.bonds)[k] * self.outputs[k] * self.inputs[k]
            if bond > min(exact, reached):
                raise SpecError(f"tensor_train: bond {k} is {bond}; {min(exact, reached)} is exact already, {example}")

    def _sizes(self) -> str:
        return f"outputs={list(self.outputs)}, inputs={list(self.inputs)}, bonds={list(self.bonds)}"

    def payload_spec(self, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """`core0: [1, o_0, i_0, r_0]`, ..., the last `[r, o, i, 1]`, in `dtype`."""
        around = (1, *self.bonds, 1)
        modes = zip(self.outputs, self.inputs, strict=True)
        return {f"core{k}": TensorSpec((around[k], o, i, around[k + 1]), dtype) for k, (o, i) in enumerate(modes)}

    def why_illegal(self, rows: int, columns: int) -> str | None:
        """Modes that do not hold the weight, or that a smaller weight would fill."""
        for what, size, modes in (("rows", rows, self.outputs), ("columns", columns, self.inputs)):
            if prod(modes) < size:
                return f"modes {list(modes)} hold {prod(modes)} of its {size} {what}"
        return None

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        """TT-SVD at these bonds; `matrix: [N, K] float`."""
        cores = decompose(matrix, self.outputs, self.inputs, chi=self.bonds).cores
        return {f"core{k}": core.to(matrix.dtype).contiguous() for k, core in enumerate(cores)}

    def decode(self, payload: Payload, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """The contracted cores, in fp32, cast to `dtype`."""
        cores = [payload[f"core{k}"].float() for k in range(len(self.outputs))]
        return contract(cores)[:rows, :columns].to(dtype)
