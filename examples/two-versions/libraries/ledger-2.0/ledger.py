"""The library `ledger`, version 2.0: accounts in a JSON file. It cannot read the files of version 1, nor has it `read`."""

import json


class Ledger:
    def __init__(self, path):
        self.path = path
        self.entries = []

    def add(self, name, cents):
        self.entries.append({"name": name, "cents": cents})

    def save(self):
        with open(self.path, "w", encoding="utf-8") as file:
            json.dump({"format": 2, "entries": self.entries}, file, indent=2)

    @classmethod
    def load(cls, path):
        ledger = cls(path)
        with open(path, encoding="utf-8") as file:
            ledger.entries = json.load(file)["entries"]
        return ledger

    def total(self):
        return sum(entry["cents"] for entry in self.entries)
