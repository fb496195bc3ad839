"""Programs that configure a network interface. They may set it down, give it addresses, or put it into a bridge."""

from __future__ import annotations

from orchestrator.errors import HostError
from orchestrator.host.root import HostRoot

# systemd-networkd's states of an interface that it leaves alone, or has not looked at yet (networkctl(1), "unmanaged").
_NOT_MANAGED = ("", "unmanaged", "pending", "initialized")


def find_owner(host: HostRoot, index: int) -> str:
    """The name of the program that manages the interface with this index; empty if none is known.

    Read from the files in which NetworkManager and systemd-networkd keep their state.
    """
    if _read(host, f"run/NetworkManager/devices/{index}").get("managed") in ("true", "1"):
        return "NetworkManager"
    if _read(host, f"run/systemd/netif/links/{index}").get("ADMIN_STATE", "") not in _NOT_MANAGED:
        return "systemd-networkd"
    return ""


def shows_state(host: HostRoot) -> bool:
    """Whether the files of one of the programs, or of the service manager that starts them, can be seen."""
    return any(host.exists(f"run/{name}") for name in ("systemd", "NetworkManager"))


def _read(host: HostRoot, name: str) -> dict[str, str]:
    try:
        lines = (host.find(name) or "").splitlines()
    except HostError:
        return {}
    pairs = (line.partition("=") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}
