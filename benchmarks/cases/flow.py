"""An inverse autoregressive flow in 20 dimensions, beside NumPyro's, Pyro's and zuko's of the same size."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from pyro.infer.autoguide import AutoIAFNormal
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Normal

import bbvi_conv as bc
from benchmarks.case import Case, Twin
from benchmarks.cases.regression import logistic

HIDDEN, FLOWS = 20, 3


def iaf() -> Case:
    """Three affine autoregressive steps, two hidden layers of 20 each, on logistic regression of 500 x 19."""
    base = logistic(500, 19)

    def pyro_guide(model: Any) -> Any:
        return AutoIAFNormal(model, hidden_dim=[HIDDEN, HIDDEN], num_transforms=FLOWS)

    def twin() -> Twin:
        from numpyro.infer.autoguide import AutoIAFNormal

        plain = base.twin()
        guide = AutoIAFNormal(plain.model, num_flows=FLOWS, hidden_dims=[HIDDEN, HIDDEN])
        return Twin(plain.model, guide, plain.args, plain.loss)

    if hasattr(bc, "IAF"):
        own: dict[str, Any] = {"family": bc.IAF(num_layers=FLOWS, hidden=(HIDDEN, HIDDEN))}
    else:
        own = {"guide": pyro_guide(base.model), "family": None}
    return replace(
        base,
        twin=twin,
        params=None,
        pyro_guide=pyro_guide,
        others={"zuko": lambda: _zuko(base)},
        steps=512,
        notes="" if hasattr(bc, "IAF") else "our guide is Pyro's AutoIAFNormal",
        **own,
    )


def _zuko(case: Case) -> Any:
    """A plain torch loop over zuko's flow, inverted so that a draw costs one pass."""
    checked = Distribution._validate_args
    try:
        import zuko
    finally:
        Distribution.set_default_validate_args(checked)  # zuko switches it off for everybody
    X, y = case.args
    torch.manual_seed(0)
    steps = zuko.flows.MAF(X.shape[1] + 1, transforms=FLOWS, hidden_features=(HIDDEN, HIDDEN))
    flow = zuko.flows.Flow([t.inv for t in steps.transform.transforms], steps.base)
    # NormalizingFlow draws by the inverse of its transform: with autoregressive steps inverted, that is one pass.
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
