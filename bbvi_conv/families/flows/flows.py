"""The flows: which layers each is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from pyro.distributions import transforms

from bbvi_conv.families.flows.conditioned import Autoregressive, Coupling
from bbvi_conv.families.flows.elementwise import Affine, Elementwise, Spline
from bbvi_conv.families.flows.law import Flow
from bbvi_conv.families.flows.layer import Layer, Wrapped
from bbvi_conv.families.flows.sylvester import Sylvester as SylvesterLayer
from bbvi_conv.networks.encoders import check_hidden


def changed_by(dim: int, index: int) -> list[int]:
    """Which coordinates the coupling at a place changes: one half, the other, the odd ones, the even ones, again.

    Example:
        >>> [changed_by(4, index) for index in range(4)]
        [[2, 3], [0, 1], [1, 3], [0, 2]]
    """
    halves = [list(range(dim // 2, dim)), list(range(dim // 2)), list(range(1, dim, 2)), list(range(0, dim, 2))]
    return halves[index % 4] or list(range(dim))


def coupling(dim: int, index: int, elementwise: Elementwise, hidden: tuple[int, ...]) -> Layer:
    """One coupling; in one dimension it depends on nothing."""
    return Coupling(dim, changed_by(dim, index), elementwise, hidden)


@dataclass(frozen=True)
class Planar(Flow):
    r"""Planar flow: each layer :math:`y = x + \hat u \tanh(w^\top x + b)`. No inverse, so no log q at given values.

    Args:
        num_layers: layers.
        init_scale: standard deviation at the start.

    Reference: Rezende and Mohamed (2015), https://arxiv.org/abs/1505.05770; layers by Pyro.
    """

    num_layers: int = 16

    path_log_q: ClassVar[bool] = False

    def layer(self, dim: int, index: int) -> Layer:
        """Pyro's, started where u-hat is zero."""
        transform = transforms.Planar(dim)
        with torch.no_grad():
            w = transform.w / transform.w.norm()
            transform.w.copy_(w)
            transform.u.copy_(math.log(math.e - 1) * w)
        return Wrapped(transform)


@dataclass(frozen=True)
class Radial(Flow):
    r"""Radial flow: each layer :math:`y = x + \beta (x - x_0) / (\alpha + |x - x_0|)`. No log q at given values.

    Args:
        num_layers: layers.
        init_scale: standard deviation at the start.

    Reference: Rezende and Mohamed (2015), https://arxiv.org/abs/1505.05770; layers by Pyro.
    """

    num_layers: int = 16

    path_log_q: ClassVar[bool] = False

    def layer(self, dim: int, index: int) -> Layer:
        """Pyro's, started where beta is zero, around a random centre."""
        transform = transforms.Radial(dim)
        with torch.no_grad():
            transform.x0.normal_()
            transform.beta_prime.copy_(transform.alpha_prime)
        return Wrapped(transform)


@dataclass(frozen=True)
class Sylvester(Flow):
    """Sylvester flow by Householder reflections: each layer a hidden layer of many units. No log q at given values.

    Args:
        num_layers: layers.
        init_scale: standard deviation at the start.
        units: of a layer, at most the number of latent dimensions.

    Raises:
        ValueError: counts below 1, or a scale that is not positive.

    Reference: van den Berg et al. (2018), https://arxiv.org/abs/1803.05649
    """

    units: int = 8

    path_log_q: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.units < 1:
            raise ValueError(f"units must be at least 1, got {self.units}")

    def layer(self, dim: int, index: int) -> Layer:
        """One."""
        return SylvesterLayer(dim, min(self.units, dim))


@dataclass(frozen=True)
class _Networked(Flow):
    """Flows whose layers hold networks."""

    hidden: tuple[int, ...] = (32,)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_hidden(self.hidden)


@dataclass(frozen=True)
class _Scaling(_Networked):
    """Flows whose layers scale and shift: the log scales of all layers add up."""

    limit: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.limit < math.inf:
            raise ValueError(f"limit must be positive and finite, got {self.limit}")


@dataclass(frozen=True)
class RealNVP(_Scaling):
    """Affine couplings: cheap both ways.

    Args:
        num_layers: layers; which coordinates change goes round after four.
        init_scale: standard deviation at the start.
        hidden: units of the hidden layers of a coupling's network.
        limit: largest change of a coordinate's log scale by a layer: more can fit more, and overflows sooner.

    Raises:
        ValueError: counts below 1, a scale or limit that is not positive.

    Reference: Dinh et al. (2017), https://arxiv.org/abs/1605.08803
    """

    num_layers: int = 8
    limit: float = 1.0

    def layer(self, dim: int, index: int) -> Layer:
        """An affine coupling."""
        return coupling(dim, index, Affine(self.limit), self.hidden)


@dataclass(frozen=True)
class IAF(_Scaling):
    """Inverse autoregressive flow, the order reversed from layer to layer. No log q at given values.

    Args:
        num_layers: layers.
        init_scale: standard deviation at the start.
        hidden: units of the hidden layers, raised to the number of latent dimensions where that is larger.
        limit: largest change of a coordinate's log scale by a layer: more can fit more, and overflows sooner.

    Raises:
        ValueError: counts below 1, a scale or limit that is not positive.

    Reference: Kingma et al. (2016), https://arxiv.org/abs/1606.04934
    """

    path_log_q: ClassVar[bool] = False

    def layer(self, dim: int, index: int) -> Layer:
        """An affine autoregression."""
        return Autoregressive(dim, bool(index % 2), Affine(self.limit), self.hidden)


@dataclass(frozen=True)
class NeuralSpline(_Networked):
    """Couplings by monotone rational-quadratic splines: cheap both ways.

    Args:
        num_layers: layers; which coordinates change goes round after four.
        init_scale: standard deviation at the start.
        hidden: units of the hidden layers of a coupling's network.
        bins: of a spline.
        bound: B: splines live on [-B, B], in units of ``init_scale`` at the start, and are the identity outside.

    Raises:
        ValueError: counts below 1, a scale or bound that is not positive.

    Reference: Durkan et al. (2019), https://arxiv.org/abs/1906.04032
    """

    bins: int = 8
    bound: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.bins <= 500:
            raise ValueError(f"bins must lie between 1 and 500, got {self.bins}")
        if not self.bound > 0:
            raise ValueError(f"bound must be positive, got {self.bound}")

    def layer(self, dim: int, index: int) -> Layer:
        """A spline coupling."""
        return coupling(dim, index, Spline(self.bins, self.bound), self.hidden)
