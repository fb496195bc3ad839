"""Which images can be configured with what, and the two forms of a configuration: credentials of systemd, seed of cloud-init.

If an image supports both, it gets keys and network by credentials, and cloud-init gets the rest: two programs must not set the
same thing. Credentials are in libvirt's XML and QEMU's arguments, so nothing secret is in them (systemd.system-credentials(7)).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from ipaddress import IPv6Interface, ip_interface
from pathlib import Path

from orchestrator.errors import OrchestratorError, RequestError
from orchestrator.images.cpio import build_archive
from orchestrator.images.description import Description
from orchestrator.images.store import Image, find_image, image_names
from orchestrator.model.configuration import (
    CLOUD_INIT,
    CREDENTIALS,
    NETWORK_CONFIG,
    USER_DATA,
    Configuration,
    NicAddress,
    list_fields,
)
from orchestrator.model.request import GuestRequest

SEED_ARGUMENT = "ds=nocloud;s=/run/cloud-seed/"
"""For the kernel command line (cloud-init's data source NoCloud). The image's initramfs keeps /run for the root file system."""

_SEED = "run/cloud-seed"
_FOR_CLOUD_INIT = (USER_DATA, NETWORK_CONFIG)
"""Fields that only cloud-init understands."""


def has_seed(image: Description) -> bool:
    """The seed is a part of the initrd, which an image that is booted by firmware does not get from the host."""
    return CLOUD_INIT in image.configuration and image.boot == "direct"


def find_unsupported(image: Description, request: GuestRequest) -> tuple[str, ...]:
    """The request's fields with which the image cannot be configured."""
    seed = has_seed(image)
    both = seed or CREDENTIALS in image.configuration
    return tuple(name for name in list_fields(request) if not (seed if name in _FOR_CLOUD_INIT else both))


def check_texts(request: GuestRequest) -> None:
    """Raises RequestError if cloud-init would not understand one of the request's secret texts."""
    texts = {name: secret.text for name, secret in request.secrets.items() if name in _FOR_CLOUD_INIT and secret.text is not None}
    if not texts:
        return
    # Parsers of YAML and MIME take memory, and most guests have no such text.
    from orchestrator.images.user_data import check_network_config, check_user_data

    for name, text in texts.items():
        (check_user_data if name == USER_DATA else check_network_config)(text)


def build_credentials(image: Description, configuration: Configuration) -> dict[str, str]:
    """Credential → content; empty for an image that does not support credentials."""
    if CREDENTIALS not in image.configuration:
        return {}
    credentials = {"system.hostname": configuration.hostname}
    if configuration.ssh_keys:
        credentials["ssh.authorized_keys.root"] = "".join(f"{key}\n" for key in configuration.ssh_keys)
    if configuration.network_config is None:
        # Read by systemd-network-generator(8).
        for number, nic in enumerate(configuration.nics):
            credentials[f"network.network.50-nohype{number}"] = _format_network(nic, keep=configuration.disk_login is not None)
    return credentials


def build_seed(image: Description, configuration: Configuration) -> bytes | None:
    """The archive to append to the initrd; None for an image without a seed."""
    if not has_seed(image):
        return None
    alone = CREDENTIALS not in image.configuration
    # cloud-init stores what it has done under the instance's id: it is a new one for each guest, and stays with a guest.
    metadata: dict[str, object] = {"instance-id": str(configuration.uuid), "local-hostname": configuration.hostname}
    if alone and configuration.ssh_keys:
        metadata["public-keys"] = list(configuration.ssh_keys)
    network: dict[str, object] = _build_network(configuration.nics) if alone else {"config": "disabled"}
    texts = {
        "meta-data": json.dumps(metadata),  # JSON is YAML
        "user-data": configuration.user_data or "#cloud-config\n{}\n",
        "network-config": configuration.network_config or json.dumps(network),
    }
    return build_archive({f"{_SEED}/{name}": text.encode() for name, text in texts.items()})


def _build_network(nics: Sequence[NicAddress]) -> dict[str, object]:
    """Network configuration of cloud-init, version 2. A NIC without an address uses DHCP, as in images for clouds.

    The NICs get names: cloud-init's renderer for systemd-networkd requires the name of the entry in addition to the MAC address.
    """
    devices: dict[str, Mapping[str, object]] = {}
    for number, nic in enumerate(nics):
        settings: Mapping[str, object] = {"addresses": [nic.address]} if nic.address else {"dhcp4": True, "optional": True}
        name = f"nic{number}"
        devices[name] = {"match": {"macaddress": str(nic.mac)}, "set-name": name, **settings}
    return {"version": 2, "ethernets": devices}


def _format_network(nic: NicAddress, *, keep: bool) -> str:
    """A file of systemd.network(5). Type=ether excludes VLANs and bridges above the NIC, which have its address too.

    ``keep``: the initramfs has configured a NIC, and the root is reached through it.
    """
    lines = ["[Match]", f"MACAddress={nic.mac}", "Type=ether"]
    if not nic.address:
        # No program waits for the reply of a DHCP server that may not exist.
        return "\n".join((*lines, "[Link]", "RequiredForOnline=no", "[Network]", "DHCP=yes", ""))
    lines += ["[Network]", "KeepConfiguration=yes"] if keep else []
    lines += ["[Address]", f"Address={nic.address}"]
    if isinstance(ip_interface(nic.address), IPv6Interface):
        # The external switch sends multicast back to its sender too: the guest would take itself for a duplicate.
        lines.append("DuplicateAddressDetection=none")
    return "\n".join((*lines, ""))


def list_configurable(store: Path, request: GuestRequest) -> tuple[str, ...]:
    """The images in the store that can be configured with the request's fields. Omits damaged images."""
    found = []
    for name in image_names(store):
        try:
            if not find_unsupported(find_image(store, name), request):
                found.append(name)
        except OrchestratorError:
            continue
    return tuple(found)


def check_configurable(image: Image, request: GuestRequest, store: Path | None) -> None:
    """Raises RequestError if the image cannot be configured with a field of the request, or a text has an error.

    ``store``: the hint names the images in it that can be; None if the caller may not know their names.
    """
    if unsupported := find_unsupported(image, request):
        ways = " and ".join(image.configuration) or "no configuration"
        boots = ", and boots by firmware" if image.boot == "firmware" else ""
        others = list_configurable(store, request) if store else None
        hint = (
            "ask the operator of the host for an image that supports them"
            if others is None
            else f"use an image that supports them: {', '.join(others) or 'the store has none'}"
        )
        raise RequestError(f"image {image.name} does not support {', '.join(unsupported)}: it supports {ways}{boots}", hint)
    if request.profile and image.boot == "firmware":
        what = f"image {image.name} boots by firmware: the manager cannot give its kernel the words of profile {request.profile}"
        raise RequestError(what, "omit the profile, and set the words in the image's boot loader: docs/exits.md lists them")
    check_texts(request)
