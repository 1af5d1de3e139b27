"""Laws that every objective obeys, over one table: a line adds a member."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from bbvi_conv.engine import Calculus, Stream
from bbvi_conv.objectives import CIWAE, ELBO, IWAE, MIWAE, PIWAE, VRIWAE, LinearWarmup, Objective, Pair
from bbvi_conv.objectives.weights import learning_signals
from bbvi_conv.program import Minibatch, Program
from bbvi_conv.program.build import build
from bbvi_conv.program.trace import TracedLogWeights

DOUBLY, STICKING = "doubly-reparameterised", "sticking-the-landing"
PATHWISE: dict[str, Objective] = {
    "elbo": ELBO(4),
    "beta-elbo": ELBO(4, kl_weight=0.5),
    "warm-up": ELBO(4, kl_weight=LinearWarmup(10)),
    "iwae": IWAE(5),
    "vr-iwae": VRIWAE(5, 0.3),
    "miwae": MIWAE(2, 3),
    "ciwae": CIWAE(5, 0.4),
    "piwae": PIWAE(2, 3),
    "pair": Pair(IWAE(6), ELBO(3)),
}
DETACHED: dict[str, Objective] = {
    "elbo": ELBO(4, STICKING),
    "iwae": IWAE(5, DOUBLY),
    "vr-iwae": VRIWAE(5, 0.3, DOUBLY),
    "miwae": MIWAE(2, 3, DOUBLY),
    "ciwae": CIWAE(5, 0.4, DOUBLY),
    "piwae": PIWAE(2, 3, DOUBLY),
    "pair": Pair(IWAE(6, DOUBLY), ELBO(3, STICKING)),
}
ALL = {**PATHWISE, **{f"{name}, detached": member for name, member in DETACHED.items()}}
N, D = 5, 2
X = torch.randn(N, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
MU = torch.tensor([0.3, -0.2], dtype=torch.float64)


def model(x: Tensor) -> None:
    mu = pyro.param("mu", MU.clone())
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def guide(x: Tensor) -> None:
    """Posterior at slope 1/2, shift mu/2, scale sqrt(1/2); starts elsewhere."""
    slope = pyro.param("slope", torch.tensor([0.35, 0.6], dtype=torch.float64))
    shift = pyro.param("shift", torch.tensor([0.1, 0.0], dtype=torch.float64))
    log_scale = pyro.param("log_scale", torch.tensor([-0.2, -0.5], dtype=torch.float64))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x + shift, log_scale.exp()).to_event(1))


@pytest.fixture(scope="module")
def program() -> Program:
    return build(model, guide, (X,))


def at_posterior(program: Program) -> Tensor:
    values = {
        "mu": MU,
        "slope": torch.full_like(MU, 0.5),
        "shift": MU / 2,
        "log_scale": torch.full_like(MU, math.log(0.5) / 2),
    }
    return torch.cat([values[leaf.name].to(torch.float64) for leaf in program.leaves])


def log_evidence(x: Tensor, mu: Tensor) -> Tensor:
    return MultivariateNormal(mu, 2 * torch.eye(D, dtype=mu.dtype)).log_prob(x).sum()


def gradients(
    calculus: Calculus, x: Tensor, count: int, *, key: int = 1, step: float = math.inf
) -> tuple[Tensor, Tensor]:
    feed = Stream(calculus.program, 0, "law", calculus.objective.draws).once(key, count)
    return calculus.gradients(x, feed, step=step)


def worst_z(a: Tensor, b: Tensor) -> float:
    """Largest distance of two means over draws, in standard errors."""
    error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
    return float(((a.mean(0) - b.mean(0)) / error).abs().max())


@pytest.mark.parametrize("name", DETACHED)
def test_valid_estimators_agree_in_expectation(name: str, program: Program, traced: TracedLogWeights) -> None:
    x = program.initial()
    pathwise, _ = gradients(Calculus(program, PATHWISE[name], traced, 1.0), x, 20_000, key=1)
    detached, _ = gradients(Calculus(program, DETACHED[name], traced, 1.0), x, 20_000, key=2)
    error = (pathwise.var(0) / len(pathwise)).sqrt()
    assert (pathwise.mean(0).abs() > 12 * error).any()  # power: the gradients are far from zero
    assert worst_z(pathwise, detached) < 4.5


def test_the_law_sees_a_wrong_weight(program: Program, traced: TracedLogWeights) -> None:
    class Wrong(IWAE):  # v where v squared is due
        def weights(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
            v = torch.softmax(log_w, 0)
            return v, v

    x = program.initial()
    right, _ = gradients(Calculus(program, IWAE(5), traced, 1.0), x, 20_000, key=1)
    wrong, _ = gradients(Calculus(program, Wrong(5, DOUBLY), traced, 1.0), x, 20_000, key=2)
    assert worst_z(right, wrong) > 12


@pytest.mark.parametrize("name", ALL)
def test_engines_agree_to_rounding(name: str, program: Program, traced: TracedLogWeights) -> None:
    x = program.initial()
    graph, loss = gradients(Calculus(program, ALL[name], traced, 1.0), x, 3, step=4.0)
    eager, same = gradients(Calculus(program, ALL[name], program.log_weights, 1.0), x, 3, step=4.0)
    torch.testing.assert_close(graph, eager, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(loss, same, rtol=1e-12, atol=0)


@pytest.mark.parametrize("one", [IWAE(1), VRIWAE(1, 0.4), MIWAE(1, 1), CIWAE(1, 0.3), Pair(IWAE(1), MIWAE(1, 1))])
def test_one_draw_is_the_elbo(one: Objective, program: Program, traced: TracedLogWeights) -> None:
    x = program.initial()
    for left, right in zip(
        gradients(Calculus(program, one, traced, 1.0), x, 4),
        gradients(Calculus(program, ELBO(), traced, 1.0), x, 4),
        strict=True,
    ):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_doubly_reparameterised_one_draw_sticks_the_landing(program: Program, traced: TracedLogWeights) -> None:
    x = program.initial()
    doubly, _ = gradients(Calculus(program, IWAE(1, DOUBLY), traced, 1.0), x, 4)
    sticking, _ = gradients(Calculus(program, ELBO(1, STICKING), traced, 1.0), x, 4)
    torch.testing.assert_close(doubly, sticking, rtol=1e-12, atol=1e-12)


def test_alpha_runs_from_the_iwae_to_the_elbo() -> None:
    log_w = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(VRIWAE(7, 0.0).bound(log_w), IWAE(7).bound(log_w))
    torch.testing.assert_close(VRIWAE(7, 1 - 1e-9).bound(log_w), ELBO(7).bound(log_w), rtol=0, atol=1e-6)
    bounds = torch.stack([VRIWAE(7, alpha).bound(log_w) for alpha in (0.0, 0.2, 0.5, 0.9)])
    assert (bounds.diff(dim=0) < 0).all()
    elbo, iwae = ELBO(7).bound(log_w), IWAE(7).bound(log_w)
    torch.testing.assert_close(CIWAE(7, 0.25).bound(log_w), 0.25 * elbo + 0.75 * iwae)
    torch.testing.assert_close(MIWAE(1, 7).bound(log_w), iwae)
    torch.testing.assert_close(MIWAE(7, 1).bound(log_w), elbo)


def test_bounds_rise_with_draws_and_stay_below_the_evidence(program: Program, traced: TracedLogWeights) -> None:
    x, evidence = program.initial(), log_evidence(X, MU)
    means, errors = [], []
    for count in (1, 4, 16, 64):
        _, losses = gradients(Calculus(program, IWAE(count), traced, 1.0), x, 4000)
        means.append(-losses.mean())
        errors.append(losses.std() / len(losses) ** 0.5)
    for low, high, a, b in zip(means, means[1:], errors, errors[1:], strict=False):
        assert high - low > 4 * (a**2 + b**2).sqrt()
    assert means[-1] < evidence + 4 * errors[-1]
    assert evidence - means[-1] < 0.1  # at K = 64 hardly anything is left
    assert evidence - means[0] > 10 * errors[0]  # power: there was something to gain


@pytest.mark.parametrize("name", ALL)
def test_at_the_posterior_every_bound_is_the_evidence(name: str, program: Program, traced: TracedLogWeights) -> None:
    objective = ALL[name]
    if objective.kl_weight != 1.0:
        pytest.skip("a weighted KL term is another objective")
    x = at_posterior(program)
    grads, losses = gradients(Calculus(program, objective, traced, 1.0), x, 8)
    torch.testing.assert_close(-losses, log_evidence(X, MU).expand_as(losses), rtol=1e-12, atol=1e-11)
    if objective.estimator != "pathwise":
        assert grads[:, program.groups["phi"]].abs().max() < 1e-12  # no variance at all


def test_elbo_gradient_has_its_closed_form(program: Program, traced: TracedLogWeights) -> None:
    def exact(x: Tensor) -> Tensor:
        values = dict(zip([leaf.name for leaf in program.leaves], torch.split(x, program.sizes), strict=True))
        loc = values["slope"] * X + values["shift"]
        scale = values["log_scale"].exp()
        prior = dist.Normal(values["mu"], 1.0)
        kl = torch.distributions.kl_divergence(dist.Normal(loc, scale.expand_as(loc)), prior.expand(loc.shape)).sum()
        likelihood = (dist.Normal(loc, 1.0).log_prob(X) - scale**2 / 2).sum()
        return kl - likelihood

    x = program.initial().requires_grad_()
    (expected,) = torch.autograd.grad(exact(x), x)
    for member in (ELBO(1), ELBO(4, STICKING)):
        grads, _ = gradients(Calculus(program, member, traced, 1.0), x.detach(), 20_000)
        error = (grads.var(0) / len(grads)).sqrt()
        assert (error < 0.1 * expected.abs().max()).all()
        assert ((grads.mean(0) - expected).abs() < 4.5 * error + 1e-10).all()


def test_theta_gradient_tends_to_that_of_the_evidence(program: Program, traced: TracedLogWeights) -> None:
    mu = MU.clone().requires_grad_()
    (expected,) = torch.autograd.grad(-log_evidence(X, mu), mu)
    grads, _ = gradients(Calculus(program, IWAE(256), traced, 1.0), program.initial(), 1500)
    theta = grads[:, program.groups["theta"]]
    error = (theta.var(0) / len(theta)).sqrt()
    assert ((theta.mean(0) - expected).abs() < 4.5 * error + 0.01 * expected.abs()).all()


@pytest.mark.parametrize("name", ["elbo", "iwae", "vr-iwae", "miwae", "ciwae", "piwae", "iwae, detached"])
def test_the_expectation_does_not_depend_on_the_batch_size(
    name: str, traced: TracedLogWeights, program: Program
) -> None:
    x = program.initial()
    full, losses = gradients(Calculus(program, ALL[name], traced, 1.0), x, 20_000)
    for size in (1, 3):
        part = build(model, guide, (X,), minibatch=Minibatch(size, plate="data"), dtype=torch.float64)
        calculus = Calculus(part, ALL[name], TracedLogWeights(part), 1.0)
        grads, batch_losses = gradients(calculus, x, 20_000, key=size)
        assert worst_z(batch_losses[:, None], losses[:, None]) < 4.5
        assert worst_z(grads, full) < 4.5


@pytest.mark.parametrize("name", ALL)
def test_huge_weights_stay_finite(name: str) -> None:
    member = ALL[name]
    log_w = torch.linspace(-400, 400, member.draws, dtype=torch.float32).unsqueeze(-1).repeat(1, 2).requires_grad_()
    value = member.bound(log_w).sum()
    (grad,) = torch.autograd.grad(value, log_w)
    pieces = [value, grad, *member.weights(log_w.detach()), learning_signals(member.bound, log_w.detach())]
    assert all(torch.isfinite(piece).all() for piece in pieces)


# ---- sites without a pathwise gradient ----


def switch_model(x: Tensor) -> None:
    rate = pyro.param("rate", torch.tensor(0.3, dtype=torch.float64))
    with pyro.plate("data", len(x)):
        s = pyro.sample("s", dist.Bernoulli(torch.full((len(x),), 0.4, dtype=torch.float64)))
        pyro.sample("x", dist.Normal(rate + 1.5 * s, 1.0).to_event(0), obs=x)


def switch_guide(x: Tensor) -> None:
    logit = pyro.param("logit", torch.tensor([0.2, -0.7, 0.4], dtype=torch.float64))
    with pyro.plate("data", len(x)):
        pyro.sample("s", dist.Bernoulli(logits=logit))


SWITCH = torch.tensor([0.4, 1.9, -0.3], dtype=torch.float64)


def enumerated(objective: Objective, program: Program) -> Tensor:
    """Exact gradient of the expected loss by summing over all configurations of one unit at a time."""
    x = program.initial().requires_grad_()
    values = dict(zip([leaf.name for leaf in program.leaves], torch.split(x, program.sizes), strict=True))
    total = x.sum() * 0
    for n in range(len(SWITCH)):
        q = dist.Bernoulli(logits=values["logit"][n])
        states = torch.tensor([0.0, 1.0], dtype=torch.float64)
        log_q = q.log_prob(states)
        log_p = dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)).log_prob(states)
        log_p = log_p + dist.Normal(values["rate"] + 1.5 * states, 1.0).log_prob(SWITCH[n])
        log_w = log_p - log_q
        for picks in itertools.product((0, 1), repeat=objective.draws):
            pick = torch.tensor(picks)
            total = total + log_q[pick].sum().exp() * objective.bound(log_w[pick].unsqueeze(-1)).sum()
    (grad,) = torch.autograd.grad(-total, x)
    return grad


@pytest.mark.parametrize(
    "member", [ELBO(1), ELBO(3), ELBO(3, STICKING), IWAE(3), VRIWAE(3, 0.5), MIWAE(2, 2), CIWAE(3)]
)
def test_score_function_is_unbiased_against_enumeration(member: Objective) -> None:
    program = build(switch_model, switch_guide, (SWITCH,))
    expected = enumerated(member, program)
    grads, _ = gradients(Calculus(program, member, TracedLogWeights(program), 1.0), program.initial(), 40_000)
    error = (grads.var(0) / len(grads)).sqrt()
    assert (expected.abs() > 6 * error).any()
    assert ((grads.mean(0) - expected).abs() < 4.5 * error + 1e-10).all()


def test_leave_one_out_baseline_takes_noise_away() -> None:
    log_w = 50 + torch.randn(4000, 6, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bound = IWAE(6).bound
    signals = torch.vmap(lambda w: learning_signals(bound, w))(log_w)
    assert signals.abs().mean() < 1 < torch.vmap(bound)(log_w).abs().mean() / 20


def mixed_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        s = pyro.sample("s", dist.Bernoulli(torch.full((len(x),), 0.4, dtype=torch.float64)))
        z = pyro.sample("z", dist.Normal(1.5 * s, 1.0))
        pyro.sample("x", dist.Normal(z, 0.7), obs=x)


def mixed_guide(x: Tensor) -> None:
    logit = pyro.param("logit", torch.tensor(0.1, dtype=torch.float64))
    loc = pyro.param("loc", torch.tensor([0.2, 0.8], dtype=torch.float64))
    with pyro.plate("data", len(x)):
        s = pyro.sample("s", dist.Bernoulli(logits=logit.expand(len(x))))
        pyro.sample("z", dist.Normal(loc[0] + loc[1] * s + 0.3 * x, 0.8))


def test_mixed_sites_are_unbiased() -> None:
    """ELBO of a switch and a Gaussian: exact by summing the switch and integrating the Gaussian in closed form."""
    program = build(mixed_model, mixed_guide, (SWITCH,))
    x = program.initial().requires_grad_()
    values = dict(zip([leaf.name for leaf in program.leaves], torch.split(x, program.sizes), strict=True))
    total = x.sum() * 0
    for s in (0.0, 1.0):
        q, p = dist.Bernoulli(logits=values["logit"]), dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64))
        state = torch.tensor(s, dtype=torch.float64)
        loc, scale = values["loc"][0] + values["loc"][1] * s + 0.3 * SWITCH, torch.tensor(0.8, dtype=torch.float64)
        kl = torch.distributions.kl_divergence(
            dist.Normal(loc, scale.expand(3)), dist.Normal(torch.full((3,), 1.5 * s).double(), 1.0)
        )
        likelihood = dist.Normal(loc, 0.7).log_prob(SWITCH) - scale**2 / (2 * 0.7**2)
        inner = likelihood - kl + p.log_prob(state) - q.log_prob(state)
        total = total + (q.log_prob(state).exp() * inner).sum()
    (expected,) = torch.autograd.grad(-total, x)
    for member in (ELBO(3), ELBO(3, STICKING)):
        grads, _ = gradients(Calculus(program, member, TracedLogWeights(program), 1.0), x.detach(), 40_000)
        error = (grads.var(0) / len(grads)).sqrt()
        assert ((grads.mean(0) - expected).abs() < 4.5 * error).all()


# ---- what is refused ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IWAE(0), "num_particles must be at least 1"),
        (lambda: IWAE(3, STICKING), "unknown estimator"),
        (lambda: ELBO(3, DOUBLY), "unknown estimator"),
        (lambda: VRIWAE(3, 1.0), "alpha must lie in"),
        (lambda: CIWAE(3, 1.5), "elbo_weight must lie in"),
        (lambda: MIWAE(0, 3), "num_groups must be at least 1"),
        (lambda: ELBO(1, STICKING, analytic_kl=True), "analytic KL"),
    ],
)
def test_invalid_cells_are_refused_at_construction(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_invalid_cells_are_refused_by_name(program: Program) -> None:
    discrete = build(switch_model, switch_guide, (SWITCH,))
    with pytest.raises(ValueError, match="site 's' has no pathwise gradient"):
        IWAE(3, DOUBLY).validate(discrete)

    def shared_guide(x: Tensor) -> None:
        mu = pyro.param("mu", MU.clone())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mu + 0 * x, 1.0).to_event(1))

    shared = build(model, shared_guide, (X,))
    for member in (IWAE(3, DOUBLY), PIWAE(2, 2)):
        with pytest.raises(ValueError, match="parameter 'mu'"):
            member.validate(shared)
    ELBO(1, STICKING).validate(shared)

    def global_model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def global_guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.1)), 1.0))

    part = build(global_model, global_guide, (X,), minibatch=Minibatch(2, plate="data"))
    for member in (IWAE(3), VRIWAE(3, 0.5), MIWAE(2, 2), CIWAE(3), IWAE(3, DOUBLY)):
        with pytest.raises(ValueError, match="no unbiased estimator when plate 'data' is subsampled"):
            member.validate(part)
    for member in (ELBO(3), IWAE(1)):
        member.validate(part)


# ---- analytic KL ----


def test_analytic_kl_keeps_the_expectation_and_loses_noise(program: Program, traced: TracedLogWeights) -> None:
    import copy

    from bbvi_conv.program.closed_form import closed_form_sites

    exact = copy.copy(program)
    exact.analytic = closed_form_sites(exact)
    assert exact.analytic == ("z",)
    x = program.initial()
    sampled, _ = gradients(Calculus(program, ELBO(), traced, 1.0), x, 20_000, key=1)
    closed, _ = gradients(Calculus(exact, ELBO(analytic_kl=True), TracedLogWeights(exact), 1.0), x, 20_000, key=2)
    assert worst_z(sampled, closed) < 4.5
    assert closed.var(0).sum() < 0.7 * sampled.var(0).sum()


def test_analytic_kl_is_refused_where_it_is_not_proved() -> None:
    from bbvi_conv.program.closed_form import closed_form_sites

    with pytest.raises(ValueError, match="no site has an analytic KL"):
        closed_form_sites(build(lambda x: mixed_chain(x), lambda x: mixed_chain_guide(x), (X[:, 0],)))


def mixed_chain(x: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    z = pyro.sample("z", dist.Normal(0.0, scale))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def mixed_chain_guide(x: Tensor) -> None:
    pyro.sample("scale", dist.Gamma(pyro.param("a", torch.tensor(2.0)), 1.0))  # no closed form against a LogNormal
    pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))


def test_every_member_has_a_quieter_and_a_plain_form() -> None:
    for member in ALL.values():
        assert member.quietest().draws == member.draws
        assert member.plain().estimator == "pathwise"
        assert member.single().draws <= member.draws
    assert replace(IWAE(5), num_particles=7).draws == 7
