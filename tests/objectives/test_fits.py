"""Objectives beyond the ELBO, from ``bc.fit`` to the verdict: on both engines, under schedules, stopped and resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bbvi_conv as bc
from bbvi_conv.monitor import Strata
from bbvi_conv.objectives import CIWAE, ELBO, IWAE, MIWAE, PIWAE, VRIWAE, GrowingParticles, LinearWarmup, Objective
from bbvi_conv.program.build import build
from bbvi_conv.run import FitState, Run, Settings

DOUBLY = "doubly-reparameterised"
ROWS = 40
X = 0.8 + 1.5 * torch.randn(ROWS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
"""Rows of x_n ~ N(mu, 2), whose evidence is known."""


def model(x: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor(0.0, dtype=torch.float64))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0).expand([len(x)]))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    """An amortized encoder that can be the posterior: slope 1/2, shift mu/2, scale sqrt(1/2)."""
    slope = pyro.param("slope", torch.tensor(0.1, dtype=torch.float64))
    shift = pyro.param("shift", torch.tensor(-0.3, dtype=torch.float64))
    log_scale = pyro.param("log_scale", torch.tensor(0.2, dtype=torch.float64))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x + shift, log_scale.exp()))


def evidence(mu: float) -> float:
    return float(dist.Normal(mu, 2**0.5).log_prob(X).sum())


def tiny(objective: Objective | GrowingParticles, **settings: Any) -> bc.Fit:
    """A minibatched fit of the model above."""
    chosen = {
        "objective": objective,
        "minibatch": bc.Minibatch(8, plate="data"),
        "optimiser": bc.Adam(bc.InverseSqrt(0.1)),
        "max_steps": 400,
        "window": 100,
        "khat_draws": 100,
        "dtype": torch.float64,
        "progress": False,
    }
    return bc.fit(model, guide, X, **(chosen | settings))


TABLE: dict[str, Objective] = {
    "iwae": IWAE(4),
    "iwae, doubly": IWAE(4, DOUBLY),
    "vr-iwae, doubly": VRIWAE(3, 0.5, DOUBLY),
    "miwae": MIWAE(2, 2),
    "ciwae": CIWAE(3, 0.3),
    "piwae": PIWAE(2, 2),
    "elbo, analytic": ELBO(2, analytic_kl=True),
    "elbo, warming up": ELBO(kl_weight=LinearWarmup(200)),
}


@pytest.mark.parametrize("name", TABLE)
def test_every_objective_reaches_the_evidence_and_says_how_far_it_is(name: str) -> None:
    """The guide contains the posterior: there every one of these bounds is the evidence at mu, best at the mean."""
    found = tiny(TABLE[name])
    numbers = found.verdict.numbers
    mu = float(found.params["theta"]["mu"])
    spread = float(X.std()) / ROWS**0.5
    assert abs(mu - float(X.mean())) < spread  # minibatches move mu by less than the data leave open
    assert numbers["objective"]["class"] in (type(TABLE[name]).__name__, "Pair")
    bound, gap = numbers["bound"], numbers["remaining_gap_nats"]
    assert abs(bound["value"] - evidence(mu)) < 0.5 + 4.5 / 1.96 * (bound["high"] - bound["value"])
    assert evidence(0.0) < evidence(mu) - 3.0  # power: it started this far off
    if name == "piwae":
        assert gap["value"] is None
        assert "theta and phi follow different bounds" in gap["reason"]
    else:
        assert 0 <= gap["low"] <= gap["high"] < 2.0
    signal = numbers["gradient_norm_sq"]
    assert signal["theta"]["value"] is not None
    assert signal["phi"]["value"] is not None
    told = json.loads(json.dumps(found.verdict.to_json()))["signal_to_noise"]
    for group in ("theta", "phi"):
        assert told[group]["low"] <= told[group]["value"] <= told[group]["high"]


def test_the_monitor_tells_the_noise_of_the_estimator_that_trains() -> None:
    """A look uses the quietest estimator for U; the signal-to-noise ratio is about the one the steps are made with."""
    traces = {}
    for objective in (IWAE(16), IWAE(16, DOUBLY)):
        looks = walk(objective, "traced", 60).monitor.looks
        traces[objective.estimator] = torch.tensor([[e.noise["phi"], e.phi.trace_sigma] for e in looks if e.phi])
    assert torch.equal(*traces[DOUBLY].T)
    training, quiet = traces["pathwise"].T
    assert training.mean() > 2 * quiet.mean()


def walk(objective: Objective | GrowingParticles, engine: str, steps: int, stop: int | None = None) -> FitState:
    """A run's state after some steps and looks, no check; broken off and taken up again at ``stop``."""
    settings = Settings(
        objective=objective,
        minibatch=bc.Minibatch(3, plate="data"),
        engine=engine,
        dtype=torch.float64,
        window=10_000,
        num_gradients=4,
        strata=Strata(5, 0.0),
    )
    program = build(model, guide, (X,), minibatch=settings.minibatch, dtype=torch.float64)
    run = Run(program, settings)
    state = run.start(program.initial())
    if stop is not None:
        state = run.advance(state, stop, lambda *_: None)
        run = Run(build(model, guide, (X,), minibatch=settings.minibatch, dtype=torch.float64), settings)
    return run.advance(state, steps, lambda *_: None)


GROWING = {
    "by plan": GrowingParticles(IWAE(1), stop=6, every=7),
    "by signal": GrowingParticles(IWAE(2, DOUBLY), stop=8, every=7, snr=0.3),
    "by plan, vr": GrowingParticles(VRIWAE(1, 0.5), stop=4, every=9, factor=3),
}


@pytest.mark.parametrize("name", [*TABLE, *GROWING])
def test_engines_walk_the_same_path(name: str) -> None:
    objective = (TABLE | GROWING)[name]
    traced, eager = (walk(objective, engine, 22) for engine in ("traced", "eager"))
    torch.testing.assert_close(traced.carry.x, eager.carry.x, rtol=1e-8, atol=1e-9)
    assert len(traced.monitor.looks) == len(eager.monitor.looks) > 3
    for one, other in zip(traced.monitor.looks, eager.monitor.looks, strict=True):
        assert one.total.value == pytest.approx(other.total.value, rel=1e-5, abs=1e-7)
    start = build(model, guide, (X,)).initial()
    assert (traced.carry.x - start).abs().max() > 1e-2  # power: it moved


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize("stop", [7, 11])
def test_a_growing_run_that_was_stopped_ends_in_the_same_bits(name: str, stop: int) -> None:
    whole, parts = walk(GROWING[name], "eager", 30), walk(GROWING[name], "eager", 30, stop)
    assert torch.equal(whole.carry.x, parts.carry.x)
    assert whole.monitor == parts.monitor


def test_the_plan_and_the_signal_decide_alike_wherever_they_are_asked() -> None:
    plan = GROWING["by plan"]
    assert [plan.at(step, ()).draws for step in (0, 6, 7, 13, 14, 21, 400)] == [1, 1, 2, 2, 4, 6, 6]
    assert [plan.next_change(step) for step in (0, 6, 7)] == [7, 7, 14]
    assert not plan.settled(20, ())
    assert plan.settled(21, ())
    looks = walk(IWAE(2), "eager", 40).monitor.looks
    signals = [math.sqrt(max(e.phi.value, 0.0) / e.noise["phi"]) for e in looks if e.phi is not None]
    level = sorted(signals)[len(signals) // 2]
    driven = GrowingParticles(IWAE(2), stop=64, every=7, snr=level)
    counts = [driven.at(step, looks).draws for step in range(41)]
    expected, count = [], 2
    for step in range(41):
        if step and step % 7 == 0:
            latest = [s for s, look in zip(signals, looks, strict=True) if look.step < step][-1]
            count = min(64, 2 * count) if latest >= level else count
        expected.append(count)
    assert counts == expected
    assert 2 < counts[-1] < 64  # power: it rose at some marks and not at others
    assert driven.settled(0, looks)


def test_a_run_by_plan_is_not_done_before_its_last_objective() -> None:
    """Easy enough to be done at once; the plan has it go on to K = 2, and the verdict is about that."""
    easy = {"max_steps": 1600, "tol": 5.0, "minibatch": None, "window": 50}
    at_once = tiny(IWAE(1, DOUBLY), **easy)
    planned = tiny(GrowingParticles(IWAE(1, DOUBLY), stop=2, every=400), **easy)
    assert at_once.state.done
    assert planned.state.done
    assert at_once.state.step < 400 <= planned.state.step
    assert planned.objective == IWAE(2, DOUBLY)
    assert planned.verdict.numbers["objective"] == {"class": "IWAE", "num_particles": 2, "estimator": DOUBLY}


def test_a_schedule_survives_its_run_directory(tmp_path: Path) -> None:
    """Stopped, loaded, resumed: the same settings and the same bits as a run that nobody stopped."""
    objective = GrowingParticles(IWAE(1), stop=2, every=60)
    options = {"max_steps": 120, "tol": 1e-9, "window": 50}
    whole = tiny(objective, **options)
    tiny(objective, **(options | {"max_steps": 90}), out=tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["settings"]["objective"]["class"] == "GrowingParticles"
    loaded = bc.load(tmp_path / "run", model=model, guide=guide, args=X, max_steps=120)
    assert loaded.settings.objective == objective
    assert loaded.objective == loaded.run.schedule.at(90, loaded.state.monitor.looks) == IWAE(2)
    again = loaded.resume(progress=False)
    assert torch.equal(again.x, whole.x)
    assert again.objective == whole.objective == IWAE(2)
    assert again.state.monitor == whole.state.monitor
