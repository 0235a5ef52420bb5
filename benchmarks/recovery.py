"""Recovery of a pruned image classifier, for `benchmarks/structured_cnn.py`: its data, fxpress' `recover`, and a plain PyTorch loop as a check on it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_fashion import batches

import fxpress
from fxpress.ir.program import Program
from fxpress.passes.context import Context
from fxpress.passes.examples import as_examples
from fxpress.passes.pipeline import run_pipeline
from fxpress.passes.recipe import as_recipe
from fxpress.runtime.zoo_images import fashion_mnist

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Steps of Adam on `batch` images; cross-entropy with the labels plus divergence from the dense net's answers."""

    steps: int = 300
    batch: int = 64
    lr: float = 1e-3

    def spec(self) -> str:
        """The pass."""
        return f"recover{{steps={self.steps},lr={self.lr},objective=both,held_out=0.02,evaluate_every={max(1, self.steps // 4)}}}"


def recovery_data(settings: Recovery, seed: int) -> list[Batch]:
    """As many augmented batches of training images as there are steps."""
    images, labels = fashion_mnist("train")
    generator = torch.Generator().manual_seed(7000 + seed)
    work: list[Batch] = []
    while len(work) < settings.steps:
        work += batches(images, labels, size=settings.batch, generator=generator)
    return work[: settings.steps]


def labelled(work: Sequence[Batch]) -> list[fxpress.Labelled]:
    """The batches as `fxpress.optimize(training=)` takes them."""
    return [fxpress.Labelled(inputs=(x,), target=y) for x, y in work]


def by_recover(pruned: Program, dense: Program, work: Sequence[Batch], settings: Recovery, seed: int) -> Program:
    """The `recover` pass on a program that was pruned elsewhere, with the dense program as the teacher."""
    ctx = Context(training=as_examples(labelled(work), pruned.inputs), original=dense, seed=seed)
    return run_pipeline(pruned, as_recipe([settings.spec()]).passes, ctx).program


def by_plain_loop(pruned: Program, dense: Program, work: Sequence[Batch], settings: Recovery) -> nn.Module:
    """What a user would write: Adam, a short warmup, a cosine, on a copy of the pruned graph; unlike in `recover`, batch norm is live while training."""
    model = copy.deepcopy(pruned.graph_module)
    weights = [p.requires_grad_() for p in model.parameters() if p.is_floating_point()]
    optimizer = torch.optim.Adam(weights, lr=settings.lr)
    set_batch_norm(model, training=True)
    for step, (x, y) in enumerate(work):
        progress = (step + 1) / len(work)
        optimizer.param_groups[0]["lr"] = settings.lr * min(1, 20 * progress) * (1 + math.cos(math.pi * progress)) / 2
        with torch.no_grad():
            teacher = dense(x)
        loss = both(model(x), y, teacher)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    set_batch_norm(model, training=False)
    return model


def both(logits: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy plus Kullback-Leibler divergence from the teacher's softmax: `[B, 10], [B], [B, 10] -> scalar`."""
    divergence = F.kl_div(logits.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)
    return F.cross_entropy(logits, target) + divergence


def set_batch_norm(model: nn.Module, *, training: bool) -> None:
    """Let the captured batch norms use and update batch statistics, or their stored ones."""
    assert isinstance(model, torch.fx.GraphModule)
    stored, live = torch.ops.aten._native_batch_norm_legit_no_training.default, torch.ops.aten._native_batch_norm_legit.default
    for node in model.graph.nodes:
        if training and node.target is stored:
            node.target, node.args = live, (*node.args[:5], True, *node.args[5:])
        elif not training and node.target is live:
            node.target, node.args = stored, (*node.args[:5], *node.args[6:])
    model.recompile()
