"""Running moments of gradient estimates, from one set of draws for all bounds, estimators and settings.

An estimate uses the whole data set and fresh noise ``(N, T, D)``. It is drawn in blocks of data, so that memory does
not grow with N, and leaves only sums behind. Estimates come in batches, each on its own generator and each kept apart
for the jackknife. Directional ratios need a direction that does not stem from the same draws: the first half of the
batches gives it, the second half is measured against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bbvi_conv.program.noise import generator
from rainforth2018.gradients import (
    Estimator,
    combine,
    contract,
    log_weights,
    phi_estimators,
    theta_estimators,
    vectors,
)

BLOCK = 64
"""Data whose draws are held at once: 64 x 1,000 x 20 numbers are 5 MB."""
QUIETER = {"iwae": "dreg", "vr02": "vr02_dreg", "vr05": "vr05_dreg"}
"""For phi, the estimator with the same expectation and less noise, from which the mean direction is taken."""


@dataclass(frozen=True)
class Setting:
    """Where gradients are taken: parameters near the optimum and the guide's variance.

    ``gap`` is d ``(N, D)`` and ``ahead`` is A x + b - mu ``(N, D)``, both of the model's file; ``x`` ``(N, D)``.
    """

    x: Tensor
    gap: Tensor
    ahead: Tensor
    variance: float

    @property
    def scale(self) -> float:
        """s, the guide's standard deviation."""
        return math.sqrt(self.variance)

    @property
    def design(self) -> Tensor:
        """``(N, 1 + D)``: a one for b, then x for A."""
        return torch.cat([torch.ones_like(self.x[:, :1]), self.x], 1)


@dataclass(frozen=True)
class Plan:
    """How much to draw: ``estimates`` in ``batches``, for every number of draws in ``ends``."""

    estimates: int
    batches: int
    ends: tuple[int, ...]
    seed: int = 0
    workers: int = 1

    def __post_init__(self) -> None:
        if self.batches < 8 or self.batches % 4 or self.estimates % self.batches:
            raise ValueError(
                f"batches must be a multiple of 4, at least 8, that divides the {self.estimates} estimates, "
                f"got {self.batches}"
            )


class Moments(NamedTuple):
    """Sums over ``per_batch`` estimates in each of S batches, of E estimators at J numbers of draws for P parameters.

    ``ratios`` and ``aimed`` hold ||parallel|| / ||perpendicular|| of single estimates ``(estimates / 2, E, J)``: to the
    estimator's own mean direction, and to the direction at the largest K.
    """

    estimators: tuple[Estimator, ...]
    ends: tuple[int, ...]
    per_batch: int
    total: Tensor
    squares: Tensor
    norms: Tensor
    ratios: Tensor
    aimed: Tensor

    def of(self, name: str) -> Single:
        """The part of one estimator, at the numbers of draws where it is defined."""
        place = [estimator.name for estimator in self.estimators].index(name)
        ends = self.estimators[place].counts(self.ends)
        return Single(
            tuple(self.ends[end] for end in ends),
            self.per_batch,
            *(field[:, place, ends] for field in (self.total, self.squares, self.norms, self.ratios, self.aimed)),
        )


class Single(NamedTuple):
    """:class:`Moments` of one estimator: no dimension E, and ``draws`` the J numbers of draws."""

    draws: tuple[int, ...]
    per_batch: int
    total: Tensor
    squares: Tensor
    norms: Tensor
    ratios: Tensor
    aimed: Tensor


class _Sums:
    """Running sums of one batch, for phi or for theta."""

    def __init__(self, shape: tuple[int, int, int], direction: Tensor | None, aim: Tensor | None) -> None:
        self.total, self.squares = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        self.norms = torch.zeros(shape[:2], dtype=torch.float64)
        self.direction, self.aim = direction, aim
        self.ratios: list[Tensor] = []
        self.aimed: list[Tensor] = []

    def add(self, gradient: Tensor) -> None:
        gradient = gradient.double()
        self.total += gradient
        squares = gradient.square()
        self.squares += squares
        norm = squares.sum(-1)
        self.norms += norm
        if self.direction is not None and self.aim is not None:
            self.ratios.append(_ratio(gradient, norm, self.direction))
            self.aimed.append(_ratio(gradient, norm, self.aim))


def _ratio(gradient: Tensor, norm: Tensor, direction: Tensor) -> Tensor:
    """||parallel|| / ||perpendicular|| of gradients ``(E, J, P)`` to unit directions."""
    along = (gradient * direction).sum(-1)
    return along.abs() / (norm - along.square()).clamp_min(torch.finfo(norm.dtype).tiny).sqrt()


def measure(settings: Sequence[Setting], plan: Plan, progress: Callable[[], None]) -> list[tuple[Moments, Moments]]:
    """Moments for phi and for theta at each setting; all settings share data and noise.

    Args:
        settings: the same ``x``, each with its parameters and variance.
        plan: numbers of estimates, batches and draws.
        progress: called after every batch.
    """
    half = plan.batches // 2
    with ThreadPoolExecutor(plan.workers) as pool:

        def run(batches: range, directions: list[_Directions] | None) -> list[list[tuple[_Sums, _Sums]]]:
            jobs = [pool.submit(_batch, settings, plan, batch, directions) for batch in batches]
            found = []
            for job in jobs:
                found.append(job.result())
                progress()
            return found

        first = run(range(half), None)
        directions = [_directions([batch[i] for batch in first], setting) for i, setting in enumerate(settings)]
        second = run(range(half, plan.batches), directions)
    return [
        _gather([batch[i] for batch in first], [batch[i] for batch in second], setting, plan)
        for i, setting in enumerate(settings)
    ]


class _Directions(NamedTuple):
    """Unit directions: per estimator and K ``(E, J, P)``, and at the largest K ``(P,)``."""

    phi: Tensor
    phi_aim: Tensor
    theta: Tensor
    theta_aim: Tensor


def _directions(batches: list[tuple[_Sums, _Sums]], setting: Setting) -> _Directions:
    phi, theta = (torch.stack([batch[part].total for batch in batches]).sum(0) for part in (0, 1))
    names = [estimator.name for estimator in phi_estimators(setting.scale)]
    quiet = phi[[names.index(QUIETER.get(name, name)) for name in names]]
    iwae = [estimator.name for estimator in theta_estimators(setting.scale)].index("iwae")
    own = [_unit(quiet), _unit(phi[names.index("dreg"), -1]), _unit(theta), _unit(theta[iwae, -1])]
    return _Directions(*own)


def _unit(vector: Tensor) -> Tensor:
    """Along the last dimension; where an estimator is not defined the vector is zero and stays so."""
    return torch.nn.functional.normalize(vector, dim=-1, eps=torch.finfo(vector.dtype).tiny)


def _batch(
    settings: Sequence[Setting], plan: Plan, batch: int, directions: list[_Directions] | None
) -> list[tuple[_Sums, _Sums]]:
    """One batch of estimates, all settings."""
    source = generator(plan.seed, "evaluate", batch)
    ready = [_Prepared(setting) for setting in settings]
    size, dim = settings[0].x.shape
    sums = []
    for i, prepared in enumerate(ready):
        aims = directions[i] if directions else _Directions(*[None] * 4)  # type: ignore[arg-type]
        shapes = [(len(prepared.phi), len(plan.ends), dim + dim * dim), (len(prepared.theta), len(plan.ends), dim)]
        sums.append((_Sums(shapes[0], aims.phi, aims.phi_aim), _Sums(shapes[1], aims.theta, aims.theta_aim)))
    for _ in range(plan.estimates // plan.batches):
        rows = [torch.zeros(()) for _ in ready]
        for start in range(0, size, BLOCK):
            piece = slice(start, start + BLOCK)
            noise = torch.randn(len(ready[0].gap[piece]), plan.ends[-1], dim, generator=source)
            squares = torch.linalg.vector_norm(noise, dim=-1).square()
            for i, prepared in enumerate(ready):
                rows[i] = rows[i] + prepared.contribution(noise, squares, piece, plan.ends)
        for prepared, (phi, theta), found in zip(ready, sums, rows, strict=True):
            mean = found / size
            phi.add(combine(prepared.phi, mean, prepared.phi_constant).flatten(-2))
            theta.add(combine(prepared.theta, mean[..., 0], prepared.theta_constant))
    return sums


class _Prepared:
    """A setting in single precision, with what is known of its gradients before any draw."""

    def __init__(self, setting: Setting) -> None:
        self.scale = setting.scale
        self.gap, self.design = setting.gap.float(), setting.design.float()
        self.phi, self.theta = phi_estimators(setting.scale), theta_estimators(setting.scale)
        self.phi_constant = (setting.gap.T @ setting.design / len(setting.x)).float()
        self.theta_constant = setting.ahead.mean(0).float()

    def contribution(self, noise: Tensor, squares: Tensor, piece: slice, ends: Sequence[int]) -> Tensor:
        log_w = log_weights(noise, squares, self.gap[piece], self.scale)
        return contract(vectors(noise, log_w, self.gap[piece], ends), self.design[piece])


def _gather(
    first: list[tuple[_Sums, _Sums]], second: list[tuple[_Sums, _Sums]], setting: Setting, plan: Plan
) -> tuple[Moments, Moments]:
    estimators: tuple[Sequence[Estimator], ...] = (phi_estimators(setting.scale), theta_estimators(setting.scale))
    phi, theta = (
        Moments(
            tuple(estimators[part]),
            plan.ends,
            plan.estimates // plan.batches,
            torch.stack([batch[part].total for batch in (*first, *second)]),
            torch.stack([batch[part].squares for batch in (*first, *second)]),
            torch.stack([batch[part].norms for batch in (*first, *second)]),
            torch.stack([ratio for batch in second for ratio in batch[part].ratios]),
            torch.stack([ratio for batch in second for ratio in batch[part].aimed]),
        )
        for part in (0, 1)
    )
    return phi, theta


def measure_batch_size(
    setting: Setting, plan: Plan, sizes: Sequence[int]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Sums of IWAE gradients on i.i.d. minibatches of every size B in ``sizes``, for every K in ``plan.ends``.

    Rows are drawn with replacement, each with its own noise, and the first B of a draw are the minibatch of size B.

    Returns:
        For phi and for theta: totals ``(S, len(ends), len(sizes), P)`` and squared norms ``(S, len(ends), len(sizes))``
        over the ``plan.estimates / plan.batches`` estimates of each batch.
    """
    with ThreadPoolExecutor(plan.workers) as pool:
        jobs = [pool.submit(_iid_batch, setting, plan, batch, sizes) for batch in range(plan.batches)]
        found = [job.result() for job in jobs]
    phi, theta = (
        (torch.stack([sums[part].total for sums in found]), torch.stack([sums[part].norms for sums in found]))
        for part in (0, 1)
    )
    return phi, theta


def _iid_batch(setting: Setting, plan: Plan, batch: int, sizes: Sequence[int]) -> tuple[_Sums, _Sums]:
    rows_source, source = generator(plan.seed, "minibatch", batch), generator(plan.seed, "predict", batch)
    prepared, ahead = _Prepared(setting), setting.ahead.float()
    dim, largest = setting.x.shape[1], sizes[-1]
    phi, theta = ([e for e in group if e.name == "iwae"] for group in (prepared.phi, prepared.theta))
    sums = tuple(_Sums((len(plan.ends), len(sizes), size), None, None) for size in (dim + dim * dim, dim))
    counts = torch.tensor(sizes)[:, None]
    pieces = [slice(start, end) for start, end in zip((0, *sizes[:-1]), sizes, strict=True)]
    for _ in range(plan.estimates // plan.batches):
        rows = torch.randint(len(setting.x), (largest,), generator=rows_source)
        noise = torch.randn(largest, plan.ends[-1], dim, generator=source)
        gap, design = prepared.gap[rows], prepared.design[rows]
        log_w = log_weights(noise, noise.square().sum(-1), gap, prepared.scale)
        found = vectors(noise, log_w, gap, plan.ends)
        for place, estimators, constant, to_parameters in (
            (0, phi, gap, design),
            (1, theta, ahead[rows], design[:, :1]),
        ):
            gradient = combine(estimators, found, constant[:, None])[0]  # (B, J, D)
            parts = [torch.einsum("bjd,bp->jdp", gradient[piece], to_parameters[piece]) for piece in pieces]
            sums[place].add(torch.stack(parts, 1).flatten(2).cumsum(1) / counts)
    return sums[0], sums[1]
