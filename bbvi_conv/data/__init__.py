"""Loaders of real data: checked files in, plain tensors and arrays out; nothing is ever unpickled.

Every set of images comes as uint8 ``(N, H, W)`` or ``(N, 3, H, W)``, 0 to 255, with one int64 number for each image.
"""

from __future__ import annotations

from bbvi_conv.data.binarise import binarised, codes, rebinarised
from bbvi_conv.data.celeba import celeba
from bbvi_conv.data.cifar100 import cifar100
from bbvi_conv.data.mnist import fashion_mnist, mnist
from bbvi_conv.data.omniglot import omniglot
from bbvi_conv.data.posteriordb import Posterior, posterior

__all__ = [
    "Posterior",
    "binarised",
    "celeba",
    "cifar100",
    "codes",
    "fashion_mnist",
    "mnist",
    "omniglot",
    "posterior",
    "rebinarised",
]
