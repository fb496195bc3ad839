"""A plain Debian server becomes a NoHype host over SSH, reboots, runs a guest, is upgraded meanwhile, and is restored."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from orchestrator.host.run import Completed, run
from orchestrator.images.build import build_image
from orchestrator.images.cache import cache_folder
from orchestrator.images.recipe import recipes_folder
from orchestrator.images.wheels import build_wheelhouse, source_tree
from orchestrator.lab.ansible import build_environment, find_ansible
from orchestrator.lab.build import role_variables
from orchestrator.lab.lab import build_ssh
from tests.lab.conftest import LabHost, own_lab

ANSIBLE = source_tree() / "ansible"
# Accounts, packages, enabled units, and settings with their contents. GRUB's menu is generated from them. At a boot systemd
# creates /var/lib/machines and /var/lib/portables.
LOOK = r"""
cut -d: -f1 /etc/passwd | sed 's/^/user /'; cut -d: -f1 /etc/group | sed 's/^/group /'
dpkg-query --show --showformat='package ${Package} ${Version} ${db:Status-Status}\n'
find /etc/systemd /usr/local /opt /var/lib -maxdepth 3 ! -name '*.pyc' \
  ! -path /var/lib/machines ! -path /var/lib/portables \
  ! -path '/var/lib/apt/*' ! -path '/var/lib/dpkg/*' ! -path '/var/lib/systemd/*' ! -path '/var/lib/ucf/*' -printf '%y %p %l\n'
find /etc -type f ! -name '*-' ! -name ld.so.cache ! -path '/etc/ssl/certs/*' -exec sha256sum {} +
"""

# Under emulation each module of Ansible takes 3 s on an idle machine, and up to 15 s on a busy one.
PLAYBOOK, WHOLE = 7200, 18000  # seconds

pytestmark = [pytest.mark.soak, pytest.mark.timeout(WHOLE)]


class Playbooks:
    """Runs them from this machine, as an operator does."""

    def __init__(self, host: LabHost, folder: Path) -> None:
        self.host, self.folder = host, folder

    def run(self, name: str, *words: str, check: bool = True, **variables: object) -> Completed:
        lab = self.host.lab
        _ssh, *options, _p, _port, _where = build_ssh(lab)
        spec = {key: value for key, value in role_variables(lab.state.spec).items() if key != "nohype_lab_hostname"}
        server: Mapping[str, object] = {
            **spec, "nohype_offline": False, "nohype_switches": {}, "nohype_switch_addresses": [],
            "nohype_wheelhouse": str(build_wheelhouse(source_tree(), cache_folder(), progress=print)),
            "nohype_guest_images": [str(build_image(recipes_folder(), "minimal", cache_folder(), progress=print))],
            "nohype_ignore_checks": ["bare-metal"],
            "ansible_host": "127.0.0.1", "ansible_port": lab.state.port, "ansible_user": "root", "ansible_become": False,
            "ansible_ssh_common_args": shlex.join(options), **variables,
        }  # fmt: skip
        inventory = self.folder / "inventory.json"
        inventory.write_text(json.dumps({"nohype_hosts": {"hosts": {"server": server}}}))
        argv: list[str | Path] = [find_ansible(), f"--inventory={inventory}", *words, ANSIBLE / name]
        log = self.folder / "ansible.log"  # each task with its time, also after a timeout
        environment = {**build_environment(ANSIBLE, self.folder / "home"), "ANSIBLE_LOG_PATH": str(log)}
        started = time.monotonic()
        done = run(argv, env=environment, timeout=PLAYBOOK, check=False)
        print(name, *words, f"{time.monotonic() - started:.0f} s, log {log}", done.stdout[-3000:])
        assert done.status == 0 or not check, done.stdout[-6000:] + done.stderr[-1000:]
        return done


@pytest.fixture(scope="module")
def host() -> Iterator[LabHost]:
    with own_lab("plain", "plain") as found:
        yield found


def test_plain_server_becomes_a_host_and_is_restored(host: LabHost, tmp_path: Path) -> None:
    playbooks = Playbooks(host, tmp_path)
    before, boot = host.run(LOOK).stdout.splitlines(), host.run("cat /proc/sys/kernel/random/boot_id").stdout
    assert "isolcpus" not in host.run("cat /proc/cmdline").stdout

    playbooks.run("site.yml")
    assert host.run("cat /proc/sys/kernel/random/boot_id").stdout != boot
    assert "isolcpus=nohz,domain,managed_irq,1-3" in host.run("cat /proc/cmdline").stdout
    host.run("nohype guest create web --image minimal --cores 1 --memory 256M --wait 240")
    playbooks.run("verify.yml")

    running = host.run("cat /run/libvirt/qemu/web.pid").stdout
    upgraded = tmp_path / "wheelhouse.tar"  # the same wheels with another checksum: the role installs them again
    shutil.copyfile(build_wheelhouse(source_tree(), cache_folder(), progress=print), upgraded)
    with upgraded.open("ab") as file:
        file.write(bytes(10240))
    done = playbooks.run("playbooks/host.yml", "--tags=nohype_install", nohype_wheelhouse=str(upgraded))
    assert re.search(r"RUNNING HANDLER \[nohype_host : Restart the manager\]", done.stdout)
    assert host.run("cat /run/libvirt/qemu/web.pid").stdout == running
    assert json.loads(host.run("nohype guest list --json").stdout)[0]["state"] == "running"

    refused = playbooks.run("undo.yml", check=False)
    assert refused.status
    assert "The server has guests: web" in refused.stdout
    host.run("nohype guest delete web")
    playbooks.run("undo.yml")
    after = host.run(LOOK).stdout.splitlines()
    assert sorted(set(after) ^ set(before)) == []
    assert "isolcpus" not in host.run("cat /proc/cmdline").stdout
