"""Submits many guests with one command. All are checked before the first is submitted, and each runs once or never."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrator.errors import CommandError, OrchestratorError, QuotaExceeded, RequestError
from orchestrator.fleet import slurm
from orchestrator.fleet.again import find_unchanged
from orchestrator.fleet.follow import wait_all_ready
from orchestrator.fleet.job import Job
from orchestrator.fleet.outcome import Outcome
from orchestrator.fleet.quota import Quota, check_quota
from orchestrator.fleet.saved import is_saved
from orchestrator.fleet.slurm import CONTROLLER_SECONDS, SAVE_SECONDS
from orchestrator.fleet.submit import NO_QUOTA, check_ids, select_job, submit, submit_once, wait_until_orphans_ended
from orchestrator.fleet.wish import Wish, check_deadline, check_room, read_wish

_WORKERS = 4
"""The controller serves submissions one after the other; more of them only wait."""
_MAX_DIGITS = 20
_MAX_NAME = 64
"""Characters of a name, which can be invalid, in a message."""


class Constraints(BaseModel):
    """What an element of the list has beside the guest's request; see `wish.Wish`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    features: Annotated[tuple[str, ...], Field(strict=False)] = ()
    minutes: int | None = None
    anti_affinity: str | None = None
    deadline: str | None = None
    requeue: bool = False


def read_batch(text: str, prefix: str = "", tenant: str = "") -> tuple[Wish, ...]:
    """Reads a JSON list of requests, each an object with the fields of a guest's request and of `Constraints`.

    Args:
        prefix: a guest without an id gets ``PREFIX:NAME``; if empty, a new one.
        tenant: of all guests.

    Raises RequestError for the first element that is invalid, or has the name or id of an earlier one.
    """
    elements = _parse(text)
    if not isinstance(elements, list) or not elements:
        raise RequestError("the guests are not a JSON list with at least one element", "give a list of objects, one per guest")
    wishes = tuple(_read_element(number, element, prefix, tenant) for number, element in enumerate(elements, 1))
    for what, values in (("name", [wish.request.name for wish in wishes]), ("id", [wish.guest_id for wish in wishes])):
        if repeated := [value for value, count in Counter(values).items() if count > 1]:
            raise RequestError(f"{what} {repeated[0]} is given to several guests", f"give each guest its own {what}")
    return wishes


def submit_batch(wishes: Sequence[Wish], quota: Quota = NO_QUOTA, *, only_ended: bool = False) -> tuple[Outcome, ...]:
    """Submits guests of one tenant, or of the operators, and returns when the controller cannot forget them any more.

    An error of a single guest after the checks is its outcome. A repeated call submits only what the fleet does not have.

    Args:
        only_ended: submit guests again that have ended, and leave the others of these names as they are, whatever their ids are.

    Raises:
        NoRoom: no node can ever have one of the guests. As with all errors here, no guest was submitted.
        QuotaExceeded: the guests and the other guests of the tenant exceed the quota together.
        Conflict: the fleet has another guest of one of the names, or has one of the ids under another name.
        NotFound: with ``only_ended``, the fleet does not know one of the guests, which could run without being known.
        RequestError: one of the guests cannot end by its deadline.
        OrchestratorError: the controller does not respond. If guests may have been submitted, the message states this.
    """
    slurm.check_version()
    done = find_unchanged(wishes, slurm.read_jobs()) if only_ended else {}
    if missing := [wish for wish in wishes if wish.guest_id not in done]:
        done |= _submit_missing(missing, quota)
    return tuple(done[wish.guest_id] for wish in wishes)


def _submit_missing(wishes: Sequence[Wish], quota: Quota) -> dict[str, Outcome]:
    """Outcomes by the ids of the wishes. Reads the jobs: `find_unchanged` can have waited."""
    known = slurm.read_jobs()
    jobs = _group(known)
    check_ids(wishes, known)
    found = [select_job(wish, jobs[wish.request.name]) for wish in wishes]
    new = [wish for wish, job in zip(wishes, found, strict=True) if not job]
    _check(new, quota)
    try:
        return _submit_all(wishes, new, quota, saved=not new and all(is_saved(job) for job in found if job))
    except slurm.Unreachable:
        what = "the controller does not respond any more; it is not known which of the guests were submitted"
        raise CommandError(what, "repeat the command with the same --id: no guest is started twice") from None


def _submit_all(wishes: Sequence[Wish], new: Sequence[Wish], quota: Quota, *, saved: bool) -> dict[str, Outcome]:
    """``new``: those that the fleet does not have; ``saved``: it cannot forget any of the others. Raises Unreachable."""
    done: dict[str, Outcome] = {}

    def find_left() -> list[Wish]:
        return [wish for wish in wishes if wish.guest_id not in done]

    with ThreadPoolExecutor(_WORKERS) as pool:
        done |= _index(outcome for outcome in pool.map(_submit, new) if outcome)
        if not saved:
            time.sleep(SAVE_SECONDS)
        done |= _index(_release(find_left(), quota))
        done |= _index(_submit_forgotten(find_left(), pool))
        jobs = _group(slurm.retry(slurm.read_jobs, CONTROLLER_SECONDS))
        done |= _index(pool.map(lambda wish: _complete(wish, quota, jobs[wish.request.name]), find_left()))
    return done


def wait_batch(outcomes: Sequence[Outcome], seconds: float | None = None) -> tuple[Outcome, ...]:
    """Waits until each guest has reported ready, as `follow.wait_ready` does. ``seconds`` is for all of them.

    An error of a single guest is its outcome. Raises OrchestratorError if the controller does not respond.
    """
    submitted = [outcome for outcome in outcomes if not outcome.error]
    results = wait_all_ready([(outcome.name, outcome.guest_id) for outcome in submitted], seconds)
    found = {outcome.guest_id: _conclude(outcome, result) for outcome, result in zip(submitted, results, strict=True)}
    return tuple(found.get(outcome.guest_id, outcome) for outcome in outcomes)


def _conclude(outcome: Outcome, result: Job | OrchestratorError) -> Outcome:
    if isinstance(result, OrchestratorError):
        return replace(outcome, error=_summarize(result))
    return replace(outcome, state=result.state)


def _parse(text: str) -> object:
    """Raises RequestError."""
    try:
        return json.loads(text, object_pairs_hook=_build_object, parse_int=_parse_integer)
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise RequestError(f"the guests are not JSON: {reason}", "give a list of objects, one per guest")


def _build_object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A field that is given twice would have its last value without notice."""
    if repeated := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
        raise ValueError(f"an object has the field {repeated[0]!r:.80} twice")
    return dict(pairs)


def _parse_integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"the number {text[:_MAX_DIGITS]}... is too long")
    return int(text)


def _read_element(number: int, element: object, prefix: str, tenant: str) -> Wish:
    if not isinstance(element, Mapping):
        raise RequestError(f"guest {number}: not an object", 'give objects such as {"name": "web", "memory": "1G"}')
    name = element.get("name")
    where = (
        f"guest {number} ({name})"
        if isinstance(name, str) and name.isprintable() and len(name) <= _MAX_NAME
        else f"guest {number}"
    )
    fields: dict[str, Any] = {key: value for key, value in element.items() if key not in Constraints.model_fields}
    if prefix and fields.get("id") is None:
        fields["id"] = f"{prefix}:{fields.get('name')}"
    try:
        more = Constraints.model_validate({key: element[key] for key in Constraints.model_fields if key in element})
        return read_wish(
            fields, more.features, more.minutes, group=more.anti_affinity, deadline=more.deadline, tenant=tenant,
            requeue=more.requeue,
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise RequestError(f"{where}: {field}: {first['msg']}", "see docs/fleet.md for the fields") from None
    except RequestError as error:
        raise RequestError(f"{where}: {error.message}", error.hint) from None


def _group(jobs: Iterable[Job]) -> dict[str, list[Job]]:
    """By name."""
    found: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        found[job.name].append(job)
    return found


def _check(wishes: Sequence[Wish], quota: Quota) -> None:
    nodes = slurm.read_nodes() if wishes else ()
    for wish in wishes:
        check_room(wish, nodes)
        check_deadline(wish)
    if wishes and (tenant := wishes[0].tenant):
        first, *others = (wish.use for wish in wishes)
        check_quota(tenant, quota, first, [*others, *slurm.read_tenant_uses(tenant)])


def _index(outcomes: Iterable[Outcome]) -> dict[str, Outcome]:
    return {outcome.guest_id: outcome for outcome in outcomes}


def _fail(wish: Wish, error: OrchestratorError) -> Outcome:
    """Raises Unreachable: each of the other guests would wait for the controller too."""
    if isinstance(error, slurm.Unreachable):
        raise error
    return Outcome(wish.request.name, wish.guest_id, error=_summarize(error))


def _summarize(error: OrchestratorError) -> str:
    """On one line. Without the hint, which is for a command with a single guest, such as its --id."""
    return " ".join(error.message.split())


def _submit(wish: Wish) -> Outcome | None:
    """None if the controller has acknowledged the guest."""
    try:
        submit_once(wish)
    except OrchestratorError as error:
        return _fail(wish, error)
    return None


def _release(wishes: Sequence[Wish], quota: Quota) -> list[Outcome]:
    """Releases the guests of a tenant that are within the quota, and withdraws the others: their outcomes are returned."""
    if not wishes or not (tenant := wishes[0].tenant):
        return []
    jobs = {job.guest_id: job for job in slurm.retry(slurm.read_jobs, CONTROLLER_SECONDS) if job.tenant == tenant}
    held = [(job, wish) for wish in wishes if (job := jobs.get(wish.guest_id)) and job.is_held and job.state == "PENDING"]
    uses = sorted(slurm.retry(lambda: slurm.read_tenant_uses(tenant), CONTROLLER_SECONDS), key=lambda use: use.number)
    withdrawn = {}
    for job, wish in held:
        try:
            check_quota(tenant, quota, wish.use, [use for use in uses if use.number < job.number])
        except QuotaExceeded as error:
            withdrawn[job.number] = _fail(wish, error)
    released = [job.number for job, _ in held if job.number not in withdrawn]
    # What was not withdrawn or released is found when the jobs are read again.
    try:
        if withdrawn:
            slurm.cancel_jobs(withdrawn)
    except CommandError:
        withdrawn = {}
    with suppress(CommandError):
        if released:
            slurm.release_jobs(released)
    if held:
        time.sleep(SAVE_SECONDS)
    return list(withdrawn.values())


def _submit_forgotten(wishes: Sequence[Wish], pool: ThreadPoolExecutor) -> list[Outcome]:
    """Submits guests again that the controller has forgotten, when no host can have them. Returns the outcomes of failures."""
    if not (forgotten := _find_unknown(wishes)):
        return []
    try:
        wait_until_orphans_ended(*forgotten)
    except OrchestratorError as error:
        return [_fail(wish, error) for wish in forgotten]
    outcomes = [outcome for outcome in pool.map(_submit, _find_unknown(forgotten)) if outcome]
    time.sleep(SAVE_SECONDS)
    return outcomes


def _find_unknown(wishes: Sequence[Wish]) -> list[Wish]:
    known = {job.guest_id for job in slurm.retry(slurm.read_jobs, CONTROLLER_SECONDS)}
    return [wish for wish in wishes if wish.guest_id not in known]


def _complete(wish: Wish, quota: Quota, jobs: Sequence[Job]) -> Outcome:
    """Most guests are complete. Others were forgotten, or are held because a release was forgotten, or by an operator."""
    try:
        job = select_job(wish, jobs)
        if not job or (job.is_held and job.state == "PENDING"):
            job = submit(wish, quota)
        return Outcome(wish.request.name, wish.guest_id, job.number, job.state, job.note if job.has_ended else "")
    except OrchestratorError as error:
        return _fail(wish, error)
