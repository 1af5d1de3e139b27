"""Choose an engine, and say why."""

from __future__ import annotations

import math
import warnings

from bbvi_conv.engine.calculus import Calculus
from bbvi_conv.engine.compiled import CompiledEngine
from bbvi_conv.engine.cuda_graph import CudaGraphEngine
from bbvi_conv.engine.engine import EagerEngine, Engine, TracedEngine
from bbvi_conv.engine.native import CannotCompile, NoCompiler
from bbvi_conv.objectives.objective import Objective
from bbvi_conv.optim import Optimiser
from bbvi_conv.program.aten_graph import Untraceable, first_sentence
from bbvi_conv.program.graphs import widths
from bbvi_conv.program.program import Program
from bbvi_conv.program.scan import operations, scans
from bbvi_conv.program.trace import TracedLogWeights

ENGINES = ("auto", "eager", "traced", "compiled", "cuda-graph")

COMPILE_SECONDS = 5.0
COMPILE_SECONDS_PER_NODE = 0.01
STEP_SECONDS_PER_NODE = 5e-6
STEP_SECONDS_PER_NUMBER = 0.3e-9
"""What compiling costs, and what it saves, by the operations of a step and the numbers they compute."""

KERNEL_SECONDS = 1.5e-6
FUSE_SECONDS = 10.0
"""What an operation of its own costs in a captured step, and what fusing a step takes (an H200: 4 to 20 s).

The rounds of a scan are taken to need as long.
"""

MOST_NODES = 6_000
"""Operations of a step up to which ``"auto"`` compiles: a loop in a model that is traced round by round has more."""


def make_engine(
    name: str,
    program: Program,
    objective: Objective,
    optimiser: Optimiser,
    *,
    normaliser: float = 1.0,
    num_seeds: int = 1,
    steps: float = math.inf,
    reason: str = "asked for",
    amp: str | None = None,
) -> Engine:
    """The engine of that name, for one seed or several at once.

    ``"auto"`` traces where the program allows it, and compiles where the remaining ``steps`` repay it, with those of
    earlier runs of the same program, or an earlier process has done so; where compiling fails it warns once and runs
    the traced steps. On a CUDA device steps are captured and replayed, fused (``"compiled"``) where that repays
    compiling, or operation by operation (``"cuda-graph"``); on any other they are traced. An engine asked for by its
    name gives ``reason``. ``amp`` is how matrix products and convolutions of a step round.

    Raises:
        ValueError: unknown name; ``"traced"`` or ``"compiled"`` for a program that cannot be (with the reason), or an
            engine of the other device; several seeds of a program whose buffers change.
    """
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; choose one of {', '.join(ENGINES)}")
    if name != "eager":
        try:
            calculus = Calculus(program, objective, TracedLogWeights(program), normaliser)
            traced = TracedEngine(calculus, optimiser, reason, num_seeds=num_seeds, amp=amp)
            return traced if name == "traced" else _compiled(name, traced, steps)
        except Untraceable as error:
            if name != "auto":
                raise ValueError(f'the program cannot be traced: {error}; use engine="eager" or "auto"') from error
            reason = f"cannot be traced: {error}"
    if amp is not None:
        raise ValueError(
            f"amp needs steps that are graphs, and those of the eager engine ({reason}) are none: leave it out"
        )
    calculus = Calculus(program, objective, program.log_weights, normaliser)
    return EagerEngine(calculus, optimiser, reason, num_seeds=num_seeds)


def _compiled(name: str, traced: TracedEngine, steps: float) -> Engine:
    """The engine over a traced one: for ``"auto"`` the one that pays, with the reason."""
    nodes, made = operations(traced.one.graph)
    device = traced.calculus.program.device
    if device.type == "cuda":
        return _captured(name, traced, steps * made * KERNEL_SECONDS)
    if name == "cuda-graph" or (name == "compiled" and device.type != "cpu"):
        raise ValueError(f'engine="{name}" does not run on {device}; use engine="auto"')
    if device.type != "cpu":
        traced.reason = f"the program traces, and nothing is compiled for {device}"
        return traced
    if name == "auto" and nodes > MOST_NODES:
        traced.reason = f"a step has {nodes:,} operations, too many to compile: write loops with bc.scan"
        return traced
    try:
        engine = CompiledEngine(traced, traced.reason)
        found = engine.cached
        cost = COMPILE_SECONDS + COMPILE_SECONDS_PER_NODE * nodes
        numbers = traced.num_seeds * sum(widths(traced.one.graph))
        saved = steps * (STEP_SECONDS_PER_NODE * made + STEP_SECONDS_PER_NUMBER * numbers)
        if name == "auto" and not found and engine.lost(saved) < cost:
            traced.reason = f"the program traces, and {steps:,.0f} steps do not repay compiling"
            return traced
        built = engine.prepare()
    except (CannotCompile, NoCompiler) as error:
        if name == "compiled":
            raise ValueError(f'the program cannot be compiled: {error}; use engine="traced" or "auto"') from error
        warnings.warn(f"steps run uncompiled: {error}", stacklevel=3)
        traced.reason = f"the program traces, but cannot be compiled: {error}"
        return traced
    if name == "auto":
        engine.reason = "compiled for this run" if built else "compiled by an earlier run"
    return engine


def _captured(name: str, traced: TracedEngine, saved: float) -> Engine:
    """Replayed steps on a CUDA device: for ``"auto"`` fused where the seconds saved repay it."""
    cost = FUSE_SECONDS * (1 + len(scans(traced.one.graph)))
    if name == "compiled" or (name == "auto" and saved > cost):
        try:
            return CudaGraphEngine(traced, "compiled for this run" if name == "auto" else traced.reason, fuse=True)
        except RuntimeError as error:
            why = first_sentence(error)
            if name == "compiled":
                raise ValueError(f'the step cannot be compiled: {why}; use engine="cuda-graph" or "auto"') from error
            warnings.warn(f"steps run uncompiled: {why}", stacklevel=3)
    try:
        reason = "captured operation by operation: more does not repay compiling" if name == "auto" else traced.reason
        return CudaGraphEngine(traced, reason)
    except RuntimeError as error:
        if name == "cuda-graph":
            why = first_sentence(error)
            raise ValueError(f'the step cannot be captured: {why}; use engine="traced" or "auto"') from error
        warnings.warn(f"steps run one by one, they cannot be captured: {first_sentence(error)}", stacklevel=3)
        traced.reason = "the program traces, but its steps cannot be captured"
        return traced
