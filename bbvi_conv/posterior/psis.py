r"""Can the posterior be trusted: the Pareto k-hat of the importance weights p / q.

The generalised Pareto shape k fitted to the largest weights says how many moments they have. The draws serve as a
proposal for the posterior, and q as an approximation of it, where k is under :math:`\min(1 - 1/\log_{10} S, 0.7)`.

Reference: Vehtari, Simpson, Gelman, Yao and Gabry (2024), JMLR 25(72), https://arxiv.org/abs/1507.02646; Yao, Vehtari,
Simpson and Gelman (2018), https://arxiv.org/abs/1802.02538
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from bbvi_conv.monitor.distance import finite_size, rounding_error
from bbvi_conv.monitor.intervals import Estimate, unavailable
from bbvi_conv.posterior.draws import STREAM, Mapped, draw, local, row_step
from bbvi_conv.program.minibatch import Batch
from bbvi_conv.program.noise import Noise, generator
from bbvi_conv.program.program import Program

MIN_UNITS, MAX_UNITS = 100, 200
MIN_DRAWS = 25
MOST_HANDLED = 4000
"""Runs by Pyro's handlers, of many milliseconds each, beyond which k-hat is of fewer units."""
_LEAST = math.exp(20.0) * float(np.finfo(np.float64).tiny)
_KEY = 1_000_003  # a block of the stream that no export reaches


def khat_threshold(num_samples: int) -> float:
    r"""Largest k-hat that S draws can make good for: :math:`\min(1 - 1/\log_{10} S, 0.7)`.

    Example:
        >>> round(khat_threshold(1000), 3), khat_threshold(100_000)
        (0.667, 0.7)
    """
    return min(1.0 - 1.0 / math.log10(num_samples), 0.7)


class Tail(NamedTuple):
    r"""What the importance weights p / q of draws from q say.

    Attributes:
        khat: the Pareto shape of the largest.
        effective: share of the draws that count, :math:`(\sum w)^2 / (S \sum w^2)`; of several units the median; None
            where there is no k-hat. Near one, all but the far tails of q agree with the posterior, whatever k-hat is:
            the largest weights are then fitted on differences that hardly matter.
    """

    khat: Estimate
    effective: float | None = None


def tail(program: Program, x: Tensor, *, num_samples: int = 2000, seed: int = 0) -> Tail:
    r"""k-hat of the weights :math:`p(x, z) / q(z)`, z ~ q.

    *One unit*: of the joint weights, with the interval of the Pareto shape's asymptotic standard deviation,
    :math:`(1 + k)/\sqrt M` for M draws in the tail. *Several units* (a VAE's data): of each unit's own weights, for at
    most 200 units chosen at random; the value is their median, the ends their 5% and 95% quantiles. Generative
    parameters stay at their point estimate. Where all weights are equal to rounding, the value is 0: they are bounded.

    Args:
        program: the program.
        x: flat parameters ``(P,)``.
        num_samples: S.
        seed: of the noise.

    Returns:
        The estimate, unavailable where q has no density, a weight is not finite or the rows cannot be seen together.
    """
    if num_samples < MIN_DRAWS:
        return Tail(unavailable(f"k-hat needs at least {MIN_DRAWS} draws, got {num_samples}: raise khat_draws"))
    if not program.structure.latents:
        return Tail(unavailable("the model has no latent site, so there are no weights"))
    if program.layout.normal + program.layout.uniform == 0:
        return Tail(unavailable("the guide is a point estimate without noise: use a family with a density"))
    x = x.detach()
    if math.prod(program.structure.unit_shape) > 1:
        return _over_units(*_unit_weights(program, x, num_samples, seed))
    log_w = _joint_weights(program, x, num_samples, seed)
    if isinstance(log_w, str):
        return Tail(unavailable(log_w))
    weights, rounding = log_w
    return _joint(weights, rounding)


def pareto_shape(log_w: NDArray[np.float64]) -> float:
    r"""The Pareto shape k-hat of log weights ``(S,)``; NaN where ties leave no tail.

    Zhang and Stephens' fit, by Pyro, to how far the :math:`M = \lfloor\min(S/5, 3\sqrt S)\rfloor` largest weights lie
    above the next. Where the lower quarter of these is less than :math:`e^{-688}` of the largest, which the fit cannot
    divide by, it is Hill's estimate, the mean of :math:`\log w - \log w_{(S-M)}`, shrunk alike to
    :math:`(Mk + 5)/(M + 10)`, infinite where that weight is 0: both are far above any threshold there.
    """
    ordered = np.sort(log_w) - log_w.max()
    count = _tail_length(len(log_w))
    quartile = int(count / 4 - 0.5)
    cutoff, largest = ordered[-count - 1], ordered[-count:]
    above = np.exp(largest) - np.exp(cutoff)
    if above[-1] == 0:
        return math.nan
    if above[quartile] < _LEAST:
        if largest[quartile] == cutoff:
            return math.nan
        return float((np.sum(largest - cutoff) + 5) / (count + 10))
    try:
        with torch.device("cpu"):  # where Pyro makes tensors of its own
            return float(fit_generalized_pareto(torch.from_numpy(above))[0])
    except ZeroDivisionError:  # ties that fit an exponential tail exactly
        return math.nan


def _tail_length(draws: int) -> int:
    return math.floor(min(draws / 5, 3 * math.sqrt(draws)))


def _equal(log_w: NDArray[np.float64], rounding: float) -> bool:
    return float(log_w.max() - log_w.min()) <= rounding


def _joint(log_w: NDArray[np.float64], rounding: float) -> Tail:
    bad = int((np.isnan(log_w) | (log_w == np.inf)).sum())
    if bad:
        return Tail(
            unavailable(f"{bad} of {len(log_w)} importance weights are not finite: fit again from another start")
        )
    if log_w.max() == -np.inf:
        return Tail(unavailable(f"all {len(log_w)} importance weights are 0: the model has no density at any draw"))
    if _equal(log_w, rounding):
        return Tail(Estimate(0.0, 0.0, 0.0, "all importance weights are equal to rounding: q is the posterior"), 1.0)
    k = pareto_shape(log_w)
    if not math.isfinite(k):
        return Tail(unavailable("no Pareto tail could be fitted to the importance weights: raise khat_draws"))
    half = 1.96 * max(1.0 + k, 0.5) / math.sqrt(_tail_length(len(log_w)))
    weights = np.exp(log_w - log_w.max())
    return Tail(Estimate(k, k - half, k + half), float(weights.mean() ** 2 / (weights**2).mean()))


def _over_units(log_w: NDArray[np.float64], rounding: float) -> Tail:
    """Median and quantiles over the columns of ``(S, U)``."""
    parts = [_joint(column, rounding) for column in log_w.T]
    values = [part.khat.value for part in parts if part.khat.value is not None]
    if not values:
        return parts[0]
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    said = f"median over {len(values)} units, each with its own weights; the ends are their 5% and 95% quantiles"
    effective = float(np.median([part.effective for part in parts if part.effective is not None]))
    return Tail(Estimate(float(middle), float(low), float(high), said), effective)


def _joint_weights(program: Program, x: Tensor, count: int, seed: int) -> tuple[NDArray[np.float64], float] | str:
    rows, kept = None, None
    if program.minibatch is not None and not local(program):
        if program.total % row_step(program, x):
            return f"the weights need all {program.total} rows: choose a minibatch size that divides them"
        rows, kept = torch.arange(program.total), (program.minibatch.plate, 0)
    try:
        draws = draw(program, x, count, seed, rows, kept=kept)
    except ValueError as error:
        return str(error)
    if draws.log_p is None:
        return (
            "the subsampled plate holds a factor, scale or mask, so the whole joint density is not known from its parts"
        )
    return _numpy(draws.log_p - draws.log_q), rounding_error(draws.log_p, program.dtype)


def _unit_weights(program: Program, x: Tensor, count: int, seed: int) -> tuple[NDArray[np.float64], float]:
    """Log weights ``(S, U)`` of at most :data:`MAX_UNITS` units chosen at random."""
    chooser = generator(seed, f"{STREAM} rows", 0)
    per_part = math.prod(program.structure.unit_shape)
    if program.minibatch is None:
        parts: list[Tensor | None] = [None]
    else:
        needed = program.minibatch.size * math.ceil(MIN_UNITS / per_part)
        rows = torch.randperm(program.total, generator=chooser)[:needed]
        most = max(1, MOST_HANDLED // count) if program.obstacles else len(rows)
        whole = len(rows) // program.minibatch.size * program.minibatch.size
        parts = list(torch.split(rows[:whole], program.minibatch.size)[:most])
    picked = torch.randperm(per_part, generator=chooser)[: math.ceil(MAX_UNITS / len(parts))].to(program.device)
    theta, phi = program.split(x)
    number = len(program.batch(parts[0]).args)

    def function(normal: Tensor, uniform: Tensor, *fixed: Tensor) -> dict[str, Tensor]:
        seen = Batch(fixed[:number], fixed[number] if len(fixed) > number else None)
        terms = program.log_weights(theta, phi, phi, Noise(normal, uniform), seen)
        return {"log_w": (terms.log_p - terms.log_q)[picked], "size": finite_size(terms.log_p)}

    mapped: Mapped | None = None
    columns, sizes = [], []
    for index, part in enumerate(parts):
        batch = program.batch(part)
        noise = program.layout.draw(generator(seed, STREAM, _KEY + index, program.device), count, dtype=program.dtype)
        fixed = [*batch.args, *([batch.indices] if batch.indices is not None else [])]
        with torch.no_grad(), program.networks_kept():
            if mapped is None:  # all parts have the same shapes
                mapped = Mapped(function, list(noise), fixed, trace=not program.obstacles, runs=count * len(parts))
            out = mapped(list(noise), fixed)
        columns.append(out["log_w"])
        sizes.append(out["size"])
    return _numpy(torch.cat(columns, 1)[:, :MAX_UNITS]), rounding_error(torch.cat(sizes), program.dtype)


def _numpy(values: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = values.detach().cpu().double().numpy()
    return array
