"""SVG elements as text: markup that is well-formed and escaped, whatever names the data has."""

from collections.abc import Iterable
from xml.etree import ElementTree

from markupsafe import Markup

Element = ElementTree.Element


def element(tag: str, *children: Element | str, **attributes: object) -> Element:
    """Build an element. Numbers are rounded; a trailing ``_`` of an attribute's name goes, and ``_`` becomes ``-``."""
    made = Element(tag, {_name(key): _value(value) for key, value in attributes.items() if value is not None})
    for child in children:
        if isinstance(child, str):
            made.text = (made.text or "") + child
        else:
            made.append(child)
    return made


def titled(tag: str, title: str, **attributes: object) -> Element:
    """Build an element that shows ``title`` when the pointer rests on it."""
    return element(tag, element("title", title), **attributes)


def svg(children: Iterable[Element], *, label: str | None, **attributes: object) -> Markup:
    """Return an ``<svg>`` with a text alternative; without a ``label`` it is decoration that screen readers skip."""
    role = {"role": "img", "aria_label": label} if label is not None else {"aria_hidden": "true"}
    root = element("svg", *children, **role, **attributes)
    # Without self-closing tags the text is valid as HTML and as XML.
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))


def _name(key: str) -> str:
    return key if key in ("viewBox", "preserveAspectRatio") else key.rstrip("_").replace("_", "-")


def _value(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
