r"""Black-and-white images from grey ones: each pixel white with its grey value v as the probability v / 255.

*Static*: once for all, by :func:`binarised`. *Dynamic*: anew each time an image is seen, by :func:`rebinarised`, a pure
function of a code that names an image and one of its binarisations. A model that gets codes as its data sees fresh
pixels at every step, yet all K draws of a bound, guide and model see the same, and a resumed run sees them again.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def binarised(images: Tensor, *, seed: int = 0) -> Tensor:
    """Static binarisation.

    Args:
        images: uint8, any shape, grey values.
        seed: of the draw; torch's own generator is left as found.
    Returns:
        uint8 of the same shape, each value 0 or 255.
    Raises:
        TypeError: images that are not bytes.
    """
    _check(images)
    generator = torch.Generator().manual_seed(seed)
    threshold = torch.randint(255, images.shape, generator=generator, dtype=torch.uint8)
    return (threshold < images.cpu()).to(images) * 255


def codes(count: int, visits: int) -> Tensor:
    """Codes of the first ``count`` images, each in its binarisations 0 to ``visits - 1``: int64 ``(count * visits,)``.

    Pass them as the data of a model that calls :func:`rebinarised`; a minibatch of them is one of images.

    Raises:
        ValueError: a number below 1, or more codes than there are.

    Example:
        >>> codes(2, 3).tolist()
        [0, 1, 2, 3, 4, 5]
    """
    if count < 1 or visits < 1 or count * visits > WORD:
        raise ValueError(f"count and visits must be at least 1 and their product below 2^32, got {count} and {visits}")
    return torch.arange(count * visits)


def rebinarised(images: Tensor, codes: Tensor) -> Tensor:
    """Dynamic binarisation: code c shows image c mod N in its binarisation c div N, for N images.

    The thresholds are a hash of code and pixel, so nothing is drawn and nothing is stored; equal codes give equal
    pixels on every machine and engine.

    Args:
        images: uint8 ``(N, ...)``, grey values.
        codes: int64 ``(B,)``, from 0 on and below 2^32.
    Returns:
        uint8 ``(B, ...)``, each value 0 or 255.
    Raises:
        TypeError: images that are not bytes.
    """
    _check(images)
    shown = images[codes % len(images)].flatten(1).long()
    place = _mixed(torch.arange(shown.shape[1], device=images.device) + 0x9E3779B9)
    hashed = _mixed(_mixed(codes + 0x85EBCA6B).unsqueeze(-1) ^ place)
    white = (hashed * 255) >> 32 < shown
    return (white.to(torch.uint8) * 255).reshape(-1, *images.shape[1:])


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit words that spreads every bit, in int64, where its products fit.

    Source: T. Mueller (2012), an integer hash found by measuring its avalanche.
    """
    x = x & WORD
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & WORD
    return x ^ (x >> 16)


def _check(images: Tensor) -> None:
    if images.dtype != torch.uint8:
        raise TypeError(f"grey values are bytes from 0 to 255, got images of {images.dtype}")
