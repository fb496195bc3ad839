"""The lab itself, with the real QEMU: the machine matches its spec, and nothing of it is left behind."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.errors import LabLost, ShellError
from orchestrator.host import netlink
from orchestrator.images.build import build_image
from orchestrator.images.cache import cache_folder
from orchestrator.images.recipe import recipes_folder
from orchestrator.lab import accel, control, switch
from orchestrator.lab import lab as labs
from orchestrator.lab.build import build_tools
from orchestrator.lab.health import check_cpus
from orchestrator.lab.keys import make_key
from orchestrator.lab.paths import LabDir, find_state
from orchestrator.lab.progress import Timeline
from orchestrator.lab.qmp import ask
from orchestrator.lab.start import build_parts
from orchestrator.ssh import ShellTimeout, connect
from tests.lab.conftest import LabHost

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
UP = """
import sys
from pathlib import Path
from orchestrator.lab.accel import Accel
from orchestrator.lab.control import LabParts, up
from orchestrator.lab.progress import Timeline
from orchestrator.lab.spec import LabImage, load_spec
name, spec, tools, kernel, initrd, root = sys.argv[1:]
image = LabImage(Path(kernel), Path(initrd), Path(root), "")
up(name, LabParts(load_spec(spec), image, Path(tools), Accel(kvm=False, reason="test")), Timeline())
"""


def test_processors_and_memory_match_the_spec(host: LabHost) -> None:
    spec = host.lab.state.spec
    fields = {item["field"]: item["data"] for item in json.loads(host.run("lscpu --json --hierarchic=never").stdout)["lscpu"]}
    assert fields["CPU(s):"] == str(spec.cpus)
    assert fields["Socket(s):"] == str(spec.sockets)
    assert fields["Core(s) per socket:"] == str(spec.cores)
    assert fields["Thread(s) per core:"] == str(spec.threads)
    assert fields["NUMA node(s):"] == str(spec.nodes)
    for node in range(spec.nodes):
        folder = f"/sys/devices/system/node/node{node}"
        assert host.run(f"cat {folder}/cpulist").stdout.strip() == str(spec.node_cpus(node))
        assert host.run(f"cat {folder}/hugepages/hugepages-2048kB/nr_hugepages").stdout.strip() == str(spec.hugepages_per_node)
    assert host.run("cat /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages").stdout.strip() == str(spec.gigantic_pages)
    assert host.run("cat /sys/devices/system/cpu/isolated").stdout.strip() == str(spec.guest_cpus)


def test_machine_supports_device_passthrough(host: LabHost) -> None:
    assert "Enabled IRQ remapping" in host.run("dmesg").stdout
    assert host.run("ls /sys/kernel/iommu_groups | wc -l").stdout.strip() != "0"
    assert host.run("grep -cwE 'svm|vmx' /proc/cpuinfo", check=False).stdout.strip() == str(host.lab.state.spec.cpus)
    nic = host.run("basename $(readlink -f /sys/class/net/nic0/device)").stdout.strip()
    assert host.run(f"cat /sys/bus/pci/devices/{nic}/numa_node /sys/bus/pci/devices/{nic}/sriov_totalvfs").stdout.split() == [
        "0",
        "7",
    ]


def test_each_disk_has_its_own_nvme_controller(host: LabHost) -> None:
    spec = host.lab.state.spec
    found = host.run("cat /sys/class/nvme/nvme*/serial").stdout.split()
    assert sorted(found) == [f"nohype-disk{index}" for index in range(len(spec.disks))]
    for index in range(len(spec.disks)):
        line = f"cat $(dirname $(grep -l nohype-disk{index} /sys/class/nvme/nvme*/serial))/device/numa_node"
        assert host.run(line).stdout.strip() == str(index % spec.nodes)


def test_emulator_memory_is_within_limit(host: LabHost) -> None:
    # A machine with 8 GB must suffice.
    memory = labs.read_status(host.lab.name).memory
    assert memory is not None
    assert memory <= 5 * GIB


def test_only_the_labs_own_host_key_is_accepted(host: LabHost) -> None:
    with pytest.raises(ShellError, match="presented the host key .*, expected "):
        connect("127.0.0.1", host.lab.state.port, key=host.lab.folder.key, host_key=make_key().public)
    offered = host.run("sshd -T | grep -i ^hostkey").stdout.split()
    assert [word for word in offered if word.startswith("/")] == ["/etc/ssh/ssh_host_ed25519_key"]


def test_timed_out_command_is_killed_in_the_lab(host: LabHost) -> None:
    with pytest.raises(ShellTimeout):
        host.run("sleep 98765", timeout=3)
    assert host.run("pgrep --full 'sleep [9]8765'", check=False).status == 1


def test_uploaded_file_is_complete(host: LabHost, tmp_path: Path) -> None:
    source = tmp_path / "data"
    source.write_bytes(os.urandom(2 << 20))
    with host.lab.shell() as shell:
        shell.put(source, "/root/data")
    assert host.run("sha256sum /root/data; rm /root/data").stdout.split()[0] == hashlib.sha256(source.read_bytes()).hexdigest()


def test_link_down_is_visible_in_the_lab(host: LabHost) -> None:
    def carrier() -> str:
        return host.run("cat /sys/class/net/nic0/carrier").stdout.strip()

    _wait_until(lambda: carrier() == "1", "there is a carrier: an earlier test can have reset the NIC")
    ask(host.lab.folder.qmp, "set_link", arguments={"name": "data", "up": False})
    try:
        _wait_until(lambda: carrier() == "0", "the carrier is gone")
    finally:
        ask(host.lab.folder.qmp, "set_link", arguments={"name": "data", "up": True})
    _wait_until(lambda: carrier() == "1", "the carrier is back")


@pytest.fixture
def booting(host: LabHost) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A second lab that has just started to boot, and the `up` that waits for it."""
    name = f"{host.lab.name[:16]}-b"
    spec = host.lab.state.spec
    tools, image = build_parts(spec, Timeline())
    before = image.root.stat()
    words = [name, spec.name, str(tools), str(image.kernel), str(image.initrd), str(image.root)]
    process = subprocess.Popen([sys.executable, "-c", UP, *words], cwd=ROOT, start_new_session=True)
    try:
        _wait_until(lambda: LabDir(name).console.exists() and LabDir(name).console.stat().st_size, "the kernel prints something")
        yield name, process
    finally:
        process.kill()
        process.wait()
        control.down(name)
    after = image.root.stat()
    assert (after.st_mtime, after.st_blocks) == (before.st_mtime, before.st_blocks), "a lab wrote to the image it boots from"


def test_killed_up_kills_the_emulator(booting: tuple[str, subprocess.Popen[bytes]]) -> None:
    name, process = booting
    qemu = _qemu(name)
    process.kill()
    _wait_until(lambda: not _lives(qemu), "QEMU is gone")
    _wait_until(lambda: not LabDir(name).lock.exists(), "the keeper is gone")
    assert not netlink.netns_exists(switch.netns_of(name))
    assert not LabDir(name).path.exists()


def test_killed_keeper_kills_the_emulator(booting: tuple[str, subprocess.Popen[bytes]]) -> None:
    name, _ = booting
    qemu = _qemu(name)
    state = find_state(LabDir(name))
    assert state
    os.kill(state.pid, signal.SIGKILL)
    _wait_until(lambda: not _lives(qemu), "QEMU is gone")
    control.down(name)
    assert not netlink.netns_exists(switch.netns_of(name))
    assert not [line for line in Path("/proc/self/mounts").read_text().splitlines() if name in line]


def _qemu(name: str) -> int:
    _wait_until(lambda: find_state(LabDir(name)), "the keeper has written its state")
    state = find_state(LabDir(name))
    assert state
    assert _lives(state.qemu)
    return state.qemu


def _lives(pid: int) -> bool:
    return b"qemu-system-x86_64" in Path(f"/proc/{pid}/cmdline").read_bytes() if Path(f"/proc/{pid}").exists() else False


def _wait_until(condition: Callable[[], object], what: str, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.1)


@pytest.mark.soak
def test_kvm_probe_accepts_a_working_kernel(host: LabHost, monkeypatch: pytest.MonkeyPatch) -> None:
    # The same boot under emulation, where it works: a refusal would not be due to KVM.
    words = {"kvm": "tcg", "host": "max", "q35,kernel-irqchip=split": "q35"}
    monkeypatch.setattr(accel, "PROBE_ARGV", [words.get(word, word) for word in accel.PROBE_ARGV])
    image = build_image(recipes_folder(), "minimal", cache_folder(), progress=lambda _: None)
    tools = build_tools(cache_folder())
    found = accel.probe_kvm(accel.Probe(tools, image / "vmlinuz", image / "initrd"), timeout=180)
    assert found == accel.Accel(kvm=True, reason="a kernel boots under KVM and reports svm")


@pytest.mark.soak
def test_stopped_cpu_is_reported_as_lost_lab(host: LabHost) -> None:
    check_cpus(host.lab)
    online = "/sys/devices/system/cpu/cpu7/online"
    with host.changed(f"echo 0 > {online}", f"echo 1 > {online}"):
        with pytest.raises(LabLost, match="(?s)CPUs 7 stopped executing.*local APIC state for CPU 7"):
            check_cpus(host.lab)
    check_cpus(host.lab)
