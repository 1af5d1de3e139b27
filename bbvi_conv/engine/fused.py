"""Fewer kernels for the same graph, by torch's compiler."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch.fx import GraphModule

from bbvi_conv.engine.native.cache import folder
from bbvi_conv.program.graph_module import WrittenLate
from bbvi_conv.program.graphs import widest

NARROW = 2**22
"""Numbers in the widest tensor of a graph below which kernels that do not wait for each other become one."""


def fused(graph: GraphModule) -> Callable[..., object]:
    """The graph, compiled at its first call for the shapes given there; what was compiled is kept in the private cache.

    Raises:
        UnsafeCache: for the folder of the cache.
    """
    together = widest(graph) < NARROW
    WrittenLate.force_recompile(graph)  # it reads the code
    run = torch.compile(graph, fullgraph=True, dynamic=False, options={"combo_kernels": together})

    def quietly(*inputs: torch.Tensor) -> object:
        with _private_cache(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on options that are chosen elsewhere
            return run(*inputs)

    return quietly


@contextmanager
def _private_cache() -> Iterator[None]:
    """torch's compiler keeps its files in a folder of the user's alone, unless the user has named one.

    It names its own folder in the environment as if the user had.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) != default_cache_dir()
    own = {} if named else {"TORCHINDUCTOR_CACHE_DIR": str(folder() / "inductor")}
    with mock.patch.dict(os.environ, own):
        yield
