"""Ways and options: fronts against brute force, uniform combinations kept, budgets and floors."""

from __future__ import annotations

from itertools import product

import pytest

from fxpress.ir.errors import PassError
from fxpress.passes.planning.choices import Kind, Option, Table, Unit, Way, at_share, combined, thinned


def ways(place: str, *rows: tuple[Kind, float, int, float]) -> list[Way]:
    """Dense (100, free), and ways of (kind, share, amount, cost)."""
    dense = Way(place=place, kind=Kind.DENSE, action="", nbytes=100, amount=100)
    return [dense, *(Way(place=place, kind=k, action=f"{k.value} {a}", nbytes=a, amount=a, cost=c, share=s) for k, s, a, c in rows)]


A = ways("a", (Kind.SVD, 0.2, 20, 9.0), (Kind.SVD, 0.5, 50, 2.0), (Kind.MPO, 0.2, 20, 5.0))
B = ways("b", (Kind.SVD, 0.2, 20, 1.0), (Kind.SVD, 0.5, 50, 0.5))
C = ways("c", (Kind.SVD, 0.5, 50, 4.0))


def test_combinations_are_the_front_of_all_pairs() -> None:
    options = combined([A, B, C], extra=7)
    every = [(7 + sum(w.amount for w in trio), sum(w.cost for w in trio)) for trio in product(A, B, C)]
    best = {amount: min(c for a, c in every if a <= amount) for amount, _ in every}
    for amount, cost in best.items():
        assert min(o.cost for o in options if o.amount <= amount) == cost
    assert all(o.extra == 7 and len({w.place for w in o.ways}) == 3 for o in options)


def test_equal_shares_stay_though_others_beat_them() -> None:
    uniform = [o for o in combined([A, B, C]) if [w.kind for w in o.ways] == [Kind.SVD] * 3 and o.ways[0].share == 0.5]
    assert [o.amount for o in uniform if all(w.share == 0.5 for w in o.ways)]
    assert at_share(A, Kind.SVD, 0.45).share == 0.2 and at_share(C, Kind.SVD, 0.3).kind is Kind.DENSE


def test_long_fronts_keep_their_hull() -> None:
    front = [Option(ways=tuple(ways(str(i), (Kind.SVD, 0.1, i, 1000.0 / (1 + i)))[1:])) for i in range(500)]
    dip = Option(ways=(ways("dip", (Kind.SVD, 0.1, 100, 0.5))[1],))
    kept = thinned([*front, dip], width=16)
    assert 16 <= len(kept) < 60 and dip in kept and kept[0].amount == 0
    assert [o.amount for o in kept] == sorted(o.amount for o in kept) and [o.cost for o in kept] == sorted((o.cost for o in kept), reverse=True)


def test_budgets_floors_and_frontiers() -> None:
    table = Table(unit=Unit.BYTES, total=330, fixed=30, items=tuple(tuple(Option(ways=(w,)) for w in part) for part in (A, B, C)))
    assert table.floor == (30 + 20 + 20 + 50) / 330
    picked = table.choose(200 / 330)
    assert table.reached(picked) <= 200 / 330 and sum(o.cost for o in picked) == 2.0 + 1.0 + 0.0
    assert sum(o.cost for o in table.choose(table.floor)) == 5.0 + 1.0 + 4.0
    assert table.choose(1.0) == [o[0] for o in table.items] and table.point(1.0).kinds == {"dense": 3}
    with pytest.raises(PassError, match=r"30.00% of the program's bytes is out of reach: 9.09% .* the least in reach is 36.36%"):
        table.choose(0.3)
