"""Flows in 20 dimensions beside NumPyro's, Pyro's and zuko's of the same size."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pyro.distributions.transforms import affine_coupling, iterated
from pyro.infer.autoguide import AutoIAFNormal, AutoNormalizingFlow
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Normal

import bbvi_conv as bc
from benchmarks.case import Case, Twin
from benchmarks.cases.regression import logistic

HIDDEN, FLOWS = 20, 3


def iaf() -> Case:
    """Three affine autoregressive steps, two hidden layers of 20 each, on logistic regression of 500 x 19."""

    def pyro_guide(model: Any) -> Any:
        return AutoIAFNormal(model, hidden_dim=[HIDDEN, HIDDEN], num_transforms=FLOWS)

    def in_zuko(zuko: Any, dim: int) -> Any:
        steps = zuko.flows.MAF(dim, transforms=FLOWS, hidden_features=(HIDDEN, HIDDEN))
        # a draw goes by the inverse of the transform: with autoregressive steps inverted, that is one pass
        return zuko.flows.Flow([t.inv for t in steps.transform.transforms], steps.base)

    return _flow(bc.IAF(num_layers=FLOWS, hidden=(HIDDEN, HIDDEN)), pyro_guide, in_zuko)


def real_nvp() -> Case:
    """Three affine couplings of the same size; NumPyro has no such guide, and its autoregressive one stands in."""

    def pyro_guide(model: Any) -> Any:
        return AutoNormalizingFlow(model, partial(iterated, FLOWS, partial(affine_coupling, hidden_dims=[HIDDEN] * 2)))

    def in_zuko(zuko: Any, dim: int) -> Any:
        return zuko.flows.RealNVP(dim, transforms=FLOWS, hidden_features=(HIDDEN, HIDDEN))

    family = bc.RealNVP(num_layers=FLOWS, hidden=(HIDDEN, HIDDEN))
    return replace(_flow(family, pyro_guide, in_zuko), notes="NumPyro's guide is AutoIAFNormal")


def _flow(family: Any, pyro_guide: Callable[[Any], Any], in_zuko: Callable[[Any, int], Any]) -> Case:
    base = logistic(500, 19)

    def twin() -> Twin:
        from numpyro.infer.autoguide import AutoIAFNormal

        plain = base.twin()
        guide = AutoIAFNormal(plain.model, num_flows=FLOWS, hidden_dims=[HIDDEN, HIDDEN])
        return Twin(plain.model, guide, plain.args, plain.loss)

    return replace(
        base,
        twin=twin,
        params=None,
        family=family,
        pyro_guide=pyro_guide,
        others={"zuko": lambda: _zuko(base, in_zuko)},
        steps=512,
    )


def _zuko(case: Case, make: Callable[[Any, int], Any]) -> Callable[[int], float]:
    """A plain torch loop over zuko's flow."""
    checked = Distribution._validate_args
    try:
        import zuko
    finally:
        Distribution.set_default_validate_args(checked)  # zuko switches it off for everybody
    X, y = case.args
    torch.manual_seed(0)
    flow = make(zuko, X.shape[1] + 1)
    optimiser = torch.optim.Adam(flow.parameters(), lr=case.step_size)

    def loss() -> Tensor:
        z, log_q = flow().rsample_and_log_prob(())
        alpha, beta = z[0], z[1:]
        logits = alpha + X @ beta
        prior = Normal(0.0, 5.0).log_prob(alpha) + Normal(0.0, 1.0).log_prob(beta).sum()
        return log_q - prior - Bernoulli(logits=logits).log_prob(y).sum()

    def turn(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            optimiser.zero_grad()
            loss().backward()
            optimiser.step()
        return (time.perf_counter() - start) / steps

    return turn
