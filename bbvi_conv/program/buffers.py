"""Modules a program calls, and their buffers: found by a forward hook, put back after every look."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from bbvi_conv.program.device import move


class CalledModule(NamedTuple):
    """A module that ran, and a copy of its own buffers from just before."""

    module: nn.Module
    buffers: dict[str, Tensor]


def own_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's own buffers, submodules left out."""
    return {name: b.detach().clone() for name, b in module.named_buffers(recurse=False)}


@contextmanager
def called_modules(device: torch.device) -> Iterator[list[CalledModule]]:
    """Collect every module called inside, once each, in order of the first call, and move it to ``device``.

    The hook is one for all threads: what others call meanwhile, as the graphs of other fits, is not of this program.
    """
    thread = threading.get_ident()
    found: dict[int, CalledModule] = {}
    called: list[CalledModule] = []

    def hook(module: nn.Module, inputs: Any) -> None:
        if threading.get_ident() == thread and id(module) not in found:
            move(module, device)
            found[id(module)] = CalledModule(module, own_buffers(module))
            called.append(found[id(module)])

    handle = register_module_forward_pre_hook(hook)
    try:
        yield called
    finally:
        handle.remove()


def changed_buffers(called: Sequence[CalledModule]) -> list[str]:
    """Names of buffers that differ from their copies."""
    return [
        f"{type(module).__name__}.{name}"
        for module, buffers in called
        for name, now in module.named_buffers(recurse=False)
        if name in buffers and not torch.equal(now, buffers[name])
    ]


def restore_buffers(called: Sequence[CalledModule]) -> None:
    """Put the copies back, in place."""
    for module, buffers in called:
        for name, now in module.named_buffers(recurse=False):
            if name in buffers:
                now.copy_(buffers[name])


def copies_of(modules: Sequence[nn.Module]) -> list[CalledModule]:
    """The modules with copies of their own buffers as they are now."""
    return [CalledModule(module, own_buffers(module)) for module in modules]


def by_name(called: Sequence[CalledModule]) -> dict[str, Tensor]:
    """The copies as plain data: by the number of the module and the name."""
    return {f"{i}.{name}": value for i, one in enumerate(called) for name, value in one.buffers.items()}


def of_modules(modules: Sequence[nn.Module], values: Mapping[str, Tensor]) -> list[CalledModule]:
    """The modules with what :func:`by_name` made of copies of their buffers."""
    return [
        CalledModule(module, {name: values[f"{i}.{name}"] for name in own_buffers(module) if f"{i}.{name}" in values})
        for i, module in enumerate(modules)
    ]


@contextmanager
def buffers_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Whatever runs inside leaves the buffers of ``modules`` as they were."""
    before = copies_of(modules)
    try:
        yield
    finally:
        restore_buffers(before)
