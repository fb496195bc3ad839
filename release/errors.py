"""Causes and remedies of each error code, for docs/errors.md. Codes and HTTP statuses are those of the error classes."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping

import orchestrator
from orchestrator.errors import OrchestratorError

# Programs, not libraries.
_SKIP = ("orchestrator.doctor.__main__",)

ERRORS: Mapping[str, tuple[str, str]] = {
    "bad-request": (
        "an invalid field, option, name, number, JSON text, HTTP request or configuration; a member that occurs twice in one"
        " object",
        "correct the field that the message names",
    ),
    "unauthorized": (
        "TLS port: no valid token and no certificate was presented. A certificate without a known name is `forbidden`",
        "pass `--token-file` or `--cert`; check the name in `[tokens]` of the manager's configuration",
    ),
    "forbidden": (
        "the caller's role does not permit the request",
        "use the account of an operator, or ask the operator for the role; see `[access]` and `[tenants]`",
    ),
    "cross-site": (
        "a page of another site made a browser send a change or a plan: any method except `GET` and `HEAD` with `Origin`, or with"
        " `Sec-Fetch-Site` other than `none` and `same-origin`. Exception: the manager's [own page](web.md) with a token",
        "send the request from a program, or from a page of the same origin",
    ),
    "not-found": (
        "the path, guest, network, switch or image does not exist, or it is another tenant's",
        "list what exists, for example with `nohype guest list`",
    ),
    "method": ("the path does not support the HTTP method", "use a method of the header `Allow`"),
    "conflict": (
        "the name is in use, the request id belongs to another request, or the state does not allow the change",
        "check `nohype guest show NAME`, then choose another name or wait for the state that the message names",
    ),
    "lost-race": ("another request changed the ledger in the meantime", "repeat the request"),
    "no-room": (
        "no candidate has the requested cores, memory, VFs or disks; `reasons` states why each was refused",
        "compare `nohype survey` with `nohype guest list`; request less, or delete a guest",
    ),
    "quota": (
        "the request exceeds the quota of the tenant; `reasons` has each limit and its use",
        "delete a guest, or ask the operator to raise the quota in `[tenants]`",
    ),
    "guest": (
        "the guest did not become ready, did not reply, or ended while it was started; or its image does not use the console"
        " protocol `nohype-1`",
        "read `nohype guest console NAME --no-follow --history 1000`",
    ),
    "image": (
        "the image is damaged, unsupported or cannot be built: a file is missing or has another size, `image.json` is invalid, or"
        " the image store is locked. Nothing was claimed",
        "run `nohype image verify NAME`; build or install the image again",
    ),
    "ready-by-ssh": (
        "the guest reports ready only by answering SSH, which the manager does not check",
        "wait with `nohype guest create --wait` or `nohype guest ssh`, which check it",
    ),
    "stale": ("the guest's version is not listed in `If-Match`", "read the guest again, and repeat the change with its version"),
    "too-large": (
        "the body is too long, nested too deeply, or has more than 512 elements (strings, lists, objects, commas)",
        "send less in one request; the operator sets `body` and `nesting` in `[limits]`",
    ),
    "media-type": (
        "the body is not declared as `application/json` in UTF-8, or is compressed",
        "send `Content-Type: application/json` without `Content-Encoding`",
    ),
    "too-many": (
        "the limit of requests per second, or at the same time, is reached. The response is delayed by one second",
        "repeat after `wait` seconds (also in `Retry-After`); the operator sets `rate` and `concurrent` in `[limits]`",
    ),
    "internal": ("an internal error in the manager", "read `journalctl -u nohyped`, and report the error"),
    "host": (
        "the kernel refused or clamped an operation on the host; the message has its error, or both numbers",
        "follow the hint; check the server with `nohype doctor` and `nohype config check --host`",
    ),
    "command": ("a program failed, is missing, or did not end in time", "read the output in the message; install the program"),
    "ledger": (
        "the ledger cannot be read or written: its disk is full, or the file is damaged, locked or replaced",
        "see [troubleshooting](troubleshooting.md#the-manager)",
    ),
    "error": ("an error that no other code describes", "follow the hint of the message"),
    "hypervisor": (
        "libvirt or QEMU refused an operation, or libvirt cannot be reached",
        "check `systemctl status libvirtd` and `/var/log/libvirt/qemu/NAME.log`",
    ),
    "switch": (
        "an external switch cannot be reached, presented another host key, or refused a request",
        "run `nohype switch verify NAME`",
    ),
    "shell": (
        "a connection by SSH to a guest, a lab or a switch failed",
        "check the address, the key and the host key that the message names",
    ),
    "shell-timeout": ("a command over SSH did not end in time", "raise `--timeout`, or check the load of the host"),
    "lab": ("the nested lab cannot be built, started or used", "run `nohype lab status`; the message names the log to read"),
    "lab-lost": (
        "the lab stopped responding while it was used. This is not the result of a proof",
        "run `nohype lab down NAME`, and start a new lab; check the load of the machine",
    ),
    "evidence": (
        "evidence cannot be verified; the exit status tells the reason (see [evidence](evidence.md#verify))",
        "obtain the evidence again from the host, and check the key",
    ),
}


def read_codes() -> frozenset[str]:
    """Codes of all error classes of the program."""
    for module in pkgutil.walk_packages(orchestrator.__path__, "orchestrator."):
        if module.name not in _SKIP:
            importlib.import_module(module.name)
    return frozenset({OrchestratorError.code} | {kind.code for kind in _subclasses(OrchestratorError)})


def _subclasses(kind: type[OrchestratorError]) -> Iterator[type[OrchestratorError]]:
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)
