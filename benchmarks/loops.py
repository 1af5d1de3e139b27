"""The step of a VAE as people write it: a loop in PyTorch, the same under ``torch.compile``, pythae's trainer."""

from __future__ import annotations

import copy
import logging
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.peers import Turn

SCALE = 0.1
"""Standard deviation of a Gaussian pixel."""


class Pixels(NamedTuple):
    """How images are judged.

    Attributes:
        seen: bytes -> numbers.
        density: decoded -> Pyro's distribution of an image.
        loss: (decoded, numbers) -> minus its log-density, nats, summed over images.
        mean: decoded -> expected image.
        in_pythae: pythae's name of such a loss.
    """

    seen: Callable[[Tensor], Tensor]
    density: Callable[[Tensor], Any]
    loss: Callable[[Tensor, Tensor], Tensor]
    mean: Callable[[Tensor], Tensor]
    in_pythae: str


def _bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, x, reduction="sum")


def _gaussian(mean: Tensor, x: Tensor) -> Tensor:
    return (x - mean).square().sum() / (2 * SCALE**2) + x.numel() * math.log(SCALE * math.sqrt(2 * math.pi))


BERNOULLI = Pixels(
    Tensor.float, lambda logits: dist.Bernoulli(logits=logits).to_event(1), _bernoulli, torch.sigmoid, "bce"
)
GAUSSIAN = Pixels(
    lambda x: x.float() / 255, lambda mean: dist.Normal(mean, SCALE).to_event(3), _gaussian, lambda mean: mean, "mse"
)


@dataclass(frozen=True)
class Autoencoder:
    """A VAE with z ~ N(0, I) and a diagonal Gaussian encoder, which gives location and log scale side by side.

    Attributes:
        encoder, decoder: networks; the loops train copies.
        latent: dimensions of z.
        images: all of them, resident bytes.
        pixels: how they are judged.
        batch: rows of a step, drawn with replacement.
        step_size: of Adam.
    """

    encoder: nn.Module
    decoder: nn.Module
    latent: int
    images: Tensor
    pixels: Pixels
    batch: int
    step_size: float = 1e-3

    def loss(self, encoder: nn.Module, decoder: nn.Module, images: Tensor, noise: Tensor) -> Tensor:
        """Negative ELBO of one draw, nats per image; ``noise`` ``(B, latent)`` is standard normal."""
        x = self.pixels.seen(images)
        loc, log_scale = encoder(x).chunk(2, dim=-1)
        z = loc + log_scale.exp() * noise
        divergence = (0.5 * (z.square() - noise.square()) - log_scale).sum()
        return (self.pixels.loss(decoder(z), x) + divergence) / len(x)


def contenders(problem: Autoencoder) -> dict[str, Callable[[], Turn]]:
    """Makers by name, from the networks as they now are. Adam: torch's default, and for others the fastest it has."""
    encoder, decoder = copy.deepcopy((problem.encoder, problem.decoder))
    start = replace(problem, encoder=encoder, decoder=decoder)
    return {
        "torch_loop": partial(torch_loop, start),
        "torch_loop_fused_adam": partial(torch_loop, start, fused=True),
        "torch_compile_loop": partial(torch_loop, start, compiled=True, fused=True),
        "pythae_trainer": partial(pythae_trainer, start),
    }


def torch_loop(problem: Autoencoder, *, compiled: bool = False, fused: bool = False) -> Turn:
    """Modules, ``torch.optim.Adam``, resident rows; ``compiled``: loss and gradient by ``torch.compile``.

    ``turn.losses`` are those of the last turn.
    """
    encoder, decoder = copy.deepcopy((problem.encoder, problem.decoder))
    optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=problem.step_size, fused=fused)
    loss_of = torch.compile(problem.loss) if compiled else problem.loss

    def turn(steps: int) -> float:
        losses = []
        start = time.perf_counter()
        for _ in range(steps):
            images = problem.images[torch.randint(len(problem.images), (problem.batch,))]
            optimiser.zero_grad()
            loss = loss_of(encoder, decoder, images, torch.randn(problem.batch, problem.latent))
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        seconds = (time.perf_counter() - start) / steps
        turn.losses = torch.stack(losses).tolist()  # type: ignore[attr-defined]
        return seconds

    return turn


def in_pythae(problem: Autoencoder, kind: str, **options: Any) -> Any:
    """A model of pythae, such as its ``"VAE"``, with copies of the networks and the loss nearest to ours."""
    import pythae.models
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = copy.deepcopy(problem.encoder)

        def forward(self, x: Tensor) -> ModelOutput:
            loc, log_scale = self.layers(x).chunk(2, dim=-1)
            return ModelOutput(embedding=loc, log_covariance=2 * log_scale)

    class Decoder(BaseDecoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = copy.deepcopy(problem.decoder)

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=problem.pixels.mean(self.layers(z)))

    config = getattr(pythae.models, f"{kind}Config")(
        input_dim=tuple(problem.images.shape[1:]),
        latent_dim=problem.latent,
        reconstruction_loss=problem.pixels.in_pythae,
        **options,
    )
    return getattr(pythae.models, kind)(config, encoder=Encoder(), decoder=Decoder())


def pythae_trainer(problem: Autoencoder) -> Turn:
    """``BaseTrainer.train_step``: an epoch over as many images as the steps of the turn need.

    Making the loader, progress bar, logs and checkpoints are left out. ``turn.losses`` is the epoch's mean.
    """
    logging.getLogger("pythae").setLevel(logging.ERROR)
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import CallbackHandler, TrainingCallback

    model, images = in_pythae(problem, "VAE"), problem.pixels.seen(problem.images)
    data = BaseDataset(images, torch.zeros(len(images)))
    config = BaseTrainerConfig(
        output_dir=tempfile.gettempdir(),
        learning_rate=problem.step_size,
        per_device_train_batch_size=problem.batch,
        no_cuda=True,
    )
    trainer = BaseTrainer(model=model, train_dataset=data, training_config=config)
    trainer.set_optimizer()
    trainer.callback_handler = CallbackHandler([TrainingCallback()], model)
    epoch = 0

    def turn(steps: int) -> float:
        nonlocal epoch
        epoch += 1
        size = steps * problem.batch
        rows = torch.randint(len(images), (size,)).tolist()
        trainer.train_loader = trainer.get_train_dataloader(torch.utils.data.Subset(data, rows))
        start = time.perf_counter()
        loss = float(trainer.train_step(epoch))
        seconds = (time.perf_counter() - start) / steps
        turn.losses = [loss]  # type: ignore[attr-defined]
        return seconds

    return turn
