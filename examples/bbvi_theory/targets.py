"""The targets: model files, whether they are log-concave, and for regressions the exact objective of a Gaussian q."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bbvi_conv.model_file import load_module
from bbvi_conv.program.noise import Noise
from bbvi_conv.program.program import Program

NODES = 80
"""Of the Gauss-Hermite rule: exact for the quadratic, to rounding for the logistic likelihood at these variances."""


load = cache(load_module)


class Gaussian:
    r"""A Gaussian :math:`N(m, C C^\top)` as ``loc`` ``(D,)`` and ``factor`` ``(D, D)``, read off a guide."""

    def __init__(self, loc: Tensor, factor: Tensor) -> None:
        self.loc, self.factor = loc, factor

    @staticmethod
    def of(program: Program, x: Tensor) -> Gaussian:
        """From a location-scale guide over real sites: its draw is affine in the noise."""
        dim = program.layout.normal
        noise = torch.cat([torch.zeros(1, dim, dtype=x.dtype), torch.eye(dim, dtype=x.dtype)])
        _, batch = program.example()
        draws = []
        with torch.no_grad():
            for row in noise:
                latent = program.site_values(x, Noise(row, x.new_zeros(0)), batch).latent
                draws.append(torch.cat([value.reshape(-1) for value in latent.values()]))
        return Gaussian(draws[0], (torch.stack(draws[1:]) - draws[0]).T)

    def squared_distance(self, other: Gaussian) -> float:
        """Of locations and factors together."""
        return float((self.loc - other.loc).square().sum() + (self.factor - other.factor).square().sum())


@dataclass(frozen=True)
class Regression:
    """A generalised linear model with latents (alpha, beta): the negative ELBO of a Gaussian in closed form.

    Attributes:
        covariate, response: data ``(N,)``.
        prior: scales of alpha and beta.
        log_likelihood: of responses at linear predictors, elementwise, in nats.
        curvature: largest -d^2/df^2 of it.
    """

    covariate: Tensor
    response: Tensor
    prior: Tensor
    log_likelihood: Callable[[Tensor, Tensor], Tensor]
    curvature: float

    @property
    def design(self) -> Tensor:
        """``(N, 2)``."""
        return torch.stack([torch.ones_like(self.covariate), self.covariate], -1)

    @property
    def smoothness(self) -> float:
        """L, a Lipschitz constant of the gradient of log p."""
        return float(torch.linalg.eigvalsh(self._curvature(self.curvature))[-1])

    def _curvature(self, weight: float) -> Tensor:
        return weight * self.design.T @ self.design + torch.diag(self.prior**-2)

    def loss(self, loc: Tensor, factor: Tensor) -> Tensor:
        """Negative ELBO ``()``, in nats; predictors are Gaussian, so each expectation is an integral on the line."""
        nodes, weights = (torch.tensor(a, dtype=loc.dtype) for a in np.polynomial.hermite_e.hermegauss(NODES))
        spread = (self.design @ factor).square().sum(-1).sqrt()
        predictor = (self.design @ loc)[:, None] + spread[:, None] * nodes
        fitted = (self.log_likelihood(predictor, self.response[:, None]) * weights).sum() / weights.sum()
        prior = -0.5 * ((loc.square() + factor.square().sum(-1)) / self.prior**2).sum() - self.prior.log().sum()
        entropy = factor.diagonal().abs().log().sum() + 0.5 * len(loc)
        return -(fitted + prior + entropy)

    @cache  # noqa: B019 - one target lives as long as the program
    def optimum(self, dense: bool) -> tuple[Gaussian, float]:
        """The best Gaussian, full-rank or factorised, and its loss; by Newton's method to rounding."""
        x = torch.tensor([0.0, 0.0, -1.0, -1.0] + [0.0] * dense, dtype=torch.float64)

        def objective(x: Tensor) -> Tensor:
            return self.loss(*_unpack(x))

        for _ in range(100):
            gradient = torch.func.grad(objective)(x)
            step = torch.linalg.solve(_hessian(objective)(x), gradient)
            x = x - step * min(1.0, 1.0 / float(step.norm()))
            if float(step.norm()) < 1e-13:
                break
        return Gaussian(*_unpack(x)), float(objective(x))

    @cache  # noqa: B019
    def convexity(self, dense: bool) -> float:
        """Smallest curvature of the loss in (m, C) at the optimum: mu of the rates for strongly convex objectives."""
        best, _ = self.optimum(dense)
        entries = ([0, 1, 1], [0, 0, 1]) if dense else ([0, 1], [0, 1])

        def objective(x: Tensor) -> Tensor:
            return self.loss(
                x[:2], torch.zeros(2, 2, dtype=x.dtype).index_put(tuple(map(torch.tensor, entries)), x[2:])
            )

        curvature = _hessian(objective)(torch.cat([best.loc, best.factor[entries]]))
        return float(torch.linalg.eigvalsh(curvature)[0])


def _hessian(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """By reverse mode twice: torch's forward mode compiles scripts, and warns that they are deprecated."""
    second: Callable[[Tensor], Tensor] = torch.func.jacrev(torch.func.jacrev(function))
    return second


def _unpack(x: Tensor) -> tuple[Tensor, Tensor]:
    """Location, and a factor with the exponentials of two entries on its diagonal."""
    factor = torch.diag(x[2:4].exp())
    if len(x) > 4:
        factor = factor + x[4] * torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=x.dtype)
    return x[:2], factor


@dataclass(frozen=True)
class Target:
    """A model file under the name that the table gives it.

    Attributes:
        file: of the model.
        log_concave: whether it is, on the unconstrained space.
        step: C of step sizes where no smoothness constant is known.
    """

    name: str
    file: str
    log_concave: bool
    step: float = 0.1

    @property
    def module(self) -> ModuleType:
        """The model file, loaded."""
        return load(self.file)

    @property
    def args(self) -> tuple[Tensor, ...]:
        """Arguments of the model."""
        args: tuple[Tensor, ...] = self.module.data()
        return args

    @property
    def regression(self) -> Regression | None:
        """The exact objective, for regressions."""
        return _regression(self.file)


@cache
def _regression(file: str) -> Regression | None:
    if file not in ("forbes", "challenger"):
        return None
    covariate, response = load(file).data()
    if file == "forbes":
        noise = load(file).NOISE
        prior = torch.tensor(load(file).PRIOR, dtype=torch.float64)
        constant = -0.5 * float(np.log(2 * np.pi)) - float(np.log(noise))
        normal = lambda f, y: constant - 0.5 * ((y - f) / noise).square()  # noqa: E731
        return Regression(covariate, response, prior, normal, noise**-2)
    prior = torch.tensor([5.0, 2.5], dtype=torch.float64)
    return Regression(covariate, response, prior, lambda f, y: logsigmoid((2 * y - 1) * f), 0.25)


LINEAR = Target("linear regression", "forbes", True)
LOGISTIC = Target("logistic regression", "challenger", True)
FUNNEL = Target("funnel", "funnel", False, 0.02)
BANANA = Target("banana", "banana", False, 0.05)
MODES = Target("two modes", "two_modes", False, 0.1)
SCHOOLS = Target("eight schools", "eight_schools", False, 0.05)
