"""Checksums of files. It has never heard of miniplug."""

import hashlib
import os
from typing import Dict, List


class Tool:
    def sha256(self, path: str) -> str:
        """The SHA-256 of a file, in hexadecimal."""
        return self.digest(path, "sha256")

    def digest(self, path: str, algorithm: str = "blake2b") -> str:
        """A file's digest by any algorithm that hashlib knows."""
        found = hashlib.new(algorithm)
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                found.update(block)
        return found.hexdigest()

    def duplicates(self, folder: str) -> List[List[str]]:
        """The files below a folder that have the same content, in groups. Hidden folders are left out."""
        by_size: Dict[int, List[str]] = {}
        for parent, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (os.path.join(parent, name) for name in names):
                if os.path.isfile(path) and not os.path.islink(path):
                    by_size.setdefault(os.path.getsize(path), []).append(path)
        groups: Dict[str, List[str]] = {}
        for paths in by_size.values():
            for path in paths if len(paths) > 1 else ():  # only files of one size can be the same
                groups.setdefault(self.sha256(path), []).append(path)
        return sorted(sorted(group) for group in groups.values() if len(group) > 1)
