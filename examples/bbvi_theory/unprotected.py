"""A linear scale with nothing to keep it positive: how often a plain SGD run goes wrong at its start.

Twenty Gaussian targets with condition numbers up to 100; q starts at scale 0.01, far below theirs, and takes steps of
1 / L, which convexity would allow were the entropy's gradient -1 / s not unbounded near zero.
"""

from __future__ import annotations

import math
import time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import bbvi_conv as bc
from bbvi_conv.binding import bind, scales_of
from bbvi_conv.engine import Stream, make_engine, start_carry
from bbvi_conv.families import Linear, MeanField
from bbvi_conv.program.noise import generator

DIM, START, JUMP, STEPS = 5, 0.01, 10.0, 60
"""Dimensions; scale at the start; standard deviations that count as a jump; steps of a run."""


def target(seed: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviations ``(DIM,)`` of one target, the latter over at most one decade."""
    source = generator(seed, "target", 0)
    mean = torch.randn(DIM, generator=source, dtype=torch.float64)
    return mean, 10 ** torch.rand(DIM, generator=source, dtype=torch.float64)


def share(targets: int) -> dict[str, Any]:
    """Share of runs with a non-positive scale or a jump, by optimiser, and the targets it happened on."""
    began = time.perf_counter()
    runs = {name: [_run(seed, name) for seed in range(targets)] for name in ("SGD", "prox-SGD", "proj-SGD")}
    return {
        "targets": targets,
        "start": START,
        "steps": STEPS,
        "runs": runs,
        "share": {name: sum(r["nonpositive"] or r["jump"] for r in found) / targets for name, found in runs.items()},
        "seconds": time.perf_counter() - began,
    }


def _run(seed: int, name: str) -> dict[str, bool]:
    mean, spread = target(seed)
    smoothness = float(spread.min()) ** -2
    floor = 0.5 / math.sqrt(smoothness)
    size = bc.Constant(1 / smoothness)
    optimisers: dict[str, Any] = {
        "SGD": bc.SGD(size),
        "prox-SGD": bc.ProximalSGD(size),
        "proj-SGD": bc.ProjectedSGD(size, floor),
    }

    def model() -> None:
        pyro.sample("z", dist.Normal(mean, spread).to_event(1))

    program = bc.build(model, family=MeanField(floor if name == "proj-SGD" else START, Linear()), seed=seed)
    objective = bc.ELBO(10)
    rule = bind(optimisers[name], program, objective, 1.0)
    engine, stream = make_engine("traced", program, objective, rule), Stream(program, seed, "optimise", objective.draws)
    carry = start_carry(rule, program.initial())
    path = [carry.x]
    for n in range(STEPS):
        carry, _ = engine.advance(carry, stream, n, 1)
        path.append(carry.x)
    iterates = torch.stack(path)
    moves = (iterates[1:] - iterates[:-1]).abs() / torch.cat([spread, spread])
    scales = scales_of(program).of(iterates)
    return {"nonpositive": bool((scales <= 0).any()), "jump": bool((moves > JUMP).any())}
