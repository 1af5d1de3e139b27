"""Programs written without a thought of devices, on a device."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn


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
    """Move a module whose own parameters or buffers lie elsewhere, with all that is inside it."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    if any(tensor.device != device for tensor in own):
        module.to(device)


def with_index(device: torch.device | str) -> torch.device:
    """The device, the current one where only a kind is named: as tensors on it say of themselves.

    Raises:
        RuntimeError: an unknown name.
    """
    named = torch.device(device)
    if named.type == "cpu" or named.index is not None:
        return named
    return torch.device(named.type, torch.get_device_module(named).current_device())
