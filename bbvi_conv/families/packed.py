"""All latent sites as one vector on the unconstrained space, under the law of any vector family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from pyro.distributions.util import broadcast_shape
from pyro.infer.autoguide import AutoContinuous
from pyro.nn import PyroParam
from torch import Tensor

from bbvi_conv.families.family import VectorFamily
from bbvi_conv.families.start import put_together, start


class PackedGuide(AutoContinuous):  # type: ignore[misc]
    """A vector family over the packed sites of a model."""

    def __init__(self, model: Callable[..., Any], family: VectorFamily) -> None:
        self.family = family
        super().__init__(model, init_loc_fn=start)
        self._pyro_name = f"{type(family).__name__}Guide"  # what its parameters and errors are named by

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        loc = self._init_loc()
        parameters = self.family.parameters(loc, torch.full_like(loc, self.family.init_scale))
        self._names = list(parameters)
        for name, parameter in parameters.items():
            setattr(self, name, PyroParam(parameter.start, parameter.constraint))
        self.layers = self.family.layers(self.latent_dim).to(loc)

    def placed(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Starts by leaf name, constrained, for which the law has about the location and scale of draws of sites."""
        loc, sites = self._init_loc(), self.prototype_trace.iter_stochastic_nodes()
        scale = torch.full_like(loc, self.family.init_scale)
        loc, scale = put_together(sites, self._unconstrained_shapes, draws, loc, scale)
        return {f"{self._pyro_name}.{name}": p.start for name, p in self.family.parameters(loc, scale).items()}

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """As Pyro's, by a function that does not import sympy, which takes half a second of a short fit."""
        end = 0
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            shape = self._unconstrained_shapes[name]
            start, end = end, end + shape.numel()
            event_dim = site["fn"].event_dim + len(shape) - site["value"].dim()
            whole = broadcast_shape(shape, latent.shape[:-1] + (1,) * event_dim)
            yield site, latent[..., start:end].view(whole)

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The law over the packed unconstrained vector."""
        return self.family.law({name: getattr(self, name) for name in self._names}, self.layers)
