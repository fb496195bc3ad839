"""NoHype on stock Linux: dedicated cores, static memory, passed-through devices, switching in the network."""

__version__ = "0.1.0"
