"""The pressure on modules against gradients taken by hand."""

from __future__ import annotations

import torch

from fxpress.ir.program import Program
from fxpress.passes.context import Context
from fxpress.passes.modules.finding import Module, Part, find_modules
from fxpress.passes.modules.slopes import module_slopes, output_key, pair_key
from fxpress.passes.tapped import Tapped

from ... import attention_models
from ...tiny import randn


def found() -> tuple[Program, tuple[Module, ...], Context]:
    program = attention_models.program("cross")
    memory = [(randn(2, 5, 6, seed=i).double(), randn(2, 7, 32, seed=10 + i).double()) for i in range(2)]
    return program, find_modules(program, tuple(Part)).modules, Context(calibration=[(m, {}) for m in memory])


def test_outputs_and_pairs() -> None:
    program, modules, ctx = found()
    slopes = module_slopes(program, modules, ctx)
    values = next(m for m in modules if m.part is Part.VALUE_OUTPUT)
    scores = next(m for m in modules if m.part is Part.QUERY_KEY)
    q, k = scores.attention.q, scores.attention.k
    assert q is not None and k is not None and scores.heads is not None
    generator, total, pairs, count = ctx.generator(), torch.zeros(32, dtype=torch.float64), torch.zeros(4, 8, dtype=torch.float64), 0
    for call in ctx.calibration:
        runner = Tapped(program, [values.output.node.name, q.node.name, k.node.name])
        with torch.enable_grad():
            weights = {s.tensors[0]: s.matrix().clone().requires_grad_() for s in program.sites()}
            reply = runner(call, weights)
            noise = torch.randn(reply.leaves[0].shape, generator=generator)
            slope = torch.autograd.grad((reply.leaves[0].float() * noise).sum(), list(reply.hidden))
        total += (slope[0] * 2).square().sum((0, 1))
        queries, keys = scores.heads.query_rows(scores.axis)[:, 0, :, 0], scores.heads.key_rows(scores.axis)[..., 0]
        for rows, change, value in ((queries, slope[1], reply.hidden[1]), (keys, slope[2], reply.hidden[2])):
            pairs += 0.5 * (2 * change * value)[..., rows].square().sum((0, 1))
        count += slope[0].shape[0] * slope[0].shape[1]
    assert torch.allclose(slopes[output_key(values)], total / count, rtol=1e-4)
    assert torch.allclose(slopes[pair_key(scores)], pairs / count, rtol=1e-4)
