"""The cache of builds: complete folders only, one builder at a time, nothing left of a failure."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import ImageError
from orchestrator.host.run import run
from orchestrator.images.cache import build_cached, cache_folder, hash_inputs
from orchestrator.images.logged import run_logged


def nothing(_: str) -> None:
    pass


def fill(text: str = "built") -> object:
    def build(folder: Path) -> None:
        (folder / "file").write_text(text)

    return build


def names(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_folder_is_built_once(tmp_path: Path) -> None:
    calls: list[Path] = []

    def build(folder: Path) -> None:
        calls.append(folder)
        (folder / "file").write_text("built")

    first = build_cached(tmp_path / "cache", "thing", "a" * 12, build, progress=nothing)
    second = build_cached(tmp_path / "cache", "thing", "a" * 12, build, progress=nothing)
    assert first == second == tmp_path / "cache" / f"thing-{'a' * 12}"
    assert (first / "file").read_text() == "built"
    assert len(calls) == 1
    assert calls[0] != first


def test_renewed_folder_replaces_the_old_one(tmp_path: Path) -> None:
    for number in range(3):
        folder = build_cached(tmp_path, "thing", "a" * 12, fill(str(number)), progress=nothing, renew=True)  # type: ignore[arg-type]
        assert (folder / "file").read_text() == str(number)
        assert names(tmp_path) == [folder.name]
    assert build_cached(tmp_path, "thing", "a" * 12, fill("4"), progress=nothing) == folder  # type: ignore[arg-type]
    assert (folder / "file").read_text() == "2"


def test_failed_renewal_keeps_the_old_folder(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise ImageError("no")

    folder = build_cached(tmp_path, "thing", "a" * 12, fill("old"), progress=nothing)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="^no$"):
        build_cached(tmp_path, "thing", "a" * 12, fail, progress=nothing, renew=True)
    assert (folder / "file").read_text() == "old"
    assert names(tmp_path) == [folder.name]


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise ImageError("no")

    with pytest.raises(ImageError, match="^no$"):
        build_cached(tmp_path, "thing", "a" * 12, build, progress=nothing)
    assert names(tmp_path) == []


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cached(tmp_path, "thing", "a" * 12, build, progress=nothing)
    assert names(tmp_path) == []


BUILDER = """
import sys, time
from pathlib import Path
from orchestrator.images.cache import build_cached
def build(folder):
    (folder / "half").write_text("x")
    print("building", flush=True)
    time.sleep(60)
build_cached(Path(sys.argv[1]), "thing", "b" * 12, build, progress=print)
"""


@pytest.fixture
def builder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, in the middle of a build in tmp_path."""
    with subprocess.Popen([sys.executable, "-c", BUILDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "building\n"
        yield process
        process.kill()


def test_next_build_removes_leftovers_of_a_crash(tmp_path: Path, builder: subprocess.Popen[str]) -> None:
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    assert [name for name in names(tmp_path) if name.startswith(".thing-tmp-")]
    build_cached(tmp_path, "thing", "a" * 12, fill(), progress=nothing)  # type: ignore[arg-type]
    assert names(tmp_path) == [f"thing-{'a' * 12}"]


def test_second_builder_waits_and_reports_it(tmp_path: Path, builder: subprocess.Popen[str]) -> None:
    notes: list[str] = []
    thread = threading.Thread(target=lambda: build_cached(tmp_path, "thing", "a" * 12, fill(), progress=notes.append))  # type: ignore[arg-type]
    thread.start()
    deadline = time.monotonic() + 10
    while not notes and time.monotonic() < deadline:
        time.sleep(0.02)
    assert notes == ["waiting for another build (thing.lock)"]
    assert not (tmp_path / f"thing-{'a' * 12}").exists()
    builder.kill()
    thread.join(10)
    assert (tmp_path / f"thing-{'a' * 12}" / "file").exists()


def test_existing_folder_needs_no_lock(tmp_path: Path, builder: subprocess.Popen[str]) -> None:
    """Otherwise each lab would wait for the build of another checkout."""
    (tmp_path / f"thing-{'a' * 12}").mkdir()
    notes: list[str] = []
    found = build_cached(tmp_path, "thing", "a" * 12, fill(), progress=notes.append)  # type: ignore[arg-type]
    assert (found.name, notes) == (f"thing-{'a' * 12}", [])
    assert builder.poll() is None


def test_newest_two_folders_stay(tmp_path: Path) -> None:
    for number, letter in enumerate("abc"):
        folder = build_cached(tmp_path, "thing", letter * 12, fill(), progress=nothing)  # type: ignore[arg-type]
        os.utime(folder, (number, number))
    build_cached(tmp_path, "thing-two", "e" * 12, fill(), progress=nothing)  # type: ignore[arg-type]
    build_cached(tmp_path, "thing", "d" * 12, fill(), progress=nothing)  # type: ignore[arg-type]
    assert names(tmp_path) == [f"thing-{'c' * 12}", f"thing-{'d' * 12}", f"thing-two-{'e' * 12}"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    if os.geteuid():
        pytest.skip("mounting needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", disk])
    yield disk
    run(["umount", disk])


def test_full_disk_is_one_clear_error(small_disk: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "big").write_bytes(bytes(2 << 20))

    with pytest.raises(ImageError, match="cannot build thing in .*: the disk is full") as error:
        build_cached(small_disk / "cache", "thing", "a" * 12, build, progress=nothing)
    assert "NOHYPE_CACHE" in error.value.hint
    assert names(small_disk / "cache") == []


def test_full_disk_in_a_program_is_the_same_error(small_disk: Path) -> None:
    def build(folder: Path) -> None:
        run(["dd", "if=/dev/zero", f"of={folder}/big", "bs=1M", "count=2"], env={"LC_ALL": "C"})

    with pytest.raises(ImageError, match="cannot build thing in .*: the disk is full"):
        build_cached(small_disk / "cache", "thing", "a" * 12, build, progress=nothing)
    assert names(small_disk / "cache") == []


def test_cache_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match="cannot use the cache folder") as error:
        build_cached(tmp_path / "file" / "cache", "thing", "a" * 12, fill(), progress=nothing)  # type: ignore[arg-type]
    assert "NOHYPE_CACHE" in error.value.hint


def test_hash_covers_names_contents_and_mode_not_times(tmp_path: Path) -> None:
    file = tmp_path / "tree" / "file"
    file.parent.mkdir()
    file.write_text("one")
    first = hash_inputs(tmp_path / "tree")
    os.utime(file, (1, 1))
    (tmp_path / "tree/__pycache__").mkdir()
    (tmp_path / "tree/__pycache__/x.pyc").touch()
    assert hash_inputs(tmp_path / "tree") == first
    seen = {first}
    for change in (lambda: file.write_text("two"), lambda: file.chmod(0o755), lambda: file.rename(file.with_name("other"))):
        change()
        seen.add(hash_inputs(tmp_path / "tree"))
    assert len(seen) == 4


def test_hash_distinguishes_parts() -> None:
    assert len({hash_inputs("ab", "c"), hash_inputs("a", "bc"), hash_inputs(["a", "bc"]), hash_inputs("abc")}) == 4


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/one")
    monkeypatch.delenv("NOHYPE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/one/.cache/nohype")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/nohype")
    monkeypatch.setenv("NOHYPE_CACHE", "/own")
    assert cache_folder() == Path("/own")


def test_failed_program_shows_its_last_output(tmp_path: Path) -> None:
    log = tmp_path / "log" / "one.log"
    lines = "; ".join(f"echo line {number}" for number in range(20))
    with pytest.raises(ImageError) as error:
        run_logged(["sh", "-c", f"{lines}; exit 3"], task="cannot make it", program="thing", log=log, timeout=10)
    first, *rest = error.value.message.splitlines()
    assert first == "cannot make it: thing exited with status 3:"
    assert rest == [f"    line {number}" for number in range(8, 20)]
    assert str(log) in error.value.hint
    run_logged(["sh", "-c", "echo again"], task="cannot make it", program="thing", log=log, timeout=10)
    assert log.read_text() == "again\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="a filter of syscalls needs CAP_SYS_ADMIN")
@pytest.mark.parametrize("call", ["fsync", "fdatasync"])
def test_program_of_a_build_does_not_wait_for_the_disk(tmp_path: Path, call: str) -> None:
    """The kernel refuses the sync of a descriptor that is not open, unless a filter answers first. In a child, as dpkg's is."""
    program = f"import os; print(os.{call}(999))"
    words = ["sh", "-c", f"{shlex.quote(sys.executable)} -c '{program}'; :"]
    assert "Bad file descriptor" in run(words).stderr
    run_logged(words, task="cannot make it", program="thing", log=tmp_path / "log", timeout=60)
    assert (tmp_path / "log").read_text() == "None\n"


def test_missing_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="^cannot make it: `no-such-program` is not installed"):
        run_logged(["no-such-program"], task="cannot make it", program="thing", log=tmp_path / "log", timeout=10)
