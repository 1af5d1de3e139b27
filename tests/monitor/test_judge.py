"""Looks and checks on problems whose gradients, excess and Fisher information are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence, transform_to

from bbvi_conv.engine.calculus import Calculus
from bbvi_conv.engine.streams import Feed
from bbvi_conv.families import FullRank, MeanField
from bbvi_conv.monitor import judge
from bbvi_conv.monitor.gradient_norm import squared_norm, total_gram
from bbvi_conv.monitor.intervals import Estimate
from bbvi_conv.monitor.judge import Judge, quietest
from bbvi_conv.objectives import ELBO
from bbvi_conv.program import Minibatch
from bbvi_conv.program.build import build
from bbvi_conv.program.program import Program
from bbvi_conv.program.trace import TracedLogWeights

FAMILIES = [MeanField, FullRank]


def conjugate(x: Tensor, noise_scale: Tensor) -> None:
    """z ~ N(0, 2), x_n ~ N(z, noise_scale), as in the shipped model."""
    z = pyro.sample("z", dist.Normal(torch.zeros_like(noise_scale), 2.0).to_event(1))
    with pyro.plate("observation", len(x)):
        pyro.sample("x", dist.Normal(z, noise_scale).to_event(1), obs=x)


def observations(dim: int, scales: Tensor | None = None) -> tuple[Tensor, Tensor, MultivariateNormal]:
    """Data, noise scales and the exact posterior."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.logspace(-1, 2, dim, base=2, dtype=torch.float64) if scales is None else scales
    x = noise * torch.randn(50, dim, generator=generator, dtype=torch.float64) + 1.0
    scale = (0.25 + len(x) / noise**2) ** -0.5
    return x, noise, MultivariateNormal(scale**2 * x.sum(0) / noise**2, scale_tril=torch.diag(scale))


def correlated(covariance: Tensor) -> None:
    """z ~ N(0, covariance): the posterior is the prior."""
    pyro.sample("z", dist.MultivariateNormal(torch.zeros(len(covariance), dtype=covariance.dtype), covariance))


def calculus(program: Program, objective: ELBO | None = None) -> Calculus:
    return Calculus(program, objective or ELBO(), TracedLogWeights(program), 1.0)


def gaussian(program: Program, x: Tensor) -> MultivariateNormal:
    """q at the flat parameters ``x``, as torch knows it: differentiable, and no code of the families in it."""
    parts = torch.split(x, program.sizes)
    values = {
        leaf.name.rpartition(".")[2] if leaf.name.endswith(("loc", "scale", "lower")) else leaf.name.split(".")[-2]: (
            transform_to(leaf.constraint)(part.reshape(leaf.tensor.shape))
        )
        for leaf, part in zip(program.leaves, parts, strict=True)
    }
    if "lower" in values:
        dim = len(values["loc"])
        rows, columns = torch.tril_indices(dim, dim, -1)
        tril = torch.eye(dim, dtype=x.dtype).index_put((rows, columns), values["lower"])
        return MultivariateNormal(values["loc"], scale_tril=values["scale"].unsqueeze(-1) * tril)
    return MultivariateNormal(values["locs"], scale_tril=torch.diag(values["scales"]))


def exact(program: Program, target: MultivariateNormal, x: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || target) and its gradient in the unconstrained leaves: what the loss is, up to a constant."""
    x = x.detach().clone().requires_grad_()
    excess = kl_divergence(gaussian(program, x), target)
    return excess.detach(), torch.autograd.grad(excess, x)[0]


def at(program: Program, loc: Tensor, scale: Tensor) -> Tensor:
    """Flat parameters of a q with this location and these scales, uncorrelated."""
    x = program.initial()
    parts = torch.split(x, program.sizes)
    for leaf, part in zip(program.leaves, parts, strict=True):
        if leaf.name.endswith("lower"):
            continue
        value = scale if "scale" in leaf.name else loc
        part.copy_(transform_to(leaf.constraint).inv(value))
    return x


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quiet", [True, False], ids=["quiet", "pathwise"])
def test_u_is_the_squared_gradient_at_five_points(family: Callable[..., Any], quiet: bool) -> None:
    x, noise, target = observations(5, torch.ones(5, dtype=torch.float64))
    program = build(conjugate, args=(x, noise), family=family())
    judge = Judge(calculus(program), seed=0, gradients=8)
    if not quiet:  # the pathwise estimator is as noisy at the optimum as elsewhere: there the plain norm is all bias
        judge.quiet = judge.calculus
    best = at(program, target.mean, target.stddev)
    generator = torch.Generator().manual_seed(1)
    biases = []
    for spread in (0.01, 0.03, 0.1, 0.3, 0.8):
        point = best + spread * torch.randn(len(best), generator=generator, dtype=torch.float64)
        norm = float(exact(program, target, point)[1].square().sum())
        looks = [
            squared_norm(total_gram(judge.look({0: point}, stratum)[0].grams))
            for stratum in range(100 if quiet else 300)
        ]
        values = torch.tensor([look.value for look in looks])
        stderr = float(values.std()) / math.sqrt(len(values))
        if spread >= 0.3:
            assert stderr < 0.15 * norm  # power: a wrong factor or a missing group would show
        assert abs(float(values.mean()) - norm) < 4 * stderr
        plain = sum(look.mean_norm_sq_biased for look in looks) / len(looks)
        biases.append((plain - norm) / stderr)
    if not quiet:
        assert max(biases) > 20


@pytest.mark.parametrize("spread", [0.0, 0.001, 0.01, 0.1, 0.3])
def test_one_look_in_a_thousand_dimensions_needs_no_average(spread: float) -> None:
    x, noise, target = observations(1000, torch.ones(1000, dtype=torch.float64))
    program = build(conjugate, args=(x, noise), family=MeanField(), dtype=torch.float64)
    judge = Judge(calculus(program), seed=0, gradients=32)
    generator = torch.Generator().manual_seed(2)
    # scales 1.5 times too large, so that even the quiet estimator is noisy in every coordinate
    point = at(program, target.mean, 1.5 * target.stddev)
    point = point + spread * torch.randn(len(point), generator=generator, dtype=torch.float64)
    norm = float(exact(program, target, point)[1].square().sum())
    look = squared_norm(total_gram(judge.look({0: point}, 0)[0].grams))
    stderr = math.sqrt(look.variance_slope * norm + look.variance_floor)
    assert abs(look.value - norm) < 4 * stderr
    plain_error = (look.mean_norm_sq_biased - norm) / math.sqrt(look.variance_floor)
    if spread == 0.0:
        assert plain_error > 20


def test_controls_make_the_gap_a_hundred_times_more_precise(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the best factorised q for a correlated posterior the quiet estimator is loud; its noise is linear in eps."""
    covariance = torch.tensor([[1.0, 0.99], [0.99, 1.0]], dtype=torch.float64)
    program = build(correlated, args=(covariance,), family=MeanField())
    scale = torch.full((2,), math.sqrt(1 - 0.99**2), dtype=torch.float64)
    point = at(program, torch.full((2,), 0.2, dtype=torch.float64), scale)
    quiet = checks(program, point, 1, tolerance=1e3)[0][0]
    monkeypatch.setattr("bbvi_conv.monitor.judge.fit_control", lambda *_: None)
    loud = checks(program, point, 1, tolerance=1e3)[0][0]
    assert 100 * (quiet.high - quiet.low) < loud.high - loud.low
    assert quiet.low <= 0.04 / 1.99 * 1.01
    assert quiet.high >= 0.04 / 1.99 * 0.99


def test_the_quiet_estimator_is_silent_at_the_posterior() -> None:
    x, noise, target = observations(5)
    program = build(conjugate, args=(x, noise), family=FullRank())
    quiet, note = quietest(calculus(program))
    assert (note, quiet.objective.estimator) == ("", "sticking-the-landing")
    judge = Judge(calculus(program), seed=0)
    seen = judge.look({0: at(program, target.mean, target.stddev)}, 0)[0]
    assert float(total_gram(seen.grams).diagonal().max()) < 1e-20
    assert float(seen.losses.std()) < 1e-8  # every draw is the evidence
    assert seen.held_out is None


def checks(program: Program, x: Tensor, count: int, tolerance: float = 1e-6) -> tuple[list[Estimate], list[Estimate]]:
    """Remaining gap and natural-gradient norm of independent checks at one point."""
    judge = Judge(calculus(program), seed=0, tolerance=tolerance)
    made = [judge.check(step, x, None) for step in range(count)]
    return [c.gap for c in made], [c.natural for c in made]


def mean_and_error(found: list[Estimate]) -> tuple[float, float]:
    values = torch.tensor([e.value for e in found], dtype=torch.float64)
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


@pytest.mark.parametrize("family", FAMILIES)
def test_gap_of_a_displaced_location_is_the_excess(family: Callable[..., Any]) -> None:
    x, noise, target = observations(5)
    program = build(conjugate, args=(x, noise), family=family())
    shift = torch.tensor([0.5, -0.2, 0.4, 0.1, -0.6], dtype=torch.float64)
    point = at(program, target.mean + shift * target.stddev, target.stddev)
    excess, _ = exact(program, target, point)
    assert float(excess) == pytest.approx(0.5 * float(shift.square().sum()))
    gap, stderr = mean_and_error(checks(program, point, 12)[0])
    assert stderr < 0.01 * float(excess)
    assert abs(gap - float(excess)) < 4 * stderr + 0.01 * float(excess)  # H itself is from 128 draws


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gap_of_displaced_scales_is_within_a_tenth(family: Callable[..., Any], sign: float) -> None:
    x, noise, target = observations(5)
    program = build(conjugate, args=(x, noise), family=family())
    ratio = math.exp(sign * 0.068)
    point = at(program, target.mean, ratio * target.stddev)
    excess = float(exact(program, target, point)[0])
    assert 0.004 < excess / 5 <= 0.005
    gap, stderr = mean_and_error(checks(program, point, 4)[0])
    assert stderr < 0.02 * excess
    assert abs(gap - excess) < 0.1 * excess


def test_natural_gradient_norm_misses_the_slow_direction_a_hundredfold() -> None:
    covariance = torch.tensor([[1.0, 0.99], [0.99, 1.0]], dtype=torch.float64)
    program = build(correlated, args=(covariance,), family=MeanField())
    target = MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance)
    scale = torch.full((2,), math.sqrt(1 - 0.99**2), dtype=torch.float64)  # the best factorised one
    best = exact(program, target, at(program, torch.zeros(2, dtype=torch.float64), scale))
    assert float(best[1].abs().max()) < 1e-12
    point = at(program, torch.full((2,), 0.2, dtype=torch.float64), scale)
    excess = float(exact(program, target, point)[0] - best[0])
    gaps, naturals = checks(program, point, 6)
    gap, gap_error = mean_and_error(gaps)
    natural, natural_error = mean_and_error(naturals)
    assert gap_error < 0.05 * excess
    assert abs(gap - excess) < 0.1 * excess
    # F = 1/s^2 where H = 1/1.99 along (1, 1): the ratio is (1 - 0.99^2) / 1.99 = 1/100
    assert natural_error < 0.0005 * excess
    assert abs(natural - 0.01 * excess) < 4 * natural_error + 0.0005 * excess


def softplus_guide(x: Tensor, noise_scale: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros_like(noise_scale))
    scale = pyro.param("scale", torch.ones_like(noise_scale), constraint=constraints.softplus_positive)
    pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def exp_guide(x: Tensor, noise_scale: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros_like(noise_scale))
    scale = pyro.param("scale", torch.ones_like(noise_scale), constraint=constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def test_natural_gradient_norm_does_not_depend_on_the_parameterisation() -> None:
    x, noise, target = observations(5, torch.full((5,), 20.0, dtype=torch.float64))  # posterior scales of 1.6
    found, euclidean = [], []
    for guide in (softplus_guide, exp_guide):
        program = build(conjugate, guide, args=(x, noise))
        point = at(program, target.mean + 0.3 * target.stddev, 1.4 * target.stddev)
        found.append(mean_and_error(checks(program, point, 12)[1]))
        euclidean.append(
            float(squared_norm(total_gram(Judge(calculus(program), seed=0).look({0: point}, 0)[0].grams)).value)
        )
    # 1/2 g' F^-1 g with F = diag(1/s^2, 2/s^2) in (m, s): per coordinate 1/2 s^2 g_m^2 + 1/4 s^2 g_s^2
    ratio = 1.4
    truth = 5 * (0.5 * ratio**2 * 0.3**2 + 0.25 * ratio**2 * (ratio - 1 / ratio) ** 2)
    for value, stderr in found:
        assert stderr < 0.02 * truth
        assert abs(value - truth) < 4 * stderr + 0.01 * truth
    assert euclidean[0] / euclidean[1] > 1.5 or euclidean[1] / euclidean[0] > 1.5  # the plain norm does depend on it


def test_the_gap_is_not_given_where_the_loss_curves_down() -> None:
    def funnel(y: Tensor) -> None:
        tau = pyro.sample("tau", dist.Normal(torch.zeros((), dtype=y.dtype), 3.0))
        pyro.sample("z", dist.Normal(torch.zeros_like(y), (tau / 2).exp()).to_event(1), obs=y)

    program = build(funnel, args=(torch.full((4,), 3.0, dtype=torch.float64),), family=MeanField())
    zero = torch.zeros((), dtype=torch.float64)
    check = Judge(calculus(program), seed=0).check(0, at(program, zero - 6.0, zero + 6.0), None)
    assert check.gap.value is None or check.gap.value > 0
    far = Judge(calculus(program), seed=0).check(0, at(program, zero + 30.0, zero + 0.01), None)
    assert far.gap.value is not None  # the prior alone curves up there: 1/2 (30/3 + ...)^2
    wave = build(lambda y: _wave(y), args=(torch.ones(1, dtype=torch.float64),), family=MeanField())
    refused = Judge(calculus(wave), seed=0).check(0, at(wave, zero + math.pi, zero + 0.01), None).gap
    assert refused.value is None
    assert "not positive definite" in refused.reason


def _wave(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=y.dtype), 10.0))
    pyro.factor("wave", 3.0 * torch.cos(z))  # a minimum of log p at pi


def test_an_implicit_gradient_has_no_gap_and_says_so() -> None:
    def model(counts: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("n", len(counts)):
            pyro.sample("count", dist.Poisson(rate), obs=counts)

    def guide(counts: Tensor) -> None:
        shape = pyro.param("shape", torch.tensor(3.0), constraint=constraints.positive)
        pyro.sample("rate", dist.Gamma(shape, pyro.param("b", torch.tensor(1.0), constraint=constraints.positive)))

    program = build(model, guide, args=(torch.tensor([2.0, 3.0, 1.0]),))
    eager = Calculus(program, ELBO(), program.log_weights, 1.0)
    check = Judge(eager, seed=0, gradients=8).check(0, program.initial(), None)
    assert check.gap.value is None
    assert "implicit gradient" in check.gap.reason
    assert check.bound.value is not None


def test_conjugate_gradients_take_over_for_many_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    x, noise, target = observations(5)
    program = build(conjugate, args=(x, noise), family=MeanField())
    point = at(program, target.mean + 0.5 * target.stddev, target.stddev)
    excess = float(exact(program, target, point)[0])
    monkeypatch.setattr("bbvi_conv.monitor.judge.DENSE", 4)
    judge = Judge(calculus(program), seed=0, gradients=256)
    gaps = [judge.check(step, point, None).gap for step in range(16)]
    value, stderr = mean_and_error(gaps)
    assert stderr < 0.15 * excess
    assert abs(value - excess) < 4 * stderr + 0.05 * excess
    assert len({g.value for g in gaps}) == len(gaps)  # fresh noise at every check


def test_both_distances_are_known_of_thousands_of_scales() -> None:
    """2,400 parameters whose posterior scales span three decades; displaced by a tenth of each."""
    x, noise, target = observations(1200, torch.logspace(-2, 1, 1200, dtype=torch.float64))
    program = build(conjugate, args=(x, noise), family=MeanField())
    point = at(program, target.mean + 0.1 * target.stddev, target.stddev)
    excess = float(exact(program, target, point)[0])
    assert excess > 5
    judge = Judge(calculus(program), seed=0)
    assert not judge._effort(judge.cheap, len(point)).dense
    found = judge.check(0, point, None)
    for estimate in (found.gap, found.natural):
        assert estimate.value == pytest.approx(excess, rel=0.05)


def test_a_missing_second_derivative_of_many_parameters_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Tensor:
        raise RuntimeError("derivative for aten::anything is not implemented")

    x, noise, target = observations(1200)
    program = build(conjugate, args=(x, noise), family=MeanField())
    monkeypatch.setattr(Calculus, "hessian_products", missing)
    found = Judge(calculus(program), seed=0).check(0, at(program, target.mean, target.stddev), None)
    assert "no second derivative here (derivative for aten::anything" in found.gap.reason
    assert found.natural.value is not None


def test_the_noise_of_a_check_depends_on_its_step_alone() -> None:
    x, noise, target = observations(5)
    program = build(conjugate, args=(x, noise), family=MeanField())
    point, before = at(program, target.mean, 1.2 * target.stddev), program.initial()
    one, other = (Judge(calculus(program), seed=3) for _ in range(2))
    one.check(500, point, None)
    assert one.check(1000, point, before) == other.check(1000, point, before)
    assert one.check(1000, point, before) != other.check(2000, point, before)


def test_paired_improvement_is_the_difference_of_the_bounds() -> None:
    x, noise, target = observations(5)
    program = build(conjugate, args=(x, noise), family=MeanField())
    before = at(program, target.mean + 0.3 * target.stddev, 1.3 * target.stddev)
    after = at(program, target.mean + 0.1 * target.stddev, 1.1 * target.stddev)
    truth = float(exact(program, target, before)[0] - exact(program, target, after)[0])
    judge = Judge(calculus(program), seed=0, tolerance=1e3)
    found = [judge.check(step, after, before).improvement for step in range(30)]
    value, stderr = mean_and_error(found)
    assert stderr < 0.05 * truth
    assert abs(value - truth) < 4 * stderr
    covered = sum(e.low <= truth <= e.high for e in found)
    assert covered >= 30 * 0.95 - 4 * math.sqrt(30 * 0.95 * 0.05)


def test_matrices_and_gradients_come_from_independent_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same draws in both, 1/2 g' H^-1 g of a pure-noise gradient would be biased; here its mean is zero."""
    x, noise, target = observations(3)
    program = build(conjugate, args=(x, noise), family=MeanField())
    judge = Judge(calculus(program), seed=0, tolerance=1e3)
    judge.cheap = judge.calculus  # pathwise: noisy at the optimum, where sticking the landing is silent
    monkeypatch.setattr("bbvi_conv.monitor.judge.fit_control", lambda *_: None)
    gaps = [judge.check(step, at(program, target.mean, target.stddev), None).gap for step in range(40)]
    value, stderr = mean_and_error(gaps)
    assert stderr > 0
    assert abs(value) < 4 * stderr
    covered = sum(g.low == 0.0 for g in gaps)
    assert covered >= 40 * 0.95 - 4 * math.sqrt(40 * 0.95 * 0.05)


@pytest.mark.parametrize(
    ("moved", "final", "cost", "draws"),
    [(1.0, False, 0, 32), (1.0, True, 0, 128), (0.0, False, 0, 128), (1.0, False, judge.ROUGH_COST, 128)],
)
def test_curvature_comes_from_few_draws_where_the_run_is_sure_to_go_on(
    moved: float, final: bool, cost: int, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a window improves the bound by far more than the tolerance; not in the last check, nor of small models."""
    x, noise, posterior = observations(3)
    program = build(conjugate, None, (x, noise), family=MeanField())
    here = at(program, posterior.mean, posterior.stddev)
    asked: list[int] = []
    products = Calculus.hessian_products

    def counted(self: Calculus, x: Tensor, vectors: Tensor, feed: Feed) -> Tensor:
        asked.append(len(feed.noise.normal))
        return products(self, x, vectors, feed)

    monkeypatch.setattr(judge, "ROUGH_COST", cost)
    monkeypatch.setattr(Calculus, "hessian_products", counted)
    before = at(program, posterior.mean + moved, posterior.stddev)
    check = Judge(calculus(program), 0, tolerance=1e-3).check(100, here, before, final=final)
    assert check.improvement.low is not None
    assert (check.improvement.low > judge.SURE * 1e-3) == (moved > 0)
    assert set(asked) == {draws}


def flat(x: Tensor) -> None:
    """z ~ N(0, 1); data that do not depend on it."""
    pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0), obs=x)


def unmoved(reach: float, scale: float) -> Callable[[Tensor], None]:
    """q = N(reach, scale), whatever its parameter is: it lies beyond a clip."""

    def guide(x: Tensor) -> None:
        beyond = pyro.param("beyond", torch.tensor(3.0, dtype=x.dtype))
        pyro.sample("z", dist.Normal(beyond.clamp(-1.0, 1.0) * reach, scale))

    return guide


@pytest.mark.parametrize(
    ("guide", "cut"), [(unmoved(2.0, 1.0), True), (unmoved(0.0, 0.5), True), (unmoved(0.0, 1.0), False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_any_gradient_a_loss_that_varies_from_draw_to_draw_is_cut_off(
    guide: Callable[[Tensor], None], cut: bool, dtype: torch.dtype
) -> None:
    """The last guide is the posterior: its loss varies over rows, and not from draw to draw."""
    x = torch.linspace(-2, 5, 40, dtype=dtype)
    program = build(flat, guide, (x,), minibatch=Minibatch(5, plate="data"), dtype=dtype)
    check = Judge(calculus(program), seed=0).check(500, program.initial(), None)
    for found in (check.gap, check.natural):
        assert found.available is not cut
        assert ("cut all parameters off" in found.reason) is cut
        assert found.value == (None if cut else 0.0)
