"""Steps on a GPU beside NumPyro's on the same GPU, and beside the time that the chip itself would need."""

from __future__ import annotations

import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import bbvi_conv as bc
from bbvi_conv.engine.engine import TracedEngine, float32_products
from benchmarks import peers
from benchmarks.agree import check
from benchmarks.case import Case
from benchmarks.cases.garch import garch
from benchmarks.cases.vae import vae
from benchmarks.machine import machine
from benchmarks.measure import PAIR
from benchmarks.peers import Turn
from benchmarks.timing import interleave, ratio, summary

PRECISIONS = {"float32": (None, "highest"), "tf32": ("tf32", "tensorfloat32"), "bfloat16": ("bfloat16", None)}
"""Name -> our ``amp``, and what JAX calls products of that precision, where it has them for float32 numbers."""


class Ceilings(NamedTuple):
    """What the chip was seen to do: products in FLOP/s by precision, and bytes/s of a copy, read and written."""

    products: dict[str, float]
    copy: float


def ceilings() -> Ceilings:
    """Of this GPU: a product of matrices of 8,192 by 8,192 random numbers, a copy of 4 GiB."""
    a, b = torch.randn(2, 8192, 8192, device="cuda").unbind()
    done = {}
    for name in PRECISIONS:
        left, right = (a.bfloat16(), b.bfloat16()) if name == "bfloat16" else (a, b)
        with float32_products(name == "tf32"):
            done[name] = 2 * 8192**3 / _seconds(lambda left=left, right=right: left @ right)
    source = torch.empty(2**30, device="cuda").normal_()
    target = torch.empty_like(source)
    return Ceilings(done, 2 * source.numel() * source.element_size() / _seconds(lambda: target.copy_(source)))


def _seconds(work: Callable[[], Any], repeats: int = 10) -> float:
    """Median by device events, after three that are not counted."""
    times = []
    for repeat in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        if repeat >= 3:
            times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def needed(case: Case) -> tuple[int, int]:
    """Operations of products in one step, and the fewest bytes it must move: what it is given, and what it leaves."""
    from bbvi_conv.run import Run

    engine = Run(case.program(), case.settings(engine="traced")).engine
    assert isinstance(engine, TracedEngine)
    graph, example, _ = engine.side_by_side(1, checked=False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        made = graph(*example)
    return counter.get_total_flops(), _bytes(example) + _bytes(made)


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def numpyro(case: Case, precision: str) -> Turn:
    """NumPyro's turn with JAX's products at that precision."""
    import jax

    with jax.default_matmul_precision(precision):
        inner = peers.numpyro_scan(case)

    def turn(steps: int) -> float:
        with jax.default_matmul_precision(precision):
            return inner(steps)

    return turn


def row(case: Case, precision: str, limits: Ceilings, *, steps: int, rounds: int) -> dict[str, Any]:
    """One case at one precision: microseconds, ratios round by round, and the share of the floor's speed."""
    amp, in_jax = PRECISIONS[precision]
    turns = {"ours": peers.ours(case, "compiled", amp=amp)}
    if in_jax is not None:
        turns["numpyro_scan"] = numpyro(case, in_jax)
    pair = PAIR if in_jax else None
    seconds, attempts = interleave(turns, dict.fromkeys(turns, steps), rounds=rounds, pair=pair)
    figures = {name: summary(values) for name, values in seconds.items()}
    flops, moved = needed(case)
    floor = max(flops / limits.products[precision], moved / limits.copy)
    found = ratio(seconds["numpyro_scan"], seconds["ours"]) if pair else None
    return {
        "precision": precision,
        **{f"{name}_us": 1e6 * figure.median for name, figure in figures.items()},
        "numpyro_over_ours": found and found.median,
        "spread": found.spread if found else figures["ours"].spread,
        "attempts": attempts,
        "gflop": flops / 1e9,
        "mb": moved / 1e6,
        "floor_us": 1e6 * floor,
        "share_of_floor": floor / figures["ours"].median,
        "engine": turns["ours"].engine,  # type: ignore[attr-defined]
    }


def main(
    batches: Annotated[str, typer.Option(help="comma-separated rows of a step")] = "128,1024",
    particles: Annotated[str, typer.Option(help="comma-separated K; 1 is the ELBO")] = "1,50",
    precisions: Annotated[str, typer.Option(help="comma-separated")] = ",".join(PRECISIONS),
    recursions: Annotated[str, typer.Option(help="comma-separated lengths of GARCH series; none without")] = "",
    rounds: Annotated[int, typer.Option(help="turns of either side")] = 5,
    seconds: Annotated[float, typer.Option(help="that a turn takes, about")] = 0.1,
    out: Annotated[Path | None, typer.Option("--json", help="write the result here")] = None,
) -> None:
    """The MLP VAE and recursions on a GPU beside NumPyro there, and beside the floor of arithmetic and bandwidth."""
    os.environ["JAX_PLATFORMS"] = "cuda"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device here: run this on a machine that has one")
    limits = ceilings()
    rows: list[dict[str, Any]] = []
    result = {**machine(), "gpu": torch.cuda.get_device_name(), "ceilings": limits._asdict(), "rows": rows}
    for labels, case in _cases(_numbers(particles), _numbers(batches), _numbers(recursions)):
        for precision in precisions.split(",") if labels["case"] == "vae" else ["float32"]:
            guess = peers.ours(case, "compiled", amp=PRECISIONS[precision][0])(256)
            steps = max(64, 64 * round(seconds / guess / 64))
            rows.append({**labels, "steps": steps, **row(case, precision, limits, steps=steps, rounds=rounds)})
            typer.echo(json.dumps(rows[-1]))
            if out is not None:
                out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    typer.echo(json.dumps(result["ceilings"]))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _cases(particles: list[int], batches: list[int], recursions: list[int]) -> Iterator[tuple[dict[str, Any], Case]]:
    """What a row says of its case, and the case, whose sides agree."""
    import jax

    for count, batch in itertools.product(particles, batches):
        case = vae(bc.ELBO(1) if count == 1 else bc.IWAE(count), batch=batch, device="cuda")
        with jax.default_matmul_precision("highest"):
            check(f"batch {batch}, K {count}", case)
        yield {"case": "vae", "batch": batch, "particles": count}, case
    for length in recursions:
        check(f"garch {length}", garch(length))  # Pyro's own guide does not run on the device
        yield {"case": "garch", "rounds": length}, garch(length, device="cuda")
