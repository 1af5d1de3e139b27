"""What a layer of a flow is, and Pyro's transforms as such layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class Layer(nn.Module, ABC):
    """A smooth invertible map of vectors that knows its volume."""

    has_inverse = True

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image of ``x`` ``(..., D)``, and the log absolute determinant of the Jacobian there, ``(...)``."""

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """What maps to ``y``, and the log determinant of :meth:`forward` there."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse in closed form")


class Wrapped(Layer):
    """A transform of :mod:`pyro.distributions.transforms`, in the forward direction."""

    has_inverse = False

    def __init__(self, transform: Any) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As Pyro has it."""
        y = self.transform(x)
        return y, self.transform.log_abs_det_jacobian(x, y)
