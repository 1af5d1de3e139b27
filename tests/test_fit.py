"""``fit``: real models end where they should, and every way of not converging is called by its name."""

from __future__ import annotations

import abc
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive, Trace_ELBO
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

import bbvi_conv as bc
from bbvi_conv.data.posteriordb import posterior
from bbvi_conv.model_file import load_model
from bbvi_conv.program.build import build
from bbvi_conv.run import Settings
from bbvi_conv.verdict import OUTCOMES

needs_data = pytest.mark.skipif(
    "BBVI_CONV_DATA" not in os.environ, reason="BBVI_CONV_DATA names no folder of real data"
)

QUICK = {"progress": False, "window": 100, "khat_draws": 200}


def normal_mean(x: Tensor) -> None:
    """z ~ N(0, 2), x_n ~ N(z, 1)."""
    z = pyro.sample("z", dist.Normal(torch.zeros(x.shape[1], dtype=x.dtype), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def rows(count: int = 40, dim: int = 3) -> Tensor:
    return 1.0 + torch.randn(count, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def finite_numbers(value: Any) -> bool:
    """Whether nothing in nested plain values is a tensor, NaN or infinite."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and finite_numbers(v) for k, v in value.items())
    if isinstance(value, list):
        return all(finite_numbers(v) for v in value)
    return value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


# ---- where fits end ----


@pytest.fixture(scope="module")
def easy() -> bc.Fit:
    """A converged fit of :func:`normal_mean`, not to be changed."""
    return bc.fit(normal_mean, args=(rows(),), **QUICK)


@pytest.fixture(scope="module")
def eight_schools() -> bc.Fit:
    file = load_model("eight_schools")
    return bc.fit(file.model, args=file.args, family=bc.FullRank(), seed=1, progress=False)


def test_eight_schools_converges_with_figures_that_agree(eight_schools: bc.Fit) -> None:
    fit = eight_schools
    assert fit.verdict.outcome == "converged"
    gap, bound = fit.state.checks[-1].gap, fit.state.checks[-1].bound
    assert gap.high < fit.settings.tol
    assert bound.low < bound.value < bound.high
    # what the first check said was left is what the run gained afterwards, to a second order in the distance
    first = fit.state.checks[0]
    gained = sum(c.improvement.value for c in fit.state.checks[1:])
    slack = sum(c.improvement.high - c.improvement.value for c in fit.state.checks[1:]) + first.gap.high - first.gap.low
    assert abs(gained - first.gap.value) < slack + 0.3 * first.gap.value


@needs_data
def test_eight_schools_means_are_those_of_the_reference_draws(eight_schools: bc.Fit) -> None:
    reference = posterior("eight_schools-eight_schools_noncentered").draws
    draws = eight_schools.sample(4000)
    ours = {"mu": draws["mu"], **{f"theta[{j + 1}]": draws["theta"][:, j] for j in range(8)}}
    for name, found in ours.items():
        sd = reference[name].std()
        assert float(found.std()) / math.sqrt(len(found)) < 0.02 * sd
        assert abs(float(found.mean()) - reference[name].mean()) < 0.15 * sd, name


@pytest.mark.parametrize("family", [bc.MeanField(), bc.FullRank()], ids=["mean-field", "full-rank"])
def test_conjugate_posterior_and_evidence(family: Any) -> None:
    x = rows()
    fit = bc.fit(normal_mean, args=(x,), family=family, progress=False)
    assert fit.verdict.outcome == "converged"
    precision = 0.25 + len(x)
    drawn = fit.sample(4000)["z"]
    stderr = precision**-0.5 / math.sqrt(len(drawn))
    # within the tolerance of 0.01 nats, a location may be off by sqrt(0.02) of its scale and a scale by 10%
    assert bool(((drawn.mean(0) - x.sum(0) / precision).abs() < 4 * stderr + math.sqrt(0.02 / precision)).all())
    assert bool(((drawn.std(0) * precision**0.5 - 1).abs() < 4 / math.sqrt(2 * len(drawn)) + 0.1).all())
    covariance = torch.eye(len(x), dtype=torch.float64) + 4.0
    evidence = dist.MultivariateNormal(torch.zeros(len(x), dtype=torch.float64), covariance).log_prob(x.T).sum()
    bound = fit.state.checks[-1].bound
    error = (bound.high - bound.low) / 3.92
    assert bound.value - float(evidence) < 4 * error
    assert float(evidence) - bound.value < 4 * error + fit.settings.tol


@pytest.mark.parametrize("family", [bc.RealNVP(), bc.IAF()], ids=["real-nvp", "iaf"])
@pytest.mark.parametrize("name", ["funnel", "eight_schools"])
def test_flows_go_downhill_by_default(family: Any, name: str) -> None:
    """With the steps of location and scale, 0.3 / sqrt(n), and a limit of 4 each of them diverged at step 1."""
    file = load_model(name)
    fit = bc.fit(file.model, args=file.args, family=family, max_steps=300, khat_draws=50, progress=False)
    assert not fit.state.frozen
    losses = [loss for _, _, loss in fit.state.losses]
    best = {"funnel": 0.0, "eight_schools": 31.3}[name]  # of any family at most: minus the evidence, or below
    assert best - 0.5 < losses[-1] < best + 1.7
    assert losses[0] > best + 5  # power: it was far away


def test_rules_by_default() -> None:
    rows, flow = bc.Minibatch(2, plate="rows"), bc.Adam(bc.InverseSqrt(0.1), max_norm=10.0)
    for family, rule in (
        (bc.MeanField(), bc.Adam(bc.InverseSqrt(0.3))),
        (bc.Mixture(2), bc.Adam(bc.InverseSqrt(0.3))),
        (bc.NeuralSpline(), flow),
        (bc.Mixture(2, bc.RealNVP()), flow),
        (bc.Amortized(bc.MLP()), flow),
    ):
        assert Settings(family=family).rule() == rule
        assert Settings(family=family, minibatch=rows).rule() == bc.Adam(bc.Constant(1e-3))


def test_networks_of_a_script_take_small_steps_by_default(coder: Callable[..., Any]) -> None:
    encoder, decoder = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 4)).double(), nn.Linear(2, 30).double()
    fit = bc.fit(*coder(encoder, decoder), (10.0 * rows(20, 30),), max_steps=100, engine="traced", **QUICK)
    assert fit.run.rule == bc.Adam(bc.InverseSqrt(0.1), max_norm=10.0)
    assert not fit.state.frozen
    assert fit.state.losses[-1][2] < 0.5 * fit.state.losses[0][2]


def test_what_is_no_network_takes_large_ones() -> None:
    class Model(nn.Module, abc.ABC):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.eye(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> None:
            pyro.module("model", self)
            normal_mean(x @ self.matrix)

    for model in (normal_mean, Model()):
        assert bc.fit(model, args=(rows(),), max_steps=1, **QUICK).run.rule == bc.Adam(bc.InverseSqrt(0.3))


# ---- not converged ----


@pytest.mark.parametrize("optimiser", [bc.Adam(bc.Constant(0.1)), bc.SGD(bc.Constant(0.005))], ids=["adam", "sgd"])
def test_a_constant_step_is_stalled_and_its_tail_average_is_not(optimiser: Any) -> None:
    settings: dict[str, Any] = {"optimiser": optimiser, "objective": bc.ELBO(), "progress": False, "window": 125}
    last = bc.fit(normal_mean, args=(rows(),), average="last", max_steps=8000, **settings)
    assert last.verdict.outcome == "stalled"
    assert last.state.checks[-1].gap.low > last.settings.tol
    tail = bc.fit(normal_mean, args=(rows(),), average="tail", max_steps=8000, **settings)
    assert tail.verdict.outcome == "converged"


def test_parameters_that_are_cut_off_have_not_arrived() -> None:
    """Steps so large that a clip swallows the guide's parameters: the gap is zero for want of any gradient."""

    def clipped(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(x.shape[1], dtype=x.dtype))
        pyro.sample("z", dist.Normal(5.0 * loc.clamp(-1.0, 1.0), 0.2).to_event(1))

    fit = bc.fit(normal_mean, clipped, (9.0 + rows(),), optimiser=bc.SGD(bc.Constant(1.0)), **QUICK)
    assert fit.verdict.outcome == "stalled"
    assert fit.state.step == 200  # two windows show that nothing moves
    assert "cut all parameters off" in fit.verdict.reasons[0]


def test_a_run_cut_short_is_slow() -> None:
    fit = bc.fit(normal_mean, args=(rows(),), optimiser=bc.Adam(bc.Constant(1e-3)), max_steps=400, **QUICK)
    assert fit.verdict.outcome == "slow"
    assert fit.state.checks[-1].improvement.low > fit.settings.tol


@pytest.mark.parametrize("engine", ["traced", "eager"])
def test_divergence_names_site_and_step_and_keeps_the_last_finite_state(engine: str) -> None:
    def cliff(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        pyro.factor("pull", 3.0 * z + 0.0 * (1.0 - z).log())  # NaN from z = 1 on

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Delta(pyro.param("loc", torch.zeros((), dtype=x.dtype))))

    seen: list[Any] = []
    fit = bc.fit(
        cliff,
        guide,
        args=(torch.tensor(0.0, dtype=torch.float64),),
        engine=engine,
        optimiser=bc.SGD(bc.Constant(0.05)),
        objective=bc.ELBO(),
        on_look=seen.append,
        **QUICK,
    )
    assert fit.verdict.outcome == "diverged"
    bad = int(fit.state.carry.bad)
    assert f"step {bad}: the log-probability of model site 'pull' is not finite" in fit.verdict.reasons[0]
    assert fit.state.step == bad
    assert bool(torch.isfinite(fit.x).all())
    assert float(fit.x) >= 1.0  # one step over the edge: finite itself, and the loss there is not
    assert fit.verdict.numbers["khat"]["value"] is None
    with pytest.raises(ValueError, match=f"diverged at step {bad}"):
        fit.resume(steps=10)
    assert finite_numbers(fit.verdict.to_json())


def test_ctrl_c_returns_what_there_is() -> None:
    looks = []

    def stop(state: bc.FitState) -> None:
        looks.append(state)
        if state.step >= 250:
            raise KeyboardInterrupt

    fit = bc.fit(normal_mean, args=(rows(),), on_look=stop, optimiser=bc.Adam(bc.Constant(1e-3)), **QUICK)
    assert fit.interrupted
    assert fit.state.step == looks[-1].step
    assert "stopped by the user" in fit.verdict.reasons[-1]
    assert fit.state.checks[-1].step == fit.state.step  # judged at what is returned
    early = bc.fit(normal_mean, args=(rows(),), on_look=lambda state: _interrupt(), **QUICK)
    assert early.state.step == 0
    assert early.verdict.outcome == "undecided"


def _interrupt() -> None:
    raise KeyboardInterrupt


# ---- going on ----


def test_resume_gives_the_bits_of_one_longer_run() -> None:
    settings: dict[str, Any] = {"family": bc.FullRank(), "seed": 5, "tol": 1e-9, **QUICK}
    whole = bc.fit(normal_mean, args=(rows(),), max_steps=444, **settings)
    part = bc.fit(normal_mean, args=(rows(),), max_steps=177, **settings)
    assert part.state.checks[-1].step == 177
    again = part.resume(steps=267)
    assert torch.equal(whole.x, again.x)
    assert all(torch.equal(a, b) for a, b in zip(whole.state.carry.flat(), again.state.carry.flat(), strict=True))
    assert whole.state.monitor == again.state.monitor
    assert whole.state.checks == again.state.checks
    assert whole.verdict.reasons == again.verdict.reasons
    assert part.state.step == 177  # the earlier fit is left as it was
    assert part.verdict.outcome in OUTCOMES


def test_resume_without_steps_leaves_a_finished_run_and_with_steps_goes_on(easy: bc.Fit) -> None:
    done = easy
    assert done.verdict.outcome == "converged"
    same = done.resume()
    assert same.state.step == done.state.step
    assert torch.equal(same.x, done.x)
    further = done.resume(steps=150)
    assert further.state.step == done.state.step + 150
    assert further.state.checks[: len(done.state.checks)] == done.state.checks
    with pytest.raises(ValueError, match="steps must be at least 1"):
        done.resume(steps=0)


def test_init_starts_from_an_earlier_fit(easy: bc.Fit) -> None:
    first = easy
    seen: list[bc.FitState] = []
    bc.fit(normal_mean, args=(rows(),), init=first, max_steps=1, on_look=seen.append, **QUICK)
    assert seen[0].step == 0
    assert torch.equal(seen[0].carry.x, first.x)
    with pytest.raises(ValueError, match="init has no parameter that fits"):
        bc.fit(normal_mean, args=(rows(dim=2),), init=first, max_steps=1, **QUICK)


def test_on_look_sees_plain_data_that_stays_valid() -> None:
    states: list[bc.FitState] = []
    bc.fit(normal_mean, args=(rows(),), max_steps=300, tol=1e-9, on_look=states.append, **QUICK)
    steps = [state.step for state in states]
    assert steps == sorted(steps)
    assert {100, 200} <= set(steps)
    frozen = states[3].carry.x.clone()
    assert torch.equal(states[3].carry.x, frozen)
    assert not torch.equal(states[3].carry.x, states[-1].carry.x)
    for state in states:
        assert all(isinstance(value, Tensor) and not value.requires_grad for value in state.carry.flat())
        assert sum(count for _, count, _ in state.losses) == state.step
        assert all(isinstance(seconds, float) for seconds in state.seconds.values())


@pytest.mark.parametrize("engine", ["traced", "eager"])
def test_where_it_stops_to_look_changes_no_iterate(engine: str) -> None:
    from bbvi_conv.monitor import Strata

    cheap: dict[str, Any] = {**QUICK, "objective": bc.ELBO(), "num_gradients": 4}
    few, many = (
        bc.fit(normal_mean, args=(rows(),), engine=engine, strata=strata, max_steps=40, average="last", **cheap)
        for strata in (Strata(1000, 1.0), Strata(3, 0.0))
    )
    assert torch.equal(few.x, many.x)
    assert len(few.state.monitor.looks) < len(many.state.monitor.looks)


# ---- what a fit gives ----


def test_verdict_json_has_the_promised_form(easy: bc.Fit) -> None:
    fit = easy
    told = json.loads(json.dumps(fit.verdict.to_json()))
    assert finite_numbers(told)
    promised = {
        "outcome",
        "remaining_gap_nats",
        "natural_gradient_norm",
        "paired_improvement",
        "gradient_norm_sq",
        "rate",
        "khat",
        "bound",
        "steps",
        "seconds",
        "engine",
        "reasons",
    }
    assert promised <= told.keys()
    assert {"steps", "monitor", "compile", "export"} <= told["seconds"].keys()
    assert {"envelope_slope", "exponent", "plateau"} <= told["rate"].keys()
    numbers = [told[k] for k in ("remaining_gap_nats", "natural_gradient_norm", "paired_improvement", "khat", "bound")]
    numbers += [told["gradient_norm_sq"][group] for group in ("theta", "phi", "total")]
    numbers += [told["rate"][name] for name in ("envelope_slope", "exponent")]
    for number in numbers:
        if number["value"] is None:
            assert number["reason"]
        else:
            assert number["low"] <= max(number["value"], 0.0) <= number["high"] or number["value"] < 0
    assert told["gradient_norm_sq"]["theta"]["value"] is None  # no generative parameters
    assert told["steps"] == fit.state.step


def test_model_and_guide_work_with_predictive_and_leave_the_store_alone(easy: bc.Fit) -> None:
    x, fit = rows(), easy
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    drawn = Predictive(fit.model, guide=fit.guide, num_samples=400)(x)["z"]
    precision = 0.25 + len(x)
    stderr = precision**-0.5 / 20
    error = (drawn.reshape(400, -1).mean(0) - x.sum(0) / precision).abs()
    assert bool((error < 4 * stderr + math.sqrt(0.02 / precision)).all())
    assert list(pyro.get_param_store().keys()) == []


def test_global_state_is_as_found() -> None:
    pyro.set_rng_seed(11)
    before, dtype = torch.get_rng_state(), torch.get_default_dtype()
    pyro.get_param_store().clear()
    bc.fit(normal_mean, args=(rows(),), max_steps=120, **QUICK)
    assert list(pyro.get_param_store().keys()) == []
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_default_dtype() == dtype
    assert pyro.settings.get("validate_poutine") is True


# ---- amortized ----

LATENT, PIXELS, SIZE = 2, 6, 256


def images() -> Tensor:
    """A linear factor model: what a small VAE can learn."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(LATENT, PIXELS, generator=generator)
    return torch.randn(SIZE, LATENT, generator=generator) @ weight + 0.5 * torch.randn(
        SIZE, PIXELS, generator=generator
    )


class Vae:
    """Networks, model and guide of a small Gaussian VAE."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.encoder, self.decoder = nn.Linear(PIXELS, 2 * LATENT), nn.Linear(LATENT, PIXELS)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def fit(self, **settings: Any) -> bc.Fit:
        chosen = {"minibatch": bc.Minibatch(32, plate="data"), "optimiser": bc.Adam(bc.Constant(1e-2)), **QUICK}
        return bc.fit(self.model, self.guide, args=(images(),), **{**chosen, **settings})


def test_a_minibatched_vae_ends_with_a_verdict_and_trained_modules() -> None:
    vae = Vae()
    before = vae.decoder.weight.detach().clone()
    fit = vae.fit(max_steps=500)
    assert fit.verdict.outcome in OUTCOMES
    gap = fit.verdict.numbers["remaining_gap_nats"]
    assert (gap["value"] is None) == ("reason" in gap and bool(gap["reason"]))
    assert fit.program.structure.unit == ("data",)
    assert not torch.equal(vae.decoder.weight, before)
    assert torch.equal(fit.params["theta"]["decoder$$$weight"], vae.decoder.weight)
    norms = fit.verdict.numbers["gradient_norm_sq"]
    assert norms["per"] == "datum"
    assert norms["theta"]["value"] is not None
    assert norms["phi"]["value"] is not None
    first, last = fit.state.losses[0][2], fit.state.losses[-1][2]
    assert last < first
    bound = fit.state.checks[-1].bound
    assert bound.value / SIZE == pytest.approx(-last, abs=0.2 * abs(last))  # total nats against nats per datum


def test_modules_can_be_left_as_they_were() -> None:
    vae = Vae()
    before = [p.detach().clone() for p in (*vae.encoder.parameters(), *vae.decoder.parameters())]
    fit = vae.fit(max_steps=50, update_modules=False)
    after = (*vae.encoder.parameters(), *vae.decoder.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(fit.params["theta"]["decoder$$$weight"], vae.decoder.weight)


def test_per_datum_and_total_differ_by_the_size_of_the_data() -> None:
    runs = [Vae().fit(max_steps=60, average="last", normalise=normalise) for normalise in ("datum", "total")]
    datum, total = runs
    assert [run.verdict.numbers["gradient_norm_sq"]["per"] for run in runs] == ["datum", "total"]
    looks = [run.state.monitor.looks[0].total for run in runs]  # at the same start, with the same noise
    assert looks[1].value == pytest.approx(looks[0].value * SIZE**2, rel=1e-4)
    assert total.state.losses[0][2] == pytest.approx(datum.state.losses[0][2] * SIZE, rel=1e-4)
    one, other = datum.state.checks[-1].bound, total.state.checks[-1].bound  # always total nats
    assert abs(one.value - other.value) < 0.05 * abs(one.value)


def test_held_out_rows_judge_the_bound() -> None:
    shifted = images()[:100] + 3.0
    seen = Vae().fit(max_steps=100)
    unseen = Vae().fit(max_steps=100, held_out=(shifted,))
    assert torch.equal(seen.x, unseen.x)  # held-out rows touch nothing but the judgement
    bounds = [fit.state.checks[-1].bound.value for fit in (seen, unseen)]
    assert bounds[1] / 100 < 2 * bounds[0] / SIZE  # rows from elsewhere are worse explained, in nats a row
    with pytest.raises(ValueError, match="held-out data needs a minibatch"):
        bc.fit(normal_mean, args=(rows(),), held_out=(rows(),), **QUICK)


# ---- refusals ----


@pytest.mark.parametrize(
    ("settings", "error", "told"),
    [
        ({"steps": 5}, TypeError, "unknown setting 'steps'; the settings are family"),
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1"),
        ({"tol": 0.0}, ValueError, "tol must be positive"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"num_gradients": 2}, ValueError, "num_gradients must be at least 4"),
        ({"average": "mean"}, ValueError, "unknown average 'mean'; choose one of tail, all, last"),
        ({"normalise": "rows"}, ValueError, "unknown normalise"),
        ({"engine": "warp"}, ValueError, "unknown engine 'warp'"),
        ({"device": "abacus"}, ValueError, "unknown device 'abacus'"),
        ({"optimiser": torch.optim.Adam}, ValueError, r"optimiser must be a value such as bc.Adam\(.*got <class"),
        ({"optimiser": "adam"}, ValueError, "optimiser must be a value such as .*got 'adam'"),
        ({"objective": "iwae"}, ValueError, r"objective must be a value such as bc.ELBO\(\) .*got 'iwae'"),
        ({"objective": bc.IWAE}, ValueError, "objective must be a value"),
        ({"objective": Trace_ELBO()}, ValueError, "objective must be a value"),
        ({"family": "full-rank"}, ValueError, "family must be a value such as .*got 'full-rank'"),
        ({"family": bc.FullRank}, ValueError, r"family must be a value such as bc.FullRank\(\)"),
        ({"minibatch": 10}, ValueError, "minibatch must be a value such as .*got 10"),
        ({"strata": 10}, ValueError, "strata must be a value"),
        ({"dtype": torch.float16}, ValueError, "unknown dtype torch.float16; choose one of None, torch.float32"),
        ({"dtype": "float64"}, ValueError, "unknown dtype 'float64'"),
        ({"seed": 1.5}, ValueError, "seed must be a whole number, got 1.5"),
        ({"seed": None}, ValueError, "seed must be a whole number, got None"),
        ({"num_seeds": 2.0}, ValueError, "num_seeds must be a whole number"),
        ({"window": True}, ValueError, "window must be a whole number"),
        ({"tol": "a"}, ValueError, "tol must be a number of nats, got 'a'"),
    ],
)
def test_bad_settings_get_a_sentence(settings: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        bc.fit(normal_mean, args=(rows(),), progress=False, **settings)


@pytest.mark.parametrize("engine", ["traced", "compiled"])
def test_fits_in_several_threads_do_not_disturb_each_other(engine: str) -> None:
    def fitted(seed: int) -> Tensor:
        return bc.fit(normal_mean, args=(rows(),), seed=seed, engine=engine, max_steps=60, **QUICK).x

    alone = [fitted(seed) for seed in range(4)]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(fitted, range(4)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert torch.get_default_dtype() is torch.float32
    with pytest.raises(ValueError, match="within the support"):
        dist.HalfNormal(1.0, validate_args=True).log_prob(torch.tensor(-1.0))


def test_fits_of_minibatches_in_several_threads_take_turns() -> None:
    """Pyro's stack of handlers is one for all threads."""

    def of_rows(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def fitted(seed: int) -> Tensor:
        batch = bc.Minibatch(4, plate="data")
        return bc.fit(
            of_rows, args=(torch.linspace(-1.0, 1.0, 12),), minibatch=batch, seed=seed, max_steps=20, **QUICK
        ).x

    alone = [fitted(seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(fitted, range(6)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert not _PYRO_STACK


def test_modules_that_other_threads_call_are_not_of_the_program() -> None:
    """Torch's hooks are for all threads; the graph of another fit would have its constants put back as it is traced."""
    own, other = nn.Tanh(), nn.Tanh()

    def model(x: Tensor) -> None:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(other, torch.ones(1)).result()
        normal_mean(own(x))

    program = build(model, None, (rows(),), family=bc.MeanField())
    assert own in program.modules
    assert other not in program.modules


@pytest.mark.parametrize("objective", [bc.ELBO(), bc.IWAE(num_particles=3)])
def test_straight_through_draws_keep_what_they_were_rounded_from(objective: Any) -> None:
    """Log q is taken at the soft draw, as in plain Pyro; at the rounded one it would be minus infinity."""
    x = torch.bernoulli(torch.full((32, 4), 0.5), generator=torch.Generator().manual_seed(0))
    encoder, decoder = torch.nn.Linear(4, 3), torch.nn.Linear(3, 4)
    law, temperature = dist.RelaxedOneHotCategoricalStraightThrough, torch.tensor(0.7)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", law(temperature, logits=torch.zeros(3)))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", law(temperature, logits=encoder(x)))

    fitted = bc.fit(model, guide, args=(x,), objective=objective, max_steps=20, **QUICK)
    assert fitted.state.step == 20
    assert fitted.verdict.outcome != "diverged"
    plain = -Trace_ELBO(num_particles=200).loss(fitted.model, fitted.guide, x)
    assert plain - 2 < fitted.verdict.numbers["bound"]["value"] < plain + 10  # what several particles gain is less


@pytest.mark.filterwarnings("ignore:Using `torch.compile")  # of our hooks, which then run twice
def test_compiled_networks_are_fitted_as_they_were_written() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(3, 2)
    network = torch.compile(plain, backend="eager")
    x = torch.linspace(-1.0, 1.0, 30).reshape(10, 3)

    def model(x: Tensor) -> None:
        pyro.module("network", network)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(network(x) + z, 1.0).to_event(1), obs=x[:, :2])

    before = plain.weight.detach().clone()
    fitted = bc.fit(model, args=(x,), engine="traced", max_steps=30, **QUICK)
    assert not torch.equal(plain.weight, before)
    assert fitted.verdict.outcome != "diverged"


def test_a_guide_and_a_family_are_one_too_many() -> None:
    with pytest.raises(ValueError, match="a guide or a family, not both"):
        bc.fit(normal_mean, lambda x: None, args=(rows(),), family=bc.MeanField())


@pytest.mark.parametrize("engine", ["eager", "traced", "compiled"])
def test_a_default_device_of_the_users_is_not_where_a_fit_computes(engine: str) -> None:
    """That of torch without any numbers would take whatever is made without saying where."""

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        slopes = pyro.sample("slopes", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ slopes, 1.0), obs=y)

    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    torch.set_default_device("meta")
    try:
        settings = {"max_steps": 200, "num_gradients": 8, "khat_draws": 100, "progress": False}
        fit = bc.fit(model, args=(x, x.sum(1)), engine=engine, **settings)
        assert fit.to_arviz(20).posterior.sizes["draw"] == 20
    finally:
        torch.set_default_device(None)
    assert (fit.sample(500)["slopes"].mean(0) - 1).abs().max() < 0.2
