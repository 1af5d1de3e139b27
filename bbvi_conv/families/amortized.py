"""Guides for latents of single data: an encoder of the datum supplies the parameters of any vector family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.nn import PyroModule
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch.distributions import biject_to, transform_to

from bbvi_conv.families.by_site import put_site
from bbvi_conv.families.family import VectorFamily
from bbvi_conv.families.mean_field import MeanField
from bbvi_conv.families.start import start
from bbvi_conv.networks.encoders import MLP, Encoder


class AmortizedGuide(PyroModule):  # type: ignore[misc]
    """An encoder and a head, built for a model and its data at the first run; made by :class:`Amortized`."""

    def __init__(self, model: Callable[..., Any], family: Amortized) -> None:
        super().__init__("AmortizedGuide")
        self.family = family
        self._model = (model,)  # in a tuple, else a module would be taken for a part of the guide
        self._sites: dict[str, Any] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Encode the data, draw all latents of a datum together, and give every site its part."""
        if self._sites is None:
            self._sites = self._setup(args, kwargs)
        x, frame = args[self.family.argument], self._frame
        subsampled = frame.full_size != frame.size
        size = {"size": frame.full_size, "subsample_size": frame.size} if subsampled else {"size": len(x)}
        result = {}
        with pyro.plate(frame.name, **size, dim=-1) as rows:
            law = self._law(x[rows] if subsampled else x)
            vector = pyro.sample("_AmortizedGuide_latent", law, infer={"is_auxiliary": True})
            parts = torch.split(vector, [shape.numel() for shape in self._shapes.values()], -1)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True):
                result[name] = put_site(name, self._sites[name], part.reshape(*part.shape[:-1], *shape))
        return result

    def _law(self, x: Tensor) -> Any:
        raw = self.network(numbers(x))
        parts = torch.split(raw, [shape.numel() for shape, _ in self._heads.values()], -1)
        values = {
            name: transform_to(constraint)(part.reshape(*part.shape[:-1], *shape))
            for (name, (shape, constraint)), part in zip(self._heads.items(), parts, strict=True)
        }
        return self.family.head.law(values, self.layers)

    def _setup(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Latent sites of the model, their frame and shapes; encoder, head and layers of a flow."""
        x = self._data(args)
        with poutine.block():
            trace = poutine.trace(InitMessenger(start)(self._model[0])).get_trace(*args, **kwargs)
        sites = dict(prune_subsample_sites(trace).iter_stochastic_nodes())
        frames = {name: [f for f in site["cond_indep_stack"] if f.vectorized] for name, site in sites.items()}
        if not sites:
            raise ValueError("the model has no latent site to encode")
        for name, own in frames.items():
            if [f.dim for f in own] != [-1] or own[0].name != next(iter(frames.values()))[0].name:
                raise ValueError(
                    f"an amortized guide draws the latents of one datum in one plate at dim -1, but site {name!r} lies "
                    f"in plates {[f.name for f in own]}; use Structured, or a guide of your own"
                )
        self._frame = next(iter(frames.values()))[0]
        if len(x) not in (self._frame.size, self._frame.full_size):
            raise ValueError(
                f"argument {self.family.argument} has {len(x)} rows, plate {self._frame.name!r} has "
                f"{self._frame.size}; name the argument that the encoder reads by Amortized(argument=...)"
            )
        self._shapes = {
            name: biject_to(site["fn"].support).inv(site["value"].detach()).shape[1:] for name, site in sites.items()
        }
        dim = sum(shape.numel() for shape in self._shapes.values())
        zero = torch.zeros(dim, device=x.device)
        parameters = self.family.head.parameters(zero, torch.full_like(zero, self.family.head.init_scale))
        self._heads = {name: (p.start.shape, p.constraint) for name, p in parameters.items()}
        free = torch.cat([transform_to(p.constraint).inv(p.start).reshape(-1) for p in parameters.values()])
        encoder, features = self.family.encoder.network(tuple(x.shape[1:]))
        head = nn.Linear(features, len(free))
        with torch.no_grad():
            head.weight *= 0.1
            head.bias.copy_(free)
        self.network = nn.Sequential(encoder, head).to(zero)
        self.layers = self.family.head.layers(dim).to(zero)
        return sites

    def _data(self, args: tuple[Any, ...]) -> Tensor:
        at = self.family.argument
        if not -len(args) <= at < len(args) or not isinstance(args[at], Tensor) or args[at].dim() == 0:
            raise ValueError(f"the encoder reads positional argument {at}, which is no tensor of rows")
        found: Tensor = args[at]
        return found


def numbers(x: Tensor) -> Tensor:
    """Floating-point numbers as they are; bytes as grey values in [0, 1]; other numbers in the default float type."""
    if x.is_floating_point():
        return x
    return x.to(torch.get_default_dtype()) / (255 if x.dtype == torch.uint8 else 1)


@dataclass(frozen=True)
class Amortized:
    """Encoder guide :math:`q(z_n | x_n)` for models whose latents all belong to single data, VAEs among them.

    All latent sites of a datum are one vector on the unconstrained space, under the law of ``head`` with parameters
    from the encoder; the layers of a flow are shared by all data.

    Args:
        encoder: ``MLP`` or ``Conv``, or any value with their method.
        head: vector family of a datum's latents, started at location zero and its ``init_scale``.
        argument: which positional argument of the model the encoder reads, a tensor with one row per datum; bytes are
            read as grey values in [0, 1].

    Raises:
        ValueError: at the first run, if a latent lies outside the data's plate or the argument has no rows.

    Reference: Kingma and Welling (2014), https://arxiv.org/abs/1312.6114
    """

    encoder: Encoder = MLP()  # noqa: RUF009 - frozen
    head: VectorFamily = MeanField(init_scale=1.0)  # noqa: RUF009 - frozen
    argument: int = 0

    layered: ClassVar[bool] = True

    def __call__(self, model: Callable[..., Any]) -> AmortizedGuide:
        """A guide for ``model``, built at its first run."""
        return AmortizedGuide(model, self)
