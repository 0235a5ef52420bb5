"""Layer numbers of blocks: from an integer in their module paths where there is one, from graph order otherwise. Paths are used for nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from ..nodes import module_path
from ..sites import WeightSite


def number_layers(sites: Sequence[tuple[WeightSite, ...]], streams: Sequence[int], halves: Sequence[bool]) -> list[tuple[int, str]]:
    """Per block its layer, counted over the whole model, and the module path of that layer (empty without one). `halves`: attention alone."""
    paths = [common([module_path(s.node).split(".") for s in block]) for block in sites]
    keys: list[str] = [""] * len(paths)
    for stream in dict.fromkeys(streams):
        members = [i for i, s in enumerate(streams) if s == stream]
        for i, key in zip(members, _keys([paths[i] for i in members]), strict=True):
            keys[i] = key
    return _numbered(keys, streams, halves)


def common(paths: Sequence[Sequence[str]]) -> list[str]:
    """The longest common beginning."""
    return [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))] if paths else []


def _keys(paths: list[list[str]]) -> list[str]:
    """Per block of a stream the common prefix with the integer that follows, or an integer inside the prefix; else nothing."""
    prefix = common(paths)
    n = len(prefix)
    if all(len(p) > n and p[n].isdigit() for p in paths):
        return [".".join(p[: n + 1]) for p in paths]
    last = max((i for i, part in enumerate(prefix) if part.isdigit()), default=None)
    return [".".join(prefix[: last + 1]) if last is not None else ""] * len(paths)


def _numbered(keys: list[str], streams: Sequence[int], halves: Sequence[bool]) -> list[tuple[int, str]]:
    """Equal keys are one layer; without keys attention alone belongs to the layer of the block after them."""
    numbers: dict[object, int] = {}
    out = []
    run = 0
    for i, (key, stream) in enumerate(zip(keys, streams, strict=True)):
        if i and (streams[i - 1] != stream or not halves[i - 1]):
            run += 1
        out.append((numbers.setdefault(key or run, len(numbers)), key))
    return out
