"""KL(q || p) in nats of every family on targets of known density, all given the same wall clock.

    python examples/bbvi_families.py --seconds 60 --seeds 10 --out runs/kl

The evidence of a target is one, so KL(q || p) is the mean of log q - log p over draws of q. A family's number of steps
is what its own time per step, measured first, affords; the step size falls by a cosine over exactly these steps.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple

import torch
import typer

import bbvi_conv as bc
from bbvi_conv.engine import Stream, make_engine, start_carry
from bbvi_conv.model_file import load_module
from bbvi_conv.posterior import draw

TARGETS = ("banana", "funnel", "two_modes")
FAMILIES: dict[str, tuple[Any, float]] = {
    "full-rank": (bc.FullRank(1.0), 0.05),
    "real-nvp": (bc.RealNVP(init_scale=1.0), 0.01),
    "iaf": (bc.IAF(init_scale=1.0), 0.01),
    "neural-spline": (bc.NeuralSpline(init_scale=1.0), 0.01),
    "sylvester": (bc.Sylvester(init_scale=1.0), 0.01),
    "planar": (bc.Planar(init_scale=1.0), 0.01),
    "mixture": (bc.Mixture(4, bc.FullRank(1.0), spread=3.0), 0.05),
    "mixture-of-flows": (bc.Mixture(2, bc.RealNVP(num_layers=4, init_scale=1.0), spread=3.0), 0.01),
}
"""Name -> family and first step size."""
DRAWS, CALIBRATION = 8, 20


class Result(NamedTuple):
    """One run: KL in nats with its standard error, steps made, and the share of draws left of zero."""

    kl: float
    error: float
    steps: int
    left: float


def affordable(module: ModuleType, family: Any, seconds: float, *, engine: str = "auto") -> int:
    """Steps that ``seconds`` pay for, compilation left out."""
    program = bc.build(module.model, None, module.data(), family=family, dtype=torch.float64)
    rule, stream = bc.Adam(bc.Constant(1e-3)), Stream(program, 0, "optimise", DRAWS)
    runner = make_engine(engine, program, bc.ELBO(DRAWS), rule)
    carry, _ = runner.advance(start_carry(rule, program.initial()), stream, 0, CALIBRATION)
    start = time.perf_counter()
    runner.advance(carry, stream, CALIBRATION, CALIBRATION)
    return max(1, int(seconds * CALIBRATION / (time.perf_counter() - start)))


def run(
    module: ModuleType, family: Any, size: float, steps: int, seed: int, *, engine: str = "auto", count: int = 100_000
) -> Result:
    """Fit by the ELBO, and measure by ``count`` draws."""
    program = bc.build(module.model, None, module.data(), family=family, dtype=torch.float64, seed=seed)
    rule, stream = bc.Adam(bc.CosineDecay(size, steps)), Stream(program, seed, "optimise", DRAWS)
    runner = make_engine(engine, program, bc.ELBO(DRAWS), rule)
    carry, _ = runner.advance(start_carry(rule, program.initial()), stream, 0, steps)
    drawn = draw(program, carry.x, count, seed)
    assert drawn.log_p is not None
    log_ratio = drawn.log_q - drawn.log_p
    left = float((drawn.latent["z"][:, 0] < 0).double().mean())
    return Result(float(log_ratio.mean()), float(log_ratio.std()) / count**0.5, steps, left)


def main(
    out: Path = Path("runs/kl"),
    seconds: float = 60.0,
    seeds: int = 10,
    targets: list[str] = list(TARGETS),  # noqa: B006 - typer reads it
    families: list[str] = list(FAMILIES),  # noqa: B006 - typer reads it
) -> None:
    """Measure, print a table of medians over seeds, and write results.json."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in targets:
        module = load_module(name)
        for label in families:
            family, size = FAMILIES[label]
            steps = affordable(module, family, seconds)
            results = [run(module, family, size, steps, seed) for seed in range(seeds)]
            row = {"target": name, "family": label, "kl_nats": median(r.kl for r in results)}
            rows.append(row | {"seconds": seconds, "runs": [r._asdict() for r in results]})
            typer.echo(f"{name:10} {label:17} KL {row['kl_nats']:8.4f} nats, {steps} steps")
            (out / "results.json").write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    typer.run(main)
