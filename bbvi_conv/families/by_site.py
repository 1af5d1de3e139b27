"""One factorised law per latent site on the unconstrained space, plates kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any, Protocol

import pyro
import pyro.distributions as dist
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import biject_to

from bbvi_conv.families.family import Parameter
from bbvi_conv.families.scale_maps import ScaleMap
from bbvi_conv.families.start import moments, start


class Factorised(Protocol):
    """A family whose law is a product over coordinates."""

    @property
    def init_scale(self) -> float:
        """Scale at the start."""
        ...

    @property
    def scale_map(self) -> ScaleMap:
        """From leaves to scales."""
        ...

    def more(self, loc: Tensor) -> dict[str, Parameter]:
        """Parameters beyond location and scale, of the location's shape."""
        ...

    def coordinates(self, loc: Tensor, scale: Tensor, **more: Tensor) -> Any:
        """The law of every coordinate."""
        ...


def sample_site(name: str, site: Any, law: Any) -> Tensor:
    """Sample a site by a law of its unconstrained value, an auxiliary site beside it; inside the site's plates."""
    return put_site(name, site, pyro.sample(f"{name}_unconstrained", law, infer={"is_auxiliary": True}))


def put_site(name: str, site: Any, free: Tensor) -> Tensor:
    """Give a site the value that an unconstrained one stands for, with its volume; inside the site's plates."""
    transform, event_dim = biject_to(site["fn"].support), site["fn"].event_dim
    value = transform(free)
    volume = transform.inv.log_abs_det_jacobian(value, free)
    volume = sum_rightmost(volume, volume.dim() - value.dim() + event_dim)
    drawn: Tensor = pyro.sample(name, dist.Delta(value, log_density=volume, event_dim=event_dim))
    return drawn


def placed_by_site(
    guide: AutoNormal, sites: Iterable[tuple[str, Any]], draws: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Starts of locations and scales by leaf name, constrained, that are those of draws of the sites."""
    starts: dict[str, Tensor] = {}
    for name, site in sites:
        found = moments(site, draws, attrgetter(name)(guide.locs).shape)
        if found is not None:
            for kind, value in zip(("locs", "scales"), found, strict=True):
                starts[f"{guide._pyro_name}.{kind}.{name}"] = value
    return starts


@contextmanager
def inside(site: Any, plates: Mapping[str, Any]) -> Iterator[None]:
    """Inside the plates that a site of the model lies in."""
    with ExitStack() as stack:
        for frame in site["cond_indep_stack"]:
            if frame.vectorized:
                stack.enter_context(plates[frame.name])
        yield


class SiteGuide(AutoNormal):  # type: ignore[misc]
    """One law per latent scalar on the unconstrained space."""

    def __init__(self, model: Callable[..., Any], family: Factorised) -> None:
        self.family = family
        self.scale_constraint = family.scale_map.constraint
        super().__init__(model, init_loc_fn=start, init_scale=float(family.init_scale))
        self._pyro_name = f"{type(family).__name__}Guide"  # what its parameters and errors are named by

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        self.more = PyroModule()
        self._more: tuple[str, ...] = ()
        for name, event_dim in self._event_dims.items():
            parameters = self.family.more(attrgetter(name)(self.locs).detach())
            self._more = tuple(parameters)
            for key, parameter in parameters.items():
                deep_setattr(self.more, f"{key}.{name}", PyroParam(parameter.start, parameter.constraint, event_dim))

    def placed(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Starts by leaf name, constrained, with the location and scale of draws of sites."""
        return placed_by_site(self, self.prototype_trace.iter_stochastic_nodes(), draws)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site inside its plates."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        result = {}
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            with inside(site, plates):
                loc, scale = self._get_loc_and_scale(name)
                more = {key: attrgetter(f"{key}.{name}")(self.more) for key in self._more}
                law = self.family.coordinates(loc, scale, **more)
                result[name] = sample_site(name, site, law.to_event(self._event_dims[name]))
        return result
