"""Makes labs a fleet, as an operator does with servers: by the role `nohype_fleet`, over SSH. The first lab is the controller.

The machines of a fleet have to reach each other. The labs do through this machine: QEMU forwards ports of its loopback device to
slurmctld and slurmd, and shows it to each lab as `THIS_MACHINE`.
"""

from __future__ import annotations

import json
import shlex
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from orchestrator.errors import LabError
from orchestrator.host.run import format_tail, run
from orchestrator.images.cache import cache_folder
from orchestrator.images.wheels import source_tree
from orchestrator.lab.ansible import build_environment, find_ansible
from orchestrator.lab.build import role_variables
from orchestrator.lab.lab import Lab, build_ssh, execute
from orchestrator.lab.qemu import THIS_MACHINE
from orchestrator.lab.qmp import ask_human

PACKAGES = ("munge", "slurm-client", "slurmctld", "slurmd")
"""Of the lab's image: a lab reaches no package archive."""
ACCOUNT = "nohype-fleet"
# Programs of an emulated host take ten to twenty times as long to start: the Prolog, and what slurmctld waits for.
_SLOW_HOST = ("BatchStartTimeout=300", "MessageTimeout=60", "SlurmdTimeout=60")
_ROLE_TIMEOUT = 1800
_COMMAND_TIMEOUT = 60


def set_up_fleet(labs: Sequence[Lab]) -> None:
    """Raises LabError, with the end of Ansible's output. Each lab is a host of the fleet, under its own name."""
    ports = find_free_ports(len(labs) + 1)
    for lab, inner in zip(labs, ports[1:], strict=True):
        _forward(lab, inner)
        # Labs of one spec have one host name, and Slurm's controller must have its own.
        done = execute(lab, f"hostname {lab.name} && echo 127.0.1.1 {lab.name} >> /etc/hosts", timeout=_COMMAND_TIMEOUT)
        if done.status:
            raise LabError(f"cannot set the host name of lab {lab.name}: {done.stderr.strip()}")
    _forward(labs[0], ports[0])
    apply_fleet_role(build_inventory(labs, ports), cache_folder() / "log" / "fleet.log")


def build_inventory(labs: Sequence[Lab], ports: Sequence[int]) -> dict[str, object]:
    """``ports``: of slurmctld, then of slurmd of each lab."""
    hosts = {}
    for lab, port in zip(labs, ports[1:], strict=True):
        _ssh, *options, _p, ssh_port, _where = build_ssh(lab)
        hosts[lab.name] = {
            **role_variables(lab.state.spec),
            "nohype_offline": False,
            "nohype_fleet_address": THIS_MACHINE,
            "nohype_fleet_port": port,
            "nohype_fleet_settings": [f"SlurmctldPort={ports[0]}", *_SLOW_HOST],
            "nohype_fleet_keep_record": False,  # a lab is discarded
            "ansible_host": "127.0.0.1",
            "ansible_port": int(ssh_port),
            "ansible_user": "root",
            "ansible_become": False,
            "ansible_ssh_common_args": shlex.join(options),
        }
    return {"nohype_hosts": {"hosts": hosts}, "nohype_fleet_controller": {"hosts": {labs[0].name: {}}}}


def apply_fleet_role(inventory: dict[str, object], log: Path) -> None:
    """The packages are in the image. ``log`` gets Ansible's output."""
    roles = source_tree() / "ansible"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    with TemporaryDirectory(prefix="nohype-fleet-") as name:
        folder = Path(name)
        (folder / "inventory.json").write_text(json.dumps(inventory))
        argv: list[str | Path] = [
            find_ansible(),
            f"--inventory={folder}/inventory.json",
            "--skip-tags=nohype_packages",
            roles / "fleet.yml",
        ]
        done = run(argv, timeout=_ROLE_TIMEOUT, env=build_environment(roles, folder / "home"), log=log, check=False)
    if done.status:
        tail = format_tail(log.read_text(errors="replace"))
        raise LabError(f"cannot make the labs a fleet: Ansible exited with status {done.status}{tail}", f"see {log}")


def find_free_ports(count: int) -> list[int]:
    """Of the loopback device. Another program can take one before QEMU does, which is an error then."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(one.getsockname()[1]) for one in sockets]


def _forward(lab: Lab, port: int) -> None:
    """A port of this machine's loopback device to the same port of the lab, until the lab ends. Raises LabError."""
    answer = ask_human(lab.folder.qmp, f"hostfwd_add management tcp:127.0.0.1:{port}-:{port}")
    if answer.strip():  # it is silent if it succeeds
        raise LabError(
            f"QEMU cannot forward port {port} of this machine to lab {lab.name}: {answer.strip()}", "run the demo again"
        )
