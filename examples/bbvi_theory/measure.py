"""Run the fits of a row and measure its slope; everything comes from the library's fit and monitor."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

import bbvi_conv as bc
from bbvi_conv.monitor.intervals import Estimate, student_quantile, unavailable
from bbvi_conv.monitor.series import WINDOW_DECADES
from bbvi_conv.optim import Projected, ScaleFloor
from bbvi_conv.run import FitState
from bbvi_theory.rows import Row
from bbvi_theory.targets import Gaussian

EXACT = 1e-11
"""Nats under which a gap is rounding, and not looked at."""

Curve = tuple[np.ndarray, np.ndarray]


def measure(row: Row, seeds: int, steps: int) -> dict[str, Any]:
    """The row of the table as plain data, its curves included."""
    began = time.perf_counter()
    runs = [_run(row, seed, steps) for seed in range(seeds)]
    fits, curves = [fit for fit, _ in runs], [curve for _, curve in runs]
    slope = _slope(row, fits, curves)
    gaps = [_gap(row, fit) for fit in fits]
    return {
        "reference": row.reference,
        "target": row.target.name,
        "log_concave": row.target.log_concave,
        "family": row.family,
        "parameterisation": row.parameterisation,
        "estimator": row.estimator,
        "optimiser": row.optimiser,
        "quantity": row.quantity,
        "guaranteed": row.guaranteed,
        "expected_slope": row.expected_slope,
        "slope": slope.to_json() | {"of": "log quantity in n" if row.expected_slope == "geometric" else "log-log"},
        "gap_nats": _median(gaps),
        "khat": _median([fit.verdict.numbers["khat"]["value"] for fit in fits]),
        "seconds": time.perf_counter() - began,
        "outcomes": [fit.verdict.outcome for fit in fits],
        "floor_active": any(_floor_active(fit) for fit in fits),
        "assumptions": [c._asdict() for c in fits[0].assumptions().conditions],
        "seeds": seeds,
        "steps": steps,
        "curves": [[n.tolist(), values.tolist()] for n, values in curves],
    }


def _run(row: Row, seed: int, steps: int) -> tuple[bc.Fit, Curve]:
    """A fit, and the quantity along it."""
    seen: list[tuple[int, Tensor, Tensor]] = []

    def keep(state: FitState) -> None:
        seen.append((state.step, state.carry.x.clone(), state.carry.average.mean.clone()))

    settings: dict[str, Any] = {"average": "last", **row.settings}
    fit = bc.fit(
        row.target.module.model,
        args=row.target.args,
        seed=seed,
        max_steps=steps,
        window=steps,
        progress=False,
        on_look=keep,
        **settings,
    )
    if row.quantity == "E||grad||^2":
        looks = fit.state.monitor.looks
        return fit, (np.array([look.step for look in looks]), np.array([look.total.value for look in looks]))
    kept = {step: (x, mean) for step, x, mean in seen if step > 0}
    return fit, (np.array(list(kept)), np.array([_exact(row, fit, *pair) for pair in kept.values()]))


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


def _slope(row: Row, fits: Sequence[bc.Fit], curves: Sequence[Curve]) -> Estimate:
    """Over seeds: mean and Student interval of the slopes of single runs; of one run, the monitor's own interval."""
    if row.quantity == "E||grad||^2":
        each = [_monitored(fit) for fit in fits]
    else:
        each = [_fitted(curve, geometric=row.expected_slope == "geometric") for curve in curves]
    missing = next((e for e in each if e.value is None), None)
    if missing is not None or len(each) == 1:
        return missing or each[0]
    values = np.array([e.value for e in each], dtype=float)
    half = student_quantile(0.95, len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    mean = float(values.mean())
    return Estimate(mean, mean - half, mean + half)


def _monitored(fit: bc.Fit) -> Estimate:
    number = fit.verdict.numbers["rate"]["exponent"]
    return Estimate(number["value"], number["low"], number["high"], number.get("reason", ""))


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


def _floor_active(fit: bc.Fit) -> bool:
    """Whether a projected scale rests on its floor: then the gradient mapping, not the gradient, would be judged."""
    rule: Any = fit.settings.optimiser
    if not (isinstance(rule, Projected) and isinstance(rule.onto, ScaleFloor)):
        return False
    q = Gaussian.of(fit.program, fit.x)
    return bool((q.factor.diagonal() <= rule.onto.floor * (1 + 1e-9)).any())


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return float(np.median(known)) if len(known) == len(values) else None
