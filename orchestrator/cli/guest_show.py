"""A guest as text: a line of `nohype guest list`, and the table of `guest show`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.cli.nics import describe_network
from orchestrator.cli.output import format_size, print_table
from orchestrator.model.cache import BandwidthUnit


def list_columns(shown: Mapping[str, Any]) -> tuple[object, ...]:
    cpus = ",".join(shown["cores"])
    return (
        shown["name"],
        _describe_state(shown),
        cpus,
        shown["node"],
        format_size(shown["memory"]),
        ",".join(nic["address"] or nic["tap"] for nic in shown["nics"]),
        ",".join(nic["mac"] for nic in shown["nics"]),
        shown["image"],
    )


def _describe_state(shown: Mapping[str, Any]) -> str:
    progress = shown.get("progress")
    return f"{shown['state']} ({progress['phase']} {progress['disk']}: {progress['percent']}%)" if progress else shown["state"]


def describe_boot(shown: Mapping[str, Any]) -> str:
    end = shown.get("disengaged")
    return f"{end['time']} (signal: {end['signal']})" if end else "not yet: the guest is in its boot"


def _describe_policy(shown: Mapping[str, Any]) -> str:
    policy, kinds = shown["exit_policy"], ("application", "housekeeping")
    rules = [f"{kind}:{name}={_describe_budget(budget)}" for kind in kinds for name, budget in policy[kind].items()]
    return f"{policy['action']} beyond {' '.join(rules)}"


def _describe_budget(budget: Mapping[str, int | None]) -> str:
    limits = [f"{budget[key]}/{unit}" for key, unit in (("second", "s"), ("minute", "min")) if budget[key] is not None]
    return ",".join(limits) or "any"


def _describe_disk(disk: Mapping[str, Any]) -> str:
    if disk.get("target"):
        return f"{disk['target']}, mounted by the guest over its NIC"
    size = format_size(disk["size"])
    if disk["file"]:
        return f"{disk['file']}, {size}, emulated"
    node = "" if disk["node"] is None else f" on node {disk['node']}"
    return f"NVMe {disk['serial']}, {size}, {disk['address']}{node}"


def _show_bandwidth(value: int, unit: str) -> str:
    if unit == BandwidthUnit.PERCENT:
        return f"{value}%"
    return f"{value * 125 if unit == BandwidthUnit.EIGHTH_GB else value} MB/s"


def _describe_caches(caches: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if not caches:
        return []
    rows = [("cache", f"ways {share['mask']:#x} of L{caches['level']} cache {share['id']}") for share in caches["shares"]]
    if caches["bandwidth"] is not None:
        ids = ", ".join(map(str, caches["throttled"]))
        rows.append(("bandwidth", f"at most {_show_bandwidth(caches['bandwidth'], caches['unit'])} for L3 cache {ids}"))
    return rows


def _describe_nic(nic: Mapping[str, Any]) -> tuple[str, str]:
    if nic["address"] is None:
        return "NIC", f"{nic['tap']} on {nic['interface']}, edge mode {nic['edge']}, address {nic['mac']}{describe_network(nic)}"
    where = f"number {nic['index']} of {nic['interface']} ({nic['pf']})"
    return "VF", f"{nic['address']}, {where}, address {nic['mac']}{describe_network(nic)}"


def print_guest(shown: Mapping[str, Any]) -> None:
    rows: list[tuple[str, object]] = [
        ("name", shown["name"]),
        ("state", _describe_state(shown)),
        ("CPUs", f"{','.join(shown['cores'])} on node {shown['node']} (vCPU n is the n-th of {shown['cpus']})"),
        ("memory", f"{format_size(shown['memory'])}, {shown['huge_pages']} huge pages of {format_size(shown['page_size'])}"),
        *(_describe_nic(nic) for nic in shown["nics"]),
        *(("disk", _describe_disk(disk)) for disk in shown.get("disks", ())),
        *_describe_caches(shown.get("caches")),
        *(("weaker", name) for name in shown.get("waived", ())),
        ("image", shown["image"]),
        ("cmdline", shown["cmdline"]),
        ("restarts", f"{shown['restarts']} ({shown['restart']})"),
    ]
    rows[-1:-1] = [("initiator", shown["initiator"])] if shown.get("initiator") else []
    rows[-1:-1] = [("host name", shown["hostname"])] if shown["hostname"] != shown["name"] else []
    rows[-1:-1] = [("SSH keys", shown["ssh_keys"])] if shown["ssh_keys"] else []
    for title, field in (("user data", "user_data"), ("network configuration", "network_config")):
        rows[-1:-1] = [(title, f"SHA-256 {shown[field]}...")] if shown[field] else []
    if shown["owner"]:
        rows.insert(1, ("tenant", shown["owner"]))
    if shown["id"]:
        rows.insert(1, ("id", shown["id"]))
    if shown.get("housekeeping_vcpus"):
        rows.append(("housekeeping", f"vCPUs {shown['housekeeping_vcpus']}"))
    if shown.get("exit_policy"):
        rows.append(("exit policy", _describe_policy(shown)))
    if shown["state"] == "running":
        rows.append(("disengaged", describe_boot(shown)))
    if shown["ssh_host_key"]:
        rows.append(("SSH host key", shown["ssh_host_key"]))
    if "ready" in shown:
        rows.append(("ready", shown["ready"]))
    rows += [("warning", warning) for warning in shown.get("warnings", ())]
    print_table(rows)
