"""The image `minimal` with more files and commands, for guests that tests and benchmarks send into the lab."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from orchestrator.images.build import build_image
from orchestrator.images.cache import cache_folder
from orchestrator.images.cpio import pad
from orchestrator.images.description import FILE, INITRD, KERNEL
from orchestrator.images.recipe import recipes_folder
from orchestrator.lab.lab import Lab, execute

FRAMES = "frames"
"""The image with `guest_frames.pl` as command `frames`, and with busybox as command `shell`."""

_PROGRAM = Path(__file__).with_name("guest_frames.pl")
_PLACE = "        burn) do_burn"  # in the init of `minimal`: before it commands are added
_COMMANDS = """\
        frames) /opt/ld.so --library-path /opt /opt/perl /opt/frames.pl "$@" ;;
        shell)
            output=$(busybox "$@" 2>&1)
            # shellcheck disable=SC2086,SC2116 # one line
            say 'done' shell "status=$?" "$(echo $output)"
            ;;
"""


def make_frames_image(folder: Path) -> Path:
    """In a new folder below this one."""
    built = build_image(recipes_folder(), "minimal", cache_folder(), progress=print)
    image = folder / FRAMES
    image.mkdir()
    for name in (KERNEL, INITRD, FILE):
        shutil.copyfile(built / name, image / name)
    init = add_commands((recipes_folder() / "minimal" / "init").read_text(), _COMMANDS)
    append(image / INITRD, {"init": init.encode(), "opt/frames.pl": _PROGRAM.read_bytes(), **read_perl()})
    return image


def add_commands(init: str, commands: str) -> str:
    """``commands``: patterns of the shell's `case`."""
    assert init.count(_PLACE) == 1
    return init.replace(_PLACE, commands + _PLACE)


def read_perl() -> dict[str, bytes]:
    """This machine's Perl with its libraries: each Debian system has one (perl-base is essential)."""
    program = shutil.which("perl") or "/usr/bin/perl"
    listed = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    paths = [Path(path) for path in re.findall(r"(/\S+) \(0x", listed)]
    files = {f"opt/{'ld.so' if path.name.startswith('ld-') else path.name}": path.read_bytes() for path in paths}
    assert "opt/ld.so" in files
    return {"opt/perl": Path(program).read_bytes(), **files}


def append(initrd: Path, files: Mapping[str, bytes]) -> None:
    """Adds an archive of executable files to an initrd, of which the kernel unpacks the last of each name."""
    with tempfile.TemporaryDirectory() as name:
        for path, content in files.items():
            (file := Path(name) / path).parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            file.chmod(0o755)
        names = sorted({str(path.relative_to(name)) for path in Path(name).rglob("*")})
        words = ["cpio", "--create", "--format=newc", "--quiet", "--owner=0:0", "--null"]
        packed = subprocess.run(words, input="\0".join(names).encode(), cwd=name, check=True, stdout=subprocess.PIPE).stdout
    content = initrd.read_bytes()
    # Unpacked, since it is only sent once, and guests unpack it at each start. The kernel skips zeros between archives.
    content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    initrd.write_bytes(content + pad(len(content)) + packed)


def send_image(lab: Lab, image: Path, files: Iterable[str] = ()) -> None:
    """Installs it on the lab host, under the name of its folder. ``files``: those to send; none for all."""
    names = list(files) or sorted(os.listdir(image))
    with tempfile.TemporaryFile() as packed:
        with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=3) as tar:
            for name in names:
                tar.add(image / name, f"{image.name}/{name}")
        packed.seek(0)
        place = f"/tmp/{image.name}"
        line = f"rm -rf {place} && tar -xz -C /tmp && nohype image install {place} && rm -rf {place}"
        done = execute(lab, line, timeout=180, input=packed)
    assert done.status == 0, done.stderr
