"""Run directories: one writer, whole files, and a checkpoint that survives a kill at any instant."""

from __future__ import annotations

import errno
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from bbvi_conv.run_directory import RunDirectory

TENSORS = {"x": torch.arange(5, dtype=torch.float64) / 3, "step": torch.tensor(7.0), "rows": torch.tensor([[1, 2]])}
META = {"floats": [0.1 + 0.2, 1e-320, math.inf, -0.0], "nested": {"none": None, "text": "µ"}}


def test_a_checkpoint_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run") as run:
        shared = {"a": TENSORS["x"], "b": TENSORS["x"][1:], "c": TENSORS["x"].reshape(5, 1).T, **TENSORS}
        run.save_checkpoint(shared, META)
        tensors, meta = run.load_checkpoint()
    assert set(tensors) == set(shared)
    for name, tensor in shared.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert repr(meta) == repr(META)


def test_two_checkpoints_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path) as run:
        for count in range(5):
            run.save_checkpoint(TENSORS, {"count": count})
        assert run.load_checkpoint()[1] == {"count": 4}
    assert len(list((tmp_path / "checkpoint").iterdir())) == 2


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, name: str, damage: str) -> None:
    with RunDirectory.create(tmp_path) as run:
        for count in range(2):
            run.save_checkpoint(TENSORS, {"count": count})
    older, newer = sorted((tmp_path / "checkpoint").iterdir())
    spoil(newer / name, damage)
    assert RunDirectory.open(tmp_path).load_checkpoint()[1] == {"count": 0}
    spoil(older / name, damage)
    with pytest.raises(ValueError, match=r"no sound checkpoint is left .*: start the run again"):
        RunDirectory.open(tmp_path).load_checkpoint()
    with RunDirectory.open(tmp_path, write=True) as run:  # and the folder is not lost for it
        run.save_checkpoint(TENSORS, {"count": 2})
        assert run.load_checkpoint()[1] == {"count": 2}


def spoil(path: Path, damage: str) -> None:
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:9] + bytes([content[9] ^ 1]) + content[10:])


def test_a_folder_with_other_files_is_taken_and_one_with_a_run_refused(tmp_path: Path) -> None:
    (tmp_path / ".marker").touch()
    with RunDirectory.create(tmp_path) as run:
        run.write_config({"seed": 1})
    with pytest.raises(ValueError, match="already holds a run: choose another directory"):
        RunDirectory.create(tmp_path)
    assert RunDirectory.open(tmp_path).read_config() == {"seed": 1}
    assert (tmp_path / ".marker").exists()


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such run directory"):
        RunDirectory.open(tmp_path / "none")
    with pytest.raises(ValueError, match="is no run directory"):
        RunDirectory.open(tmp_path)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="a file is in the way"):
            RunDirectory.create(path)


def test_a_run_without_checkpoint_or_with_a_damaged_config_says_so(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path) as run:
        run.write_config({})
        assert not run.has_checkpoint()
        with pytest.raises(ValueError, match="holds no checkpoint"):
            run.load_checkpoint()
    (tmp_path / "config.json").write_text('{"seed": ', encoding="utf-8")
    with pytest.raises(ValueError, match="is not sound JSON"):
        run.read_config()
    with pytest.raises(ValueError, match=r"holds no verdict\.json"):
        run.read_json("verdict.json")


def test_json_files_are_strict_json_and_the_log_grows(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path) as run:
        run.write_json("verdict.json", {"gap": {"value": math.nan, "low": (0.1, -math.inf)}})
        assert run.read_json("verdict.json") == {"gap": {"value": None, "low": [0.1, None]}}
        run.append_log("one")
        run.append_log("two\n")
    assert [line.split(" ", 1)[1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["one", "two"]


def test_a_second_writer_in_this_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path) as run:
        run.write_config({})
        with pytest.raises(ValueError, match="is being written by process"):
            RunDirectory.open(tmp_path, write=True)
        RunDirectory.open(tmp_path).read_config()  # readers are welcome
    RunDirectory.open(tmp_path, write=True).close()


WRITER = """
import sys, torch
from bbvi_conv.run_directory import RunDirectory
with RunDirectory.create(sys.argv[1]) as run:
    count = 0
    while True:
        run.save_checkpoint({"x": torch.full((20_000,), float(count))}, {"count": count, "pad": "y" * 10_000})
        if count == 0:
            print("ready", flush=True)
        count += 1
"""


def start_writer(path: Path) -> subprocess.Popen[str]:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    return writer


def kill(writer: subprocess.Popen[str]) -> None:
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert writer.stdout is not None
    writer.stdout.close()


def test_another_process_is_refused_and_a_kill_frees_the_lock(tmp_path: Path) -> None:
    writer = start_writer(tmp_path)
    try:
        with pytest.raises(ValueError, match=f"is being written by process {writer.pid}: wait"):
            RunDirectory.open(tmp_path, write=True)
        with pytest.raises(ValueError, match="is being written"):
            RunDirectory.create(tmp_path)
    finally:
        kill(writer)
    RunDirectory.open(tmp_path, write=True).close()


FORKER = """
import os, sys, torch
from bbvi_conv.run_directory import RunDirectory
for folder in sys.stdin:
    child = os.fork()
    if child == 0:
        with RunDirectory.create(folder.strip()) as run:
            count = 0
            while True:
                run.save_checkpoint({"x": torch.full((20_000,), float(count))}, {"count": count, "pad": "y" * 10_000})
                count += 1
    print(child, flush=True)
    os.waitpid(child, 0)
"""


@pytest.fixture
def heard() -> Iterator[Callable[..., Any]]:
    """What hears Ctrl-C, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("interrupted", ["close", "fsync", "rename", "rmdir"])
def test_ctrl_c_is_heard_when_the_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: Callable[..., Any], interrupted: str
) -> None:
    """Each call of the kind is followed by a Ctrl-C, as one that comes while it runs is."""
    call = getattr(os, interrupted)

    def interrupt(*arguments: object, **options: object) -> None:
        call(*arguments, **options)
        signal.raise_signal(signal.SIGINT)

    with RunDirectory.create(tmp_path) as run:
        for count in range(2):
            run.save_checkpoint(TENSORS, {"count": count})
        with monkeypatch.context() as patch:
            patch.setattr(os, interrupted, interrupt)
            with pytest.raises(KeyboardInterrupt):
                run.save_checkpoint(TENSORS, {"count": 2})
        assert signal.getsignal(signal.SIGINT) is heard
        assert run.load_checkpoint()[1] == {"count": 2}
    assert len(list((tmp_path / "checkpoint").iterdir())) == 2


def test_an_error_while_a_checkpoint_is_written_is_told_though_ctrl_c_was_hit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: Callable[..., Any]
) -> None:
    def full(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunDirectory.create(tmp_path) as run, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            run.save_checkpoint(TENSORS, META)
    assert signal.getsignal(signal.SIGINT) is heard


def test_checkpoints_are_written_in_other_threads_too(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path) as run, ThreadPoolExecutor(1) as pool:
        pool.submit(run.save_checkpoint, TENSORS, META).result()
        assert repr(run.load_checkpoint()[1]) == repr(META)


def test_a_kill_at_any_instant_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Eighty processes in a tight loop of checkpoints, each killed at a random moment of it."""
    moments, caught = random.Random(0), 0
    command = [sys.executable, "-c", FORKER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        for index in range(80):
            path = tmp_path / str(index)
            print(path, file=parent.stdin, flush=True)
            child = int(parent.stdout.readline())
            try:
                wait_for(lambda path=path: list(path.glob("checkpoint/*[0-9]")))
                time.sleep(moments.uniform(0, 0.05))
            finally:
                os.kill(child, signal.SIGKILL)
            wait_for(lambda path=path: is_free(path))
            left = [entry.name for entry in (path / "checkpoint").iterdir()]
            caught += any(name.endswith(".tmp") for name in left)
            with RunDirectory.open(path, write=True) as run:
                tensors, meta = run.load_checkpoint()
                assert meta["count"] == max(int(name) for name in left if name.isdigit()) - 1  # no fall-back
                assert torch.equal(tensors["x"], torch.full((20_000,), float(meta["count"])))
                run.save_checkpoint(tensors, meta)  # what was left half-written is swept away
            assert not list(path.glob("checkpoint/*.tmp"))
    assert caught >= 10  # power: many of the kills did fall inside a write


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def is_free(path: Path) -> bool:
    """Whether the kernel has freed the dead writer's lock."""
    try:
        RunDirectory.open(path, write=True).close()
    except ValueError:
        return False
    return True
