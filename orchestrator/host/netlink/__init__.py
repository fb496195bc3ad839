"""Network interfaces, VF settings, bridges, macvtaps, network namespaces (rtnetlink(7)), and nftables. This module
implements `host.root.Net`.
"""

# Each function opens and closes its own socket, and finds interfaces by a dump: a long-lived socket leaks an acknowledgement for
# every `get` (pyroute2 0.9.7). pyroute2 runs an event loop, so asyncio programs must call these functions in a thread.

from orchestrator.host.hairpin import HairpinProbe as open_hairpin
from orchestrator.host.hairpin import probe_hairpin
from orchestrator.host.netlink.bridge_ports import BridgeState, read_bridge
from orchestrator.host.netlink.bridges import add_port, create_bridge, read_hairpin, set_hairpin
from orchestrator.host.netlink.counters import read_counters, read_queue, read_vf_counters
from orchestrator.host.netlink.filters import count_packets, delete_table, read_table, replace_table
from orchestrator.host.netlink.links import (
    read_addressed,
    read_hwmode,
    read_links,
    set_hwmode,
    set_link_up,
    watch_links,
)
from orchestrator.host.netlink.namespaces import create_netns, delete_netns, move_to_netns, rename_link
from orchestrator.host.netlink.notices import LinkNotices, RuleNotices
from orchestrator.host.netlink.sockets import netns_exists
from orchestrator.host.netlink.taps import (
    create_macvtap,
    create_tap,
    delete_link,
    restore_macvtap,
    restore_tap,
    set_promiscuous,
)
from orchestrator.host.netlink.vfs import enforce_vf, read_vfs

__all__ = [
    "BridgeState",
    "LinkNotices",
    "RuleNotices",
    "add_port",
    "count_packets",
    "create_bridge",
    "create_macvtap",
    "create_netns",
    "create_tap",
    "delete_link",
    "delete_netns",
    "delete_table",
    "move_to_netns",
    "netns_exists",
    "open_hairpin",
    "probe_hairpin",
    "read_addressed",
    "read_bridge",
    "read_counters",
    "read_hairpin",
    "read_hwmode",
    "read_links",
    "read_queue",
    "read_table",
    "read_vf_counters",
    "read_vfs",
    "rename_link",
    "replace_table",
    "restore_macvtap",
    "restore_tap",
    "set_hairpin",
    "set_hwmode",
    "set_link_up",
    "set_promiscuous",
    "enforce_vf",
    "watch_links",
]
