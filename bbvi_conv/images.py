"""Figures of a model of images: reconstructions, samples from the prior, and traversals of single latents.

Shown is the mean of the observed site, as an image: of one shape ``(H, W)`` or ``(3, H, W)``, or flat with a square
number of pixels, or three times one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bbvi_conv.evaluate.subject import Source, Subject, subject
from bbvi_conv.posterior.sites import replay
from bbvi_conv.program.buffers import buffers_kept
from bbvi_conv.program.noise import generator

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
    source: Source, data: Any = None, *, latents: int = 6, columns: int = 9, site: str | None = None, seed: int = 0
) -> Figure:
    """From a draw for the first datum, one coordinate of a latent site at a time, from -3 to 3.

    Raises:
        ValueError: no such latent site.
    """
    found = subject(source, data, batch=columns)
    names = [latent.name for latent in found.program.structure.latents]
    name = site or names[-1]
    if name not in names:
        raise ValueError(f"there is no latent site {name!r}; the sites are {', '.join(names)}")
    drawn = _draw(found, seed)
    base = {key: value[:1].expand_as(value).clone() for key, value in drawn.items()}
    flat = base[name].flatten(1)
    steps = torch.linspace(-REACH, REACH, len(flat)).to(flat)
    rows = []
    for j in range(min(latents, flat.shape[1])):
        moved = flat.clone()
        moved[:, j] = steps
        rows.append(as_images(_observed(found, {**base, name: moved.reshape(base[name].shape)})[1]))
    return _grid(rows, [f"{name}[{j}]" for j in range(len(rows))])


def _through(found: Subject, seed: int) -> tuple[Tensor, Tensor]:
    """Observed values and their means at one draw of the guide."""
    return _observed(found, _draw(found, seed))


def _draw(found: Subject, seed: int) -> dict[str, Tensor]:
    program = found.program
    noise = program.layout.draw(generator(seed, STREAM, 0, program.device), dtype=program.dtype)
    batch, _ = next(found.parts())
    with torch.no_grad(), buffers_kept(program.modules):
        trace = program.drawn(found.x, noise, batch)
    return {site.name: trace.nodes[site.name]["value"] for site in program.structure.latents}


def _observed(found: Subject, latents: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    batch, _ = next(found.parts())
    with torch.no_grad(), buffers_kept(found.program.modules):
        trace = replay(found.program, found.x, latents, batch)
    node = trace.nodes[found.program.structure.observed[-1].name]
    return node["value"], node["fn"].mean


def _grid(rows: list[Tensor], titles: list[str]) -> Figure:
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(0.9 * columns + 1.2, 0.95 * len(rows) + 0.2), layout="constrained")
    for axes, row, title in zip(figure.subplots(len(rows), columns, squeeze=False), rows, titles, strict=True):
        for axis, image in zip(axes, row, strict=True):
            axis.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[0].set_ylabel(title, fontsize=8, rotation=0, ha="right", va="center")
    return figure
