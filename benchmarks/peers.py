"""Contenders: each turns a number of steps into seconds per step, and goes on where its last turn ended."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch

from bbvi_conv.engine import Carry, start_carry
from bbvi_conv.run import Run
from benchmarks.agree import numpyro_start
from benchmarks.case import Case, Twin

Turn = Callable[[int], float]
"""Run that many steps; seconds of one."""


def ours(case: Case, engine: str = "auto", *, amp: Any = None) -> Turn:
    """Steps of the engine that ``bc.fit`` would use, steady state.

    Noise is drawn by the block: a turn of whole blocks pays for its own; a shorter one is timed inside a block, and the
    share of a step in its block is added. On a GPU a turn is one of whole blocks.
    """
    program = case.program()
    run = Run(program, case.settings(engine=engine, amp=amp))
    carry, done = start_carry(run.rule, program.initial()), 0
    if case.seeds > 1:
        carry = Carry.stack([carry] * case.seeds)
    draws, block = case.objective.draws, run.stream.block
    share = 0.0
    if program.device.type == "cpu":
        start = time.perf_counter()
        program.layout.draw(torch.Generator().manual_seed(0), block, draws, dtype=program.dtype)
        share = case.seeds * (time.perf_counter() - start) / block

    def turn(steps: int) -> float:
        nonlocal carry, done
        short = steps < block
        if short:
            if done // block != (done + steps - 1) // block:
                done = (done // block + 1) * block
            next(run.stream.steps(done, 1))  # the block is at hand
        start = time.perf_counter()
        carry, _ = run.engine.advance(carry, run.stream, done, steps)
        float(carry.x.reshape(-1)[0])  # on a device: wait
        seconds = (time.perf_counter() - start) / steps
        done += steps
        if bool((carry.bad >= 0).any()):
            raise RuntimeError(f"the run is frozen: step {int(carry.bad.max())} was not finite")
        return seconds + share if short else seconds

    turn.engine = (run.engine.name, run.engine.reason)  # type: ignore[attr-defined]
    return turn


def ours_fit(case: Case, steps: int, engine: str = "auto") -> tuple[float, Any]:
    """Seconds per step of ``bc.fit`` as a user calls it, building, compiling and monitor included; and the fit."""
    import bbvi_conv as bc

    settings = case.settings(engine=engine)
    given = {
        name: getattr(settings, name) for name in ("objective", "optimiser", "minibatch", "dtype", "engine", "device")
    }
    start = time.perf_counter()
    fit = bc.fit(
        case.model, case.guide, case.args, family=case.family, max_steps=steps, tol=1e-9, progress=False, **given
    )
    return (time.perf_counter() - start) / max(fit.state.step, 1), fit


def some(case: Case) -> tuple[torch.Tensor, ...]:
    """The arguments of one step: all, or rows drawn anew."""
    if case.minibatch is None:
        return case.args
    rows = torch.randint(case.total, (case.minibatch.size,))
    return tuple(a[rows] for a in case.args)


def pyro_svi(case: Case, *, jit: bool = False) -> Turn:
    """``pyro.infer.SVI`` with ``Trace_ELBO`` or ``JitTrace_ELBO``, Pyro's settings as it sets them."""
    from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
    from pyro.optim import Adam

    if not case.pyro_bound:
        raise NotImplementedError("Pyro has no such bound")
    if case.seeds > 1:
        raise NotImplementedError("Pyro runs one seed at a time")
    particles = case.objective.draws
    loss = JitTrace_ELBO(particles, ignore_jit_warnings=True) if jit else Trace_ELBO(particles)
    before = torch.get_rng_state()
    model, guide = case.in_pyro()
    with pyro.get_param_store().scope() as kept:
        svi = SVI(model, guide, Adam({"lr": case.step_size}), loss)
        guide(*some(case))  # a guide makes its parameters when first run, which the jit must not see
    torch.set_rng_state(before)

    def turn(steps: int) -> float:
        with pyro.get_param_store().scope(kept), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's remarks on constants
            start = time.perf_counter()
            for _ in range(steps):
                svi.step(*some(case))
            return (time.perf_counter() - start) / steps

    return turn


def numpyro_chunk(case: Case, twin: Twin, svi: Any) -> Callable[..., Any]:
    """``(state, keys, *args) -> (state, losses)``: one ``svi.update`` a key, rows drawn and gathered inside.

    A jitted ``lax.scan``, over seeds by ``vmap``; or a jitted call a step, where a case says that this is faster.
    """
    import jax

    size = None if case.minibatch is None else case.minibatch.size

    def one(state: Any, key: Any, *args: Any) -> Any:
        rows = {} if size is None else {"rows": jax.random.randint(key, (size,), 0, len(args[0]))}
        return svi.update(state, *args, **rows)

    def chunk(state: Any, keys: Any, *args: Any) -> Any:
        return jax.lax.scan(lambda state, key: one(state, key, *args), state, keys)

    if case.scan:
        return jax.jit(jax.vmap(chunk, (0, 0, *(None for _ in twin.args))) if case.seeds > 1 else chunk)
    jitted = jax.jit(one)

    def loop(state: Any, keys: Any, *args: Any) -> Any:
        losses = []
        for key in keys:
            state, loss = jitted(state, key, *args)
            losses.append(loss)
        return state, jax.numpy.stack(losses)

    return loop


def numpyro_scan(case: Case) -> Turn:
    """Steps of :func:`numpyro_chunk`, compiled before the clock runs."""
    import jax
    from jax import random
    from numpyro.infer import SVI
    from numpyro.optim import Adam

    twin, program, many = case.twin(), case.program(), case.seeds > 1
    params = None if case.params is None else case.params(program, program.initial())
    start = numpyro_start(case, twin, params)
    svi = SVI(twin.model, twin.guide, Adam(case.step_size), twin.loss)
    begin = lambda key: svi.init(key, *twin.args, init_params=start)  # noqa: E731
    state = jax.vmap(begin)(random.split(random.PRNGKey(0), case.seeds)) if many else begin(random.PRNGKey(0))
    compiled = numpyro_chunk(case, twin, svi)
    known: set[int] = set()
    key = random.PRNGKey(1)

    def turn(steps: int) -> float:
        nonlocal state, key
        key, own = random.split(key)
        keys = random.split(own, (case.seeds, steps) if many else steps)
        if steps not in known:
            jax.block_until_ready(compiled(state, keys, *twin.args))
            known.add(steps)
        start = time.perf_counter()
        state, losses = jax.block_until_ready(compiled(state, keys, *twin.args))
        seconds = (time.perf_counter() - start) / steps
        if not bool(jax.numpy.isfinite(losses).all()):
            raise RuntimeError("NumPyro's loss is not finite")
        return seconds

    return turn


def numpyro_run(case: Case, steps: int) -> float:
    """Seconds per step of ``svi.run(key, steps, *args, progress_bar=False)`` as a user calls it, compiling included.

    The progress bar is off because with it NumPyro makes one call a step.
    """
    from jax import block_until_ready, random
    from numpyro.infer import SVI
    from numpyro.optim import Adam

    twin = case.twin()
    svi = SVI(twin.model, twin.guide, Adam(case.step_size), twin.loss)
    start = time.perf_counter()
    block_until_ready(svi.run(random.PRNGKey(0), steps, *twin.args, progress_bar=False).losses)
    return (time.perf_counter() - start) / steps
