"""The image store under several programs, kills and a full disk, and claims while builds are removed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lxml import etree

from orchestrator.errors import ImageError
from orchestrator.images.install import collect, install_image
from orchestrator.images.store import find_build, find_image, image_names
from orchestrator.images.store_lock import keeping_builds, removing_builds
from orchestrator.images.verify import verify
from orchestrator.ledger.database import FSYNC
from orchestrator.ledger.loading import read_claims
from orchestrator.model.access import OPERATOR
from orchestrator.model.plan import ImageRef
from orchestrator.model.request import GuestRequest
from tests.fakes.server import IMAGE
from tests.harness import full_store
from tests.harness.crash import World
from tests.harness.images import list_store, make_build

ROOT = Path(__file__).parents[2]

# Installs a build, and kills itself at the given fsync: one is between any two steps.
KILLED = """
import os, signal, sys
from pathlib import Path
from orchestrator.images.install import install_image
built, store, name, left = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
sync = os.fsync
def count(descriptor):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)
os.fsync = count
install_image(built, store, name)
"""
# Changes the store until it is killed.
BUSY = """
import itertools, sys
from pathlib import Path
from orchestrator.images.install import collect, install_image
folder, store, first = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
for number in itertools.count(first):
    install_image(folder / f"built{number % 3}", store, "one")
    collect(store, lambda: ())
    print(number, flush=True)
"""


def run(script: str, *words: object) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def check_store(store: Path) -> None:
    """Every name is a complete build."""
    for name in image_names(store):
        assert not [result for result in verify(find_image(store, name)) if result.problem]


@pytest.mark.parametrize("before", ["nothing", "build", "old folder"])
def test_killed_installation_leaves_the_old_or_the_new_image(tmp_path: Path, before: str) -> None:
    built, seen = make_build(tmp_path / "built", "new", disk=b"disk"), set()
    for point in range(1, 30):
        store = tmp_path / f"store{point}"
        if before == "build":
            install_image(make_build(tmp_path / f"old{point}", "old"), store, "one")
        elif before == "old folder":
            make_build(store / "one", "old")
        with run(KILLED, built, store, "one", point) as child:
            status = child.wait()
        assert status in (0, -signal.SIGKILL)
        # in the middle of the replacement of an old folder, the name is missing until the next change completes it
        found = list_store(store).get("one", "nothing")
        assert found in {"nothing": ("nothing", "new"), "build": ("old", "new"), "old folder": ("old", "new", "nothing")}[before]
        seen.add(found)
        if before == "old folder":
            assert find_build(store, ImageRef("one", "abc")).kernel.read_text() == "old"
        collect(store, lambda: ())
        assert set(os.listdir(store)) <= {".builds", ".lock", "one"}, "a leftover"
        found = list_store(store).get("one", "nothing")
        assert found in ("nothing", "new") if before == "nothing" else found in ("old", "new")
        if found == "new" or before == "build":
            check_store(store)
        if not status:
            assert found == "new"
            break
    else:
        pytest.fail("no installation was completed")
    assert len(seen) > 1, "killed at several points"


def test_programs_that_change_a_store_at_the_same_time_leave_it_whole(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for number in range(3):
        make_build(tmp_path / f"built{number}", f"kernel{number}", disk=bytes([number]) * 10_000)
    install_image(tmp_path / "built0", store, "one")
    children = [run(BUSY, tmp_path, store, first) for first in (0, 1)]
    try:
        for child in children:
            assert child.stdout
            for _ in range(5):
                assert child.stdout.readline()
                with keeping_builds(store):
                    check_store(store)
    finally:
        for child in children:
            child.kill()
            child.wait()
            assert child.stdout
            child.stdout.close()
    install_image(tmp_path / "built0", store, "one")
    collect(store, lambda: ())
    assert list_store(store) == {"one": "kernel0", ".builds": "1"}


@contextmanager
def repeating(work: list[Callable[[], object]]) -> Iterator[list[BaseException]]:
    """Runs the functions, each in a thread of its own, again and again."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def repeat(one: Callable[[], object]) -> None:
        try:
            while not stop.is_set():
                one()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    try:
        yield errors
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_claimed_build_is_never_removed(tmp_path: Path) -> None:
    """Guests are created and deleted while the image is built anew and unused builds are removed."""
    world = World(tmp_path / "world")
    store = world.folder / "images"
    for number in range(3):
        make_build(tmp_path / f"built{number}", f"kernel{number}")
    install_image(tmp_path / "built0", store, IMAGE)
    manager, ledger = world.open_manager()
    manager.reconciler.recover()
    ledger_file = world.folder / "ledger.sqlite"
    removed: list[str] = []

    def renew() -> None:
        install_image(tmp_path / f"built{random.randrange(3)}", store, IMAGE)

    def remove() -> None:
        removed.extend(collect(store, lambda: [(claim.plan.name, claim.plan.image) for claim in read_claims(ledger_file)]))

    with repeating([renew, remove]) as errors:
        for number in range(15):
            manager.create(OPERATOR, GuestRequest(name=f"g{number}", memory="128M", image=IMAGE))
            for claim in ledger.read().claims:
                find_build(store, claim.plan.image)
            if number >= 2:
                manager.delete(OPERATOR, f"g{number - 2}")
    manager.close()
    ledger.close()
    assert not errors
    assert removed, "builds were removed meanwhile"


def test_no_build_is_removed_between_its_look_up_and_the_claim(tmp_path: Path) -> None:
    world, seen = World(tmp_path / "world"), {}

    def is_locked() -> bool:
        try:
            with removing_builds(world.folder / "images", timeout=0):
                return False
        except ImageError:
            return True

    def trace(statement: str) -> None:
        if statement == FSYNC or statement.startswith("INSERT INTO guest"):
            seen.setdefault(statement.split("(")[0].strip(), is_locked())

    world.trace = trace
    manager, ledger = world.open_manager()
    manager.reconciler.recover()
    seen.clear()
    manager.create(OPERATOR, GuestRequest(name="web", memory="128M", image=IMAGE))
    assert seen
    assert all(seen.values()), seen
    assert any(statement.startswith("INSERT INTO guest") for statement in seen)
    assert not is_locked()
    manager.close()
    ledger.close()


def test_guest_starts_the_build_that_it_was_created_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path / "world")
    store, kernels = world.folder / "images", []
    start = world.hypervisor.create_paused
    monkeypatch.setattr(
        world.hypervisor, "create_paused", lambda xml: (kernels.append(etree.fromstring(xml).findtext("os/kernel")), start(xml))
    )
    manager, ledger = world.open_manager()
    manager.reconciler.recover()
    old = install_image(make_build(tmp_path / "old", "old"), store, IMAGE)
    manager.create(OPERATOR, GuestRequest(name="web", memory="128M", image=IMAGE))
    new = install_image(make_build(tmp_path / "new", "new"), store, IMAGE)
    assert "0" in collect(store, lambda: [(claim.plan.name, claim.plan.image) for claim in ledger.read().claims])
    manager.kill(OPERATOR, "web")
    manager.start(OPERATOR, "web")
    manager.create(OPERATOR, GuestRequest(name="db", memory="128M", image=IMAGE))
    assert kernels == [str(old.kernel), str(old.kernel), str(new.kernel)]
    for name in ("web", "db"):
        manager.delete(OPERATOR, name)
    assert collect(store, lambda: ()) == (old.hash,)
    manager.close()
    ledger.close()


def test_lock_of_another_process_is_reported_after_a_time_limit(tmp_path: Path) -> None:
    with removing_builds(tmp_path), pytest.raises(ImageError, match="is locked by another process") as caught:
        with keeping_builds(tmp_path, timeout=0.05):
            pass
    assert "lslocks" in caught.value.hint
    with keeping_builds(tmp_path), keeping_builds(tmp_path, timeout=0):
        pass
    with keeping_builds(tmp_path), pytest.raises(ImageError), removing_builds(tmp_path, timeout=0.05):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount needs root")
def test_full_and_read_only_store(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    # In a mount namespace: it is gone with the program, however that ends.
    script = 'mount -t tmpfs -o "size=$3" tmpfs "$2/disk" && exec "$1" -m tests.harness.full_store "$2"'
    argv = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        script,
        "sh",
        sys.executable,
        tmp_path,
        str(full_store.SIZE),
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
