"""Loops in Python, of which a graph holds every round: equal operations on different tensors become one.

A loop over data, sites or times traces into thousands of operations on single numbers. Those that do the same and do
not wait for one another run as one, on their inputs side by side, and long sums as sums of vectors. What a round takes
from the round before it waits for it: that becomes a scan (``recursions.py``).

Reference: Neubig, Goldberg and Dyer (2017), "On-the-fly operation batching in dynamic computation graphs",
https://arxiv.org/abs/1705.07860
"""

from __future__ import annotations

import copy
import functools
import heapq
import itertools
import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from bbvi_conv.program.constants import changes, overwritten
from bbvi_conv.program.graph_module import WrittenLate, constant
from bbvi_conv.program.pieces import MANY, VIEWS, Pieces, taken
from bbvi_conv.program.recursions import Recursion, recursions

_aten: Any = torch.ops.aten

WORTH = 300
"""Operations of a graph from which it is looked through."""

SMALL = 2**14
"""Numbers in a tensor up to which it is put beside others: operations on larger ones are worth a call of their own."""

BACK = 8
"""Operations back to which those that run as one have to be alike."""

GAIN = 2
"""Times fewer operations that the result has to have."""

_WITH_NUMBERS = (_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor)


_Inputs = Mapping[Node, tuple[Node, ...]]


class Group(NamedTuple):
    """Operations that run as one; or a sum of many ``terms``; or a ``recursion``, of which it has the first node."""

    nodes: tuple[Node, ...]
    terms: tuple[Node, ...] = ()
    recursion: Recursion | None = None


class Plan(NamedTuple):
    """A graph like another, and its groups in an order in which they can run."""

    graph: GraphModule
    groups: list[Group]


def plan(original: GraphModule) -> Plan | None:
    """Groups of a copy of a graph; None where there is too little to gain.

    Numbers of the copy that differ from round to round are constants.
    """
    if sum(node.op == "call_function" for node in original.graph.nodes) < WORTH:
        return None
    graph = WrittenLate(original, copy.deepcopy(original.graph))
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    _keep_numbers_apart(graph, nodes)
    ins = {node: inputs(node) for node in graph.graph.nodes}
    memory = _memory(graph, nodes)
    free = _free(graph).difference(memory.met)
    sums = _sums([node for node in nodes if node not in memory.met], ins)
    inner = {node for terms, between in sums.values() for node in between}
    waiting = {n: sums[n][0] if n in sums else ins[n] for n in nodes if n not in free and n not in inner}
    own = _signatures(graph.graph.nodes, free)

    def groups(loops: Sequence[Recursion]) -> list[Group]:
        tasks = _tasks(waiting, free, loops, memory)
        return list(_scheduled(tasks, sums, _alike(own, ins, loops, memory.met), loops))

    found = groups(())
    alone = {group.nodes[0] for group in found if len(group.nodes) == 1 and not group.terms}.difference(memory.met)
    alone |= {part for node in alone for part in node.users if part.target is operator.getitem}
    loops = recursions([node for node in nodes if node in alone], own.__getitem__, ins.__getitem__)
    if loops:
        found = groups(loops) or found
    size = sum(len(group.recursion.reads) if group.recursion else 1 for group in found)
    return Plan(graph, found) if found and GAIN * size <= len(nodes) else None


def batched(
    planned: Plan, vectorised: Callable[..., Any], repeated: Callable[..., Sequence[Tensor]]
) -> Callable[..., Any]:
    """The function of a graph, run group by group.

    ``vectorised(function, mapped)`` maps a function over the first dimension of some of its arguments, and
    ``repeated(step, carry, moving, fixed, length)`` gives what the rounds of a scan give.
    """
    graph, pieces = planned.graph, Pieces()

    def run(*flat: Tensor) -> Any:
        known = _Values(graph, pieces, flat)
        for group in planned.groups:
            first = group.nodes[0]
            if group.recursion is not None:
                loop = group.recursion
                carry, fixed = ([known.of(node) for node in nodes] for nodes in (loop.carry, loop.fixed))
                moving = [known.beside(nodes) for nodes in loop.moving]
                given = repeated(_round(loop), carry, moving, fixed, len(loop.rounds))
                for place, column in zip(loop.gives, given, strict=True):
                    known.keep([nodes[place] for nodes in loop.rounds], column)
            elif group.terms:
                known.alone[first] = known.total(group.terms)
            elif len(group.nodes) == 1:
                known.alone[first] = call(first, *map(known.of, inputs(first)))
            else:
                columns = list(zip(*map(inputs, group.nodes), strict=True))
                shared = [len(set(column)) == 1 for column in columns]
                args = [known.of(c[0]) if same else known.beside(c) for c, same in zip(columns, shared, strict=True)]
                found = vectorised(functools.partial(call, first), [not same for same in shared])(*args)
                if isinstance(found, Tensor):
                    known.keep(group.nodes, found)
                    continue
                for number, rows in enumerate(found):  # of operations that give several, the nodes that pick one
                    known.keep([[user for user in n.users if user.args[1] == number] for n in group.nodes], rows)
        (results,) = graph.graph.output_node().args
        return map_arg(results, known.of)

    return run


class _Values:
    """What the nodes of a graph have given so far: ``alone`` by themselves, others in rows."""

    def __init__(self, graph: GraphModule, pieces: Pieces, flat: Sequence[Tensor]) -> None:
        self._graph, self._pieces = graph, pieces
        self.alone: dict[Node, Tensor] = dict(zip(graph.graph.find_nodes(op="placeholder"), flat, strict=True))
        self._rows: dict[Node, tuple[int, int]] = {}  # number of the tensor, place in it
        self._made: list[Tensor] = []

    def keep(self, nodes: Sequence[Node | Sequence[Node]], rows: Tensor) -> None:
        """Rows of one tensor, each the value of a node or of several."""
        for place, some in enumerate(nodes):
            for node in [some] if isinstance(some, Node) else some:
                self._rows[node] = len(self._made), place
        self._made.append(rows)

    def of(self, node: Node) -> Tensor:
        """The value of a node."""
        if node not in self.alone:
            if node in self._rows:
                number, place = self._rows[node]
                self.alone[node] = self._made[number][place]
            elif node.op == "get_attr":
                self.alone[node] = getattr(self._graph, str(node.target))
            elif node.target not in VIEWS:
                raise RuntimeError(f"{node} is asked for before it has run")
            else:  # which nobody had to compute
                self.alone[node] = call(node, *map(self.of, inputs(node)))
        return self.alone[node]

    def beside(self, nodes: Sequence[Node]) -> Tensor:
        """Values of many nodes, side by side."""
        parts = []
        for number, following in itertools.groupby(nodes, lambda node: self._rows.get(node, (None,))[0]):
            some = list(following)
            parts.append(self._stacked(some) if number is None else self._taken(number, some))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def total(self, terms: Sequence[Node]) -> Tensor:
        """A sum: of the rows of every tensor by themselves, then of these and of what is in none."""
        inside: dict[int, list[Node]] = defaultdict(list)
        for node in terms:
            if node in self._rows:
                inside[self._rows[node][0]].append(node)
        parts = [
            self._taken(number, sorted(some, key=self._rows.__getitem__)).sum(0) for number, some in inside.items()
        ]
        return functools.reduce(torch.add, [*parts, *(self.of(node) for node in terms if node not in self._rows)])

    def _taken(self, number: int, nodes: Sequence[Node]) -> Tensor:
        return taken(self._made[number], torch.tensor([self._rows[node][1] for node in nodes]))

    def _stacked(self, nodes: Sequence[Node]) -> Tensor:
        found = [self._pieces.of(node) for node in nodes]
        sources = {part.source for part in found if part is not None}
        if len(sources) == 1 and None not in found:
            places = torch.stack([part.places for part in found if part is not None])
            return taken(self.of(sources.pop()).reshape(-1), places)
        return torch.stack([self.of(node) for node in nodes])


def inputs(node: Node) -> tuple[Node, ...]:
    """The nodes among a node's arguments, in their order, one as often as it occurs."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return tuple(found)


def call(node: Node, *given: Tensor) -> Tensor:
    """The node's operation on other inputs."""
    rest = iter(given)
    args, kwargs = map_arg((node.args, node.kwargs), lambda _: next(rest))
    made: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return made


def _round(loop: Recursion) -> Callable[..., tuple[Tensor, ...]]:
    """One round: what is carried on, and what is given."""

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        known = list(given)
        for node, reads in zip(loop.rounds[0], loop.reads, strict=True):
            known.append(call(node, *(known[number] for number in reads)))
        return tuple(known[number] for number in (*loop.carries, *(len(given) + place for place in loop.gives)))

    return run


def _keep_numbers_apart(graph: GraphModule, nodes: Sequence[Node]) -> None:
    """Make numbers of Python's that differ from round to round constants of the graph, which can lie side by side."""
    alike: dict[Any, list[Node]] = defaultdict(list)
    for node in nodes:
        if node.target in _WITH_NUMBERS and not node.kwargs and isinstance(node.args[1], float):
            alike[node.target, node.meta["tensor_meta"]].append(node)
    for some in alike.values():
        if len({node.args[1] for node in some}) < MANY:
            continue
        for node in some:
            kind = node.meta["tensor_meta"]
            number = torch.tensor(node.args[1], dtype=kind.dtype, device=kind.device)
            with graph.graph.inserting_before(node):
                node.update_arg(1, constant(graph, number, f"number_of_{node.name}"))


def _free(graph: GraphModule) -> set[Node]:
    """Views that are taken up where they are used: of what comes from outside, or of what many parts are taken of.

    So are the results of an operation that has several.
    """
    parts: dict[Node, int] = {}
    views: set[Node] = set()
    results: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target not in VIEWS:
            continue
        source = node.args[0]
        outside = source.op in ("placeholder", "get_attr")
        if source not in parts:
            parts[source] = sum(user.target in VIEWS for user in source.users)
        if outside or source in views or parts[source] >= MANY:
            views.add(node)
        elif node.target is operator.getitem:
            results.add(node)
    return views | results


class _Memory(NamedTuple):
    """Memory that operations write to.

    Attributes:
        nodes: what lies in it.
        met: what meets it up to the last that writes; each with the one before it, after which it has to run.
        last: that one; later readers wait for it.
    """

    nodes: set[Node]
    met: dict[Node, Node | None]
    last: Node


def _memory(graph: GraphModule, nodes: Sequence[Node]) -> _Memory:
    found = overwritten(graph)
    written = nodes[: max((place for place, node in enumerate(nodes, 1) if changes(node)), default=0)]
    met = [node for node in written if node in found or not found.isdisjoint(node.all_input_nodes)]
    return _Memory(found, dict(zip(met, [None, *met], strict=False)), nodes[len(written) - 1])


def _sums(nodes: Sequence[Node], ins: _Inputs) -> dict[Node, tuple[tuple[Node, ...], tuple[Node, ...]]]:
    """Long sums of tensors of one shape: the last addition -> its terms, and the additions before it."""
    allowed = set(nodes)

    def is_sum(node: Node) -> bool:
        plain = node in allowed and node.target is _aten.add.Tensor and not node.kwargs
        return plain and node.meta["tensor_meta"].dtype.is_floating_point and _same_kind(node, ins[node])

    found = {}
    inner: set[Node] = set()
    for last in reversed(nodes):
        if last in inner or not is_sum(last):
            continue
        terms, between, pending = [], [], list(ins[last])
        while pending:
            node = pending.pop()
            if is_sum(node) and sum(ins[user].count(node) for user in node.users) == 1:
                between.append(node)
                pending += ins[node]
            else:
                terms.append(node)
        if len(terms) >= MANY:
            found[last] = tuple(reversed(terms)), tuple(between)
            inner.update(between)
    return found


def _same_kind(node: Node, others: Sequence[Node]) -> bool:
    kind = node.meta.get("tensor_meta")
    return len(others) == 2 and all(other.meta.get("tensor_meta") == kind for other in others)


def _signatures(nodes: Iterable[Node], free: set[Node]) -> dict[Node, int]:
    """What nodes have in common that do the same: operation and kind."""
    found: dict[Node, int] = {}
    for node in nodes:
        runs = node.op == "call_function" and (node not in free or node.target is operator.getitem)
        what = (node.target, map_arg((node.args, node.kwargs), lambda _: None)) if runs else node.op
        found[node] = hash((repr(what), repr(node.meta.get("tensor_meta"))))
    return found


def _alike(
    own: dict[Node, int], ins: _Inputs, loops: Sequence[Recursion], apart: Collection[Node]
) -> dict[Node, int | None]:
    """The same number for nodes that can run as one, by their own; None for those that run alone.

    They have inputs of the same kinds, and what these come from is alike too. That goes back a few operations, or to a
    recursion, so that a group's inputs are mostly those that another group gives.
    """
    given = {n: (at, k) for at, loop in enumerate(loops) for nodes in loop.rounds for k, n in enumerate(nodes)}
    own = {node: hash(given.get(node, number)) for node, number in own.items()}
    found = own
    for _ in range(BACK):
        found = {
            node: number if node in given else hash((number, *(found[source] for source in ins[node])))
            for node, number in own.items()
        }
    return {node: found[node] if _can_be_mapped(node, ins[node]) and node not in apart else None for node in own}


def _can_be_mapped(node: Node, sources: Sequence[Node]) -> bool:
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace != "aten" or target._schema.is_mutable or not sources:
        return False
    made = [node] if "tensor_meta" in node.meta else list(node.users)
    if not made or not all(one is node or one.target is operator.getitem for one in made):
        return False
    kinds = [one.meta.get("tensor_meta") for one in (*made, *sources)]
    return all(kind is not None and kind.shape.numel() <= SMALL for kind in kinds)


class _Tasks(NamedTuple):
    """What has to run, in the order of the graph, a recursion as its first node.

    Attributes:
        missing: task -> how many others it waits for.
        users: task -> those that wait for it.
    """

    missing: dict[Node, int]
    users: dict[Node, list[Node]]


def _tasks(waiting: _Inputs, free: set[Node], loops: Sequence[Recursion], memory: _Memory) -> _Tasks:
    """What waits for what: nodes, or what they are views of, and what comes before in memory."""
    first = {node: loop.rounds[0][0] for loop in loops for nodes in loop.rounds for node in nodes}
    needed = {loop.rounds[0][0]: loop.needed for loop in loops}
    waiting = {n: needed.get(n, sources) for n, sources in waiting.items() if first.get(n, n) is n}

    def before(node: Node) -> Iterator[Node]:
        previous = memory.met.get(node)
        if previous is not None:
            yield previous
        for source in waiting[node]:
            if source in memory.nodes and node not in memory.met:
                yield memory.last
            while source in free:
                source = source.args[0]  # type: ignore[assignment]
            source = first.get(source, source)
            if source in waiting:
                yield source

    found = _Tasks({}, {node: [] for node in waiting})
    for node in waiting:
        sources = set(before(node))
        found.missing[node] = len(sources)
        for source in sources:
            found.users[source].append(node)
    return found


def _scheduled(
    tasks: _Tasks, sums: dict[Node, Any], signatures: dict[Node, int | None], loops: Sequence[Recursion]
) -> Iterator[Group]:
    """Groups of what is ready.

    First the kinds of operations of which all that are left are ready, then those whose nodes are nearest to the start
    in the mean: what waits for a recursion runs when that is through. Nothing where something would wait for itself.
    """
    whole = {loop.rounds[0][0]: loop for loop in loops}
    depth = _depths(tasks)
    if not depth:
        return
    kinds: dict[Any, list[Node]] = defaultdict(list)
    for node in tasks.missing:
        signature = None if node in sums or node in whole else signatures[node]
        kinds[node if signature is None else signature].append(node)
    order = {node: place for place, node in enumerate(tasks.missing)}
    kind_of = {node: kind for kind, nodes in kinds.items() for node in nodes}
    left = {kind: len(nodes) for kind, nodes in kinds.items()}
    mean = {kind: sum(depth[node] for node in nodes) / len(nodes) for kind, nodes in kinds.items()}
    missing = dict(tasks.missing)
    ready: dict[Any, list[Node]] = defaultdict(list)
    turns: list[tuple[bool, float, int, Any]] = []  # of kinds, some of them out of date
    number = itertools.count()

    def add(node: Node) -> None:
        kind = kind_of[node]
        ready[kind].append(node)
        heapq.heappush(turns, (len(ready[kind]) < left[kind], mean[kind], next(number), kind))

    for node, count in missing.items():
        if count == 0:
            add(node)
    while turns:
        partly, _, _, kind = heapq.heappop(turns)
        if kind not in ready or partly != (len(ready[kind]) < left[kind]):
            continue
        nodes = sorted(ready.pop(kind), key=order.__getitem__)
        left[kind] -= len(nodes)
        if nodes[0] in sums:
            yield Group((nodes[0],), sums[nodes[0]][0])
        elif nodes[0] in whole:
            yield Group((nodes[0],), recursion=whole[nodes[0]])
        elif len(nodes) < MANY:
            yield from (Group((node,)) for node in nodes)
        else:
            yield Group(tuple(nodes))
        for user in itertools.chain(*(tasks.users[node] for node in nodes)):
            missing[user] -= 1
            if missing[user] == 0:
                add(user)


def _depths(tasks: _Tasks) -> dict[Node, int]:
    """How many operations at least come before each, itself counted in; of none where some wait for themselves."""
    left = dict(tasks.missing)
    depth = {node: 1 for node, count in left.items() if count == 0}
    pending = list(depth)
    for node in pending:
        for user in tasks.users[node]:
            depth[user] = max(depth.get(user, 1), depth[node] + 1)
            left[user] -= 1
            if left[user] == 0:
                pending.append(user)
    return depth if len(pending) == len(left) else {}
