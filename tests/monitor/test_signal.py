"""Signal-to-noise ratios against a model whose gradient has a known mean and covariance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bbvi_conv as bc
from bbvi_conv.engine import Calculus
from bbvi_conv.monitor import signal
from bbvi_conv.monitor.signal import GroupSignal, measure
from bbvi_conv.objectives import ELBO, IWAE, GrowingParticles
from bbvi_conv.program import Minibatch, Program
from bbvi_conv.program.build import build
from bbvi_conv.program.trace import TracedLogWeights

D = 4
COUNT, REPEATS = 160, 120
X = torch.tensor([0.5, -1.0, 1.5, 0.2], dtype=torch.float64)
LOC = torch.tensor([0.9, -0.3, 0.6, 0.4], dtype=torch.float64)
SCALE = torch.tensor([0.8, 0.5, 1.1, 0.7], dtype=torch.float64)
MU = torch.tensor(0.3, dtype=torch.float64)


def model(x: Tensor) -> None:
    """z ~ N(mu, 1), x ~ N(z, 1)."""
    mu = pyro.param("mu", MU.clone())
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0).expand([len(x)]))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    loc = pyro.param("loc", LOC.clone())
    log_scale = pyro.param("log_scale", SCALE.log())
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, log_scale.exp()))


class Exact(NamedTuple):
    """Mean and variance of every coordinate of the pathwise ELBO gradient, of the loss."""

    mean: dict[str, Tensor]
    variance: dict[str, Tensor]


def exact() -> Exact:
    """With z = m + s e and a = 2m - mu - x: d/dm = a + 2 s e, d/dlog s = (a + 2 s e) s e - 1, d/dmu = -sum (z - mu)."""
    a = 2 * LOC - MU - X
    mean = {"mu": (MU - LOC).sum(), "loc": a, "log_scale": 2 * SCALE**2 - 1}
    variance = {"mu": (SCALE**2).sum(), "loc": 4 * SCALE**2, "log_scale": a**2 * SCALE**2 + 8 * SCALE**4}
    return Exact(mean, variance)


GROUPS = {"theta": ("mu",), "phi": ("loc", "log_scale"), "total": ("mu", "loc", "log_scale")}


def figures(names: tuple[str, ...]) -> tuple[float, float]:
    """Squared norm of the gradient and trace of its covariance."""
    found = exact()
    return (
        sum(float((found.mean[n] ** 2).sum()) for n in names),
        sum(float(found.variance[n].sum()) for n in names),
    )


@pytest.fixture(scope="module")
def program() -> Program:
    return build(model, guide, (X,))


@pytest.fixture(scope="module")
def repeats(program: Program, traced: TracedLogWeights) -> list[dict[str, GroupSignal]]:
    """Independent measurements, against a reference that is off by a known distance."""
    calculus = Calculus(program, ELBO(), traced, 1.0)
    target = reference(program)
    found = (measure(calculus, program.initial(), COUNT, seed, target) for seed in range(REPEATS))
    return [{"theta": m.theta, "phi": m.phi, "total": m.total} for m in found if m.theta and m.phi]


def reference(program: Program) -> Tensor:
    return torch.cat([exact().mean[leaf.name].reshape(-1) + 0.5 for leaf in program.leaves])


def standard_error(values: Tensor) -> float:
    return float(values.std()) / len(values) ** 0.5


@pytest.mark.parametrize("group", GROUPS)
def test_squared_norm_and_trace_are_unbiased(group: str, repeats: list[dict[str, GroupSignal]]) -> None:
    norm, trace = figures(GROUPS[group])
    norms = torch.tensor([found[group].squared_norm for found in repeats])
    traces = torch.tensor([found[group].trace_sigma for found in repeats])
    assert abs(float(norms.mean()) - norm) < 4.5 * standard_error(norms)
    assert abs(float(traces.mean()) - trace) < 4.5 * standard_error(traces)
    assert (
        trace / 60 > 2 * standard_error(norms) or group == "theta"
    )  # power: the plain norm of the mean is off by this
    assert standard_error(traces) < 0.05 * trace


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("figure", ["aggregate", "rmse"])
def test_intervals_cover(group: str, figure: str, repeats: list[dict[str, GroupSignal]]) -> None:
    norm, trace = figures(GROUPS[group])
    size = {"theta": 1, "phi": 2 * D, "total": 2 * D + 1}[group]
    truth = math.sqrt(norm / trace) if figure == "aggregate" else math.sqrt(trace + 0.25 * size)
    estimates = [getattr(found[group], figure) for found in repeats]
    covered = sum(e.low <= truth <= e.high for e in estimates) / len(estimates)
    assert covered > 0.95 - 4.5 * math.sqrt(0.95 * 0.05 / len(estimates))
    widths = torch.tensor([e.high - e.low for e in estimates])
    assert widths.median() < 1.6 * truth  # power: an interval of everything covers too


def test_no_signal_is_not_mistaken_for_one(program: Program, traced: TracedLogWeights) -> None:
    """At the optimum the true ratio is 0: its interval has to reach down to it, though U is as often positive."""
    posterior = {"mu": MU * 0 + X.mean(), "loc": (X + X.mean()) / 2, "log_scale": torch.full_like(X, math.log(0.5) / 2)}
    x = torch.cat([posterior[leaf.name].reshape(-1) for leaf in program.leaves])
    calculus = Calculus(program, ELBO(), traced, 1.0)
    found = [measure(calculus, x, 60, seed, None).total for seed in range(60)]
    assert sum(f.aggregate.low == 0.0 for f in found) / len(found) > 0.95 - 4.5 * math.sqrt(0.05 * 0.95 / len(found))
    assert all(f.aggregate.high > 0.0 for f in found if f.squared_norm > 0)
    assert any(f.squared_norm < 0 for f in found)
    assert any(f.squared_norm > 0 for f in found)
    assert not found[0].rmse.available
    assert "no reference gradient" in found[0].rmse.reason


def test_one_call_against_the_closed_form() -> None:
    count = 4000
    off = {name: mean + 0.5 for name, mean in exact().mean.items()}
    found = bc.signal_to_noise(model, guide, X, num_estimates=count, reference=off, dtype=torch.float64)
    assert found.num_estimates == count
    truth = exact()
    for name, mean in truth.mean.items():
        error = (truth.variance[name] / count).sqrt()
        assert ((found.mean[name] - mean).abs() < 4.5 * error).all()
        ratio = mean.abs() / truth.variance[name].sqrt()
        # the variance is of e and of e^2, whose excess kurtosis is at most 12
        assert ((found.per_parameter[name] - ratio).abs() < 4.5 * ((1 + 3.5 * ratio**2) / count).sqrt()).all()
        assert found.per_parameter[name].shape == mean.shape
    assert found.theta is not None
    assert found.phi is not None
    for group, part in (("theta", found.theta), ("phi", found.phi), ("total", found.total)):
        norm, trace = figures(GROUPS[group])
        low, value, high = part.aggregate.low, part.aggregate.value, part.aggregate.high
        assert low is not None
        assert value is not None
        assert high is not None
        assert abs(value - math.sqrt(norm / trace)) < 4.5 / 2.09 * (high - low) / 2  # Student's 19 degrees
        assert high - low < 0.3 * value  # power
    assert found.total.squared_norm == pytest.approx(found.theta.squared_norm + found.phi.squared_norm)
    assert found.total.trace_sigma == pytest.approx(found.theta.trace_sigma + found.phi.trace_sigma)


@pytest.mark.parametrize("group", ["phi", "total"])
def test_directional_ratio_against_direct_simulation(group: str) -> None:
    """Gradients by their formula, projected on the exact mean direction."""
    count = 20_000
    e = torch.randn(count, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    path = 2 * LOC - MU - X + 2 * SCALE * e
    parts = {"mu": -(LOC - MU + SCALE * e).sum(-1, keepdim=True), "loc": path, "log_scale": path * SCALE * e - 1}
    gradients = torch.cat([parts[name] for name in GROUPS[group]], -1)
    mean = torch.cat([exact().mean[name].reshape(-1) for name in GROUPS[group]])
    along = gradients @ mean / mean.norm()
    across = (gradients**2).sum(-1) - along**2
    ratios = along.abs() / across.sqrt()
    found = bc.signal_to_noise(model, guide, X, num_estimates=8000, dtype=torch.float64)
    part = {"phi": found.phi, "total": found.total}[group]
    assert part is not None
    assert part.dsnr.value is not None
    error = math.hypot(standard_error(ratios), (part.dsnr.high - part.dsnr.value) / 1.96)
    assert abs(part.dsnr.value - float(ratios.mean())) < 4.5 * error
    assert error < 0.03 * part.dsnr.value  # power
    assert found.theta is not None
    assert not found.theta.dsnr.available  # one parameter has nothing across it
    assert "one parameter" in found.theta.dsnr.reason


def test_pieces_bound_memory_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = Calculus.gradients

    def spy(self: Calculus, x: Tensor, feed: Any, **kwargs: Any) -> Any:
        seen.append(len(feed.noise.normal))
        return original(self, x, feed, **kwargs)

    monkeypatch.setattr(Calculus, "gradients", spy)
    options = {"objective": IWAE(3), "num_estimates": 210, "minibatch": Minibatch(2, plate="data"), "seed": 4}
    local = (lambda x: batch_model(x), lambda x: batch_guide(x), X)
    whole = bc.signal_to_noise(*local, **options)
    assert max(seen) > 5
    seen.clear()
    monkeypatch.setattr(signal, "AT_ONCE", 18)  # three particles of two normals each
    pieces = bc.signal_to_noise(*local, **options)
    assert max(seen) == 3
    assert sum(seen) == 210
    for name, mean in whole.mean.items():
        torch.testing.assert_close(mean, pieces.mean[name], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(whole.per_parameter[name], pieces.per_parameter[name], rtol=1e-4, atol=1e-6)
    assert whole.total.dsnr.value == pytest.approx(pieces.total.dsnr.value, rel=1e-4)


def batch_model(x: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor(0.3))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0).expand([len(x)]))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def batch_guide(x: Tensor) -> None:
    slope = pyro.param("slope", torch.tensor(0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, 0.9))


def test_per_datum_and_total_differ_by_n_alone() -> None:
    options = {"num_estimates": 60, "minibatch": Minibatch(2, plate="data"), "seed": 4}
    datum = bc.signal_to_noise(batch_model, batch_guide, X, **options)
    total = bc.signal_to_noise(batch_model, batch_guide, X, normalise="total", **options)
    for name, mean in total.mean.items():
        torch.testing.assert_close(mean, D * datum.mean[name], rtol=1e-5, atol=1e-6)
    assert total.total.aggregate.value == pytest.approx(datum.total.aggregate.value, rel=1e-5)


def test_it_reads_the_point_asked_for() -> None:
    """At ``at`` the figures are those of a fit that stands there; what is not named stays where it is."""
    moved = bc.signal_to_noise(model, guide, X, num_estimates=40, at={"loc": LOC + 5.0}, dtype=torch.float64)
    still = bc.signal_to_noise(model, guide, X, num_estimates=40, dtype=torch.float64)
    torch.testing.assert_close(moved.mean["loc"], still.mean["loc"] + 10.0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(moved.mean["mu"], still.mean["mu"] - 5.0 * D, rtol=1e-10, atol=1e-10)


def test_an_analytic_kl_takes_noise_away() -> None:
    """The closed form leaves only the likelihood's noise: variance s^2 of a in place of 4 s^2."""
    sampled = bc.signal_to_noise(model, guide, X, num_estimates=2000, dtype=torch.float64)
    closed = bc.signal_to_noise(
        model, guide, X, objective=ELBO(analytic_kl=True), num_estimates=2000, dtype=torch.float64
    )
    loc = exact().mean["loc"].abs() / SCALE  # |a| / s
    assert ((closed.per_parameter["loc"] - loc).abs() < 4.5 * ((1 + 0.5 * loc**2) / 2000).sqrt()).all()
    assert closed.total.trace_sigma < 0.5 * sampled.total.trace_sigma


def test_without_noise_there_is_no_ratio() -> None:
    """A model whose latent the gradient never sees: every gradient is the same."""

    def still(x: Tensor) -> None:
        theta = pyro.param("theta", torch.tensor([0.1, 0.7], dtype=torch.float64))
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(theta.sum(), 1.3).expand([len(x)]).to_event(1), obs=x)

    def constant(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    found = bc.signal_to_noise(still, constant, X, num_estimates=100, dtype=torch.float64)
    for part in (found.total, found.theta):
        assert part is not None
        assert not part.aggregate.available
        assert "no noise" in part.aggregate.reason
        assert not part.dsnr.available
        assert part.trace_sigma == 0.0
        assert part.squared_norm > 0
    assert found.phi is None
    assert torch.isinf(found.per_parameter["theta"]).all()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"num_estimates": 39}, ValueError, "num_estimates must be at least 40"),
        ({"at": {"nothing": torch.zeros(2)}}, ValueError, "there is no leaf 'nothing'; the leaves are .*'mu'"),
        ({"at": {"loc": torch.zeros(3)}}, ValueError, r"leaf 'loc' has shape \(4,\), got \(3,\)"),
        ({"reference": {"mu": torch.zeros(1)}}, ValueError, r"leaf 'mu' has shape \(\), got \(1,\)"),
        ({"normalise": "row"}, ValueError, "unknown normalise 'row'"),
        ({"objective": GrowingParticles(IWAE(2), 8)}, TypeError, "GrowingParticles has a K for every step"),
    ],
)
def test_refusals(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        bc.signal_to_noise(model, guide, X, **options)


def test_neither_or_both_guides_are_refused() -> None:
    unguided: Callable[..., Any] = bc.signal_to_noise
    with pytest.raises(ValueError, match="a guide or a family is needed"):
        unguided(model, args=X)
