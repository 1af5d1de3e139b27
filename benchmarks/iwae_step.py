"""Cost of an IWAE step beside an ELBO step with as many draws, and beside pythae's IWAE: same network, one run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import bbvi_conv as bc
from benchmarks import peers
from benchmarks.cases.vae import PIXELS, vae
from benchmarks.machine import machine
from benchmarks.timing import interleave, ratio, summary

HIDDEN, LATENT, STEP_SIZE = 400, 20, 1e-3


def pythae_iwae(particles: int, data: Tensor, batch: int) -> peers.Turn:
    """A step of pythae's IWAE with the network of the ``vae`` case and torch's Adam."""
    from pythae.models import IWAE, IWAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * LATENT))

        def forward(self, x: Tensor) -> ModelOutput:
            loc, log_scale = self.layers(x).chunk(2, dim=-1)
            return ModelOutput(embedding=loc, log_covariance=2 * log_scale)

    class Decoder(BaseDecoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, PIXELS))

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.layers(z).sigmoid())

    torch.manual_seed(0)
    config = IWAEConfig(input_dim=(PIXELS,), latent_dim=LATENT, reconstruction_loss="bce", number_samples=particles)
    model = IWAE(config, encoder=Encoder(), decoder=Decoder())
    optimiser = torch.optim.Adam(model.parameters(), lr=STEP_SIZE)

    def turn(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            rows = torch.randint(len(data), (batch,))
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
    cases = {name: vae(o, hidden=HIDDEN, latent=LATENT, batch=batch, rows=4096) for name, o in objectives.items()}
    turns = {name: peers.ours(case, engine) for name, case in cases.items()}
    try:
        turns["pythae_iwae"] = pythae_iwae(particles, cases["iwae"].args[0], batch)
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
