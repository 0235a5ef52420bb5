"""What is worked out once about every module, for all amounts: a basis or an order with what matters most first, and a score for every index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from ...ir.nodes import get_tensor
from ...ir.program import Program
from ...ir.sites import WeightSite
from ..base import Need
from ..calibrate import CalibrationWalk, Statistics, site_groups
from ..context import Context
from ..kronecker_sum import roots
from ..memory import Tensors
from ..modular import channel_scores, greedy_neurons, pair_scores, ridge_leverage
from ..spectra import Spectrum, spectrum
from ..structured.obs import eliminate
from .finding import Module, Part
from .slopes import module_slopes, output_key, pair_key


class Neurons(Enum):
    """How the neurons that stay are chosen."""

    LEVERAGE = "leverage"  # ridge leverage scores, as published
    GREEDY = "greedy"  # those that explain most of the module's output, one after another
    ELIMINATION = "elimination"  # those that cost least go, one after another, the others making up for them


class Values(Enum):
    """What the basis of the values is the best for."""

    OWN = "own"  # the value projection alone, as published for shared value heads
    STACKED = "stacked"  # all output projections that share the value head, on what the heads pass on


class Pairs(Enum):
    """How channels or rotary pairs of queries and keys are scored."""

    NORMS = "norms"  # product of their norms, as published
    SLOPES = "slopes"  # what the loss would feel


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to work out, and how."""

    neurons: Neurons
    values: Values
    pairs: Pairs
    ridge: float

    @property
    def needs_slopes(self) -> bool:
        """Whether gradients are needed."""
        return self.neurons is not Neurons.LEVERAGE or self.values is Values.STACKED or self.pairs is Pairs.SLOPES


def score_key(module: Module) -> str:
    """Name of `[size]`: what is lost with every index, in the module's new order or basis; never rising in the order in which they should stay."""
    return f"score of {module.name}"


def order_key(module: Module) -> str:
    """Name of `[H, size]`: the index that stands at every place of a key head from now on."""
    return f"order of {module.name}"


def maps_keys(module: Module) -> tuple[str, str]:
    """Names of `[H, D, D]`: maps of values and output columns, or of queries and keys."""
    return f"first map of {module.name}", f"second map of {module.name}"


def module_facts(program: Program, modules: Sequence[Module], recipe: Recipe, ctx: Context) -> Tensors:
    """Orders, maps and scores of all modules, float64, of the program as it stands; one sweep of gradients and one walk over the calibration data."""
    slopes = module_slopes(program, modules, ctx) if recipe.needs_slopes else {}
    wanted = {module: [s.name for s in _watched(module, recipe)] for module in modules}
    names = {name for found in wanted.values() for name in found}
    walk, facts, waiting, seen = CalibrationWalk(program, ctx.calibration), dict[str, Tensor](), list(modules), dict[str, Moments]()
    for sites in ctx.track(site_groups([s for s in program.sites() if s.name in names]), "decomposing modules"):
        moments = _moments(walk.statistics(sites, Need.GRAM | Need.MEAN))
        seen |= {s.name: moments for s in sites}
        for module in [m for m in waiting if seen.keys() >= set(wanted[m])]:
            make = {Part.FEED_FORWARD: _neurons, Part.VALUE_OUTPUT: _values, Part.QUERY_KEY: _scores}[module.part]
            facts |= make(program, module, recipe, seen, slopes)
            waiting.remove(module)
        needed = {name for m in waiting for name in wanted[m]}
        seen = {name: one for name, one in seen.items() if name in needed}
    return facts


def _watched(module: Module, recipe: Recipe) -> list[WeightSite]:
    """The sites whose inputs tell what the module does."""
    if module.part is Part.VALUE_OUTPUT and recipe.values is Values.OWN:
        assert module.attention.v is not None
        return [module.attention.v]
    if module.part is Part.QUERY_KEY:
        assert module.attention.q is not None and module.attention.k is not None
        return [module.attention.q, module.attention.k]
    return [module.output]


@dataclass(frozen=True)
class Moments:
    """Second moment `[K, K]` and mean `[K]` of a site's input, float64."""

    second: Tensor
    mean: Tensor

    @property
    def covariance(self) -> Tensor:
        """Second moment about the mean."""
        return self.second - torch.outer(self.mean, self.mean)


Seen = Mapping[str, Moments]  # by the site that sees it


def _moments(statistics: Statistics) -> Moments:
    assert statistics.gram is not None and statistics.mean is not None
    return Moments(statistics.gram[0].double(), statistics.mean[0].double())


def _neurons(program: Program, module: Module, recipe: Recipe, seen: Seen, slopes: Tensors) -> Tensors:
    site, size, moments = module.output, module.axis.size, seen[module.output.name]
    if recipe.neurons is Neurons.LEVERAGE:
        return {score_key(module): ridge_leverage(moments.second, recipe.ridge)}
    weight = site.matrix().double() * slopes[output_key(module)].sqrt().unsqueeze(1)
    if recipe.neurons is Neurons.ELIMINATION:
        return {score_key(module): eliminate(weight.float(), moments.covariance.float(), torch.arange(size), size).double()}
    order, gains = greedy_neurons(moments.covariance, weight, size)
    falling = gains.flip(0).cummax(0).values.flip(0) + 1e-12 * float(gains.sum()) * torch.arange(size, 0, -1, dtype=torch.float64) / size
    return {score_key(module): torch.zeros(size, dtype=torch.float64).index_copy(0, order, falling)}


def _values(program: Program, module: Module, recipe: Recipe, seen: Seen, slopes: Tensors) -> Tensors:
    heads, moments = module.heads, seen[_watched(module, recipe)[0].name]
    assert heads is not None and heads.attention.v is not None
    rows, columns, out = heads.value_rows(module.axis), heads.output_columns(module.axis), module.output.matrix().double()
    forward, back, energy = [], [], torch.zeros(module.axis.size, dtype=torch.float64)
    for h in range(heads.count):
        if recipe.values is Values.OWN:
            found = spectrum(heads.attention.v.matrix()[rows[h]], moments.second)
            forward.append(found.left.t())
            back.append(found.left)
        else:
            own = sum(moments.covariance[c][:, c] for c in columns[h]) / heads.members
            assert isinstance(own, Tensor)
            stacked = torch.cat([out[:, c] for c in columns[h]])
            found = spectrum(stacked, own, slopes[output_key(module)].repeat(heads.members))
            first, second = _basis(found)
            forward.append(first)
            back.append(second)
        energy += _padded(found.energy, len(energy))
    names = maps_keys(module)
    maps = {names[0]: torch.stack(forward), names[1]: torch.stack(back)}
    if recipe.values is Values.OWN:
        return maps | {score_key(module): energy}
    return maps | {score_key(module): _eliminated(module, out, moments, slopes[output_key(module)], maps[names[0]], maps[names[1]])}


def _padded(values: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(values[:size], (0, max(0, size - len(values))))


def _basis(found: Spectrum) -> tuple[Tensor, Tensor]:
    """`[D, D]` that takes values to the principal directions of the outputs, largest first and of their size, and its inverse."""
    size = found.matrix.shape[1]
    down = found.left[:, :size].t() @ (found.scale.unsqueeze(1) * found.matrix)  # [D, D]: singular values in its rows
    if not bool(torch.linalg.cond(down) < 1e10):  # outputs that do not depend on all value channels: an orthogonal basis, those channels last
        down = torch.linalg.svd(found.matrix.t() @ found.matrix)[0].t()
    return down, torch.linalg.inv(down)


def _eliminated(module: Module, out: Tensor, moments: Moments, pressure: Tensor, forward: Tensor, back: Tensor) -> Tensor:
    """What every value channel of the new basis costs when it goes and the others make up for it."""
    heads = module.heads
    assert heads is not None
    columns = heads.output_columns(module.axis)
    change, undo = torch.eye(out.shape[1], dtype=torch.float64), torch.eye(out.shape[1], dtype=torch.float64)
    owner = torch.full((out.shape[1],), -1, dtype=torch.int64)
    for h in range(heads.count):
        for c in columns[h]:
            change[c.unsqueeze(1), c], undo[c.unsqueeze(1), c] = forward[h], back[h]
            owner[c] = torch.arange(len(c))
    weight = (out @ undo) * pressure.sqrt().unsqueeze(1)
    return eliminate(weight, change @ moments.covariance @ change.t(), owner, module.axis.size)


def _scores(program: Program, module: Module, recipe: Recipe, seen: Seen, slopes: Tensors) -> Tensors:
    heads = module.heads
    assert heads is not None
    if module.mixed and recipe.pairs is Pairs.SLOPES:
        return _mixed_scores(program, module, seen, slopes)
    scores = slopes[pair_key(module)] if recipe.pairs is Pairs.SLOPES else _norms(program, module, seen)
    if not module.own:
        return {score_key(module): scores.sum(0)}
    ranked = torch.sort(scores, dim=1, descending=True, stable=True)
    return {order_key(module): ranked.indices, score_key(module): ranked.values.sum(0)}


def _norms(program: Program, module: Module, seen: Seen) -> Tensor:
    """Scores of CR, `[H, size]`: products of the norms of queries and keys."""
    heads = module.heads
    assert heads is not None and heads.attention.q is not None and heads.attention.k is not None
    queries = _energy(program, heads.attention.q, seen)[heads.query_rows(module.axis)].sum(-1)  # [H, G, size]
    keys = _energy(program, heads.attention.k, seen)[heads.key_rows(module.axis)].sum(-1)
    score = pair_scores if heads.attention.rotary else channel_scores
    return torch.stack([score(queries[h], keys[h]) for h in range(heads.count)])


def _energy(program: Program, site: WeightSite, seen: Seen) -> Tensor:
    """Mean squares of the site's outputs, `[N]`."""
    moments, w = seen[site.name], site.matrix().double()
    found = ((w @ moments.second) * w).sum(1)
    if site.bias is not None:
        b = get_tensor(program.graph_module, site.bias).detach().double()
        found = found + 2 * b * (w @ moments.mean) + b.square()
    return found.clamp_min(0)


def _mixed_scores(program: Program, module: Module, seen: Seen, slopes: Tensors) -> Tensors:
    """The best basis for the scores of each key head: SVD of the roots of the second moments of queries and of keys about their mean.

    A constant added to all scores of a query changes nothing, so keys count about their mean. Without grouped queries this is the joint SVD of A3 (arXiv
    2505.12942); singular values become loss by the ratio of the pressure on channels to the energy of their products.
    """
    heads = module.heads
    assert heads is not None and heads.attention.q is not None and heads.attention.k is not None
    rows_q, rows_k = heads.query_rows(module.axis)[..., 0], heads.key_rows(module.axis)[..., 0]
    first, second, score = [], [], torch.zeros(module.axis.size, dtype=torch.float64)
    for h in range(heads.count):
        queries = sum(_second(program, heads.attention.q, r, seen) for r in rows_q[h])
        w = heads.attention.k.matrix()[rows_k[h]].double()
        keys = w @ seen[heads.attention.k.name].covariance @ w.t()
        assert isinstance(queries, Tensor)
        (root_q, inverse_q), (root_k, inverse_k) = roots(queries), roots(keys)
        u, s, vt = torch.linalg.svd(root_q @ root_k)
        first.append(s.sqrt().unsqueeze(1) * (u.t() @ inverse_q))
        second.append(s.sqrt().unsqueeze(1) * (vt @ inverse_k))
        pressure = float(slopes[pair_key(module)][h].sum()) / max(float((queries.diagonal() * keys.diagonal()).sum()), 1e-300)
        score += pressure * s.square()
    # first^T second = inverse_q u s vt inverse_k = 1: what is computed stays the same
    names = maps_keys(module)
    return {names[0]: torch.stack(first), names[1]: torch.stack(second), score_key(module): score}


def _second(program: Program, site: WeightSite, rows: Tensor, seen: Seen) -> Tensor:
    """Second moment of some outputs, bias included, `[D, D]`."""
    moments, w = seen[site.name], site.matrix()[rows].double()
    found = w @ moments.second @ w.t()
    if site.bias is not None:
        b, m = get_tensor(program.graph_module, site.bias).detach()[rows].double(), w @ moments.mean
        found = found + torch.outer(m, b) + torch.outer(b, m) + torch.outer(b, b)
    return found
