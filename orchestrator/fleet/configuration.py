"""The files of Slurm for a host: their text, and the comparison of files with the host. Pure; equal hosts give equal text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from orchestrator.errors import RequestError
from orchestrator.fleet.apart import GRES_NAMES, build_gres
from orchestrator.fleet.gres import NVME, VF, count_gres
from orchestrator.fleet.hostlist import expand
from orchestrator.fleet.node import EMULATED_DISK, NETWORK, FleetNode, check_added_feature, find_host, is_of_survey
from orchestrator.host.pci import DEVICES
from orchestrator.values import CpuSet

FOLDER = "/etc/slurm"
NODES_FILE, GRES_FILE, START_FILE = "nohype-nodes.conf", "gres.conf", "nohype-start"
FIRST_PORT = 17000
_MAX_LINES = 1 << 20
"""That a line with ranges stands for."""
_PER_NODE = ("NodeName", "NodeHostname", "NodeAddr", "Port")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,57}[a-z0-9])?")
_PROGRAM = re.compile(r"/[A-Za-z0-9._/+-]+")
_COMMON = """\
# Common to all hosts and the controller. See docs/fleet.md for the reason of each setting.
ClusterName=nohype
SlurmctldHost={controller}
SlurmUser=slurm
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation={state}
SlurmdSpoolDir=/var/lib/slurm/slurmd.%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.%n.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.%n.log
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
# The manager pins guests; Slurm must not bind the job script to a core of its guest.
TaskPlugin=task/none
GresTypes=vf,nvme,{apart}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=5,sched_min_interval=0
ReturnToService=1
# Refuses the jobs of other users than those of AllowGroups. Newer versions would let them wait in the queue.
EnforcePartLimits=ALL
SlurmctldTimeout=30
SlurmdTimeout=30
# Seconds from SIGTERM to SIGKILL of a job script, which shuts its guest down in this time.
KillWait=30
MinJobAge=3600
# A guest that has an identity must not be started a second time by the controller.
JobRequeue=0
# A guest is started once, also if the controller forgets that it has started it.
PrologSlurmctld={folder}/{start}
PrologFlags=Alloc
Prolog={folder}/nohype-prolog
Epilog={folder}/nohype-epilog
# Checks the host, and ends guests that the controller has forgotten; runs when slurmd starts, and at this interval in seconds.
HealthCheckProgram={folder}/nohype-check
HealthCheckInterval=60
HealthCheckNodeState=ANY,CYCLE
MailProg=/bin/true
Include {folder}/{nodes}
PartitionName=guests Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=NO AllowGroups={group} State=UP
"""
_STATE = "/var/lib/slurm/slurmctld"
_MARK_DAYS = 30
"""For which an id can be used once."""
_WAIT_SECONDS = 20
"""From the start of the controller to that of the first guest: slurmd reports its jobs, ends them, and runs their Epilogs."""
_START = f"""\
#!/bin/sh
# The controller runs this when it has given a place to a guest, before the host learns of it (PrologSlurmctld). A controller that
# is killed forgets what it did in the last 5 s, and would start the guest again. A mark per guest id prevents that.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C
# A restarted controller gives the numbers of forgotten jobs to others. Hosts must have ended these jobs before: a host refuses a
# job whose number it has, and Slurm then ends the guest.
# Age of the controller in seconds: proc_pid_stat(5), field 22, of which 100 are a second. ps(1) would read all of /proc.
while read -r stat < "/proc/$PPID/stat" && read -r uptime idle < /proc/uptime; do
    set -- ${{stat##*) }}
    [ $((${{uptime%.*}} - ${{20}} / 100)) -lt {_WAIT_SECONDS} ] || break
    sleep 1
done
folder={_STATE}/nohype-started
separator=$(printf '\\037')
id=${{SLURM_JOB_COMMENT%%"$separator"*}}
mark=$folder/$id
[ -d "$folder" ] || {{ mkdir "$folder" && sync {_STATE}; }}
[ $((SLURM_JOB_ID % 100)) -ne 0 ] || find "$folder" -type f -mtime +{_MARK_DAYS} -delete
case $id in "" | [!A-Za-z0-9]* | *[!A-Za-z0-9._:-]*) mark= ;; esac
if [ -z "$mark" ]; then
    text="the comment of the job does not begin with the id of a guest; use nohype fleet submit"
elif [ -s "$mark" ]; then
    text="a guest with this id was already started on $(cat "$mark"); the controller does not know that guest any more"
    text="$text, because it was killed or the guest ended more than an hour ago; use another id"
elif echo "$SLURM_JOB_NODELIST" > "$mark" && sync "$mark" "$folder"; then
    exit 0
else
    text="the controller cannot store that it starts the guest: check the space in {_STATE}"
fi
scontrol update JobId="$SLURM_JOB_ID" Comment="$SLURM_JOB_COMMENT$separator$(date -u +%FT%TZ) refused: $text"
exit 1
"""
_STEP = """\
#!/bin/sh
exec {program} fleet step {step} --host {host} --page-size {size}
"""


@dataclass(frozen=True)
class Address:
    """Where the slurmd of a host's first node listens; each further node uses the next port."""

    host: str
    address: str
    port: int = FIRST_PORT


def check_host_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise RequestError(f"{text!r} is not a host name for Slurm", "use 1 to 59 characters of a-z, 0-9 and inner hyphens")
    if find_host(text) != text:
        raise RequestError(f"host name {text!r} ends like the name of a NUMA node", "choose a name that does not end in -nNUMBER")
    return text


def build_common(controller: str, group: str) -> str:
    """slurm.conf, the same on the controller and all hosts. ``group``: users who may submit guests."""
    return _COMMON.format(
        controller=controller,
        group=group,
        folder=FOLDER,
        nodes=NODES_FILE,
        apart=",".join(GRES_NAMES),
        state=_STATE,
        start=START_FILE,
    )


def build_start() -> str:
    """The script that the controller runs before each start of a guest; the same on all machines."""
    return _START


def build_node_lines(
    nodes: Sequence[FleetNode], where: Address, networks: Iterable[str] = (), features: Sequence[str] = ()
) -> str:
    """The lines of one host for `NODES_FILE`.

    Args:
        networks: names of the tenant networks of the host.
        features: names that the operator adds to each node.

    Raises RequestError for a feature that the operator cannot add.
    """
    more = [*(NETWORK + network for network in sorted(networks)), *dict.fromkeys(map(check_added_feature, features))]
    return "".join(
        f"NodeName={node.name} NodeHostname={where.host} NodeAddr={where.address} Port={where.port + number}"
        f" {' '.join(f'{key}={value}' for key, value in _describe(node))}"
        f" Feature={','.join((*_list_features(node), *more))} State=UNKNOWN\n"
        for number, node in enumerate(nodes)
    )


def build_gres_lines(nodes: Iterable[FleetNode]) -> str:
    """The lines of one host for gres.conf. One File per VF: slurmd needs each of them to start, and jobs learn which they got."""
    return "".join(f"NodeName={node.name} Name=vf File={_device(vf)}\n" for node in nodes for vf in node.vfs)


def build_step(step: str, program: str, host: str, size: str) -> str:
    """The script that runs a step. ``program``: path of `nohype` on the host."""
    if not _PROGRAM.fullmatch(program):
        raise RequestError(
            f"{program!r} is not an absolute path without special characters", "give the path of nohype with --program"
        )
    return _STEP.format(program=program, step=step, host=host, size=size)


def find_differences(
    nodes: Sequence[FleetNode], host: str, node_file: str, gres_file: str, networks: Collection[str] = ()
) -> tuple[str, ...]:
    """What the two files say of this host that differs from what it has, one sentence per difference.

    Features that the operator added are accepted, and also what the file does not use: networks, NVMe controllers and emulated
    disks of the host.
    """
    return tuple(_compare(nodes, host, _parse(node_file), _list_files(_parse(gres_file)), networks))


def _compare(
    nodes: Sequence[FleetNode], host: str, lines: Sequence[dict[str, str]], files: dict[str, list[str]], networks: Collection[str]
) -> Iterator[str]:
    known: dict[str, dict[str, str]] = {}
    for line in lines:
        if "NodeName" in line and (line.get("NodeHostname") == host or line["NodeName"] in {node.name for node in nodes}):
            if line["NodeName"] in known:
                yield f"{NODES_FILE} has node {line['NodeName']} twice"
            known[line["NodeName"]] = line
    for name in sorted(known.keys() - {node.name for node in nodes}):
        yield f"{NODES_FILE} has node {name}, which the host cannot offer"
    for node in nodes:
        if node.name not in known:
            yield f"{NODES_FILE} does not have node {node.name}"
            continue
        listed = known[node.name].get("Feature", "").split(",")
        used = replace(
            node, disks=node.disks[: count_gres(NVME, known[node.name].get("Gres", ""))],
            emulates_disks=node.emulates_disks and EMULATED_DISK in listed,
        )  # fmt: skip
        for key, value in _describe(used):
            if (found := known[node.name].get(key)) != value:
                yield _describe_difference(node, key, found, value)
        yield from _compare_features(used, listed, networks)
        expected = [_device(vf) for vf in node.vfs]
        if (listed := files.get(node.name, [])) != expected:
            differing = [file for file in (*listed, *expected) if (file in listed) != (file in expected)] or ["their order"]
            yield f"node {node.name}: {GRES_FILE} has {len(listed)} VFs, the host {len(expected)}; {', '.join(differing)}"


def _describe(node: FleetNode) -> Iterator[tuple[str, str]]:
    yield "Sockets", "1"
    yield "CoresPerSocket", str(len(node.cores))
    yield "ThreadsPerCore", str(node.threads)
    yield "RealMemory", str(node.memory)
    counts = {VF: len(node.vfs), NVME: len(node.disks)}
    yield "Gres", ",".join([*(f"{name}:{count}" for name, count in counts.items() if count), *build_gres(node.slots)])


def _describe_difference(node: FleetNode, key: str, found: str | None, expected: str) -> str:
    slots = ",".join(build_gres(node.slots))
    texts = [f"{key}={found}", expected]
    if key == "Gres" and found and found.endswith(slots):  # they are many, and the same
        texts = [text.removesuffix(slots).rstrip(",") for text in texts]
    return f"node {node.name}: {texts[0]} in {NODES_FILE}, the host has {texts[1] or 'none'}"


def _list_features(node: FleetNode) -> tuple[str, ...]:
    return (*node.features, f"cores-{_digest(node.cores)}")


def _compare_features(node: FleetNode, listed: Sequence[str], networks: Collection[str]) -> Iterator[str]:
    own = list(filter(is_of_survey, listed))
    expected = _list_features(node)
    if set(own) != set(expected):
        yield f"node {node.name}: Feature={','.join(own)} in {NODES_FILE}, the host has {','.join(expected)}"
    for feature in listed:
        if feature.startswith(NETWORK) and feature.removeprefix(NETWORK) not in networks:
            yield f"node {node.name}: Feature={feature} in {NODES_FILE}, the host does not have this network"


def _digest(cores: Iterable[CpuSet]) -> str:
    """Which CPUs the cores are, in order: another list of the same length would be mapped to wrong CPUs without notice."""
    return hashlib.sha256(" ".join(map(str, cores)).encode()).hexdigest()[:12]


def _device(vf: object) -> str:
    return f"/{DEVICES}/{vf}"


def _parse(text: str) -> list[dict[str, str]]:
    """Lines of Slurm's configuration, with the spelling of `build_node_lines`; one with ranges counts as several lines.

    Raises RequestError for an invalid range.
    """
    lines = (line.split("#", 1)[0].split() for line in text.splitlines())
    return [one for words in lines if words for one in _expand(dict(word.split("=", 1) for word in words if "=" in word))]


def _expand(line: dict[str, str]) -> list[dict[str, str]]:
    """A value that is not a range is that of all nodes. A range of files belongs to each node."""
    if not any("[" in value for value in line.values()):
        return [line]
    names = expand(line.get("NodeName", ""))
    columns = {key: expand(line[key]) for key in _PER_NODE if key in line}
    if wrong := [key for key, values in columns.items() if len(values) not in (1, len(names))]:
        raise RequestError(
            f"NodeName={line.get('NodeName', '')} has {len(names)} names, {wrong[0]} another number", "correct the range"
        )
    files = expand(line["File"]) if "File" in line else [""]
    if len(names) * len(files) > _MAX_LINES:
        raise RequestError(f"NodeName={line.get('NodeName', '')} has {len(names)} x {len(files)} files", "correct the range")
    return [
        {**line, **{key: values[number % len(values)] for key, values in columns.items()}, **({"File": file} if file else {})}
        for number in range(len(names))
        for file in files
    ]


def _list_files(lines: Iterable[dict[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in lines:
        if line.get("Name") == "vf" and "NodeName" in line:
            found.setdefault(line["NodeName"], []).append(line.get("File", ""))
    return found
