"""A program is what Pyro runs: parameters that are hidden from the tape, and noise that is, do not pass unseen."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.fx.graph_module import _loader
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import bbvi_conv as bc
from bbvi_conv.engine import Calculus
from bbvi_conv.families import MeanField
from bbvi_conv.objectives import ELBO, IWAE
from bbvi_conv.program import Program
from bbvi_conv.program.build import build
from bbvi_conv.program.trace import TracedLogWeights

X = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(4, 3)


def regression(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], None]:
    """The mean is a function of a parameter that is its own unconstrained leaf, and of the data."""

    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.tensor([0.3, 0.7, 1.1], dtype=x.dtype))
        c = pyro.sample("c", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(function(w, x) + c, 1.0), obs=x[:, 0])

    return model


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return w**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (w,) = ctx.saved_tensors
        return 2 * w * grad


FUNCTIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "vmap": (lambda w, x: x @ torch.func.vmap(lambda a: a**2)(w), True),
    "vmap over a dict": (lambda w, x: x @ torch.func.vmap(lambda d: d["w"] ** 2)({"w": w}), True),
    "grad": (lambda w, x: x @ torch.func.grad(lambda a: (a**3).sum())(w), True),
    "jacrev": (lambda w, x: x @ torch.func.jacrev(lambda a: a**2)(w).sum(0), True),
    "an autograd function": (lambda w, x: x @ Squared.apply(w), False),
}


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and in use
        made: nn.Module = torch.jit.script(nn.Linear(3, 1).double())
    return made


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_parameter_is_followed_into_functions_that_hide_it(agrees_with_pyro, name: str) -> None:
    function, traced = FUNCTIONS[name]
    program = build(regression(function), None, (X,), family=MeanField(), dtype=torch.float64)
    assert [leaf.name for leaf in program.leaves if leaf.group == "theta"] == ["w"]
    assert agrees_with_pyro(program, traced=traced) <= 1e-9


def test_a_hidden_parameter_is_trained() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.param("w", torch.ones(3, dtype=x.dtype))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 0.1))
            pyro.sample("y", dist.Normal(x @ torch.func.vmap(lambda a: a**2)(w) + z, 1.0), obs=y)

    fit = bc.fit(model, args=(x, x @ torch.tensor([4.0, 9.0, 1.0], dtype=x.dtype)), max_steps=2000, progress=False)
    torch.testing.assert_close(
        fit.constrained_params["w"].abs(), torch.tensor([2.0, 3.0, 1.0], dtype=x.dtype), rtol=0, atol=0.1
    )


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda w: x @ w)(self.w).mean(0)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return made.squeeze(-1)


def with_module(module: nn.Module) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        pyro.module("net", module)
        c = pyro.sample("c", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(module(x).reshape(len(x)) + c, 1.0), obs=x[:, 0])

    return model


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Ensemble, "w"),
        (Checkpointed, r"inner\.0\.weight"),
        (scripted, "weight"),
    ],
    ids=["vmap", "checkpoint", "scripted"],
)
def test_a_module_that_hides_its_parameters_is_refused(make: Callable[[], nn.Module], name: str) -> None:
    module = make()
    before = {key: value.detach().clone() for key, value in module.named_parameters()}
    with pytest.raises(ValueError, match=rf"parameter 'net\$\$\${name}' is handed to something that hides it.*1\.0 \*"):
        build(with_module(module), None, (X,), family=MeanField(), dtype=torch.float64)
    assert all(torch.equal(value, before[key]) for key, value in module.named_parameters())


def noisy(function: Callable[[Tensor], Tensor]) -> Program:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ function(z), 1.0), obs=x[:, 0])

    return build(model, None, (X,), family=MeanField(), dtype=torch.float64)


@pytest.mark.parametrize(
    "function",
    [
        lambda z: functional.gumbel_softmax(z),
        lambda z: functional.dropout1d(z.expand(2, 3), 0.5).sum(0),
    ],
    ids=["gumbel_softmax", "dropout1d"],
)
def test_noise_inside_functions_of_torch_follows_the_seed(function: Callable[[Tensor], Tensor], draw) -> None:
    program = noisy(function)
    assert program.untaped
    calculus = Calculus(program, ELBO(), program.log_weights, 1.0)
    feed = bc.engine.Stream(program, 0, "optimise", 1).once(0, 6)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(calculus.losses(program.initial(), feed))
    assert torch.equal(*found)
    assert len(found[0].unique()) == 6


def test_an_operation_without_a_backward_leaves_the_eager_engine() -> None:
    bag = nn.EmbeddingBag(5, 3, dtype=torch.float64)

    def model(x: Tensor) -> None:
        pyro.module("bag", bag)
        c = pyro.sample("c", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        mean = bag(torch.tensor([[0, 1], [1, 2], [2, 3], [4, 0]])).sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean + c, 1.0), obs=x[:, 0])

    fit = bc.fit(model, args=(X,), max_steps=5, progress=False, dtype=torch.float64)
    assert fit.engine_name == "eager"
    assert "cannot be traced" in fit.engine_reason


encoder = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()


def decoded(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2, dtype=x.dtype), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True) * torch.ones(3, dtype=x.dtype), 1.0).to_event(1), obs=x)


def encoded(x: Tensor) -> None:
    pyro.module("encoder", encoder)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(encoder(x), 0.1).to_event(1))


@pytest.mark.parametrize("objective", [ELBO(1, "sticking-the-landing"), IWAE(3, "doubly-reparameterised")])
def test_a_guide_with_noise_of_its_own_has_no_density_at_given_values(objective: Any) -> None:
    with pytest.raises(ValueError, match="the guide draws noise outside its sample sites"):
        bc.fit(decoded, encoded, args=(X,), objective=objective, max_steps=2, engine="eager", progress=False)
    with pyro.get_param_store().scope():
        assert ELBO(1).loss(decoded, encoded, X) > 0
        with pytest.raises(ValueError, match="the guide draws noise outside its sample sites"):
            objective.loss(decoded, encoded, X)


def test_the_text_of_graphs_is_let_go() -> None:
    program = build(regression(lambda w, x: x @ w), None, (X,), family=MeanField(), dtype=torch.float64)
    before = len(_loader.eval_cache)
    calculus = Calculus(program, ELBO(2), TracedLogWeights(program), 1.0)
    calculus.gradients(program.initial(), bc.engine.Stream(program, 0, "optimise", 2).once(0, 6))
    assert len(_loader.eval_cache) == before
