#!/usr/bin/env python3
"""Compares `nohype doctor` with other checks of hosts on this machine, point by point.

    compare_doctor.py [--housekeeping 0] [--tuned-root DIR]

Runs virt-host-validate and the verification of tuned's profiles realtime-virtual-host and cpu-partitioning, if they are
installed, and reads what Firecracker's checklist (docs/prod-host-setup.md) tells an operator to verify. Exit status 1 if one of
them reports a failure for a point that the doctor reports neither as a failure nor as not measured; 2 without both programs.

tuned verifies without applying anything: as an unprivileged user, in a mount namespace of its own. With --tuned-root it is that
of another root file system (`mmdebstrap --variant=apt --include=tuned stable DIR`). tuned needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from compare_doctor_points import (
    FIRECRACKER,
    LIBVIRT,
    POINTS,
    PROGRAMS,
    TUNED,
    VULNERABILITIES,
    Reading,
    Row,
    compare,
    parse_libvirt,
    parse_tuned,
)

from orchestrator.errors import CommandError
from orchestrator.host.run import run
from orchestrator.values import CpuSet

PROFILES = ("realtime-virtual-host", "cpu-partitioning")
VARIABLES = ("realtime", *PROFILES)
# The arguments are the root, the file with the variables, a profile, and the names of the files to cover.
_IN_NAMESPACE = """
set -e
root=$1 variables=$2 profile=$3; shift 3
if [ "$root" != / ]; then for dir in proc sys dev; do mount --rbind "/$dir" "$root/$dir"; done; fi
for name; do mount --bind "$variables" "$root/etc/tuned/$name-variables.conf"; done
exec chroot "$root" setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs python3 - "$profile"
"""


# For tuned's own Python; its argument is a profile. `tuned-adm verify` asks the daemon, which verifies only what it has applied.
_VERIFY = """
import logging, sys
from tuned import consts, hardware, monitors, plugins, profiles, storage, units
from tuned.utils.global_config import GlobalConfig

log = logging.getLogger("tuned")
log.handlers.clear()
log.addHandler(logging.StreamHandler(sys.stdout))
config, variables = GlobalConfig(), profiles.variables.Variables()
inventory, watched = hardware.Inventory(), monitors.Repository()
found = plugins.Repository(
    watched, storage.Factory(storage.PickleProvider()), inventory, hardware.DeviceMatcher(), hardware.DeviceMatcherUdev(),
    plugins.instance.Factory(), config, variables,
)
locator = profiles.Locator(consts.LOAD_DIRECTORIES)
loader = profiles.Loader(locator, profiles.Factory(), profiles.Merger(), config, variables)
manager = units.Manager(found, watched, consts.CFG_DEF_DEFAULT_INSTANCE_PRIORITY, inventory, config)
manager.create(loader.load([sys.argv[1]]).units)
manager.verify_tuning(ignore_missing=False)
"""


def read_libvirt() -> list[Reading] | None:
    """None if it is not installed."""
    if shutil.which("virt-host-validate") is None:
        return None
    return parse_libvirt(run(["virt-host-validate", "qemu"], check=False, env={"LC_ALL": "C"}).stdout)


def read_tuned(root: Path, isolated: CpuSet) -> list[Reading] | None:
    """None if it is not installed below ``root``. Raises CommandError if it verifies nothing."""
    if not (root / "usr/lib/python3/dist-packages/tuned").is_dir():
        return None
    readings = []
    with tempfile.TemporaryDirectory() as folder:
        variables = Path(folder, "variables")
        variables.write_text(f"isolated_cores={isolated}\n")
        for profile in PROFILES:
            command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _IN_NAMESPACE, "sh"]
            done = run([*command, root.resolve(), variables, profile, *VARIABLES], input=_VERIFY, check=False)
            found = parse_tuned(done.stdout)
            if not found:
                raise CommandError(f"tuned verified nothing of {profile}: {done.stderr[-500:]}", f"check {root}")
            readings += found
    return list(dict.fromkeys(readings))  # what both profiles have is one item


def read_checklist(root: Path = Path("/")) -> list[Reading]:
    """What docs/prod-host-setup.md of Firecracker tells an operator to verify, as far as a file below ``root`` shows it."""
    files = {
        "SMT": "sys/devices/system/cpu/smt/control", "KSM": "sys/kernel/mm/ksm/run", "swap": "proc/swaps",
        "nx_huge_pages": "sys/module/kvm/parameters/nx_huge_pages",
        **{name: f"sys/devices/system/cpu/vulnerabilities/{name}" for name in VULNERABILITIES},
    }  # fmt: skip
    texts = {item: (root / file).read_text().strip() for item, file in files.items() if (root / file).is_file()}
    multihit = root / "sys/devices/system/cpu/vulnerabilities/itlb_multihit"
    if not multihit.is_file() or multihit.read_text().strip() != "Not affected":
        texts.pop("nx_huge_pages", None)  # the advice is for processors without the erratum
    wanted = {
        "SMT": lambda text: text in ("forceoff", "notsupported", "notimplemented"),
        "KSM": lambda text: text == "0",
        "swap": lambda text: len(text.splitlines()) < 2,
        "nx_huge_pages": lambda text: text == "never",
        **{name: lambda text: not text.startswith("Vulnerable") for name in VULNERABILITIES},
    }
    readings = [Reading(FIRECRACKER, item, not wanted[item](text), text) for item, text in texts.items()]
    access = os.access(root / "dev/kvm", os.R_OK | os.W_OK)
    return [*readings, Reading(FIRECRACKER, "/dev/kvm", not access, "accessible" if access else "not accessible")]


def format_rows(rows: Sequence[Row]) -> list[str]:
    """A table, and below it the reasons and what is missed."""
    shown = [row for row in rows if set(row.verdicts.values()) != {"-"}]
    table = [("POINT", *PROGRAMS, "nohype doctor")]
    table += [(row.point, *(row.verdicts[program] for program in PROGRAMS), row.doctor) for row in shown]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    lines += [f"differs: {row.point}: {reason}" for row in shown for reason in row.reasons]
    lines += [
        f"MISSED: {row.point}: {one.program}: {one.item}" + (f": {one.text}" if one.text != one.item else "")
        for row in shown
        for one in row.missed
    ]
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--housekeeping", type=CpuSet.parse, default=CpuSet.parse("0"), help="CPUs that guests do not get")
    parser.add_argument("--tuned-root", type=Path, default=Path("/"), help="root file system in which tuned is installed")
    options = parser.parse_args(argv)
    done = run(
        [sys.executable, "-P", "-m", "orchestrator.doctor", "--json", "--housekeeping", str(options.housekeeping)],
        check=False, env={"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    document = json.loads(done.stdout)
    checks = {check["name"]: check for check in document["checks"]}
    isolated = CpuSet.parse(Path("/sys/devices/system/cpu/online").read_text().strip()) - options.housekeeping
    sources = {LIBVIRT: read_libvirt(), TUNED: read_tuned(options.tuned_root, isolated), FIRECRACKER: read_checklist()}
    rows = compare([reading for readings in sources.values() for reading in readings or ()], checks)
    print("\n".join(format_rows(rows)))
    for program, readings in sources.items():
        failures = sum(reading.failed for reading in readings or ())
        print(f"{program}: " + ("not installed" if readings is None else f"{len(readings)} items, {failures} failures"))
    compared = {name for point in POINTS for name, _ in point.checks}
    alone = [name for name, check in checks.items() if check["verdict"] == "fail" and name not in compared]
    print(f"nohype doctor: {len(checks)} checks; fails that the others have no item for: {', '.join(alone) or 'none'}")
    if sources[LIBVIRT] is None and sources[TUNED] is None:
        print("install virt-host-validate (package libvirt-clients) or tuned", file=sys.stderr)
        return 2
    return int(any(row.missed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
