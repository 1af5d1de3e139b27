"""Layers that map coordinates one by one, with parameters from a network of other coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.nn import AutoRegressiveNN, DenseNN
from torch import Tensor, nn

from bbvi_conv.families.flows.elementwise import Elementwise
from bbvi_conv.families.flows.layer import Layer


class Constant(nn.Module):
    """Parameters that depend on nothing, where there is no other coordinate."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        """The same at every x."""
        return self.value.expand(*x.shape[:-1], *self.value.shape)


def silent(network: nn.Module) -> nn.Module:
    """The network with its last layer at zero: whatever it is asked, it says zero."""
    last: Any = network.layers[-1]  # type: ignore[index]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return network


class Coupling(Layer):
    r"""Maps the coordinates in ``changed`` one by one, by a network of the others.

    .. math:: y_{changed} = f(x_{changed}; \lambda(x_{kept})), \quad y_{kept} = x_{kept}

    Args:
        dim: D.
        changed: which coordinates.
        elementwise: f.
        hidden: units of the hidden layers.

    Reference: Dinh et al. (2017), "Density estimation using Real NVP", https://arxiv.org/abs/1605.08803
    """

    order: Tensor
    back: Tensor

    def __init__(self, dim: int, changed: Sequence[int], elementwise: Elementwise, hidden: Sequence[int]) -> None:
        super().__init__()
        kept = [i for i in range(dim) if i not in changed]
        order = torch.tensor([*kept, *changed])
        self.elementwise, self.split = elementwise, len(kept)
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())
        size = len(changed) * elementwise.size
        self.network = (
            silent(DenseNN(len(kept), list(hidden), [size], nonlinearity=nn.SiLU())) if kept else Constant((size,))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map the changed coordinates."""
        kept, changed = x[..., self.order].tensor_split((self.split,), -1)
        y, log_slope = self.elementwise.forward(changed, self._at(kept))
        return torch.cat((kept, y), -1)[..., self.back], log_slope.sum(-1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """As cheap as forward."""
        kept, changed = y[..., self.order].tensor_split((self.split,), -1)
        x, log_slope = self.elementwise.inverse(changed, self._at(kept))
        return torch.cat((kept, x), -1)[..., self.back], log_slope.sum(-1)

    def _at(self, kept: Tensor) -> Tensor:
        flat: Tensor = self.network(kept)
        return flat.reshape(*flat.shape[:-1], -1, self.elementwise.size)


class Autoregressive(Layer):
    r"""Maps every coordinate by a masked network of those before it: :math:`y_i = f(x_i; \lambda_i(x_{<i}))`.

    The inverse would take D passes one after the other; it is left out.

    Args:
        dim: D.
        reverse: count the coordinates from the last.
        elementwise: f.
        hidden: units of the hidden layers, each at least D.

    Reference: Kingma et al. (2016), "Improving variational inference with inverse autoregressive flow",
    https://arxiv.org/abs/1606.04934; Germain et al. (2015), MADE, https://arxiv.org/abs/1502.03509
    """

    has_inverse = False

    def __init__(self, dim: int, reverse: bool, elementwise: Elementwise, hidden: Sequence[int]) -> None:
        super().__init__()
        self.elementwise = elementwise
        order = torch.arange(dim)
        self.network = (
            silent(
                AutoRegressiveNN(
                    dim,
                    [max(dim, units) for units in hidden],
                    param_dims=[elementwise.size],
                    permutation=order.flip(0) if reverse else order,
                    nonlinearity=nn.SiLU(),
                )
            )
            if dim > 1
            else Constant((elementwise.size, dim))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One pass."""
        y, log_slope = self.elementwise.forward(x, self.network(x).mT)
        return y, log_slope.sum(-1)
