"""Make docs/reference.md of the docstrings in miniplug.py: ``python docs/make_reference.py``.

What is public and in no group here, or the other way round, is an error.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any, Iterator

HERE = Path(__file__).resolve().parent
PAGE = HERE / "reference.md"
sys.path.insert(0, str(HERE.parent))

import miniplug

GROUPS = {
    "In a host": ["launch", "Plugin", "attach", "local", "discover", "discover_entry_points", "Limits", "MethodInfo",
                  "freeze_support"],
    "What a host calls": ["Call", "Stream"],
    "In a plugin": ["serve", "cancelled"],
    "On both sides": ["Handshake", "register", "ref", "release"],
    "Errors": ["PluginError", "LaunchError", "HandshakeError", "AuthenticationError", "ChecksumError", "PluginCrashed",
               "ProtocolError", "PluginClosed", "PluginNotFound", "DeadReference", "CallTimeout", "MethodNotFound",
               "InterfaceMismatch", "NotSerializable", "MessageTooLarge", "RemoteError"],
}
MADE_BY_USERS = ("Limits", "Handshake")  # of the other classes nobody calls the constructor
HEAD = """\
# Reference

Every public name of `miniplug.py`, from its docstrings: `python docs/make_reference.py` writes this page.
[The guide](guide.md) says what they are for.
"""
INTRODUCTIONS = {
    "What a host calls": """\
`plugin.dispense(...)` gives a *proxy*, which has the plugin's public methods. Of a method `m` of a proxy, and of a
function that was lent:

- `m(*args, **kwargs)` waits for the result, and raises what the method raised.
- `m.submit(*args, **kwargs)` does not wait: it gives a `Call`. That of a streaming method resolves to the `Stream`.
- `m.notify(*args, **kwargs)` wants no answer. It returns None once that is sent.
- `m.timeout(seconds)` is `m` with that deadline, to be called in any of the three ways. None is no deadline.
""",
    "Errors": """\
Each is a `PluginError`, and what stands in brackets as well. The attributes that a docstring names are there on every instance.
""",
}


def text_of(obj: Any) -> str:
    """A docstring as Markdown."""
    text = re.sub(r"``(.+?)``", r"`\1`", inspect.getdoc(obj) or "")
    return re.sub(r"::$", ":", text, flags=re.MULTILINE) + "\n"


def default_of(value: Any) -> str:
    if isinstance(value, miniplug.Handshake):
        return "Handshake()"
    if type(value) is int and value >= 1 << 20 and value % (1 << 20) == 0:
        return f"{value >> 20} << 20"
    return repr(value)


def call_of(name: str, function: Any) -> str:
    """How it is called: names and defaults. What types they have, the docstring says."""
    kinds, parts, starred = inspect.Parameter, [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is kinds.KEYWORD_ONLY and not starred:
            parts.append("*")
        starred = starred or parameter.kind in (kinds.KEYWORD_ONLY, kinds.VAR_POSITIONAL)
        before = {kinds.VAR_POSITIONAL: "*", kinds.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        after = "" if parameter.default is kinds.empty else f"={default_of(parameter.default)}"
        parts.append(before + parameter.name + after)
    line = f"{name}({', '.join(parts)})"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(parts) + ",\n)"


def members_of(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that miniplug itself gives a class and that have a docstring."""
    seen = set()
    for base in cls.__mro__:
        for name, member in vars(base).items() if base.__module__ == miniplug.__name__ else ():
            known = isinstance(member, (property, staticmethod, classmethod)) or inspect.isfunction(member)
            if known and not name.startswith("_") and name not in seen and inspect.getdoc(member):
                seen.add(name)
                yield name, member


def entry(name: str) -> Iterator[str]:
    """The paragraphs about a public name."""
    obj = getattr(miniplug, name)
    is_class = inspect.isclass(obj)
    yield f"### {name}\n"
    if is_class and issubclass(obj, Exception) and obj is not miniplug.PluginError:
        bases = [each for base in obj.__bases__ for each in (base.__bases__ if base.__name__[0] == "_" else (base,))]
        own = [f"[{base.__name__}](#{base.__name__.lower()})" for base in bases if base.__module__ == miniplug.__name__]
        others = dict.fromkeys(f"\\[{base.__name__}]" for base in bases if base.__module__ != miniplug.__name__)
        yield ", ".join([*own, *others]) + "\n"  # before 3.11 a timeout is one of asyncio's, too, by the same name
    if name == "Plugin":
        yield "```text\nPlugin(command, **options)\n```\n"  # those of launch
    elif not is_class or name in MADE_BY_USERS:
        yield f"```text\n{call_of(name, obj)}\n```\n"
    yield text_of(obj)
    for member_name, member in members_of(obj) if is_class else ():
        if isinstance(member, property):
            yield f"#### {name}.{member_name}\n"
        else:
            before = "await " if inspect.iscoroutinefunction(member) else ""
            yield f"#### {before}{call_of(f'{name}.{member_name}', getattr(obj, member_name))}\n"
        yield text_of(member)


def reference() -> str:
    """The whole page. Raises ValueError if its groups and ``miniplug.__all__`` differ."""
    grouped = [name for names in GROUPS.values() for name in names]
    if sorted([*grouped, "__version__"]) != sorted(miniplug.__all__):
        raise ValueError(f"in one of GROUPS and __all__ alone: {set(grouped) ^ set(miniplug.__all__) - {'__version__'}}")
    contents = [f"- {group}: " + ", ".join(f"[{name}](#{name.lower()})" for name in names)
                for group, names in GROUPS.items()]
    parts = [HEAD, "\n".join(contents) + "\n"]
    for group, names in GROUPS.items():
        parts += [f"## {group}\n", *filter(None, [INTRODUCTIONS.get(group)])]
        for name in names:
            parts += entry(name)
    return "\n".join(parts)


if __name__ == "__main__":
    with open(PAGE, "w", encoding="utf-8", newline="\n") as file:
        file.write(reference())
