"""Training in stretches, with a look at held-out data after each, and what a fit's monitor saw as plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import typer
from torch import Tensor

import bbvi_conv as bc
from bbvi_conv.monitor.intervals import student_quantile
from bbvi_conv.monitor.strata import Strata
from bbvi_conv.run import figures

Pair = tuple[Callable[..., Any], Callable[..., Any]]
Score = Callable[[bc.Fit], dict[str, Any]]


def train(
    pair: Pair, args: tuple[Any, ...], marks: Sequence[int], score: Score | None = None, **settings: Any
) -> tuple[bc.Fit, list[dict[str, Any]]]:
    """Fit up to the last of ``marks`` without stopping early, and apply ``score`` at each of them.

    Returns:
        The fit, and per mark its step, the seconds spent on steps alone so far, and what ``score`` said.
    """
    last = marks[-1]
    defaults: dict[str, Any] = {
        "average": "last",
        "tol": 1e-9,  # all steps are made
        "window": last,
        "num_gradients": 16,
        "khat_draws": 10,
        "strata": Strata(min_length=max(1, last // 100), growth=0.25),
        "engine": "compiled",
    }
    fit, history = None, []
    for mark in marks:
        if fit is None:
            fit = bc.fit(*pair, args, max_steps=mark, progress=False, **{**defaults, **settings})
        else:
            fit = fit.resume(mark - fit.state.step, progress=False)
        own = score(fit) if score is not None else {}
        typer.echo(f"step {fit.state.step:,}, {fit.seconds['steps']:.0f} s of steps", err=True)
        history.append({"step": fit.state.step, "seconds": fit.seconds["steps"], **own})
    assert fit is not None
    return fit, history


def looks(fit: bc.Fit) -> dict[str, Any]:
    """Steps looked at, and per seed squared gradient norms and bounds, per datum; and the rate over all seeds."""
    states = fit.state.seeds
    seen = figures(fit.state)
    return {
        "step": [look.step for look in states[0].monitor.looks],
        "gradient_norm_sq": [[look.total.value for look in one.monitor.looks] for one in states],
        "bound": [[look.bound for look in one.monitor.looks] for one in states],
        "rate": seen.rate.to_json(),
        "plateau": {"trend": seen.rate.plateau.trend, "reason": seen.rate.plateau.reason},
    }


def interval(values: Tensor) -> dict[str, float]:
    """Mean of two or more values, such as over seeds, with Student's 95 % interval."""
    mean, count = float(values.double().mean()), len(values)
    half = student_quantile(0.95, count - 1) * float(values.double().std()) / count**0.5
    return {"value": mean, "low": mean - half, "high": mean + half}


def networks_from(seed: int, make: Callable[[], Any]) -> Any:
    """What ``make`` makes of networks that start under a seed; torch's own generator is left as found."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
