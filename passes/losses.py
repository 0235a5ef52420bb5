"""What training minimises: agreement with a teacher, the user's own task, or both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.errors import TrainingError
from ..ir.nodes import op_name
from ..ir.program import Program
from ..ir.sites import SiteKind
from .cross_entropy import cross_entropy, next_token
from .divergence import divergence
from .examples import Example
from .tapped import Reply

Loss = Callable[[Any, Any], Tensor]
_THROUGH = {"view", "_unsafe_view", "reshape", "_to_copy", "to", "clone", "contiguous", "alias", "slice", "unsqueeze", "squeeze"}


class Objective(Enum):
    """What to minimise."""

    AUTO = "auto"  # distill; also the task on labelled batches
    DISTILL = "distill"
    TASK = "task"
    BOTH = "both"


class Outputs(Enum):
    """How float outputs are compared with the teacher's."""

    AUTO = "auto"  # logits for class-labelled batches and for token logits of a language model, else values
    LOGITS = "logits"
    VALUES = "values"


@dataclass(frozen=True)
class Language:
    """A language model: which input leaf holds token ids `[B, T]`, which output leaf logits `[B, T, V]`."""

    ids: int
    logits: int


def find_language(program: Program) -> Language | None:
    """The token ids and logits of a language model, or None.

    Ids are the 2-d input behind the first embedding site; logits are the first float output, if it is 3-d and a weight site with more than one output
    made it.
    """
    sites = {s.node: s for s in program.sites()}
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    tables = (s for s in sites.values() if s.kind is SiteKind.EMBEDDING)
    ids = next((source for s in tables if (source := _source(s.data)).op == "placeholder" and _rank(source) == 2), None)
    for index, leaf in enumerate(_outputs(program)):
        if isinstance(leaf, fx.Node) and _is_float(leaf):
            maker = sites.get(_source(leaf))
            fits = ids is not None and _rank(leaf) == 3 and maker is not None and maker.kind is not SiteKind.EMBEDDING and maker.rows > 1
            return Language(placeholders.index(ids), index) if fits else None
    return None


def _source(node: fx.Node) -> fx.Node:
    """The node whose values `node` shows, behind views and casts."""
    while op_name(node).split(".")[1:2] and op_name(node).split(".")[1] in _THROUGH and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _outputs(program: Program) -> list[Any]:
    return torch.utils._pytree.tree_leaves(program.graph.output_node().args[0])


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else -1


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """The loss of one example, from what student and teacher replied."""

    objective: Objective = Objective.AUTO
    outputs: Outputs = Outputs.AUTO
    temperature: float = 1.0
    hidden: float = 0.0
    loss: Loss | None = None
    language: Language | None = None

    def distils(self) -> bool:
        """Whether a teacher is needed."""
        return self.objective is not Objective.TASK

    def has_task(self, example: Example) -> bool:
        """Whether the task loss counts on this example."""
        wanted = self.objective in (Objective.TASK, Objective.BOTH)
        return wanted or (self.objective is Objective.AUTO and example.target is not None)

    def why_not(self, example: Example) -> str | None:
        """Reason why this example has no loss, or None."""
        if not self.has_task(example) or (example.target is not None and self.loss is not None):
            return None
        if example.target is None:
            return None if self.language else f"objective={self.objective.value} needs a target; pass fxpress.Labelled(inputs, target), or objective=distill"
        if isinstance(example.target, Tensor) and example.target.dtype == torch.int64:
            return None
        got = f"a {example.target.dtype} tensor" if isinstance(example.target, Tensor) else f"a {type(example.target).__name__}"
        return f"its target is {got}, and only int64 class indices have a loss of their own; pass loss=, a function of outputs and target"

    def __call__(self, example: Example, leaves: list[Any], student: Reply, teacher: Reply | None) -> Tensor:
        """The scalar loss; `leaves` are the example's flattened inputs."""
        keep = kept_tokens(example)
        terms = []
        if self.has_task(example):
            terms.append(self._task(example, leaves, student, keep))
        if teacher is not None:
            terms.append(self._distil(example, student, teacher, keep))
            pairs = list(zip(student.hidden, teacher.hidden, strict=True))
            if self.hidden and pairs:
                terms.append(self.hidden * torch.stack([relative_error(rows(s, keep), rows(t, keep)) for s, t in pairs]).mean())
        return torch.stack([t.float() for t in terms]).sum()

    def _task(self, example: Example, leaves: list[Any], student: Reply, keep: Tensor | None) -> Tensor:
        if example.target is None:
            assert self.language is not None
            return next_token(student.leaves[self.language.logits], leaves[self.language.ids], keep)
        if self.loss is None:
            return cross_entropy(student.leaves[_floats(student)[0]], example.target)
        found = self.loss(student.outputs, example.target)
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise TrainingError(f"loss: expected a scalar tensor, got {list(found.shape) if isinstance(found, Tensor) else type(found).__name__}")
        return found.reshape(())

    def _distil(self, example: Example, student: Reply, teacher: Reply, keep: Tensor | None) -> Tensor:
        places = _floats(student)
        if not places or places != _floats(teacher):
            raise TrainingError(f"distillation needs the same float outputs in student and original; got outputs {places} and {_floats(teacher)}")
        return torch.stack([self._agreement(example, i, student.leaves[i], teacher.leaves[i], keep) for i in places]).mean()

    def _agreement(self, example: Example, index: int, student: Tensor, teacher: Tensor, keep: Tensor | None) -> Tensor:
        if student.shape != teacher.shape:
            raise TrainingError(f"distillation: output {index} is {list(student.shape)}, the original's is {list(teacher.shape)}; use objective=task")
        if self._is_logits(example, index, student):
            return divergence(rows(student, keep), rows(teacher, keep), self.temperature)
        return relative_error(rows(student, keep), rows(teacher, keep))

    def _is_logits(self, example: Example, index: int, student: Tensor) -> bool:
        if self.outputs is not Outputs.AUTO:
            return self.outputs is Outputs.LOGITS
        if self.language is not None and index == self.language.logits:
            return True
        target = example.target
        return self.loss is None and isinstance(target, Tensor) and target.dtype == torch.int64 and target.shape == student.shape[:-1]


def _floats(reply: Reply) -> list[int]:
    return [i for i, leaf in enumerate(reply.leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def kept_tokens(example: Example) -> Tensor | None:
    """The positions `[B, T] bool` that count: what an input called `attention_mask` leaves in, or None for all."""
    mask = example.call[1].get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_floating_point() or bool(mask.all()):
        return None
    return mask.bool()


def rows(value: Tensor, keep: Tensor | None) -> Tensor:
    """The rows of `value: [B, T, ...]` at kept positions; `value` itself when it has no such axes."""
    return value if keep is None or value.dim() < 3 or value.shape[:2] != keep.shape else value[keep]


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over the teacher's variance (its mean square when it is constant), in float32."""
    one, other = student.float(), teacher.float()
    scale = torch.maximum(other.var(unbiased=False), 1e-6 * other.square().mean()).clamp_min(1e-12)
    return (one - other).square().mean() / scale


def stream_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over positions of the squared error over the teacher's power at that position, in float32 (ours): what a norm behind the stream sees of it.

    A position is a row of the last axis, and of images `[B, C, H, W]` a whole image. `relative_error` would be about the few positions of massive activations
    that residual streams of language models have. Positions with less than a thousandth of the median power count as if they had that.
    """
    one, other = ((t.flatten(1) if t.dim() == 4 else t).float() for t in (student, teacher))
    power = other.square().mean(-1)
    return ((one - other).square().mean(-1) / power.clamp_min(max(1e-3 * float(power.median()), 1e-12))).mean()
