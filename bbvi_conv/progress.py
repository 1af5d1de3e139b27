"""The progress bar of a fit: steps a second, bound, gap with its interval."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.progress

    from bbvi_conv.run import FitState, Run


class Progress:
    """A context manager; shows nothing unless asked and on a terminal."""

    def __init__(self, run: Run, total: int, *, shown: bool) -> None:
        self._run, self._total, self._bar = run, total, None if not shown else _bar()
        self._task: rich.progress.TaskID | None = None

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            seeds = f", {len(self._run.seeds)} seeds" if len(self._run.seeds) > 1 else ""
            self._task = self._bar.add_task(
                f"{self._run.engine.name} engine{seeds}", total=self._total, status="", speed=""
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, state: FitState) -> None:
        """Bring the bar up to ``state``."""
        if self._bar is None or self._task is None:
            return
        spent = state.seconds.get("steps", 0.0)
        speed = f"{state.step / spent:,.0f} steps/s" if spent > 0 else ""
        self._bar.update(self._task, completed=state.step, speed=speed, status=_status(self._run, state))


def _status(run: Run, state: FitState) -> str:
    from bbvi_conv.verdict import show

    parts = []
    if state.losses:
        unit = "nats per datum" if run.normaliser > 1 else "nats"
        parts.append(f"bound {-state.losses[-1][2]:.4g} {unit}")
    if state.checks and state.checks[-1].gap.value is not None:
        parts.append(f"gap {show(state.checks[-1].gap)}")
    return ", ".join(parts)


def _bar() -> rich.progress.Progress | None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[status]}"),
        console=console,
        transient=True,
    )
