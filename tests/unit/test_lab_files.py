"""Tar files to and from a lab host: what is packed, and that nothing is written outside of the folder."""

from __future__ import annotations

import io
import os
import socket
import stat
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import LabError
from orchestrator.lab import files
from orchestrator.lab.files import packed, unpack
from orchestrator.values import Size


def build(*entries: tuple[str, bytes, str]) -> io.BytesIO:
    """Entries of name, type and content; the content of a link is its target."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, text in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode, entry.mtime = kind, 0o4755, 1_700_000_000
            if kind == tarfile.REGTYPE:
                entry.size = len(text)
            else:
                entry.linkname = text
            tar.addfile(entry, io.BytesIO(text.encode()) if kind == tarfile.REGTYPE else None)
    output.seek(0)
    return output


def test_folder_arrives_as_it_is(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    (source / "a" / "b").mkdir(parents=True)
    (source / "a" / "b" / "program").write_bytes(b"\0" * 100_000)
    (source / "a" / "b" / "program").chmod(0o750)
    os.utime(source / "a" / "b" / "program", (1_700_000_000.25, 1_700_000_000.25))
    (source / "link").symlink_to("a/b/program")
    os.link(source / "a" / "b" / "program", source / "same")
    strange = source / os.fsdecode(b"new\nline \xff")
    strange.write_text("x")
    (source / "empty").mkdir()
    os.mkfifo(source / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(source / "socket"))
        with packed(source) as archive, tarfile.open(fileobj=archive) as tar:
            found = {entry.name: entry for entry in tar}
    assert found.keys() == {"a", "a/b", "a/b/program", "link", "same", strange.name, "empty"}
    assert {(entry.uid, entry.uname) for entry in found.values()} == {(0, "root")}
    (source / "same").unlink()  # a second name of a file is a hard link in the archive, which a lab never sends
    with packed(source) as archive:
        assert unpack(archive, target) == 3
    program = target / "a" / "b" / "program"
    assert (program.read_bytes(), stat.S_IMODE(program.stat().st_mode)) == (b"\0" * 100_000, 0o750)
    assert program.stat().st_mtime == 1_700_000_000.25
    assert os.readlink(target / "link") == "a/b/program"
    assert (target / strange.name).read_text() == "x"
    assert (target / "empty").is_dir()


def test_folder_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SEND_LIMIT", Size(1 << 20))
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x" * (600 << 10))
    with pytest.raises(LabError, match="larger than 1M"), packed(tmp_path):
        pass


def test_sparse_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 1 << 42)
    with pytest.raises(LabError, match="larger than 1G"), packed(tmp_path):
        pass


def test_one_folder_is_left_out(tmp_path: Path) -> None:
    for name in ("source/a/cache/b/file", "source/cache/file", "source/a/file"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "link").symlink_to("source/a/cache")
    for without in (tmp_path / "link", tmp_path / "source/cache/../a/cache"):
        with packed(tmp_path / "source", without=without) as archive, tarfile.open(fileobj=archive) as tar:
            assert tar.getnames() == ["a", "a/file", "cache", "cache/file"]
    for without in (tmp_path / "none", tmp_path / "source", tmp_path):
        with packed(tmp_path / "source", without=without) as archive, tarfile.open(fileobj=archive) as tar:
            assert len(tar.getnames()) == 7


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    with pytest.raises(LabError, match=f"cannot copy {tmp_path}/no: No such file"), packed(tmp_path / "no"):
        pass


def test_files_replace_those_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "was-file").write_text("old")
    (tmp_path / "link").symlink_to("/etc/hostname")
    archive = build(
        ("./file", tarfile.REGTYPE, "new"), ("link", tarfile.REGTYPE, "new"), ("was-file", tarfile.DIRTYPE, ""),
        ("was-file/inner", tarfile.REGTYPE, "new"), ("without/its/folder", tarfile.REGTYPE, "new"), (".", tarfile.DIRTYPE, ""),
    )  # fmt: skip
    assert unpack(archive, tmp_path) == 4
    for name in ("file", "link", "was-file/inner", "without/its/folder"):
        assert ((tmp_path / name).read_text(), (tmp_path / name).is_symlink()) == ("new", False)
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o755, "setuid"


@pytest.mark.skipif(os.geteuid() != 0, reason="changes owners")
def test_files_belong_to_the_owner_of_the_folder(tmp_path: Path) -> None:
    os.chown(tmp_path, 1234, 2345)
    archive = build(("d", tarfile.DIRTYPE, ""), ("d/file", tarfile.REGTYPE, "x"), ("link", tarfile.SYMTYPE, "d"))
    unpack(archive, tmp_path / "new" / "folder")
    for name in ("", "new", "new/folder", "new/folder/d", "new/folder/d/file", "new/folder/link"):
        found = (tmp_path / name).lstat()
        assert (found.st_uid, found.st_gid) == (1234, 2345)


@pytest.mark.parametrize(
    "entries",
    [
        [("../outside/file", tarfile.REGTYPE, "x")],
        [("a/../../outside/file", tarfile.REGTYPE, "x")],
        [("/OUTSIDE/file", tarfile.REGTYPE, "x")],
        [("link/file", tarfile.REGTYPE, "x")],
        [("fresh", tarfile.SYMTYPE, "OUTSIDE"), ("fresh/file", tarfile.REGTYPE, "x")],
        [("fresh", tarfile.SYMTYPE, "OUTSIDE/file"), ("hard", tarfile.LNKTYPE, "fresh")],
        [("hard", tarfile.LNKTYPE, "OUTSIDE/kept")],
        [("node", tarfile.CHRTYPE, "")],
        [("pipe", tarfile.FIFOTYPE, "")],
        [("full", tarfile.REGTYPE, "x")],
    ],
)
def test_entry_that_leads_outside_is_refused(tmp_path: Path, entries: list[tuple[str, bytes, str]]) -> None:
    target, outside = tmp_path / "target", tmp_path / "outside"
    (target / "full" / "inner").mkdir(parents=True)
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (target / "link").symlink_to(outside)
    named = [(name.replace("OUTSIDE", str(outside)), kind, text.replace("OUTSIDE", str(outside))) for name, kind, text in entries]
    with pytest.raises(LabError, match="cannot write 1 file of the lab"):
        unpack(build(*named, ("good", tarfile.REGTYPE, "x")), target)
    assert [path.name for path in outside.iterdir()] == ["kept"]
    assert (outside / "kept").read_text() == "kept"
    assert (target / "good").read_text() == "x", "the entries after it are written"
    assert not list(target.rglob("*.part"))


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:700], lambda data: b"x" * 4096, lambda data: b"\xff" * 100 + data[100:]],
    ids=["cut", "no", "bits"],
)
def test_damaged_archive_is_one_error(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    data = build(("file", tarfile.REGTYPE, "x" * 5000)).getvalue()
    with pytest.raises(LabError, match="invalid tar file"):
        unpack(io.BytesIO(damage(data)), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("headers", "name"),
    [({"mtime": "nan"}, "bad"), ({"mtime": "1e300"}, "bad"), ({"mtime": "-1e300"}, "bad"), ({"path": "a\0b"}, "bad")],
)
def test_odd_entry_does_not_lose_the_others(tmp_path: Path, headers: dict[str, str], name: str) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for found in ("first", name, "last"):
            entry = tarfile.TarInfo(found)
            entry.pax_headers = headers if found == name else {}
            tar.addfile(entry)
    archive.seek(0)
    with pytest.raises(LabError, match="cannot write 1 file of the lab"):
        unpack(archive, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "last"]


def add_header(archive: io.BytesIO, kind: bytes, text: bytes) -> None:
    header = tarfile.TarInfo("header")
    header.type, header.size = kind, len(text)
    archive.write(header.tobuf(tarfile.USTAR_FORMAT) + text + b"\0" * (-len(text) % tarfile.BLOCKSIZE))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
@pytest.mark.parametrize(("count", "size"), [(1, 20 << 20), (5000, 100)], ids=["large", "many"])
def test_headers_take_little_memory(tmp_path: Path, kind: bytes, count: int, size: int) -> None:
    archive = io.BytesIO()
    start = f"{size} comment="
    for _ in range(count):
        add_header(archive, kind, f"{start}{'x' * (size - len(start) - 1)}\n".encode())
    archive.write(build(("file", tarfile.REGTYPE, "x")).getvalue())
    archive.seek(0)
    tracemalloc.start()
    try:
        with pytest.raises(LabError, match="invalid tar file"):
            unpack(archive, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_many_entries_take_little_memory(tmp_path: Path) -> None:
    """Also entries that cannot be written, and global headers."""
    archive = io.BytesIO()
    for number in range(3000):
        add_header(archive, tarfile.XGLTYPE, f"1024 {number:04}=".encode().ljust(1023, b"x") + b"\n")
        archive.write(tarfile.TarInfo(f"../{number}").tobuf(tarfile.USTAR_FORMAT))
    archive.write(bytes(2 * tarfile.BLOCKSIZE))
    archive.seek(0)
    tracemalloc.start()
    try:
        with pytest.raises(LabError, match="cannot write 3000 files") as failed:
            unpack(archive, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
    assert len(failed.value.message.splitlines()) == 6
