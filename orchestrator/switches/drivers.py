"""The drivers of external switches. A new driver is one more entry here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.errors import RequestError
from orchestrator.model.switch import Switch, SwitchDriver
from orchestrator.switches.base import Capability, Driver
from orchestrator.switches.bridge_commands import RemoteBridge
from orchestrator.switches.commands import SshCommands
from orchestrator.switches.linux_bridge import LinuxBridge


def open_driver(switch: Switch, key: Path | None) -> Driver:
    """Connects at the first call of a method. ``key``: the private SSH key of the manager, None without one."""
    commands = SshCommands(switch.ssh, key) if switch.ssh else None
    if switch.driver is SwitchDriver.LINUX_BRIDGE:
        return RemoteBridge(switch.bridge, commands) if commands else LinuxBridge(switch.bridge, switch.netns or None)
    raise RequestError(f"no driver for switches of the kind {switch.driver}", "see docs/switches.md")


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
