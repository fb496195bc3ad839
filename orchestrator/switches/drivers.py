"""The drivers of external switches. A new driver is one more entry here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.model.switch import Switch, SwitchDriver
from orchestrator.switches.base import Capability, Driver
from orchestrator.switches.bridge_commands import RemoteBridge
from orchestrator.switches.commands import LocalCommands, SshCommands
from orchestrator.switches.linux_bridge import LinuxBridge
from orchestrator.switches.openvswitch import OpenVSwitch


def open_driver(switch: Switch, key: Path | None) -> Driver:
    """Connects at the first call of a method. ``key``: the private SSH key of the manager, None without one."""
    return _DRIVERS[switch.driver](switch, key)


def _open_bridge(switch: Switch, key: Path | None) -> Driver:
    if switch.ssh:
        return RemoteBridge(switch.bridge, SshCommands(switch.ssh, key))
    return LinuxBridge(switch.bridge, switch.netns or None)


def _open_openvswitch(switch: Switch, key: Path | None) -> Driver:
    return OpenVSwitch(switch.bridge, SshCommands(switch.ssh, key) if switch.ssh else LocalCommands())


_DRIVERS: dict[SwitchDriver, Callable[[Switch, Path | None], Driver]] = {
    SwitchDriver.LINUX_BRIDGE: _open_bridge,
    SwitchDriver.OPENVSWITCH: _open_openvswitch,
}


@contextmanager
def opened(switch: Switch, key: Path | None) -> Iterator[Driver]:
    driver = open_driver(switch, key)
    try:
        yield driver
    finally:
        driver.close()


def list_capabilities(switch: Switch) -> tuple[str, ...]:
    able = open_driver(switch, None).can
    return tuple(str(one) for one in Capability if one in able)
