"""Real munge, slurmctld and slurmd in namespaces of their own, with one manager on a fake host behind each host of the fleet."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestrator.fleet.configuration import Address, build_common, build_gres_lines, build_node_lines, build_start
from orchestrator.fleet.node import FleetNode, build_nodes, find_host
from orchestrator.host.pci import DEVICES
from orchestrator.host.run import Completed, run
from orchestrator.waiting import wait_until
from tests.harness.fleet_manager import SERVER, ManagerProcess
from tests.harness.slurm_root import HERE, System, build_system, hold_root

USER = "nohype-fleet"
"""The account that submits guests."""
STEPS_LOG = "/var/log/slurm/steps.log"
"""What the steps print; on a real host syslog has it."""
_CONTROLLER, _ADDRESS = "controller", "10.77.0.1"


@dataclass
class FleetHost:
    """A host of the fleet: its manager, and the nodes that it is for Slurm."""

    name: str
    address: str
    served: ManagerProcess
    nodes: tuple[FleetNode, ...]


class Cluster:
    """Daemons can be killed and started again.

    Args:
        folder: has its files.
        hosts: those of the fleet.
        program: words that run nohype.
    """

    def __init__(self, holder: int, folder: Path, hosts: Sequence[FleetHost], program: Sequence[str] = ()) -> None:
        self.folder, self.hosts, self._program = folder, tuple(hosts), program
        self._root = folder / "root"
        self._enter = ("nsenter", f"--target={holder}", "--mount", "--net", "--pid", "--uts", "chroot", str(self._root))

    def run(self, *words: str | Path, check: bool = True, timeout: float = 120, input: str = "") -> Completed:
        """As root."""
        return run([*self._enter, *words], check=check, timeout=timeout, input=input)

    def open(self, *words: str | Path) -> subprocess.Popen[str]:
        """Starts a program, as root, whose input and output are pipes. To end it, close its input: nsenter is its parent."""
        return subprocess.Popen([*self._enter, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def nohype(self, *words: str, check: bool = True, timeout: float = 300, input: str = "") -> Completed:
        """As the account that submits guests."""
        argv = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", *self._program, *words]
        return self.run(*argv, check=check, timeout=timeout, input=input)

    def manage(self, *words: str, host: str = "host1", check: bool = True) -> Completed:
        """As root on a host of the fleet."""
        folders = ("--records", f"/var/lib/nohype/fleet-{host}") if "orphans" in words else ()
        settings = (f"NOHYPE_SOCKET=/run/nohype/{host}.sock", f"PYTHONPATH={Path.cwd()}")
        return self.run("env", *settings, *self._program, *words, *folders, check=check)

    def read_version(self) -> str:
        return self.run("sinfo", "--version").stdout.strip()

    def start(self) -> None:
        self.run("setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "/usr/sbin/munged", "--force")
        self.run("install", "--mode=0666", "/dev/null", STEPS_LOG)
        self.start_controller()
        for node in self.node_names():
            self.start_slurmd(node)

    def start_controller(self) -> None:
        self.run("slurmctld")
        self.wait_for(lambda: self.run("scontrol", "ping", check=False).stdout.count(" UP") == 1, "the controller")

    def start_slurmd(self, node: str, munge: str = "/run/munge", skew: str = "", small: str = "") -> None:
        """In the network namespace of its host.

        Args:
            munge: folder with the socket of the munged that it uses.
            skew: what its clock differs, such as "+120s".
            small: folder that is an empty disk of 1 MiB for it.
        """
        disk = f"mkdir -p {small} && mount -t tmpfs -o size=1M tmpfs {small} &&" if small else ""
        script = f"{disk} mount --bind {munge} /run/munge && exec {_fake_clock(skew)} slurmd -N {node}"
        self.run("nsenter", f"--net=/run/netns/{find_host(node)}", "unshare", "--mount", "sh", "-c", script)

    def run_beside_slurmd(self, node: str, script: str) -> Completed:
        """Runs a shell script that sees the files as this slurmd does."""
        return self.run(
            "sh", "-c", f'exec nsenter --target="$(cat /run/slurmd.{node}.pid)" --mount --root sh -c "$0"', script, check=False
        )

    def start_munge(self, name: str, key: bytes = b"", skew: str = "") -> str:
        """Starts a munged as another host has it; returns the folder of its socket. ``key``: instead of that of the fleet."""
        folder = f"/run/munge-{name}"
        self.run("install", "--directory", "--owner=munge", "--mode=0755", folder)
        self.run("install", "--owner=munge", "--mode=0400", "/etc/munge/munge.key", f"{folder}/key")
        if key:
            self.run("sh", "-c", f"cat > {folder}/key", input=key.hex())
        files = [f"--{file}={folder}/{file}" for file in ("key-file", "pid-file", "log-file", "seed-file")]
        files[0] = f"--key-file={folder}/key"
        words = f"{_fake_clock(skew)} munged --force --socket={folder}/munge.socket.2 {' '.join(files)}"
        self.run("setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "sh", "-c", words)
        return folder

    def cut(self, host: FleetHost) -> None:
        """Takes the network from a host; its programs keep running."""
        self.run("ip", "link", "set", host.name, "down")

    def mend(self, host: FleetHost) -> None:
        self.run("ip", "link", "set", host.name, "up")
        self.run("ip", "route", "add", host.address, "dev", host.name, "src", _ADDRESS)

    def kill_host(self, host: FleetHost) -> None:
        """Kills all programs of Slurm on a host. The manager and the guests keep running."""
        script = f'while pids=$(ip netns pids {host.name}); [ -n "$pids" ]; do kill -9 $pids 2>/dev/null; sleep 0.05; done'
        self.run("sh", "-c", script)

    def forget_jobs(self) -> None:
        """Kills the controller, and starts one that knows no job, as on a new machine."""
        self.kill_controller()
        self.run("sh", "-c", "rm -rf /var/lib/slurm/slurmctld/*")
        self.start_controller()

    def kill_controller(self) -> None:
        self._kill("/run/slurmctld.pid")

    def kill_slurmd(self, node: str) -> None:
        self._kill(f"/run/slurmd.{node}.pid")

    def find_processes(self, pattern: str) -> list[str]:
        """Ids, within the cluster, of the processes whose command line has this pattern."""
        return self.run("pgrep", "-f", pattern, check=False).stdout.split()

    def node_names(self) -> list[str]:
        return [node.name for host in self.hosts for node in host.nodes]

    def node_states(self) -> dict[str, str]:
        text = self.run("sinfo", "--Node", "--noheader", "--format=%N %T").stdout
        return dict(line.split() for line in text.splitlines())

    def guests(self) -> dict[str, list[str]]:
        """The hosts on which each guest runs, from their hypervisors, not from the manager or Slurm."""
        found: dict[str, list[str]] = {}
        for host in self.hosts:
            for name in host.served.world.hypervisor.running_names():
                found.setdefault(name, []).append(host.name)
        return found

    def wait_for(self, condition: Callable[[], object], what: str, timeout: float = 60) -> None:
        assert wait_until(condition, timeout=timeout, interval=0.2), f"{what}: not within {timeout:g} s\n{self.describe()}"

    def describe(self) -> str:
        """For a failed test."""
        texts = [
            self.run(*words, check=False).stdout for words in (("squeue", "--states=all"), ("sinfo", "-N", "-l"), ("sinfo", "-R"))
        ]
        texts.append(self.run("sh", "-c", "tail -n 25 /var/log/slurm/*.log", check=False).stdout)
        return "\n".join([str(self.guests()), *texts])

    def jobs(self) -> dict[str, list[str]]:
        """The nodes of the running jobs, by the name of the guest."""
        found: dict[str, list[str]] = {}
        for line in self.run("squeue", "--noheader", "--states=running", "--format=%j %N").stdout.splitlines():
            name, node = line.split()
            found.setdefault(name, []).append(node)
        return found

    def resume(self) -> None:
        """Returns drained nodes to use. The state of one may change meanwhile."""
        for node, state in self.node_states().items():
            if "drain" in state:
                self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)

    def find_violations(self) -> list[str]:
        """What a hypervisor has seen that must not happen, such as a core that is given twice."""
        return [f"{host.name}: {violation}" for host in self.hosts for violation in host.served.world.host.violations()]

    def find_records(self) -> list[str]:
        """Files of the jobs that have not ended on their hosts."""
        return self.run("sh", "-c", "ls /var/lib/nohype/fleet-*/*.json", check=False).stdout.split()

    def wait_idle(self, timeout: float = 120) -> None:
        """Until all nodes can have guests and have none."""
        self.wait_for(lambda: set(self.node_states().values()) == {"idle"}, "the nodes are idle", timeout)

    def _kill(self, file: str) -> None:
        script = f"pid=$(cat {file}); kill -9 $pid; while kill -0 $pid 2>/dev/null; do sleep 0.02; done"
        self.run("sh", "-c", script)


def _fake_clock(skew: str) -> str:
    library = "$(echo /usr/lib/*/faketime/libfaketime.so.1)"
    return f"env LD_PRELOAD={library} FAKETIME={skew} DONT_FAKE_MONOTONIC=1" if skew else ""


@contextmanager
def running(folder: Path, count: int = 2, release: str = HERE) -> Iterator[Cluster]:
    """A fleet of ``count`` hosts in the empty ``folder``, which is on a file system that can be the upper layer of an overlay.

    Args:
        release: whose Slurm, see `slurm_root`.
    """
    system = build_system(release)
    for name in ("etc", "run"):
        (folder / name).mkdir()
    with ExitStack() as stack:
        hosts = [stack.enter_context(_serve_host(folder, number)) for number in range(count)]
        _configure(folder, hosts, system)
        devices = sorted({str(vf) for host in hosts for node in host.nodes for vf in node.vfs})
        holder = stack.enter_context(hold_root(folder, devices, {host.name: host.address for host in hosts}, system))
        cluster = Cluster(holder, folder, hosts, system.program)
        cluster.start()
        cluster.wait_for(lambda: set(cluster.node_states().values()) == {"idle"}, "the nodes")
        yield cluster


@contextmanager
def _serve_host(folder: Path, number: int) -> Iterator[FleetHost]:
    name = f"host{number + 1}"
    (folder / name).mkdir()
    manager = ManagerProcess(folder / name, folder / "run" / f"{name}.sock")
    for pf in ("0000:10:00.0", "0000:14:00.0"):  # as an operator creates them when the host boots
        manager.world.host.write(f"{DEVICES}/{pf}/sriov_numvfs", str(SERVER.vfs))
    manager.start()
    try:
        yield FleetHost(name, f"10.77.0.{number + 11}", manager, build_nodes(manager.client.host(), name))
    finally:
        manager.stop()


def _configure(folder: Path, hosts: Sequence[FleetHost], system: System) -> None:
    common = build_common(f"{_CONTROLLER}({_ADDRESS})", USER)
    # The hosts have more cores than this machine, and are one machine, of one name.
    common += "SlurmdParameters=config_overrides\n"
    common = common.replace("KillWait=30", "KillWait=5").replace("SlurmdTimeout=30", "SlurmdTimeout=20")
    common = common.replace("HealthCheckInterval=60", "HealthCheckInterval=10")
    nodes = "".join(
        build_node_lines(host.nodes, Address(_CONTROLLER, host.address, 17000 + 10 * number)) for number, host in enumerate(hosts)
    )
    gres = "".join(build_gres_lines(host.nodes) for host in hosts)
    steps = {}
    for step in ("prolog", "job", "epilog", "check"):
        # One machine plays all hosts: the node's name selects the manager.
        steps[f"nohype-{step}"] = (
            f"#!/bin/sh\nhost=${{SLURMD_NODENAME%-n*}}\nexport NOHYPE_SOCKET=/run/nohype/$host.sock PYTHONPATH={Path.cwd()}\n"
            f"exec 2>> {STEPS_LOG}\n"
            f'echo "$(date -u +%T.%3N) $SLURMD_NODENAME: {step} of job $SLURM_JOB_ID" >&2\n'
            f"exec {' '.join(system.program)} fleet step {step} --host $host --page-size 2M"
            " --records /var/lib/nohype/fleet-$host\n"
        )
    names = "".join(f"{host.address} {host.name}\n" for host in hosts)
    files = {"etc/slurm.conf": common, "etc/nohype-nodes.conf": nodes, "etc/gres.conf": gres, "etc/nohype-start": build_start()}
    files |= {f"etc/{name}": text for name, text in steps.items()}
    files["hosts"] = f"127.0.0.1 localhost\n{_ADDRESS} {_CONTROLLER}\n{names}"
    for name, text in files.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
