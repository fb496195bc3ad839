"""Options of the form KEY=VALUE,KEY=VALUE."""

from __future__ import annotations

from collections.abc import Callable

import click

Callback = Callable[[click.Context, click.Parameter, tuple[str, ...]], tuple[dict[str, str], ...]]


def parse_key_values(text: str, keys: tuple[str, ...]) -> dict[str, str]:
    """The fields that an option names. Raises click.BadParameter for wrong keys; the manager checks the values."""
    fields: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in keys or not value or key in fields:
            raise click.BadParameter(f"{part!r} in {text!r}: use each of {', '.join(keys)} at most once, as KEY=VALUE")
        fields[key] = value
    return fields


def parse_all(keys: tuple[str, ...]) -> Callback:
    """The callback of an option that can be repeated."""
    return lambda _context, _option, values: tuple(parse_key_values(text, keys) for text in values)
