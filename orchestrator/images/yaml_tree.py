"""Reads YAML of a caller into a tree of nodes, in bounded time and memory. Constructs no objects.

The tree comes from the parser's events: `yaml.load` recurses with the nesting, and merge keys make a short text grow without
limit.
Messages name lines and nothing of the text, which may be secret.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn

import yaml

from orchestrator.errors import RequestError

MAX_NODES, MAX_DEPTH = 20_000, 32
"""MAX_NODES counts a node again for each alias, as a program that walks the tree meets it."""

_LONGEST_TYPED = 100
"""Characters; a longer scalar is text."""
_CORE = "tag:yaml.org,2002:"
_NAMES = ("null", "bool", "int", "float", "str", "binary", "timestamp", "map", "seq", "set", "merge")
_TAGS = {f"{_CORE}{name}" for name in _NAMES}
_RESOLVER = yaml.resolver.Resolver()
# libyaml's parser is ten times faster; PyYAML may be built without it.
_LOADER: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class Node:
    """A value of the document.

    Attributes:
        kind: "map", "list", or a scalar's type in YAML 1.1: "str", "int", "bool", "null", "float", ...
        line: from 1.
        text: of a scalar.
        keys: of a map: its keys in order, each with the value. A merge key `<<` is a key like the others.
        items: of a list.
        size: nodes in it, itself included.
    """

    kind: str
    line: int
    text: str = ""
    keys: list[tuple[Node, Node]] = field(default_factory=list)
    items: list[Node] = field(default_factory=list)
    size: int = 1

    def find(self, key: str) -> Node | None:
        return next((value for name, value in self.keys if name.text == key), None)


def parse_yaml(text: str, what: str) -> Node:
    """Reads a text with one document. ``what`` names the text in messages.

    Raises RequestError if it is not YAML, has several documents, a duplicate key, a tag that is not YAML's own, an alias within
    its own anchor, more than 32 levels, or more than 20,000 nodes with its aliases counted out.
    """
    try:
        return _build(yaml.parse(text, Loader=_LOADER), what)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "the text"
        raise RequestError(f"{what}: invalid YAML at {where}", "check it with `cloud-init schema -c FILE`") from None
    except yaml.YAMLError:
        raise RequestError(f"{what}: invalid YAML: it contains a character that YAML does not allow") from None


def _build(events: Iterator[yaml.Event], what: str) -> Node:
    root: Node | None = None
    documents = 0
    builder = _Builder(what)
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise RequestError(f"{what}: line {event.start_mark.line + 1} starts a second YAML document", "give one document")
        elif isinstance(event, yaml.NodeEvent | yaml.CollectionEndEvent):
            root = builder.add(event) or root
    return root or Node("null", 1)


@dataclass
class _Open:
    """A collection that is not complete, and in a map the key that waits for its value."""

    node: Node
    anchor: str | None
    key: Node | None = None
    seen: set[str] = field(default_factory=set)


class _Builder:
    """Builds the tree from events, without recursion."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._open: list[_Open] = []
        self._anchors: dict[str, Node] = {}
        self._count = 0

    def add(self, event: yaml.Event) -> Node | None:
        """Returns the root once it is complete."""
        line = event.start_mark.line + 1
        if isinstance(event, yaml.CollectionEndEvent):
            closed = self._open.pop()
            node, anchor = closed.node, closed.anchor
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                self._refuse(line, "an alias refers to an anchor that does not exist or is not complete")
            node, anchor = self._anchors[event.anchor], None
            self._count += node.size
        else:
            node, anchor = self._make(event, line), event.anchor
            self._count += 1
        if self._count > MAX_NODES:
            self._refuse(line, f"the text has more than {MAX_NODES} values, aliases counted out")
        if isinstance(event, yaml.CollectionStartEvent):
            if len(self._open) == MAX_DEPTH:
                self._refuse(line, f"values are nested deeper than {MAX_DEPTH} levels")
            self._open.append(_Open(node, anchor))
            return None
        if anchor is not None:
            self._anchors[anchor] = node
        if not self._open:
            return node
        self._attach(self._open[-1], node, line)
        return None

    def _make(self, event: yaml.Event, line: int) -> Node:
        tag, text = event.tag, ""
        if isinstance(event, yaml.ScalarEvent):
            kind, text = "str", event.value
            if tag is None and len(text) <= _LONGEST_TYPED:
                tag = _RESOLVER.resolve(yaml.ScalarNode, text, event.implicit)
        else:
            kind = "map" if isinstance(event, yaml.MappingStartEvent) else "list"
        if tag not in (None, "!"):
            if tag not in _TAGS:
                self._refuse(line, "a tag is not one of YAML's own")
            if isinstance(event, yaml.ScalarEvent):
                kind = tag.removeprefix(_CORE)
        return Node(kind, line, text)

    def _attach(self, parent: _Open, node: Node, line: int) -> None:
        parent.node.size += node.size
        if parent.node.kind == "list":
            parent.node.items.append(node)
        elif parent.key is not None:
            parent.node.keys.append((parent.key, node))
            parent.key = None
        else:
            if node.kind in ("map", "list"):
                self._refuse(line, "a key is not a single value")
            if node.text in parent.seen:
                self._refuse(line, "a key is given twice in one map")
            parent.seen.add(node.text)
            parent.key = node

    def _refuse(self, line: int, why: str) -> NoReturn:
        raise RequestError(f"{self._what}: line {line}: {why}")
