"""The emulated server as a QEMU command line. Pure: a spec and an accelerator go in, arguments come out.

QEMU runs by chroot from the tools root, in a mount namespace of its own, with what it needs bound below /mnt: nothing of the
machine changes, nothing stays mounted when it ends, and every machine runs the same QEMU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from orchestrator.lab.spec import LabImage, LabSpec

# Where QEMU sees its files.
INSIDE = Path("/mnt")

MANAGEMENT_MAC = "52:54:00:00:00:01"
DATA_MAC = "52:54:00:00:01:00"

# Makes the root that QEMU sees, then becomes QEMU. Arguments: our pid, root, name=path for each file or folder, --, command.
# The second line closes a gap: had the keeper been killed before setpriv asked for its death signal, nobody would end QEMU.
# A core dump of an emulator that aborts would be as large as the lab's memory, and delay the word of its end.
_ENTER = """set -e
ulimit -c 0
[ "$PPID" = "$1" ]
root=$2; shift 2
for name in dev proc sys; do mount --rbind "/$name" "$root/$name"; done
mount -t tmpfs -o mode=700 tmpfs "$root/mnt"
while [ "$1" != -- ]; do
  source=${1#*=} target=$root/mnt/${1%%=*}
  if [ -d "$source" ]; then mkdir "$target"; else : > "$target"; fi
  mount --bind "$source" "$target"
  shift
done
shift
exec chroot "$root" "$@"
"""


def build_entry(tools: Path, binds: Mapping[str, Path], parent: int) -> list[str]:
    """The words before QEMU's own: die with the parent, private mounts, chroot.

    Args:
        tools: root file system that QEMU comes from.
        binds: files and folders that QEMU sees as /mnt/NAME.
        parent: our process id; QEMU is killed when that process ends (PR_SET_PDEATHSIG, kept across execve(2)).
    """
    return [
        "setpriv", "--pdeathsig", "KILL",
        "unshare", "--mount", "--propagation", "private",
        "sh", "-c", _ENTER, "enter", str(parent), str(tools), *(f"{name}={path}" for name, path in binds.items()), "--",
        # snapshot=on writes to an unlinked file here: on disk, since /tmp may be memory, and gone with QEMU.
        "env", "TMPDIR=/var/tmp", "LC_ALL=C",
    ]  # fmt: skip


def build_argv(spec: LabSpec, image: LabImage, *, name: str, kvm: bool, tap: int | None) -> list[str]:
    """QEMU and its arguments.

    Args:
        name: the lab's name, for process lists.
        kvm: use KVM instead of emulation.
        tap: descriptor of the tap that is the NIC's cable; needed when the spec has VFs.
    """
    return [
        "qemu-system-x86_64",
        "-name", f"nohype-lab-{name},process=nohype-{name}"[:80],
        # Nothing but what is listed: no floppy, no VGA, no e1000, none of which a server here has a use for.
        "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none",
        # Interrupt remapping needs the I/O APIC in QEMU, so KVM may have only the other half of the interrupt controllers.
        "-M", "q35,sata=off,smbus=off" + (",kernel-irqchip=split" if kvm else ""),
        *_accelerator(kvm=kvm),
        "-smp", f"{spec.cpus},sockets={spec.sockets},cores={spec.cores},threads={spec.threads}",
        "-m", str(spec.size),
        *_nodes(spec),
        # The guests' DMA is translated, their interrupts are remapped (VFIO insists); caching-mode lets QEMU see new mappings.
        "-device", "intel-iommu,intremap=on,caching-mode=on,aw-bits=48",
        "-kernel", _inside("kernel"), "-initrd", _inside("initrd"),
        "-append", build_cmdline(image),
        # snapshot: labs leave the image as it was. cache=unsafe: nothing outlives the lab, so nothing need be flushed.
        "-drive", f"if=none,id=root,file={_inside('root.raw')},format=raw,cache=unsafe,snapshot=on",
        "-device", "virtio-blk-pci,drive=root,bus=pcie.0",
        # Port 0: the kernel picks a free port, so that no two labs can fight for one; `info usernet` tells which.
        "-netdev", "user,id=management,hostfwd=tcp:127.0.0.1:0-:22",
        "-device", f"virtio-net-pci,bus=pcie.0,netdev=management,mac={MANAGEMENT_MAC}",
        *_nic(spec, tap),
        *_disks(spec),
        # A fresh root file system has no entropy of its own; without this sshd and TLS wait for it.
        "-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng,bus=pcie.0",
        "-fw_cfg", f"name=opt/io.systemd.credentials/tmpfiles.extra,file={_inside('lab/tmpfiles.extra')}",
        "-serial", f"file:{_inside('lab/console.log')}",
        "-qmp", f"unix:{_inside('lab/qmp')},server=on,wait=off",
        # A lab that panics or reboots ends: one that comes up again by itself would hide it.
        "-no-reboot",
    ]  # fmt: skip


def build_cmdline(image: LabImage) -> str:
    """The kernel command line: what this machine needs, and what the host role wants on any NoHype host."""
    return f"root=/dev/vda rw console=ttyS0 panic=-1 {image.cmdline}".strip()


def _inside(name: str) -> str:
    return str(INSIDE / name)


def _accelerator(*, kvm: bool) -> list[str]:
    if kvm:
        return ["-accel", "kvm", "-cpu", "host"]
    # max: all that TCG can do, with SVM and nested paging for the guests inside.
    # tb-size (MB): the default, a quarter of the memory, is thrown away and refilled all the time by eight CPUs.
    return ["-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "max"]


def _nodes(spec: LabSpec) -> list[str]:
    words = []
    for node in range(spec.nodes):
        words += ["-object", f"memory-backend-ram,id=ram{node},size={spec.node_memory}"]
        words += ["-numa", f"node,nodeid={node},cpus={spec.node_cpus(node)},memdev=ram{node}"]
        # PCI functions have a NUMA node only below a host bridge of their own that has one.
        words += ["-device", f"pxb-pcie,id=pxb{node},bus=pcie.0,bus_nr={64 * (node + 1)},numa_node={node}"]
    return words


def _nic(spec: LabSpec, tap: int | None) -> list[str]:
    if not spec.vfs:
        return []
    return [
        "-netdev", f"tap,id=data,fd={tap}",
        "-device", "pcie-root-port,id=port0,bus=pxb0,slot=1,chassis=1",
        # An Intel 82576: SR-IOV with 7 VFs, and the NIC of the NoHype prototype.
        "-device", f"igb,bus=port0,netdev=data,mac={DATA_MAC}",
    ]  # fmt: skip


def _disks(spec: LabSpec) -> list[str]:
    words = []
    for index in range(len(spec.disks)):
        # Whole controllers, since VFs of QEMU's NVMe cannot be bound (ENODEV in 10.0); on the nodes in turn.
        words += ["-drive", f"if=none,id=disk{index},file={_inside(f'lab/disk{index}')},format=raw,cache=unsafe,snapshot=on"]
        port, bus = f"port{index + 1}", f"pxb{index % spec.nodes}"
        words += ["-device", f"pcie-root-port,id={port},bus={bus},slot={index + 2},chassis={index + 2}"]
        words += ["-device", f"nvme,serial=nohype-disk{index},drive=disk{index},bus={port}"]
    return words
