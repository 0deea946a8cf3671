"""The plugin: XML documents, that stay in here. Each element of theirs that a method takes or gives is lent."""

import xml.etree.ElementTree as ET
from typing import Iterator, List

import miniplug


class Element:
    """An element of a document. The host gets one of its own class `Element`, which calls this one."""

    def __init__(self, node: ET.Element) -> None:
        self._node = node

    def tag(self) -> str:
        return self._node.tag

    def text(self) -> str:
        return self._node.text or ""

    def attribute(self, name: str) -> str:
        """Raises KeyError if there is none."""
        return self._node.attrib[name]

    def children(self) -> List["Element"]:
        return [Element(node) for node in self._node]

    def walk(self) -> Iterator["Element"]:
        """This element and all in it. The host may stop at any: those behind it never travel."""
        return map(Element, self._node.iter())

    def move(self, child: "Element", to: "Element") -> None:
        """Take a child out of this element, and put it at the end of another."""
        self._node.remove(child._node)
        to._node.append(child._node)


# An Element travels as a reference, and one that comes home is the very one that was lent.
miniplug.register(Element, name="Element", encode=miniplug.ref, decode=lambda element: element)


class Documents:
    def parse(self, path: str) -> Element:
        """A document's root."""
        return Element(ET.parse(path).getroot())

    def dump(self, element: Element) -> str:
        """An element and all in it, as XML."""
        return ET.tostring(element._node, encoding="unicode").strip()


if __name__ == "__main__":
    miniplug.serve({"documents": Documents()})
