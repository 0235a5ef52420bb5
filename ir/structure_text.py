"""The structure of a program as a tree of lines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .axes import AxisClass
from .finders.attention import Attention
from .finders.feed_forward import FeedForward
from .finders.residual import Block, BlockKind
from .nodes import op_name
from .sites import WeightSite

if TYPE_CHECKING:
    from .structure import Structure

MANY = 3  # more classes than this that are pinned for like reasons are one line


@dataclass(frozen=True)
class Line:
    """A line of the tree and those below it."""

    text: str
    below: tuple[Line, ...] = ()

    def draw(self, first: str = "", rest: str = "") -> str:
        """The tree with box characters."""
        lines = [first + self.text]
        for i, line in enumerate(self.below):
            last = i == len(self.below) - 1
            lines.append(line.draw(rest + ("└── " if last else "├── "), rest + ("    " if last else "│   ")))
        return "\n".join(lines)


def structure_tree(structure: Structure) -> Line:
    """Streams, layers with their blocks, sites outside of blocks, remaining classes, operators without a rule."""
    return _Tree(structure).root()


class _Tree:
    """Builds the lines and remembers which classes have had theirs."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.analysis = structure.analysis
        self.shown: set[AxisClass] = set()

    def root(self) -> Line:
        s = self.structure
        free = sum(not c.pinned for c in self.analysis.classes)
        classes = _count(len(self.analysis.classes), "axis class", "axis classes")
        title = f"{_count(len(s.layers), 'layer')}, {_count(len(s.blocks), 'residual block')}, {classes}"
        parts = [*self.streams(), *self.layers(), *self.outside()]
        rest = tuple(self.rest([c for c in self.analysis.classes if c not in self.shown]))
        parts += [Line("other axis classes", rest)] if rest else []
        unruled = tuple(Line(f"{op_name(n)} at {n.name}: {why}") for n, why in self.analysis.unruled)
        parts.append(Line("operators without an axis rule", unruled) if unruled else Line("every operator has an axis rule"))
        return Line(f"{title} ({free} free)", tuple(parts))

    def streams(self) -> Iterator[Line]:
        for one in self.structure.residuals:
            adds = _count(len(one.adds), "block")
            yield Line(f"residual stream {one.index}: {adds}, from {one.source.name}", tuple(self.classes(one.classes)))

    def layers(self) -> Iterator[Line]:
        for i, blocks in enumerate(self.structure.layers):
            yield Line(f"layer {i}" + (f": {blocks[0].path}" if blocks[0].path else ""), tuple(line for b in blocks for line in self.block(b)))

    def block(self, block: Block) -> Iterator[Line]:
        """One line for each attention and feed-forward network; one for the block when it is something else."""
        refusal = "" if block.droppable else f"; cannot be dropped: {block.why_not}"
        for attention in block.attentions:
            yield Line(_describe_attention(attention) + refusal, tuple(self.attention(attention, block.path)))
        named = {s for a in block.attentions for s in a.sites}
        whole = block.kind is BlockKind.FEED_FORWARD or block.attentions
        for network in block.feed_forwards if whole else ():
            named |= set(network.sites)
            yield Line(_describe_feed_forward(network) + refusal, tuple(self.feed_forward(network, block.path)))
        left = [s for s in block.sites if s not in named]
        if left:
            made = {c for s in left for c in self.made_by(s)} - self.shown
            below = [*(_site(s, block.path) for s in left), *self.classes(c for c in self.analysis.classes if c in made)]
            yield Line(("also" if named else block.kind.value.replace("_", "-")) + refusal, tuple(below))

    def attention(self, one: Attention, path: str) -> Iterator[Line]:
        if one.fused and one.q == one.k == one.v and one.q is not None:
            yield _site(one.q, path, "q, k, v")
        else:
            yield from (_site(s, path, label) for label, s in (("q", one.q), ("k", one.k), ("v", one.v)) if s is not None)
        if one.o is not None:
            yield _site(one.o, path, "o")
        yield from self.classes(c for c in (one.kv_groups, one.heads, *one.qk_dims, *one.v_dims) if c is not None)

    def feed_forward(self, one: FeedForward, path: str) -> Iterator[Line]:
        labels = {one.gate: "gate", one.up: "up", one.down: "down"} if not one.fused else {one.up: "gate, up", one.down: "down"}
        yield from (_site(s, path, labels.get(s, "up")) for s in one.sites)
        yield from self.classes(one.hiddens)

    def outside(self) -> Iterator[Line]:
        """Sites that no block has."""
        s = self.structure
        inside = {site for b in s.blocks for site in b.sites}
        sites = [site for site in self.analysis.program.sites() if site not in inside]
        labels = dict.fromkeys(s.embeddings, "embedding") | dict.fromkeys(s.heads, "output")
        networks = tuple(Line(_describe_feed_forward(f), tuple(self.feed_forward(f, ""))) for f in s.feed_forwards if not set(f.sites) & inside)
        named = {site for f in s.feed_forwards for site in f.sites if not set(f.sites) & inside}
        lines = (*networks, *(_site(site, "", labels.get(site, "")) for site in sites if site not in named))
        if lines:
            yield Line("outside of blocks", lines)

    def made_by(self, site: WeightSite) -> list[AxisClass]:
        held = {(site.tensors[0], site.out_axis)}
        return [c for c in self.structure.roles if any((o.tensor, o.dim) in held for o in c.occurrences)]

    def rest(self, left: list[AxisClass]) -> Iterator[Line]:
        """The remaining classes; many without a role that are pinned for one reason (but for the node or tensor it names) are one line."""
        names = {n.name for n in self.analysis.axes} | set(self.analysis.tensors)
        like: dict[str, list[AxisClass]] = defaultdict(list)
        for one in left:
            if one.pinned and self.structure.role_of(one) is None:
                like[" ".join("..." if word in names else word for word in one.pinned[0].split())].append(one)
        many = {reason: group for reason, group in like.items() if len(group) > MANY}
        folded = {c for group in many.values() for c in group}
        yield from (self.one_class(c) for c in left if c not in folded)
        for reason, group in many.items():
            low, high = min(c.size for c in group), max(c.size for c in group)
            yield Line(f"no role, {len(group)} classes of size {low if low == high else f'{low} to {high}'}; pinned: {reason}")

    def classes(self, found: Iterable[AxisClass]) -> Iterator[Line]:
        for one in dict.fromkeys(found):
            yield self.one_class(one)

    def one_class(self, one: AxisClass) -> Line:
        self.shown.add(one)
        role = self.structure.role_of(one)
        where = _count(len({o.tensor for o in one.occurrences}), "tensor")
        text = f"{role.value if role else 'no role'}, size {one.size}: {one.name}, in {where}"
        return Line(text + (f"; pinned: {one.pinned[0]}" if one.pinned else ""))


def _describe_attention(one: Attention) -> str:
    heads = _count(one.num_heads, "head")
    grouped = f" over {_count(one.num_kv_heads, 'key/value head')}" if one.num_kv_heads != one.num_heads else ""
    notes = {"cross": one.cross, "causal": one.causal, "rotary": one.rotary, "normalised queries and keys": one.qk_norm}
    return ", ".join([f"attention, {heads}{grouped}", *(note for note, holds in notes.items() if holds)])


def _describe_feed_forward(one: FeedForward) -> str:
    return ", ".join(["feed-forward", *(["gated"] if one.gate is not None else []), one.activation or "no activation"])


def _site(site: WeightSite, path: str, label: str = "") -> Line:
    name = site.name.removeprefix(f"{path}.") if path else site.name
    return Line(f"{label + ' ' if label else ''}{name}: {site.kind.value} {list(site.shape)}")


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
