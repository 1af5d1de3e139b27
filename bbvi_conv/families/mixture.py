"""Mixtures over the joint latent vector, with stratified or implicit pathwise gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Size, Tensor, nn

from bbvi_conv.families.family import SCALAR, Parameter, VectorFamily, VectorLaw
from bbvi_conv.families.flows.flows import NeuralSpline, RealNVP
from bbvi_conv.families.full_rank import FullRank
from bbvi_conv.families.implicit import implicitly
from bbvi_conv.families.low_rank import LowRank
from bbvi_conv.families.mean_field import MeanField

COMPONENTS = (MeanField, FullRank, LowRank, RealNVP, NeuralSpline)
"""What a mixture may be made of: log q at given values is at hand, and draws take normals only."""


class MixtureLaw(VectorLaw):
    r""":math:`q(z) = \sum_c w_c q_c(z)`; a draw takes one uniform, and a vector of noise for every component.

    The uniform u picks the component by inverse CDF. An evaluation that is stratified puts c + 1.5 in its place: then
    component c is drawn, and :attr:`stratum_weight` is :math:`C w_c`, so that over the C strata

    .. math:: \tfrac1C \sum_c C w_c\, E_{q_c}[f(z)] = E_q[f(z)]

    is differentiable in the weights and, through the draws, in the components.

    Args:
        log_weights: ``(..., C)``, normalised.
        components: law with batch dimensions ``(..., C)``.
        stratified: whether evaluations run once per component.
    """

    def __init__(self, log_weights: Tensor, components: Any, dim: int, *, stratified: bool) -> None:
        self.log_weights, self.components = log_weights, components
        self.strata = log_weights.shape[-1] if stratified else 1
        self.stratum_weight: Tensor | None = None
        super().__init__(Size((*log_weights.shape[:-1], dim)))

    def draw(self, shape: Size) -> tuple[Tensor, Tensor]:
        """One component's draw, and the density of all."""
        value = self.pick(shape)
        return value, self.density(value)

    def pick(self, shape: Size) -> Tensor:
        """Draw every component, and take the one that the uniform names."""
        u = torch.rand(shape[:-1], dtype=self.log_weights.dtype, device=self.log_weights.device).unsqueeze(-1)
        every = self.components.rsample(shape[: len(shape) - 1 - len(self.batch_shape)])
        weights, count = self.log_weights.exp(), self.log_weights.shape[-1]
        by_cdf = (weights.detach().cumsum(-1)[..., :-1] <= u).sum(-1, keepdim=True)
        index = torch.where(u < 1, by_cdf, (u - 1).to(by_cdf.dtype))
        if self.strata > 1:
            named = count * weights.expand(*u.shape[:-1], count).gather(-1, index)
            self.stratum_weight = torch.where(u < 1, torch.ones_like(named), named).squeeze(-1)
        picked: Tensor = every.gather(-2, index.unsqueeze(-1).expand(*shape[:-1], 1, shape[-1])).squeeze(-2)
        return picked

    def density(self, value: Tensor) -> Tensor:
        """Sum over the components."""
        return torch.logsumexp(self.log_weights + self.components.log_prob(value.unsqueeze(-2)), -1)


class ImplicitMixtureLaw(VectorLaw):
    """A mixture of factorised Gaussians whose draws have implicit gradients.

    Args:
        mixture: the same mixture, not stratified.
        loc: of the components, ``(..., C, D)``.
        scale: of the components, ``(..., C, D)``.
    """

    implicit_gradient = True

    def __init__(self, mixture: MixtureLaw, loc: Tensor, scale: Tensor) -> None:
        self.mixture, self.loc, self.scale = mixture, loc, scale
        super().__init__(Size((*mixture.batch_shape, *mixture.event_shape)))

    def draw(self, shape: Size) -> tuple[Tensor, Tensor]:
        """A draw of the mixture, with a gradient."""
        value = implicitly(self.mixture.pick(shape), self.mixture.log_weights, self.loc, self.scale)
        return value, self.density(value)

    def density(self, value: Tensor) -> Tensor:
        """Of the mixture."""
        return self.mixture.density(value)


class Stacked:
    """Laws side by side, as one law with a batch dimension of components."""

    def __init__(self, laws: Sequence[VectorLaw]) -> None:
        self.laws = laws

    def rsample(self, sample_shape: Size = SCALAR) -> Tensor:
        """``(..., C, D)``."""
        return torch.stack([law.rsample(sample_shape) for law in self.laws], -2)

    def log_prob(self, value: Tensor) -> Tensor:
        """``(..., C)`` at ``value`` ``(..., 1, D)``."""
        return torch.stack([law.density(value.squeeze(-2)) for law in self.laws], -1)


@dataclass(frozen=True)
class Mixture(VectorFamily):
    r"""Mixture :math:`q(z) = \sum_c w_c q_c(z)` of Gaussians or flows over all latent sites.

    Args:
        num_components: C.
        component: family of :math:`q_c`: ``MeanField``, ``FullRank``, ``LowRank``, ``RealNVP`` or ``NeuralSpline``.
        spread: standard deviation of the components' random starts around the common one, on the unconstrained space.
        gradient: ``"stratified"``: every component draws, and the bound is the sum over components, each by its weight
            (the ELBO only; C runs of the model in place of one); ``"implicit"``: a draw of the mixture with an implicit
            gradient (any objective; components factorised Gaussians, whose curvature is then not to be had).

    Raises:
        ValueError: if C is below 2, the spread is negative, the component or the gradient is none of these, or the
            implicit gradient is asked for of other components than ``MeanField``.

    Reference: Morningstar et al. (2021), "Automatic differentiation variational inference with mixtures",
    https://arxiv.org/abs/2003.01687; Figurnov et al. (2018), https://arxiv.org/abs/1805.08498
    """

    num_components: int = 4
    component: VectorFamily = FullRank()  # noqa: RUF009 - frozen
    spread: float = 1.0
    gradient: Literal["stratified", "implicit"] = "stratified"

    def __post_init__(self) -> None:
        if self.num_components < 2:
            raise ValueError(f"num_components must be at least 2, got {self.num_components}")
        if not self.spread >= 0:
            raise ValueError(f"spread must not be negative, got {self.spread}")
        if not isinstance(self.component, COMPONENTS):
            names = ", ".join(cls.__name__ for cls in COMPONENTS)
            raise ValueError(f"a mixture's component must be one of {names}, got {self.component!r}")
        if self.gradient not in ("stratified", "implicit"):
            raise ValueError(f'gradient must be "stratified" or "implicit", got {self.gradient!r}')
        if self.gradient == "implicit" and not isinstance(self.component, MeanField):
            raise ValueError(
                "an implicit gradient is known for MeanField components, got "
                f'{type(self.component).__name__}; use gradient="stratified"'
            )

    @property
    def init_scale(self) -> float:  # type: ignore[override]
        """The component's."""
        return self.component.init_scale

    @property
    def layered(self) -> bool:  # type: ignore[override]
        """The component's."""
        return self.component.layered

    def parameters(self, loc: Tensor, scale: Tensor) -> dict[str, Parameter]:
        """Those of the components, stacked in front of their own dimensions, and the logits of the weights."""
        starts = [loc + self.spread * torch.randn_like(loc) for _ in range(self.num_components)]
        each = [self.component.parameters(start, scale) for start in starts]
        found = {"logits": Parameter(loc.new_zeros(self.num_components))}
        for name, first in each[0].items():
            found[name] = Parameter(torch.stack([e[name].start for e in each]), first.constraint)
        return found

    def layers(self, dim: int) -> nn.ModuleList:
        """Each component's own; none where components have none."""
        each = [self.component.layers(dim) for _ in range(self.num_components)]
        return nn.ModuleList(each if len(each[0]) else ())

    def law(self, values: Mapping[str, Tensor], layers: Any) -> VectorLaw:
        """The mixture."""
        own = {name: value for name, value in values.items() if name != "logits"}
        if len(layers):
            unbound = {name: value.unbind(-2) for name, value in own.items()}
            components: Any = Stacked(
                [
                    self.component.law({name: parts[c] for name, parts in unbound.items()}, own_layers)
                    for c, own_layers in enumerate(layers)
                ]
            )
        else:
            components = self.component.law(own, layers)
        stratified = self.gradient == "stratified"
        log_weights = torch.log_softmax(values["logits"], -1)
        mixture = MixtureLaw(log_weights, components, own["loc"].shape[-1], stratified=stratified)
        return mixture if stratified else ImplicitMixtureLaw(mixture, own["loc"], own["scale"])
