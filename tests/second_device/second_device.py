"""``torch.device("second")``: another device, made of this machine's processor; importing this adds it to torch.

What lies on the CPU cannot become a tensor on it in place, as it can on a CUDA device: make networks there.
It is a plugin of pytest: ``pytest -p second_device``, with the compiled part in the folder of the environment's
``BBVI_CONV_SECOND_DEVICE``, where :func:`compiled` puts it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
import types
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAME, LIBRARY = "second", "second_device_of_torch"
FOLDER = "BBVI_CONV_SECOND_DEVICE"


def compiled(folder: Path, compiler: str) -> None:
    """Compile the device into a folder, with that compiler."""
    from torch.utils.cpp_extension import include_paths

    headers = [*include_paths(), sysconfig.get_paths()["include"]]
    libraries = Path(torch.__file__).parent / "lib"
    linked = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", *(f"-l{n}" for n in ("c10", "torch_cpu", "torch_python"))]
    subprocess.run(
        [
            *(compiler, "-std=c++20", "-O0", "-shared", "-fPIC", *(f"-I{path}" for path in headers)),
            *(f"-DTORCH_EXTENSION_NAME={LIBRARY}", str(Path(__file__).with_name("device.cpp"))),
            *("-o", str(folder / f"{LIBRARY}.so"), *linked),
        ],
        check=True,
    )


class Module(types.ModuleType):
    """What torch asks of a device; its own generator, for calls without one, is the CPU's."""

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def device(self, device: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    manual_seed_all = manual_seed


def _add() -> None:
    torch.utils.rename_privateuse1_backend(NAME)
    spec = importlib.util.spec_from_file_location(LIBRARY, Path(os.environ[FOLDER]) / f"{LIBRARY}.so")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    torch._register_device_module(NAME, Module(f"torch.{NAME}"))
    torch.utils.generate_methods_for_privateuse1_backend()


if FOLDER in os.environ:
    _add()
