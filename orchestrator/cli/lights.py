"""The last verdicts about the host and its guests, in a few words. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.client.host_shapes import Host, Light

_NOT_REPORTED = "this version of the manager does not report verdicts"


def find_lights(host: Host) -> Mapping[str, Light]:
    """By guest, and of "host"."""
    subjects = ("host", *(guest["name"] for guest in host["guests"]))
    missing = {name: Light(subject=name, verdict="not measured", text=_NOT_REPORTED) for name in subjects}
    return missing | {light["subject"]: light for light in host["lights"]}
