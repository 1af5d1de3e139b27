"""The tests of a device, on one that is made of this machine's processor: most of them need no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from second_device import FOLDER, NAME, compiled

from bbvi_conv.engine.native.library import compiler

HERE = Path(__file__).parent


def test_fits_on_a_second_device(tmp_path: Path) -> None:
    """In a process of its own: a device cannot be taken away again."""
    compiled(tmp_path, compiler())
    paths = [str(HERE / "second_device"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
        **{"PYTHONPATH": os.pathsep.join(filter(None, paths)), FOLDER: str(tmp_path), "BBVI_CONV_TEST_DEVICE": NAME},
    }
    done = subprocess.run(
        [*(sys.executable, "-m", "pytest", "-q", "-p", "second_device", "-p", "no:cacheprovider"), "test_device.py"],
        **{"cwd": HERE, "env": environment, "capture_output": True, "text": True},
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout
