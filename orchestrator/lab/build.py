"""Builds what a lab boots from: a root with QEMU, and the image of a lab host with the host role of ansible/ applied.

The stages packages, wheels, role, raw image are each cached by a hash of their inputs. All run natively: under emulation each
would take ten to twenty times longer.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from orchestrator.errors import ImageError
from orchestrator.host.run import run
from orchestrator.images import added_packages, apt, debian, initramfs, wheels
from orchestrator.images.added_packages import add_packages
from orchestrator.images.build import build_image
from orchestrator.images.cache import Progress, build_cached, hash_inputs, remove_tree
from orchestrator.images.initramfs import build_initramfs, find_kernel
from orchestrator.images.logged import run_logged
from orchestrator.lab import ansible, grub, plain
from orchestrator.lab.emulator import PROGRAM, write_record
from orchestrator.lab.keys import SWITCH_KEY
from orchestrator.lab.qemu import THIS_MACHINE
from orchestrator.lab.spec import PAGE, LabImage, LabSpec

# An emulated processor can lose an interrupt in QEMU before 10.2: helpers of SVM change a processor's pending interrupts without
# the lock, while another thread may add one (qemu-devel, 29 August 2025, "treewide: clear bits of cs->interrupt_request with
# cpu_reset_interrupt()"). A lab's CPU stopped once; this is the likely cause, but it could not be reproduced.
_TOOLS_SUITES = (apt.SUITE, debian.BACKPORTS)

# coreutils: the lab starts QEMU through env(1)
_TOOLS = ("coreutils", "qemu-system-x86", "swtpm")

# Programs of the external switch: Open vSwitch, LLDP, and a target for disks on the network.
_SWITCH_TOOLS = ("iproute2", "lldpd", "nftables", "openvswitch-switch", "tgt")

# In addition to the packages of the host role: what a root needs to boot and to serve SSH, two tools for proofs, and the owners
# of disks that the manager must not touch.
_BASE = (
    "busybox-static", "dbus", "fdisk", "linux-image-amd64", "lvm2", "mdadm", "openssh-server", "strace", "systemd-sysv",
    "tcpdump", "udev",
)  # fmt: skip

# Drivers of hardware that servers do not have: half of the modules.
_DROPPED = (
    "sound",
    "drivers/gpu",
    "drivers/media",
    "drivers/net/wireless",
    "drivers/infiniband",
    "drivers/staging",
    "drivers/isdn",
    "net/bluetooth",
)

# crc32c_generic: ext4 requests it by the name of the algorithm, which modules.dep does not list
_INITRD_MODULES = ("crc32c_generic", "virtio_pci", "virtio_blk", "ext4", "qemu_fw_cfg", "virtio_net")
_GUEST_IMAGE = "minimal"
_FILE_SYSTEM, _LARGE_FILE_SYSTEM = "2G", "6G"  # sparse
_PLAIN_DISK = 4 << 30  # bytes, sparse

# The lab has its own initramfs: this variable makes the kernel's hook build none.
_NO_INITRD = {"INITRD": "No"}


def build_tools(cache: Path, *, progress: Progress = lambda _: None) -> Path:
    """Builds a Debian root with the patched QEMU (see ``patches``), to be run by chroot(2) in a mount namespace."""
    _check_root()
    patches = _load_patches()

    def build(folder: Path) -> None:
        progress("tools: building a root with QEMU")
        log = cache / "log" / "tools.log"
        debian.make_root(folder / "root", _TOOLS, cache=cache, log=log, variant="extract", suites=_TOOLS_SUITES)
        for name in ("dev", "proc", "sys", "mnt", "tmp", "var/tmp"):
            (folder / "root" / name).mkdir(parents=True, exist_ok=True)
        write_record(folder / "root", patches.patch_emulator(folder / "root" / PROGRAM))
        run(["chroot", folder / "root", "qemu-system-x86_64", "--version"])

    key = hash_inputs(*_TOOLS_SUITES, _TOOLS, _code(debian.__file__, patches.__file__))
    return build_cached(cache, "tools", key, build, progress=progress) / "root"


def build_switch_tools(cache: Path, *, progress: Progress = lambda _: None) -> Path:
    """Builds a Debian root with the programs of an external switch, to be run by chroot(2); callers must not change it."""
    _check_root()

    def build(folder: Path) -> None:
        progress("switch tools: building a root with Open vSwitch, LLDP and an iSCSI target")
        log = cache / "log" / "switch-tools.log"
        debian.make_root(folder / "root", _SWITCH_TOOLS, cache=cache, log=log, variant="extract")

    key = hash_inputs(apt.SUITE, _SWITCH_TOOLS, _code(debian.__file__))
    return build_cached(cache, "switch-tools", key, build, progress=progress) / "root"


def build_lab(spec: LabSpec, cache: Path, progress: Progress = lambda _: None, *, packages: Sequence[str] = ()) -> LabImage:
    """Builds the image of a lab host: Debian, libvirt, QEMU, this package, the guest image, and the host role applied.

    ``packages`` are additional Debian packages. An image with them has a larger file system.
    """
    _check_root()
    tree = wheels.source_tree()
    if spec.plain:
        return _build_plain(spec, tree, cache, progress, packages)
    host = build_host(spec, tree, cache, progress=progress)
    wheelhouse = wheels.build_wheelhouse(tree, cache, progress=progress)
    guest_images = _build_guest_images(tree, cache, progress)

    def build(folder: Path) -> None:
        root = folder / "root"
        progress(f"lab {spec.name}: installing the package")
        _copy_root(host, root)
        if packages:
            progress(f"lab {spec.name}: installing {', '.join(packages)}")
            log = cache / "log" / f"packages-{spec.name}.log"
            add_packages(root, packages, cache=cache, log=log, env=_NO_INITRD)
        # Applies only the part of the role that installs this package: a change of the sources costs seconds.
        variables = {**role_variables(spec), "nohype_wheelhouse": str(wheelhouse), "nohype_guest_images": guest_images}
        apply_role(tree, root, variables, log=cache / "log" / f"lab-{spec.name}.log", tags="nohype_install")
        progress(f"lab {spec.name}: packing the image")
        _pack(tree, root, folder, _LARGE_FILE_SYSTEM if packages else _FILE_SYSTEM)
        remove_tree(root)

    code = _code(__file__, initramfs.__file__)
    if packages:
        kind, key = (
            f"lab-{spec.name}+packages",
            hash_inputs(str(host), str(wheelhouse), packages, code, _code(added_packages.__file__)),
        )
    else:
        kind, key = f"lab-{spec.name}", hash_inputs(str(host), str(wheelhouse), code)
    return _read_image(build_cached(cache, kind, key, build, progress=progress))


def _build_plain(spec: LabSpec, tree: Path, cache: Path, progress: Progress, added: Sequence[str]) -> LabImage:
    base = build_base(tree, cache, progress=progress)
    packages = (*_BASE, *plain.PACKAGES, *(name for name in read_packages(tree) if name not in plain.LEFT_OUT), *added)

    def build(folder: Path) -> None:
        progress(f"lab {spec.name}: building a root with kernel, GRUB and QEMU")
        root = folder / "root"
        debian.make_root(root, packages, cache=cache, log=cache / "log" / "plain.log", env=_NO_INITRD)
        plain.add_repository(root, base, cache / "debs")
        variables = {"nohype_lab_hostname": f"lab-{spec.name}"}
        apply_role(tree, root, variables, log=cache / "log" / f"lab-{spec.name}.log", playbook="plain")
        progress(f"lab {spec.name}: packing the image")
        plain.pack_disk(root, tree / "ansible/roles/nohype_lab/files/init", _INITRD_MODULES, folder, _PLAIN_DISK)
        remove_tree(root)

    role, playbook = tree / "ansible/roles/nohype_lab", tree / "ansible/playbooks/plain.yml"
    code = _code(__file__, plain.__file__, initramfs.__file__, grub.__file__)
    key = hash_inputs(str(base), packages, spec.name, role, playbook, code)
    return _read_image(build_cached(cache, f"lab-{spec.name}", key, build, progress=progress))


def _read_image(folder: Path) -> LabImage:
    return LabImage(
        kernel=folder / "vmlinuz",
        initrd=folder / "initrd",
        root=folder / "root.raw",
        cmdline=(folder / "cmdline").read_text().strip(),
    )


def build_host(spec: LabSpec, tree: Path, cache: Path, *, progress: Progress) -> Path:
    """The root file system of a lab host with the role applied except this package. Callers must not change it."""
    base = build_base(tree, cache, progress=progress)
    variables = {**role_variables(spec), "nohype_guest_images": _build_guest_images(tree, cache, progress)}

    def build(folder: Path) -> None:
        progress(f"lab {spec.name}: applying the host role")
        _copy_root(base, folder / "root")
        apply_role(tree, folder / "root", variables, log=cache / "log" / f"host-{spec.name}.log")

    # the paths of base and guest image contain hashes
    key = hash_inputs(
        str(base), json.dumps(variables), tree / "ansible", tree / "guest-images", _code(__file__, ansible.__file__)
    )
    return build_cached(cache, f"host-{spec.name}", key, build, progress=progress) / "root"


def _build_guest_images(tree: Path, cache: Path, progress: Progress) -> list[str]:
    return [str(build_image(tree / "guest-images", _GUEST_IMAGE, cache, progress=progress))]


def build_base(tree: Path, cache: Path, *, progress: Progress) -> Path:
    """The root file system of a lab host before the role: packages only. Callers must not change it."""
    packages = (*_BASE, *read_packages(tree))

    def build(folder: Path) -> None:
        progress("lab: building a root with kernel, libvirt and QEMU")
        root = folder / "root"
        debian.make_root(root, packages, cache=cache, log=cache / "log" / "base.log", env=_NO_INITRD)
        version, _ = find_kernel(root)
        for name in _DROPPED:
            shutil.rmtree(root / "usr/lib/modules" / version / "kernel" / name, ignore_errors=True)
        run(["chroot", root, "depmod", version])

    key = hash_inputs(apt.SUITE, packages, _DROPPED, _code(debian.__file__))
    return build_cached(cache, "base", key, build, progress=progress) / "root"


def read_packages(tree: Path) -> tuple[str, ...]:
    text = (tree / "ansible/roles/nohype_host/files/packages.txt").read_text()
    return tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))


def role_variables(spec: LabSpec) -> dict[str, object]:
    """Variables of the host role (ansible/roles/nohype_host/defaults) that depend on the spec."""
    # The kernel distributes these over the nodes; pages of the default size are reserved per node.
    larger = "".join(f"hugepagesz={size} hugepages={n} " for size, n in spec.page_pools.items() if n and size != PAGE)
    return {
        "nohype_offline": True,
        "nohype_housekeeping_cpus": str(spec.housekeeping),
        "nohype_guest_cpus": str(spec.guest_cpus),
        "nohype_hugepages": [spec.hugepages_per_node] * spec.nodes,
        "nohype_vfs_per_uplink": spec.vfs,
        "nohype_switch_addresses": [THIS_MACHINE],
        "nohype_switches": {"ssh_key": SWITCH_KEY},
        "nohype_iomem_relaxed": True,  # the emulated NIC is an 82576
        # the emulated processor is from AMD, which the erratum does not affect
        "nohype_nx_huge_pages": "never",
        # disables self-tests of ciphers and of an entropy source, which take seconds under emulation
        "nohype_extra_cmdline": f"{larger}cryptomgr.notests initcall_blacklist=jent_mod_init loglevel=5",
        "nohype_lab_hostname": f"lab-{spec.name}",
    }


def apply_role(
    tree: Path, root: Path, variables: Mapping[str, object], *, log: Path, tags: str = "all", playbook: str = "lab"
) -> int:
    """Applies the roles of a playbook to a root file system; returns the number of changed tasks.

    ``variables`` are those of ``role_variables``, and ``log`` gets Ansible's output.
    """
    roles = tree / "ansible"
    home = root.parent / f".ansible-{root.name}"
    argv: list[str | Path] = [
        ansible.find_ansible(), "--connection=nohype_chroot", f"--inventory={root},", f"--extra-vars={json.dumps(variables)}",
        f"--tags={tags}", roles / f"playbooks/{playbook}.yml",
    ]  # fmt: skip
    task = "cannot apply the host role to the lab's image"
    try:
        run_logged(argv, task=task, program="Ansible", log=log, timeout=900, env=ansible.build_environment(roles, home))
    finally:
        remove_tree(home)
    return ansible.parse_changed(log.read_text())


def _copy_root(source: Path, target: Path) -> None:
    run(["cp", "--archive", "--reflink=auto", source, target], timeout=600)


def _pack(tree: Path, root: Path, folder: Path, size: str) -> None:
    _, kernel = find_kernel(root)
    shutil.copyfile(kernel, folder / "vmlinuz")
    build_initramfs(root, tree / "ansible/roles/nohype_lab/files/init", _INITRD_MODULES, folder / "initrd")
    shutil.copyfile(root / "etc/nohype/kernel.cmdline", folder / "cmdline")
    for path in (root / "boot").iterdir():  # QEMU loads the kernel
        path.unlink()
    # No journal, no reserve: labs write to a snapshot that is discarded.
    argv = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal,^metadata_csum", "-m", "0", "-L", "nohype-lab"]
    run(
        [*argv, "-d", root, folder / "root.raw", size],
        timeout=600,
        env={"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"},
    )


def _load_patches() -> ModuleType:
    # Imported late: only builds need the libraries of this module.
    try:
        return importlib.import_module("orchestrator.lab.patches")
    except ImportError as error:
        hint = "run `pip install 'nohype-orchestrator[lab]'`"
        raise ImageError(f"cannot patch QEMU: the Python package {error.name} is not installed", hint) from None


def _check_root() -> None:
    if os.geteuid():
        raise ImageError("cannot build a lab: root is required (mmdebstrap, chroot)", "run as root (sudo)")


def _code(*files: str | None) -> str:
    return hash_inputs(*(Path(file) for file in files if file))
