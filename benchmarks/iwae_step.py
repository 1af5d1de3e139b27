"""Cost of an IWAE step beside an ELBO step with as many draws, and beside pythae's IWAE: same network, one run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

import bbvi_conv as bc
from benchmarks import peers
from benchmarks.cases.vae import PIXELS, mlp, vae
from benchmarks.loops import Autoencoder, in_pythae
from benchmarks.machine import machine
from benchmarks.timing import interleave, ratio, summary

HIDDEN, LATENT = 400, 20


def pythae_iwae(particles: int, problem: Autoencoder) -> peers.Turn:
    """A step of pythae's IWAE with torch's Adam."""
    model, data = in_pythae(problem, "IWAE", number_samples=particles), problem.images
    optimiser = torch.optim.Adam(model.parameters(), lr=problem.step_size)

    def turn(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            rows = torch.randint(len(data), (problem.batch,))
            optimiser.zero_grad()
            model({"data": data[rows].float()}).loss.backward()
            optimiser.step()
        return (time.perf_counter() - start) / steps

    return turn


def main(
    particles: Annotated[int, typer.Option(help="K, and M of the ELBO")] = 50,
    batch: Annotated[int, typer.Option(help="rows of a step")] = 128,
    rounds: Annotated[int, typer.Option(help="times every contender has its turn")] = 7,
    steps: Annotated[int, typer.Option(help="steps of a turn")] = 3,
    threads: Annotated[int, typer.Option(help="torch threads")] = 1,
    engine: Annotated[str, typer.Option(help="our engine")] = "auto",
    out: Annotated[Path | None, typer.Option("--json", help="write the result here")] = None,
) -> None:
    """IWAE beside an ELBO of as many draws and pythae: seconds per step and ratios round by round, as JSON."""
    torch.set_num_threads(threads)
    objectives = {
        "iwae": bc.IWAE(particles),
        "elbo": bc.ELBO(particles),
        "iwae_doubly_reparameterised": bc.IWAE(particles, "doubly-reparameterised"),
    }
    sizes = {"hidden": HIDDEN, "latent": LATENT, "batch": batch, "rows": 4096}
    cases = {name: vae(o, **sizes) for name, o in objectives.items()}
    turns = {name: peers.ours(case, engine) for name, case in cases.items()}
    try:
        turns["pythae_iwae"] = pythae_iwae(particles, mlp(**sizes))
    except ImportError as error:
        typer.echo(f"pythae is left out: {error}; make benchmark-deps installs it", err=True)
    seconds, attempts = interleave(turns, dict.fromkeys(turns, steps), rounds=rounds, pair=("iwae", "elbo"))
    result = {
        **machine(),
        "network": f"{PIXELS}-{HIDDEN}-{LATENT}",
        "batch": batch,
        "particles": particles,
        "threads": threads,
        "attempts": attempts,
        "notes": cases["iwae"].notes,
        "seconds_per_step": {name: summary(values)._asdict() for name, values in seconds.items()},
        "iwae_over": {
            name: ratio(seconds["iwae"], values)._asdict() for name, values in seconds.items() if name != "iwae"
        },
    }
    text = json.dumps(result, indent=2)
    typer.echo(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
