"""One case on a number of threads, in this process; and the same in a fresh one."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.agree import check
from benchmarks.case import Case
from benchmarks.timing import interleave, ratio, summary

PAIR = ("ours", "numpyro_scan")
PEERS = ("ours", "numpyro_scan", "pyro", "pyro_jit")
"""Contenders with turns; a case may add its own."""


def measure(
    name: str,
    case: Case,
    *,
    threads: int,
    engine: str = "auto",
    rounds: int = 7,
    scale: float = 1.0,
    run_steps: int = 2000,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """The row of a case: medians in microseconds per step, ratios round by round, and what could not be had and why.

    Args:
        name: of the case.
        case: the case.
        threads: of torch; the caller has set those of XLA.
        engine: ours.
        rounds: turns of every contender in one attempt.
        scale: of the case's steps of a turn.
        run_steps: steps of ``svi.run`` and ``bc.fit``; 0: leave them out.
        only: contenders; empty: all.
    Raises:
        Disagreement: if the sides of the case do not pose the same problem.
    """
    torch.set_num_threads(threads)
    start = resident()
    turns, missing = _contenders(name, case, engine, only)
    fast, slow = max(1, int(case.steps * scale)), max(1, int(case.pyro_steps * scale))
    steps = {contender: fast if contender in PAIR else slow for contender in turns}
    seconds, attempts = interleave(turns, steps, rounds=rounds, pair=PAIR)
    figures = {contender: summary(values) for contender, values in seconds.items()}
    row: dict[str, Any] = {
        "case": name,
        "threads": threads,
        "steps": fast,
        "rounds": rounds,
        "attempts": attempts,
        "engine": getattr(turns.get("ours"), "engine", (None, ""))[0],
        **{f"{contender}_us": None for contender in PEERS},
        **{f"{contender}_us": 1e6 * figure.median for contender, figure in figures.items()},
        "numpyro_run_us": None,
        "ours_fit_us": None,
        "ratio_numpyro_scan": None,
        "ratio_pyro": None,
        "spread": next(iter(figures.values())).spread,
        "notes": case.notes,
        "missing": missing,
    }
    if set(PAIR) <= set(seconds):
        found = ratio(seconds["ours"], seconds["numpyro_scan"])
        row["ratio_numpyro_scan"], row["spread"] = found.median, found.spread
    if {"ours", "pyro"} <= set(seconds):
        row["ratio_pyro"] = ratio(seconds["pyro"], seconds["ours"]).median
    row["ratio_others"] = {
        name: ratio(seconds["ours"], seconds[name]).median for name in case.others if {"ours", name} <= set(seconds)
    }
    if run_steps and case.seeds == 1:
        within = max(1, min(run_steps, int(60 / figures["ours"].median)))  # about a minute at most
        row |= _whole_runs(case, within, engine, numpyro="numpyro_scan" in turns)
    row["start_mib"], row["peak_mib"] = start, resident()
    return row


def _contenders(
    name: str, case: Case, engine: str, only: Sequence[str]
) -> tuple[dict[str, Callable[[int], float]], dict[str, str]]:
    """Who takes turns, warmed up by one step; and who does not, with the reason."""
    missing = {}
    if find_spec("numpyro") is None:
        missing["numpyro_scan"] = "NumPyro is not installed"
    elif not only or len(only) > 1:
        check(name, case)
    makers: dict[str, Callable[[], Callable[[int], float]]] = {
        "ours": lambda: peers.ours(case, engine),
        "numpyro_scan": lambda: peers.numpyro_scan(case),
        "pyro": lambda: peers.pyro_svi(case),
        "pyro_jit": lambda: peers.pyro_svi(case, jit=True),
        **case.others,
    }
    turns = {}
    for contender, make in makers.items():
        if contender in missing or (only and contender not in only):
            continue
        try:
            turn = make()
            turn(1)
        except Exception as error:  # a peer that cannot do a case is a finding, not a failure of the rest
            if contender == "ours":
                raise
            missing[contender] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        else:
            turns[contender] = turn
    return turns, missing


def _whole_runs(case: Case, steps: int, engine: str, *, numpyro: bool) -> dict[str, Any]:
    """A step of ``bc.fit`` and of ``svi.run``, everything included, and the monitor's share of ours."""
    seconds, fit = peers.ours_fit(case, steps, engine)
    monitor = fit.seconds["monitor"]
    return {
        "run_steps": steps,
        "ours_fit_us": 1e6 * seconds,
        "monitor_share": monitor / max(monitor + fit.seconds["steps"], 1e-12),
        "numpyro_run_us": 1e6 * peers.numpyro_run(case, steps) if numpyro else None,
    }


def resident() -> float:
    """Largest resident size of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fresh(arguments: Sequence[str], *, threads: int, environment: Mapping[str, str] | None = None) -> Any:
    """Run ``python -m benchmarks ...`` in a new process with that many threads; what it wrote as JSON.

    Raises:
        RuntimeError: with the end of its messages.
    """
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "NPROC": str(threads)}
    env["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'}"
    env["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", "benchmarks", *arguments, "--json", str(out)]
        done = subprocess.run(
            command, env={**env, **(environment or {})}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command[1:])} failed: {done.stderr.strip()[-2000:]}")
        return json.loads(out.read_text(encoding="utf-8"))
