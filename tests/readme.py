"""Does what a page says, so that nothing in it is made up."""

import contextlib
import os
import re
import shlex
import subprocess
import sys

BLOCK = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
FILES = ("python", "toml", "json")  # a block of these is a file, named by its first line
HOME = "https://github.com/miniplug/miniplug/blob/main/"


def blocks(path):
    """The code blocks of a Markdown file: (kind, text) of each."""
    return BLOCK.findall(path.read_text(encoding="utf-8"))


def sections(path):
    """The parts of a page that have code blocks: [(heading, blocks)]. A heading inside a block is none."""
    heading, found, text = path.stem, [], path.read_text(encoding="utf-8")
    at = [(match.start(), match.groups()) for match in BLOCK.finditer(text)]
    inside = [range(match.start(), match.end()) for match in BLOCK.finditer(text)]
    at += [(match.start(), match.group(1)) for match in re.finditer(r"^#{1,3} (.*)$", text, re.MULTILINE)
           if not any(match.start() in block for block in inside)]
    for _, content in sorted(at, key=lambda item: item[0]):
        if isinstance(content, str):
            heading = content
        elif found and found[-1][0] == heading:
            found[-1][1].append(content)
        else:
            found.append((heading, [content]))
    assert len(dict(found)) == len(found), f"two parts of {path} have one heading"
    return found


def headings(path):
    """The anchors of a page: what GitHub makes of its headings."""
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def targets(text):
    """Where the links of a page lead, and the label of each that is defined below it has its use."""
    text = BLOCK.sub("", text)
    labels = re.findall(r"^\[([^\]]+)\]: (\S+)$", text, re.MULTILINE)
    for label, _ in labels:
        assert f"][{label}]" in text, f"nothing links to [{label}]"
    return re.findall(r"\]\(([^)]+)\)", text) + [target for _, target in labels]


def links(path, root):
    """Where a page's links lead inside the project: (file, anchor or None) of each."""
    for target in targets(path.read_text(encoding="utf-8")):
        start = root if target.startswith(HOME) else path.parent
        place, _, anchor = target.replace(HOME, "", 1).partition("#")
        if ":" not in place:
            yield (start / place if place else path), anchor or None


def run(folder, *arguments, **options):
    """Run this Python with arguments in a folder, to its end."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, stdin=subprocess.DEVNULL,
                          capture_output=True, encoding="utf-8", **options)


def write(folder, text):
    """Write the block that is a file. Returns whether it is one."""
    name = re.match(r"# ([\w./-]+\.\w+)\n", text)
    if name:
        path = folder / name.group(1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return bool(name)


class Follower:
    """Follows a page in a folder. On Windows only what ``python3`` begins can be run."""

    def __init__(self, folder):
        self.folder = folder
        self.background = []  # what was started with ``sh background``
        self.printed = None  # its first line, or None: what stands for CONFIG in a later command
        self.done = None
        self.environment = dict(os.environ)
        self.environment.pop("PYTHONPATH", None)

    def path_with_python(self):
        """A folder whose python3 is this Python, so that a shell's commands run under it."""
        tools = self.folder / ".tools"
        if not tools.exists():
            tools.mkdir()
            script = tools / "python3"
            script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
            script.chmod(0o755)
        return f"{tools}{os.pathsep}{os.environ['PATH']}"

    def command(self, text):
        """The command, its environment and more, as `subprocess` wants it."""
        text = text.replace("CONFIG", self.printed or "CONFIG").strip()
        options = {"cwd": str(self.folder), "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE,
                   "stderr": subprocess.PIPE, "encoding": "utf-8", "env": self.environment}
        if os.name != "nt":
            options["env"] = dict(self.environment, PATH=self.path_with_python())
            return ["sh", "-ec", text], options
        program, *arguments = shlex.split(text)
        assert program == "python3"
        return [sys.executable, *arguments], options

    def run(self, text):
        command, options = self.command(text)
        self.done = subprocess.run(command, **options)
        assert self.done.returncode == 0, self.done.stderr

    def start(self, text):
        """Start what goes on running, and wait for its first line."""
        command, options = self.command("exec " + text if os.name != "nt" else text)
        options["stderr"] = subprocess.DEVNULL
        self.background.append(subprocess.Popen(command, **options))
        self.printed = self.background[-1].stdout.readline().strip()

    def compare(self, text):
        """What the last command has printed; on stdout and stderr together in any order."""
        shown, printed = text.splitlines(), (self.done.stdout + self.done.stderr).splitlines()
        in_order = printed == shown
        assert in_order or (self.done.stderr and sorted(printed) == sorted(shown)), "it printed:\n" + "\n".join(printed)

    def follow(self, found, elsewhere=()):
        for kind, text in found:
            if text in elsewhere:
                continue
            if kind in FILES:
                assert write(self.folder, text), f"a {kind} block does not begin with its file's name: {text[:60]!r}"
            elif kind == "sh":
                self.run(text)
            elif kind == "sh background":
                self.start(text)
            else:
                assert kind == "text", f"a block that no test knows: {kind!r}"
                self.compare(text)

    def close(self):
        for process in self.background:
            with process:
                process.terminate()


def follow(path, folder, elsewhere=(), found=None):
    """Follow a page, or the blocks of it that were `found`, in a folder. Asserts what it shows.

    A ``python`` block is a file, named by its first line; ``sh`` is a command, ``sh background`` one that goes on
    running; ``text`` is what the command before it prints. `elsewhere`: the commands that something else runs.
    """
    assert set(elsewhere) <= {text for _, text in blocks(path)}
    with contextlib.closing(Follower(folder)) as follower:
        follower.follow(blocks(path) if found is None else found, elsewhere)
