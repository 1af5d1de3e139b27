"""The evidence lower bound."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from bbvi_conv.objectives.objective import Particles
from bbvi_conv.objectives.stock import StockLoss
from bbvi_conv.program.minibatch import Batch
from bbvi_conv.program.noise import Noise
from bbvi_conv.program.program import Terms

ESTIMATORS = ("pathwise", "sticking-the-landing")


@dataclass(frozen=True)
class ELBO(StockLoss):
    r"""Evidence lower bound, in nats, summed over the data.

    .. math:: L = E_q[\log p_\theta(x, z) - \log q_\phi(z)]
              \approx \tfrac1M \sum_m \log p_\theta(x, z_m) - \log q_\phi(z_m), \quad z_m \sim q_\phi

    Also ``loss=`` of a stock ``pyro.infer.SVI``, and ``ELBO()(model, guide)(x)`` in a plain torch loop.

    Args:
        num_particles: M, independent draws averaged.
        estimator: ``"pathwise"`` differentiates both the draw and the density; ``"sticking-the-landing"`` detaches
            the density's parameters, whose score has mean zero: the gradient has the same expectation and no variance
            where q is the posterior. Sites without a pathwise gradient get the score function, with the mean of the
            other draws as baseline when M > 1.

    Raises:
        ValueError: if ``num_particles`` is below 1 or the estimator is unknown.

    Reference: Kingma and Welling (2014), https://arxiv.org/abs/1312.6114; Roeder et al. (2017),
    https://arxiv.org/abs/1703.09194

    Example:
        >>> ELBO(num_particles=4).draws
        4
    """

    num_particles: int = 1
    estimator: Literal["pathwise", "sticking-the-landing"] = "pathwise"

    def __post_init__(self) -> None:
        if self.num_particles < 1:
            raise ValueError(f"num_particles must be at least 1, got {self.num_particles}")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"unknown estimator {self.estimator!r}; choose one of {', '.join(ESTIMATORS)}")

    @property
    def draws(self) -> int:
        """Runs of the program in one evaluation: M."""
        return self.num_particles

    @property
    def split(self) -> bool:
        """Whether the density has its own copy of phi."""
        return self.estimator == "sticking-the-landing"

    def surrogate(
        self,
        particles: Particles,
        theta: dict[str, Tensor],
        phi: dict[str, Tensor],
        noise: Noise,
        batch: Batch,
        *,
        scale: float,
        score: bool,
    ) -> Tensor:
        """Scalar ``()`` negative bound in nats; see :class:`~bbvi_conv.objectives.objective.Objective`."""
        density = {name: value.detach() for name, value in phi.items()} if self.split else phi
        return self.from_terms(particles(theta, phi, density, noise, batch), scale=scale, score=score)

    def from_terms(self, terms: Terms, *, scale: float, score: bool) -> Tensor:
        """Scalar loss from terms with M in front; ``score`` adds the surrogate of non-pathwise sites."""
        units = scale * (terms.log_p - terms.log_q)
        bounds = units.sum(-1) + terms.free
        surrogate = bounds
        if score:  # unit by unit: what the draws of one unit cannot change is no signal for them
            fixed = units.detach()
            others = (fixed.sum(0) - fixed) / (len(fixed) - 1) if len(fixed) > 1 else fixed * 0
            own = 0.0 if self.split else scale  # takes back the gradient of log q itself: its mean is zero
            surrogate = bounds + ((fixed - others + own) * terms.score).sum(-1)
        return -(bounds.detach() + surrogate - surrogate.detach()).mean()

    def quietest(self) -> ELBO:
        """Sticking the landing: same expectation, no variance where q is the posterior."""
        return replace(self, estimator="sticking-the-landing")

    def single(self) -> ELBO:
        """One draw instead of M: the same gradient in expectation, for when many evaluations are averaged anyway."""
        return replace(self, num_particles=1)

    def plain(self) -> ELBO:
        """One pathwise draw."""
        return ELBO()
