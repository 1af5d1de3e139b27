"""The command line: parse, call the library, print, exit code. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import atexit
import dataclasses
import gc
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bbvi_conv.fitting import Fit
    from bbvi_conv.model_file import ModelFile

CONVERGED, BAD_USAGE, NOT_CONVERGED, INTERRUPTED = 0, 2, 3, 130

app = typer.Typer(
    help="Fit Pyro models by variational inference, and say whether the fit has converged and can be trusted. "
    "Exit code 0: converged; 3: any other outcome; 2: bad usage.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress bar and no verdict: the exit code says it")]


@app.callback()
def _start() -> None:
    """Walk through all that a command imports less often than Python does for garbage, and not once more at the end."""
    gc.set_threshold(10_000, 20, 50)
    atexit.register(gc.freeze)


@app.command()
def fit(
    file: Annotated[
        str, typer.Argument(metavar="FILE[:NAME]", help="a model file, or a shipped model such as eight_schools")
    ],
    family: Annotated[
        str | None,
        typer.Option(help="where the file has no guide: mean-field, full-rank, iaf, ..."),
    ] = None,
    objective: Annotated[str | None, typer.Option(help="the bound: elbo, iwae, vr-iwae, miwae, ciwae or piwae")] = None,
    particles: Annotated[int | None, typer.Option(help="draws of the objective: K, for the elbo M")] = None,
    estimator: Annotated[
        str | None, typer.Option(help="of the gradient: pathwise, sticking-the-landing or doubly-reparameterised")
    ] = None,
    groups: Annotated[int | None, typer.Option(help="M of miwae and piwae")] = None,
    alpha: Annotated[float | None, typer.Option(help="alpha of vr-iwae, in [0, 1)")] = None,
    elbo_weight: Annotated[float | None, typer.Option(help="share of the elbo in ciwae")] = None,
    steps: Annotated[int | None, typer.Option(help="optimiser steps at most")] = None,
    tol: Annotated[float | None, typer.Option(help="tolerance on the remaining gap, in nats")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of all noise, and of networks made by the file")] = None,
    seeds: Annotated[int | None, typer.Option(help="independent runs at once, of this seed and the next ones")] = None,
    engine: Annotated[str | None, typer.Option(help="auto, eager, traced, compiled or cuda-graph")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or float64")] = None,
    amp: Annotated[
        str | None,
        typer.Option(help="bfloat16 rounds what products of a step take and give; tf32, on CUDA, what they take"),
    ] = None,
    minibatch: Annotated[int | None, typer.Option(help="rows a step sees")] = None,
    plate: Annotated[str | None, typer.Option(help="the plate whose rows are subsampled")] = None,
    step_size: Annotated[float | None, typer.Option(help="C of the optimiser's step-size rule")] = None,
    max_norm: Annotated[float | None, typer.Option(help="length to which longer gradients are cut")] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out/--no-held-out", help="judge on the file's held_out(), where it has one")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="the new run directory; by default runs/FILE")] = None,
    quiet: Quiet = False,
) -> None:
    """Fit a model file and leave verdict, posterior and report in a run directory.

    The options override the file's own `fit` dict, which overrides the library's defaults.
    """
    with _one_sentence() as failing:
        from bbvi_conv.model_file import load_model
        from bbvi_conv.run_directory import RunDirectory

        if seed is not None and seed < 0:
            raise ValueError(f"--seed must be at least 0, got {seed}")
        found = failing.model = load_model(file, seed=seed, held_out=held_out)
        directory = out or Path("runs") / "-".join(filter(None, (found.path.stem, found.name)))
        if RunDirectory(directory).holds_run():
            raise ValueError(f"{directory} already holds a run: choose another directory with --out, or resume it")
        options = {"family": family, "max_steps": steps, "tol": tol, "engine": engine, "device": device, "dtype": dtype}
        options |= {"num_seeds": seeds, "objective": objective, "particles": particles, "estimator": estimator}
        options |= {"groups": groups, "alpha": alpha, "elbo-weight": elbo_weight}
        options |= {"minibatch": minibatch, "plate": plate, "amp": amp}
        options |= {"step_size": step_size, "max_norm": max_norm}
        settings = _settings(found, {name: value for name, value in options.items() if value is not None})
        result = _fit(found, settings, directory, quiet)
        _finish(result, directory, quiet)


@app.command()
def report(run: RunArgument) -> None:
    """Write the report of a run again, one self-contained HTML page."""
    with _one_sentence():
        import bbvi_conv as bc
        from bbvi_conv.report import write_report

        path = run / "report.html"
        write_report(bc.load(run), path)
        typer.echo(str(path))


@app.command()
def assumptions(run: RunArgument) -> None:
    """Print what convergence theorems ask of a run: holds, fails or unknown, where and why."""
    with _one_sentence():
        import bbvi_conv as bc

        typer.echo(str(bc.load(run).assumptions()))


@app.command()
def resume(
    run: RunArgument,
    steps: Annotated[int | None, typer.Option(help="steps more; by default up to those first asked for")] = None,
    quiet: Quiet = False,
) -> None:
    """Take up a run where it stands: one that was killed ends in the same bits as one that was not."""
    with _one_sentence():
        import bbvi_conv as bc

        _finish(bc.load(run).resume(steps, progress=not quiet), run, quiet)


@app.command()
def rerun(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="the new run directory")],
    quiet: Quiet = False,
) -> None:
    """Make a run again from its settings and say whether the numbers are the same (exit code 3 if not)."""
    with _one_sentence() as failing:
        import bbvi_conv as bc
        from bbvi_conv.model_file import load_model
        from bbvi_conv.run_directory import RunDirectory

        if RunDirectory(out).holds_run():
            raise ValueError(f"{out} already holds a run: choose another directory with --out")
        first = bc.load(run)
        if first.source is None:
            raise ValueError(f"the model of {run} came from no file: make the run again with bbvi_conv.fit")
        spec = ":".join(filter(None, first.source))
        judged = first.run.held_out is not None
        found = failing.model = load_model(spec, seed=first.settings.seed, held_out=judged)
        settings = {field.name: getattr(first.settings, field.name) for field in dataclasses.fields(first.settings)}
        if found.guide is not None:
            del settings["family"]
        again = _fit(found, settings, out, quiet)
        different = differences(first, again)
        _finish(
            again, out, quiet, note=f"not the same numbers: {', '.join(different)}" if different else "the same numbers"
        )
        if different:
            raise typer.Exit(NOT_CONVERGED)


@app.command()
def models() -> None:
    """List the shipped models."""
    from bbvi_conv.model_file import shipped

    listed = shipped()
    width = max(len(name) for name, _ in listed)
    for name, line in listed:
        typer.echo(f"{name:<{width}}  {line}")


def differences(first: Fit, again: Fit) -> list[str]:
    """Names of what differs between two fits, to the last bit; times, and why an engine was chosen, do not count."""
    import torch

    pairs = list(zip(first.seeds, again.seeds, strict=False))
    same = len(first.seeds) == len(again.seeds) and all(torch.equal(one.x, other.x) for one, other in pairs)
    found = [] if same else ["parameters"]
    one, other = ({**fit.verdict.to_json(), "engine": fit.engine_name} for fit in (first, again))
    return found + [name for name in one if name != "seconds" and repr(one[name]) != repr(other.get(name))]


def _fit(found: ModelFile, settings: Mapping[str, Any], out: Path, quiet: bool) -> Fit:
    import bbvi_conv as bc

    return bc.fit(
        found.model,
        found.guide,
        found.args,
        found.kwargs,
        held_out=found.held_out,
        out=out,
        progress=not quiet,
        source=bc.ModelSource(str(found.path), found.name),
        **settings,
    )


def _finish(result: Fit, directory: Path, quiet: bool, note: str = "") -> None:
    """Show the verdict and leave with its exit code."""
    if not quiet:
        typer.echo(str(result.verdict))
        typer.echo(f"report: {directory / 'report.html'}")
    if note:
        typer.echo(note)
    if not result.verdict.converged:
        raise typer.Exit(NOT_CONVERGED)


def _settings(found: ModelFile, options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``bbvi_conv.fit``: the options given, over the file's own."""
    import torch

    from bbvi_conv.families import FAMILIES
    from bbvi_conv.run import Settings

    names = [field.name for field in dataclasses.fields(Settings)]
    for name in found.defaults:
        if name not in names:
            raise ValueError(
                f"{found.path}: its fit dict holds the unknown setting {name!r}; choose from {', '.join(names)}"
            )
    settings = {**found.defaults, "seed": found.seed}
    settings |= {
        name: options[name] for name in ("max_steps", "tol", "num_seeds", "engine", "device", "amp") if name in options
    }
    if "dtype" in options:
        settings["dtype"] = _pick("dtype", options["dtype"], {"float32": torch.float32, "float64": torch.float64})
    if "family" in options:
        if found.guide is not None:
            raise ValueError(f"{found.path} has a guide of its own, so --family does not apply: leave it out")
        settings["family"] = _pick("family", options["family"], FAMILIES)()
    if "minibatch" in options or "plate" in options:
        settings["minibatch"] = _minibatch(settings.get("minibatch"), options)
    chosen = Settings(**settings)  # which fills in the bound and the rule that a minibatch or its absence calls for
    details = {name: options[option] for option, name in _OF_OBJECTIVES.items() if option in options}
    if "objective" in options or details:
        settings["objective"] = _objective(chosen.bound(), options.get("objective"), details)
    if "step_size" in options or "max_norm" in options:
        settings["optimiser"] = _optimiser(chosen.rule(), options)
    return settings


def _optimiser(base: Any, options: Mapping[str, Any]) -> Any:
    """The optimiser with C and the longest gradient as asked for, or with those changed in what it projects."""
    from bbvi_conv.optim import Projected

    if isinstance(base, Projected):
        return dataclasses.replace(base, optimiser=_optimiser(base.optimiser, options))
    if "step_size" in options:
        rule = _replaced(base.step_size, {"size": options["step_size"]}, {"step-size": "size"})
        base = dataclasses.replace(base, step_size=rule)
    if "max_norm" in options:
        base = _replaced(base, {"max_norm": options["max_norm"]}, {"max-norm": "max_norm"})
    return base


_OF_OBJECTIVES = {
    "particles": "num_particles",
    "estimator": "estimator",
    "groups": "num_groups",
    "alpha": "alpha",
    "elbo-weight": "elbo_weight",
}
"""Option -> argument of an objective."""


def _objective(base: Any, name: str | None, details: Mapping[str, Any]) -> Any:
    """The objective of that name with its details; those of the file's own stay where it is the same one."""
    import inspect

    from bbvi_conv.objectives import OBJECTIVES

    options = {option: argument for option, argument in _OF_OBJECTIVES.items() if argument in details}
    make = None if name is None else _pick("objective", name, OBJECTIVES)
    if make is None or type(base) is make:
        return _replaced(base, details, options)
    arguments = inspect.signature(make).parameters
    for option, argument in options.items():
        if argument not in arguments:
            raise ValueError(f"--{option} does not apply to {name}: leave it out")
    return make(**details)


def _pick(option: str, name: str, choices: Mapping[str, Any]) -> Any:
    if name not in choices:
        raise ValueError(f"unknown {option} {name!r}; choose one of {', '.join(choices)}")
    return choices[name]


def _replaced(value: Any, changes: Mapping[str, Any], options: Mapping[str, str]) -> Any:
    """The dataclass with some fields changed; a field it lacks is an option that does not apply."""
    has = {field.name for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set()
    for option, name in options.items():
        if name not in has:
            raise ValueError(f"--{option} does not apply to {type(value).__name__}: leave it out")
    return dataclasses.replace(value, **changes)


def _minibatch(base: Any, options: Mapping[str, Any]) -> Any:
    from bbvi_conv.program.minibatch import Minibatch

    changes = {
        field: options[option] for option, field in (("minibatch", "size"), ("plate", "plate")) if option in options
    }
    if base is not None:
        return dataclasses.replace(base, **changes)
    missing = next((option for option in ("minibatch", "plate") if option not in options), None)
    if missing is not None:
        raise ValueError(f"--{missing} is needed too: a minibatch is --minibatch ROWS --plate NAME")
    return Minibatch(**changes)


class _Failing:
    """Whose code runs: an error that came through this model file is told with its line."""

    model: ModelFile | None = None


@contextmanager
def _one_sentence() -> Iterator[_Failing]:
    """Bad input becomes one sentence on stderr and exit code 2; a mistake of this library keeps its traceback."""
    failing = _Failing()
    try:
        yield failing
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        message = _sentence(error, failing.model)
        if message is None:
            raise
        print(f"bbvi-conv: {message}", file=sys.stderr)
        raise typer.Exit(BAD_USAGE) from error


def _sentence(error: Exception, model: ModelFile | None) -> str | None:
    """What to tell the user; None for an error that is ours."""
    from bbvi_conv.model_file import line_of

    said = " ".join(str(error).split("Trace Shapes:")[0].split())
    line = None if model is None else line_of(error, model.path)
    if model is not None and line is not None:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return f"{model.path}, line {line}: {kind}{said}"
    if isinstance(error, ValueError | OSError):
        return said
    if isinstance(error, RuntimeError | IndexError) and model is not None:
        return f"{model.path}: {said}"
    return None
