"""Memory order around convolutions, written into the graph so that all who read a value agree on it.

Convolutions are given their images channels last, pixel by pixel, which torch's are fastest on. Where a vector has more
lanes than an image has channels, what is computed between a convolution and other data is kept plane by plane: vectors
would be filled with the channels of one pixel, and with three of them thirteen of sixteen lanes would stay empty. For
the same reason a transposed convolution to few channels becomes one of stride 1 that computes whole blocks of pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from bbvi_conv.engine.native.inductor import force_stride_order, stored
from bbvi_conv.program.graphs import PRODUCTS, TURNS

REPEATED = 16
"""Times that an operand of an operation on single numbers is repeated, from which it is settled first."""

MANY = 2**12
"""Numbers that a single one meets, from which it is kept; for fewer, the order of loops gains more than it costs."""

_aten = torch.ops.aten
_FUNCTIONS = {
    *(_aten.pow.Tensor_Scalar, _aten.pow.Tensor_Tensor, _aten.pow.Scalar, _aten.exp.default, _aten.log.default),
    *(_aten.sqrt.default, _aten.rsqrt.default, _aten.div.Tensor, _aten.reciprocal.default, _aten.tanh.default),
    *(_aten.log1p.default, _aten.expm1.default, _aten.sigmoid.default, _aten.softplus.default),
}
"""What is worth keeping where its value, a single number, meets many."""

_DERIVATIVES = {
    *(_aten.softplus_backward.default, _aten.tanh_backward.default, _aten.sigmoid_backward.default),
    *(_aten.threshold_backward.default, _aten.silu_backward.default, _aten.gelu_backward.default),
    *(_aten.elu_backward.default, _aten.leaky_relu_backward.default, _aten.hardtanh_backward.default),
}
"""Operations on numbers in the same place that torch does not say so of."""

_FORWARD, _BACKWARD = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default


class Ordered(Interpreter):
    """Runs a graph with its images in the order that is best for them; to be traced.

    Args:
        graph: plain operations.
        bits: of a vector.
    """

    def __init__(self, graph: GraphModule, bits: int) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self._bits = bits
        self._dear, self._operands = _dear(graph), _operands(graph)

    def run_node(self, n: Node) -> Any:
        """As it is, kept where it would be computed again: a number that is repeated, an operand of a product."""
        value = super().run_node(n)
        if n in self._operands:
            return force_stride_order(value, list(self.env[self._operands[n]].stride()))
        return settled(value) if n in self._dear else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """As it is, but for convolutions of images and their gradients."""
        if target is torch.ops.aten.view.default:  # what was one block of memory when traced may no longer be
            value, size = args
            if value.dim() > 3 and not value.is_contiguous() and list(size[-3:]) != list(value.shape[-3:]):
                value = _in_order(value)  # an image becomes a row of numbers
            return super().call_function(torch.ops.aten.reshape.default, (value, size), kwargs)
        if target is _FORWARD and args[0].dim() == 4:
            return self._forward(*args)
        if target is _BACKWARD and args[0].dim() == 4:
            return self._backward(*args)
        if torch.Tag.pointwise in getattr(target, "tags", ()):
            args = _settled_where_spread(args)
        return super().call_function(target, args, kwargs)

    def _forward(self, image: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        """By blocks of pixels, where a vector holds the channels of one."""
        side = _block(weight, *settings)
        if side is None or weight.shape[1] * side**2 > self._lanes(image):
            given = (_pixels(image), _pixels(weight), bias, *settings)
            return self._planes(super().call_function(_FORWARD, given, {}))
        weight = _of_blocks(weight, side, settings[1][0])
        around = [n // 2 for n in weight.shape[2:]]
        given = (_pixels(image), _pixels(weight), None, [1, 1], around, [1, 1], False, [0, 0], 1)
        blocks = super().call_function(_FORWARD, given, {}).unflatten(1, (-1, side, side))
        blocks = blocks if bias is None else blocks + bias.reshape(-1, 1, 1, 1, 1)
        count, channels, _, _, *size = blocks.shape
        rows = blocks.permute(0, 1, 4, 2, 5, 3)  # image, channel, block and row in it, block and column in it
        return _in_order(rows).reshape(count, channels, *(side * n for n in size))

    def _backward(self, grad: Tensor, image: Tensor, weight: Tensor, *rest: Any) -> tuple[Any, ...]:
        """The bias gradient of a transposed convolution is summed here: torch's, channels last, takes twice as long."""
        *settings, (to_image, to_weight, to_bias) = rest
        planes, transposed = self._planes(grad), settings[4]
        pixels = _pixels(planes)
        given = (pixels, _pixels(image), _pixels(weight), *settings)
        made = super().call_function(_BACKWARD, (*given, (to_image, to_weight, to_bias and not transposed)), {})
        summed = pixels if planes is grad else planes
        return (*made[:2], summed.sum((0, 2, 3)) if to_bias and transposed else made[2])

    def _planes(self, image: Tensor) -> Tensor:
        """Plane by plane, where there are few channels."""
        return _in_order(image) if 1 < image.shape[1] < self._lanes(image) else image

    def _lanes(self, image: Tensor) -> int:
        return self._bits // (8 * image.itemsize)


def _settled_where_spread(args: Any) -> Any:
    """Operands that are repeated over a far larger result, computed and laid out before, not anew for every number."""
    sizes = [value.numel() for value in args if isinstance(value, Tensor)]
    if len(sizes) < 2:
        return args
    few = max(sizes) // REPEATED

    def small(value: Any) -> bool:
        return isinstance(value, Tensor) and 1 < value.numel() <= few

    return tuple(_in_order(value) if small(value) else value for value in args)


def _dear(graph: GraphModule) -> set[Node]:
    """Single numbers that take a function or a division to compute, where they meet many others."""
    found: set[Node] = set()
    dear: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op != "call_function" or torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            continue
        if _count(node) == 1:
            if node.target in _FUNCTIONS or any(n in dear for n in node.all_input_nodes):
                dear.add(node)
        elif _count(node) >= MANY:
            found |= {n for n in node.all_input_nodes if n in dear}
    return found


def _operands(graph: GraphModule) -> dict[Node, Node]:
    """Operands of products that something else reads before, and from what they come that has an order of its own.

    They are computed once, in that order: Inductor would do so anew for all who come before the product.
    """
    place = {node: i for i, node in enumerate(graph.graph.nodes)}
    found: dict[Node, Node] = {}
    for product in graph.graph.nodes:
        if product.target not in PRODUCTS:
            continue
        for operand in product.all_input_nodes:
            node: Any = operand
            while node.target in TURNS and len(node.users) == 1:
                node = node.args[0]
            others = [user for user in node.users if user.target not in TURNS and user is not product]
            source = _ordered_source(node) if any(place[user] < place[product] for user in others) else node
            if source is not None and source is not node:
                found[node] = source
    return found


def _ordered_source(node: Node) -> Node | None:
    """What is computed, not number by number, and gives this value number by number; the first met, of its shape."""
    seen, front = {node}, [node]
    while front:
        node = front.pop(0)
        if node.all_input_nodes and not _by_number(node):
            return node
        for other in node.all_input_nodes:
            if other not in seen and other.target is not _aten.expand.default and _shape(other) == _shape(node):
                seen.add(other)
                front.append(other)
    return None


def _by_number(node: Node) -> bool:
    """Whether each number of the result comes from the numbers in its place."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in _DERIVATIVES


def _shape(node: Node) -> torch.Size | None:
    return getattr(node.meta.get("tensor_meta"), "shape", None)


def _count(node: Node) -> int:
    shape = _shape(node)
    return 0 if shape is None else shape.numel()


def settled(value: Tensor) -> Tensor:
    """Computed in its own shape: read as a vector, as gradients are, each number would be looked for by division."""
    if value.numel() == 1:
        return stored(value)  # type: ignore[no-any-return]
    return force_stride_order(value, list(value.stride()))  # type: ignore[no-any-return]


def _block(
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    more: list[int],
    groups: int,
) -> int | None:
    """The side s of the blocks s x s that a transposed convolution makes of each pixel; None where it does not.

    Over one dimension, y[s i + a] = sum_d x[i + d] w[a + p - s d]: the taps d must lie evenly around zero.
    """
    s, p, k = stride[0], padding[0], weight.shape[-1]
    square = len({*stride}) == len({*padding}) == len({*weight.shape[2:]}) == 1
    if not (transposed and square and {*dilation} == {1} and {*more} == {0} and groups == 1 and s > 1):
        return None
    even = k - s == 2 * p and (k - 1 - p) // s == (s - 1 + p) // s
    return s if even else None


def _of_blocks(weight: Tensor, s: int, p: int) -> Tensor:
    """``(I, C, k, k)`` of a transposed convolution to ``(C s s, I, r, r)`` of one of stride 1, by :func:`_block`."""
    inputs, channels, k, _ = weight.shape
    reach = (s - 1 + p) // s
    r, before = 2 * reach + 1, s * reach - p
    after = s * r - k - before
    taps = torch.nn.functional.pad(weight, (before, after, before, after)).reshape(inputs, channels, r, s, r, s)
    return taps.flip(2, 4).permute(1, 3, 5, 0, 2, 4).reshape(channels * s * s, inputs, r, r)


def _pixels(image: Tensor) -> Tensor:
    """Channels last; said even where tracing has it so, because Inductor would choose anew for what several read."""
    return _laid(image, torch.channels_last)


def _in_order(value: Tensor) -> Tensor:
    """The last dimension without gaps, then the one before it."""
    return _laid(value, torch.contiguous_format)


def _laid(value: Tensor, order: torch.memory_format) -> Tensor:
    return force_stride_order(value, list(torch.empty_like(value, memory_format=order).stride()))  # type: ignore[no-any-return]
