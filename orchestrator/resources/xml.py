"""Elements of the domain XML (https://libvirt.org/formatdomain.html). Pure."""

from __future__ import annotations

from lxml import etree

QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"


def element(tag: str, *content: etree._Element | str, **attributes: str) -> etree._Element:
    """The content is child elements and text."""
    made = etree.Element(tag, attributes, nsmap={"qemu": QEMU})
    for part in content:
        if isinstance(part, str):
            made.text = part
        else:
            made.append(part)
    return made
