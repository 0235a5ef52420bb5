"""The algebra of axes: an axis is a product of atoms, and an atom may turn out to be a product or a concatenation of smaller ones.

Written outer to inner: a view of 64 channels as 8 heads of 8 makes the axis `64 = 8 x 8`; a split of 96 into query, key and value makes it
`96 = 32 | 32 | 32`. Operators unify axes; unification merges atoms and refines them until both sides say the same. What stays whole is a *leaf*.
This replaces the node types, index mappings and special cases of dependency graphs (Fang et al., "DepGraph", CVPR 2023, arXiv 2301.12900) by one
data structure. Axes of size 1 have no atoms: the empty product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate
from math import prod

DEPTH = 24  # deeper refinements are shifts of an axis against itself, which never settle
PIECES = 512  # more pieces than this mean the same


class Kind(Enum):
    """What an atom is made of."""

    LEAF = "leaf"
    PRODUCT = "product"
    CONCAT = "concat"


@dataclass(eq=False)
class Atom:
    """A factor of an axis: a node of the union-find forest. `parts` are factors (one axis) of a product, or the axes of a concatenation."""

    size: int
    number: int
    parent: Atom | None = None
    kind: Kind = Kind.LEAF
    parts: tuple[tuple[Atom, ...], ...] = ()
    pins: list[str] = field(default_factory=list)
    reductions: list[str] = field(default_factory=list)

    def root(self) -> Atom:
        """The atom that stands for everything merged with this one."""
        atom = self
        while atom.parent is not None:
            atom = atom.parent
        return atom


Axis = tuple[Atom, ...]


class MisalignedError(Exception):
    """Two axes that no refinement makes equal; both have been pinned."""


class Algebra:
    """Makes atoms and keeps what is known about them."""

    def __init__(self) -> None:
        self.atoms: list[Atom] = []

    def axis(self, size: int) -> Axis:
        """A new axis: one leaf, or none for size 1."""
        if size == 1:
            return ()
        atom = Atom(size, len(self.atoms))
        self.atoms.append(atom)
        return (atom,)

    def pin(self, axis: Axis, why: str) -> None:
        """Forbid removing anything from the axis."""
        for atom in axis:
            atom.pins.append(why)

    def reduce(self, axis: Axis, node: str) -> None:
        """Note that `node` averages or normalises over the axis, so that removing an index differs from zeroing it."""
        for atom in axis:
            atom.reductions.append(node)

    def unify(self, a: Axis, b: Axis, where: str, depth: int = 0) -> Axis:
        """Make two axes of equal size the same axis; axes that cannot be aligned are pinned. Returns the first."""
        try:
            self._unify(a, b, where, depth)
        except MisalignedError:
            if depth:
                raise
            self.pin(a + b, f"axes that do not line up at {where}")
        return a

    def _unify(self, a: Axis, b: Axis, where: str, depth: int) -> None:
        left, right = factors(a), factors(b)
        if size_of(a) != size_of(b) or size_of(a) == 0 or depth > DEPTH:
            raise MisalignedError
        while left and right:
            x, y = left[0], right[0]
            if x is y:
                left, right = left[1:], right[1:]
            elif x.size == y.size:
                self._merge(x, y, where, depth)
                left, right = factors(left[1:]), factors(right[1:])
            elif x.size % y.size == 0:
                left = factors(self.divide((x,), y.size)) + left[1:]
            elif y.size % x.size == 0:
                right = factors(self.divide((y,), x.size)) + right[1:]
            else:
                raise MisalignedError

    def _merge(self, x: Atom, y: Atom, where: str, depth: int) -> None:
        if x.kind is Kind.LEAF or y.kind is Kind.LEAF:
            leaf, other = (x, y) if x.kind is Kind.LEAF else (y, x)
            leaf.parent = other
            return
        cuts = sorted({c for atom in (x, y) for c in accumulate(map(size_of, pieces((atom,))))})
        sizes = [high - low for low, high in zip([0, *cuts], cuts, strict=False)]
        for p, q in zip(self.split((x,), sizes), self.split((y,), sizes), strict=True):
            self.unify(p, q, where, depth + 1)
        if x.root() is not y.root():
            y.root().parent = x.root()

    def divide(self, axis: Axis, outer: int) -> Axis:
        """The axis as `(outer, rest)`; raises `MisalignedError` when its atoms do not split there."""
        if size_of(axis) == 0:
            raise MisalignedError
        head: list[Atom] = []
        rest = factors(axis)
        need = outer
        while need > 1:
            if not rest:
                raise MisalignedError
            first = rest[0]
            if need % first.size == 0:
                head.append(first)
                rest, need = rest[1:], need // first.size
            elif first.size % need == 0:
                self._factor(first, need)
                rest = factors(rest)
            else:
                raise MisalignedError
        return (*head, *rest)

    def grouped(self, axis: Axis, outer: int) -> tuple[Axis, Axis]:
        """The axis as two axes, the first of size `outer`."""
        atoms = factors(self.divide(axis, outer))
        count = next(i for i in range(len(atoms) + 1) if size_of(atoms[:i]) == outer)
        return tuple(atoms[:count]), tuple(atoms[count:])

    def _factor(self, atom: Atom, outer: int) -> None:
        """Make a leaf or a concatenation a product of two."""
        inner = self.axis(atom.size // outer)
        if atom.kind is Kind.LEAF:
            atom.kind, atom.parts = Kind.PRODUCT, (self.axis(outer) + inner,)
            return
        step = size_of(inner)
        if any(size_of(p) % step for p in atom.parts):
            raise MisalignedError
        heads = []
        for part in atom.parts:
            head = self.axis(size_of(part) // step)
            self.unify(part, head + inner, "a concatenation seen as a product", 1)
            heads.append(head)
        atom.kind, atom.parts = Kind.PRODUCT, (self.concat(heads) + inner,)

    def split(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """Cut the axis into consecutive parts; raises `MisalignedError` when a cut falls inside an inner factor."""
        rest = list(pieces(axis))
        if len(rest) > PIECES or sum(sizes) != size_of(axis) or any(s <= 0 for s in sizes):
            raise MisalignedError
        out = []
        for size in sizes:
            taken: list[Axis] = []
            while (need := size - sum(map(size_of, taken))) > 0:
                if size_of(rest[0]) > need:
                    rest[:1] = self._cut(rest[0], need)
                taken.append(rest.pop(0))
            out.append(self.concat(taken))
        return out

    def _cut(self, piece: Axis, at: int) -> list[Axis]:
        atoms = factors(piece)
        step = size_of(atoms[1:])
        if at % step:
            raise MisalignedError
        first = atoms[0]
        first.kind, first.parts = Kind.CONCAT, (self.axis(at // step), self.axis((first.size * step - at) // step))
        return [(*p, *atoms[1:]) for p in first.parts]

    def concat(self, axes: Sequence[Axis]) -> Axis:
        """One axis that is the given ones after each other; empty ones leave no trace."""
        axes = [a for a in axes if size_of(a)] or list(axes[:1])
        if len(axes) == 1:
            return axes[0]
        joined = self.axis(sum(map(size_of, axes)))
        joined[0].kind, joined[0].parts = Kind.CONCAT, tuple(axes)
        return joined

    def settle(self) -> None:
        """Hand pins and reductions down to the leaves; call once, after the last unification."""
        for atom in self.atoms:
            for leaf in {id(x): x for x in leaves((atom,))}.values():
                if leaf is not atom:
                    leaf.pins += [p for p in atom.pins if p not in leaf.pins]
                    leaf.reductions += [r for r in atom.reductions if r not in leaf.reductions]


def size_of(axis: Sequence[Atom]) -> int:
    """Number of positions on the axis."""
    return prod(a.size for a in axis)


def factors(axis: Sequence[Atom]) -> Axis:
    """The axis as a product of leaves and concatenations."""
    out: list[Atom] = []
    for atom in axis:
        root = atom.root()
        out += factors(root.parts[0]) if root.kind is Kind.PRODUCT else (root,)
    return tuple(out)


def pieces(axis: Axis) -> Iterator[Axis]:
    """The axis as a concatenation of products whose outermost factor is a leaf."""
    atoms = factors(axis)
    if atoms and atoms[0].kind is Kind.CONCAT:
        for part in atoms[0].parts:
            for piece in pieces(part):
                yield (*piece, *atoms[1:])
    else:
        yield atoms


def leaves(axis: Sequence[Atom]) -> Iterator[Atom]:
    """The leaves of the axis, outer to inner, as often as they occur."""
    for atom in factors(axis):
        if atom.kind is Kind.LEAF:
            yield atom
        for part in atom.parts:
            yield from leaves(part)


def squared(axis: Sequence[Atom]) -> Iterator[Atom]:
    """Leaves that one position of the axis belongs to twice, at different indices."""
    seen: set[Atom] = set()
    for atom in factors(axis):
        own = set(leaves((atom,)))
        yield from seen & own
        seen |= own
        for part in atom.parts:
            yield from squared(part)


def text(axis: Axis, names: dict[Atom, str] | None = None) -> str:
    """The axis as text: `4x8`, `(32|32)x2`, `1`."""
    names = names or {}
    return "x".join(_text(a, names) for a in factors(axis)) or "1"


def _text(atom: Atom, names: dict[Atom, str]) -> str:
    if atom.kind is Kind.LEAF:
        return names.get(atom, str(atom.size))
    return "(" + "|".join(text(p, names) for p in atom.parts) + ")"
