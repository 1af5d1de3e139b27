"""Memory order around convolutions, written into the graph so that all who read a value agree on it.

Convolutions are given their images channels last, pixel by pixel, which torch's are fastest on. Where a vector has more
lanes than an image has channels, what is computed between a convolution and other data is kept plane by plane: vectors
would be filled with the channels of one pixel, and with three of them thirteen of sixteen lanes would stay empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from bbvi_conv.engine.native.inductor import force_stride_order

_FORWARD, _BACKWARD = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default


class Ordered(Interpreter):
    """Runs a graph with its images in the order that is best for them; to be traced.

    Args:
        graph: plain operations.
        bits: of a vector.
    """

    def __init__(self, graph: GraphModule, bits: int) -> None:
        super().__init__(graph)
        self._bits = bits

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """As it is, but for convolutions of images and their gradients."""
        if target is torch.ops.aten.view.default:  # what was one block of memory when traced may no longer be
            return super().call_function(torch.ops.aten.reshape.default, args, kwargs)
        if target is _FORWARD and args[0].dim() == 4:
            image, weight, *rest = args
            return self._planes(super().call_function(target, (_pixels(image), _pixels(weight), *rest), kwargs))
        if target is _BACKWARD and args[0].dim() == 4:
            return self._backward(*args)
        return super().call_function(target, args, kwargs)

    def _backward(self, grad: Tensor, image: Tensor, weight: Tensor, *rest: Any) -> tuple[Any, ...]:
        """The bias gradient of a transposed convolution is summed here: torch's, channels last, takes twice as long."""
        *settings, (to_image, to_weight, to_bias) = rest
        grad, transposed = self._planes(grad), settings[4]
        given = (_pixels(grad), _pixels(image), _pixels(weight), *settings)
        made = super().call_function(_BACKWARD, (*given, (to_image, to_weight, to_bias and not transposed)), {})
        return (*made[:2], grad.sum((0, 2, 3)) if to_bias and transposed else made[2])

    def _planes(self, image: Tensor) -> Tensor:
        """Plane by plane, where there are few channels."""
        if 1 < image.shape[1] < self._bits // (8 * image.itemsize):
            return force_stride_order(image, _strides(image, torch.contiguous_format))  # type: ignore[no-any-return]
        return image


def _pixels(image: Tensor) -> Tensor:
    """Channels last."""
    if image.is_contiguous(memory_format=torch.channels_last):
        return image
    return force_stride_order(image, _strides(image, torch.channels_last))  # type: ignore[no-any-return]


def _strides(image: Tensor, order: torch.memory_format) -> list[int]:
    return list(torch.empty_like(image, memory_format=order).stride())
