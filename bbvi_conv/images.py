"""Figures of a model of images: reconstructions, samples from the prior, and traversals of single latents.

Shown is the mean of the observed site, as an image: of one shape ``(H, W)`` or ``(3, H, W)``, or flat with a square
number of pixels, or three times one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bbvi_conv.evaluate.subject import Source, Subject, drawn, subject
from bbvi_conv.posterior.sites import replay
from bbvi_conv.program.minibatch import Batch
from bbvi_conv.program.noise import Noise, generator
from bbvi_conv.program.program import Program

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STREAM = "images"
REACH = 3.0
"""A traversal goes from minus to plus so many prior standard deviations."""


def as_images(values: Tensor) -> Tensor:
    """``(B, ...)`` to grey ``(B, H, W)`` or colour ``(B, H, W, 3)``, in [0, 1].

    Raises:
        ValueError: values of another shape.
    """
    values = values.detach().float().clamp(0, 1)
    if values.dim() == 2:
        for channels in (1, 3):
            side = math.isqrt(values.shape[1] // channels)
            if channels * side * side == values.shape[1]:
                values = values.reshape(-1, *([side, side] if channels == 1 else [3, side, side]))
                break
    if values.dim() == 4 and values.shape[1] == 1:
        values = values[:, 0]
    if values.dim() == 4 and values.shape[1] == 3:
        return values.permute(0, 2, 3, 1)
    if values.dim() != 3:
        raise ValueError(f"values of shape {tuple(values.shape)} are no images: (B, H, W), (B, 3, H, W) or (B, side^2)")
    return values


def reconstructions(source: Source, data: Any = None, *, count: int = 10, seed: int = 0) -> Figure:
    """Data, and the mean image at one draw of q(z | x) for each."""
    found = subject(source, data, batch=count)
    seen, made = _through(found, seed)
    return _grid([as_images(seen), as_images(made)], ["data", "reconstructions"])


def samples(source: Source, data: Any = None, *, rows: int = 4, columns: int = 10, seed: int = 0) -> Figure:
    """Mean images at draws of the prior. ``data`` are for their shapes alone; at least ``columns`` of them."""
    found = subject(source, data, batch=columns, from_prior=True)
    made = [as_images(_through(found, seed + row)[1]) for row in range(rows)]
    return _grid(made, ["samples", *[""] * (rows - 1)])


def traversals(
    source: Source,
    data: Any = None,
    *,
    latents: int | Sequence[int] = 6,
    columns: int = 9,
    site: str | None = None,
    seed: int = 0,
) -> Figure:
    """From a draw for the first datum, one coordinate of a latent site at a time, from -3 to 3.

    Args:
        source, data: as for :func:`reconstructions`; at least ``columns`` data.
        latents: which coordinates, or how many of the first.
        columns: images of each.
        site: the latent site; None: the last one.
        seed: of the draw.

    Raises:
        ValueError: no such latent site.
    """
    found = subject(source, data, batch=columns)
    names = [latent.name for latent in found.program.structure.latents]
    name = site or names[-1]
    if name not in names:
        raise ValueError(f"there is no latent site {name!r}; the sites are {', '.join(names)}")
    batch, _ = next(found.parts())
    latent = drawn(found.program, found.x, _noise(found.program, seed), batch)
    base = {key: value[:1].expand_as(value).clone() for key, value in latent.items()}
    flat = base[name].flatten(1)
    steps = torch.linspace(-REACH, REACH, len(flat)).to(flat)
    rows = []
    chosen = range(min(latents, flat.shape[1])) if isinstance(latents, int) else latents
    for j in chosen:
        moved = flat.clone()
        moved[:, j] = steps
        latent = {**base, name: moved.reshape(base[name].shape)}
        rows.append(as_images(observed(found.program, found.x, latent, batch)[1]))
    return _grid(rows, [f"{name}[{j}]" for j in chosen])


def _through(found: Subject, seed: int) -> tuple[Tensor, Tensor]:
    """Observed values and their means at one draw of the guide."""
    batch, _ = next(found.parts())
    latent = drawn(found.program, found.x, _noise(found.program, seed), batch)
    return observed(found.program, found.x, latent, batch)


def _noise(program: Program, seed: int) -> Noise:
    return program.layout.draw(generator(seed, STREAM, 0, program.device), dtype=program.dtype)


def observed(program: Program, x: Tensor, latents: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    """Values of the last observed site, and their means under the model at these latents; each ``(B, ...)``."""
    with torch.no_grad(), program.networks_kept():
        trace = replay(program, x, latents, batch)
    node = trace.nodes[program.structure.observed[-1].name]
    return node["value"], node["fn"].mean


def _grid(rows: list[Tensor], titles: list[str]) -> Figure:
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(0.9 * columns + 1.2, 0.95 * len(rows) + 0.2), layout="constrained")
    for axes, row, title in zip(figure.subplots(len(rows), columns, squeeze=False), rows, titles, strict=True):
        for axis, image in zip(axes, row, strict=True):
            axis.imshow(image.cpu().numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[0].set_ylabel(title, fontsize=8, rotation=0, ha="right", va="center")
    return figure
