"""Things to do with text. It has never heard of miniplug."""

import collections
import re
import unicodedata
from typing import Dict


class Tool:
    def count(self, path: str) -> Dict[str, int]:
        """How many lines, words and characters a text file has."""
        with open(path, encoding="utf-8") as file:
            text = file.read()
        return {"lines": len(text.splitlines()), "words": len(text.split()), "characters": len(text)}

    def frequent(self, path: str, limit: int = 10) -> Dict[str, int]:
        """The words that a text file uses most, and how often."""
        with open(path, encoding="utf-8") as file:
            words = re.findall(r"\w+", file.read().lower())
        return dict(collections.Counter(words).most_common(limit))

    def slug(self, title: str) -> str:
        """A title as it can stand in an address or a file name."""
        plain = unicodedata.normalize("NFKD", str(title)).encode("ascii", "ignore").decode()
        return "-".join(re.findall(r"[a-z0-9]+", plain.lower()))
