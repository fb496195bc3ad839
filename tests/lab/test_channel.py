"""Edge mode channel with guests: each VF has a VLAN of its own, and Open vSwitch as external switch translates between them.

The lab's NIC is taken from its Linux bridge for that time: a Linux bridge translates only with kernels that have 8021q.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key
from pyroute2 import IPRoute

from orchestrator.host.netlink import add_port, set_hairpin
from orchestrator.images.cache import cache_folder
from orchestrator.lab import switch
from orchestrator.lab.build import build_switch_tools
from orchestrator.lab.keys import SWITCH_KEY, KeyPair
from orchestrator.lab.qemu import THIS_MACHINE
from orchestrator.lab.switch import LabPort
from orchestrator.model.switch import PortChannel
from orchestrator.waiting import wait_until
from tests.harness.bridge import SshSwitch, ssh_switch
from tests.harness.openvswitch import BRIDGE, Daemons, running
from tests.lab.conftest import LabHost
from tests.lab.test_manager import MEMORY
from tests.lab.test_networks import ping

pytestmark = pytest.mark.soak

CONFIG = "/etc/nohype/nohype.toml"
GUESTS = {"chan-a": ("blue", "10.3.0.1/24"), "chan-b": ("blue", "10.3.0.2/24"), "chan-c": ("red", "10.3.0.3/24")}


@pytest.fixture(scope="module")
def daemons(host: LabHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    """Open vSwitch with the lab's NIC as a port."""
    port = switch.port(host.lab.name)
    with running(tmp_path_factory.mktemp("channel"), build_switch_tools(cache_folder())) as found:
        with IPRoute(netns=port.netns) as ipr:
            (index,) = ipr.link_lookup(ifname=port.interface)
            ipr.link("set", index=index, net_ns_pid=found.holder)
        try:
            found.run("ip", "link", "set", port.interface, "up")
            found.run("ovs-vsctl", "--timeout=20", "add-port", BRIDGE, port.interface)
            yield found
            found.run("ovs-vsctl", "--timeout=20", "del-port", BRIDGE, port.interface)
        finally:
            _give_back(found.holder, port)


def _give_back(holder: int, port: LabPort) -> None:
    words = ["ip", "link", "set", port.interface, "netns", port.netns]
    subprocess.run(["nsenter", f"--target={holder}", "--net", *words], check=True, timeout=60)
    add_port(switch.BRIDGE, port.interface, port.netns)
    set_hairpin(port.interface, port.netns, on=True)


@pytest.fixture(scope="module")
def name_of_port(host: LabHost) -> str:
    return switch.name_port(host.lab.name).interface


def find_key(host: LabHost) -> KeyPair:
    """With which the manager of the lab logs in on switches."""
    private = host.run(f"cat {SWITCH_KEY}").stdout.encode()
    public = load_ssh_private_key(private, None).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return KeyPair(private, public.decode())


@pytest.fixture(scope="module")
def registered(
    host: LabHost, daemons: Daemons, name_of_port: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SshSwitch]:
    """The manager reaches the switch over SSH, and gives guests of nic0 the edge mode channel."""
    port = name_of_port
    scripts = {name: f'exec {" ".join(daemons.prefix)} {name} "$@"' for name in ("ovs-vsctl", "ovs-ofctl", "lldpcli")}
    with ssh_switch(tmp_path_factory.mktemp("ssh"), scripts, find_key(host)) as server:
        section = f'\n[uplinks.nic0]\nedge = "channel"\nchannels = "1000-1019"\nswitch = "ovs1"\nport = "{port}"\n'
        change = f"cp -p {CONFIG} {CONFIG}.before; cat >> {CONFIG} <<'END'{section}END\nsystemctl restart nohyped"
        with host.changed(change, f"mv {CONFIG}.before {CONFIG}; systemctl restart nohyped"):
            host.nohype(
                "switch", "add", "ovs1", "--driver", "openvswitch", "--bridge", BRIDGE, "--host", THIS_MACHINE,
                "--ssh-port", str(server.address.port), "--host-key", server.address.host_key,
            )  # fmt: skip
            yield server
            host.nohype("switch", "delete", "ovs1", "--force")


@pytest.fixture(scope="module")
def members(host: LabHost, registered: SshSwitch) -> Iterator[dict[str, dict[str, Any]]]:
    try:
        for name, vlan in (("blue", 100), ("red", 200)):
            host.nohype("network", "create", name, "--vlan", str(vlan))
        create = f"nohype guest create {{}} {' '.join(MEMORY)} --nic network={{}},address={{}} --wait 300 &"
        done = host.run("\n".join([*(create.format(name, *place) for name, place in GUESTS.items()), "wait"]), timeout=400)
        print(done.stdout, done.stderr)
        shown = {name: json.loads(host.nohype("guest", "show", name, "--json").stdout) for name in GUESTS}
        yield shown
    finally:
        for name in GUESTS:
            host.nohype("guest", "delete", name, check=False)
        for name in ("blue", "red"):
            host.nohype("network", "delete", name, check=False)


def audit(host: LabHost, frames: int = 0) -> dict[tuple[str, str], dict[str, Any]]:
    """As the manager alone measures it: the observer of `LabHost.proofs` is at the Linux bridge."""
    found = json.loads(host.nohype("audit", "--frames", str(frames), "--json", check=False).stdout)
    return {(proof["name"], proof["subject"]): proof for proof in found}


def test_members_of_a_network_reach_each_other_and_others_do_not(
    host: LabHost, members: dict[str, dict[str, Any]], daemons: Daemons
) -> None:
    nics = {name: guest["nics"][0] for name, guest in members.items()}
    assert {nic["edge"] for nic in nics.values()} == {"channel"}
    assert {nic["vlan"] for nic in nics.values()} == {1000, 1001, 1002}
    assert {name: nic["switch_vlan"] for name, nic in nics.items()} == {"chan-a": 100, "chan-b": 100, "chan-c": 200}
    assert ping(host, "chan-a", "10.3.0.2", 5) >= 4
    assert ping(host, "chan-b", "10.3.0.1", 5) == 5
    assert ping(host, "chan-c", "10.3.0.1") == 0, "of another network, in the same subnet"
    assert ping(host, "chan-a", "10.3.0.3") == 0
    checks = json.loads(host.nohype("switch", "verify", "ovs1", "--json").stdout)
    assert {check["name"]: check["verdict"] for check in checks}["channels"] == "pass", checks


def test_audit_measures_frames_and_names_the_translation(host: LabHost, members: dict[str, dict[str, Any]]) -> None:
    proofs = audit(host, frames=20)
    isolated, vepa = proofs["network-isolated", "chan-a"], proofs["vepa", "host"]
    assert isolated["verdict"] == "pass", isolated["evidence"]
    expected = f"the switch translates VLAN {members['chan-a']['nics'][0]['vlan']} to VLAN 100"
    assert any(expected in line for line in isolated["evidence"]), isolated["evidence"]
    assert vepa["verdict"] == "pass", vepa["evidence"]
    assert any("loopback bit 31 clear: vepa" in line for line in vepa["evidence"]), vepa["evidence"]


def test_lost_translations_are_set_again_and_those_of_ended_guests_undone(
    host: LabHost, members: dict[str, dict[str, Any]], daemons: Daemons, name_of_port: str
) -> None:
    nics = {name: guest["nics"][0] for name, guest in members.items()}

    def read() -> dict[int, PortChannel]:
        (port,) = daemons.driver.read([name_of_port]).ports
        return {channel.vlan: channel for channel in port.channels}

    assert read().keys() == {nic["vlan"] for nic in nics.values()}
    host.nohype("guest", "kill", "chan-c")
    running = {nics[name]["vlan"] for name in ("chan-a", "chan-b")}
    assert read().keys() == running
    daemons.kill_vswitchd()
    daemons.start_vswitchd()
    assert not read()
    lost = time.monotonic()
    assert wait_until(lambda: read().keys() == running, timeout=120, interval=0.5)
    print(f"translations were set again {time.monotonic() - lost:.1f} s after the switch had restarted")
    assert ping(host, "chan-a", "10.3.0.2", 5) >= 4
    events = [
        event["detail"] for event in json.loads(host.nohype("events", "--json").stdout) if event["kind"] == "switch-changed"
    ]
    assert any("is not translated: its frames reach no other guest" in detail for detail in events), events
    assert any("lost translations were set again" in detail for detail in events), events
    # Another operator puts chan-b into the other network.
    daemons.driver.set_channel(name_of_port, replace(read()[nics["chan-b"]["vlan"]], switch_vlan=200))
    proofs = audit(host)
    assert proofs["network-isolated", "chan-b"]["verdict"] == "fail"
    assert proofs["network-isolated", "chan-a"]["verdict"] == "pass", proofs["network-isolated", "chan-a"]["evidence"]
