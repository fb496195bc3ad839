"""Runs programs that read images of unknown origin: without privileges, and with nothing in reach but the image.

The program sees a read-only /usr, /dev/null and one folder at /work. It runs as a user without files and capabilities, without
ways to get any, in empty namespaces of its own (mounts, processes, network, IPC, users), and with limits of memory, CPU time and
output. An image that exploits a fault of the program gains nothing except wrong output.
"""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from orchestrator.errors import CommandError, ImageError
from orchestrator.host.run import format_tail, run

USER = 65534  # has no files; a program writes only files that were given to it

_SETUP_FAILED = 250
_MAX_TEXT = 1 << 20  # bytes of the tmpfs that holds the program's text output

# $1: an empty folder for the root. $2: the folder at /work. $3: ro or rw. $4: the file for the program's output.
# umount needs /proc to find a mount. A user namespace without mapped users cannot create other user namespaces.
_SCRIPT = """
set -eu
trap 'exit 250' EXIT
box=$1 work=$2 mode=$3 output=$4 limits=$5
shift 5
mount -t tmpfs -o size=2m,mode=755,nosuid box "$box"
mkdir "$box/usr" "$box/work" "$box/dev" "$box/out" "$box/old"
for name in bin sbin lib lib64; do if [ -L "/$name" ]; then ln -s "usr/$name" "$box/$name"; fi; done
mount --bind /usr "$box/usr"
mount -o remount,bind,ro,nosuid,nodev "$box/usr"
mount --bind "$work" "$box/work"
mount -o "remount,bind,$mode,nosuid,nodev,noexec" "$box/work"
: >"$box/dev/null"
mount --bind /dev/null "$box/dev/null"
cd "$box"
pivot_root . old
cd /
ln -s old/proc proc
umount -l /old
rm proc
rmdir old
status=0
# shellcheck disable=SC2086
setpriv --reuid=65534 --regid=65534 --clear-groups --bounding-set=-all --inh-caps=-all --no-new-privs --pdeathsig KILL \\
  unshare --user prlimit $limits -- env -i PATH=/usr/sbin:/usr/bin LC_ALL=C MALLOC_ARENA_MAX=1 MTOOLSRC=/dev/null "$@" \\
  </dev/null >"$output" 2>/out/stderr || status=$?
trap - EXIT
head -c 65536 /out/stderr >&2
if [ "$output" = /out/stdout ]; then cat /out/stdout; fi
exit $status
"""

_VERSION = re.compile(r"\d+(\.\d+)+")
_PACKAGES = {"qemu-img": "qemu-utils", "debugfs": "e2fsprogs", "mcopy": "mtools", "setpriv": "util-linux"}


@dataclass(frozen=True)
class Limits:
    seconds: int = 30  # of CPU time; programs that wait get 30 s more
    memory: int = 256 << 20  # bytes of data and stacks
    output: int = _MAX_TEXT  # bytes of one file


@dataclass(frozen=True)
class Output:
    status: int
    stdout: str
    stderr: str


def check_programs() -> None:
    """Raises ImageError if a program for reading images is not installed."""
    missing = [name for name in _PACKAGES if shutil.which(name) is None]
    if missing:
        packages = " ".join(sorted({_PACKAGES[name] for name in missing}))
        raise ImageError(f"cannot read images: {', '.join(missing)} not installed", f"run `apt-get install {packages}`")


def read_versions() -> dict[str, str]:
    """Versions of the programs that read images; one that prints none is left out."""
    found = {}
    for name, option in (("qemu-img", "--version"), ("debugfs", "-V"), ("mcopy", "--version")):
        done = run([name, option], check=False)
        if match := _VERSION.search(done.stdout or done.stderr):
            found[name] = match[0]
    return found


def run_confined(
    folder: Path,
    argv: Sequence[str],
    *,
    limits: Limits = Limits(),  # noqa: B008
    output: str | None = None,
    writable: bool = False,
) -> Output:
    """Runs a program with ``folder`` at /work; its parent holds the root for the time. Requires root.

    Args:
        output: file in ``folder`` that receives the program's stdout; otherwise the result has the first 1 MB.
        writable: whether the program can write the files of USER in ``folder``.

    Raises:
        ImageError: the sandbox cannot be set up, the program ran into a limit, or was killed.
    """
    cpu = f"{limits.seconds}:{limits.seconds + 5}"  # SIGXCPU comes first, SIGKILL later
    words = {"cpu": cpu, "data": limits.memory, "fsize": limits.output, "nofile": 64, "nproc": 256, "core": 0}
    target = f"/work/{output}" if output else "/out/stdout"
    mode = "rw" if writable or output else "ro"
    with TemporaryDirectory(prefix="sandbox-", dir=folder.parent) as box:
        command = [
            "setpriv", "--pdeathsig", "KILL",
            "unshare", "--mount", "--propagation", "private", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child", "--",
            "sh", "-c", _SCRIPT, "sh", box, str(folder), mode, target,
            " ".join(f"--{name}={value}" for name, value in words.items()), *argv,
        ]  # fmt: skip
        try:
            done = run(command, timeout=limits.seconds + 30, check=False)
        except CommandError as error:
            if "timed out" in error.message:
                raise ImageError(f"{argv[0]} did not finish within {limits.seconds + 30} s on this image") from None
            raise ImageError(f"cannot run {argv[0]}: {error.message}", error.hint) from None
    _check_status(argv[0], done.status, done.stderr)
    return Output(done.status, done.stdout, done.stderr)


def _check_status(program: str, status: int, stderr: str) -> None:
    if status == _SETUP_FAILED or stderr.startswith(("unshare:", "setpriv:", "prlimit:", "env:")):
        hint = "run as root on a kernel with user namespaces (sysctl user.max_user_namespaces)"
        raise ImageError(f"cannot set up the sandbox for {program}{format_tail(stderr)}", hint)
    number = status - 128 if status > 128 else -status
    if number in (signal.SIGXCPU, signal.SIGXFSZ):
        what = "CPU time" if number == signal.SIGXCPU else "output"
        raise ImageError(f"{program} reached its limit of {what} on this image", "check the image; it may be damaged or hostile")
    if number in set(signal.Signals):
        name = signal.Signals(number).name
        raise ImageError(f"{program} was killed by {name} while it read the image", "check the image; it may be damaged")
