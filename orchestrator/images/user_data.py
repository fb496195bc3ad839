"""Checks what a caller gives to cloud-init, before anything is claimed: cloud-init reports an error only inside the guest.

User data is a cloud-config (YAML), a script (#!) or MIME multi-part with such parts. A message names lines, parts and words of
cloud-init, and nothing else of the text, which is secret.
"""

from __future__ import annotations

import difflib
import email
import re
from collections.abc import Mapping
from email.message import Message
from email.policy import compat32

from orchestrator.errors import RequestError
from orchestrator.images.cloud_config import KEYS
from orchestrator.images.yaml_tree import Node, parse_yaml
from orchestrator.model.configuration import NETWORK_CONFIG, USER_DATA

_CLOUD_CONFIG = "#cloud-config"
_FORMS = f"begin it with {_CLOUD_CONFIG}, with #! and an interpreter, or with the header of MIME multi-part"
_SHOW_KEYS = "`cloud-init schema -c FILE` checks the whole file"

# Content types that cloud-init executes or merges (cloudinit/handlers/__init__.py). text/plain is examined by its first line.
_SCRIPTS = ("text/x-shellscript", *(f"text/x-shellscript-per-{when}" for when in ("boot", "instance", "once")))
_BOOTHOOK, _PLAIN, _CONFIG = "text/cloud-boothook", "text/plain", "text/cloud-config"
# Types that cloud-init knows and that cannot be checked here: code for cloud-init itself, templates, text from elsewhere.
_REFUSED = ("text/part-handler", "text/jinja2", "text/x-include-url", "text/x-include-once-url", "text/cloud-config-archive",
            "text/cloud-config-jsonp", "text/x-not-multipart")  # fmt: skip
_MAX_PARTS = 64
# RFC 2046 5.1; a header field may begin on any line of a nested part.
_MULTIPART = re.compile(r"^content-type:\s*multipart/", re.IGNORECASE | re.MULTILINE)
_HEADER = re.compile(r"(mime-version|content-type):", re.IGNORECASE)

_DEVICES = ("ethernets", "bonds", "bridges", "vlans")
_PHYSICAL: Mapping[str, tuple[str, ...]] = {
    "match": ("map",), "set-name": ("str",), "wakeonlan": ("bool",), "addresses": ("list",), "routes": ("list",),
    "nameservers": ("map",), "dhcp4": ("bool",), "dhcp6": ("bool",), "dhcp4-overrides": ("map",), "dhcp6-overrides": ("map",),
    "accept-ra": ("bool",), "gateway4": ("str",), "gateway6": ("str",), "mtu": ("int",), "optional": ("bool",),
    "critical": ("bool",), "macaddress": ("str",), "renderer": ("str",), "link-local": ("list",), "ipv6-privacy": ("bool",),
    "ipv6-address-generation": ("str",), "dhcp-identifier": ("str",), "optional-addresses": ("list",),
    "routing-policy": ("list",),
}  # fmt: skip
_MADE: Mapping[str, tuple[str, ...]] = {**_PHYSICAL, "interfaces": ("list",), "parameters": ("map",)}
_VLAN: Mapping[str, tuple[str, ...]] = {**_PHYSICAL, "id": ("int",), "link": ("str",)}


def check_user_data(text: str) -> None:
    """Raises RequestError if cloud-init would not understand the text."""
    first = text.partition("\n")[0].strip()
    if _is_cloud_config(text):
        _check_cloud_config(text, USER_DATA)
    elif first.startswith("#!"):
        _check_script(text, USER_DATA)
    elif _HEADER.match(first):
        _check_multipart(text)
    else:
        raise RequestError(f"{USER_DATA}: unknown format of the first line", _FORMS)


def check_network_config(text: str) -> None:
    """Raises RequestError if the text is not a network configuration of version 2 (netplan's format)."""
    root = parse_yaml(text, NETWORK_CONFIG)
    if root.kind == "map" and (inner := root.find("network")) is not None:
        if len(root.keys) > 1:
            raise RequestError(f"{NETWORK_CONFIG}: keys beside network; move them into it")
        root = inner
    _check_kind(root, ("map",), NETWORK_CONFIG, "the text")
    version = root.find("version")
    if version is None or version.text != "2":
        raise RequestError(f"{NETWORK_CONFIG}: the version is not 2", "write `version: 2` and the devices below ethernets")
    _check_keys(root, {"version": ("int",), "renderer": ("str",), **dict.fromkeys(_DEVICES, ("map",))}, NETWORK_CONFIG)
    for kind, keys in zip(_DEVICES, (_PHYSICAL, _MADE, _MADE, _VLAN), strict=True):
        devices = root.find(kind)
        for _, device in devices.keys if devices else ():
            _check_kind(device, ("map",), NETWORK_CONFIG, f"a device of {kind}")
            _check_keys(device, keys, NETWORK_CONFIG)


def _is_cloud_config(text: str) -> bool:
    return text.partition("\n")[0].split()[:1] == [_CLOUD_CONFIG]


def _check_cloud_config(text: str, what: str) -> None:
    root = parse_yaml(text, what)
    if root.kind == "null":
        return
    _check_kind(root, ("map",), what, "a cloud-config")
    # An unknown key is refused: cloud-init would only write a warning into a log of the guest, and most are spelling errors.
    _check_keys(root, KEYS, what)


def _check_keys(node: Node, known: Mapping[str, tuple[str, ...]], what: str) -> None:
    for key, value in node.keys:
        if key.kind == "merge":
            raise RequestError(f"{what}: line {key.line}: a merge key (<<) is not supported here", "write its keys out")
        if key.text not in known:
            near = difflib.get_close_matches(key.text[:100], known, 1)
            hint = f"the nearest known key is {near[0]}; {_SHOW_KEYS}" if near else _SHOW_KEYS
            raise RequestError(f"{what}: line {key.line}: unknown key", hint)
        _check_kind(value, known[key.text], what, key.text)


def _check_kind(node: Node, kinds: tuple[str, ...], what: str, name: str) -> None:
    # YAML 1.1 reads some words as other types: `hostname: 1234` is a number, and cloud-init converts it to text.
    found = "str" if "str" in kinds and node.kind in ("int", "float", "timestamp", "binary") else node.kind
    if found not in kinds:
        raise RequestError(f"{what}: line {node.line}: {name} has the type {found}, expected {' or '.join(kinds)}", _SHOW_KEYS)


def _check_script(text: str, what: str) -> None:
    words = text.partition("\n")[0].strip().removeprefix("#!").split()
    if not words or not words[0].startswith("/"):
        raise RequestError(f"{what}: the first line of the script does not name an interpreter", "begin it with #!/bin/sh")


def _check_multipart(text: str) -> None:
    if len(_MULTIPART.findall(text)) != 1:  # before it is parsed: email's parser recurses
        raise RequestError(
            f"{USER_DATA}: nested MIME multi-parts, or none, are not supported", "use one multi-part with all parts"
        )
    message: Message = email.message_from_string(text, policy=compat32)
    parts = message.get_payload()
    if not isinstance(parts, list) or message.defects:
        raise RequestError(f"{USER_DATA}: damaged MIME multi-part", "create it with `cloud-init devel make-mime`")
    if len(parts) > _MAX_PARTS:
        raise RequestError(f"{USER_DATA}: {len(parts)} parts, at most {_MAX_PARTS} are allowed")
    for number, part in enumerate(parts, start=1):
        _check_part(part, f"{USER_DATA}: part {number}")


def _check_part(part: Message, what: str) -> None:
    kind = part.get_content_type()
    text = _decode(part, what)
    if kind == _CONFIG or (kind == _PLAIN and _is_cloud_config(text)):
        _check_cloud_config(text, what)
    elif kind in _SCRIPTS or (kind == _PLAIN and text.startswith("#!")):
        _check_script(text, what)
    elif kind != _BOOTHOOK:  # any text
        found = f"the content type {kind}" if kind in (_PLAIN, *_REFUSED) else "an unknown content type"
        raise RequestError(f"{what} has {found}, which is not supported", f"use {', '.join((_CONFIG, _BOOTHOOK, *_SCRIPTS))}")


def _decode(part: Message, what: str) -> str:
    content = part.get_payload(decode=True)
    if part.defects or not isinstance(content, bytes):
        raise RequestError(f"{what} is damaged", "create it with `cloud-init devel make-mime`")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise RequestError(f"{what} is not text in UTF-8", "do not compress the parts") from None
