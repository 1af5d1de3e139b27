"""Fits with discrete latents summed out, from the model to the file: known posteriors, exports, reports, k-hat."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor
from typer.testing import CliRunner

import bbvi_conv as bc
from bbvi_conv.cli import app
from bbvi_conv.data import posteriordb
from bbvi_conv.families import FullRank, MeanField
from bbvi_conv.model_file import load_module
from bbvi_conv.posterior import draw, from_program
from bbvi_conv.program import Minibatch
from bbvi_conv.program.build import build

coal = load_module("coal_mining")
Y = torch.tensor([-2.1, -1.7, 0.4, 2.9, 3.3, 3.1], dtype=torch.float64)


def mixture(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    means = pyro.sample("means", dist.Normal(torch.tensor([-2.0, 3.0]), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
        centre = pyro.deterministic("centre", means[z])
        pyro.sample("y", dist.Normal(centre, scale), obs=y)


def chain(y: Tensor) -> None:
    stay = pyro.sample("stay", dist.Beta(8.0, 2.0))
    rows = torch.stack([torch.stack([stay, 1 - stay]), torch.stack([1 - stay, stay])])
    z: Any = 0
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(rows[z]))
        pyro.sample(f"y_{t}", dist.Normal(5.0 * z - 2.0, 4.0), obs=y[t])


@pytest.fixture(scope="module")
def fit() -> bc.Fit:
    """The year of the change in the coal-mining disasters, summed out."""
    return bc.fit(coal.model, args=coal.data(), family=FullRank(), max_steps=3000, engine="traced")


def test_the_bound_comes_to_the_evidence(fit: bc.Fit) -> None:
    evidence, _ = coal.posterior(*coal.data())
    drawn = draw(fit.program, fit.x, 4000, 1)
    assert drawn.log_p is not None
    weights = drawn.log_p - drawn.log_q
    assert float(evidence - weights.mean()) == pytest.approx(0.0, abs=0.1)
    assert float(weights.logsumexp(0) - np.log(4000)) == pytest.approx(float(evidence), abs=0.02)
    assert fit.verdict.outcome != "wrong_family"


def test_enumerated_latents_are_drawn_from_their_posterior(fit: bc.Fit) -> None:
    """Frequencies of the year over 20,000 draws against its exact law, whose standard errors are below 0.004."""
    _, probability = coal.posterior(*coal.data())
    change = fit.sample(20_000)["change"]
    assert change.shape == (20_000,)
    assert change.dtype is torch.int64
    frequency = torch.bincount(change, minlength=len(probability)).double() / len(change)
    assert (frequency - probability).abs().max() < 0.02
    assert probability.max() > 0.2  # power


def test_the_export_holds_them(fit: bc.Fit) -> None:
    exported = fit.to_arviz(200)
    assert set(exported.posterior) == {"early", "late", "change"}
    assert exported.posterior["change"].shape == (1, 200)
    assert exported.log_likelihood["disasters"].dims == ("chain", "draw")  # one number: the year joins all of them
    assert exported.posterior_predictive["disasters"].shape == (1, 200, 112)
    early = exported.posterior_predictive["disasters"].values[..., :30].mean()
    late = exported.posterior_predictive["disasters"].values[..., 60:].mean()
    assert (early, late) == (pytest.approx(3.1, abs=0.3), pytest.approx(0.9, abs=0.2))


def test_the_report_says_what_was_summed_out(fit: bc.Fit, tmp_path: Path) -> None:
    from bbvi_conv.report import write_report

    write_report(fit, tmp_path / "report.html")
    assert "summed out" in (tmp_path / "report.html").read_text()


def test_the_command_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["fit", "models/coal_mining.py", "--steps", "300", "--out", str(tmp_path / "run")])
    assert done.exit_code in (0, 3), done.output
    assert (tmp_path / "run" / "posterior.nc").exists()


def test_assignments_of_a_mixture_row_by_row() -> None:
    program = build(mixture, None, (Y,), family=MeanField(), dtype=torch.float64)
    drawn = draw(program, program.initial(), 4000, 0, replicate=True)
    means, scale, z = drawn.latent["means"], drawn.latent["scale"], drawn.latent["z"]
    parts = dist.Normal(means.unsqueeze(1), scale.reshape(-1, 1, 1)).log_prob(Y.reshape(1, -1, 1))
    joint = parts + torch.tensor([0.4, 0.6]).log()
    torch.testing.assert_close(drawn.log_likelihood["y"], joint.logsumexp(-1), rtol=1e-6, atol=1e-6)
    error = (z.double() - joint.softmax(-1)[..., 1]).mean(0)
    assert (error.abs() < 4 * 0.5 / 4000**0.5).all()
    assert 0.01 < z.double().mean() < 0.99
    centre = drawn.deterministic["centre"]
    assert torch.equal(centre, means.gather(1, z))
    spread = (drawn.replicated["y"] - centre) / scale.unsqueeze(1)  # new data at the assignments drawn
    assert (float(spread.mean()), float(spread.std())) == (pytest.approx(0.0, abs=0.03), pytest.approx(1.0, abs=0.03))


def test_values_that_are_vectors_are_drawn_as_such() -> None:
    """One-hot assignments, beside the same by numbers; states of a chain, each by the one before."""

    def one_hot(y: Tensor) -> None:
        means = pyro.sample("means", dist.Normal(torch.tensor([-2.0, 3.0]), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.4, 0.6])))
            pyro.sample("y", dist.Normal((z * means).sum(-1), 1.0), obs=y)

    program = build(one_hot, None, (Y,), family=MeanField(), dtype=torch.float64)
    drawn = draw(program, program.initial(), 4000, 0, replicate=True)
    means, z = drawn.latent["means"], drawn.latent["z"]
    assert z.shape == (4000, len(Y), 2)
    assert torch.equal(z.sum(-1), torch.ones(4000, len(Y), dtype=z.dtype))
    joint = dist.Normal(means.unsqueeze(1), 1.0).log_prob(Y.reshape(1, -1, 1)) + torch.tensor([0.4, 0.6]).log()
    assert ((z - joint.softmax(-1)).mean(0).abs() < 4 * 0.5 / 4000**0.5).all()
    spread = drawn.replicated["y"] - (z * means.unsqueeze(1)).sum(-1)
    assert (float(spread.mean()), float(spread.std())) == (pytest.approx(0.0, abs=0.03), pytest.approx(1.0, abs=0.03))

    def chain_of_vectors(y: Tensor) -> None:
        stay = pyro.sample("stay", dist.Beta(8.0, 2.0))
        rows = torch.stack([torch.stack([stay, 1 - stay]), torch.stack([1 - stay, stay])])
        z = torch.tensor([1.0, 0.0], dtype=y.dtype)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.OneHotCategorical((z.unsqueeze(-1) * rows).sum(-2)))
            pyro.sample(f"y_{t}", dist.Normal(5.0 * z[..., 1] - 2.0, 4.0), obs=y[t])

    paths = {}
    for model in (chain, chain_of_vectors):
        program = build(model, None, (Y,), family=MeanField(), dtype=torch.float64)
        found = draw(program, program.initial(), 6000, 0).latent
        states = [found[f"z_{t}"] for t in range(len(Y))]
        paths[model] = torch.stack([s[..., 1] if s.dim() > 1 else s.double() for s in states], -1)
    ends = [path.cov() for path in (p.T for p in paths.values())]
    assert (ends[0] - ends[1]).abs().max() < 0.02
    assert (paths[chain].mean(0) - paths[chain_of_vectors].mean(0)).abs().max() < 0.04
    assert ends[0].fill_diagonal_(0).max() > 0.05  # power
    exported = bc.fit(one_hot, args=(Y,), max_steps=200, engine="traced").to_arviz(20)
    assert exported.posterior["z"].shape == (1, 20, len(Y), 2)


def test_states_of_a_chain_are_drawn_together() -> None:
    """Pairs of neighbouring states against all 2^6 paths."""
    program = build(chain, None, (Y,), family=MeanField(), dtype=torch.float64)
    drawn = draw(program, program.initial(), 6000, 0)
    stay = drawn.latent["stay"]
    paths = torch.cartesian_prod(*[torch.arange(2)] * 6)
    same = (torch.cat([torch.zeros(64, 1, dtype=torch.int64), paths[:, :-1]], 1) == paths).double()
    log_stay = stay.log().reshape(-1, 1, 1), (-stay).log1p().reshape(-1, 1, 1)
    prior = (same * log_stay[0] + (1 - same) * log_stay[1]).sum(-1)
    joint = prior + dist.Normal(5.0 * paths - 2.0, 4.0).log_prob(Y).sum(-1)
    assert list(drawn.log_likelihood) == ["y_0+...+y_5"]
    torch.testing.assert_close(drawn.log_likelihood["y_0+...+y_5"], joint.logsumexp(-1), rtol=1e-6, atol=1e-6)
    states = torch.stack([drawn.latent[f"z_{t}"] for t in range(6)], -1)
    equal = (states[:, 1:] == states[:, :-1]).double().mean(0)
    right = (joint.softmax(-1).unsqueeze(-1) * (paths[:, 1:] == paths[:, :-1])).sum(1).mean(0)
    assert (equal - right).abs().max() < 4 * 0.5 / 6000**0.5
    apart = torch.stack([states[:, 1:].double().mean(0), states[:, :-1].double().mean(0)])
    assert ((apart.prod(0) + (1 - apart).prod(0)) - right).abs().max() > 0.05  # power: neighbours are not independent


def test_rows_of_a_subsampled_mixture_are_exported_alike() -> None:
    subsampled = build(
        mixture, None, (Y,), family=MeanField(), dtype=torch.float64, minibatch=Minibatch(2, plate="data")
    )
    whole = build(mixture, None, (Y,), family=MeanField(), dtype=torch.float64)
    ours = from_program(subsampled, subsampled.initial(), num_samples=50).groups
    right = from_program(whole, whole.initial(), num_samples=50).groups
    assert ours["posterior"]["z"].dims == ("sample", "data")
    assert ours["posterior"]["z"].values.shape == (50, 6)
    for group, name in (("log_likelihood", "y"), ("sample_stats", "log_p"), ("posterior", "means")):
        np.testing.assert_allclose(ours[group][name].values, right[group][name].values, rtol=1e-9)


def test_two_sites_of_one_assignment_have_one_likelihood() -> None:
    def twice(y: Tensor) -> None:
        means = pyro.sample("means", dist.Normal(torch.tensor([-2.0, 3.0]), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("a", dist.Normal(means[z], 1.0), obs=y)
            pyro.sample("b", dist.Normal(means[z], 2.0), obs=y + 0.5)

    exported = bc.fit(twice, args=(Y,), max_steps=100, engine="traced").to_arviz(20)
    assert list(exported.log_likelihood) == ["a+b"]
    assert exported.log_likelihood["a+b"].dims == ("chain", "draw", "data")
    assert set(exported.posterior_predictive) == {"a", "b"}


needs_data = pytest.mark.skipif(
    "BBVI_CONV_DATA" not in os.environ, reason="BBVI_CONV_DATA names no folder of real data"
)


@needs_data
def test_reference_posterior_of_a_mixture() -> None:
    """posteriordb's ``low_dim_gauss_mix``, its assignments as discrete latents: means and spreads of long MCMC."""

    def model(y: Tensor) -> None:
        low = pyro.sample("low", dist.Normal(0.0, 2.0))
        gap = pyro.sample("gap", dist.ImproperUniform(constraints.positive, (), ()))
        pyro.factor("high", dist.Normal(0.0, 2.0).log_prob(low + gap))
        with pyro.plate("component", 2):
            sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
        mu = pyro.deterministic("mu", torch.stack([low, low + gap], -1))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(1 - theta)).long()
            pyro.sample("y", dist.Normal(mu[z], sigma[z]), obs=y)

    reference = posteriordb.posterior("low_dim_gauss_mix-low_dim_gauss_mix")
    y = torch.tensor(reference.data["y"])
    fit = bc.fit(model, args=(y,), family=FullRank(), max_steps=3000, engine="traced", num_gradients=64)
    drawn = fit.sample(4000)
    found = {f"{name}[{i + 1}]": drawn[name][:, i] for name in ("mu", "sigma") for i in range(2)}
    for name, values in {**found, "theta": drawn["theta"]}.items():
        right = reference.draws[name]
        assert abs(float(values.mean()) - right.mean()) < 0.2 * right.std(), name
        assert float(values.std()) == pytest.approx(right.std(), rel=0.15), name
