"""The table of convergence theory for black-box variational inference, with measured slopes beside the proved ones.

    python examples/bbvi_convergence.py --out runs/bbvi_convergence
    python examples/bbvi_convergence.py --out runs/quick --quick

Log-concave targets (linear and logistic regression) under linear parameterisations are judged by objective gap and
distance to the best Gaussian, both exact; all others by E||grad||^2 from the library's monitor. Every row is a few
fits, and is kept in the folder as soon as it is measured: a run that was stopped goes on where it was.
Sources: Domke et al. (2023), https://arxiv.org/abs/2306.03638; Kim et al. (2023), https://arxiv.org/abs/2305.15349; Kim
et al. (2024), https://arxiv.org/abs/2307.14642; Surendran et al. (2025).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bbvi_theory import figures, unprotected
from bbvi_theory.measure import measure
from bbvi_theory.rows import table
from cells import write


@dataclass(frozen=True)
class Size:
    """How much work a run does."""

    seeds: int
    steps: int
    targets: int


SIZES = {"quick": Size(1, 300, 1), "default": Size(5, 2000, 20)}


def _measured(index: int, quick: bool, seeds: int, steps: int) -> dict[str, Any]:
    """One row; rows side by side are in processes, for Pyro's handlers are not for threads."""
    return measure(table(quick=quick)[index], seeds, steps)


def run(
    out: Annotated[Path, typer.Option(help="folder for the figures, results.json and table.md")],
    quick: Annotated[bool, typer.Option("--quick", help="a row of every kind, one seed, few steps")] = False,
    seeds: Annotated[int | None, typer.Option(help="fits a row", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="optimiser steps of a fit", min=100)] = None,
    only: Annotated[str, typer.Option(help="rows whose key contains this")] = "",
    workers: Annotated[int, typer.Option(help="processes", min=1)] = os.cpu_count() or 1,
) -> None:
    """Measure the table, draw it, and write results.json and table.md."""
    preset = SIZES["quick" if quick else "default"]
    size = Size(seeds or preset.seeds, steps or preset.steps, preset.targets)
    began, rows = time.perf_counter(), table(quick=quick)
    chosen = [i for i, row in enumerate(rows) if only in row.key]
    if not chosen:
        raise typer.BadParameter(f"no row's key contains {only!r}; keys are like {rows[0].key}")
    kept = out / "rows"
    kept.mkdir(parents=True, exist_ok=True)
    places = {i: kept / f"{rows[i].key}-{size.seeds}x{size.steps}.json" for i in chosen}
    missing = [i for i in chosen if not places[i].exists()]
    typer.echo(f"{len(chosen)} rows, {len(chosen) - len(missing)} of them already measured")
    for i, found in _all(missing, quick, size, min(workers, max(len(missing), 1))):
        write(places[i], found)
        typer.echo(f"{rows[i].key}: {_slope(found)}, {found['seconds']:.0f} s")
    measured = [json.loads(places[i].read_text(encoding="utf-8")) for i in chosen]
    share = _share(kept / f"unprotected-{size.targets}.json", size.targets)
    for target in dict.fromkeys(row["target"] for row in measured):
        figure = figures.falls([row for row in measured if row["target"] == target], target)
        figure.savefig(out / f"{target.replace(' ', '_')}.png", dpi=120)
    figures.shares(share).savefig(out / "unprotected.png", dpi=120)
    results = {
        "rows": [{key: value for key, value in row.items() if key != "curves"} for row in measured],
        "unprotected": share,
        "run": {"preset": "quick" if quick else "default", "seeds": size.seeds, "steps": size.steps},
        "seconds": time.perf_counter() - began,
    }
    write(out / "results.json", results)
    (out / "table.md").write_text(markdown(measured, share), encoding="utf-8")
    typer.echo(f"results: {out / 'results.json'}, table: {out / 'table.md'}, {results['seconds']:.0f} s in all")


def _all(missing: list[int], quick: bool, size: Size, workers: int) -> Any:
    """Rows as they are measured."""
    if workers == 1:
        yield from ((i, _measured(i, quick, size.seeds, size.steps)) for i in missing)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
        jobs = {pool.submit(_measured, i, quick, size.seeds, size.steps): i for i in missing}
        yield from ((jobs[job], job.result()) for job in as_completed(jobs))


def _share(place: Path, targets: int) -> dict[str, Any]:
    if not place.exists():
        write(place, unprotected.share(targets))
    found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return found


def _slope(row: dict[str, Any]) -> str:
    slope = row["slope"]
    if slope["value"] is None:
        return f"not available: {slope['reason']}"
    words = f"{slope['value']:+.3g}"
    if slope["low"] is not None:
        words += f" [{slope['low']:+.3g}, {slope['high']:+.3g}]"
    return words + (" per step" if slope["of"] == "log quantity in n" else "")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def markdown(rows: list[dict[str, Any]], share: dict[str, Any]) -> str:
    """The table for the documentation."""
    head = ("reference", "target", "log-concave", "family", "parameterisation", "estimator", "optimiser")
    head += ("quantity", "guaranteed", "expected slope", "measured slope", "gap, nats", "k-hat")
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        expected = row["expected_slope"]
        lines.append(
            " | ".join(
                [
                    *(str(row[key]) for key in ("reference", "target")),
                    "yes" if row["log_concave"] else "no",
                    *(row[key] for key in ("family", "parameterisation", "estimator", "optimiser")),
                    row["quantity"].replace("|", "\\|"),
                    row["guaranteed"] or "nothing",
                    "none" if expected is None else expected if isinstance(expected, str) else f"at most {expected:g}",
                    _slope(row),
                    _number(row["gap_nats"], ".2g"),
                    _number(row["khat"], ".2f"),
                ]
            )
        )
    wrong = ", ".join(f"{name} {value:.0%}" for name, value in share["share"].items())
    body = "\n".join(f"| {line} |" for line in lines)
    return (
        f"{body}\n\nA linear scale that starts at {share['start']:g} and takes steps of 1 / L comes to a non-positive "
        f"scale or jumps by more than 10 standard deviations in this share of {share['targets']} Gaussian targets: "
        f"{wrong}.\n"
    )


if __name__ == "__main__":
    typer.run(run)
