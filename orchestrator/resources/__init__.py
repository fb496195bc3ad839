"""Changes to the host with their undo, by noun. Importing this package fills the registry of steps."""

from orchestrator.resources import configuration, cores, isolation, memory, nic, uplink

__all__ = ["configuration", "cores", "isolation", "memory", "nic", "uplink"]
