"""Autoencoders without a bound, to lay beside probabilistic PCA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bbvi_conv.program.noise import generator


def orthogonal(x: Tensor, mean: Tensor, latent: int, steps: int, batch: int, seed: int) -> Tensor:
    """Orthogonal linear autoencoder: ``U`` ``(D, d)`` with U'U = I that minimises E |x - mean - U U'(x - mean)|^2.

    Stochastic gradient steps on rows drawn i.i.d., brought back onto the orthogonal matrices by a QR decomposition
    after each (Oja and Karhunen, 1985), step sizes 1 / (10 + n).
    """
    rows = generator(seed, "autoencoder rows", 0)
    u = torch.linalg.qr(torch.randn(x.shape[1], latent, generator=generator(seed, "autoencoder", 0), dtype=x.dtype)).Q
    for n in range(1, steps + 1):
        some = x[torch.randint(len(x), (batch,), generator=rows)] - mean
        u = torch.linalg.qr(u + (10.0 / (10 + n)) * some.T @ (some @ u) / batch).Q
    return u


def deep(x: Tensor, hidden: int, latent: int, steps: int, batch: int, seed: int) -> float:
    """Mean squared error, summed over pixels, of a deep autoencoder D-hidden-latent-hidden-D, tanh, by Adam."""
    rows = generator(seed, "deep rows", 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = ((x.shape[1], hidden), (hidden, latent), (latent, hidden), (hidden, x.shape[1]))
        layers = [nn.Linear(*size) for size in sizes]
    network = nn.Sequential(layers[0], nn.Tanh(), layers[1], layers[2], nn.Tanh(), layers[3]).to(x)
    adam = torch.optim.Adam(network.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps, 2e-5)
    for _ in range(steps):
        some = x[torch.randint(len(x), (batch,), generator=rows)]
        loss = (network(some) - some).square().sum(-1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        decay.step()
    with torch.no_grad():
        return float(torch.cat([(network(part) - part).square().sum(-1) for part in x.split(4096)]).double().mean())
