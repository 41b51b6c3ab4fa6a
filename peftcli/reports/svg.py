"""SVG made fit to stand inside an HTML page: no script, no outside reference, ids of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree

DROPPED = frozenset({"script", "style", "metadata", "foreignobject", "iframe", "image", "a", "set", "animate"})
FONT = re.compile(r"font-family:[^;\"]*;?\s*")


def inline(svg: str, prefix: str, description: str, colors: Mapping[str, str] | None = None) -> str:
    """Rewrite a whole SVG document for use inside HTML.

    Args:
        svg: The document, from matplotlib or from a method's own hands; it is not trusted.
        prefix: Put before every id, so that two figures of a page do not share one.
        description: What the figure shows, for those who cannot see it.
        colors: Colour -> name of the CSS variable that takes its place.

    Raises:
        ValueError: It is not SVG.
    """
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise ValueError(f"not readable SVG ({error})") from error
    if _plain(root.tag) != "svg":
        raise ValueError(f"not SVG but <{_plain(root.tag)}>")
    used = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", svg)) if svg else set()
    _clean(root, prefix, {name for pair in used for name in pair if name}, colors or {})
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib.update({"role": "img", "aria-label": description})
    return re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode"))


def _clean(element: ElementTree.Element, prefix: str, used: set[str], colors: Mapping[str, str]) -> None:
    element.tag = _plain(element.tag)
    element.attrib = dict(_attributes(element.attrib, prefix, used, colors))
    for child in list(element):
        if not isinstance(child.tag, str) or _plain(child.tag).lower() in DROPPED:
            element.remove(child)
        else:
            _clean(child, prefix, used, colors)


def _attributes(given: Mapping[str, str], prefix: str, used: set[str], colors: Mapping[str, str]):
    for key, value in given.items():
        name = _plain(key)
        if name.lower().startswith("on") or re.search(r"url\(\s*['\"]?[^#'\"\s]", value):
            continue
        if name == "id":
            if value in used:
                yield "id", f"{prefix}-{value}"
        elif name == "href":
            if value.startswith("#"):
                yield "href", f"#{prefix}-{value[1:]}"
        else:
            value = FONT.sub("", value.replace("url(#", f"url(#{prefix}-"))
            for color, variable in colors.items():
                value = value.replace(color, f"var({variable})")
            yield name, re.sub(r"\s+", " ", value).strip()


def _plain(tag: str) -> str:
    return tag.rsplit("}", 1)[-1]
