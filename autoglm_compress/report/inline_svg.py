"""matplotlib's SVG as a part of a page, with unique ids and no effect outside the picture."""

import re
from xml.etree import ElementTree

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
REFERENCE = re.compile(r"(?<=url\(#)[^)]+(?=\))|(?<=^#).+$")
LEFT_OUT = {f"{{{SVG}}}{name}" for name in ("metadata", "style", "script")}


def inline_svg(svg: bytes, prefix: str, label: str) -> str:
    """The picture as an `svg` element of HTML.

    Args:
        svg: a file that matplotlib wrote.
        prefix: what every id of this picture begins with; letters, digits and `-`.
        label: what the picture shows, for those who cannot see it.
    """
    root = ElementTree.fromstring(svg)
    for parent in root.iter():
        for child in [child for child in parent if child.tag in LEFT_OUT]:
            parent.remove(child)
    used = {found for element in root.iter() for value in element.attrib.values() for found in REFERENCE.findall(value)}
    for element in root.iter():
        _own(element, prefix, used)
    width = float(root.attrib.pop("width").removesuffix("pt"))
    root.attrib.pop("height")
    root.set("id", prefix)
    root.set("style", f"--width: {width * 4 / 3:.0f}px")
    root.set("role", "img")
    root.set("aria-label", label)
    return ElementTree.tostring(root, encoding="unicode")


def _own(element: ElementTree.Element, prefix: str, used: set[str]) -> None:
    """Give ids that are `used`, and references to them, a prefix; drop other ids, and the names of namespaces."""
    for name, value in list(element.attrib.items()):
        del element.attrib[name]
        if name != "id":
            name = name.removeprefix(f"{{{XLINK}}}")  # browsers accept plain `href` since 2018
            element.set(name, REFERENCE.sub(rf"{prefix}-\g<0>", value))
        elif value in used:
            element.set(name, f"{prefix}-{value}")
    element.tag = element.tag.removeprefix(f"{{{SVG}}}")
