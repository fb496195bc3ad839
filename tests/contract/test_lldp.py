"""LLDP neighbours, as two real daemons tell each other over a cable in namespaces of their own; and odd output of lldpcli."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import OrchestratorError, SwitchError
from orchestrator.images.cache import cache_folder
from orchestrator.lab.build import build_switch_tools
from orchestrator.model.switch import Neighbour, SwitchPort
from orchestrator.switches.commands import LocalCommands
from orchestrator.switches.lldp import find_neighbour, read_neighbour
from orchestrator.waiting import wait_until

PORT = SwitchPort("up0", True, True, True, "forwarding", False, 1500, (), None, (), (), None)

# The switch's daemon announces the EVB TLV by hand: lldpd does not know it. The first argument is its value.
_SCRIPT = """
set -e
read -r pid rest < /proc/self/stat
mount -t proc proc /proc
mount -t tmpfs tmpfs "$1"
cd "$1"
mkdir upper work root
mount -t overlay overlay -o "lowerdir=$2,upperdir=upper,workdir=work" root
mkdir -p root/proc root/run root/etc root/sys
rm -rf root/var/run
ln -s /run root/var/run
printf 'root:x:0:0::/:/bin/sh\\n_lldpd:x:101:101::/:/bin/sh\\n' > root/etc/passwd
printf 'root:x:0:\\n_lldpd:x:101:\\n' > root/etc/group
mount --rbind /proc root/proc
mount --rbind /dev root/dev
mount -t tmpfs tmpfs root/run
mkdir -p root/run/lldpd
unshare --net sh -c 'while :; do sleep 1000; done' &
switch=$!
while [ "$(readlink /proc/self/ns/net)" = "$(readlink /proc/$switch/ns/net)" ]; do sleep 0.01; done
ip link add up0 type veth peer name sw0 netns "/proc/$switch/ns/net"
ip link set up0 up
nsenter --net="/proc/$switch/ns/net" ip link set sw0 up
nsenter --net="/proc/$switch/ns/net" chroot root lldpd -d -u /run/switch.sock -I sw0 -c -S "switch of the lab" >/dev/null 2>&1 &
until [ -S root/run/switch.sock ]; do sleep 0.05; done
chroot root lldpd -d -I up0 -c >/dev/null 2>&1 &
until [ -S root/run/lldpd.socket ]; do sleep 0.05; done
chroot root lldpcli -u /run/switch.sock configure lldp tx-interval 1 >/dev/null
# intervals for which an announcement counts: on a slow machine the next one may be late
chroot root lldpcli -u /run/switch.sock configure lldp tx-hold 100 >/dev/null
if [ -n "$3" ]; then
    chroot root lldpcli -u /run/switch.sock configure lldp custom-tlv oui 00,80,c2 subtype 13 oui-info "$3" >/dev/null
fi
echo "$pid"
cat
"""


@contextmanager
def announcing(folder: Path, evb: str) -> Iterator[LocalCommands]:
    try:
        tools = build_switch_tools(cache_folder())
    except OrchestratorError as error:
        pytest.skip(f"the root with lldpd cannot be built: {error.message}")
    place = folder / "lldp"
    place.mkdir()
    namespaces = ["--mount", "--net", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    words = ["unshare", *namespaces, "sh", "-c", _SCRIPT, "sh", str(place), str(tools), evb]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin
        assert holder.stdout
        try:
            pid = int(holder.stdout.readline())
            yield LocalCommands(("nsenter", f"--target={pid}", "--mount", "--net", "--pid", "chroot", str(place / "root")))
        finally:
            holder.stdin.close()


@pytest.mark.netns
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for mount and network namespaces")
@pytest.mark.parametrize(
    ("announced", "shown"),
    [
        ("03,00,00,00,00", "reflective relay possible, reflective relay on"), ("02,00,00,00,00", "reflective relay possible"),
        ("00,04,00,00,00", "reflective relay requested"), ("00,00,00,00,00", "no reflective relay"), ("", ""),
    ],
)  # fmt: skip
def test_neighbour_of_a_real_daemon_is_read(tmp_path: Path, announced: str, shown: str) -> None:
    with announcing(tmp_path, announced) as commands:

        def find() -> Neighbour | None:
            # lldpd may send nothing by itself if it is configured while it starts.
            commands.run(["lldpcli", "-u", "/run/switch.sock", "update"])
            found = find_neighbour(commands, "up0")
            return found if found and bool(found.evb) == bool(announced) else None

        found = wait_until(find, lambda found: found is not None, timeout=60, interval=0.1)
        assert found
        assert (found.port, found.evb) == ("sw0", shown)
        assert found.system
        assert find_neighbour(commands, "lo") is None
        assert read_neighbour(commands, PORT).neighbour == found


class Printing:
    """lldpcli of which the output is given."""

    where = "on this host"

    def __init__(self, text: str) -> None:
        self._text = text

    def run(self, words: object, *, input: str = "") -> str:
        return self._text

    def close(self) -> None:
        pass


def document(**fields: Any) -> str:
    interface = {"name": "up0", "chassis": [{"name": [{"value": "sw1"}]}], "port": [{"id": [{"value": "1"}]}], **fields}
    return json.dumps({"lldp": [{"interface": [interface]}]})


def test_only_what_is_announced_is_shown() -> None:
    assert find_neighbour(Printing(document()), "up0") == Neighbour("sw1", "1", "")
    for empty in ('{"lldp": []}', '{"lldp": [{}]}', document(name="up1")):
        assert find_neighbour(Printing(empty), "up0") is None
        (gap,) = read_neighbour(Printing(empty), PORT).gaps
        assert "none announces itself" in gap


def test_text_of_a_station_cannot_control_a_terminal() -> None:
    text = document(chassis=[{"name": [{"value": "\x1b[2Jroot@host" + "x" * 500}]}])
    found = find_neighbour(Printing(text), "up0")
    assert found
    assert found.system.startswith("?[2Jroot@host")
    assert len(found.system) == 128


@pytest.mark.parametrize(
    "text",
    [
        "", "not JSON", "[]", "{}", '{"lldp": 1}', document(chassis=[]), document(port=[]), document(chassis=[{"name": [{}]}]),
        document(**{"unknown-tlvs": [{"unknown-tlv": [{"oui": "00,80,C2", "subtype": "13", "value": "zz"}]}]}),
        document(**{"unknown-tlvs": [{"unknown-tlv": [{"oui": 1}]}]}), "[" * 100_000,
    ],
)  # fmt: skip
def test_odd_output_is_one_error(text: str) -> None:
    with pytest.raises(SwitchError):
        find_neighbour(Printing(text), "up0")
    port = replace(PORT, gaps=("another",))
    assert read_neighbour(Printing(text), port).neighbour is None
    assert [gap.partition(":")[0] for gap in read_neighbour(Printing(text), port).gaps] == ["another", "neighbour"]


def test_without_a_daemon_it_is_not_measured() -> None:
    (gap,) = read_neighbour(LocalCommands(("/nonexistent-prefix",)), PORT).gaps
    assert gap.startswith("neighbour: not measured, because")
