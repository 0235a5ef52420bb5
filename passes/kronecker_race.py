"""Choice among the members of the two-site family: refined side by side, round after round, and those that fall behind are given up. Ours.

Rounds of `kronecker_fit` gain less and less: of ten fits of linears of SmolLM2-135M (layers 1 and 15) none gained more than 25 % after its first round, or
14 % after its second. A member that stands further above the best than `LEAD / 2^round` is therefore given up; its error is reported as it stood.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .kronecker_fit import Fit, Whitening, rearranged, whitening
from .kronecker_sum import Cores, Modes, finished, fit
from .spectra import spectrum

LEAD = 0.3  # a member may stand so far above the best error after its first round, half as far after its second, and so on
Member = tuple[Modes, int]


@dataclass(frozen=True, kw_only=True)
class Winner:
    """The best member's cores and their relative error; `errors` of all by the size b, where they stood."""

    cores: Cores
    modes: Modes
    chi: int
    error: float
    errors: dict[int, float]


def best_member(matrix: Tensor, members: Sequence[Member], gram: Tensor | None, rounds: int, shared: MutableMapping[str, Any]) -> Winner:
    """Of `members` (modes and bond) the one with the least error for `matrix: [N, K]`; `shared` keeps whitened Grams for sites with one input."""
    closed = [m for m in members if gram is None or rounds == 0 or m[0].b == m[0].c == 1]
    done = {m: fit(matrix, *m, gram, rounds) for m in closed}
    errors = {m: error for m, (_, error) in done.items()}
    racing = {m: Fit(matrix, m[0], shared_whitening(gram, m[0], shared), m[1]) for m in members if m not in done and gram is not None}
    running = list(racing)
    for number in range(rounds):
        going = [m for m in running if racing[m].refine(1)]
        errors |= {m: racing[m].error for m in running}
        best = min(errors.values())
        running = [m for m in going if errors[m] <= best * (1 + LEAD / 2**number)] if len(members) > 1 else going
    first = min(errors, key=errors.__getitem__)
    if first in racing:
        assert gram is not None
        done[first] = finished(racing[first], matrix, gram)
    cores, error = done[first]
    return Winner(cores=cores, modes=first[0], chi=first[1], error=error, errors={m[0].b: e for m, e in (errors | {first: error}).items()})


def shared_whitening(gram: Tensor, modes: Modes, shared: MutableMapping[str, Any]) -> Whitening:
    """The Gram's whitening for these modes of the inputs, made once for all sites with one input."""
    key = f"kronecker_whitening {modes.b} {modes.d}"
    if key not in shared:
        shared[key] = whitening(gram, modes)
    found: Whitening = shared[key]
    return found


def smallest_bond(matrix: Tensor, modes: Modes, most: int, gram: Tensor | None, rounds: int, tolerance: float, shared: MutableMapping[str, Any]) -> int | None:
    """The smallest bond up to `most` whose fit meets the relative error `tolerance`, by bisection between fits; None where the largest does not."""
    if gram is None or modes.b == modes.c == 1:
        found = spectrum(matrix, gram) if modes.b == modes.c == 1 else spectrum(rearranged(matrix, modes))
        rank = found.rank_for(tolerance)
        return rank if rank <= most and found.error(rank) <= tolerance else None
    white = shared_whitening(gram, modes, shared)

    def meets(chi: int) -> bool:
        return fit(matrix, modes, chi, gram, rounds, white)[1] <= tolerance

    if most < 1 or not meets(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high
