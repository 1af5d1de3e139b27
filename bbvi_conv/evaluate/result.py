"""Log-likelihoods of single data with their Monte Carlo errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bbvi_conv.monitor.intervals import Estimate, student_quantile


@dataclass(frozen=True)
class PerDatum:
    """A number for every datum, in nats.

    Attributes:
        values: ``(N,)``.
        errors: ``(N,)``, Monte Carlo standard errors.
        level: coverage of intervals.
    """

    values: Tensor
    errors: Tensor
    level: float = 0.95

    @property
    def interval(self) -> tuple[Tensor, Tensor]:
        """Lower and upper ends per datum, each ``(N,)``."""
        half = student_quantile(self.level, math.inf) * self.errors
        return self.values - half, self.values + half

    @property
    def mean(self) -> Estimate:
        """Mean over these data, with the interval of its Monte Carlo error."""
        return self._mean(float(self.errors.square().sum().sqrt()) / len(self.values))

    @property
    def population(self) -> Estimate:
        """The same with the interval of a mean over data like these, of which they are a sample."""
        if len(self.values) < 2:
            return Estimate(float(self.values.mean()), None, None, "one datum says nothing of others")
        return self._mean(float(self.values.std()) / len(self.values) ** 0.5)

    def _mean(self, error: float) -> Estimate:
        value, half = float(self.values.mean()), student_quantile(self.level, math.inf) * error
        return Estimate(value, value - half, value + half)

    def __sub__(self, other: PerDatum) -> PerDatum:
        """Differences datum by datum, of independent estimates; ``population`` is then a paired interval."""
        errors = (self.errors.square() + other.errors.square()).sqrt()
        return PerDatum(self.values - other.values, errors, self.level)


@dataclass(frozen=True)
class LogLikelihood:
    r"""Estimates of :math:`\log p(x_n)` in nats, each from S weights: :math:`\log \tfrac1S \sum_s w_{ns}`.

    Each is a lower bound in expectation; the bias is about minus half its squared error, which the intervals, by the
    delta method, do not cover: raise S where errors are not small.

    Attributes:
        per_datum: values and Monte Carlo errors, in nats.
        ess: ``(N,)``, effective sample sizes :math:`(\sum w)^2 / \sum w^2`, from 1 to S.
        num_weights: S.
        method: how the weights were made.
    """

    per_datum: PerDatum
    ess: Tensor
    num_weights: int
    method: str

    @classmethod
    def of_sums(cls, first: Tensor, second: Tensor, count: int, method: str, level: float) -> LogLikelihood:
        r"""From :math:`\log \sum w` and :math:`\log \sum w^2` ``(N,)`` over ``count`` weights."""
        ess = (2 * first - second).exp()
        errors = (1 / ess - 1 / count).clamp(min=0).sqrt()
        return cls(PerDatum(first - math.log(count), errors, level), ess, count, method)

    @property
    def values(self) -> Tensor:
        """``(N,)``."""
        return self.per_datum.values

    @property
    def errors(self) -> Tensor:
        """``(N,)``, Monte Carlo standard errors."""
        return self.per_datum.errors

    @property
    def interval(self) -> tuple[Tensor, Tensor]:
        """As of :class:`PerDatum`."""
        return self.per_datum.interval

    @property
    def mean(self) -> Estimate:
        """As of :class:`PerDatum`."""
        return self.per_datum.mean

    @property
    def population(self) -> Estimate:
        """As of :class:`PerDatum`."""
        return self.per_datum.population

    def part(self, start: int, stop: int) -> LogLikelihood:
        """Of the data from ``start`` to ``stop`` alone."""
        own = slice(start, stop)
        per_datum = PerDatum(self.values[own], self.errors[own], self.per_datum.level)
        return replace(self, per_datum=per_datum, ess=self.ess[own])

    def larger(self, other: LogLikelihood) -> LogLikelihood:
        """Of two estimates for the same data the larger one, datum by datum: both are lower bounds.

        Raises:
            ValueError: of different numbers of data.
        """
        if self.values.shape != other.values.shape:
            raise ValueError(f"{len(self.values)} and {len(other.values)} log-likelihoods are not of the same data")
        better = self.values >= other.values
        mine, theirs = (self.values, self.errors, self.ess), (other.values, other.errors, other.ess)
        values, errors, ess = (torch.where(better, a, b) for a, b in zip(mine, theirs, strict=True))
        method = f"the larger of {self.method} and {other.method}"
        weights = max(self.num_weights, other.num_weights)
        return LogLikelihood(PerDatum(values, errors, self.per_datum.level), ess, weights, method)

    def __repr__(self) -> str:
        mean = self.mean
        return (
            f"<LogLikelihood: {mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}] nats per datum over "
            f"{len(self.values)} data, {self.num_weights} weights each by {self.method}, smallest effective number "
            f"{float(self.ess.min()):.1f}>"
        )


class LogSums:
    r"""Running :math:`\log \sum w` and :math:`\log \sum w^2` in float64: weights come in pieces ``(S, N)``."""

    def __init__(self) -> None:
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def add(self, log_w: Tensor) -> None:
        """Take in log weights ``(S, N)``."""
        log_w = log_w.double()
        first, second = log_w.logsumexp(0), (2 * log_w).logsumexp(0)
        self.first = first if self.first is None else torch.logaddexp(self.first, first)
        self.second = second if self.second is None else torch.logaddexp(self.second, second)
