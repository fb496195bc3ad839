"""The confinement of QEMU and of the manager by the real kernel, systemd and libvirt."""

from __future__ import annotations

from typing import Any

import pytest

from tests.lab.conftest import LabHost

FORBIDDEN = (
    "echo x > /proc/sys/kernel/core_pattern",
    "echo h > /proc/sysrq-trigger",
    "echo x > /sys/kernel/uevent_helper",
    "echo 0 > /sys/kernel/mm/ksm/run",
    "echo 1 > /sys/devices/system/cpu/cpu1/online",
    "test -s /proc/kcore",
    "ls /sys/kernel/debug/*",
    *(f"cp /bin/true {folder}/x && {folder}/x" for folder in ("/var/lib/nohype", "/var/log/nohype", "/run/nohype", "/tmp")),
)


def test_qemu_is_confined(host: LabHost, guests: list[dict[str, Any]]) -> None:
    for guest in guests:
        pid = host.run(f"cat /run/libvirt/qemu/{guest['name']}.pid").stdout.strip()
        assert "\nSeccomp:\t2\n" in host.run(f"cat /proc/{pid}/status").stdout
        profile = host.run(f"cat /proc/{pid}/attr/current").stdout.strip()
        assert profile.startswith("libvirt-")
        assert profile.endswith(" (enforce)")
        limits = host.run(f"cd {host.scope(guest['name'])} && cat memory.max memory.swap.max pids.max").stdout.split()
        assert limits == [str(4 << 30), "0", "2048"]
    weights = "cat /sys/fs/cgroup/system.slice/cpu.weight /sys/fs/cgroup/machine.slice/cpu.weight"
    assert host.run(weights).stdout.split() == ["1000", "100"]
    assert "DENIED" not in host.run("journalctl --boot --no-pager --grep 'apparmor=.DENIED.*libvirt-'", check=False).stdout


@pytest.mark.parametrize("command", FORBIDDEN)
def test_manager_sandbox_refuses_command(host: LabHost, command: str) -> None:
    """Tried as root in the manager's mount namespace, not outside of it, where some commands would do harm."""
    pid = host.run("systemctl show --property MainPID --value nohyped").stdout.strip()
    clean = "rm -f /var/lib/nohype/x /var/log/nohype/x /run/nohype/x /tmp/x"
    try:
        assert host.run(f"nsenter --mount --target {pid} sh -c '{command}'", check=False).status
    finally:
        host.run(f"nsenter --mount --target {pid} {clean}")


@pytest.mark.usefixtures("guests")
def test_stopped_manager_leaves_one_ledger_file(host: LabHost) -> None:
    with host.changed("systemctl stop nohyped.socket nohyped.service", "systemctl start nohyped.socket nohyped.service"):
        files = host.run("ls /var/lib/nohype").stdout.split()
        assert {"ledger.sqlite", "ledger.sqlite.lock", "ledger.sqlite.reserve"} <= set(files)
        assert [name for name in files if name.startswith("ledger.sqlite-")] == [], "-wal, -shm or -journal"
    assert len(host.nohype("guest", "list").stdout.splitlines()) == 3
