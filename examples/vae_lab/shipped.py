"""Shipped model files as modules, run by their path as the command line does."""

from __future__ import annotations

import sys
from types import ModuleType

from bbvi_conv.model_file import load_programs, locate_model


def shipped(name: str, seed: int = 0) -> ModuleType:
    """A shipped model file, run without its data; networks that it makes start under the seed."""
    path, _ = locate_model(name)
    model, _ = load_programs(str(path), None, seed=seed)
    return sys.modules[model.__module__]
