"""Log-likelihoods by importance sampling from the guide, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bbvi_conv.evaluate.result import LogLikelihood, LogSums
from bbvi_conv.evaluate.subject import Source, Subject, subject
from bbvi_conv.objectives.checks import check_count
from bbvi_conv.posterior.draws import Mapped
from bbvi_conv.program.aten_graph import Untraceable
from bbvi_conv.program.device import cpu_by_default
from bbvi_conv.program.minibatch import Batch
from bbvi_conv.program.noise import Noise, generator
from bbvi_conv.program.trace import TracedLogWeights

STREAM = "log-likelihood"
PIECE = 250
"""Draws whose noise is held at once; how many run at once is a matter of the memory they take."""


@cpu_by_default
def log_likelihood(
    source: Source,
    data: Any = None,
    *,
    num_particles: int = 5000,
    batch: int = 100,
    seed: int = 0,
    level: float = 0.95,
    dtype: torch.dtype | None = None,
) -> LogLikelihood:
    r"""Estimate :math:`\log p(x_n)` of every datum by :math:`\log \tfrac1K \sum_k p(x_n, z_{nk}) / q(z_{nk} | x_n)`.

    Args:
        source: a fit, or a model and its guide with the parameters they now hold.
        data: positional arguments of the model over the data, or its only one; None: the data of the fit.
        num_particles: K, draws per datum.
        batch: rows at a time; memory is bounded whatever N and K are.
        seed: of the noise, which depends on nothing else but the batch; torch's generator is left as found.
        level: coverage of intervals.
        dtype: float type; None: the fit's, for a pair float32.

    Returns:
        Values, errors and effective sample sizes per datum; where all latents are global there is one, of all data.

    Raises:
        TypeError: a source that is neither.
        ValueError: bad counts, no data, or a model whose units are not the rows of one plate.

    Reference: Burda et al. (2016), appendix, https://arxiv.org/abs/1509.00519
    """
    check_count("num_particles", num_particles)
    check_count("batch", batch)
    found = subject(source, data, batch=batch, dtype=dtype)
    weigh = Weights(found, num_particles)
    firsts, seconds = [], []
    for index, (part, counted) in enumerate(found.parts()):
        sums = LogSums()
        for start in range(0, num_particles, PIECE):
            gen = generator(seed, f"{STREAM} {index}", start // PIECE, found.program.device)
            count = min(PIECE, num_particles - start)
            sums.add(weigh(found.program.layout.draw(gen, count, dtype=found.program.dtype), part))
        assert sums.first is not None
        assert sums.second is not None
        firsts.append(sums.first[:counted])
        seconds.append(sums.second[:counted])
    return LogLikelihood.of_sums(torch.cat(firsts), torch.cat(seconds), num_particles, "importance sampling", level)


class Weights:
    """Log weights ``(K, U)`` at the subject's parameters for noise ``(K, ...)`` and a batch: traced, else by a loop.

    Args:
        found: the subject.
        draws: how many of each datum there will be.
    """

    def __init__(self, found: Subject, draws: int) -> None:
        self.program, self.runs = found.program, found.num_parts * draws
        self.theta, self.phi = found.program.split(found.x.detach())
        self.log_weights: Callable[..., Any] = found.program.log_weights
        self.traced = False
        try:
            traced = TracedLogWeights(found.program)
            with torch.no_grad():
                traced.prepare(joint=True)
            self.log_weights, self.traced = traced, True
        except Untraceable:
            pass
        self._mapped: Mapped | None = None

    def __call__(self, noise: Noise, batch: Batch) -> Tensor:
        """Mapped over the noise's first dimension."""
        fixed = [*batch.args, *([] if batch.indices is None else [batch.indices])]
        with torch.no_grad(), self.program.networks_kept():
            if self._mapped is None:
                self._mapped = Mapped(self._one, list(noise), fixed, trace=self.traced, runs=self.runs)
            return self._mapped(list(noise), fixed)["log_w"]

    def _one(self, normal: Tensor, uniform: Tensor, *fixed: Tensor) -> dict[str, Tensor]:
        rows = None if len(fixed) == len(self.program.batched) else fixed[-1]
        batch = Batch(fixed if rows is None else fixed[:-1], rows)
        terms = self.log_weights(self.theta, self.phi, self.phi, Noise(normal, uniform), batch)
        return {"log_w": terms.log_p - terms.log_q}
