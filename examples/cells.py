"""A study is cells, each kept in its folder as soon as it is measured: a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer


class Cells:
    """JSON files below a folder, one for each cell, under the settings they were measured with.

    Args:
        folder: where results.json, the figures and ``cells/`` go.
        settings: what the cells depend on; cells measured under others are measured again.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        (folder / "cells").mkdir(parents=True, exist_ok=True)

    def get(self, name: str, measure: Callable[[], dict[str, Any]], **own: Any) -> dict[str, Any]:
        """The cell of that name: as it was kept, or measured now and kept; ``own`` are settings of this cell alone."""
        settings = self.settings | own
        path = self.folder / "cells" / f"{name}.json"
        if path.is_file():
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if kept["settings"] == settings:
                return kept["found"]  # type: ignore[no-any-return]
        start = time.perf_counter()
        found = measure()
        found["seconds"] = time.perf_counter() - start
        write(path, {"settings": settings, "found": found})
        typer.echo(f"{name}: {found['seconds']:.1f} s")
        return found

    def conclude(self, results: dict[str, Any]) -> None:
        """Write results.json."""
        write(self.folder / "results.json", {**results, "run": self.settings})
        typer.echo(f"results: {self.folder / 'results.json'}")


def write(path: Path, content: dict[str, Any]) -> None:
    """JSON, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def preset(quick: bool, full: bool = False) -> str:
    """Which size a run has.

    Raises:
        BadParameter: both options at once.
    """
    if quick and full:
        raise typer.BadParameter("choose either --quick or --full")
    return "quick" if quick else "full" if full else "default"


def pick(only: Sequence[str] | None, rows: Mapping[str, str]) -> list[str]:
    """The rows called by their name or group, in their order; all where none is called.

    Args:
        only: what is called.
        rows: name -> group.

    Raises:
        BadParameter: no such row or group.
    """
    if unknown := sorted(set(only or ()) - {*rows, *rows.values()}):
        raise typer.BadParameter(f"no row or group is called {unknown[0]!r}; the rows are {', '.join(rows)}")
    return [name for name, group in rows.items() if not only or name in only or group in only]


def bar(value: float, limit: float) -> dict[str, Any]:
    """A number beside the limit it is to stay under."""
    return {"value": value, "at_most": limit, "met": bool(value <= limit)}
