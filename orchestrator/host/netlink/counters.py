"""Frames that network interfaces and VFs have sent and received (IFLA_STATS64, IFLA_VF_STATS)."""

from __future__ import annotations

from typing import Any

from orchestrator.host.netlink.sockets import RTEXT_FILTER_SKIP_STATS, RTEXT_FILTER_VF, find_index, opened
from orchestrator.model.uplink import FrameCounts, QueueCounts

_TC_H_ROOT = 0xFFFF_FFFF  # include/uapi/linux/pkt_sched.h
_TAPS = ("tun",)
"""Kinds of interfaces that receive what a guest sends. A macvtap sends it: its other side is the uplink."""


def read_counters() -> dict[str, FrameCounts]:
    """Of all interfaces, by one dump. The counters of a PF do not include the frames of its VFs with most drivers."""
    with opened("read the counters of network interfaces") as ipr:
        messages = list(ipr.link("dump", ext_mask=RTEXT_FILTER_SKIP_STATS))
    found = {message.get_attr("IFLA_IFNAME"): _parse(message) for message in messages}
    return {name: counts for name, counts in found.items() if counts}


def read_vf_counters(interface: str) -> dict[int, FrameCounts]:
    """By number of the VF. Without the VFs whose counters are all zero: the kernel reports zeros for a driver that does not count
    (rtnl_fill_vfinfo(), net/core/rtnetlink.c).
    """
    what = f"read the counters of the VFs of {interface}"
    with opened(what) as ipr:
        (message,) = ipr.link("get", index=find_index(ipr, interface, what), ext_mask=RTEXT_FILTER_VF)
    vfs = message.get_attr("IFLA_VFINFO_LIST")
    found = dict(map(_parse_vf, vfs.get_attrs("IFLA_VF_INFO"))) if vfs is not None else {}
    return {index: counts for index, counts in found.items() if counts.sent or counts.received}


def read_queue(interface: str) -> QueueCounts:
    """Its root qdisc, which counts for those below it too. Zeros without one, as for many virtual interfaces."""
    what = f"read the queue of {interface}"
    with opened(what) as ipr:
        index = find_index(ipr, interface, what)
        for message in ipr.get_qdiscs(index=index):
            found = message.get_nested("TCA_STATS2", "TCA_STATS_QUEUE")
            if message["index"] == index and message["parent"] == _TC_H_ROOT and found:
                return QueueCounts(int(found["drops"]), int(found["qlen"]))
    return QueueCounts(0, 0)


def _parse(message: Any) -> FrameCounts | None:
    counted = message.get_attr("IFLA_STATS64")
    if not counted:
        return None
    kind = message.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND")
    sent, received = ("rx", "tx") if kind in _TAPS else ("tx", "rx")
    return FrameCounts(
        sent=counted[f"{sent}_packets"],
        received=counted[f"{received}_packets"],
        sent_bytes=counted[f"{sent}_bytes"],
        received_bytes=counted[f"{received}_bytes"],
        sent_dropped=counted[f"{sent}_dropped"],
        received_dropped=counted[f"{received}_dropped"],
    )


def _parse_vf(info: Any) -> tuple[int, FrameCounts]:
    counted = info.get_attr("IFLA_VF_STATS")

    def read(name: str) -> int:
        return int((counted.get_attr(f"IFLA_VF_STATS_{name}") if counted is not None else 0) or 0)

    counts = FrameCounts(
        sent=read("TX_PACKETS"),
        received=read("RX_PACKETS"),
        sent_bytes=read("TX_BYTES"),
        received_bytes=read("RX_BYTES"),
        sent_dropped=read("TX_DROPPED"),
        received_dropped=read("RX_DROPPED"),
    )
    return int(info.get_attr("IFLA_VF_MAC")["vf"]), counts
