"""Objectives as ``loss=`` of a stock ``pyro.infer.SVI`` loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer.elbo import ELBO as PyroELBO
from pyro.infer.util import torch_item
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bbvi_conv.program.program import Terms, anew, guide_trace
from bbvi_conv.program.structure import random_sites
from bbvi_conv.program.tape import Tape


class StockLoss(PyroELBO):  # type: ignore[misc]
    """Pyro's loss interface on top of ``split``, ``draws`` and ``from_terms``; parameters live in Pyro's store."""

    split: Any
    draws: Any
    from_terms: Callable[..., Tensor]

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kw: Any
    ) -> Tensor:
        """Scalar negative bound, in nats; its gradient with respect to the store's parameters is the estimator's."""
        rows, score = [], False
        for _ in range(self.draws):
            terms, has_score = stock_terms(model, guide, args, kw, split=self.split)
            rows.append(terms)
            score = score or has_score
        return self.from_terms(Terms(*(torch.stack(part) for part in zip(*rows, strict=True))), scale=1.0, score=score)

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kw: Any) -> float:
        """Value of the negative bound."""
        with torch.no_grad():
            return float(torch_item(self.differentiable_loss(model, guide, *args, **kw)))

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kw: Any) -> float:
        """Value of the negative bound; gradients are accumulated into the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kw)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        return float(torch_item(loss))

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        drawn = guide_trace(guide, args, kwargs)
        return poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs), drawn


def stock_terms(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, split: bool
) -> tuple[Terms, bool]:
    """Summed terms of one draw with Pyro's own scales, and whether a site has no pathwise gradient."""
    drawn = guide_trace(guide, args, kwargs)
    density = drawn
    if split:
        owned = (site["value"] for site in drawn.nodes.values() if site["type"] == "param")
        leaves = [value.unconstrained() if hasattr(value, "unconstrained") else value for value in owned]
        with Tape(None, {id(leaf): leaf.detach() for leaf in leaves}, serve=False):
            with poutine.replay(trace=anew(drawn)):
                density = guide_trace(guide, args, kwargs)
            density.compute_log_prob()
    density.compute_log_prob()
    replayed = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
    log_p, log_q = torch.as_tensor(replayed.log_prob_sum()), torch.as_tensor(density.log_prob_sum())
    scored = [s for s in random_sites(drawn) if not s["is_observed"] and not getattr(s["fn"], "has_rsample", True)]
    if scored and split:
        drawn.compute_log_prob()
    score = sum((drawn.nodes[s["name"]]["log_prob_sum"] for s in scored), torch.zeros_like(log_p))
    return Terms(log_p.reshape(1), log_q.reshape(1), torch.zeros_like(log_p), score.reshape(1)), bool(scored)
