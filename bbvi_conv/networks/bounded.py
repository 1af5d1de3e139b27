"""Layers whose Lipschitz constant is declared, and networks whose outputs are bounded by construction."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn.functional import linear

from bbvi_conv.networks.soft_clipping import SoftClipping


class BoundedLinear(nn.Linear):
    r"""A linear layer :math:`x \mapsto V x + b` with :math:`\|V\|_2 < c` whatever its parameters are.

    .. math:: V = c\, W / (c^4 + \|W\|_{S_4}^4)^{1/4}, \qquad \|W\|_{S_4}^4 = \|W W^\top\|_F^2

    The Schatten norm :math:`S_4` bounds the operator norm from above by at most :math:`r^{1/4}` of it, r the rank. V
    is a smooth function of W without state: no power iteration, no buffer, so a program with it can be traced.

    Args:
        in_features, out_features: sizes.
        norm: c.
        bias: whether there is b.

    Raises:
        ValueError: if ``norm`` is not positive and finite.

    Example:
        >>> BoundedLinear(3, 2, norm=0.5).bounded_weight().shape
        torch.Size([2, 3])
    """

    def __init__(self, in_features: int, out_features: int, norm: float = 1.0, *, bias: bool = True) -> None:
        if not (norm > 0 and math.isfinite(norm)):
            raise ValueError(f"norm must be positive and finite, got {norm}")
        super().__init__(in_features, out_features, bias)
        self.norm = norm

    def bounded_weight(self) -> Tensor:
        """V ``(out, in)``."""
        gram = self.weight @ self.weight.T if self.out_features <= self.in_features else self.weight.T @ self.weight
        return self.norm * self.weight * (self.norm**4 + gram.square().sum()) ** -0.25

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        return linear(x, self.bounded_weight(), self.bias)

    def extra_repr(self) -> str:
        """What torch prints of the layer."""
        return f"{super().extra_repr()}, norm={self.norm:g}"


def bounded_mlp(
    sizes: Sequence[int],
    low: float,
    high: float,
    *,
    norm: float = 1.0,
    activation: Callable[[], nn.Module] = nn.Tanh,
    sharpness: float = 1.0,
) -> nn.Sequential:
    r"""An encoder or decoder for the theorems: outputs in [low, high], Lipschitz, smooth if its activation is.

    Args:
        sizes: of the layers, inputs first.
        low, high, sharpness: of the :class:`~bbvi_conv.networks.soft_clipping.SoftClipping` at the end.
        norm: of every linear layer.
        activation: makes the layer between two linear ones.

    Raises:
        ValueError: fewer than two sizes, or bounds in the wrong order.

    Reference: Surendran et al. (2025), assumptions on encoder and decoder.
    """
    if len(sizes) < 2:
        raise ValueError(f"sizes must name the inputs and the outputs at least, got {list(sizes)}")
    layers: list[nn.Module] = []
    for first, second in itertools.pairwise(sizes):
        layers += [BoundedLinear(first, second, norm), activation()]
    return nn.Sequential(*layers[:-1], SoftClipping(low, high, sharpness))
