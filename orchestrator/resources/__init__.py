"""Changes to the host with their undo, by noun. Importing this package fills the registry of steps."""

from orchestrator.resources import (
    cache,
    configuration,
    cores,
    disk,
    disk_volume,
    exit_trace,
    isolation,
    memory,
    nic,
    switch,
    switch_trace,
    tap,
    uplink,
)

__all__ = [
    "cache",
    "configuration",
    "cores",
    "disk",
    "disk_volume",
    "exit_trace",
    "isolation",
    "memory",
    "nic",
    "switch",
    "switch_trace",
    "tap",
    "uplink",
]
