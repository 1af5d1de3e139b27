"""Loaders of real data: checked files in, plain tensors and arrays out; nothing is ever unpickled."""

from __future__ import annotations

from bbvi_conv.data.mnist import mnist
from bbvi_conv.data.posteriordb import Posterior, posterior

__all__ = ["Posterior", "mnist", "posterior"]
