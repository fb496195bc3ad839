"""SSH: commands, terminals and files, only on hosts with a known key. No other package uses paramiko."""

from orchestrator.ssh.shell import Completed, Shell, ShellTimeout, Stream, connect

__all__ = ["Completed", "Shell", "ShellTimeout", "Stream", "connect"]
