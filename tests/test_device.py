"""What a user does, on a device: programs written without a thought of devices, and loops of one's own.

On a CUDA device, and, as far as it goes, on the device that :mod:`second_device` makes of the processor.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

import bbvi_conv as bc
from bbvi_conv import evaluate
from bbvi_conv.engine import Stream, make_engine, start_carry
from bbvi_conv.program.build import build
from bbvi_conv.report import write_report

DEVICE = os.environ.get("BBVI_CONV_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device; see test_second_device.py"
)
cuda = pytest.mark.skipif(DEVICE != "cuda", reason="about CUDA, or about networks that are moved in place")
FAST = ("cuda-graph", "compiled") if DEVICE == "cuda" else ()

SMALL = {"max_steps": 300, "window": 100, "khat_draws": 200, "num_gradients": 8, "progress": False}
FIGURES = {
    "eight_schools": {"family": bc.FullRank()},
    "challenger": {"family": bc.FullRank()},
    "forbes": {"family": bc.MeanField()},
    "banana": {"family": bc.Mixture(2)},
    "funnel": {"family": bc.IAF(), "optimiser": bc.Adam(bc.Constant(0.01))},
    "two_modes": {"family": bc.LowRank(1)},
}


def images(rows: int = 200) -> Tensor:
    """Black and white stripes, uint8 ``(N, 64)``."""
    places = torch.arange(64, device="cpu")
    starts = torch.randint(8, (rows, 1), generator=torch.Generator().manual_seed(1), device="cpu")
    return ((places % 8 == starts) | (places // 8 == starts)).byte()


def vae(hidden: int = 16) -> tuple[Callable[..., None], Callable[..., None], nn.Module]:
    """Networks and constants are made where torch makes them: on the CPU, from where CUDA can take them."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 4))
        decoder = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 64))
    if DEVICE != "cuda":
        encoder, decoder = encoder.to(DEVICE), decoder.to(DEVICE)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x.float())

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x.float()).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, decoder


def fitted(**settings: Any) -> bc.Fit:
    model, guide, _ = vae()
    batch = bc.Minibatch(20, plate="data")
    return bc.fit(model, guide, (images(),), minibatch=batch, device=DEVICE, **SMALL | settings)


@pytest.mark.parametrize("name", FIGURES)
def test_a_shipped_model_fits_and_is_exported(name: str, shipped: Callable[[str], ModuleType]) -> None:
    module = shipped(name)
    options = SMALL | FIGURES[name]
    fit = bc.fit(module.model, args=module.data(), device=DEVICE, dtype=torch.float64, **options)
    assert fit.program.device.type == fit.x.device.type == DEVICE
    assert fit.engine_name == (*FAST, "traced")[0]
    assert not fit.state.frozen
    assert fit.verdict.numbers["khat"]["value"] is not None
    assert fit.to_arviz(100).posterior.sizes["draw"] == 100


@pytest.mark.parametrize("engine", ["eager", *FAST])
def test_engines_agree(engine: str, shipped: Callable[[str], ModuleType]) -> None:
    """A number of steps at the same noise, float64."""
    module = shipped("eight_schools")
    rule, objective = bc.Adam(bc.InverseSqrt(0.1)), bc.ELBO(4)
    found = {}
    for name in ("traced", engine):
        program = build(module.model, None, module.data(), family=bc.FullRank(), dtype=torch.float64, device=DEVICE)
        made = make_engine(name, program, objective, rule)
        start = start_carry(rule, program.initial())
        found[name] = made.advance(start, Stream(program, 0, "optimise", 4), 0, 200 if DEVICE == "cuda" else 30)
    end, losses = found[engine]
    assert float((end.x - found["traced"][0].x).norm() / end.x.norm()) < 1e-9
    torch.testing.assert_close(losses, found["traced"][1], rtol=1e-9, atol=1e-9)


def recursion(y: Tensor) -> None:
    memory = pyro.sample("memory", dist.Beta(5.0, 2.0))
    _, levels = bc.scan(lambda level, x: (memory * level + (1 - memory) * x, level), y[0], y)
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(levels, 0.5), obs=y)


def walk(y: Tensor) -> None:
    """A loop of Python's, whose rounds run together."""
    z = torch.zeros(())
    for t in range(len(y)):
        z = pyro.sample(f"z_{t}", dist.Normal(z, 0.5))
        pyro.sample(f"y_{t}", dist.Normal(z, 0.5), obs=y[t])


def hidden_states(y: Tensor) -> None:
    """Discrete latents, summed out by a recursion that is found in the graph."""
    stay = pyro.sample("stay", dist.Beta(8.0, 2.0))
    rows = torch.stack([torch.stack([stay, 1 - stay]), torch.stack([1 - stay, stay])])
    z: Any = 0
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(rows[z]))
        pyro.sample(f"y_{t}", dist.Normal(2.0 * z - 1.0, 1.0), obs=y[t])


@pytest.mark.parametrize("model", [recursion, walk, hidden_states])
def test_recursions_and_loops(model: Callable[..., None]) -> None:
    y = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    program = build(model, None, (y,), family=bc.MeanField(), dtype=torch.float64, device=DEVICE)
    rule, objective = bc.Adam(bc.Constant(0.02)), bc.ELBO(2)
    start, found = start_carry(rule, program.initial()), {}
    for name in ("eager", "traced", *FAST):
        made = make_engine(name, program, objective, rule)
        found[name] = made.advance(start, Stream(program, 0, "optimise", 2), 0, 5 if name == "eager" else 35)[1]
    expected = found.pop("traced")
    for name, losses in found.items():
        torch.testing.assert_close(
            losses, expected[: len(losses)], rtol=1e-9, atol=1e-9, msg=f"{name}: {losses - expected[: len(losses)]}"
        )
    if DEVICE == "cuda" or model is recursion:
        fit = bc.fit(model, args=(y,), device=DEVICE, **SMALL)
        assert fit.verdict.numbers["remaining_gap_nats"]["value"] is not None
        assert fit.to_arviz(20).posterior.sizes["draw"] == 20


def test_priors_of_a_network_are_moved() -> None:
    class Net(PyroModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.hidden = PyroModule[nn.Linear](4, 8)
            self.hidden.weight = PyroSample(dist.Normal(0.0, 1.0).expand([8, 4]).to_event(2))
            self.last = PyroModule[nn.Linear](8, 1)

        def forward(self, x: Tensor, y: Tensor) -> None:
            mean = self.last(torch.tanh(self.hidden(x))).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 0.3), obs=y)

    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    fit = bc.fit(Net(), args=(x, x[:, 0].sin()), device=DEVICE, **SMALL)
    assert fit.state.losses[-1][2] < fit.state.losses[0][2]
    assert fit.sample(10)["hidden.weight"].shape == (10, 8, 4)


@pytest.mark.parametrize("device", [None, DEVICE, "cpu"])
def test_a_default_device_is_where_fits_run(device: str | None) -> None:
    def model(x: Tensor, y: Tensor) -> None:
        slopes = pyro.sample("slopes", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ slopes, 1.0), obs=y)

    torch.set_default_device(DEVICE)
    try:
        x = torch.randn(50, 2)
        fit = bc.fit(model, args=(x, x.sum(1)), device=device, family=bc.FullRank(), **SMALL)
        assert fit.x.device.type == (device or DEVICE)
        assert fit.to_arviz(20).posterior.sizes["draw"] == 20
    finally:
        torch.set_default_device(None)
    fit = bc.fit(model, args=(x, x.sum(1)), **SMALL)
    assert fit.x.device.type == DEVICE


@cuda
@pytest.mark.parametrize("device", [None, "cuda", "cpu"])
def test_where_torch_makes_tensors_on_the_device(device: str | None, tmp_path: Path) -> None:
    """With a default device of the user's a fit runs there, or where it is told to."""
    torch.set_default_device(DEVICE)
    try:
        model, guide, decoder = vae()
        decoder.to(DEVICE)
        held_out, batch = (images(40).to(DEVICE),), bc.Minibatch(20, plate="data")
        data = (images().to(DEVICE),)
        fit = bc.fit(
            *(model, guide, data), minibatch=batch, device=device, held_out=held_out, out=tmp_path / "run", **SMALL
        )
        assert fit.x.device.type == (device or DEVICE)
        assert evaluate.log_likelihood(fit, num_particles=20).values.isfinite().all()
        again = bc.load(tmp_path / "run", model=model, guide=guide, args=data, held_out=held_out)
        assert again.resume(20, progress=False).state.step == 320
    finally:
        torch.set_default_device(None)


@cuda
@pytest.mark.parametrize(
    ("objective", "rows", "hidden"),
    [
        *((bound, 20, 16) for bound in (bc.ELBO(1), bc.IWAE(5), bc.IWAE(5, "doubly-reparameterised"), bc.MIWAE(2, 3))),
        (bc.ELBO(1), 600, 256),  # so large that products are those of parts on tensor cores
    ],
)
def test_networks_are_trained_on_the_device(objective: Any, rows: int, hidden: int) -> None:
    """Captured, fused steps in float32 end where the traced ones do; the module that was handed over is trained."""
    ends = []
    for engine in ("traced", "compiled"):
        model, guide, decoder = vae(hidden)
        before = [p.detach().clone() for p in decoder.parameters()]
        rule, batch = bc.Adam(bc.Constant(1e-3)), bc.Minibatch(rows, plate="data")
        fit = bc.fit(
            *(model, guide, (images(10 * rows),)),
            **SMALL | {"average": "last", "max_steps": 200},
            objective=objective,
            optimiser=rule,
            minibatch=batch,
            engine=engine,
            device=DEVICE,
        )
        after = [p.detach() for p in decoder.parameters()]
        assert all(p.device.type == DEVICE for p in after)
        assert max(float((a.cpu() - b).abs().max()) for a, b in zip(after, before, strict=True)) > 1e-3
        ends.append(fit.x)
    assert float((ends[0] - ends[1]).norm() / ends[0].norm()) < 1e-4


def test_a_fit_finds_what_one_on_the_cpu_finds(shipped: Callable[[str], ModuleType]) -> None:
    """The noise is another, the optimum is not: locations agree to a tenth of a posterior's scale."""
    module = shipped("challenger")
    options: Any = {"family": bc.FullRank(), "progress": False, "dtype": torch.float64}
    here = bc.fit(module.model, args=module.data(), **options)
    there = bc.fit(module.model, args=module.data(), device=DEVICE, **options)
    draws = [fit.sample(4000) for fit in (here, there)]
    for name in draws[0]:
        one, other = (draw[name].cpu() for draw in draws)
        assert float(((one.mean(0) - other.mean(0)).abs() / one.std(0)).max()) < 0.1
    assert here.state.done
    assert there.state.done


def test_a_run_goes_on_where_it_was_left(tmp_path: Path) -> None:
    whole = fitted(tol=1e-9)
    fitted(max_steps=150, tol=1e-9, out=tmp_path / "run")
    model, guide, _ = vae()
    resumed = bc.load(tmp_path / "run", model=model, guide=guide, args=(images(),)).resume(150, progress=False)
    assert whole.state.step == resumed.state.step == 300
    assert torch.equal(whole.x, resumed.x)


def test_several_seeds_and_held_out_rows() -> None:
    fit = fitted(num_seeds=3, held_out=(images(60),))
    assert len(fit.state.seeds) == 3
    assert not any(one.frozen for one in fit.state.seeds)


@cuda
@pytest.mark.parametrize("amp", ["tf32", "bfloat16"])
def test_rounded_products_end_near_the_exact_ones(amp: Any) -> None:
    exact, rounded = (fitted(amp=given, average="last") for given in (None, amp))
    first, last = exact.state.losses[0][2], exact.state.losses[-1][2]
    assert abs(rounded.state.losses[-1][2] - last) < 0.05 * abs(first - last)
    assert float((rounded.x - exact.x).norm() / exact.x.norm()) > 1e-6


def test_a_step_that_is_not_finite_is_named() -> None:
    def model(x: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope, 1.0), obs=x)

    x = torch.full((10,), 1e3, dtype=torch.float32)
    program = build(model, None, (x,), family=bc.MeanField(), dtype=torch.float32, device=DEVICE)
    rule = bc.SGD(bc.Constant(1e30))
    ends = {}
    for name in ("traced", *FAST[:1]):
        stream = Stream(program, 0, "optimise", 1)
        ends[name] = make_engine(name, program, bc.ELBO(1), rule).advance(
            start_carry(rule, program.initial()), stream, 0, 50
        )
    assert int(ends["traced"][0].bad) >= 0
    for name in FAST[:1]:
        assert torch.equal(ends["traced"][0].bad, ends[name][0].bad)
        assert torch.equal(ends["traced"][0].x, ends[name][0].x)


def test_evaluation(tmp_path: Path) -> None:
    fit = fitted()
    likelihood = evaluate.log_likelihood(fit, num_particles=50)
    annealed = evaluate.annealed_log_likelihood(fit, images(10), num_chains=4, num_temperatures=10)
    assert likelihood.values.isfinite().all()
    assert annealed.values.isfinite().all()
    assert evaluate.latents(fit).kl["z"].shape == (2,)
    write_report(fit, tmp_path / "report.html")
    assert "under each the mean image" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("loss", [bc.ELBO(2), bc.IWAE(3), bc.IWAE(3, "doubly-reparameterised")])
def test_losses_and_monitor_in_a_stock_loop(loss: Any) -> None:
    x = torch.linspace(-1, 1, 20, device=DEVICE)
    y = 2 * x + 0.1

    def model(x: Tensor, y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)

    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[0], device_type=DEVICE):
        pyro.set_rng_seed(0)
        guide = AutoNormal(model)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
        monitor = bc.GradientMonitor(model, guide, objective=loss, draw_batch=lambda: (x, y))
        losses = []
        for _ in range(150):
            losses.append(svi.step(x, y))
            monitor.update()
        assert sum(losses[-20:]) < sum(losses[:20])
        assert monitor.summary().latest["total"].value is not None


def test_torch_s_own_generators_stay_as_found() -> None:
    device = torch.get_device_module(DEVICE)
    device.manual_seed(5)
    before = device.get_rng_state(), torch.get_rng_state()
    fitted(max_steps=20)
    assert torch.equal(before[0], device.get_rng_state())
    assert torch.equal(before[1], torch.get_rng_state())
