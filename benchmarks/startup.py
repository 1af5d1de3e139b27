"""From a fresh process to the end of the first step, cold and warm, and of a whole short fit, imports apart."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.case import Case
from benchmarks.measure import fresh

CACHES = ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR")
"""Where compilers keep what they built: a new folder is a cold start."""


def first_step(case: Case, side: str, engine: str = "auto") -> dict[str, Any]:
    """Seconds from model to the end of the first step, in this process; ``side``: ``"ours"`` or ``"numpyro"``."""
    from benchmarks import peers

    if side == "numpyro":
        import numpyro

        assert numpyro  # its import is not part of the step
        start = time.perf_counter()
        peers.numpyro_run(case, 1)
        return {"seconds": time.perf_counter() - start}
    from bbvi_conv.run import Run

    start = time.perf_counter()
    program = case.program()
    run = Run(program, case.settings(engine=engine))
    carry, _ = run.engine.advance(run.start(program.initial()).carry, run.stream, 0, 1)
    float(carry.x[0])
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "engine": run.engine.name, "reason": run.engine.reason}


def startup(name: str, *, engine: str, threads: int, warm: int = 2) -> dict[str, Any]:
    """Cold and warm first steps of both sides: every one in a process of its own, caches in a folder that starts empty.

    Args:
        name: of the case.
        engine: ours.
        threads: of the processes.
        warm: processes after the cold one; the fastest counts.
    """
    row: dict[str, Any] = {"case": name, "threads": threads}
    step = ["first-step", name, "--engine", engine]
    for side in ("ours", "numpyro"):
        with tempfile.TemporaryDirectory() as folder:
            environment = {variable: str(Path(folder) / variable.lower()) for variable in CACHES}
            made = [fresh([*step, "--side", side], threads=threads, environment=environment) for _ in range(1 + warm)]
        row[f"{side}_cold_s"], row[f"{side}_warm_s"] = made[0]["seconds"], min(m["seconds"] for m in made[1:])
        row.update({key: made[0][key] for key in ("engine", "reason") if key in made[0]})
    return row
