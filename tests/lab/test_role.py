"""The host role on a running host: manager and guests keep running, and only differences are changed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from orchestrator.host.run import run
from orchestrator.images.cache import cache_folder
from orchestrator.images.wheels import build_wheelhouse, source_tree
from orchestrator.lab.ansible import build_environment, find_ansible
from orchestrator.lab.build import role_variables
from orchestrator.lab.lab import build_ssh
from tests.lab.conftest import LabHost
from tests.lab.test_recovery import await_new, check_unnoticed, look

ANSIBLE = source_tree() / "ansible"
SETTINGS, SOCKET = "/etc/nohype/nohype.toml", "/etc/systemd/system/nohyped.socket"


def apply(host: LabHost, folder: Path, **variables: object) -> list[str]:
    """Applies playbooks/host.yml by SSH, as an operator does; returns the names of the changed tasks and handlers.

    Without the packages, as the lab has no network.
    """
    lab = host.lab
    _ssh, *options, _p, _port, _where = build_ssh(lab)
    server = {
        **role_variables(lab.state.spec),
        "nohype_offline": False,
        "nohype_boot_loader": "manual",  # QEMU loads the kernel
        "nohype_keep_record": False,
        "nohype_wheelhouse": str(build_wheelhouse(source_tree(), cache_folder(), progress=print)),
        "ansible_host": "127.0.0.1",
        "ansible_port": lab.state.port,
        "ansible_user": "root",
        "ansible_become": False,  # already root, without sudo
        "ansible_ssh_common_args": shlex.join(options),
        **variables,
    }
    inventory = folder / "inventory.json"
    inventory.write_text(json.dumps({"nohype_hosts": {"hosts": {lab.name: server}}}))
    argv = [find_ansible(), f"--inventory={inventory}", "--skip-tags=nohype_packages", ANSIBLE / "playbooks/host.yml"]
    done = run(argv, env=build_environment(ANSIBLE, folder / "home"), timeout=800, check=False)
    assert done.status == 0, done.stdout[-4000:] + done.stderr[-1000:]
    parts = re.split(r"^(?:TASK|RUNNING HANDLER) \[nohype_host : (.*)\] \**$", done.stdout, flags=re.MULTILINE)
    return [name for name, output in zip(parts[1::2], parts[2::2], strict=True) if re.search("^changed: ", output, re.MULTILINE)]


@pytest.mark.usefixtures("guests")
@pytest.mark.soak
def test_role_can_be_applied_to_a_host_with_guests(host: LabHost, tmp_path: Path) -> None:
    """Includes the socket's unit: systemd starts no socket whose service runs."""
    before = look(host)
    spoil = f"cp -a {SETTINGS} {SETTINGS}.kept && echo '# an older one' >> {SOCKET}"
    with host.changed(spoil, f"mv {SETTINGS}.kept {SETTINGS} && systemctl restart nohyped"):
        assert apply(host, tmp_path, nohype_limits={"rate": 77}) == [
            "Write the manager's settings",
            "Write the unit of the manager's socket",
            "Stop the manager",
            "Open the socket",
            "Restart the manager",
        ], "nothing else differs"
        await_new(host, "nohyped", before.manager)
        now = check_unnoticed(host, before)
        assert {name: now.kinds(name) for name in now.guests} == dict.fromkeys(before.guests, ["adopt"])
        assert "rate = 77" in host.run(f"cat {SETTINGS}").stdout
        assert "older" not in host.run(f"cat {SOCKET}").stdout
        assert host.run("systemctl is-active nohyped.socket nohyped.service").stdout.split() == ["active", "active"]
