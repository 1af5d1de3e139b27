"""Plans as JSON."""

from __future__ import annotations

from typing import Any

import torch

from bbvi_conv.engine.native.plan import Call, Place, Plan, View


def encode(plan: Plan) -> dict[str, Any]:
    """What a later process needs to run the library: memory, and the calls of torch's operations."""
    return {
        "inputs": list(plan.inputs),
        "scratch": plan.scratch,
        "taken": plan.taken,
        "calls": [
            {"target": c.target, "args": _value(c.args), "kwargs": _value(c.kwargs), "results": _value(c.results)}
            for c in plan.calls()
        ],
    }


def decode(data: dict[str, Any]) -> Plan:
    """The inverse of :func:`encode`, without kernels: they are in the library."""
    code = tuple(
        Call(c["target"], tuple(_back(c["args"])), _back(c["kwargs"]), tuple(_back(c["results"])))
        for c in data["calls"]
    )
    return Plan(tuple(data["inputs"]), data["scratch"], data["taken"], code)


def _value(value: Any) -> Any:
    if isinstance(value, View):
        return {"view": [list(value.place), value.dtype, list(value.size), list(value.stride)]}
    if isinstance(value, dict):
        return {"dict": {k: _value(v) for k, v in value.items()}}
    if isinstance(value, (list, tuple)):
        return [_value(v) for v in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, float):
        return {"float": value.hex()}
    return value


def _back(value: Any) -> Any:
    if isinstance(value, list):
        return [_back(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "view" in value:
        place, dtype, size, stride = value["view"]
        return View(Place(*place), dtype, tuple(size), tuple(stride))
    if "float" in value:
        return float.fromhex(value["float"])
    if "dtype" in value:
        return getattr(torch, value["dtype"])
    return {k: _back(v) for k, v in value["dict"].items()}
