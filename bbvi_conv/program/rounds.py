r"""Rounds of scans that hold no more than what waits for the round before; the rest runs for all rounds at once.

A round computes much that does not depend on what is carried into it, and much that is not carried on: of a recurrent
network the products with the inputs, and the outputs; of its derivative all that the rounds have computed once, and the
gradients of weights, which are sums over the rounds.

.. math:: c_t = f(c_{t-1}, e(x_t)), \quad y_t = l(c_{t-1}, x_t), \quad s = \sum_t g(c_{t-1}, x_t)

Only f stays in the loop. A sum of products of matrices is one product, of these side by side.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from bbvi_conv.program.aten_graph import to_graph
from bbvi_conv.program.batching import call, inputs
from bbvi_conv.program.constants import above, changes
from bbvi_conv.program.graph_module import WrittenLate
from bbvi_conv.program.graphs import TURNS, is_dear, result_of, simplify
from bbvi_conv.program.pieces import VIEWS
from bbvi_conv.program.scan import BODIES, Body, name_of, scans

_aten: Any = torch.ops.aten

MOST = 2**24
"""Numbers that a tensor of all rounds may have that leaves the loop for it."""

NARROW = 8
"""Numbers in the tensors of a round up to which all rounds together are quicker whatever they compute."""

_SEVERAL = {operator.getitem, _aten.unbind.int, _aten.split_with_sizes.default, _aten.split.Tensor}
_FREE = {*VIEWS, _aten.expand.default} - _SEVERAL
"""Operations that compute nothing, and give one tensor."""

_CHEAP = {_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.neg.default, _aten.where.self}
"""Operations that cost less than laying out what they give."""

_LINEAR = (*TURNS, _aten.reshape.default, _aten.neg.default)
"""Operations of one tensor of which a sum is that of the sum."""

_SUMS = (_aten.add.Tensor, _aten.sub.Tensor)

_PRODUCTS = (_aten.mm.default, _aten.bmm.default, _aten.mv.default)


def with_short_rounds(
    graph: GraphModule, example: Sequence[Tensor], vectorised: Callable[..., Callable[..., Any]]
) -> GraphModule:
    """The graph with as little as possible in the rounds of its scans; itself where nothing can leave them.

    Args:
        graph: one of which no derivative is taken any more.
        example: its inputs.
        vectorised: ``vectorised(function, mapped)`` maps a function over the first dimension of some arguments.
    """
    try:
        parts = {node: _Parts(node, body, length) for node, body, length in scans(graph)}
        parts = {node: found for node, found in parts.items() if found.shorter}
        run = _InParts(graph, parts, vectorised).run
        return simplify(to_graph(run, *(x.clone() for x in example), functional=False)) if parts else graph
    except Exception:  # whatever cannot be taken apart, as what vmap cannot map, runs as it is
        return graph


class _Parts:
    """A scan's round taken apart.

    Attributes:
        carry, xs, fixed: the inputs of a round.
        new, ys: what it gives.
        waits: numbers of what is carried from round to round, but for what stays the same, and sums.
        terms: numbers of sums over the rounds: what a round adds.
        absorbed: operations that are done on such sums instead.
        early: operations that run before the loop, on all rounds.
        inside: those that stay in it.
        moving, stays: what they read that differs from round to round, or does not.
        given: what they give besides what is carried on.
        late: operations that run after the loop, on all rounds.
        shorter: whether anything leaves the loop.
    """

    def __init__(self, scan: Node, body: Body, length: int) -> None:
        graph = body.plain.graph
        places = iter(graph.find_nodes(op="placeholder"))
        made: list[Node] = list(graph.output_node().args[0])  # type: ignore[arg-type]
        self.carry, self.xs = list(itertools.islice(places, body.carry)), list(itertools.islice(places, body.moving))
        self.fixed = list(places)
        self.new, self.ys = made[: body.carry], made[body.carry :]
        self.shorter = not any(n.op == "get_attr" or changes(n) for n in graph.nodes)
        if not self.shorter:
            return
        self.used = {int(user.args[1]) for user in scan.users}  # type: ignore[arg-type]
        self._leaves = set(graph.nodes)
        if max(_numbers(n) for n in graph.nodes if n not in self.fixed) > NARROW:
            self._leaves = {n for n in graph.nodes if is_dear(result_of(n))}
        self.terms = self._terms(made)
        asked = self._asked_for()
        self.waits, needed = self._needed(asked)
        self.absorbed = _absorbed(self.terms, self.new)
        computed = [n for n in graph.nodes if n in needed and n.op == "call_function"]
        self._divide(computed, asked, length)
        sizes = (len(part) for part in (self.waits, self.inside, self.moving, self.given))
        self.shorter = any(map(operator.lt, sizes, (body.carry, len(computed), body.moving, len(self.ys))))
        if self.shorter and self.waits:
            self.name = self._body(body.plain)

    def _terms(self, made: Sequence[Node]) -> dict[int, Node]:
        """What a round adds to what is carried on, where that is all that happens to it."""
        terms = {}
        for number, (old, new) in enumerate(zip(self.carry, self.new, strict=True)):
            sums = new.target is _aten.add.Tensor and not new.kwargs and list(old.users) == [new]
            sums = sums and _kind(old).dtype.is_floating_point  # small whole numbers wrap round, and truths stay truths
            others = [n for n in inputs(new) if n is not old]
            alone = len(new.users) == 1 and made.count(new) == 1 and number + len(self.carry) not in self.used
            if sums and alone and len(others) == 1 and _kind(others[0]) == _kind(old) and number in self.used:
                terms[number] = others[0]
        waiting = above([new for number, new in enumerate(self.new) if number not in terms])
        return {number: term for number, term in terms.items() if above([term]) & self._leaves - waiting}

    def _asked_for(self) -> list[Node]:
        """Values of rounds that are used after the loop."""
        carried = len(self.carry)
        rows = [*self.carry, *self.ys]
        return [*self.terms.values(), *(rows[k - carried] for k in sorted(self.used) if k >= carried)]

    def _needed(self, asked: Sequence[Node]) -> tuple[list[int], set[Node]]:
        """What has to be carried on, and all that is needed in a round."""
        stays = {i for i, (old, new) in enumerate(zip(self.carry, self.new, strict=True)) if old is new}
        waits = {i for i in range(len(self.carry)) if i in self.used and i not in self.terms} - stays
        while True:
            needed = above([*asked, *(self.new[i] for i in waits)])
            more = {i for i, old in enumerate(self.carry) if old in needed} - stays - waits
            if not more:
                return sorted(waits), needed
            waits |= more

    def _divide(self, computed: Sequence[Node], asked: Sequence[Node], length: int) -> None:
        """Tell what stays in the loop from what runs before and after it."""
        carried = [self.carry[i] for i in self.waits]
        large = {result_of(n) for n in computed if n not in self.absorbed and length * _numbers(n) > MOST}
        large = large if self.waits else set()  # without a loop there is no place for it
        waiting = _below([*carried, *large], computed) | large
        inside = above([*(self.new[i] for i in self.waits), *large]) & waiting
        inside.update(n for n in computed if result_of(n) in inside)  # all results of an operation, or none
        rest = [n for n in computed if n not in inside and n not in self.absorbed]
        dear = self._leaves.intersection(rest)
        after = waiting.intersection((*dear, *_below(dear, rest)))
        wanted = {*asked, *(n for user in (*after, *self.absorbed) for n in inputs(user))}
        before = above(n for n in (*dear, *wanted) if n not in waiting)
        inside.update(n for n in rest if before.isdisjoint((n, result_of(n))) and n not in after)
        moving = {*self.xs, *_below(self.xs, computed)}
        _take_in(inside, computed, waiting, moving)
        inside.update(n for n in computed if result_of(n) in inside)
        for node in reversed(computed):  # views of what stays inside are taken anew
            small = node.target in _FREE and all(_numbers(n) <= _numbers(node) for n in inputs(node))
            if small and node in wanted and node in inside and node in waiting:
                after.add(node)
                wanted.update(inputs(node))
        self.given = [n for n in computed if n in inside and n in wanted and n in waiting and n not in after]
        self.late = [n for n in computed if n in after]
        self.inside = [n for n in computed if n in inside]
        reads = [*(n for user in self.inside for n in inputs(user)), *(self.new[i] for i in self.waits)]
        outside = [n for n in dict.fromkeys(reads) if n not in inside and n not in carried]
        self.moving = [n for n in outside if n in moving] or self.xs[:1]
        self.stays = [n for n in outside if n not in moving]
        before = above(n for n in (*wanted, *outside) if n not in waiting)
        self.early = [n for n in computed if n in before and n not in self.absorbed]

    def _body(self, plain: GraphModule) -> str:
        """The name of the body of what stays in the loop."""
        graph, known = Graph(), {}
        inputs = [*(self.carry[i] for i in self.waits), *self.moving, *self.stays]
        for node in inputs:
            known[node] = graph.placeholder(node.name)
            known[node].meta = dict(node.meta)
        for node in self.inside:
            known[node] = graph.node_copy(node, known.__getitem__)
        outputs = [*(self.new[i] for i in self.waits), *self.given]
        graph.output([known[node] for node in outputs])
        module = WrittenLate(plain, graph)
        name = name_of(module, map(_kind, inputs), len(self.waits), len(self.moving))
        results = tuple((kind.shape, kind.dtype) for kind in map(_kind, outputs))
        BODIES.setdefault(name, Body(module, module, len(self.waits), len(self.moving), results))
        return name


def _kind(node: Node) -> Any:
    return node.meta["tensor_meta"]


def _numbers(node: Node) -> int:
    kind = node.meta.get("tensor_meta")
    return 0 if kind is None else int(kind.shape.numel())


def _below(nodes: Iterable[Node], among: Sequence[Node]) -> set[Node]:
    """What is computed from nodes, of some in the order of the graph."""
    sources, found = set(nodes), set()
    for node in among:
        if not sources.isdisjoint(node.all_input_nodes):
            sources.add(node)
            found.add(node)
    return found


def _absorbed(terms: Mapping[int, Node], new: Sequence[Node]) -> set[Node]:
    """Operations of what is added up that are as well done on sums, or side by side, and that nothing else uses."""
    found: set[Node] = set()
    pending = [(term, new[number]) for number, term in terms.items()]
    while pending:
        node, user = pending.pop()
        if node.op != "call_function" or list(node.users) != [user] or node.kwargs:
            continue
        if node.target in _PRODUCTS:
            found.add(node)
        elif node.target in _LINEAR or (node.target in _SUMS and [_kind(n) for n in inputs(node)] == 2 * [_kind(node)]):
            found.add(node)
            pending += [(source, node) for source in inputs(node)]
    return found


def _take_in(inside: set[Node], computed: Sequence[Node], waiting: Collection[Node], moving: Collection[Node]) -> None:
    """Take into the loop what is cheap, and larger than what it is made from: that would have to be laid out."""
    while True:
        views: dict[Node, list[Node]] = defaultdict(list)
        taken: list[Node] = []
        for node in computed:
            if node in waiting or node in inside or inside.isdisjoint(node.users):
                continue
            sources = [n for n in node.all_input_nodes if n in moving]
            if node.target in _FREE and sources:
                views[sources[0]].append(node)
            elif node.target in _FREE or (node.target in _CHEAP and sum(map(_numbers, sources)) < _numbers(node)):
                taken.append(node)
        for source, nodes in views.items():
            if _numbers(source) <= sum(map(_numbers, nodes)):
                taken += nodes
        if not taken:
            return
        inside.update(taken)


# ---- running the parts ----


class _InParts(Interpreter):
    """Runs a graph, its scans in parts."""

    def __init__(self, graph: GraphModule, parts: Mapping[Node, _Parts], vectorised: Callable[..., Any]) -> None:
        super().__init__(graph)
        self._parts, self._vectorised = parts, vectorised

    def run_node(self, n: Node) -> Any:
        """What a node gives."""
        if n not in self._parts:
            return super().run_node(n)
        (_, carry, xs, fixed, reverse), _ = self.fetch_args_kwargs_from_env(n)
        return _run(self._parts[n], _Rounds(self._vectorised, len(xs[0])), carry, xs, fixed, reverse)


class _Rounds:
    """What the nodes of a round have given: one value, or ``rows``, one for every round."""

    def __init__(self, vectorised: Callable[..., Any], length: int) -> None:
        self.length, self._vectorised = length, vectorised
        self.values: dict[Node, Any] = {}
        self.rows: dict[Node, Any] = {}

    def run(self, node: Node) -> None:
        """The node's operation, for all rounds where they differ."""
        given = inputs(node)
        mapped = [n in self.rows for n in given]
        values = [self.rows[n] if n in self.rows else self.values[n] for n in given]
        function = functools.partial(call, node)
        if any(mapped):
            self.rows[node] = self._vectorised(function, mapped)(*values)
        else:
            self.values[node] = function(*values)

    def of(self, node: Node) -> Tensor:
        """Values of all rounds."""
        if node in self.rows:
            found: Tensor = self.rows[node]
            return found
        value: Tensor = self.values[node]
        return value.expand(self.length, *value.shape)

    def total(self, node: Node, absorbed: Collection[Node]) -> Tensor:
        """The sum over the rounds of what a node gives, or would have given."""
        given = inputs(node)
        moving = [n for n in given if n in self.rows]
        if node not in absorbed:
            total: Tensor = self.rows[node].sum(0) if node in self.rows else self.length * self.values[node]
        elif node.target not in _PRODUCTS:
            total = call(node, *(self.total(n, absorbed) for n in given))
        elif len(moving) < len(given):
            total = call(node, *(self.rows[n].sum(0) if n in self.rows else self.values[n] for n in given))
            total = total if moving else self.length * total
        else:  # rounds side by side: along the rows of the one and the columns of the other
            first, second = (self.rows[n] for n in given)
            right = second.flatten() if second.dim() == 2 else second.movedim(0, -3).flatten(-3, -2)
            total = call(node, first.movedim(0, -2).flatten(-2), right)
        return total


def _run(
    parts: _Parts,
    rounds: _Rounds,
    carry: Sequence[Tensor],
    xs: Sequence[Tensor],
    fixed: Sequence[Tensor],
    reverse: bool,
) -> list[Tensor | None]:
    """What a scan gives; nothing in the place of what nobody reads."""
    rounds.rows.update(zip(parts.xs, xs, strict=True))
    rounds.values.update(zip(parts.fixed, fixed, strict=True))
    rounds.values.update(
        (old, value) for old, new, value in zip(parts.carry, parts.new, carry, strict=True) if old is new
    )
    for node in parts.early:
        rounds.run(node)
    last = dict(enumerate(carry))
    if parts.waits:
        made = torch.ops.bbvi_conv.scan(
            parts.name,
            [carry[i] for i in parts.waits],
            [rounds.of(node).contiguous() for node in parts.moving],
            [rounds.values[node].contiguous() for node in parts.stays],
            reverse,
        )
        count = len(parts.waits)
        last.update(zip(parts.waits, made, strict=False))
        before = [parts.carry[i] for i in parts.waits]
        rounds.rows.update(zip([*before, *parts.given], made[count:], strict=True))
    for node in parts.late:
        rounds.run(node)
    for number, term in parts.terms.items():
        last[number] = carry[number] + rounds.total(term, parts.absorbed)
    count = len(carry)
    results = [rounds.of(node) if k in parts.used else None for k, node in enumerate([*parts.carry, *parts.ys], count)]
    return [*(last[i] for i in range(count)), *results]


__all__ = ["MOST", "with_short_rounds"]
