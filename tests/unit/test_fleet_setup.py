"""What the role `nohype_fleet` is told of labs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.errors import LabError
from orchestrator.lab import fleet_setup
from orchestrator.lab.lab import Lab
from orchestrator.lab.paths import LabDir
from orchestrator.lab.spec import load_spec


def make_lab(name: str, folder: Path) -> Lab:
    state: Any = SimpleNamespace(spec=load_spec("small"), port=2200 + len(name), host_key="key")
    return Lab(LabDir(name, folder), state)


def test_first_lab_is_the_controller_and_all_are_hosts_with_their_own_ports(tmp_path: Path) -> None:
    labs = [make_lab("one", tmp_path), make_lab("three", tmp_path)]
    inventory: Any = json.loads(json.dumps(fleet_setup.build_inventory(labs, [6000, 6001, 6002])))
    assert list(inventory["nohype_fleet_controller"]["hosts"]) == ["one"]
    hosts = inventory["nohype_hosts"]["hosts"]
    assert {name: (host["ansible_port"], host["nohype_fleet_port"]) for name, host in hosts.items()} == {
        "one": (2203, 6001), "three": (2205, 6002),
    }  # fmt: skip
    for host in hosts.values():
        assert host["nohype_fleet_settings"][0] == "SlurmctldPort=6000"
        assert "IdentityFile" in host["ansible_ssh_common_args"]
        assert host["nohype_housekeeping_cpus"] == "0"
        assert not host["nohype_offline"]


def test_free_ports_differ() -> None:
    ports = fleet_setup.find_free_ports(5)
    assert len(set(ports)) == 5


def test_failed_role_is_one_error_with_the_end_of_its_output(tmp_path: Path) -> None:
    """Ansible itself, with an inventory that the role refuses."""
    with pytest.raises(LabError, match="cannot make the labs a fleet") as caught:
        fleet_setup.apply_fleet_role({"nohype_hosts": {"hosts": {"a": {"ansible_connection": "local"}}}}, tmp_path / "log")
    assert "the group nohype_fleet_controller with one machine" in " ".join(caught.value.message.split())
    assert str(tmp_path / "log") in caught.value.hint
