"""Things to do with text. It has never heard of miniplug."""

import re
import unicodedata
from typing import Dict


class Tool:
    def count(self, text: str) -> Dict[str, int]:
        """How many lines, words and characters a text has."""
        return {"lines": len(text.splitlines()), "words": len(text.split()), "characters": len(text)}

    def slug(self, title: str) -> str:
        """A title as it can stand in an address or a file name."""
        plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
        return "-".join(re.findall(r"[a-z0-9]+", plain.lower()))
