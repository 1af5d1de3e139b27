"""The gradient monitor in a plain ``pyro.infer.SVI`` loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from bbvi_conv.engine.calculus import Calculus
from bbvi_conv.engine.streams import Feed
from bbvi_conv.monitor.judge import grams_by_group, quietest
from bbvi_conv.monitor.state import CONDITIONAL, THIS_RUN, MonitorState, Summary, look, summary, update
from bbvi_conv.monitor.strata import Strata
from bbvi_conv.objectives import ELBO, Objective
from bbvi_conv.objectives.objective import checked_objective
from bbvi_conv.program.build import build
from bbvi_conv.program.closed_form import closed_form_sites
from bbvi_conv.program.device import cpu_by_default
from bbvi_conv.program.noise import generator, random_state


class GradientMonitor:
    r"""Unbiased :math:`\|\nabla L\|^2` at one random iterate per stratum of the steps of a loop of your own.

    Call :meth:`update` after every ``svi.step``. At a look it draws J independent gradients at the store's current
    parameters, with noise of its own and J fresh minibatches from ``draw_batch``; parameters, gradients, the random
    generator and buffers are left as found.

    Args:
        model, guide: as given to ``SVI``.
        objective: the bound whose gradient is looked at, scaled as the model scales its terms.
        draw_batch: returns the positional arguments (a tuple, or one tensor) of one minibatch, drawn independently from
            the whole data. Without it the arguments passed to :meth:`update` are used for all J gradients, and the
            result is labelled conditional on the minibatch: it says how large the gradient of *that* minibatch's bound
            is, which does not vanish at the optimum, and enters no verdict.
        seed: of the monitor's own noise and of the choice of iterates.
        num_gradients: J.
        strata: steps between looks.

    Attributes:
        state: the looks so far, plain data.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *,
        objective: Objective | None = None,
        draw_batch: Callable[[], Any] | None = None,
        seed: int = 0,
        num_gradients: int = 32,
        strata: Strata | None = None,
    ) -> None:
        self.model, self.guide, self.draw_batch, self.seed = model, guide, draw_batch, seed
        self.objective: Objective = ELBO() if objective is None else objective
        checked_objective(self.objective)
        self.num_gradients, self.strata = num_gradients, Strata(50, 0.1) if strata is None else strata
        self.state = MonitorState(label=CONDITIONAL if draw_batch is None else THIS_RUN)
        self._iterate = 0
        self._calculus: Calculus | None = None
        self._prepared_for: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def update(self, *args: Any, **kwargs: Any) -> bool:
        """Count one step, and look if this is the iterate drawn for its stratum; returns whether it looked.

        Args:
            *args, **kwargs: the model's arguments; positional ones are needed only without ``draw_batch``.

        Raises:
            ValueError: minibatches of differing shapes, or what :func:`bbvi_conv.build` refuses.
        """
        index = len(self.state.looks)
        due = self._iterate == self.strata.random_step(self.seed, index)
        if due:
            self._look(index, args, kwargs)
        self._iterate += 1
        return due

    def summary(self) -> Summary:
        """Figures so far: mean over a random iterate, latest look, rate and plateau test."""
        steps = self._iterate if self.state.looks else None
        return summary(self.state, steps=steps)

    def _look(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seed = int(generator(self.seed, "monitor batches", index).initial_seed())
        with random_state(_parameter().device, seed):
            if self.draw_batch is None:
                batches = [args]
            else:
                batches = [_as_tuple(self.draw_batch()) for _ in range(self.num_gradients)]
        _check_alike(batches)
        self._measure(index, batches, kwargs)

    @cpu_by_default
    def _measure(self, index: int, batches: list[tuple[Any, ...]], kwargs: dict[str, Any]) -> None:
        calculus = self._prepare(batches[0], kwargs)
        program = calculus.program
        stacked = [_stack([b[i] for b in batches], i) for i in program.batched]
        repeats = self.num_gradients if self.draw_batch is None else 1
        moving = tuple(part.expand(repeats * len(part), *part.shape[1:]) for part in stacked)
        gen = generator(self.seed, "monitor", index, program.device)
        noise = program.layout.draw(gen, self.num_gradients, calculus.objective.draws, dtype=program.dtype)
        grads, losses = calculus.gradients(program.initial(), Feed(noise, None, moving or None))
        entry = look(
            self._iterate,
            index,
            self.strata.bounds(index),
            grams_by_group(program, grads),
            bound=-float(losses.mean()),
            bound_error=float(losses.std()) / len(losses) ** 0.5,
        )
        self.state = update(self.state, entry)

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Calculus:
        """The program of this model and guide; its leaves are the store's own tensors.

        Traced once, and anew where the store holds other tensors, a batch has another shape, or something changed that
        is not a positional tensor: all else is a constant of the trace.
        """
        if self._calculus is not None and self._is_current(self._calculus, args, kwargs):
            return self._calculus
        like = _parameter()
        program = build(self.model, self.guide, args, kwargs, dtype=like.dtype, device=like.device, loop=True)
        if self.objective.analytic_kl:
            program.analytic = closed_form_sites(program)
        self._calculus = quietest(Calculus.of(program, self.objective, 1.0))[0]
        self._prepared_for = args, _copied(kwargs)
        return self._calculus

    def _is_current(self, calculus: Calculus, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        params = pyro.get_param_store().get_state()["params"]
        earlier, named = self._prepared_for
        return (
            all(params.get(leaf.name) is leaf.tensor for leaf in calculus.program.leaves)
            and _signature(args) == _signature(earlier)
            and kwargs.keys() == named.keys()
            and all(_same(kwargs[name], named[name]) for name in kwargs)
        )


def _parameter() -> Tensor:
    """One of the store's, or where it has none a number as torch makes them."""
    return next(iter(pyro.get_param_store().get_state()["params"].values()), torch.empty(()))


def _as_tuple(batch: Any) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def _signature(args: tuple[Any, ...]) -> list[Any]:
    """Shape and type of tensors, other arguments themselves."""
    return [(tuple(a.shape), a.dtype) if isinstance(a, Tensor) else a for a in args]


def _copied(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in kwargs.items()}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)


def _check_alike(batches: list[tuple[Any, ...]]) -> None:
    """Refuse minibatches that differ in the number of arguments, or in one that is not a tensor."""
    counts = sorted({len(batch) for batch in batches})
    if len(counts) != 1:
        raise ValueError(f"draw_batch gave {counts} positional arguments; give the same number at every call")
    for i, first in enumerate(batches[0]):
        if any(isinstance(b[i], Tensor) != isinstance(first, Tensor) for b in batches) or (
            not isinstance(first, Tensor) and any(b[i] != first for b in batches)
        ):
            raise ValueError(
                f"draw_batch gave positional argument {i} with differing values; only tensors may differ within a look"
            )


def _stack(parts: list[Tensor], position: int) -> Tensor:
    shapes = {tuple(part.shape) for part in parts}
    if len(shapes) != 1:
        raise ValueError(
            f"draw_batch gave positional argument {position} in the shapes {sorted(shapes)}; draw full batches only"
        )
    return torch.stack(parts)
