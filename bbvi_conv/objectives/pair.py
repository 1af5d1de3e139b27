"""One objective for theta, another for phi, over the same draws."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from bbvi_conv.objectives.importance import IWAE, MIWAE
from bbvi_conv.objectives.objective import PATHWISE, Evaluation, Objective
from bbvi_conv.program.terms import Terms

if TYPE_CHECKING:
    from bbvi_conv.program.structure import Structure


@dataclass(frozen=True)
class Pair(Objective):
    r"""Theta follows the gradient of one bound, phi that of another; the reported bound is theta's.

    The draws are shared: the objective with fewer uses the first of them. With different bounds the pair is the
    gradient of no single function, so it has no Hessian and no remaining gap.

    Args:
        theta: bound whose gradient moves the generative parameters.
        phi: bound whose gradient moves the variational ones.

    Reference: Rainforth et al. (2018), section 4 and conclusions, https://arxiv.org/abs/1802.04537
    """

    theta: Objective
    phi: Objective

    conservative = False

    @property
    def estimator(self) -> str:  # type: ignore[override]
        """Pathwise only if both are."""
        return next((o.estimator for o in (self.theta, self.phi) if o.estimator != PATHWISE), PATHWISE)

    @property
    def draws(self) -> int:
        """The larger number of draws."""
        return max(self.theta.draws, self.phi.draws)

    @property
    def linear(self) -> bool:
        """If both are."""
        return self.theta.linear and self.phi.linear

    def bound(self, log_w: Tensor) -> Tensor:
        """Theta's."""
        return self.theta.bound(log_w[: self.theta.draws])

    def weights(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """Theta's for the model, phi's for the draw."""
        return self.theta.weights(log_w)[0], self.phi.weights(log_w)[1]

    def surrogate(self, evaluate: Evaluation, *, scale: float = 1.0, score: bool = False) -> Tensor:
        """Theta's loss in value; its gradient in theta, phi's in phi."""
        model_side = self.theta.surrogate(_Only(evaluate, self.theta.draws, theta=True), scale=scale, score=score)
        guide_side = self.phi.surrogate(_Only(evaluate, self.phi.draws, theta=False), scale=scale, score=score)
        return model_side + guide_side - guide_side.detach()

    def quietest(self) -> Pair:
        """Both by their quietest estimator."""
        return replace(self, theta=self.theta.quietest(), phi=self.phi.quietest())

    def single(self) -> Pair:
        """Both at the least cost."""
        return replace(self, theta=self.theta.single(), phi=self.phi.single())

    def plain(self) -> Objective:
        """Theta's bound, pathwise."""
        return self.theta.plain()

    def _refuse(self, structure: Structure, subsampled: list[str], shared: list[str]) -> None:
        if shared:
            raise ValueError(f"Pair cannot tell whose parameter {shared[0]!r} is: model and guide share it")
        if structure.strata > 1:
            raise ValueError('Pair cannot be stratified over a mixture; give the mixture gradient="implicit"')
        self.theta._refuse(structure, subsampled, shared)
        self.phi._refuse(structure, subsampled, shared)


class _Only:
    """An evaluation with one side's parameters held, cut to the first draws."""

    def __init__(self, evaluate: Evaluation, draws: int, *, theta: bool) -> None:
        self._evaluate, self._draws, self._theta = evaluate, draws, theta
        self.step, self.has_theta = evaluate.step, evaluate.has_theta and theta

    def __call__(self, *, theta: bool = True, phi: bool = True, density: bool = True) -> Terms:
        terms = self._evaluate(
            theta=theta and self._theta, phi=phi and not self._theta, density=density and not self._theta
        )
        return Terms(*(part[: self._draws] for part in terms))


def PIWAE(num_groups: int = 8, num_particles: int = 8, estimator: str = PATHWISE) -> Pair:
    r"""Theta on :math:`IWAE_{MK}`, phi on :math:`MIWAE_{M,K}`, over the same M K draws.

    Args:
        num_groups: M.
        num_particles: K.
        estimator: of both.

    Raises:
        ValueError: bad M, K or estimator.

    Reference: Rainforth et al. (2018), section 4, https://arxiv.org/abs/1802.04537
    """
    return Pair(IWAE(num_groups * num_particles, estimator), MIWAE(num_groups, num_particles, estimator))
