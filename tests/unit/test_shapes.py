"""The types that the client promises are those of the values that the manager sends."""

from __future__ import annotations

import functools
import operator
import types
from enum import StrEnum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from uuid import UUID

import pytest

from orchestrator.client import host_shapes, shapes, switch_shapes
from orchestrator.ledger import Quarantined
from orchestrator.model import cache, disk, host_view, plan, proof, switch, topology, uplink
from orchestrator.model.event import Event
from orchestrator.planning.host_check import HostFinding
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size

VALUES: dict[type, Any] = {
    plan.NicPlan: shapes.Nic,
    plan.VfPlan: shapes.Vf,
    Event: shapes.Event,
    Quarantined: shapes.Quarantined,
    proof.Proof: shapes.Proof,
    uplink.SwitchCount: shapes.SwitchCount,
    uplink.InvariantReading: shapes.InvariantReading,
    uplink.FrameCounts: shapes.FrameCounts,
    uplink.CounterReading: shapes.CounterReading,
    uplink.VepaReadings: shapes.VepaReadings,
    uplink.EdgeReading: shapes.EdgeReading,
    uplink.ModeView: shapes.ModeView,
    uplink.Uplink: shapes.Uplink,
    uplink.HairpinResult: shapes.HairpinResult,
    uplink.Traffic: shapes.Traffic,
    topology.Core: shapes.Core,
    topology.PagePool: shapes.Pool,
    topology.VirtualFunction: shapes.Function,
    topology.Port: shapes.Port,
    topology.PhysicalFunction: shapes.Pf,
    topology.IommuGroup: shapes.Group,
    topology.NvmeNamespace: shapes.Namespace,
    topology.NvmeController: shapes.Controller,
    plan.DiskPlan: shapes.Disk,
    disk.DiskProgress: shapes.DiskProgress,
    cache.CacheShare: shapes.CacheShare,
    cache.CachePlan: shapes.Caches,
    topology.PromisedPages: shapes.Promised,
    topology.Interface: shapes.Interface,
    topology.KernelSetting: shapes.KernelSetting,
    topology.Topology: shapes.Survey,
    HostFinding: shapes.Finding,
    host_view.CoreUse: host_shapes.CoreUse,
    host_view.UnmanagedGuest: host_shapes.UnmanagedGuest,
    host_view.PageUse: host_shapes.PageUse,
    host_view.VcpuActivity: host_shapes.VcpuActivity,
    host_view.OtherThread: host_shapes.OtherThread,
    host_view.GuestActivity: host_shapes.GuestActivity,
    host_view.LastProof: host_shapes.LastProof,
    host_view.LastAudit: host_shapes.LastAudit,
    host_view.Drift: host_shapes.Drift,
    switch.SshAddress: switch_shapes.SshAddress,
    switch.Switch: switch_shapes.Switch,
    switch.UplinkPort: switch_shapes.UplinkPort,
    switch.SwitchView: switch_shapes.SwitchView,
    switch.PortCounters: switch_shapes.PortCounters,
    switch.PortVlan: switch_shapes.PortVlan,
    switch.FdbEntry: switch_shapes.FdbEntry,
    switch.SwitchUplink: switch_shapes.SwitchUplink,
    switch.PortChannel: switch_shapes.PortChannel,
    switch.PairCount: switch_shapes.PairCount,
    switch.Neighbour: switch_shapes.Neighbour,
    switch.SwitchPort: switch_shapes.SwitchPort,
    switch.SwitchState: switch_shapes.SwitchState,
    switch.UplinkNeighbour: switch_shapes.UplinkNeighbour,
    switch.SwitchDetails: switch_shapes.SwitchDetails,
    switch.SwitchCheck: switch_shapes.SwitchCheck,
}
PLAIN: dict[Any, Any] = {**VALUES, CpuSet: str, PciAddress: str, MacAddress: str, UUID: str, Size: int}


def plain_type(kind: Any) -> Any:
    """The type that ``to_plain`` makes of a value of this type."""
    if get_origin(kind) in (Union, types.UnionType):
        return functools.reduce(operator.or_, map(plain_type, get_args(kind)))
    if get_origin(kind) is tuple:
        return list[plain_type(get_args(kind)[0])]  # type: ignore[misc]
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return Literal[tuple(member.value for member in kind)]
    return PLAIN.get(kind, kind)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value.__name__)
def test_shape_has_the_fields_of_its_value(value: type) -> None:
    fields = {name: plain_type(kind) for name, kind in get_type_hints(value).items()}
    if value is topology.Topology:
        del fields["cmdline"]  # it may hold passwords
        del fields["volume_group"], fields["caches"]  # a survey does not read them
        fields |= {"findings": list[shapes.Finding], "housekeeping": str}
    assert fields == get_type_hints(VALUES[value])
