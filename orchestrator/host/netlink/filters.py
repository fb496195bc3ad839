"""Tables of nftables, family netdev, as the JSON of libnftables-json(5). Each is replaced as a whole, in one transaction."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

from orchestrator.errors import CommandError, HostError
from orchestrator.host.root import Rule
from orchestrator.host.run import run

_FAMILY = "netdev"
_SECONDS = 20
# "device eth0" or, of several, "devices = { eth0, eth1 }" (nft(8), base chains)
_DEVICES = re.compile(r"hook \w+ devices? (?:= )?\{?([^;}]*?)\}? priority")
_HINT = "install nftables; software edges require Linux 5.16 or newer with CONFIG_NETFILTER_EGRESS and NFT_FWD_NETDEV"


def replace_table(table: str, device: str, hook: str, rules: list[Rule], *, policy: str = "accept") -> None:
    """A table with one chain, which sees the frames of a device; ``hook`` is "ingress" or "egress".

    Raises HostError if nft is not installed, or the kernel refuses the rules.
    """
    named = {"family": _FAMILY, "table": table}
    whole = {"table": {"family": _FAMILY, "name": table}}
    chain = {**named, "name": hook, "type": "filter", "hook": hook, "dev": device, "prio": 0, "policy": policy}
    commands: list[dict[str, Any]] = [{"add": whole}, {"delete": whole}, {"add": whole}, {"add": {"chain": chain}}]
    commands += [{"add": {"rule": {**named, "chain": hook, "expr": rule}}} for rule in rules]
    _run(f"load table {table}", ["-j", "-f", "-"], json.dumps({"nftables": commands}))


def read_table(table: str) -> tuple[str, str, tuple[str, ...], list[Rule]] | None:
    """Hook, policy, devices and rules of the table's only chain; None if the table does not exist, or has another form."""
    try:
        found, text = (
            run(["nft", word, "list", "table", _FAMILY, table], timeout=_SECONDS, check=False) for word in ("-j", "-s")
        )
    except CommandError as error:
        raise HostError(f"cannot read table {table} of nftables: {error.message}", _HINT, error.errno) from None
    if found.status or text.status:
        return None
    try:
        entries = json.loads(found.stdout)["nftables"]
        (chain,) = [entry["chain"] for entry in entries if "chain" in entry]
        rules = [[_without_counts(part) for part in entry["rule"]["expr"]] for entry in entries if "rule" in entry]
        return str(chain["hook"]), str(chain["policy"]), _parse_devices(text.stdout), rules
    except (ValueError, KeyError, TypeError):
        return None


def delete_table(table: str) -> None:
    """No-op if it does not exist, or nft is not installed: the rules have no device any more."""
    if shutil.which("nft") is None:
        return
    whole = {"table": {"family": _FAMILY, "name": table}}
    _run(f"delete table {table}", ["-j", "-f", "-"], json.dumps({"nftables": [{"add": whole}, {"delete": whole}]}))


def _run(what: str, words: list[str], text: str) -> None:
    try:
        run(["nft", *words], timeout=_SECONDS, input=text)
    except CommandError as error:
        raise HostError(f"cannot {what} of nftables: {error.message}", _HINT, error.errno) from None


def _parse_devices(text: str) -> tuple[str, ...]:
    # The JSON of nftables 1.0.6 does not name the device.
    match = _DEVICES.search(text)
    return tuple(name.strip().strip('"') for name in match[1].split(",")) if match else ()


def _without_counts(part: dict[str, Any]) -> dict[str, Any]:
    return {"counter": None} if "counter" in part else part
