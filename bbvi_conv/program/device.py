"""Programs written without a thought of devices, on a device."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.utils._pytree import tree_leaves

P = ParamSpec("P")
R = TypeVar("R")

_users: ContextVar[torch.device | None] = ContextVar("the default device outside", default=None)


def by_default(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, torch makes tensors on the device where it is not told where; costs nothing where it does so anyway."""
    return nullcontext() if torch.get_default_device() == device else device


def cpu_by_default(function: Callable[P, R]) -> Callable[P, R]:
    """The function with torch making tensors on the CPU where it is not told where, whatever a user's default device.

    So is this package's own code written; models and guides run where their program lives
    (:func:`~bbvi_conv.program.program.quiet_pyro`).
    """

    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        outside = torch.get_default_device()
        if outside.type == "cpu":
            return function(*args, **kwargs)
        token = _users.set(outside)
        try:
            with torch.device("cpu"):
                return function(*args, **kwargs)
        finally:
            _users.reset(token)

    return inner


def home(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Where to run with these arguments unless told otherwise: where the first of their tensors lies that is not on
    the CPU, or where torch makes tensors by default."""
    places = [value.device for value in tree_leaves((args, dict(kwargs))) if isinstance(value, Tensor)]
    places.append(_users.get() or torch.get_default_device())
    return next((str(place) for place in places if place.type not in _NO_HOME), "cpu")


_NO_HOME = ("cpu", "meta", "mps")
"""The kind that is left when no other is found, one that holds no numbers, and one that has no float64."""


class OnDevice(Messenger):  # type: ignore[misc]
    """Move the first value of a parameter that lies elsewhere: one of a module's in place, it stays the same."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def _pyro_param(self, msg: Any) -> None:
        first, *rest = msg["args"]
        if not isinstance(first, Tensor) or first.device == self.device:
            return
        if isinstance(first, nn.Parameter):
            first.data = first.data.to(self.device)
        else:
            msg["args"] = (first.to(self.device), *rest)


def move(module: nn.Module, device: torch.device) -> None:
    """Move a module whose own parameters or buffers lie elsewhere, with all that is inside it; and priors inside it."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    if any(tensor.device != device for tensor in own):
        module.to(device)
    for part in module.modules():
        if isinstance(part, PyroModule):  # of a PyroSample: torch knows nothing of them
            priors = part._pyro_samples
            priors.update({name: moved(prior, device) for name, prior in priors.items()})


def moved(prior: Any, device: torch.device) -> Any:
    """A distribution with its tensors on the device; itself where they are. Parameters are moved in place."""
    found: dict[int, Any] = {}
    made = _moved(prior, device, found)
    return made if any(isinstance(one, Tensor) for one in found.values()) else prior


def _moved(value: Any, device: torch.device, known: dict[int, Any]) -> Any:
    """What stands for a part of a distribution there; ``known`` holds what was met before, by identity."""
    if id(value) in known:  # a transform and its inverse hold each other
        return known[id(value)]
    if isinstance(value, nn.Parameter):
        value.data = value.data.to(device)
    elif isinstance(value, Tensor):
        if value.device != device:
            return known.setdefault(id(value), value.to(device))
    elif isinstance(value, Distribution | Transform):
        made = known[id(value)] = copy.copy(value)
        made.__dict__.update({name: _moved(part, device, known) for name, part in vars(value).items()})
        return made
    elif isinstance(value, weakref.ref):  # of a transform to its inverse, which it then makes anew
        return None
    elif isinstance(value, dict):
        return {name: _moved(part, device, known) for name, part in value.items()}
    elif type(value) in (list, tuple):
        return type(value)(_moved(part, device, known) for part in value)
    return value


def with_index(device: torch.device | str) -> torch.device:
    """The device, the current one where only a kind is named: as tensors on it say of themselves.

    Raises:
        RuntimeError: an unknown name.
    """
    named = torch.device(device)
    if named.type == "cpu" or named.index is not None:
        return named
    return torch.device(named.type, torch.get_device_module(named).current_device())
