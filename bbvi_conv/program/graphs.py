"""ATen graphs: what they give, their constants as inputs, and fewer operations for the same function."""

from __future__ import annotations

import cmath
import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from bbvi_conv.program.constants import changes, fold, is_fresh, overwritten
from bbvi_conv.program.graph_module import WrittenLate
from bbvi_conv.program.lookups import without_lookup
from bbvi_conv.program.pieces import Pieces, joined

_aten: Any = torch.ops.aten

_SAME = (_aten.detach.default, _aten.alias.default, _aten.clone.default, _aten.lift_fresh_copy.default)
_VIEWS = (_aten.view.default, _aten._unsafe_view.default)
_RESHAPES = (_aten.expand.default, _aten.reshape.default)
_ONE = (_aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Tensor, _aten.div.Scalar)
_ZERO = (_aten.add.Tensor, _aten.sub.Tensor)
TURNS = (_aten.t.default, _aten.permute.default, _aten.transpose.int)
_FILLS = {_aten.fill_.Scalar: _aten.full_like.default, _aten.zero_.default: _aten.zeros_like.default}
"""``aten.fill`` and ``aten.zero``, which give a result of their own, have no ``vmap`` rule."""


CONVOLUTIONS = (_aten.convolution.default, _aten.convolution_backward.default)
PRODUCTS = (*(_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default), *CONVOLUTIONS)
"""Products of matrices, and convolutions."""

_FACTORS = ("aten::linalg_", "aten::_linalg_", "aten::cholesky", "aten::triangular_solve", "aten::lu_")

NARROW = 64
"""Columns up to which a tall constant matrix is kept columns first: its rows then fill whole vectors."""


WRITTEN = (0.0, 1.0)
"""Sizes of numbers that are a part of the program: adding them, or multiplying by them, is not done at all."""


def results(graph: GraphModule) -> list[Any]:
    """Shape and dtype of each result, as tracing saw them."""
    (made,) = graph.graph.output_node().args
    assert isinstance(made, (list, tuple))
    return [node.meta["tensor_meta"] for node in made if isinstance(node, Node)]


def widths(graph: GraphModule) -> list[int]:
    """Numbers in each tensor that an evaluation computes."""
    kinds = (node.meta.get("tensor_meta") for node in graph.graph.nodes if node.op == "call_function")
    return [kind.shape.numel() for kind in kinds if kind is not None]


def widest(graph: GraphModule) -> int:
    """Numbers in the largest of them."""
    return max(widths(graph), default=1)


def round_products(graph: GraphModule, dtype: torch.dtype) -> int:
    """Let matrix products and convolutions of float32 numbers take and give numbers of ``dtype``; all else stays.

    Sums inside a product are the processor's, in float32 or better. Changes ``graph``.

    Returns:
        How many products there are.
    """
    products = _products(graph)
    for node in products:
        for source in node.all_input_nodes:
            with graph.graph.inserting_before(node):
                node.replace_input_with(source, _cast(graph, source, dtype))
        for made in [node] if "tensor_meta" in node.meta else list(node.users):
            with graph.graph.inserting_after(made):
                back = _cast(graph, made, torch.float32)
            for user in [user for user in made.users if user is not back]:
                user.replace_input_with(made, back)
            made.meta["tensor_meta"] = made.meta["tensor_meta"]._replace(dtype=dtype)
    graph.recompile()
    return len(products)


def has_products(graph: GraphModule) -> bool:
    """Whether there are matrix products or convolutions of float32 numbers."""
    return bool(_products(graph))


def _products(graph: GraphModule) -> list[Node]:
    return [
        node
        for node in graph.graph.nodes
        if node.target in PRODUCTS and node.args[0].meta["tensor_meta"].dtype is torch.float32
    ]


def _cast(graph: GraphModule, source: Node, dtype: torch.dtype) -> Node:
    cast = graph.graph.call_function(_aten._to_copy.default, (source,), {"dtype": dtype})
    cast.meta["tensor_meta"] = source.meta["tensor_meta"]._replace(dtype=dtype)
    return cast


def reordered(graph: GraphModule, order: Sequence[int]) -> GraphModule:
    """The graph with its inputs in another order: first the one whose number comes first."""
    inner = Graph()
    known: dict[Node, Node] = {}
    inputs = graph.graph.find_nodes(op="placeholder")
    for node in [*(inputs[i] for i in order), *(node for node in graph.graph.nodes if node.op != "placeholder")]:
        known[node] = inner.node_copy(node, known.__getitem__)
    return WrittenLate(graph, inner)


def is_dear(node: Node) -> bool:
    """Whether a node is a product of matrices, a convolution, a factorization or a solution of linear equations."""
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    return node.target in (*PRODUCTS, _aten.mv.default) or name.startswith(_FACTORS)


def result_of(node: Node) -> Node:
    """Of one of several results of an operation that operation, else the node itself."""
    return node.args[0] if node.target is operator.getitem else node  # type: ignore[return-value]


def lift(graph: GraphModule, *, numbers: bool) -> tuple[GraphModule, list[Tensor]]:
    """The graph with its constant tensors as further inputs, after the others; and these, each in memory of its own.

    Args:
        graph: any.
        numbers: whether single numbers are inputs as well, but for :data:`WRITTEN` ones, so that the graph stays the
            same for another scale of a prior, other data that it was computed from, and another step size; else they
            are written into the graph.
    """
    inner = Graph()
    known: dict[Node, Node] = {}
    for node in graph.graph.find_nodes(op="placeholder"):
        known[node] = inner.node_copy(node)
    lifted: dict[Any, Node] = {}
    constants: list[Tensor] = []
    places: set[int] = set()
    unsteady = overwritten(graph)
    values = {node: value for node in graph.graph.nodes if (value := _constant(graph, node, unsteady)) is not None}
    for node, value in values.items():
        name = node.target if node.op == "get_attr" else node
        if name not in lifted and (value.dim() or (numbers and not _is_written(value.item()))):
            lifted[name] = inner.placeholder(f"constant_{len(constants)}")
            constant = _columns_first(value.detach())
            place = constant.untyped_storage().data_ptr()
            constants.append(constant.clone() if place in places else constant)
            places.add(place)
        if name in lifted:
            known[node] = lifted[name]
    for node in graph.graph.nodes:
        if node in known:
            continue
        if node in values:
            value = values[node]
            where = {} if value.device.type == "cpu" else {"device": value.device}
            kind: Any = {"dtype": value.dtype, **where}
            known[node] = inner.call_function(_aten.full.default, ([], value.item()), kind)
            known[node].meta = dict(node.meta)
        else:
            known[node] = inner.node_copy(node, known.__getitem__)
    return WrittenLate(graph, inner), constants


def _constant(graph: GraphModule, node: Node, unsteady: Collection[Node]) -> Tensor | None:
    """The value of a constant tensor, and of a single number that is made in the graph and stays as it is."""
    if node.op == "get_attr":
        value: Tensor = getattr(graph, str(node.target))
        return value
    if node.target is _aten.full.default and not node.args[0] and node not in unsteady:
        return torch.full((), node.args[1], **node.kwargs)  # type: ignore[arg-type]
    return None


def _is_written(number: complex) -> bool:
    return abs(number) in WRITTEN or not cmath.isfinite(number)


def simplify(graph: GraphModule, *, differentiable: bool = False) -> GraphModule:
    r"""The same function without what it computes twice or anew from constants, and what changes nothing.

    Changes ``graph`` and returns it.

    ``detach`` stays where the graph is ``differentiable``; in others it has done its work. A guide that runs twice at
    equal parameters, as sticking the landing has it, then runs once; and of the two equal halves of the gradient of a
    function of :math:`A A^\top` one. Look-ups of entries in their order become slices.
    """
    for node in graph.graph.nodes:
        if node.target in _VIEWS:  # of what may no longer be one block of memory
            node.target = _aten.reshape.default
        give_anew(node)
    unsteady, pieces = overwritten(graph), Pieces()
    fold(graph, unsteady)
    seen: dict[Any, Node] = {}
    symmetric: set[Node] = set()
    for node in list(graph.graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        if node in unsteady or not unsteady.isdisjoint(node.all_input_nodes):  # what it reads may be another later
            continue
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):  # each draws for itself
            continue
        detached = differentiable and node.target is _aten.detach.default
        same = (None if detached else _same_as(node)) or _turned_back(node, symmetric) or without_lookup(graph, node)
        same, key = same or joined(graph, node, pieces), _key(node)
        if same is None:
            same = seen.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.graph.erase_node(node)
        elif _is_log_of_own_value(node):
            seen[key] = _make_zero(graph, node)
        elif _is_symmetric(node, symmetric):
            symmetric.add(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def give_anew(node: Node) -> None:
    """Let an operation that changes what nothing else reads give a result of its own: it then fuses with others."""
    source = node.args[0] if node.args else None
    if not changes(node) or not isinstance(source, Node) or len(source.users) > 1 or not is_fresh(source):
        return
    name, overload = node.target._schema.name.removeprefix("aten::"), node.target._overloadname  # type: ignore[union-attr]
    packet = getattr(_aten, name.removesuffix("_"), None)
    if node.target in _FILLS:
        node.target = _FILLS[node.target]
    elif name.endswith("_") and hasattr(packet, overload):
        node.target = getattr(packet, overload)


def _same_as(node: Node) -> Node | None:
    """The input that the node gives back as it is, if it does."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or node.kwargs:
        return None
    kept = _kind(node) == _kind(source) is not None
    if node.target in _SAME:
        return source if kept else None
    neutral = 1 if node.target in _ONE else 0 if node.target in _ZERO else None
    unchanged = node.target in _RESHAPES or (
        neutral is not None and isinstance(node.args[1], (int, float)) and node.args[1] == neutral
    )
    return source if kept and unchanged else None


def _turned_back(node: Node, symmetric: set[Node]) -> Node | None:
    """What a matrix turned over twice was, or a symmetric one is."""
    source = turned(node)
    if source is None or _kind(node) is None:
        return None
    return source if source in symmetric else turned(source)


def turned(node: Node) -> Node | None:
    """The matrix that the node is the transpose of, if it is one."""
    if node.target not in TURNS:
        return None
    source, *order = node.args
    kind = _kind(source)  # type: ignore[arg-type]
    if kind is None or len(kind[0]) != 2:
        return None
    if node.target is _aten.permute.default:
        turns = [n % 2 for n in order[0]] == [1, 0]  # type: ignore[operator,union-attr]
    else:  # of two dimensions, or of none, which are all
        turns = len({n % 2 for n in order}) != 1  # type: ignore[operator]
    return source if turns else None  # type: ignore[return-value]


def _is_symmetric(node: Node, symmetric: set[Node]) -> bool:
    """Whether a matrix is a product with its own transpose, or computed, number by number, from such ones alone."""
    kind = _kind(node)
    if kind is None or len(kind[0]) != 2 or kind[0][0] != kind[0][1] or not _is_only_read(node):
        return False
    if node.target is _aten.mm.default:
        first, second = node.args
        return turned(first) is second or turned(second) is first  # type: ignore[arg-type]
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return False
    return all(n in symmetric or _is_one_number(n) for n in node.all_input_nodes)


def _is_only_read(node: Node) -> bool:
    """Whether nothing that shares its memory, but transposes that are only read, could be changed."""
    return all(is_fresh(user) or (user.target in TURNS and all(map(is_fresh, user.users))) for user in node.users)


def _is_one_number(node: Node) -> bool:
    """Whether a tensor repeats a single number."""
    source = node.args[0] if node.target is _aten.expand.default else node
    kind = _kind(source) if isinstance(source, Node) else None
    return kind is not None and set(kind[0]) <= {1}


def _kind(node: Node) -> tuple[Any, ...] | None:
    meta = node.meta.get("tensor_meta")
    return None if meta is None or not hasattr(meta, "shape") else (tuple(meta.shape), meta.dtype)


def _key(node: Node) -> Any:
    def frozen(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return (type(value), *map(frozen, value))
        if isinstance(value, dict):
            return tuple((name, frozen(part)) for name, part in value.items())
        return (type(value), str(value)) if isinstance(value, float) else (type(value), value)

    try:
        key = (node.target, frozen(node.args), frozen(node.kwargs))
        hash(key)
    except TypeError:
        return node
    return key


def _is_log_of_own_value(node: Node) -> bool:
    """Whether this is the log-density of a Delta at the value it was made with: ``log(float(value == value))``.

    Computed twice in compiled code, a value may differ from itself by a rounding, and its density would be zero.
    """
    number = node.args[0] if node.target is _aten.log.default else None
    equal = number.args[0] if isinstance(number, Node) and number.target is _aten._to_copy.default else None
    return isinstance(equal, Node) and equal.target is _aten.eq.Tensor and equal.args[0] is equal.args[1]


def _make_zero(graph: GraphModule, node: Node) -> Node:
    meta, source = node.meta["tensor_meta"], node.args[0]
    with graph.graph.inserting_before(node):
        zero = graph.graph.call_function(_aten.zeros_like.default, (source,))
    zero.meta["tensor_meta"] = meta
    node.replace_all_uses_with(zero)
    graph.graph.erase_node(node)
    return zero


def _columns_first(value: Tensor) -> Tensor:
    if value.dim() == 2 and value.shape[1] <= NARROW and value.shape[0] >= 4 * value.shape[1]:
        return value.t().contiguous().t()
    return value.contiguous()
