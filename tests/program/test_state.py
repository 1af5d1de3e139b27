"""Nothing global is touched: parameter store, random generators, default dtype, validation, modules, logging."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn

import bbvi_conv as bc
from bbvi_conv.engine import Calculus
from bbvi_conv.engine.streams import Feed
from bbvi_conv.families import MeanField
from bbvi_conv.objectives import ELBO
from bbvi_conv.program import Minibatch
from bbvi_conv.program.build import build
from bbvi_conv.program.trace import TracedLogWeights

X = torch.linspace(-1, 1, 12)


class Pair:
    """A VAE in small, with a buffer that changes and one that does not."""

    def __init__(self, norm: bool = False) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            middle = nn.BatchNorm1d(1) if norm else nn.Tanh()
            self.encoder, self.decoder = nn.Linear(1, 2), nn.Sequential(nn.Linear(1, 1), middle, nn.Linear(1, 1))
            self.frozen = nn.Linear(1, 1).requires_grad_(False)
        self.decoder.register_buffer("fixed", torch.ones(2))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.frozen(self.decoder(z[:, None]))[:, 0], 0.5), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x[:, None]).unbind(-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))


def snapshot(pair: Pair) -> dict[str, Any]:
    store = pyro.get_param_store()
    modules = {"encoder": pair.encoder, "decoder": pair.decoder, "frozen": pair.frozen}
    return {
        "names": sorted(store.keys()),
        "leaves": {name: id(tensor) for name, tensor in store.get_state()["params"].items()},
        "values": {name: store[name].detach().clone() for name in store},
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002 - the global state is the one that must not move
        "python": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "pyro validation": pyro.infer.util.is_validation_enabled(),
        "distribution validation": torch.distributions.Distribution._validate_args,
        "identity": [id(p) for m in modules.values() for p in m.parameters()],
        "requires grad": [p.requires_grad for m in modules.values() for p in m.parameters()],
        "parameters": [p.detach().clone() for m in modules.values() for p in m.parameters()],
        "gradients": [p.grad for m in modules.values() for p in m.parameters()],
        "buffers": [b.clone() for m in modules.values() for b in m.buffers()],
        "training": [m.training for top in modules.values() for m in top.modules()],
        "hooks": len(torch.nn.modules.module._global_forward_pre_hooks),
        "levels": [(name, logging.getLogger(name).level) for name in ("", "bbvi_conv", "pyro", "torch")],
        "handlers": [list(logging.getLogger(name).handlers) for name in ("", "bbvi_conv", "pyro")],
        "dirichlet": torch.distributions.dirichlet._Dirichlet,
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


def do_build(pair: Pair) -> None:
    build(pair.model, pair.guide, (X,))


def do_build_with_minibatch(pair: Pair) -> None:
    build(pair.model, pair.guide, (X,), minibatch=Minibatch(4, plate="data"))


def do_trace(pair: Pair) -> None:
    program = build(pair.model, pair.guide, (X,))
    noise = program.layout.draw(torch.Generator().manual_seed(0), 2, 1, dtype=program.dtype)
    Calculus(program, ELBO(), TracedLogWeights(program), 1.0).gradients(program.initial(), Feed(noise))


def do_eager(pair: Pair) -> None:
    program = build(pair.model, pair.guide, (X,))
    noise = program.layout.draw(torch.Generator().manual_seed(0), 2, 1, dtype=program.dtype)
    calculus = Calculus(program, ELBO(), program.log_weights, 1.0)
    calculus.gradients(program.initial(), Feed(noise))
    calculus.losses(program.initial(), Feed(noise))


def do_fit(pair: Pair) -> None:
    options = {"max_steps": 20, "window": 20, "khat_draws": 50, "progress": False, "num_gradients": 4}
    bc.fit(pair.model, pair.guide, (X,), minibatch=Minibatch(4, plate="data"), update_modules=False, **options)


def do_fail(pair: Pair) -> None:
    with pytest.raises(ValueError, match="no sample site"):
        build(pair.model, lambda x: None, (X,))


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch-norm"])
@pytest.mark.parametrize("act", [do_build, do_build_with_minibatch, do_trace, do_eager, do_fit, do_fail])
def test_everything_is_left_as_found(act: Callable[[Pair], None], norm: bool) -> None:
    pair = Pair(norm)
    if norm and act is do_trace:
        pytest.skip("buffers that change keep the program eager")
    with pyro.get_param_store().scope(), pyro.validation_enabled(norm):
        pyro.param("mine", torch.tensor(1.5), constraint=dist.constraints.positive)
        pyro.param("loc", torch.tensor(0.25))
        before = snapshot(pair)
        act(pair)
        after = snapshot(pair)
    assert [key for key in before if not same(before[key], after[key])] == []


def test_a_snapshot_sees_what_changes() -> None:
    pair = Pair()
    with pyro.get_param_store().scope():
        before = snapshot(pair)
        torch.rand(1)
        pyro.param("new", torch.tensor(0.0))
        pair.encoder.bias.data += 1
        after = snapshot(pair)
    assert {"torch", "names", "parameters"} <= {key for key in before if not same(before[key], after[key])}


def test_fit_trains_modules_in_place_unless_told_not_to() -> None:
    pair = Pair()
    weight, frozen = pair.encoder.weight, pair.frozen.weight.clone()
    before = weight.detach().clone()
    options = {"max_steps": 20, "window": 20, "khat_draws": 50, "progress": False, "num_gradients": 4}
    fit = bc.fit(pair.model, pair.guide, (X,), minibatch=Minibatch(4, plate="data"), **options)
    assert pair.encoder.weight is weight
    assert not torch.equal(weight, before)
    assert torch.equal(weight, fit.params["phi"]["encoder$$$weight"])
    assert torch.equal(pair.frozen.weight, frozen)
    assert list(pyro.get_param_store().keys()) == []


def test_a_silent_constant_is_named() -> None:
    layer = nn.Linear(1, 1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(layer(z[:, None])[:, 0], 0.5), obs=x)

    with pytest.warns(UserWarning, match=r"parameter '(weight|bias)' of Linear is not registered") as caught:
        build(model, None, (X,), family=MeanField(), dtype=torch.float32)
    assert len(caught) == 2
    assert all("pyro.module(name, module)" in str(warning.message) for warning in caught)
    layer.requires_grad_(False)
    build(model, None, (X,), family=MeanField(), dtype=torch.float32)  # frozen on purpose: no warning


def test_a_name_of_another_module_is_no_registration() -> None:
    """Pyro's store keeps the first of a name, without a word: the second trains nothing, there as here."""

    class Guide(PyroModule):
        def __init__(self, out: int = 1) -> None:
            super().__init__()
            self.net = nn.Linear(1, out)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.net(x[:, None])[:, 0], 1.0))

    class Model(Guide):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(self.net(z[:, None])[:, 0], 0.5), obs=x)

    with pytest.warns(
        UserWarning, match=r"'net.(weight|bias)' of Model has the name of one registered before"
    ) as caught:
        program = build(Model(2), Guide(), (X,), dtype=torch.float32)
    assert len(caught) == 2
    assert [(leaf.name, leaf.group) for leaf in program.leaves] == [("net$$$weight", "phi"), ("net$$$bias", "phi")]


def test_a_guide_with_a_prototype_of_its_own_can_be_built_twice(agrees_with_pyro) -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoNormal(model)
    first = build(model, guide, (X.double(),), dtype=torch.float64)
    x = first.initial() + 1.0
    first.write_back(x)
    second = build(model, guide, (X.double(),), dtype=torch.float64)
    torch.testing.assert_close(second.initial(), x)  # its parameters are its own: the second starts where it stands
    agrees_with_pyro(second)
