"""Prints one image, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from orchestrator.images.store import Image
from orchestrator.model.plan import ImageRef

_BOOT = {"direct": "direct: kernel and initrd of the build", "firmware": "firmware: SeaBIOS from the guest's own disk"}
_LAYOUT = {"ext4": "ext4 on the whole disk", "partitioned": "partitions"}
_READY = {
    "console": "a line on the console (protocol nohype-1)",
    "notify": "a message of the guest's systemd",
    "cloud-init": "the end of cloud-init",
    "ssh": "SSH responds",
    None: "not reported",
}

Users = Sequence[tuple[str, ImageRef]]


def build_document(image: Image, users: Users | None) -> dict[str, object]:
    """``ram_memory``: what a guest without a disk needs, in bytes; ``guests``: null if they cannot be read."""
    guests = None if users is None else [
        {"name": name, "hash": ref.hash, "current": ref.hash in ("", image.hash)} for name, ref in users
    ]  # fmt: skip
    ram = image.ram_root.min_memory.bytes if image.ram_root else None
    return {**image.to_json(full=True), "ram_memory": ram, "guests": guests}


def format_image(image: Image, users: Users | None, unknown: str = "") -> str:
    """``unknown``: why the guests cannot be read, if ``users`` is None."""
    rows = [*_describe(image), *_describe_provenance(image), ("guests", _format_users(image, users, unknown))]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join([f"image {image.name}", *(f"  {name:{width}}{text}".rstrip() for name, text in rows)])


def _describe(image: Image) -> Iterator[tuple[str, str]]:
    yield "build", image.hash
    if image.description:
        yield "description", image.description
    yield "kernel", image.kernel_version or "in the disk"
    yield "boot", _BOOT[image.boot]
    if image.cmdline:
        yield "cmdline", image.cmdline
    yield "memory", f"at least {image.memory}"
    disk = image.disk
    yield "disk", f"{_format(disk.size)}, {_LAYOUT[disk.layout]}" if disk else "none"
    ram = image.ram_root
    if ram:
        sizes = f"{_format(ram.unpacked)} unpacked, {_format(ram.packed)} packed"
        yield (
            "RAM root",
            f"{sizes}; a guest without a disk needs at least {_format(ram.min_memory.bytes)}",
        )
    else:
        yield "RAM root", "none" if disk else "the initrd"
    yield "ready", _READY[image.ready]
    yield "configuration", ", ".join(image.configuration) or "none"
    if disk:
        yield "network root", ", ".join(image.network_root) or "none"
    for name, record in sorted(image.files.items()):
        yield name, f"{_format(record.size)}, SHA-256 {record.sha256}"


def _describe_provenance(image: Image) -> Iterator[tuple[str, str]]:
    made = image.provenance
    if made is None:
        yield "provenance", "not recorded"
        return
    if made.recipe:
        yield "recipe", made.recipe
    if made.source:
        yield "source", made.source
    if made.lock:
        yield "lock file", f"SHA-256 {made.lock}"
    yield "packages", f"{len(made.packages)} (names and versions: --json)" if made.packages else "not recorded"
    yield "tools", ", ".join(f"{name} {version}" for name, version in sorted(made.tools.items())) or "not recorded"


def _format_users(image: Image, users: Users | None, unknown: str) -> str:
    if users is None:
        return f"unknown: {unknown}"
    shown = [name if ref.hash in ("", image.hash) else f"{name} (build {ref.hash[:12]})" for name, ref in users]
    return ", ".join(shown) or "none"


def _format(size: int) -> str:
    """Rounded up to 0.1 MB for large sizes, as a figure that is a minimum must be."""
    if size < 1 << 20:
        return f"{size} bytes"
    tenths = -(-size * 10 // (1 << 20))
    return f"{tenths // 10}M" if tenths % 10 == 0 else f"{tenths / 10:.1f}M"
