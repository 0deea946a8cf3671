"""A command line made of plugins: every file in the folder ``plugins`` is one, and brings its own tools.

    python3 toolbox.py                   lists every tool
    python3 toolbox.py TOOL [ARG...]     runs one; an ARG is JSON, or else a string

A plugin is a file ``NAME.py``, or a folder ``NAME`` with a ``plugin.py``, and has a class ``Tool``. Each public method
of that class is a tool, called ``NAME.METHOD``. A folder with a ``requirements.txt`` gets a virtual environment of its
own, made when the plugin is first used. Each plugin runs in its own process: a broken one takes nothing else with it.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Sequence

HERE = Path(__file__).resolve().parent

try:
    import miniplug
except ImportError:  # not installed, as in a fresh clone: it is the one file two folders up
    sys.path.append(str(HERE.parent.parent))
    import miniplug


class ToolError(Exception):
    """A tool cannot be had, or failed. Its text is one line for the user."""


def find_plugins(folder: Path) -> dict[str, Path]:
    """The plugins in a folder: name to file, sorted by name."""
    found = {path.stem: path for path in miniplug.discover(folder, "*.py")}
    found.update((path.parent.name, path) for path in miniplug.discover(folder, "*/plugin.py"))
    return {name: found[name] for name in sorted(found)}


def interpreter_for(name: str, file: Path) -> str | None:
    """The Python of the plugin's own virtual environment, made if need be; None if the plugin asks for none."""
    requirements = file.with_name("requirements.txt")
    if file.name != "plugin.py" or not requirements.exists():
        return None
    environment = file.with_name(".venv")
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    installed = environment / "installed.txt"  # written last: a copy of the requirements that are in there
    if not installed.exists() or installed.read_bytes() != requirements.read_bytes():
        print(f"{name}: making its virtual environment, this once", file=sys.stderr)
        run_quietly("make its virtual environment", sys.executable, "-m", "venv", "--clear", environment)
        run_quietly("install its requirements (is a package index in reach?)", python, "-m", "pip", "install",
                    "--quiet", "--disable-pip-version-check", "--no-input", "--retries", "1", "-r", requirements)
        installed.write_bytes(requirements.read_bytes())
    return str(python)


def run_quietly(purpose: str, *command: str | Path) -> None:
    """Run a program to its end. Raises ToolError with the most telling line it wrote if it fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        lines = done.stdout.decode(errors="replace").strip().splitlines() or ["it wrote nothing"]
        errors = [line for line in lines if line.startswith("ERROR")]  # pip's; warnings come before them
        raise ToolError(f"cannot {purpose}: {(errors or lines)[0]}")


def open_plugin(name: str, file: Path) -> miniplug.Plugin:
    """Start a plugin. Raises ToolError, or an error of miniplug's."""
    return miniplug.launch(f"tool={file}:Tool", name=name, python=interpreter_for(name, file), start_timeout=20.0)


def describe(name: str, file: Path) -> list[str]:
    """The lines that tell about a plugin's tools, or what is wrong with it. Raises nothing that a plugin can cause."""
    lines = []
    try:
        with open_plugin(name, file) as plugin:
            system = plugin.dispense("system", timeout=20.0)
            for method in system.listMethods():
                served, _, tool = method.partition(".")
                if served == "tool":
                    doc = system.methodHelp(method).partition("\n")[0]
                    lines += [f"{name}.{tool}{system.methodSignature(method) or '(...)'}", f"    {doc}".rstrip()]
    except (ToolError, miniplug.PluginError) as error:
        return [f"{name}: {explain(error)}"]
    return lines or [f"{name}: its class Tool has no public methods"]


def explain(error: Exception) -> str:
    """An error in one line, the most telling one."""
    if isinstance(error, miniplug.LaunchError) and error.output:
        return error.output[-1]  # such as the last line of a traceback
    if isinstance(error, miniplug.RemoteError):
        return f"{error.type_name}: {error.message}"
    return str(error).partition("\n")[0]


def list_tools(plugins: dict[str, Path]) -> None:
    with ThreadPoolExecutor(8) as pool:  # side by side: a slow plugin holds up no other
        for lines in pool.map(describe, plugins, plugins.values()):
            print("\n".join(filter(None, lines)))


def run_tool(plugins: dict[str, Path], tool: str, arguments: Sequence[str]) -> None:
    name, _, method = tool.partition(".")
    if name not in plugins or not method:
        raise ToolError("no such tool; without arguments this program lists those there are")
    with open_plugin(name, plugins[name]) as plugin:
        result = getattr(plugin.dispense(), method)(*map(parse, arguments))
    print(result if isinstance(result, str) else json.dumps(result, indent=2, ensure_ascii=False, default=str))


def parse(argument: str) -> Any:
    """An argument from the command line: JSON, or else a string."""
    try:
        return json.loads(argument)
    except ValueError:
        return argument


def main(arguments: Sequence[str]) -> int:
    logging.getLogger("miniplug").addHandler(logging.NullHandler())  # what plugins print and log is not for this user
    plugins = find_plugins(HERE / "plugins")
    if not arguments:
        list_tools(plugins)
        return 0
    try:
        run_tool(plugins, arguments[0], arguments[1:])
    except (ToolError, miniplug.PluginError) as error:
        print(f"{arguments[0]}: {explain(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
