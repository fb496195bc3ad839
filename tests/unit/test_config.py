"""Settings that mean nothing are refused, with one line that names the field; and reading the file neither hangs nor fails."""

from __future__ import annotations

import grp
import hashlib
import json
import os
import pwd
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from orchestrator.api.identity import build_identity_map
from orchestrator.cli.main import nohype
from orchestrator.config import DaemonConfig, read_config
from orchestrator.daemon import main as daemon
from orchestrator.errors import RequestError
from orchestrator.guests.switches import build_settings
from orchestrator.model.edge import EdgeMode
from orchestrator.model.switch import SwitchSettings, UplinkPort
from orchestrator.model.waiver import Waiver
from orchestrator.planning.host_check import build_policy

HOST = '[host]\nhousekeeping = "0-1"\nuplinks = ["nic0"]\n'
EMPTY_HASH = hashlib.sha256(b"").hexdigest()
DIGITS = "9" * 5000


@pytest.fixture(autouse=True)
def _logging_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "set_up_diagnostics", lambda: None)


def write(folder: Path, text: str) -> Path:
    file = folder / "nohype.toml"
    file.write_text(text)
    return file


def host(**fields: str) -> str:
    settings = {"housekeeping": '"0-1"', "uplinks": '["nic0"]', **fields}
    return "[host]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items())


def paths(**fields: str) -> str:
    return f"{HOST}[paths]\n" + "".join(f'{name} = "{value}"\n' for name, value in fields.items())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = " + "[" * 20_000, "nested too deeply"),
        ("x = " + "{a=" * 20_000, "nested too deeply"),
        ("x = " + "[" * 900 + "]" * 900, "nested too deeply|x: "),
        (f"x = {DIGITS}", "is not TOML: .*4300"),
        (f"{HOST}[limits]\nburst = {DIGITS}", "is not TOML: .*4300"),
        (f"{HOST}[limits]\nburst = 0x{'f' * 5000}", r"limits\.burst"),
        (f"{HOST}[tenants.a]\ncores = 0x{'f' * 5000}", r"tenants\.a\.cores"),
        (f"{HOST}[tenants.a]\nvfs = 0b{'1' * 50000}", r"tenants\.a\.vfs"),
        (f'{HOST}accept = ["everything"]', r"host\.accept\.0"),
        (f'{HOST}[disks]\nserials = ["a\\nb"]', r"disks\.serials\.0: .* is not the serial number of a disk"),
        (f'{HOST}[disks]\nserials = [""]', r"disks\.serials\.0"),
        (f'{HOST}[disks]\nemulated = "disks"', r"disks\.emulated: .*not an absolute path"),
        (f'{HOST}[disks]\nwipe = true', r"disks\.wipe"),
        (f"{HOST}[tenants.a]\ndisks = -1", r"tenants\.a\.disks"),
        (f"{HOST}[exits.policy.housekeeping]\nnonsense = 'any'", r"exits\.policy\.housekeeping\..*unknown exit reason; known"),
        (f"{HOST}[tenants.a.exit_policy]\naction = 'explode'", r"tenants\.a\.exit_policy\.action"),
        (f"{HOST}[exits.policy.application]\nio = '5'", r"is not a budget such as"),
        (host(vfs_per_uplink=f"0o{'7' * 5000}"), r"host\.vfs_per_uplink"),
        (host(reserved_pages=f'{{"2M" = 0x{"f" * 5000}}}'), r"host\.reserved_pages"),
        (f"{HOST}[exits]\ntotal = inf", r"exits\.total"),
        (f"{HOST}[exits]\nemulated = nan", r"exits\.emulated"),
        (f"{HOST}[limits]\nrate = nan", r"limits\.rate"),
        (f"{HOST}[limits]\nrate = 5e-324", r"limits\.rate"),
        (f"{HOST}[events]\nkeep = 1", r"events\.keep"),
        (host(housekeeping='"0-8191"'), "no CPU is left for guests"),
        (host(housekeeping='"٣"'), "not a list of CPUs"),
        (host(page_size='"1"'), "'1' is not a huge page size; use 2M or 1G"),
        (host(page_size='"3M"'), "'3M' is not a huge page size"),
        (host(page_size='"4K"'), "'4K' is not a huge page size"),
        (host(reserved_pages='{"3M" = 5}'), r"reserved_pages.*'3M' is not a huge page size"),
        (host(reserved_pages='{"2M" = 1, "2MiB" = 5}'), "'2M' and '2MiB' are the same page size"),
        (host(reserved_pages='{"1G" = 1, "1024M" = 1}'), "'1G' and '1024M' are the same page size"),
        (host(uplinks='["nic0", "nic0"]'), r"host\.uplinks: nic0 is listed 2 times"),
        (host(uplinks='["../nic0"]'), "not the name of a network interface"),
        (host(uplinks='[".."]'), "not the name of a network interface"),
        (host(uplinks='["nic0", ""]'), "not the name of a network interface"),
        (host(uplinks='["nic\\u001b[31m"]'), "not the name of a network interface"),
        (host(uplinks='["a name"]'), "not the name of a network interface"),
        (host(uplinks='["sixteen-letters-"]'), "not the name of a network interface"),
        (paths(ledger=""), r"paths\.ledger: '' is not an absolute path"),
        (paths(images=""), r"paths\.images: '' is not an absolute path"),
        (paths(consoles="guests"), r"paths\.consoles: 'guests' is not an absolute path"),
        (paths(ledger="/a/../b"), r"paths\.ledger: .* is not an absolute path"),
        (paths(ledger="/a\\u0000b"), r"paths\.ledger: .* is not an absolute path"),
        (paths(socket="/a\\u001b[31m"), r"paths\.socket: .* is not an absolute path"),
        (paths(ledger="//"), r"paths\.ledger: / is the root directory"),
        (paths(consoles=f"/{'a/' * 2500}"), r"paths\.consoles: a path of \d+ bytes is too long"),
        (paths(socket=f"/{'a' * 107}"), "a socket's path has 107 bytes at most, this one 108"),
        (paths(socket=f"/{'ä' * 54}"), "a socket's path has 107 bytes at most, this one 109"),
        (paths(ledger="/a/x", socket="/a//x"), "ledger and socket are the same path /a/x"),
        (paths(ledger="/a/x", consoles="/a/x/"), "ledger and consoles are the same path /a/x"),
        (paths(images="/a", consoles="/a"), "images and consoles are the same path /a"),
        (paths(ledger="/a/x", consoles="/a/x/y"), "consoles is below /a/x, which is the file of ledger"),
        (paths(ledger="/a/x", socket="/a/x-wal"), "socket is /a/x-wal, which belongs to the ledger"),
        (paths(ledger="/a/x", consoles="/a/x.lock"), "consoles is /a/x.lock, which belongs"),
        (f'{HOST}[tenants.a]\nusers = ["0"]', r"tenants\.a\.users: '0' is root"),
        (f'{HOST}[tenants.a]\nusers = ["000"]', r"tenants\.a\.users: '0' is root"),
        (f'{HOST}[tenants.a]\nusers = ["root"]', r"tenants\.a\.users: 'root' is root"),
        (f'{HOST}[access.viewers]\nusers = ["root"]', r"access\.viewers\.users: 'root' is root"),
        (f'{HOST}[tenants.a]\nusers = ["99999999999999999999"]', "too high for the number of a user or group"),
        (f'{HOST}[tenants.a]\nusers = ["4294967295"]', "too high for the number of a user or group"),
        (f'{HOST}[tenants.a]\nusers = ["{DIGITS}"]', "too high for the number of a user or group"),
        (f'{HOST}[tenants.a]\ngroups = ["{DIGITS}"]', "too high for the number of a user or group"),
        (f'{HOST}[tenants.a]\nusers = ["٣"]', "not the name or number of a user or group"),
        (f'{HOST}[tenants.a]\ngroups = ["1٣"]', "not the name or number of a user or group"),
        (f'{HOST}[tenants.a]\nusers = [""]', "not the name or number of a user or group"),
        (f'{HOST}[tenants.a]\nusers = ["a\\u0000"]', "not the name or number of a user or group"),
        (f'{HOST}[tenants.a]\nusers = ["7"]\n[tenants.b]\nusers = ["07"]', r"tenants\.b\.users: '7' is already in tenants\.a"),
        (f'{HOST}[tenants.a]\ngroups = ["x"]\n[tenants.b]\ngroups = ["x"]', r"tenants\.b\.groups: 'x' is already in tenants\.a"),
        (f'{HOST}[access.viewers]\ngroups = ["x"]\n[tenants.b]\ngroups = ["x"]', r"groups: 'x' is already in access\.viewers"),
        (f'{HOST}[tenants.a]\ncertificates = ["CN:\\u001b[31m"]', "invalid certificate name"),
        (f'{HOST}[tokens.a]\nrole = "operator"\nhash = "sha256:{EMPTY_HASH}"', "the hash of an empty token"),
        (f'{HOST}"\\u001b[31m" = 1', r"\\x1b\[31m: "),
        (f'{HOST}"a\\nb" = 1', r"a\\nb: "),
        (HOST + "".join(f"x{number} = 1\n" for number in range(5000)), r"and 4980 more$"),
        ("x" * (1 << 21), "has 2097152 bytes"),
        ("\ufeff" + HOST, "is not TOML"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(RequestError, match=said) as caught:
        read_config(file)
    assert str(file) in caught.value.message
    assert caught.value.message.isprintable(), "one line, and nothing that a terminal acts on"
    assert len(caught.value.message) < 2500
    with pytest.raises(SystemExit) as ended:
        daemon.main(["--config", str(file)])
    assert ended.value.code == os.EX_CONFIG, "systemd does not try it again"
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (host(reserved_pages='{"2MiB" = 5, "1 G" = 1}', page_size='"1024M"'), ("host", "reserved_pages", {"2M": 5, "1G": 1})),
        (host(uplinks='["enp1s0f0np0", "a.b@c"]'), ("host", "uplinks", ("enp1s0f0np0", "a.b@c"))),
        (paths(ledger="/srv//a b/ledger.sqlite"), ("paths", "ledger", "/srv/a b/ledger.sqlite")),
        (paths(socket=f"/{'a' * 106}"), ("paths", "socket", f"/{'a' * 106}")),
        (f"{HOST}[events]\nkeep = 1000", ("events", "keep", 1000)),
    ],
)
def test_what_means_something_is_taken(tmp_path: Path, text: str, found: tuple[str, str, Any]) -> None:
    section, field, value = found
    assert getattr(getattr(read_config(write(tmp_path, text)), section), field) == value


def test_accounts_of_all_kinds_are_taken() -> None:
    users = ["alice", "4294967294", "DOMAIN\\alice", "alice@example.org", "müller", "nobody-"]
    config = DaemonConfig.model_validate(
        {
            "host": {"housekeeping": "0", "uplinks": ["nic0"]},
            "access": {"operators": {"users": ["root"]}},
            "tenants": {"a": {"users": users, "groups": ["0", "domain users"]}},
        }
    )
    assert config.tenants["a"].users == tuple(users)


def test_root_and_groups_are_known_by_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only the host's own list of accounts tells."""
    monkeypatch.setattr(pwd, "getpwnam", lambda name: pwd.struct_passwd((name, "x", 0, 0, "", "/", "/bin/sh")))
    monkeypatch.setattr(grp, "getgrnam", lambda name: grp.struct_group((name, "x", 7, [])))
    section = {"host": {"housekeeping": "0", "uplinks": ["nic0"]}}
    with pytest.raises(RequestError, match=r"tenants\.a\.users: 'toor' is root"):
        build_identity_map(DaemonConfig.model_validate({**section, "tenants": {"a": {"users": ["toor"]}}}))
    tenants = {"a": {"groups": ["staff"]}, "b": {"groups": ["7"]}}
    with pytest.raises(RequestError, match=r"tenants\.b\.groups: '7' already has a role"):
        build_identity_map(DaemonConfig.model_validate({**section, "tenants": tenants}))
    build_identity_map(DaemonConfig.model_validate({**section, "access": {"operators": {"users": ["toor"]}}}))


@contextmanager
def odd_file(folder: Path, kind: str) -> Iterator[Path]:
    path = folder / kind
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            yield path
        return
    yield path


@pytest.mark.parametrize("kind", ["fifo", "folder", "link to a device", "socket"])
def test_a_special_file_does_not_block(tmp_path: Path, kind: str) -> None:
    results: list[Any] = []
    with odd_file(tmp_path, kind) as path:
        # In a thread: the test must not hang where the reading does.
        reader = threading.Thread(
            target=lambda: results.append(CliRunner().invoke(nohype, ["config", "check", str(path)])), daemon=True
        )
        reader.start()
        reader.join(20)
        assert results, "it waits"
        assert isinstance(results[0].exception, RequestError)
        assert str(path) in str(results[0].exception)


def test_edge_mode_of_an_uplink_is_part_of_the_policy(tmp_path: Path) -> None:
    def edges(text: str) -> tuple[tuple[str, EdgeMode], ...]:
        return build_policy(read_config(write(tmp_path, HOST + text))).edges

    assert edges("") == edges("[uplinks.nic0]") == edges('[uplinks.nic0]\nedge = "auto"') == ()
    for mode in (EdgeMode.VEPA, EdgeMode.MACVTAP_VEPA):
        assert edges(f'[uplinks.nic0]\nedge = "{mode}"') == (("nic0", mode),)
    for text, message in (
        ('[uplinks.nic9]\nedge = "vepa"', "uplinks.nic9: [host] uplinks does not list nic9"),
        ('[uplinks.nic0]\nedge = "veb"', "'veb' is not an edge mode for guests; use auto, vepa, channel, macvtap-vepa, nft-vepa"),
        ("[uplinks.nic0]\nedge = 1", "uplinks.nic0.edge"),
        ('[uplinks.nic0]\nmode = "vepa"', "uplinks.nic0.mode"),
    ):
        with pytest.raises(RequestError) as caught:
            edges(text)
        assert message in caught.value.message


def test_switch_and_port_of_an_uplink(tmp_path: Path) -> None:
    def settings(text: str) -> SwitchSettings:
        return build_settings(read_config(write(tmp_path, HOST.replace('["nic0"]', '["nic0", "nic1"]') + text)))

    tied = '[uplinks.nic0]\nswitch = "sw1"\nport = "swp1"\n'
    assert settings("") == SwitchSettings()
    found = settings(f'{tied}[switches]\nssh_key = "/etc/nohype/switch_key"\n')
    assert found == SwitchSettings("/etc/nohype/switch_key", (UplinkPort("nic0", "sw1", "swp1"),))
    for text, message in (
        ('[uplinks.nic0]\nswitch = "sw1"', "uplinks.nic0: Value error, switch and port belong together"),
        ('[uplinks.nic0]\nport = "swp1"', "switch and port belong together"),
        ('[uplinks.nic0]\nswitch = "Switch 1"\nport = "swp1"', "uplinks.nic0.switch"),
        ('[uplinks.nic0]\nswitch = "sw1"\nport = "a b"', "uplinks.nic0.port"),
        (tied + tied.replace("nic0", "nic1"), "uplinks.nic1: switch sw1 port swp1 is already that of nic0"),
        ('[switches]\nssh_key = "switch_key"', "switches.ssh_key"),
        ("[switches]\npassword = 1", "switches.password"),
    ):
        with pytest.raises(RequestError) as caught:
            settings(text)
        assert message.replace("Value error, ", "") in caught.value.message


def test_disks_are_part_of_the_policy(tmp_path: Path) -> None:
    text = (
        f'{HOST}accept = ["emulated-disk"]\n[disks]\nserials = ["S5GX 1"]\nemulated = "/var/lib/disks/"\n[tenants.a]\ndisks = 2'
    )
    config = read_config(write(tmp_path, text))
    policy = build_policy(config)
    assert (policy.disk_serials, policy.disk_folder, policy.accept) == ({"S5GX 1"}, "/var/lib/disks", (Waiver.EMULATED_DISK,))
    assert config.tenants["a"].quota.disks == 2
    volumes = build_policy(read_config(write(tmp_path, f'{HOST}[disks]\nvolume_group = "vg-0"')))
    assert (volumes.disk_group, volumes.disk_folder) == ("vg-0", "")
    empty = build_policy(read_config(write(tmp_path, HOST)))
    assert empty.disk_group == ""
    assert (empty.disk_serials, empty.disk_folder, empty.accept) == (frozenset(), "", ())


@pytest.mark.parametrize("name", ["", "-vg", "a/b", "..", "vg 0", "vg0\n", "x" * 65, "vg\u00e9", "a|b", "$(reboot)"])
def test_invalid_volume_group_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="disks.volume_group"):
        read_config(write(tmp_path, f"{HOST}[disks]\nvolume_group = {json.dumps(name)}"))


def test_folder_and_volume_group_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="emulated and volume_group are both set"):
        read_config(write(tmp_path, f'{HOST}[disks]\nvolume_group = "vg0"\nemulated = "/srv/disks"'))


def test_exit_policies_of_host_and_tenants_are_read(tmp_path: Path) -> None:
    text = """[exits.policy]
action = "kill"
application = {io = "0/s", "PF excp" = {minute = 5}}
[tenants.acme.exit_policy.housekeeping]
all = "1000/s,30000/min"
"""
    file = tmp_path / "nohype.toml"
    file.write_text(HOST + text)
    policies = build_policy(read_config(file)).exit_policies
    host, tenant = policies.find(""), policies.find("acme")
    assert host
    assert tenant
    assert (host.action, host.application["io"].second, host.application["PF excp"].minute) == ("kill", 0, 5)
    assert (tenant.action, tenant.housekeeping["all"].second, tenant.housekeeping["all"].minute) == ("report", 1000, 30_000)
    assert policies.find("bolt") == host
