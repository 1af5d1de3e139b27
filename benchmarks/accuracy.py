"""Seconds, compiling included, until the bound is within 0.1 nat of the best bound that any side finds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bbvi_conv.engine import Calculus, Stream
from bbvi_conv.engine.calculus import TracedLogWeights
from benchmarks.agree import numpyro_start
from benchmarks.case import Case

DRAWS = 512
"""Draws behind one bound: common to all marks of a side, so that differences between them are sharp."""


class Mark(NamedTuple):
    """A point of a run: steps, seconds since the model was handed over, bound in nats with its standard error."""

    steps: int
    seconds: float
    bound: float
    error: float


def marks(last: int) -> list[int]:
    """Steps at which bounds are taken: powers of two times 125, up to ``last``.

    >>> marks(1000)
    [125, 250, 500, 1000]
    """
    found, step = [], 125
    while step < last:
        found.append(step)
        step *= 2
    return [*found, last]


def ours(case: Case, steps: int, engine: str = "auto") -> list[Mark]:
    """Our run; bounds at the mean iterate of the latter half of the steps so far are not in the clock."""
    from bbvi_conv.run import Run

    start, paused = time.perf_counter(), 0.0
    program = case.program()
    run = Run(program, case.settings(engine=engine))
    carry, done, made = run.start(program.initial()).carry, 0, []
    judge = Calculus(program, case.objective.plain(), TracedLogWeights(program), 1.0)
    stream = Stream(program, 0, "evaluate", judge.objective.draws)
    for mark in marks(steps):
        carry, _ = run.engine.advance(carry, run.stream, done, mark - done)
        done = mark
        x = carry.x.clone()
        now = time.perf_counter()
        made.append(Mark(mark, now - start - paused, *_bound(-judge.losses(x, stream.once(0, DRAWS)))))
        paused += time.perf_counter() - now
    return made


def numpyro(case: Case, steps: int) -> list[Mark]:
    """NumPyro's run by a jitted scan, compiled once per length of chunk."""
    import jax
    import numpy as np
    from jax import random
    from numpyro.infer import SVI
    from numpyro.optim import Adam

    twin = case.twin()
    program = case.program()
    params = None if case.params is None else case.params(program, program.initial())
    numpyro_start(case, twin, params)  # imports and prototypes, as ours has them before the clock
    start, paused = time.perf_counter(), 0.0
    svi = SVI(twin.model, twin.guide, Adam(case.step_size), twin.loss)
    state = svi.init(random.PRNGKey(0), *twin.args, init_params=params)
    size = None if case.minibatch is None else case.minibatch.size

    def rows(key: Any, args: Any) -> dict[str, Any]:
        return {} if size is None else {"rows": random.randint(key, (size,), 0, len(args[0]))}

    @jax.jit
    def chunk(state: Any, keys: Any, *args: Any) -> Any:
        return jax.lax.scan(lambda s, key: svi.update(s, *args, **rows(key, args)), state, keys)

    @jax.jit
    def evaluate(params: Any, keys: Any, *args: Any) -> Any:
        one = lambda key: -twin.loss.loss(key, params, twin.model, twin.guide, *args, **rows(key, args))  # noqa: E731
        return jax.lax.map(one, keys, batch_size=16)

    made, done = [], 0
    for mark in marks(steps):
        keys = random.split(random.fold_in(random.PRNGKey(1), mark), mark - done)
        state, losses = chunk(state, keys, *twin.args)
        jax.block_until_ready(losses)
        done = mark
        now = time.perf_counter()
        bounds = evaluate(svi.get_params(state), random.split(random.PRNGKey(2), DRAWS), *twin.args)
        made.append(Mark(mark, now - start - paused, *_bound(torch.from_numpy(np.array(bounds)))))
        paused += time.perf_counter() - now
    return made


def _bound(values: Tensor) -> tuple[float, float]:
    values = values.double()
    return float(values.mean()), float(values.std()) / len(values) ** 0.5


def reached(run: Sequence[Mark], best: float, within: float) -> Mark | None:
    """The first mark whose bound is within so many nats of the best.

    >>> run = [Mark(125, 1.0, -9.0, 0.0), Mark(250, 2.0, -5.05, 0.0), Mark(500, 4.0, -5.0, 0.0)]
    >>> reached(run, -5.0, 0.1).seconds, reached(run, -4.0, 0.1)
    (2.0, None)
    """
    return next((mark for mark in run if mark.bound >= best - within), None)


def accuracy(name: str, case: Case, *, steps: int, engine: str = "auto", within: float = 0.1) -> dict[str, Any]:
    """Both runs mark by mark, and when each is ``within`` nats (of N times the bound per datum) of the best."""
    sides: dict[str, Callable[[], list[Mark]]] = {
        "ours": lambda: ours(case, steps, engine),
        "numpyro": lambda: numpyro(case, steps),
    }
    runs = {side: run() for side, run in sides.items()}
    top = max((mark for run in runs.values() for mark in run), key=lambda mark: mark.bound)
    row: dict[str, Any] = {"case": name, "best": top.bound, "error": top.error, "within_nats": within}
    for side, run in runs.items():
        first = reached(run, top.bound, within)
        row[f"{side}_seconds"] = first.seconds if first else None
        row[f"{side}_steps"] = first.steps if first else None
        row[f"{side}_marks"] = [mark._asdict() for mark in run]
    return row
