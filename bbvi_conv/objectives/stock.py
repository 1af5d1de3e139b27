"""Objectives as ``loss=`` of a stock ``pyro.infer.SVI`` loop, on the parameters in Pyro's own store."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer.elbo import ELBO as PyroELBO
from pyro.infer.util import torch_item
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bbvi_conv.program.build import dependent_sites
from bbvi_conv.program.enumeration import Enumerated, check_enumerated, enumerated
from bbvi_conv.program.faithful import generator_state
from bbvi_conv.program.noise import random_state
from bbvi_conv.program.program import NOISY_GUIDE, ParamValues, Rows, anew, guide_trace
from bbvi_conv.program.structure import Structure, analyse, check_guide, is_plate, random_sites, revalued, subsampling
from bbvi_conv.program.tape import Tape
from bbvi_conv.program.terms import Terms, collect


class StockLoss(PyroELBO):  # type: ignore[misc]
    """Pyro's loss interface on top of ``draws`` and ``surrogate``."""

    @property
    @abstractmethod
    def draws(self) -> int:
        """Runs of the program in one evaluation."""

    @abstractmethod
    def surrogate(self, evaluate: Any, *, scale: float, score: bool) -> Tensor:
        """Scalar loss of an evaluation."""

    @abstractmethod
    def refuse_stock(self, structure: Structure, subsampled: list[str], shared: list[str]) -> None:
        """Raise where a stock loop cannot give an unbiased estimator."""

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Scalar negative bound, in nats; its gradient with respect to the store's parameters is the estimator's."""
        evaluate = _StockDraws(model, guide, args, kwargs, self.draws)
        self.refuse_stock(evaluate.structure, evaluate.outside, evaluate.shared)
        return self.surrogate(evaluate, scale=evaluate.scale, score=bool(evaluate.structure.score_sites))

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Value of the negative bound."""
        with torch.no_grad():
            return float(torch_item(self.differentiable_loss(model, guide, *args, **kwargs)))

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Value of the negative bound; gradients are accumulated into the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        return float(torch_item(loss))

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        drawn = guide_trace(guide, args, kwargs)
        return poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs), drawn


class _Known(NamedTuple):
    """What does not change from step to step: which latents are summed out, which sites depend on a latent."""

    model: Any
    enumerated: tuple[frozenset[str], int] | None
    structure: Structure


_STRUCTURES: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()
"""By guide, with a weak reference to the model."""


def _known(model: Any, guide: Any) -> _Known | None:
    try:
        known = _STRUCTURES[guide]
    except (KeyError, TypeError):
        return None
    return known if known.model() is model else None


class _StockDraws:
    """K draws from the guide; model and densities run again with either side's parameters held, as often as asked."""

    step = torch.tensor(torch.nan)

    def __init__(self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any], draws: int) -> None:
        self._model, self._guide, self._args, self._kwargs = model, guide, args, kwargs
        known = _known(model, guide)
        first = guide_trace(guide, args, kwargs)
        self._rows: dict[str, Tensor] = {}
        if known is not None and known.enumerated is not None:
            self._model = Enumerated(model, *known.enumerated)
        self._drawn, self._modelled = [first], [self._run_model(first)]
        self._rows = {n: s["value"] for t in (first, self._modelled[0]) for n, s in t.nodes.items() if is_plate(s)}
        self.structure = self._look() if known is None else known.structure
        for _ in range(draws - 1):  # all draws of a K-sample bound see the same rows
            with Rows(self._rows):
                drawn = guide_trace(guide, args, kwargs)
            self._drawn.append(drawn)
            self._modelled.append(self._run_model(drawn))
        theta, phi = _leaves(self._modelled[0]), _leaves(self._drawn[0])
        self._theta, self._phi = list(theta.values()), list(phi.values())
        self.has_theta, self.shared = bool(theta), sorted(set(theta) & set(phi))
        frames = {f.name: f for f in _frames(self._modelled[0])}
        self.outside = [name for name, f in frames.items() if self.factor(f) != 1.0]
        self.scale = 1.0
        for name in self.structure.unit:
            self.scale *= self.factor(frames[name])

    def __call__(self, *, theta: bool = True, phi: bool = True, density: bool = True) -> Terms:
        """Terms with K in front; the draws and rows stay the same."""
        rows = []
        for drawn, modelled in zip(self._drawn, self._modelled, strict=True):
            given, guide = (drawn if phi else revalued(drawn, Tensor.detach)), drawn
            if density != phi or not density:
                held = [] if density else self._phi
                with self._no_noise(), Rows(self._rows), _holding(held), poutine.replay(trace=anew(given)):
                    guide = guide_trace(self._guide, self._args, self._kwargs)
                    guide.compute_log_prob()
            drawn.compute_log_prob()
            model = modelled
            if not (theta and phi):
                with self._no_noise(), _holding([] if theta else self._theta):
                    model = self._run_model(given)
            model.compute_log_prob()
            zero = torch.as_tensor(model.log_prob_sum()).detach().reshape(-1)[:1] * 0
            terms = collect(drawn, guide, model, self.structure, self, (), zero)
            rows.append(terms if phi else terms._replace(score=terms.score.detach()))
        return Terms(*(torch.stack(part) for part in zip(*rows, strict=True)))

    def scale_of(self, site: dict[str, Any]) -> Any:
        """Scale of a site with those of subsampled plates taken out."""
        scale = site["scale"]
        for frame in site["cond_indep_stack"]:
            scale = scale / self.factor(frame)
        return scale

    def factor(self, frame: Any) -> float:
        """N/B of a plate that the model subsamples."""
        return subsampling(frame) if frame.vectorized else 1.0

    @contextmanager
    def _no_noise(self) -> Iterator[None]:
        """Refuse noise in one more run at given values of the sites: it would be other noise than that of the first."""
        before = generator_state(self._device)
        yield
        if generator_state(self._device) != before:
            raise ValueError(
                f"{NOISY_GUIDE}; so it is with a model: use the pathwise estimator, or leave the noise out"
            )

    @property
    def _device(self) -> torch.device:
        return next((site["value"].device for site in random_sites(self._drawn[0])), torch.device("cpu"))

    def _run_model(self, drawn: Trace, model: Any = None) -> Trace:
        with Rows(self._rows):
            replayed = poutine.replay(model or self._model, trace=drawn)
            return poutine.trace(replayed).get_trace(*self._args, **self._kwargs)

    def _look(self) -> Structure:
        """The structure of a pair that is new here; discrete latents that the guide leaves out are enumerated."""
        model, drawn, plain = self._model, self._drawn[0], self._modelled[0]
        names = {site["name"] for site in random_sites(drawn)}
        with random_state(self._device):  # further runs of the model must not move the loop's own draws
            found = enumerated(model, plain, names)
            if found is not None:
                self._model = found
                try:
                    self._modelled = [self._run_model(drawn)]
                    self._modelled[0].compute_log_prob()
                except (IndexError, RuntimeError, ValueError) as error:
                    raise found.refused(error) from error
                check_enumerated(
                    self._modelled[0], plain, lambda z: self._run_model(drawn, poutine.condition(model, data=z))
                )
            check_guide(drawn, self._modelled[0])
            dependent = dependent_sites(drawn, self._modelled[0], self._run_model)
        structure = analyse(drawn, self._modelled[0], dependent)
        with suppress(TypeError):  # bound methods and the like cannot be remembered
            kept = None if found is None else (found.names, found.dim)
            _STRUCTURES[self._guide] = _Known(weakref.ref(model), kept, structure)
        return structure


def _leaves(trace: Trace) -> dict[str, Tensor]:
    """Unconstrained leaves of the parameters a trace read, by name."""
    values = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "param"}
    return {name: x.unconstrained() if hasattr(x, "unconstrained") else x for name, x in values.items()}


def _frames(trace: Trace) -> Iterator[Any]:
    for site in trace.nodes.values():
        if site["type"] == "sample":
            yield from (f for f in site["cond_indep_stack"] if f.vectorized)


@contextmanager
def _holding(leaves: list[Tensor]) -> Iterator[None]:
    """Run with these parameters detached."""
    with Tape(None, {id(leaf): leaf.detach() for leaf in leaves}, serve=False) as tape, ParamValues(tape):
        yield
