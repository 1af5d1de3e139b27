"""Models that read what Python holds: numbers that change, and generators other than torch's."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import bbvi_conv as bc
from bbvi_conv.program.surroundings import changed, numbers

DATA = torch.linspace(-1.0, 2.0, 12)


class Tempered:
    """A model whose prior has a weight that something outside torch decides on."""

    def __init__(self, weight: Callable[[Tempered], float]) -> None:
        self.runs, self.weight, self.of = 0, 1.0, weight

    def __call__(self, x: Tensor) -> None:
        with poutine.scale(scale=self.of(self)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def counting(model: Tempered) -> float:
    model.runs += 1
    return 0.1 if model.runs < 100 else 1.0


def built(model: Any) -> Any:
    return bc.build(model, None, (DATA,), family=bc.MeanField())


def test_a_number_that_runs_change_keeps_a_program_from_being_traced() -> None:
    assert built(Tempered(counting)).obstacles == ("the number 'runs' changes as the program runs",)
    assert built(Tempered(lambda model: model.weight)).obstacles == ()


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["Python", "NumPy"])
def test_draws_of_other_generators_are_those_of_the_seed(draw: Callable[[], float]) -> None:
    """Such a program is not traced, and its steps have draws of their own."""
    model = Tempered(lambda _: 0.5 + draw())
    assert "NumPy's or Python's" in built(model).obstacles[0]
    fits = [bc.fit(model, args=(DATA,), seed=s, max_steps=20, khat_draws=25, progress=False) for s in (0, 0, 1)]
    assert torch.equal(fits[0].x, fits[1].x)
    assert not torch.equal(fits[0].x, fits[2].x)


def test_what_changes_after_tracing_is_told() -> None:
    model = Tempered(lambda model: model.weight)

    def change(state: Any) -> None:
        model.weight = 30.0

    settings: dict[str, Any] = {"max_steps": 60, "window": 30, "khat_draws": 25, "progress": False}
    with pytest.warns(UserWarning, match="at step 30 the model has other densities than its graph"):
        bc.fit(model, args=(DATA,), on_look=change, engine="traced", **settings)


def test_numbers_around_functions() -> None:
    weight, model = 0.5, Tempered(counting)

    def inner() -> float:
        return weight * model.runs

    names = {name for _, name in numbers(inner)}
    assert {"weight", "runs"} <= names
    before = numbers(inner)
    model.runs += 1
    assert changed(before, numbers(inner)) == ["runs"]
