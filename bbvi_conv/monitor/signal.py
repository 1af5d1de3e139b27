r"""Signal-to-noise of a gradient estimator, from running moments of many draws.

For one gradient G with mean g and covariance :math:`\Sigma`: per parameter :math:`|g_i| / \sigma_i`, in aggregate
:math:`\sqrt{\|g\|^2 / \operatorname{tr}\Sigma}` with :math:`\|g\|^2` by its U-statistic, and the directional
:math:`DSNR = E[\|G_\parallel\| / \|G_\perp\|]` against the mean direction of the *other* half of the draws.

Reference: Rainforth et al. (2018), sections 3 and 5, https://arxiv.org/abs/1802.04537
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bbvi_conv.engine.calculus import Calculus
from bbvi_conv.engine.streams import Stream, feed_of_all
from bbvi_conv.monitor.gradient_norm import gram_matrix, squared_norm
from bbvi_conv.monitor.intervals import Estimate, student_quantile, unavailable
from bbvi_conv.objectives import ELBO, GrowingParticles, Objective
from bbvi_conv.objectives.objective import checked_objective
from bbvi_conv.program.build import build, positional
from bbvi_conv.program.closed_form import closed_form_sites
from bbvi_conv.program.device import cpu_by_default
from bbvi_conv.program.minibatch import Minibatch
from bbvi_conv.program.program import Program

BLOCKS = 20
"""Blocks of draws: intervals come from their spread."""
AT_ONCE = 10_000_000
"""Numbers held at once for gradients."""
ROUNDING = 1e-12
"""Share of the whole below which what is left is rounding."""


class Moments(NamedTuple):
    """Running sums over draws: ``number``, ``total`` ``(P,)``, ``squares`` ``(P,)``; float64."""

    number: int
    total: Tensor
    squares: Tensor

    def add(self, gradients: Tensor) -> Moments:
        """With the draws ``(J, P)`` as well; this one stays as it was."""
        wide = gradients.to(torch.float64)
        return Moments(self.number + len(wide), self.total + wide.sum(0), self.squares + (wide * wide).sum(0))

    def join(self, other: Moments) -> Moments:
        """Both together."""
        return Moments(self.number + other.number, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> Tensor:
        """Mean ``(P,)``."""
        return self.total / self.number

    @property
    def variance(self) -> Tensor:
        """Unbiased variance of each parameter ``(P,)``; 0 where the sums cannot tell it from their own rounding."""
        left = self.squares - self.total * self.mean
        return torch.where(left > ROUNDING * self.squares, left, 0.0) / (self.number - 1)

    def squared_norm(self, part: slice = slice(None)) -> tuple[float, float]:
        """U and tr Sigma of some of the parameters, from sums alone."""
        n, total, squares = self.number, self.total[part], self.squares[part]
        return float((total @ total - squares.sum()) / (n * (n - 1))), float(self.variance[part].sum())


def no_moments(size: int) -> Moments:
    """Before the first draw."""
    return Moments(0, torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64))


class GroupSignal(NamedTuple):
    """Figures of one group of parameters.

    Attributes:
        aggregate: :math:`\\sqrt{U / \\operatorname{tr}\\Sigma}` of one gradient, 0 where U is negative.
        dsnr: directional signal-to-noise ratio.
        rmse: root mean squared distance of one gradient to the reference.
        squared_norm: U.
        trace_sigma: :math:`\\operatorname{tr}\\Sigma`.
    """

    aggregate: Estimate
    dsnr: Estimate
    rmse: Estimate
    squared_norm: float
    trace_sigma: float


class SignalToNoise(NamedTuple):
    """What :func:`signal_to_noise` found; ``theta``, ``phi`` and ``total`` are None where a group has no parameters.

    Attributes:
        per_parameter: |mean| / standard deviation by leaf name, in the leaf's shape; nan where both are zero.
        mean: mean gradient by leaf name.
        num_estimates: gradients drawn.
        objective: the bound and estimator.
    """

    theta: GroupSignal | None
    phi: GroupSignal | None
    total: GroupSignal
    per_parameter: dict[str, Tensor]
    mean: dict[str, Tensor]
    num_estimates: int
    objective: Objective


@cpu_by_default
def signal_to_noise(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None = None,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: dict[str, Any] | None = None,
    *,
    objective: Objective | None = None,
    family: Any = None,
    minibatch: Minibatch | None = None,
    num_estimates: int = 1000,
    at: dict[str, Tensor] | None = None,
    reference: dict[str, Tensor] | None = None,
    normalise: str = "datum",
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> SignalToNoise:
    """Signal-to-noise ratios of an objective's gradient at one point, in bounded memory.

    Args:
        model, guide, args, kwargs, family, minibatch, dtype: as for :func:`bbvi_conv.fit`.
        objective: bound and estimator.
        num_estimates: gradients drawn; at least 40.
        at: unconstrained values by leaf name (such as ``fit.params["phi"]``); others stay where they are.
        reference: gradient by leaf name to measure the root mean squared error against, in the units of the loss.
        normalise: ``"datum"`` divides the loss by N where a plate is subsampled, ``"total"`` never does.
        seed: of the draws.

    Raises:
        ValueError: too few estimates, an unknown leaf or one of another shape, or what the program or objective
            refuses.
        TypeError: a schedule in place of an objective.
    """
    if isinstance(objective, GrowingParticles):
        raise TypeError(
            "GrowingParticles has a K for every step: pass the objective in force, schedule.at(step, looks)"
        )
    objective = ELBO() if objective is None else objective
    checked_objective(objective)
    if normalise not in ("datum", "total"):
        raise ValueError(f"unknown normalise {normalise!r}; choose one of datum, total")
    if num_estimates < 2 * BLOCKS:
        raise ValueError(f"num_estimates must be at least {2 * BLOCKS} for an interval, got {num_estimates}")
    args = positional(args)
    program = build(model, guide, args, kwargs, family=family, minibatch=minibatch, dtype=dtype, seed=seed)
    if not program.leaves:
        raise ValueError(
            "model and guide have no parameters, as those of a fit, which hold their values: pass the model and family "
            'or guide that were fitted, and at=fit.params["phi"] for the point'
        )
    if objective.analytic_kl:
        program.analytic = closed_form_sites(program)
    scale = float(program.total) if minibatch is not None and normalise == "datum" else 1.0
    calculus = Calculus.of(program, objective, scale)
    x = _flat(program, at, program.initial())
    target = None if reference is None else _flat(program, reference, torch.full_like(x, math.nan)).to(torch.float64)
    return measure(calculus, x, num_estimates, seed, target)


def measure(calculus: Calculus, x: Tensor, num_estimates: int, seed: int, target: Tensor | None) -> SignalToNoise:
    """The figures at flat parameters ``x``, from draws of the stream ``"signal"``."""
    program = calculus.program
    blocks = [no_moments(len(x)) for _ in range(BLOCKS)]
    slices = {**program.present_groups, "total": slice(0, len(x))}
    ratios: dict[str, list[Tensor]] = {name: [] for name in slices}
    direction: Tensor | None = None
    for block, gradients in _gradients(calculus, x, num_estimates, seed):
        if block >= BLOCKS // 2:
            if direction is None:
                direction = _joined(blocks[: BLOCKS // 2]).mean
            for name, part in slices.items():
                ratios[name].append(_directional(gradients[:, part].to(torch.float64), direction[part]))
        blocks[block] = blocks[block].add(gradients)
    whole = _joined(blocks)
    spread = whole.variance.sqrt()
    found = {
        name: _group(blocks, part, torch.cat(ratios[name]), None if target is None else target[part])
        for name, part in slices.items()
    }
    per = _by_leaf(program, whole.mean.abs() / spread)
    mean = _by_leaf(program, whole.mean)
    return SignalToNoise(
        found.get("theta"), found.get("phi"), found["total"], per, mean, whole.number, calculus.objective
    )


def _gradients(calculus: Calculus, x: Tensor, count: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Gradients ``(J, P)`` piece by piece, with the block they belong to; each has its own key, whatever the piece."""
    stream = Stream(calculus.program, seed, "signal", calculus.objective.draws)
    noise = sum(calculus.program.layout) * calculus.objective.draws
    piece = max(1, AT_ONCE // max(1, len(x), noise))
    for block in range(BLOCKS):
        start, stop = block * count // BLOCKS, (block + 1) * count // BLOCKS
        for first in range(start, stop, piece):
            feeds = [stream.once(key, 1) for key in range(first, min(first + piece, stop))]
            yield block, calculus.gradients(x, feed_of_all(feeds))[0]


def _joined(blocks: list[Moments]) -> Moments:
    whole = blocks[0]
    for block in blocks[1:]:
        whole = whole.join(block)
    return whole


def _directional(gradients: Tensor, direction: Tensor) -> Tensor:
    """Norm along the direction over the norm across it, ``(J,)``."""
    unit = direction / direction.norm()
    along = gradients @ unit
    across = (gradients - along.unsqueeze(-1) * unit).norm(dim=-1)
    across = torch.where(across > ROUNDING * along.abs(), across, 0.0)
    ratio: Tensor = along.abs() / across
    return ratio


def _group(blocks: list[Moments], part: slice, ratios: Tensor, target: Tensor | None) -> GroupSignal:
    value, trace = _joined(blocks).squared_norm(part)
    rmse = unavailable("no reference gradient was given") if target is None else _error(blocks, part, target)
    return GroupSignal(_aggregate(blocks, part), _mean(ratios), rmse, value, trace)


def _aggregate(blocks: list[Moments], part: slice, level: float = 0.95) -> Estimate:
    r""":math:`\sqrt{U / \operatorname{tr}\Sigma}`; the interval holds all c whose square is not surprising.

    That is :math:`(U - c^2 T)^2 \le z^2 (\text{slope}\, c^2 T + \text{floor} + c^4 \operatorname{Var} T)`, Fieller's
    for a ratio. The noise of U is that of the block means; its variance is taken at c, as in
    :func:`~bbvi_conv.monitor.gradient_norm.squared_norm`. T is the trace, its variance a jackknife.
    """
    value, trace = _joined(blocks).squared_norm(part)
    if trace <= 0.0:
        return unavailable("the estimator has no noise: its signal-to-noise ratio is infinite")
    noise = squared_norm(gram_matrix(torch.stack([block.mean[part] for block in blocks])), level)
    slope, floor, z = noise.variance_slope, noise.variance_floor, student_quantile(level, len(blocks) - 1)
    curvature = trace**2 - (z * _jackknife_error(blocks, lambda m: m.squared_norm(part)[1])) ** 2
    if curvature <= 0.0:
        return unavailable("the noise of the gradient is itself not known from so few draws: raise num_estimates")
    centre = value * trace + z * z * slope * trace / 2
    root = math.sqrt(max(centre**2 - curvature * (value**2 - z * z * floor), 0.0))
    low = max((centre - root) / curvature, 0.0) if value > 0.0 else 0.0
    high = max((centre + root) / curvature, z * math.sqrt(floor) / trace)
    return Estimate(math.sqrt(max(value, 0.0) / trace), math.sqrt(low), math.sqrt(high))


def _error(blocks: list[Moments], part: slice, target: Tensor, level: float = 0.95) -> Estimate:
    """Root mean squared distance to the target; the interval is symmetric in its logarithm, for squares are skewed."""

    def log_error(moments: Moments) -> float:
        distance = (moments.squares[part] - 2 * target * moments.total[part]) / moments.number + target * target
        return 0.5 * math.log(float(distance.sum().clamp(min=torch.finfo(torch.float64).tiny)))

    value = math.exp(log_error(_joined(blocks)))
    factor = math.exp(student_quantile(level, len(blocks) - 1) * _jackknife_error(blocks, log_error))
    return Estimate(value, value / factor, value * factor)


def _jackknife_error(blocks: list[Moments], statistic: Callable[[Moments], float]) -> float:
    """Standard error of a statistic of all draws, by leaving out one block at a time."""
    left_out = torch.tensor([statistic(_joined(blocks[:i] + blocks[i + 1 :])) for i in range(len(blocks))])
    count = len(blocks)
    return math.sqrt((count - 1) / count * float(((left_out - left_out.mean()) ** 2).sum()))


def _mean(values: Tensor, level: float = 0.95) -> Estimate:
    if not bool(torch.isfinite(values).all()) or len(values) < 2:
        return unavailable("some gradient has no part across the mean direction: one parameter, or no noise")
    half = student_quantile(level, len(values) - 1) * float(values.std()) / math.sqrt(len(values))
    mean = float(values.mean())
    return Estimate(mean, max(mean - half, 0.0), mean + half)


def _flat(program: Program, values: dict[str, Tensor] | None, start: Tensor) -> Tensor:
    if values is None:
        return start
    unknown = set(values) - {leaf.name for leaf in program.leaves}
    if unknown:
        names = [leaf.name for leaf in program.leaves]
        raise ValueError(f"there is no leaf {sorted(unknown)[0]!r}; the leaves are {names}")
    for leaf in program.leaves:
        given = values.get(leaf.name)
        if given is not None and given.shape != leaf.tensor.shape:
            raise ValueError(f"leaf {leaf.name!r} has shape {tuple(leaf.tensor.shape)}, got {tuple(given.shape)}")
    return program.replaced(start, values)


def _by_leaf(program: Program, flat: Tensor) -> dict[str, Tensor]:
    parts = torch.split(flat, program.sizes)
    return {leaf.name: part.reshape(leaf.tensor.shape) for leaf, part in zip(program.leaves, parts, strict=True)}
