"""What `nohype lab run` copies back, whatever its command does with the files. The stand-in for QEMU runs it on this machine."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import LabError, LabLost
from orchestrator.lab import control
from orchestrator.lab.lab import keeping_connection
from orchestrator.lab.paths import LabDir
from orchestrator.lab.server import LabServer
from tests.service.test_lab_control import name, stand_in, start
from tests.service.test_lab_job import run

__all__ = ["name", "stand_in"]

pytestmark = [pytest.mark.netns, pytest.mark.timeout(120)]

StandIn = Callable[[str], None]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    work = tmp_path / "work"
    work.mkdir()
    (work / "kept").write_text("kept\n")
    return work


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("echo x > fresh; rm ../remote.before", "remote.before: No such file"),
        ("echo x > fresh; rm ../remote.before; mkdir ../remote.before", "remote.before: Is a directory"),
        ("printf 'z\\0a\\0' > ../remote.before", "not in sorted order"),
        ('rm -r "$PWD"', "remote does not exist there"),
        ('rm -r "$PWD"; touch ../remote', "remote does not exist there"),
    ],
)
def test_lost_list_of_files_is_an_error(
    name: str, tmp_path: Path, work: Path, stand_in: StandIn, command: str, message: str
) -> None:
    """And not a success that copies nothing."""
    status, _, err = run(name, tmp_path, "--copy", str(work), "--", command)
    assert (status, message in err) == (125, True), err
    assert "invalid tar file" not in err


def test_only_files_folders_and_links_come_back(name: str, tmp_path: Path, work: Path, stand_in: StandIn) -> None:
    command = (
        "mkfifo pipe; mknod node c 1 3; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"socket\")'; "
        "ln -s pipe link; echo x > file; mkdir folder; exit 4"
    )
    status, _, err = run(name, tmp_path, "--copy", str(work), "--", command)
    assert (status, "2 changed or new files" in err) == (4, True), err
    assert sorted(path.name for path in work.iterdir()) == ["file", "folder", "kept", "link"]


def test_other_file_systems_stay(name: str, tmp_path: Path, work: Path, stand_in: StandIn) -> None:
    """Those of the command end with the stand-in: it has a mount namespace of its own."""
    command = "mkdir mounted; mount -t tmpfs -o size=1M none mounted; echo x > mounted/file; echo y > file"
    status, _, err = run(name, tmp_path, "--copy", str(work), "--", command)
    assert (status, "1 changed or new files" in err) == (0, True), err
    assert not (work / "mounted" / "file").exists()


def test_cache_of_images_is_not_copied(
    name: str, tmp_path: Path, work: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = work / ".cache" / "nohype"
    cache.mkdir(parents=True)
    (cache / "image").touch()
    os.truncate(cache / "image", 2 << 30)  # more than a lab takes
    monkeypatch.setenv("NOHYPE_CACHE", str(cache))
    status, out, err = run(name, tmp_path, "--copy", str(work), "--", "find . -type f")
    assert (status, out) == (0, "./kept\n"), err
    assert f"{cache} is not copied" in err


def test_new_folders_have_the_owner_of_the_directory(name: str, tmp_path: Path, work: Path, stand_in: StandIn) -> None:
    """Also if what is in them is listed first: by size, mode or time."""
    os.chown(work, 1234, 2345)
    command = "mkdir -p -m 0700 b/a; mkdir -m 0750 b/private; touch b/a/file; touch -d @0 b/a b/private; chmod 0711 b"
    status, _, err = run(name, tmp_path, "--copy", str(work), "--", command)
    assert status == 0, err
    found = {str(path.relative_to(work)): path.stat() for path in work.rglob("*") if path.name != "kept"}
    assert {(stat.st_uid, stat.st_gid) for stat in found.values()} == {(1234, 2345)}
    assert {key: stat.st_mode & 0o777 for key, stat in found.items() if key != "b/a/file"} == {
        "b": 0o711, "b/a": 0o700, "b/private": 0o750,
    }  # fmt: skip


def test_fetch_refuses_what_is_no_file(name: str, tmp_path: Path, stand_in: StandIn) -> None:
    server = LabServer(start(name, tmp_path))
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "folder").mkdir(parents=True)
    (source / "folder" / "file").write_text("x")
    os.mkfifo(source / "folder" / "pipe")
    for path, message in [("folder/pipe", "neither a file"), ("none", "neither a file"), ("none/none", "none does not exist")]:
        with pytest.raises(LabError, match=message):
            server.fetch(str(source / path), target)
    server.fetch(str(source / "folder"), target)
    assert [path.name for path in (target / "folder").iterdir()] == ["file"]


def test_file_that_cannot_be_written_is_named(name: str, tmp_path: Path, stand_in: StandIn) -> None:
    server = LabServer(start(name, tmp_path))
    source = tmp_path / "source"
    source.write_text("x")
    source.chmod(0o640)
    server.copy(source, str(tmp_path / "a b"))
    assert ((tmp_path / "a b").read_text(), (tmp_path / "a b").stat().st_mode & 0o777) == ("x", 0o640)
    (tmp_path / "folder").mkdir()
    for target, reason in [("none/file", "No such file"), ("folder", "cannot overwrite directory")]:
        with pytest.raises(LabError, match=f"cannot write {tmp_path / target} in lab {name}: .*{reason}") as failed:
            server.copy(source, str(tmp_path / target))
        assert not isinstance(failed.value, LabLost)


def test_lab_that_is_lost_during_a_copy_is_lost(name: str, tmp_path: Path, stand_in: StandIn) -> None:
    """Also with a connection that is kept, which a copy uses first."""
    (tmp_path / "source").write_text("x")
    with keeping_connection(start(name, tmp_path)) as lab:
        server = LabServer(lab)
        server.run("true")
        os.kill(lab.state.qemu, signal.SIGKILL)
        with pytest.raises(LabLost):
            server.copy(tmp_path / "source", str(tmp_path / "target"))


def test_dead_lab_that_cannot_be_removed_does_not_stop_a_job(tmp_path: Path, stand_in: StandIn) -> None:
    first, second = (LabDir(f"run-{os.getpid():07x}{end}") for end in "ab")
    first.lock.mkdir(parents=True)
    second.path.mkdir()
    notes: list[str] = []
    try:
        control.remove_dead(re.compile(f"{first.name}|{second.name}"), notes.append)
        assert not second.path.exists()
    finally:
        first.lock.rmdir()
    assert [first.name in note for note in notes] == [True], notes
