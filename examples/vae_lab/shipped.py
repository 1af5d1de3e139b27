"""Shipped model files as modules, run by their path as the command line does."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch

from bbvi_conv.model_file import locate_model


def shipped(name: str, seed: int = 0) -> ModuleType:
    """A shipped model file, run anew and without its data: its networks are new ones, started under the seed."""
    path, _ = locate_model(name)
    spec = importlib.util.spec_from_file_location(f"_vae_lab_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        spec.loader.exec_module(module)
    return module
