"""Elements of the domain XML (https://libvirt.org/formatdomain.html), and its text. Pure."""

from __future__ import annotations

from xml.etree import ElementTree
from xml.etree.ElementTree import Element

QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
ElementTree.register_namespace("qemu", QEMU)


def element(tag: str, *content: Element | str, **attributes: str) -> Element:
    """The content is child elements and text."""
    made = Element(tag, attributes)
    for part in content:
        if isinstance(part, str):
            made.text = part
        else:
            made.append(part)
    return made


def to_text(root: Element) -> str:
    """Indented by two spaces per level; changes ``root``."""
    ElementTree.indent(root)
    # ">" is escaped in text and attributes, so " />" is always the end of an empty element.
    return ElementTree.tostring(root, encoding="unicode").replace(" />", "/>") + "\n"
