"""Pair the nodes of two programs that share no journal: by weight content, by module path and operator, then by neighbourhood.

Every stage pairs only what earlier ones left over. Where modules were renamed or dropped, a map of module paths is voted for by the pairs found so far.
Nothing depends on node names, hash seeds or memory addresses, so equal programs always give equal pairs.
"""

from __future__ import annotations

import warnings
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from difflib import SequenceMatcher
from functools import partial
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from .diff_snapshot import NodeView, Snapshot

_HOPS = 3  # radius of the neighbourhood hashes
_SAMPLES = 4096  # weight elements looked at for a fingerprint
_LONGEST = 1_000_000  # product of two sequence lengths up to which they are aligned exactly
_FAMILIES = {"addmm": "linear", "mm": "linear", "matmul": "linear", "conv1d": "conv", "conv2d": "conv"}

Pairs = dict[str, str]


def match(before: Snapshot, after: Snapshot) -> Pairs:
    """Names in `before` to names in `after`; what is not in the result was removed or added."""
    return _Matcher(before, after).run()


def family(view: NodeView) -> str:
    """What a node computes, whatever its weight format: `aten.linear`, `aten.addmm` and `fxpress.linear` on a weight are one family."""
    name = view.op.split(".")[1] if "." in view.op else view.op
    return _FAMILIES.get(name, name) if view.format else name


class _Side:
    """One program as a graph, with a hash of every node's neighbourhood at each radius."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.nodes = snapshot.nodes
        self.tensors = snapshot.tensors
        self.order = {name: i for i, name in enumerate(snapshot.nodes)}
        self.graph: Any = nx.DiGraph()
        for name, view in snapshot.nodes.items():
            self.graph.add_node(name, label=family(view))
            self.graph.add_edges_from((source, name, {"position": str(i)}) for i, source in enumerate(view.inputs) if source in snapshot.nodes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # networkx: the hashes differ from those of its older versions
            self.hashes: dict[str, list[str]] = nx.weisfeiler_lehman_subgraph_hashes(self.graph, "position", "label", iterations=_HOPS)

    def neighbours(self, name: str) -> tuple[list[str], list[str]]:
        """Inputs and users."""
        return list(self.graph.predecessors(name)), list(self.graph.successors(name))


_Label = Callable[[_Side, str], Hashable]


class _Matcher:
    def __init__(self, before: Snapshot, after: Snapshot) -> None:
        self.a, self.b = _Side(before), _Side(after)
        self.pairs: Pairs = {}
        self.taken: set[str] = set()

    def run(self) -> Pairs:
        """All stages; the second round profits from the module map that the first one's pairs give."""
        self._by(lambda side, name: _fingerprint(side, name), unique=True)
        self._by(lambda side, name: (side.nodes[name].op, name) if side.nodes[name].op in ("placeholder", "output") else None)
        for _ in range(2):
            self._spread()
            self._by_module()
            self._by(lambda side, name: (_kind(side, name), side.hashes[name][-1]))
        self._by_neighbours()
        return self.pairs

    def _left(self) -> tuple[list[str], list[str]]:
        return [n for n in self.a.nodes if n not in self.pairs], [n for n in self.b.nodes if n not in self.taken]

    def _pair(self, a: str, b: str) -> None:
        self.pairs[a] = b
        self.taken.add(b)

    def _by(self, key: _Label, *, unique: bool = False, modules: _ModuleMap | None = None) -> None:
        """Pair what has an equal key in graph order, where both programs have it equally often (`unique`: once)."""
        left, right = self._left()
        there = _buckets((key(self.b, n), n) for n in right)
        for value, names in _buckets((key(self.a, n) if modules is None else modules.translate(key(self.a, n)), n) for n in left).items():
            others = there.get(value, [])
            if len(names) == len(others) and (len(names) == 1 or not unique):
                for a, b in zip(names, others, strict=True):
                    self._pair(a, b)

    def _spread(self) -> None:
        """From every pair to the inputs and users that are alone of their kind on both sides, and on from there."""
        modules = _ModuleMap(self.a.nodes, self.b.nodes, self.pairs)
        queue = deque((a, self.pairs[a]) for a in self.a.nodes if a in self.pairs)
        while queue:
            a, b = queue.popleft()
            for near_a, near_b in zip(self.a.neighbours(a), self.b.neighbours(b), strict=True):
                for pair in [p for label in (_kind, _family_label) for p in self._alone(near_a, near_b, label, modules)]:
                    if pair[0] not in self.pairs and pair[1] not in self.taken:
                        self._pair(*pair)
                        queue.append(pair)

    def _alone(self, left: list[str], right: list[str], label: _Label, modules: _ModuleMap) -> Iterator[tuple[str, str]]:
        """Pairs of leftover nodes with a label that no other leftover node of either list has, at places that agree."""
        there = _buckets((label(self.b, n), n) for n in right if n not in self.taken)
        for key, names in _buckets((label(self.a, n), n) for n in left if n not in self.pairs).items():
            others = there.get(key, [])
            if len(names) == len(others) == 1 and modules.agree(self.a.nodes[names[0]].module, self.b.nodes[others[0]].module):
                yield names[0], others[0]

    def _by_module(self) -> None:
        """Within modules of equal (or renamed) path: neighbourhoods from wide to narrow, then the order of operators."""
        modules = _ModuleMap(self.a.nodes, self.b.nodes, self.pairs)
        for radius in reversed(range(_HOPS)):
            self._by(partial(_module_label, radius), modules=modules)
        for label in (_kind, _family_label):
            left, right = self._left()
            there = _buckets((self.b.nodes[n].module, n) for n in right)
            for module, names in _buckets((modules.resolve(self.a.nodes[n].module), n) for n in left).items():
                self._align(names, there.get(module, []), label)

    def _align(self, left: list[str], right: list[str], label: _Label) -> None:
        """Pair the longest common subsequence of two node lists (very long ones: the first of each label with the first, and so on)."""
        if len(left) * len(right) > _LONGEST:
            there = _buckets((label(self.b, n), n) for n in right)
            for key, names in _buckets((label(self.a, n), n) for n in left).items():
                for a, b in zip(names, there.get(key, []), strict=False):
                    self._pair(a, b)
            return
        tokens_a, tokens_b = [label(self.a, n) for n in left], [label(self.b, n) for n in right]
        for block in SequenceMatcher(None, tokens_a, tokens_b, autojunk=False).get_matching_blocks():
            for i in range(block.size):
                self._pair(left[block.a + i], right[block.b + i])

    def _by_neighbours(self) -> None:
        """A leftover node takes the leftover node that stands between the partners of its neighbours, whatever its operator."""
        for name in self._left()[0]:
            sources, users = self.a.neighbours(name)
            from_sources = {u for s in sources if s in self.pairs for u in self.b.graph.successors(self.pairs[s])}
            from_users = {s for u in users if u in self.pairs for s in self.b.graph.predecessors(self.pairs[u])}
            open_nodes = sorted((from_sources & from_users) - self.taken, key=self.b.order.__getitem__)
            if open_nodes:
                self._pair(name, max(open_nodes, key=lambda n: self._likeness(name, n)))

    def _likeness(self, a: str, b: str) -> tuple[bool, bool]:
        before, after = self.a.nodes[a], self.b.nodes[b]
        return before.module == after.module, before.type == after.type


class _ModuleMap:
    """Module paths of one program to those of the other: voted for by pairs, else by the nearest mapped parent, else the same path."""

    def __init__(self, before: dict[str, NodeView], after: dict[str, NodeView], pairs: Pairs) -> None:
        votes: Counter[tuple[str, str]] = Counter()
        for a, b in pairs.items():
            votes.update(_path_pairs(before[a].module, after[b].module))
        self._before, self._after = {v.module for v in before.values()}, {v.module for v in after.values()}
        self._map: dict[str, str | None] = {}
        self._claimed: set[str] = set()
        for (a, b), _ in votes.most_common():
            if a not in self._map and b not in self._claimed:
                self._map[a] = b
                self._claimed.add(b)

    def resolve(self, path: str) -> str | None:
        """The other program's path, or None when its place is taken by another module."""
        if path not in self._map:
            parent, dot, leaf = path.rpartition(".")
            above = self.resolve(parent) if parent else ""
            candidate = None if above is None else f"{above}{dot}{leaf}"
            self._map[path] = None if candidate in self._claimed else candidate
        return self._map[path]

    def agree(self, a: str, b: str) -> bool:
        """Whether `b` is the place of `a`, or both are paths that the other program does not have."""
        return self.resolve(a) == b or (self.resolve(a) not in self._after and b not in self._before)

    def translate(self, key: Any) -> Hashable:
        """A key whose first element is a module path, in the other program's terms."""
        return (resolved, *key[1:]) if (resolved := self.resolve(key[0])) is not None else None


def _path_pairs(a: str, b: str) -> Iterable[tuple[str, str]]:
    """Both paths and their parents, level by level from the leaf."""
    while a and b:
        yield a, b
        a, b = a.rpartition(".")[0], b.rpartition(".")[0]


def _buckets(items: Iterable[tuple[Hashable, str]]) -> dict[Hashable, list[str]]:
    found: dict[Hashable, list[str]] = defaultdict(list)
    for key, name in items:
        if key is not None:
            found[key].append(name)
    return found


def _module_label(radius: int, side: _Side, name: str) -> Hashable:
    return side.nodes[name].module, _kind(side, name), side.hashes[name][radius]


def _family_label(side: _Side, name: str) -> Hashable:
    return family(side.nodes[name])


def _kind(side: _Side, name: str) -> Hashable:
    return family(side.nodes[name]), side.nodes[name].type


def _fingerprint(side: _Side, name: str) -> Hashable:
    """Checksum of a sample of the weights a node reads; None without a weight that tells it from others."""
    tensors = [t for t in side.tensors[name] if t.dim() > 1 or t.numel() > 1]
    samples = [_sample(t) for t in tensors]
    if not samples or all(bool((s == s[0]).all()) for s in samples):
        return None
    return family(side.nodes[name]), *((tuple(t.shape), str(t.dtype), zlib.crc32(_bits(s))) for t, s in zip(tensors, samples, strict=True))


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)].cpu()


def _bits(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
