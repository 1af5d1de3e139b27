"""Bounds from K importance weights: IWAE, VR-IWAE, MIWAE, CIWAE."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from bbvi_conv.objectives.checks import check_count, check_estimator, check_share
from bbvi_conv.objectives.objective import DOUBLY, PATHWISE, Objective
from bbvi_conv.objectives.weights import renyi, tempered


class _KDraws(Objective):
    """What bounds of K draws have in common; a member says ``bound`` and ``weights``."""

    num_particles: int

    def __post_init__(self) -> None:
        check_count("num_particles", self.num_particles)
        check_estimator(self.estimator, (PATHWISE, DOUBLY))

    @property
    def draws(self) -> int:
        """K."""
        return self.num_particles

    @property
    def linear(self) -> bool:
        """Only with one draw a bound."""
        return self.num_particles == 1

    def quietest(self) -> Self:
        """Doubly reparameterised."""
        return replace(self, estimator=DOUBLY)

    def single(self) -> Self:
        """Itself: K is part of the bound."""
        return self

    def plain(self) -> Self:
        """Pathwise."""
        return replace(self, estimator=PATHWISE)


@dataclass(frozen=True)
class IWAE(_KDraws):
    r"""Importance-weighted bound, in nats, summed over the data.

    .. math:: L_K = \sum_u E \log \tfrac1K \sum_k p_\theta(x_u, z_{uk}) / q_\phi(z_{uk} | x_u), \quad z_{uk} \sim q_\phi

    It tightens as K grows, while the signal-to-noise ratio of its pathwise gradient for phi falls like
    :math:`K^{-1/2}`; that of the doubly reparameterised one (DReG) rises like :math:`K^{1/2}`.

    Args:
        num_particles: K, draws per unit; K = 1 is the ELBO.
        estimator: ``"pathwise"`` or ``"doubly-reparameterised"``.

    Raises:
        ValueError: bad K or estimator.

    Reference: Burda et al. (2016), section 3, https://arxiv.org/abs/1509.00519; Rainforth et al. (2018),
    https://arxiv.org/abs/1802.04537; Tucker et al. (2019), https://arxiv.org/abs/1810.04152

    Example:
        >>> IWAE(num_particles=8).draws
        8
    """

    num_particles: int = 5
    estimator: str = PATHWISE

    def bound(self, log_w: Tensor) -> Tensor:
        """Log mean weight."""
        return renyi(log_w, 0.0)

    def weights(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised weights v, and v squared."""
        v = tempered(log_w, 0.0)
        return v, v * v


@dataclass(frozen=True)
class VRIWAE(_KDraws):
    r"""Variational Renyi importance-weighted bound, in nats, summed over the data.

    .. math:: L_{\alpha, K} = \sum_u E \tfrac1{1-\alpha} \log \tfrac1K \sum_k w_{uk}^{1-\alpha}

    alpha = 0 is the IWAE, alpha to 1 the ELBO, K = 1 the ELBO; for a fixed alpha > 0 it tends to the variational Renyi
    bound as K grows, not to :math:`\log p(x)`.

    Args:
        num_particles: K, draws per unit.
        alpha: in [0, 1).
        estimator: ``"pathwise"``, or ``"doubly-reparameterised"``: with :math:`v_k \propto w_k^{1-\alpha}`,
            :math:`\sum_k (\alpha v_k + (1-\alpha) v_k^2) (\partial_z \log w_k)(\partial_\phi z_k)` for phi and
            :math:`\sum_k v_k \partial_\theta \log p` for theta.

    Raises:
        ValueError: bad K, alpha or estimator.

    Reference: Daudel et al. (2023), https://arxiv.org/abs/2210.06226; Tucker et al. (2019),
    https://arxiv.org/abs/1810.04152

    Example:
        >>> VRIWAE(num_particles=8, alpha=0.5).draws
        8
    """

    num_particles: int = 5
    alpha: float = 0.5
    estimator: str = PATHWISE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("alpha", self.alpha, below_one=True)

    def bound(self, log_w: Tensor) -> Tensor:
        """Renyi mean of the weights."""
        return renyi(log_w, self.alpha)

    def weights(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`v` and :math:`\alpha v + (1 - \alpha) v^2`."""
        v = tempered(log_w, self.alpha)
        return v, self.alpha * v + (1 - self.alpha) * v * v


@dataclass(frozen=True)
class MIWAE(_KDraws):
    r"""Mean of M independent importance-weighted bounds of K draws each (Rainforth's, not the missing-data one).

    .. math:: L_{M, K} = \sum_u E \tfrac1M \sum_m \log \tfrac1K \sum_k w_{umk}

    M = 1 is the IWAE. Arguments, errors and estimators as in :class:`VRIWAE` with alpha = 0.

    Args:
        num_groups: M.
        num_particles: K, draws per unit and group.
        estimator: ``"pathwise"`` or ``"doubly-reparameterised"``.

    Raises:
        ValueError: bad M, K or estimator.

    Reference: Rainforth et al. (2018), "Tighter variational bounds are not necessarily better", section 4,
    https://arxiv.org/abs/1802.04537

    Example:
        >>> MIWAE(num_groups=4, num_particles=8).draws
        32
    """

    num_groups: int = 8
    num_particles: int = 8
    estimator: str = PATHWISE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_groups", self.num_groups)

    @property
    def draws(self) -> int:
        """M K."""
        return self.num_groups * self.num_particles

    def _groups(self, log_w: Tensor) -> Tensor:
        """``(M K, U)`` to ``(K, M, U)``."""
        return log_w.reshape(self.num_groups, self.num_particles, -1).transpose(0, 1)

    def bound(self, log_w: Tensor) -> Tensor:
        """Mean over groups."""
        return renyi(self._groups(log_w), 0.0).mean(0)

    def weights(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """v / M and v squared / M, v normalised within groups."""
        v = tempered(self._groups(log_w), 0.0).transpose(0, 1).reshape(log_w.shape)
        return v / self.num_groups, v * v / self.num_groups

    def single(self) -> MIWAE:
        """One group: the same gradient in expectation."""
        return replace(self, num_groups=1)

    def plain(self) -> MIWAE:
        """Pathwise, one group."""
        return replace(self, num_groups=1, estimator=PATHWISE)


@dataclass(frozen=True)
class CIWAE(_KDraws):
    r"""Convex combination :math:`\beta\, L_{ELBO} + (1 - \beta)\, L_{IWAE_K}` over the same K draws.

    Args:
        num_particles: K.
        elbo_weight: beta, in [0, 1].
        estimator: ``"pathwise"`` or ``"doubly-reparameterised"``.

    Raises:
        ValueError: bad K, weight or estimator.

    Reference: Rainforth et al. (2018), section 4, https://arxiv.org/abs/1802.04537
    """

    num_particles: int = 8
    elbo_weight: float = 0.5
    estimator: str = PATHWISE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("elbo_weight", self.elbo_weight)

    def bound(self, log_w: Tensor) -> Tensor:
        """Both bounds, mixed."""
        return self.elbo_weight * log_w.mean(0) + (1 - self.elbo_weight) * renyi(log_w, 0.0)

    def weights(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """Both weights, mixed."""
        v, even = tempered(log_w, 0.0), torch.full_like(log_w, self.elbo_weight / len(log_w))
        return even + (1 - self.elbo_weight) * v, even + (1 - self.elbo_weight) * v * v
