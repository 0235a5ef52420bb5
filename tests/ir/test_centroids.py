"""Tables for one-dimensional data: exact where they can be, locally optimal elsewhere, nearest entries exactly nearest."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxpress.ir.centroids import fit_tables, nearest_codes

from ..checks import assert_same
from ..tiny import randn, seeded

FREE = torch.tensor([False])


def distances(matrix: Tensor, values: Tensor) -> Tensor:
    """`[N, K, E]` in double precision."""
    return (matrix.double().unsqueeze(2) - values.double().unsqueeze(1)).abs()


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(2, 256), st.booleans())
def test_nearest_is_nearest_and_of_equals_the_lowest_code(seed: int, columns: int, entries: int, coarse: bool) -> None:
    generator = seeded(seed)
    matrix, values = torch.randn(3, columns, generator=generator), torch.randn(3, entries, generator=generator)
    if coarse:  # many exact ties and equal entries
        matrix, values = (matrix * 4).round() / 4, (values * 2).round() / 2
    codes = nearest_codes(matrix, values)
    assert codes.dtype == torch.uint8
    assert_same(codes.long(), distances(matrix, values).min(2).indices)  # min gives the first of equals


def test_nearest_decides_between_neighbouring_floats() -> None:
    low = torch.tensor([[1.0]])
    values = torch.cat([low, torch.nextafter(low, low + 1)], 1)
    assert nearest_codes(values, values).tolist() == [[0, 1]]
    assert nearest_codes(values, values.flip(1)).tolist() == [[1, 0]]


def test_work_is_cut_into_chunks_of_rows(monkeypatch: object) -> None:
    import fxpress.ir.centroids as module

    matrix, values = randn(7, 10), randn(7, 5, seed=1)
    whole = nearest_codes(matrix, values), fit_tables(matrix, 4, FREE.expand(7))
    chunk, module.CHUNK = module.CHUNK, 20
    try:
        assert_same((nearest_codes(matrix, values), fit_tables(matrix, 4, FREE.expand(7))), whole)
    finally:
        module.CHUNK = chunk


def squared_error(samples: Tensor, tables: Tensor) -> float:
    return float(distances(samples, tables).min(2).values.square().mean())


def test_sweeps_reach_the_known_optimum_for_normal_samples() -> None:
    samples = randn(1, 100_000)
    for entries, optimum in ((2, 0.3634), (4, 0.1175), (8, 0.03454), (16, 0.009497)):  # J. Max, 1960, table I
        assert squared_error(samples, fit_tables(samples, entries, FREE, sweeps=200)) < 1.02 * optimum
        assert squared_error(samples, fit_tables(samples, entries, FREE)) < 1.05 * optimum


@given(st.integers(0, 2**31), st.integers(2, 32), st.integers(0, 8))
def test_few_distinct_samples_are_the_table(seed: int, entries: int, less: int) -> None:
    generator = seeded(seed)
    distinct = torch.randn(max(entries - less, 1), generator=generator) * 1000 ** torch.randn(max(entries - less, 1), generator=generator)
    samples = distinct[torch.randint(len(distinct), (2, 60), generator=generator)]
    tables = fit_tables(samples, entries, FREE.expand(2))
    assert squared_error(samples, tables) == 0
    assert bool((tables.diff(dim=1) >= 0).all())


def test_sweeps_never_hurt() -> None:
    samples = torch.cat([randn(4, 300), 50 * randn(4, 5, seed=1)], 1)
    errors = [squared_error(samples, fit_tables(samples, 8, FREE.expand(4), sweeps=n)) for n in (0, 1, 3, 10, 40)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[0]


def test_a_pinned_zero_is_exact_and_the_rest_adapts() -> None:
    samples = torch.where(randn(2, 400, seed=1) > 0, randn(2, 400) + 3, 0.0)
    tables = fit_tables(samples, 4, torch.tensor([True, False]))
    assert (tables == 0).sum(1)[0] == 1
    assert squared_error(samples[:1], tables[:1]) < 1.3 * squared_error(samples[1:], tables[1:])
