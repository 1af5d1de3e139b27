"""The law of a standard normal vector sent through layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn

from bbvi_conv.families.family import Parameter, VectorFamily, VectorLaw, log_normal, normals
from bbvi_conv.families.flows.layer import Layer
from bbvi_conv.families.scale_maps import Softplus


class FlowLaw(VectorLaw):
    r""":math:`z = m + s \odot f(\epsilon)`, f the layers one after the other.

    At its own draw :math:`\log q = \log N(\epsilon; 0, I) - \log |\det J_f(\epsilon)| - \sum \log s`; elsewhere, where
    every layer has an inverse, the same at :math:`\epsilon = f^{-1}((z - m) / s)`.
    """

    def __init__(self, loc: Tensor, scale: Tensor, layers: Any) -> None:
        self.loc, self.scale, self.layers = loc, scale, layers
        self.path_log_q = all(layer.has_inverse for layer in layers)
        super().__init__(loc.shape)

    def draw(self, shape: Size) -> tuple[Tensor, Tensor]:
        """Through the layers."""
        x = normals(shape, self.loc)
        log_q = log_normal(x, self.scale).sum(-1)
        for layer in self.layers:
            x, log_det = layer(x)
            log_q = log_q - log_det
        return self.loc + self.scale * x, log_q

    def density(self, value: Tensor) -> Tensor:
        """Back through the layers."""
        x = (value - self.loc) / self.scale
        volume = torch.zeros((), dtype=value.dtype, device=value.device)
        for layer in reversed(self.layers):
            x, log_det = layer.inverse(x)
            volume = volume + log_det
        return log_normal(x, self.scale).sum(-1) - volume


@dataclass(frozen=True)
class Flow(VectorFamily):
    """What flows share: they start as a diagonal Gaussian, every layer the identity."""

    num_layers: int = 4
    init_scale: float = 0.1

    layered: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Softplus().check(self.init_scale)
        if self.num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {self.num_layers}")

    @abstractmethod
    def layer(self, dim: int, index: int) -> Layer:
        """The layer at a place."""

    def layers(self, dim: int) -> nn.ModuleList:
        """All of them."""
        return nn.ModuleList(self.layer(dim, index) for index in range(self.num_layers))

    def parameters(self, loc: Tensor, scale: Tensor) -> dict[str, Parameter]:
        """Location and scale outside the layers."""
        return {"loc": Parameter(loc), "scale": Parameter(scale, Softplus().constraint)}

    def law(self, values: Mapping[str, Tensor], layers: Any) -> FlowLaw:
        """The law."""
        return FlowLaw(values["loc"], values["scale"], layers)
