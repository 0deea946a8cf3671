"""The host: walks through a document that is in the plugin's process, and changes it there."""

import os
import sys
from typing import Any, Iterator

try:
    import miniplug
except ImportError:  # not installed, as in a fresh clone: it is the one file two folders up
    sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
    import miniplug

HERE = os.path.dirname(os.path.abspath(__file__))


class Element:
    """An element of a document in the plugin, to be used like one that is here. `lent`: the proxy for it."""

    def __init__(self, lent: Any) -> None:
        self._lent = lent

    def __iter__(self) -> Iterator["Element"]:
        return iter(self._lent.children())  # they come as Elements, and theirs will, and so on

    def __getitem__(self, name: str) -> str:
        return self._lent.attribute(name)

    @property
    def tag(self) -> str:
        return self._lent.tag()

    @property
    def text(self) -> str:
        return self._lent.text()

    def find(self, text: str) -> "Element":
        """The first element in this one with that text. Raises LookupError if there is none."""
        with self._lent.walk() as elements:
            for element in elements:
                if element.text == text:
                    return element
        raise LookupError(text)

    def move(self, child: "Element", to: "Element") -> None:
        self._lent.move(child, to)  # both go home


miniplug.register(Element, name="Element", encode=lambda element: element._lent, decode=Element)


def main() -> None:
    with miniplug.launch(os.path.join(HERE, "plugin.py"), name="xml") as plugin:
        documents = plugin.dispense()
        library = documents.parse(os.path.join(HERE, "shelves.xml"))
        for shelf in library:
            print(f"{shelf['name']}: {', '.join(book.text for book in shelf)}")
        fiction, science = library
        fiction.move(fiction.find("A Brief History of Time"), science)
        print("moved:", documents.dump(science))


if __name__ == "__main__":
    main()
