"""Builds wheel and sdist from the tracked files: `python -m release.dist FOLDER`. Other files of the work tree are not packed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from release.manpages import read_date

ROOT = Path(__file__).parents[1]


def build_dist(output: Path) -> list[Path]:
    """The files in ``output``. Raises OSError, and CalledProcessError with the output of a program that failed."""
    output.mkdir(parents=True, exist_ok=True)
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    with TemporaryDirectory() as folder:
        tree, built = Path(folder) / "tree", Path(folder) / "built"
        for name in filter(None, names):
            if (ROOT / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, tree / name)
        argv = [sys.executable, "-m", "build", "--outdir", str(built), str(tree)]
        environment = {**os.environ, "SOURCE_DATE_EPOCH": str(read_date())}
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=900, check=False)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, "build", done.stdout, done.stderr)
        return [Path(shutil.copy2(path, output / path.name)) for path in sorted(built.iterdir())]


def main() -> None:
    try:
        print(*build_dist(Path(sys.argv[1])), sep="\n")
    except subprocess.CalledProcessError as error:
        sys.exit(f"cannot build wheel and sdist: {error.cmd} failed: {error.stderr or error.stdout}")
    except OSError as error:
        sys.exit(f"cannot build wheel and sdist: {error}")


if __name__ == "__main__":
    main()
