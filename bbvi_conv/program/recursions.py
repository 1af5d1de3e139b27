"""Recursions in Python, of which a graph holds every round: found in it, to be run by a scan.

What a round of a loop takes from the round before it has to wait for it, so that operations that are alike cannot run
together. They recur in the graph with a period, though, and the rounds differ in nothing but where their inputs lie.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.fx import Node

LEAST = 8
"""Rounds from which a recursion is run by a scan."""

LAGS = 8
"""Rounds back to which one may look."""

KINDS = 8
"""Recursions looked for in one graph."""


class Recursion(NamedTuple):
    """Operations that recur round by round.

    A round reads, by number, first what is carried into it, then what moves, what is fixed, and what its operations
    before have given.

    Attributes:
        rounds: the nodes of each round, alike place by place.
        carry: what is carried into the first round.
        moving: inputs from elsewhere that differ; of every round.
        fixed: inputs from elsewhere that do not.
        reads: of every operation, the numbers of its inputs.
        carries: numbers of what a round carries into the next.
        gives: places of operations whose values are used elsewhere.
    """

    rounds: tuple[tuple[Node, ...], ...]
    carry: tuple[Node, ...]
    moving: tuple[tuple[Node, ...], ...]
    fixed: tuple[Node, ...]
    reads: tuple[tuple[int, ...], ...]
    carries: tuple[int, ...]
    gives: tuple[int, ...]

    @property
    def needed(self) -> tuple[Node, ...]:
        """All that has to be there before it runs."""
        return tuple(dict.fromkeys([*self.carry, *itertools.chain(*self.moving), *self.fixed]))


class _Source(NamedTuple):
    """Where an operation finds an input: at a place of the round ``lag`` rounds before, 0 being its own."""

    lag: int
    place: int


_Pattern = tuple[tuple[_Source | None, ...], ...]
"""By place, the sources of an operation's inputs; None: elsewhere."""

_Round = tuple[Node, ...]


def recursions(
    nodes: Sequence[Node], signature: Callable[[Node], Hashable], inputs: Callable[[Node], Sequence[Node]]
) -> list[Recursion]:
    """Recursions among nodes of a graph, in the order of the graph.

    Args:
        nodes: those that run alone.
        signature: the same for nodes whose operations are alike but for their inputs.
        inputs: a node's inputs, as often as they occur.
    """
    search = _Search(nodes, signature, inputs)
    for _ in range(KINDS):
        if not search.goes_on():
            break
    return search.found


class _Search:
    """Recursions ``found`` so far, and the nodes ``left`` in which others may be."""

    def __init__(
        self, nodes: Sequence[Node], signature: Callable[[Node], Hashable], inputs: Callable[[Node], Sequence[Node]]
    ) -> None:
        self.found: list[Recursion] = []
        self.left = dict.fromkeys(nodes)  # in their order
        self._signature, self._inputs = signature, inputs

    def goes_on(self) -> bool:
        """Look at the longest stretch that repeats itself; whether there is one."""
        nodes = list(self.left)
        run = _periodic([self._signature(node) for node in nodes])
        if run is None:
            return False
        start, period, count = run
        if nodes[start].target is operator.getitem:  # a round begins with an operation of its own
            shift = next((n for n in range(period) if nodes[start + n].target is not operator.getitem), 0)
            start, count = start + shift, count - 1
        rounds = [tuple(nodes[at : at + period]) for at in range(start, start + period * count, period)]
        self._look(self._on_the_way(rounds))
        for node in itertools.chain(*rounds, *(nodes for one in self.found for nodes in one.rounds)):
            self.left.pop(node, None)
        return True

    def _patterns(self, rounds: Sequence[_Round]) -> list[_Pattern]:
        at = {node: (r, place) for r, nodes in enumerate(rounds) for place, node in enumerate(nodes)}

        def source(node: Node, r: int) -> _Source | None:
            back, place = at.get(node, (r - LAGS - 1, 0))
            return _Source(r - back, place) if r - back <= LAGS else None

        return [tuple(tuple(source(i, r) for i in self._inputs(n)) for n in nodes) for r, nodes in enumerate(rounds)]

    def _on_the_way(self, rounds: Sequence[_Round]) -> Sequence[_Round]:
        """The rounds with those operations alone that lie between what one round gets and what it hands on."""
        usual = _most_common(self._patterns(rounds))
        kept, before = [True] * len(usual), None
        while kept != before:  # what is taken from the round before counts where that is itself on the way
            before = kept
            waits: list[bool] = []
            for sources in usual:
                waits.append(any(s is not None and (before if s.lag else waits)[s.place] for s in sources))
            on = [sources for sources, is_on in zip(usual, before, strict=True) if is_on]
            leads = {s.place for sources in on for s in sources if s is not None and s.lag > 0}
            for place in reversed(range(len(usual))):
                if place in leads:
                    leads.update(s.place for s in usual[place] if s is not None)
            for place, node in enumerate(rounds[0]):
                if node.target is operator.getitem:  # several results stay together
                    leads.update(place for s in usual[place] if s is not None and s.place in leads)
            kept = [wait and place in leads for place, wait in enumerate(waits)]
        return [tuple(itertools.compress(nodes, kept)) for nodes in rounds] if any(kept) else ()

    def _look(self, rounds: Sequence[_Round]) -> None:
        """Add stretches of rounds that take their inputs from the same places."""
        patterns = self._patterns(rounds)
        usual = _most_common(patterns) if patterns else ()
        stop = 0
        while stop < len(rounds):
            start = stop
            while stop < len(rounds) and patterns[stop] == usual:
                stop += 1
            if stop - start >= LEAST:
                made = self._longest(rounds[start:stop], usual)
                if made is not None:
                    self.found.append(made)
            stop = max(stop, start + 1)

    def _longest(self, rounds: Sequence[_Round], pattern: _Pattern) -> Recursion | None:
        """The recursion of these rounds, and of as many before them as belong to it."""
        best = self._recursion(rounds, pattern)
        while best is not None:
            before = self._round_before(best.rounds[0], pattern)
            longer = None if before is None else self._recursion([before, *best.rounds], pattern)
            if longer is None:
                break
            best = longer
        return best

    def _round_before(self, first: _Round, pattern: _Pattern) -> _Round | None:
        """The nodes that give what the first round takes from the one before, if they are alike."""
        known: dict[int, Node] = {}
        pending = [
            (source.place, node)
            for one, sources in zip(first, pattern, strict=True)
            for source, node in zip(sources, self._inputs(one), strict=True)
            if source is not None and source.lag == 1
        ]
        while pending:
            place, node = pending.pop()
            if known.get(place) is node:
                continue
            if place in known or node not in self.left or self._signature(node) != self._signature(first[place]):
                return None
            known[place] = node
            pairs = zip(pattern[place], self._inputs(node), strict=True)
            pending += [(source.place, i) for source, i in pairs if source is not None and source.lag == 0]
        return tuple(known[place] for place in range(len(pattern))) if len(known) == len(pattern) else None

    def _recursion(self, rounds: Sequence[_Round], pattern: _Pattern) -> Recursion | None:
        """That of rounds of one pattern; None where something differs in kind, or where it would wait for itself."""
        columns = [list(zip(*(self._inputs(nodes[k]) for nodes in rounds), strict=True)) for k in range(len(pattern))]
        pairs = [pair for own, taken in zip(pattern, columns, strict=True) for pair in zip(own, taken, strict=True)]
        outside = dict.fromkeys(column for source, column in pairs if source is None)
        if any(len(set(map(_kind, column))) > 1 for column in outside):
            return None
        before: dict[tuple[int, int], Node] = {}  # what is carried in: by rounds before the first, and place
        for source, column in pairs:
            for r, node in enumerate(column if source is not None else ()):
                assert source is not None
                given = (
                    before.setdefault((source.lag - r, source.place), node)
                    if r < source.lag
                    else rounds[r - source.lag][source.place]
                )
                if node is not given or _kind(node) != _kind(rounds[0][source.place]):
                    return None
        carried = sorted(before)
        moving = [column for column in outside if len(set(column)) > 1]
        fixed = [column for column in outside if len(set(column)) == 1]
        numbers: dict[Any, int] = {key: number for number, key in enumerate([*carried, *moving, *fixed])}
        first = len(numbers)  # of the operations

        def number(source: _Source | None, column: tuple[Node, ...]) -> int:
            if source is None:
                return numbers[column]
            return numbers[source] if source.lag else first + source.place

        inside = {node for nodes in rounds for node in nodes}
        made = Recursion(
            tuple(rounds),
            tuple(before[key] for key in carried),
            tuple(moving),
            tuple(column[0] for column in fixed),
            tuple(
                tuple(number(source, column) for source, column in zip(own, taken, strict=True))
                for own, taken in zip(pattern, columns, strict=True)
            ),
            tuple(first + place if lag == 1 else numbers[lag - 1, place] for lag, place in carried),
            tuple(k for k in range(len(pattern)) if any(u not in inside for nodes in rounds for u in nodes[k].users)),
        )
        return None if self._waits_for_itself(made, inside) else made

    def _waits_for_itself(self, one: Recursion, inside: Collection[Node]) -> bool:
        """Whether what it needs depends on what it gives: then its rounds cannot all run at once."""
        together: dict[Node, Recursion] = {n: other for other in self.found for nodes in other.rounds for n in nodes}
        after: set[Node] = set()
        pending = [user for node in inside for user in node.users if user not in inside]
        while pending:
            node = pending.pop()
            if node in after:
                continue
            alike = together.get(node)
            reached = [n for nodes in alike.rounds for n in nodes] if alike else [node]
            after.update(reached)
            pending += [user for n in reached for user in n.users]
        return not after.union(inside).isdisjoint(one.needed)


def _kind(node: Node) -> Any:
    return node.meta.get("tensor_meta")


def _most_common(patterns: Sequence[_Pattern]) -> _Pattern:
    return Counter(patterns).most_common(1)[0][0]


def _periodic(signatures: Sequence[Hashable]) -> tuple[int, int, int] | None:
    """Start, period and rounds of the longest stretch that repeats itself; of some nearly as long the least period."""
    numbers: dict[Hashable, int] = {}
    row = np.array([numbers.setdefault(one, len(numbers)) for one in signatures])
    best: dict[int, tuple[int, int]] = {}  # period -> start and rounds
    for period in range(1, len(row) // LEAST + 1):
        breaks = np.flatnonzero(row[period:] != row[:-period])
        edges = np.concatenate([[-1], breaks, [len(row) - period]])
        longest = int(np.argmax(np.diff(edges)))
        start, length = int(edges[longest]) + 1, int(edges[longest + 1] - edges[longest] - 1) + period
        if length >= LEAST * period:
            best[period] = start, length // period
    if not best:
        return None
    most = max(period * count for period, (_, count) in best.items())
    period = next(p for p, (_, count) in sorted(best.items()) if p * count >= 0.9 * most)
    return best[period][0], period, best[period][1]
