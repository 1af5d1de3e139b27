"""The monitor in a stock Pyro loop: it says the truth about the full data's gradient and leaves everything as found."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from bbvi_conv.monitor import Strata
from bbvi_conv.monitor.state import CONDITIONAL, THIS_RUN
from bbvi_conv.monitor.svi import GradientMonitor
from bbvi_conv.objectives import ELBO

ROWS, BATCH, DIM = 60, 6, 3
EVERY = Strata(1, 0.0)
"""A look at every step."""


@pytest.fixture(autouse=True)
def store() -> Any:
    """A parameter store of the test's own."""
    with pyro.get_param_store().scope():
        yield


def rows() -> Tensor:
    return 1.0 + torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))


def model(x: Tensor) -> None:
    """z ~ N(0, 2), x_n ~ N(z, 1), a minibatch scaled to all rows."""
    z = pyro.sample("z", dist.Normal(torch.zeros(DIM), 2.0).to_event(1))
    with pyro.plate("data", len(x)), poutine.scale(scale=ROWS / len(x)):
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.full((DIM,), 0.5))
    log_scale = pyro.param("log_scale", torch.full((DIM,), -1.0))
    pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def squared_gradient(x: Tensor) -> float:
    """Exact squared gradient of the bound for rows ``x`` standing for all, at the store's parameters."""
    state = pyro.get_param_store().get_state()["params"]
    loc, log_scale = (state[name].detach().double().requires_grad_() for name in ("loc", "log_scale"))
    precision = 0.25 + ROWS
    mean = ROWS * x.double().mean(0) / precision
    excess = kl_divergence(Normal(loc, log_scale.exp()), Normal(mean, precision**-0.5)).sum()
    return float(sum(g.square().sum() for g in torch.autograd.grad(excess, (loc, log_scale))))


def sampler(x: Tensor, size: int = BATCH) -> Callable[[], tuple[Tensor]]:
    return lambda: (x[torch.randint(len(x), (size,))],)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std()) / math.sqrt(len(found))


def looked(monitor: GradientMonitor) -> list[float]:
    return [entry.total.value for entry in monitor.state.looks]


def put(**values: Tensor) -> None:
    """Overwrite the parameters in place."""
    with torch.no_grad():
        for name, value in values.items():
            pyro.get_param_store().get_state()["params"][name].copy_(value)


def optimum(x: Tensor) -> dict[str, Tensor]:
    """Best loc and log_scale for rows ``x`` standing for all."""
    precision = torch.tensor(0.25 + ROWS)
    return {"loc": ROWS * x.mean(0) / precision, "log_scale": (-0.5 * precision.log()).expand(DIM)}


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.5])
def test_independent_batches_give_the_gradient_on_all_data(shift: float) -> None:
    x = rows()
    SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).evaluate_loss(x)
    best = optimum(x)
    put(loc=best["loc"] + shift, log_scale=best["log_scale"] + shift)
    monitor = GradientMonitor(model, guide, draw_batch=sampler(x), strata=EVERY, num_gradients=8)
    for _ in range(400):
        assert monitor.update(x[:BATCH])
    value, stderr = mean_and_error(looked(monitor))
    truth = squared_gradient(x)
    assert abs(value - truth) < 4 * stderr
    plain = sum(entry.total.mean_norm_sq_biased for entry in monitor.state.looks) / 400
    if shift == 0.0:
        assert plain - truth > 20 * stderr  # what noise and minibatches alone would have shown
    assert monitor.summary().label == THIS_RUN


def test_one_batch_gives_its_own_gradient_which_does_not_vanish() -> None:
    x = rows()
    pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).evaluate_loss(x)
    put(**optimum(x))
    monitor = GradientMonitor(model, guide, strata=EVERY)
    batch = x[:BATCH]
    for _ in range(100):
        monitor.update(batch)
    value, stderr = mean_and_error(looked(monitor))
    assert abs(value - squared_gradient(batch)) < 4 * stderr
    assert value > 20 * stderr  # at the optimum of the full data, whose own gradient is zero
    assert squared_gradient(x) < 1e-6 * value
    assert monitor.state.label == monitor.summary().label == CONDITIONAL


@pytest.mark.parametrize("loss", [Trace_ELBO(), ELBO(num_particles=2, estimator="sticking-the-landing")])
def test_a_monitored_loop_ends_in_the_same_bits(loss: Any) -> None:
    x = rows()

    def train(monitored: bool) -> tuple[dict[str, Tensor], list[float], Tensor, int]:
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss)
        monitor = GradientMonitor(model, guide, draw_batch=sampler(x), strata=Strata(5, 0.0))
        losses = []
        for _ in range(30):
            losses.append(svi.step(x[torch.randint(ROWS, (BATCH,))]))
            if monitored:
                monitor.update()
        params = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
        return params, losses, torch.get_rng_state(), len(monitor.state.looks)

    alone, losses_alone, rng_alone, none = train(False)
    watched, losses_watched, rng_watched, looks = train(True)
    assert (none, looks >= 6) == (0, True)
    assert losses_alone == losses_watched
    assert torch.equal(rng_alone, rng_watched)
    assert {k: v.tolist() for k, v in alone.items()} == {k: v.tolist() for k, v in watched.items()}


def test_gradients_store_and_flags_are_as_found() -> None:
    x = rows()
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO())
    svi.step(x)
    state = pyro.get_param_store().get_state()["params"]
    for tensor in state.values():
        tensor.grad = torch.full_like(tensor, 7.0)
    identities, dtype = {name: id(t) for name, t in state.items()}, torch.get_default_dtype()
    monitor = GradientMonitor(model, guide, draw_batch=sampler(x), strata=EVERY)
    monitor.update()
    after = pyro.get_param_store().get_state()["params"]
    assert {name: id(t) for name, t in after.items()} == identities
    assert all(bool((t.grad == 7.0).all()) for t in after.values())
    assert torch.get_default_dtype() == dtype
    assert pyro.settings.get("validate_poutine") is True


@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal])
def test_autoguides(make: Callable[..., Any]) -> None:
    x, auto = rows(), make(model)
    pyro.set_rng_seed(0)
    svi = SVI(model, auto, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    monitor = GradientMonitor(model, auto, draw_batch=sampler(x), strata=Strata(10, 0.0))
    for _ in range(200):
        svi.step(x)
        monitor.update()
    first, last = monitor.state.looks[0].total, monitor.state.looks[-1].total
    assert first.low > last.high  # it saw the run come down
    assert monitor.summary().gradient_norm_sq["phi"].value is not None
    assert monitor.summary().gradient_norm_sq["theta"].value is None


def test_modules_registered_with_pyro_module(coder) -> None:
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(DIM, 2), nn.Linear(1, DIM)
    model, amortized = coder(encoder, decoder, latents=1)
    vae, x = poutine.scale(model, scale=ROWS / BATCH), rows()
    svi = SVI(vae, amortized, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    monitor = GradientMonitor(vae, amortized, draw_batch=sampler(x), strata=Strata(3, 0.0))
    for _ in range(12):
        svi.step(x[:BATCH])
        monitor.update()
    norms = monitor.summary().gradient_norm_sq
    total = monitor.state.looks[-1]
    assert norms["theta"].value is not None
    assert norms["phi"].value is not None
    assert total.total.value == pytest.approx(total.theta.value + total.phi.value)
    weights = [p.detach().clone() for p in (*encoder.parameters(), *decoder.parameters())]
    monitor.update()
    assert all(torch.equal(a, b) for a, b in zip(weights, (*encoder.parameters(), *decoder.parameters()), strict=True))


def test_it_looks_at_the_current_parameters_after_the_store_is_cleared() -> None:
    x = rows()
    monitor = GradientMonitor(model, guide, draw_batch=lambda: (x,), num_gradients=64, strata=EVERY)
    for scale in (0.5, 3.0):
        pyro.clear_param_store()
        SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO()).evaluate_loss(x)
        put(loc=torch.full((DIM,), scale))
        monitor.update()
        look = monitor.state.looks[-1].total
        assert abs(look.value - squared_gradient(x)) < 4 * look.standard_error


def test_what_is_not_gathered_may_change_from_step_to_step() -> None:
    x = rows()

    def tempered(x: Tensor, power: float, *, y: Tensor) -> None:
        with poutine.scale(scale=power):
            model(x + y)

    def tempered_guide(x: Tensor, power: float, *, y: Tensor) -> None:
        with poutine.scale(scale=power):
            guide(x)

    SVI(tempered, tempered_guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO()).evaluate_loss(x, 1.0, y=torch.zeros(DIM))
    monitor = GradientMonitor(tempered, tempered_guide, num_gradients=64, strata=EVERY)
    for power, shift in ((1.0, 0.0), (0.5, 0.0), (0.5, 1.0)):
        monitor.update(x, power, y=torch.full((DIM,), shift))
        look = monitor.state.looks[-1].total
        assert abs(look.value - power**2 * squared_gradient(x + shift)) < 4 * look.standard_error


def test_a_shorter_batch_later_is_no_error_without_draw_batch() -> None:
    x = rows()
    SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO()).evaluate_loss(x)
    monitor = GradientMonitor(model, guide, num_gradients=64, strata=EVERY)
    for size in (BATCH, 4, 1):
        monitor.update(x[:size])
        look = monitor.state.looks[-1].total
        assert abs(look.value - squared_gradient(x[:size])) < 4 * look.standard_error


def test_batches_of_differing_shapes_get_a_sentence() -> None:
    x = rows()
    SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO()).evaluate_loss(x)
    sizes = iter([6, 4] * 100)
    monitor = GradientMonitor(model, guide, draw_batch=lambda: x[: next(sizes)], strata=EVERY)
    with pytest.raises(ValueError, match=r"draw_batch gave positional argument 0 in the shapes .*full batches only"):
        monitor.update()
    ragged = iter([(x,), (x, 1.0)] * 100)
    monitor = GradientMonitor(model, guide, draw_batch=lambda: next(ragged), strata=EVERY)
    with pytest.raises(ValueError, match="draw_batch gave"):
        monitor.update()


def test_not_a_look_costs_nothing() -> None:
    monitor = GradientMonitor(model, guide, draw_batch=sampler(rows()), strata=Strata(50, 0.1), seed=1)
    calls = [monitor.update() for _ in range(3)]
    assert len(monitor.state.looks) == sum(calls)


def test_a_model_that_cannot_be_traced_is_monitored_draw_by_draw() -> None:
    x = rows()

    def branching(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(DIM), 2.0).to_event(1))
        if float(z[0].detach()) > 1e6:
            raise AssertionError("out of reach")
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    SVI(branching, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO()).evaluate_loss(x)
    monitor = GradientMonitor(branching, guide, draw_batch=lambda: x, num_gradients=64, strata=EVERY)
    monitor.update()
    look = monitor.state.looks[0].total
    assert abs(look.value - squared_gradient(x)) < 4 * look.standard_error


def test_an_analytic_kl_is_looked_at_as_such() -> None:
    """Where the data say little the noise of the gradient is that of the KL, which the closed form does not have."""

    def vague(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 30.0).to_event(1), obs=x)

    x = rows()[:BATCH]
    guide(x)
    traces = []
    for objective in (ELBO(), ELBO(analytic_kl=True)):
        monitor = GradientMonitor(vague, guide, objective=objective, strata=EVERY, num_gradients=32)
        assert monitor.update(x)
        traces.append(monitor.state.looks[0].total.trace_sigma)
    assert traces[1] < 0.01 * traces[0]
