"""Markdown, by the library mistune, which is installed for this plugin alone."""

from typing import Any, Dict, Iterator, List

import mistune


class Tool:
    def render(self, text: str) -> str:
        """Markdown text as HTML."""
        return str(mistune.html(str(text))).rstrip("\n")

    def render_file(self, path: str) -> str:
        """A Markdown file as HTML."""
        with open(path, encoding="utf-8") as file:
            return self.render(file.read())

    def outline(self, path: str) -> List[str]:
        """The headings of a Markdown file, each as deep as its level."""
        parse = mistune.create_markdown(renderer=None)
        with open(path, encoding="utf-8") as file:
            tokens = parse(file.read())
        headings = [token for token in tokens if token["type"] == "heading"]
        return ["  " * (token["attrs"]["level"] - 1) + "".join(words(token["children"])) for token in headings]


def words(tokens: List[Dict[str, Any]]) -> Iterator[str]:
    """The text in a part of a document, whatever it is wrapped in."""
    for token in tokens:
        yield token.get("raw", "")
        yield from words(token.get("children", []))
