"""The network of a fake host: its PFs' interfaces with what igb enforces for their VFs. On disk, below the host's folder.

What is refused, and how, is from rtnetlink (net/core/rtnetlink.c, do_setvfinfo()) and igb (drivers/net/ethernet/intel/igb,
igb_ndo_set_vf_*()). The same contract tests run on this and, in the lab, on the real network.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from orchestrator.errors import HostError, HypervisorError, RequestError
from orchestrator.host.root import Chain
from orchestrator.model.topology import Link, VfState
from orchestrator.model.uplink import FrameCounts, HairpinResult, QueueCounts
from orchestrator.values import MacAddress

if TYPE_CHECKING:
    from tests.fakes.root import FakeRoot

FOLDER = ".state/net"
TAPS, TABLES = " taps", " tables"
"""Files in the folder, which no interface is called."""
_DEVICES = "sys/bus/pci/devices"
_MAX_VLAN, _MAX_QOS = 4095, 7
_MTU = 1500
Driver = Callable[[str, object], "int | dict[str, Any]"]
"""An attribute of VfState and its wanted value -> an errno, or what is set instead of what was asked for."""
# As host.netlink asks, one after the other, each with what goes with it.
_REQUESTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("trust", ()), ("spoof_check", ()), ("vlan", ("qos",)), ("max_rate", ("min_rate",)), ("link_state", ()), ("mac", ())
)  # fmt: skip


class FakeNet:
    """See `host.root.Net`.

    Args:
        fake: the host that the network is of.
        changing: `FakeRoot.changing`.

    Attributes:
        drivers: interface -> what its driver makes of a request, where that is not as igb does.
        new_vf: how the drivers make a new VF.
        hairpin: whether the external switch sends frames back.
        probes: uplinks whose hairpin was probed.
        counters: frames by interface; zero for the others.
        queue: of each interface.
        vf_counters: frames by number of the VF.
        packets: counted by the rules of a chain, by its name; zero for the others.
    """

    def __init__(self, fake: FakeRoot, changing: Callable[[str, str], AbstractContextManager[None]]) -> None:
        self._fake, self._changing = fake, changing
        self.drivers: dict[str, Driver] = {}
        self.new_vf = VfState(0)
        self.hairpin = True
        self.probes: list[str] = []
        self.counters: dict[str, FrameCounts] = {}
        self.queue = QueueCounts(0, 0)
        self.vf_counters: dict[int, FrameCounts] = {}
        self.packets: dict[str, int] = {}

    def read_links(self) -> tuple[Link, ...]:
        """See `host.netlink`."""
        lo = Link("lo", 1, None, up=True, carrier=True, master=None, kind=None)
        links = [lo, *(self._link(number, name, folder) for number, (name, folder) in enumerate(self._interfaces().items(), 2))]
        for number, (name, tap) in enumerate(sorted(self._load(TAPS).items()), len(links) + 1):
            state = {key: value for key, value in tap.items() if key != "held"} | {"mac": MacAddress.parse(tap["mac"])}
            links.append(Link(name, number, carrier=tap["up"], **{"master": None, "mtu": _MTU} | state))
        return tuple(links)

    def read_addressed(self) -> frozenset[str]:
        """See `host.netlink`. A test gives an interface an address with `give_address`."""
        return frozenset(name for name in self._interfaces() if self._load(name).get("addressed"))

    def read_vfs(self, interface: str) -> tuple[VfState, ...]:
        """See `host.netlink`."""
        self._find_folder(interface)
        return self.vfs(interface)

    def enforce_vf(self, interface: str, wanted: VfState) -> dict[str, HostError]:
        """See `host.netlink`: one attribute after the other, of which the driver may refuse some."""
        refused: dict[str, HostError] = {}
        for name, others in _REQUESTS:
            before = self._find(interface, wanted.index)
            fields = {key: getattr(wanted, key) for key in (name, *others)}
            if any(getattr(before, key) != value for key, value in fields.items()):
                try:
                    self._ask_driver(interface, wanted.index, name, fields)
                except HostError as error:
                    refused[name] = error
        for name, difference in self._find(interface, wanted.index).diff(wanted).items():
            refused.setdefault(name, HostError(f"VF {wanted.index} of {interface}: its {difference}"))
        return refused

    def _ask_driver(self, interface: str, index: int, name: str, fields: dict[str, Any]) -> None:
        answer = self.drivers.get(interface, _igb)(name, fields[name])
        if isinstance(answer, int):
            raise HostError(f"cannot set VF {index} of {interface}: {name} {fields[name]}", errno=answer)
        self.set_vf(interface, index, **fields | answer)

    def set_vf(self, interface: str, index: int, **fields: Any) -> None:
        """What `ip link set IFACE vf N ...` does; the fields are those of VfState."""
        with self._changing(f"{interface} vf {index}", " ".join(f"{key}={value}" for key, value in fields.items())):
            before = self._find(interface, index)
            after = dataclasses.replace(before, **fields)
            if after.vlan > _MAX_VLAN or after.qos > _MAX_QOS or after.min_rate:
                # igb_ndo_set_vf_vlan(), igb_ndo_set_vf_bw(): it has no minimum rate.
                raise HostError(f"cannot set VF {index} of {interface}", errno=errno.EINVAL)
            if self._fake.in_use(f"{self._find_folder(interface)}/virtfn{index}"):
                self._fake.violate(f"VF {index} of {interface} was changed while a guest has it: {fields}")
            vfs = [after if vf.index == index else vf for vf in self.vfs(interface)]
            self._store(interface, vfs=[_to_json(vf) for vf in vfs])

    def read_hwmode(self, interface: str) -> str | None:
        """See `host.netlink`."""
        self._find_folder(interface)
        mode = self._load(interface).get("hwmode")
        return str(mode) if mode else None

    def set_hwmode(self, interface: str, mode: str) -> None:
        """See `host.netlink`. igb has none; a test gives an interface one with `give_hwmode`."""
        with self._changing(f"{interface} hwmode", mode):
            if self.read_hwmode(interface) is None:
                raise HostError(
                    f"cannot set hwmode {mode} on {interface}", "use a NIC whose driver supports hwmode", errno.EOPNOTSUPP
                )
            self._store(interface, hwmode=mode)

    def set_link_up(self, interface: str, *, up: bool) -> None:
        """See `host.netlink`; of taps only."""
        self.change_tap(interface, up=up)

    def create_macvtap(self, name: str, uplink: str, mac: MacAddress) -> None:
        """See `host.netlink`."""
        with self._changing(f"macvtap {name}", f"{uplink} {mac}"):
            if uplink not in self._interfaces():
                raise HostError(
                    f"cannot create macvtap {name} on {uplink}: interface {uplink} does not exist", errno=errno.ENODEV
                )
            if name in self._load(TAPS):
                raise HostError(f"cannot create macvtap {name} on {uplink}", errno=errno.EEXIST)
            new = {"kind": "macvtap", "parent": uplink, "mac": str(mac), "mode": "vepa", "all_multicast": True, "up": False}
            self._store(TAPS, **{name: new})

    def restore_macvtap(self, name: str) -> None:
        """See `host.netlink`."""
        self.change_tap(name, mode="vepa", all_multicast=True)

    def create_tap(self, name: str, uplink: str, mac: MacAddress, drain: str) -> None:
        """See `host.netlink`."""
        with self._changing(f"tap {name}", f"{uplink} {mac}"):
            if uplink not in self._interfaces():
                raise HostError(f"cannot create tap {name}: interface {uplink} does not exist", errno=errno.ENODEV)
            if name in self._load(TAPS) or drain in self._load(TAPS):
                raise HostError(f"cannot create tap {name}", errno=errno.EBUSY)
            new = {"mac": str(mac), "up": False}
            self._store(TAPS, **{drain: {**new, "kind": "bridge"}, name: {**new, "kind": "tun", "master": drain}})

    def restore_tap(self, name: str, uplink: str, mac: MacAddress, drain: str) -> None:
        """See `host.netlink`."""
        del uplink
        self.change_tap(name, mac=str(mac), master=drain, mtu=_MTU)
        self._store(TAPS, **{drain: {"mac": str(mac), "up": False, "kind": "bridge"}})

    def set_promiscuous(self, interface: str, *, on: bool) -> None:
        """See `host.netlink`."""
        with self._changing(f"promiscuous {interface}", str(on)):
            self._find_folder(interface)
            self._store(interface, promiscuous=on)

    def delete_link(self, name: str) -> None:
        """See `host.netlink`."""
        with self._changing(f"delete {name}", ""):
            if name not in self._load(TAPS):
                raise HostError(f"cannot delete interface {name}: it does not exist", errno=errno.ENODEV)
            if self._load(TAPS)[name].get("held"):
                self._fake.violate(f"tap {name} was removed while a guest has it")
            self._store(TAPS, **{name: None})

    def list_made(self) -> list[str]:
        """Names of the taps and tables that exist."""
        return [*self._load(TAPS), *self._load(TABLES)]

    def hold_tap(self, name: str) -> None:
        """What QEMU does when it opens a tap that libvirt must not create."""
        tap = self._load(TAPS).get(name)
        if tap is None:
            raise HypervisorError(f"cannot create the guest: target managed='no' but specified dev {name} doesn't exist")
        ruled = {chain["device"] for table in self._load(TABLES).values() for chain in table["chains"]}
        if not tap["up"] or name not in ruled:
            self._fake.violate(f"a guest was started on tap {name}, which has no rules yet or is down")
        self._store(TAPS, **{name: {**tap, "held": True}})

    def release_tap(self, name: str) -> None:
        """QEMU has ended."""
        if tap := self._load(TAPS).get(name):
            self._store(TAPS, **{name: {**tap, "held": False}})

    def change_tap(self, name: str, **fields: object) -> None:
        """What `ip link set` does to a tap."""
        with self._changing(f"tap {name}", str(fields)):
            if name not in self._load(TAPS):
                raise HostError(f"cannot change {name}: interface {name} does not exist", errno=errno.ENODEV)
            self._store(TAPS, **{name: self._load(TAPS)[name] | fields})

    def probe_hairpin(self, uplink: str, *, attempts: int = 5, wait: float = 0.4) -> HairpinResult:
        """See `host.netlink`. A test sets what the switch does by `hairpin`; it takes no time."""
        self._find_folder(uplink)
        self.probes.append(uplink)
        return HairpinResult(uplink, 1, 1) if self.hairpin else HairpinResult(uplink, attempts, 0)

    def open_hairpin(self, uplink: str) -> FakeProbe:
        """See `host.netlink`."""
        return FakeProbe(self, uplink)

    def read_counters(self) -> dict[str, FrameCounts]:
        """See `host.netlink`. A test sets them by `counters`."""
        zero = FrameCounts(0, 0, 0, 0, 0, 0)
        return {link.name: self.counters.get(link.name, zero) for link in self.read_links()}

    def read_queue(self, interface: str) -> QueueCounts:
        """See `host.netlink`."""
        self._find_folder(interface)
        return self.queue

    def read_vf_counters(self, interface: str) -> dict[int, FrameCounts]:
        """See `host.netlink`: igb does not count."""
        self._find_folder(interface)
        return self.vf_counters

    def read_table(self, table: str) -> tuple[Chain, ...] | None:
        """See `host.netlink`."""
        found = self._load(TABLES).get(table)
        return tuple(Chain(**chain) for chain in found["chains"]) if found else None

    def replace_table(self, table: str, *chains: Chain) -> None:
        """See `host.netlink`."""
        with self._changing(f"table {table}", " ".join(chain.name for chain in chains)):
            self._store(TABLES, **{table: {"chains": [vars(chain) for chain in chains]}})

    def count_packets(self, table: str) -> dict[str, int] | None:
        """See `host.netlink`. A test sets them by `packets`."""
        found = self._load(TABLES).get(table)
        return {chain["name"]: self.packets.get(chain["name"], 0) for chain in found["chains"]} if found else None

    def delete_table(self, table: str) -> None:
        """See `host.netlink`."""
        with self._changing(f"delete table {table}", ""):
            self._store(TABLES, **{table: None})

    def give_hwmode(self, interface: str, mode: str) -> None:
        """Makes the interface's driver one with a hwmode."""
        self._store(interface, hwmode=mode)

    def make_vfs(self, interface: str, count: int) -> None:
        """New VFs: with igb no address, checked for spoofing, not trusted (igb_main.c, igb_vf_configure())."""
        self._store(interface, vfs=[_to_json(dataclasses.replace(self.new_vf, index=index)) for index in range(count)])

    def give_address(self, interface: str) -> None:
        """Gives the interface an IP address."""
        self._store(interface, addressed=True)

    def own_interface(self, folder: str) -> str:
        """Of a PF's interfaces its own: the oldest. Representors come later."""
        names = self._fake.names(f"{folder}/net")
        return min(names, key=lambda name: int(self._fake.find(f"{folder}/net/{name}/ifindex") or 10**9))

    def vfs(self, interface: str) -> tuple[VfState, ...]:
        """What the PF enforces for each VF."""
        return tuple(_from_json(fields) for fields in self._load(interface).get("vfs", ()))

    def _interfaces(self) -> dict[str, str]:
        """Name of each interface, in order, and the folder of its device."""
        folders = [f"{_DEVICES}/{name}" for name in self._fake.names(_DEVICES)]
        # os.path and not pathlib: there may be hundreds of devices, and this is asked often.
        nics = [folder for folder in folders if os.path.isdir(f"{self._fake.path}/{folder}/net")]
        return dict(sorted((name, folder) for folder in nics for name in self._fake.names(f"{folder}/net")))

    def _link(self, number: int, name: str, folder: str) -> Link:
        up = self._fake.find(f"{folder}/net/{name}/operstate") == "up"
        try:
            mac = MacAddress.parse(self._fake.find(f"{folder}/net/{name}/address") or "")
        except RequestError:
            mac = None
        promiscuous = bool(self._load(name).get("promiscuous"))
        return Link(name, number, mac, up=up, carrier=up, master=None, kind=None, mtu=_MTU, promiscuous=promiscuous)

    def _find_folder(self, interface: str) -> str:
        folder = self._interfaces().get(interface)
        if folder is None and interface != "lo":
            raise HostError(f"interface {interface} does not exist", "check the name with `ip link show`", errno.ENODEV)
        return folder or "sys/devices/virtual/net/lo"

    def _find(self, interface: str, index: int) -> VfState:
        self._find_folder(interface)
        for vf in self.vfs(interface):
            if vf.index == index:
                return vf
        raise HostError(f"cannot set VF {index} of {interface}", f"{interface} has no VF {index}", errno.EINVAL)

    def _load(self, interface: str) -> dict[str, Any]:
        path = self._fake.path / FOLDER / interface
        return json.loads(path.read_text()) if path.exists() else {}

    def _store(self, interface: str, **fields: object) -> None:
        """One file an interface; without anything to say, no file, so that a host after a test looks as before."""
        kept = {key: value for key, value in {**self._load(interface), **fields}.items() if value}
        if kept:
            self._fake.add(f"{FOLDER}/{interface}", json.dumps(kept))
        else:
            (self._fake.path / FOLDER / interface).unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class FakeProbe:
    """See `host.hairpin`."""

    net: FakeNet
    uplink: str

    def attempt(self, wait: float) -> bool:
        return bool(self.net.probe_hairpin(self.uplink, attempts=1, wait=wait).returned)

    def discard(self) -> None:
        """Has nothing to discard."""

    def close(self) -> None:
        """Holds nothing."""


def _igb(_name: str, _value: object) -> dict[str, Any]:
    """Takes all that is asked for."""
    return {}


def _to_json(vf: VfState) -> dict[str, object]:
    return vars(vf) | {"mac": str(vf.mac) if vf.mac else None}


def _from_json(fields: dict[str, Any]) -> VfState:
    return VfState(**fields | {"mac": MacAddress(fields["mac"]) if fields["mac"] else None})
