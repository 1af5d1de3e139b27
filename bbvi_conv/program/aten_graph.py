"""Functions of tensors as graphs of ATen operations, and as simpler ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from bbvi_conv.program.graph_module import Kind, constant
from bbvi_conv.program.tracer import trace


class Untraceable(RuntimeError):
    """The program cannot become a graph; the reason is the message. The eager engine still runs it."""


_aten: Any = torch.ops.aten
_FLOATS = (torch.float32, torch.float64)


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


def to_graph(
    function: Callable[..., Any], *example: Tensor, functional: bool = True, random: bool = False
) -> GraphModule:
    """Trace a function of tensors, returning tensors, into ATen operations without mutation.

    Args:
        function: what to trace.
        example: tensors of the right shapes.
        functional: take mutation out; not needed for a function made of such graphs.
        random: let random operations stay in the graph, which then draws from torch's generator.

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
        if torch.Tag.nondeterministic_seeded in tags and not random:
            raise Untraceable(f"random operation {node.target} is not on the noise tape")
        if node.op == "call_function":
            _fix_dtype(node)
            _fix_promotion(graph, node)
            _fix_ends(node)
            _fix_masks(graph, node)
            _fix_counts(graph, node)
            if node.target is _aten.view.default:  # what is one block of memory here may not be under vmap
                node.target = _aten.reshape.default
    graph.graph.eliminate_dead_code()
    graph.recompile()
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


_NOT_TAGGED = {_aten.floor_divide.default, _aten.floor_divide.Scalar, _aten.logsumexp.default}
"""Operations on numbers that torch does not list as such."""


def _fix_promotion(graph: GraphModule, node: Node) -> None:
    """Let what makes whole numbers floats, at torch's default dtype of tracing time, be given floats: ``0.1 * n``."""
    kind, given = node.meta.get("tensor_meta"), node.all_input_nodes
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()) and node.target not in _NOT_TAGGED:
        return
    if not given or node.kwargs.get("dtype") is not None or not isinstance(kind, Kind) or kind.dtype not in _FLOATS:
        return
    kinds = [old for old in (source.meta.get("tensor_meta") for source in given) if isinstance(old, Kind)]
    if len(kinds) < len(given) or any(old.dtype.is_floating_point or old.dtype.is_complex for old in kinds):
        return
    for source, old in zip(given, kinds, strict=True):
        with graph.graph.inserting_before(node):
            cast = graph.graph.call_function(_aten._to_copy.default, (source,), {"dtype": kind.dtype})
        cast.meta["tensor_meta"] = old._replace(dtype=kind.dtype)
        node.replace_input_with(source, cast)


def _fix_counts(graph: GraphModule, node: Node) -> None:
    """Give a binomial counts and probabilities of one shape: under ``vmap`` torch warns of others."""
    if node.target is not _aten.binomial.default:
        return
    whole: list[Node] = []
    for one, other in (node.args[:2], node.args[1::-1]):
        with graph.graph.inserting_before(node):
            zero = graph.graph.call_function(_aten.mul.Tensor, (other, 0))
            whole.append(graph.graph.call_function(_aten.add.Tensor, (one, zero)))
        zero.meta["tensor_meta"] = other.meta["tensor_meta"]  # type: ignore[union-attr]
        whole[-1].meta["tensor_meta"] = node.meta["tensor_meta"]
    node.args = (*whole, *node.args[2:])


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
    """Type and first sentence of an error, in one line, without the table of shapes that Pyro adds."""
    text = " ".join(str(error).split()).split(" Trace Shapes:")[0].split(". ")[0]
    return f"{type(error).__name__}: {text[:200]}"
