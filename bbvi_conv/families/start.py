"""Where a guide starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro.distributions.util import broadcast_shape
from pyro.infer.autoguide.initialization import init_to_median
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import biject_to


def start(site: Any = None) -> Any:
    """Prior median where the prior can be sampled; else the image of zero, as for ``ImproperUniform``.

    An initialisation function in Pyro's sense: called without a site it returns itself.

    Raises:
        ValueError: the site lies in a plate without a size, of which a family cannot make one of its own.
    """
    if site is None:
        return start
    around = [one for one in _PYRO_STACK if isinstance(one, pyro.plate) and one.dim is not None]
    for plate in around:
        if plate.size == -1:
            raise ValueError(
                f'plate {plate.name!r} of site {site["name"]!r} has no size: write pyro.plate("{plate.name}", len(x)) '
                "over its rows, or give a guide"
            )
    try:
        value: Tensor = init_to_median(site)
    except NotImplementedError:
        fn = site["fn"]
        transform = biject_to(fn.support)
        shape = transform.inverse_shape(fn.shape())
        value = transform(torch.zeros(shape))
    fn = site["fn"]  # which does not know of all plates around it yet where the site is reparametrised
    batch = broadcast_shape(fn.batch_shape, *((one.subsample_size, *(1,) * (-one.dim - 1)) for one in around))
    value = value.expand((*batch, *fn.event_shape))  # a view of its own, on which Pyro's mark of a start can be set
    value._pyro_custom_init = False  # type: ignore[attr-defined]
    return value


def moments(site: Any, draws: Mapping[str, Tensor], shape: torch.Size) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation of a site's draws ``(S, ...)`` on the unconstrained space; None where shapes do not fit."""
    values = draws.get(site["name"])
    if values is None:
        return None
    free = biject_to(site["fn"].support).inv(values)
    return (free.mean(0), free.std(0)) if free.shape[1:] == shape else None


def put_together(
    sites: Iterable[tuple[str, Any]],
    shapes: Mapping[str, torch.Size],
    draws: Mapping[str, Tensor],
    loc: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """Packed locations and scales with those of draws of the sites in their places, where shapes fit."""
    loc, scale, at = loc.clone(), scale.clone(), 0
    for name, site in sites:
        part = slice(at, at + shapes[name].numel())
        found, at = moments(site, draws, shapes[name]), part.stop
        if found is not None:
            loc[part], scale[part] = (value.reshape(-1).to(loc) for value in found)
    return loc, scale
