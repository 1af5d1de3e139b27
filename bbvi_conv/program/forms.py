"""Equal forms of functions that cost less than torch's own, or can be traced, where a program is mapped over draws.

A form has the value and the gradient of its function, to rounding. Under ``torch.func`` some functions are taken apart
into many operations before a decomposition table sees them; the tape puts the form in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LINEAR_FROM = 40.0
"""softplus(x) is x from here on: what is left out, e^-40, is below the rounding of x in float64."""


def _cross_entropy(x: Tensor, y: Tensor, **options: Any) -> Any:
    r""":math:`\log(1 + e^x) - y x`: three operations where torch's stable form becomes a dozen; finite at any logit."""
    if options.pop("reduction", "mean") != "none" or any(value is not None for value in options.values()):
        return NotImplemented
    if x.shape != y.shape:
        return NotImplemented  # torch says what is wrong
    return functional.softplus(x, threshold=LINEAR_FROM) - y * x


def _entry(x: Tensor, index: Any) -> Any:
    """``x[i]`` and ``x[i, j]`` of whole numbers that are drawn: torch would ask for their values."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(not isinstance(i, Tensor) or i.dim() or i.dtype is not torch.int64 for i in parts) or not parts:
        return NotImplemented
    return x[tuple(i.reshape(1) for i in parts)].squeeze(0)


def _one_hot(x: Tensor, num_classes: int = -1) -> Any:
    """Of so many classes: torch would ask for the values first, to see whether they lie inside."""
    if num_classes < 1 or x.dtype is not torch.int64:
        return NotImplemented
    return (x.unsqueeze(-1) == torch.arange(num_classes, device=x.device)).to(torch.int64)


class SafeLog:
    """In place of Pyro's autograd function of that name: the gradient of log x is at most 1 / eps, the value untouched.

    Written by hand, a gradient is none of a graph's.
    """

    @staticmethod
    def apply(x: Tensor) -> Tensor:
        least = torch.finfo(x.dtype).eps
        below = x.detach().log() + (x - x.detach()) / least
        return torch.where(x > least, x.clamp(min=least).log(), below)


def _in_place(made: Callable[..., Tensor]) -> Callable[..., Any]:
    """By the function that makes a new tensor, whose numbers are then copied.

    Functionalised in place, torch would ask a kernel in Python for the shape, and import its compiler or sympy for it.
    """

    def form(x: Tensor, *args: Any, **named: Any) -> Any:
        if 0 in x.stride():
            return NotImplemented  # numbers that share their place in memory: torch's own takes or refuses them
        return x.copy_(made(x, *args, **named))

    return form


def _lstm(*args: Any) -> Any:
    """By plain operations: oneDNN's layer, which a graph would hold, has no gradient there."""
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        return torch.lstm(*args)


FORMS: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.binary_cross_entropy_with_logits: _cross_entropy,
    functional.one_hot: _one_hot,
    torch.lstm: _lstm,
    Tensor.__getitem__: _entry,
    Tensor.masked_fill_: _in_place(Tensor.masked_fill),
    Tensor.clamp_: _in_place(Tensor.clamp),
    Tensor.scatter_add_: _in_place(Tensor.scatter_add),
    Tensor.__ior__: Tensor.bitwise_or_,
    Tensor.__iand__: Tensor.bitwise_and_,
    Tensor.__ixor__: Tensor.bitwise_xor_,
}
"""Function of torch -> its form, which answers ``NotImplemented`` to options it does not serve."""
