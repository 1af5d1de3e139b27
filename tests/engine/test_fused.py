"""Where torch's compiler keeps what it makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from bbvi_conv.engine.fused import fused
from bbvi_conv.program.aten_graph import to_graph


@pytest.mark.parametrize("named", ["nobody", "the compiler", "the user"])
def test_code_is_kept_in_a_folder_of_the_users_alone(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler names its own folder, which others may write to, in the environment: that is no user's choice."""
    own, users = tmp_path / "own", tmp_path / "users"
    monkeypatch.setenv("BBVI_CONV_CACHE", str(own))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    if named != "nobody":
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(users) if named == "the user" else default_cache_dir())
    x = torch.randn(5)
    run = fused(to_graph(lambda x: torch.sin(x) + len(named), x))
    torch.testing.assert_close(run(x), torch.sin(x) + len(named))
    assert any(users.rglob("*.py")) == (named == "the user")
    assert any((own / "inductor").rglob("*.py")) == (named != "the user")
