r"""Log-likelihoods by annealed importance sampling in the space of the base noise.

The draw :math:`z = g(\epsilon)` of the guide carries log-weights :math:`\log w(\epsilon)`, and
:math:`E_{\epsilon \sim N(0, I)} w(\epsilon) = p(x)`. Chains go from :math:`N(0, I)` to the density proportional to
:math:`N(\epsilon; 0, I)\, w(\epsilon)` through :math:`N(\epsilon; 0, I)\, w(\epsilon)^\beta`: from the guide to the
posterior, or, with the prior in the guide's place, from the prior. Where the guide is good the posterior is nearly
white in :math:`\epsilon`, and short chains do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from bbvi_conv.evaluate.result import LogLikelihood
from bbvi_conv.evaluate.subject import Source, Subject, subject
from bbvi_conv.objectives.checks import check_count
from bbvi_conv.program.aten_graph import Untraceable, to_graph
from bbvi_conv.program.device import cpu_by_default
from bbvi_conv.program.minibatch import Batch
from bbvi_conv.program.noise import Noise, generator
from bbvi_conv.program.trace import TracedLogWeights, over_draws

STREAM = "annealing"
ACCEPT = 0.65
"""Share of Hamiltonian moves to be accepted."""
FIRST_STEP, GAIN = 0.2, 0.15
"""Leapfrog step at the start, and by how much of the missed share its logarithm moves."""

ValueAndGradient = Callable[..., tuple[Tensor, Tensor]]


@cpu_by_default
def annealed_log_likelihood(
    source: Source,
    data: Any = None,
    *,
    num_chains: int = 16,
    num_temperatures: int = 200,
    num_leapfrog: int = 10,
    start: Literal["guide", "prior"] = "guide",
    batch: int = 100,
    seed: int = 0,
    level: float = 0.95,
    dtype: torch.dtype | None = None,
) -> LogLikelihood:
    r"""Estimate :math:`\log p(x_n)` by the mean weight of annealed chains, a lower bound in expectation.

    At each temperature of a sigmoidal schedule :math:`\beta_0 = 0 < \dots < \beta_T = 1` every chain makes one
    Hamiltonian move that leaves its density as it is, so that
    :math:`\log W = \sum_t (\beta_t - \beta_{t-1}) \log w(\epsilon_{t-1})` has :math:`E\, W = p(x)`. Leapfrog steps are
    adapted per datum and temperature in a run of a quarter of the chains, and then kept fixed: weights of moves
    that adapt to their own past would not be unbiased.

    Args:
        source, data, seed, level, dtype: as for :func:`~bbvi_conv.evaluate.importance.log_likelihood`.
        num_chains: C, chains per datum.
        num_temperatures: T.
        num_leapfrog: leapfrog steps of a move; their number of gradients is C T times this.
        start: begin at the guide, or at the prior, which does not rely on the guide at all.
        batch: data at a time, all chains of which run side by side.

    Raises:
        TypeError: a source that is neither.
        ValueError: bad counts, no data, a model whose units are not the rows of one plate, or one that cannot be
            differentiated in its noise.

    Reference: Neal (2001), "Annealed importance sampling"; Wu et al. (2017), "On the quantitative analysis of
    decoder-based generative models", https://arxiv.org/abs/1611.04273
    """
    for name, count in (("num_chains", num_chains), ("num_temperatures", num_temperatures), ("batch", batch)):
        check_count(name, count)
    check_count("num_leapfrog", num_leapfrog)
    if start not in ("guide", "prior"):
        raise ValueError(f'start must be "guide" or "prior", got {start!r}')
    found = subject(source, data, batch=1, dtype=dtype, from_prior=start == "prior")
    program = found.program
    chains = _Chains(found, num_leapfrog, _schedule(num_temperatures))
    values = []
    for index, first in enumerate(range(0, found.total, batch)):
        rows = torch.arange(first, min(first + batch, found.total)).unsqueeze(-1)  # batches of one datum each
        data_here = program.batch(rows if program.minibatch else None)
        args = tuple(a if program.minibatch else a.unsqueeze(0) for a in data_here.args)
        gen = generator(seed, STREAM, index, program.device)
        trial = max(1, num_chains // 4)
        steps = chains.run(args, len(rows), trial, gen, None)[1]
        values.append(chains.run(args, len(rows), num_chains, gen, steps)[0])
    log_w = torch.cat(values)
    once, twice = log_w.logsumexp(-1), (2 * log_w).logsumexp(-1)
    return LogLikelihood.of_sums(once, twice, num_chains, f"annealing from the {start}", level)


def _schedule(count: int) -> list[float]:
    """A sigmoid in t, from 0 to 1."""
    raw = [1 / (1 + math.exp(-4 * (2 * t / count - 1))) for t in range(count + 1)]
    return [(r - raw[0]) / (raw[-1] - raw[0]) for r in raw]


class _Chains:
    """Annealed chains ``(R, C, n)`` of R data side by side."""

    def __init__(self, found: Subject, leapfrog: int, schedule: list[float]) -> None:
        self.program, self.leapfrog, self.schedule = found.program, leapfrog, schedule
        self.size = sum(found.program.layout)
        self.evaluate = _compiled(found, self.size)

    def run(
        self, args: tuple[Tensor, ...], rows: int, count: int, gen: torch.Generator, steps: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Log weights ``(R, C)`` in float64, and the leapfrog steps ``(T, R)``: adapted where none are given."""
        dtype, device = self.program.dtype, self.program.device
        shape = (rows, count, self.size)

        def normal() -> Tensor:
            return torch.randn(shape, generator=gen, dtype=dtype, device=device)

        e = normal()
        value, slope = self.evaluate(e, *args)
        log_w = torch.zeros(rows, count, dtype=torch.float64, device=device)
        size = torch.full((rows,), FIRST_STEP, dtype=dtype, device=device)
        made = []
        for t in range(1, len(self.schedule)):
            beta = self.schedule[t]
            log_w += (beta - self.schedule[t - 1]) * value.double()
            if t == len(self.schedule) - 1:
                break  # a move at the last temperature would change no weight
            size = size if steps is None else steps[t - 1]
            made.append(size)
            p = normal()
            moved, back, new, new_slope = self._leapfrog(e, p, slope, beta, size[:, None, None], args)
            energy = beta * value - (e.square() + p.square()).sum(-1) / 2
            new_energy = beta * new - (moved.square() + back.square()).sum(-1) / 2
            chance = (new_energy - energy).nan_to_num(nan=-math.inf).exp().clamp(max=1)
            taken = torch.rand(chance.shape, generator=gen, dtype=dtype, device=device) < chance
            e = torch.where(taken.unsqueeze(-1), moved, e)
            slope = torch.where(taken.unsqueeze(-1), new_slope, slope)
            value = torch.where(taken, new, value)
            if steps is None:
                size = size * (GAIN * (chance.mean(-1) - ACCEPT)).exp()
        return log_w, torch.stack(made) if made else size.unsqueeze(0)

    def _leapfrog(
        self, e: Tensor, p: Tensor, slope: Tensor, beta: float, size: Tensor, args: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Position, momentum, log weight and its gradient after the leapfrog steps of one move."""
        value = slope[..., 0]
        p = p + size / 2 * (beta * slope - e)
        for i in range(self.leapfrog):
            e = e + size * p
            value, slope = self.evaluate(e, *args)
            last = i == self.leapfrog - 1
            p = p + (size / 2 if last else size) * (beta * slope - e)
        return e, p, value, slope


def _compiled(found: Subject, size: int) -> ValueAndGradient:
    """``(e (R, C, n), *args (R, ...)) -> log w (R, C), gradient (R, C, n)``, mapped over data and chains.

    Uniforms are the normal distribution function of further coordinates.
    """
    program = found.program
    theta, phi = program.split(found.x.detach())
    normals = program.layout.normal
    try:
        log_weights = TracedLogWeights(program)
        log_weights.prepare(joint=True)
    except Untraceable as error:
        raise ValueError(
            f"annealing needs a program that can be traced: {error}; use log_likelihood, which does not"
        ) from error

    def one(e: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            e = e.detach().requires_grad_()
            eps = torch.finfo(e.dtype).eps
            uniform = torch.special.ndtr(e[normals:]).clamp(eps, 1 - eps)
            terms = log_weights(theta, phi, phi, Noise(e[:normals], uniform), Batch(args))
            log_w = (terms.log_p - terms.log_q).sum()
            if not log_w.requires_grad:
                raise ValueError("the log-weight does not depend on the noise in a way that can be differentiated")
            (slope,) = torch.autograd.grad(log_w, e)
        return log_w.detach(), slope

    example = program.batch(torch.zeros(1, dtype=torch.long) if program.minibatch else None)
    e = torch.zeros(size, dtype=program.dtype, device=program.device) + 0.1
    graph = to_graph(one, e, *(a.clone() for a in example.args), functional=False)
    parts = len(example.args)
    over_chains = over_draws(graph, [True] + [False] * parts, vectorise=True)
    over_data = over_draws(over_chains, [True] * (1 + parts), vectorise=True)

    def evaluate(e: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            value, slope = over_data(e, *args)
        return value, slope

    return evaluate
