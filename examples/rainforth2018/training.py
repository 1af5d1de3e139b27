"""Stochastic gradient ascent on MIWAE(M, K) for the Gaussian model, and how far it stays from the optimum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bbvi_conv.program.noise import generator


@dataclass(frozen=True)
class Training:
    """Adam with a constant step on minibatches of ``batch`` i.i.d. rows; distances are kept every ``every`` steps."""

    steps: int
    batch: int = 32
    step_size: float = 0.01
    every: int = 10
    low: float = 1.5
    high: float = 2.5


class Distances:
    """Of one run: ``steps``, and Euclidean distances of theta to mu* and of phi to (A*, b*)."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.theta: list[float] = []
        self.phi: list[float] = []


def train(x: Tensor, variance: float, groups: int, particles: int, training: Training, seed: int) -> Distances:
    """Maximise MIWAE(M = ``groups``, K = ``particles``) by its pathwise gradient.

    All parameters start uniformly in [low, high]. Runs with equal seeds start at the same point and see the same rows.
    At K = 1 the mean over M draws of the noise is drawn as what it is, one normal vector of variance 1 / M.
    """
    scale, dim = math.sqrt(variance), x.shape[1]
    x = x.float()
    start, rows, noise = (generator(seed, stream, 0) for stream in ("start", "minibatch", "optimise"))
    span = training.high - training.low
    mu, slope, offset = (
        (training.low + span * torch.rand(shape, generator=start)).requires_grad_()
        for shape in ((dim,), (dim, dim), (dim,))
    )
    best = x.mean(0)
    adam = torch.optim.Adam([mu, slope, offset], lr=training.step_size)
    found = Distances()
    for step in range(training.steps + 1):
        if step % training.every == 0:
            with torch.no_grad():
                found.steps.append(step)
                found.theta.append(float((mu - best).norm()))
                apart = torch.cat([(slope - torch.eye(dim) / 2).flatten(), offset - best / 2])
                found.phi.append(float(apart.norm()))
        some = x[torch.randint(len(x), (training.batch,), generator=rows)]
        with torch.no_grad():
            mean = some @ slope.T + offset
            gap = mean - (some + mu) / 2
            weighted = _weighted_noise(gap, scale, groups, particles, noise)
            ascent = -2 * gap - 2 * scale * weighted
            mu.grad = -(mean - mu + scale * weighted).mean(0)
            offset.grad = -ascent.mean(0)
            slope.grad = -ascent.T @ some / training.batch
        adam.step()
    return found


def _weighted_noise(gap: Tensor, scale: float, groups: int, particles: int, source: torch.Generator) -> Tensor:
    """sum_k v_k e_k, averaged over M groups: ``(B, D)``."""
    size, dim = gap.shape
    if particles == 1:
        return torch.randn(size, dim, generator=source) / math.sqrt(groups)
    noise = torch.randn(size, groups * particles, dim, generator=source)
    log_w = -2 * scale * (noise @ gap[:, :, None])[..., 0] - (scale**2 - 0.5) * noise.square().sum(-1)
    weights = log_w.unflatten(-1, (groups, particles)).softmax(-1).flatten(-2) / groups
    return (weights[:, None] @ noise)[:, 0]
