"""Steps whose products are rounded to bfloat16: which numbers are, what it costs in accuracy, where it is refused."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import bbvi_conv as bc
from bbvi_conv.engine import make_engine
from bbvi_conv.program import Minibatch
from bbvi_conv.program.build import build

aten: Any = torch.ops.aten
RULE = bc.Adam(bc.Constant(1e-2))


def images(count: int = 64) -> Tensor:
    """Bright discs of two sizes, ``(count, 1, 8, 8)``."""
    axis = torch.linspace(-1, 1, 8)
    radius = axis[:, None].square() + axis.square()
    which = torch.arange(count).remainder(2)[:, None, None, None]
    return torch.where(which == 0, (radius < 0.3).float(), (radius < 0.9).float())


def vae() -> tuple[Callable[..., None], Callable[..., None]]:
    """A convolution each way and a dense layer, two latent dimensions."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 4, 4, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(64, 4))
    decoder = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Unflatten(-1, (4, 4, 4)), nn.ConvTranspose2d(4, 1, 4, 2, 1))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.3).to_event(3), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


def test_products_take_and_give_rounded_numbers_and_nothing_else_does() -> None:
    program = build(*vae(), (images(),), minibatch=Minibatch(16, plate="data"))
    engine: Any = make_engine("traced", program, bc.ELBO(1), RULE, amp="bfloat16")
    rounded = {node.target for node in engine.one.graph.graph.nodes if _dtype(node) is torch.bfloat16}
    assert {aten.addmm.default, aten.mm.default, aten.convolution.default} <= rounded
    assert rounded <= {
        *(aten.addmm.default, aten.mm.default, aten.convolution.default, aten.convolution_backward.default),
        *(aten._to_copy.default, aten.view.default, operator.getitem),
    }
    assert all(part.dtype is not torch.bfloat16 for part in engine.one.graph(*engine.one.example))


def _dtype(node: Any) -> Any:
    kind = node.meta.get("tensor_meta")
    return None if kind is None else kind.dtype


def fitted(**settings: Any) -> bc.Fit:
    """300 steps on the discs."""
    common = {"minibatch": Minibatch(16, plate="data"), "optimiser": RULE, "max_steps": 300, "window": 300}
    return bc.fit(*vae(), (images(),), progress=False, average="last", khat_draws=10, **common, **settings)


def test_a_rounded_fit_ends_where_the_exact_one_does() -> None:
    """Rounding to 8 bits may cost a hundredth of the way, and does change the iterates."""
    exact, rounded = fitted(engine="traced"), fitted(engine="traced", amp="bfloat16")
    first, last = exact.state.losses[0][2], exact.state.losses[-1][2]
    assert first - last > 10
    assert abs(rounded.state.losses[-1][2] - last) < 0.01 * (first - last)
    assert 1e-5 < float((rounded.x - exact.x).norm() / exact.x.norm()) < 0.1
    compiled = fitted(engine="compiled", amp="bfloat16")
    assert float((compiled.x - rounded.x).norm() / rounded.x.norm()) < 0.05
    assert abs(compiled.state.losses[-1][2] - last) < 0.01 * (first - last)


def test_looks_do_not_round() -> None:
    """At the same parameters the monitor of a rounded run sees the very numbers of an exact one."""
    looks = [fitted(engine="traced", amp=amp).state.monitor.looks[0] for amp in (None, "bfloat16")]
    assert looks[0].step == looks[1].step == 0
    assert looks[0].total.value == looks[1].total.value


def test_where_nothing_can_be_rounded_it_says_so(shipped: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="amp needs steps that are graphs"):
        fitted(amp="bfloat16", engine="eager")
    with pytest.raises(ValueError, match="unknown amp 'float16'"):
        fitted(amp="float16")
    with pytest.raises(ValueError, match='amp="tf32" needs a CUDA device, and this run is on cpu'):
        fitted(amp="tf32")
    schools = shipped("eight_schools")
    with pytest.raises(ValueError, match="no matrix product or convolution of float32"):
        bc.fit(schools.model, args=schools.data(), amp="bfloat16", progress=False)
