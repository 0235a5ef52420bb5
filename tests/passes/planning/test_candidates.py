"""What a site may become: legal, smaller, within the share, each once, and reasons where nothing is."""

from __future__ import annotations

import pytest

from fxpress.ir.chain import parameters
from fxpress.passes.base import parse_pass
from fxpress.passes.factorize_svd import FactorizeSvd, Metric
from fxpress.passes.planning.candidates import Space, candidates, why_none
from fxpress.passes.planning.choices import Kind

from ..nets import conv_net, tied_net
from .nets import structured_convolutions, structured_linears

ALL = frozenset(Kind)


@pytest.mark.parametrize("net", [structured_linears, structured_convolutions])
@pytest.mark.parametrize("multiple", [1, 4])
def test_candidates_are_legal_and_within_their_share(net: object, multiple: int) -> None:
    program, _ = net()  # type: ignore[operator]
    for site in program.sites():
        found = candidates(site, Space(kinds=ALL, multiple=multiple, min_keep=0.1))
        assert len({c.one.to_spec() for c in found}) == len(found)
        for c in found:
            planned = c.one.planned_chain(site)
            assert not isinstance(planned, str) and parameters(planned) <= c.share * site.parameters + 1e-9 and c.share >= 0.1
            assert parse_pass(c.one.to_spec()) == c.one and c.one.why_skip(site) is None


def test_pairs_have_the_ranks_of_a_uniform_pass() -> None:
    site = structured_linears()[0].sites()[0]
    found = {c.share: c.one for c in candidates(site, Space(kinds=frozenset({Kind.SVD}), metric=Metric.INPUT))}
    planned = FactorizeSvd(ratio=0.5).planned_chain(site)
    assert found[0.5].planned_chain(site)[0].weight.shape == planned[0].weight.shape  # type: ignore[union-attr]
    assert not candidates(site, Space(kinds=frozenset({Kind.CP, Kind.TUCKER, Kind.SLICE})))


def test_kinds_follow_the_kernel() -> None:
    sites = {s.name: {c.kind for c in candidates(s, Space(kinds=ALL))} for s in structured_convolutions()[0].sites()}
    assert sites == {
        "0": {Kind.SVD, Kind.TUCKER, Kind.CP}, "2": {Kind.SVD, Kind.TUCKER, Kind.CP}, "4": {Kind.SVD}, "6.2": {Kind.SVD, Kind.MPO},
    }  # fmt: skip


def test_reasons() -> None:
    sites = {s.name: s for s in conv_net()[0].sites()} | {s.name if s.name != "head" else "tied head": s for s in tied_net()[0].sites()}
    why = {name: why_none(site, Space(kinds=ALL)) for name, site in sites.items()}
    assert "looked up" in str(why["embed"]) and "tied to embed" in str(why["tied head"])
    assert "16 groups" in str(why["depthwise"]) and why["conv"] is None and why["up"] is None
