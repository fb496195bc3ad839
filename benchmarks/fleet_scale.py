"""Submits, starts and cancels 1,000 guests on 1,000 hosts, and restarts the controller meanwhile; all on this machine.

    .venv/bin/python benchmarks/fleet_scale.py [--hosts 1000] [--guests 1000] [--steps bash|nohype]
        [--files ranges|lines] [--release here|debian13] [--plot FILE]

Requires root. Munge, slurmctld and one slurmd per host are real. The managers are played by one process, which
stores guests in memory and starts nothing (fleet_scale_played.py). Guests are submitted by `nohype fleet submit-all`, with one
command for all of them.

    --steps bash      stand-ins of bash, which ask slurmctld and the manager the same as Prolog, job script and Epilog, except for
                      the survey. They show what the controller can do: the steps of 1,000 hosts do not run on two CPUs
    --steps nohype    the real steps, for fewer guests: prints their CPU time and memory; with --files lines
    --files ranges    all hosts in one line of nohype-nodes.conf and gres.conf, as Slurm allows for equal hosts
    --files lines     as `nohype fleet config` writes them; each program of Slurm reads 5 lines per host
    --release         whose Slurm: that of this machine's release, or that of Debian 13 in a root of its own; with --steps bash

Exits with 1 if a guest was not started or not ended, or if a limit is missed.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

from fleet_scale_played import PORT, SCONTROL_PORT

from orchestrator.client.host_shapes import Host
from orchestrator.fleet.configuration import Address, build_common, build_gres_lines, build_node_lines, build_start
from orchestrator.fleet.journal import What, build_comment, make_entry
from orchestrator.fleet.node import build_nodes
from orchestrator.host.pci import DEVICES
from tests.fakes.server import Server
from tests.harness.api_server import serve
from tests.harness.crash import World
from tests.harness.slurm import USER, Cluster
from tests.harness.slurm_root import HERE, RELEASES, System, build_system, hold_root

ADDRESS, FIRST_PORT = "10.77.0.1", 20001
SERVER = Server(cores=8, nodes=1, vfs=4, pages=512)
SINGLE = 10
"""Guests that are submitted one at a time."""
SAVED = 15.0
START_SECONDS = 25.0
"""From the start of the controller it starts no guest for 20 s."""
IDLE_LIMIT, START_LIMIT, RESTART_LIMIT = 1.0, 15.0, 3.0
START_SLURMDS = """\
for i in $(seq -f %04g 1 $0); do
    unshare --pid --fork --kill-child --mount-proc bash -c 'slurmd -N h$0; sleep infinity & wait' $i > /dev/null 2>&1 &
done
"""
"""Each in a PID namespace, as it has its own host: slurmstepd reads /proc of all processes."""
COSTS, NEVER = "/run/nohype/costs", "/run/nohype/never"
"""The second is a FIFO, from which a job script that waits reads."""
_ASK = """\
exec 3<>/dev/tcp/127.0.0.1/{port}
printf '{request}' {words} >&3
read -r line <&3
[[ $line == *' {status} '* ]] || exit 1
"""


@dataclass
class Result:
    """Times are of time.time(), durations in seconds.

    Attributes:
        controller: CPU time while all guests were submitted and started, ``machine`` that of all programs.
    """

    version: str = ""
    started_slurmds: float = 0.0
    memory: float = 0.0
    command: float = 0.0
    singles: dict[str, float] = field(default_factory=dict)
    first: float = 0.0
    last: float = 0.0
    restarts: list[float] = field(default_factory=list)
    cancelled: float = 0.0
    idle: float = 0.0
    job_memory: float = 0.0
    controller: float = 0.0
    machine: float = 0.0
    requested: dict[str, float] = field(default_factory=dict)
    deleted: dict[str, float] = field(default_factory=dict)
    costs: dict[str, list[float]] = field(default_factory=dict)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--guests", type=int, default=1000)
    parser.add_argument("--steps", choices=("bash", "nohype"), default="bash")
    parser.add_argument("--files", choices=("ranges", "lines"), default="ranges")
    parser.add_argument("--plot", type=Path, default=Path("build/benchmarks/fleet_scale.png"))
    parser.add_argument("--release", choices=RELEASES, default=HERE)
    options = parser.parse_args()
    if options.steps == "nohype" and options.release != HERE:
        parser.error("--steps nohype requires the Slurm of this machine's release")
    before = os.getloadavg()[0]
    with TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        result = measure(folder, options.hosts, options.guests, options.steps, options.files, build_system(options.release))
    print(f"{result.version}, {options.hosts} hosts, {options.guests} guests, steps: {options.steps}, files: {options.files}")
    print(f"load before {before:.1f}, after {os.getloadavg()[0]:.1f}; {describe_machine()}")
    good = report(result, options.guests)
    draw(result, options, options.plot)
    return not good


def measure(folder: Path, hosts: int, guests: int, steps: str, files: str, system: System) -> Result:
    result, names = Result(), [f"guest{number:04}" for number in range(guests)]
    for name in ("etc", "run", "run/records"):
        (folder / name).mkdir()
    os.mkfifo(folder / "run/never")
    for name in ("records", "never"):
        (folder / "run" / name).chmod(0o777)
    host = survey(folder)
    write_files(folder, host, hosts, steps, files)
    devices = [str(vf) for vf in build_nodes(host, "h0001")[0].vfs]
    with hold_root(folder, devices, {}, system) as holder, ExitStack() as stack:
        cluster = Cluster(holder, folder, (), system.program)
        cluster.start()
        result.version = cluster.read_version()
        manager = stack.enter_context(played(cluster, hosts))
        began = time.time()
        used = read_used()
        cluster.run("bash", "-c", START_SLURMDS, str(hosts), timeout=1800)
        cluster.wait_for(lambda: count_nodes(cluster, "idle") == hosts, "all nodes are idle", timeout=600)
        result.command = measure_command(cluster)
        result.started_slurmds, result.memory = time.time() - began, read_used() - used
        time.sleep(START_SECONDS)
        for number in range(SINGLE):
            result.singles[f"single{number}"] = time.time()
            submit(cluster, [f"single{number}"])
        cancel(cluster, hosts)
        begin = read_controller(cluster), read_machine()
        result.first = time.time()
        submit(cluster, names)
        cluster.wait_for(lambda: count_running(cluster) == guests, "all guests run", timeout=900)
        result.controller, result.machine = read_controller(cluster) - begin[0], read_machine() - begin[1]
        result.last = read_last_submission(cluster)
        for _ in range(3):
            time.sleep(SAVED)
            cluster.kill_controller()
            began = time.time()
            cluster.run("slurmctld")
            cluster.wait_for(lambda: count_running(cluster) == guests, "all guests are shown", timeout=300)
            result.restarts.append(time.time() - began)
        time.sleep(SAVED)
        if steps == "nohype":
            result.job_memory = read_memory(cluster)
        result.cancelled = time.time()
        cancel(cluster, hosts)
        result.idle = time.time()
        assert manager.stdin
        assert manager.stdout
        manager.stdin.close()
        found = json.loads(manager.stdout.read())
        result.requested, result.deleted = found["requested"], found["deleted"]
        for line in cluster.run("cat", COSTS, check=False).stdout.splitlines():
            step, user, system = line.split()
            result.costs.setdefault(step, []).append(float(user) + float(system))
    return result


def survey(folder: Path) -> Host:
    """What a real manager says of the fake host that all hosts are. Writes that and what it says of a guest to a file."""
    world = World(folder / "world", SERVER)
    world.host.write(f"{DEVICES}/0000:10:00.0/sriov_numvfs", str(SERVER.vfs))
    with serve(folder / "manager", {"host": {"housekeeping": "0-1", "uplinks": ["nic0"]}}, world=world) as served:
        found = served.client.host()
        guest = served.client.create({"name": "example", "memory": "64M", "image": "minimal"})
    (folder / "survey.json").write_text(json.dumps({"host": found, "guest": guest}))
    return found


def write_files(folder: Path, host: Host, count: int, steps: str, files: str) -> None:
    common = build_common(f"controller({ADDRESS})", USER)
    common += "SlurmdParameters=config_overrides\nSlurmdDebug=error\nTreeWidth=250\n"
    names = [f"h{number:04}" for number in range(1, count + 1)]
    ports = [str(FIRST_PORT + number) for number in range(count)]
    if files == "ranges":
        names, ports = [f"h[0001-{count:04}]"], [f"[{ports[0]}-{ports[-1]}]"]
    (example,) = build_nodes(host, "NODE")
    line, gres = build_node_lines([example], Address("controller", ADDRESS, 0)), build_gres_lines([example])
    lines = [
        line.replace("=NODE ", f"={name} ").replace("Port=0 ", f"Port={port} ") for name, port in zip(names, ports, strict=True)
    ]
    texts = {
        "etc/slurm.conf": common, "etc/nohype-start": build_start(), "etc/nohype-nodes.conf": "".join(lines),
        "etc/gres.conf": "".join(gres.replace("=NODE ", f"={name} ") for name in names),
        "hosts": f"127.0.0.1 localhost\n{ADDRESS} controller\n",
        **{f"etc/nohype-{step}": text for step, text in (build_bash() if steps == "bash" else build_real()).items()},
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def build_bash() -> dict[str, str]:
    """Prolog and job script ask the controller for the allocation, as the real ones do."""

    def scontrol(command: str) -> str:
        return f'exec 3<>/dev/tcp/127.0.0.1/{SCONTROL_PORT}\necho "{command}" >&3\nread -r job <&3\n'

    ask = scontrol("show job $SLURM_JOB_ID")

    def call(method: str, status: int, path: str = "", body: str = "") -> str:
        words = "$SLURMD_NODENAME " + (f'"{path}" ' if path else "") + (f'${{#{body}}} "${body}"' if body else "")
        request = f"{method} /%s/v1/guests{'/%s' if path else ''} HTTP/1.1\\r\\n" + ("Content-Length: %d\\r\\n" if body else "")
        return _ASK.format(port=PORT, request=request + "\\r\\n" + ("%s" if body else ""), words=words, status=status)

    record = "/run/nohype/records/$SLURM_JOB_ID"
    entry = build_comment("", [make_entry(What.STARTED, "guest runs")]).replace(" ", "_")  # scontrol splits lines at spaces
    update = scontrol("update JobId=$SLURM_JOB_ID Comment=${BASH_REMATCH[1]}" + entry)
    report = f"[[ $job =~ Comment=([^[:space:]]+) ]]\n{update}"
    name = "[[ $job =~ JobName=([^[:space:]]+) ]]\n"
    scripts = {
        "prolog": f"{ask}{name}{call('GET', 200)}echo ${{BASH_REMATCH[1]}} > {record}\n",
        "job": f"read -r request\n{ask}{call('POST', 201, body='request')}exec 3>&-\n{report}read -r <> {NEVER}\n",
        "epilog": f"read -r name < {record} || exit 0\n{call('DELETE', 204, '$name')}rm {record}\n",
        "check": "exit 0\n",
    }
    return {step: f"#!/bin/bash\n{text}" for step, text in scripts.items()}


def build_real() -> dict[str, str]:
    """The check, which slurmd runs when it starts, is left out: there are no records."""
    program = Path(sys.executable).with_name("nohype")
    scripts = {"check": "#!/bin/sh\n"}
    for step in ("prolog", "job", "epilog"):
        words = f"fleet step {step} --host $SLURMD_NODENAME --page-size 2M --records /run/nohype/records/$SLURMD_NODENAME"
        scripts[step] = (
            f"#!/bin/bash\ntrap '' TERM\nexport NOHYPE_SOCKET=/run/nohype/$SLURMD_NODENAME.sock PYTHONPATH={Path.cwd()}\n"
            f'TIMEFORMAT="{step} %U %S"\n{{ time {program} {words} > /dev/null 2>&1; }} 2>> {COSTS}\n'
        )
    return scripts


@contextmanager
def played(cluster: Cluster, hosts: int) -> Iterator[subprocess.Popen[str]]:
    """The played managers, beside the controller."""
    (cluster.folder / "run/costs").touch()
    (cluster.folder / "run/costs").chmod(0o666)
    script = Path(__file__).with_name("fleet_scale_played.py")
    with cluster.open("python3", script, cluster.folder / "run", cluster.folder / "survey.json", str(hosts)) as manager:
        assert manager.stdout
        assert manager.stdout.readline() == "ready\n"
        yield manager


def submit(cluster: Cluster, names: Sequence[str]) -> None:
    """Returns when the controller cannot forget the guests any more."""
    guests = [{"name": name, "memory": "64M", "image": "minimal"} for name in names]
    done = cluster.nohype("fleet", "submit-all", "-", "--id", "scale", input=json.dumps(guests), timeout=900, check=False)
    assert done.status == 0, done.stdout + done.stderr


def read_last_submission(cluster: Cluster) -> float:
    """Seconds of time.time(), whole."""
    lines = cluster.run("env", "TZ=UTC0", "squeue", "--noheader", "--format=%V").stdout.splitlines()
    return max(datetime.fromisoformat(f"{line}+00:00").timestamp() for line in lines)


def cancel(cluster: Cluster, hosts: int) -> None:
    """Returns when all hosts are idle."""
    cluster.run("scancel", "--partition=guests", f"--user={USER}")
    cluster.wait_for(lambda: not cluster.run("squeue", "--noheader").stdout, "no guest is left", timeout=900)
    cluster.wait_for(lambda: count_nodes(cluster, "idle") == hosts, "all nodes are idle", timeout=300)


def count_running(cluster: Cluster) -> int:
    return len(cluster.run("squeue", "--noheader", "--states=running", "--format=%i", check=False).stdout.splitlines())


def count_nodes(cluster: Cluster, state: str) -> int:
    text = cluster.run("sinfo", "--noheader", f"--states={state}", "--responding", "--format=%D").stdout
    return sum(map(int, text.split()))


def read_memory(cluster: Cluster) -> float:
    """MiB of a job script, with its share of what several of them use (median of 10)."""
    found = []
    for number in cluster.find_processes("nohype fleet step job")[:10]:
        text = cluster.run("grep", "^Pss:", f"/proc/{number}/smaps_rollup", check=False).stdout
        found += [int(text.split()[1]) / 1024] if text else []
    return statistics.median(found) if found else 0.0


def measure_command(cluster: Cluster) -> float:
    """CPU seconds of a command of Slurm (median of 5)."""
    script = 'TIMEFORMAT="%U %S"; for i in 1 2 3 4 5; do time scontrol ping > /dev/null; done'
    text = cluster.run("bash", "-c", script).stderr
    return statistics.median(sum(map(float, line.split())) for line in text.splitlines())


def read_used() -> float:
    """GiB of this machine that are in use."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return (int(fields["MemTotal"].split()[0]) - int(fields["MemAvailable"].split()[0])) / 2**20


def read_controller(cluster: Cluster) -> float:
    """CPU seconds of slurmctld and of the scripts that it has run."""
    text = cluster.run("sh", "-c", "cat /proc/[0-9]*/stat", check=False).stdout
    found = [line.rpartition(") ") for line in text.splitlines()]
    own = (fields.split()[11:15] for name, _, fields in found if name.partition("(")[2] in ("slurmctld", "slurmscriptd"))
    return sum(int(ticks) for times in own for ticks in times) / os.sysconf("SC_CLK_TCK")


def read_machine() -> float:
    """CPU seconds of this machine that were used, by all programs (proc_stat(5))."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    return sum(map(int, (user, nice, system, irq, softirq))) / os.sysconf("SC_CLK_TCK")


def describe_machine() -> str:
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    return f"{os.cpu_count()} CPUs, kernel {platform.release()}, Python {platform.python_version()}, commit {commit}"


def report(result: Result, guests: int) -> bool:
    """Returns whether all guests were started and ended, within the limits."""
    idle = [result.requested[name] - begin for name, begin in result.singles.items()]
    asked = [moment - result.first for name, moment in result.requested.items() if name not in result.singles]
    ended = [moment - result.cancelled for name, moment in result.deleted.items() if name not in result.singles]
    delay = result.last - result.first
    shown = ", ".join(f"{seconds:.2f}" for seconds in result.restarts)
    lines = (
        f"scontrol ping: {result.command * 1000:.0f} ms of CPU time",
        f"slurmds started in {result.started_slurmds:.1f} s; they use {result.memory:.1f} GiB",
        f"submit to request of the manager, one at a time: median {statistics.median(idle):.2f} s, max {max(idle):.2f} s"
        f" (limit {IDLE_LIMIT:g})",
        f"{guests} guests submitted in {delay:.0f} s; {len(asked)} requested of the managers, the last {max(asked):.1f} s after"
        f" the start of the command (limit {START_LIMIT:g}), {max(asked) - delay:.0f} s after the last was submitted",
        f"CPU time for {guests} guests: {result.controller:.1f} s of the controller, {result.machine:.1f} s of the whole machine",
        f"controller killed, until all guests are shown: {shown} s (limit {RESTART_LIMIT:g})",
        f"cancelled: {len(ended)} guests deleted in {max(ended):.1f} s, all hosts idle after"
        f" {result.idle - result.cancelled:.1f} s",
    )
    print("\n".join(lines))
    for step, costs in result.costs.items():
        print(f"{step}: {statistics.median(costs):.2f} s of CPU time (median of {len(costs)})")
    if result.job_memory:
        print(f"job script: {result.job_memory:.1f} MiB")
    complete = len(asked) == len(ended) == guests
    return (
        complete and statistics.median(idle) <= IDLE_LIMIT and max(asked) <= START_LIMIT and max(result.restarts) <= RESTART_LIMIT
    )


def draw(result: Result, options: argparse.Namespace, file: Path) -> None:
    """Guests over time since the start of the command."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.5), layout="constrained", sharey=True)
    for axes, moments, begin, label in (
        (left, result.requested, result.first, "requested of the managers"),
        (right, result.deleted, result.cancelled, "deleted in the managers"),
    ):
        times = sorted(moment - begin for name, moment in moments.items() if name not in result.singles)
        axes.step([0, *times], range(len(times) + 1), where="post", label=label)
        axes.grid(visible=True, alpha=0.3)
    left.axvline(result.last - result.first, color="gray", linestyle="--", label="last guest submitted")
    left.axvline(START_LIMIT, color="tab:red", linestyle=":", label=f"limit: {START_LIMIT:g} s")
    left.set(xlabel="s after the start of submit-all", ylabel="guests", title=f"{options.guests} guests, {options.hosts} slurmds")
    right.set(xlabel="s after scancel", title=f"{os.cpu_count()} CPUs, steps: {options.steps}, managers played")
    left.legend()
    right.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    print(f"picture: {file}")


if __name__ == "__main__":
    sys.exit(main())
