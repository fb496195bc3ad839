"""Guests that boot files from HTTP servers."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from errno import EROFS
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import Conflict, Forbidden, ImageError, NotFound, OrchestratorError, RequestError
from orchestrator.guests import boot_images
from orchestrator.guests.service import GuestService
from orchestrator.images.store import find_image, image_names
from orchestrator.ledger import Ledger
from orchestrator.model.access import OPERATOR, Identity, Role
from orchestrator.model.plan import BootPolicy
from orchestrator.model.request import GuestRequest, parse_guest_request
from tests.fakes.server import Server
from tests.harness.crash import World

SERVER = Server(cores=8, nodes=1, vfs=3, pages=600)
KERNEL, INITRD = b"kernel" * 1000, b"initrd" * 5000


class BootServer:
    """An HTTP server on loopback with two files; ``asked`` are the paths that were requested."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "vmlinuz").write_bytes(KERNEL)
        (folder / "initrd").write_bytes(INITRD)
        self.asked: list[str] = []
        asked = self.asked

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, _format: str, *_: Any) -> None:
                asked.append(self.path)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def boot(self, **changed: str) -> dict[str, str]:
        sums = {name: hashlib.sha256(content).hexdigest() for name, content in (("kernel", KERNEL), ("initrd", INITRD))}
        fields = {"kernel": f"{self.url}vmlinuz", "initrd": f"{self.url}initrd"}
        return {**fields, **{f"{name}_sha256": digest for name, digest in sums.items()}, **changed}


@pytest.fixture
def files(tmp_path: Path) -> Iterator[BootServer]:
    server = BootServer(tmp_path / "www")
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, SERVER)


def open_manager(world: World, files: BootServer, max_size: int = 1 << 20) -> tuple[GuestService, Ledger]:
    return world.open_manager(replace(SERVER.policy, boot=BootPolicy((files.url,), max_size, 60)))


def request(boot: dict[str, str], name: str = "net", **fields: object) -> GuestRequest:
    return parse_guest_request({"name": name, "memory": "128M", "boot": boot, **fields})


def test_guest_boots_downloaded_files_once(world: World, files: BootServer) -> None:
    manager, _ = open_manager(world, files)
    planned = manager.plan(OPERATOR, request(files.boot()))
    with pytest.raises(RequestError, match="reserved for the host itself"):
        manager.plan(OPERATOR, request(files.boot(), "host"))
    assert files.asked == [], "a plan downloads nothing"
    view, new = manager.create(OPERATOR, request(files.boot()))
    assert (view.state, new, view.plan.cores) == ("running", True, planned.plan.cores)
    image = find_image(world.folder / "images", view.plan.image.name)
    assert (image.kernel.read_bytes(), image.initrd.read_bytes()) == (KERNEL, INITRD)
    manager.stop(OPERATOR, "net", 0)
    manager.start(OPERATOR, "net")
    manager.create(OPERATOR, request(files.boot(), "other"))
    assert len(files.asked) == 2


def test_tenant_boots_only_from_its_own_servers(world: World, files: BootServer) -> None:
    manager, _ = open_manager(world, files)
    tenant = Identity("alice", Role.TENANT, "acme")
    for call in (manager.plan, manager.create):
        with pytest.raises(Forbidden, match="not allowed on this host"):
            call(tenant, request(files.boot()))
    assert files.asked == []
    manager.create(replace(tenant, boot_servers=(files.url,)), request(files.boot()))
    with pytest.raises(Forbidden):
        manager.create(tenant, request(files.boot(), "second"))


def test_failed_download_claims_nothing_and_leaves_nothing(world: World, files: BootServer) -> None:
    manager, ledger = open_manager(world, files)
    images = world.folder / "images"
    before = image_names(images)
    for boot in (
        files.boot(initrd=f"{files.url}missing"),
        files.boot(kernel_sha256="0" * 64),
        files.boot(initrd=f"{files.url}vmlinuz"),
    ):
        with pytest.raises(ImageError):
            manager.create(OPERATOR, request(boot))
    assert ledger.read().claims == ()
    assert image_names(images) == before
    assert [path.name for path in images.iterdir() if path.name.startswith((".tmp-", ".download-"))] == []


def test_store_that_cannot_be_written_is_one_error(world: World, files: BootServer, monkeypatch: pytest.MonkeyPatch) -> None:
    manager, _ = open_manager(world, files)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(EROFS, os.strerror(EROFS))

    monkeypatch.setattr(boot_images, "TemporaryDirectory", refuse)
    with pytest.raises(ImageError, match="cannot store boot files in .*: Read-only file system"):
        manager.create(OPERATOR, request(files.boot()))


def test_size_limit_counts_both_files(world: World, files: BootServer) -> None:
    manager, _ = open_manager(world, files, max_size=len(KERNEL) + len(INITRD) - 1)
    with pytest.raises(ImageError, match=f"the limit is {len(INITRD) - 1}"):
        manager.create(OPERATOR, request(files.boot()))
    manager, _ = open_manager(world, files, max_size=len(KERNEL) + len(INITRD))
    manager.create(OPERATOR, request(files.boot()))


def test_too_little_memory_is_refused_before_a_claim(world: World, files: BootServer) -> None:
    manager, ledger = open_manager(world, files)
    with pytest.raises(RequestError, match="needs 66M of memory, requested 64M"):
        manager.create(OPERATOR, request(files.boot(), memory="64M"))
    assert ledger.read().claims == ()


def test_image_without_guest_is_removed_after_a_while(world: World, files: BootServer, monkeypatch: pytest.MonkeyPatch) -> None:
    manager, _ = open_manager(world, files)
    images = world.folder / "images"
    name = manager.create(OPERATOR, request(files.boot()))[0].plan.image.name
    leftover = images / ".download-killed"
    leftover.mkdir()
    for path in (images / name, leftover):
        os.utime(path, (0, 0), follow_symlinks=False)
    manager.remove_boot_images()
    assert name in image_names(images), "it has a guest"
    assert not leftover.exists()
    manager.delete(OPERATOR, "net")
    os.utime(images / name, follow_symlinks=False)
    manager.remove_boot_images()
    assert name in image_names(images), "it is new"
    os.utime(images / name, (0, 0), follow_symlinks=False)
    manager.remove_boot_images()
    assert name not in image_names(images)
    with pytest.raises(NotFound):
        find_image(images, name)


def swapped(files: BootServer) -> dict[str, str]:
    """Another image than ``files.boot()``."""
    boot = files.boot()
    return files.boot(kernel=boot["initrd"], kernel_sha256=boot["initrd_sha256"])


def open_shared(world: World, files: BootServer, monkeypatch: pytest.MonkeyPatch, images: int) -> GuestService:
    """A manager with two tenants that may boot from the server."""
    monkeypatch.setattr(boot_images, "MAX_IMAGES", images)
    return world.open_manager(replace(SERVER.policy, boot=BootPolicy((files.url,), 1 << 20, 60, tenants=2)))[0]


def as_tenant(files: BootServer, name: str) -> Identity:
    return Identity(f"user of {name}", Role.TENANT, name, boot_servers=(files.url,))


def test_tenant_cannot_use_up_the_share_of_others(world: World, files: BootServer, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = open_shared(world, files, monkeypatch, images=3)
    acme = as_tenant(files, "acme")
    manager.create(acme, request(files.boot()))
    with pytest.raises(Conflict, match="tenant acme has 1 images from boot servers already, limit 1"):
        manager.create(acme, request(swapped(files), "second"))
    for caller, name in ((as_tenant(files, "other"), "theirs"), (OPERATOR, "own")):
        manager.create(caller, request(swapped(files), name))
        with pytest.raises(Conflict, match="limit 1"):
            manager.create(caller, request(files.boot(), f"{name}-second"))
    manager.delete(acme, "net")
    manager.create(acme, request(files.boot(), "same-image"))


def test_shared_image_is_removed_after_its_last_tenant(world: World, files: BootServer, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = open_shared(world, files, monkeypatch, images=3)
    images, acme, other = world.folder / "images", as_tenant(files, "acme"), as_tenant(files, "other")
    name = manager.create(acme, request(files.boot()))[0].plan.image.name
    manager.create(other, request(files.boot(), "theirs"))
    manager.delete(acme, "net")
    for path in (images / name, *images.glob(".boot-tenants/*/*")):
        os.utime(path, (0, 0), follow_symlinks=False)
    manager.remove_boot_images()
    assert name in image_names(images), "another tenant's guest has it"
    manager.create(acme, request(swapped(files), "second"))
    with pytest.raises(Conflict, match="tenant other has 1 images"):
        manager.create(other, request(swapped(files), "third"))


@pytest.mark.parametrize("changes", [{"kernel_sha256": "0" * 64}, {"initrd": "missing"}])
def test_failed_download_does_not_count(
    world: World, files: BootServer, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]
) -> None:
    manager = open_shared(world, files, monkeypatch, images=3)
    changes = {name: f"{files.url}{value}" if name == "initrd" else value for name, value in changes.items()}
    with pytest.raises(ImageError):
        manager.create(as_tenant(files, "acme"), request(files.boot(**changes)))
    manager.create(as_tenant(files, "acme"), request(files.boot()))


def test_parallel_requests_do_not_exceed_the_share(world: World, files: BootServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are at the start of their download before the first has an image."""
    manager = open_shared(world, files, monkeypatch, images=3)
    download, together = boot_images.download, threading.Event()
    monkeypatch.setattr(boot_images, "download", lambda *words, **rest: (together.wait(60), download(*words, **rest))[1])
    errors: list[OrchestratorError] = []
    refused = threading.Event()

    def create(boot: dict[str, str], name: str) -> None:
        try:
            manager.create(as_tenant(files, "acme"), request(boot, name))
        except OrchestratorError as error:
            errors.append(error)
            refused.set()

    threads = [threading.Thread(target=create, args=one) for one in ((files.boot(), "a"), (swapped(files), "b"))]
    for thread in threads:
        thread.start()
    assert refused.wait(60)
    together.set()
    for thread in threads:
        thread.join(60)
    assert [type(error) for error in errors] == [Conflict]
    assert len(manager.guests(OPERATOR)) == 1


def test_image_counts_although_a_parallel_request_for_it_failed(
    world: World, files: BootServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = open_shared(world, files, monkeypatch, images=3)
    acme, download, begun, others_failed = as_tenant(files, "acme"), boot_images.download, threading.Event(), threading.Event()

    def wait(url: str, *words: Any, **rest: Any) -> int:
        if url.endswith("initrd"):
            begun.set()
            assert others_failed.wait(60)
        return download(url, *words, **rest)

    monkeypatch.setattr(boot_images, "download", wait)
    thread = threading.Thread(target=manager.create, args=(acme, request(files.boot())))
    thread.start()
    assert begun.wait(60)
    with pytest.raises(ImageError):
        manager.create(acme, request(files.boot(initrd=f"{files.url}missing"), "second"))
    others_failed.set()
    thread.join(60)
    with pytest.raises(Conflict, match="tenant acme has 1 images from boot servers already, limit 1"):
        manager.create(acme, request(swapped(files), "third"))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"image": "minimal", "boot": {}}, "boot.kernel"),
        ({"boot": {"kernel": "file:///etc/shadow"}}, "not a URL"),
        ({"boot": 5}, "boot"),
        ({"image": f"boot-{'0' * 32}"}, "request them with boot"),
        ({}, "image"),
    ],
)
def test_wrong_boot_fields_are_refused(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        parse_guest_request({"name": "net", "memory": "64M", **fields})


def test_image_beside_boot_files_is_refused(files: BootServer) -> None:
    with pytest.raises(OrchestratorError, match="together with boot"):
        request(files.boot(), image="minimal")
