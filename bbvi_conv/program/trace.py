"""Trace a program once into an ATen graph, and map functions over draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map

from bbvi_conv.program.buffers import buffers_kept
from bbvi_conv.program.minibatch import Batch
from bbvi_conv.program.noise import Noise
from bbvi_conv.program.program import Program
from bbvi_conv.program.terms import Terms
from bbvi_conv.program.tracer import trace

LogWeights = Callable[..., Terms]
"""``(theta, phi_sample, phi_density, noise, batch) -> Terms``."""


class Untraceable(RuntimeError):
    """The program cannot become a graph; the reason is the message. The eager engine still runs it."""


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(target.dtype).expand(target.shape)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.copy.default: _copy,
    torch.ops.aten.fill.Scalar: torch.full_like,
    torch.ops.aten._efficientzerotensor.default: torch.zeros,
}
"""``aten.copy``, left by functionalised mutation, has no derivative of its own; ``aten.fill`` has no ``vmap`` rule; and
torch imports its compiler in order to add one of its zero tensors without memory, which second derivatives leave."""


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
            _fix_end(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _shape_varies(node: Node, varying: set[Node]) -> bool:
    """Whether the result has a shape that only the values of this run tell."""
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    deciding = node.all_input_nodes
    if node.target is torch.ops.aten.index.Tensor:  # only a mask decides on a shape, indices do not
        deciding = [n for n in deciding[1:] if n.meta["tensor_meta"].dtype in (torch.bool, torch.uint8)]
    return bool(varying.intersection(deciding))


def _fix_dtype(node: Node) -> None:
    """Write the dtype a factory took from torch's default at tracing time into the graph."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or node.all_input_nodes or node.kwargs.get("dtype") is not None:
        return
    if any(argument.name == "dtype" for argument in schema.arguments):
        node.kwargs = {**node.kwargs, "dtype": node.meta["tensor_meta"].dtype}


_SLICES = (torch.ops.aten.slice.Tensor, torch.ops.aten.slice_scatter.default, torch.ops.aten.slice_backward.default)


def _fix_end(node: Node) -> None:
    """Write the end of an open slice into the graph: under ``vmap`` torch overflows on a strided slice without one."""
    if node.target not in _SLICES:
        return
    args: Any = node.args
    for i, argument in enumerate(args):
        if isinstance(argument, int) and argument == torch.iinfo(torch.int64).max:
            sizes = args[1] if node.target is _SLICES[2] else args[0].meta["tensor_meta"].shape
            node.update_arg(i, sizes[args[i - 2]])


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

        def function(*flat: Tensor) -> tuple[Tensor, ...]:
            rest = iter(flat)
            theta = {name: next(rest) for name in names_t}
            sample = {name: next(rest) for name in names_p}
            density = sample if joint else {name: next(rest) for name in names_p}
            noise = Noise(next(rest), next(rest))
            args = tuple(next(rest) for _ in batch.args)
            rows = next(rest) if batch.indices is not None else None
            return tuple(program.log_weights(theta, sample, density, noise, Batch(args, rows), tracing=True))

        flat = [*theta.values(), *phi.values(), *(() if joint else phi.values()), *noise, *batch.args]
        if batch.indices is not None:
            flat.append(batch.indices)
        with buffers_kept(program.modules):  # clones: the tracer tells inputs apart by identity
            self._graphs[joint] = to_graph(function, *(x.clone() for x in flat))


def over_draws(function: Callable[..., Any], mapped: Sequence[bool], *, vectorise: bool) -> Callable[..., Any]:
    """Map ``function`` over the leading dimension of the ``mapped`` arguments (pytrees of tensors or None).

    By ``torch.vmap``, or by a loop where the program cannot be vectorised. Both give the same values.
    """

    def merge(args: Sequence[Any], picked: Iterator[Any]) -> list[Any]:
        return [next(picked) if m else a for a, m in zip(args, mapped, strict=True)]

    def call(*args: Any) -> Any:
        moving = [a for a, m in zip(args, mapped, strict=True) if m]
        if vectorise:  # what is not mapped stays outside, so that the identity of its objects is kept
            return torch.vmap(lambda *picked: function(*merge(args, iter(picked))))(*moving)
        count = len(next(x for x in tree_leaves(moving) if x is not None))
        picks = (tree_map(lambda x, i=i: x[i], moving) for i in range(count))
        return tree_map(lambda *xs: torch.stack(xs), *[function(*merge(args, iter(pick))) for pick in picks])

    return call
