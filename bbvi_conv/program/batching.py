"""Loops in Python, of which a graph holds every round: equal operations on different tensors become one.

A loop over data, sites or times traces into thousands of operations on single numbers. Those that do the same and do
not wait for one another run as one, on their inputs side by side, and long sums as sums of vectors. What a round takes
from the round before it still waits for it: :func:`bbvi_conv.scan` is for that.

Reference: Neubig, Goldberg and Dyer (2017), "On-the-fly operation batching in dynamic computation graphs",
https://arxiv.org/abs/1705.07860
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from bbvi_conv.program.constants import changes
from bbvi_conv.program.graph_module import constant
from bbvi_conv.program.pieces import MANY, VIEWS, Pieces, taken

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


class Group(NamedTuple):
    """Operations that run as one; or, with ``terms``, a sum of many."""

    nodes: tuple[Node, ...]
    terms: tuple[Node, ...] = ()


def plan(graph: GraphModule) -> list[Group] | None:
    """Groups in an order in which they can run; None where there is too little to gain.

    Numbers that differ from round to round become constants of the graph.
    """
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    if len(nodes) < WORTH or any(map(changes, nodes)):
        return None
    _keep_numbers_apart(graph, nodes)
    free = _free(graph)
    sums = _sums(nodes)
    inner = {node for terms, between in sums.values() for node in between}
    waiting = {node: (sums[node][0] if node in sums else inputs(node)) for node in nodes}
    waiting = {node: ins for node, ins in waiting.items() if node not in free and node not in inner}
    found = list(_scheduled(waiting, sums, free, _signatures(graph.graph.nodes, free)))
    return found if GAIN * len(found) <= len(nodes) else None


def batched(graph: GraphModule, groups: Sequence[Group], vectorised: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a graph, run group by group.

    ``vectorised(function, mapped)`` maps a function over the first dimension of some of its arguments.
    """
    pieces = Pieces()

    def run(*flat: Tensor) -> Any:
        values: dict[Node, Tensor] = dict(zip(graph.graph.find_nodes(op="placeholder"), flat, strict=True))
        rows: dict[Node, tuple[int, int]] = {}  # number of its group, place in it
        made: list[Tensor] = []

        def value(node: Node) -> Tensor:
            if node not in values:
                if node in rows:
                    group, place = rows[node]
                    values[node] = made[group][place]
                elif node.op == "get_attr":
                    values[node] = getattr(graph, str(node.target))
                else:  # a view that nobody had to compute
                    values[node] = _call(node, [value(n) for n in inputs(node)])
            return values[node]

        def beside(nodes: Sequence[Node]) -> Tensor:
            """Values of many nodes, side by side."""
            parts = []
            for source, following in itertools.groupby(nodes, lambda node: rows[node][0] if node in rows else None):
                some = list(following)
                parts.append(
                    in_none(some) if source is None else taken(made[source], torch.tensor([rows[n][1] for n in some]))
                )
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        def in_none(nodes: Sequence[Node]) -> Tensor:
            found = [pieces.of(node) for node in nodes]
            sources = {part.source for part in found if part is not None}
            if len(sources) == 1 and None not in found:
                places = torch.stack([part.places for part in found if part is not None])
                return taken(value(sources.pop()).reshape(-1), places)
            return torch.stack([value(node) for node in nodes])

        for group in groups:
            first = group.nodes[0]
            if group.terms:
                values[first] = _total(group.terms, rows, made, value)
            elif len(group.nodes) == 1:
                values[first] = _call(first, [value(n) for n in inputs(first)])
            else:
                columns = list(zip(*map(inputs, group.nodes), strict=True))
                shared = [len(set(column)) == 1 for column in columns]
                given = [value(c[0]) if same else beside(c) for c, same in zip(columns, shared, strict=True)]
                one = vectorised(lambda *args, node=first: _call(node, args), [not same for same in shared])
                rows.update((node, (len(made), place)) for place, node in enumerate(group.nodes))
                made.append(one(*given))
        (results,) = graph.graph.output_node().args
        return map_arg(results, value)

    return run


def inputs(node: Node) -> tuple[Node, ...]:
    """The nodes among a node's arguments, in their order, one as often as it occurs."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return tuple(found)


def _call(node: Node, given: Sequence[Tensor]) -> Tensor:
    """The node's operation on other inputs."""
    rest = iter(given)
    args, kwargs = map_arg((node.args, node.kwargs), lambda _: next(rest))
    made: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return made


def _total(
    terms: Sequence[Node], rows: dict[Node, tuple[int, int]], made: list[Tensor], value: Callable[[Node], Tensor]
) -> Tensor:
    """A sum: of every group by itself, then of these and of what is in none."""
    places: dict[int, list[int]] = defaultdict(list)
    for node in terms:
        if node in rows:
            places[rows[node][0]].append(rows[node][1])
    parts = [taken(made[group], torch.tensor(sorted(some))).sum(0) for group, some in places.items()]
    parts += [value(node) for node in terms if node not in rows]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


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
    """Views that are taken up where they are used: of what comes from outside, or of what many parts are taken of."""
    free: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target in VIEWS:
            source = node.args[0]
            outside = source.op in ("placeholder", "get_attr")
            if outside or source in free or sum(user.target in VIEWS for user in source.users) >= MANY:
                free.add(node)
    return free


def _sums(nodes: Sequence[Node]) -> dict[Node, tuple[tuple[Node, ...], tuple[Node, ...]]]:
    """Long sums of tensors of one shape: the last addition -> its terms, and the additions before it."""

    def is_sum(node: Node) -> bool:
        return node.target is _aten.add.Tensor and not node.kwargs and _same_kind(node, inputs(node))

    found = {}
    inner: set[Node] = set()
    for last in reversed(nodes):
        if last in inner or not is_sum(last):
            continue
        terms, between, pending = [], [], list(inputs(last))
        while pending:
            node = pending.pop()
            if is_sum(node) and len(node.users) == 1:
                between.append(node)
                pending += inputs(node)
            else:
                terms.append(node)
        if len(terms) >= MANY:
            found[last] = tuple(reversed(terms)), tuple(between)
            inner.update(between)
    return found


def _same_kind(node: Node, others: Sequence[Node]) -> bool:
    kind = node.meta.get("tensor_meta")
    return len(others) == 2 and all(other.meta.get("tensor_meta") == kind for other in others)


def _signatures(nodes: Iterable[Node], free: set[Node]) -> dict[Node, Any]:
    """What those nodes have in common that can run as one: operation, kinds of inputs, and what these come from.

    That goes back a few operations, so that a group's inputs are mostly those that another group gives. None of nodes
    that run alone.
    """
    own: dict[Node, Any] = {}
    for node in nodes:
        runs = node.op == "call_function" and node not in free
        what = (node.target, map_arg((node.args, node.kwargs), lambda _: None)) if runs else node.op
        own[node] = hash((repr(what), repr(node.meta.get("tensor_meta"))))
    found = own
    for _ in range(BACK):
        found = {node: hash((own[node], *(found[source] for source in inputs(node)))) for node in own}
    return {node: found[node] if _can_be_mapped(node) else None for node in own}


def _can_be_mapped(node: Node) -> bool:
    target, sources = node.target, inputs(node)
    if not isinstance(target, OpOverload) or target.namespace != "aten" or target._schema.is_mutable or not sources:
        return False
    kinds = [one.meta.get("tensor_meta") for one in (node, *sources)]
    return all(kind is not None and kind.shape.numel() <= SMALL for kind in kinds)


def _scheduled(
    waiting: dict[Node, tuple[Node, ...]], sums: dict[Node, Any], free: set[Node], signatures: dict[Node, Any]
) -> Iterator[Group]:
    """Groups of what is ready.

    First the kinds of operations of which all that are left are ready, then those whose nodes are nearest to the start
    in the mean: what waits for a recursion runs when that is through.
    """
    depth: dict[Node, int] = {}
    users: dict[Node, list[Node]] = defaultdict(list)
    missing: dict[Node, int] = {}

    def needed(node: Node) -> Iterator[Node]:
        """What is computed, of a node's inputs, or of what they are views of."""
        for source in waiting[node]:
            while source in free:
                source = source.args[0]  # type: ignore[assignment]
            if source in waiting:
                yield source

    kinds: dict[Any, list[Node]] = defaultdict(list)
    order = {node: place for place, node in enumerate(waiting)}
    for node in waiting:
        sources = set(needed(node))
        depth[node] = 1 + max((depth[source] for source in sources), default=0)
        missing[node] = len(sources)
        for source in sources:
            users[source].append(node)
        signature = None if node in sums else signatures[node]
        kinds[node if signature is None else signature].append(node)
    kind_of = {node: kind for kind, nodes in kinds.items() for node in nodes}
    left = {kind: len(nodes) for kind, nodes in kinds.items()}
    mean = {kind: sum(depth[node] for node in nodes) / len(nodes) for kind, nodes in kinds.items()}
    ready: dict[Any, list[Node]] = defaultdict(list)
    for node, count in missing.items():
        if count == 0:
            ready[kind_of[node]].append(node)
    while ready:
        kind = min(ready, key=lambda k: (len(ready[k]) < left[k], mean[k]))
        nodes = sorted(ready.pop(kind), key=order.__getitem__)
        left[kind] -= len(nodes)
        if nodes[0] in sums:
            yield Group((nodes[0],), sums[nodes[0]][0])
        elif len(nodes) < MANY:
            yield from (Group((node,)) for node in nodes)
        else:
            yield Group(tuple(nodes))
        for node in nodes:
            for user in users[node]:
                missing[user] -= 1
                if missing[user] == 0:
                    ready[kind_of[user]].append(user)
