"""Cost of an IWAE step beside an ELBO step with as many draws, and beside pythae's IWAE: same network, one run.

    python benchmarks/iwae_step.py --threads 1 --out iwae_step.json

An MLP VAE 784-400-20 with Bernoulli pixels in float32: gather a batch, draw, forward, backward, Adam. Rounds are
interleaved (A B C D, B C D A, ...), a figure is the median over rounds, and its spread is that of the rounds. Noise is
drawn in blocks by this library; the share of a step in its block is added. ``make benchmark-deps`` installs pythae.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import pyro
import pyro.distributions as dist
import torch
import typer
from torch import Tensor, nn

import bbvi_conv as bc
from bbvi_conv.engine import Stream
from bbvi_conv.engine.choose import make_engine
from bbvi_conv.engine.engine import start_carry
from bbvi_conv.program.noise import BLOCK

PIXELS, HIDDEN, LATENT, ROWS, STEP_SIZE = 784, 400, 20, 4096, 1e-3

Step = Callable[[int], float]
"""Run that many steps; mean seconds of one."""


class Trunk(nn.Module):
    """784-400, then mean and log-variance of 20 latents."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU())
        self.loc, self.log_var = nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.hidden(x)
        return self.loc(h), self.log_var(h)


def decoder_logits() -> nn.Module:
    """20-400-784, logits."""
    return nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS))


def ours(objective: Any, data: Tensor, batch: int) -> Step:
    """A step of this library's engine."""
    torch.manual_seed(0)
    encoder, decoder = Trunk(), decoder_logits()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_var = encoder(x)
            pyro.sample("z", dist.Normal(loc, (0.5 * log_var).exp()).to_event(1))

    program = bc.build(model, guide, (data,), minibatch=bc.Minibatch(batch, plate="data"))
    optimiser = bc.Adam(bc.Constant(STEP_SIZE))
    engine = make_engine("auto", program, objective, optimiser, normaliser=len(data))
    stream = Stream(program, 0, "optimise", objective.draws)
    state, done = start_carry(optimiser, program.initial()), 0
    start = time.perf_counter()
    program.layout.draw(torch.Generator().manual_seed(0), BLOCK, objective.draws, dtype=program.dtype)
    noise = (time.perf_counter() - start) / BLOCK

    def run(steps: int) -> float:
        nonlocal state, done
        if (done + steps) // BLOCK != done // BLOCK:
            raise ValueError(f"the steps of all rounds must fit into one block of {BLOCK}: lower --rounds or --steps")
        start = time.perf_counter()
        state, _ = engine.advance(state, stream, done, steps)
        seconds = time.perf_counter() - start
        done += steps
        return seconds / steps + noise

    return run


def pythae_iwae(particles: int, data: Tensor, batch: int) -> Step:
    """A step of pythae's IWAE with the same network and torch's Adam."""
    from pythae.models import IWAE, IWAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.trunk = Trunk()

        def forward(self, x: Tensor) -> ModelOutput:
            loc, log_var = self.trunk(x)
            return ModelOutput(embedding=loc, log_covariance=log_var)

    class Decoder(BaseDecoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.logits = decoder_logits()

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.logits(z).sigmoid())

    torch.manual_seed(0)
    config = IWAEConfig(input_dim=(PIXELS,), latent_dim=LATENT, reconstruction_loss="bce", number_samples=particles)
    model = IWAE(config, encoder=Encoder(), decoder=Decoder())
    optimiser = torch.optim.Adam(model.parameters(), lr=STEP_SIZE)

    def run(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            rows = torch.randint(len(data), (batch,))
            optimiser.zero_grad()
            model({"data": data[rows]}).loss.backward()
            optimiser.step()
        return (time.perf_counter() - start) / steps

    return run


def main(
    particles: Annotated[int, typer.Option(help="K, and M of the ELBO")] = 50,
    batch: Annotated[int, typer.Option(help="rows of a step")] = 128,
    rounds: Annotated[int, typer.Option(help="times every contender has its turn")] = 7,
    steps: Annotated[int, typer.Option(help="steps of a turn")] = 3,
    threads: Annotated[int, typer.Option(help="torch threads")] = 1,
    out: Annotated[Path | None, typer.Option(help="also write the JSON here")] = None,
) -> None:
    """Measure, and print JSON: seconds per step by contender, and ratios round by round."""
    torch.set_num_threads(threads)
    data = torch.bernoulli(torch.full((ROWS, PIXELS), 0.2), generator=torch.Generator().manual_seed(0))
    contenders: dict[str, Step] = {
        "iwae": ours(bc.IWAE(particles), data, batch),
        "elbo": ours(bc.ELBO(particles), data, batch),
        "iwae_doubly_reparameterised": ours(bc.IWAE(particles, "doubly-reparameterised"), data, batch),
    }
    try:
        contenders["pythae_iwae"] = pythae_iwae(particles, data, batch)
    except ImportError as error:
        typer.echo(f"pythae is left out: {error}; make benchmark-deps installs it", err=True)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run(1)
    names = list(contenders)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody always follows the same one
            seconds[name].append(contenders[name](steps))
    result = {
        "network": f"{PIXELS}-{HIDDEN}-{LATENT}",
        "batch": batch,
        "particles": particles,
        "threads": threads,
        "versions": {name: _version(name) for name in ("torch", "pyro-ppl", "pythae")},
        "python": platform.python_version(),
        "seconds_per_step": {name: _summary(values) for name, values in seconds.items()},
        "iwae_over": {
            name: _summary([a / b for a, b in zip(seconds["iwae"], values, strict=True)])
            for name, values in seconds.items()
            if name != "iwae"
        },
    }
    text = json.dumps(result, indent=2)
    typer.echo(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    typer.run(main)
