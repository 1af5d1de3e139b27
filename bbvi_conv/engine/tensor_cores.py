r"""Products of float32 matrices on the tensor cores of a GPU, as accurate as those of its float32 units.

A float32 number is the sum of three of bfloat16, and six products of the parts of two numbers are their product, as in
:mod:`bbvi_conv.engine.native.tiles`, which gives the equation. Where TF32 is allowed, with its 11 bits, two parts and
three products keep 16. Tensor cores do not round the sums that they make but cut them off: theirs are those of short
blocks (``product_kernel.py``).

Parts are plain operations of the graph: fused kernels compute them together with the numbers, and whoever reads these
later reads the parts, which sum to them. Whole numbers up to 255, as images have them, are one part.

Infinite numbers, and the largest finite ones, which would be rounded to infinity, make a result that is not a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from bbvi_conv.engine.native.functions import softplus
from bbvi_conv.program.aten_graph import to_graph
from bbvi_conv.program.constants import is_fresh
from bbvi_conv.program.graph_module import Kind
from bbvi_conv.program.graphs import turned

_aten: Any = torch.ops.aten

DEPTH = 32
"""Terms that tensor cores add up before their sum is added, rounded, to that of the others."""

COLUMNS = 64
"""Of a block."""

AT_ONCE, ROUNDS_OF_LARGE = 396, 792
"""Programs that an H200 has running at once with blocks of 64 rows, and three rounds of those with 128."""

FUSED, FEW = 7, 100
"""Parts of a sum up to which the kernel that reads them adds them up, and programs that are worth more parts."""

NARROW = 32
"""Rows, columns, or numbers in a sum below which blocks are mostly empty: only small products are then quicker."""

LEAST, SMALL, LARGE = 2**22, 2**26, 2**30
"""Multiplications: from where parts pay at all; for narrow matrices only up to; and where TF32 is as quick with two."""

_WHOLE = (torch.uint8, torch.int8, torch.bool)


class Blocks(NamedTuple):
    """How a product ``(M, K) @ (K, N)`` is divided among programs.

    Attributes:
        rows: of the block that a program computes; its columns are :data:`COLUMNS`.
        parts: of the sum over K; a program adds up one.
        length: terms of such a part, a multiple of :data:`DEPTH`.
    """

    rows: int
    parts: int
    length: int


def blocks(m: int, n: int, k: int) -> Blocks:
    """Large blocks read less; where there are few, their sums are divided, so that no part of the GPU waits."""
    across = math.ceil(n / COLUMNS)
    large = math.ceil(m / 128) * across * math.ceil(k / 1_024) >= ROUNDS_OF_LARGE
    rows = 128 if large else 64
    programs = math.ceil(m / rows) * across
    most = FUSED if FUSED * programs >= FEW else 1 << (FEW // programs).bit_length()
    wanted = ROUNDS_OF_LARGE // programs if large else min(AT_ONCE // programs, most)
    length = DEPTH * math.ceil(k / max(wanted, 1) / DEPTH)
    return Blocks(rows, math.ceil(k / length), length)


@torch.library.custom_op("bbvi_conv::products_of_parts", mutates_args=())
def products_of_parts(factors: list[Tensor], counts: list[int], sums: list[bool]) -> list[Tensor]:
    """Partial sums of one or two products of matrices that are themselves sums of bfloat16 ones.

    Args:
        factors: of each product one to three matrices ``(M, K)`` of the same strides, the largest numbers first, and as
            many ``(K, N)``.
        counts: how many of either, product by product.
        sums: whether sums of the rows of the first are wanted as well.

    Returns:
        Of each product, float32 ``(S, M, N)``, and ``(S, M)`` or ``(S, 0)``, with S as :func:`blocks` says; their sums
        over S are the results.
    """
    made: list[Tensor] = _empty(factors, counts, sums)
    pairs = zip(_pairs(factors, counts), made[::2], made[1::2], strict=True)
    products = [(a, b, out, rows) for (a, b), out, rows in pairs]
    if factors[0].is_cuda:
        from bbvi_conv.engine.product_kernel import launch

        launch(products)
        return made
    for a, b, out, rows in products:
        left, right = (torch.stack(parts).double().sum(0) for parts in (a, b))
        length = blocks(len(left), right.shape[1], len(right)).length
        for part, (x, y) in enumerate(zip(left.split(length, 1), right.split(length), strict=True)):  # type: ignore[no-untyped-call]
            out[part] = x @ y
            rows[part] = x.sum(1)[: rows.shape[1]]
    return made


@products_of_parts.register_fake
def _empty(factors: list[Tensor], counts: list[int], sums: list[bool]) -> list[Tensor]:
    made = []
    for (a, b), summed in zip(_pairs(factors, counts), sums, strict=True):
        (m, k), n = a[0].shape, b[0].shape[1]
        parts = blocks(m, n, k).parts
        made += [a[0].new_empty(shape, dtype=torch.float32) for shape in ((parts, m, n), (parts, m if summed else 0))]
    return made


def _pairs(factors: list[Tensor], counts: list[int]) -> list[tuple[list[Tensor], list[Tensor]]]:
    given = iter(factors)
    parts = [list(islice(given, count)) for count in counts]
    return list(zip(parts[::2], parts[1::2], strict=True))


def split(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """The parts of float32 numbers, in bfloat16: three sum to the numbers, two to their first 16 bits.

    All but the last are rounded by their bits, for compilers leave out a cast that is cast back.
    """
    made = []
    for _ in range(count - 1):
        made.append(((x.view(torch.int32) + 0x8000) & -0x10000).view(torch.float32))
        x = x - made[-1]
    return tuple(part.bfloat16() for part in (*made, x))


def on_tensor_cores(graph: GraphModule, inputs: Sequence[Tensor], *, tf32: bool) -> GraphModule:
    """The graph with products by parts where they are quicker, and softplus by fewer operations; ``inputs`` change.

    Args:
        graph: of plain operations.
        inputs: to run it on.
        tf32: whether products may round float32 numbers to 11 bits.
    """
    return to_graph(_Quicker(graph, tf32).run, *inputs, functional=False)


class _Quicker(Interpreter):
    def __init__(self, graph: GraphModule, tf32: bool) -> None:
        super().__init__(graph)
        self._place = {node: place for place, node in enumerate(graph.graph.nodes)}
        self._tf32 = tf32
        sizes = {node: _multiplications(node) for node in graph.graph.nodes}
        self._left = [node for node, size in sizes.items() if size and not (tf32 and size >= LARGE)]
        self._large = {node for node, size in sizes.items() if size and tf32 and size >= LARGE}
        kept = {node for product in self._left for node in (*_bias(product), *map(_start, _factors(product)))}
        for done_with in self.user_to_last_uses.values():
            done_with[:] = [node for node in done_with if node not in kept]
        self._parts: dict[Node, tuple[Tensor, ...]] = {}
        self._known: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """What the node gives."""
        if n in self._left:
            self._by_parts(n)
        if n in self._known:
            return self._known.pop(n)
        if n in self._large:
            return self._by_library(n)
        if n.target is _aten.softplus.default and _kind(n.args[0]).dtype is torch.float32:
            made = softplus(*self.fetch_args_kwargs_from_env(n)[0])
            return super().run_node(n) if made is NotImplemented else made
        return super().run_node(n)

    def _by_library(self, node: Node) -> Tensor:
        """Tensor cores read factors of TF32 along the sum: a small second one that lies otherwise is turned round."""
        (*bias, left, right), _ = self.fetch_args_kwargs_from_env(node)
        if right.stride(1) == 1 and 8 * right.numel() <= left.numel():
            right = right.t().contiguous().t()
        return node.target(*bias, left, right)  # type: ignore[operator,no-any-return]

    def _by_parts(self, node: Node) -> None:
        """Compute a product, and in the same kernel another one whose factors are at hand: both together fill a GPU."""
        group = [node, *self._partner(node)]
        factors, counts, sums = [], [], []
        for one in group:
            self._left.remove(one)
            sums.append(self._sums(one))
            for parts in map(self._taken_apart, _factors(one)):
                factors += parts
                counts.append(len(parts))
        made = products_of_parts(factors, counts, [bool(wanted) for wanted in sums])
        for one, wanted, out, rows in zip(group, sums, made[::2], made[1::2], strict=True):
            result = _added(out)
            self._known[one] = sum((self.env[bias] for bias in _bias(one)), start=result)
            for total in wanted:
                self._known[total] = _added(rows).view(_kind(total).shape)

    def _partner(self, node: Node) -> list[Node]:
        if _blocks(node).rows == 128:
            return []
        others = (one for one in self._left if one is not node and _blocks(one).rows == 64)
        return [one for one in others if all(n in self.env for n in (*_bias(one), *map(_start, _factors(one))))][:1]

    def _sums(self, node: Node) -> list[Node]:
        """Sums over all rows of the matrix that the first factor is the transpose of, where they come later."""
        whole = turned(_factors(node)[0])
        if whole is None:
            return []
        sums = (user for user in whole.users if user.target is _aten.sum.dim_IntList and not user.kwargs)
        found = [one for one in sums if one.args[1] in ([0], [-2])]
        return found if all(self._place[one] > self._place[node] for one in found) else []

    def _taken_apart(self, factor: Node) -> list[Tensor]:
        """The parts of a factor; from then on what was computed is read as their sum."""
        start = _start(factor)
        if start not in self._parts:
            count = 1 if _is_whole(start) else 2 if self._tf32 else 3
            self._parts[start] = split(self.env[start], count)
            if is_fresh(start) and count != 2:
                first, *rest = (part.float() for part in self._parts[start])
                self.env[start] = sum(rest, start=first)
        return [part if start is factor else part.t() for part in self._parts[start]]


def _added(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _kind(node: Any) -> Kind:
    kind: Kind = node.meta["tensor_meta"]
    return kind


def _factors(product: Node) -> tuple[Node, Node]:
    return product.args[-2:]  # type: ignore[return-value]


def _bias(product: Node) -> tuple[Node, ...]:
    return product.args[:-2]  # type: ignore[return-value]


def _blocks(product: Node) -> Blocks:
    left, right = map(_kind, _factors(product))
    return blocks(left.shape[0], right.shape[1], left.shape[1])


def _multiplications(node: Node) -> int:
    """Of a product of float32 matrices that is quicker on tensor cores; otherwise zero."""
    if node.target not in (_aten.mm.default, _aten.addmm.default) or node.kwargs:
        return 0
    left, right = map(_kind, _factors(node))
    (m, k), n = left.shape, right.shape[1]
    size: int = m * k * n
    quicker = SMALL > size >= LEAST if min(m, k, n) < NARROW else size >= LEAST
    numbers = max(m * k, k * n, m * n * _blocks(node).parts)
    return size if left.dtype is torch.float32 and quicker and numbers < 2**31 else 0


def _start(factor: Node) -> Node:
    """The matrix that a factor is, or is the transpose of."""
    return turned(factor) or factor


def _is_whole(node: Node) -> bool:
    """Whether these are whole numbers that bfloat16 holds."""
    return node.target is _aten._to_copy.default and _kind(node.args[0]).dtype in _WHOLE
