"""Three guests with seven VFs in two networks, of the image whose guests send and count frames."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.lab import switch
from tests.harness.guest_frames import Wire
from tests.harness.guest_image import FRAMES, make_frames_image, send_image
from tests.lab.conftest import LabHost

BLUE, RED = 100, 200
# Blue and red have the same subnet: only the VLANs keep them apart. A guest with NICs in both reaches red through a /31 network.
NICS = {
    "net-a": (
        "network=blue,address=10.1.0.1/24,rate=100",
        "network=red,address=10.1.0.2/31",
        "network=blue,address=fd00::1/64",
    ),
    "net-b": ("network=blue,address=10.1.0.5/24", "network=blue,address=fd00::5/64"),
    "net-c": ("network=red,address=10.1.0.3/24", "address=fd00::3/64"),
}
# The image disables IPv6. A guest can use registers of its VF past its driver only if its own kernel permits it.
CMDLINE = "ipv6.disable=0 iomem=relaxed"


@contextmanager
def sent_image(host: LabHost) -> Iterator[None]:
    """The image FRAMES is installed during the block."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            send_image(host.lab, make_frames_image(Path(folder)))
        yield
    finally:
        host.nohype("image", "delete", FRAMES, check=False)


@contextmanager
def created(host: LabHost) -> Iterator[dict[str, dict[str, Any]]]:
    """The guests by name, as the manager shows them."""
    with sent_image(host), _removed(host):
        for name, vlan in (("blue", BLUE), ("red", RED)):
            host.nohype("network", "create", name, "--vlan", str(vlan))
        made = {}
        for name, nics in NICS.items():
            words = [word for nic in nics for word in ("--nic", nic)]
            words += ["--memory", "128M", "--image", FRAMES, "--cmdline", CMDLINE]
            made[name] = json.loads(host.nohype("guest", "create", name, *words, "--json").stdout)
        for name in NICS:
            host.nohype("guest", "start", name, "--wait", "180")  # they run already: only waits
        yield made


@contextmanager
def _removed(host: LabHost) -> Iterator[None]:
    try:
        yield
    finally:
        for name in NICS:
            host.nohype("guest", "delete", name, check=False)
        for name in ("blue", "red"):
            host.nohype("network", "delete", name, check=False)


@contextmanager
def watched(host: LabHost, guests: dict[str, dict[str, Any]]) -> Iterator[Wire]:
    with watched_on(dict.fromkeys(guests, host), guests.values()) as wire:
        yield wire


@contextmanager
def watched_on(hosts: Mapping[str, LabHost], guests: Iterable[Mapping[str, Any]]) -> Iterator[Wire]:
    """Guests on several hosts behind one switch. ``hosts``: by name of the guest."""

    def tell(guest: str, line: str) -> str:
        return hosts[guest].nohype("guest", "tell", guest, line).stdout.splitlines()[-1]  # other output may precede the answer

    ports = [switch.port(name) for name in sorted({host.lab.name for host in hosts.values()})]
    with Wire.watched(tell, ports, guests) as wire:
        yield wire
