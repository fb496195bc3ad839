"""Network interfaces, VFs as their PF sees them, bridges and network namespaces. As a value this is `host.root.Net`.

Each function opens a socket of its own and closes it: a long-lived one leaks an acknowledgement for every `get` (pyroute2 0.9.7).
For the same reason interfaces are looked up by a dump. pyroute2 runs an event loop inside, so an asyncio program must call
these functions in a thread. Sources: rtnetlink(7), include/uapi/linux/if_link.h, ip-link(8), bridge(8).
"""

from orchestrator.host.netlink.bridges import add_port, create_bridge, read_hairpin, set_hairpin
from orchestrator.host.netlink.links import (
    read_addressed,
    read_hwmode,
    read_links,
    set_hwmode,
    set_link_up,
    watch_links,
)
from orchestrator.host.netlink.namespaces import create_netns, delete_netns, move_to_netns
from orchestrator.host.netlink.sockets import netns_exists
from orchestrator.host.netlink.vfs import enforce_vf, read_vfs

__all__ = [
    "add_port",
    "create_bridge",
    "create_netns",
    "delete_netns",
    "move_to_netns",
    "netns_exists",
    "read_addressed",
    "read_hairpin",
    "read_hwmode",
    "read_links",
    "read_vfs",
    "set_hairpin",
    "set_hwmode",
    "set_link_up",
    "enforce_vf",
    "watch_links",
]
