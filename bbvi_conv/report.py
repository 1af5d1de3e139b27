"""One self-contained HTML page about a fit: verdict in words first, then numbers, figures, settings, versions."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bbvi_conv.decoded import NoFigure
from bbvi_conv.plots import plot
from bbvi_conv.program.device import cpu_by_default

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bbvi_conv.fitting import Fit
    from bbvi_conv.program.structure import Site

TEMPLATE = "report.html"

CAPTIONS = {
    "gap": (
        "Three distances in nats at every check, judged at the parameters that are returned. A run has converged when "
        "the whole interval of the remaining gap lies below the dashed tolerance and the paired improvement is not "
        "significantly above it."
    ),
    "gradient_norm": (
        "Squared norm of the gradient at one random step of every stratum (grey), and its running mean (blue), which "
        "is what the theory bounds. It should fall at least as fast as the dashed envelope."
    ),
    "rate": (
        "Left: the running mean over the envelope; a slope of 0 or less agrees with the theorem. Right: the norm "
        "itself, which shows a plateau where a constant step size has reached its noise floor."
    ),
    "bound": "The bound along the run, and with its interval at every check. Higher is better.",
    "reconstructions": "Data, and under each the mean image at one draw of q(z | x).",
    "samples": "Mean images at draws of the prior: what the model has learnt to make.",
    "traversals": (
        "One latent coordinate at a time moved from -3 to 3, all others held fixed. A row that does not change belongs "
        "to a latent that the decoder does not use."
    ),
    "latents": (
        "KL between q(z | x) and the prior that each coordinate carries, with 95% intervals over data; active is one "
        "whose posterior mean varies over data by more than 0.01."
    ),
}
"""What stands below each figure, in the order of the page; those of a decoder only where the model has one."""


class Row(NamedTuple):
    """A line of the table of numbers."""

    name: str
    value: str
    interval: str
    against: str
    note: str


@cpu_by_default
def write_report(fit: Fit | str | Path, path: str | Path) -> None:
    """Write the report of a fit, or of the run in a directory; the file is whole or not there.

    Args:
        fit: a fit, or a run directory.
        path: the HTML file; an old one is replaced.

    Raises:
        ValueError: if the directory holds no run.
    """
    if isinstance(fit, str | Path):
        from bbvi_conv.fitting import load

        fit = load(fit)
    path = Path(path)
    page = render(fit)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def render(fit: Fit) -> str:
    """The page as text: no script, and nothing that a browser would fetch."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from bbvi_conv.archive import versions
    from bbvi_conv.verdict import OUTCOMES

    verdict = fit.verdict
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assumed = fit.assumptions()
    return environment.get_template(TEMPLATE).render(
        title=_title(fit),
        outcome=verdict.outcome,
        sentence=OUTCOMES[verdict.outcome],
        reasons=verdict.reasons,
        rows=number_rows(verdict.numbers, fit.settings.tol),
        checks=[_check_row(check) for check in fit.state.seeds[fit.best].checks],
        seeds=_seed_rows(verdict.numbers),
        figures=_figures(fit),
        facts=_facts(fit),
        conditions=assumed.conditions,
        terms=[
            (term.name, "not available" if term.value is None else _short(term.value), term.meaning)
            for term in assumed.terms
        ],
        sites=[_site_row(site, kind) for kind, sites in _sites(fit) for site in sites],
        settings=_settings(fit),
        seconds=[(name, f"{value:.2f}") for name, value in fit.seconds.items()],
        versions=list(versions().items()),
    )


def _figures(fit: Fit) -> list[tuple[str, str, str]]:
    """Kind, caption and image of every figure that the fit has."""
    found = []
    for kind, caption in CAPTIONS.items():
        with suppress(NoFigure):
            found.append((kind, caption, _data_uri(plot(fit, kind))))
    return found


def number_rows(numbers: Mapping[str, Any], tolerance: float) -> list[Row]:
    """The table of numbers, from the plain data of ``verdict.json``."""
    rate, norms = numbers["rate"], numbers["gradient_norm_sq"]
    limit = numbers["khat"].get("threshold")
    unit = "per datum" if norms["per"] == "datum" else "whole data"
    rows = [
        _row("remaining gap, nats", numbers["remaining_gap_nats"], f"< {tolerance:g}", "½ gᵀH⁻¹g, H the Hessian"),
        _row(
            "paired improvement, nats", numbers["paired_improvement"], f"< {tolerance:g}", "this window over the last"
        ),
        _row(
            "natural-gradient norm, nats",
            numbers["natural_gradient_norm"],
            "",
            "½ gᵀF⁻¹g, F the Fisher information of q",
        ),
        _row("bound, nats", numbers["bound"], "", "at the returned parameters, whole data"),
    ]
    if "held_out" in numbers:
        rows[1] = rows[1]._replace(note=f"{rows[1].note}, on held-out rows")
        rows[-1:] = _held_out_rows(numbers)
    for group, words in (("total", "all parameters"), ("theta", "generative (theta)"), ("phi", "variational (phi)")):
        rows.append(
            _row(
                f"squared gradient norm, {words}",
                norms[group],
                "",
                f"mean over {norms['over'].removeprefix('over ')}, {unit}",
            )
        )
    rows += [
        _row("slope against the envelope", rate["envelope_slope"], "≤ 0", "running mean over C log n / √n"),
        _row("exponent of the squared norm", rate["exponent"], "< 0", "over the last 1.5 decades of steps"),
        _row("exponent in the plateau test", rate["plateau"]["exponent"], "", rate["plateau"]["reason"]),
        _row(
            "PSIS k-hat", numbers["khat"], "" if limit is None else f"≤ {limit:.2f}", "tail of p / q: can q be trusted"
        ),
    ]
    return rows


def _held_out_rows(numbers: Mapping[str, Any]) -> list[Row]:
    """Bounds, and the norm of the gradient, on held-out rows."""
    found = numbers["held_out"]
    on, span = f"on {found['rows']:,} held-out rows", "over the best window so far"
    total, per = found["gradient_norm_sq"]["total"], numbers["gradient_norm_sq"]["per"]
    unit = "per datum" if per == "datum" else "whole data"
    return [
        _row("bound, nats", numbers["bound"], "", f"{on}, scaled to the size of the whole data"),
        _row("bound, nats per datum", found["bound_per_datum"], "", f"{on}, at the returned parameters"),
        _row("improvement on held-out rows, nats", found["over_best_nats"], "", f"{span}, of the newest parameters"),
        _row("improvement on training rows, nats", found["training_over_best_nats"], "", f"{span}, of the same"),
        _row("squared gradient norm, held-out rows", total, "", f"mean over this run, {unit}"),
    ]


def _row(name: str, number: Mapping[str, Any], against: str, note: str) -> Row:
    reason = str(number.get("reason") or "")
    if number.get("value") is None:
        return Row(name, "not available", "", against, reason)
    interval = f"{_short(number['low'])} to {_short(number['high'])}"
    return Row(
        name, _short(number["value"]), interval, against, f"{note}; {reason}" if reason and reason != note else note
    )


def _short(value: float | None) -> str:
    """Three significant digits, more where the number is large.

    Example:
        >>> _short(-31.57012), _short(0.00123456), _short(None)
        ('-31.57', '0.00123', '-')
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.2f}" if abs(value) >= 10 else f"{value:.3g}"


def _seed_rows(numbers: Mapping[str, Any]) -> list[list[str]]:
    """A line for every seed, where there are several."""
    if "seeds" not in numbers:
        return []

    def cell(own: Mapping[str, Any], name: str) -> str:
        number = own.get(name)
        if number is None or number["value"] is None:
            return "-"
        return f"{_short(number['value'])} [{_short(number['low'])}, {_short(number['high'])}]"

    names = ("remaining_gap_nats", "bound", "below_best_nats", "distance_sd")
    best = numbers["seeds"]["best"]
    return [
        [
            f"{own['seed']}, returned" if own["seed"] == best else str(own["seed"]),
            own["outcome"],
            f"{own['steps']:,}",
            *(cell(own, name) for name in names),
        ]
        for own in numbers["seeds"]["each"]
    ]


def _check_row(check: Any) -> list[str]:
    def cell(estimate: Any) -> str:
        if estimate.value is None:
            return f"not available: {estimate.reason}"
        return f"{_short(estimate.value)} [{_short(estimate.low)}, {_short(estimate.high)}]"

    return [f"{check.step:,}", *(cell(e) for e in (check.gap, check.improvement, check.natural, check.bound))]


def _title(fit: Fit) -> str:
    if fit.source is not None:
        name = Path(fit.source.path).name
        return f"{name}:{fit.source.name}" if fit.source.name else name
    model = fit.program.model
    return str(getattr(model, "__qualname__", type(model).__name__))


def _facts(fit: Fit) -> list[tuple[str, str]]:
    program = fit.program
    guide = getattr(program.guide, "__qualname__", type(program.guide).__name__)
    sizes = {name: part.stop - part.start for name, part in program.groups.items()}
    facts = [
        ("model file", "none: the model was given" if fit.source is None else str(fit.source.path)),
        ("unit", program.structure.describe()),
        ("guide", str(guide)),
        ("parameters", ", ".join(f"{size:,} {name}" for name, size in sizes.items() if size) or "none"),
        ("noise per draw", f"{program.layout.normal:,} normals, {program.layout.uniform:,} uniforms"),
        ("steps", f"{fit.state.step:,}"),
        ("engine", f"{fit.engine_name}: {fit.engine_reason}"),
        ("float type, device", f"{_plain(program.dtype)}, {program.device}"),
    ]
    if program.minibatch is not None:
        facts.append(
            ("rows", f"{program.minibatch.size:,} of {program.total:,} a step, plate {program.minibatch.plate}")
        )
    return facts


def _settings(fit: Fit) -> list[tuple[str, str]]:
    """What was asked for, and what was chosen where nothing was."""
    asked = {f.name: getattr(fit.settings, f.name) for f in dataclasses.fields(fit.settings)}
    chosen: dict[str, Any] = {"objective": fit.settings.bound(), "optimiser": fit.run.rule}
    chosen |= {"strata": fit.run.strata, "dtype": fit.program.dtype}
    return [
        (name, _plain(value) if value is not None else f"{_plain(chosen[name])} (chosen)" if name in chosen else "none")
        for name, value in asked.items()
    ]


def _sites(fit: Fit) -> list[tuple[str, tuple[Site, ...]]]:
    structure = fit.program.structure
    return [
        ("latent", structure.latents),
        ("latent, summed out", structure.enumerated),
        ("observed", structure.observed),
        ("of the guide alone", structure.auxiliary),
    ]


def _site_row(site: Site, kind: str) -> list[str]:
    plates = ", ".join(f"{name} ({size:,})" for name, _, size in site.plates) or "-"
    return [site.name, kind, plates, f"{site.size:,}"]


def _plain(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _data_uri(figure: Figure) -> str:
    """The image that ``savefig`` would write; that lays out and draws every figure twice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).save(buffer, "png", compress_level=3)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
