"""Runs in the lab host (see crash_lab.py): checks of what was read there, one sentence per finding. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import libvirt
from crash_lab_reading import BYSTANDER, SECOND, Claimed, Event, Host, Left, Life

from orchestrator.hypervisor.connection import EndCause
from orchestrator.model.access import MANAGER

NO_MAC = "00:00:00:00:00:00"
"""The address of an unused VF."""
SETTLED = ("running", "stopped", "quarantined")
ENDING = ("stopping", "deleting")
"""States of a guest that is being stopped or deleted on request."""
ON_REQUEST, ENDS = ("stopped", "deleted"), ("finish", "ended", "stopped", "deleted")
"""Events of a guest that ended on request, and of any guest that ended or whose cleanup was finished."""
BY_ITSELF = (str(EndCause.POWERED_OFF), str(EndCause.RESET))


def check_guests(host: Host, life: Life, wanted: str | None) -> list[str]:
    """Findings about both guests.

    Args:
        life: the bystander's.
        wanted: state of the second guest according to the last response: None for no guest; empty without a response.
    """
    found = []
    if host.lives.get(BYSTANDER) != life:
        found.append(f"stopped: the bystander was process {life}, now it is {host.lives.get(BYSTANDER)}")
    state = host.guests[SECOND].state if SECOND in host.guests else None
    if wanted != "" and state != wanted:
        found.append(f"broken word: the second guest is {state}, but the response was {wanted}")
    found += [f"unsettled: {name} is {one.state}" for name, one in host.guests.items() if one.state not in SETTLED]
    found += [f"quarantined: {name}" for name, one in host.guests.items() if one.state == "quarantined"]
    running = {name: one for name, one in host.guests.items() if one.state == "running"}
    domains = {name for name, state in host.domains.items() if state == libvirt.VIR_DOMAIN_RUNNING}
    if domains != running.keys() or domains != host.domains.keys():
        found.append(f"guests: running by the ledger {sorted(running)}, libvirt has {host.domains} (1 is running, 3 paused)")
    if host.qemus != {pid for pid, _ in host.lives.values()} or host.lives.keys() != running.keys():
        found.append(f"guests: processes {sorted(host.qemus)}, but libvirt's are {host.lives}")
    return found + check_claims(host) + check_host(host, running)


def check_kept(host: Host, lefts: Sequence[Left], events: Sequence[Event]) -> list[str]:
    """The second guest's process outlives each killed manager, unless its end was requested, or the guest itself
    has ended. Pure.

    Args:
        lefts: what each killed manager left.
        events: of the second guest; read after ``host``.
    """
    now, found = host.lives.get(SECOND), []
    # A shutdown that a killed manager had started continues in libvirt or in the guest.
    asked = any(left.state in ENDING for left in lefts)
    for left in lefts:
        if left.life in (None, now):
            continue
        since = [event for event in events if event.id > left.event]
        what = f"the second guest was {left.state} as process {left.life} at a kill, now it is {now}"
        if asked and not any(event.kind in ENDS for event in since):
            found.append(f"unexplained: {what}, and no event reports its end")  # one may be on its way
        if not asked and not any(explains(event) for event in since):
            found.append(f"stopped: {what}")
    return found


def explains(event: Event) -> bool:
    """Whether the guest ended on request or by itself; an event that only reports its absence counts as neither."""
    if event.kind in ON_REQUEST:
        return event.who != MANAGER.name
    return event.kind == "ended" and event.detail in BY_ITSELF


def check_claims(host: Host) -> list[str]:
    """Every resource is claimed once, by a guest that exists."""
    guests = host.guests.values()
    cpus = [cpu for one in guests for cpu in one.cpus]
    found = []
    for what, items in (("cores", cpus), ("VFs", [one.vf for one in guests]), ("MACs", [one.mac for one in guests])):
        if len(set(items)) != len(items):
            found.append(f"doubled {what}: {sorted(items)}")
    if host.taken != (len(cpus), len(host.guests), len(host.guests)):
        found.append(
            f"leaked claims: {host.taken} CPUs, VFs and addresses are taken by {len(host.guests)} guests with {len(cpus)} CPUs"
        )
    return found


def check_host(host: Host, running: dict[str, Claimed]) -> list[str]:
    """Host and ledger agree, down to the page."""
    found = []
    if host.vfio != {one.vf for one in running.values()}:
        found.append(
            f"leaked VFs: vfio-pci has {sorted(host.vfio)}, running guests have {sorted(one.vf for one in running.values())}"
        )
    given = {index: mac for index, mac in host.macs.items() if mac in {one.mac for one in host.guests.values()}}
    if given != {one.index: one.mac for one in running.values()}:
        found.append(f"leaked MACs: the PF has {host.macs}, running guests {[(one.index, one.mac) for one in running.values()]}")
    macs = [mac for mac in host.macs.values() if mac != NO_MAC]
    if len(set(macs)) != len(macs):
        found.append(f"doubled MACs: {host.macs}")
    pages = {node: sum(one.pages for one in running.values() if one.node == node) for node in host.used}
    if host.used != pages:
        found.append(f"leaked pages: in use on each node {host.used}, running guests have {pages}")
    for name, one in running.items():
        if host.threads.get(name) != one.cpus:
            found.append(f"cores: the vCPUs of {name} may run on {sorted(host.threads.get(name, ()))}, it has {sorted(one.cpus)}")
    owners = sorted(owner for owner in host.undo if owner != "host")
    if owners != sorted([*running, *running, *running]):
        found.append(f"undo journal: records of {owners}, wanted are three of each running guest {sorted(running)}")
    return found


def check_clean(host: Host, base: Host) -> list[str]:
    """Without the second guest the host is as it was before it."""
    return [
        f"after the end {name}: {getattr(host, name)}, before the begin: {getattr(base, name)}"
        for name in ("guests", "taken", "undo", "domains", "lives", "qemus", "threads", "vfio", "macs", "used")
        if getattr(host, name) != getattr(base, name)
    ]


def prove_checks(host: Host, life: Life) -> None:
    """Exits unless each kind of loss, inserted into the real reading, is found, and the real reading has no finding."""
    sound, one = check_guests(host, life, None), host.guests[BYSTANDER]
    stopped = replace(one, state="stopped", vf="x", mac="x", index=9, cpus=frozenset({9}))
    wrong: dict[str, Host] = {
        "stopped:": replace(host, lives={BYSTANDER: (life[0], life[1] + 1)}),
        "broken word:": replace(host, guests={**host.guests, SECOND: stopped}),
        "unsettled:": replace(host, guests={**host.guests, SECOND: replace(stopped, state="creating")}),
        "quarantined:": replace(host, guests={**host.guests, SECOND: replace(stopped, state="quarantined")}),
        "guests: running": replace(host, domains={BYSTANDER: libvirt.VIR_DOMAIN_PAUSED}),
        "guests: processes": replace(host, qemus=host.qemus | {1}),
        "doubled cores": replace(host, guests={**host.guests, SECOND: replace(stopped, cpus=one.cpus)}),
        "doubled VFs": replace(host, guests={**host.guests, SECOND: replace(stopped, vf=one.vf)}),
        "doubled MACs": replace(host, guests={**host.guests, SECOND: replace(stopped, mac=one.mac)}),
        "leaked claims": replace(host, taken=(0, 1, 1)),
        "leaked VFs": replace(host, vfio=host.vfio | {"x"}),
        "leaked MACs": replace(host, macs={**host.macs, one.index: "x"}),
        "doubled MACs:": replace(host, macs=dict.fromkeys(host.macs, one.mac)),
        "leaked pages": replace(host, used={node: pages + 1 for node, pages in host.used.items()}),
        "cores:": replace(host, threads={BYSTANDER: frozenset({0})}),
        "undo journal": replace(host, undo=(*host.undo, SECOND)),
    }
    blind = [
        kind for kind, reading in wrong.items() if not any(text.startswith(kind) for text in check_guests(reading, life, None))
    ]
    if sound or blind or not check_clean(wrong["leaked VFs"], host):
        raise SystemExit(f"the checks are wrong: on a correct host they find {sound}, and they miss {blind}")
