"""`nohyped`, the system manager: a systemd service."""
