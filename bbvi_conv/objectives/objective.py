"""What an objective is to the engines and the monitor, and how a bound becomes a loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from bbvi_conv.objectives.stock import StockLoss
from bbvi_conv.objectives.weights import learning_signals
from bbvi_conv.program.terms import Terms

if TYPE_CHECKING:
    from bbvi_conv.program.program import Program
    from bbvi_conv.program.structure import Structure

PATHWISE = "pathwise"
STICKING = "sticking-the-landing"
DOUBLY = "doubly-reparameterised"

KlWeight = float | Callable[[Tensor], Tensor]
"""A number, or a function of the step number n = 1, 2, ... (a scalar tensor)."""


class Evaluation(Protocol):
    """All K draws of the program at one point; each copy of the parameters is live or detached.

    Attributes:
        step: n, a scalar tensor, for schedules.
        has_theta: whether the model has parameters of its own.
    """

    step: Tensor
    has_theta: bool

    def __call__(self, *, theta: bool = True, phi: bool = True, density: bool = True) -> Terms:
        """Terms with K in front. ``phi`` is the copy in the draw, ``density`` the copy in log q."""
        ...


def shown(value: object) -> str:
    """A value that was given, short enough for a sentence."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def checked_objective(given: object) -> None:
    """Refuse what is no objective.

    Raises:
        ValueError: with an example of one.
    """
    if not isinstance(given, Objective):
        raise ValueError(f"objective must be a value such as bc.ELBO() or bc.IWAE(5), got {shown(given)}")


class Objective(StockLoss):
    r"""A bound as a small frozen value: a function of K log-weights per unit, and an estimator of its gradient.

    With :math:`\log w_k = \log p_\theta(x, z_k) - \log q_\phi(z_k)`:

    * ``pathwise`` differentiates everything. Sites without a pathwise gradient add
      :math:`\sum_k (\hat L - \hat L_{-k}) \nabla \log q(z_k)`, their score with a leave-one-out baseline.
    * ``sticking-the-landing`` (ELBO) detaches the density's parameters, whose score has mean zero.
    * ``doubly-reparameterised`` (K > 1) weighs :math:`\partial_\theta \log p` and
      :math:`(\partial_z \log w_k)(\partial_\phi z_k)` by :meth:`weights`.

    Members say :meth:`bound` and :meth:`weights`; the rest follows.
    """

    estimator: str

    # ---- what a member says ----

    @property
    @abstractmethod
    def draws(self) -> int:
        """Runs of the program in one evaluation."""

    @property
    @abstractmethod
    def linear(self) -> bool:
        """Whether the bound is linear in the log-weights: only then may terms be scaled N/B inside."""

    @abstractmethod
    def bound(self, log_w: Tensor) -> Tensor:
        """Bound of every unit ``(U,)`` from log-weights ``(draws, U)``, in nats."""

    @abstractmethod
    def weights(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """Weights ``(draws, U)`` of the model's and of the draw's gradient, for estimators with a detached density."""

    @abstractmethod
    def quietest(self) -> Objective:
        """The same gradient in expectation, by the valid estimator with the least noise."""

    @abstractmethod
    def single(self) -> Objective:
        """The same expectation at the least cost per evaluation, for when many are averaged anyway."""

    @abstractmethod
    def plain(self) -> Objective:
        """The same bound by the pathwise estimator, at the least cost: twice differentiable on fixed noise."""

    # ---- what follows ----

    kl_weight: KlWeight = 1.0
    analytic_kl: bool = False
    averages: bool = False
    """Whether the bound is the mean over its draws, however many: only then may they be strata of unequal weight."""
    conservative: bool = True
    """Whether the estimator is the gradient of one function, which then has a Hessian."""

    @property
    def split(self) -> bool:
        """Whether the density needs its own copy of the variational parameters."""
        return self.estimator != PATHWISE

    def surrogate(self, evaluate: Evaluation, *, scale: float = 1.0, score: bool = False) -> Tensor:
        """Scalar ``()`` loss: in value the negative bound, in nats summed over the data; in gradient the estimator's.

        Args:
            evaluate: the draws.
            scale: N/B, outside the bound of each unit.
            score: whether some site has no pathwise gradient.
        """
        if self.split:
            return self._detached_density(evaluate, scale, score)
        terms = evaluate()
        log_w = self._log_weights(terms, evaluate.step)
        value = scale * self.bound(log_w).sum() + terms.free.mean()
        surrogate = value
        if score:
            signals = learning_signals(self.bound, log_w.detach())
            if self.linear:  # takes back the gradient of these sites' own log q: its mean is zero
                signals = signals + self._kl(evaluate.step) * self.weights(log_w.detach())[1]
            surrogate = value + scale * (signals * terms.score).sum()
        return -(value.detach() + surrogate - surrogate.detach())

    def _detached_density(self, evaluate: Evaluation, scale: float, score: bool) -> Tensor:
        drawn = evaluate(theta=False, density=False)
        log_w = self._log_weights(drawn, evaluate.step)
        value, free = scale * self.bound(log_w).sum(), drawn.free.mean()
        for_model, for_draw = self.weights(log_w.detach())
        surrogate = scale * (for_draw * log_w).sum()
        if score:
            surrogate = surrogate + scale * (learning_signals(self.bound, log_w.detach()) * drawn.score).sum()
        if evaluate.has_theta:
            modelled = evaluate(phi=False, density=False)
            free = modelled.free.mean()
            surrogate = surrogate + scale * (for_model * self._log_weights(modelled, evaluate.step)).sum() + free
        return -((value + free).detach() + surrogate - surrogate.detach())

    def _log_weights(self, terms: Terms, step: Tensor) -> Tensor:
        if isinstance(self.kl_weight, float) and self.kl_weight == 1.0:
            return terms.log_p - terms.log_q
        return terms.log_p - terms.log_prior + self._kl(step) * (terms.log_prior - terms.log_q)

    def _kl(self, step: Tensor) -> Tensor | float:
        return self.kl_weight(step) if callable(self.kl_weight) else self.kl_weight

    def at(self, step: int, looks: Any) -> Objective:
        """The objective in force after ``step`` steps and these looks: itself, but for a schedule."""
        return self

    def next_change(self, step: int) -> int | None:
        """First later step at which :meth:`at` may differ by plan, if any."""
        return None

    def settled(self, step: int, looks: Any) -> bool:
        """Whether no other objective is due after this one by plan, so that a run may be done."""
        return True

    def validate(self, program: Program) -> None:
        """Refuse what has no unbiased estimator.

        Raises:
            ValueError: naming the plate, parameter or site and the way out.
        """
        if program.own_rows and not self.linear:
            raise ValueError(
                f"{type(self).__name__} needs all its draws on the same rows, but the model draws the rows of plate "
                f"{program.own_rows[0]!r} by itself; give it gathered rows, over a plate of their number"
            )
        subsampled = [] if program.plate is None else [program.plate]
        shared = [leaf.name for leaf in program.leaves if leaf.group == "shared"]
        self._refuse(program.structure, subsampled, shared)

    def refuse_stock(self, structure: Structure, subsampled: list[str], shared: list[str]) -> None:
        """The same in a stock loop, where there is no step number either.

        Raises:
            ValueError: naming the plate, parameter, site or option and the way out.
        """
        if callable(self.kl_weight):
            raise ValueError("a schedule of kl_weight needs the step number: use bbvi_conv.fit, or a number per phase")
        if self.analytic_kl:
            raise ValueError("analytic_kl needs bbvi_conv.fit; in a stock loop use pyro.infer.TraceMeanField_ELBO")
        if structure.strata > 1:
            raise ValueError('a stratified mixture needs bbvi_conv.fit; in a stock loop give it gradient="implicit"')
        self._refuse(structure, subsampled, shared)

    def _refuse(self, structure: Structure, subsampled: list[str], shared: list[str]) -> None:
        name = type(self).__name__
        outside = [plate for plate in subsampled if plate not in structure.unit]
        if outside and not self.linear:
            raise ValueError(
                f"{name} has no unbiased estimator when plate {outside[0]!r} is subsampled and a latent site lies "
                f"outside it ({structure.describe()}); use the ELBO, or all rows"
            )
        if structure.strata > 1 and not (self.averages and not structure.score_sites):
            raise ValueError(
                f"{name} cannot be stratified over the {structure.strata} components of the guide's mixture: that "
                'takes the ELBO and pathwise sites; give the mixture gradient="implicit"'
            )
        if self.split and structure.no_path:
            raise ValueError(
                f'{name} cannot use estimator="{self.estimator}": the law of guide site {structure.no_path[0]!r} has '
                f'no density at given values (no cheap inverse); use estimator="{PATHWISE}" or a family with an inverse'
            )
        if self.estimator != DOUBLY:
            return
        if shared:
            raise ValueError(
                f"{name} cannot be doubly reparameterised: model and guide share parameter {shared[0]!r}; "
                f'use estimator="{PATHWISE}"'
            )
        if structure.score_sites:
            raise ValueError(
                f"{name} cannot be doubly reparameterised: site {structure.score_sites[0]!r} has no pathwise "
                f'gradient; use estimator="{PATHWISE}", which gives it the score function'
            )
