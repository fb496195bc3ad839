"""The counters of KVM for a guest, through libvirt and QEMU."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import libvirt

_VCPU_COUNTER = re.compile(r"vcpu\.(\d+)\.(\w+)\.sum")


def read_exits(domain: Any) -> tuple[dict[str, int], ...]:
    """The counters since the guest started; raises what libvirt raises."""
    return parse_exits(domain.connect().domainListGetStats([domain], libvirt.VIR_DOMAIN_STATS_VCPU)[0][1])


def parse_exits(statistics: Mapping[str, Any]) -> tuple[dict[str, int], ...]:
    """The counters per vCPU: `exits`, `halt_exits`, `io_exits`, ... The names come from the kernel through QEMU (query-stats)
    and are not stable: treat every key as optional.
    """
    counters: dict[int, dict[str, int]] = {}
    for key, value in statistics.items():
        if match := _VCPU_COUNTER.fullmatch(key):
            counters.setdefault(int(match[1]), {})[match[2]] = int(value)
    return tuple(counters[index] for index in sorted(counters))
