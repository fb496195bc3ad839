"""Tables of nftables, family netdev, as the JSON of libnftables-json(5). Each is replaced as a whole, in one transaction."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

from orchestrator.errors import CommandError, HostError
from orchestrator.host.root import Chain, Rule
from orchestrator.host.run import run

_FAMILY = "netdev"
_SECONDS = 20
# Of one device; several have the form "devices = { eth0, eth1 }" (nft(8), base chains).
_DEVICE = re.compile(r'chain (\S+) \{\s+type filter hook \w+ device "?(\S+?)"? priority')
_HINT = (
    "install nftables; software edges require Linux 5.16 or newer with CONFIG_NETFILTER_EGRESS, NFT_FWD_NETDEV and NFT_DUP_NETDEV"
)


def replace_table(table: str, *chains: Chain) -> None:
    """Raises HostError if nft is not installed, or the kernel refuses the rules."""
    named = {"family": _FAMILY, "table": table}
    whole = {"table": {"family": _FAMILY, "name": table}}
    commands: list[dict[str, Any]] = [{"add": whole}, {"delete": whole}, {"add": whole}]
    for chain in chains:
        base = {"name": chain.name, "type": "filter", "hook": chain.hook, "dev": chain.device, "policy": chain.policy}
        commands.append({"add": {"chain": named | base | {"prio": chain.priority}}})
        commands += [{"add": {"rule": {**named, "chain": chain.name, "expr": rule}}} for rule in chain.rules]
    _run(f"load table {table}", ["-j", "-f", "-"], json.dumps({"nftables": commands}))


def read_table(table: str) -> tuple[Chain, ...] | None:
    """The table's chains; None if the table does not exist, or has another form than base chains of one device each."""
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
        devices = dict(_DEVICE.findall(text.stdout))  # the JSON of nftables 1.0.6 does not name the device
        chains = [entry["chain"] for entry in entries if "chain" in entry]
        return tuple(
            Chain(
                chain["name"],
                chain["hook"],
                devices[chain["name"]],
                _parse_rules(entries, chain["name"]),
                chain["policy"],
                chain["prio"],
            )
            for chain in chains
        )
    except (ValueError, KeyError, TypeError):
        return None


def count_packets(table: str) -> dict[str, int] | None:
    """By chain, the packets that the counters in its rules have counted since the table was loaded. None without the table."""
    try:
        found = run(["nft", "-j", "list", "table", _FAMILY, table], timeout=_SECONDS, check=False)
    except CommandError as error:
        raise HostError(f"cannot read table {table} of nftables: {error.message}", _HINT, error.errno) from None
    if found.status:
        return None
    try:
        entries = json.loads(found.stdout)["nftables"]
        counts = {entry["chain"]["name"]: 0 for entry in entries if "chain" in entry}
        for rule in (entry["rule"] for entry in entries if "rule" in entry):
            counts[rule["chain"]] += sum(part["counter"]["packets"] for part in rule["expr"] if "counter" in part)
    except (ValueError, KeyError, TypeError):
        return None
    return counts


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


def _parse_rules(entries: list[dict[str, Any]], chain: str) -> list[Rule]:
    rules = [entry["rule"] for entry in entries if "rule" in entry]
    return [[_without_counts(part) for part in rule["expr"]] for rule in rules if rule["chain"] == chain]


def _without_counts(part: dict[str, Any]) -> dict[str, Any]:
    return {"counter": None} if "counter" in part else part
