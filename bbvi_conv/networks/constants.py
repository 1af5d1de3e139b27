r"""Lipschitz, smoothness and range constants of a network, composed from those of its layers.

For :math:`h = f \circ g`, with L a Lipschitz constant and S one of the derivative,
:math:`L_h \le L_f L_g` and :math:`S_h \le S_f L_g^2 + L_f S_g`. All in the Euclidean norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bbvi_conv.networks.bounded import BoundedLinear
from bbvi_conv.networks.soft_clipping import SoftClipping


@dataclass(frozen=True)
class Constants:
    """Bounds that hold at every input; ``math.inf`` where there is none, NaN where none is known.

    Attributes:
        lipschitz: of the function.
        smoothness: Lipschitz constant of its derivative; infinite for a kink such as that of ReLU.
        low, high: least and largest value of any output.
        why: the first layer that spoils a bound, in words; empty where all is well.
    """

    lipschitz: float
    smoothness: float
    low: float = -math.inf
    high: float = math.inf
    why: str = ""

    @property
    def bounded(self) -> bool:
        """Whether the outputs lie in a finite interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def after(self, inner: Constants) -> Constants:
        """Constants of this function applied to the outputs of ``inner``."""
        if self == IDENTITY:
            return inner
        smoothness = self.smoothness * inner.lipschitz**2 + self.lipschitz * inner.smoothness
        return replace(
            self, lipschitz=self.lipschitz * inner.lipschitz, smoothness=smoothness, why=inner.why or self.why
        )


IDENTITY = Constants(1.0, 0.0)

_ROOT_3 = math.sqrt(3)

ACTIVATIONS: dict[type[nn.Module], Callable[..., Constants]] = {
    nn.Tanh: lambda _: Constants(1.0, 4 / (3 * _ROOT_3), -1.0, 1.0),
    nn.Sigmoid: lambda _: Constants(0.25, 1 / (6 * _ROOT_3), 0.0, 1.0),
    nn.LogSigmoid: lambda _: Constants(1.0, 0.25, high=0.0),
    nn.Softplus: lambda layer: Constants(1.0, layer.beta / 4, low=0.0),
    nn.SiLU: lambda _: Constants(1.0999, 0.5, low=-0.2785),
    nn.GELU: lambda _: Constants(1.1290, 2 / math.sqrt(2 * math.pi), low=-0.1701),
    nn.Softsign: lambda _: Constants(1.0, 2.0, -1.0, 1.0),
    nn.ELU: lambda layer: _elu(layer.alpha),
    nn.ReLU: lambda _: Constants(1.0, math.inf, low=0.0, why="ReLU has a kink, so its derivative jumps"),
    nn.LeakyReLU: lambda layer: Constants(
        max(1.0, abs(layer.negative_slope)), math.inf, why="LeakyReLU has a kink, so its derivative jumps"
    ),
    SoftClipping: lambda layer: Constants(layer.slope, layer.curvature, layer.low, layer.high),
}
"""Activation -> its constants, by the extremes of its first two derivatives; GELU also in its tanh form."""

_SHAPES = (nn.Flatten, nn.Unflatten, nn.Identity)


def _elu(alpha: float) -> Constants:
    if alpha == 1.0:
        return Constants(1.0, 1.0, low=-1.0)
    return Constants(max(1.0, alpha), math.inf, low=-alpha, why="ELU with alpha != 1 has a kink at 0")


def operator_norm(layer: nn.Module) -> float:
    r"""Norm of the linear part: exact for ``Linear``; for convolutions Schur's bound
    :math:`\sqrt{\max_o \sum_{i,t} |k| \cdot \max_i \sum_{o,t} |k|}`, whatever the image size.

    Raises:
        TypeError: a layer without a kernel, or a convolution that pads by reflection or replication.
    """
    if isinstance(layer, BoundedLinear):
        return layer.norm
    if isinstance(layer, nn.Linear):
        return float(torch.linalg.matrix_norm(layer.weight.detach(), 2))
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.padding_mode in ("zeros", "circular"):
        kernel = layer.weight.detach().abs()
        grouped: Tensor = kernel.reshape(layer.groups, len(kernel) // layer.groups, *kernel.shape[1:]).flatten(3)
        first, second = grouped.sum((2, 3)).max(), grouped.sum((1, 3)).max()
        return float((first * second).sqrt())
    raise TypeError(f"{type(layer).__name__} has no operator norm that is known here")


def constants(network: nn.Module) -> Constants:
    """Constants of a network made of ``Sequential``, linear and convolutional layers, and known activations.

    They hold for the weights as they now stand. A layer that is not known, a recurrent one or one of the user's own,
    makes every constant NaN ("unknown"), and ``why`` names it.

    Example:
        >>> constants(nn.Sequential(BoundedLinear(4, 3, norm=2.0), nn.Tanh(), SoftClipping(-1.0, 1.0))).bounded
        True
    """
    if type(network).forward is nn.Sequential.forward:
        whole = IDENTITY
        for layer in network.children():
            whole = constants(layer).after(whole)
        return whole
    if type(network) in ACTIVATIONS:
        return ACTIVATIONS[type(network)](network)
    if isinstance(network, _SHAPES):
        return IDENTITY
    if isinstance(network, nn.Dropout) and not network.training:
        return IDENTITY
    if isinstance(network, nn.Linear | nn.modules.conv._ConvNd):
        try:
            return Constants(operator_norm(network), 0.0)
        except TypeError as error:
            return Constants(math.nan, math.nan, why=str(error))
    return Constants(math.nan, math.nan, math.nan, math.nan, f"nothing is known of the layer {type(network).__name__}")


def kinks(network: nn.Module) -> list[str]:
    """Names of activations inside ``network`` whose derivative jumps."""
    return [
        f"{name or 'itself'} ({type(layer).__name__})"
        for name, layer in network.named_modules()
        if type(layer) in ACTIVATIONS and not math.isfinite(ACTIVATIONS[type(layer)](layer).smoothness)
    ]
