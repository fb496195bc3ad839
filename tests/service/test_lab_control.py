"""Labs are started, used, stopped and killed, and nothing is left of them.

Keeper, locks, network namespace, tap, private mounts and death signals are real; only QEMU is a stand-in.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from orchestrator import ssh
from orchestrator.errors import Conflict, LabError, LabLost, NotFound, RequestError, ShellError, SwitchError
from orchestrator.host import netlink
from orchestrator.lab import control, switch
from orchestrator.lab import lab as labs
from orchestrator.lab.accel import Accel
from orchestrator.lab.keys import SWITCH_KEY
from orchestrator.lab.paths import LabDir, is_locked, take_lock
from orchestrator.lab.progress import Timeline
from orchestrator.lab.qemu import build_entry, data_mac
from orchestrator.lab.spec import LabImage, LabSpec, parse_spec
from orchestrator.model.switch import SshAddress, Switch, SwitchDriver
from orchestrator.ssh import ShellTimeout
from orchestrator.switches.commands import SshCommands
from orchestrator.switches.drivers import opened

pytestmark = [pytest.mark.netns, pytest.mark.timeout(120)]

ROOT = Path(__file__).parents[2]
SPEC = parse_spec(
    'sockets = 1\ncores = 2\nthreads = 1\nmemory = "2G"\nhugepages_per_node = 64\nvfs = 2\ndisks = ["1M"]\n',
    name="tiny",
    source="test",
)
EMULATED = Accel(kvm=False, reason="test")
UP = """
import sys
from pathlib import Path
from tests.service.test_lab_control import SPEC, start
start(sys.argv[1], Path(sys.argv[2]), spec=SPEC.model_copy(update={"tpm": "tpm" in sys.argv[3:]}))
print("up", flush=True)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts the stand-in for QEMU on the PATH; the returned function sets its mode."""
    program = tmp_path / "bin" / "qemu-system-x86_64"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/fakes/qemu.py "$@"\n')
    program.chmod(0o755)
    for name in ("vmlinuz", "initrd", "root.raw"):
        (tmp_path / name).write_text("not read\n")
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", "")
    return lambda mode: monkeypatch.setenv("STAND_IN", mode)


@pytest.fixture
def name(tmp_path: Path) -> Iterator[str]:
    """A unique name; the lab is removed after the test."""
    found = f"t{os.getpid()}-{int(time.monotonic() * 1000) % 100000}"
    yield found
    control.down(found, timeout=3)
    assert_nothing_left(found)


def start(name: str, tmp_path: Path, *, boot_timeout: float = 30, switch_of: str = "", spec: LabSpec = SPEC) -> labs.Lab:
    """Starts a lab whose tools root is this machine's own root."""
    return control.up(name, parts(tmp_path, spec), Timeline(), boot_timeout=boot_timeout, switch_of=switch_of)


def parts(tmp_path: Path, spec: LabSpec = SPEC) -> control.LabParts:
    image = LabImage(tmp_path / "vmlinuz", tmp_path / "initrd", tmp_path / "root.raw", "quiet")
    return control.LabParts(spec, image, Path("/"), EMULATED)


def start_in_background(name: str, tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    """`up` in its own process, which the test can kill. With the word "tpm", of a lab with a TPM."""
    return subprocess.Popen(
        [sys.executable, "-c", UP, name, str(tmp_path), *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], object], what: str, timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.05)


def processes_of(name: str) -> list[str]:
    """Command lines that name the lab: its keeper's and QEMU's."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it exited since the glob
            lines.append(path.read_bytes())
    return [
        line.replace(b"\0", b" ").decode()[:200]
        for line in lines
        if f"nohype-lab-{name},".encode() in line or b"keeper\0" + name.encode() in line
    ]


def assert_nothing_left(name: str) -> None:
    folder = LabDir(name)
    wait_until(lambda: not processes_of(name), f"{name} has no process")
    assert not netlink.netns_exists(switch.netns_of(name))
    assert not folder.path.exists()
    assert not folder.lock.exists()
    assert not [line for line in Path("/proc/self/mounts").read_text().splitlines() if name in line]


def test_lab_starts_runs_commands_and_leaves_nothing(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    lab = start(name, tmp_path)
    assert lab.state.timings.keys() == {"switch and emulator", "boot until SSH answers", "manager"}
    done = labs.execute(lab, ["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (done.status, done.stdout, done.stderr) == (7, "out\n", "err\n")
    status = labs.read_status(name)
    assert (status.condition, status.state) == ("up", lab.state)
    assert status.memory
    assert control.down(name) is True
    assert_nothing_left(name)
    assert control.down(name) is False


def test_commands_share_a_kept_connection(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    with labs.keeping_connection(start(name, tmp_path)) as lab:
        with lab.shell() as first:
            assert first.run("exit 3").status == 3
        assert labs.execute(lab, "exit 4").status == 4
        with lab.shell() as second:
            assert second is first
        first.close()
        assert labs.execute(lab, "exit 5").status == 5, "a lost connection is opened again"
        with lab.shell() as third:
            assert third is not first
    assert not third.is_open


def test_command_that_was_not_sent_is_sent_over_a_new_connection(
    name: str, tmp_path: Path, stand_in: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection was lost between the look at it and the command."""
    with labs.keeping_connection(start(name, tmp_path)) as lab:
        with lab.shell() as first:
            first.close()
        monkeypatch.setattr(ssh.Shell, "is_open", True)
        with pytest.raises(ssh.NotStarted, match="lost or refused"):
            first.run("exit 6")
        assert labs.execute(lab, "exit 6").status == 6
        monkeypatch.undo()
        with lab.shell() as second:
            assert second is not first


def test_switch_is_a_bridge_with_the_tap_as_hairpin_port(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    start(name, tmp_path)
    port = switch.port(name)
    assert netlink.read_hairpin(port.interface, port.netns)
    links = {link.name: link for link in netlink.read_links(netns=port.netns)}
    assert links[port.interface].master == switch.BRIDGE
    assert links[port.interface].up
    assert links[port.interface].carrier, "no process holds the tap"
    assert port.interface not in [link.name for link in netlink.read_links()]


def test_two_labs_run_at_the_same_time(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    other = f"{name}-b"
    try:
        first, second = start(name, tmp_path), start(other, tmp_path)
        assert first.state.port != second.state.port
        assert first.state.host_key != second.state.host_key
        control.down(name)
        assert labs.execute(second, "echo still here").stdout == "still here\n"
    finally:
        control.down(other)
    assert_nothing_left(other)


def test_second_up_is_refused_and_does_not_affect_the_lab(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    lab = start(name, tmp_path)
    with pytest.raises(Conflict, match=f"{name} is up since .*keeper process {lab.state.pid}"):
        start(name, tmp_path)
    with pytest.raises(Conflict):
        control.check_name_available(name)
    assert labs.execute(lab, "true").status == 0


def test_existing_namespace_is_refused_and_kept(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    netns = switch.netns_of(name)
    netlink.create_netns(netns)
    try:
        with pytest.raises(LabError, match=f"namespace {netns}.* exists already"):
            start(name, tmp_path)
        assert netlink.netns_exists(netns)
    finally:
        netlink.delete_netns(netns)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_up_leaves_nothing(name: str, tmp_path: Path, stand_in: Callable[[str], None], number: signal.Signals) -> None:
    stand_in("mute")
    up = start_in_background(name, tmp_path)
    wait_until(LabDir(name).state.exists, "QEMU runs")
    assert netlink.netns_exists(switch.netns_of(name))
    up.send_signal(number)
    up.communicate(timeout=20)
    wait_until(lambda: not LabDir(name).lock.exists(), "the keeper has cleaned up")
    assert_nothing_left(name)


def test_up_killed_after_ready_keeps_the_lab(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    up = start_in_background(name, tmp_path)
    out, err = up.communicate(timeout=40)
    assert out == "up\n", err
    assert labs.execute(labs.find_lab(name), "true").status == 0


def test_killed_keeper_kills_qemu_and_leftovers_are_removed(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    lab = start(name, tmp_path)
    os.kill(lab.state.pid, signal.SIGKILL)
    wait_until(lambda: not processes_of(name), "QEMU died with its keeper")
    with pytest.raises(LabLost, match="keeper was killed"):
        labs.find_lab(name)
    assert netlink.netns_exists(switch.netns_of(name))
    assert labs.read_status(name).condition == "lost"
    assert not netlink.netns_exists(switch.netns_of(name))
    again = start(name, tmp_path)
    assert labs.execute(again, "echo new").stdout == "new\n"


def test_failed_emulator_is_reported_with_its_output(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    stand_in("abort")
    lab = start(name, tmp_path)
    threading.Timer(0.5, lab.folder.path.joinpath("abort").touch).start()
    expected = r"the emulator failed, not the lab host: QEMU was killed by SIGABRT.*assertion failed: \(bql_locked\(\)\)"
    with pytest.raises(LabLost, match=expected):
        labs.execute(lab, ["sleep", "60"])
    with pytest.raises(LabLost, match="the emulator failed"):
        labs.find_lab(name)
    assert "the emulator failed" in labs.read_status(name).state.ended  # type: ignore[union-attr]
    assert not list(Path("/").glob("core*"))


def test_down_removes_leftovers_of_a_killed_keeper(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    os.kill(start(name, tmp_path).state.pid, signal.SIGKILL)
    assert control.down(name) is True
    assert_nothing_left(name)


def test_killed_lab_is_lost_not_a_failed_command(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    lab = start(name, tmp_path)
    with pytest.raises(LabLost, match="(?s)QEMU was killed by SIGKILL.*Linux version 6.12 of the stand-in"):
        labs.execute(lab, f"kill -KILL {lab.state.qemu}; sleep 60")
    wait_until(lambda: not is_locked(LabDir(name)), "the keeper has ended")
    status = labs.read_status(name)
    assert status.condition == "lost"
    assert status.state
    assert "QEMU was killed" in status.state.ended
    assert not netlink.netns_exists(switch.netns_of(name))
    with pytest.raises(LabLost):
        labs.find_lab(name)


def test_timed_out_command_is_not_a_lost_lab(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    lab = start(name, tmp_path)
    with pytest.raises(ShellTimeout, match="(?s)timed out after 3 s.*begun"):
        labs.execute(lab, "echo begun; sleep 60", timeout=3)
    assert labs.execute(lab, "true").status == 0


def test_hung_host_is_a_lost_lab_not_a_timeout(
    name: str, tmp_path: Path, stand_in: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labs, "RESPONSE_TIMEOUT", 2)
    lab = start(name, tmp_path)
    with pytest.raises(LabLost, match="the lab host does not respond"):
        labs.execute(lab, f"kill -STOP {lab.state.qemu}; sleep 60", timeout=3)
    os.kill(lab.state.qemu, signal.SIGCONT)


@pytest.mark.parametrize(
    ("mode", "text"), [("", "the state of its QEMU is running; gone"), ("full", "this machine's disk is full; gone")]
)
def test_lost_lab_reports_the_machine_state(
    name: str, tmp_path: Path, stand_in: Callable[[str], None], mode: str, text: str
) -> None:
    stand_in(mode)
    lab = start(name, tmp_path)
    with pytest.raises(LabLost, match=text), labs.raising_lab_lost(lab):
        raise ShellError("gone")


def test_emulator_that_does_not_start_is_reported_with_its_output(
    name: str, tmp_path: Path, stand_in: Callable[[str], None]
) -> None:
    stand_in("die")
    with pytest.raises(LabError, match="(?s)status 1.*not a valid device model name"):
        start(name, tmp_path)
    assert_nothing_left(name)


@pytest.mark.parametrize(
    ("mode", "text"), [("mute", "(?s)did not become ready in time.*Linux version"), ("panic", "(?s)QEMU exited.*Kernel panic")]
)
def test_failed_boot_is_reported_with_the_console(
    name: str, tmp_path: Path, stand_in: Callable[[str], None], mode: str, text: str
) -> None:
    stand_in(mode)
    with pytest.raises(LabError, match=text):
        start(name, tmp_path, boot_timeout=4)
    assert_nothing_left(name)


@pytest.mark.parametrize("mode", ["fail,mute", "fail"])
def test_emulator_failure_during_boot_is_a_lost_lab(
    name: str, tmp_path: Path, stand_in: Callable[[str], None], mode: str
) -> None:
    """Before SSH answers, and while the manager starts."""
    stand_in(mode)
    slow = tmp_path / "bin" / "systemctl"
    slow.write_text("#!/bin/sh\nsleep 5\n")
    slow.chmod(0o755)
    with pytest.raises(LabLost, match="cannot start lab .*: the emulator failed, not the lab host: QEMU was killed by SIGABRT"):
        start(name, tmp_path)
    assert_nothing_left(name)


def test_down_kills_after_the_timeout(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    stand_in("stubborn")
    lab = start(name, tmp_path)
    os.kill(lab.state.pid, signal.SIGSTOP)  # a hung keeper
    before = time.monotonic()
    assert control.down(name, timeout=1) is True
    assert time.monotonic() - before < 8
    assert_nothing_left(name)


def test_down_during_up_stops_both(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    stand_in("mute")
    up = start_in_background(name, tmp_path)
    wait_until(LabDir(name).state.exists, "QEMU runs")
    with pytest.raises(NotFound, match="still being started"):
        labs.find_lab(name)
    assert labs.read_status(name).condition == "starting"
    control.down(name)
    _, err = up.communicate(timeout=20)
    assert up.returncode
    assert "taken down while it was being started" in err


def test_busy_switch_is_removed_later(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    # A second mount on the namespace's file: unmounting once does not suffice.
    start(name, tmp_path)
    netns = switch.netns_of(name)
    subprocess.run(["mount", "--bind", "/proc/self/ns/net", f"/run/netns/{netns}"], check=True)
    control.down(name)
    assert_nothing_left(name)


def test_start_and_stop_require_root(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    start(name, tmp_path)
    for call in (f"control.down({name!r})", "control.check_name_available('other')", f"labs.read_status({name!r})"):
        code = f"import os; os.setuid(65534)\nfrom orchestrator.lab import control, lab as labs\n{call}"
        argv = [sys.executable, "-c", f"from orchestrator.lab import control, lab as labs\n{code}"]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
        assert "HostError" in done.stderr
        assert "run as root" in done.stderr
    assert is_locked(LabDir(name))


def test_unknown_lab_is_not_found(name: str) -> None:
    with pytest.raises(NotFound, match=f"no lab named {name}"):
        labs.find_lab(name)
    with pytest.raises(NotFound, match=f"no lab named {name}"):
        labs.read_status(name)
    with pytest.raises(RequestError, match="is not a lab name"):
        labs.find_lab("../etc")


def test_lab_commands(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    start(name, tmp_path)

    def nohype(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-c", "from orchestrator.cli.main import main; main()", "lab", *words]
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    assert nohype("exec", "--lab", name, "--", "exit 5").returncode == 5
    assert nohype("exec", "--lab", name, "--", "printf", "%s\n", "a b", "$HOME").stdout == "a b\n$HOME\n"
    shown = json.loads(nohype("status", name, "--json").stdout)
    assert (shown["condition"], shown["state"]["accel"], shown["state"]["accel_reason"]) == ("up", "tcg", "test")
    assert "Linux version 6.12" in nohype("console", "--lab", name).stdout
    os.kill(labs.find_lab(name).state.qemu, signal.SIGKILL)
    wait_until(lambda: not is_locked(LabDir(name)), "the keeper has ended")
    lost = nohype("exec", "--lab", name, "--", "true")
    assert lost.returncode == 3
    assert f"lab {name} is lost: QEMU was killed" in lost.stderr
    assert "Traceback" not in lost.stderr
    assert nohype("down", name).stdout == f"lab {name} is down\n"


def test_emulator_does_not_start_after_its_keeper_died(tmp_path: Path) -> None:
    def enter(parent: int) -> int:
        return subprocess.run(
            [*build_entry(Path("/"), {"lab": tmp_path}, parent), "ls", "/mnt/lab"], check=False, capture_output=True
        ).returncode

    assert enter(os.getpid()) == 0
    assert enter(os.getppid()) != 0


def test_lab_joins_the_switch_of_another_as_a_second_host(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    other = f"{name}-b"
    first = start(name, tmp_path)
    try:
        second = start(other, tmp_path, switch_of=name)
        ports = switch.port(name), switch.port(other)
        assert ports[0].netns == ports[1].netns == switch.netns_of(name)
        assert ports[0].interface != ports[1].interface
        state = ports[0].switch.read()
        assert {port.name: (port.hairpin, port.carrier) for port in state.ports} == {
            port.interface: (True, True) for port in ports
        }
        assert data_mac(name) != data_mac(other), "two hosts with one address behind a switch"
        control.down(name)
        assert netlink.netns_exists(switch.netns_of(name)), "the other lab uses the switch"
        assert [port.name for port in switch.port(other).switch.read().ports] == [ports[1].interface]
        again = start(name, tmp_path)
        assert (again.state.switch, len(switch.port(name).switch.read().ports)) == (name, 2), "it is the same switch"
        assert first.state.switch_ssh != second.state.switch_ssh
    finally:
        control.down(other)
    assert_nothing_left(other)
    assert netlink.netns_exists(switch.netns_of(name))


def test_switch_of_a_lab_that_is_not_up_cannot_be_joined(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    with pytest.raises(LabError, match=f"no lab has a switch named {name}-x"):
        start(name, tmp_path, switch_of=f"{name}-x")
    with pytest.raises(RequestError, match="is not a lab name"):
        start(name, tmp_path, switch_of="../x")


def test_switch_is_read_over_ssh_and_nothing_else(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    """As the manager in the lab does, with the key that the lab's credential carries."""
    lab = start(name, tmp_path)
    port, state = switch.port(name), lab.state
    lines = (lab.folder.path / "tmpfiles.extra").read_text().splitlines()
    (line,) = [line for line in lines if SWITCH_KEY in line]
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_bytes(base64.b64decode(line.split()[-1]))
    address = SshAddress("127.0.0.1", state.switch_ssh, "root", state.switch_key)
    registered = Switch("lab", SwitchDriver.LINUX_BRIDGE, switch.BRIDGE, ssh=address)
    with opened(registered, key) as driver:
        (found,) = driver.read().ports
        assert (found.name, found.hairpin, found.carrier) == (port.interface, True, True)
        driver.set_hairpin(port.interface, on=False)
        assert not netlink.read_hairpin(port.interface, port.netns)
        driver.set_hairpin(port.interface, on=True)
    commands = SshCommands(address, key)
    for words in (["id"], ["ip", "netns", "exec", "x", "id"], ["ip", "link", "set", "dev", port.interface, "netns", "1"]):
        with pytest.raises(SwitchError, match="exited with status 126: the switch of a lab does not run this command"):
            commands.run(words)
    commands.close()
    with pytest.raises(SwitchError, match="refused|rejects|does not accept|key"):
        SshCommands(address, lab.folder.key).run(["bridge", "-j", "vlan", "show"])


def test_switch_of_a_lab_that_is_ending_cannot_be_joined(name: str, tmp_path: Path) -> None:
    """Its keeper holds the lock until its end, which is after that of the switch."""
    first, second = LabDir(name, tmp_path), LabDir(f"{name}-b", tmp_path)
    locks = [take_lock(folder) for folder in (first, second)]
    try:
        for folder in (first, second):
            folder.path.mkdir()
        descriptor, _ = switch.create_port(first, name)
        os.close(descriptor)
        switch.delete_port(first)
        with pytest.raises(NotFound, match=f"no lab has a switch named {name}"):
            switch.create_port(second, name)
        assert not netlink.netns_exists(switch.netns_of(name))
    finally:
        for lock in locks:
            assert lock is not None
            os.close(lock)


@pytest.fixture
def tpm(tmp_path: Path, stand_in: Callable[[str], None]) -> Callable[[str], LabSpec]:
    """Puts a program of these lines of shell in the place of the TPM's emulator; returns a spec with a TPM."""

    def place(lines: str) -> LabSpec:
        program = tmp_path / "bin" / "swtpm"
        program.write_text(f"#!/bin/sh\n{lines}\n")
        program.chmod(0o755)
        return SPEC.model_copy(update={"tpm": True})

    return place


def test_emulator_of_the_tpm_runs_as_long_as_the_lab(name: str, tmp_path: Path, tpm: Callable[[str], LabSpec]) -> None:
    # The socket is the last part of --ctrl type=unixio,path=/mnt/lab/SOCKET.
    make_socket = 'for word; do case $word in *path=*) touch "${word##*path=}"; esac; done'
    start(name, tmp_path, spec=tpm(f"echo $$ > {tmp_path}/pid; {make_socket}; exec sleep 1000"))
    process = Path("/proc", (tmp_path / "pid").read_text().strip())
    assert process.exists()
    control.down(name)
    assert not process.exists()


def test_emulator_of_the_tpm_ends_with_a_killed_keeper(name: str, tmp_path: Path, tpm: Callable[[str], LabSpec]) -> None:
    make_socket = 'for word; do case $word in *path=*) touch "${word##*path=}"; esac; done'
    lab = start(name, tmp_path, spec=tpm(f"echo $$ > {tmp_path}/pid; {make_socket}; exec sleep 1000"))
    process = Path("/proc", (tmp_path / "pid").read_text().strip())
    os.kill(lab.state.pid, signal.SIGKILL)
    wait_until(lambda: not process.exists(), "the emulator of the TPM has ended")


def test_emulator_of_the_tpm_that_fails_is_reported(name: str, tmp_path: Path, tpm: Callable[[str], LabSpec]) -> None:
    with pytest.raises(LabError, match="emulator of the TPM exited immediately with status 3:\n.*no such key"):
        start(name, tmp_path, spec=tpm("echo no such key >&2; exit 3"))
    assert_nothing_left(name)


def test_killed_up_does_not_wait_for_the_emulator_of_the_tpm(name: str, tmp_path: Path, tpm: Callable[[str], LabSpec]) -> None:
    tpm(f"echo $$ > {tmp_path}/new && mv {tmp_path}/new {tmp_path}/pid; exec sleep 1000")  # without a socket
    up = start_in_background(name, tmp_path, "tpm")
    wait_until((tmp_path / "pid").exists, "the emulator of the TPM runs")
    up.kill()
    up.communicate(timeout=20)
    wait_until(lambda: not LabDir(name).lock.exists(), "the keeper has cleaned up")
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()
    assert_nothing_left(name)
