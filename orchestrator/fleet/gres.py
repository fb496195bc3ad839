"""Resources of a node that Slurm counts by name (GRES), in the words of its commands. Slots of groups are in `apart`."""

from __future__ import annotations

import re

from orchestrator.values import CpuSet

VF, NVME = "vf", "nvme"
"""VFs have a file each, so that a job learns which it has. NVMe controllers are only counted: the manager chooses them."""


def count_gres(name: str, text: str) -> int:
    """The number of a resource in a list such as ``vf:4,nvme:2``; 0 if the list does not have it.

    A request of a job is printed as ``gres:vf:1``, in newer versions as ``gres/vf=1``. What a job has of a resource without files
    is printed as ``nvme(CNT:2)``.
    """
    match = re.search(rf"(?:^|,)(?:gres[:/])?{name}(?:[:=]|\(CNT:)(\d+)", text)
    return int(match[1]) if match else 0


def parse_indexes(name: str, text: str) -> CpuSet:
    """The indexes that a job has of a resource with files: ``vf:2(IDX:0-1)``, with or without a type."""
    return CpuSet.parse(",".join(re.findall(rf"(?:^|,){name}(?::[^:(,]+)?:\d+\(IDX:([0-9,-]+)\)", text)))
