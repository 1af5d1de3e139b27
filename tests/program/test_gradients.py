"""Gradients equal Pyro's ``Trace_ELBO`` at replayed noise: shipped models, and every continuous guide of Pyro."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import affine_coupling, iterated, planar, spline_coupling
from pyro.infer import autoguide as ag

from bbvi_conv.families import FullRank, MeanField
from bbvi_conv.program import Minibatch
from bbvi_conv.program.build import build

SHIPPED = [
    ("eight_schools", "model"),
    ("eight_schools", "centered"),
    ("challenger", "model"),
    ("conjugate_gaussian", "model"),
]


@pytest.mark.parametrize("family", [MeanField(), FullRank()], ids=["mean-field", "full-rank"])
@pytest.mark.parametrize(("file", "name"), SHIPPED)
def test_shipped_models(shipped, agrees_with_pyro, file: str, name: str, family: Callable[..., Any]) -> None:
    module = shipped(file)
    agrees_with_pyro(build(getattr(module, name), None, module.data(), family=family))


def test_shipped_vae_with_a_minibatch(shipped, agrees_with_pyro) -> None:
    module = shipped("vae")
    module.encoder.double(), module.decoder.double()
    try:
        images = 255 * torch.randint(2, (6, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        batch = Minibatch(2, plate="data")
        program = build(module.model, module.guide, (images,), minibatch=batch, dtype=torch.float64)
        assert {leaf.group for leaf in program.leaves} == {"theta", "phi"}
        agrees_with_pyro(program, scale=3.0)
    finally:
        module.encoder.float(), module.decoder.float()


def hierarchy(y: torch.Tensor, s: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("group", len(y)):
        z = pyro.sample("z", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(z, s), obs=y)


def guide_list(model: Callable[..., Any]) -> ag.AutoGuideList:
    guides = ag.AutoGuideList(model)
    guides.append(ag.AutoNormal(poutine.block(model, expose=["mu", "tau"])))
    guides.append(ag.AutoDelta(poutine.block(model, expose=["z"])))
    return guides


def flow(transform: Callable[..., Any], **options: Any) -> Callable[..., ag.AutoGuide]:
    return lambda model: ag.AutoNormalizingFlow(model, functools.partial(iterated, 2, transform, **options))


def structured(z: str) -> Callable[..., ag.AutoGuide]:
    return lambda model: ag.AutoStructured(
        model, conditionals={"mu": "normal", "tau": "delta", "z": z}, dependencies={"z": {"mu": "linear"}}
    )


GUIDES: dict[str, Callable[..., Any]] = {
    "normal": ag.AutoNormal,
    "diagonal": ag.AutoDiagonalNormal,
    "multivariate": ag.AutoMultivariateNormal,
    "low-rank": functools.partial(ag.AutoLowRankMultivariateNormal, rank=2),
    "iaf": functools.partial(ag.AutoIAFNormal, hidden_dim=[10], num_transforms=2),
    "affine-coupling": flow(affine_coupling, hidden_dims=[6]),
    "planar": flow(planar),
    "spline-coupling": flow(spline_coupling, hidden_dims=[6], count_bins=4, bound=3.0),
    "laplace": ag.AutoLaplaceApproximation,
    "delta": ag.AutoDelta,
    "structured-normal": structured("normal"),
    "structured-mvn": structured("mvn"),
    "gaussian": ag.AutoGaussian,
    "list": guide_list,
    "normal-messenger": ag.AutoNormalMessenger,
    "hierarchical-messenger": ag.AutoHierarchicalNormalMessenger,
    "regressive-messenger": ag.AutoRegressiveMessenger,
}


@pytest.mark.parametrize("guide", GUIDES)
def test_continuous_guides_of_pyro(agrees_with_pyro, guide: str) -> None:
    y, s = torch.tensor([2.8, 0.8, -0.3, 0.7]), torch.tensor([1.5, 1.0, 1.6, 1.1])
    agrees_with_pyro(build(hierarchy, None, (y, s), family=GUIDES[guide], dtype=torch.float64))


def test_no_continuous_guide_of_pyro_is_left_out() -> None:
    ours = {kind.__name__ for make in GUIDES.values() for kind in type(make(hierarchy)).__mro__}
    public = {name for name in ag.__all__ if name.startswith("Auto")}
    abstract_or_discrete = {"AutoCallable", "AutoContinuous", "AutoDiscreteParallel", "AutoGuide", "AutoMessenger"}
    assert public - abstract_or_discrete <= ours
