"""Connection plugin `nohype_chroot`: runs Ansible in a root file system on this machine by chroot(8).

The one of community.general does the same, but comes with 500 MB of collections that nothing else here needs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any

from ansible.errors import AnsibleConnectionFailure, AnsibleFileNotFound

from ansible.plugins.connection import ConnectionBase

DOCUMENTATION = """
name: nohype_chroot
short_description: Run tasks in a root file system by chroot
description:
  - The inventory name of the host is the path of the root file system. Must be run as root.
options: {}
"""


class Connection(ConnectionBase):  # type: ignore[misc]
    """A root file system as a host; `remote_addr` is its path."""

    transport = "nohype_chroot"
    has_pipelining = True
    has_tty = False

    def _connect(self) -> Connection:
        if not self._connected:
            root = self._play_context.remote_addr
            if os.geteuid():
                raise AnsibleConnectionFailure("chroot needs root")
            if not os.access(os.path.join(root, "bin/sh"), os.X_OK):
                raise AnsibleConnectionFailure(f"{root} is not a root file system: it has no /bin/sh")
            self._connected = True
        return self

    def exec_command(self, cmd: str, in_data: bytes | None = None, sudoable: bool = True) -> tuple[int, bytes, bytes]:  # noqa: FBT001, FBT002 (Ansible's interface)
        super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
        # The environment of this machine (proxies, languages) must not leak into the image.
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"}
        done = subprocess.run(
            ["chroot", self._play_context.remote_addr, "/bin/sh", "-c", cmd],
            input=in_data or b"", capture_output=True, check=False, env=environment, cwd="/",
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    def put_file(self, in_path: str, out_path: str) -> None:
        super().put_file(in_path, out_path)
        if not os.path.exists(in_path):
            raise AnsibleFileNotFound(f"{in_path} is not there")
        shutil.copyfile(in_path, self._inside(out_path))

    def fetch_file(self, in_path: str, out_path: str) -> None:
        super().fetch_file(in_path, out_path)
        shutil.copyfile(self._inside(in_path), out_path)

    def close(self) -> None:
        self._connected = False

    def _inside(self, path: str) -> Any:
        # normpath: no way out of the root by `..`
        return os.path.join(self._play_context.remote_addr, os.path.normpath("/" + path).lstrip("/"))
