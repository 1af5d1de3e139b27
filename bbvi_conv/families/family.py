"""What a family over one vector is, so that a guide, a mixture and the head of an encoder can all be made of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide
from torch import Size, Tensor, nn

SCALAR = Size()
LOG_2PI = math.log(2 * math.pi)


def normals(shape: Size | tuple[int, ...], like: Tensor) -> Tensor:
    """Standard normal noise of a tensor's type and device."""
    return torch.empty(shape, dtype=like.dtype, device=like.device).normal_()


def log_normal(eps: Tensor, scale: Tensor) -> Tensor:
    r""":math:`-\epsilon^2/2 - \log |s| - \log(2\pi)/2` of every coordinate, in nats: the density of
    :math:`m + s \epsilon`."""
    return -0.5 * (eps * eps + LOG_2PI) - scale.abs().log()


def recalled(drawn: tuple[Tensor, Tensor] | None, value: Tensor) -> Tensor | None:
    """What a law remembered beside its last draw, if ``value`` is that very draw."""
    return drawn[1] if drawn is not None and value is drawn[0] else None


class Parameter(NamedTuple):
    """A parameter before it has an owner: where it starts, constrained, and its constraint."""

    start: Tensor
    constraint: Any = constraints.real


class VectorLaw(dist.TorchDistribution, ABC):  # type: ignore[misc]
    """A law of vectors with a log density at its own last draw that may come from the noise.

    Batch dimensions are those of the parameters. Members say :meth:`draw` and :meth:`density`; one without a density
    at given values says ``path_log_q = False``, and estimators that need it are refused by name.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - the interface of torch.distributions
    support = constraints.real_vector
    has_rsample = True
    path_log_q = True

    def __init__(self, shape: Size) -> None:
        self._drawn: tuple[Tensor, Tensor] | None = None
        super().__init__(shape[:-1], shape[-1:], validate_args=False)

    @abstractmethod
    def draw(self, shape: Size) -> tuple[Tensor, Tensor]:
        """A draw ``shape`` (batch and event) and its log density, in nats."""

    @abstractmethod
    def density(self, value: Tensor) -> Tensor:
        """Log density at any value, in nats."""

    def rsample(self, sample_shape: Size = SCALAR) -> Tensor:
        """Draw ``(*sample_shape, *batch, D)`` and remember its density."""
        self._drawn = self.draw(self._extended_shape(sample_shape))
        return self._drawn[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """At the law's own draw from the noise, elsewhere by the path form."""
        own = recalled(self._drawn, value)
        if own is not None:
            return own
        if not self.path_log_q:
            raise NotImplementedError(f"{type(self).__name__} has no density at values other than its own draws")
        return self.density(value)

    def expand(self, batch_shape: Size, _instance: Any = None) -> VectorLaw:
        """Itself: its parameters fix its batch shape."""
        if Size(batch_shape) != self.batch_shape:
            raise ValueError(
                f"{type(self).__name__} packs all sites into one vector and cannot stand inside a plate of its own"
            )
        return self


class VectorFamily(ABC):
    """A family of laws over one vector; subclasses are frozen dataclasses.

    Called with a model it returns a guide over the packed unconstrained vector of all latent sites.
    """

    init_scale: float
    path_log_q: ClassVar[bool] = True
    """Whether log q is known at given values, as sticking the landing, double reparameterisation and mixtures need."""
    layered: ClassVar[bool] = False
    """Whether parameters act through layers, so that steps on them have to be small."""

    @abstractmethod
    def parameters(self, loc: Tensor, scale: Tensor) -> dict[str, Parameter]:
        """Parameters by name, started so that the law has about this location and these scales, each ``(D,)``."""

    def layers(self, dim: int) -> nn.ModuleList:
        """Networks of the law, started near the identity; none unless it is a flow."""
        return nn.ModuleList()

    @abstractmethod
    def law(self, values: Mapping[str, Tensor], layers: Any) -> Any:
        """The law at given parameters, whose leading dimensions are batch dimensions."""

    def __call__(self, model: Callable[..., Any]) -> AutoGuide:
        """A guide for ``model``, built at its first run."""
        from bbvi_conv.families.packed import PackedGuide

        return PackedGuide(model, self)
