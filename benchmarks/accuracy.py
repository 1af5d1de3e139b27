"""Seconds, compiling included, until the bound is within 0.1 nat of the best that either side finds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bbvi_conv as bc
from bbvi_conv.engine import Stream, start_carry
from bbvi_conv.engine.streams import Feed
from bbvi_conv.run import Run
from benchmarks import peers
from benchmarks.case import Case

DRAWS = {False: 4096, True: 128}
"""Evaluations behind one bound, without and with a minibatch. Noise is common to all marks of a side, rows to both."""


class Mark(NamedTuple):
    """A point of a run: steps, seconds since the model was handed over, bound in nats with its standard error."""

    steps: int
    seconds: float
    bound: float
    error: float


CHUNK = 125
"""Steps of one call: of one length, so that NumPyro compiles once."""


def marks(last: int) -> list[int]:
    """Steps at which bounds are taken: a chunk, doubled while it is at most ``last``.

    >>> marks(1200), marks(20)
    ([125, 250, 500, 1000], [20])
    """
    found = [min(CHUNK, last)]
    while 2 * found[-1] <= last:
        found.append(2 * found[-1])
    return found


def ours(case: Case, steps: int, engine: str = "auto") -> list[Mark]:
    """Our run; taking bounds, of the last iterate, is not in the clock."""
    start, paused = time.perf_counter(), 0.0
    program = case.program()
    run = Run(program, case.settings(engine=engine))
    carry, done, made = start_carry(run.rule, program.initial()), 0, []
    for mark in marks(steps):
        carry, _ = run.engine.advance(carry, run.stream, done, mark - done)
        done, x = mark, carry.x.clone()
        now = time.perf_counter()
        losses = run.engine.calculus.losses(x, _evaluations(case, program)) * run.normaliser / case.total
        made.append(Mark(mark, now - start - paused, *_bound(-losses)))
        paused += time.perf_counter() - now
    return made


def _evaluations(case: Case, program: bc.Program) -> Feed:
    """Noise and rows of the bounds."""
    return Stream(program, 0, "evaluate", case.objective.draws).once(0, DRAWS[case.minibatch is not None])


def numpyro(case: Case, steps: int) -> list[Mark]:
    """NumPyro's run, bounds on the same rows."""
    import jax
    import numpy as np
    from jax import random
    from numpyro.infer import SVI
    from numpyro.optim import Adam

    twin, program = case.twin(), case.program()
    params = None if case.params is None else case.params(program, program.initial())
    rows = _evaluations(case, program).rows
    taken = np.zeros((DRAWS[False], 0)) if rows is None else rows.numpy()
    start, paused = time.perf_counter(), 0.0
    svi = SVI(twin.model, twin.guide, Adam(case.step_size), twin.loss)
    state = svi.init(random.PRNGKey(0), *twin.args, init_params=params)
    chunk = peers.numpyro_chunk(case, twin, svi)

    @jax.jit
    def evaluate(params: Any, keys: Any, taken: Any, *args: Any) -> Any:
        def one(each: Any) -> Any:
            given = {} if rows is None else {"rows": each[1]}
            return -twin.loss.loss(each[0], params, twin.model, twin.guide, *args, **given)

        return jax.lax.map(one, (keys, taken))

    made, done = [], 0
    for mark in marks(steps):
        while done < mark:
            keys = random.split(random.fold_in(random.PRNGKey(1), done), min(CHUNK, mark))
            state, losses = jax.block_until_ready(chunk(state, keys, *twin.args))
            done += len(losses)
        now = time.perf_counter()
        bounds = evaluate(svi.get_params(state), random.split(random.PRNGKey(2), len(taken)), taken, *twin.args)
        made.append(Mark(mark, now - start - paused, *_bound(torch.from_numpy(np.array(bounds)) / case.total)))
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
    """Both runs mark by mark, and when each is ``within`` nats of the best; nats per datum where rows are drawn."""
    sides: dict[str, Callable[[], list[Mark]]] = {
        "ours": lambda: ours(case, steps, engine),
        "numpyro": lambda: numpyro(case, steps),
    }
    runs = {side: run() for side, run in sides.items()}
    top = max((mark for run in runs.values() for mark in run), key=lambda mark: mark.bound)
    row: dict[str, Any] = {"case": name, "best": top.bound, "error": top.error, "within_nats": within}
    row["per"] = "total" if case.minibatch is None else "datum"
    for side, run in runs.items():
        first = reached(run, top.bound, within)
        row[f"{side}_seconds"] = first.seconds if first else None
        row[f"{side}_steps"] = first.steps if first else None
        row[f"{side}_marks"] = [mark._asdict() for mark in run]
    return row
