"""Networks of model and guide: smooth, Lipschitz, bounded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from pyro.infer.autoguide import AutoGuide
from torch import nn

from bbvi_conv.networks.constants import Constants, constants, kinks
from bbvi_conv.program.program import Program
from bbvi_conv.theory.condition import Condition, Status


class Network(NamedTuple):
    """A network with parameters that are optimised: ``side`` is ``"guide"`` or ``"model"``."""

    module: nn.Module
    side: str

    @property
    def name(self) -> str:
        """Which network, for a table."""
        return f"network of the {self.side} ({type(self.module).__name__})"


def networks(program: Program) -> list[Network]:
    """Outermost modules that a program calls and whose parameters are leaves; model and guide are opened if modules."""
    group = {id(leaf.tensor): leaf.group for leaf in program.leaves}
    containers = {id(program.model), id(program.guide)}
    called = [m for m in program.modules if id(m) not in containers and not isinstance(m, AutoGuide)]
    inner = {id(child) for module in called for child in module.modules() if child is not module}
    found = []
    for module in called:
        groups = {group[id(p)] for p in module.parameters() if id(p) in group}
        if id(module) not in inner and groups:
            found.append(Network(module, "guide" if "phi" in groups else "model"))
    return found


def layers(program: Program) -> int:
    """N, linear and convolutional layers in all networks; 1 where there is none."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return sum(isinstance(layer, kinds) for n in networks(program) for layer in n.module.modules()) or 1


def conditions(program: Program, theorem: str) -> Iterator[Condition]:
    """Smooth activations, Lipschitz constants and bounded outputs, network by network."""
    for network in networks(program):
        said = constants(network.module)
        yield Condition(theorem, "smooth activations", *_smooth(network, said))
        yield Condition(theorem, "bounded outputs", *_bounded(network, said))


def _smooth(network: Network, said: Constants) -> tuple[Status, str, str]:
    if rough := kinks(network.module):
        why = f"the derivative of {', '.join(rough)} jumps; use Tanh, Softplus, GELU or another smooth one"
        return "fails", network.name, why
    if math.isnan(said.smoothness):
        return "unknown", network.name, said.why
    both = f"Lipschitz with constant {said.lipschitz:.3g}, its derivative with {said.smoothness:.3g}"
    return "holds", network.name, f"{both}, at the weights as they stand"


def _bounded(network: Network, said: Constants) -> tuple[Status, str, str]:
    if said.bounded:
        return "holds", network.name, f"outputs lie in [{said.low:g}, {said.high:g}]"
    if math.isnan(said.low) or math.isnan(said.high):
        return "unknown", network.name, said.why
    why = "the last layer has no bounded range; end with bc.SoftClipping(low, high), or use bc.bounded_mlp"
    return "fails", network.name, why
