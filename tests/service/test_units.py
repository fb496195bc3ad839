"""The manager's units as the role writes them: systemd reads them without a complaint, and the sandbox is as tight as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from orchestrator.host.run import Completed, run
from orchestrator.images.wheels import source_tree
from orchestrator.lab.ansible import build_environment, find_ansible

ROLE = source_tree() / "ansible/roles/nohype_host"
UNITS = ("nohyped.service", "nohyped.socket")
EXPOSURE = 33
"""Tenths of `systemd-analyze security`: 0 is tightest. What is left is in the unit's comments: CAP_SYS_ADMIN, NVMe disks."""
SANDBOX = {
    "ReadOnlyPaths": {"/sys", "/proc/sys", "-/proc/sysrq-trigger", "-/sys/devices/system", "-/sys/devices/virtual"},
    "ReadWritePaths": {
        "/sys/bus/pci",
        "/sys/devices",
        "/sys/fs/cgroup",
        "-/sys/kernel/tracing/instances",
        "-/sys/fs/resctrl",
        "-/proc/sys/kernel/watchdog_cpumask",
    },
    "InaccessiblePaths": {"-/proc/kcore", "-/proc/kallsyms", "-/sys/kernel/debug", "-/sys/fs/bpf"},
    "NoExecPaths": {"/", "/var/lib/nohype", "/var/log/nohype", "/run/nohype", "/tmp", "/var/tmp", "/dev/shm"},
    "ExecPaths": {"/usr", "/opt/nohype/bin", "/opt/nohype/lib"},
    "SystemCallFilter": {
        "@system-service",
        "~@privileged",
        "~@aio",
        "~@debug",
        "~process_vm_readv",
        "~process_vm_writev",
        "~kcmp",
    },
    "IPAddressDeny": {"any"},
    "SocketBindDeny": {"any"},
    "PrivateIPC": {"yes"},
    "KeyringMode": {"private"},
    "NoNewPrivileges": {"yes"},
    "ProtectSystem": {"strict"},
    "MemoryDenyWriteExecute": {"yes"},
}
"""What each setting holds at least; of a list that is denied, each word with its ~."""
WRITTEN = {"sys/bus/pci", "sys/devices", "sys/fs/cgroup", "proc/irq"}
"""Where code below `orchestrator/host` writes, by the words that its paths begin with."""


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the units, rendered by Ansible with the role's defaults."""
    return render(tmp_path_factory.mktemp("units"))


def render(folder: Path, **more: object) -> Path:
    """Renders the units into the folder; with further variables of the role."""
    tasks = [
        {"ansible.builtin.template": {"src": str(ROLE / f"templates/{unit}.j2"), "dest": str(folder / unit)}} for unit in UNITS
    ]
    play = {
        "hosts": "localhost", "gather_facts": False, "vars_files": [str(ROLE / "defaults/main.yml")],
        "tasks": tasks,
    }  # fmt: skip
    (folder / "play.yml").write_text(json.dumps([play]))
    variables = {"nohype_housekeeping_cpus": "0-1", "nohype_uplinks": [{"name": "nic0"}, {"name": "nic1"}], **more}
    argv = [find_ansible(), "--connection=local", "--inventory=localhost,", f"--extra-vars={json.dumps(variables)}"]
    run([*argv, folder / "play.yml"], env=build_environment(source_tree() / "ansible", folder / "home"))
    return folder


def read_unit(path: Path) -> dict[str, list[tuple[str, str]]]:
    """Sections of a unit, with their settings in order; a setting may be there several times."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in path.read_text().splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            key, equals, value = line.partition("=")
            assert equals, line
            section.append((key, value))
    return found


def analyze(*words: str | Path) -> Completed:
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd here")
    return run(["systemd-analyze", *words], check=False)


def test_systemd_understands_the_units(units: Path, tmp_path: Path) -> None:
    for unit in UNITS:
        # Only a manager that is installed could be found.
        (tmp_path / unit).write_text((units / unit).read_text().replace("/opt/nohype/bin/nohyped", "/bin/true"))
    done = analyze("verify", "--recursive-errors=no", *(tmp_path / unit for unit in UNITS))
    assert (done.status, done.stderr.strip()) == (0, "")


def test_the_sandbox_is_as_tight_as_it_was(units: Path) -> None:
    done = analyze("security", "--offline=true", f"--threshold={EXPOSURE}", units / "nohyped.service")
    assert done.status == 0, done.stdout


def read_words(settings: list[tuple[str, str]], key: str) -> set[str]:
    """All words of a list, of which ~ stands before each that is denied."""
    words: set[str] = set()
    for name, value in settings:
        if name == key:
            sign = "~" if value.startswith("~") else ""
            words |= {sign + word for word in value.removeprefix("~").split()}
    return words


@pytest.mark.parametrize("setting", SANDBOX)
def test_what_the_sandbox_forbids(units: Path, setting: str) -> None:
    words = read_words(read_unit(units / "nohyped.service")["Service"], setting)
    assert SANDBOX[setting] <= words


def test_what_the_manager_can_write_it_can_not_run(units: Path) -> None:
    """Of a mount below another NoExecPaths= does not hold: each folder that can be written is one."""
    settings = read_unit(units / "nohyped.service")["Service"]
    assert not read_words(settings, "ExecPaths") & read_words(settings, "NoExecPaths")
    given = dict(settings)
    folders = {f"/var/lib/{given['StateDirectory']}", f"/var/log/{given['LogsDirectory']}", f"/run/{given['RuntimeDirectory']}"}
    assert folders <= read_words(settings, "NoExecPaths")


def test_the_manager_may_write_where_it_writes_and_nowhere_else(units: Path) -> None:
    settings = read_unit(units / "nohyped.service")["Service"]
    kernel = {path for path in read_words(settings, "ReadWritePaths") if path.startswith(("/sys", "/proc"))}
    # ReadOnlyPaths= has no /proc as a whole: /proc/irq is written, and must not be there.
    assert kernel | {"/proc/irq"} == {f"/{path}" for path in WRITTEN}
    assert not {"/proc", "/proc/irq", "-/proc/irq"} & read_words(settings, "ReadOnlyPaths")


def test_volume_group_widens_the_sandbox_only_for_lvm(units: Path, tmp_path: Path) -> None:
    wider = read_unit(render(tmp_path, nohype_disks={"volume_group": "vg0"}) / "nohyped.service")["Service"]
    usual = read_unit(units / "nohyped.service")["Service"]
    added = [setting for setting in wider if setting not in usual]
    assert {setting for setting in usual if setting not in wider} == {("PrivateIPC", "yes")}
    assert {name for name, _ in added} == {"DeviceAllow", "ReadWritePaths", "NoExecPaths", "PrivateIPC"}
    assert read_words(added, "ReadWritePaths") == read_words(added, "NoExecPaths")
    assert "-/etc/lvm" not in read_words(added, "ReadWritePaths"), "lvm.conf names programs"
    done = analyze("security", "--offline=true", f"--threshold={EXPOSURE}", tmp_path / "nohyped.service")
    assert done.status == 0, done.stdout


def test_uplinks_come_before_the_manager(units: Path) -> None:
    unit = dict(read_unit(units / "nohyped.service")["Unit"])
    for key in ("Wants", "After"):
        assert {"nohype-uplink@nic0.service", "nohype-uplink@nic1.service"} <= set(unit[key].split())


def test_the_manager_can_be_started_again_without_harm(units: Path) -> None:
    """What makes guests, and the socket, outlive it."""
    service = dict(read_unit(units / "nohyped.service")["Service"])
    assert service["RuntimeDirectoryPreserve"] == "yes"
    assert service["Slice"] == "system.slice"
    assert "Delegate" not in service
    unit = dict(read_unit(units / "nohyped.service")["Unit"])
    assert unit["Requires"] == "nohyped.socket"
    assert not {"BindsTo", "PartOf"} & unit.keys()
    assert "libvirtd.service" not in unit["Requires"]


def test_the_socket_is_for_the_group_only(units: Path) -> None:
    socket = dict(read_unit(units / "nohyped.socket")["Socket"])
    assert (socket["SocketMode"], socket["SocketGroup"], socket["FileDescriptorName"]) == ("0660", "nohype", "nohyped")


def test_each_exception_says_what_it_is_for(units: Path) -> None:
    """A capability, and a protection that is off, has a comment on the line before."""
    lines = (units / "nohyped.service").read_text().splitlines()
    for index, line in enumerate(lines):
        if line.startswith("CapabilityBoundingSet=CAP") or (line.startswith("Protect") and line.endswith(("=no", "=default"))):
            assert lines[index - 1].startswith("#"), line


def test_nothing_is_set_twice_by_mistake(units: Path) -> None:
    lists = {"CapabilityBoundingSet", "SystemCallFilter", "ReadOnlyPaths", "DeviceAllow"}
    for unit in UNITS:
        for section, settings in read_unit(units / unit).items():
            keys = [key for key, _ in settings if key not in lists]
            assert len(keys) == len(set(keys)), (unit, section)
