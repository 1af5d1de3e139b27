"""Known forms are proved, counterexamples are real, and what is neither is not known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian

import bbvi_conv as bc
from bbvi_conv.theory.log_concave import probe, unknown_form
from bbvi_conv.theory.target import Target

X = torch.linspace(-1, 2, 6, dtype=torch.float64)
COUNTS = torch.tensor([0.0, 1, 3, 2, 5, 1], dtype=torch.float64)
BINARY = torch.tensor([0.0, 1, 1, 0, 1, 1], dtype=torch.float64)


def regression(likelihood: Callable[[Tensor], Any], y: Tensor = X) -> Callable[[], None]:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        b = pyro.sample("b", dist.Laplace(a, 1.0))
        with pyro.plate("n", len(X)):
            pyro.sample("y", likelihood(a + b * X), obs=y)

    return model


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    pyro.sample("z", dist.Normal(torch.zeros(3, dtype=torch.float64), (v / 2).exp()).to_event(1))


def rates() -> None:
    with pyro.plate("p", 6):
        rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
        pyro.sample("more", dist.HalfCauchy(1.0))
        pyro.sample("y", dist.Poisson(rate), obs=COUNTS)


def quartic() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    pyro.factor("steep", -(z**4).sum())


def target(model: Callable[[], None]) -> Target:
    program = bc.build(model, family=bc.MeanField())
    return Target(program, program.initial())


CONCAVE: dict[str, Callable[[], None]] = {
    "normal": regression(lambda f: dist.Normal(f, 0.5)),
    "logistic": regression(lambda f: dist.Bernoulli(logits=f), BINARY),
    "binomial": regression(lambda f: dist.Binomial(5, logits=f), COUNTS),
    "poisson": regression(lambda f: dist.Poisson(f.exp()), COUNTS),
    "categorical": regression(lambda f: dist.Categorical(logits=torch.stack([f, -f, 0 * f], -1)), BINARY),
    "negative binomial": regression(lambda f: dist.NegativeBinomial(3.0, logits=f), COUNTS),
    "gamma": regression(lambda f: dist.Gamma(2.0, f.exp()), COUNTS + 1),
    "masked": regression(lambda f: dist.Normal(f, 0.5).mask(BINARY.bool())),
}

REFUTED: dict[str, Callable[[], None]] = {
    "funnel": funnel,
    "student-t": regression(lambda f: dist.StudentT(2.0, f, 0.1), X**2),
    "curved mean": regression(lambda f: dist.Normal(f.square(), 0.3)),
    "scale that depends": regression(lambda f: dist.Normal(0.0, f.abs() + 0.1)),
}


@pytest.mark.parametrize("name", CONCAVE)
def test_known_forms_are_proved_and_no_curvature_contradicts(name: str) -> None:
    found = target(CONCAVE[name])
    assert unknown_form(found) == ""
    points = 3 * torch.randn(40, found.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert probe(found, list(points)).witness == ""


def test_positive_latents_are_known_by_their_logarithm() -> None:
    def model() -> None:
        with pyro.plate("p", 6):
            pyro.sample("rate", dist.Gamma(2.0, 0.5))
            pyro.sample("more", dist.HalfCauchy(1.0))
            pyro.sample("wide", dist.InverseGamma(2.0, 1.0))

    found = target(model)
    assert unknown_form(found) == ""
    points = 2 * torch.randn(40, found.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert probe(found, list(points)).witness == ""
    assert unknown_form(target(rates)) == ""  # the logarithm of a Poisson rate is that unconstrained latent itself

    def located() -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
        pyro.sample("y", dist.Normal(rate, 1.0), obs=torch.tensor(1.0, dtype=torch.float64))

    assert "of site 'y' (Normal) is not affine in the latents" in unknown_form(target(located))


@pytest.mark.parametrize("name", REFUTED)
def test_counterexamples_are_found_from_a_fits_start(name: str) -> None:
    found = bc.assumptions(REFUTED[name], bc.MeanField(), bc.Adam(), log_concave=True)
    (condition,) = (c for c in found.conditions if c.name == "log-concave target")
    assert condition.status == "fails"
    assert "second derivative +" in condition.why
    assert unknown_form(target(REFUTED[name])) != ""


def test_what_is_neither_known_nor_refuted_is_unknown_claimed_or_not() -> None:
    for claim, words in ((None, "; not contradicted"), (True, "; claimed, and not contradicted")):
        found = bc.assumptions(quartic, bc.FullRank(), bc.Adam(), log_concave=claim)
        (condition,) = (c for c in found.conditions if c.name == "log-concave target")
        assert condition.status == "unknown"
        assert words in condition.why
        assert "'steep'" in condition.why
    assert bc.assumptions(quartic, bc.FullRank(), bc.Adam(), log_concave=False).status("log-concave target") == "fails"


def by_hand(zeta: Tensor) -> Tensor:
    """``rates`` with both latents through the exponential."""
    rate, more = zeta[:6].exp(), zeta[6:].exp()
    gamma = 2 * math.log(0.5) + zeta[:6] - 0.5 * rate
    cauchy = math.log(2 / math.pi) - torch.log1p(more.square())
    poisson = COUNTS * zeta[:6] - rate - torch.lgamma(COUNTS + 1)
    return (gamma + cauchy + poisson).sum() + zeta.sum()


def test_the_target_is_the_density_on_the_unconstrained_space() -> None:
    found = target(rates)
    assert found.dim == 12
    zeta = torch.randn(12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(found(zeta), by_hand(zeta), rtol=1e-12, atol=1e-12)
    assert [found.coordinate(i) for i in (0, 5, 6)] == ["rate[0]", "rate[5]", "more[0]"]
    values = probe(found, [zeta])
    exact = torch.linalg.eigvalsh(hessian(by_hand, zeta))
    assert values.largest == pytest.approx(float(exact[-1]), rel=1e-9)
    assert values.smallest == pytest.approx(float(exact[0]), rel=1e-9)


def test_many_dimensions_are_probed_along_directions() -> None:
    weights = torch.linspace(-0.5, 3, 80, dtype=torch.float64)

    def saddle() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(80, dtype=torch.float64), 1.0).to_event(1))
        pyro.factor("bent", 0.5 * (weights * z.square()).sum())  # second derivatives weights - 1

    values = probe(target(saddle), [torch.zeros(80, dtype=torch.float64)])
    assert values.witness != ""
    assert -1.5 < values.smallest < values.largest < 2
