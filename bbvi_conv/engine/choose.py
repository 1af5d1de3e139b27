"""Choose an engine, and say why."""

from __future__ import annotations

from bbvi_conv.engine.calculus import Calculus
from bbvi_conv.engine.engine import EagerEngine, Engine, TracedEngine
from bbvi_conv.objectives.objective import Objective
from bbvi_conv.optim import Optimiser
from bbvi_conv.program.program import Program
from bbvi_conv.program.trace import TracedLogWeights, Untraceable

ENGINES = ("auto", "eager", "traced")


def make_engine(
    name: str,
    program: Program,
    objective: Objective,
    optimiser: Optimiser,
    *,
    normaliser: float = 1.0,
    num_seeds: int = 1,
) -> Engine:
    """The engine of that name, for one seed or several at once; ``"auto"`` traces where the program allows it.

    Raises:
        ValueError: unknown name, ``"traced"`` for a program that cannot be traced (with the reason), or several seeds
            of a program whose buffers change.
    """
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; choose one of {', '.join(ENGINES)}")
    reason = "asked for"
    if name != "eager":
        try:
            calculus = Calculus(program, objective, TracedLogWeights(program), normaliser)
            why = "the program traces" if name == "auto" else reason
            return TracedEngine(calculus, optimiser, why, num_seeds=num_seeds)
        except Untraceable as error:
            if name == "traced":
                raise ValueError(f'the program cannot be traced: {error}; use engine="eager" or "auto"') from error
            reason = f"cannot be traced: {error}"
    calculus = Calculus(program, objective, program.log_weights, normaliser)
    return EagerEngine(calculus, optimiser, reason, num_seeds=num_seeds)
