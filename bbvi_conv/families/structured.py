"""Guides for hierarchical models: local latents whose law moves with the global ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import pyro
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide, AutoNormal
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import biject_to

from bbvi_conv.families.by_site import inside, placed_by_site, put_site, sample_site
from bbvi_conv.families.family import VectorFamily
from bbvi_conv.families.full_rank import FullRank
from bbvi_conv.families.mean_field import DiagonalNormal
from bbvi_conv.families.scale_maps import ScaleMap, Softplus
from bbvi_conv.families.start import put_together, start


class StructuredGuide(AutoNormal):  # type: ignore[misc]
    """A vector family over sites outside plates; given it, a normal for every scalar inside. Made by Structured."""

    def __init__(self, model: Callable[..., Any], family: Structured) -> None:
        self.family = family
        self.scale_constraint = family.scale_map.constraint
        super().__init__(model, init_loc_fn=start, init_scale=float(family.init_scale))
        self._pyro_name = "StructuredGuide"

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        sites = dict(self.prototype_trace.iter_stochastic_nodes())
        self._global = [n for n, s in sites.items() if not any(f.vectorized for f in s["cond_indep_stack"])]
        free = self._free(sites)
        self._shapes = {name: value.shape for name, value in free.items()}
        if not free:
            return
        loc = torch.cat([value.reshape(-1) for value in free.values()])
        parameters = self.family.outer.parameters(loc, torch.full_like(loc, self.family.outer.init_scale))
        self._names = list(parameters)
        for name, parameter in parameters.items():
            setattr(self, f"global_{name}", PyroParam(parameter.start, parameter.constraint))
        self.layers = self.family.outer.layers(len(loc)).to(loc)
        self.slopes = PyroModule()
        for name in sites:
            if name not in free:
                where = attrgetter(name)(self.locs)
                slope = where.new_zeros((*where.shape, len(loc)))
                event_dim = self._event_dims[name] + 1
                deep_setattr(self.slopes, name, PyroParam(slope, constraints.real, event_dim))

    def _free(self, sites: Mapping[str, Any]) -> dict[str, Tensor]:
        """Where the global sites start, on the unconstrained space."""
        return {n: biject_to(sites[n]["fn"].support).inv(sites[n]["value"]).detach() for n in self._global}

    def placed(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Starts by leaf name, constrained, with about the location and scale of draws of sites; no slopes."""
        sites = dict(self.prototype_trace.iter_stochastic_nodes())
        starts = placed_by_site(self, [(n, site) for n, site in sites.items() if n not in self._shapes], draws)
        if not self._shapes:
            return starts
        loc = torch.cat([value.reshape(-1) for value in self._free(sites).values()])
        scale = torch.full_like(loc, self.family.outer.init_scale)
        loc, scale = put_together([(n, sites[n]) for n in self._shapes], self._shapes, draws, loc, scale)
        parameters = self.family.outer.parameters(loc, scale)
        return starts | {f"{self._pyro_name}.global_{name}": p.start for name, p in parameters.items()}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the global sites together, then every local one inside its plates."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        sites = dict(self.prototype_trace.iter_stochastic_nodes())
        plates = self._create_plates(*args, **kwargs)
        result, moved = self._draw_global(sites)
        for name, site in sites.items():
            if name in result:
                continue
            with inside(site, plates):
                loc, scale = self._get_loc_and_scale(name)
                if moved is not None:
                    loc = loc + (attrgetter(name)(self.slopes) * moved).sum(-1)
                result[name] = sample_site(name, site, DiagonalNormal(loc, scale).to_event(self._event_dims[name]))
        return result

    def _draw_global(self, sites: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor | None]:
        """Values of the global sites, and how far their vector is from its location; None without such sites."""
        if not self._global:
            return {}, None
        values = {name: getattr(self, f"global_{name}") for name in self._names}
        law = self.family.outer.law(values, self.layers)
        vector = pyro.sample(f"_{self._pyro_name}_global", law, infer={"is_auxiliary": True})
        sizes = [shape.numel() for shape in self._shapes.values()]
        parts = zip(self._shapes.items(), torch.split(vector, sizes), strict=True)
        result = {name: put_site(name, sites[name], part.reshape(shape)) for (name, shape), part in parts}
        loc = values["loc"]
        return result, vector - (loc if loc.dim() == 1 else loc.mean(0))


@dataclass(frozen=True)
class Structured:
    r"""Hierarchical guide: global sites under any vector family, local ones normal around a line in them.

    .. math:: q(g)\, \prod_n N\big(z_n \mid m_n + A_n (g - m_g),\ \mathrm{diag}(\phi(s_n)^2)\big)

    g packs the sites outside plates and :math:`z_n` are those inside, all on the unconstrained space; parameters grow
    with the number of local sites times the dimension of g. Plates may be subsampled by index, as in
    ``plate("data", N, subsample_size=B)``.

    Args:
        outer: family of q(g).
        init_scale: scale of local sites at the start; their slopes A start at zero.
        scale_map: :math:`\phi`.

    Raises:
        ValueError: if ``init_scale`` is not positive, or outside the range of the scale map.

    Reference: Hoffman and Blei (2015), "Structured stochastic variational inference", https://arxiv.org/abs/1404.4114;
    Pyro's ``AutoStructured`` is its like.
    """

    outer: VectorFamily = FullRank()  # noqa: RUF009 - frozen
    init_scale: float = 0.1
    scale_map: ScaleMap = Softplus()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        self.scale_map.check(self.init_scale)

    def __call__(self, model: Callable[..., Any]) -> AutoGuide:
        """A guide for ``model``, built at its first run."""
        return StructuredGuide(model, self)
