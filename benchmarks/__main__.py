"""``python -m benchmarks COMMAND``: a thin shell over the modules beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from benchmarks import accuracy as timed
from benchmarks import gpu, iwae_step
from benchmarks import startup as starting
from benchmarks.case import Case
from benchmarks.cases import CASES
from benchmarks.growth import GROWTH, label
from benchmarks.machine import machine
from benchmarks.measure import fresh, measure
from benchmarks.table import cell, write

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Speed beside peers, in one run."
)
app.command("iwae")(iwae_step.main)
app.command("gpu")(gpu.main)

Item = TypeVar("Item")
Json = Annotated[Path | None, typer.Option("--json", help="write the result here")]
Names = Annotated[str, typer.Option(help="comma-separated cases; all by default")]
Engine = Annotated[str, typer.Option(help="our engine")]
Threads = Annotated[str, typer.Option(help="comma-separated numbers of threads")]


@app.command()
def speed(
    cases: Names = "",
    threads: Threads = "1,2",
    engine: Engine = "auto",
    rounds: Annotated[int, typer.Option(help="turns of every contender in one attempt")] = 7,
    scale: Annotated[float, typer.Option(help="times the steps of a turn that a case asks for")] = 1.0,
    run_steps: Annotated[int, typer.Option(help="steps of svi.run and bc.fit; 0 leaves them out")] = 2000,
    out: Json = None,
    table: Annotated[Path | None, typer.Option(help="page to put the table in, such as docs/performance.md")] = None,
) -> None:
    """Time per step of every contender; a fresh process for each case and number of threads."""
    options = {"engine": engine, "rounds": rounds, "scale": scale, "run-steps": run_steps}

    def row(of: tuple[str, int]) -> dict[str, Any]:
        name, count = of
        return fresh(["one", name, *_flags({**options, "threads": count})], threads=count)

    def said(row: dict[str, Any]) -> str:
        seen = ("ours_us", "numpyro_scan_us", "pyro_us", "ratio_numpyro_scan", "spread", "ratio_pyro")
        return f"{row['case']}, {row['threads']} threads: " + ", ".join(f"{key} {cell(key, row[key])}" for key in seen)

    counts = [int(count) for count in threads.split(",")]
    result = _collect([(name, count) for name in _chosen(cases) for count in counts], row, said, out)
    if table is not None:
        write(table, result)


@app.command()
def one(
    name: Annotated[str, typer.Argument(help="the case")],
    threads: Annotated[int, typer.Option(help="of torch")] = 1,
    engine: Engine = "auto",
    rounds: int = 7,
    scale: float = 1.0,
    run_steps: int = 2000,
    only: Annotated[str, typer.Option(help="comma-separated contenders; all by default")] = "",
    out: Json = None,
) -> None:
    """One row, measured in this process."""
    options: dict[str, Any] = {"engine": engine, "rounds": rounds, "scale": scale, "run_steps": run_steps}
    picked = tuple(filter(None, only.split(",")))
    result = measure(name, _case(name), threads=threads, only=picked, **options)
    _save(out, result)
    if out is None:
        typer.echo(json.dumps(result, indent=2))


@app.command()
def growth(
    what: Annotated[str, typer.Option(help="comma-separated, of N, latents, K, S")] = ",".join(GROWTH),
    threads: Annotated[int, typer.Option(help="of torch and XLA")] = 1,
    engine: Engine = "auto",
    rounds: int = 5,
    scale: float = 1.0,
    out: Json = None,
) -> None:
    """Time per step as rows, latents, draws or seeds grow."""
    options = {"engine": engine, "rounds": rounds, "scale": scale, "run-steps": 0, "threads": threads}
    names = [label(name, size) for name in what.split(",") for size in GROWTH[name].sizes]
    seen = ("ours_us", "numpyro_scan_us", "ratio_numpyro_scan")
    _collect(
        names,
        lambda name: fresh(["one", name, *_flags(options), "--only", "ours,numpyro_scan"], threads=threads),
        lambda row: f"{row['case']}: " + ", ".join(f"{key} {cell(key, row[key])}" for key in seen),
        out,
    )


@app.command()
def memory(
    cases: Names = "",
    threads: Annotated[int, typer.Option(help="of torch and XLA")] = 1,
    engine: Engine = "auto",
    out: Json = None,
) -> None:
    """Peak resident memory of either side, MiB above what it was before the case ran; a process for each."""
    options = {"engine": engine, "rounds": 2, "run-steps": 0, "threads": threads}

    def row(name: str) -> dict[str, Any]:
        found: dict[str, Any] = {"case": name}
        for side in ("ours", "numpyro_scan"):
            made = fresh(["one", name, *_flags(options), "--only", side], threads=threads)
            found[f"{side}_mib"] = made["peak_mib"] - made["start_mib"]
        return found

    _collect(_chosen(cases), row, json.dumps, out)


@app.command()
def startup(
    cases: Names = "",
    threads: Annotated[int, typer.Option(help="of torch and XLA")] = 1,
    engine: Engine = "auto",
    out: Json = None,
) -> None:
    """Seconds to the end of the first step beyond imports: cold, and warm in a second process."""
    _collect(_chosen(cases), lambda name: starting.startup(name, engine=engine, threads=threads), json.dumps, out)


@app.command("first-step", hidden=True)
def first_step(name: str, side: str = "ours", engine: str = "auto", out: Json = None) -> None:
    """One first step, in this process."""
    _save(out, starting.first_step(_case(name), side, engine))


@app.command()
def accuracy(
    cases: Names = "",
    steps: Annotated[int, typer.Option(help="of either run")] = 16_000,
    within: Annotated[float, typer.Option(help="nats from the best bound found")] = 0.1,
    engine: Engine = "auto",
    out: Json = None,
) -> None:
    """Seconds, compiling included, until the bound is near the best that either side finds."""
    _collect(
        _chosen(cases),
        lambda name: timed.accuracy(name, _case(name), steps=steps, engine=engine, within=within),
        lambda row: json.dumps({key: value for key, value in row.items() if not key.endswith("_marks")}),
        out,
    )


@app.command("table")
def page(
    result: Annotated[Path, typer.Argument(help="JSON of speed")],
    out: Annotated[Path, typer.Option(help="page to put the table in")] = Path("docs/performance.md"),
) -> None:
    """Write the table of an earlier run into the page."""
    write(out, json.loads(result.read_text(encoding="utf-8")))


def _collect(
    items: Iterable[Item],
    measured: Callable[[Item], dict[str, Any]],
    said: Callable[[dict[str, Any]], str],
    out: Path | None,
) -> dict[str, Any]:
    """A row for every item; each is shown and saved as it is measured, so that none is lost."""
    rows: list[dict[str, Any]] = []
    result = {**machine(), "rows": rows}
    for item in items:
        rows.append(measured(item))
        typer.echo(said(rows[-1]))
        _save(out, result)
    return result


def _chosen(cases: str) -> list[str]:
    names = [name.strip() for name in cases.split(",") if name.strip()] or list(CASES)
    for name in names:
        if name not in CASES:
            raise typer.BadParameter(f"unknown case {name!r}; choose from {', '.join(CASES)}")
    return names


def _case(name: str) -> Case:
    """A case of the table, or of one that grows: ``N=500``."""
    what, _, size = name.partition("=")
    return GROWTH[what].case(int(size)) if size and what in GROWTH else CASES[_chosen(name)[0]]()


def _flags(options: dict[str, Any]) -> list[str]:
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def _save(path: Path | None, result: Any) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
