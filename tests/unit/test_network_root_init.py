"""What /init of the Debian images reports if its network disk cannot be used, from output of real servers.

Runs the functions of the script with sh, and busybox's applets as programs of this machine.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from orchestrator.console import format_tail

INIT = Path(__file__).parents[2] / "guest-images/debian/init"
HOST_NQN = "nqn.2014-08.org.nvmexpress:uuid:11111111-2222-4333-8444-555555555555"
LONG = "nqn.2026-11.example:" + "x" * 203
# From here on the script acts; before it are only functions and constants.
_FIRST_ACTION = "busybox mount -t devtmpfs"
_STUBS = """
busybox() { case $1 in dmesg) echo "$LOG" ;; *) "$@" ;; esac; }
say() { echo "nohype: $*"; }
fail_for_now() { say "error boot $*"; exit; }
target_nic=1 address=10.9.0.31/24 host=10.9.0.100 port=4420
"""
REFUSED_LOGIN = """\
iscsistart: version 2.1.11
iscsistart: Login failed to authenticate with target iqn.2026-11.example:netroot
iscsistart: session 1 login rejected: Initiator failed authentication with target
iscsistart: Connection1:0 to [target: iqn.2026-11.example:netroot, portal: 10.9.0.1,3260] through [iface: default] is shutdown.
iscsistart: initiator reported error (24 - iSCSI login failed due to authorization failure)
"""
NO_SERVER = """\
iscsistart: version 2.1.11
iscsistart: connect to 10.9.0.1:3261 failed (Connection refused)
iscsistart: connect to 10.9.0.1:3261 failed (Connection refused)
iscsistart: initiator reported error (8 - connection timed out)
"""


def run(script: str, folder: Path | str = "/", **values: str) -> subprocess.CompletedProcess[str]:
    functions, _, _ = INIT.read_text().partition(_FIRST_ACTION)
    argv = ["sh", "-c", f"{functions}\n{_STUBS}\n{script}"]
    return subprocess.run(argv, cwd=folder, env={"PATH": "/usr/bin:/bin", **values}, capture_output=True, text=True, timeout=30)


def report(explain: str, problem: str, target: str, *, log: str = "", secret: str = "", initiator: str = HOST_NQN) -> list[str]:
    values = {"problem": problem, "LOG": log, "secret": secret, "user": "", "target": target, "initiator": initiator}
    return run(f"{explain}\nfail_to_connect", **values).stdout.splitlines()


def connect_failed(status: int) -> str:
    """Of the kernel's log; bit 14 is `do not retry`."""
    return f"[    3.1] nvme nvme0: failed to connect queue: 0 ret={status}\n[    3.2] clocksource: Switched"


NVME = {
    "wrong secret": ("Key was rejected by service", "", "the target refused the secret"),
    "no secret": ("Required key not available", "", "the target requires a secret"),
    "unknown name": ("Input/output error", connect_failed(0x4182), "the target does not know the disk"),
    "another initiator": ("Input/output error", connect_failed(0x4184), "the target does not allow the guest"),
    "busy": ("Input/output error", connect_failed(0x4181), "the target has no free controller"),
    "another status": ("Input/output error", connect_failed(0x4006), "Input/output error, status 16390"),
    "another error": ("Input/output error", "", "Input/output error, status unknown"),
    "no server": ("Connection refused", "", "Connection refused"),
    "silent server": ("Resource temporarily unavailable", "", "the server accepted the connection, but did not answer"),
}


@pytest.mark.parametrize("case", NVME)
def test_nvme_login_that_fails_has_a_reason_and_a_hint(case: str) -> None:
    problem, log, reason = NVME[case]
    lines = report("explain_nvme", problem, "nvme-tcp://10.9.0.100:4420/nqn.2026-11.example:web", log=log)
    assert lines[0] == "nohype: error boot cannot connect to nvme-tcp://10.9.0.100:4420/nqn.2026-11.example:web"
    assert lines[1].startswith(f"nohype: error boot {reason}")
    assert lines[2].startswith("nohype: error boot hint: ")


ISCSI = {
    "wrong secret": (REFUSED_LOGIN, "another-secret", "the target refused the secret"),
    "no secret": (REFUSED_LOGIN, "", "the target requires a secret"),
    "another initiator": (REFUSED_LOGIN.replace("authentication", "authorization"), "", "the target does not allow the guest"),
    "unknown name": ("iscsistart: session 1 login rejected: target not found (02/03)", "", "the target does not know the disk"),
    "no server": (NO_SERVER, "", "connect to 10.9.0.1:3261 failed (Connection refused)"),
    "killed after 60 s": ("iscsistart: version 2.1.11\n", "", "the server did not answer within 60 s"),
}


@pytest.mark.parametrize("case", ISCSI)
def test_iscsi_login_that_fails_has_a_reason_and_a_hint(case: str) -> None:
    problem, secret, reason = ISCSI[case]
    lines = report("explain_iscsi", problem, "iscsi://10.9.0.1:3260/iqn.2026-11.example:netroot/1", secret=secret)
    assert lines[1].startswith(f"nohype: error boot {reason}")
    assert lines[2].startswith("nohype: error boot hint: ")


def test_names_of_any_length_leave_the_reason_visible() -> None:
    """Error messages show 200 characters of a line of the console."""
    lines = report("explain_nvme", "Connection refused", f"nvme-tcp://10.9.0.100:4420/{LONG}", initiator=LONG)
    shown = format_tail("\n".join(lines).encode())
    assert "Connection refused" in shown
    assert "hint: check that the server offers the disk" in shown


@pytest.mark.parametrize(
    ("state", "there"),
    [
        ("running", True),
        ("blocked", True),
        ("live", True),
        ("connecting", True),
        ("offline", False),
        ("transport-offline", False),
    ],
)
@pytest.mark.parametrize("name", ["sda", "sda1"])
def test_disk_is_gone_when_it_is_offline(tmp_path: Path, name: str, state: str, there: bool) -> None:
    (tmp_path / "disk/sda/device").mkdir(parents=True)
    (tmp_path / "disk/sda/device/state").write_text(f"{state}\n")
    (tmp_path / "disk/sda/sda1").mkdir()
    (tmp_path / "class").mkdir()
    for link, disk in (("sda", "sda"), ("sda1", "sda/sda1")):
        (tmp_path / "class" / link).symlink_to(tmp_path / "disk" / disk)
    assert (run(f"has_disk {name}", tmp_path / "class").returncode == 0) == there


def test_disk_is_gone_when_the_kernel_has_removed_it(tmp_path: Path) -> None:
    assert run("has_disk nvme0n1", tmp_path).returncode == 1
    (tmp_path / "nvme0n1").mkdir()
    assert run("has_disk nvme0n1", tmp_path).returncode == 0


def test_disk_is_found_when_the_root_has_no_paths_any_more(tmp_path: Path) -> None:
    """The watch stays in the archive, from which /dev is moved away: nothing may be opened there."""
    (tmp_path / "sda/device").mkdir(parents=True)
    (tmp_path / "sda/device/state").write_text("running\n")
    functions, _, _ = INIT.read_text().partition(_FIRST_ACTION)
    script = functions.replace(" /dev/", f" {tmp_path}/gone/") + "\nhas_disk sda"
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_watch_has_its_files_before_the_second_process_begins(tmp_path: Path) -> None:
    """Meanwhile the first one moves /dev, /proc and /sys away: then the watch has no folder, or writes to another file."""
    functions, _, _ = INIT.read_text().partition(_FIRST_ACTION)
    (tmp_path / "sys/class/block").mkdir(parents=True)
    for name in ("dev/console", "dev/null", "proc/sysrq-trigger"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("/never", "/dev/console", "/dev/null", "/proc/sysrq-trigger", "/sys/class/block"):
        functions = functions.replace(f" {name}", f" {tmp_path}{name}")
    moved = f"busybox mv {tmp_path}/dev {tmp_path}/proc {tmp_path}/sys {tmp_path}/moved"
    late = 'eval "slow() { $(declare -f watch_disk | sed 1d); }"; watch_disk() { sleep 0.5; slow; }'
    script = f"{functions}\n{_STUBS}\n{late}\nread() {{ sleep 0.1; }}\ndevice=/dev/gone target=disk; mkdir {tmp_path}/moved\n"
    subprocess.run(["bash", "-c", f"{script}start_watch && {moved}; wait"], check=True, timeout=30)
    assert (tmp_path / "moved/proc/sysrq-trigger").read_text() == "b\n"
    assert "the disk disk is gone" in (tmp_path / "moved/dev/console").read_text()
