"""Trace a program once into an ATen graph, and map functions over draws."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from bbvi_conv.program.aten_graph import Untraceable, first_sentence, to_graph
from bbvi_conv.program.batching import batched, plan
from bbvi_conv.program.faithful import differing, total_and_slopes
from bbvi_conv.program.graphs import simplify
from bbvi_conv.program.minibatch import Batch
from bbvi_conv.program.noise import Noise
from bbvi_conv.program.program import Program
from bbvi_conv.program.rounds import with_short_rounds
from bbvi_conv.program.scan import repeated, work
from bbvi_conv.program.terms import Terms

LogWeights = Callable[..., Terms]
"""``(theta, phi_sample, phi_density, noise, batch) -> Terms``."""


class TracedLogWeights:
    """``log_weights`` as two graphs, traced when first needed: one where phi_sample is phi_density, one where not."""

    def __init__(self, program: Program) -> None:
        if program.obstacles:
            raise Untraceable("; ".join(program.obstacles))
        self.program = program
        self._graphs: dict[bool, GraphModule] = {}
        self._maps: dict[bool, bool] = {}

    def __call__(
        self,
        theta: dict[str, Tensor],
        phi_sample: dict[str, Tensor],
        phi_density: dict[str, Tensor],
        noise: Noise,
        batch: Batch,
    ) -> Terms:
        """Same values as ``program.log_weights``."""
        joint = phi_density is phi_sample
        self.prepare(joint)
        flat = [*theta.values(), *phi_sample.values(), *(() if joint else phi_density.values()), *noise, *batch.args]
        if batch.indices is not None:
            flat.append(batch.indices)
        return Terms(*self._graphs[joint](*flat))

    @property
    def work(self) -> int:
        """Numbers that one run computes in all."""
        self.prepare(joint=True)
        return work(self._graphs[True])

    def differs(self, x: Tensor) -> bool:
        """Whether the program has other densities at ``x`` than its graph, by more than roundings.

        So it is where a number that the model reads from Python has changed since the graph was traced.
        """
        theta, phi = self.program.split(x)
        noise, batch = self.program.example()
        with torch.no_grad(), self.program.networks_kept():
            runs = (self, self.program.log_weights)
            found, right = ([part.sum() for part in run(theta, phi, phi, noise, batch)] for run in runs)
        return bool(differing([right[0], *found], [right[0], *right]))  # each beside the largest of them

    def maps(self, joint: bool) -> bool:
        """Whether ``vmap`` can map the graph over draws of noise."""
        if joint not in self._maps:
            theta, phi = self.program.split(self.program.initial())
            noise, batch = self.program.example()
            two = Noise(*(torch.stack([part, part]) for part in noise))
            mapped = over_draws(self, (False, False, False, True, False), vectorise=True)
            try:
                mapped(theta, phi, phi if joint else dict(phi), two, batch)
            except Exception:  # whatever vmap cannot do, a loop can
                self._maps[joint] = False
            else:
                self._maps[joint] = True
        return self._maps[joint]

    def prepare(self, joint: bool) -> None:
        """Trace now; to be called outside any ``vmap`` or other tracing.

        Raises:
            Untraceable: with the reason.
        """
        if joint in self._graphs:
            return
        program = self.program
        theta, phi = program.split(program.initial())
        noise, batch = program.example()
        names_t, names_p = list(theta), list(phi)
        names = [*names_t, *names_p, *(() if joint else names_p)]

        def function(*flat: Tensor, tracing: bool = True) -> tuple[Tensor, ...]:
            rest = iter(flat)
            theta = {name: next(rest) for name in names_t}
            sample = {name: next(rest) for name in names_p}
            density = sample if joint else {name: next(rest) for name in names_p}
            noise = Noise(next(rest), next(rest))
            args = tuple(next(rest) for _ in batch.args)
            rows = next(rest) if batch.indices is not None else None
            return tuple(program.log_weights(theta, sample, density, noise, Batch(args, rows), tracing=tracing))

        flat = [*theta.values(), *phi.values(), *(() if joint else phi.values()), *noise, *batch.args]
        if batch.indices is not None:
            flat.append(batch.indices)
        with program.networks_kept():  # clones: the tracer tells inputs apart by identity
            plain = simplify(to_graph(function, *(x.clone() for x in flat)), differentiable=True)
            right = functools.partial(function, tracing=False)
            graph = _with_rounds_together(plain, flat)
            try:
                _check(graph, right, flat, names)
            except Untraceable:
                if graph is plain:
                    raise
                graph = plain
                _check(graph, right, flat, names)
        self._graphs[joint] = graph


def _with_rounds_together(graph: GraphModule, example: Sequence[Tensor]) -> GraphModule:
    """The graph with the rounds of Python loops done at once; itself where that cannot be or does not pay."""
    planned = plan(graph)
    if planned is None:
        return graph
    try:
        run = batched(planned, functools.partial(over_draws, vectorise=True), repeated)
        return simplify(to_graph(run, *(x.clone() for x in example), functional=False), differentiable=True)
    except (Untraceable, RuntimeError):  # an operation that vmap cannot map
        return graph


def _check(graph: GraphModule, function: Callable[..., Any], flat: Sequence[Tensor], names: Sequence[str]) -> None:
    """Compare values and gradients of a graph, in the parameters called ``names``, with those of what was traced.

    Raises:
        Untraceable: where they differ by more than roundings.
    """

    def slopes(run: Callable[..., Any]) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in flat[: len(names)]]
        return total_and_slopes(lambda: run(*leaves, *flat[len(names) :]), leaves)

    right = slopes(function)
    try:
        found = slopes(graph)
    except Exception as error:  # an operation that only forward runs have
        raise Untraceable(first_sentence(error)) from error
    if wrong := differing(found, right):
        name = ("the density", *names)[wrong[0]]
        raise Untraceable(
            f"its graph does not give what the program itself does ({name}): something in it changes from run to "
            "run, or a tensor is changed in a way that a graph cannot follow"
        )


def simplified(function: Callable[..., Any], *example: Tensor) -> GraphModule:
    """A simpler graph of a function made of graphs, with short rounds in its scans; run once.

    It has to give what the function gave.

    Raises:
        Untraceable: as :func:`to_graph`, or where it does not.
    """
    made: list[Any] = []

    def noted(*given: Tensor) -> Any:
        made.append(function(*given))
        return made[-1]

    graph = simplify(to_graph(noted, *example, functional=False))
    graph = with_short_rounds(graph, example, functools.partial(over_draws, vectorise=True))
    with torch.no_grad():
        found, right = ([part.detach() for part in tree_leaves(given)] for given in (graph(*example), made[-1]))
    if differing([found[0], *found], [right[0], *right]):  # which takes the first for the whole
        raise Untraceable("its graph does not give what it was made from, which is a fault of this library's")
    return graph


def over_draws(
    function: Callable[..., Any], mapped: Sequence[bool], *, vectorise: bool, randomness: str = "error"
) -> Callable[..., Any]:
    """Map ``function`` over the leading dimension of the ``mapped`` arguments (pytrees of tensors or None).

    By ``torch.vmap``, or by a loop where the program cannot be vectorised. Both give the same values; ``randomness`` is
    what ``torch.vmap`` does about random operations.
    """

    def merge(args: Sequence[Any], picked: Iterator[Any]) -> list[Any]:
        return [next(picked) if m else a for a, m in zip(args, mapped, strict=True)]

    def call(*args: Any) -> Any:
        moving = [a for a, m in zip(args, mapped, strict=True) if m]
        if vectorise:  # what is not mapped stays outside, so that the identity of its objects is kept
            with _without_advice():
                return torch.vmap(lambda *picked: function(*merge(args, iter(picked))), randomness=randomness)(*moving)
        count = len(next(x for x in tree_leaves(moving) if x is not None))
        picks = (tree_map(lambda x, i=i: x[i], moving) for i in range(count))
        return tree_map(lambda *xs: torch.stack(xs), *[function(*merge(args, iter(pick))) for pick in picks])

    return call


@contextmanager
def _without_advice() -> Iterator[None]:
    """No word from torch, on standard error, about operations that it maps one by one."""
    functorch: Any = torch._C._functorch
    functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_warning_enabled(True)
