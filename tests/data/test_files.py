"""Finding, checking and downloading data files, on small files made up here."""

from __future__ import annotations

import hashlib
import stat
import zipfile
from pathlib import Path

import pytest

from bbvi_conv.data._files import cache_folder, locate, read_single_member

CONTENT = b"twenty-three launches"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data folder, a cache and a source of downloads of our own, so that no test depends on the user's."""
    monkeypatch.setenv("BBVI_CONV_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "source").write_bytes(CONTENT)


def test_the_data_folder_comes_before_the_cache(tmp_path: Path) -> None:
    for folder, content in ((tmp_path / "data", CONTENT), (cache_folder(), b"older")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "file").write_bytes(content)
    assert locate("file", sha256=SHA256).read_bytes() == CONTENT
    (tmp_path / "data" / "file").unlink()
    assert locate("file").read_bytes() == b"older"


def test_a_download_is_cached_and_not_repeated(tmp_path: Path) -> None:
    url = (tmp_path / "source").as_uri()
    path = locate("set/file", url=url, sha256=SHA256)
    assert path == tmp_path / "cache" / "bbvi_conv" / "set" / "file"
    assert path.read_bytes() == CONTENT
    (tmp_path / "source").unlink()
    assert locate("set/file", url=url, sha256=SHA256) == path


def test_a_download_with_another_checksum_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not the expected file"):
        locate("file", url=(tmp_path / "source").as_uri(), sha256="0" * 64)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_local_file_with_another_checksum_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data" / "file").write_bytes(CONTENT + b"!")
    with pytest.raises(ValueError, match=f"expected {SHA256}; remove the file"):
        locate("file", url=(tmp_path / "source").as_uri(), sha256=SHA256)


def test_a_file_that_is_nowhere_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"not under BBVI_CONV_DATA=.*set BBVI_CONV_DATA to a folder that holds"
    ):
        locate("set/file")
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        locate("set/file", url=(tmp_path / "missing").as_uri(), sha256=SHA256)
    monkeypatch.delenv("BBVI_CONV_DATA")
    with pytest.raises(FileNotFoundError, match="BBVI_CONV_DATA is not set"):
        locate("set/file")


@pytest.mark.parametrize("relative", ["../file", "/etc/passwd", "a/../../file", "..\\file", "C:\\file", ""])
def test_a_path_cannot_leave_the_data_folder(tmp_path: Path, relative: str) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    with pytest.raises(ValueError, match="does not stay below the data folder"):
        locate(relative)


def test_a_download_needs_a_checksum(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a sha256"):
        locate("file", url=(tmp_path / "source").as_uri())


def archive(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in names:
            file.writestr(name, CONTENT * 100)
    return path


def test_the_only_member_is_read(tmp_path: Path) -> None:
    assert read_single_member(archive(tmp_path / "a.zip", "folder/", "folder/a.json")) == CONTENT * 100


@pytest.mark.parametrize("name", ["../a.json", "/a.json", "folder/../../a.json", "..\\a.json"])
def test_a_member_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="unsafe member"):
        read_single_member(archive(tmp_path / "a.zip", name))


def test_a_linked_member_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("a.json")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(link, "/etc/passwd")
    with pytest.raises(ValueError, match="unsafe member"):
        read_single_member(tmp_path / "a.zip")


def test_an_unsound_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds 2 files, expected one"):
        read_single_member(archive(tmp_path / "a.zip", "a.json", "b.json"))
    with pytest.raises(ValueError, match="holds 0 files"):
        read_single_member(archive(tmp_path / "b.zip"))
    with pytest.raises(ValueError, match="more than 100 bytes"):
        read_single_member(archive(tmp_path / "c.zip", "a.json"), limit=100)
    whole = archive(tmp_path / "d.zip", "a.json").read_bytes()
    (tmp_path / "d.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a sound zip archive"):
        read_single_member(tmp_path / "d.zip")
    broken = bytearray(whole)
    broken[40:50] = bytes(10)  # inside the compressed data: the directory at the end is whole
    (tmp_path / "d.zip").write_bytes(broken)
    with pytest.raises(ValueError, match="not a sound zip archive"):
        read_single_member(tmp_path / "d.zip")
