"""An application that uses two versions of one library at once, and a C extension that crashes.

    python3 host.py     converts accounts.txt, which version 1 can read, to accounts.json, which version 2 can
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

try:
    import miniplug
except ImportError:  # not installed, as in a fresh clone: it is the one file two folders up
    sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
    import miniplug

HERE = Path(__file__).resolve().parent
MADE = HERE / ".venv"  # all that is made here


def python_with(library: str) -> str:
    """The Python of a virtual environment that has a library and nothing else, made if need be."""
    environment = MADE / library
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([str(python), "-c", where], check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout
    shutil.copytree(str(HERE / "libraries" / library), packages.strip(), dirs_exist_ok=True)  # offline; else pip would
    return str(python)


def compile_extension() -> str:
    """Make a module of native/peek.c, if there is a C compiler. Returns the folder to import it from."""
    MADE.mkdir(exist_ok=True)
    target = MADE / f"peek{sysconfig.get_config_var('EXT_SUFFIX')}"
    compiler = shutil.which("cc")
    if compiler and not target.exists():
        subprocess.run([compiler, "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}",
                        str(HERE / "native" / "peek.c"), "-o", str(target)], stderr=subprocess.DEVNULL)
    return str(MADE)


def convert(old: miniplug.Plugin, new: miniplug.Plugin) -> None:
    reader, writer = old.dispense(), new.dispense()
    path = str(HERE / "accounts.json")
    entries = reader.read(str(HERE / "accounts.txt"))
    print(f"ledger {reader.version()} has read {len(entries)} entries")
    writer.write(path, entries)
    print(f"ledger {writer.version()} has written them: {writer.total(path)} cents")


def crash() -> None:
    with miniplug.launch(f"{HERE / 'native' / 'plugin.py'}:Native", env={"PYTHONPATH": compile_extension()},
                         stderr="discard", max_restarts=1) as plugin:
        native = plugin.dispense()
        try:
            native.at(0)
        except miniplug.PluginCrashed:
            print("the C extension has crashed: its own process has ended, and no other")
        native.kind()  # the next call starts it anew
        print("it has been started", 1 + plugin.restarts, "times")


def main() -> None:
    with miniplug.launch(f"{HERE / 'reader.py'}:Reader", python=python_with("ledger-1.0")) as old, \
            miniplug.launch(f"{HERE / 'writer.py'}:Writer", python=python_with("ledger-2.0")) as new:
        convert(old, new)
        crash()
        print("both versions are still there:", old.dispense().version(), "and", new.dispense().version())


if __name__ == "__main__":
    main()
