"""Droppable blocks: single-entry single-exit regions of the dataflow that identity can replace.

Values are nodes, data dependence is edges. u → v is a *link* when every path into v passes u and every path out of u
passes v, with nothing in between that has the same property (v is u's immediate post-dominator and u dominates v).
What steers a branch from the side does not count as a path into it: masks and positions, and, where the network has
several inputs, whatever does not depend on the input that the stream comes from (a decoder's view of its encoder).
Links form chains, and chains nest: the branch of a residual addition is a chain inside the link of the addition. On a
chain, the stretch between two points of one shape can be replaced by identity. A block is the shortest such stretch
that holds a contraction with parameters, together with the norm and activation that follow it; taken from the front of
the chain they do not overlap, so any subset can be dropped. Plain layers inside a residual block are not listed:
the residual block is the unit of depth there.

Dominance in an acyclic graph: Cooper, Harvey and Kennedy, "A simple, fast dominance algorithm", 2001. Regions that
nest: Johnson, Pearson and Pingali, "The program structure tree", PLDI 1994.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from treesurgeon.engine.flow import Kinds, kernel_leaves
from treesurgeon.engine.jaxprs import Operand, Program, is_float, live

MOST_ORIGINS = 8


@dataclass(frozen=True)
class Region:
    """A block before it has a name: from value `entry` to value `exit`."""

    entry: int
    exit: int
    kernels: frozenset[int]
    residual: bool


@dataclass(eq=False)
class _Link:
    kernels: set[int] = field(default_factory=set)
    leaves: set[int] = field(default_factory=set)
    residual: bool = False


def find_regions(
    program: Program,
    kinds: Kinds,
    roots: Sequence[Operand],
    module: Callable[[int], str],
    stepping: Collection[int] = (),
) -> list[Region]:
    """All blocks of a program in order of execution; `module` names the module of a parameter leaf.

    The equations `stepping` are loops whose steps are blocks already: they do not make a block.
    """
    flow = _Flow(program, kinds, roots)
    found = _regions(_Streams(flow, flow.signal), program, kinds, module, stepping)
    exits = {region.exit for region in found}
    spans = _Spans()
    for region in found:
        spans.add(flow.node[region.entry], flow.node[region.exit])
    origins = flow.origins()
    for origin in origins if 1 < len(origins) <= MOST_ORIGINS else ():
        stream = _Streams(flow, flow.reach(origin))
        for region in _regions(stream, program, kinds, module, stepping):
            if region.exit in exits or not region.residual:
                continue
            span = flow.node[region.entry], flow.node[region.exit]
            if spans.nests(*span):
                found.append(region)
                exits.add(region.exit)
                spans.add(*span)
    return sorted(found, key=lambda region: flow.node[region.exit])


def _regions(
    flow: _Streams, program: Program, kinds: Kinds, module: Callable[[int], str], stepping: Collection[int]
) -> list[Region]:
    links = _fill_links(flow, program, kinds, stepping)
    found: list[tuple[Region, int | None]] = []
    for chain in flow.chains():
        surrounding = flow.enclosing(chain[0])
        for region in _stretches(chain, flow, links, program, module):
            found.append((region, surrounding))
    outer = set()
    for region, _ in found:
        node = flow.node[region.exit]
        while node != flow.node[region.entry]:
            node = flow.prev[node]
            outer.add(node)
    kept = []
    for region, link in found:
        inside = False
        while link is not None:
            inside = inside or link in outer
            link = flow.link_around(link)
        if region.residual or not inside:
            kept.append(region)
    return kept


class _Spans:
    """The nodes from entry to exit of regions: where some begin or end, how far the longest reaches."""

    def __init__(self):
        self.ends_at: dict[int, int] = {}
        self.begins_at: dict[int, int] = {}

    def add(self, start: int, end: int) -> None:
        """Take in one that nests with the others."""
        self.ends_at[start] = max(end, self.ends_at.get(start, end))
        self.begins_at[end] = min(start, self.begins_at.get(end, start))

    def nests(self, start: int, end: int) -> bool:
        """Whether it is apart from every other one, or one of the two is inside the other."""
        return (
            all(
                self.begins_at.get(n, start) >= start and self.ends_at.get(n, end) <= end for n in range(start + 1, end)
            )
            and end not in self.begins_at
        )


class _Flow:
    """Live data values as nodes: node n < len(inputs) is input n, the others are equations, -1 is the end.

    `signal` holds the nodes that carry the network's activations: floating-point values that come from inputs or that
    parameters had a part in. Masks and positions, which steer them from the side, are no signal. No block reaches
    across `barriers`: identity would let derivatives through where they are stopped.
    """

    def __init__(self, program: Program, kinds: Kinds, roots: Sequence[Operand]):
        shift = len(program.inputs)
        alive = live(program, roots)
        used = {v for i in alive for v in program.eqns[i].ins} | set(roots)
        self.node: dict[int, int] = {}
        self.value: dict[int, int] = {}
        for n, v in enumerate(program.inputs):
            if kinds.data[v]:
                self.node[v], self.value[n] = n, v
        for i, eqn in enumerate(program.eqns):
            if i in alive and any(kinds.data[v] for v in eqn.outs):
                for v in eqn.outs:
                    self.node[v] = shift + i
                read = [v for v in eqn.outs if v in used]
                if len(read) == 1:
                    self.value[shift + i] = read[0]
        self.shift = shift
        self.nodes = sorted(set(self.node.values()))
        self.feeds = {n: self._feeding(program, n) for n in self.nodes}
        fed: dict[int, list[int]] = {n: [] for n in self.nodes}
        for n, sources in self.feeds.items():
            for source in sources:
                fed[source].append(n)
        for v in roots:
            if isinstance(v, int) and v in self.node:
                fed[self.node[v]].append(-1)
        self.ipdom = _dominators(self.nodes[::-1], {n: s or [-1] for n, s in fed.items()})
        self.pdominates = _ancestry(self.ipdom)
        eqns = program.eqns
        self.barriers = {n for n in self.nodes if n >= shift and eqns[n - shift].name == "stop_gradient"}
        self.signal: set[int] = set()
        for n in self.nodes:
            if n < shift:
                carries, outs = True, (program.inputs[n],)
            else:
                eqn = program.eqns[n - shift]
                carries = any(s in self.signal for s in self.feeds[n]) or any(kinds.of(v)[1] for v in eqn.ins)
                outs = eqn.outs
            if carries and any(is_float(program.avals[v]) for v in outs):
                self.signal.add(n)

    def _feeding(self, program: Program, n: int) -> list[int]:
        if n < self.shift:
            return []
        ins = program.eqns[n - self.shift].ins
        return sorted({self.node[v] for v in ins if isinstance(v, int) and v in self.node})

    def origins(self) -> list[int]:
        """The signal nodes that no other one feeds."""
        return [n for n in self.nodes if n in self.signal and not any(s in self.signal for s in self.feeds[n])]

    def reach(self, origin: int) -> set[int]:
        """The signal nodes that depend on one of them."""
        out = {origin}
        for n in self.nodes:
            if n in self.signal and any(s in out for s in self.feeds[n]):
                out.add(n)
        return out


class _Streams:
    """Links and chains among some nodes of the dataflow, what reaches them from elsewhere left aside."""

    def __init__(self, flow: _Flow, within: set[int]):
        self.shift, self.node, self.value = flow.shift, flow.node, flow.value
        self.nodes = [n for n in flow.nodes if n in within]
        feeds = {n: [s for s in flow.feeds[n] if s in within] or [-1] for n in self.nodes}
        self.idom = _dominators(self.nodes, feeds)
        inside = _ancestry(self.idom)
        self.pdominates = flow.pdominates
        # With masks left aside several u may have one v: the nearest is the link.
        self.prev = {
            v: u for u in self.nodes if (v := flow.ipdom[u]) in within and inside(u, v) and v not in flow.barriers
        }
        self.next = {u: v for v, u in self.prev.items()}
        self._head: dict[int, int] = {}
        self._around: dict[int, int | None] = {}
        for n in self.nodes:
            self._head[n] = self._head[self.prev[n]] if n in self.prev else n

    def chains(self) -> list[list[int]]:
        """Every maximal chain of links, as its nodes in order."""
        out = []
        for n in self.nodes:
            if n not in self.prev and n in self.next:
                chain = [n]
                while chain[-1] in self.next:
                    chain.append(self.next[chain[-1]])
                out.append(chain)
        return out

    def enclosing(self, n: int) -> int | None:
        """The start of the smallest link that the chain of node `n` lies in."""
        head = self._head[n]
        if head not in self._around:
            a = self.idom[head]
            while a != -1 and not (a in self.next and self.pdominates(self.next[a], head)):
                a = self.idom[a]
            self._around[head] = None if a == -1 else a
        return self._around[head]

    def link_of(self, n: int) -> int | None:
        """The start of the smallest link whose work includes node `n`."""
        return self.prev.get(n, self.enclosing(n))

    def link_around(self, link: int) -> int | None:
        """The start of the smallest link around a link."""
        return self.enclosing(link)


def _dominators(order: Sequence[int], sources: dict[int, list[int]]) -> dict[int, int]:
    idom: dict[int, int] = {}
    depth = {-1: 0}
    for n in order:
        a, *rest = sources[n]
        for b in rest:
            while a != b:
                if depth[a] >= depth[b]:
                    a = idom[a]
                else:
                    b = idom[b]
        idom[n], depth[n] = a, depth[a] + 1
    return idom


def _ancestry(parent: dict[int, int]) -> Callable[[int, int], bool]:
    """A test whether a is an ancestor of b (or b itself) in the tree, in constant time."""
    children: dict[int, list[int]] = {}
    for n, p in parent.items():
        children.setdefault(p, []).append(n)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    clock = 0
    stack = [(-1, False)]
    while stack:
        n, done = stack.pop()
        if done:
            last[n] = clock
            continue
        first[n] = clock = clock + 1
        stack.append((n, True))
        stack += [(c, False) for c in children.get(n, ())]
    return lambda a, b: first[a] <= first[b] <= last[a]


def _fill_links(flow: _Streams, program: Program, kinds: Kinds, stepping: Collection[int]) -> dict[int, _Link]:
    links: dict[int, _Link] = {u: _Link() for u in flow.next}
    for n in flow.nodes:
        if n < flow.shift:
            continue
        eqn = program.eqns[n - flow.shift]
        i = n - flow.shift
        kernels = frozenset() if i in stepping else kernel_leaves(program, i, kinds)
        leaves = {leaf for v in eqn.ins if isinstance(v, int) for leaf in kinds.leaves[v] or ()}
        if not leaves:
            continue
        link, own = flow.link_of(n), True
        while link is not None:
            links[link].leaves |= leaves
            if kernels:
                links[link].kernels |= kernels
                links[link].residual |= not (own and flow.next[link] == n)
            link, own = flow.link_around(link), False
    return links


def _stretches(
    chain: list[int],
    flow: _Streams,
    links: dict[int, _Link],
    program: Program,
    module: Callable[[int], str],
) -> list[Region]:
    def kind(n: int):
        aval = program.avals[flow.value[n]] if n in flow.value else None
        return None if aval is None or not aval.shape else (tuple(map(str, aval.shape)), str(aval.dtype))

    kinds_ = [kind(n) for n in chain]
    places: dict = {}
    out: list[Region] = []
    free, last, j = 0, -1, 0
    while j < len(chain):
        if j and links[chain[j - 1]].kernels:
            last = j - 1
        same = places.get(kinds_[j], [])
        at = bisect_right(same, last) - 1
        if kinds_[j] is not None and last >= free and at >= 0 and same[at] >= free:
            i = same[at]
            end = _extend(chain, i, j, kinds_, links, module)
            stretch = [links[n] for n in chain[i:end]]
            kernels = frozenset().union(*(link.kernels for link in stretch))
            residual = any(link.residual for link in stretch)
            out.append(Region(flow.value[chain[i]], flow.value[chain[end]], kernels, residual))
            for k in range(j, end):
                places.setdefault(kinds_[k], []).append(k)
            free = j = end
        places.setdefault(kinds_[j], []).append(j)
        j += 1
    return out


def _extend(
    chain: list[int], i: int, j: int, kinds_: list, links: dict[int, _Link], module: Callable[[int], str]
) -> int:
    """Take in the norm and activation that follow the contraction, up to the next contraction or change of shape."""
    inside = [links[n] for n in chain[i:j]]
    residual = any(link.residual for link in inside)
    prefix = common_prefix([module(leaf) for link in inside for leaf in sorted(link.leaves)])
    homes = {prefix, prefix.rpartition("/")[0]} - {""}
    while j + 1 < len(chain) and kinds_[j + 1] == kinds_[j]:
        link = links[chain[j]]
        foreign = [leaf for leaf in link.leaves if not any(_under(module(leaf), home) for home in homes)]
        if link.kernels or (residual and foreign):
            break
        j += 1
    return j


def _under(path: str, home: str) -> bool:
    return path == home or path.startswith(home + "/")


def common_prefix(paths: Sequence[str]) -> str:
    """The longest path of which every path is a part: `a/b` for `a/b/c` and `a/b/d`."""
    parts = [path.split("/") for path in paths]
    if not parts:
        return ""
    out = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        out.append(column[0])
    return "/".join(out)
