"""Pure functions of log-weights ``(K, U)``: K draws of U conditionally independent units, in nats."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

PerUnit = Callable[[Tensor], Tensor]
"""Log-weights ``(K, U)`` -> bound of every unit ``(U,)``."""

DUST = 40.0
"""Nats under the largest log-weight of a unit below which a draw counts as nothing: K e^-40 of the sum at most."""


def without_dust(log_w: Tensor) -> Tensor:
    """Log-weights with those that no float64 sum can see at minus infinity, ``(K, U)``.

    Their normalised weights are then zero, not subnormal: processors are slow at subnormal
    numbers, and a K-sample bound far from the posterior is full of them.
    """
    return log_w.masked_fill(log_w < log_w.detach().amax(0) - DUST, -math.inf)


def renyi(log_w: Tensor, alpha: float) -> Tensor:
    r""":math:`\tfrac1{1-\alpha} \log \tfrac1K \sum_k w_k^{1-\alpha}`, ``(U,)``; alpha = 0: the IWAE's."""
    return (torch.logsumexp(without_dust((1 - alpha) * log_w), 0) - math.log(len(log_w))) / (1 - alpha)


def tempered(log_w: Tensor, alpha: float) -> Tensor:
    r""":math:`v_k \propto w_k^{1-\alpha}`, summing to one over K, ``(K, U)``."""
    return torch.softmax(without_dust((1 - alpha) * log_w), 0)


def learning_signals(bound: PerUnit, log_w: Tensor) -> Tensor:
    r""":math:`\hat L - \hat L_{-k}` ``(K, U)``: what draw k adds to the bound, given the others.

    In :math:`\hat L_{-k}` the log-weight of draw k is replaced by the mean of the others; it does not depend on draw
    k, so it is a baseline that costs no bias. With one draw there is none.

    Reference: Mnih and Rezende (2016), "Variational inference for Monte Carlo objectives", section 2.4,
    https://arxiv.org/abs/1602.06725
    """
    count = len(log_w)
    whole = bound(log_w)
    if count == 1:
        return whole.unsqueeze(0)
    others = (log_w.sum(0) - log_w) / (count - 1)
    left_out = [bound(torch.cat([log_w[:k], others[k : k + 1], log_w[k + 1 :]])) for k in range(count)]
    return whole - torch.stack(left_out)
