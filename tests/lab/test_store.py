"""The image store of a real host: the manager may only read it, and libvirt starts guests from its files."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.lab.conftest import LabHost

STORE = "/var/lib/nohype/images"
NAME = "stored"


@pytest.fixture(autouse=True)
def _clean(host: LabHost) -> Iterator[None]:
    yield
    host.nohype("guest", "delete", NAME, check=False)
    host.nohype("image", "delete", NAME, check=False)
    host.run(f"rm -rf /tmp/{NAME}")


def image(host: LabHost, *words: str) -> dict[str, object]:
    found = json.loads(host.nohype("image", *words, "--json").stdout)
    assert isinstance(found, dict)
    return found


def install(host: LabHost, description: str) -> str:
    """The same image with another description is a build of its own."""
    folder = f"/tmp/{NAME}"
    host.run(f"rm -rf {folder} && cp -rL {STORE}/minimal {folder}")
    host.run(f"""sed -i 's/"description": "[^"]*"/"description": "{description}"/' {folder}/image.json""")
    return str(image(host, "install", folder)["hash"])


def read_kernel(host: LabHost) -> str:
    return host.run(f"virsh dumpxml {NAME} | grep -o '<kernel>.*</kernel>'").stdout.strip()


@pytest.mark.soak
def test_guest_keeps_its_build_until_it_is_deleted(host: LabHost) -> None:
    assert image(host, "verify", "minimal")["verified"] is True
    old = install(host, "old")
    host.nohype("guest", "create", NAME, "--memory", "128M", "--image", NAME, "--wait", "120")
    assert f"{STORE}/.builds/{old}/vmlinuz" in read_kernel(host)
    new = install(host, "new")
    assert new != old
    assert image(host, "gc")["removed"] == []
    assert image(host, "show", NAME)["guests"] == [{"name": NAME, "hash": old, "current": False}]
    done = host.nohype("image", "delete", NAME, check=False)
    assert (done.status, f"guests use the image {NAME}: {NAME}" in done.stderr) == (1, True)
    host.nohype("guest", "kill", NAME)
    host.nohype("guest", "start", NAME, "--wait", "120")
    assert f"{STORE}/.builds/{old}/vmlinuz" in read_kernel(host)
    host.nohype("guest", "delete", NAME)
    assert image(host, "gc")["removed"] == [old]
    assert image(host, "delete", NAME)["removed"] == [new]


@pytest.mark.soak
def test_claim_waits_for_the_lock_of_the_store_and_reports_it(host: LabHost) -> None:
    """The manager's sandbox lets it lock a folder that it may not write."""
    words = f"nohype guest create {NAME} --memory 128M --image minimal"
    done = host.run(f"flock --exclusive {STORE} {words}", check=False)
    assert done.status == 1
    assert "the image store is locked by another process for more than 10 s" in done.stderr
    assert NAME not in host.nohype("guest", "list").stdout
    host.run(f"flock --shared {STORE} {words}")
