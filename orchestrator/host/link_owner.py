"""Programs that configure a network interface. They may set it down, give it addresses, or put it into a bridge."""

from __future__ import annotations

from orchestrator.errors import HostError
from orchestrator.host.root import HostRoot

# systemd-networkd's states (networkctl(1)) of an interface that it leaves alone, and has not looked at yet.
_NOT_MANAGED = ("", "unmanaged")
_UNDECIDED = ("pending", "initialized")


def find_owner(host: HostRoot, index: int) -> str | None:
    """The name of the program that manages the interface with this index; empty if none does, None if that is not decided yet.

    Read from the files in which NetworkManager and systemd-networkd keep their state.
    """
    if _read(host, f"run/NetworkManager/devices/{index}").get("managed") in ("true", "1"):
        return "NetworkManager"
    state = _read(host, f"run/systemd/netif/links/{index}").get("ADMIN_STATE", "")
    if state in _UNDECIDED:
        return None
    return "" if state in _NOT_MANAGED else "systemd-networkd"


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
