"""A fit's state as named tensors and plain data, and back to the last bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bbvi_conv.engine.engine import Carry
from bbvi_conv.monitor.intervals import Estimate
from bbvi_conv.monitor.judge import Check
from bbvi_conv.monitor.state import columns, from_rows, to_rows
from bbvi_conv.run import FitState, joined

Rows = list[list[float | int | None]]
"""The looks of one seed as :func:`~bbvi_conv.monitor.state.to_rows` writes them."""

_BUFFERS = "buffers."

VERSION = 1
"""Layout of the checkpoint; raised when an older one can no longer be read."""


def pack(state: FitState, tables: Sequence[Rows] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and what JSON holds: floats go through ``repr`` unharmed.

    ``tables`` are the rows of every seed's looks, where they are known already.
    """
    tensors: dict[str, Tensor] = {}
    metas = []
    for index, one in enumerate(state.seeds):
        head = _head(index)
        tensors |= {f"{head}carry.{part:03d}": tensor for part, tensor in enumerate(one.carry.flat())}
        if one.previous is not None:
            tensors[f"{head}previous"] = one.previous
        if one.best is not None:
            tensors[f"{head}best"] = one.best
        tensors |= {f"{head}{_BUFFERS}{name}": tensor for name, tensor in one.buffers.items()}
        metas.append(_pack_seed(one, to_rows(one.monitor) if tables is None else tables[index]))
    return tensors, {"version": VERSION, **metas[0], "others": metas[1:]}


def _head(index: int) -> str:
    """What the tensors of a seed are called by; those of the first by nothing."""
    return f"seed{index:03d}." if index else ""


def _pack_seed(state: FitState, rows: Rows) -> dict[str, Any]:
    return {
        "window_start": state.window_start,
        "monitor": {
            "label": state.monitor.label,
            "columns": columns(held_out=state.monitor.judges_held_out),
            "rows": rows,
        },
        "checks": [[check.step, *(list(estimate) for estimate in check[1:] if estimate)] for check in state.checks],
        "losses": [list(chunk) for chunk in state.losses],
        "seconds": dict(state.seconds),
        "done": state.done,
        **({} if state.best is None else {"best_step": state.best_step}),
    }


def unpack(tensors: dict[str, Tensor], meta: dict[str, Any]) -> FitState:
    """The state that :func:`pack` took apart.

    Raises:
        ValueError: a layout of another version, or a part that is missing.
    """
    if meta.get("version") != VERSION:
        raise ValueError(
            f"the checkpoint has layout {meta.get('version')!r}, this version of bbvi_conv reads layout {VERSION}: "
            "resume it with the version that config.json names, or start again in a new directory"
        )
    try:
        metas = [meta, *meta.get("others", [])]
        return joined([_unpack_seed(tensors, one, _head(index)) for index, one in enumerate(metas)])
    except (KeyError, TypeError) as error:
        raise ValueError(f"the checkpoint lacks a part ({error}): start the run again in a new directory") from error


def _unpack_seed(tensors: dict[str, Tensor], meta: dict[str, Any], head: str) -> FitState:
    table = meta["monitor"]
    return FitState(
        carry=Carry.unflatten([tensors[name] for name in sorted(tensors) if name.startswith(f"{head}carry.")]),
        window_start=meta["window_start"],
        previous=tensors.get(f"{head}previous"),
        monitor=from_rows(table["columns"], table["rows"], label=table["label"]),
        checks=tuple(Check(step, *(Estimate(*estimate) for estimate in rest)) for step, *rest in meta["checks"]),
        losses=tuple((first, count, loss) for first, count, loss in meta["losses"]),
        seconds=meta["seconds"],
        done=meta["done"],
        best=tensors.get(f"{head}best"),
        best_step=meta.get("best_step", 0),
        buffers={
            name.removeprefix(head + _BUFFERS): tensor
            for name, tensor in tensors.items()
            if name.startswith(head + _BUFFERS)
        },
    )
