"""The model's log density as a function of all latents on the unconstrained space."""

from __future__ import annotations

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to

from bbvi_conv.program.enumeration import log_joint
from bbvi_conv.program.noise import random_state
from bbvi_conv.program.program import Program, quiet_pyro
from bbvi_conv.program.structure import random_sites


class Target:
    r""":math:`\log p(x, T(\zeta)) + \log |T'(\zeta)|` of packed :math:`\zeta` ``(D,)``, over all rows of the data.

    Args:
        program: one that does not gather its rows by index.
        x: flat parameters, for those of the model.
    """

    def __init__(self, program: Program, x: Tensor) -> None:
        self._program, self._model = program, program.bind(program.density_model, x)
        with torch.no_grad():  # a draw of the guide: an improper prior has none
            trace = self._run(program.site_values(x, *program.example()).latent)
        names = {site.name for site in program.structure.latents}
        self._latent = {s["name"]: s for s in random_sites(trace) if s["name"] in names}
        self._maps = {name: biject_to(site["fn"].support) for name, site in self._latent.items()}
        free = {name: self._maps[name].inv(site["value"]) for name, site in self._latent.items()}
        self._shapes = {name: value.shape for name, value in free.items()}
        self.dim = sum(shape.numel() for shape in self._shapes.values())
        self.first = self.pack({name: site["value"] for name, site in self._latent.items()})

    def _run(self, values: dict[str, Tensor]) -> Trace:
        program = self._program
        with random_state(program.device, 0), quiet_pyro(program.store, program.dtype, program.device):
            conditioned = poutine.condition(self._model, data=values)
            return poutine.trace(conditioned).get_trace(*program.args, **program.kwargs)

    def pack(self, values: dict[str, Tensor]) -> Tensor:
        """Constrained values by site to :math:`\\zeta`."""
        return torch.cat([self._maps[name].inv(values[name]).reshape(-1) for name in self._latent])

    def trace(self, zeta: Tensor) -> Trace:
        """Trace of the model at :math:`\\zeta`, the latents conditioned on."""
        return self._run(self._values(zeta)[0])

    def _values(self, zeta: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        values, volume = {}, zeta.new_zeros(())
        for (name, shape), part in zip(
            self._shapes.items(), torch.split(zeta, [s.numel() for s in self._shapes.values()]), strict=True
        ):
            free = part.reshape(shape)
            values[name] = self._maps[name](free)
            volume = volume + self._maps[name].log_abs_det_jacobian(free, values[name]).sum()
        return values, volume

    def __call__(self, zeta: Tensor) -> Tensor:
        """Log density in nats, ``()``."""
        values, volume = self._values(zeta)
        trace = self._run(values)
        trace.compute_log_prob()
        return log_joint(trace) + volume

    def coordinate(self, index: int) -> str:
        """Which site a coordinate belongs to."""
        for name, shape in self._shapes.items():
            if index < shape.numel():
                return f"{name}[{index}]" if shape.numel() > 1 else name
            index -= shape.numel()
        raise IndexError(index)

    def is_latent(self, name: str) -> bool:
        """Whether a site of :meth:`trace` is a latent of the model."""
        return name in self._latent
