"""Requests about external switches, checked strictly. Their texts become words of commands on the switch."""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from orchestrator.model.fields import NameField, as_value_error
from orchestrator.model.ssh_key import MAX_KEY, check_ssh_key
from orchestrator.model.switch import SshAddress, Switch, SwitchDriver, SwitchUplink
from orchestrator.values import MacAddress

MAX_MACS = 64
"""Each pair of them is a flow."""
MAX_UPLINKS = 64
_MAX_INTERFACE = 15  # IFNAMSIZ, less the final zero byte
_INTERFACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.:-]*[A-Za-z0-9])?", re.ASCII)
_USER = re.compile(r"[a-z_][a-z0-9_.-]{0,31}", re.ASCII)
_HOST_KEY = "ssh-ed25519"


def _check_interface(text: str) -> str:
    # Without a hyphen in front, which programs read as an option.
    if not _INTERFACE.fullmatch(text):
        raise ValueError(f"{text!r} is not the name of a bridge or port: a-z, A-Z, 0-9 and . _ - within, up to 15 characters")
    return text


def _check_host(text: str) -> str:
    if not _HOST.fullmatch(text):
        raise ValueError(f"{text!r} is not a host name or IP address")
    return text


def _check_user(text: str) -> str:
    if not _USER.fullmatch(text):
        raise ValueError(f"{text!r} is not the name of a user")
    return text


def _check_host_key(text: str) -> str:
    key = check_ssh_key(text)
    if key.split()[0] != _HOST_KEY:
        raise ValueError(f"the host key is not of the type {_HOST_KEY}; print it on the switch: ssh-keyscan -t ed25519 localhost")
    return " ".join(key.split()[:2])


def _check_mac(text: str) -> str:
    return as_value_error(lambda: str(MacAddress.parse(text)))


InterfaceField = Annotated[str, Field(max_length=_MAX_INTERFACE), AfterValidator(_check_interface)]
MacField = Annotated[str, Field(max_length=17), AfterValidator(_check_mac)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class SshRequest(_Strict):
    """The manager logs in with the key that its configuration names. ``host_key``: the switch's public key."""

    host: Annotated[str, Field(max_length=253), AfterValidator(_check_host)]
    port: Annotated[int, Field(ge=1, le=65535)] = 22
    user: Annotated[str, AfterValidator(_check_user)] = "root"
    host_key: Annotated[str, Field(max_length=MAX_KEY), AfterValidator(_check_host_key)]


class SwitchUplinkRequest(_Strict):
    """An uplink of the host, and the port of the switch that its cable leads to."""

    uplink: InterfaceField
    port: InterfaceField


class SwitchRequest(_Strict):
    """An external switch: a bridge of this host, in a network namespace or not, or of another machine over SSH.

    ``uplinks``: with their ports, unless the configuration has them.
    """

    name: NameField
    driver: Annotated[SwitchDriver, Field(strict=False)]
    bridge: InterfaceField
    netns: Annotated[str, Field(max_length=_MAX_INTERFACE * 4), AfterValidator(_check_interface)] | None = None
    ssh: SshRequest | None = None
    uplinks: Annotated[tuple[SwitchUplinkRequest, ...], Field(max_length=MAX_UPLINKS, strict=False)] = ()

    @model_validator(mode="after")
    def _check_uplinks(self) -> Self:
        for kind, names in (("uplink", [one.uplink for one in self.uplinks]), ("port", [one.port for one in self.uplinks])):
            if repeated := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"uplinks: {kind} {repeated[0]} is given twice; an uplink has one port")
        return self

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        if self.netns and self.ssh:
            raise ValueError("netns and ssh exclude each other: a network namespace is on this host")
        if self.netns and self.driver is SwitchDriver.OPENVSWITCH:
            raise ValueError("netns is for linux-bridge: the programs of Open vSwitch find its daemon by a socket")
        return self

    def build(self) -> Switch:
        ssh = SshAddress(self.ssh.host, self.ssh.port, self.ssh.user, self.ssh.host_key) if self.ssh else None
        uplinks = tuple(SwitchUplink(one.uplink, one.port) for one in self.uplinks)
        return Switch(self.name, self.driver, self.bridge, self.netns or "", ssh, uplinks)


class HairpinRequest(_Strict):
    """Sets reflective relay at a port. ``macs``: the addresses behind it, for a driver that binds addresses."""

    port: InterfaceField
    on: bool
    macs: Annotated[tuple[MacField, ...], Field(max_length=MAX_MACS, strict=False)] = ()
