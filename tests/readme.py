"""Does what a README says, so that nothing in it is made up."""

import re
import shlex
import subprocess
import sys

BLOCK = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)


def blocks(path):
    """The code blocks of a Markdown file: (kind, text) of each."""
    return BLOCK.findall(path.read_text(encoding="utf-8"))


def run(folder, *arguments, **options):
    """Run this Python with arguments in a folder, to its end."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, stdin=subprocess.DEVNULL,
                          capture_output=True, encoding="utf-8", **options)


def follow(path, folder, elsewhere=()):
    """Follow a README in a folder. `elsewhere`: the commands that something else runs. Asserts what it shows.

    A ``python`` block is a file, named by its first line; ``sh`` is one command, which ``python3`` begins; ``text`` is
    what the command before it prints. Output on stdout and stderr together is compared in any order.
    """
    assert set(elsewhere) <= {text for _, text in blocks(path)}
    done = None
    for kind, text in blocks(path):
        if kind == "python":
            name = re.match(r"# (\w+\.py)\n", text)
            assert name, f"a python block of {path} does not begin with its file's name"
            (folder / name.group(1)).write_text(text, encoding="utf-8")
        elif kind == "sh" and text not in elsewhere:
            program, *arguments = shlex.split(text)
            assert program == "python3"
            done = run(folder, *arguments)
            assert done.returncode == 0, done.stderr
        elif kind == "text":
            shown, printed = text.splitlines(), (done.stdout + done.stderr).splitlines()
            assert printed == shown or (done.stderr and sorted(printed) == sorted(shown))
        else:
            assert text in elsewhere, f"a block of {path} that no test knows: {kind!r}"
