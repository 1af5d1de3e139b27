"""Run the fits of a row and measure its slope; everything comes from the library's fit and monitor."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bbvi_conv as bc
from bbvi_conv.binding import bind
from bbvi_conv.engine import Stream
from bbvi_conv.monitor.intervals import Estimate, student_quantile, unavailable
from bbvi_conv.monitor.power_law import exponent
from bbvi_conv.monitor.series import WINDOW_DECADES, Series
from bbvi_conv.monitor.state import series
from bbvi_conv.optim import SGD, Projected, gradient_mapping
from bbvi_conv.run import FitState
from bbvi_theory.rows import Row
from bbvi_theory.targets import Gaussian

EXACT = 1e-11
"""Nats under which a gap is rounding, and not looked at."""

MAPPING = "E||gradient mapping||^2"
"""What is looked at in place of the gradient where a constraint is active."""

Curve = tuple[np.ndarray, np.ndarray]
Path = dict[int, tuple[Tensor, Tensor]]
"""Iterate and running average by step."""


def measure(row: Row, seeds: int, steps: int) -> dict[str, Any]:
    """The row of the table as plain data, its curves included."""
    began = time.perf_counter()
    whole, seen = _run(row, seeds, steps)
    fits, monitored, geometric = whole.seeds, row.quantity == "E||grad||^2", row.expected_slope == "geometric"
    rule = bind(whole.settings.optimiser, whole.program, whole.objective, whole.run.normaliser)
    onto = rule.onto if isinstance(rule, Projected) else None
    active = onto is not None and any(onto.on_boundary(x) for each in seen for x, _ in each.values())
    if monitored:
        looked = [_looked(fit, each, rule if active else None) for fit, each in zip(fits, seen, strict=True)]
        slopes = [exponent(run) for run in looked]
        curves = [(run.steps, run.values) for run in looked]
    else:
        curves = [_curve(row, fit, each) for fit, each in zip(fits, seen, strict=True)]
        slopes = [_fitted(curve, geometric=geometric) for curve in curves]
    lost = sum(fit.state.frozen for fit in fits)
    slope = unavailable(f"{lost} of {seeds} seeds diverged") if lost else over(slopes)
    return {
        "reference": row.reference,
        "target": row.target.name,
        "log_concave": row.target.log_concave,
        "family": row.family,
        "parameterisation": row.parameterisation,
        "estimator": row.estimator,
        "optimiser": row.optimiser,
        "quantity": MAPPING if monitored and active else row.quantity,
        "guaranteed": row.guaranteed,
        "expected_slope": row.expected_slope,
        "slope": slope.to_json() | {"of": "log quantity in n" if geometric else "log-log"},
        "gap_nats": _median([_gap(row, fit) for fit in fits]),
        "khat": _median([fit.verdict.numbers["khat"]["value"] for fit in fits]),
        "seconds": time.perf_counter() - began,
        "outcomes": [fit.verdict.outcome for fit in fits],
        "constraint_active": active,
        "assumptions": [c._asdict() for c in fits[0].assumptions().conditions],
        "seeds": seeds,
        "steps": steps,
        "curves": [[n.tolist(), values.tolist()] for n, values in curves],
    }


def _run(row: Row, seeds: int, steps: int) -> tuple[bc.Fit, list[Path]]:
    """Fits of several seeds side by side, and iterate and running average of each at every chunk's end."""
    seen: list[Path] = [{} for _ in range(seeds)]

    def keep(state: FitState) -> None:
        for path, one in zip(seen, state.seeds, strict=True):
            path[int(one.carry.step)] = (one.carry.x.clone(), one.carry.average.mean.clone())

    settings: dict[str, Any] = {"average": "last", **row.settings}
    fit = bc.fit(
        row.target.module.model,
        args=row.target.args,
        num_seeds=seeds,
        max_steps=steps,
        window=steps,
        progress=False,
        on_look=keep,
        **settings,
    )
    return fit, seen


def _looked(fit: bc.Fit, seen: Path, rule: Projected | None) -> Series:
    r"""The monitor's squared gradient norms; with ``rule``, those of the gradient mapping :math:`G(g)` in their place.

    The mapping is not linear in g, so the J gradients of a look go into it as the means a, b of two halves, and
    :math:`G(a) \cdot G(b)` has expectation :math:`\|E G\|^2`. Its noise is taken to be that of the whole gradient.
    """
    run = series(fit.state.monitor)
    assert run is not None
    if rule is None:
        return run
    calculus, plain = fit.run.judge.quiet, Projected(SGD(rule.step_size), rule.onto)
    stream = Stream(fit.program, fit.run.settings.seed, "monitor", calculus.objective.draws)
    values = []
    for look in fit.state.monitor.looks:
        x, n = seen[look.step][0], torch.tensor(float(look.step + 1), dtype=torch.float64)
        gradients, _ = calculus.gradients(x, stream.once(look.stratum, look.total.num_gradients), step=look.step)
        a, b = (gradient_mapping(plain, half.mean(0), x, n) for half in gradients.tensor_split(2))
        values.append(float(a @ b))
    return run._replace(values=np.array(values))


def _curve(row: Row, fit: bc.Fit, seen: Path) -> Curve:
    """A convex quantity along the run, in closed form."""
    kept = {step: pair for step, pair in seen.items() if step > 0}
    return np.array(list(kept)), np.array([_exact(row, fit, *pair) for pair in kept.values()])


def _exact(row: Row, fit: bc.Fit, x: Tensor, mean: Tensor) -> float:
    """The convex quantities, in closed form."""
    regression = row.target.regression
    assert regression is not None
    best, lowest = regression.optimum(row.dense)
    q = Gaussian.of(fit.program, mean if row.quantity == "objective gap of the average" else x)
    if row.quantity == "squared distance":
        return q.squared_distance(best)
    return float(regression.loss(q.loc, q.factor)) - lowest


def _gap(row: Row, fit: bc.Fit) -> float | None:
    """Nats from the best of the family: exact for regressions, else the monitor's remaining gap."""
    regression = row.target.regression
    if regression is None:
        return fit.verdict.numbers["remaining_gap_nats"]["value"]
    q = Gaussian.of(fit.program, fit.x)
    return float(regression.loss(q.loc, q.factor)) - regression.optimum(row.dense)[1]


def over(slopes: Sequence[Estimate]) -> Estimate:
    """Mean and Student interval over seeds; of one run, its own estimate."""
    missing = next((slope for slope in slopes if slope.value is None), None)
    if missing is not None or len(slopes) == 1:
        return missing or slopes[0]
    values = np.array([slope.value for slope in slopes], dtype=float)
    half = student_quantile(0.95, len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    mean = float(values.mean())
    return Estimate(mean, mean - half, mean + half)


def _fitted(curve: Curve, *, geometric: bool) -> Estimate:
    """Least squares over the last 1.5 decades of steps, or over all of a geometric fall down to rounding."""
    steps, values = curve
    if geometric:
        under = np.flatnonzero(values <= EXACT)
        use = np.arange(len(steps)) < (under[0] if len(under) else len(steps))
        x = steps.astype(float)
    else:
        use = (steps >= steps[-1] / 10**WINDOW_DECADES) & (values > EXACT)
        x = np.log(steps)
    if use.sum() < 8 or not np.isfinite(values[use]).all():
        return unavailable("fewer than 8 looks at a quantity above rounding: run more steps")
    return Estimate(float(np.polyfit(x[use], np.log(values[use]), 1)[0]), None, None)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return float(np.median(known)) if len(known) == len(values) else None
