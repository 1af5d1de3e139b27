"""Programs on which engines are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bbvi_conv.engine.native import blocks, routines, tiles
from bbvi_conv.families import FullRank, MeanField
from bbvi_conv.objectives import ELBO
from bbvi_conv.program import Program
from bbvi_conv.program.build import build

SMALL = [
    ("eight_schools", "model", MeanField(), ELBO()),
    ("eight_schools", "centered", FullRank(), ELBO(2, "sticking-the-landing")),
    ("challenger", "model", FullRank(), ELBO(3)),
    ("conjugate_gaussian", "model", MeanField(), ELBO(1, "sticking-the-landing")),
]


@pytest.fixture(params=SMALL, ids=[f"{file}-{name}" for file, name, *_ in SMALL])
def small(shipped, request: pytest.FixtureRequest) -> tuple[Program, ELBO]:
    """A shipped model with a family, and an objective."""
    file, name, family, objective = request.param
    module = shipped(file)
    return build(getattr(module, name), None, module.data(), family=family), objective


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Torch has two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """A cache of the test's own, and the text of the one library compiled there."""
    monkeypatch.setenv("BBVI_CONV_CACHE", str(tmp_path / "cache"))

    def text() -> str:
        (source,) = (tmp_path / "cache").glob("*/step.cpp")
        return source.read_text(encoding="utf-8")

    return text


@pytest.fixture
def let_make(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let tiles, blocks, routines or torch, by name, make all products they can, whoever is quickest here."""
    have = {"tiles": tiles.faster, "blocks": blocks.available, "routines": routines.available}
    need = {"tiles": "tiles of bfloat16 (AMX)", "blocks": "AVX-512, and torch's oneDNN", "routines": "MKL"}

    def let(maker: str) -> None:
        if maker != "torch" and not have[maker]():
            pytest.skip(f"needs {need[maker]}")
        monkeypatch.setattr(tiles, "faster", lambda: maker == "tiles")
        monkeypatch.setattr(tiles, "LARGE", 0)
        monkeypatch.setattr(tiles, "LEAST", 1)
        monkeypatch.setattr(blocks, "faster", lambda: maker == "blocks")
        if maker == "torch":
            monkeypatch.setattr(routines, "available", lambda: False)

    return let
