"""SSH: commands, terminals and files, only on hosts with a known key. No other package uses paramiko."""

from orchestrator.ssh.shell import Completed, KeyRefused, NotStarted, Shell, ShellTimeout, Stream, connect
from orchestrator.ssh.transport import WrongHostKey

__all__ = ["Completed", "KeyRefused", "NotStarted", "Shell", "ShellTimeout", "Stream", "WrongHostKey", "connect"]
