"""The evidence lower bound, with a weight on the KL term."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bbvi_conv.objectives.checks import check_count, check_estimator
from bbvi_conv.objectives.objective import PATHWISE, STICKING, KlWeight, Objective


@dataclass(frozen=True)
class LinearWarmup:
    """KL weight that rises from ``start`` to ``end`` over ``steps`` steps, then stays.

    Raises:
        ValueError: if ``steps`` is below 1.
    """

    steps: int
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        check_count("steps", self.steps)

    def __call__(self, n: Tensor) -> Tensor:
        """Weight at step n."""
        return self.start + (self.end - self.start) * (n / self.steps).clamp(max=1.0)


@dataclass(frozen=True)
class ELBO(Objective):
    r"""Evidence lower bound, in nats, summed over the data; beta-ELBO where ``kl_weight`` is not one.

    .. math:: L_\beta = E_q[\log p_\theta(x | z) + \beta (\log p_\theta(z) - \log q_\phi(z))], \quad \beta = 1: L
              = E_q[\log p_\theta(x, z) - \log q_\phi(z)]

    estimated by the mean of M draws. Also ``loss=`` of a stock ``pyro.infer.SVI``, and ``ELBO()(model, guide)(x)`` in a
    plain torch loop.

    Args:
        num_particles: M, independent draws averaged.
        estimator: ``"pathwise"`` differentiates both the draw and the density; ``"sticking-the-landing"`` detaches
            the density's parameters, whose score has mean zero: the gradient has the same expectation and no variance
            where q is the posterior. Sites without a pathwise gradient get the score function, with the mean of the
            other draws as baseline when M > 1 (pathwise only).
        kl_weight: beta, or a function of the step number such as :class:`LinearWarmup`.
        analytic_kl: replace the Monte Carlo KL of a site by its closed form wherever that is provably the same in
            expectation: guide and prior of the site depend on no other latent and torch knows their KL. Refused where
            there is no such site, as in families and AutoGuides, which draw all latents as one vector.

    Raises:
        ValueError: if ``num_particles`` is below 1, the estimator is unknown, or it cannot go with an analytic KL.

    Reference: Kingma and Welling (2014), https://arxiv.org/abs/1312.6114; Roeder et al. (2017),
    https://arxiv.org/abs/1703.09194; Higgins et al. (2017), beta-VAE

    Example:
        >>> ELBO(num_particles=4).draws
        4
    """

    num_particles: int = 1
    estimator: str = PATHWISE
    kl_weight: KlWeight = 1.0
    analytic_kl: bool = False

    averages = True

    def __post_init__(self) -> None:
        check_count("num_particles", self.num_particles)
        check_estimator(self.estimator, (PATHWISE, STICKING))
        if self.analytic_kl and self.estimator == STICKING:
            raise ValueError(
                "an analytic KL has no density to detach: use the pathwise estimator with analytic_kl=True"
            )

    @property
    def draws(self) -> int:
        """Runs of the program in one evaluation: M."""
        return self.num_particles

    @property
    def linear(self) -> bool:
        """True."""
        return True

    def bound(self, log_w: Tensor) -> Tensor:
        """Mean log-weight."""
        return log_w.mean(0)

    def weights(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """1/M, 1/M."""
        even = torch.full_like(log_w, 1 / len(log_w))
        return even, even

    def quietest(self) -> ELBO:
        """Sticking the landing: same expectation, no variance where q is the posterior; itself with an analytic KL."""
        return self if self.analytic_kl else replace(self, estimator=STICKING)

    def single(self) -> ELBO:
        """One draw instead of M: the same gradient in expectation."""
        return replace(self, num_particles=1)

    def plain(self) -> ELBO:
        """One pathwise draw."""
        return replace(self, num_particles=1, estimator=PATHWISE)
