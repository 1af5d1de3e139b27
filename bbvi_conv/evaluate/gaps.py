r"""What inference loses: to the family of the guide, and to sharing one encoder among all data.

.. math:: \log p(x) - L[q_\phi] = \underbrace{\log p(x) - L[q^*]}_{\text{approximation}}
          + \underbrace{L[q^*] - L[q_\phi]}_{\text{amortization}}

with :math:`q^*` the best mean-field Gaussian of each datum on its own.

Reference: Cremer, Li and Duvenaud (2018), "Inference suboptimality in variational autoencoders",
https://arxiv.org/abs/1801.03558
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bbvi_conv.evaluate.importance import PIECE, Weights
from bbvi_conv.evaluate.result import LogLikelihood, PerDatum
from bbvi_conv.evaluate.subject import Source, Subject, drawn, subject
from bbvi_conv.fitting import Fit
from bbvi_conv.objectives.checks import check_count
from bbvi_conv.program.device import cpu_by_default
from bbvi_conv.program.noise import generator
from bbvi_conv.variational_em import VariationalEM

STREAM = "bound"


@dataclass(frozen=True)
class Gaps:
    """Per datum, in nats: ``approximation``, ``amortization`` and their sum ``inference``.

    Attributes:
        log_p: what is taken for log p(x).
        best: L[q*].
        amortized: L[q_phi].
        converged: whether the factors q* did.
    """

    log_p: LogLikelihood
    best: PerDatum
    amortized: PerDatum
    converged: bool

    @property
    def approximation(self) -> PerDatum:
        """log p(x) - L[q*]."""
        return self.log_p.per_datum - self.best

    @property
    def amortization(self) -> PerDatum:
        """L[q*] - L[q_phi]."""
        return self.best - self.amortized

    @property
    def inference(self) -> PerDatum:
        """log p(x) - L[q_phi]."""
        return self.log_p.per_datum - self.amortized


@cpu_by_default
def elbo(
    source: Source,
    data: Any = None,
    *,
    num_particles: int = 1000,
    batch: int = 100,
    seed: int = 0,
    level: float = 0.95,
    dtype: torch.dtype | None = None,
) -> PerDatum:
    """The ELBO of every datum with its Monte Carlo error; arguments as for ``log_likelihood``."""
    check_count("num_particles", num_particles)
    return _elbo(subject(source, data, batch=batch, dtype=dtype), num_particles, seed, level)


def _elbo(found: Subject, draws: int, seed: int, level: float) -> PerDatum:
    weigh, values, errors = Weights(found, draws), [], []
    for index, (part, counted) in enumerate(found.parts()):
        total: Tensor | float = 0.0
        square: Tensor | float = 0.0
        for start in range(0, draws, PIECE):
            gen = generator(seed, f"{STREAM} {index}", start // PIECE, found.program.device)
            noise = found.program.layout.draw(gen, min(PIECE, draws - start), dtype=found.program.dtype)
            log_w = weigh(noise, part).double()
            total, square = total + log_w.sum(0), square + log_w.square().sum(0)
        assert isinstance(total, Tensor)
        assert isinstance(square, Tensor)
        mean = total / draws
        variance = (square / draws - mean.square()).clamp(min=0) / max(draws - 1, 1)
        counted = len(mean) if found.program.minibatch is None else counted
        values.append(mean[:counted])
        errors.append(variance[:counted].sqrt())
    return PerDatum(torch.cat(values), torch.cat(errors), level)


def _draws(found: Subject, seed: int, count: int = 64) -> dict[str, Tensor]:
    """Draws of the latent sites for all data, ``(count, N, ...)``."""
    program = found.program
    parts: dict[str, list[Tensor]] = {site.name: [] for site in program.structure.latents}
    for index, (part, counted) in enumerate(found.parts()):
        gen = generator(seed, f"{STREAM} start {index}", 0, program.device)
        noise = program.layout.draw(gen, count, dtype=program.dtype)
        values = [drawn(program, found.x, noise.at(i), part) for i in range(count)]
        for name, pieces in parts.items():
            pieces.append(torch.stack([each[name] for each in values])[:, :counted])
    return {name: torch.cat(pieces, 1) for name, pieces in parts.items()}


@cpu_by_default
def inference_gaps(
    fit: Fit,
    data: Any,
    log_p: LogLikelihood,
    *,
    em: VariationalEM | None = None,
    num_particles: int = 1000,
    seed: int = 0,
) -> Gaps:
    """Approximation and amortization gaps of a fit with an encoder, at these data.

    Args:
        fit: the fit.
        data: positional arguments of the model over the data, all of which are seen at once.
        log_p: log-likelihoods of the same data, from ``log_likelihood`` or ``annealed_log_likelihood``, or the
            ``larger`` of both: all are lower bounds in expectation.
        em: fits the factors q*.
        num_particles: draws of each ELBO.
        seed: of their noise.

    Raises:
        ValueError: log-likelihoods of another number of data, or as for :func:`bbvi_conv.fit`.
    """
    found = subject(fit, data, batch=100)
    factors = (em or VariationalEM()).e_step(fit, data, draws=_draws(found, seed))
    best = _elbo(Subject(factors.program, factors.x), num_particles, seed, log_p.per_datum.level)
    if best.values.shape != log_p.values.shape:
        raise ValueError(f"log_p is of {len(log_p.values)} data, the gaps are of {len(best.values)}")
    amortized = _elbo(found, num_particles, seed, log_p.per_datum.level)
    return Gaps(log_p, best, amortized, factors.converged)
