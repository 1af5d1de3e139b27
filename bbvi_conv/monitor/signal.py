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
from bbvi_conv.engine.streams import Stream
from bbvi_conv.monitor.intervals import Estimate, student_quantile, unavailable
from bbvi_conv.objectives import ELBO, Objective
from bbvi_conv.program.build import build
from bbvi_conv.program.minibatch import Minibatch
from bbvi_conv.program.program import Program
from bbvi_conv.program.trace import TracedLogWeights, Untraceable

BLOCKS = 20
"""Blocks of draws: intervals are jackknives over them."""
AT_ONCE = 10_000_000
"""Numbers held at once for gradients."""


class Moments(NamedTuple):
    """Running sums over draws: ``count``, ``total`` ``(P,)``, ``squares`` ``(P,)``; float64."""

    count: int
    total: Tensor
    squares: Tensor

    def add(self, gradients: Tensor) -> Moments:
        """With the draws ``(J, P)`` as well; this one stays as it was."""
        wide = gradients.to(torch.float64)
        return Moments(self.count + len(wide), self.total + wide.sum(0), self.squares + (wide * wide).sum(0))

    def join(self, other: Moments) -> Moments:
        """Both together."""
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> Tensor:
        """Mean ``(P,)``."""
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        """Unbiased variance of each parameter ``(P,)``."""
        return ((self.squares - self.total * self.mean) / (self.count - 1)).clamp(min=0.0)


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
        ValueError: too few estimates, an unknown leaf, or what the program or objective refuses.
    """
    if num_estimates < 2 * BLOCKS:
        raise ValueError(f"num_estimates must be at least {2 * BLOCKS} for an interval, got {num_estimates}")
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    program = build(model, guide, args, kwargs, family=family, minibatch=minibatch, dtype=dtype, seed=seed)
    objective = ELBO() if objective is None else objective
    scale = float(program.total) if minibatch is not None and normalise == "datum" else 1.0
    try:
        calculus = Calculus(program, objective, TracedLogWeights(program), scale)
    except Untraceable:
        calculus = Calculus(program, objective, program.log_weights, scale)
    x = _flat(program, at, program.initial())
    target = None if reference is None else _flat(program, reference, torch.full_like(x, math.nan)).to(torch.float64)
    return measure(calculus, x, num_estimates, seed, target)


def measure(calculus: Calculus, x: Tensor, num_estimates: int, seed: int, target: Tensor | None) -> SignalToNoise:
    """The figures at flat parameters ``x``, from draws of the stream ``"signal"``."""
    program = calculus.program
    blocks = [no_moments(len(x)) for _ in range(BLOCKS)]
    slices = {name: part for name, part in program.groups.items() if part.stop > part.start}
    slices["total"] = slice(0, len(x))
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
        found.get("theta"), found.get("phi"), found["total"], per, mean, whole.count, calculus.objective
    )


def _gradients(calculus: Calculus, x: Tensor, count: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Gradients ``(J, P)`` piece by piece, with the block they belong to."""
    stream = Stream(calculus.program, seed, "signal", calculus.objective.draws)
    noise = sum(calculus.program.layout) * calculus.objective.draws
    piece = max(1, AT_ONCE // max(1, len(x), noise))
    key = 0
    for block in range(BLOCKS):
        left = (block + 1) * count // BLOCKS - block * count // BLOCKS
        while left > 0:
            size = min(piece, left)
            yield block, calculus.gradients(x, stream.once(key, size))[0]
            key, left = key + 1, left - size


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
    return along.abs() / across


def _squared_norm(moments: Moments, part: slice) -> tuple[float, float]:
    """U and tr Sigma of a group, from sums alone."""
    n, total, squares = moments.count, moments.total[part], moments.squares[part]
    return float((total @ total - squares.sum()) / (n * (n - 1))), float(moments.variance[part].sum())


def _group(blocks: list[Moments], part: slice, ratios: Tensor, target: Tensor | None) -> GroupSignal:
    def aggregate(moments: Moments) -> float:
        value, trace = _squared_norm(moments, part)
        return math.sqrt(max(value, 0.0) / trace) if trace > 0 else math.inf

    def rmse(moments: Moments) -> float:
        assert target is not None
        distance = (moments.squares[part] - 2 * target * moments.total[part]) / moments.count + target * target
        return math.sqrt(max(float(distance.sum()), 0.0))

    whole = _joined(blocks)
    value, trace = _squared_norm(whole, part)
    distance = unavailable("no reference gradient was given") if target is None else _jackknife(blocks, rmse)
    return GroupSignal(_jackknife(blocks, aggregate), _mean(ratios), distance, value, trace)


def _jackknife(blocks: list[Moments], statistic: Callable[[Moments], float], level: float = 0.95) -> Estimate:
    """A statistic of all draws, with the interval of leaving out one block at a time."""
    value = statistic(_joined(blocks))
    if not math.isfinite(value):
        return unavailable("the estimator has no noise: its signal-to-noise ratio is infinite")
    left_out = torch.tensor([statistic(_joined(blocks[:i] + blocks[i + 1 :])) for i in range(len(blocks))])
    count = len(blocks)
    error = math.sqrt((count - 1) / count * float(((left_out - left_out.mean()) ** 2).sum()))
    half = student_quantile(level, count - 1) * error
    return Estimate(value, max(value - half, 0.0), value + half)


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
    parts = torch.split(start, program.sizes)
    chosen = [values.get(leaf.name) for leaf in program.leaves]
    return torch.cat([part if v is None else v.reshape(-1).to(start) for part, v in zip(parts, chosen, strict=True)])


def _by_leaf(program: Program, flat: Tensor) -> dict[str, Tensor]:
    parts = torch.split(flat, program.sizes)
    return {leaf.name: part.reshape(leaf.tensor.shape) for leaf, part in zip(program.leaves, parts, strict=True)}
