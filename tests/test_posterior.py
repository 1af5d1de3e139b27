"""Draws, exports and k-hat against a posterior that is known exactly, and against ArviZ itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from pyro import infer, poutine
from pyro.infer.autoguide import AutoDelta
from pyro.infer.reparam import LocScaleReparam
from scipy import stats
from torch import Tensor
from torch.distributions import transform_to

import bbvi_conv as bc
from bbvi_conv.families import FullRank, MeanField
from bbvi_conv.model_file import load_module
from bbvi_conv.posterior import (
    draw,
    export,
    from_program,
    khat_threshold,
    neutral,
    pareto_shape,
    psis,
    tail,
    to_datatree,
    to_inference_data,
    write_netcdf,
)
from bbvi_conv.posterior.draws import Draws, Mapped
from bbvi_conv.posterior.export import legacy_arviz
from bbvi_conv.posterior.neutral import plan
from bbvi_conv.program.build import build
from bbvi_conv.program.program import Program

conjugate = load_module("conjugate_gaussian")
schools = load_module("eight_schools")


def with_values(program: Program, values: dict[str, Tensor]) -> Tensor:
    """Flat parameters from constrained values by the end of the leaf's name."""
    parts = []
    for leaf in program.leaves:
        value = next(v for name, v in values.items() if leaf.name.endswith(name))
        parts.append(transform_to(leaf.constraint).inv(value.to(program.dtype)).reshape(-1))
    return torch.cat(parts)


def gaussian(size: int = 20, dim: int = 3, width: float = 1.0) -> tuple[Program, Tensor, tuple[Tensor, Tensor]]:
    """The conjugate model, and mean-field parameters at its posterior with all scales times ``width``."""
    data = conjugate.data(size, dim)
    program = build(conjugate.model, args=data, family=MeanField())
    loc, scale = conjugate.posterior(*data)
    return program, with_values(program, {"locs.z": loc, "scales.z": width * scale}), data


def test_at_the_posterior_every_weight_is_the_evidence() -> None:
    program, x, data = gaussian()
    draws = draw(program, x, 500, seed=3)
    assert draws.log_p is not None
    torch.testing.assert_close(draws.log_p - draws.log_q, conjugate.log_evidence(*data).expand(500), rtol=1e-12, atol=0)
    assert draws.log_q.std() > 0.5  # the draws do move


def test_draws_have_the_posterior_moments() -> None:
    program, x, data = gaussian()
    count = 4000
    z = draw(program, x, count, seed=1).latent["z"]
    loc, scale = conjugate.posterior(*data)
    assert ((z.mean(0) - loc).abs() < 4 * scale / count**0.5).all()
    assert ((z.var(0) / scale**2 - 1).abs() < 4 * (2 / count) ** 0.5).all()


def test_log_likelihoods_are_those_of_the_draws() -> None:
    program, x, (data, noise_scale) = gaussian()
    draws = draw(program, x, 50, seed=1)
    z = draws.latent["z"].numpy()
    expected = stats.norm(z[:, None], noise_scale.numpy()).logpdf(data.numpy()).sum(-1)
    np.testing.assert_allclose(draws.log_likelihood["x"].numpy(), expected, rtol=1e-12)


def test_replicated_data_come_from_the_model_at_each_draw() -> None:
    program, x, (_, noise_scale) = gaussian()
    count = 2000
    draws = draw(program, x, count, seed=2, replicate=True)
    residual = (draws.replicated["x"] - draws.latent["z"].unsqueeze(1)) / noise_scale
    assert residual.shape == (count, 20, 3)
    number = residual.numel()
    assert residual.mean().abs() < 4 / number**0.5
    assert (residual.var() - 1).abs() < 4 * (2 / number) ** 0.5
    correlation = (residual[1:] * residual[:-1]).mean()  # fresh noise for every draw
    assert correlation.abs() < 4 / number**0.5


def test_a_loop_and_a_graph_give_the_same_draws() -> None:
    data = schools.data()
    program = build(schools.model, args=data, family=FullRank())
    x = program.initial()
    fast = draw(program, x, 20, seed=0, replicate=True)
    program.obstacles = ("told to",)
    slow = draw(program, x, 20, seed=0, replicate=True)
    for group in ("latent", "deterministic", "log_likelihood", "replicated"):
        ours, theirs = getattr(fast, group), getattr(slow, group)
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name])
    torch.testing.assert_close(fast.log_p, slow.log_p)


def test_pieces_do_not_change_the_values() -> None:
    mapped = Mapped(lambda a, b: {"y": a * b}, [torch.arange(7.0)], [torch.tensor(2.0)], trace=True)
    whole = mapped([torch.arange(7.0)], [torch.tensor(2.0)])["y"]
    mapped.piece = 3
    assert torch.equal(mapped([torch.arange(7.0)], [torch.tensor(2.0)])["y"], whole)
    assert torch.equal(whole, 2 * torch.arange(7.0))


def test_global_state_is_left_as_found() -> None:
    program, x, _ = gaussian()
    pyro.get_param_store().clear()
    pyro.param("mine", torch.tensor(1.0))
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    from_program(program, x, num_samples=10)
    tail(program, x, num_samples=100)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype
    assert list(pyro.get_param_store().keys()) == ["mine"]
    pyro.get_param_store().clear()


# ---- k-hat ----


@pytest.mark.parametrize("shape", [0.3, 0.7, 1.2])
def test_the_shape_of_pareto_weights_is_found(shape: float) -> None:
    """w = exp(k E), E exponential, is Pareto with shape k; the fit shrinks to 1/2 with the weight of 10 draws."""
    log_w = shape * np.random.default_rng(0).standard_exponential(20_000)
    tail = 3 * math.sqrt(len(log_w))
    expected = (tail * shape + 5) / (tail + 10)
    error = (1 + shape) / math.sqrt(tail)
    assert error < 0.12
    assert abs(pareto_shape(log_w) - expected) < 3 * error


def test_both_generations_of_arviz_agree() -> None:
    from arviz_stats.base import array_stats

    rng = np.random.default_rng(1)
    for shape, draws in ((0.3, 4000), (0.9, 4000), (-0.5, 200)):
        log_w = shape * rng.standard_exponential(draws) - 100.0
        ours = pareto_shape(log_w)
        _, new = array_stats.psislw(-log_w)  # it takes log-likelihoods, the negatives of leave-one-out's log weights
        assert ours == pytest.approx(float(new), abs=1e-9)
        _, old = legacy_arviz().psislw(log_w.copy())
        # its tail has a draw or two more, so the estimates differ by about (1 + k) / M
        assert abs(ours - old) < 5 * (1 + shape) / math.ceil(min(draws / 5, 3 * math.sqrt(draws)))


@pytest.mark.parametrize("spread", [300.0, 3000.0])
def test_weights_too_far_apart_for_their_numbers_have_a_large_shape(spread: float) -> None:
    """Where a quarter of the tail is 0 beside the largest weight, libraries find nothing but their prior, k = 0.05."""
    rng = np.random.default_rng(2)
    assert pareto_shape(spread * rng.standard_normal(1000)) > 50
    assert pareto_shape(np.append(rng.standard_normal(999), 3 * spread)) > 5
    program, x, _ = gaussian(width=spread)
    estimate = tail(program, x, num_samples=500).khat
    assert estimate.value is not None
    assert estimate.value > 50


@pytest.mark.parametrize("height", [600.0, 680.0, 684.0, 690.0, 700.0, 720.0, 760.0])
def test_a_single_weight_has_a_large_shape_at_any_height(height: float) -> None:
    """On both sides of what the fit can divide by."""
    assert pareto_shape(np.append(np.random.default_rng(0).standard_normal(1999), height)) > 1


def test_ties_that_a_fit_cannot_divide_by_have_no_tail() -> None:
    for draws in (1200, 1400, 1600):
        assert math.isnan(pareto_shape(np.append(np.zeros(82), np.full(draws - 82, -3.0))))
    assert math.isnan(pareto_shape(np.append(np.zeros(1999), 600.0)))
    assert not pareto_shape(np.append(1e-12 * np.random.default_rng(0).standard_normal(1999), 684.0)) < 1


def test_draws_without_density_do_not_make_the_others_equal() -> None:
    """log p of -inf is no size that rounding errors are a share of."""

    def cut(y: Tensor) -> None:
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.factor("slope", torch.where(z > -3.0, 5.0 * z, -math.inf))

    def guide(y: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("n", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(len(y)), scale))

    for units in (1, 20):
        program = build(cut, guide, (torch.zeros(units),))
        found = tail(program, program.initial(), num_samples=2000)
        assert found.khat.value is not None
        assert found.khat.value > 1
        assert found.effective is not None
        assert found.effective < 0.02


def test_weights_that_are_zero_are_named() -> None:
    def unseen(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("nowhere", torch.where(z < 100.0, -math.inf, 0.0))

    program = build(unseen, None, (torch.zeros(1),), family=MeanField())
    estimate = tail(program, program.initial(), num_samples=100).khat
    assert estimate.value is None
    assert estimate.reason.startswith("all 100 importance weights are 0")


def test_khat_of_the_posterior_itself_is_zero() -> None:
    program, x, _ = gaussian()
    estimate = tail(program, x, num_samples=1000).khat
    assert estimate[:3] == (0.0, 0.0, 0.0)
    assert "equal to rounding" in estimate.reason


def test_khat_tells_a_narrow_guide_from_a_wide_one() -> None:
    """With q narrower by s in two dimensions, log w = (1 - s^2) E, E exponential: the shape is 1 - s^2 exactly."""
    count, shape = 20_000, 1 - 0.4**2
    program, x, _ = gaussian(dim=2, width=0.4)
    narrow = tail(program, x, num_samples=count).khat
    assert narrow.value is not None
    largest = 3 * math.sqrt(count)
    assert abs(narrow.value - (largest * shape + 5) / (largest + 10)) < 3 * (1 + shape) / math.sqrt(largest)
    assert narrow.value > khat_threshold(count)
    program, x, _ = gaussian(dim=2, width=1.5)
    wide = tail(program, x, num_samples=count).khat
    assert wide.high is not None
    assert wide.high < 0.5  # bounded weights


def test_the_share_of_effective_draws() -> None:
    """For p = N(0, 1) and q = N(0, s^2) the second moment of p / q is s / sqrt(2 - 1 / s^2)."""
    program, x, _ = gaussian(dim=1, width=0.9)
    found = tail(program, x, num_samples=20_000).effective
    assert found == pytest.approx(math.sqrt(2 - 1 / 0.9**2) / 0.9, abs=0.005)
    program, x, _ = gaussian(dim=1, width=0.3)
    assert (tail(program, x, num_samples=20_000).effective or 0.0) < 0.3
    program, x, _ = gaussian()
    assert tail(program, x, num_samples=1000).effective == 1.0


def rate(y: Tensor) -> None:
    r = pyro.sample("r", dist.Gamma(1.0, 1.0))
    pyro.sample("y", dist.Exponential(r).expand([8]).to_event(1), obs=y)


def test_far_tails_alone_do_not_make_a_family_wrong() -> None:
    """KL(q || p) is 0.01 nats, moments are right to 3%, and k-hat of 2,000 draws is 2.4."""
    y = torch.tensor([0.3, 1.2, 0.7, 2.5, 0.1, 0.9, 1.1, 0.4])
    fit = bc.fit(rate, args=(y,), progress=False)
    khat = fit.verdict.numbers["khat"]
    assert khat["value"] > 1.5 > khat["threshold"]
    assert khat["effective"] > 0.97
    assert fit.verdict.outcome == "converged"
    exact = torch.distributions.Gamma(9.0, 1.0 + y.sum())
    drawn = fit.sample(4000)["r"]
    assert float(drawn.mean()) == pytest.approx(float(exact.mean), rel=0.03)
    assert float(drawn.std()) == pytest.approx(float(exact.stddev), rel=0.05)


def test_the_interval_shrinks_with_the_tail() -> None:
    program, x, _ = gaussian(dim=1, width=0.5)
    few, many = (tail(program, x, num_samples=n).khat for n in (500, 50_000))
    assert few.high is not None
    assert many.high is not None
    assert many.high - many.low < 0.5 * (few.high - few.low)  # type: ignore[operator]


def test_khat_is_not_available_without_a_density() -> None:
    program = build(schools.model, args=schools.data(), guide=None, family=AutoDelta)
    estimate = tail(program, program.initial()).khat
    assert estimate.value is None
    assert "point estimate" in estimate.reason


def test_a_non_finite_weight_is_named() -> None:
    program, x, _ = gaussian()
    estimate = tail(program, torch.full_like(x, torch.nan), num_samples=100).khat
    assert estimate.value is None
    assert "100 of 100" in estimate.reason


# ---- exports ----


@pytest.fixture(scope="module")
def exported() -> Any:
    program = build(schools.model, args=schools.data(), family=FullRank())
    return from_program(program, program.initial(), num_samples=500, seed=4)


def test_dims_and_coords_come_from_plates(exported: Any) -> None:
    posterior = exported.groups["posterior"]
    assert {name: array.dims for name, array in posterior.items()} == {
        "mu": ("sample",),
        "tau": ("sample",),
        "theta_trans": ("sample", "school"),
        "theta": ("sample", "school"),
    }
    assert exported.coords["school"].tolist() == list(range(8))
    mu, tau, raw, theta = (posterior[n].values for n in ("mu", "tau", "theta_trans", "theta"))
    np.testing.assert_allclose(theta, mu[:, None] + tau[:, None] * raw)
    assert (tau > 0).all()
    y, sigma = schools.data()
    np.testing.assert_array_equal(exported.groups["observed_data"]["y"].values, y)
    np.testing.assert_array_equal(exported.groups["constant_data"]["sigma"].values, sigma)
    assert exported.groups["constant_data"]["sigma"].dims == ("school",)
    assert exported.groups["log_likelihood"]["y"].dims == ("sample", "school")
    assert exported.groups["posterior_predictive"]["y"].values.shape == (500, 8)
    assert exported.attrs["inference_method"] == "variational"


def test_event_dimensions_are_named_after_their_site() -> None:
    program, x, _ = gaussian()
    groups = from_program(program, x, num_samples=5).groups
    assert groups["posterior"]["z"].dims == ("sample", "z_dim_0")
    assert groups["posterior_predictive"]["x"].dims == ("sample", "observation", "x_dim_0")
    assert groups["log_likelihood"]["x"].dims == ("sample", "observation")
    assert groups["constant_data"]["noise_scale"].dims == ("noise_scale_dim_0",)


def test_both_generations_of_arviz_read_the_export(exported: Any, caplog: pytest.LogCaptureFixture) -> None:
    import arviz_stats

    old, new = to_inference_data(exported), to_datatree(exported)
    arviz = export.legacy_arviz()
    summary, theirs = arviz.summary(old), arviz_stats.summary(new)
    np.testing.assert_allclose(summary.loc["mu", "mean"], exported.groups["posterior"]["mu"].values.mean(), atol=6e-4)
    np.testing.assert_allclose(float(theirs.loc["mu", "mean"]), summary.loc["mu", "mean"], atol=6e-3)
    loo, other = arviz.loo(old, var_name="y", reff=1.0), arviz_stats.loo(new, var_name="y", reff=1.0)
    assert abs(loo.elpd_loo - other.elpd) < 0.02 * loo.se
    for group in exported.groups:
        assert set(new[group].data_vars) == set(old[group].data_vars) == set(exported.groups[group])
        for name in exported.groups[group]:
            xarray.testing.assert_equal(new[group][name], old[group][name])
    assert old.posterior.sizes["chain"] == new["posterior"].sizes["chain"] == 1
    assert "not a chain" in new.attrs["draws"]
    assert "length 1" in old.attrs["chain"]


def test_netcdf_holds_the_same_and_is_whole_or_absent(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "posterior.nc"
    write_netcdf(exported, path)
    with xarray.open_datatree(path, engine="h5netcdf") as tree:
        assert set(tree.children) == set(exported.groups)
        np.testing.assert_array_equal(
            tree["posterior"]["theta"].values[0], exported.groups["posterior"]["theta"].values
        )
        assert tree.attrs["inference_library"] == "bbvi_conv"
        assert tree["posterior"]["theta"].dims == ("chain", "draw", "school")
    before = path.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(xarray.DataTree, "to_netcdf", fail)
    with pytest.raises(OSError, match="no space"):
        write_netcdf(exported, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["posterior.nc"]


# ---- what models may hold ----


def run(model: Callable[..., None], *args: Tensor, count: int = 400, **kwargs: Any) -> Any:
    program = build(model, args=args, family=MeanField(), dtype=torch.float64)
    return from_program(program, program.initial(), num_samples=count, **kwargs)


def test_factors_are_left_out_and_said_so() -> None:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", -(z**2))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    out = run(model, torch.zeros(3))
    assert set(out.groups["log_likelihood"]) == set(out.groups["posterior_predictive"]) == {"y"}
    assert "penalty" in out.attrs["posterior_predictive"]
    z, log_p = out.groups["posterior"]["z"].values, out.groups["sample_stats"]["log_p"].values
    np.testing.assert_allclose(log_p, stats.norm.logpdf(z) - z**2 + 3 * stats.norm.logpdf(z), rtol=1e-10)


def test_data_the_tape_cannot_serve_are_drawn_one_by_one() -> None:
    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.LogNormal(1.0, 0.1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    y = torch.tensor([2.0, 3.0, 4.0, 1.0])
    state = torch.get_rng_state()
    first, again, other = (run(model, y, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    values = first.groups["posterior_predictive"]["y"].values
    np.testing.assert_array_equal(values, again.groups["posterior_predictive"]["y"].values)
    assert not np.array_equal(values, other.groups["posterior_predictive"]["y"].values)
    rate = first.groups["posterior"]["rate"].values
    pulls = (values - rate[:, None]) / np.sqrt(rate)[:, None]
    assert abs(pulls.mean()) < 4 / math.sqrt(pulls.size)
    assert abs((pulls**2).mean() - 1) < 4 * math.sqrt((2 + 1 / rate.mean()) / pulls.size)


def test_new_data_that_are_drawn_until_they_fit() -> None:
    """Von Mises draws by rejection: how much noise one takes is not known before."""

    def directions(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 0.3))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.VonMises(mean, 0.5), obs=y)

    y = torch.linspace(-1.0, 1.0, 30)
    program = build(directions, None, (y,), family=MeanField())
    drawn = from_program(program, program.initial(), num_samples=300).groups["posterior_predictive"]["y"].values
    again = from_program(program, program.initial(), num_samples=300).groups["posterior_predictive"]["y"].values
    assert drawn.shape == (300, 30)
    assert (drawn == again).all()
    assert np.abs(drawn).max() <= math.pi
    assert len(np.unique(drawn)) > 8000  # no draw is another one's
    known = stats.circmean(drawn.reshape(-1), high=math.pi, low=-math.pi)
    located = from_program(program, program.initial(), num_samples=300).groups["posterior"]["mean"].values.mean()
    assert abs(known - located) < 0.1


def test_masked_rows_have_no_likelihood() -> None:
    y, seen = torch.tensor([1.0, 2.0, 0.0, 4.0]), torch.tensor([True, True, False, True])

    def masked(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", 4), pyro.poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def by_distribution(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", 4):
            pyro.sample("y", dist.Normal(mu, 1.0).mask(seen), obs=y)

    found = []
    for model in (masked, by_distribution):
        program = build(model, None, (y,), family=MeanField())
        found.append(from_program(program, program.initial(), num_samples=50).groups["log_likelihood"]["y"].values)
    assert (found[0] == found[1]).all()
    assert (found[0][:, 2] == 0).all()
    assert (found[0][:, [0, 1, 3]] < 0).all()


def test_names_that_files_cannot_hold_get_others() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("y", len(y)):
            z = pyro.sample("layer/z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=y)

    out = run(model, torch.zeros(3), count=4)
    assert out.groups["posterior"]["layer.z"].dims == ("sample", "y_dim")
    to_datatree(out)
    to_inference_data(out)


def test_nested_plates_keep_their_order() -> None:
    def model(y: Tensor) -> None:
        col, row = pyro.plate("col", 3, dim=-1), pyro.plate("row", 4, dim=-2)
        with col:
            b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with row:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with row, col:
            pyro.sample("y", dist.Normal(a + b.sum(-1), 1.0), obs=y)

    groups = run(model, torch.zeros(4, 3), count=6).groups
    assert groups["posterior"]["a"].dims == ("sample", "row")
    assert groups["posterior"]["b"].dims == ("sample", "col", "b_dim_0")
    assert groups["log_likelihood"]["y"].dims == ("sample", "row", "col")
    assert groups["observed_data"]["y"].dims == ("row", "col")


# ---- minibatches ----

ROWS = 49


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def regression_by_index(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", ROWS, subsample_size=7) as rows:
        pyro.sample("y", dist.Bernoulli(logits=x[rows] @ w), obs=y[rows])


@pytest.mark.parametrize(("model", "size"), [(regression, 7), (regression, 10), (regression_by_index, 7)])
def test_subsampled_global_latents_are_judged_on_all_rows(model: Callable[..., None], size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 2, generator=generator, dtype=torch.float64)
    y = (x.sum(1) > 0).double()
    whole = build(regression, args=(x, y), family=MeanField(), dtype=torch.float64)
    part = build(
        model, args=(x, y), family=MeanField(), dtype=torch.float64, minibatch=bc.Minibatch(size, plate="data")
    )
    at = whole.initial()
    ours, theirs = (from_program(p, at, num_samples=30).groups for p in (part, whole))
    for group, name in (("sample_stats", "log_p"), ("sample_stats", "log_q"), ("log_likelihood", "y")):
        np.testing.assert_allclose(ours[group][name].values, theirs[group][name].values, rtol=1e-10)
    assert ours["observed_data"]["y"].values.tolist() == y.tolist()
    assert tail(part, at, num_samples=500).khat.value == pytest.approx(tail(whole, at, num_samples=500).khat.value)


NOISE = 0.8


def local_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def local_guide(x: Tensor) -> None:
    slope = pyro.param("slope", torch.tensor(0.1))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, scale))


def local_program(rows: int = 300, size: int = 8, width: float = 1.0) -> tuple[Program, Tensor, Tensor]:
    """A subsampled program with a latent per row, at its exact posterior but for ``width``."""
    x = torch.randn(rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    minibatch = bc.Minibatch(size, plate="data")
    program = build(local_model, local_guide, args=(x,), minibatch=minibatch, dtype=torch.float64)
    precision = 1 + NOISE**-2
    numbers = {"slope": NOISE**-2 / precision, "scale": width * precision**-0.5}
    values = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    return program, with_values(program, values), x


def test_local_latents_are_exported_row_by_row() -> None:
    program, at, x = local_program()
    out = from_program(program, at, num_samples=200)
    z = out.groups["posterior"]["z"].values
    assert z.shape == (200, 300)
    assert out.coords["data"].tolist() == list(range(300))
    pulls = (z - (x / (1 + NOISE**2)).numpy()) * math.sqrt(1 + NOISE**-2)
    assert abs(pulls.mean()) < 4 / math.sqrt(pulls.size)
    assert abs(pulls.var() - 1) < 4 * math.sqrt(2 / pulls.size)
    neighbours = (pulls[:, :-8] * pulls[:, 8:]).mean()  # rows of the next part have noise of their own
    assert abs(neighbours) < 4 / math.sqrt(pulls[:, 8:].size)
    evidence = stats.norm(0, math.sqrt(1 + NOISE**2)).logpdf(x.numpy()).sum()
    stat = out.groups["sample_stats"]
    np.testing.assert_allclose(stat["log_p"].values - stat["log_q"].values, evidence, rtol=1e-10)


def test_an_export_beyond_the_cap_keeps_the_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "__kwdefaults__", {"step": 1, "parts": 1, "cap": 3 * 100 * 20})
    program, at, x = local_program()
    out = from_program(program, at, num_samples=100)
    assert out.coords["data"].tolist() == list(range(20))
    assert out.groups["log_likelihood"]["x"].values.shape == (100, 20)
    np.testing.assert_array_equal(out.groups["observed_data"]["x"].values, x[:20])
    assert "first 20 of the 300 entries of plate data" in str(out.attrs["size"])
    assert "20 rows" in str(out.attrs["sample_stats_rows"])


def test_without_a_minibatch_the_largest_plate_is_cut() -> None:
    program = build(local_model, local_guide, args=(torch.arange(50.0),), dtype=torch.float64)
    draws = draw(program, program.initial(), 10, 0, kept=("data", 5), replicate=True)
    assert draws.latent["z"].shape == draws.replicated["x"].shape == draws.log_likelihood["x"].shape == (10, 5)
    whole = draw(program, program.initial(), 10, 0, replicate=True)
    assert torch.equal(whole.latent["z"][:, :5], draws.latent["z"])
    assert torch.equal(whole.log_p, draws.log_p)  # type: ignore[arg-type]
    chosen = plan(program, whole.variables, 10, cap=10 * 3 * 5)
    assert chosen.kept == ("data", 5)
    assert plan(program, whole.variables, 10).kept is None


def test_units_have_their_own_weights() -> None:
    program, at, _ = local_program()
    exact = tail(program, at, num_samples=400).khat
    assert exact.value == 0.0
    program, at, _ = local_program(width=0.4)
    narrow = tail(program, at, num_samples=4000).khat
    assert "median over 104 units" in narrow.reason  # 13 parts of 8 rows make at least 100
    assert narrow.value is not None
    eps = np.random.default_rng(0).standard_normal((300, 4000))  # log w of one unit, up to a constant
    peers = np.array([pareto_shape(0.5 * (1 - 0.4**2) * e**2) for e in eps])
    error = 1.25 * peers.std() * math.sqrt(1 / 104 + 1 / 300)  # of the difference of two medians
    assert error < 0.03
    assert abs(narrow.value - np.median(peers)) < 4 * error
    assert narrow.low == pytest.approx(np.quantile(peers, 0.05), abs=8 * error)
    assert narrow.high == pytest.approx(np.quantile(peers, 0.95), abs=8 * error)


def test_runs_by_pyros_handlers_are_of_few_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psis, "MOST_HANDLED", 90)
    program, at, _ = local_program(width=0.4)
    program.obstacles = ("something keeps it from being traced",)
    assert "median over 24 units" in tail(program, at, num_samples=30).khat.reason  # 3 parts of 8 rows


def test_bad_requests_get_one_sentence() -> None:
    program, x, _ = gaussian()
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        draw(program, x, 0, 0)
    with pytest.raises(ValueError, match="rows are for programs with a minibatch"):
        draw(program, x, 1, 0, torch.arange(3))
    data = torch.zeros(ROWS, 2), torch.zeros(ROWS)
    by_index = build(regression_by_index, args=data, family=MeanField(), minibatch=bc.Minibatch(7, plate="data"))
    with pytest.raises(ValueError, match="takes 7 rows at a time, got 10"):
        draw(by_index, by_index.initial(), 1, 0, torch.arange(10))


def test_a_fit_names_itself() -> None:
    fit = bc.fit(
        conjugate.model, args=conjugate.data(20, 2), max_steps=60, window=50, seed=7, progress=False, khat_draws=100
    )
    attrs = neutral(fit, 10).attrs
    assert attrs["outcome"] == fit.verdict.outcome
    assert attrs["family"] == "MeanField(init_scale=0.1, scale_map=Softplus())"
    assert attrs["objective"] == repr(fit.settings.bound())
    assert attrs["seed"] == 7
    assert set(fit.sample(5)) == {"z"}
    assert fit.to_arviz(10).posterior.sizes["draw"] == 10


def test_ties_among_the_largest_weights_leave_no_tail() -> None:
    """The fit is then judged by what else is known; no warning, and no error of the library below."""
    assert math.isnan(pareto_shape(np.repeat([0.0, 1.0], 1000)))


def test_counts_are_drawn_side_by_side() -> None:
    """Draws of torch's own generator, mapped: at other rates, each for itself, as stated by the model."""

    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Poisson(rate), obs=y)
            pyro.sample("again", dist.Poisson(rate), obs=y)
            pyro.sample("of", dist.Binomial(10, probs=rate / (1 + rate)), obs=y)
            pyro.sample("wide", dist.GammaPoisson(2.0, 1 / rate), obs=y)

    program = build(model, None, (torch.tensor([1.0, 4.0, 2.0]),), family=MeanField())
    kept: dict[str, Any] = {}
    real = Mapped.__init__

    def noted(self: Mapped, *args: Any, **more: Any) -> None:
        real(self, *args, **more)
        kept["piece"] = self.piece

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mapped, "__init__", noted)
        found = draw(program, program.initial(), 4000, 0, replicate=True)
        same = draw(program, program.initial(), 4000, 0, replicate=True)
    assert kept["piece"] > 1  # power: not one after the other
    rate = found.latent["rate"][:, None]
    means = {"y": rate, "again": rate, "of": 10 * rate / (1 + rate), "wide": 2 * rate}
    for name, mean in means.items():
        drawn = found.replicated[name]
        assert torch.equal(drawn, same.replicated[name])
        error = (drawn - mean) / mean.sqrt()
        assert error.mean().abs() < 4 * error.std() / 12000**0.5
        assert not torch.equal(drawn[:, 0], drawn[:, 1])
    assert not torch.equal(found.replicated["y"], found.replicated["again"])


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("family", [FullRank(), MeanField(), bc.Structured()])
def test_reparametrised_sites_are_values_of_latents(family: Any, outside: bool) -> None:
    """They belong to the posterior and are no data, and every element of a plate has parameters of its own."""
    y, sigma = schools.data()
    config = {"theta": LocScaleReparam(0.0)}

    def inside(y: Tensor, sigma: Tensor) -> None:
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", len(y)):
            with poutine.reparam(config=config):
                theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    model = poutine.reparam(schools.centered, config=config) if outside else inside
    program = build(model, None, (y, sigma), family=family)
    assert [site.name for site in program.structure.latents] == ["mu", "tau", "theta_decentered"]
    assert [site.name for site in program.structure.observed] == ["y"]
    found = draw(program, program.initial(), 50, 0, replicate=True)
    assert set(found.log_likelihood) == set(found.replicated) == {"y"}
    right = found.latent["mu"][:, None] + found.latent["tau"][:, None] * found.latent["theta_decentered"]
    torch.testing.assert_close(found.deterministic["theta"], right)
    assert (found.latent["theta_decentered"].std(1) > 0).all()
    exported = from_program(program, program.initial(), num_samples=50)
    assert "theta" in exported.groups["posterior"]
    assert "theta" not in exported.groups["observed_data"]


def test_deterministic_sites_are_of_the_data_not_of_new_data() -> None:
    y = torch.tensor([2.0, 3.5, 3.0])

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(y)):
            seen = pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
            pyro.deterministic("residual", seen - mu)

    drawn = _replicated(model, y)
    assert torch.equal(drawn.deterministic["residual"], y - drawn.latent["mu"][:, None])
    assert (drawn.replicated["y"] - y).abs().max() > 0.5


def test_deterministic_sites_of_a_drawn_class_are_of_the_data() -> None:
    y = torch.tensor([-3.0, 3.5, 3.0])

    @infer.config_enumerate
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            side = pyro.sample("side", dist.Bernoulli(0.5))
            seen = pyro.sample("y", dist.Normal(mu + 6.0 * side - 3.0, 1.0), obs=y)
            pyro.deterministic("residual", seen - (mu + 6.0 * side - 3.0))

    drawn = _replicated(model, y)
    loc = drawn.latent["mu"][:, None] + 6.0 * drawn.latent["side"] - 3.0
    torch.testing.assert_close(drawn.deterministic["residual"], y - loc)
    assert (drawn.latent["side"].mean(0) - torch.tensor([0.0, 1.0, 1.0])).abs().max() < 0.1
    assert (drawn.replicated["y"] - y).abs().max() > 0.5


def _replicated(model: Callable[[Tensor], None], y: Tensor) -> Draws:
    program = bc.build(model, None, (y,), family=bc.MeanField())
    return draw(program, program.initial(), 50, 0, replicate=True)
