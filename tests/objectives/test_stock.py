"""Objectives inside loops that are not ours: a stock ``pyro.infer.SVI``, and plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

import bbvi_conv as bc
from bbvi_conv.engine import Calculus
from bbvi_conv.engine.streams import Feed
from bbvi_conv.objectives import CIWAE, ELBO, IWAE, MIWAE, PIWAE, VRIWAE, LinearWarmup, Objective, Pair
from bbvi_conv.program.build import build
from bbvi_conv.program.noise import Noise
from bbvi_conv.program.trace import TracedLogWeights

DOUBLY, STICKING = "doubly-reparameterised", "sticking-the-landing"
TABLE: dict[str, Objective] = {
    "elbo": ELBO(3),
    "elbo, sticking": ELBO(3, STICKING),
    "beta-elbo": ELBO(3, kl_weight=0.5),
    "iwae": IWAE(4),
    "iwae, doubly": IWAE(4, DOUBLY),
    "vr-iwae": VRIWAE(4, 0.3),
    "vr-iwae, doubly": VRIWAE(4, 0.3, DOUBLY),
    "miwae": MIWAE(2, 3),
    "miwae, doubly": MIWAE(2, 3, DOUBLY),
    "ciwae": CIWAE(4, 0.4),
    "ciwae, doubly": CIWAE(4, 0.4, DOUBLY),
    "piwae": PIWAE(2, 2),
    "piwae, doubly": PIWAE(2, 2, DOUBLY),
    "pair": Pair(IWAE(4), ELBO(2, STICKING)),
}
EVERY = pytest.mark.parametrize("name", TABLE)
N = 6
X = torch.randn(N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.fixture(autouse=True)
def store() -> Iterator[Any]:
    """A store and a random state of the test's own."""
    with pyro.get_param_store().scope() as scoped, torch.random.fork_rng():
        yield scoped


def gradients_in_the_store() -> dict[str, Tensor]:
    """Gradients that a loss left in the unconstrained parameters, taken away."""
    leaves = pyro.get_param_store().get_state()["params"]
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    return grads


class Pairwise:
    """z ~ N(mu, 1), x ~ N(z, 1) over a plate that subsamples ``size`` of its rows; remembers what its guide drew."""

    def __init__(self, size: int = N, switch: bool = False) -> None:
        self.size, self.switch = size, switch
        self.draws: list[tuple[Tensor, Tensor]] = []

    def plate(self, x: Tensor) -> Any:
        return pyro.plate("data", len(x), subsample_size=self.size if self.size < len(x) else None)

    def prior(self) -> Any:
        mu = pyro.param("mu", torch.tensor(0.3, dtype=torch.float64))
        return dist.Bernoulli(torch.sigmoid(mu)) if self.switch else dist.Normal(mu, 1.0)

    def posterior(self, x: Tensor) -> Any:
        slope = pyro.param("slope", torch.tensor(0.3, dtype=torch.float64))
        shift = pyro.param("shift", torch.tensor(-0.2, dtype=torch.float64))
        if self.switch:
            return dist.Bernoulli(logits=slope * x + shift)
        scale = pyro.param("scale", torch.tensor(0.9, dtype=torch.float64), constraint=dist.constraints.positive)
        return dist.Normal(slope * x + shift, scale)

    def model(self, x: Tensor) -> None:
        prior = self.prior()
        with self.plate(x) as rows:
            z = pyro.sample("z", prior.expand([len(rows)]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(self, x: Tensor) -> None:
        with self.plate(x) as rows:
            z = pyro.sample("z", self.posterior(x[rows]))
        self.draws.append((rows.clone(), z.detach()))

    def bound(self, objective: Objective, x: Tensor) -> Tensor:
        """Negative loss at the draws remembered, by the formula."""
        rows = self.draws[0][0]
        z = torch.stack([value for _, value in self.draws[: objective.draws]])
        log_prior, log_q = self.prior().log_prob(z), self.posterior(x[rows]).log_prob(z)
        beta = float(objective.kl_weight)  # type: ignore[arg-type]
        log_w = dist.Normal(z, 1.0).log_prob(x[rows]) + beta * (log_prior - log_q)
        total: Tensor = len(x) / len(rows) * objective.bound(log_w).sum()
        return total


@EVERY
@pytest.mark.parametrize("size", [N, 2], ids=["all rows", "2 of 6"])
def test_the_loss_is_the_bound_of_its_draws_whatever_the_scale(name: str, size: int) -> None:
    """N/B multiplies the bound of each unit from outside, and all K draws see the same rows."""
    pair, objective = Pairwise(size), TABLE[name]
    pyro.set_rng_seed(1)
    value = objective.differentiable_loss(pair.model, pair.guide, X)
    rows = [drawn for drawn, _ in pair.draws]
    assert all(torch.equal(drawn, rows[0]) for drawn in rows)
    torch.testing.assert_close(value, -pair.bound(objective, X), rtol=1e-12, atol=1e-12)
    pair.draws.clear()
    pyro.set_rng_seed(1)
    assert objective.loss(pair.model, pair.guide, X) == pytest.approx(float(value.detach()), rel=1e-12)


@EVERY
@pytest.mark.parametrize("switch", [False, True], ids=["gaussian", "bernoulli"])
def test_the_gradient_is_that_of_our_own_engine_on_the_same_draws(name: str, switch: bool) -> None:
    """One law for both worlds: the noise that the stock draws came from, put on the tape, gives the same gradient."""
    pair, objective = Pairwise(switch=switch), TABLE[name]
    program = build(pair.model, pair.guide, (X,), dtype=torch.float64)
    if switch and objective.estimator == DOUBLY:
        for refused in (
            lambda: objective.loss_and_grads(pair.model, pair.guide, X),
            lambda: objective.validate(program),
        ):
            with pytest.raises(ValueError, match="site 'z' has no pathwise gradient"):
                refused()
        return
    pair.draws.clear()
    pyro.set_rng_seed(2)
    loss = objective.loss_and_grads(pair.model, pair.guide, X)
    stock = gradients_in_the_store()
    z = torch.stack([value for _, value in pair.draws[: objective.draws]])
    q = pair.posterior(X)
    none = torch.zeros(1, objective.draws, 0, dtype=torch.float64)
    if switch:  # any uniform on the right side of the threshold
        noise = Noise(none, torch.where(z == 1, q.probs / 2, (1 + q.probs) / 2).detach().unsqueeze(0))
    else:
        noise = Noise(((z - q.loc) / q.scale).detach().unsqueeze(0), none)
    ours, losses = Calculus(program, objective, program.log_weights, 1.0).gradients(program.initial(), Feed(noise))
    assert loss == pytest.approx(float(losses[0]), rel=1e-12)
    flat = torch.cat([stock[leaf.name].reshape(-1) for leaf in program.leaves])
    torch.testing.assert_close(flat, ours[0], rtol=1e-9, atol=1e-11)
    assert ours[0].abs().min() > 1e-3  # power: every parameter moves


@pytest.mark.parametrize("name", ["iwae, doubly", "piwae"])
def test_minibatch_gradients_average_to_those_of_all_rows(name: str) -> None:
    """Fresh draws and fresh rows, against many evaluations of our own engine on all rows."""
    pair, objective = Pairwise(3), TABLE[name]
    whole = Pairwise()
    program = build(whole.model, whole.guide, (X,), dtype=torch.float64)
    full = Noise(
        torch.randn(4000, objective.draws, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        torch.zeros(4000, objective.draws, 0, dtype=torch.float64),
    )
    ours, _ = Calculus(program, objective, TracedLogWeights(program), 1.0).gradients(program.initial(), Feed(full))
    pyro.set_rng_seed(3)
    rows = []
    for _ in range(300):
        objective.loss_and_grads(pair.model, pair.guide, X)
        grads = gradients_in_the_store()
        rows.append(torch.cat([grads[leaf.name].reshape(-1) for leaf in program.leaves]))
    stock = torch.stack(rows)
    error = (stock.var(0) / len(stock) + ours.var(0) / len(ours)).sqrt()
    assert ((stock.mean(0) - ours.mean(0)).abs() < 4.5 * error).all()
    assert (ours.mean(0).abs() > 9 * error).any()  # power: without N/B it would be halved


@EVERY
def test_every_step_uses_the_generator_alike(name: str) -> None:
    """What is found out about the model at the first step costs no random number, so a loop repeats from any step."""
    pair, objective = Pairwise(3), TABLE[name]
    states, losses = [], []
    for _ in range(3):
        pyro.set_rng_seed(4)
        losses.append(objective.loss_and_grads(pair.model, pair.guide, X))
        states.append(torch.random.get_rng_state())
    assert losses[0] == losses[1] == losses[2]
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


@pytest.mark.parametrize("name", ["iwae, doubly", "piwae"])
def test_a_stock_loop_reaches_the_posterior(name: str) -> None:
    """The guide contains the posterior N((x + mu)/2, 1/2), and mu has its optimum at the mean of the data."""
    pair = Pairwise(3)
    pyro.set_rng_seed(5)
    svi = SVI(pair.model, pair.guide, pyro.optim.ClippedAdam({"lr": 0.08, "lrd": 0.98}), loss=TABLE[name])
    for _ in range(250):
        svi.step(X)
    found = {key: float(pyro.param(key).detach()) for key in ("mu", "slope", "shift", "scale")}
    mean = float(X.mean())
    exact = {"mu": mean, "slope": 0.5, "shift": mean / 2, "scale": 0.5**0.5}
    for key, value in exact.items():
        assert found[key] == pytest.approx(value, abs=0.15), key


# ---- forms a model and guide come in ----


class Decoder(PyroModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 3)
        self.noise = PyroParam(torch.tensor(0.7), constraint=dist.constraints.positive)

    def forward(self, x: Tensor) -> None:
        pyro.module("decoder", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), self.noise).to_event(1), obs=x)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> None:
        pyro.module("encoder", self)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.net(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@pytest.mark.parametrize("name", ["elbo, sticking", "iwae", "iwae, doubly", "piwae, doubly"])
def test_modules_in_a_plain_torch_loop(name: str) -> None:
    pyro.set_rng_seed(6)
    model, guide, data = Decoder(), Encoder(), torch.randn(20, 3)
    loss = TABLE[name](model, guide)
    loss(data)
    assert {n.split(".")[0] for n, _ in loss.named_parameters()} == {"model", "guide"}
    optimiser = torch.optim.Adam(loss.parameters(), lr=0.02)
    values = []
    for _ in range(120):
        optimiser.zero_grad()
        value = loss(data)
        value.backward()
        assert all(p.grad is not None for p in loss.parameters())
        optimiser.step()
        values.append(float(value.detach()))
    assert sum(values[-20:]) < sum(values[:20]) - 20.0


def test_autoguides() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    x = 1.0 + torch.randn(40, generator=torch.Generator().manual_seed(0))
    for objective in (ELBO(2, STICKING), IWAE(4, DOUBLY), VRIWAE(4, 0.5)):
        pyro.clear_param_store()
        pyro.set_rng_seed(7)
        guide = AutoNormal(model)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=objective)
        for _ in range(150):
            svi.step(x)
        error = float(x.std()) / len(x) ** 0.5
        assert float(guide.median()["loc"]) == pytest.approx(float(x.mean()), abs=3 * error)


def test_bound_methods_and_lambdas_find_the_same_units() -> None:
    """They cannot be remembered from step to step, and are analysed anew; the loss is the same."""
    pair, objective = Pairwise(2), IWAE(3)

    def model(x: Tensor) -> None:
        pair.model(x)

    def guide(x: Tensor) -> None:
        pair.guide(x)

    values = []
    for forms in ((model, guide), (pair.model, pair.guide), (lambda x: pair.model(x), lambda x: pair.guide(x))):
        for _ in range(2):
            pyro.set_rng_seed(8)
            values.append(objective.loss(*forms, X))
    assert len(set(values)) == 1


def test_one_guide_beside_two_models() -> None:
    """What is remembered of a guide belongs to one model."""
    pair = Pairwise()

    def guide(x: Tensor) -> None:
        pair.guide(x)

    def apart(x: Tensor) -> None:  # its likelihood lies outside the plate: one unit
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    for _ in range(2):
        for model, summed in ((pair.model, False), (apart, True)):
            pair.draws.clear()
            pyro.set_rng_seed(9)
            value = -IWAE(3).loss(model, guide, X)
            z = torch.stack([v for _, v in pair.draws])
            prior = dist.Normal(0.0 if summed else 0.3, 1.0)
            log_w = prior.log_prob(z) + dist.Normal(z, 1.0).log_prob(X) - pair.posterior(X).log_prob(z)
            log_w = log_w.sum(-1, keepdim=True) if summed else log_w
            assert value == pytest.approx(float(IWAE(3).bound(log_w).sum().detach()), rel=1e-9)


# ---- what is refused ----


def global_model(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=2) as rows:
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])


def global_guide(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.8))


@pytest.mark.parametrize("name", TABLE)
def test_a_global_latent_beside_a_subsampled_plate(name: str) -> None:
    objective = TABLE[name]
    if objective.linear:
        assert math.isfinite(objective.loss_and_grads(global_model, global_guide, X))
        return
    with pytest.raises(ValueError, match=r"no unbiased estimator when plate 'data' is subsampled .* use the ELBO"):
        objective.loss_and_grads(global_model, global_guide, X)


def test_rows_stay_put_while_a_global_latent_is_evaluated_again() -> None:
    """The rows are the model's own draw here; the copies of an estimator must see the same ones."""
    seen: list[Tensor] = []

    def model(x: Tensor) -> None:
        theta = pyro.param("theta", torch.tensor(0.5, dtype=torch.float64))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            seen.append(rows.clone())
            pyro.sample("x", dist.Normal(z + theta, 1.0), obs=x[rows])

    pyro.set_rng_seed(10)
    ELBO(3, STICKING).loss_and_grads(model, global_guide, X)
    assert len(seen) > 3
    assert all(torch.equal(rows, seen[0]) for rows in seen)


def test_what_a_stock_loop_cannot_have() -> None:
    pair = Pairwise()
    with pytest.raises(ValueError, match="schedule of kl_weight needs the step number"):
        ELBO(kl_weight=LinearWarmup(10)).loss(pair.model, pair.guide, X)
    with pytest.raises(ValueError, match=r"analytic_kl needs bbvi_conv\.fit"):
        ELBO(analytic_kl=True).loss(pair.model, pair.guide, X)

    def shared(x: Tensor) -> None:
        mu = pyro.param("mu", torch.tensor(0.3, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mu, 1.0).expand([len(x)]))

    for objective in (IWAE(3, DOUBLY), PIWAE(2, 2)):
        with pytest.raises(ValueError, match="'mu'"):
            objective.loss(pair.model, shared, X)
    assert math.isfinite(IWAE(3).loss(pair.model, shared, X))


# ---- why this exists: what pyro.infer.RenyiELBO does instead ----


def test_a_minibatched_renyi_elbo_is_no_bound() -> None:
    r"""Pyro multiplies log-weights by N/B *before* the log-mean-exp: ours does it after.

    With z_n ~ N(0, 1), x_n ~ N(z_n, 1) the evidence is known. Pyro's figure for a minibatch estimates
    :math:`\sum_n \log E\, w_n^{N/B}` instead of :math:`\sum_n \log E\, w_n`, and passes the evidence by many nats.
    """
    x = 3.0 + X

    def model(x: Tensor, size: int | None) -> None:
        with pyro.plate("data", len(x), subsample_size=size) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(len(rows), dtype=torch.float64), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x: Tensor, size: int | None) -> None:
        with pyro.plate("data", len(x), subsample_size=size) as rows:
            pyro.sample("z", dist.Normal(0.35 * x[rows], 1.0))

    evidence = float(dist.Normal(0.0, 2**0.5).log_prob(x).sum())

    def estimate(loss: Any, size: int | None) -> tuple[float, float]:
        pyro.set_rng_seed(11)
        bounds = -torch.tensor([loss.loss(model, guide, x, size) for _ in range(200)], dtype=torch.float64)
        return float(bounds.mean()), float(bounds.std()) / len(bounds) ** 0.5

    (ours, error), (ours_part, error_part) = estimate(bc.IWAE(6), None), estimate(bc.IWAE(6), 1)
    theirs, _ = estimate(RenyiELBO(alpha=0, num_particles=6), None)
    theirs_part, their_error_part = estimate(RenyiELBO(alpha=0, num_particles=6), 1)
    assert ours == pytest.approx(theirs, rel=1e-12)  # on all rows they are the same bound of the same draws
    assert abs(ours - ours_part) < 4.5 * math.hypot(error, error_part)  # ours stays the same for one row of six
    assert ours < evidence + 4.5 * error
    assert error_part < 1.5
    assert theirs_part > evidence + 4.5 * their_error_part  # theirs is above the evidence: no bound at all


def test_a_renyi_elbo_gives_score_function_sites_no_gradient() -> None:
    """At alpha = 0 Pyro drops the score function term: the guide of a discrete latent never learns; ours is exact."""
    pair, free = Pairwise(switch=True), {}
    for key, value in (("mu", 0.3), ("slope", 0.3), ("shift", -0.2)):
        free[key] = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for x in X:  # K = 2: sum over the four pairs of states of one unit
        states = torch.tensor([0.0, 1.0], dtype=torch.float64)
        log_q = dist.Bernoulli(logits=free["slope"] * x + free["shift"]).log_prob(states)
        log_p = dist.Bernoulli(logits=free["mu"]).log_prob(states) + dist.Normal(states, 1.0).log_prob(x)
        log_w = log_p - log_q
        for first in (0, 1):
            for second in (0, 1):
                pick = torch.tensor([first, second])
                total = total + log_q[pick].sum().exp() * IWAE(2).bound(log_w[pick].unsqueeze(-1)).sum()
    exact = dict(zip(free, torch.autograd.grad(-total, list(free.values())), strict=True))

    def gradients(loss: Any, count: int) -> dict[str, Tensor]:
        pyro.set_rng_seed(12)
        rows = []
        for _ in range(count):
            loss.loss_and_grads(pair.model, pair.guide, X)
            rows.append(gradients_in_the_store())
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    z_from_zero = []
    for key, draws in gradients(bc.IWAE(2), 600).items():
        error = float(draws.std()) / len(draws) ** 0.5
        assert abs(float(draws.mean() - exact[key])) < 4.5 * error
        z_from_zero.append(abs(float(exact[key])) / error)
    assert max(z_from_zero) > 8  # power: it is not zero
    theirs = gradients(RenyiELBO(alpha=0, num_particles=2), 20)
    assert theirs["slope"].abs().max() == 0
    assert theirs["shift"].abs().max() == 0
    assert theirs["mu"].abs().max() > 0
