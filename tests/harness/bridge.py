"""A Linux bridge as external switch: in a network namespace, with the end of a cable as its port. Needs root."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paramiko
from pyroute2 import IPRoute

from orchestrator.host.netlink import (
    LinkNotices,
    add_port,
    create_bridge,
    create_netns,
    delete_netns,
    move_to_netns,
    read_bridge,
    set_link_up,
)
from orchestrator.lab.keys import KeyPair, make_key
from orchestrator.model.switch import SshAddress, SwitchPort
from tests.harness.ssh_server import serve

BRIDGE = "br0"


@dataclass(frozen=True)
class Cable:
    """From ``near`` in the namespace of this process to ``far``, the only port of the bridge in ``netns``."""

    netns: str
    near: str
    far: str

    @property
    def port(self) -> SwitchPort:
        """As the kernel reports it now."""
        (found,) = read_bridge(BRIDGE, self.netns).ports
        return found

    def change_port(self, **settings: int) -> None:
        with IPRoute(netns=self.netns) as ipr:
            (index,) = ipr.link_lookup(ifname=self.far)
            ipr.brport("set", index=index, **settings)

    def set_link(self, **settings: Any) -> None:
        with IPRoute(netns=self.netns) as ipr:
            (index,) = ipr.link_lookup(ifname=self.far)
            ipr.link("set", index=index, **settings)

    def rejoin(self) -> None:
        """The port leaves the bridge and joins it again."""
        self.set_link(master=0)
        add_port(BRIDGE, self.far, self.netns)

    def await_forwarding(self) -> SwitchPort:
        """The kernel notices the carrier of a new veth with a delay."""
        with LinkNotices(self.netns) as notices:
            while (found := self.port).state != "forwarding":
                assert notices.wait(60), found
        return found


@contextmanager
def plugged(prefix: str) -> Iterator[Cable]:
    """``prefix``: at most 14 characters, unique on this machine."""
    near, far = f"{prefix}n", f"{prefix}f"
    create_netns(prefix)
    try:
        with IPRoute() as ipr:
            ipr.link("add", ifname=near, kind="veth", peer={"ifname": far})
        create_bridge(BRIDGE, prefix)
        move_to_netns(far, prefix)
        add_port(BRIDGE, far, prefix)
        set_link_up(near, up=True)
        yield Cable(prefix, near, far)
    finally:
        with IPRoute() as ipr:  # with it goes the other end, at once
            for index in ipr.link_lookup(ifname=near):
                ipr.link("del", index=index)
        delete_netns(prefix)


@dataclass
class SshSwitch:
    """An SSH server, and the folder of the programs that it runs."""

    address: SshAddress
    key: Path
    programs: Path
    transports: list[paramiko.Transport]

    def replace_program(self, name: str, script: str) -> None:
        (self.programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.programs / name).chmod(0o755)


def find_programs(cable: Cable) -> dict[str, str]:
    """`ip` and `bridge` that act in the namespace of a cable, and an lldpcli without a daemon."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    enter = f"exec {shutil.which('ip', path=path)} netns exec {cable.netns}"
    found = {name: f'{enter} {shutil.which(name, path=path)} "$@"' for name in ("ip", "bridge")}
    return {**found, "lldpcli": "echo 'no daemon' >&2; exit 1"}


@contextmanager
def ssh_switch(folder: Path, scripts: Mapping[str, str], client: KeyPair | None = None) -> Iterator[SshSwitch]:
    """``scripts``: the programs of the switch. While it serves, PATH of this process begins with their folder. ``client``: the
    key that may log in; None for a new one.
    """
    client, host = client or make_key(), make_key()
    key, programs = folder / "switch_key", folder / "programs"
    key.touch(0o600)
    key.write_bytes(client.private)
    programs.mkdir()
    path = os.environ["PATH"]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        transports: list[paramiko.Transport] = []
        arguments = (listener, host.private.decode(), client.public, transports.append, ("root", "admin"))
        threading.Thread(target=_serve, args=arguments, daemon=True).start()
        address = SshAddress("127.0.0.1", listener.getsockname()[1], "root", host.public)
        switch = SshSwitch(address, key, programs, transports)
        for name, script in scripts.items():
            switch.replace_program(name, script)
        os.environ["PATH"] = f"{programs}:{path}"
        try:
            yield switch
        finally:
            os.environ["PATH"] = path
            for transport in transports:
                transport.close()
            listener.shutdown(socket.SHUT_RDWR)


def _serve(*arguments: Any) -> None:
    try:
        serve(*arguments)
    except OSError:
        pass  # the listener is closed
