"""What a run leaves in its directory, and how it is found again."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import itertools
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bbvi_conv.checkpoint import Rows, pack, unpack
from bbvi_conv.monitor.state import Look, MonitorState, columns, to_rows
from bbvi_conv.program.noise import Noise
from bbvi_conv.program.program import Program
from bbvi_conv.recipe import ModelSource, Recipe
from bbvi_conv.run import FitState, Run, Settings
from bbvi_conv.run_directory import RunDirectory
from bbvi_conv.settings import decode, encode

if TYPE_CHECKING:
    from bbvi_conv.fitting import Fit

POSTERIOR_DRAWS = 1000
HELD_OUT = "held_out_sha256"
"""Key of ``config.json``, there for a run with held-out data."""
_PACKAGES = ("bbvi_conv", "torch", "pyro-ppl", "numpy", "scipy", "arviz")


class Plan(NamedTuple):
    """What it takes to build a run again."""

    recipe: Recipe
    settings: Settings
    engine_reason: str | None


class Archive:
    """The outputs of one run on top of :class:`~bbvi_conv.run_directory.RunDirectory`."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self._due = 0.0
        self._written: dict[int, tuple[tuple[Look, ...], Rows]] = {}

    @classmethod
    def create(cls, path: str | Path) -> Archive:
        """A new run directory, locked for writing.

        Raises:
            ValueError: it already holds a run, or another process writes it.
        """
        return cls(RunDirectory.create(path))

    @classmethod
    def open(cls, path: str | Path) -> Archive:
        """An existing run directory; the lock is taken when something is written.

        Raises:
            FileNotFoundError, ValueError: it is no run directory.
        """
        return cls(RunDirectory.open(path))

    def close(self) -> None:
        """Let others write."""
        self.directory.close()

    # ---- writing ----

    def describe(self, run: Run, source: ModelSource | None) -> None:
        """Write ``config.json``: settings, versions, threads, engine, data hash, model file."""
        program, settings = run.program, run.settings
        config = {
            "settings": {f.name: encode(getattr(settings, f.name)) for f in dataclasses.fields(settings)},
            "source": None if source is None else {"path": source.path, "name": source.name},
            "data_sha256": data_hash(program.args, program.kwargs),
            "model": fingerprint(program),
            **({} if run.held_out is None else {HELD_OUT: data_hash(run.held_out.args, {})}),
            "engine": {"name": run.engine.name, "reason": run.engine.reason},
            "dtype": str(program.dtype).removeprefix("torch."),
            "unit": program.structure.describe(),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        self.directory.write_config(config)
        self.directory.append_log(f"started on the {run.engine.name} engine: {run.engine.reason}")

    def keep(self, state: FitState, seed: int) -> None:
        """A checkpoint, unless the last one is so fresh that more than a tenth of the time would go into them."""
        start = time.perf_counter()
        if start >= self._due:
            self.checkpoint(state, seed)
            end = time.perf_counter()
            self._due = end + 9 * (end - start)

    def checkpoint(self, state: FitState, seed: int) -> None:
        """Save the state as one unit, and the looks so far as ``monitor.csv``; ``seed`` is the first of the run."""
        self.directory.lock()
        tables = [self._rows(index, one.monitor) for index, one in enumerate(state.seeds)]
        self.directory.save_checkpoint(*pack(state, tables))
        names = columns(held_out=state.monitor.judges_held_out)
        self.directory.write_text("monitor.csv", monitor_csv(names, tables, seed))

    def _rows(self, index: int, monitor: MonitorState) -> Rows:
        """Rows of the looks of one seed; those of looks that were written before are kept."""
        looks, rows = self._written.get(index, ((), []))
        known = monitor.looks[: len(looks)]
        if len(known) < len(looks) or any(one is not other for one, other in zip(looks, known, strict=True)):
            rows = []
        rows = rows + to_rows(monitor, since=len(rows))
        self._written[index] = monitor.looks, rows
        return rows

    def conclude(self, fit: Fit) -> None:
        """Write everything a finished run leaves; the verdict comes first, so that no export can lose it."""
        from bbvi_conv.posterior import neutral, write_netcdf
        from bbvi_conv.report import write_report

        self.checkpoint(fit.state, fit.settings.seed)
        start = time.perf_counter()
        self._write_verdict(fit)
        path = self.directory.path
        exports: dict[str, Callable[[Path], object]] = {
            "posterior.nc": lambda to: write_netcdf(neutral(fit, POSTERIOR_DRAWS), to),
            "report.html": lambda to: write_report(fit, to),
        }
        for name, export in exports.items():
            try:
                export(path / name)
            except Exception as error:
                self.directory.append_log(f"{name} was not written: {type(error).__name__}: {error}")
                raise RuntimeError(
                    f"the fit is safe in {path}, but {name} could not be written: {error}; mend that and call "
                    "bbvi_conv.load(directory) to try again"
                ) from error
            finally:
                fit.seconds["export"] = time.perf_counter() - start
                self._write_verdict(fit)
        self.directory.append_log(f"{fit.verdict.outcome} after {fit.state.step} steps")

    def _write_verdict(self, fit: Fit) -> None:
        self.directory.write_json("verdict.json", {**fit.verdict.to_json(), "seconds": dict(fit.seconds)})

    # ---- reading ----

    def check_model(self, program: Program) -> None:
        """Refuse a model or guide that is not the one the run was made with.

        Raises:
            ValueError: in what they differ.
        """
        then = self.directory.read_config().get("model")
        if then is not None and (found := _differs(fingerprint(program), then)):
            where = self.directory.path
            raise ValueError(f"the model is not that of the run in {where}: {found}; put it back, or fit anew")

    def state(self, device: torch.device) -> FitState | None:
        """The newest sound checkpoint, its tensors on ``device``; or None before the first."""
        if not self.directory.has_checkpoint():
            return None
        tensors, meta = self.directory.load_checkpoint()
        return unpack({name: tensor.to(device) for name, tensor in tensors.items()}, meta)

    def plan(self, recipe: Recipe | None, held_out: tuple[Any, ...] | None, given: dict[str, Any]) -> Plan:
        """Model, data and settings of the run, from its model file or from what is given.

        Args:
            recipe: model, guide and data; None: those of the model file.
            held_out: held-out data; None: those of the model file, where the run has any.
            given: settings by name, in place of the stored ones.

        Raises:
            ValueError: no model to be found, other data, or a setting that a file cannot hold.
        """
        config = self.directory.read_config()
        try:
            stored, source = dict(config["settings"]), config["source"]
        except (KeyError, TypeError):
            raise ValueError(
                f"{self.directory.path / 'config.json'} lacks settings or source: it is no run of ours"
            ) from None
        settings = {name: given[name] if name in given else decode(value, name=name) for name, value in stored.items()}
        engine_reason = None
        if settings["engine"] == "auto" and "engine" not in given:  # the same bits need the same engine
            settings["engine"], engine_reason = config["engine"]["name"], config["engine"]["reason"]
        chosen = Settings(**settings)
        found = None if source is None else ModelSource(source["path"], source["name"])
        judged = HELD_OUT in config
        if recipe is None:
            if found is None:
                raise ValueError(
                    f"the run in {self.directory.path} was not made from a model file: give model, guide and args"
                )
            from bbvi_conv.model_file import load_model

            spec = found.path if found.name is None else f"{found.path}:{found.name}"
            file = load_model(spec, seed=chosen.seed, held_out=judged and held_out is None)
            recipe = Recipe(file.model, file.guide, file.args, file.kwargs, found, file.held_out)
        recipe = recipe._replace(source=found, held_out=recipe.held_out if held_out is None else held_out)
        if data_hash(recipe.args, recipe.kwargs) != config["data_sha256"]:
            raise ValueError(f"the data are not those of the run in {self.directory.path}: give the same, or fit anew")
        self._check_held_out(recipe.held_out, config.get(HELD_OUT))
        return Plan(recipe, chosen, engine_reason)

    def _check_held_out(self, given: tuple[Any, ...] | None, wanted: str | None) -> None:
        path = self.directory.path
        if given is None and wanted is not None:
            raise ValueError(f"the run in {path} was judged on held-out data: give them as held_out")
        if given is not None and wanted is None:
            raise ValueError(f"the run in {path} has no held-out data: leave held_out out, or fit anew with it")
        if given is not None and data_hash(given, {}) != wanted:
            raise ValueError(f"the held-out data are not those of the run in {path}: give the same, or fit anew")


def monitor_csv(names: Sequence[str], tables: Sequence[Rows], seed: int) -> str:
    """The rows of every seed as CSV, in the order the looks were made; ``seed`` is the first of them."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["seed", *names])
    for looks in itertools.zip_longest(*tables):
        present = [[seed + s, *row] for s, row in enumerate(looks) if row is not None]
        writer.writerows(["" if cell is None else cell for cell in row] for row in present)
    return text.getvalue()


def fingerprint(program: Program) -> dict[str, Any]:
    """What tells a model and its guide from others: their parameters, and both densities of one draw at a fixed point.

    A density is None where it is not finite there, or depends on buffers that steps change.
    """
    x = 0.1 * torch.sin(torch.arange(1.0, len(program.initial()) + 1.0)).to(program.initial())
    drawn = program.layout.draw(torch.Generator().manual_seed(0), dtype=program.dtype)  # the same on every device
    noise, batch = Noise(*(part.to(program.device) for part in drawn)), program.example()[1]
    with torch.no_grad(), program.networks_kept():
        seen = program.site_values(x, noise, batch)
    densities = {"log_p": float(seen.log_p), "log_q": float(seen.log_q)}
    fixed = not program.changing
    return {
        "parameters": {leaf.name: list(leaf.tensor.shape) for leaf in program.leaves},
        **{name: value if fixed and math.isfinite(value) else None for name, value in densities.items()},
    }


def _differs(now: Mapping[str, Any], then: Mapping[str, Any]) -> str:
    """In what a model is not that of a run, in words; empty where it is."""
    if list(now["parameters"].items()) != list(then["parameters"].items()):
        shown = [", ".join(f"{n} {tuple(shape)}" for n, shape in one["parameters"].items()) for one in (then, now)]
        return f"its parameters were {shown[0]}, and are {shown[1]}"
    for name in ("log_p", "log_q"):
        a, b = now[name], then[name]
        if (a is None) != (b is None) or (a is not None and abs(a - b) > 1e-3 + 1e-4 * abs(b)):
            return f"at the same draw {name} was {b}, and is {a}"
    return ""


def data_hash(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """SHA-256 of all arguments; floats count as float32, so that the float type of the run does not matter."""
    digest = hashlib.sha256()
    for value in (*args, *(kwargs[name] for name in sorted(kwargs))):
        _digest(value, digest.update)
    return digest.hexdigest()


def _digest(value: Any, update: Callable[[bytes], None]) -> None:
    """Arrays by their numbers, containers by what they hold, other objects by type and attributes."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu()
        plain = plain.to(torch.float32) if plain.is_floating_point() else plain
        update(repr(tuple(plain.shape)).encode())
        update(plain.contiguous().numpy().tobytes())
    elif hasattr(value, "__array__"):
        array = np.asarray(value)
        _digest(array.tolist() if array.dtype.hasobject else torch.as_tensor(array), update)
    elif isinstance(value, Mapping):
        _digest([*value.items()], update)
    elif isinstance(value, (list, tuple)):
        update(f"{type(value).__name__} of {len(value)}".encode())
        for part in value:
            _digest(part, update)
    elif isinstance(value, (set, frozenset)):
        _digest(sorted(map(repr, value)), update)
    elif " at 0x" in repr(value):  # an address, which another process does not have
        update(getattr(value, "__qualname__", type(value).__qualname__).encode())
        _digest(getattr(value, "__dict__", {}), update)
    else:
        update(repr(value).encode())


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
