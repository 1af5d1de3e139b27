"""Figures of a fit whose model decodes the latents of single data: images, and what each latent carries.

Held-out rows are shown where the fit has any, else the rows it was trained on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from bbvi_conv import images
from bbvi_conv.evaluate.latents import Latents
from bbvi_conv.evaluate.latents import latents as use_of
from bbvi_conv.evaluate.subject import drawn
from bbvi_conv.program.program import Program

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bbvi_conv.fitting import Fit

SMALLEST = 64
"""Numbers from which a flat row with a square number of them is taken for an image."""
ROWS, DRAWS = 500, 4
"""Rows, and draws for each, that say what latents carry."""
SHOWN, TRAVERSED = 10, 6
"""Images in a row of a figure; latents that are traversed."""


class NoFigure(ValueError):
    """The figure asked for is one that this fit has none of."""


def reconstructions(fit: Fit) -> Figure:
    """Data, and under each the mean image at one draw of q(z | x)."""
    _check_images(fit)
    figure = images.reconstructions(fit, _few(fit, SHOWN), count=_count(fit, SHOWN))
    figure.suptitle(f"Reconstructions of {_rows_of(fit)}", fontsize=10)
    return figure


def samples(fit: Fit) -> Figure:
    """Mean images at draws of the prior."""
    _check_images(fit)
    figure = images.samples(fit, _few(fit, SHOWN), columns=_count(fit, SHOWN))
    figure.suptitle("Samples: mean images at draws of the prior", fontsize=10)
    return figure


def traversals(fit: Fit) -> Figure:
    """Active coordinates of the last latent site, those with the largest KL first, each moved from -3 to 3."""
    _check_images(fit)
    site = fit.program.structure.latents[-1].name
    chosen, told = _by_kl(fit, site)
    columns = _count(fit, SHOWN - 1)
    figure = images.traversals(fit, _few(fit, columns), latents=chosen, columns=columns, site=site)
    figure.suptitle(f"Traversals from -3 to 3, from a draw for the first of {_rows_of(fit)}: {told}", fontsize=10)
    return figure


def latents(fit: Fit) -> Figure:
    """KL that every coordinate of every latent site carries, largest first, active ones in colour."""
    from matplotlib.figure import Figure

    from bbvi_conv.plots import BLUE, DPI, GREY

    used = _used(fit)
    figure = Figure(figsize=(7.2, 0.6 + 2.6 * len(used.kl)), dpi=DPI, layout="constrained")
    for axis, (name, kl) in zip(figure.subplots(len(used.kl), 1, squeeze=False)[:, 0], used.kl.items(), strict=True):
        order = kl.argsort(descending=True)
        active = (used.activity[name] > used.threshold)[order]
        errors = 1.96 * used.kl_errors[name][order]
        for mask, colour, label in ((active, BLUE, "active"), (~active, GREY, "not active")):
            at = mask.nonzero().squeeze(-1)
            if len(at):
                heights = kl[order][at].tolist()
                axis.bar(at.tolist(), heights, yerr=errors[at].tolist(), color=colour, ecolor="#555555", label=label)
        axis.set_title(f"{name}: {used.active[name]} of {len(kl)} active, {float(kl.sum()):.4g} nats", fontsize=10)
        axis.set_xlabel("coordinates, by KL")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylabel("KL, nats per datum")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    figure.suptitle(f"What each latent carries, over {_count(fit, ROWS)} of {_rows_of(fit)}", fontsize=10)
    return figure


def why_no_images(fit: Fit) -> str:
    """Why there are no images to draw of a fit; empty where its model decodes local latents into images.

    That is: all latents and the observed site lie in one plate, and what is observed has the shape of images and values
    from 0 to 1.
    """
    program = fit.program
    if why := _why_not_local(program):
        return why
    site = program.structure.observed[-1]
    noise, batch = program.example()
    try:
        seen, mean = images.observed(program, fit.x, drawn(program, fit.x, noise, batch), batch)
        shown = images.as_images(seen)
        images.as_images(mean)
    except (ValueError, NotImplementedError) as error:  # no shape of an image, or a distribution without a mean
        return f"the observed site {site.name!r} holds no images ({error})"
    if seen.dim() == 2 and shown[0].numel() < SMALLEST:
        return f"the observed site {site.name!r} holds {shown[0].numel()} numbers a row, too few for an image"
    if float(seen.min()) < 0.0 or float(seen.max()) > 1.0:
        return f"the observed site {site.name!r} holds values outside [0, 1], which are no pixels"
    return ""


def _why_not_local(program: Program) -> str:
    structure = program.structure
    if len(structure.unit) != 1 or not structure.latents:
        return "its latents are not those of single data, in one plate that the observed site shares"
    outside = next((site.name for site in structure.observed if not site.in_unit), None)
    return "" if outside is None else f"the observed site {outside!r} depends on no latent"


def _check_images(fit: Fit) -> None:
    if why := why_no_images(fit):
        raise NoFigure(f"this fit has no images to draw: {why}")


def _used(fit: Fit) -> Latents:
    if why := _why_not_local(fit.program):
        raise NoFigure(f"this fit has no latents of single data to draw: {why}")
    try:
        return fit.use_of_latents
    except (ValueError, NotImplementedError) as error:  # a law that is no product, or has no mean
        raise NoFigure(f"what the latents of this fit carry cannot be told apart: {error}") from error


def measured(fit: Fit) -> Latents:
    """KL and activity of every latent coordinate, over the first rows."""
    return use_of(fit, _few(fit, ROWS), num_samples=DRAWS, batch=ROWS)


def _by_kl(fit: Fit, site: str) -> tuple[list[int] | int, str]:
    """Coordinates to traverse, and in words which they are."""
    try:
        used = _used(fit)
    except NoFigure:
        return TRAVERSED, f"the first latents of {site}"
    order = used.kl[site].argsort(descending=True).tolist()
    active = [j for j in order if float(used.activity[site][j]) > used.threshold]
    if not active:
        return order[:TRAVERSED], f"latents of {site}, none of which is active"
    return active[:TRAVERSED], f"active latents of {site}, by KL"


def _shown(fit: Fit) -> Program:
    return fit.program if fit.run.held_out is None else fit.run.held_out


def _rows_of(fit: Fit) -> str:
    return "the training rows" if fit.run.held_out is None else "the held-out rows"


def _count(fit: Fit, most: int) -> int:
    program = _shown(fit)
    return min(most, program.total if program.minibatch else program.structure.unit_shape[0])


def _few(fit: Fit, count: int) -> tuple[Any, ...]:
    """Positional arguments of the model over the first rows."""
    program = _shown(fit)
    rows = len(program.args[program.batched[0]]) if program.batched else program.structure.unit_shape[0]

    def holds_rows(i: int, value: Any) -> bool:
        if program.minibatch is not None:
            return i in program.batched
        return isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows

    return tuple(a[:count] if holds_rows(i, a) else a for i, a in enumerate(program.args))
