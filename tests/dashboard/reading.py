"""A page as a reader without eyes meets it: its tree, the text of an element, its links, its forms."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "input", "img", "br", "hr", "rect"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Its words, one space between them."""
        return " ".join(" ".join(c if isinstance(c, str) else c.text for c in self.children).split())

    def all(self, tag: str | None = None, **attributes: str) -> list[Element]:
        """Every element below it, itself included, of this tag and with these attributes."""
        mine = (tag is None or self.tag == tag) and all(
            self.attributes.get(name.strip("_")) == value for name, value in attributes.items()
        )
        found = [self] if mine else []
        for child in self.children:
            if isinstance(child, Element):
                found += child.all(tag, **attributes)
        return found

    def one(self, tag: str | None = None, **attributes: str) -> Element:
        [found] = self.all(tag, **attributes)
        return found

    def rows(self) -> list[list[str]]:
        """The cells of the first table in it, without its head."""
        body = self.all("tbody")[0]
        return [[c.text for c in row.children if isinstance(c, Element)] for row in body.all("tr")]


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.path = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.path[-1].children.append(element)
        if tag not in VOID:
            self.path.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.path[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.path[-1].tag == tag, f"</{tag}> ends <{self.path[-1].tag}>"
        self.path.pop()

    def handle_data(self, data: str) -> None:
        self.path[-1].children.append(data)


def parse(html: str) -> Element:
    """The page; every element that is opened must be closed, in order."""
    parser = _Parser()
    parser.feed(html)
    parser.close()
    left = [element.tag for element in parser.path[1:]]
    assert not left, f"never closed: {left}"
    return parser.root
