"""An iSCSI target in the network namespace of a lab's external switch: tgtd of the root with the switch's programs.

tgtd runs in a mount namespace and a PID namespace of its own, and ends with the test, also after a kill.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.host.run import run
from orchestrator.images.cache import cache_folder
from orchestrator.lab import switch
from orchestrator.lab.build import build_switch_tools

SERVER, PORT = "10.9.0.1", 3260
IQN = "iqn.2026-11.example:netroot"
READY = "target ready"

# tgtd ignores SIGTERM while it has a target; as the child of process 1 of its PID namespace it is killed with that. The root must
# not change: its folders are bound into an empty one.
_SCRIPT = r"""
set -e
root=$1 file=$2 server=$3 iqn=$4 user=$5 secret=$6
mount -t tmpfs root /mnt
cd /mnt
mkdir usr etc dev proc run run/tgtd tmp var
for name in usr etc; do mount --bind "$root/$name" $name; done
mount --bind /dev dev
mount -t proc proc proc
for name in bin sbin lib lib64; do ln -s usr/$name $name; done
ln -s ../run var/run
touch disk
mount --bind "$file" disk
chroot . tgtd -f --iscsi "portal=$server" </dev/null >/dev/null 2>&1 &
admin() { chroot /mnt tgtadm --lld iscsi "$@"; }
tries=0
until admin --op show --mode target >/dev/null 2>&1; do
    tries=$((tries + 1))
    [ $tries -lt 300 ]
    sleep 0.1
done
admin --op new --mode target --tid 1 -T "$iqn"
admin --op new --mode logicalunit --tid 1 --lun 1 -b /disk
admin --op new --mode account --user "$user" --password "$secret"
admin --op bind --mode account --tid 1 --user "$user"
admin --op bind --mode target --tid 1 -I ALL
echo "target ready"
read -r _ || true
"""


@contextmanager
def serving(lab: str, file: Path, *, user: str, secret: str) -> Iterator[None]:
    """A target with LUN 1, the content of ``file``, at an address of the switch during the block."""
    netns, root = switch.netns_of(lab), build_switch_tools(cache_folder())
    run(["ip", "-n", netns, "address", "replace", f"{SERVER}/24", "dev", switch.BRIDGE])
    contained = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc")
    words = ("sh", "-c", _SCRIPT, "target", root, file, f"{SERVER}:{PORT}", IQN, user, secret)
    argv = ["ip", "netns", "exec", netns, "setpriv", "--pdeathsig", "KILL", *contained, *words]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        first = process.stdout.readline().strip()
        assert first == READY, process.communicate(timeout=60)[1]
        yield
    finally:
        process.kill()
        process.communicate(timeout=60)
        run(["ip", "-n", netns, "address", "delete", f"{SERVER}/24", "dev", switch.BRIDGE])
