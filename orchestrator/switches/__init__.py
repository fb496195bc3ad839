"""Drivers of external switches: they read a port, set reflective relay on it, and count what it reflects."""
