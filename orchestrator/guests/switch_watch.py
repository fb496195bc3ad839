"""Watches the ports of external switches: a hairpin that is lost silently stops all frames between guests of this host."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import HostError, OrchestratorError, SwitchError
from orchestrator.host.netlink import LinkNotices
from orchestrator.model.event import utc_now
from orchestrator.model.switch import PortNeeds, Switch, SwitchState
from orchestrator.switches.base import Capability, Driver
from orchestrator.switches.drivers import opened
from orchestrator.switches.verify import check_ports, describe_faults

_log = logging.getLogger(__name__)

POLL_SECONDS = 5.0
"""A change is reported within two polls, or immediately if the kernel announces it."""
_CALM = 0.2
"""Seconds between two reads after notifications: other interfaces of the namespace may change all the time."""
_UNREADABLE = "the switch cannot be read: "


@dataclass(frozen=True)
class Observation:
    time: str  # UTC, ISO 8601
    problem: str  # empty if all checks passed

    def same_as(self, other: Observation | None) -> bool:
        """The text of an error may differ between two attempts; the first observation counts only with a problem."""
        before = other.problem if other else ""
        return self.problem == before or (self.problem.startswith(_UNREADABLE) and before.startswith(_UNREADABLE))


class SwitchWatch:
    """Args:
    ports: the ports to check of a switch, by its name; may change at any time.
    mtus: MTU of the uplink by port.
    report: gets each change, in the thread of the switch.
    needs: of guests, by port.
    inspect: gets each state that was read, in the thread of the switch.
    repair: gets each state that was read, after a problem was reported, in the thread of the switch.
    """

    def __init__(
        self, key: Path | None, ports: Callable[[str], tuple[str, ...]], mtus: Callable[[str], dict[str, int]],
        report: Callable[[str, Observation], object], inspect: Callable[[str, SwitchState], object] = lambda *_: None,
        needs: Callable[[str], dict[str, PortNeeds]] = lambda _: {},
        repair: Callable[[str, SwitchState], object] = lambda *_: None,
    ) -> None:  # fmt: skip
        self._inspect, self._needs, self._repair = inspect, needs, repair
        self._key, self._ports, self._mtus, self._report = key, ports, mtus, report
        self._lock = threading.Lock()
        self._started = False
        self._switches: dict[str, tuple[Switch, threading.Event]] = {}
        self._seen: dict[str, Observation] = {}
        self._states: dict[str, SwitchState] = {}

    def start(self) -> None:
        with self._lock:
            self._started = True
            for switch, stop in self._switches.values():
                self._begin(switch, stop)

    def add(self, switch: Switch) -> None:
        """Watched from ``start`` on."""
        with self._lock:
            if switch.name not in self._switches:
                self._switches[switch.name] = switch, threading.Event()
                if self._started:
                    self._begin(*self._switches[switch.name])

    def remove(self, name: str) -> None:
        with self._lock:
            if found := self._switches.pop(name, None):
                found[1].set()
            self._seen.pop(name, None)
            self._states.pop(name, None)

    def close(self) -> None:
        for name in list(self._switches):
            self.remove(name)

    def find(self, name: str) -> Observation | None:
        """The last observation; None before the first."""
        return self._seen.get(name)

    def find_state(self, name: str) -> SwitchState | None:
        """As it was read last; None if the last attempt failed."""
        return self._states.get(name)

    def _begin(self, switch: Switch, stop: threading.Event) -> None:
        threading.Thread(target=self._work, args=(switch, stop), name=f"switch-{switch.name}", daemon=True).start()

    def _work(self, switch: Switch, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                with opened(switch, self._key) as driver:
                    self._follow(switch, driver, stop)
            except OrchestratorError as error:
                _log.error("%s", error)
            except Exception:
                _log.exception("internal error while watching switch %s, continuing", switch.name)
            stop.wait(POLL_SECONDS)

    def _follow(self, switch: Switch, driver: Driver, stop: threading.Event) -> None:
        """Until ``stop``; or until notifications end, as when the network namespace was replaced."""
        with self._open_notices(switch, driver) or nullcontext() as notices:
            while not stop.is_set():
                problem = self._observe(switch, driver)
                if stop.is_set():
                    return
                self._note(switch.name, Observation(utc_now(), problem))
                if state := self._states.get(switch.name):
                    self._repair(switch.name, state)
                if notices is None:
                    stop.wait(POLL_SECONDS)
                    if Capability.NOTICES in driver.can:
                        return  # opens notifications again
                    continue
                stop.wait(_CALM)
                _wait_for_change(notices, stop)
                if problem.startswith(_UNREADABLE):
                    return

    def _open_notices(self, switch: Switch, driver: Driver) -> LinkNotices | None:
        if Capability.NOTICES in driver.can:
            with suppress(HostError):  # the network namespace does not exist: reading the bridge reports it
                return LinkNotices(switch.netns or None)
        return None

    def _observe(self, switch: Switch, driver: Driver) -> str:
        try:
            state = driver.read()
        except SwitchError as error:
            self._states.pop(switch.name, None)
            return f"{_UNREADABLE}{error.message}"
        self._states[switch.name] = state
        self._inspect(switch.name, state)
        name = switch.name
        return describe_faults(check_ports(name, state, self._mtus(name), self._ports(name), self._needs(name)))

    def _note(self, name: str, observation: Observation) -> None:
        with self._lock:
            if name not in self._switches:
                return
            before, self._seen[name] = self._seen.get(name), observation
        if not observation.same_as(before):
            self._report(name, observation)


def _wait_for_change(notices: LinkNotices, stop: threading.Event) -> None:
    """For a notification, at most one poll. Returns early after ``stop``."""
    deadline = time.monotonic() + POLL_SECONDS
    while not stop.is_set() and (left := deadline - time.monotonic()) > 0:
        if notices.wait(min(left, 1.0)):
            return
