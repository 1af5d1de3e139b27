"""Trace a program once into an ATen graph, and map functions over draws."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from bbvi_conv.program.batching import batched, plan
from bbvi_conv.program.buffers import buffers_kept
from bbvi_conv.program.faithful import differing, total_and_slopes
from bbvi_conv.program.graph_module import constant
from bbvi_conv.program.graphs import simplify
from bbvi_conv.program.minibatch import Batch
from bbvi_conv.program.noise import Noise
from bbvi_conv.program.program import Program
from bbvi_conv.program.terms import Terms
from bbvi_conv.program.tracer import trace

LogWeights = Callable[..., Terms]
"""``(theta, phi_sample, phi_density, noise, batch) -> Terms``."""


class Untraceable(RuntimeError):
    """The program cannot become a graph; the reason is the message. The eager engine still runs it."""


_aten: Any = torch.ops.aten


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(target.dtype).expand(target.shape)


def _index_put(target: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    """One number wherever a mask says so; other writes are left to torch."""
    mask, *more = indices
    if mask is None or mask.dtype is not torch.bool or more or values.numel() != 1 or accumulate:
        return NotImplemented
    mask = mask.reshape(*mask.shape, *[1] * (target.dim() - mask.dim()))
    return torch.where(mask, values.reshape(()), target)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _aten.copy.default: _copy,
    _aten.fill.Scalar: torch.full_like,
    _aten.index_put.default: _index_put,
    _aten._efficientzerotensor.default: torch.zeros,
}
"""``aten.copy``, left by functionalised mutation, has no derivative of its own; ``aten.fill`` has no ``vmap`` rule, nor
has ``aten.index_put`` with a mask, as left by ``x[mask] = 0``; and torch imports its compiler in order to add one of
its zero tensors without memory, which second derivatives leave."""


def to_graph(function: Callable[..., Any], *example: Tensor, functional: bool = True) -> GraphModule:
    """Trace a function of tensors, returning tensors, into ATen operations without mutation.

    Args:
        function: what to trace.
        example: tensors of the right shapes.
        functional: take mutation out; not needed for a function made of such graphs.

    Raises:
        Untraceable: if Python's flow or a shape depends on values, or a random operation remains.
    """
    try:
        pure = torch.func.functionalize(function, remove="mutations") if functional else function
        graph = trace(pure, *example, decompositions=DECOMPOSITIONS)
    except Exception as error:
        raise Untraceable(first_sentence(error)) from error
    varying: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or varying.intersection(node.all_input_nodes):
            varying.add(node)
        if _shape_varies(node, varying):
            raise Untraceable(f"the shape of a result depends on values, as with a boolean mask ({node.target})")
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            raise Untraceable(f"random operation {node.target} is not on the noise tape")
        if node.op == "call_function":
            _fix_dtype(node)
            _fix_ends(node)
            _fix_masks(graph, node)
            if node.target is _aten.view.default:  # what is one block of memory here may not be under vmap
                node.target = _aten.reshape.default
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def simplified(function: Callable[..., Any], *example: Tensor) -> GraphModule:
    """A simpler graph of a function made of graphs, run once: it has to give what the function gave.

    Raises:
        Untraceable: as :func:`to_graph`, or where it does not.
    """
    made: list[Any] = []

    def noted(*given: Tensor) -> Any:
        made.append(function(*given))
        return made[-1]

    graph = simplify(to_graph(noted, *example, functional=False))
    with torch.no_grad():
        found, right = ([part.detach() for part in tree_leaves(given)] for given in (graph(*example), made[-1]))
    if differing([found[0], *found], [right[0], *right]):  # which takes the first for the whole
        raise Untraceable("its graph does not give what it was made from, which is a fault of this library's")
    return graph


def _shape_varies(node: Node, varying: set[Node]) -> bool:
    """Whether the result has a shape that only the values of this run tell."""
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    return bool(varying.intersection(_masks(node) if node.target is _aten.index.Tensor else node.all_input_nodes))


def _masks(node: Node) -> list[Node]:
    """What decides on the shape of the tensor that is picked out: masks do, indices do not."""
    indices: Any = node.args[1]
    return [n for n in indices if n is not None and n.meta["tensor_meta"].dtype in (torch.bool, torch.uint8)]


def _fix_masks(graph: GraphModule, node: Node) -> None:
    """Write the places that a constant mask picks into the graph: under ``vmap``, and compiled, there are no masks."""
    if node.target is not _aten.index.Tensor or not (masks := _masks(node)):
        return
    found: list[Node | None] = []
    for indices in node.args[1]:  # type: ignore[union-attr]
        if indices not in masks:
            found.append(indices)  # type: ignore[arg-type]
            continue
        for places in _value(graph, indices).nonzero().unbind(1):  # type: ignore[arg-type]
            with graph.graph.inserting_before(node):
                found.append(constant(graph, places, f"_{node.name}_{len(found)}"))
    node.update_arg(1, found)


def _value(graph: GraphModule, node: Node) -> Any:
    """What a node gives that depends on no input of the graph."""
    if node.op == "get_attr":
        return getattr(graph, str(node.target))
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: _value(graph, n))
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _fix_dtype(node: Node) -> None:
    """Write the dtype a factory took from torch's default at tracing time into the graph."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or node.all_input_nodes or node.kwargs.get("dtype") is not None:
        return
    if any(argument.name == "dtype" for argument in schema.arguments):
        node.kwargs = {**node.kwargs, "dtype": node.meta["tensor_meta"].dtype}


_SLICES = {_aten.slice.Tensor: 1, _aten.slice_scatter.default: 2, _aten.slice_backward.default: 2}
"""Operation -> where its arguments name the dimension; start and end follow."""


def _fix_ends(node: Node) -> None:
    """Write starts and ends of slices as places from the front: under ``vmap`` torch misreads other ones."""
    if node.target not in _SLICES:
        return
    args: Any = node.args
    where = _SLICES[node.target]
    sizes = args[1] if node.target is _aten.slice_backward.default else args[0].meta["tensor_meta"].shape
    size = sizes[args[where] if len(args) > where else 0]
    for i, end in enumerate(args[where + 1 : where + 3], where + 1):
        if isinstance(end, int):
            node.update_arg(i, max(end + size, 0) if end < 0 else min(end, size))


def first_sentence(error: Exception) -> str:
    """Type and first sentence of an error, in one line."""
    text = " ".join(str(error).split()).split(". ")[0]
    return f"{type(error).__name__}: {text[:200]}"


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
        with buffers_kept(program.modules):  # clones: the tracer tells inputs apart by identity
            graph = simplify(to_graph(function, *(x.clone() for x in flat)), differentiable=True)
            graph = _with_rounds_together(graph, flat)
            _check(graph, functools.partial(function, tracing=False), flat, names)
        self._graphs[joint] = graph


def _with_rounds_together(graph: GraphModule, example: Sequence[Tensor]) -> GraphModule:
    """The graph with what a Python loop did round by round done at once, where that can be and pays."""
    groups = plan(graph)
    if groups is None:
        return graph
    try:
        run = batched(graph, groups, functools.partial(over_draws, vectorise=True))
        made = to_graph(run, *(x.clone() for x in example), functional=False)
    except (Untraceable, RuntimeError):  # an operation that vmap cannot map
        return graph
    return simplify(made, differentiable=True)


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


def over_draws(function: Callable[..., Any], mapped: Sequence[bool], *, vectorise: bool) -> Callable[..., Any]:
    """Map ``function`` over the leading dimension of the ``mapped`` arguments (pytrees of tensors or None).

    By ``torch.vmap``, or by a loop where the program cannot be vectorised. Both give the same values.
    """

    def merge(args: Sequence[Any], picked: Iterator[Any]) -> list[Any]:
        return [next(picked) if m else a for a, m in zip(args, mapped, strict=True)]

    def call(*args: Any) -> Any:
        moving = [a for a, m in zip(args, mapped, strict=True) if m]
        if vectorise:  # what is not mapped stays outside, so that the identity of its objects is kept
            with _without_advice():
                return torch.vmap(lambda *picked: function(*merge(args, iter(picked))))(*moving)
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
