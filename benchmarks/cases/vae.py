"""Variational autoencoders: an MLP on MNIST-sized images, under the ELBO and IWAE bounds, and a convolutional one."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import bbvi_conv as bc
from bbvi_conv.data import binarised, mnist
from benchmarks.case import Arrays, Case, Twin
from benchmarks.loops import BERNOULLI, GAUSSIAN, SCALE, Autoencoder, contenders

PIXELS = 784


def _digits(rows: int) -> Tensor:
    """Black and white images, uint8 ``(N, 784)``: MNIST where ``BBVI_CONV_DATA`` has it, else coin flips."""
    if os.environ.get("BBVI_CONV_DATA"):
        return binarised(mnist("train")[0].reshape(-1, PIXELS)[:rows], seed=0) // 255
    return torch.bernoulli(torch.full((rows, PIXELS), 0.13), generator=torch.Generator().manual_seed(0)).byte()


def _weights(module: nn.Module, name: str) -> Arrays:
    return {f"{name}.{key}": value.detach().numpy() for key, value in module.named_parameters()}


def _params(program: bc.Program, x: Tensor) -> Arrays:
    """Weights of the modules under their names in torch."""
    return {name.replace("$$$", "."): value.cpu().numpy() for name, value in program.constrained(x).items()}


def _numpyro_loss(objective: Any) -> Any:
    from numpyro.infer import RenyiELBO, Trace_ELBO

    if isinstance(objective, bc.IWAE):
        return RenyiELBO(alpha=0, num_particles=objective.num_particles)
    return Trace_ELBO(num_particles=objective.num_particles)


def _programs(problem: Autoencoder) -> tuple[Callable[..., None], Callable[..., None]]:
    """Pyro model and guide."""
    encoder, decoder, seen = problem.encoder, problem.decoder, problem.pixels.seen

    def model(images: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(images)):
            z = pyro.sample("z", dist.Normal(torch.zeros(problem.latent), 1.0).to_event(1))
            pyro.sample("image", problem.pixels.density(decoder(z)), obs=seen(images))

    def guide(images: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(images)):
            loc, log_scale = encoder(seen(images)).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


def _twins(encode: Any, decode: Any, latent: int, batch: int, seen: Any, pixels: Any) -> tuple[Any, Any]:
    """The same in NumPyro, which gathers the rows itself."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as npd

    def model(images: Any, rows: Any = None) -> None:
        with numpyro.plate("data", len(images), subsample_size=batch) as drawn:
            x = seen(images[drawn if rows is None else rows].astype(jnp.float32))
            z = numpyro.sample("z", npd.Normal(jnp.zeros(latent), 1.0).to_event(1))
            numpyro.sample("image", pixels(decode(z)), obs=x)

    def guide(images: Any, rows: Any = None) -> None:
        with numpyro.plate("data", len(images), subsample_size=batch) as drawn:
            x = seen(images[drawn if rows is None else rows].astype(jnp.float32))
            loc, log_scale = jnp.split(encode(x), 2, axis=-1)
            numpyro.sample("z", npd.Normal(loc, jnp.exp(log_scale)).to_event(1))

    return model, guide


def _layer(weights: Arrays, name: str, x: Any) -> Any:
    """A linear layer in NumPyro that starts at torch's weights."""
    weight, bias = _pair(weights, name)
    return x @ weight.T + bias


def _pair(weights: Arrays, name: str) -> list[Any]:
    import numpyro

    return [numpyro.param(f"{name}.{part}", weights[f"{name}.{part}"]) for part in ("weight", "bias")]


def mlp(*, hidden: int = 400, latent: int = 20, batch: int = 128, rows: int = 60_000) -> Autoencoder:
    """784-hidden-latent and back, tanh, Bernoulli pixels; Kingma and Welling (2014), appendix C."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(PIXELS, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latent))
    decoder = nn.Sequential(nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, PIXELS))
    return Autoencoder(encoder, decoder, latent, _digits(rows), BERNOULLI, batch)


def vae(objective: Any = None, *, steps: int = 64, device: str = "cpu", **sizes: int) -> Case:
    """:func:`mlp`; minibatches gathered from resident bytes."""
    objective = objective or bc.ELBO(1)
    problem = mlp(**sizes)
    latent, batch, images = problem.latent, problem.batch, problem.images
    weights = {**_weights(problem.encoder, "encoder"), **_weights(problem.decoder, "decoder")}
    model, guide = _programs(problem)

    def twin() -> Twin:
        import jax.numpy as jnp
        import numpyro.distributions as npd

        def network(name: str) -> Any:
            return lambda x: _layer(weights, f"{name}.2", jnp.tanh(_layer(weights, f"{name}.0", x)))

        programs = _twins(
            network("encoder"),
            network("decoder"),
            latent,
            batch,
            lambda x: x,
            lambda logits: npd.Bernoulli(logits=logits).to_event(1),
        )
        return Twin(*programs, (jnp.asarray(images.numpy()),), _numpyro_loss(objective))

    return Case(
        model=model,
        guide=guide,
        args=(images,),
        twin=twin,
        params=_params,
        minibatch=bc.Minibatch(batch, plate="data"),
        objective=objective,
        step_size=problem.step_size,
        pyro_bound=not isinstance(objective, bc.IWAE),
        others=contenders(problem) if objective == bc.ELBO(1) else {},
        device=device,
        steps=steps,
        pyro_steps=10,
        notes=f"{'MNIST' if os.environ.get('BBVI_CONV_DATA') else 'simulated images'}"
        + ("; Pyro's RenyiELBO is another bound" if isinstance(objective, bc.IWAE) else ""),
    )


def iwae_5() -> Case:
    """The same under IWAE with K = 5."""
    return vae(bc.IWAE(5), steps=16)


def iwae_50() -> Case:
    """The same under IWAE with K = 50."""
    return vae(bc.IWAE(50), steps=3)


CHANNELS = (32, 64, 64)


def _conv_networks(weights: Arrays) -> tuple[Any, Any]:
    """Encoder and decoder of :func:`conv_vae` in JAX; images channels last, which XLA's CPU prefers."""
    import jax
    import jax.numpy as jnp

    relu = jax.nn.relu

    def halved(weight: Any, x: Any) -> Any:  # torch's layout of weights: (out, in, h, w)
        layout = ("NHWC", "OIHW", "NHWC")
        return jax.lax.conv_general_dilated(x, weight, (2, 2), ((1, 1), (1, 1)), dimension_numbers=layout)

    def down(name: str, x: Any) -> Any:
        weight, bias = _pair(weights, name)
        return halved(weight, x) + bias

    def up(name: str, x: Any) -> Any:  # lax.conv_transpose has a weight gradient 30 times slower on XLA's CPU
        weight, bias = _pair(weights, name)
        wide = jax.ShapeDtypeStruct((len(x), 2 * x.shape[1], 2 * x.shape[2], weight.shape[1]), x.dtype)
        return jax.linear_transpose(partial(halved, weight), wide)(x)[0] + bias

    def encode(x: Any) -> Any:
        for name in ("encoder.0", "encoder.2", "encoder.4"):
            x = relu(down(name, x))
        return _layer(weights, "encoder.7", jnp.transpose(x, (0, 3, 1, 2)).reshape(len(x), -1))

    def decode(z: Any) -> Any:
        x = relu(_layer(weights, "decoder.0", z)).reshape(len(z), CHANNELS[-1], 8, 8)
        x = relu(up("decoder.3", jnp.transpose(x, (0, 2, 3, 1))))
        return jax.nn.sigmoid(up("decoder.7", relu(up("decoder.5", x))))

    return encode, decode


def conv(*, latent: int = 32, batch: int = 64, rows: int = 2048) -> Autoencoder:
    """Three strided convolutions each way on 64 x 64 x 3 bytes, Gaussian pixels."""
    torch.manual_seed(0)
    a, b, c = CHANNELS
    encoder = nn.Sequential(
        *(nn.Conv2d(3, a, 4, 2, 1), nn.ReLU(), nn.Conv2d(a, b, 4, 2, 1), nn.ReLU(), nn.Conv2d(b, c, 4, 2, 1)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(64 * c, 2 * latent)),
    )
    decoder = nn.Sequential(
        *(nn.Linear(latent, 64 * c), nn.ReLU(), nn.Unflatten(-1, (c, 8, 8)), nn.ConvTranspose2d(c, b, 4, 2, 1)),
        *(nn.ReLU(), nn.ConvTranspose2d(b, a, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(a, 3, 4, 2, 1), nn.Sigmoid()),
    )
    blobs = torch.rand(rows, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = (255 * nn.functional.interpolate(blobs, size=64, mode="bilinear")).byte()
    return Autoencoder(encoder, decoder, latent, images, GAUSSIAN, batch)


def conv_vae(**sizes: int) -> Case:
    """:func:`conv`; minibatches gathered from resident bytes."""
    problem = conv(**sizes)
    latent, batch, images = problem.latent, problem.batch, problem.images
    weights = {**_weights(problem.encoder, "encoder"), **_weights(problem.decoder, "decoder")}
    model, guide = _programs(problem)

    def twin() -> Twin:
        import jax.numpy as jnp
        import numpyro.distributions as npd

        programs = _twins(
            *_conv_networks(weights), latent, batch, lambda x: x / 255, lambda mean: npd.Normal(mean, SCALE).to_event(3)
        )
        channels_last = jnp.asarray(images.permute(0, 2, 3, 1).contiguous().numpy())
        return Twin(*programs, (channels_last,), _numpyro_loss(bc.ELBO(1)))

    return Case(
        model=model,
        guide=guide,
        args=(images,),
        twin=twin,
        params=_params,
        minibatch=bc.Minibatch(batch, plate="data"),
        step_size=problem.step_size,
        others=contenders(problem),
        scan=False,
        steps=4,
        pyro_steps=2,
        notes="simulated images; NumPyro by a jitted svi.update a step, since XLA's CPU convolutions are ten times "
        "slower inside lax.scan",
    )
