"""From a Pyro model and guide to the pure function ``log_weights(theta, phi_sample, phi_density, noise, batch)``."""

from __future__ import annotations

from bbvi_conv.program.minibatch import Batch, Minibatch
from bbvi_conv.program.noise import Noise, NoiseLayout
from bbvi_conv.program.program import Params, Program
from bbvi_conv.program.structure import Leaf, Site, Structure
from bbvi_conv.program.terms import Terms

__all__ = ["Batch", "Leaf", "Minibatch", "Noise", "NoiseLayout", "Params", "Program", "Site", "Structure", "Terms"]
