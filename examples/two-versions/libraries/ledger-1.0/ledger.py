"""The library `ledger`, version 1.0: accounts in a text file."""


def read(path):
    """The entries of a file: (name, cents) of each."""
    entries = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            name, _, cents = line.rpartition(" ")
            entries.append((name, int(cents)))
    return entries
