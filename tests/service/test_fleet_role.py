"""The role `nohype_fleet` on two small Debian systems with the host role, and back. In root folders, without systemd.

The manager of each is a real one on a fake host.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import OrchestratorError
from orchestrator.fleet.configuration import find_differences
from orchestrator.fleet.node import build_nodes
from orchestrator.host.pci import DEVICES
from orchestrator.host.run import Completed, run
from orchestrator.images.cache import cache_folder
from orchestrator.images.wheels import build_wheelhouse, source_tree
from orchestrator.lab.ansible import build_environment, find_ansible
from tests.fakes.server import Server
from tests.harness.api_server import Served, open_to_all, serve
from tests.harness.crash import World
from tests.harness.large_folder import large_folder
from tests.service.test_setup import Server as Machine
from tests.service.test_setup import build_root

ANSIBLE = source_tree() / "ansible"
SERVER = Server(cores=8, nodes=2, vfs=4, pages=512)
pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for chroot"),
]


class Fleet:
    """Two machines: both are hosts, and the first is the controller."""

    def __init__(self, machines: list[Machine], served: list[Served], folder: Path) -> None:
        self.machines, self.served, self.folder = machines, served, folder
        self.inventory = folder / "fleet.json"
        self.write()

    def write(self, **more: Any) -> None:
        hosts = {}
        for number, machine in enumerate(self.machines, 1):
            own = json.loads(machine.inventory.read_text())["nohype_hosts"]["hosts"][str(machine.root)]
            hosts[str(machine.root)] = {
                **own, "nohype_fleet_name": f"host{number}", "nohype_fleet_address": f"10.77.0.{number}",
                "nohype_fleet_offline": True, "nohype_vfs_per_uplink": 4, "nohype_fleet_features": [f"rack-{number}"],
                "nohype_uplinks": [{"name": "nic0"}, {"name": "tap0", "edge": "macvtap-vepa"}],
                **more,
            }  # fmt: skip
        controller = {"hosts": {str(self.machines[0].root): {}}}
        self.inventory.write_text(json.dumps({"nohype_hosts": {"hosts": hosts}, "nohype_fleet_controller": controller}))

    def play(self, playbook: str, *words: str, check: bool = True) -> Completed:
        mounts = "".join(
            f"mount -t proc proc {machine.root}/proc\n"
            f"mkdir -p {machine.root}/run/nohype\n"
            f": > {machine.root}/run/nohype/nohyped.sock\n"
            f"mount --bind {served.path} {machine.root}/run/nohype/nohyped.sock\n"
            for machine, served in zip(self.machines, self.served, strict=True)
        )
        argv = [find_ansible(), f"--inventory={self.inventory}", *words, ANSIBLE / playbook]
        mounted = ["unshare", "--mount", "sh", "-ec", f'{mounts}exec "$@"', "sh"]
        done = run([*mounted, *argv], env=build_environment(ANSIBLE, self.folder / "home"), timeout=1800, check=False)
        assert done.status == 0 or not check, done.stdout[-6000:] + done.stderr[-1000:]
        return done

    def look(self) -> list[dict[str, str]]:
        return [machine.look() for machine in self.machines]


@pytest.fixture(params=["trixie", "bookworm"])
def fleet(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    try:
        origin = build_root(request.param, monkeypatch)
    except OrchestratorError as error:
        pytest.skip(f"the root cannot be built: {error.message}")
    build_wheelhouse(source_tree(), cache_folder(), progress=print)
    with ExitStack() as stack:
        machines, served = [], []
        roots = stack.enter_context(large_folder("fleet"))
        first = roots / "1"
        for number in (1, 2):
            root, folder = roots / str(number), tmp_path / f"host{number}"
            folder.mkdir()
            if number == 1:
                run(["cp", "--archive", "--reflink=auto", origin, root], timeout=600)
                machine = Machine(root, folder)
                machine.play("playbooks/host.yml")
            else:
                run(["cp", "--archive", "--reflink=auto", first, root], timeout=600)
                machine = Machine(root, folder)
            machines.append(machine)
            world = World(folder / "world", SERVER)
            world.host.write(f"{DEVICES}/0000:10:00.0/sriov_numvfs", str(SERVER.vfs))
            manager = stack.enter_context(
                serve(folder / "api", {"host": {"housekeeping": "0-1", "uplinks": ["nic0"]}}, world=world)
            )
            open_to_all(manager.path)
            served.append(manager)
        yield Fleet(machines, served, tmp_path)


def test_machines_become_a_fleet_and_are_restored(fleet: Fleet) -> None:
    before = fleet.look()
    fleet.play("fleet.yml", "--check", "--diff")
    assert fleet.look() == before, "check mode changes nothing"
    fleet.play("fleet.yml")
    roots = [machine.root for machine in fleet.machines]
    texts = [
        {name: (root / "etc/slurm" / name).read_text() for name in ("slurm.conf", "nohype-nodes.conf", "gres.conf")}
        for root in roots
    ]
    assert texts[0] == texts[1], "the same on all machines"
    for number, served in enumerate(fleet.served, 1):
        nodes = build_nodes(served.client.host(), f"host{number}")
        assert not find_differences(nodes, f"host{number}", texts[0]["nohype-nodes.conf"], texts[0]["gres.conf"])
        assert re.search(rf"^NodeName=host{number}\b.*Feature=\S*,rack-{number} ", texts[0]["nohype-nodes.conf"], re.MULTILINE)
        assert f"--host host{number} " in (roots[number - 1] / "etc/slurm/nohype-prolog").read_text()
        run(
            [
                "chroot",
                roots[number - 1],
                "systemd-analyze",
                "verify",
                "--man=no",
                "nohype-slurmd@x.service",
                "nohype-vfs@nic0.service",
            ]
        )
    keys = {(root / "etc/munge/munge.key").read_bytes() for root in roots}
    assert len(keys) == 1
    wanted = {root / "etc/systemd/system/multi-user.target.wants" for root in roots}
    assert [(folder / "nohype-vfs@nic0.service").is_symlink() for folder in wanted] == [True, True]
    assert not any((folder / "nohype-vfs@tap0.service").is_symlink() for folder in wanted)
    assert fleet.play("fleet.yml").stdout.count("changed=0") == 2, "nothing is left to do"
    refused = fleet.machines[0].play("undo.yml", check=False)
    assert refused.status
    assert "run fleet-undo.yml before" in refused.stdout
    record = roots[1] / "var/lib/nohype/fleet/host2-n0.7.json"
    record.parent.mkdir()
    record.write_text("{}")
    refused = fleet.play("fleet-undo.yml", check=False)
    assert refused.status
    assert "of the jobs host2-n0.7" in refused.stdout
    record.unlink()
    fleet.play("fleet-undo.yml")
    after = fleet.look()
    for left, was in zip(after, before, strict=True):
        assert {name: left.get(name) for name in {*left, *was} if left.get(name) != was.get(name)} == {}
    assert "holds no record" in fleet.play("fleet-undo.yml", check=False).stdout
