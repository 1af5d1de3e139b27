"""Memory order around convolutions: what has few channels is kept plane by plane.

Inductor gives convolutions their images channels last, pixel by pixel, and what follows fills vectors with the channels
of a pixel as soon as something else in the same kernel, such as the data, lies plane by plane. With three channels that
leaves thirteen of sixteen lanes empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from bbvi_conv.engine.native.inductor import force_stride_order

_FORWARD, _BACKWARD = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default


def planes_first(graph: GraphModule, bits: int) -> GraphModule:
    """Put results of convolutions and gradients that enter them plane by plane, where their channels fill no vector.

    Changes ``graph`` and returns it.

    Args:
        graph: with ``node.meta["val"]``.
        bits: of a vector.
    """
    for node in list(graph.graph.nodes):
        if node.target is _FORWARD and _few_channels(node, bits):
            with graph.graph.inserting_after(node):
                made = _contiguous(graph, node)
            node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
        elif node.target is _BACKWARD and _few_channels(node.args[0], bits):
            with graph.graph.inserting_before(node):
                node.update_arg(0, _contiguous(graph, node.args[0]))
    graph.recompile()
    return graph


def _few_channels(node: Any, bits: int) -> bool:
    value: Tensor = node.meta["val"]
    return value.dim() == 4 and 1 < value.shape[1] < bits // (8 * value.itemsize)


def _contiguous(graph: GraphModule, node: Node) -> Node:
    value: Tensor = node.meta["val"]
    plain = torch.empty_like(value, memory_format=torch.contiguous_format)
    made = graph.graph.call_function(force_stride_order, (node, list(plain.stride())))
    made.meta["val"] = plain
    return made
