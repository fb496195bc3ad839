"""Searches the disk and the memory of each guest for what the guest before it has written on the same disk, cores and pages.

    .venv/bin/python benchmarks/tenant_cycles.py [CYCLES]

Requires root and gcc. Uses the lab `bench`, or the one named by NOHYPE_TEST_LAB, which must have no guests. In each cycle a guest
searches for the marker of the last one, writes its own over its disk and half of its free memory, finds it (so the search works),
and is deleted. Before the cycles, two things are broken on purpose: a marker is written to a wiped disk, which must be refused,
and to the disk of a stopped guest, in which the search must find it. Prints a line per cycle, then a line of JSON. Exits with 1
if a marker was found that must not be there, or one that is there was not found.
"""

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_lab import use_lab

from orchestrator.host.run import run
from orchestrator.images.build import build_image
from orchestrator.images.cache import cache_folder
from orchestrator.images.description import INITRD
from orchestrator.images.recipe import recipes_folder
from orchestrator.lab.lab import build_ssh
from tests.harness.guest_image import add_commands, append, send_image

NAME = "marker"
FOLDER = Path(__file__).parent
INSIDE = FOLDER / "tenant_cycles_inside.py"
COMMAND = '        marker) say \'done\' "marker $(/bin/marker "$@")" ;;\n'
CYCLE = 180.0
"""Maximum seconds per cycle."""


def main() -> int:
    """Returns 1 if an expectation is not met."""
    cycles = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with use_lab() as lab, tempfile.TemporaryDirectory() as name:
        send_image(lab, make_image(Path(name)))
        # By OpenSSH: each line is shown as soon as it is printed.
        words = [*build_ssh(lab), shlex.join(["/opt/nohype/bin/python", "-", str(cycles)])]
        done = subprocess.run(words, input=INSIDE.read_bytes(), timeout=(cycles + 3) * CYCLE)
        return int(done.returncode != 0)


def make_image(folder: Path) -> Path:
    """The image `minimal` with the driver of NVMe disks and the program that writes and searches."""
    recipe = folder / "recipes" / NAME
    recipe.mkdir(parents=True)
    source = recipes_folder() / "minimal"
    (recipe / "image.toml").write_text((source / "image.toml").read_text().replace('"igbvf"', '"nvme", "igbvf"', 1))
    (recipe / "init").write_text(add_commands((source / "init").read_text(), COMMAND))
    built = build_image(folder / "recipes", NAME, cache_folder(), progress=lambda text: print(text, file=sys.stderr))
    program = folder / "program"
    run(["gcc", "-O2", "-static", "-o", program, FOLDER / "tenant_marker.c"])
    image = folder / NAME
    image.mkdir()
    for file in built.iterdir():
        (image / file.name).write_bytes(file.read_bytes())
    append(image / INITRD, {"bin/marker": program.read_bytes()})
    return image


if __name__ == "__main__":
    sys.exit(main())
