"""Builds the QEMU command line of the emulated server. Pure.

QEMU runs by chroot(2) in the tools root, in its own mount namespace, with its files bind-mounted below /mnt. This changes nothing
on the machine, leaves no mounts behind, and runs the same QEMU on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from orchestrator.lab.spec import LabImage, LabSpec

INSIDE = Path("/mnt")  # where QEMU sees its files

SPARE_PORT = "spare"
"""An empty PCI slot, for a disk that is added or removed while the lab runs."""

THIS_MACHINE = "10.0.2.2"
"""This machine, as QEMU's user network shows it to the lab."""

TPM = "tpm.sock"
"""Socket of the TPM's emulator, in the folder of the lab."""

MANAGEMENT_MAC = "52:54:00:00:00:01"

# Prepares the root of QEMU, then executes QEMU. Arguments: parent pid, root, name=path per file or folder, --, command.
# The check of $PPID closes a gap: if the keeper is killed before setpriv sets the death signal, no signal would kill QEMU.
# No core dump: that of an aborting emulator would be as large as the lab's memory, and delay the report of its exit.
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
    """The words before QEMU's own command line: private mounts, chroot, and the death signal.

    ``binds`` are the files and folders that QEMU sees as /mnt/NAME. When the calling process ``parent`` exits, the kernel kills
    QEMU (PR_SET_PDEATHSIG, kept across execve(2)).
    """
    return [
        "setpriv", "--pdeathsig", "KILL",
        "unshare", "--mount", "--propagation", "private",
        "sh", "-c", _ENTER, "enter", str(parent), str(tools), *(f"{name}={path}" for name, path in binds.items()), "--",
        # For the unlinked file that snapshot=on writes to: on disk, since /tmp may be a tmpfs.
        "env", "TMPDIR=/var/tmp", "LC_ALL=C",
    ]  # fmt: skip


def build_argv(spec: LabSpec, image: LabImage, *, name: str, kvm: bool, tap: int | None) -> list[str]:
    """``tap`` is the descriptor of the tap behind the NIC; required if the spec has VFs."""
    return [
        "qemu-system-x86_64",
        "-name", f"nohype-lab-{name},process=nohype-{name}"[:80],
        # Only the devices listed here: no floppy, VGA or e1000.
        "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none",
        # Interrupt remapping requires the I/O APIC in QEMU; KVM gets only the local APICs.
        "-M", "q35,sata=off,smbus=off" + (",kernel-irqchip=split" if kvm else ""),
        *_accelerator(kvm=kvm),
        "-smp", f"{spec.cpus},sockets={spec.sockets},cores={spec.cores},threads={spec.threads}",
        "-m", str(spec.size),
        *_nodes(spec),
        # Translates the guests' DMA and remaps their interrupts (VFIO requires it); caching-mode lets QEMU see new mappings.
        "-device", "intel-iommu,intremap=on,caching-mode=on,aw-bits=48",
        *_boot(spec, image),
        # snapshot: labs never change the image. cache=unsafe: no data outlives the lab, so nothing needs to be flushed.
        "-drive", f"if=none,id=root,file={_inside('root.raw')},format=raw,cache=unsafe,snapshot=on",
        "-device", "virtio-blk-pci,drive=root,bus=pcie.0",
        # Port 0: the kernel chooses a free port, so labs cannot collide; `info usernet` shows it.
        "-netdev", "user,id=management,hostfwd=tcp:127.0.0.1:0-:22",
        "-device", f"virtio-net-pci,bus=pcie.0,netdev=management,mac={MANAGEMENT_MAC}",
        *_nic(spec, name, tap),
        *_disks(spec),
        *_tpm(spec),
        # A fresh root file system has no entropy: without this sshd and TLS wait for it.
        "-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng,bus=pcie.0",
        "-fw_cfg", f"name=opt/io.systemd.credentials/tmpfiles.extra,file={_inside('lab/tmpfiles.extra')}",
        "-serial", f"file:{_inside('lab/console.log')}",
        "-qmp", f"unix:{_inside('lab/qmp')},server=on,wait=off",
    ]  # fmt: skip


def _boot(spec: LabSpec, image: LabImage) -> list[str]:
    if spec.plain:
        return []
    # QEMU exits on a panic or reboot: a lab that boots again would hide it.
    return ["-kernel", _inside("kernel"), "-initrd", _inside("initrd"), "-append", build_cmdline(image), "-no-reboot"]


def build_tpm_argv() -> list[str]:
    """The TPM's emulator, which exits when QEMU closes its connection."""
    state, control = f"dir={_inside('lab')},mode=0600", f"type=unixio,path={_inside(f'lab/{TPM}')}"
    return ["swtpm", "socket", "--tpm2", "--tpmstate", state, "--ctrl", control, "--terminate"]


def build_cmdline(image: LabImage) -> str:
    """The kernel command line: this machine's words, then those of the host role for any NoHype host.

    no_timer_check: while it boots, the kernel panics if a timer does not tick for some milliseconds ("timer doesn't work through
    Interrupt-remapped IO-APIC"), as when the emulator has to wait for a CPU. Linux omits this check on KVM too (kernel/kvm.c).
    """
    return f"root=/dev/vda rw console=ttyS0 panic=-1 no_timer_check {image.cmdline}".strip()


def _inside(name: str) -> str:
    return str(INSIDE / name)


def _accelerator(*, kvm: bool) -> list[str]:
    if kvm:
        return ["-accel", "kvm", "-cpu", "host"]
    # max: every feature of TCG, with SVM and nested paging for the guests.
    # tb-size (MB): with the default, eight CPUs flush and refill the translation cache all the time.
    return ["-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "max"]


def _nodes(spec: LabSpec) -> list[str]:
    words = []
    for node in range(spec.nodes):
        words += ["-object", f"memory-backend-ram,id=ram{node},size={spec.node_memory}"]
        words += ["-numa", f"node,nodeid={node},cpus={spec.node_cpus(node)},memdev=ram{node}"]
        # PCI functions have a NUMA node only below a host bridge that has one.
        words += ["-device", f"pxb-pcie,id=pxb{node},bus=pcie.0,bus_nr={64 * (node + 1)},numa_node={node}"]
    return words


def data_mac(lab: str) -> str:
    """Differs between labs, since they may share a switch."""
    return "52:54:00:" + hashlib.sha256(lab.encode()).digest()[:3].hex(":")


def _nic(spec: LabSpec, lab: str, tap: int | None) -> list[str]:
    if not spec.vfs:
        return []
    return [
        "-netdev", f"tap,id=data,fd={tap}",
        "-device", "pcie-root-port,id=port0,bus=pxb0,slot=1,chassis=1",
        # Intel 82576: SR-IOV with 7 VFs; the NIC of the NoHype prototype.
        "-device", f"igb,bus=port0,netdev=data,mac={data_mac(lab)}",
    ]  # fmt: skip


def _disks(spec: LabSpec) -> list[str]:
    slot = len(spec.disks) + 2
    words = ["-device", f"pcie-root-port,id={SPARE_PORT},bus=pxb0,slot={slot},chassis={slot}"] if spec.disks else []
    for index in range(len(spec.disks)):
        # Whole controllers, as VFs of QEMU's NVMe cannot be bound (ENODEV in 10.0). Nodes in turn.
        # Every other disk ignores a discard and reports success, as some real disks do: a scrub must notice.
        discard = ("unmap", "ignore")[index % 2]
        file = f"file={_inside(f'lab/disk{index}')},format=raw,cache=unsafe,snapshot=on,discard={discard}"
        words += ["-drive", f"if=none,id=disk{index},{file}"]
        port, bus = f"port{index + 1}", f"pxb{index % spec.nodes}"
        words += ["-device", f"pcie-root-port,id={port},bus={bus},slot={index + 2},chassis={index + 2}"]
        words += ["-device", f"nvme,serial=nohype-disk{index},drive=disk{index},bus={port}"]
    return words


def _tpm(spec: LabSpec) -> list[str]:
    if not spec.tpm:
        return []
    return [
        "-chardev", f"socket,id=tpm,path={_inside(f'lab/{TPM}')}", "-tpmdev", "emulator,id=tpm0,chardev=tpm",
        "-device", "tpm-crb,tpmdev=tpm0",
    ]  # fmt: skip
