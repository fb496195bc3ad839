"""The core manager: prepares a guest's memory and VFs, launches it on its cores, and cleans up and verifies after its end.

It runs no code while the guest runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from errno import ENOENT, ESRCH
from functools import partial
from pathlib import Path
from uuid import UUID

from orchestrator import serving_cpu
from orchestrator.domain import build_domain
from orchestrator.errors import GuestError, HostError, NotFound
from orchestrator.guests.console_logs import ConsoleLogs
from orchestrator.guests.core_starts import record_adopted, record_start
from orchestrator.guests.disk_work import DiskWork
from orchestrator.guests.host_setup import HostSetup
from orchestrator.guests.outcome import log_errors
from orchestrator.guests.secrets import GuestSecrets
from orchestrator.host.cgroups import confine, move_thread, read_cgroup
from orchestrator.host.cpus import read_online
from orchestrator.host.firmware import find_qboot
from orchestrator.host.partitions import is_partition
from orchestrator.host.processes import read_process_threads
from orchestrator.host.root import HostRoot
from orchestrator.host.thread_counts import forget_threads
from orchestrator.hypervisor.connection import Hypervisor, RunningGuest
from orchestrator.images.configuration import build_credentials, build_seed
from orchestrator.images.network_root import append_login
from orchestrator.images.store import Image, find_build
from orchestrator.ledger import Claim, Ledger
from orchestrator.model.configuration import build_configuration
from orchestrator.model.plan import DiskPlan, Plan
from orchestrator.model.switch import SwitchTie
from orchestrator.resources import disk, disk_volume
from orchestrator.resources.cache import MakeControlGroup
from orchestrator.resources.configuration import WriteInitrd
from orchestrator.resources.cores import check_confinement
from orchestrator.resources.memory import TakePages
from orchestrator.resources.nic import BindVfio, ConfigureVf, find_still_bound
from orchestrator.resources.step import GuestContext, Step, UndoContext, run_steps, undo_steps
from orchestrator.resources.switch import plan_translations
from orchestrator.resources.tap import CreateTap, find_left_over, require_taps
from orchestrator.values import CpuSet
from orchestrator.waiting import wait_until

PARALLEL_LAUNCHES = 8
"""A launch is work for the housekeeping cores. Shutdowns are not limited."""
_FIRST_EXIT_SECONDS = 60.0
_WRITES = (disk.FillDisk.action, disk_volume.FillVolume.action)


class Launches:
    """Limits parallel launches; contains the ids of guests that this manager has launched and that hold their pages."""

    def __init__(self) -> None:
        self._slots = threading.BoundedSemaphore(PARALLEL_LAUNCHES)
        self._holding_pages: set[UUID] = set()

    def __contains__(self, uuid: object) -> bool:
        return uuid in self._holding_pages

    @contextmanager
    def slot(self) -> Iterator[None]:
        with self._slots:
            yield

    def add(self, uuid: UUID) -> None:
        self._holding_pages.add(uuid)

    def discard(self, uuid: UUID) -> None:
        self._holding_pages.discard(uuid)


@dataclass(frozen=True)
class CoreContext:
    """The parts that all core managers share. ``images`` is the folder of the built guest images."""

    host: HostRoot
    hypervisor: Hypervisor
    ledger: Ledger
    setup: HostSetup
    launches: Launches
    images: Path
    logs: ConsoleLogs
    secrets: GuestSecrets
    disk_work: DiskWork = field(default_factory=DiskWork)
    find_tie: Callable[[str], SwitchTie | None] = lambda _: None
    switch_key: str = ""  # file with the SSH key for external switches, as it is configured now


class CoreManager:
    """The caller holds the guest's lock."""

    def __init__(self, context: CoreContext, claim: Claim) -> None:
        self._context, self._host, self._hypervisor = context, context.host, context.hypervisor
        self.plan, self._claim = claim.plan, claim

    @property
    def is_running(self) -> bool:
        """libvirt has the guest, paused or not."""
        return self.plan.uuid in self._hypervisor.running_uuids()

    def launch(self, *, first: bool) -> tuple[str, ...]:
        """Returns what was changed, once the vCPUs run and all other threads are confined. If it raises, the caller cleans up.

        ``first``: the guest's disks are filled before.

        libvirt's daemon runs on housekeeping CPUs, gives QEMU's first thread the affinity of ``emulatorpin`` before QEMU's first
        instruction, and pins each vCPU before the guest's (qemuProcessLaunch): no thread of it is ever on another guest's core.
        """
        plan, context = self.plan, self._context
        if offline := find_offline(self._host, plan):
            hint = "set them online (echo 1 > /sys/devices/system/cpu/cpuN/online), or delete the guest and create it again"
            raise HostError(f"guest {plan.name}: CPUs {offline} are offline", hint)
        image = find_build(context.images, plan.image)
        given = build_configuration(plan, self._claim.request, context.secrets.read(self._claim))
        initrd = self._plan_initrd(image, append_login(build_seed(image, given), given))
        log = context.logs.begin(plan, self._claim.owner)
        changed = self._fill_disks(image) if first else ()
        with context.launches.slot():
            changed += self._prepare(plan, initrd)
            xml = build_domain(
                plan, image, context.setup.housekeeping, log=log,
                credentials=build_credentials(image, given), seeded_initrd=initrd.path if initrd else None,
                qboot=find_qboot(self._host),
            )  # fmt: skip
            self._hypervisor.create_paused(xml)
            context.launches.add(plan.uuid)
        try:
            self.confine_and_resume()
            return changed
        except (NotFound, HostError):
            if self.is_running:
                raise
            hint = f"see {log} and /var/log/libvirt/qemu/{plan.name}.log"
            raise GuestError(f"guest {plan.name} ended immediately after launch", hint) from None

    def confine_and_resume(self) -> None:
        """Resumes a paused guest after its threads are confined. Can be repeated. Raises NotFound if it has ended."""
        running = self.confine()
        self._context.setup.set_reception(self.plan)
        require_taps(self._host, self.plan)
        if is_paused := self._hypervisor.is_paused(self.plan.uuid):
            log_errors(lambda: forget_threads(self._host, [vcpu.tid for vcpu in running.vcpus]))
            log_errors(self._context.setup.restore_switch_counts)
            self._hypervisor.resume(self.plan.uuid)
        self._await_first_exit()
        _move_helpers(self._host, running)
        self.record_start(running, at_launch=is_paused)

    def record_start(self, running: RunningGuest, *, at_launch: bool) -> None:
        """Records what was counted on the guest's cores until now, unless it is known; ``at_launch`` if its vCPUs were just let
        run. A guest runs without the record, and the audit names that.
        """
        arguments = self._host, self._context.ledger, self.plan, running.pid
        prepare = self._context.setup.restore_exit_counts
        log_errors(lambda: record_start(*arguments) if at_launch else record_adopted(*arguments, prepare))

    def confine(self) -> RunningGuest:
        """Raises HostError if a thread can run beyond the guest's cores and housekeeping, NotFound if the guest has ended."""
        plan, housekeeping = self.plan, self._context.setup.housekeeping
        running = self._hypervisor.read_guest(self.plan.uuid)
        # libvirt: SCOPE/libvirt/{emulator,vcpuN}; the scope holds them all.
        scope = read_cgroup(self._host, running.pid, running.pid).partition("/libvirt/")[0]
        groups = {read_cgroup(self._host, running.pid, vcpu.tid): CpuSet.of([plan.cpus[vcpu.index]]) for vcpu in running.vcpus}
        if not groups or not all(is_partition(self._host, group) for group in groups):
            confine(self._host, scope, CpuSet.of(plan.cpus) | housekeeping)
            self._context.setup.isolate(plan, scope, groups)
        check_confinement(plan, housekeeping, running, read_process_threads(self._host, running.pid))
        return running

    def shut_down(self, timeout: float, is_expired: Callable[[], bool]) -> bool:
        """Presses the power button; returns whether the guest has ended after ``timeout`` seconds, or once ``is_expired()``."""
        self._hypervisor.shutdown(self.plan.uuid)
        wait_until(lambda: not self.is_running or is_expired(), timeout=timeout, interval=0.2)
        return not self.is_running

    def clean_up(self) -> tuple[str, ...]:
        """Forces the guest off and undoes its steps. Returns one sentence per part that is not verified clean.

        Raises HypervisorError if libvirt did not respond.
        """
        self._hypervisor.destroy(self.plan.uuid)
        self._context.launches.discard(self.plan.uuid)
        try:
            context = UndoContext(self._host, self._guest_context(), switch_key=self._context.switch_key)
            undo_steps(context, self._context.ledger, self.plan.name)
            bound = (*find_still_bound(self._host, self.plan), *disk.find_still_bound(self._host, self.plan))
            return (*bound, *find_left_over(self._host, self.plan))
        except HostError as error:
            return (error.message,)

    @property
    def must_wipe(self) -> bool:
        """Disks of the guest have been written, or handed over to it."""
        return any(record.action in _WRITES for record in self._context.ledger.undo_records(self.plan.name))

    def wipe(self) -> None:
        """Wipes the guest's disks, and gives them back to the host. Raises HostError if one is not verified clean."""
        progress = self._context.disk_work.reporter(self.plan.uuid)
        context = UndoContext(self._host, self._guest_context(), progress)
        undo_steps(context, self._context.ledger, self.plan.name, lasting=True)

    def drop_undo_records(self) -> None:
        """Gives up: what is not undone stays as it is, except the reservations of disks that are there, which are ended."""
        for record in self._context.ledger.undo_records(self.plan.name):
            if record.action == disk.ReserveDisk.action:
                log_errors(partial(disk.ReserveDisk.release, self._host, record.arguments))
            self._context.ledger.drop_undo_record(record.id)

    def _plan_initrd(self, image: Image, seed: bytes | None) -> WriteInitrd | None:
        """None for a guest that boots the image's own initrd."""
        if seed is None:
            return None
        source = image.choose_initrd(has_disk=bool(self.plan.disks))
        return WriteInitrd(source, self._context.secrets.prepare_initrd(self.plan.uuid), seed)

    def _prepare(self, plan: Plan, initrd: WriteInitrd | None) -> tuple[str, ...]:
        context = self._context
        changed = context.setup.prepare(plan)
        steps: list[Step] = [*([initrd] if initrd else []), TakePages(self._guest_context())]
        for vf in plan.vfs:
            steps += [ConfigureVf(vf), BindVfio(vf)]
        if plan.caches and not plan.caches.waived:
            steps.append(MakeControlGroup(plan, plan.caches))
        steps += [*plan_translations(plan, context.find_tie), *(CreateTap(nic) for nic in plan.software_nics)]
        steps += [disk.BindDisk(one) for one in plan.controllers]
        steps += [disk_volume.ActivateVolume(one) for one in plan.disks if one.group]
        changed += run_steps(self._host, context.ledger, plan.name, steps)
        context.setup.restore_edge_mode(plan)
        return changed

    def _fill_disks(self, image: Image) -> tuple[str, ...]:
        """Not within a launch slot: it takes minutes."""
        changed: tuple[str, ...] = ()
        try:
            with serving_cpu.left():
                for number, one in enumerate(self.plan.disks):
                    file, digest = (image.disk_file, image.disk.sha256) if image.disk and not number else (None, "")
                    may_destroy = one.serial in self._context.setup.policy.disk_serials
                    for step in self._list_disk_steps(one, disk.Contents(file, digest, may_destroy)):
                        changed += run_steps(self._host, self._context.ledger, self.plan.name, [step])
        finally:
            self._context.disk_work.forget(self.plan.uuid)
        return changed

    def _list_disk_steps(self, one: DiskPlan, contents: disk.Contents) -> Iterator[Step]:
        """Each step is made before the next is asked for. None for a network disk, which only its guest reaches."""
        progress = self._context.disk_work.reporter(self.plan.uuid, prepares=True)
        verified = partial(self._context.ledger.add_disk_check, self.plan.name)
        if one.target:
            return
        if one.group:
            yield disk_volume.MakeVolume(one)
            yield disk_volume.FillVolume(one, contents, verified, progress)
            return
        if one.file:
            yield disk.MakeFile(one, contents, verified, progress)
            return
        yield disk.ReserveDisk(one)
        check = disk.check_disk(self._host, one, contents, progress)
        yield disk.FillDisk(one, contents, check, verified, progress)

    def _guest_context(self) -> GuestContext:
        return GuestContext(self.plan, self._context.ledger, self._hypervisor)

    def _await_first_exit(self) -> None:
        """KVM creates its helper thread when a vCPU first runs; a vCPU that has exited once has run."""
        uuid = self.plan.uuid
        if not wait_until(
            lambda: all(vcpu.get("exits", 1) for vcpu in self._hypervisor.read_exits(uuid)[:1]),
            timeout=_FIRST_EXIT_SECONDS, interval=0.1,
        ):  # fmt: skip
            raise GuestError(f"guest {self.plan.name}: vCPU 0 did not run within {_FIRST_EXIT_SECONDS:g} s")


def find_offline(host: HostRoot, plan: Plan) -> CpuSet:
    """The guest's CPUs that are offline: the kernel lets its threads run on housekeeping CPUs instead."""
    return CpuSet.of(plan.cpus) - read_online(host)


def _move_helpers(host: HostRoot, guest: RunningGuest) -> None:
    """KVM's kvm-nx-lpage-recovery is a thread of the process whose vCPU ran first, and inherits that vCPU's cgroup
    (kernel 6.12, virt/kvm: vhost_task_create from the vCPU's first KVM_RUN).
    """
    vcpus = {vcpu.tid for vcpu in guest.vcpus}
    emulator = read_cgroup(host, guest.pid, guest.pid)
    for thread in read_process_threads(host, guest.pid):
        if thread.tid not in vcpus and not thread.allowed <= guest.emulator_pin:
            try:
                move_thread(host, thread.tid, emulator)
            except HostError as error:
                # The thread has ended: the write fails with ESRCH, reading back with ENOENT.
                if error.errno not in (ENOENT, ESRCH):
                    raise
