# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the miniplug authors
"""miniplug: plugins that run as subprocesses and are called like local objects.

One file, standard library only, Python 3.8 and up. Vendor it or install it.

A plugin that never heard of miniplug::

    # greeter.py
    class GreeterHello:
        def greet(self, name):
            return f"Hello, {name}!"

and its host::

    import miniplug

    if __name__ == "__main__":
        with miniplug.launch("greeter.py:GreeterHello") as plugin:
            greeter = plugin.dispense()
            print(greeter.greet("world"))

What `dispense` gives is a proxy, with the plugin's public methods. Each can be called in four ways::

    m(...)             waits for the result, and raises what the method raised
    m.submit(...)      gives a Call: a concurrent.futures.Future that asyncio can await too
    m.notify(...)      wants no answer
    m.timeout(5)(...)  waits at most 5 seconds; m.timeout(5).submit(...) and .notify(...) likewise

The plugin runs in a process of its own. Whatever it does there (raise, leak, call ``os._exit``, die of a
segmentation fault) is an exception in the host, with the exit code and the last lines it wrote; and when the host
ends, however it ends, the plugin ends too, with all it started. What it prints and logs goes to the host's
``logging``. The two talk over a private socket (a named pipe on Windows) with a fresh key for every launch, in JSON
that keeps Python's types. Nothing that arrives is ever run as code. A program can serve plugins by itself, too::

    if __name__ == "__main__":
        miniplug.serve({"greeter": GreeterHello()})

The map of this file; each section uses only those above it:

     1  errors        what can go wrong, by name
     2  codec         values to bytes and back
     3  channel       whole frames over a socket or a named pipe
     4  handshake     who are you, which version, do you hold the key
     5  session       calls and answers, both ways, over one channel
     6  dispatcher    names to methods
     7  proxies       what the user of a plugin holds
     8  serve         the plugin's main loop, its output and its logging
     9  process       start, watch, limit and end a process tree, per platform
    10  plugin        launch, and what becomes of it
    11  discovery     what there is to launch
    12  command line  python -m miniplug serve ...
"""

from __future__ import annotations

import sys

_AS_PROGRAM = __name__ == "__main__"
if _AS_PROGRAM:
    __name__ = "miniplug"

import binascii
import builtins
import io
import itertools
import json
import json.encoder
import os
import re
import socket
import struct
import threading
import time
from collections import deque, namedtuple
from contextvars import ContextVar
from functools import lru_cache, partial, reduce

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself is slow to import
    import logging
    import multiprocessing
    from pathlib import Path
    from types import ModuleType
    from typing import IO, Any, Callable, Iterable, Mapping, NamedTuple, NoReturn, Sequence, TextIO, TypeVar, Union, overload

    from typing_extensions import ParamSpec  # which type checkers have for every Python

    _T = TypeVar("_T")
    _F = TypeVar("_F", bound=Callable[..., Any])
    _P = ParamSpec("_P")
    _Path = Union[str, "os.PathLike[str]"]
    _Command = Union[_Path, Sequence[_Path]]
    _Sink = Callable[[str], Any]  # what takes lines of output
    _Output = Union[str, _Sink, TextIO]
    _Bytes = Union[bytes, bytearray, memoryview]
    _Message = tuple[Any, ...]  # kind, flags, number, parent, body, buffers
    _Content = tuple[bytes, Sequence[_Bytes], int, Sequence[int]]  # a value as bytes, those beside it, tagged?, what it lends

__version__ = "0.1.0"

__all__ = ["AuthenticationError", "Call", "CallTimeout", "ChecksumError", "DeadReference", "Handshake", "HandshakeError",
           "InterfaceMismatch", "LaunchError", "Limits", "MessageTooLarge", "MethodInfo", "MethodNotFound", "NotSerializable",
           "Plugin", "PluginClosed", "PluginCrashed", "PluginError", "PluginNotFound", "ProtocolError", "RemoteError", "Stream",
           "__version__", "attach", "cancelled", "discover", "discover_entry_points", "freeze_support", "launch", "local", "ref",
           "register", "release", "serve"]

_WINDOWS = os.name == "nt"
_posix: Any = os  # for what Windows lacks, which type checkers know
try:
    _FILE = os.path.abspath(__file__)
except OSError:  # the current folder is gone
    _FILE = __file__
_network: Any = socket


# === 1. errors ==========================================================================================

class _Brief(type):
    """help() and Tab tell what a class of ours adds, not all that it inherits."""

    def __dir__(cls) -> list[str]:
        ours = [vars(base) for base in cls.__mro__ if base.__module__ == __name__]
        return sorted({name for names in ours for name in names if not name.startswith("_")})


class PluginError(Exception, metaclass=_Brief):
    """The base of every error of miniplug's. What an error carries beside its text are attributes of it."""

    def __init__(self, message: str = "", **carried: Any) -> None:
        super().__init__(message)
        for name, value in carried.items():
            setattr(self, name, value)


class LaunchError(PluginError, OSError):
    """The plugin never came up. `command`: what was run. `exit_code`: how it ended, negative for a signal, or
    None. `output`: the last lines it wrote to stderr, or else to stdout."""

    command: list[str] | None = None
    exit_code: int | None = None
    output: Sequence[str] = ()


class HandshakeError(LaunchError):
    """The program is no plugin, or not one for this host. `host`, `plugin`: dicts of what each side has."""

    host: Mapping[str, Any] = {}
    plugin: Mapping[str, Any] = {}


class ChecksumError(LaunchError):
    """The file `path` is not the one expected; nothing was run. `expected`, `actual`: SHA-256, hex digits."""

    path: str = ""
    expected: str = ""
    actual: str = ""


class PluginCrashed(PluginError, ConnectionError):
    """The plugin died in use. `exit_code`: negative for a signal, or None. `signal_name`: such as
    ``"SIGSEGV"``, or None. `output`: the last lines of its stderr. `calls`: the methods being called."""

    exit_code: int | None = None
    signal_name: str | None = None
    output: Sequence[str] = ()
    calls: Sequence[str] = ()


class ProtocolError(PluginCrashed):
    """The other side sent what the protocol does not allow, and was ended for it."""


class PluginClosed(PluginError, RuntimeError):
    """A call after ``close()``, or one that ``close()`` cut off."""


class PluginNotFound(PluginError, LookupError):
    """No plugin of that name is served, or none was named and there are several. `names`: those there are."""

    names: Sequence[str] = ()


class DeadReference(PluginError, ReferenceError):
    """A call on a reference whose owner is gone or has released it."""


class InterfaceMismatch(PluginError, TypeError):
    """What is served is not the interface. `differences`: every missing or differing method, as text."""

    differences: Sequence[str] = ()


class MethodNotFound(PluginError, AttributeError):
    """The plugin has no such public method. `name`: what was asked for. `matches`: names that come close."""

    name: str = ""
    matches: Sequence[str] = ()


class NotSerializable(PluginError, TypeError):
    """A value cannot travel. `path`: where in the arguments or the result it sits. `type_name`: its type."""

    path: str = ""
    type_name: str = ""


class MessageTooLarge(PluginError, ValueError):
    """A message is over ``max_message``. `size`, `limit`: in bytes."""

    size: int = 0
    limit: int = 0


class RemoteError(PluginError):
    """A method raised. `type_name`: the exception's type. `message`: its text; this error's own begins with
    the type. `remote_traceback`: the plugin's own, as text. A builtin or registered exception is of its own
    type too: ``except ValueError`` and ``except RemoteError`` both catch a plugin's ValueError."""

    type_name: str = ""
    message: str = ""
    remote_traceback: str = ""
    _body: Any = None  # what it was made from

    def __reduce__(self) -> Any:
        return _reduce_error(self)


class _RemoteTraceback(Exception):
    """The cause of a RemoteError: what prints the plugin's own traceback above the host's."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _Unauthenticated(LaunchError):
    """The other side does not hold the key."""


class _Overdue(PluginError, TimeoutError):
    """The deadline passed. `method`: what was called. `seconds`: how long it was given."""

    method: str = ""
    seconds: float = 0.0


if TYPE_CHECKING:
    class AuthenticationError(_Unauthenticated, multiprocessing.AuthenticationError): ...
    class CallTimeout(_Overdue): ...


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _on_first_use(name: str) -> Any:
    """What has bases that are slow to import is made when it is first asked for, here and by users."""
    if name in globals():
        return globals()[name]
    if name == "AuthenticationError":
        bases = [_Unauthenticated, _import("multiprocessing").AuthenticationError]
    elif name == "CallTimeout":
        bases = [_Overdue]
        if sys.version_info < (3, 11):  # where asyncio and concurrent.futures have timeouts of their own
            bases += [_import("asyncio").TimeoutError, _import("concurrent.futures").TimeoutError]
    elif name == "Call":
        bases = [_Awaitable, _import("concurrent.futures").Future]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = _Brief(name, tuple(bases), {"__module__": __name__, "__doc__": bases[0].__doc__})
    return globals().setdefault(name, made)  # one class, however many threads ask at once


if not TYPE_CHECKING:  # or checkers would take any name for one of ours
    __getattr__ = _on_first_use


def _import(name: str) -> Any:
    __import__(name)
    return sys.modules[name]


def _is_ctrl_c(error: BaseException) -> bool:
    """Whether this is for the program, and not just something that was raised."""
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and issubclass(type(error), KeyboardInterrupt)


def _start_thread(name: str, target: Callable[..., Any], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    thread.start()
    return thread


def _aside(name: str, function: Callable[..., Any], *args: Any) -> None:
    """Call a function in a thread of its own, or here if there is none to be had."""
    try:
        _start_thread(name, function, *args)
    except RuntimeError:
        function(*args)


# === 2. codec ===========================================================================================
#
# JSON that keeps Python's types, read and written by the json module's parts in C. What JSON has goes as it
# is. What it has not is tagged: an object with one key, which begins with "$". docs/protocol.md lists the
# tags, _TAGS says what travels, and register() adds to it. Before the encoder runs, `fit` looks, at C speed,
# for what that would change without a word, and copies with tags only there; what the encoder does not know
# it asks its hook for (`tag`).

_SAFE_INTEGER = 2**53 - 1  # what every JSON reader keeps exactly: RFC 8259, section 6
_MAX_BITS = 1 << 15  # of an integer: to print, compare or convert one takes a millisecond or two at most
_MAX_DIGITS = 10000  # of a Decimal, and how far its exponent goes either way
_MAX_ALIKE = 16  # values of a set, or keys, that may have one hash: each is compared with each
_MAX_COMBINATIONS = 1 << 14  # of an enum's flags: Python keeps each for ever
_MANY = 32  # items of a list that goes in a shorter form, where the other side knows that
_INLINE = 2048  # bytes up to this many go in base64, longer ones in a frame beside the message
_MAX_BUFFERS = 1 << 16  # that go beside one message; what is over goes in base64 again
_FINE = frozenset((str, bool, type(None), float))  # the encoder changes none; it trips over NaN, surrogates
_CONSTANTS = frozenset((bool, type(None)))
_ATOMS = _FINE | {int}
_TEXTS = frozenset((str,))
_BASES = (str, int, float, list, tuple, dict)  # the encoder takes instances of their subclasses for theirs
_HEAP = 1 << 9  # the flag of a class that a class statement made
_flatten = itertools.chain.from_iterable


class _Undecodable(Exception):
    """What arrived is well-formed, and yet its value cannot be made here, for the reason that is its
    argument. That fails one call, not the session."""


@lru_cache(None)
def _found(path: Any) -> Any:
    """What a path such as "datetime.date.fromisoformat" names; its module is imported only now."""
    if type(path) is not str:
        return path
    module, *names = path.split(".")
    return reduce(getattr, names, _import(module))


def _call(path: str, *arguments: Any) -> Any:
    return _found(path)(*arguments)


def _cut(text: str) -> str:
    return text if len(text) <= 1000 else text[:1000] + "..."


def _shown(value: Any) -> str:
    try:
        return _cut(repr(value))
    except Exception:  # a __repr__ that fails
        return "'?'"


def _base64(data: _Bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode()


def _flat(view: memoryview) -> _Bytes:
    """Its bytes, not copied if they lie in a row."""
    try:
        return view.cast("B") if view.c_contiguous else view.tobytes()
    except TypeError:  # an empty one, or an unusual format
        return view.tobytes()


def _bounded(value: int) -> int:
    if value.bit_length() > _MAX_BITS:
        raise NotSerializable(f"integers of more than {_MAX_BITS} bits do not travel: send bytes, or hex()")
    return value


def _told_apart(values: list[Any]) -> list[Any]:
    """The values for a set, or the keys. To tell many with the same hash apart would take quadratic time."""
    if len(values) > _MAX_ALIKE and len(values) - len(set(map(hash, values))) >= _MAX_ALIKE:
        if max(_call("collections.Counter", map(hash, values)).values()) > _MAX_ALIKE:
            raise NotSerializable(f"more than {_MAX_ALIKE} of its values have the same hash")
    return values


def _make_dict(state: list[Any]) -> dict[Any, Any]:
    if len(state) % 2:
        raise ValueError("a dict is keys and values by turns")
    return dict(zip(_told_apart(state[::2]), state[1::2]))


def _make_numbers(state: list[Any]) -> list[Any]:
    code, data = state
    if code not in ("q", "d") or type(data) is not bytes:
        raise ValueError('numbers are "q" or "d", and bytes')
    return [*struct.unpack(f"<{len(data) // 8}{code}", data)]


def _make_each(state: list[Any]) -> list[Any]:
    tag, states = state
    if tag not in _EACH or type(states) is not list:
        raise ValueError("no tag that each may have, and states")
    makes, kinds = _makes_of(tag), set(map(type, states))
    if len(kinds) == 1:
        return [*map(makes[kinds.pop()], states)]
    return [makes[type(held)](held) for held in states]


def _make_array(state: list[Any]) -> Any:
    code, size, order, data = state
    if type(data) is not bytes or order not in ("little", "big"):
        raise ValueError("an array is a letter, the size of an item, the byte order, and bytes")
    if code not in _import("array").typecodes or _call("array.array", code).itemsize != size:
        raise NotSerializable(f"an array of {code!r} with items of {size} bytes is not to be had here")
    array = _call("array.array", code, data)
    if order != sys.byteorder:
        array.byteswap()
    return array


def _moment(value: Any) -> str | list[Any]:
    """A datetime or time as one text, if that says all; else what it reads without
    its zone, its fold, and its zone."""
    zone = value.tzinfo
    told = zone is None or (_way_of(type(zone)).tag == "$timezone" and len(zone.__getinitargs__()) == 1)
    if told and not value.fold:
        return str(value.isoformat())
    return [value.replace(tzinfo=None).isoformat(), value.fold, zone]


def _make_moment(name: str, state: list[Any]) -> Any:
    text, fold, zone = state
    return _call(f"datetime.{name}.fromisoformat", text).replace(fold=fold, tzinfo=zone)


def _make_zone(key: str) -> Any:
    try:
        return _call("zoneinfo.ZoneInfo", key)
    except (ImportError, LookupError, OSError) as error:  # Python 3.8, or no tzdata
        raise NotSerializable(f"the time zone {_shown(key)} is not to be had here: {_shown(error)}") from None


def _decimal(value: Any) -> str:
    text = str(value)
    if len(text) > _MAX_DIGITS or not -_MAX_DIGITS <= value.adjusted() <= _MAX_DIGITS:
        raise NotSerializable(f"decimals of more than {_MAX_DIGITS} digits, or exponents, do not travel")
    return text


def _make_decimal(text: str) -> Any:
    value = _call("decimal.Decimal", text)
    if len(text) > _INLINE or "E" in text or "e" in text:
        _decimal(value)
    return value


def _make_fraction(state: list[Any]) -> Any:
    """In lowest terms as it was sent: to reduce it would take longer than to read it."""
    numerator, denominator = state
    if type(numerator) is not int or type(denominator) is not int or denominator < 1:
        raise ValueError("a fraction is two integers")
    fraction = object.__new__(_found("fractions.Fraction"))
    fraction._numerator, fraction._denominator = numerator, denominator
    return fraction


def _make_registered(state: list[Any]) -> Any:
    name, held = state
    if type(name) is not str:
        raise ValueError("a registered type goes by its name")
    if name not in _registered:
        raise NotSerializable(f"a value of the type {_shown(name)} has come, which is not registered here: "
                              "both sides have to call miniplug.register for it")
    try:
        return _registered[name][1](held)
    except BaseException as error:
        if _is_ctrl_c(error):
            raise
        why = f"a value of the registered type {name!r} cannot be made from what came: {_shown(error)}"
        raise NotSerializable(why) from error


def _bounds(value: Any) -> list[Any]:
    return [value.start, value.stop, value.step]


# By the tag: the type; what gives its state, to be packed in turn; and by the type of that on the wire, the
# way back. Names are looked up on first use. A file path of the other platform arrives as a pure one: a
# WindowsPath cannot exist on POSIX, nor the reverse.
_Row = namedtuple("_Row", "type state make")
_TAGS = {tag: _Row(*row) for tag, row in {
    "$int": ("", None, {str: lambda text: _bounded(int(text, 16))}),
    "$float": ("", None, {str: float}),
    "$str": ("", None, {str: lambda text: binascii.a2b_base64(text).decode("utf-8", "surrogatepass")}),
    "$tuple": ("", None, {list: tuple}),
    "$dict": ("", None, {list: _make_dict}),
    "$numbers": ("", None, {list: _make_numbers}),
    "$each": ("", None, {list: _make_each}),
    "$bytes": ("builtins.bytes", bytes, {str: binascii.a2b_base64}),
    "$bytearray": ("builtins.bytearray", memoryview,  # a view, so that nobody resizes what is being sent
                   {str: lambda text: bytearray(binascii.a2b_base64(text))}),
    "$set": ("builtins.set", lambda held: _told_apart([*held]), {list: lambda held: set(_told_apart(held))}),
    "$frozenset": ("builtins.frozenset", lambda held: _told_apart([*held]),
                   {list: lambda held: frozenset(_told_apart(held))}),
    "$complex": ("builtins.complex", lambda z: [z.real, z.imag], {list: lambda state: complex(*state)}),
    "$ellipsis": ("builtins.ellipsis", lambda _: [], {list: lambda _: ...}),
    "$range": ("builtins.range", _bounds, {list: lambda state: range(*state)}),
    "$slice": ("builtins.slice", _bounds, {list: lambda state: slice(*state)}),
    "$array": ("array.array", lambda a: [a.typecode, a.itemsize, sys.byteorder, memoryview(a)],
               {list: _make_array}),
    "$date": ("datetime.date", "datetime.date.isoformat", {str: "datetime.date.fromisoformat"}),
    "$datetime": ("datetime.datetime", _moment,
                  {str: "datetime.datetime.fromisoformat", list: partial(_make_moment, "datetime")}),
    "$time": ("datetime.time", _moment,
              {str: "datetime.time.fromisoformat", list: partial(_make_moment, "time")}),
    "$timedelta": ("datetime.timedelta", lambda d: [d.days, d.seconds, d.microseconds],
                   {list: lambda state: _call("datetime.timedelta", *state)}),
    "$timezone": ("datetime.timezone", lambda zone: [*zone.__getinitargs__()],
                  {list: lambda state: _call("datetime.timezone", *state)}),
    "$zone": ("zoneinfo.ZoneInfo", lambda zone: zone.__reduce__()[1][0], {str: _make_zone}),
    "$decimal": ("decimal.Decimal", _decimal, {str: _make_decimal}),
    "$fraction": ("fractions.Fraction", lambda f: [f.numerator, f.denominator], {list: _make_fraction}),
    "$uuid": ("uuid.UUID", lambda value: f"{value.int:032x}", {str: "uuid.UUID"}),
    "$posixpath": ("pathlib.PosixPath", str, {str: f"pathlib.{'Pure' if _WINDOWS else ''}PosixPath"}),
    "$windowspath": ("pathlib.WindowsPath", str, {str: f"pathlib.{'' if _WINDOWS else 'Pure'}WindowsPath"}),
    "$pureposixpath": ("pathlib.PurePosixPath", str, {str: "pathlib.PurePosixPath"}),
    "$purewindowspath": ("pathlib.PureWindowsPath", str, {str: "pathlib.PureWindowsPath"}),
    "$type": ("", None, {list: _make_registered}),  # each registered type has its own state
}.items()}
_OF_TYPE = {row.type: tag for tag, row in _TAGS.items()}
_EACH = frozenset((  # what "$each" may hold: nothing that is much longer than its state
    "$tuple", "$dict", "$bytes", "$date", "$datetime", "$time", "$timedelta", "$decimal", "$uuid", "$type"))
_Way = namedtuple("_Way", "tag state")
_NO_WAY = _Way("", None)
_WAYS: dict[type, Any] = {memoryview: _Way("$bytes", _flat)}  # by the type: its tag, and what gives its state
_ASKED: set[type] = {memoryview}  # those for which the encoder asks its hook
_MAKES: dict[str, dict[type, Callable[[Any], Any]]] = {}  # what makes a value, by its tag and state's type


def _way_of(kind: type) -> Any:
    """The _Way of a type, or _NO_WAY. (That is not kept: the type may be registered later.)"""
    tag = _OF_TYPE.get(f"{kind.__module__}.".partition(".")[0] + "." + kind.__qualname__)
    if kind in _WAYS or tag is None or (kind is not type(...) and _found(_TAGS[tag].type) is not kind):
        return _WAYS.get(kind, _NO_WAY)
    return _set_way(kind, _Way(tag, _found(_TAGS[tag].state)))


def _set_way(kind: type, way: Any) -> Any:
    _WAYS[kind] = way
    if not issubclass(kind, _BASES):
        _ASKED.add(kind)
    return way


def _makes_of(tag: str) -> dict[type, Callable[[Any], Any]]:
    """What makes the values of a tag, by the type of its state."""
    if tag not in _MAKES:
        _MAKES[tag] = {kind: _found(make) for kind, make in _TAGS[tag].make.items()}
    return _MAKES[tag]


# -- registered types

_registered: dict[str, tuple[type, Callable[[Any], Any]]] = {}  # by name on the wire: class, what makes one


if TYPE_CHECKING:  # a decorated class keeps its type
    @overload
    def register(cls: type[_T], *, name: str | None = None, encode: Callable[[Any], Any] | None = None,
                 decode: Callable[[Any], Any] | None = None) -> type[_T]: ...
    @overload
    def register(cls: None = None, *, name: str | None = None, encode: Callable[[Any], Any] | None = None,
                 decode: Callable[[Any], Any] | None = None) -> Callable[[type[_T]], type[_T]]: ...


def register(cls: Any = None, *, name: str | None = None, encode: Callable[[Any], Any] | None = None,
             decode: Callable[[Any], Any] | None = None) -> Any:
    """Let instances of `cls` travel by value. Both sides call it, usually in a module that they share.
    Returns `cls`, or without one a decorator: ``@register``, ``@register(name="user")``.

    - `cls` (a class): dataclasses, enums, named tuples and exceptions know their own state, and come back
      without a call of ``__init__`` or ``__post_init__``. Any other class needs `encode` and `decode`.
      Subclasses are not meant.
    - `name` (str, default ``module.qualname``): what the wire calls it, the same on both sides.
    - `encode` (default None): a function from an instance to whatever can travel itself. `decode`: the way
      back; it gets what the other side sent, so what it does not expect it should refuse by raising. Both or
      neither. With ``encode=miniplug.ref`` instances are lent: `decode` gets a proxy.

    To register a class again is harmless, and the last word on how it is sent. A class of the same module and
    qualified name takes the former's place, as after ``importlib.reload``.

    Raises TypeError for what is no class, or has no state that is known here; ValueError for a name that
    another class has, a class in ``__main__`` without `name`, and a type that travels anyway.
    """
    if cls is None:
        return lambda decorated: register(decorated, name=name, encode=encode, decode=decode)
    if not isinstance(cls, type):
        raise TypeError(f"register takes a class, not {cls!r}")
    if name is None and cls.__module__ == "__main__":
        raise ValueError(
            f"{cls.__qualname__} is in __main__, which on the other side is another module: give name=")
    if (encode is None) != (decode is None):
        raise TypeError("encode and decode go together")
    if cls in _ATOMS or cls in _BASES or _way_of(cls).tag not in ("", "$type"):
        raise ValueError(f"{cls.__qualname__} travels by itself")
    name = name or f"{cls.__module__}.{cls.__qualname__}"
    former = _registered.get(name, (cls,))[0]
    if (former.__module__, former.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"the name {name!r} is that of {former!r} already")
    state, make = (encode, decode) if encode and decode else _own_state(cls)
    _registered[name] = (cls, make)
    _WAYS.pop(former, None)
    _ASKED.discard(former)
    _set_way(cls, _Way("$type", lambda value: [name, state(value)]))
    return cls


def _own_state(cls: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """What gives the state of a class's instances, and makes one of it. Raises TypeError if it is not
    known."""
    if issubclass(cls, _found("enum.Enum")):
        # a member goes by its name; a combination of flags, which need not have one, by its number
        return (lambda member: member._name_ if member._name_ in cls.__members__ else member._value_,
                partial(_make_member, cls))
    fields: Any = None
    if issubclass(cls, BaseException):
        fields = []
    elif issubclass(cls, tuple):
        fields = getattr(cls, "_fields", None)
    elif hasattr(cls, "__dataclass_fields__") and all(base.__flags__ & _HEAP for base in cls.__mro__[:-1]):
        fields = [field.name for field in _call("dataclasses.fields", cls)]  # and it is none of dict
    slots = {slot for base in cls.__mro__ for slot in vars(base).get("__slots__", ())}
    if fields is None or not slots <= {*fields, "__dict__", "__weakref__"}:
        raise TypeError(f"how to take {cls.__qualname__} apart is not known: give encode and decode")
    if issubclass(cls, BaseException):
        return _error_state, partial(_make_error, cls)
    return partial(_record_state, fields), partial(_make_record, cls, fields)


def _make_member(cls: Any, state: Any) -> Any:
    if type(state) is str:
        return cls[state]
    if type(state) is not int or not issubclass(cls, _found("enum.Flag")):
        raise ValueError("a member of an enum goes by its name")
    if state not in cls._value2member_map_ and len(cls._value2member_map_) >= _MAX_COMBINATIONS:
        raise ValueError(f"there are {_MAX_COMBINATIONS} combinations of its flags already")
    member = cls(state)
    if member._value_ != state:  # the enum, or this Python, leaves out what it has no name for
        raise ValueError(f"it has no flags for {state}")
    return member


def _record_state(fields: Sequence[str], value: Any) -> dict[str, Any]:
    """The fields of a dataclass or named tuple, if they are all that it holds."""
    others = {*getattr(value, "__dict__", ())}.difference(fields)
    if others:
        raise NotSerializable(f"its attribute {min(others)!r} is no field: register it with encode, decode")
    return dict(zip(fields, value if isinstance(value, tuple) else [getattr(value, name) for name in fields]))


def _make_record(cls: Any, fields: Sequence[str], state: Any) -> Any:
    if type(state) is not dict or state.keys() != set(fields):
        raise ValueError(f"its fields are {[*fields]}")
    if issubclass(cls, tuple):
        return tuple.__new__(cls, [state[name] for name in fields])
    value = object.__new__(cls)
    for name in fields:
        object.__setattr__(value, name, state[name])  # it may be frozen
    return value


# -- encoding

def _is_text(value: str) -> bool:
    try:
        value.encode()
        return True
    except UnicodeEncodeError:  # a lone surrogate
        return False


def _are_fine(values: Sequence[Any]) -> bool:
    """Whether they are atoms of which the encoder changes none; at C speed."""
    kinds = set(map(type, values))
    if int not in kinds:
        return kinds <= _FINE
    if not kinds <= _ATOMS:
        return False
    integers = [value for value in values if type(value) is int]
    return min(integers) >= -_SAFE_INTEGER and max(integers) <= _SAFE_INTEGER


_FRAGILE = sys.version_info < (3, 9)  # where what trips over the end of the stack may end the process


def _check_stack() -> None:
    try:
        sys._getframe(sys.getrecursionlimit() - 80)
    except ValueError:
        return
    raise RecursionError("nested too deeply")


class _Packer:
    """One value on its way out, of one thread. `fit` gives what the encoder is to write for it, `tag` is the
    encoder's hook. `careful`: the encoder has tripped over it, as it does over NaN and lone surrogates."""

    __slots__ = ("_arrays", "_fine", "_lend", "buffers", "lent", "tagged")

    def __init__(self, codec: _Codec, lent: list[int], careful: bool = False) -> None:
        self.buffers: list[_Bytes] = []  # that go beside the message
        self.lent = lent  # the numbers of what was lent
        self.tagged = 0
        self._fine = _CONSTANTS if careful else _FINE  # what goes as it is
        self._arrays = codec.arrays
        self._lend = codec.lend

    def tag(self, value: Any) -> dict[str, Any]:
        """What JSON does not have, with its tag. Raises NotSerializable, and whatever an `encode` raises."""
        self.tagged = 1
        kind = type(value)
        if kind is bytes and len(value) <= _INLINE:
            return {"$bytes": binascii.b2a_base64(value, newline=False).decode()}
        way = _WAYS.get(kind) or _way_of(kind)
        if way is _NO_WAY:
            loan = self._lend(value, self.lent)
            if loan is None:
                raise NotSerializable(_advice(kind))
            return dict((loan,))
        tag, state = way[0], way[1](value)
        if type(state) in self._fine:
            return {tag: state}
        if tag != "$bytes" and tag != "$bytearray":
            return {tag: self.fit(state)}
        if len(state) <= _INLINE or len(self.buffers) == _MAX_BUFFERS:
            return {tag: _base64(state)}
        self.buffers.append(state)
        return {tag: len(self.buffers) - 1}

    def fit_call(self, target: int, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return target, method, self._fit_list(args), kwargs and self._fit_dict(kwargs)

    def fit(self, value: Any) -> Any:
        """The value, or where the encoder would change it without a word, a copy with tags."""
        kind, tagged = type(value), None
        if kind is list:
            return self._fit_list(value)
        if kind is dict:
            return self._fit_dict(value)
        if kind is tuple:
            tagged = {"$tuple": self._fit_list(value)}
        elif kind is int:
            if not -_SAFE_INTEGER <= value <= _SAFE_INTEGER:
                tagged = {"$int": hex(_bounded(value))}
        elif kind is float:
            if value - value != 0.0:
                tagged = {"$float": repr(value)}
        elif kind is str:
            if not _is_text(value):
                tagged = {"$str": _base64(value.encode("utf-8", "surrogatepass"))}
        elif issubclass(kind, _BASES):
            return self.tag(value)
        if tagged is None:
            return value  # as it is, or the encoder asks for it
        self.tagged = 1
        return tagged

    def _fit_list(self, values: Sequence[Any]) -> Any:
        """The same of a list, or of a tuple's items."""
        if len(values) >= _MANY:
            fitted = self._fit_many(values)
            if fitted is not None:
                return fitted
        return values if self._fine.issuperset(map(type, values)) else self._fit_each(values)

    def _fit_each(self, values: Any) -> Any:
        if _FRAGILE:
            _check_stack()
        fine, copy = self._fine, None
        for index, part in enumerate(values):
            kind = type(part)
            if kind in fine or (kind is int and -_SAFE_INTEGER <= part <= _SAFE_INTEGER) or kind in _ASKED:
                continue
            fitted = self.fit(part)
            if fitted is not part:
                copy = [*values] if copy is None else copy
                copy[index] = fitted
        return values if copy is None else copy

    def _fit_many(self, values: Sequence[Any]) -> Any:
        """The same of a long list by one look at all that it holds; None if each item has to be looked at."""
        kinds: list[Any] = [*map(type, values)]
        kind = kinds[0]
        alike = kinds.count(kind) == len(kinds)
        if alike and self._arrays and (kind is int or kind is float):
            return self._fit_numbers("q" if kind is int else "d", values)
        if self._fine is not _FINE:
            return None
        if not alike or kind in _ATOMS:
            return values if _are_fine(values) else None
        if kind is tuple:
            return self._fit_rows("$tuple", values)
        if kind is dict and values[0] and str not in map(type, _flatten(values)):
            return self._fit_rows("$dict", [[*_flatten(row.items())] for row in values])
        if kind not in _ASKED:
            return None
        way = _way_of(kind)
        if kind is bytes and self._arrays and max(map(len, values)) <= _INLINE:
            return self._each("$bytes", [*map(_base64, values)])
        if not self._arrays or way.tag not in _EACH or way.tag == "$bytes":
            return values
        return self._each(way.tag, self._fit_list([*map(way.state, values)]))

    def _fit_numbers(self, code: str, values: Sequence[Any]) -> Any:
        try:
            data = struct.pack(f"<{len(values)}{code}", *values)
        except struct.error:  # beyond 64 bits
            return None
        self.tagged = 1
        return {"$numbers": [code, data]}

    def _fit_rows(self, tag: str, rows: Sequence[Any]) -> Any:
        short = max(map(len, rows)) < _MANY
        return self._each(tag, rows) if short and _are_fine([*_flatten(rows)]) else None

    def _each(self, tag: str, states: Any) -> Any:
        """A list whose items all have one tag."""
        self.tagged = 1
        return {"$each": [tag, states]} if self._arrays else [{tag: state} for state in states]

    def _fit_dict(self, value: dict[Any, Any]) -> Any:
        plain = _TEXTS.issuperset(map(type, value)) and (self._fine is _FINE or all(map(_is_text, value)))
        if not plain or (len(value) == 1 and next(iter(value))[:1] == "$"):
            self.tagged = 1
            _told_apart([*value])
            return {"$dict": self._fit_list([*_flatten(value.items())])}
        values = value.values()
        if self._fine.issuperset(map(type, values)):
            return value
        fitted = self._fit_each(values)
        return value if fitted is values else dict(zip(value, fitted))


def _advice(kind: type) -> str:
    """What to do with a value that cannot travel."""
    if hasattr(kind, "__next__") and kind.__module__ != "_io":
        return "send list(...) of it"
    for base in kind.__mro__:
        if base in _BASES or _way_of(base).tag not in ("", "$type"):
            name = base.__name__
            return f"it would lose its type; register it with miniplug.register, or send {name}(...) of it"
    return "register it with miniplug.register, pass miniplug.ref(...) to lend it, or send plain data"


def _parts(value: Any, path: str) -> list[tuple[str, Any]]:
    """What a value is made of: the place of each part, and the part."""
    kind = type(value)
    if kind is dict:
        keys = [(f"a key of {path}", key) for key in value]
        return keys + [(f"{path}[{_shown(key)}]", part) for key, part in value.items()]
    if kind is not list and kind is not tuple:
        way = _way_of(kind)
        value = () if way is _NO_WAY else way.state(value)
        if way.tag == "$type":
            value = value[1]
            if type(value) is dict:
                return [(f"{path}.{name}", part) for name, part in value.items()]
        if type(value) is not list:
            return [(path, value)] if way.tag == "$type" else []
    return [(f"{path}[{index}]", part) for index, part in enumerate(value)]


def _writer(hook: Any) -> Callable[[Any], str]:
    """What writes JSON, and asks `hook` for what JSON does not have."""
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    if make is None:  # not CPython
        return json.JSONEncoder(default=hook, ensure_ascii=False, check_circular=False, allow_nan=False,
                                separators=(",", ":")).encode
    # called directly: json's own setup for every value costs more than its work
    encode = make(None, hook, json.encoder.encode_basestring, None, ":", ",", False, False, False)
    return lambda value: "".join(encode(value, 0))


_encode = _writer(None)


# -- decoding

_LONG_NUMBER = re.compile(f"[0-9]{{{_MAX_DIGITS // 2}}}")  # to read one takes quadratic time


def _refuse(*what: Any) -> NoReturn:
    raise ValueError("this is not data")


def _make_integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _scanner(hook: Any, integers: Any = None) -> Callable[[str, int], tuple[Any, int]]:
    """What reads JSON: gives the value that begins at an index, and where it ends."""
    decoder: Any = json.JSONDecoder(object_hook=hook, parse_int=integers, parse_constant=_refuse)
    return decoder.scan_once  # type: ignore[no-any-return]


_scan = _scanner(None)


class _Unpacker:
    """What the tags of a message stand for, on its way in; or of any number of messages that have no buffers.
    A tag's state must be of a type that _TAGS names: what that holds is not run."""

    def __init__(self, borrow: Callable[[str, Any], Any], buffers: Sequence[_Bytes] = ()) -> None:
        self._borrow = borrow
        self._buffers = dict(enumerate(buffers))  # taken once each: a short message must not fill the memory

    def unmark(self, mapping: dict[str, Any]) -> Any:
        """What an object stands for."""
        if len(mapping) != 1:
            return mapping
        tag, state = mapping.popitem()
        try:
            make = _MAKES[tag][type(state)]
        except KeyError:
            return self._unmark_rare(tag, state)
        return make(state)

    def _unmark_rare(self, tag: str, state: Any) -> Any:
        """The same of what is no tag, or one of the session or this message, or comes for the first time."""
        if tag[:1] != "$":
            return {tag: state}
        if tag == "$ref" or tag == "$own":
            return self._borrow(tag, state)
        if type(state) is int and (tag == "$bytes" or tag == "$bytearray"):
            return (bytes if tag == "$bytes" else bytearray)(self._buffers.pop(state))
        makes = _makes_of(tag)
        if type(state) not in makes:
            raise ValueError(f"{tag} of a {type(state).__name__}")
        return makes[type(state)](state)


# -- the codec

def _is_deep() -> bool:
    """Whether most of this thread's stack is used up."""
    try:
        return bool(sys._getframe(sys.getrecursionlimit() // 2))
    except ValueError:
        return False


def _is_own(error: BaseException) -> bool:
    """Whether this file has raised an exception, or what it calls in C; and not a signal handler in the midst of it."""
    trace: Any = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__") in (__name__, "json.encoder")


class _Codec:
    """Values to bytes and back, for any number of threads. `lend`, `unlend` and `borrow` are what the session
    does with references: `lend` gives the tag and plain state of a value that goes by reference, or None, and
    appends the loan's number to a list, which `unlend` takes back; `borrow` gives the value for a tag and
    state. `arrays`: whether the other side has said that it knows "$numbers" and "$each"."""

    def __init__(self, lend: Callable[[Any, list[int]], tuple[str, Any] | None], unlend: Callable[[Any], Any],
                 borrow: Callable[[str, Any], Any]) -> None:
        self.lend, self.unlend, self.borrow = lend, unlend, borrow
        self.arrays = False
        self._scan = _scanner(_Unpacker(borrow).unmark)

    def dumps(self, value: Any, label: str, lent: list[int] | None = None) -> _Content:
        """The bytes, the buffers beside them, 1 if there are tags, and the numbers of what was lent: the list `lent`, if
        there is one, which knows each of them from the start. Raises NotSerializable, naming the place; `label` names
        the value."""
        lent = [] if lent is None else lent
        try:
            if type(value) in _FINE:
                return _encode(value).encode(), (), 0, lent
            return self._pack(_Packer(self, lent), value)
        except Exception as error:
            return self._pack_carefully(value, label, lent, error)

    def dumps_call(self, target: int, method: str, args: Sequence[Any], kwargs: dict[str, Any],
                   lent: list[int] | None = None) -> _Content:
        """The same of a call."""
        lent = [] if lent is None else lent
        try:
            if not kwargs and _FINE.issuperset(map(type, args)):
                return _encode((target, method, args, kwargs)).encode(), (), 0, lent
            return self._pack(_Packer(self, lent), (target, method, args, kwargs), call=True)
        except Exception as error:
            return self._pack_carefully([target, method, [*args], kwargs], "call", lent, error)

    def _pack(self, packer: _Packer, value: Any, call: bool = False) -> _Content:
        try:
            text = _writer(packer.tag)(packer.fit_call(*value) if call else packer.fit(value))
            return text.encode(), packer.buffers, packer.tagged, packer.lent
        except BaseException:
            self.unlend(packer.lent)
            raise

    def _can_be_packed(self, value: Any) -> bool:
        try:
            self.unlend(self._pack(_Packer(self, [], careful=True), value)[3])
            return True
        except Exception:
            return False

    def _pack_carefully(self, value: Any, label: str, lent: list[int], first: Exception) -> _Content:
        """The same of what the encoder has tripped over, or what cannot be written at all. What a signal handler has
        raised meanwhile goes on to the caller: the value itself can be packed then."""
        try:
            content = self._pack(_Packer(self, lent, careful=True), value)
            if not _is_own(first):
                self.unlend(lent)
                raise first
            return content
        except RecursionError:
            if _is_deep():
                raise
            raise NotSerializable(f"{label} is nested too deeply, or contains itself", path=label) from None
        except Exception as error:
            if error is first or self._can_be_packed(value):
                raise
            path, kind, cause = self._blame(label, value, error)
        why = str(cause)
        if type(cause) is not NotSerializable:
            why = f"its state could not be told: {_shown(cause)}"
        else:
            cause = cause.__cause__
        path = path.replace("call[2]", "args", 1).replace("call[3]", "kwargs", 1)
        name = f"{kind.__module__}.{kind.__qualname__}".replace("builtins.", "", 1)
        raise NotSerializable(f"{path} is of type {name}: {why}", path=path, type_name=name) from cause

    def _blame(self, path: str, value: Any, error: Any) -> tuple[str, type, Any]:
        """Which part of a value cannot travel: its place, its type, and why."""
        try:
            parts = _parts(value, path)
        except Exception:
            parts = []
        for place, part in parts:
            try:
                self.unlend(self._pack(_Packer(self, [], careful=True), part)[3])
            except Exception as reason:
                return self._blame(place, part, reason)
        return path, type(value), error

    def loads(self, body: _Bytes, buffers: Sequence[_Bytes], tagged: int) -> Any:
        """The value. Raises ProtocolError for what is malformed, _Undecodable for what cannot be made
        here."""
        try:
            return self._decode(body, buffers, tagged, self.borrow)
        except ProtocolError:
            raise
        except (DeadReference, MethodNotFound) as error:  # of what comes home
            raise _Undecodable(error) from error
        except Exception as error:
            if isinstance(error, RecursionError) and _is_deep():
                raise  # it is the caller's stack that is full
            failure = error
        try:
            self._decode(body, buffers, tagged, lambda tag, state: None)
        except NotSerializable as error:
            raise _Undecodable(error) from error
        except Exception as error:
            raise ProtocolError(f"a malformed value: {_shown(error)}") from None
        raise failure.__cause__ or failure  # a signal handler's: the value itself is good

    def _decode(self, body: _Bytes, buffers: Sequence[_Bytes], tagged: int, borrow: Callable[[str, Any], Any]) -> Any:
        text = str(body, "utf-8").strip(" \t\r\n")
        long = len(text) > _MAX_DIGITS and any(map(_LONG_NUMBER.match, itertools.repeat(text),
                                                   range(0, len(text), _MAX_DIGITS // 2)))
        scan = self._scan if tagged else _scan
        if buffers or long or borrow is not self.borrow:
            hook = _Unpacker(borrow, buffers).unmark if tagged else None
            scan = _scanner(hook, _make_integer if long else None)
        value, end = scan(text, 0)
        if end != len(text):
            raise ValueError("more than one value")
        return value


# -- exceptions

_MAX_PARTS = 1000  # of an exception group, all together
_MAX_LEVELS = 30  # of groups in groups
_MAX_COLUMN = 10000  # at which a SyntaxError may be: it is printed with a mark below
_TEXT_KEYS = ("type", "message", "traceback", "kind")  # of an error's body
_FIELDS = ("errno", "strerror", "filename", "filename2", "winerror", "name", "path")  # those not in __dict__


def _can_be_raised(kind: type) -> bool:
    """Whether a call may raise this in the host: what ends a loop, a task or a process may not, nor what says
    that the plugin itself is in trouble: another plugin's trouble is not this plugin's."""
    own = issubclass(kind, PluginError) and not issubclass(kind, RemoteError)
    names = {base.__name__ for base in kind.__mro__}
    ends = not names.isdisjoint(("StopIteration", "StopAsyncIteration", "CancelledError"))
    return issubclass(kind, Exception) and not own and not ends


_GROUP: Any = getattr(builtins, "ExceptionGroup", None)  # new in Python 3.11
_BUILTIN_ERRORS: dict[str, type[Exception]] = {
    name: value for name, value in vars(builtins).items()
    if isinstance(value, type) and _can_be_raised(value) and value is not _GROUP}
_OWN_ERRORS: dict[str, type[PluginError]] = {kind.__name__: kind for kind in (
    DeadReference, MessageTooLarge, MethodNotFound, NotSerializable, PluginClosed, PluginNotFound)}


def _encode_error(error: BaseException, own: bool = False, bare: bool = False) -> dict[str, Any]:
    """An exception as the body of an error message. `own`: miniplug's, about the call itself. `bare`: no more
    than its type and as much of its text as goes into any message."""
    if type(error) is _Undecodable:
        error = error.args[0]
    kind, cut = type(error), _cut if bare else str
    try:
        message = cut(str(error))
    except BaseException:  # a __str__ of its own that fails
        message = "(its text could not be made)"
    if own:
        state = {} if bare else _carried(kind, vars(error))
        return {"type": kind.__name__, "message": message, "own": True, "state": state}
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    body: dict[str, Any] = {"type": name, "message": message, "traceback": cut(_format_traceback(error))}
    if isinstance(error, RemoteError) and error._body:  # it goes on, from another process
        body["type"] = cut(str(error.type_name))
        if kind is RemoteError:
            body["message"] = cut(str(error.message))
    if _is_group(error) or _can_be_raised(kind):
        _add_type(body, error, bare)
    return body


def _is_group(error: BaseException) -> bool:
    return _GROUP is not None and isinstance(error, builtins.BaseExceptionGroup)


def _add_type(body: dict[str, Any], error: Any, bare: bool) -> None:
    """Tell an exception's registered or builtin type, and its state."""
    mro = type(error).__mro__
    registered = next((base for base in mro if _WAYS.get(base, _NO_WAY).tag == "$type"), None)
    if registered is not None and not bare and not _is_group(error):  # a group's parts are no data
        body["registered"] = _WAYS[registered].state(error)
    nearest = next((base for base in mro if _BUILTIN_ERRORS.get(base.__name__) is base), Exception)
    if nearest is Exception and not _is_group(error):
        return
    state = {} if bare else _error_state(error)
    body.update(kind=nearest.__name__, args=state.pop("args", [body["message"]]), state={
        key: held for key, held in state.items() if key[0] != "_" or key == "__notes__"})
    if _is_group(error) and not bare:
        parts = [*map(_encode_error, error.exceptions)]
        body.update(kind="ExceptionGroup", args=[error.message], parts=parts)


def _carried(kind: type, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What an error of miniplug's carries by its class, of some attributes, if it is of the right type."""
    carried = {}
    for name in vars(kind).get("__annotations__", ()):
        held: Any = attributes.get(name)
        default = getattr(kind, name)
        if type(held) in (list, tuple):
            fits = default == () and _TEXTS.issuperset(map(type, held))
        else:
            fits = type(held) is type(default) and (type(held) is str or _is_small(held))
        if fits:
            carried[name] = held
    return carried


def _is_small(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _format_traceback(error: BaseException) -> str:
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals is globals():  # miniplug's own
        frames = frames.tb_next
    try:
        return "".join(_call("traceback.format_exception", type(error), error, frames))
    except BaseException as failure:  # such as a __repr__ that calls sys.exit()
        return f"(a traceback that could not be made: {type(failure).__name__})"


def _error_base(cls: type) -> Any:
    """The builtin exception that a class comes from."""
    return next(base for base in cls.__mro__ if vars(builtins).get(base.__name__) is base)


def _error_state(error: Any) -> dict[str, Any]:
    """An exception's arguments and attributes, without those that it has for being a RemoteError."""
    base = _error_base(type(error))
    state = {name: getattr(base, name).__get__(error) for name in _FIELDS if hasattr(base, name)}
    state = {name: held for name, held in state.items() if held is not None}
    state.update(vars(error), args=[*error.args])
    hidden = ("type_name", "remote_traceback", "_body") if isinstance(error, RemoteError) else ()
    return {name: held for name, held in state.items() if name not in hidden}


def _make_error(cls: Any, state: Any) -> Any:
    """An exception from its state, without a call of any __init__ but the builtin base's. Left out is what
    would make it dear or impossible to raise, print or copy."""
    if type(state) is not dict or type(state.get("args")) is not list:
        raise ValueError("the state of an exception is its args and attributes")
    base, args = _error_base(cls), state["args"]
    known = _place_of(args) if issubclass(base, SyntaxError) else args
    error = base.__new__(cls, *known)
    base.__init__(error, *known)
    BaseException.__setattr__(error, "args", tuple(args))
    for name, held in state.items():
        kind = type(held)
        if name in _FIELDS and hasattr(base, name):
            if kind in _FINE or kind is bytes or _is_small(held) or _way_of(kind).tag[-4:] == "path":
                getattr(base, name).__set__(error, held)
        elif name == "__notes__":
            if kind is list and _TEXTS.issuperset(map(type, held)):
                vars(error)[name] = held
        elif name != "args" and type(name) is str and name[:2] != "__" and not callable(getattr(cls, name, 0)):
            vars(error)[name] = held  # where it cannot reach what the interpreter relies on
    return error


def _place_of(args: list[Any]) -> list[Any]:
    """The arguments of a SyntaxError, with no more of its place than can be printed."""
    place: Any = args[1][:4] if len(args) == 2 and type(args[1]) in (list, tuple) else ()
    for held, kind, limit in zip(place, (str, int, int, str), (0, 2**31, _MAX_COLUMN, 0)):
        if held is not None and (type(held) is not kind or (type(held) is int and not 0 <= held <= limit)):
            place = ()
    return [args[0], tuple(place)] if len(place) == 4 else args[:1]


@lru_cache(None)
def _remote_type(kind: Any) -> Any:
    """The type that is an exception's own and RemoteError at once. It can be printed whatever came."""
    def printed(method: Callable[[Any], str]) -> Callable[[Any], str]:
        def text(self: Any) -> str:
            try:
                return "" + method(self)
            except Exception:  # an integer that is too long for it, or an attribute that is not there
                return str(self._body["message"]) if self._body else ""
        return text

    body = {key: getattr(kind, key) for key in ("__module__", "__qualname__", "__doc__")}
    body.update(__str__=printed(kind.__str__), __repr__=printed(kind.__repr__))
    return type(kind.__name__, (kind, RemoteError), {**body, "__reduce__": RemoteError.__reduce__})


def _decode_error(body: Any) -> Any:
    """The exception to raise for the body of an error message, whatever is wrong with that."""
    body = body if type(body) is dict else {}
    body = {**body, **{key: body[key] if type(body.get(key)) is str else "" for key in _TEXT_KEYS}}
    name, message, traceback = body["type"], body["message"], body["traceback"]
    state = body["state"] if type(body.get("state")) is dict else {}
    if body.get("own") and name in _OWN_ERRORS:
        return _OWN_ERRORS[name](message, **_carried(_OWN_ERRORS[name], state))
    error = _raised_error(body, state)
    if error is None:
        told = ": ".join(filter(None, (name.rpartition(".")[2], message)))
        error = RemoteError(told or "the plugin failed and did not say how")
    known = {"type_name": name or "unknown", "message": message, "remote_traceback": traceback, **vars(error)}
    vars(error).update(known, _body=body)  # its own attributes win
    cause = _RemoteTraceback(traceback) if traceback else None
    BaseException.__setattr__(error, "__cause__", cause)  # it may be frozen
    return error


def _raised_error(body: dict[str, Any], state: dict[str, Any]) -> Any:
    """An instance of the registered or builtin exception that a body names, a RemoteError too; or None."""
    kind: Any = None
    try:
        if "parts" in body:
            if _GROUP is not None and _is_printable(body):
                parts = [*map(_decode_error, body["parts"])]
                kind, state = _GROUP, {**state, "args": [body["args"][0], parts]}
        else:
            error = _make_registered(body["registered"])
            kind, state = type(error), _error_state(error)
    except Exception:  # none, or one that is not registered here
        kind, state = _BUILTIN_ERRORS.get(body["kind"]), {**state, "args": body.get("args")}
    try:
        return _make_error(_remote_type(kind), state) if kind is not None and _can_be_raised(kind) else None
    except Exception:  # not what it takes
        return None


def _is_printable(group: dict[str, Any]) -> bool:
    """Whether a group of exceptions has few enough parts in few enough levels."""
    level, count = [group], 0
    for _ in range(_MAX_LEVELS + 1):
        level = [part for held in level if type(held) is dict for part in held.get("parts", ())]
        count += len(level)
        if not level or count > _MAX_PARTS:
            return not level
    return False


_portable = _Codec(lambda value, lent: None, lambda lent: None, _refuse)  # without references


def _reduce_error(error: RemoteError) -> tuple[Any, ...]:
    """What copy and pickle keep of an error: the body that it was made from, as on the wire."""
    texts = {"type": error.type_name, "message": str(error), "traceback": error.remote_traceback}
    if error._body:
        texts = {key: error._body[key] for key in texts}
    try:
        body, buffers, tagged, _ = _portable.dumps(error._body or texts, "")
        return _restore_error, (texts, body, [*map(bytes, buffers)], tagged)
    except NotSerializable:  # there is a reference in it
        return _decode_error, (texts,)


def _restore_error(texts: dict[str, str], *content: Any) -> Any:
    try:
        return _decode_error(_portable.loads(*content))
    except (ProtocolError, _Undecodable):  # a type in it is not registered in this process
        return _decode_error(texts)


# === 3. channel =========================================================================================
#
# Whole messages, a head and the buffers that it announces, over a connection that multiprocessing.connection has
# made, in its framing: a 4-byte big-endian length, or -1 and 8 bytes, and then that much. On POSIX the descriptor is
# read directly: one system call takes as many frames as have come, where Connection needs two for each. On Windows
# a frame is a message of a named pipe.
#
# What a signal handler raises strikes between any two steps. So what is read or written is kept track of by the very
# step that does it (`list.extend(map(recv, ...))` is one step for the interpreter), what belongs together is one
# tuple that is replaced by one store, and each other step may be repeated.
#
# A frame that begins a message has a header:
#
#     offset  size  field
#          0     1  wire version
#          1     1  kind
#          2     2  flags: 1 the body has tags, 2 whoever does not know the kind may ignore it, 4 a stream follows
#          4     4  how many buffers follow, each a frame of its own
#          8     8  the number of the call it is about, counted by the side that made the call
#         16     8  in a call: the number of the receiver's call on whose behalf it is made, or 0

_WIRE_VERSION = 1
_FRAME = struct.Struct("!iBBHIQQ")  # a frame's length, and the header
_HEADER = struct.Struct("!BBHIQQ")
_HEAD = _HEADER.size
_LENGTH, _LONG = struct.Struct("!i"), struct.Struct("!iQ")
_READ_SIZE = 1 << 16
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # SIGPIPE, if the host has it at its default, would end it
_DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0) | _NO_SIGNAL
_FOREVER = 2e6  # seconds, 23 days: a longer wait is more milliseconds than poll() takes
_LOOK_AGAIN = 1.0  # seconds after which who sleeps looks again: a wake-up may be lost when a handler raises
_TOGETHER = 32  # so many messages at most leave with one system call
_MANY_POSTED = 256  # so many messages may be left to the thread that writes, before others wait for it
_POSTED_LIMIT = 1 << 17  # so many that the other side does not take end the connection
_ONCE = ((),)  # for starmap: call it once, without arguments

_get_ident = threading.get_ident
_consume: Callable[[Iterable[Any]], None] = deque(maxlen=0).extend  # run an iterator to its end, in one step
_ref_to: Any = _import("_weakref").ref


class _Broken(Exception):
    """The connection has ended, for the OSError or EOFError that is the argument."""


class _Late(Exception):
    """The deadline has passed."""


def _left(deadline: float | None) -> float:
    """Seconds until a time.monotonic() deadline, not below 0; without one -1, which locks take for "no limit"."""
    return -1 if deadline is None else min(_FOREVER, max(0.0, deadline - time.monotonic()))


def _of_system(error: OSError) -> bool:
    """Whether a system call has failed. A signal handler may raise an OSError, too, in the midst of it: that one comes
    from elsewhere, or was made without an errno."""
    return error.errno is not None and _is_own(error)


class _Seat(dict):  # type: ignore[type-arg]
    """Who reads, or who writes: at most one thread at a time. For any thread; no lock.

    It is taken by one step, `setdefault(0, mine)`, so that nothing strikes between having it and knowing it, and given
    back first of all in a `finally`, without a call: so nothing strikes before that, in Python 3.10 and later. `mine`
    is a weak reference to a set with the thread's ident, which only a local variable of the holder's holds. So
    however the holder's frame is left, the seat is known to be lost once the frame is gone; and a finalizer or a
    handler that comes here in the midst of it is known as well.
    """

    __slots__ = ()
    __missing__ = dict.get  # what nobody holds is None

    def holder(self) -> Any:
        """The holder's thread, in a set; an empty one if the seat is free or lost."""
        mine = self[0]
        return () if mine is None else mine() or ()

    def mend(self) -> None:
        """Free the seat if it is lost. For threads in which no handler strikes."""
        with _mending:
            mine = self[0]
            if mine is not None and mine() is None:
                del self[0]


_mending = threading.Lock()  # held while a lost seat is freed: nobody else frees one that is not his


class _Channel:
    """Whole messages over one connection: what sockets and pipes have in common, which is writing.

    Any thread may write; at most one at a time receives. `writer` is the seat of who writes, and protects `batch`;
    `posted` and `waiters` are for any thread. `stuck` is called before a writer waits for the other side to read, so
    that somebody reads here; `later` when another thread has to go on with what is left.
    """

    skips = 0  # of a frame's length, how many bytes are not to be written

    def __init__(self) -> None:
        self.limit = _HELLO_LIMIT  # bytes of a message
        self.stuck: Callable[[], Any] = lambda: None
        self.later: Callable[[], Any] = lambda: None
        self.gone: Callable[[OSError], Any] = lambda error: None  # told when the descriptor was closed beneath us
        self.posted: deque[list[_Bytes]] = deque()  # messages to be written, in chunks
        self.batch: Any = None  # chunks of those that are being written, and how many bytes each step took of them
        self.writer = _Seat()
        self.waiters: deque[Any] = deque()  # gates of those who wait until less is posted

    def begin(self, limit: int) -> None:
        """From now on receive messages, of at most `limit` bytes. Until then frames are received."""
        self.limit = limit

    def receive(self, deadline: float | None = None) -> deque[_Message] | None:
        """The messages that have come, at least one; who takes one removes it. None past the deadline. Raises _Broken
        at the end of the connection, and ProtocolError."""
        raise NotImplementedError

    def receive_frame(self, deadline: float) -> bytes:
        """The next frame, before messages begin. Raises TimeoutError, EOFError, OSError and ProtocolError."""
        frame = _plainly(self._frame, deadline)
        if frame is None:
            raise TimeoutError("no answer has come in time")
        return frame  # type: ignore[no-any-return]

    def send_frame(self, data: bytes, deadline: float) -> None:
        """Send a short frame, before messages begin. Raises TimeoutError, EOFError and OSError."""
        _plainly(self.write, [(_LENGTH.pack(len(data)) + data)[self.skips :]], (), True, deadline)

    def _frame(self, deadline: float | None, partial: Any = None) -> bytes | None:
        """The next frame; None past the deadline. Raises _Broken and ProtocolError."""
        raise NotImplementedError

    def shutdown(self) -> None:
        """End the connection both ways, and wake whoever reads or writes. For any thread."""
        raise NotImplementedError

    def close(self) -> None:
        """Give the descriptor back. Not while another thread receives."""
        raise NotImplementedError

    def send(self, head: tuple[int, int, int, int], body: bytes, buffers: Sequence[_Bytes], lent: list[int],
             wait: bool, deadline: float | None) -> None:
        """Write a message: (kind, flags, number, parent), body, buffers. See `write`."""
        kind, flags, number, parent = head
        size = len(body) + _HEAD
        if size < _READ_SIZE:  # to copy little is cheaper than to gather
            chunks: list[_Bytes] = [
                _FRAME.pack(size, _WIRE_VERSION, kind, flags, len(buffers), number, parent) + body]
        else:
            header = _HEADER.pack(_WIRE_VERSION, kind, flags, len(buffers), number, parent)
            chunks = [_length(size) + header, body]
        for buffer in buffers:
            chunks += (_length(len(buffer)), buffer)
        self.write(chunks, lent, wait, deadline)

    def write(self, message: list[_Bytes], lent: Sequence[int] = (), wait: bool = True,
              deadline: float | None = None) -> None:
        """Write a message, whole; or leave it to the thread that is writing. An empty one: go on with what is left.
        From the very step on that has it written for sure, `lent` is empty.

        Without `wait` never wait for the other side. Raises _Late past the deadline: then a message that has begun, or
        lends, is sent by others, and any other is not. Raises _Broken.
        """
        writer, posted, token, plain = self.writer, self.posted, {_get_ident()}, not lent
        mine = _ref_to(token)
        try:
            if writer.setdefault(0, mine) is not mine:
                self._post(message, lent)
                if writer.setdefault(0, mine) is not mine:  # that one may have looked before
                    return self._leave_to_other(message, wait, deadline)
            elif self.batch is None and not (posted or lent) and message:
                self.batch = (message, [])
            else:
                self._post(message, lent)
            self._write_all(wait, deadline)
        except _Late:
            if plain:  # what it lends is lent
                self._withdraw(message)
            raise
        except _Broken:
            posted.clear()
            self.batch = None
            raise
        finally:
            if writer[0] is mine:
                del writer[0]
            while self.waiters:
                _open(self.waiters.popleft())
            if (posted or self.batch is not None) and not writer:
                self.later()  # this thread does not go on; or it was left here just now
        return None

    def _post(self, message: list[_Bytes], lent: Any) -> None:
        if message:
            # one step: it is to be written, and what it lends is lent
            clear: Any = itertools.compress(map(list.clear, (lent,)), (0,)) if lent else ()
            self.posted.extend(itertools.chain((message,), clear))

    def _withdraw(self, message: list[_Bytes]) -> None:
        """Do not send this message, unless that has begun."""
        try:
            self.posted.remove(message)
        except (ValueError, IndexError):  # it has begun; or the queue has changed meanwhile, and so it will be sent
            pass

    def _write_all(self, wait: bool, deadline: float | None) -> None:
        """As the writer: write the batch, and all that is posted."""
        posted, blocking = self.posted, False
        while True:
            if self.batch is None:
                if not posted:
                    return
                self.batch = ([], [])
                count = min(len(posted), _TOGETHER)
                messages = itertools.starmap(posted.popleft, itertools.repeat((), count))
                self.batch[0].extend(itertools.chain.from_iterable(messages))
            try:
                if self._transmit(*self.batch, blocking):  # type: ignore[call-arg]
                    self.batch = None
            except BlockingIOError as error:
                if not _of_system(error):
                    raise
                if not wait:
                    return
                self.stuck()
                blocking = deadline is None
                if not blocking and not self._await_room(_left(deadline)):
                    raise _Late from None
            except OSError as error:
                if not _of_system(error):
                    raise
                raise _Broken(error) from None

    def _transmit(self, chunks: list[_Bytes], counts: list[int], blocking: bool) -> bool:
        """Write some more of the batch. Returns whether all is written. Raises OSError."""
        raise NotImplementedError

    def _await_room(self, seconds: float) -> bool:
        """Wait until the other side takes more. False: it does not."""
        raise NotImplementedError

    def _leave_to_other(self, message: list[_Bytes], wait: bool, deadline: float | None) -> None:
        """Another thread writes, and the message too. Wait while it has too much to do."""
        if len(self.posted) > _POSTED_LIMIT:
            self.shutdown()
        if not self.writer.holder():
            self.later()  # nobody does, after all, or the seat is lost
        while wait and len(self.posted) > _MANY_POSTED:
            holder = self.writer.holder()
            if not holder or _get_ident() in holder:
                return  # nobody, now; or this thread, which a finalizer or a handler has interrupted
            left = _left(deadline)
            if left == 0:
                raise _Late
            self.stuck()
            gate = _gate()
            self.waiters.append(gate)
            if self.writer:
                gate.acquire(True, min(left, _LOOK_AGAIN) if left > 0 else _LOOK_AGAIN)

    def notice(self, number: int) -> list[list[_Bytes]]:
        """A message that gives a reference back, to be posted."""
        frame = _FRAME.pack(_HEAD, _WIRE_VERSION, 9, 0, 0, number, 0)
        return [[frame[self.skips :]]]

    def is_mine(self) -> bool:
        """Whether this thread is in the midst of writing, further down than the caller."""
        return bool(self.writer) and _get_ident() in self.writer.holder()

    def _take(self, come: deque[_Message], frame: bytes, partial: Any) -> Any:
        """A frame has come. A message that it completes goes to `come`; of one that has buffers to come, it returns
        what there is: (message, how many buffers there will be, how many there are, bytes that the rest may have)."""
        if partial is None:
            if len(frame) < _HEAD:
                raise ProtocolError(f"a frame of {len(frame)} bytes, which is shorter than a header")
            version, kind, flags, count, number, parent = _HEADER.unpack_from(frame)
            if version != _WIRE_VERSION or count > _MAX_BUFFERS:
                raise ProtocolError(f"a header with wire version {version} and {count} buffers")
            message: Any = kind, flags, number, parent, frame[_HEAD:], []
            if count:
                return message, count, 0, self.limit + _HEAD - len(frame)
        else:
            message, count, have, room = partial
            message[5][have:] = (frame,)  # this may be a repetition
            if have + 1 < count:
                return message, count, have + 1, room - len(frame)
        come.append(message)
        return None

    def _check_size(self, size: int, partial: Any) -> None:
        if not 0 <= size <= (self.limit + _HEAD if partial is None else partial[3]):
            raise ProtocolError(f"a frame of {size} bytes, where at most {self.limit} are allowed")


def _plainly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call what raises _Late and _Broken, and raise what these stand for."""
    try:
        return function(*arguments)
    except _Late:
        raise TimeoutError("the other side takes nothing") from None
    except _Broken as error:
        raise error.args[0] from None


def _length(size: int) -> bytes:
    """What goes before a frame of that many bytes."""
    return _LENGTH.pack(size) if size <= 0x7FFFFFFF else _LONG.pack(-1, size)


class _SocketChannel(_Channel):
    """Messages over a connected stream socket.

    `state`, for who receives: the messages that have come; the bytes behind them; the chunks to be read behind those;
    the message whose buffers have not all come (see `_take`); a long frame that is read into place, as (file, size,
    how much each step has read).
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self.sock: Any = sock
        sock.setblocking(True)
        if sys.platform == "darwin":
            sock.setsockopt(socket.SOL_SOCKET, 0x1022, 1)  # SO_NOSIGPIPE, which stands for MSG_NOSIGNAL there
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.state: Any = (deque(), b"", [], None, None)
        select = _import("select")
        self._readable = select.poll()  # not select(), which knows only descriptors below 1024
        self._readable.register(sock, select.POLLIN)

    def begin(self, limit: int) -> None:
        super().begin(limit)
        rest = self.state[1]
        self.state = (deque(), b"", [rest] if rest else [], None, None)

    def _frame(self, deadline: float | None, partial: Any = None) -> bytes | None:
        while True:
            come, rest, chunks, _, _ = self.state
            data = rest + b"".join(chunks)
            if len(data) >= 4:
                (size,) = _LENGTH.unpack_from(data)
                self._check_size(size, None)
                if len(data) >= 4 + size:
                    self.state = (come, data[4 + size :], [], None, None)
                    return data[4 : 4 + size]  # type: ignore[no-any-return]
            if deadline is not None and not self._readable.poll(_left(deadline) * 1000):
                return None
            self._fill(chunks, self.sock.recv, _READ_SIZE)
            if not chunks[-1]:
                raise _Broken(EOFError())

    def receive(self, deadline: float | None = None) -> deque[_Message] | None:
        while True:
            come, rest, chunks, partial, large = self.state
            if come:
                return come  # type: ignore[no-any-return]
            if not chunks:
                whole = large is not None and sum(large[2]) == large[1]  # then there may be nothing more to wait for
                if deadline is not None and not whole and not self._readable.poll(_left(deadline) * 1000):
                    return None
                if large is not None:
                    self._receive_large(*large, partial)  # type: ignore[call-arg]
                    continue
                self._fill(chunks, self.sock.recv, _READ_SIZE)
            data = chunks[0]
            if not data:
                raise _Broken(EOFError())
            self.state = self._parse(rest + data if rest else data, partial)

    @staticmethod
    def _fill(counts: list[Any], function: Callable[[Any], Any], what: Any) -> None:
        """Append what a system call gives, in one step with the call."""
        try:
            counts.extend(map(function, (what,)))
        except OSError as error:
            if not _of_system(error):
                raise
            raise _Broken(error) from None

    def _parse(self, data: bytes, partial: Any) -> Any:
        """What `state` is with these bytes."""
        come: deque[_Message] = deque()
        at, size = 0, len(data)
        while at + 4 <= size:
            if partial is None and size - at >= 28:  # the usual case: a short message without buffers
                length, version, kind, flags, count, number, parent = _FRAME.unpack_from(data, at)
                end = at + 4 + length
                if _HEAD <= length <= self.limit + _HEAD and end <= size and version == _WIRE_VERSION and not count:
                    come.append((kind, flags, number, parent, data[at + 28 : end], ()))
                    at = end
                    continue
            start, (length,) = at + 4, _LENGTH.unpack_from(data, at)
            if length == -1:
                start = at + 12
                if start > size:
                    break
                (_, length) = _LONG.unpack_from(data, at)
            self._check_size(length, partial)
            end = start + length
            if end > size:
                if length <= _READ_SIZE:
                    break
                file = io.BytesIO(bytes(length))  # it gives its bytes away without a copy
                with file.getbuffer() as view:
                    view[: size - start] = data[start:]
                return come, b"", [], partial, (file, length, [size - start])
            partial = self._take(come, data[start:end], partial)
            at = end
        return come, data[at:], [], partial, None

    def _receive_large(self, file: Any, size: int, counts: list[int], partial: Any) -> None:
        have = sum(counts)
        if have < size:
            with file.getbuffer() as view, view[have:] as rest:
                self._fill(counts, self.sock.recv_into, rest)
            if not counts[-1]:
                raise _Broken(EOFError())
        else:
            come: deque[_Message] = deque()
            self.state = come, b"", [], self._take(come, file.getvalue(), partial), None

    def _transmit(self, chunks: list[_Bytes], counts: list[int], blocking: bool) -> bool:
        flags = _NO_SIGNAL if blocking else _DONT_WAIT
        if len(chunks) == 1 and not counts:  # the usual case
            counts.extend(map(self.sock.send, chunks, (flags,)))
            return counts[0] == len(chunks[0])
        have, rest = sum(counts), []
        for chunk in chunks:
            if have < len(chunk):
                rest.append(memoryview(chunk)[have:] if have else chunk)
            have = max(0, have - len(chunk))
        if rest:
            counts.extend(map(self.sock.sendmsg, (rest[:1000],), ((),), (flags,)))  # IOV_MAX is 1024
        return not rest

    def _await_room(self, seconds: float) -> bool:
        return _wait_for(self.sock, True, seconds)

    def shutdown(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            errno = _import("errno")
            if error.errno in (errno.EBADF, errno.ENOTSOCK):  # somebody has closed it beneath us: that wakes nobody
                self.gone(error)

    def abandon(self) -> None:
        """In a forked child: close the descriptor, and let who would still write here end the child."""
        self.write = self.send = lambda *what: _leave_fork(None)  # type: ignore[assignment, method-assign]
        self.sock.close()

    def close(self) -> None:
        self.shutdown()
        try:
            self.sock.close()
        except OSError:
            pass  # somebody else has closed the descriptor


def _wait_for(sock: socket.socket, writing: bool, seconds: float) -> bool:
    """Wait until a socket can be read or written. False past that time."""
    select = _import("select")
    poll = select.poll()  # not select(), which knows only descriptors below 1024
    poll.register(sock, select.POLLOUT if writing else select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class _PipeChannel(_Channel):
    """Messages over a named pipe of Windows, by overlapped reads and writes. `connection` owns its handle.

    A read or write that is under way stays so when its caller leaves; the next one goes on with it. What is waited for
    are events, and never the handle: it is used only to begin one, and so `shutdown` can close it at any time, or the
    last to use it does. No lock is held meanwhile: a finalizer may run in there, and wait for somebody else.

    `state`, for who receives: the messages that have come; the message whose buffers have not all come (see `_take`);
    what has come of a frame; how much more of it to read; the read that is under way, in a list.
    """

    skips = 4
    _FIRST = 8192  # bytes that are read at first; of a longer frame Windows then tells how much is left

    def __init__(self, connection: Any) -> None:
        super().__init__()
        self._api = _import("_winapi")
        self._connection = [connection]  # taken out by whoever closes it
        self._handle: int | None = connection.fileno()  # None when it is to be used no more
        self._users: list[None] = []  # one for each use of it
        self._down = _import("_overlapped").Overlapped()  # whose event is set when the connection has been ended
        self.state: Any = (deque(), None, b"", self._FIRST, [])

    def send(self, head: tuple[int, int, int, int], body: bytes, buffers: Sequence[_Bytes], lent: list[int],
             wait: bool, deadline: float | None) -> None:
        kind, flags, number, parent = head
        header = _HEADER.pack(_WIRE_VERSION, kind, flags, len(buffers), number, parent)
        self.write([header + body, *buffers], lent, wait, deadline)

    def receive_frame(self, deadline: float) -> bytes:
        frame = super().receive_frame(deadline)
        self.state = (deque(), None, b"", self._FIRST, [])
        return frame

    def receive(self, deadline: float | None = None) -> deque[_Message] | None:
        while not self.state[0]:
            come, partial = deque(self.state[0]), self.state[1]
            frame = self._frame(deadline, partial)
            if frame is None:
                return None
            partial = self._take(come, frame, partial)
            self.state = (come, partial, b"", self._FIRST, [])
        return self.state[0]  # type: ignore[no-any-return]

    def _frame(self, deadline: float | None, partial: Any = None) -> bytes | None:
        """The same again until `state` is set."""
        while True:
            messages, begun, have, size, reading = self.state
            if not size:
                return bytes(have)
            wait = self._api.INFINITE if deadline is None else int(_left(deadline) * 1000 + 0.999)
            try:
                if not reading:
                    self._use(lambda handle: reading.extend(map(self._api.ReadFile, (handle,), (size,), (True,))))  # noqa: B023
                if not self._is_done(reading[0], wait):
                    return None
                _, error = reading[0][0].GetOverlappedResult(True)
                rest = self._left_of_frame() if error == self._api.ERROR_MORE_DATA else 0
            except OSError as error:
                if not _of_system(error):
                    raise
                raise _Broken(EOFError() if isinstance(error, BrokenPipeError) else error) from None
            have = have + bytes(reading[0][0].getbuffer())
            self._check_size(len(have) + rest, partial)
            self.state = (messages, begun, have, rest, [])

    def _transmit(self, chunks: list[_Bytes], counts: list[Any], blocking: bool) -> bool:
        """`counts` are the writes that have begun, one for each chunk: a chunk is a frame."""
        if counts and not self._is_done(counts[-1], self._api.INFINITE if blocking else 0):
            raise BlockingIOError(_import("errno").EAGAIN, "the pipe is full")
        if len(counts) == len(chunks):
            return True
        what = itertools.islice(chunks, len(counts), len(counts) + 1)
        self._use(lambda handle: counts.extend(map(self._api.WriteFile, (handle,), what, (True,))))
        return False

    def _await_room(self, seconds: float) -> bool:
        return self._is_done(self.batch[1][-1], int(seconds * 1000 + 0.999))

    def _is_done(self, begun: Any, wait: int) -> bool:
        """Whether a read or write has ended, after so many milliseconds at the most. Raises BrokenPipeError if the
        connection has been ended here, and what has failed."""
        operation, status = begun
        while status == self._api.ERROR_IO_PENDING:
            try:
                which = self._api.WaitForMultipleObjects([self._down.event, operation.event], False, wait)
            except InterruptedError:  # a signal, whose handler has returned
                continue
            if which == self._api.WAIT_OBJECT_0:
                raise BrokenPipeError(_import("errno").EPIPE, "the connection was ended here")
            if which == self._api.WAIT_TIMEOUT:
                return False
            break
        operation.GetOverlappedResult(True)
        return True

    def _use(self, function: Callable[[int], Any]) -> Any:
        """Call what takes the handle, which is not closed meanwhile. Raises BrokenPipeError if it is to be used no
        more."""
        self._users.append(None)
        try:
            if self._handle is None:
                raise BrokenPipeError(_import("errno").EPIPE, "the connection was ended here")
            return function(self._handle)
        finally:
            self._users.pop()
            if self._handle is None:
                self._let_go()

    def _left_of_frame(self) -> int:
        return int(self._use(self._api.PeekNamedPipe)[1])

    def _let_go(self) -> None:
        """Close the handle, once nobody uses it. What is under way has to end before."""
        if self._users:
            return
        try:
            connection = self._connection.pop()
        except IndexError:
            return  # somebody else does, or has
        batch = self.batch
        for operation, _ in [*self.state[4], *(batch[1][-1:] if batch is not None else ())]:
            try:
                operation.cancel()
                operation.GetOverlappedResult(True)
            except OSError:
                pass  # it ended by itself
        connection.close()

    def shutdown(self) -> None:
        self._handle = None
        _import("_overlapped").SetEvent(self._down.event)
        self._let_go()

    def close(self) -> None:
        self.shutdown()
        del self._users[:]  # in case a handler that raised has left one
        self._let_go()


# -- where a connection begins: every one is made by Listener and Client of multiprocessing.connection, without their
# own key exchange, which blocks accept() for everybody, can be relayed, and needs MD5 before Python 3.12

_BACKLOG = 4096  # callers that wait to be accepted; the system takes what it allows


def _transport(address: str) -> str:
    return "pipe" if address.startswith("\\\\") else "unix" if "/" in address else "tcp"


def _endpoint(address: str) -> tuple[str, Any]:
    """The family of an address, and what Listener and Client call it. Raises ValueError for none of this
    machine."""
    if _transport(address) != "tcp":
        return {"pipe": "AF_PIPE", "unix": "AF_UNIX"}[_transport(address)], address
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    here = host == "::1" or (host.startswith("127.") and host.replace(".", "").isdecimal())
    if not (here and port.isdecimal() and int(port) < 1 << 16):
        kinds = "a path with a / in it, 127.0.0.1:PORT or [::1]:PORT"
        raise ValueError(f"{address!r} is no address: that is {kinds}")
    return "AF_INET6" if ":" in host else "AF_INET", (host, int(port))


def _channel_over(connection: Any) -> _Channel:
    """The channel that takes over a Connection."""
    if _WINDOWS:
        return _PipeChannel(connection)
    with connection:
        return _SocketChannel(socket.socket(fileno=os.dup(connection.fileno())))


def _client(address: str) -> Any:
    """A Connection to `address`, however long that takes. Raises OSError."""
    connection = _import("multiprocessing.connection")
    family, target = _endpoint(address)
    if family == "AF_INET6":  # Client knows no such
        return connection.Connection(socket.create_connection(target, None).detach())
    return connection.Client(target, family)


def _connect(address: str, timeout: float) -> _Channel:
    """A channel to `address`: a path, a pipe's name or ``host:port``. Raises OSError, past the timeout
    TimeoutError."""
    came: list[Any] = []
    news = threading.Event()

    def connect() -> None:
        try:
            came.append(_client(address))
        except Exception as error:
            came.append(error)
        news.set()

    _import("multiprocessing.connection")
    _aside("miniplug-connect", connect)  # one that comes too late closes itself
    if not news.wait(timeout):
        raise TimeoutError(f"{address} took no connection within {timeout:g} s")
    if isinstance(came[0], Exception):
        raise came.pop()
    return _channel_over(came[0])


def _temp_folders() -> list[str]:
    """Where a socket may lie, the best place first."""
    bases = os.environ.get("TMPDIR"), "/tmp", "/var/tmp", os.environ.get("XDG_RUNTIME_DIR")
    try:
        return [os.path.abspath(base) for base in bases if base]
    except OSError:  # one is relative, and the current folder is gone
        return [base for base in bases if base]


def _folder_name() -> str:
    return f"miniplug-{os.urandom(8).hex()}"


_listeners: set[_Listener] = set()  # those that are open: a forked child closes its copies


class _Listener:
    """Where the other side connects: a socket in a folder of its own, a named pipe, or loopback TCP.

    The folder has mode 0700, so that only this user gets as far as the handshake. `address` is what _connect
    takes; one that is given is used instead, and the OSError or ValueError raised if it cannot be. One thread
    may `accept` while another closes it.
    """

    def __init__(self, address: str = "", made: Callable[[str], Any] = str) -> None:
        """`made` is told of each folder that it has made."""
        self.folder = ""  # the one that it has made
        self._held: list[int] = []  # a descriptor of it
        self.address = ""
        self.passed_over: list[str] = []  # the temp folders that would not do, and why
        if address and (_transport(address) == "pipe") != _WINDOWS:
            kind = "here that is the name of a pipe" if _WINDOWS else "that is the name of a pipe of Windows"
            raise ValueError(f"{address!r} is no address: {kind}")
        if _WINDOWS or address:
            self._listener = self._bind(address or rf"\\.\pipe\miniplug-{os.urandom(16).hex()}")
        else:
            self._listener = self._bind_anywhere(made)
        _listeners.add(self)

    def _bind(self, address: str) -> Any:
        family, target = _endpoint(address)
        if family == "AF_UNIX":
            address = target = os.path.abspath(address)
            _remove_stale(target)
        try:
            listener = _import("multiprocessing.connection").Listener(target, family, _BACKLOG)
            if family == "AF_UNIX":
                os.chmod(target, 0o600)
        except OSError as error:
            if error.errno is None:  # the path is too long
                raise OSError(f"{error}: {address!r}") from None
            raise OSError(error.errno, error.strerror, address) from None  # it has named no file
        if family in ("AF_INET", "AF_INET6"):
            address = f"{address.rpartition(':')[0]}:{listener.address[1]}"
        sock = getattr(getattr(listener, "_listener", None), "_socket", None)
        if sock is not None:  # who accepts looks now and then whether that is still wanted
            sock.settimeout(0.5)
        self.address = address
        return listener

    def _bind_anywhere(self, made: Callable[[str], Any]) -> Any:
        for base in _temp_folders():
            folder = os.path.join(base, _folder_name())
            try:
                if len(os.fsencode(folder)) > 101:  # BSD has 104 for "/s" and NUL too
                    raise OSError("its path is too long for a socket")
                os.mkdir(folder, 0o700)
                self.folder = folder  # from here on it is ours to remove
                made(folder)
                self._hold()
                return self._bind(os.path.join(folder, "s"))
            except OSError as error:
                self._remove_folder()
                self.passed_over.append(f"{base} ({error.strerror or error})")
        return self._bind("127.0.0.1:0")  # no folder to be had: the key alone keeps others out

    def _hold(self) -> None:
        """Lock the folder as long as this process lives: who gets the lock knows that it does not."""
        self._held.append(os.open(self.folder, os.O_RDONLY))
        try:
            fcntl = _import("fcntl")
            fcntl.flock(self._held[0], fcntl.LOCK_EX)
        except OSError:
            pass  # there are no locks there: then nobody else gets one either

    def accept(self) -> _Channel | None:
        """The next connection; or None, if half a second brings none (on Windows it waits on). Raises OSError
        when accepting fails."""
        try:
            return _channel_over(self._listener.accept())
        except socket.timeout:
            return None

    def wake(self) -> None:
        """Have whoever waits in `accept` return."""
        try:
            _connect(self.address, 1.0).close()
        except OSError:
            pass  # nobody waits any more; or without a descriptor for this it looks by itself

    def close(self) -> None:
        _listeners.discard(self)
        try:
            self._listener.close()  # and removes its socket
        except OSError:
            pass  # somebody else has
        self._remove_folder()

    def _remove_folder(self) -> None:
        if self.folder:
            _remove_socket(os.path.join(self.folder, "s"), self.folder)
        self.folder = ""
        while self._held:
            os.close(self._held.pop())


def _remove_socket(path: str, folder: str) -> None:
    for remove, name in ((os.unlink, path), (os.rmdir, folder)):
        try:
            remove(name)
        except OSError:
            pass


def _is_our_folder(folder: str) -> bool:
    """Whether this user has made it for a socket, and nobody else can have put anything there. Raises
    OSError."""
    name, stat = os.path.basename(folder), os.lstat(folder)
    return (name.startswith("miniplug-") and len(name) == len(_folder_name())
            and stat.st_uid == _posix.geteuid() and stat.st_mode & 0o170777 == 0o040700)


def _remove_stale(path: str, seconds: float = 0.0) -> bool:
    """Remove the socket that a process which was killed has left, and the folder if it had made one for it.
    Others that are being killed may hold it open for that many seconds. Whether there was one, and it is
    gone."""
    deadline = time.monotonic() + seconds
    is_socket = _import("stat").S_ISSOCK
    try:
        while _transport(path) == "unix" and is_socket(os.lstat(path).st_mode):  # and nothing else
            try:
                _connect(path, 1.0).close()
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.01)
            except ConnectionRefusedError:
                os.unlink(path)
                if _is_our_folder(os.path.dirname(path)):
                    os.rmdir(os.path.dirname(path))
                return True
    except OSError:
        pass  # there is nothing, or somebody else was quicker
    return False


def _remove_left_behind() -> list[str]:
    """Remove, in the temp folders, what plugins that listened there and were killed have left. Returns the
    folders."""
    removed = []
    for base in () if _WINDOWS else _temp_folders():
        try:
            names = os.listdir(base)
        except OSError:
            continue  # it is not there, or may not be looked at
        for folder in [os.path.join(base, name) for name in names if name.startswith("miniplug-")]:
            try:
                if _is_our_folder(folder) and _is_dead(folder) and _remove_stale(os.path.join(folder, "s")):
                    removed.append(folder)
            except OSError:
                pass  # it is gone
    return removed


def _is_dead(folder: str) -> bool:
    """Whether the process that made it is gone: then the lock is to be had. Raises OSError."""
    fcntl, fd = _import("fcntl"), os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


# === 4. handshake =======================================================================================
#
# Three passes, mutual, after ISO/IEC 9798-4: each side proves that it holds the key by a MAC over both
# nonces.
#
#     host    {"miniplug": 1, "role": "host", "nonce", "protocol_versions", "codec", "max_message",
#              "features"}
#     plugin  {"miniplug": 1, "role": "plugin", "nonce", "protocol_versions", "codecs", "max_message",
#              "features", "cookie"}
#     plugin  {"proof"}
#     host    {"protocol_version", "codec"}, or {"refusal"}
#     host    {"proof"}
#
# A proof is HMAC-SHA256 over the role's name, the address and all messages before it, each with its length
# before it, so that nothing can be changed, replayed, reflected, or relayed to another address. Until the
# other side's was right, nothing is read but short JSON in UTF-8.

_HELLO_LIMIT = 4096  # bytes; until the key is proven nothing else is decoded
_HELLO_SECONDS = 5.0
_CROWD_SECONDS = 30.0  # so long one tries again where strangers crowd the door
_KNOCK_SECONDS = 0.5  # for one try there; the system itself would try again after 1, 3 and 7 seconds


if TYPE_CHECKING:
    class _Handshake(NamedTuple):
        protocol_version: int = 1
        magic_cookie_key: str = ""
        magic_cookie_value: str = ""
else:
    _Handshake = namedtuple("_Handshake", "protocol_version magic_cookie_key magic_cookie_value",
                            defaults=(1, "MINIPLUG_COOKIE", "b7fb5a3f2d4a4c0e9a5f6b1c"))


class Handshake(_Handshake, metaclass=_Brief):
    """What a host and its plugins agree on beforehand. Immutable.

    `protocol_version` (int, default 1) is the version of the interface that they share; count it up when that
    changes. `magic_cookie_key` and `magic_cookie_value` (str) name an environment variable and what the host
    sets it to: they tell a person who starts a plugin by hand, or a host that starts the wrong program, what
    is wrong. They are no security measure.
    """

    __slots__ = ()


# What a handshake settles; the other side's limit in bytes, and its features.
_Terms = namedtuple("_Terms", "protocol_version max_message features", defaults=((),))
_FEATURES = ("arrays",)  # what each side tells that it knows, beside those of a plugin alone


class _Hello:
    """One run of the handshake over one channel, for either role, on one thread. Its methods raise
    AuthenticationError, HandshakeError, ProtocolError, OSError and EOFError."""

    def __init__(self, channel: _Channel, address: str, key: bytes, role: str) -> None:
        self._channel, self._address, self._key, self._role = channel, address, key, role
        self._said: list[bytes] = []  # all messages of either side
        self._deadline = time.monotonic() + _HELLO_SECONDS

    def say(self, **message: Any) -> None:
        self._said.append(_encode(message).encode())
        self._channel.send_frame(self._said[-1], self._deadline)

    def hear(self) -> dict[str, Any]:
        self._said.append(self._channel.receive_frame(self._deadline))
        try:
            message = json.loads(str(self._said[-1], "utf-8"))  # of bytes it would take UTF-16, too
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise ProtocolError("what came is no handshake")
        return message

    def greet(self, versions: Sequence[int], max_message: int, features: Sequence[str] = (),
              **others: Any) -> None:
        self.say(miniplug=_WIRE_VERSION, role=self._role, nonce=os.urandom(16).hex(),
                 protocol_versions=list(versions), max_message=max_message, features=[*_FEATURES, *features], **others)

    def hear_greeting(self, role: str) -> dict[str, Any]:
        """The other side's greeting, checked as far as either role needs it."""
        theirs = self.hear()
        versions = theirs.get("protocol_versions")
        if theirs.get("miniplug") != _WIRE_VERSION or theirs.get("role") != role:
            raise ProtocolError(f"the other side is no miniplug {role} of wire version {_WIRE_VERSION}")
        numbers = [*versions, theirs.get("max_message")] if isinstance(versions, list) else [None]
        if not all(type(number) is int for number in numbers):
            raise ProtocolError("the other side's greeting is incomplete")
        if not isinstance(theirs.get("features"), list):
            theirs["features"] = []
        return theirs

    def prove(self) -> None:
        self.say(proof=self._mac(self._role))

    def check(self, role: str) -> None:
        """Hear the other side's proof."""
        expected = self._mac(role)
        proof = str(self.hear().get("proof"))
        if not _import("hmac").compare_digest(expected.encode(), proof.encode("utf-8", "replace")):
            raise _on_first_use("AuthenticationError")(f"the {role} at {self._address} does not hold the key")

    def _mac(self, role: str) -> str:
        mac = _import("hmac").new(self._key, digestmod="sha256")
        for part in (role.encode(), os.fsencode(self._address), *self._said):
            mac.update(struct.pack("!I", len(part)) + part)
        return str(mac.hexdigest())

    def as_host(self, versions: Sequence[int], max_message: int) -> _Terms:
        self.greet(versions, max_message, codec="json")
        theirs = self.hear_greeting("plugin")
        self.check("plugin")
        common = set(versions) & set(theirs["protocol_versions"])
        refusal = self._refusal(versions, theirs)
        self.say(**({"refusal": refusal} if refusal else {"protocol_version": max(common), "codec": "json"}))
        self.prove()
        if refusal:
            ours = {"protocol_versions": list(versions), "codec": "json"}
            raise HandshakeError(refusal, host=ours, plugin=theirs)
        return _Terms(max(common), theirs["max_message"], theirs["features"])

    def _refusal(self, versions: Sequence[int], theirs: Mapping[str, Any]) -> str:
        """Why this host does not take a plugin that holds the key, if it does not."""
        cookie, offered = theirs.get("cookie"), theirs["protocol_versions"]
        if isinstance(cookie, dict) and cookie.get("matches") is not True:
            return ("it is a plugin for another host: it expects another magic cookie in "
                    f"{cookie.get('key')!r}; is the handshake given to launch() the one that it serves with?")
        if not set(versions) & set(offered):
            older = "plugin" if max(offered, default=0) < max(versions) else "host"
            return (f"no common protocol version: the host has {list(versions)}, the plugin has {offered}; "
                    f"the {older} is the older one, bring it up to date")
        if "json" not in (theirs["codecs"] if isinstance(theirs.get("codecs"), list) else ()):
            return f"the plugin does not know the codec 'json', only {theirs.get('codecs')}"
        return ""

    def as_plugin(self, versions: Sequence[int] | None, max_message: int, cookie: Mapping[str, Any],
                  features: Sequence[str] = ()) -> _Terms:
        """`versions` None: whatever the host has."""
        theirs = self.hear_greeting("host")
        versions = theirs["protocol_versions"] if versions is None else versions
        self.greet(versions, max_message, features, codecs=["json"], cookie=dict(cookie))
        self.prove()
        choice = self.hear()
        self.check("host")
        if "refusal" in choice:
            raise HandshakeError(str(choice["refusal"]), host=theirs)
        if choice.get("protocol_version") not in versions or choice.get("codec") != "json":
            raise ProtocolError("the host chose what the plugin has not offered")
        return _Terms(choice["protocol_version"], theirs["max_message"], theirs["features"])


def _come_in(address: str, greet: Callable[[_Channel], _Terms]) -> tuple[_Channel, _Terms]:
    """Connect to a door and run the handshake. At a TCP port, which is everybody's, strangers may crowd: who
    is pushed out there comes again. Raises what `greet` does."""
    deadline = time.monotonic() + _CROWD_SECONDS
    while True:
        channel = None
        try:
            channel = _connect(address, _KNOCK_SECONDS if _transport(address) == "tcp" else _HELLO_SECONDS)
            return channel, greet(channel)
        except BaseException as error:
            if channel is not None:
                channel.close()
            pushed = isinstance(error, (EOFError, ConnectionError, TimeoutError)) and not isinstance(
                error, (PluginError, ConnectionRefusedError))
            if not pushed or _transport(address) != "tcp" or time.monotonic() >= deadline:
                raise


class _Door:
    """Where the other side comes in. Each caller is greeted on a thread of its own, with a deadline, and let
    in if it holds the key. A wrong, slow or silent caller holds up nobody.

    `greet` runs the handshake; `arrived` is called with the channel and the terms, or with a HandshakeError,
    on that thread. The door closes before it is called, and lets in nobody else, unless it `stays` open. Any
    thread may close it. `_lock` protects `_open` and `_callers`.
    """

    _CROWD = 128  # callers in the handshake at once; past that one of them, whoever chance picks, has to go

    def __init__(self, greet: Callable[[_Channel, str], _Terms], arrived: Callable[[_Channel, Any], None],
                 address: str = "", stays: bool = False, made: Callable[[str], Any] = str) -> None:
        self.listener = _Listener(address, made)
        self.strangers = 0
        self._greet = greet
        self._arrived = arrived
        self._stays = stays
        self._lock = threading.Lock()
        self._open = True
        self._callers: list[_Channel] = []
        try:
            self._thread = _start_thread("miniplug-door", self._accept)
        except BaseException:
            self.listener.close()
            raise

    def _accept(self) -> None:
        channel = None
        while self._open:
            if channel is not None:
                self._admit(channel)
            try:
                channel = self.listener.accept()
            except OSError:  # out of descriptors, or a caller that left at once
                channel = None
                time.sleep(0.05)
        if channel is not None:
            channel.close()
        self.listener.close()

    def _admit(self, channel: _Channel) -> None:
        """Have a thread meet a caller. Where there is a crowd, chance picks who has to go: among strangers
        who come faster than anybody can speak, the oldest would always be the one who is about to prove the
        key."""
        with self._lock:
            if len(self._callers) >= self._CROWD:
                self._callers.pop(os.urandom(1)[0] % self._CROWD).shutdown()
            self._callers.append(channel)
        _aside("miniplug-hello", self._meet, channel)

    def _meet(self, channel: _Channel) -> None:
        result: Any = None
        try:
            if self._open:
                result = self._greet(channel, self.listener.address)
        except HandshakeError as error:
            result = error
        except Exception:  # a stranger, whatever it is that he did
            self.strangers += 1
        with self._lock:
            pushed_out = all(each is not channel for each in self._callers)
            enters = self._open and result is not None and not pushed_out
            self._open = self._open and (self._stays or not enters)
            if enters and not isinstance(result, Exception):
                self._forget(channel)  # first: whoever hears of it may close the door, which ends those in it
        if not enters or isinstance(result, Exception):
            channel.close()
        if enters:
            self._arrived(channel, result)
        with self._lock:
            self._forget(channel)

    def _forget(self, channel: _Channel) -> None:
        self._callers = [each for each in self._callers if each is not channel]

    def settle(self, seconds: float) -> None:
        """Wait until nobody is being greeted, at most that long."""
        deadline = time.monotonic() + seconds
        while self._callers and time.monotonic() < deadline:
            time.sleep(0.005)

    def close(self) -> None:
        """Let nobody in any more; returns when no thread, socket or file is left."""
        with self._lock:
            self._open = False
            callers = list(self._callers)
        for channel in callers:
            channel.shutdown()
        self.listener.wake()
        self._thread.join(2.0)


# === 5. session =========================================================================================
#
# Calls, answers and streams, both ways, over one channel. The two sides are one class: each numbers its own calls, and
# answers those of the other. The rooms, each with a job of its own:
#
#     _Pool       threads, for all sessions: what is to be done, and nobody waits for
#     _Watch      one thread that sleeps: alarms, and a look now and then whether a call holds others up
#     _Reader     the seat: who reads what has come, and where it goes
#     _Caller     our calls: send, wait, give up
#     _Runner     their calls: decode, run, answer
#     _Producer   one of their calls that is answered by a stream
#     _Session    what these share, and the end
#
# Reading. Whoever holds the seat reads, and only routes: what is about a call of ours goes to that call's inbox, and
# whoever waits for it decodes it; a call made on behalf of one of ours goes to the thread that waits for that one, or
# to the loop that does; any other call goes to the pool. A thread that waits takes the seat if it is free, else it
# sleeps until there is something for it, or nobody reads. Where calls come in at any time (in a plugin always, in a
# host while it has lent something), or an answer is due that no thread waits for, a thread of the pool, the attendant,
# sits there while no caller does. A method that has been quick it runs at once, and reads on; for any other it first
# has another thread read. The watch looks, twice a second while such calls are run, whether one takes long after all.
#
# Sleeping and waking. Who sleeps first says so, then looks once more, then sleeps; who has something does that first,
# then looks who sleeps. So no wake-up is lost. When a handler raises in between, one may be: so who sleeps looks again
# after a second. A wake-up for nothing is harmless.
#
# Streams. The answer to a call may be a stream: items, several to a message, until an end or an error. The caller may
# leave _WINDOW of them unread; for those that it has read it gives credit for as many. A producer without credit is set
# aside, and holds no thread.
#
# There is one lock below: `_Producer.lock`, under which nothing is called that takes another.

_CALL, _NOTIFY, _RESULT, _ERROR, _ITEM, _END, _CREDIT, _CANCEL, _RELEASE, _PING, _PONG, _SHUTDOWN = range(1, 13)
_TAGGED, _IGNORABLE, _STREAM = 1, 2, 4
_ANSWERS = frozenset((_RESULT, _ERROR, _ITEM, _END, _PONG))
_NOTHING: Any = (b"", (), 0, [])  # a content without a value
_ENDED: Any = (0, 0, 0, 0, b"", ())  # the message that the connection's end puts into every inbox
_WINDOW = 64  # items of a stream that may be on their way or unread
_GATHER = 0.001  # seconds after a message of items in which the next ones wait for each other
_QUICK = 0.001  # seconds; a method whose last three runs took less is run by the thread that reads
_LOOK = 0.5  # seconds between two looks whether such a run takes long after all
_LAZY = 0.01  # seconds after a call until a thread of the pool reads, where only what is lent asks for it
_IDLE_SECONDS = 10.0  # after which a thread of the pool that has nothing to do ends
_NESTED = 256  # calls on behalf of ours for which no thread waits that run at once; the others wait
_ENDING = {"SystemExit", "KeyboardInterrupt", "GeneratorExit", "StopIteration", "StopAsyncIteration", "CancelledError"}
_RAISED = 16  # exceptions of ours that a call remembers, should they come home

_current: ContextVar[_Request | None] = ContextVar("miniplug", default=None)  # the call that runs here
_loop_threads: set[int] = set()  # those that run event loops of ours


def cancelled() -> bool:
    """Whether the caller has given up the call that this method runs for: timed out, cancelled or gone.

    A long method asks now and then, and returns when it is true. Outside a call it is False.
    """
    request = _current.get()
    return request is not None and request.cancelled


def _gate() -> Any:
    """A lock used as a wake-up: to wait is to acquire it. It is shut."""
    gate = threading.Lock()
    gate.acquire()
    return gate


def _open(gate: Any) -> None:
    try:
        gate.release()
    except RecursionError:  # a RuntimeError too, and another matter
        raise
    except RuntimeError:
        pass  # it is open


def _in_main_thread() -> bool:
    """Whether signal handlers run in this thread."""
    return _get_ident() == threading.main_thread().ident


class _Pool:
    """Daemon threads for all sessions, as many as there is to do at once. Any thread may put, a finalizer too.

    `_idle` is as long as how many threads wait, or are about to; who puts a task takes one away, or starts a thread.
    They end when there was nothing to do for a while, or there is no session any more.
    """

    def __init__(self) -> None:
        self._tasks: Any = _import("_queue").SimpleQueue()
        self._idle: list[None] = []

    def put(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have a thread call the function. Raises RuntimeError if none can be started."""
        self.move(((function, arguments),))

    def move(self, tasks: Iterable[tuple[Callable[..., Any], Any]]) -> None:
        """Take the one (function, arguments) out of an iterable, in one step. Raises RuntimeError as `put` does."""
        try:
            self._idle.pop()
        except IndexError:
            _start_thread("miniplug-worker", self._work)
        _consume(map(self._tasks.put, tasks))

    def _work(self) -> None:
        seconds = _IDLE_SECONDS
        while True:
            try:
                function, arguments = self._tasks.get(True, seconds)
            except _import("_queue").Empty:
                try:
                    self._idle.pop()
                    return
                except IndexError:
                    if seconds < _IDLE_SECONDS:
                        return  # nobody does, after all: a handler has struck who took it
                    seconds = 1.0  # somebody counts on this one
                    continue
            seconds = _IDLE_SECONDS
            if function is None:
                return
            try:
                function(*arguments)
            except BaseException:
                _import("traceback").print_exc()
            function = arguments = None
            if not _sessions:
                return
            self._idle.append(None)

    def retire(self) -> None:
        """Let those go that wait."""
        while True:
            try:
                self._idle.pop()
            except IndexError:
                return
            self._tasks.put((None, ()))


class _Watch:
    """One thread for all sessions of this process, which sleeps when there is nothing: it calls functions at a time, and
    looks after sessions that ask for it. It runs while there is a session.

    `tasks` are (function, arguments) for it to call, soon, in its thread. Any thread may put, a finalizer too. To put is
    one step: so who is struck by a handler leaves its cleanup here, before another strikes.
    """

    def __init__(self) -> None:
        self.tasks: Any = _import("_queue").SimpleQueue()
        self._numbers = itertools.count()
        self._alarms: list[tuple[float, int, Callable[[], Any]]] = []  # a heap, the thread's own
        self._readers: list[_Reader] = []  # the thread's own as well
        self._running: dict[int, Any] = {}  # {0: a token} while the thread runs

    def alarm(self, when: float, function: Callable[[], Any]) -> None:
        """Have a thread of the pool call a function at a time."""
        self.tasks.put((_import("heapq").heappush, (self._alarms, (when, next(self._numbers), function))))

    def look_after(self, reader: _Reader) -> None:
        """Call its `look` now and then, until that says no."""
        self.tasks.put((self._readers.append, (reader,)))

    def start(self) -> None:
        """There is a session. Raises RuntimeError if no thread can be started."""
        token = [None]
        if self._running.setdefault(0, token) is token:
            try:
                _start_thread("miniplug-clock", self._run)
            except BaseException:
                self._running.clear()
                raise

    def _run(self) -> None:
        alarms, next_look = self._alarms, 0.0
        while _sessions:
            now = time.monotonic()
            while alarms and alarms[0][0] <= now:
                _aside_in_pool(_import("heapq").heappop(alarms)[2])
            if self._readers and now >= next_look:
                if next_look:
                    self._readers[:] = [reader for reader in self._readers if reader.look()]
                next_look = now + _LOOK if self._readers else 0.0
            times = [alarm[0] for alarm in alarms[:1]] + [next_look] * bool(self._readers)
            try:
                function, arguments = self.tasks.get(True, max(0.0, min(min(times) - now, _FOREVER)) if times else None)
                function(*arguments)
            except _import("_queue").Empty:
                pass
            function = arguments = None
        self._running.clear()
        if _sessions:
            self.start()


def _aside_in_pool(function: Callable[..., Any], *arguments: Any) -> None:
    """Have a thread of the pool call a function, or call it here if there is none to be had."""
    try:
        _pool.put(function, *arguments)
    except RecursionError:
        raise
    except RuntimeError:
        function(*arguments)


def _in_pool(function: Callable[..., Any], *arguments: Any) -> Any:
    """Have a thread of the pool call a function, and wait for what it gives or raises."""
    results: list[Any] = []
    gate = _gate()

    def run() -> None:
        try:
            results.append((function(*arguments), None))
        except BaseException as error:
            results.append((None, error))
        _open(gate)

    _aside_in_pool(run)
    gate.acquire()
    value, error = results.pop()
    if error is not None:
        raise error
    return value


_pool, _watch = _Pool(), _Watch()
_sessions: set[_Session] = set()  # those that have not ended: a forked child leaves them


def _after_fork() -> None:
    """In a forked child: the connections are its parent's, and the threads are not here."""
    global _pool, _watch
    _pool, _watch = _Pool(), _Watch()
    while _sessions:
        _sessions.pop().abandon()
    for listener in _listeners:
        listener._listener.close()
    _listeners.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Call:
    """A call of ours. `inbox` is what has come about it: messages, which whoever waits decodes."""

    gate: Any = None  # of the thread that waits, while it sleeps
    home = True  # whether the thread that waits runs what is nested in it
    loop: Any = None  # the event loop that does, if it was submitted where one runs
    context: Any = None  # contextvars.Context, of the submit
    nested: deque[_Message] | None = None  # calls made on behalf of this one, for the thread that waits
    running: Any = ()  # the one of them that it runs
    raised: dict[int, BaseException] | None = None  # what these have raised, by their numbers
    streams: _Message | None = None  # the result that said so
    decoded: Any = None  # the latest message that was
    granted = _WINDOW  # for how many there was credit
    deadline: float | None = None
    session: Any = None  # of a submitted one
    future: Any = None  # the Call that the user has
    watcher: Callable[[], Any] | None = None  # called by who reads when an item has come, where no thread waits
    lent: Any = ()  # references in it, until it is sent

    def __init__(self, number: int, method: str, seconds: float | None) -> None:
        self.number = number
        self.method = method
        self.seconds = seconds
        self.inbox: deque[_Message] = deque()
        if seconds is not None:
            self.deadline = time.monotonic() + seconds

    def left(self) -> float | None:
        """Seconds until the deadline, or None without one."""
        return None if self.deadline is None else _left(self.deadline)


def _waits_for_itself(call: _Call) -> Exception:
    return RuntimeError(f"{call.method}() would wait for ever: called by a signal handler, a __del__ or a decode, it has "
                        "interrupted what is to bring the answer; use submit or notify there")


def _too_late(call: _Call) -> Exception:
    text = f"{call.method}() took longer than {call.seconds:g} s"
    return _on_first_use("CallTimeout")(text, method=call.method, seconds=call.seconds)  # type: ignore[no-any-return]


class _Sealed(Exception):
    """The session takes no more calls: this one was not sent, and may go elsewhere."""


class _Request:
    """A call of the other side's, to be answered."""

    begun = False
    decoded: Any = None  # its message, once that was
    cancelled = False
    outer: _Request | None = None  # the call in which this one is run
    body: Any = None  # [target, method, args, kwargs], from when it is decoded until it has run
    method = ""
    producer: _Producer | None = None  # of the stream that is its answer
    slots: _Slots | None = None  # where it has a slot, or waits for one
    loop: Any = None  # the host's event loop, where it runs on that
    task: Any = None  # asyncio's, where it runs as one
    sending = False  # at home: whether it is answered, once `lent` is empty
    at_home = False  # whether the thread runs it that waits for the call on whose behalf it is made
    lent: Any = ()  # references in the answer, until that is sent; also 0, at home, to tell when it is

    def __init__(self, session: _Session, message: _Message) -> None:
        self.session = session
        self.message: _Message | None = message  # until it is decoded
        self.kind: int = message[0]
        self.number: int = message[2]
        self.parent: int = message[3]

    def cancel(self) -> None:
        self.cancelled = True
        task = self.task
        if task is not None:
            self.on_loop(task.cancel)
        if self.producer is not None:
            self.producer.resume()  # it is closed, if it waits for credit

    def on_loop(self, function: Callable[[], Any]) -> bool:
        """Have the event loop that this runs on call a function: the host's, or the one that the async methods share.
        False if it is closed."""
        if self.loop is None:
            return self.session.references.on_loop(function)  # type: ignore[no-any-return]
        try:
            self.loop.call_soon_threadsafe(function)
            return True
        except RuntimeError:
            return False


def _renamed(error: PluginError, old: str, new: str) -> PluginError:
    """The same error, with the place that it names told in full."""
    error.args = (str(error).replace(old, new, 1),)
    if isinstance(error, NotSerializable):
        error.path = error.path.replace(old, new, 1)
    return error


def _leave_fork(error: BaseException | None) -> None:
    """End a forked child whose method has ended there: it must neither answer nor serve beside its parent."""
    code = error.code if isinstance(error, SystemExit) else int(error is not None)
    if error is not None and not isinstance(error, SystemExit):
        _import("traceback").print_exception(type(error), error, error.__traceback__)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass  # it has none
    os._exit(code & 0xFF if isinstance(code, int) else int(code is not None))


class _Slots:
    """How many calls may run at once. All sessions of a plugin share them. Any thread: to take from a list or a deque,
    and to add to it, are one step each. Who queues looks for a slot after that, and who gives one back looks at the
    queue after that."""

    def __init__(self, count: int) -> None:
        self.free = [None] * count  # as long as how many more calls may run
        self.queue: deque[_Request] = deque()  # calls that wait for a slot

    def take(self, request: _Request) -> bool:
        """Whether a call may run now; else it runs when there is a slot."""
        request.slots = self
        try:
            self.free.pop()
            return True
        except IndexError:
            self.queue.append(request)
            if self.free:
                self._start_queued()
            return False

    def give_back(self) -> None:
        self.free.append(None)
        if self.queue:
            self._start_queued()

    def _start_queued(self) -> None:
        while self.queue:
            try:
                self.free.pop()
            except IndexError:
                return  # whoever has one looks at the queue
            try:
                request = self.queue.popleft()
            except IndexError:
                self.free.append(None)
                continue
            runner = request.session.runner
            try:
                _pool.put(runner.run_with_slot, request)
            except RecursionError:
                raise
            except RuntimeError as error:
                self.free.append(None)
                runner.fail(request, error)


class _Reader:
    """Who reads what has come, and where it goes.

    Any thread may call `read_for`, `wait` and `pass_on`; `look` is the watch's. What `_read` and `_route_...` do, the
    holder of the seat does: each of their steps may be repeated, as a handler that raises leaves the message first in
    the channel's queue.

        nobody --a caller: read_for, leaves when it has its answer--> nobody
        nobody --pass_on: a sleeper is woken, takes the seat------> nobody
        nobody --pass_on: else the attendant, from the pool-------> nobody, while it runs a quick call itself
    """

    def __init__(self, session: _Session) -> None:
        self._session = session
        self._channel = session.channel
        self._calls = session.calls
        self._requests = session.requests
        self.seat = _Seat()
        self.sleepers: dict[int, _Call] = {}  # our calls whose threads sleep
        self.unattended: set[int] = set()  # the numbers of those whose answer must be read though no thread waits
        self.attendant: Any = None  # the task of the pool that reads, or runs a call and then reads on
        self._quick: dict[str, int] = {}  # by the method: how many times in a row it was, up to 3
        self._inline = 0  # the number of the call that the attendant runs; negative when it has
        self._seen = 0  # that, at the last look
        self._watched = False
        self._retry = False  # whether there was no thread for an attendant
        self._last = 0.0  # when a call came that was not watched
        self._looked_at = 0.0  # until then it is sure that somebody looks whether a thread should read
        self.vacant = _gate()  # opens when somebody has stopped reading after the end

    def read_for(self, call: _Call) -> None:
        """Read, unless another thread does, until there is something for the call. Raises _Late past its deadline."""
        seat, token = self.seat, {_get_ident()}
        mine = _ref_to(token)
        try:
            if seat.setdefault(0, mine) is mine and not (call.inbox or call.nested):  # who read before may have brought it
                self._read(call)
        except (_Broken, ProtocolError) as error:
            self._session.end(error)
        finally:
            if seat[0] is mine:
                del seat[0]
            session = self._session
            if self.sleepers or self.unattended or self._requests or session.references.lends or session.sealed \
                    or session.serving:
                self.pass_on()

    def wait(self, call: _Call) -> None:
        """Wait until something has come about the call, reading while nobody else does, and running what is nested in
        it. Raises _Late past its deadline, RuntimeError if it would wait for itself."""
        while not call.inbox:
            if self._session.ended is not None:
                call.inbox.append(_ENDED)  # the end may have come when the call was given up already
            elif call.nested:
                self._session.runner.run_nested(call)
            elif not self.seat:
                self.read_for(call)
            else:
                self._sleep(call)

    def _sleep(self, call: _Call) -> None:
        """Sleep until there may be something to do."""
        seat, left = self.seat, _left(call.deadline)
        if left == 0:
            raise _Late
        try:
            call.gate = gate = _gate()
            self.sleepers[call.number] = call
            if not call.inbox and not call.nested and seat:
                holder = seat.holder()
                if _get_ident() in holder:
                    raise _waits_for_itself(call)
                if not holder:
                    _pool.put(seat.mend)
                gate.acquire(True, min(left, _LOOK_AGAIN) if left > 0 else _LOOK_AGAIN)
        finally:
            call.gate = None
            self.sleepers.pop(call.number, None)
            if not seat:
                self.pass_on()  # this thread may have been woken to read

    def pass_on(self) -> None:
        """Where somebody should read and nobody does, wake one who will."""
        if self.seat:
            return None
        for call in list(self.sleepers.values()):
            gate = call.gate
            if gate is not None:
                return _open(gate)
        if self._session.ended is not None:
            _open(self.vacant)
        elif self.attendant is None:
            if self._session.serving or self.unattended:
                self._attend_if_possible()
            elif self._session.is_open:
                self._attend_soon()
        return None

    def _attend_soon(self) -> None:
        """Where only what is lent asks for a reader: a caller who calls again at once finds the seat free until then."""
        now = time.monotonic()
        if now < self._looked_at:
            return
        self._looked_at = now + 5 * _LAZY
        try:
            _watch.alarm(now + _LAZY, self._attend_if_quiet)
        except RecursionError:
            raise
        except RuntimeError:
            self._looked_at = 0.0  # no thread to be had: the next one who stops reading tries again

    def _is_wanted(self) -> bool:
        """Whether somebody must read though nobody waits."""
        return self._session.ended is None and bool(self.unattended or self._session.is_open)

    def attend(self) -> None:
        """See to it that somebody reads, though nobody waits. Raises RuntimeError if no thread can be started."""
        if self.attendant is None and not self.seat:
            self.attendant = task = [None]
            try:
                _pool.put(self._attend, task)
            except BaseException:
                self.attendant = None
                raise

    def _attend_if_possible(self) -> None:
        try:
            self.attend()
        except RecursionError:
            raise
        except RuntimeError:  # no thread to be had: the calls wait for each other, until the watch can start one
            self._retry = True
            self.be_watched()

    def _attend_if_quiet(self) -> None:
        """It is a while ago that a caller has stopped reading. If none reads now, a thread of the pool does."""
        self._looked_at = 0.0
        if self._is_wanted():
            self._attend_if_possible()

    # -- as the holder of the seat

    def _read(self, waiting: _Call | None = None) -> _Request | None:
        """Hand on what comes, until there is something about the call for which this thread is `waiting`. Without one,
        as the attendant, until there is a call to be run, which is returned, or a caller reads better."""
        calls, receive = self._calls, self._channel.receive
        number = 0 if waiting is None else waiting.number
        while True:
            come = receive(None if waiting is None else waiting.deadline)
            if come is None:
                raise _Late
            while come:
                message = come[0]
                if message[1] & _TAGGED and b'"$own"' in message[4]:
                    message = come[0] = self._session.references.held(message)
                if message[2] == number and message[0] == _RESULT and not message[1] & _STREAM:  # the usual case
                    if waiting.streams is None and number in calls:  # type: ignore[union-attr]
                        waiting.inbox.extend(itertools.starmap(come.popleft, _ONCE))  # type: ignore[union-attr]
                        calls.pop(number, None)
                        continue
                kind = message[0]
                if kind in _ANSWERS:
                    if self._route_answer(come, message, waiting):
                        return None
                elif kind in (_CALL, _NOTIFY):
                    request = self._route_call(come, message, waiting)
                    if request is not None:
                        return request
                else:
                    self._session.steer(come, message)
            message = ()  # what has come is not kept alive by who waits for more
            if waiting is not None and (waiting.inbox or waiting.nested):
                return None

    def _route_answer(self, come: deque[_Message], message: _Message, waiting: _Call | None) -> bool:
        """Put a message into its call's inbox. Returns whether the attendant may go, as a caller reads better."""
        kind, flags, number = message[:3]
        call = self._calls.get(number)
        if call is None:  # it was given up
            if not number:
                self.unattended.discard(0)  # what `probe` waits for
            self._session.once(come, self._session.drop, message)
            return False
        if flags & _STREAM and kind == _RESULT and call.streams is None:
            call.streams = message
        if kind == _ITEM and len(call.inbox) > _WINDOW:  # each has an item at least
            raise ProtocolError("more items of a stream than there is credit for")
        if call.future is not None and kind != _ITEM and (call.streams is None or call.streams is message):
            call.future._arrive(call, come, waiting is None)
        else:
            call.inbox.extend(itertools.starmap(come.popleft, _ONCE))
        if kind != _ITEM and call.streams is not message and self._calls.pop(number, None) is None:
            self._session.caller.forget(call)  # it was given up meanwhile
        self.unattended.discard(number)
        if call.watcher is not None:
            call.watcher()
        if call.gate is not None:
            _open(call.gate)
            if waiting is None and not (self._session.serving or self.unattended):
                self.attendant = None
                return True
        return False

    def _route_call(self, come: deque[_Message], message: _Message, waiting: _Call | None) -> _Request | None:
        """Give a call to who runs it: the thread or the loop that waits for the one on whose behalf it is made, or the
        pool. As the attendant returns any other."""
        _, _, number, parent, _, _ = message
        request = self._requests.get(number)
        if request is None:
            request = self._requests[number] = _Request(self._session, message)
        elif request.message is not message:
            raise ProtocolError("the number of a call is that of another one")
        runner = self._session.runner
        call = self._calls.get(parent) if parent else None
        if call is not None and call.home:
            if call.nested is None:
                call.nested = deque()
            call.nested.extend(itertools.starmap(come.popleft, _ONCE))
            if not call.home:
                runner.disown(call)
            elif call.gate is not None:
                _open(call.gate)
        elif call is not None and call.loop is not None and runner.run_on_loop(call, request):
            come.popleft()
        elif parent or waiting is not None:
            function = runner.run_nested_in_slot if parent else runner.run_in_slot
            requests = map(self._requests.get, map(_number_of, itertools.starmap(come.popleft, _ONCE)))
            try:
                _pool.move(zip((function,), zip(requests)))
            except RecursionError:
                raise
            except RuntimeError as error:  # no thread to be had: that fails the call
                runner.fail(request, error, wait=False)
                come.popleft()
        else:
            come.popleft()
            return request
        return None

    # -- the attendant

    def _attend(self, task: Any) -> None:
        """As a thread of the pool: read while no caller does, and run calls that are quick at once."""
        seat, runner, token = self.seat, self._session.runner, {_get_ident()}
        mine = _ref_to(token)
        try:
            while self.attendant is task:
                if not self._is_wanted() or seat.setdefault(0, mine) is not mine:
                    self.attendant = None  # who stops reading looks for one after that
                    if seat or not self._is_wanted() or self.attendant is not None:
                        return None
                    self.attendant = task
                    continue
                request = self._read()
                if request is None or not runner.slots.take(request):
                    pass
                elif not runner.decode(request):
                    runner.slots.give_back()
                elif self._quick.get(request.method, 0) < 3 or (not self._watched and self._is_rare()):
                    self.attendant = None
                    del seat[0]
                    self.pass_on()  # another thread reads
                    return runner.run_with_slot(request)
                else:
                    self._inline = request.number
                    self.be_watched()
                    del seat[0]
                    runner.run(request)
                    runner.slots.give_back()
                    if self.attendant is not task:
                        return None
                    self._inline = -request.number
                request = None
                if seat[0] is mine:
                    del seat[0]
        except BaseException as error:  # no memory is left, say: what it was to do would be waited for in vain
            self._session.end(error)
        finally:
            if seat[0] is mine:
                del seat[0]
            if self.attendant is task:
                self.attendant = None
            self.pass_on()

    def took(self, method: str, seconds: float) -> None:
        """A method has run that long."""
        runs = self._quick.get(method, 0)
        if seconds > _QUICK or runs < 3:
            if len(self._quick) > 1000:
                self._quick.clear()  # an object that answers every name
            self._quick[method] = 0 if seconds > _QUICK else runs + 1

    def _is_rare(self) -> bool:
        """Whether no call came for a while: then another thread reads, which costs less than to be watched."""
        last, self._last = self._last, time.monotonic()
        return self._last - last > _LOOK

    def be_watched(self) -> None:
        if not self._watched:
            self._watched = True
            _watch.look_after(self)

    def look(self) -> bool:
        """Called by the watch now and then. Returns whether it shall look again."""
        if self._session.ended is not None:
            return False
        if self._channel.posted:
            self._session.flush()  # what finalizers have left
        if self._retry:
            self._retry = False
            self.pass_on()
        inline = self._inline
        if inline != self._seen:
            self._seen = inline
            return True
        if not self.seat and self._is_wanted():  # a call has outlasted a whole look: another thread reads
            self.attendant = None
            self._attend_if_possible()
            return True
        if inline > 0:
            return True
        self._watched = False
        if self._inline != inline or self._channel.posted:
            self._watched = True
        return self._watched


def _number_of(message: _Message) -> int:
    return message[2]  # type: ignore[no-any-return]


def _first_of(what: Any, _: Any) -> Any:
    return what


class _Caller:
    """Our calls, from the proxy to the answer. Any thread, from any number of them at once. What may be left when a
    handler raises is cleared up by a thread of the pool (`give_up`), where none strikes again. It is told in the first
    step of an `except`, which has no call before it: so nothing strikes before that, in Python 3.10 and later."""

    def __init__(self, session: _Session) -> None:
        self._session = session
        self._reader = session.reader
        self._codec = session.codec
        self._numbers = session.numbers
        self._calls = session.calls

    def call(self, target: int, method: str, args: Sequence[Any], kwargs: dict[str, Any], seconds: float | None) -> Any:
        """Call and wait for the answer, which may be a Stream. Raises what the method raised, CallTimeout, _Sealed, and
        what the session's `lost` said when the connection ends."""
        if _loop_threads and _get_ident() in _loop_threads:
            raise RuntimeError(f"{method}() would block the event loop of the async methods: await {method}.submit(...)")
        call = _Call(next(self._numbers), method, seconds)
        try:
            call.lent = []
            self._start(call, _CALL, self._codec.dumps_call(target, method, args, kwargs, call.lent))
            reader = self._reader
            if not reader.seat:
                reader.read_for(call)
            if not call.inbox:
                reader.wait(call)
            call.home = False
            if call.nested:
                self._session.runner.disown(call)
            if call.number in self._calls and call.streams is None:  # who read was struck before that
                self._calls.pop(call.number, None)
            return self.value(call, call.inbox[0])
        except BaseException as error:
            if call.decoded is None:
                _watch.tasks.put((_aside_in_pool, (self.give_up, call)))
            if type(error) is _Late:
                self.give_up(call)
                raise _too_late(call) from None
            raise

    def submit(self, future: Any, target: int, method: str, args: Sequence[Any], kwargs: dict[str, Any],
               seconds: float | None) -> _Call:
        """Call; the future, a Call, has the answer when it has come. Raises what sending raises."""
        call = future._call = _Call(next(self._numbers), method, seconds)
        call.session, call.future, call.home, call.lent = self._session, future, False, []
        asyncio = sys.modules.get("asyncio")
        call.loop = asyncio._get_running_loop() if asyncio is not None else None
        if call.loop is not None:
            call.context = _import("contextvars").copy_context()
        try:
            self._reader.unattended.add(call.number)
            self._reader.attend()  # first: without a thread to read the answer nothing is sent
            self._start(call, _CALL, self._codec.dumps_call(target, method, args, kwargs, call.lent))
            if call.deadline is not None:
                self._session.alarm(call.deadline)
        except _Late:
            self.give_up(call)
            future._fail(_too_late(call))
        except BaseException:
            if call.decoded is None:
                _watch.tasks.put((_aside_in_pool, (self.give_up, call)))
            raise
        return call

    def notify(self, target: int, method: str, args: Sequence[Any], kwargs: dict[str, Any],
               seconds: float | None) -> None:
        """Call, and want no answer. Raises what sending raises."""
        call = _Call(next(self._numbers), method, seconds)
        try:
            call.lent = []
            self._start(call, _NOTIFY, self._codec.dumps_call(target, method, args, kwargs, call.lent))
            self._reader.pass_on()  # it may lend something
            self._calls.pop(call.number, None)
        except BaseException as error:
            if call.decoded is None:
                _watch.tasks.put((_aside_in_pool, (self.give_up, call)))
            if type(error) is _Late:
                self.give_up(call)
                raise _too_late(call) from None
            raise

    def ping(self, seconds: float) -> float:
        """Seconds that a message takes there and back. Raises as `call` does."""
        call = _Call(next(self._numbers), "ping", seconds)
        start = time.perf_counter()
        try:
            self._start(call, _PING, _NOTHING)
            self._reader.wait(call)
            self._calls.pop(call.number, None)
            self.value(call, call.inbox[0], _PONG)
        except BaseException as error:
            if call.decoded is None:
                _watch.tasks.put((_aside_in_pool, (self.give_up, call)))
            if type(error) is _Late:
                self.give_up(call)
                raise _too_late(call) from None
            raise
        return time.perf_counter() - start

    def next(self, call: _Call) -> _Message:
        """The next message of a stream, which stays in the inbox. Raises as `call` does."""
        if not call.inbox:
            if _loop_threads and _get_ident() in _loop_threads:
                raise RuntimeError(f"{call.method}() would block the event loop of the async methods: use async for")
            call.deadline = None if call.seconds is None else time.monotonic() + call.seconds
            try:
                call.home = True
                self._reader.wait(call)
            except BaseException as error:
                _watch.tasks.put((_aside_in_pool, (self.give_up, call)))
                if type(error) is _Late:
                    self.give_up(call)
                    raise _too_late(call) from None
                raise
            finally:
                call.home = False
                if call.nested:
                    self._session.runner.disown(call)
        return call.inbox[0]

    def _parent(self) -> int:
        """The number of the other side's call on whose behalf this thread calls, or 0."""
        request = _current.get()
        while request is not None and request.session is not self._session:
            request = request.outer  # this side is called through another session
        return 0 if request is None else request.number

    def _start(self, call: _Call, kind: int, content: Any) -> None:
        session = self._session
        self._calls[call.number] = call
        if session.sealed:  # only now, as the end fails those that are there
            raise _Sealed
        session.send(kind, 0, call.number, content, self._parent() if _current.get() is not None else 0, True,
                     call.deadline)
        if session.channel.posted and session.channel.is_mine() and kind != _NOTIFY and call.future is None:
            raise _waits_for_itself(call)

    def value(self, call: _Call, message: _Message, expected: int = _RESULT) -> Any:
        """What a message that ends a call, or begins its stream, stands for. Raises what it says."""
        kind, flags, _, _, body, _ = message
        try:
            value = self._session.decode(message, call) if body else None
        except _Undecodable as error:
            raise error.args[0] from None
        except ProtocolError as error:
            raise self._session.failed(error, call) from None
        if kind == expected:
            return Stream(self._session, call) if flags & _STREAM else value
        if kind == _ERROR:
            raise self._raised(call, value)
        if kind == 0:
            raise self._session.ended(self._session.lost_calls)  # type: ignore[misc]
        raise self._session.failed(ProtocolError(f"a message of kind {kind} answers {call.method}()"), call)

    def _raised(self, call: _Call, body: Any) -> BaseException:
        """The exception that a call has raised: what began here comes home as itself."""
        home = body.get("home") if type(body) is dict else None
        if call.raised is not None and type(home) is int and home in call.raised:
            return call.raised[home]
        error = _decode_error(body)
        if isinstance(error, RemoteError):
            vars(error)["_origin"] = (_ref_to(self._session), call.number)
        return error  # type: ignore[no-any-return]

    def give_up(self, call: _Call) -> None:
        """Want nothing more of a call. The other side is told, unless it is over. (This may be repeated.)"""
        session = self._session
        call.home = False
        self._reader.unattended.discard(call.number)
        session.references.unlend(call.lent)
        session.runner.disown(call)
        for message in call.running:  # a handler has raised in the midst of that, or before it could begin
            session.runner.run_after_all(message)
        is_open = call.number in self._calls and session.ended is None
        if is_open:
            session.post(_CANCEL, call.number)
        self._calls.pop(call.number, None)
        self.forget(call)
        if call.streams is not None:
            call.inbox.append((_END, 0, call.number, 0, b"", ()))  # for a thread that waits for items
            if call.gate is not None:
                _open(call.gate)
            if is_open:  # that thread may be the one that reads; and the producer may wait to send: read until a ping is
                self.probe(next(self._numbers))  # answered
        self._reader.pass_on()
        session.flush()

    def forget(self, call: _Call) -> None:
        """Want nothing of what has come about a call."""
        while call.inbox:
            try:
                message = call.inbox.popleft()
            except IndexError:
                return  # another thread was quicker
            if message is not call.decoded:
                self._session.drop(message)

    def probe(self, number: int = 0) -> bool:
        """Ping without waiting, unless the last such ping is still out. Returns whether it was not."""
        if number in self._reader.unattended:
            return False
        self._reader.unattended.add(number)
        if number:
            self._calls[number] = ping = _Call(number, "ping", None)
            ping.home = False
        self._session.post(_PING, number)
        self._reader.pass_on()
        return True

    def expire(self) -> None:
        """Fail submitted calls whose deadline has come. Called by the session's alarm."""
        now, soonest = time.monotonic(), None
        for call in list(self._calls.values()):
            if call.future is None or call.deadline is None or call.streams is not None:
                continue
            if call.deadline <= now:
                self.give_up(call)
                call.future._fail(_too_late(call))
            elif soonest is None or call.deadline < soonest:
                soonest = call.deadline
        if soonest is not None:
            self._session.alarm(soonest)


class _Runner:
    """Their calls: decode, run, answer. `run_nested` and `run` are for the thread that waits for the call on whose behalf
    one is made; `run_on_loop` and `disown` for who routes; all others for threads of the pool."""

    def __init__(self, session: _Session, slots: _Slots) -> None:
        self._session = session
        self._requests = session.requests
        self._calls = session.calls
        self._codec = session.codec
        self.slots = slots
        self._nested_slots = _Slots(_NESTED)

    # -- which thread

    def run_in_slot(self, request: _Request | None) -> None:
        if request is not None and self.slots.take(request):
            self.run_with_slot(request)

    def run_nested_in_slot(self, request: _Request | None) -> None:
        if request is not None and self._nested_slots.take(request):
            self.run_with_slot(request)

    def run_with_slot(self, request: _Request) -> None:
        """Run a call that has a slot, and with the same slot those that wait for one."""
        slots: Any = request.slots
        try:
            self.run(request)
            while slots.queue:
                try:
                    request = slots.queue.popleft()
                except IndexError:
                    break
                request.session.runner.run(request)
        finally:
            slots.give_back()

    def run_nested(self, call: _Call) -> None:
        """As the thread that waits for a call: run one that is made on its behalf."""
        call.home = False  # this thread is busy: what comes now others run
        running: deque[Any] = deque()
        call.running = running
        running.extend(itertools.starmap(call.nested.popleft, _ONCE))  # type: ignore[union-attr]
        self.disown(call)
        request = self._requests.get(running[0][2])
        if request is not None:
            request.at_home = True
            self.run(request)
        running.clear()
        call.home = True

    def disown(self, call: _Call) -> None:
        """The thread that waited for a call does not run what is nested in it: the pool does."""
        while call.nested:
            try:
                messages = itertools.starmap(call.nested.popleft, _ONCE)
                requests = map(self._requests.get, map(_number_of, messages))
                _pool.move(zip((self.run_nested_in_slot,), zip(requests)))
            except IndexError:
                pass  # another thread was quicker

    def run_after_all(self, message: _Message) -> None:
        """Its thread has gone before it began to run this, or in the midst of it."""
        request = self._requests.get(message[2])
        if request is not None and request.begun:
            self.fail(request, KeyboardInterrupt())
        elif request is not None:
            self.run_nested_in_slot(request)

    def run_on_loop(self, call: _Call, request: _Request) -> bool:
        """Have the loop that waits for a call run one made on its behalf. False if that is closed."""
        request.loop = call.loop
        try:
            call.loop.call_soon_threadsafe(self.run, request, context=call.context)
            return True
        except RuntimeError:
            request.loop = None
            return False

    # -- running

    def decode(self, request: _Request) -> bool:
        """Make the call of what has come. False: it is answered already. Raises ProtocolError."""
        message, request.message = request.message, None
        try:
            call = self._session.decode(message, request)  # type: ignore[arg-type]
        except _Undecodable as error:
            return self.fail(request, error.args[0], own=True)
        if (type(call) is not list or len(call) < 4 or type(call[1]) is not str or type(call[2]) is not list
                or type(call[3]) is not dict):
            raise ProtocolError("a call is [target, method, [argument, ...], {name: argument, ...}]")
        request.body, request.method = call, call[1]
        if self._session.closing is not None:
            return self.fail(request, PluginClosed("the plugin is shutting down"), own=True)
        return True

    def run(self, request: _Request) -> None:
        """Run a call of the other side's and answer it, or go on with its stream. Whatever the method raises is an
        answer too."""
        if request.producer is not None:
            return self._go_on(request)
        if request.begun:
            return None
        own = True  # whether a PluginError would be about this call itself
        request.outer = outer = _current.get()
        try:
            request.begun = True
            _current.set(request)
            if request.body is None and not self.decode(request):
                return None
            start = time.monotonic()
            target, method, args, kwargs = request.body[:4]
            function = self._session.references.resolve(target, method)
            own = target == 0
            value = function(*args, **kwargs)
            self._session.reader.took(method, time.monotonic() - start)
            if type(value) not in _ATOMS and self._is_more(request, value):
                return None
            own = True
            self.answer(request, value)
        except BaseException as error:
            self._failed(request, error, own)
        finally:
            _current.set(outer)
            request.body = args = kwargs = None  # not kept alive by a frame that lingers
        return None

    def _failed(self, request: _Request, error: BaseException, own: bool) -> None:
        """A call has ended with an exception. If it had been answered before, or is Ctrl-C, that goes on to who waits."""
        kind = type(error)  # isinstance() would ask the exception itself
        if issubclass(kind, ProtocolError) and request.body is None:
            return self._session.end(error)
        unanswered = self._requests.get(request.number) is request and (request.lent or not request.sending)
        if not unanswered:
            self.finish(request)
        else:
            own = own and issubclass(kind, PluginError)
            if _in_main_thread() or issubclass(kind, RecursionError):  # no handler strikes there, and there is room
                _aside_in_pool(self.fail, request, error, own)
            else:
                self.fail(request, error, own)
        if not unanswered or _is_ctrl_c(error):
            raise error
        return None

    def _is_more(self, request: _Request, value: Any) -> bool:
        """Whether what a method has returned is not its answer yet: a coroutine, or a stream."""
        kind = type(value)
        if hasattr(kind, "__await__"):
            self._run_as_task(request, self._await(request, value))
        elif hasattr(kind, "__next__") or hasattr(kind, "__anext__"):
            self._stream(request, value)
        else:
            return False
        return True

    def answer(self, request: _Request, value: Any) -> None:
        """Answer with what a method has returned."""
        if request.kind == _CALL and not request.cancelled:
            try:
                request.lent = []
                content = self._codec.dumps(value, "the result", request.lent)
                if request.at_home:
                    request.lent.append(0)
                    request.sending = True
                self._session.send(_RESULT, 0, request.number, content)
            except PluginError as error:  # it cannot travel
                name = f"{request.method}()" if request.method else "the function"
                self.fail(request, _renamed(error, "the result", f"the result of {name}"), own=True)
                return
        elif type(value) is _Ref:  # an instance that was dispensed in vain is to be exited
            lent: list[int] = []
            references = self._session.references
            references.lend(self._session, value, lent)
            references.unlend(lent)
        self.finish(request)

    def finish(self, request: _Request) -> None:
        """The call has been answered."""
        self._requests.pop(request.number, None)
        if self._session.closing is not None and not self._requests:
            _open(self._session.drained)

    def fail(self, request: _Request, error: BaseException, own: bool = False, wait: bool = True) -> bool:
        """Answer with an exception, unless it has been answered. Returns False."""
        session = self._session
        if session.is_abandoned:
            _leave_fork(error)
        if self._requests.get(request.number) is not request:
            return False
        session.references.unlend(request.lent)
        if request.kind == _NOTIFY:
            _import("traceback").print_exception(type(error), error, error.__traceback__)
        elif not request.cancelled:
            self._remember(request, error)
            tell: Callable[[], Any]
            for tell in (partial(_encode_error, error, own), partial(_encode_error, error, own, bare=True),
                         partial(dict, message="an exception that cannot be told")):
                try:
                    body = self._with_home(tell(), error)
                    session.send(_ERROR, 0, request.number, self._codec.dumps(body, "the exception"), wait=wait)
                    break
                except BaseException as problem:  # its arguments cannot travel, or are too long, or it is a trap
                    if _is_ctrl_c(problem):
                        raise
        self.finish(request)
        return False

    def _remember(self, request: _Request, error: BaseException) -> None:
        """What has been raised here, on behalf of a call of ours, may come home as that one's."""
        call = self._calls.get(request.parent) if request.parent else None
        if call is not None and _ENDING.isdisjoint([base.__name__ for base in type.mro(type(error))]):
            call.raised = dict([*(call.raised or {}).items()][1 - _RAISED :])
            call.raised[request.number] = error

    def _with_home(self, body: dict[str, Any], error: BaseException) -> dict[str, Any]:
        """The same, if it has come from the other side, with the number of the call that had raised it here."""
        if issubclass(type(error), RemoteError):
            origin, number = vars(error).get("_origin") or (lambda: None, None)
            if origin() is self._session:
                return {**body, "home": number}
        return body

    # -- coroutines and streams

    def _run_as_task(self, request: _Request, coroutine: Any) -> None:
        """Run a coroutine on the loop of who waits for it, or on the one that the async methods share."""
        def begin() -> None:
            _current.set(request)
            request.task = task = _import("asyncio").ensure_future(coroutine)
            if request.cancelled and request.producer is None:  # once it has begun, or nothing would finish the request
                _import("asyncio").get_running_loop().call_soon(task.cancel)

        if request.loop is not None:
            return begin()
        if not request.on_loop(begin):
            coroutine.close()
            self.fail(request, PluginClosed("the plugin is shutting down"), own=True)
        return None

    async def _await(self, request: _Request, awaitable: Any) -> None:
        try:
            value = await awaitable
            request.task = None
            if type(value) in _ATOMS or not self._is_more(request, value):
                self.answer(request, value)
        except BaseException as error:
            self.fail(request, error)

    def _stream(self, request: _Request, iterator: Any) -> None:
        """Answer with a stream."""
        request.producer = _Producer(request, iterator)
        if request.kind == _NOTIFY:
            request.cancelled = True  # nobody will read it
        else:
            self._session.send(_RESULT, _STREAM, request.number, _NOTHING)
        if hasattr(type(iterator), "__anext__") or _get_ident() in _loop_threads or request.loop is not None:
            self.resume(request)
        else:
            request.producer.run()

    def resume(self, request: _Request) -> None:
        """Have somebody go on with a stream."""
        if hasattr(type(request.producer.iterator), "__anext__"):  # type: ignore[union-attr]
            request.on_loop(partial(self._go_on, request))
        elif request.parent:
            _aside_in_pool(self.run_nested_in_slot, request)
        elif self.slots.take(request):  # first: a thread for each that finds no slot would be one too many
            _aside_in_pool(self.run_with_slot, request)

    def _go_on(self, request: _Request) -> None:
        producer: Any = request.producer
        if hasattr(type(producer.iterator), "__anext__"):
            _current.set(request)
            request.task = _import("asyncio").ensure_future(producer.run_async())
        else:
            outer = _current.get()
            try:
                _current.set(request)
                producer.run()
            finally:
                _current.set(outer)


class _Producer:
    """The sending end of a stream: it takes from an iterator what the other side has given credit for. Items that come
    quickly gather, and leave together; a slow producer's leave one by one, when they are made.

    `credit` is what has come of it: who routes adds to it, and calls `resume`. One thread, or one task, produces: the
    one that is `_running`. `_lock` protects `_group`, `_size` and `_last`, and is held while items leave, so that they
    leave in order.
    """

    def __init__(self, request: _Request, iterator: Any) -> None:
        self._request = request
        self._session = request.session
        self.iterator = iterator
        self.credit: deque[int] = deque()
        self._granted, self._used = _WINDOW, 0  # items for which there was credit; that were made
        self._running: dict[int, Any] = {}
        self._over = False  # whether the end has been told
        self._lock = threading.Lock()
        self._group: list[Any] = []  # items that wait for others
        self._size = 0  # of those, in bytes
        self._last = 0.0  # when some left
        self._alarmed = False  # whether those that wait are seen to

    def grant(self, count: int) -> None:
        """There is credit for so many more items."""
        self.credit.append(count)
        self.resume()

    def resume(self) -> None:
        """There is credit, or the stream is given up: have it go on, if it waits for that."""
        if not self._running:
            self._session.runner.resume(self._request)

    def _has_credit(self) -> bool:
        while self.credit:
            self._granted += self.credit.popleft()
        return self._used < self._granted

    def _begin(self) -> Any:
        """What to hold while this produces; None if there is nothing to be done, or somebody else does it."""
        token = [None]
        waits = self._over or not (self._request.cancelled or self.credit or self._used < self._granted)
        return None if waits or self._running.setdefault(0, token) is not token else token

    def run(self) -> None:
        """Produce, until the end or until there is no credit."""
        while self._begin() is not None:
            ended, error = True, None
            try:
                while self._has_credit() and not self._request.cancelled:
                    self._put(next(self.iterator))
                ended = self._request.cancelled
                self.flush()
            except StopIteration:
                pass
            except BaseException as problem:
                ended, error = True, problem
            if ended:
                self._end(error)
            self._running.clear()

    async def run_async(self) -> None:
        """The same for an async iterator."""
        while self._begin() is not None:
            ended, error = True, None
            try:
                while self._has_credit() and not self._request.cancelled:
                    self._put(await self.iterator.__anext__())
                ended = self._request.cancelled
                if ended and hasattr(self.iterator, "aclose"):
                    await self.iterator.aclose()
                self.flush()
            except StopAsyncIteration:
                pass
            except BaseException as problem:
                ended, error = True, problem
            if ended:
                self._request.task = None
                self._end(error)
            self._running.clear()

    def _put(self, item: Any) -> None:
        """Encode an item, now, as its maker may change it; and send it, or let it wait for others."""
        lent: list[int] = []
        try:
            content = self._session.codec.dumps(item, "an item", lent)
            self._session.check_size(content)
        except PluginError as error:
            self._session.references.unlend(lent)
            raise _renamed(error, "an item", f"item {self._used} of {self._request.method}()") from None
        self._used += 1
        with self._lock:
            self._group.append(content)
            self._size += len(content[0])
            now = time.monotonic()
            full = len(self._group) >= _WINDOW // 2 or self._size >= _READ_SIZE or content[1]
        if full or now - self._last > _GATHER:
            self.flush()
        elif not self._alarmed:
            self._alarmed = True
            _watch.alarm(now + 3 * _GATHER, self._flush_late)

    def _flush_late(self) -> None:
        self._alarmed = False
        self.flush()

    def flush(self) -> None:
        """Send what has gathered: in one message what fits, and one that has buffers alone."""
        with self._lock:
            group, self._group, self._size = self._group, [], 0
            while group:
                count, size = 1, len(group[0][0])
                while count < len(group) and not (group[count - 1][1] or group[count][1]):
                    size += len(group[count][0]) + 1
                    if size + 2 > self._session.send_limit:
                        break
                    count += 1
                self._send(group[:count])
                del group[:count]
            self._last = time.monotonic()

    def _send(self, group: list[Any]) -> None:
        lent = [number for content in group for number in content[3]]
        if self._request.cancelled:
            return self._session.references.unlend(lent)  # type: ignore[no-any-return]
        body = b"[" + b",".join([content[0] for content in group]) + b"]"
        tagged = max(content[2] for content in group)
        return self._session.send(_ITEM, 0, self._request.number, (body, group[0][1], tagged, lent))

    def _end(self, error: BaseException | None) -> None:
        """Send the rest and the end, and be done with the call."""
        self._over = True
        request, runner = self._request, self._session.runner
        self.flush()
        try:
            if hasattr(self.iterator, "close"):
                self.iterator.close()
        except BaseException as problem:
            error = error or problem
        if error is not None:
            runner.fail(request, error, own=issubclass(type(error), (NotSerializable, MessageTooLarge)))
        else:
            if not request.cancelled:
                self._session.send(_END, 0, request.number, _NOTHING)
            runner.finish(request)


class _Session:
    """Both directions of one connection, for any thread: what its rooms share, and its end.

    `references` is what this side serves and lends (_References); `borrow(session, tag, state)` makes the proxy for what
    the other side lends. `lost` is called when the connection has ended, with the cause; it returns what turns the names
    of the methods whose calls are lost into the exception that they raise.

        open --seal--> sealed --end--> ended       any --end--> ended

    `sealed`: it takes no more calls. `ended` is None until it has ended; then `sealed` is true as well.
    """

    def __init__(self, channel: _Channel, terms: _Terms, max_message: int, references: Any, borrow: Callable[..., Any],
                 lost: Callable[[BaseException], Callable[[list[str]], BaseException]],
                 serving: bool = False, slots: _Slots | None = None) -> None:
        self.channel = channel
        self.protocol_version: int = terms.protocol_version
        self.references = references
        self.codec = _Codec(partial(references.lend, self), references.unlend, partial(borrow, self))
        self.codec.arrays = "arrays" in terms.features
        self.send_limit: int = terms.max_message
        self.call_timeout: float | None = None  # the deadline of calls that have no other
        self.serving = serving
        self.numbers = itertools.count(1)
        self.calls: dict[int, _Call] = {}  # ours, open
        self.requests: dict[int, _Request] = {}  # theirs, open
        self.borrowed: set[int] = set()  # the ids of what stands here for objects of the other side's
        self.sealed = False
        self.ended: Callable[[list[str]], BaseException] | None = None  # makes the error, once it has
        self.cause: BaseException | None = None  # why it has
        self.lost_calls: list[str] = []  # the methods that were being called then
        self.is_abandoned = False  # in a forked child
        self.closing: float | None = None  # the grace in seconds, once the host has said stop; -1: gone without a word
        self.finished = _gate()  # opens when the other side says stop or is gone
        self.drained = _gate()  # opens when the last of their calls has ended after that
        self._lost = lost
        self._next_alarm: float | None = None
        self._last_asked = 0  # the number taken by the last `unused`
        self.reader = _Reader(self)
        self.runner = _Runner(self, slots or _Slots(64))
        self.caller = _Caller(self)
        self.call, self.submit, self.notify = self.caller.call, self.caller.submit, self.caller.notify
        self.ping, self.probe = self.caller.ping, self.caller.probe
        channel.stuck, channel.later = self.reader.pass_on, self._flush_later
        channel.gone = lambda error: None if self.cause is not None else self.end(error)
        channel.begin(max_message)
        _sessions.add(self)
        try:
            _watch.start()
        except BaseException:
            _sessions.discard(self)
            raise
        if serving:
            self.reader.pass_on()

    @property
    def is_open(self) -> bool:
        """Whether calls may come in."""
        return bool(self.serving or self.requests or self.references.lends)

    # -- sending

    def send(self, kind: int, flags: int, number: int, content: Any, parent: int = 0, wait: bool = True,
             deadline: float | None = None) -> None:
        """Send what the codec made. Raises MessageTooLarge, and _Late past the deadline."""
        body, buffers, tagged, lent = content
        if len(body) > self.send_limit or buffers:
            self.check_size(content)
        try:
            self.channel.send((kind, flags | tagged, number, parent), body, buffers, lent, wait, deadline)
        except _Broken:
            self.channel.shutdown()  # what had come before is still read, up to the end of the connection

    def check_size(self, content: Any) -> None:
        """Raises MessageTooLarge for what the other side does not take."""
        size, limit = len(content[0]) + sum(map(len, content[1])), self.send_limit
        if size > limit:
            text = f"a message of {size} bytes, where the other side takes {limit}: raise its max_message, or send it in parts"
            raise MessageTooLarge(text, size=size, limit=limit)

    def post(self, kind: int, number: int, value: Any = None) -> None:
        """Send a small message without waiting."""
        content = _NOTHING if value is None else self.codec.dumps(value, "a message")
        self.send(kind, 0, number, content, wait=False)

    def discard(self, notices: Iterable[list[_Bytes]]) -> None:
        """Have references given back: finalizers call this, which may run at any moment, inside any lock. It leaves with
        what is sent next, or when the watch looks."""
        if self.ended is None:
            self.channel.posted.extend(notices)
            self.reader.be_watched()

    def flush(self) -> None:
        """Write what is left, without waiting."""
        try:
            self.channel.write([], (), False)
        except _Broken:
            self.channel.shutdown()

    def _flush_later(self) -> None:
        _aside_in_pool(self._flush_waiting)

    def _flush_waiting(self) -> None:
        self.channel.writer.mend()
        try:
            self.channel.write([])
        except _Broken:
            self.channel.shutdown()

    def alarm(self, when: float) -> None:
        """Have the deadlines of submitted calls looked at then."""
        if self._next_alarm is None or when < self._next_alarm:
            self._next_alarm = when
            _watch.alarm(when, self._ring)

    def _ring(self) -> None:
        self._next_alarm = None
        if self.ended is None:
            self.caller.expire()

    # -- what is neither a call nor an answer

    def steer(self, come: deque[_Message], message: _Message) -> None:
        """As the reader: the first of `come` is about a call, a reference, or the whole. To repeat this does no harm."""
        kind, flags, number, _, body, _ = message
        request = self.requests.get(number)  # None: it has ended meanwhile
        if kind == _RELEASE:
            return self.once(come, self.references.release_unless_busy, number)
        if kind == _CREDIT:
            count = self.codec.loads(body, (), 0) if body else None
            if type(count) is not int or not 0 < count <= _WINDOW:
                raise ProtocolError(f"a credit of {_shown(count)} items")
            if request is not None and request.producer is not None:
                return self.once(come, request.producer.grant, count)
        elif kind == _PING:
            self.post(_PONG, number)
        elif kind == _CANCEL:
            if request is not None:
                request.cancel()
        elif kind == _SHUTDOWN and self.serving:
            grace: Any = self.codec.loads(body, (), 0) if body else None
            self.stop(max(0.0, float(grace)) if type(grace) in (int, float) else 0.0)
        elif not flags & _IGNORABLE:
            raise ProtocolError(f"a message of the unknown kind {kind}")
        come.popleft()
        return None

    @staticmethod
    def once(come: deque[_Message], function: Callable[[Any], Any], what: Any) -> None:
        """Call a function for the first of `come`, which must neither be lost nor done twice: where a handler may raise,
        the message is handed to the pool in one step."""
        if _in_main_thread():
            try:
                return _pool.move(zip((function,), zip(map(_first_of, (what,),
                                                           itertools.starmap(come.popleft, _ONCE)))))
            except RecursionError:
                raise
            except RuntimeError:
                pass  # no thread to be had
        come.popleft()
        return function(what)  # type: ignore[no-any-return]

    def decode(self, message: _Message, owner: Any) -> Any:
        """The value of a message about a call or request. References in it are borrowed in a thread where no handler
        strikes: so none gets lost halfway. Raises as the codec does."""
        _, flags, _, _, body, buffers = message
        if flags & _TAGGED and b'"$ref"' in body and _in_main_thread():
            ticket = [message]
            try:
                return _in_pool(self._decode, ticket, owner)
            finally:
                ticket.clear()  # once this thread has gone that one does not begin
        owner.decoded = message
        return self.codec.loads(body, buffers, flags & _TAGGED)

    def _decode(self, ticket: list[_Message], owner: Any) -> Any:
        vars(owner).update(zip(("decoded",), itertools.starmap(ticket.pop, _ONCE)))  # one step: it has begun
        _, flags, _, _, body, buffers = owner.decoded
        return self.codec.loads(body, buffers, flags & _TAGGED)

    def drop(self, message: _Message) -> None:
        """A message that nobody wants any more: references in it are given back."""
        _, flags, _, _, body, buffers = message
        if flags & _TAGGED and self.ended is None:
            try:
                self.codec.loads(body, buffers, True)
            except (_Undecodable, ProtocolError):
                pass  # it does not matter any more

    # -- the end

    def stop(self, grace: float) -> None:
        """Take no more of their calls, and tell those that run that they are given up."""
        self.closing = grace
        for request in list(self.requests.values()):
            request.cancel()
        _open(self.finished)

    def drain(self, seconds: float) -> None:
        """Wait until the calls that run have ended, at most that long."""
        deadline = time.monotonic() + seconds
        while self.requests and self.drained.acquire(True, _left(deadline)):
            pass

    def busy(self) -> bool:
        """Whether any call or stream is under way, or a reference left, either way."""
        return bool(self.calls or self.requests or self.borrowed or self.references.lends)

    def unused(self) -> bool:
        """Whether it is not busy, and no call has begun since this was asked last. One thread asks."""
        before, self._last_asked = self._last_asked, next(self.numbers)
        return self._last_asked == before + 1 and not self.busy()

    def keep_reading(self) -> None:
        """Have somebody read from now on though nobody calls."""
        self.reader.unattended.add(-1)
        self.reader.pass_on()

    def ask_to_end(self, grace: float) -> None:
        """Tell the plugin to end, within so many seconds."""
        self.post(_SHUTDOWN, 0, grace)

    def seal(self) -> bool:
        """Take no more calls, unless it is busy. Returns whether it takes none. (A call is among `calls` before it looks
        whether it may be sent: so none slips through.)"""
        self.sealed = True
        self.sealed = self.ended is not None or not self.busy()
        return self.sealed

    def failed(self, error: BaseException, call: _Call) -> BaseException:
        """End the connection for what the other side should not have sent; returns what the call is to raise."""
        self.end(error)
        return self.ended([*{call.method: None, **dict.fromkeys(self.lost_calls)}])  # type: ignore[misc]

    def end(self, cause: BaseException) -> None:
        """The connection has ended: fail every call that waits, and let every thread go. Any thread; the first one ends
        it. `cause`: a _Broken, whose argument counts, or what the other side has done."""
        cause = cause.args[0] if type(cause) is _Broken else cause
        self.cause = self.cause or cause  # the first one is the reason of the others
        self.channel.shutdown()
        make_error = self._lost(self.cause)
        if self.ended is None:
            self.lost_calls = [call.method for call in list(self.calls.values())]
            self.ended = make_error
        self.sealed = True
        for call in list(self.calls.values()):
            if call.future is not None and call.streams is None:
                _aside_in_pool(call.future._settle, call, _ENDED)
            else:
                call.inbox.append(_ENDED)
            self.calls.pop(call.number, None)
            if call.watcher is not None:
                call.watcher()
            if call.gate is not None:
                _open(call.gate)
        self.stop(-1.0 if self.closing is None else self.closing)
        _sessions.discard(self)
        if not _sessions:
            _pool.retire()
            _watch.tasks.put((bool, ()))  # it ends

    def abandon(self) -> None:
        """In a forked child: leave the connection to its parent."""
        self.ended = lambda calls: PluginError("the connection belongs to the process that this one was forked from")
        self.sealed = self.is_abandoned = True
        self.channel.abandon()  # type: ignore[attr-defined]
        self.reader.seat = _Seat()

    def dispose(self) -> None:
        """Close the channel, once nobody uses it. Not for a thread that reads."""
        self.channel.shutdown()
        token = {_get_ident()}
        mine = _ref_to(token)
        for _ in range(5):
            if self.reader.seat.setdefault(0, mine) is mine:
                return self.channel.close()
            self.reader.vacant.acquire(True, 0.1)  # in vain, if somebody has closed the descriptor: that wakes nobody
        return None


# === 6. dispatcher ======================================================================================
#
# Names to methods, as xmlrpc.server does it: a method is looked up on the served object, never by a name that
# begins with "_"; and an object with its own _dispatch(method, args, kwargs) answers every name itself.

def _method_names(obj: Any) -> list[str] | None:
    """The public methods of an object, sorted; None if it answers every name. No property is run for that."""
    kind = obj if isinstance(obj, type) else type(obj)
    if issubclass(type(obj), _Remote):
        return None if obj._names is None else list(obj._names)
    if callable(getattr(kind, "_dispatch", None)):
        return None
    if hasattr(type(obj), "__code__") or hasattr(type(obj), "__self__"):
        return []  # a function: there is nothing to it but to be called
    found = {name: getattr(kind, name, None) for name in dir(kind)}
    if kind is not obj:
        found.update(getattr(obj, "__dict__", {}))
    return sorted(name for name in found if not name.startswith("_") and callable(found[name]))


def _no_method(name: str, names: Iterable[str] | None, where: str, what: str = "method") -> MethodNotFound:
    matches = _import("difflib").get_close_matches(name, list(names or ()), cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""
    if name.startswith("_"):
        hint = ": names that begin with an underscore are private to the plugin"
    text = f"has no {what} {name!r}{hint}" if name else "cannot be called, only its methods"
    return MethodNotFound(f"{where} {text}", name=name, matches=matches)


def _makes_instances(served: Any) -> bool:
    """Whether what is served is a class or a zero-argument factory, and not the object itself. A function
    that needs arguments is there to be called; so is one with *args or **kwargs, or in C, if it takes any."""
    kind, in_c = type(served).__name__, "builtin_function_or_method"
    if isinstance(served, type) or kind not in ("function", "method", "partial", in_c):
        return isinstance(served, type)
    of_class = isinstance(getattr(served, "func", None), type)  # a partial, which has what the class needs
    try:
        parameters = _import("inspect").signature(served).parameters.values()
    except ValueError:
        return of_class  # a C function that does not tell
    if kind == in_c:
        return not parameters
    return all(each.default is not each.empty or (of_class and each.kind in (2, 4)) for each in parameters)


class _Loop:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self._loop = _import("asyncio").new_event_loop()
        self._closing = False
        self._thread = _start_thread("miniplug-loop", self._run)

    def call(self, function: Callable[[], Any]) -> bool:
        """Have the loop call a function. False if it is closed."""
        try:
            self._loop.call_soon_threadsafe(function)
            return True
        except RuntimeError:
            return False

    def _run(self) -> None:
        _import("asyncio").set_event_loop(self._loop)
        _loop_threads.add(threading.get_ident())
        try:
            while not self._closing:
                try:
                    self._loop.run_forever()
                except BaseException:  # some task that the plugin has started calls sys.exit()
                    _import("traceback").print_exc()
            self._loop.run_until_complete(self._cancel_all())
        finally:
            _loop_threads.discard(threading.get_ident())
            self._loop.close()

    async def _cancel_all(self) -> None:
        asyncio = _import("asyncio")
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_asyncgens()

    def close(self) -> None:
        self._closing = True
        if self.call(self._loop.stop):
            self._thread.join(1.0)  # a task may refuse to end


class _Served:
    """What this process serves, to all who connect: plugins by name, and what their callers share."""

    def __init__(self, plugins: Mapping[str, Any], info: Mapping[str, Any] | None = None) -> None:
        self.plugins = plugins
        self.info = dict(info or {})
        self.config: dict[str, Any] | None = None  # what another host needs to attach, if one can
        self._entering: dict[str, Any] = {}  # a lock for each name, held while that is entered, once
        self._shared: dict[str, tuple[Any, Any]] = {}  # what all callers share: (object, context manager)
        self._lock = threading.Lock()  # protects the following two
        self._loop: _Loop | None = None
        self._closed = False

    def find(self, name: str | None) -> tuple[str, Any]:
        """What is served under a name, or the only plugin. Raises PluginNotFound."""
        names = sorted(self.plugins)
        if name is None and len(names) == 1:
            (name,) = names
        if name is None or name not in names:
            problem = "several plugins are" if name is None else f"no plugin {name!r} is"
            there = f"there {'is' if len(names) == 1 else 'are'} {', '.join(names)}"
            raise PluginNotFound(f"{problem} served: {there}", names=names)
        return name, self.plugins[name]

    def shared(self, name: str) -> Any:
        """The object that all callers share; of a class or factory the instance that describes the others."""
        served = self.find(name)[1]
        with self._entering.setdefault(name, threading.RLock()):
            if name not in self._shared:
                self._shared[name] = _enter(served() if _makes_instances(served) else served)
            return self._shared[name][0]

    def on_loop(self, function: Callable[[], Any]) -> bool:
        """Have the event loop that all async methods share call a function. False if it is closed."""
        with self._lock:
            if self._loop is None and not self._closed:
                self._loop = _Loop()
        return self._loop is not None and self._loop.call(function)

    def close(self) -> None:
        """End the event loop, and exit the context managers, the latest first."""
        with self._lock:
            self._closed = True
        if self._loop is not None:
            self._loop.close()
        while self._shared:
            _exit(self._shared.popitem()[1][1])


def _enter(obj: Any) -> tuple[Any, Any]:
    """(what a context manager serves, the manager); or of any other object (object, None)."""
    if hasattr(type(obj), "__enter__") and hasattr(type(obj), "__exit__"):
        return type(obj).__enter__(obj), obj
    return obj, None


def _exit(manager: Any) -> None:
    """What that raises goes to stderr, and so to the host's log."""
    try:
        if manager is not None:
            type(manager).__exit__(manager, None, None, None)
    except Exception:
        _import("traceback").print_exc()


# -- references: objects that stay where they are, and are called from the other side

class _Ref:
    """An object to be passed by reference. A dispensed one has a context manager, or None."""

    def __init__(self, obj: Any, *manager: Any) -> None:
        self.object = obj
        self.manager = manager


def ref(obj: Any) -> Any:
    """Pass `obj` by reference, in an argument or a return value: the other side gets a proxy for it.

    The object stays here and is called from there, until the other side has released it or let go of its last
    proxy for it, or the connection ends. Sent back, it arrives as itself. Functions need no `ref`.
    """
    return _Ref(obj)


class _Target:
    """What a proxy and its methods share: where the object is. What a plugin serves has another kind, which
    finds it again in another session (_Dispensed)."""

    released = False
    label = "the object"
    timeout: float | None = None  # the deadline of its calls, instead of the session's

    def __init__(self, session: _Session, number: int) -> None:
        self.session = session
        self.number = number
        self.identity: Any = (session, number)  # also when it is dispensed anew
        self._notice = session.channel.notice(number) if number else []  # until it is given back
        session.borrowed.add(id(self))

    def here(self) -> tuple[_Session, int] | None:
        """Where to call, if that is known without a look. The session may be sealed."""
        return None if self.released or self.session.sealed else (self.session, self.number)

    def number_at(self, session: _Session) -> int | None:
        return self.number if session is self.session and not self.released else None

    def find(self, asked: _Call) -> tuple[_Session, int]:
        """Where to call. Raises DeadReference, and what a plugin that cannot be called raises."""
        if self.released:
            raise DeadReference(f"{self.label} was released")
        if self.session.ended is not None:
            raise DeadReference(f"{self.label} is gone: the connection to its owner has ended")
        return self.session, self.number

    def put_off(self, call: Any, begin: Callable[[float | None], Any], seconds: float | None) -> bool:
        """If a submitted call has to wait for a start, have it begin after that."""
        return False

    def release(self) -> None:
        self.released = True
        if self._notice:  # the step that posts it forgets it
            self.session.discard(map(self._notice.pop, (0,)))
        self.session.borrowed.discard(id(self))

    def __del__(self) -> None:
        if hasattr(self, "_notice"):
            self.release()


def _reach(find: Callable[[_Call], tuple[_Session, int]], act: Callable[..., Any], method: str, args: Any,
           kwargs: Any, seconds: float | None) -> Any:
    """Call `act` with the session and number that `find` gives, or gives next if that takes no calls by then:
    all within the deadline."""
    asked = _Call(0, method, seconds)
    while True:
        try:
            return act(*find(asked), method, args, kwargs, asked.left())
        except _Sealed:
            pass
        except _on_first_use("CallTimeout"):
            if asked.left() != 0.0:  # it is another one's, such as on_start's
                raise
            raise _too_late(asked) from None


class _Remote:
    """A proxy for an object of the other side's, or a method of one. Equal ones stand for the same."""

    __slots__ = ()
    _target: _Target
    _name: Any = None  # of the method, or None for the object itself
    _names: Any = ()  # of the object's methods, or None if it answers every name

    def __eq__(self, other: Any) -> Any:
        if not issubclass(type(other), _Remote):
            return NotImplemented
        return (*self._target.identity, self._name) == (*other._target.identity, other._name)

    def __hash__(self) -> int:
        return hash(self._target.identity)

    def __reduce__(self) -> NoReturn:
        text = "a proxy cannot be copied or pickled: it stays in its process"
        raise NotSerializable(text, type_name="proxy")

    def __repr__(self) -> str:
        return f"<{f'method {self._name}' if self._name else 'proxy'} of {self._target.label}>"


def release(proxy: Any) -> None:
    """Give back what the other side has lent; a call on `proxy` raises DeadReference from then on.

    By itself it is given back when its last proxy is collected. Raises TypeError for what is no proxy.
    """
    if not issubclass(type(proxy), _Remote):
        raise TypeError(f"{type(proxy).__name__} is no proxy: there is nothing to give back")
    proxy._target.release()


class _Loan:
    """An object lent to the other side, and the context manager to exit with the loan, if any."""

    def __init__(self, obj: Any, key: Any, manager: Any = None) -> None:
        self.object = obj
        self.key = key
        self.manager = manager
        self.methods = _method_names(obj)
        self.known = {name: name for name in self.methods or ()}
        self.sent: deque[None] = deque()  # as long as how often it was sent, and not given back


class _Held(tuple):  # type: ignore[type-arg]
    """The buffers of a message, and in `loans` what comes home in it."""


class _References:
    """What one side has lent over one session, by number; 0 is `system`. Any thread."""

    def __init__(self, served: _Served) -> None:
        self.served = served
        self.on_loop = served.on_loop
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()  # protects the following three
        self._loans: dict[int, _Loan] = {0: _Loan(_System(self), None)}
        self._lent: dict[Any, int] = {}  # the numbers of what may be lent again, by identity
        self.lends = False  # whether anything is lent
        self._held: dict[int, Any] = {}  # weak references to those given back, that a message may hold
        self._parting: list[_Loan] = []  # those to be exited
        self._exit_lock = threading.RLock()  # held while they are

    def resolve(self, target: Any, method: str) -> Callable[..., Any]:
        """What a call runs; an empty name is the object itself. Raises MethodNotFound, DeadReference."""
        loan = self.loan(target)
        obj = loan.object
        if method in loan.known:  # not by the string that has come: classes cache those they are asked by
            return getattr(obj, loan.known[method])  # type: ignore[no-any-return]
        if not method and callable(obj):
            return obj  # type: ignore[no-any-return]
        if loan.methods is not None or method.startswith("_"):
            raise _no_method(method, loan.methods, "the plugin")
        return lambda *args, **kwargs: obj._dispatch(method, args, kwargs)

    def loan(self, number: Any) -> _Loan:
        loan = None
        if type(number) is int:
            loan = self._loans.get(number) or self._held.get(number, lambda: None)()
        if loan is None:
            raise DeadReference(f"reference {number!r} is not lent, or no longer")
        return loan

    def lend(self, session: _Session, value: Any, lent: list[int]) -> tuple[str, Any] | None:
        """The tag and state of what goes by reference, or None. The number of a loan is added to `lent`."""
        kind = type(value)
        obj, manager = (value.object, value.manager) if kind is _Ref else (value, ())
        if issubclass(type(obj), _Remote):
            number = obj._target.number_at(session)
            if number is not None:
                return "$own", [number, obj._name]  # it goes home
        elif kind is not _Ref and not callable(value):
            return None
        owner = getattr(obj, "__self__", None)  # a bound method is made anew each time
        function = getattr(obj, "__func__", None) or getattr(obj, "__name__", None)
        key: Any = object() if manager else (id(obj),) if owner is None else (id(owner), function)
        with self._lock:
            number = 0 if obj is self._loans[0].object else self._lent.get(key)
            if number is None:
                loan = _Loan(obj, key, *manager)  # in there a finalizer may run, and lend the same
                number = self._lent.setdefault(key, next(self._numbers))
                self._loans.setdefault(number, loan)
            loan = self._loans[number]
            self.lends = True
            loan.sent.extend(map(lent.append, (number,)))  # one step: or it would be lent without a word
        return "$ref", [number, loan.methods, callable(obj)]

    def held(self, message: _Message) -> _Message:
        """The message, holding what comes home in it: a release that follows is done before it is decoded."""
        *head, body, buffers = message
        if type(buffers) is _Held:
            return message
        held: Any = _Held(buffers)
        numbers = map(int, re.findall(rb'"\$own":\s*\[\s*(\d{1,18})\b', body))
        held.loans = [*map(self._loans.get, numbers)]
        return (*head, body, held)

    def own(self, number: Any, method: Any) -> Any:
        """What comes home. Raises DeadReference, MethodNotFound."""
        if method is not None and type(method) is not str:
            raise ProtocolError(f"a method named {_shown(method)}")
        return self.resolve(number, method) if method else self.loan(number).object

    def release(self, number: int) -> None:
        """Take one count of a loan back. A thread of the pool exits it, which may take long."""
        with self._lock:
            loan = self._loans.get(number) if number else None
            if loan is None:
                return
            if loan.sent:
                loan.sent.pop()
            if loan.sent:
                return
            self._held[number] = _ref_to(loan, lambda gone: self._held.pop(number, None))
            del self._loans[number]
            self._lent.pop(loan.key, None)
            self.lends = len(self._loans) > 1
        if loan.manager is not None:
            self._parting.append(loan)
            _aside_in_pool(self._exit_parting)

    def _exit_parting(self) -> None:
        with self._exit_lock:
            while self._parting:
                _exit(self._parting.pop().manager)

    def release_unless_busy(self, number: int) -> None:
        """For who reads: a finalizer that calls in the midst of `lend` waits for that one."""
        if not self._lock.acquire(False):
            return _aside_in_pool(self.release, number)
        try:
            return self.release(number)
        finally:
            self._lock.release()

    def unlend(self, lent: Any) -> None:
        """Take back what was lent for a message that was not sent, and what a handler has left half lent."""
        with self._lock:
            half = [number for number, loan in self._loans.items() if number and not loan.sent]
            while lent:
                half.append(lent.pop())
            for number in half:
                self.release(number)

    def close(self) -> None:
        """The connection has ended: exit the context managers, the latest first."""
        with self._lock:
            loans, self._loans = self._loans, {0: self._loans[0]}
            self._lent, self.lends = {}, False
        self._parting.extend(loan for number, loan in loans.items() if number)
        self._exit_parting()


class _System:
    """The reserved target ``system``: what a plugin tells about itself (docs/protocol.md, section 7)."""

    def __init__(self, references: _References) -> None:
        self._references = references
        self._served = references.served

    def dispense(self, name: str | None = None) -> Any:
        """A reference to the plugin of that name, or to the only one."""
        if name == "system":
            return _Ref(self)
        name, served = self._served.find(name)
        return _Ref(*_enter(served())) if _makes_instances(served) else _Ref(self._served.shared(name), None)

    def info(self) -> dict[str, Any]:
        """The dict that the plugin was served with."""
        return self._served.info

    def reattachConfig(self) -> dict[str, Any] | None:
        """What another host needs to attach, or None."""
        return self._served.config

    def listMethods(self) -> list[str]:
        """The names of all methods, as ``plugin.method``."""
        return [f"{plugin}.{name}" for plugin, methods in self.describe().items() for name in methods]

    def methodHelp(self, name: str) -> str:
        """A method's docstring, or ``""``."""
        return self._described(name)[1] or ""

    def methodSignature(self, name: str) -> str | None:
        """A method's signature, such as ``(name: str) -> str``, or None."""
        return self._described(name)[0]  # type: ignore[no-any-return]

    def describe(self, target: str | int | None = None) -> dict[str, Any]:
        """{method: [signature, doc, parameters]} of a plugin, or of the reference of that number; or that of
        each plugin."""
        if target is None:
            return {plugin: self.describe(plugin) for plugin in ("system", *sorted(self._served.plugins))}
        if type(target) is int:
            obj = self._references.loan(target).object
        else:
            obj = self if target == "system" else self._served.shared(str(target))
        methods = {name: _describe(getattr(obj, name)) for name in _method_names(obj) or ()}
        return {"": _describe(obj), **methods} if type(target) is int and callable(obj) else methods

    def _described(self, name: str) -> list[Any]:
        plugin, _, method = name.rpartition(".")
        methods = self.describe(plugin)
        if method not in methods:
            raise _no_method(method, methods, f"the plugin {plugin!r}")
        return methods[method]  # type: ignore[no-any-return]


def _describe(function: Any) -> list[Any]:
    """A function as [signature, doc, parameters], None for what is not known. A parameter is [name, kind,
    default, annotation]; the last one is the result."""
    inspect = _import("inspect")
    doc = inspect.getdoc(function)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return [None, doc, None]

    def text(value: Any, show: Callable[[Any], str]) -> str | None:
        return None if value is inspect.Parameter.empty else show(value)

    rows = [(each.name, each.kind, each.default, each.annotation) for each in signature.parameters.values()]
    rows.append(("return", 0, signature.empty, signature.return_annotation))
    parameters = [[name, int(kind), text(default, repr), text(annotation, inspect.formatannotation)]
                  for name, kind, default, annotation in rows]
    return [str(signature), doc, parameters]


# === 7. proxies =========================================================================================

class MethodInfo(namedtuple("_MethodInfo", "name signature doc"), metaclass=_Brief):
    """What `Plugin.describe` tells of a method: `name`, and as text or None its `signature` and `doc`."""

    __slots__ = ()
    if TYPE_CHECKING:
        name: str
        signature: str | None
        doc: str | None


def _call_at(session: _Session, number: int, method: str, args: Any, kwargs: Any, seconds: Any) -> Any:
    return session.call(number, method, args, kwargs, seconds)


def _notify_at(session: _Session, *what: Any) -> None:
    session.notify(*what)


def _help(remote: Any) -> str:
    """What help() shows: methods, with their signatures and docs if they can be asked for."""
    try:
        about = _ask_description(remote._target)
    except (PluginError, RuntimeError):  # gone, or asked on the thread of an event loop
        about = {}
    names = remote._names or about if remote._name is None else [remote._name]
    return "\n\n".join(_outline(name, *(about.get(name) or (None, None))[:2]) for name in names)


class _Method(_Remote):
    # A method of the other side's, or with an empty name what can only be called itself, a function: call it.

    __slots__ = ("_name", "_target", "_timeout")
    __doc__ = property(_help)

    def __init__(self, target: _Target, name: str, timeout: float | None = None) -> None:
        self._target = target
        self._name = name
        self._timeout = timeout

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._act(_call_at, args, kwargs)

    def submit(self, *args: Any, **kwargs: Any) -> Call:
        """Call, and do not wait: returns a Call, a concurrent.futures.Future that asyncio can await."""
        call: Call = _on_first_use("Call")()
        try:
            self._act(call._begin, args, kwargs, call)
            return call
        except BaseException:
            _watch.tasks.put((_aside_in_pool, (call.cancel,)))
            raise

    def notify(self, *args: Any, **kwargs: Any) -> None:
        """Call, and want no answer. What the method raises goes to the plugin's stderr."""
        self._act(_notify_at, args, kwargs)

    def timeout(self, seconds: float | None) -> _Method:
        """The same method with a deadline: past `seconds` it raises CallTimeout. None: the default one."""
        return type(self)(self._target, self._name, _checked_timeout(seconds))

    def _act(self, act: Callable[..., Any], args: Any, kwargs: Any, call: Any = None) -> Any:
        """Call `act` with the session and the number where the object is now, and all that a call needs. One
        that was submitted, `call`, may begin later, if it has to wait for a start."""
        target, seconds = self._target, self._timeout
        if seconds is None:
            seconds = target.session.call_timeout if target.timeout is None else target.timeout
        found = target.here()
        if found is not None:
            session, number = found
            try:
                return act(session, number, self._name, args, kwargs, seconds)
            except _Sealed:
                pass
        begin = partial(_reach, target.find, act, self._name, args, kwargs)
        return None if call and target.put_off(call, begin, seconds) else begin(seconds)

    @property
    def __name__(self) -> str:
        return self._name or "function"


class _AsyncMethod(_Method):
    # One that the interface declares ``async def``.

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return await self.submit(*args, **kwargs)


class _AsyncStream(_Method):
    # One that it declares as an async generator.

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with await self.submit(*args, **kwargs) as stream:
            async for item in stream:
                yield item


def _checked_count(count: Any, name: str, least: int = 0) -> int:
    if type(count) is not int or count < least:
        raise ValueError(f"{name}={count!r}: it is a whole number, at least {least}")
    return count


def _checked_timeout(seconds: Any, name: str = "timeout") -> float | None:
    if seconds is not None and (not isinstance(seconds, (int, float)) or not seconds >= 0):
        raise ValueError(f"{name}={seconds!r}: it is a number of seconds, or None for no limit")
    return None if seconds is None else float(seconds)


class _Proxy(_Remote):
    # An object of the other side's: it has the object's public methods.

    __doc__ = property(_help)

    def __init__(self, target: _Target, names: Sequence[str] | None) -> None:
        vars(self).update(_target=target, _names=names, _interface=_Proxy)

    def __getattr__(self, name: str) -> Any:
        if "_target" not in self.__dict__:
            raise AttributeError(name)
        if name.startswith("_") or (self._names is not None and name not in self._names):
            raise _no_method(name, self._names, self._target.label)
        method = self.__dict__[name] = _Method(self._target, name)  # found there the next time
        return method

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{self._target.label} has methods only: {name!r} set here would not reach it")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Method(self._target, "")(*args, **kwargs)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *(self._names or ())})

    def _dispatch(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return getattr(self, method)(*args, **kwargs)  # so that a proxy can be served in turn

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self.__dict__["_interface"]  # what isinstance() believes, also of an ABC

    def _adopt(self, interface: type) -> None:
        """Be an instance of the interface. Raises InterfaceMismatch unless all of it is there, and takes its
        arguments."""
        differences = _differences(interface, self._target, self._names)
        if differences:
            text = f"{self._target.label} is no {interface.__name__}: " + "; ".join(differences)
            raise InterfaceMismatch(text, differences=differences)
        vars(self)["_interface"] = interface
        inspect = _import("inspect")
        for name in _method_names(interface) or ():
            if inspect.iscoroutinefunction(getattr(interface, name)):
                vars(self)[name] = _AsyncMethod(self._target, name)
            elif inspect.isasyncgenfunction(getattr(interface, name)):
                vars(self)[name] = _AsyncStream(self._target, name)


def _borrow(session: _Session, tag: str, state: Any) -> Any:
    """What a reference that has come stands for. Raises ProtocolError for what is none, DeadReference and
    MethodNotFound."""
    number, second, *rest = state if type(state) is list and len(state) > 1 else (None, None)
    if tag == "$own":
        return session.references.own(number, second)
    named = second is None or (type(second) is list and all(isinstance(name, str) for name in second))
    if type(number) is not int or not 0 <= number < 1 << 64 or not named:
        raise ProtocolError(f"a reference that is none: {tag}: {_shown(state)}")
    target = _Target(session, number)
    return _Method(target, "") if second == [] and rest[:1] == [True] else _Proxy(target, second)


def _open_session(channel: _Channel, terms: _Terms, max_message: int, served: _Served,
                  *others: Any) -> _Session:
    """A session that serves to the other side, and makes proxies for what that one lends."""
    return _Session(channel, terms, max_message, _References(served), _borrow, *others)


# -- what interfaces and descriptions are made of

def _ask_description(target: _Target) -> dict[str, Any]:
    """{method: [signature, doc, parameters]}, as far as the other side tells."""
    def ask(session: _Session, number: int, method: str, *others: Any) -> Any:
        return session.call(0, method, (number,), *others[1:])

    try:
        return _checked_description(_reach(target.find, ask, "describe", (), {}, target.session.call_timeout))
    except MethodNotFound:  # it is not written with miniplug
        return {}


def _checked_description(found: Any) -> dict[str, Any]:
    """As much of what `describe` told as is what it should be."""
    methods = found if type(found) is dict else {}
    return {name: each for name, each in methods.items() if type(each) is list and len(each) == 3
            and {type(text) for text in each[:2]} <= {str, type(None)}}


def _outline(name: str, signature: str | None, doc: str | None) -> str:
    """A method, and what it says about itself below it."""
    return name + (signature or "(...)") + (_import("textwrap").indent(f"\n{doc}", "    ") if doc else "")


def _differences(interface: type, target: _Target, names: Sequence[str] | None) -> list[str]:
    """In which ways an object with methods of these names (None: all) is not the interface, in words."""
    inspect = _import("inspect")
    abstract = sorted(getattr(interface, "__abstractmethods__", ()))
    found = [f"{name!r} is private, and a plugin's cannot be called" for name in abstract if name[0] == "_"]
    found += [f"{name!r} is a property, and a plugin has methods only" for name in dir(interface)
              if not name.startswith("_") and isinstance(inspect.getattr_static(interface, name), property)
              and (name in abstract or getattr(interface, "_is_protocol", False))]
    if names is None:
        return found
    described = _ask_description(target)
    for name in _method_names(interface) or []:
        if name not in names:
            found.append(f"it has no method {name!r}")
        else:
            signature, _, parameters = described.get(name, (None, None, None))
            method = inspect.getattr_static(interface, name)
            found += _refusals(name, method, f"{name}{signature}", parameters)
    return found


def _refusals(name: str, method: Any, shown: str, parameters: Any) -> list[str]:
    """A call that the interface's method allows and the plugin's does not take, if there is one."""
    inspect = _import("inspect")
    own = not isinstance(method, staticmethod)
    try:
        mine = inspect.signature(getattr(method, "__func__", method))
        *others, (_, _, _, _) = parameters
        kinds, make = inspect._ParameterKind, inspect.Parameter
        theirs = inspect.Signature([make(name, kinds(kind), default=mine.empty if default is None else 0)
                                    for name, kind, default, _ in others])
    except (TypeError, ValueError):
        return []  # one of the two is not known
    mine = mine.replace(parameters=[*mine.parameters.values()][own:])
    for count, keywords in _allowed_calls(mine.parameters.values()):
        try:
            theirs.bind(*[None] * count, **dict.fromkeys(keywords))
        except TypeError as error:
            call = ", ".join(["..."] * count + [f"{keyword}=..." for keyword in keywords])
            return [f"{shown} does not take all that {name}{mine} allows: {name}({call}): {error}"]
    return []


def _allowed_calls(parameters: Iterable[Any]) -> Iterable[tuple[int, list[str]]]:
    """The shapes of calls that these parameters allow, as (how many by position, names of the others): each
    count with no optional name, and with all. What takes those takes all between."""
    only, either, var, keyword, rest = ([each for each in parameters if each.kind == kind]
                                        for kind in range(5))
    positional = [*only, *either]
    least = sum(each.default is each.empty for each in only)
    for count in range(least, len(positional) + 1 + 3 * len(var)):
        named = [each for each in either if each not in positional[:count]] + keyword
        yield count, [each.name for each in named if each.default is each.empty]
        yield count, [each.name for each in named] + ["any_other_name"] * len(rest)


# -- calls and streams

class _Awaitable:
    """A call that was submitted: a concurrent.futures.Future that can also be awaited in asyncio."""

    if TYPE_CHECKING:
        _condition: Any
        _state: str
        _done_callbacks: list[Any]
    _call: _Call | None = None

    def _begin(self, session: _Session, *what: Any) -> None:
        if self._state != "PENDING":  # cancelled before it could be sent, or lost with a session
            return
        call = session.submit(self, *what)
        if self._state[:9] == "CANCELLED":  # meanwhile, by a signal handler
            session.caller.give_up(call)

    def _arrive(self, call: _Call, come: deque[_Message], attends: bool) -> None:
        """Called by who reads, once the answer has come. Callbacks may take long: a thread of the pool runs
        them, and does it all where the reader may be interrupted."""
        if attends and self._condition.acquire(False):  # whoever was struck in `result` may hold it for ever
            try:  # no callback is added meanwhile
                if all(map(_is_asyncios, self._done_callbacks)):
                    return self._settle(call, come.popleft())
            finally:
                self._condition.release()
        try:
            _pool.move(zip((self._settle,), zip((call,), itertools.starmap(come.popleft, _ONCE))))
        except RecursionError:
            raise
        except RuntimeError:  # no thread to be had
            self._settle(call, come.popleft())
        return None

    def _settle(self, call: _Call, message: _Message) -> None:
        future: Any = self
        call.session.reader.unattended.discard(call.number)  # should who read have been struck before that
        if call.streams is None:
            call.session.calls.pop(call.number, None)
        if self.done():
            return call.session.drop(message)  # type: ignore[no-any-return]
        try:
            value = call.session.caller.value(call, message)
        except BaseException as error:
            return self._fail(error)
        call.future = None  # which may have a stream, that shall go when nobody wants it
        return _quietly(future.set_result, value)

    def _fail(self, error: BaseException) -> None:
        future: Any = self
        _quietly(future.set_exception, error)

    def cancel(self) -> bool:
        """Give the call up, here and at the plugin, unless it has been answered."""
        base: Any = super()
        with self._condition:
            if self.done():
                return self.cancelled()
            callbacks, self._done_callbacks = self._done_callbacks, []  # a reader may want the lock
            base.cancel()
            base.set_running_or_notify_cancel()
        call = self._call
        if call is not None and call.session is not None:
            _in_pool(call.session.caller.give_up, call)  # where no handler strikes
        for callback in callbacks:
            base.add_done_callback(callback)
        return True

    if TYPE_CHECKING:
        def cancelled(self) -> bool: ...
        def done(self) -> bool: ...

    def __await__(self) -> Any:
        return _import("asyncio").wrap_future(self).__await__()


def _quietly(settle: Callable[[Any], Any], outcome: Any) -> None:
    try:
        settle(outcome)
    except _import("concurrent.futures").InvalidStateError:
        pass  # cancelled meanwhile, or settled before


def _is_asyncios(callback: Any) -> bool:
    """Those only send word to a loop."""
    return str(getattr(callback, "__module__", "")).split(".")[0] == "asyncio"  # None for those written in C


if TYPE_CHECKING:
    import concurrent.futures

    class Call(_Awaitable, concurrent.futures.Future[Any]): ...


class Stream:
    """What a method gives that returns a generator or an iterator: iterate with ``for`` or ``async for``.

    Few items wait here unread, however slow the reader is. `close()` (or `aclose()`, or the end of ``with``)
    gives the rest up and closes the plugin's generator; so does letting go of the stream. An exception of the
    generator's is raised where it happened. Each item has the deadline that the call had.
    """

    def __init__(self, session: _Session, call: _Call) -> None:
        self._session = session
        self._call = call
        self._lock = threading.Lock()  # held by who goes on to the next message
        self._batch: Any = (call.streams, iter(()), 0)  # that; its items; how many have come, in all
        self._credited = 0  # for how many of those credit was given
        self._waiters: list[Any] = []  # (loop, event) of the tasks that wait for items
        self._over = False
        call.watcher = partial(_wake, self._waiters)
        session.borrowed.add(id(self))  # until it is over: what has come may be unread

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Any:
        while True:
            for item in self._batch[1]:
                return item
            if self._over:
                raise StopIteration
            with self._lock:
                self._advance(True)

    __aiter__ = __iter__

    async def __anext__(self) -> Any:
        while True:
            for item in self._batch[1]:
                return item
            if self._over:
                raise StopAsyncIteration
            if self._lock.acquire(False):
                try:
                    self._advance(False)
                finally:
                    self._lock.release()
            if not (self._call.inbox or self._over):
                await self._news()

    def _advance(self, wait: bool) -> None:
        """Go on to the next message, unless the latest is still being read; without `wait` if it has come."""
        call, batch = self._call, self._batch
        if self._over or batch[1].__length_hint__():
            return
        try:
            count = batch[2] - self._credited
            if count >= _WINDOW // 2 and call.number in self._session.calls:
                call.granted += count  # first: should a handler raise, all this is done again
                self._session.post(_CREDIT, call.number, count)
                self._credited += count
            if call.inbox and call.inbox[0] is batch[0]:
                call.inbox.popleft()
            if wait:
                self._session.caller.next(call)
            if call.inbox and not self._over:
                self._take(call, call.inbox[0])
        except BaseException:
            self.close()
            raise

    def _take(self, call: _Call, message: _Message) -> None:
        value = self._session.caller.value
        if message[0] == _END:
            self._finish()
            self._session.calls.pop(call.number, None)
            return value(call, message, _END)  # type: ignore[no-any-return]
        values = value(call, message, _ITEM)
        received = self._batch[2] + len(values) if type(values) is list else 0
        if not values or not 0 < received <= call.granted:
            text = "items of a stream are a list, of one at least, and no more than there is credit for"
            raise self._session.failed(ProtocolError(text), call)
        self._batch = (message, iter(values), received)
        return None

    async def _news(self) -> None:
        """Wait until something has come."""
        asyncio, call, reader = _import("asyncio"), self._call, self._session.reader
        waiter = asyncio.get_running_loop(), asyncio.Event()
        self._waiters.append(waiter)
        try:
            reader.unattended.add(call.number)
            if not (call.inbox or self._over):
                reader.attend()
                await asyncio.wait_for(waiter[1].wait(), call.seconds)
        except asyncio.TimeoutError:
            self.close()
            raise _too_late(call) from None
        finally:
            self._waiters.remove(waiter)
            if not self._waiters:
                reader.unattended.discard(call.number)

    def _finish(self) -> None:
        self._over = True
        self._session.borrowed.discard(id(self))

    def close(self) -> None:
        """Give the rest up: the plugin's generator is closed. Closing what has ended does nothing."""
        if not self._over:
            self._finish()
            if self._session.ended is None:
                _watch.tasks.put((_aside_in_pool, (self._session.caller.give_up, self._call)))
            _wake(self._waiters)
        self._batch = (self._batch[0], iter(()), self._batch[2])

    async def aclose(self) -> None:
        """As `close`."""
        self.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_over", True):
            self.close()


def _wake(waiters: list[Any]) -> None:
    """Something has come: every task looks. Called by who reads."""
    for loop, event in list(waiters):
        try:
            loop.call_soon_threadsafe(event.set)
        except RuntimeError:
            pass  # the loop is closed


# === 8. serve ===========================================================================================

_ADDRESS, _AUTHKEY, _LOG_LEVEL = "MINIPLUG_ADDRESS", "MINIPLUG_AUTHKEY", "MINIPLUG_LOG_LEVEL"
_PERSIST = "MINIPLUG_PERSIST"  # stay when the host goes
_ATTACH = "MINIPLUG_ATTACH"  # {NAME: config} as JSON: where a host attaches instead of launching
_COOKIE_KEY = "MINIPLUG_COOKIE_KEY"  # names the variable of the magic cookie
_LOADING = "MINIPLUG_LOADING"  # what is being started, down to this process, until it serves: see _Recipe.above
_NO_STDIN = "MINIPLUG_NO_STDIN"  # it is discarded
_SOURCE_ONLY = "MINIPLUG_SOURCE_ONLY"  # a spec's file was checked: a bytecode cache holds another file
_GRACE = 2.0  # seconds that a plugin has to end by itself
_MAX_MESSAGE = 256 << 20

_environment: dict[str, str] = {}  # our variables, once taken out of os.environ


def _variable(name: str) -> str:
    """An environment variable's name as os.environ lists it."""
    return name.upper() if _WINDOWS else name


def _take_environment() -> None:
    """Take our variables out of the environment, so that no child of this process sees them."""
    cookie = _variable(os.environ.get(_COOKIE_KEY, "MINIPLUG_COOKIE"))
    for name in [name for name in os.environ if name.startswith("MINIPLUG_") or name == cookie]:
        _environment[name] = os.environ.pop(name)


# What green threads would take the place of.
_PATCHED = "socket.socket", "threading.get_ident", "time.sleep", "select.select", "subprocess.Popen"


def _refuse_monkey_patches() -> None:
    """Raises RuntimeError in a process that gevent or eventlet has put green threads into: waiting here would
    hang it."""
    for name in _PATCHED:
        module, _, attribute = name.partition(".")
        found = getattr(sys.modules.get(module), attribute, None)
        library = str(getattr(found, "__module__", "")).partition(".")[0]
        if library in ("gevent", "eventlet"):
            raise RuntimeError(
                f"miniplug does not run under the monkey patches of {library} (here: {name}): it needs the "
                "system's own threads and sockets. Do not patch this process; or let another one, which is "
                "not patched, have the plugins, and talk to that")


def serve(plugins: Mapping[Any, Any], *, info: Mapping[str, Any] | None = None,
          handshake: Handshake = Handshake(), address: str | None = None, authkey: bytes | str | None = None,
          persist: bool = False, max_workers: int = 64, max_message: int = _MAX_MESSAGE) -> None:
    """Serve plugins to the host that started this process, until it says stop or is gone; then return.

    `plugins` maps a name to an object or a function with arguments, which all callers share; or to a class or
    zero-argument factory, which makes an instance for each `dispense`. Mapped by int instead, it is one such
    mapping for each protocol version. An object that is a context manager is entered before its first call
    and exited at the end.

    `info` is a plain dict about the plugin that the host reads as `Plugin.info`. Calls run in threads, at
    most `max_workers` at once (1: one after another). A message of more than `max_message` bytes (at least
    4096) is refused.

    `persist=True`: stay when the host goes, for it or another one to `attach` to, until one of them says
    stop. Any number of hosts may be there at once. `address` is where they attach: a path with a ``/`` in it,
    ``127.0.0.1:PORT`` or, on Windows, the name of a pipe; by default a private place of its own. `authkey` is
    the key that they have to hold: at least 16 bytes, or as many in hexadecimal digits; by default a fresh
    one.

    Started by hand with `persist` or an `address`, it prints what `attach` needs, as a line of JSON, and
    serves until Ctrl-C, or without `persist` until its last host is gone. Else, started by hand, it says that
    this is a plugin, and exits with status 1 (SystemExit); so it does when the host refuses the plugin.

    Raises ValueError or TypeError for what cannot be served, OSError for an `address` that is not to be had,
    and RuntimeError the second time, and under the monkey patches of gevent or eventlet.
    """
    if not hasattr(handshake, "magic_cookie_value"):
        raise TypeError(f"handshake={handshake!r}: it is a miniplug.Handshake")
    if not isinstance(address, (str, type(None))):
        raise TypeError(f"address={address!r}: it is a str, or None")
    if not isinstance(persist, bool):
        raise TypeError(f"persist={persist!r}: it is True or False")
    server = _Server(_versions(plugins, handshake), info, max_workers, max_message)
    secret = os.urandom(32) if authkey is None else _checked_key(authkey)
    _take_environment()
    key = _variable(handshake.magic_cookie_key)
    cookie = os.environ.pop(key, None) or _environment.pop(key, None)  # somebody may have set it by hand
    _serve(server, {"key": key, "matches": cookie == handshake.magic_cookie_value}, address, secret, persist)


def _serve(server: _Server, cookie: Mapping[str, Any], address: str | None, secret: bytes,
           persist: bool) -> None:
    """The plugin's main loop."""
    _refuse_monkey_patches()
    host, key = _environment.get(_ADDRESS), _environment.pop(_AUTHKEY, "")
    server.stays = persist = persist or _PERSIST in _environment
    _refuse_by_hand(address, persist, "In Python, miniplug.launch() with its path and handshake does.")
    if host == "":
        raise RuntimeError("this process has served its host already: serve() works once")
    _environment[_ADDRESS] = ""
    _environment.pop(_LOADING, None)
    _prepare_output()
    try:
        if persist or address is not None:
            passed_over = server.listen(address or "", secret)
            _heed_signals(host is not None)
        if host is None:
            for folder in passed_over:
                where = server.config["address"]
                print(f"miniplug: it listens at {where}, not in {folder}", file=sys.stderr, flush=True)
            print(json.dumps(server.config), flush=True)
        else:
            server.serve_launcher(host, key, cookie)
        server.wait()
    except KeyboardInterrupt:
        if host is not None and not persist:
            raise
    finally:
        server.close()


def _refuse_by_hand(address: str | None, persist: bool, hint: str) -> None:
    """Exit with a word if there is neither a host that has started this process nor a place for one to attach
    to."""
    if _ADDRESS not in _environment and not persist and address is None:
        whose = "the application that it belongs to starts it, not a person"
        sys.exit(f"This program is a plugin: {whose}. ({hint})")


def _checked_key(key: bytes | str) -> bytes:
    """A key that is given as bytes or in hexadecimal digits. Raises ValueError, or TypeError."""
    if not isinstance(key, (str, bytes, bytearray)):
        raise TypeError(f"authkey: it is bytes or hexadecimal digits, and not of type {type(key).__name__}")
    try:
        data = bytes.fromhex(key) if isinstance(key, str) else bytes(key)
    except ValueError as error:
        raise ValueError(f"the authkey is not in hexadecimal digits: {error}") from None
    if len(data) < 16:
        raise ValueError(f"the authkey has {len(data)} bytes, where at least 16 are needed")
    return data


def _checked_config(config: Any) -> dict[str, Any]:
    """What another host needs to attach. Raises ValueError for what is not, without telling the key."""
    kinds = {"network": str, "address": str, "authkey": str, "pid": int, "protocol_version": int}
    takes = f"it takes a dict with {', '.join(kinds)}, as Plugin.reattach_config() gives it"
    if not isinstance(config, dict):
        raise ValueError(f"{takes}, and not a {type(config).__name__}")
    wrong = [key for key, kind in kinds.items() if type(config.get(key)) is not kind]
    if wrong:
        are = "is" if len(wrong) == 1 else "are"
        raise ValueError(f"{takes}, and {', '.join(wrong)} {are} missing or of another type")
    if _transport(config["address"]) != config["network"] or (config["network"] == "pipe") != _WINDOWS:
        raise ValueError(f"{config['address']!r} is no address for the network {config['network']!r} here")
    if config["network"] != "pipe":
        _endpoint(config["address"])
    _checked_key(config["authkey"])
    return {key: config[key] for key in kinds}


def _heed_signals(launched: bool) -> None:
    """Of a plugin that listens: SIGTERM ends it orderly, as Ctrl-C does, and its host's terminal's end does
    not."""
    signal = _import("signal")
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if not _WINDOWS:
            signal.signal(signal.SIGHUP, signal.SIG_IGN if launched else signal.default_int_handler)


class _Server:
    """What this process serves, and the hosts that it serves it to, each over a session of its own.

    The main thread listens, serves the launcher, waits and closes. A thread of the door attends to each host
    that attaches. Any thread may `stop` it. `_lock` protects `_sessions` to `_over`.
    """

    def __init__(self, versions: Mapping[Any, Mapping[str, Any]], info: Mapping[str, Any] | None,
                 max_workers: int, max_message: int) -> None:
        """A version None stands for whatever a host asks for."""
        if not (info is None or hasattr(info, "keys")):
            raise TypeError(f"info={info!r}: it is a dict about the plugin, or None")
        self.stays = False  # also when its hosts are gone
        self.config: dict[str, Any] = {}  # what another host needs to attach
        self._served = {version: _Served(plugins, info) for version, plugins in versions.items()}
        self._max_message = _checked_count(max_message, "max_message", _HELLO_LIMIT)
        self._slots = _Slots(_checked_count(max_workers, "max_workers", 1))
        self._door: _Door | None = None
        self._lock = threading.Lock()
        self._sessions: list[_Session] = []  # those that are not disposed of
        self._threads: list[threading.Thread] = []  # that attend to those who have come through the door
        self._hosts = 0  # how many are there
        self._attended = False  # whether one has been
        self._grace = _GRACE  # in seconds, that the calls have and what is served
        self._over = threading.Event()  # set once it is to end

    def greet(self, channel: _Channel, address: str, key: bytes, cookie: Mapping[str, Any]) -> _Terms:
        """Run the handshake. From now on this host counts as one that is there: it may know before this side
        that it is in."""
        versions = None if None in self._served else sorted(self._served)
        hello = _Hello(channel, address, key, "plugin")
        with self._lock:
            self._hosts += 1
        try:
            return hello.as_plugin(versions, self._max_message, cookie, ["persist"] if self.stays else [])
        except BaseException:
            self._leave()
            raise

    def _leave(self) -> None:
        """A host is gone."""
        with self._lock:
            self._hosts -= 1
            last = self._attended and not (self._hosts or self.stays)
        if last:
            self.stop()

    def listen(self, address: str, key: bytes) -> list[str]:
        """Let hosts attach. They need no cookie: it is not they who start this program. Returns the temp
        folders that would not do, and why."""
        if not address:
            _remove_left_behind()
        self._door = _Door(lambda channel, address: self.greet(channel, address, key, {"matches": True}),
                           self._arrived, address, stays=True)
        address = self._door.listener.address
        version = max((each for each in self._served if each is not None), default=1)
        self.config.update(network=_transport(address), address=address, authkey=key.hex(), pid=os.getpid(),
                           protocol_version=version)
        for served in self._served.values():
            served.config = self.config
        return self._door.listener.passed_over

    def _arrived(self, channel: _Channel, terms: Any) -> None:
        if isinstance(terms, _Terms):  # or the host has refused this plugin
            with self._lock:
                alive = [each for each in self._threads if each.is_alive()]
                self._threads = [*alive, threading.current_thread()]
            self.attend(channel, terms)

    def serve_launcher(self, address: str, key: str, cookie: Mapping[str, Any]) -> None:
        """Serve the host that started this process. Exits with a word if there is none, or if it refuses."""
        gone = _outlet() if self.stays else None
        try:
            channel, terms = _come_in(
                address, lambda channel: self.greet(channel, address, _checked_key(key), cookie))
        except HandshakeError as error:
            sys.exit(f"miniplug: the host refused this plugin: {error}")
        except (OSError, EOFError, ValueError, PluginError) as error:
            sys.exit(f"miniplug: no host at {address}: {type(error).__name__}: {error}")
        cause = self.attend(channel, terms, gone)
        orderly = isinstance(cause, (EOFError, ConnectionError)) and not isinstance(cause, ProtocolError)
        if not (self.stays or cause is None or orderly):
            sys.exit(f"miniplug: the connection to the host has failed: {type(cause).__name__}: {cause}")

    def attend(self, channel: _Channel, terms: _Terms,
               gone: Callable[[], None] | None = None) -> BaseException | None:
        """Serve one host, until it says stop or is gone: then `gone` is called, at once. Returns why the
        session has ended."""
        def lost(cause: BaseException) -> Callable[[list[str]], BaseException]:
            if gone is not None:
                gone()
            return lambda calls: PluginClosed("the host is gone")

        served = self._served.get(terms.protocol_version) or self._served[None]
        with self._lock:
            if self._over.is_set():
                channel.close()
                return None
            session = _open_session(channel, terms, self._max_message, served, lost, True, self._slots)
            self._sessions.append(session)
            self._attended = True
        session.finished.acquire()
        assert session.closing is not None
        if session.closing >= 0:
            self.stop(session.closing)
        self._leave()
        if not self._over.is_set():  # else `close` does that
            self._part([session])
        return session.cause

    def _part(self, sessions: list[_Session], served: Iterable[_Served] = ()) -> None:
        """Give the calls that run the time they have, and let go of sessions, and then of what is served."""
        deadline = time.monotonic() + self._grace / 2
        for session in sessions:
            session.drain(_left(deadline))
            session.references.close()
        for each in served:
            each.close()
        for session in sessions:
            session.dispose()
            self._sessions.remove(session)

    def stop(self, grace: float = _GRACE) -> None:
        """Tell the hosts' sessions, and whoever waits, that it is over; `close` does the rest."""
        with self._lock:
            self._grace = self._grace if self._over.is_set() else grace
            self._over.set()
            sessions = list(self._sessions)
        for session in sessions:
            session.stop(self._grace)

    def wait(self) -> None:
        while not self._over.wait(0.5):
            pass  # a signal that another thread got, and on Windows any, does not interrupt a lock

    def close(self) -> None:
        """Let nobody in any more, and end the sessions and what is served."""
        self.stop()
        if self._door is not None:
            self._door.close()
        for thread in self._threads:
            thread.join()
        self._part(list(self._sessions), self._served.values())


def _outlet() -> Callable[[], None]:
    """What a plugin that stays calls when its host is gone: from then on output goes nowhere."""
    null = os.open(os.devnull, os.O_RDWR)

    def close() -> None:
        for fd in (1, 2):
            os.dup2(null, fd)

    return close


def _versions(plugins: Mapping[Any, Any], handshake: Handshake) -> Mapping[int, Mapping[str, Any]]:
    """{version: {name: object, ...}, ...}. Raises ValueError or TypeError for what cannot be served."""
    by_version = hasattr(plugins, "keys") and plugins and all(type(key) is int for key in plugins)
    versions = plugins if by_version else {handshake.protocol_version: plugins}
    for version, mapping in versions.items():
        _checked_count(version, "protocol_version")
        if not hasattr(mapping, "keys"):
            kind = getattr(mapping, "__name__", type(mapping).__name__)
            example = f"{{{kind.lower()!r}: {kind}}}"
            raise TypeError(f"{kind} is no mapping: what is served has a name, such as {example}")
        if not mapping or not all(isinstance(name, str) for name in mapping):
            takes = "{name: object, ...}, or {version: {name: object, ...}, ...}"
            raise TypeError(f"plugins is {takes}, and not empty")
        if "system" in mapping:
            raise ValueError("the name 'system' is reserved: give the plugin another one")
    return versions


# -- output and logging: lines on stderr, in the format of hclog, one JSON object each

_LEVELS = {"error": 40, "warn": 30, "info": 20, "debug": 10, "trace": 5}


def _prepare_output() -> None:
    """Have every line leave at once, as UTF-8; a crash tell where in Python it was; and logging speak to the
    host."""
    streams: list[Any] = [sys.stdout, sys.stderr]
    for stream in streams:
        try:
            if not stream.isatty():
                stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
        except (AttributeError, OSError, ValueError):
            pass  # there is none, it is closed, or it is the plugin's own
    c_stack = {"c_stack": False} if sys.version_info >= (3, 14) else {}  # which is long, and tells little
    try:
        _import("faulthandler").enable(all_threads=False, **c_stack)
    except (AttributeError, OSError, ValueError, RuntimeError):
        pass  # no stderr to write to
    if _environment.pop(_NO_STDIN, "") and "PYTHONBREAKPOINT" not in os.environ:
        sys.breakpointhook = _no_breakpoint
    level = int(_environment.pop(_LOG_LEVEL, -1))
    if level >= 0 and "logging" in sys.modules:
        _set_up_logging(sys.modules["logging"], level)
    elif level >= 0:
        sys.meta_path.insert(0, _LoggingHook(level))
    main = threading.current_thread() is threading.main_thread()
    if level >= 0 and main and not _WINDOWS and _posix.getpgrp() != os.getpid():
        signal = _import("signal")
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it shares the terminal, whose Ctrl-C is the host's


def _no_breakpoint(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("breakpoint() in a plugin whose stdin is discarded: launch it with stdin='inherit' and "
                       "stdout='inherit', or set PYTHONBREAKPOINT to what debugs from outside")


class _LoggingHook:
    """An import hook that sets logging up when somebody imports it, so that nobody pays for it who does
    not."""

    def __init__(self, level: int) -> None:
        self._level = level

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "logging":
            return None
        sys.meta_path.remove(self)
        spec = _import("importlib.util").find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _set_up_logging(module, self._level)

        spec.loader.exec_module = exec_module
        return spec


def _set_up_logging(logging: Any, level: int) -> None:
    """Send the root logger's records to the host, unless the plugin has handlers there or calls
    basicConfig."""
    root = logging.getLogger()
    if root.handlers:
        return

    handler, basic_config = logging.StreamHandler(sys.__stderr__), logging.basicConfig
    handler.format = partial(_log_line, logging.Formatter())
    root.addHandler(handler)
    root.setLevel(level)

    def basicConfig(**kwargs: Any) -> None:
        root.removeHandler(handler)  # the plugin's own configuration takes its place
        basic_config(**kwargs)

    logging.basicConfig = basicConfig


def _log_line(formatter: Any, record: Any) -> str:
    datetime = _import("datetime")
    when = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
    level = next((name for name, number in _LEVELS.items() if record.levelno >= number), "trace")
    fields: dict[str, Any] = {"@level": level, "@message": record.getMessage(), "@module": record.name,
                              "@timestamp": when.isoformat(timespec="microseconds")}
    if _LEVELS[level] != record.levelno:
        fields["@levelno"] = record.levelno
    trace = formatter.formatException(record.exc_info) if record.exc_info else record.exc_text
    if trace or record.stack_info:
        fields["@traceback"] = "\n".join(filter(None, (trace, record.stack_info)))
    more = {key: value for key, value in vars(record).items()
            if key not in _standard_fields() and not key.startswith("@")}
    try:
        return json.dumps({**fields, **more}, default=repr, skipkeys=True)
    except Exception:  # one of them holds itself, say, or its repr raises
        return json.dumps({**fields, **{key: _loggable(value) for key, value in more.items()}}, default=repr)


def _loggable(value: Any) -> Any:
    """What a log line has of a value: itself if it can be, or else how Python writes it."""
    try:
        return json.dumps(value, default=repr, skipkeys=True) and value
    except Exception:
        try:
            return repr(value)
        except Exception:
            return f"<{type(value).__name__}>"


@lru_cache(maxsize=1)
def _standard_fields() -> frozenset[str]:
    """The attributes that every log record has, and those that formatting adds: what a plugin's field may not
    be."""
    record = _import("logging").makeLogRecord({})
    return frozenset({*vars(record), *dir(type(record)), "message", "asctime"})


# === 9. process =======================================================================================
#
# Start a process, hear what it says, and end it with all that it started. On POSIX the process leads a
# session of its own, so that one signal reaches its group and the terminal's Ctrl-C does not; on Windows it
# is in a job object. The host's own end, SIGKILL included: on Windows the job closes with the host's handle;
# on POSIX the guardian waits for it. With stdin="inherit" on a terminal there is no group: then only the
# process itself is ended.
#
# A process here is what has `pid`, `stdout`, `stderr` and these methods: `signal(kill)` ends it, in any
# thread, as often as one likes; `await_exit()` and then `reap()`, which gives the exit code, are for the one
# thread that watches it; `keep()` has it stay when the host goes; `disown()` forgets it in a forked child.

_PIPE, _DEVNULL = -1, -3  # as in subprocess, which is slow to import
_SHELL = "/system/bin/sh" if hasattr(sys, "getandroidapilevel") else "/bin/sh"


def _popen(argv: Sequence[str], **options: Any) -> Any:
    """A subprocess.Popen, unbuffered. The pipes are made here: what Popen has opened when it finds no
    descriptor for the next, it leaves open."""
    theirs: list[int] = []
    ours: dict[str, int] = {}
    try:
        for name in ("stdin", "stdout", "stderr"):
            stream = options.get(name)
            if stream == _DEVNULL:
                options[name] = os.open(os.devnull, os.O_RDWR)
                theirs.append(options[name])
            elif stream == _PIPE:
                ours[name], options[name] = os.pipe()
                theirs.append(options[name])
        process = _import("subprocess").Popen(argv, bufsize=0, **options)
    except BaseException:
        for fd in ours.values():
            os.close(fd)
        raise
    finally:
        for fd in theirs:
            os.close(fd)
    for name, fd in ours.items():
        setattr(process, name, open(fd, "rb", buffering=0))  # noqa: SIM115
    return process


if TYPE_CHECKING:
    class _Limits(NamedTuple):
        memory: int | None
        cpu_seconds: float | None
        open_files: int | None
else:
    _Limits = namedtuple("_Limits", "memory cpu_seconds open_files")


class Limits(_Limits, metaclass=_Brief):
    """What a plugin, and each process that it starts, may use at most. None, the default, is no limit.

    - `memory` (bytes): on POSIX the address space of each process, on Windows what all of them have
      allocated together. An allocation past it fails: in Python that is a MemoryError. macOS enforces none.
      Runtimes that reserve much address space (Node's, Go's, Java's) need far more than they use.
    - `cpu_seconds`: on POSIX the processor time of each process, in whole seconds, rounded up; on Windows
      that of all of them together. What goes over it is ended, and PluginCrashed says so.
    - `open_files` (a count): descriptors in each process; to open one more fails with OSError. Windows has
      no such limit.

    A limit that this system does not have is not set, and the plugin's logger warns of it. A stricter one
    that the host itself is under stays. Immutable. Raises ValueError for what is no positive number.
    """

    __slots__ = ()

    def __new__(cls, memory: int | None = None, cpu_seconds: float | None = None,
                open_files: int | None = None) -> Limits:
        for name, value in (("memory", memory), ("cpu_seconds", cpu_seconds), ("open_files", open_files)):
            kinds, word = ((int, float), "number") if name == "cpu_seconds" else ((int,), "whole number")
            if value is not None and (type(value) not in kinds or not 0 < value < float("inf")):
                raise ValueError(f"{name}={value!r}: it is a positive {word}, or None")
        return super().__new__(cls, memory, cpu_seconds, open_files)

    def _not_enforced(self) -> str | None:
        """The name of a limit that this system does not have."""
        name = "open_files" if _WINDOWS else "memory" if sys.platform == "darwin" else None
        return name if name and getattr(self, name) is not None else None

    def _as_job(self, stays: bool = False) -> bytes:
        """JOBOBJECT_EXTENDED_LIMIT_INFORMATION, of a job that ends with its last handle, unless it stays."""
        time_limit, memory_limit, kill_on_close = 0x4, 0x200, 0x2000  # of the whole job, the first two
        flags = 0 if stays else kill_on_close
        flags |= time_limit * bool(self.cpu_seconds) | memory_limit * bool(self.memory)
        ticks = min(int((self.cpu_seconds or 0) * 10**7), (1 << 63) - 1)  # of 100 ns
        memory = min(self.memory or 0, (1 << 8 * struct.calcsize("N")) - 1)
        return struct.pack("qqINNINII6Q4N", 0, ticks, flags, *[0] * 12, 0, memory, 0, 0)

    def _command(self, argv: Sequence[str], env: Mapping[str, str]) -> list[str]:
        """A command that sets the limits and then becomes `argv`. A shell does that: nothing of Python's runs
        between fork and exec, and nothing of the plugin's before they hold."""
        if not os.path.exists(_SHELL):
            raise OSError(f"its limits cannot be set: there is no {_SHELL}")
        seconds = None if self.cpu_seconds is None else int(-(-self.cpu_seconds // 1))
        memory = None if sys.platform == "darwin" else self.memory
        steps = [self._step("-S -t", "CPU", seconds), self._step("-H -t", "CPU", seconds and seconds + 1),
                 self._step("-v", "AS", memory, 1024), self._step("-n", "NOFILE", self.open_files)]
        if "PWD" not in env:
            steps.append("unset PWD")  # which the shell has set
        odd = [f"{name}={env[name]}" for name in env if not (name.isascii() and name.isidentifier())]
        again = ["env", *odd] if odd else []  # some shells drop variables with such names
        script = " && ".join([*filter(None, steps), 'exec "$@"'])
        return [_SHELL, "-c", script, "miniplug-limits", *again, *argv]

    @staticmethod
    def _step(option: str, kind: str, value: int | None, unit: int = 1) -> str:
        if value is None:
            return ""
        resource = _import("resource")
        hard = resource.getrlimit(getattr(resource, f"RLIMIT_{kind}"))[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        return f"ulimit {option} {max(1, value // unit)}"

    def _broken(self, code: int, seconds: float) -> str:
        """Which limit a process went over that ended so, after so many seconds of processor time; or ""."""
        killed, time_up = -9, 1816 if _WINDOWS else -24  # SIGXCPU; at the hard limit it is SIGKILL
        over = self.cpu_seconds is not None and code == killed and seconds >= self.cpu_seconds
        if over or (self.cpu_seconds is not None and code == time_up):
            return f", over its limit of {self.cpu_seconds:g} cpu_seconds"
        if self.memory is not None and code < 0 and code not in (killed, -15):
            return f", perhaps for its limit of {self.memory} bytes of memory"
        return ""


# What the guardian does. It reads "+PID" of a process that leads a group, "=PID" of one that leads none, and
# "-PID" when that is not to be ended any more; "/FOLDER" of a door's folder that this host has made, and
# "!/FOLDER" when that is gone. When the host is gone it removes the folders, gives the processes some time to
# end by themselves, and kills those that have not, and what is left of their groups. Each is known by when it
# began as well, so that no later process of its number is meant. (A number that a group has is given to
# nobody: so what the leader has left behind is killed without a look.)
_GUARDIAN_SECONDS = 3
_GUARDIAN = """
begun() {  # when the process $1 has begun
    if [ -d /proc/self ]; then
        read -r stat 2>/dev/null <"/proc/$1/stat" || return 1
        set -- ${stat##*) }
        found=${20}
    else
        set -- $(ps -o lstart= -p "$1")
        [ $# -gt 0 ] && found=$2-$3-$4-$5
    fi
}
rounds=$1
shift
told=
while IFS= read -r line; do
    rest=${line#?}
    case $line in
    [+=]*) begun "$rest" && told="$told $line@$found" ;;
    -*) others=
        for each in $told; do
            case $each in [+=]$rest@*) ;; *) others="$others $each" ;; esac
        done
        told=$others ;;
    /*) set -- "$@" "$line" ;;
    !*) for each; do
            shift
            [ "$each" = "$rest" ] || set -- "$@" "$each"
        done ;;
    esac
done
for folder; do
    if [ ! -h "$folder" ]; then
        rm -f -- "$folder/s"
        rmdir -- "$folder"
    fi
done 2>/dev/null
runs() {  # whether what was told as $1 does, by its number and when it began
    pid=${1%%@*}
    group=${pid%%[0-9]*} pid=${pid#?}
    begun "$pid" && [ "$found" = "${1#*@}" ]
}
left() {
    for each in $told; do
        runs "$each" && return 0
    done
    return 1
}
while [ "$rounds" -gt 0 ] && left; do
    sleep .1 2>/dev/null || sleep 1
    rounds=$((rounds - 1))
done
for each in $told; do
    if runs "$each" || { [ "$group" = + ] && ! begun "$pid"; }; then
        [ "$group" = + ] && pid=-$pid
        kill -s KILL -- "$pid"
    fi
done 2>/dev/null
"""


class _Guardian:
    """A process that outlives this host by a moment, and ends what the host was to end. There is one while
    any plugin runs or starts. Any thread may call this; `_lock` protects all of it, and is held for moments:
    no write waits. One that somebody has killed or stopped is replaced when it is told something."""

    _FLAGS = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_NOSIGNAL", 0)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: Any = None
        self._line: Any = None  # a socket, as a write to it raises no SIGPIPE; its end is the host's
        self._told: dict[str, str] = {}  # what it is to end or to remove, and the line that said so
        self._users = 0

    def hire(self) -> None:
        """Somebody starts a plugin, and will `leave`."""
        with self._lock:
            self._users += 1
            if self._process is None:
                self._begin()

    def leave(self) -> None:
        """The plugin of a `hire` is gone. With the last one the guardian goes."""
        with self._lock:
            self._users -= 1
            if not self._users:
                self._told.clear()  # a folder that would not do after all
                self._part()

    def watch(self, what: str, line: str = "") -> None:
        """`what` is a folder; or the number of a process, and `line` that with the sign before it."""
        with self._lock:
            if "\n" not in what:
                self._told[what] = line or what
                self._say(self._told[what])

    def forget(self, what: str) -> None:
        """To be called while the number is still the process's own."""
        with self._lock:
            line = self._told.pop(what, "")
            if line:
                self._say(f"{'!' if line == what else '-'}{what}")

    def at_exit(self) -> None:
        """What is left is its now."""
        with self._lock:
            self._part()

    def _begin(self) -> None:
        """There is none where there is no shell: a plugin still ends by itself when its connection does.
        A host that is itself a plugin has its own host's guardian behind it: then this one waits less."""
        nested = _ADDRESS in _environment or _ADDRESS in os.environ
        tenths = "5" if nested else str(_GUARDIAN_SECONDS * 10)
        argv = [_SHELL, "-c", _GUARDIAN, "miniplug-guardian", tenths]
        try:
            self._line, theirs = socket.socketpair()
        except OSError:  # no descriptor to be had
            return
        try:
            for end in (self._line, theirs):  # whatever the host's default timeout is
                end.setblocking(True)
            if sys.platform == "darwin":
                self._line.setsockopt(socket.SOL_SOCKET, 0x1022, 1)  # SO_NOSIGPIPE
            self._process = _popen(argv, stdin=theirs.fileno(), stdout=_DEVNULL, stderr=_DEVNULL, cwd="/",
                                   env={"PATH": os.defpath}, start_new_session=True)
        except OSError:
            self._line.close()
        finally:
            theirs.close()

    def _say(self, line: str) -> None:
        if self._process is not None and not self._hears(line):
            self._process.kill()
            self._process.wait()
            self._process = None
            self._line.close()
            self._begin()
            _ = self._process is not None and self._hears("\n".join(self._told.values()))

    def _hears(self, lines: str) -> bool:
        data = os.fsencode(lines) + b"\n"
        try:
            return self._process.poll() is None and self._line.send(data, self._FLAGS) == len(data)
        except OSError:
            return False

    def _part(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        self._line.close()
        try:
            if not any(what.isdigit() for what in self._told):  # it has but folders to remove
                process.wait(1.0)
        except _import("subprocess").TimeoutExpired:  # somebody has stopped it
            process.kill()
            process.wait()

    def disown(self) -> None:
        """In a forked child: let go of what would keep the guardian waiting."""
        if self._process is not None:
            self._process.returncode = 0
            self._line.close()
        self.__init__()  # type: ignore[misc]


_guardian = _Guardian()


class _PosixProcess:
    """A process, and the group that it leads unless it shares the terminal. `_lock` protects `_reaped`:
    nobody is signalled after the reaping, when the number may be another's."""

    excess = ""  # which limit it went over, in words, once it is reaped

    def __init__(self, argv: Sequence[str], limits: Limits | None, terminal: bool, **popen: Any) -> None:
        self._limits, self._leads = limits, not terminal
        self._lock = threading.Lock()
        self._reaped = False
        argv = limits._command(argv, popen["env"]) if limits else argv
        self._popen = _popen(argv, start_new_session=self._leads, **popen)
        self.pid: int = self._popen.pid
        self.stdout, self.stderr = self._popen.stdout, self._popen.stderr
        self._guarded = True
        _guardian.hire()
        _guardian.watch(str(self.pid), f"{'+' if self._leads else '='}{self.pid}")

    def signal(self, kill: bool) -> None:
        with self._lock:
            try:
                if not self._reaped:
                    (_posix.killpg if self._leads else os.kill)(self.pid, 9 if kill else 15)
            except OSError:
                pass  # there is nobody left (or only the dead, which macOS calls a lack of permission)

    def await_exit(self) -> None:
        """It stays unreaped, so that its number stays its own."""
        try:
            if hasattr(os, "waitid"):
                _posix.waitid(_posix.P_PID, self.pid, _posix.WEXITED | _posix.WNOWAIT)
            else:  # macOS before Python 3.13: a group keeps the number while anybody is in it
                self._popen.wait()
        except ChildProcessError:
            pass  # somebody else in this host has reaped it

    def reap(self) -> int | None:
        """None if somebody else has reaped it, so that nobody knows how it ended."""
        self.keep()
        with self._lock:
            self._reaped = True
            try:
                if self._popen.returncode is None:
                    _, status, usage = _posix.wait4(self.pid, 0)
                    signalled = _posix.WIFSIGNALED(status)
                    code = -_posix.WTERMSIG(status) if signalled else _posix.WEXITSTATUS(status)
                    self._popen.returncode = code
                    if self._limits:
                        self.excess = self._limits._broken(code, usage.ru_utime + usage.ru_stime)
            except ChildProcessError:
                self._popen.wait()  # which then knows that there is nothing to wait for
                return None
        return int(self._popen.returncode)

    def keep(self) -> None:
        if self._guarded:
            self._guarded = False
            _guardian.forget(str(self.pid))
            _guardian.leave()

    def disown(self) -> None:
        self._reaped = True
        self._popen.returncode = 0


class _WindowsProcess:
    """A process in a job object, which ends with its last handle: with the host, however that ends. `_lock`
    protects `_job`: nothing is done to whatever has the number of a closed handle."""

    excess = ""
    _CALLS = ("CreateJobObjectW", 2), ("SetInformationJobObject", 4), ("AssignProcessToJobObject", 2), \
             ("TerminateJobObject", 2), ("CloseHandle", 1)

    def __init__(self, argv: Sequence[str], limits: Limits | None, terminal: bool, **popen: Any) -> None:
        suspended, new_group, no_window = 0x4, 0x200, 0x08000000
        self._limits = limits
        self._lock = threading.Lock()
        self._system = self._typed("kernel32", *self._CALLS)
        self._job = self._system.CreateJobObjectW(None, None)
        self._popen: Any = None
        try:
            self._demand(self._limit(), "Windows refuses them")
            # a group of its own hears no Ctrl-C, not even in the host's console
            flags = suspended | new_group | (0 if terminal else no_window)
            self._popen = _popen(argv, creationflags=flags, **popen)
            handle = int(self._popen._handle)
            added = self._system.AssignProcessToJobObject(self._job, handle)
            self._demand(added, "Windows refuses to put it into a job")
            status = self._typed("ntdll", ("NtResumeProcess", 1)).NtResumeProcess(handle)
            if status < 0:
                raise OSError(f"it cannot be let run: status 0x{status & 0xFFFFFFFF:08X}")
        except BaseException:
            if self._popen is not None:
                self._popen.kill()
            self._close()
            raise
        self.pid: int = self._popen.pid
        self.stdout, self.stderr = self._popen.stdout, self._popen.stderr

    @staticmethod
    def _typed(library: str, *calls: tuple[str, int]) -> Any:
        """A library with the types of its calls: ctypes takes what it is not told for an int, and would cut a
        handle in two. What is no handle is as large as one in a register, or smaller."""
        ctypes = _import("ctypes")
        functions = ctypes.WinDLL(library)
        for name, count in calls:
            function = getattr(functions, name)
            function.argtypes = [ctypes.c_void_p] * count
            function.restype = ctypes.c_void_p if name.startswith("Create") else ctypes.c_int
        return functions

    def _limit(self, stays: bool = False) -> bool:
        settings = (self._limits or Limits())._as_job(stays)
        return bool(self._system.SetInformationJobObject(self._job, 9, settings, len(settings)))

    def _demand(self, done: Any, why: str) -> None:
        """Without limits a process runs without a job, too."""
        if self._limits and not done:
            raise OSError(f"its limits cannot be set: {why}")

    def keep(self) -> None:
        self._limit(stays=True)

    def signal(self, kill: bool) -> None:
        """Windows has no gentler way for a process without a window."""
        with self._lock:
            if self._job is not None:
                self._system.TerminateJobObject(self._job, 1)
        try:
            self._popen.kill()  # in case there is no job
        except OSError:
            pass  # it has ended

    def await_exit(self) -> None:
        self._popen.wait()

    def reap(self) -> int:
        self._close()
        code = int(self._popen.wait())
        self.excess = self._limits._broken(code, 0.0) if self._limits else ""
        return code

    def _close(self) -> None:
        with self._lock:
            job, self._job = self._job, None
            if job is not None:
                self._system.CloseHandle(job)

    def disown(self) -> None:
        """There are no forks."""


class _NoProcess:
    """Stands for a process that is another host's, or this one itself: there is but a connection to it. What
    is served here has a `thread` that does that."""

    stdout = stderr = None
    excess = ""

    def __init__(self, channel: _Channel, pid: int, thread: threading.Thread | None = None) -> None:
        self.pid, self._channel, self._thread = pid, channel, thread
        self._let_go = threading.Event()

    def signal(self, kill: bool) -> None:
        self._channel.shutdown()
        self._let_go.set()

    def await_exit(self) -> None:
        self._let_go.wait() if self._thread is None else self._thread.join()

    def reap(self) -> int | None:
        return None if self._thread is None else 0

    def keep(self) -> None:
        """It stays anyway."""

    def disown(self) -> None:
        """A forked child has nothing of it."""


_LINE_LIMIT = 16 << 20  # characters; a longer line is delivered in pieces, as it must be kept until its end
_TAIL_LINES = 30  # how many last lines an error carries
_TAIL_RECORD = 1 << 14  # how much of a log record is kept for that

# What a plugin's output may cost: a line that is over one of these is logged as text.
_RECORD_LIMIT = 1 << 20  # characters of a log record
_RECORD_DEPTH = 20  # of lists and objects in each other
_TRACE_LIMIT = 1 << 20  # characters of a traceback; then its lines are logged one by one
_MODULES = 200  # loggers that a plugin may make, in the host's life
_MODULE_LENGTH = 200  # characters of a logger's name
_MODULE_DEPTH = 10  # parts of it, between dots
_modules: dict[str, set[str]] = {}  # the loggers that were made, by the plugin's own


class _Lines:
    """Bytes to lines: one output stream of a plugin, read by one thread. `deliver` takes each line as text;
    `tail` keeps the last ones."""

    def __init__(self, file: IO[bytes], deliver: Callable[[str], Any]) -> None:
        self.file = file
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._log = deliver if isinstance(deliver, _LogSink) else None
        self._deliver = deliver
        self._decoder = _import("codecs").getincrementaldecoder("utf-8")("backslashreplace")
        self._begun: list[str] = []  # a line, as much of it as has come
        self._size = 0
        self._returned = False  # whether the last line has ended with a \r, which a \n may follow
        self._report: list[str] = []  # the head of what faulthandler has written

    def read_until(self, ended: Callable[[], bool], wake: int) -> None:
        """Deliver lines until the stream ends, or the process has and nothing more comes: another one may
        hold the pipe open for ever. What has come by then is read for a moment yet."""
        more, last = True, float("inf")
        while more and time.monotonic() < last:
            over = ended()
            last = min(last, time.monotonic() + 0.8) if over else last
            if self._await_more(0.0 if over else 0.1 if self._log and self._log.trace else None, wake):
                more = self._read()
            else:  # nothing more has come for a moment: a traceback that the log holds back goes on
                more = not over
                self._flush()
        self._flush()

    def _read(self) -> bool:
        """Read what there is and deliver its lines. False at the end."""
        try:
            data = os.read(self.file.fileno(), 1 << 16)
        except OSError:
            data = b""
        self._take(data)
        return bool(data)

    def _take(self, data: bytes) -> None:
        """Deliver the lines of what has come; at the end, of nothing, what there is."""
        text = self._decoder.decode(data, final=not data)
        if text:
            text, self._returned = text[self._returned and text[0] == "\n" :], text[-1] == "\r"
        first, *others = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        self._add(first)
        for text in others:
            self._end_line()
            self._add(text)
        if self._size >= _LINE_LIMIT or (self._size and not data):
            self._end_line()

    def _add(self, text: str) -> None:
        self._begun.append(text)
        self._size += len(text)

    def _end_line(self) -> None:
        text, self._begun, self._size = "".join(self._begun), [], 0
        self.tail.append(text[:_TAIL_RECORD] if text.startswith("{") else _cut(text))
        if text.startswith("Fatal Python error: "):
            self._report = []
        if text.startswith("Fatal Python error: ") or 0 < len(self._report) < 10:
            self._report.append(self.tail[-1])
        _guard(self._deliver, text)

    def _flush(self) -> None:
        if self._log is not None:
            _guard(self._log.flush)

    def last(self) -> list[str]:
        """The last lines, for people: a log record reads as one does in a log."""
        lines = [line for text in self.tail for line in _readable(text).splitlines() or [""]]
        lines = [_cut(line) for line in lines[-_TAIL_LINES:]]
        if self._report and self._report[0] not in lines:  # its head tells most: the latest frames come first
            lines = [*self._report, "...", *lines[-9:]]
        return lines

    def _await_more(self, seconds: float | None, wake: int) -> bool:
        """Wait for something to read, until there is something in `wake`. False if there is nothing."""
        if not _WINDOWS:
            poll = _import("select").poll()
            poll.register(self.file, 1)  # POLLIN
            poll.register(wake, 1)
            return self.file.fileno() in dict(poll.poll(None if seconds is None else seconds * 1000))
        handle = _import("msvcrt").get_osfhandle(self.file.fileno())
        deadline = time.monotonic() + (seconds or 0.0)
        try:
            while seconds is not None and not _import("_winapi").PeekNamedPipe(handle, 0)[0]:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.005)
        except OSError:
            pass  # its end
        return True  # without a limit reading itself is what waits


def _record_of(line: str) -> dict[str, Any]:
    """The fields of a log record. Raises ValueError for a line that is none, or one of more than is
    reasonable."""
    if not line.startswith("{") or len(line) > _RECORD_LIMIT:
        raise ValueError("no record, or too long")
    try:
        fields = json.loads(line, parse_int=_short_int)
    except RecursionError:
        raise ValueError("too deep") from None
    if not isinstance(fields.get("@message"), str) or not _is_shallow(fields, _RECORD_DEPTH):
        raise ValueError("no message, or too deep")
    return {_clean(key): _clean(value) for key, value in fields.items()}


def _short_int(digits: str) -> int:
    if len(digits) > 1000:  # to read, print and compare it takes too long
        raise ValueError("too many digits")
    return int(digits)


def _is_shallow(value: Any, depth: int) -> bool:
    if isinstance(value, (dict, list)):
        return depth > 0 and all(_is_shallow(each, depth - 1)
                                 for each in (value.values() if isinstance(value, dict) else value))
    return True


def _clean(value: Any) -> Any:
    """Text without lone surrogates, which no file takes."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _readable(line: str) -> str:
    """A log record as text, with its traceback on lines of its own. Any other line is itself."""
    try:
        fields = _record_of(line)
    except ValueError:
        return line
    more = "".join(f" {key}={value}" for key, value in fields.items() if not key.startswith("@"))
    trace = f"\n{fields['@traceback']}" if fields.get("@traceback") else ""
    level = str(fields.get("@level", "info")).upper()
    return f"[{level}] {fields.get('@module', '')}: {fields['@message']}{more}{trace}"


def _guard(function: Callable[..., Any], *args: Any, what: str = "what takes a plugin's output") -> None:
    """Call what the host has given us (a callable, a log handler). What it raises is logged, no more."""
    try:
        function(*args)
    except BaseException as error:
        try:
            _import("logging").getLogger("miniplug").error("%s raised", what, exc_info=error)
        except Exception:
            pass  # the log handler is what raises: there is nobody left to tell


class _LogSink:
    """Lines to log records: hclog's JSON as it says, a traceback as one record, anything else as it is."""

    _HEADS = ("Traceback (most recent call last):", "Exception in thread ", "  + Exception Group Traceback")
    _LINKS = ("", "During handling of the above exception, another exception occurred:", _HEADS[0],
              "The above exception was the direct cause of the following exception:")

    def __init__(self, parent: logging.Logger, stream: str) -> None:
        self._parent = parent
        self._logger = parent.getChild(stream)
        self._stderr = stream == "stderr"
        self.trace: list[str] = []  # the lines of a traceback, which may go on
        self._room = 0  # how many characters more it may have

    def __call__(self, line: str) -> None:
        self._room -= len(line) + 1
        if self.trace and self._room >= 0 and self._goes_on(line):
            self.trace.append(line)
            return
        self.flush()
        if self._stderr and line.startswith(self._HEADS):
            self.trace, self._room = [line], _TRACE_LIMIT
        elif not (self._stderr and line.startswith("{") and self._record(line)):
            self._logger.log(30 if self._stderr else 20, "%s", line)

    def _goes_on(self, line: str) -> bool:
        """Whether the traceback does: up to the line that names the exception, or with one of a chain."""
        if not self.trace[-1].startswith((" ", *self._HEADS)):
            return line in self._LINKS
        return line.startswith(" ") or not self.trace[0].startswith(" ")

    def flush(self) -> None:
        lines, self.trace = self.trace, []
        if lines:
            self._logger.error("%s", "\n".join(lines).rstrip("\n"))

    def _record(self, line: str) -> bool:
        """Log a line of hclog's JSON with its level, logger and fields. False if it is none."""
        try:
            fields = _record_of(line)
            message, level = fields.pop("@message"), fields.pop("@level", "info").lower()
        except (ValueError, AttributeError):
            return False
        name, number = fields.pop("@module", ""), fields.pop("@levelno", None)
        known = type(number) is int and 0 < number <= 100  # a logger remembers each that it was asked for
        number = number if known else _LEVELS.get(level, 20)
        logger = self._logger_for(name)
        if logger.isEnabledFor(number):
            logger.handle(self._made(logger, number, message, fields))
        return True

    def _logger_for(self, name: Any) -> logging.Logger:
        """The logger of a module. One that is made is kept for ever: so those of a plugin are no more than so many, and
        their names no longer. What is over that goes to the plugin's own."""
        if not isinstance(name, str) or name == "root" or not all(name.split(".")):  # logging goes astray at ".."
            return self._parent
        whole = f"{self._parent.name}.{name}"
        made = _modules.setdefault(self._parent.name, set())
        if whole not in made and not hasattr(self._parent.manager.loggerDict.get(whole), "handlers"):
            if len(made) >= _MODULES or len(name) > _MODULE_LENGTH or name.count(".") >= _MODULE_DEPTH:
                return self._parent
            made.add(whole)
        return self._parent.getChild(name)

    @staticmethod
    def _made(logger: logging.Logger, number: int, message: str, fields: dict[str, Any]) -> logging.LogRecord:
        record = logger.makeRecord(logger.name, number, "(plugin)", 0, "%s", (message,), None)
        trace = fields.pop("@traceback", None)
        record.exc_text = trace if isinstance(trace, str) else None  # formatters print it below the message
        try:
            when = fields.pop("@timestamp").replace("Z", "+00:00")
            created = _import("datetime").datetime.fromisoformat(when).timestamp()
            time.localtime(created)  # formatters do that, and no platform can for every time
            record.created, record.msecs = created, created % 1 * 1000
        except (KeyError, AttributeError, TypeError, ValueError, OverflowError, OSError):
            pass  # then it is the time of its arrival
        known = _standard_fields()
        vars(record).update((key, value) for key, value in fields.items() if key not in known)
        return record


_WINDOWS_ERRORS = {
    0xC0000005: "an access violation", 0xC000001D: "an illegal instruction", 0xC0000094: "a division by zero",
    0xC00000FD: "a stack overflow", 0xC0000135: "a DLL that is missing", 0xC000013A: "Ctrl-C",
    0xC0000142: "a DLL that did not start", 0xC0000374: "a heap that is corrupt",
    0xC0000409: "abort() or a buffer overrun", 0xE06D7363: "a C++ exception"}


def _end_words(code: int | None) -> tuple[str, str | None]:
    """How a process ended, in words, and the name of the signal if it was one."""
    if code is None:
        return "ended", None
    if 0xC0000000 <= code < 0xF0000000:  # an error of Windows, or a language's own
        return f"died of {_WINDOWS_ERRORS.get(code, 'an unhandled exception')} (status 0x{code:08X})", None
    if code >= 0:
        return f"exited with status {code}", None
    try:
        name = _import("signal").Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"died of {name}", name


_TELLING = "Fatal Python error: ", "  PYTHONHOME = '"  # what names the cause, however much comes after it


def _last_words(lines: Sequence[str]) -> str:
    told = [line for line in lines[:-20] if line.startswith(_TELLING)]
    shown = [*told, *lines[-20:][len(told):]]
    return ". The last it wrote:" + "".join(f"\n    {line}" for line in shown) if lines else ""


# === 10. plugin =======================================================================================
#
# Four rooms. The recipe: what was asked for, checked once. A run: one process, from its start to its end. The
# supervisor: which run calls go to, and when another is started. Plugin: what the user holds, which has no
# state but the name of its supervisor.
#
# A lock of a lower room is taken while one of a higher is held, never the other way: the supervisor's `news`,
# then a session's. Nothing is started, ended, sent or called back under `news`.

_PAUSE = 0.1  # seconds between a crash and the next start; twice that after another one, and so on
_LONGEST_PAUSE = 10.0


def _is_seconds(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and value >= 0)


def _is_path(value: Any) -> bool:
    return value is None or isinstance(value, (str, bytes, os.PathLike))


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and value >= least


def _is_output(value: Any) -> bool:
    if isinstance(value, str):
        return value in ("discard", "inherit", "log")
    return callable(value) or (hasattr(value, "write") and "b" not in str(getattr(value, "mode", "")))


def _is_environment(env: Any) -> bool:
    if not hasattr(env, "items"):
        return env is None
    return all(isinstance(part, str) for item in env.items() for part in item)


# What the options take. Their defaults are those of Plugin's signature, where type checkers look for them.
_OPTIONS: Sequence[tuple[str, str, type, Callable[[Any], bool]]] = (
    ("name", "it is a str", TypeError, lambda value: value is None or isinstance(value, str)),
    ("handshake", "it is a miniplug.Handshake", TypeError,
     lambda value: hasattr(value, "magic_cookie_value")),  # that of another copy of this file will do
    ("protocol_versions", "it is a list of whole numbers, each at least 0", ValueError,
     lambda value: isinstance(value, list) and value != [] and all(map(_is_count, value))),
    ("cwd python", "it is a path", TypeError, _is_path),
    ("env", "it is a dict; names and values are str", TypeError, _is_environment),
    ("start_timeout call_timeout", "it is a number of seconds, or None for no limit", ValueError,
     _is_seconds),
    ("restart_window heartbeat idle_timeout", "it is more than 0 seconds, or None", ValueError,
     lambda value: _is_seconds(value) and value != 0),
    ("max_restarts", "it is a whole number, at least 0", ValueError, _is_count),
    ("max_message", f"it is a whole number, at least {_HELLO_LIMIT}", ValueError,
     lambda value: _is_count(value, _HELLO_LIMIT)),
    ("stdin", "it is 'discard', 'inherit', or a file", ValueError,
     lambda value: value in ("discard", "inherit") if isinstance(value, str) else hasattr(value, "fileno")),
    ("stdout stderr", "it is 'log', 'inherit', 'discard', a function, or a text file", ValueError,
     _is_output),
    ("logger", "it is a logging.Logger (that of a LoggerAdapter is its .logger)", TypeError,
     lambda value: value is None or hasattr(value, "getChild")),
    ("limits", "it is a miniplug.Limits", TypeError,
     lambda value: value is None or isinstance(value, Limits)),
    ("on_start on_exit", "it is a function, which is called with the plugin", TypeError,
     lambda value: value is None or callable(value)),
    ("inherit_env managed persist", "it is True or False", TypeError, lambda value: value in (True, False)))


class _Recipe:
    """What a plugin is made from: the options, checked once, as attributes, and where its paths start. None
    of it changes any more, so any thread may read it. `config`: of a process that is attached to. `process`:
    what starts one."""

    _process: Callable[..., Any] = _WindowsProcess if _WINDOWS else _PosixProcess

    def __init__(self, command: _Command, config: dict[str, Any] | None = None, **options: Any) -> None:
        given = {**(Plugin.__init__.__kwdefaults__ or {}), **options}
        versions = given["protocol_versions"]
        if versions is None:
            versions = [getattr(given["handshake"], "protocol_version", 1)]
        given["protocol_versions"] = [*versions] if hasattr(versions, "__iter__") else versions
        for names, words, kind, is_right in _OPTIONS:
            for name in names.split():
                if not is_right(given[name]):
                    raise kind(f"{name}={given[name]!r}: {words}")
        vars(self).update(given)
        self.config = config
        self.process = type(self)._process
        self.command = _checked_command(command)
        self.sha256 = _checked_digests(given["sha256"], self.command)
        self.name: str = given["name"] or _default_name(self.command)
        limit = given["start_timeout"]
        self.start_timeout = _FOREVER if limit is None else min(limit, _FOREVER)
        try:
            self.folder = os.path.abspath(os.fsdecode(self.cwd or ""))  # what is relative starts there
        except FileNotFoundError:  # the current folder is gone
            self.folder = ""
        python = os.fsdecode(self.python or sys.executable or "")
        self.is_own = python == (sys.executable or "")  # whether that is this interpreter
        elsewhere = os.path.dirname(python) and not self.is_own
        self.interpreter = os.path.join(self.folder, python) if elsewhere else python

    if TYPE_CHECKING:
        def __getattr__(self, name: str) -> Any: ...

    def place(self) -> str | None:
        """The folder to start in; None for that of this process, which may not be there by its name."""
        try:
            moved = self.folder != os.path.abspath("")
        except FileNotFoundError:
            moved = False
        return self.folder if moved or self.cwd is not None else None

    # -- what to run

    def argv(self) -> list[str]:
        """What to run, once its files are checked. Raises LaunchError if that can be told to fail."""
        if not self.command:
            raise self.not_started([], "the command is empty")
        argv = self._resolved(self.command) if isinstance(self.command, str) else [*self.command]
        for path, expected in self.sha256.items():
            self._check_file(argv, self._program(argv) if path is None else path, expected)
        return argv

    def _resolved(self, command: str) -> list[str]:
        name, source, attribute = _split_spec(command)
        path = source if attribute and not source.endswith(".py") else self._existing(source)
        if not attribute and not path.endswith((".py", ".pyw")):
            return [path]
        what = ["serve", f"{name}={path}:{attribute}"] if attribute else ["run", path]
        return [*self._loader(command), *what]

    def _loader(self, command: str) -> list[str]:
        """What runs Python code by this very file."""
        python, frozen = self.interpreter, hasattr(sys, "frozen")
        known = os.path.basename(python).lower().startswith(("python", "pypy", "graalpy"))
        if self.python is not None or (known and not frozen):
            own = self.is_own and not frozen
            flags = _import("subprocess")._args_from_interpreter_flags() if own else []
            return [python, *flags, "-c", _BOOTSTRAP, self._own_file(command), __name__]
        if _frozen_mains:
            return [python, _FROZEN]
        freeze = ", or call miniplug.freeze_support() first in its main program" if frozen else ""
        which = f"this application ({python or 'an embedded Python'}) has no interpreter of its own to run it"
        raise self.not_started([command], f"{which}: pass python='/path/to/python'{freeze}")

    def _own_file(self, command: str) -> str:
        """This file, for another process to load. Where all is frozen, that has to be packed as well."""
        if not hasattr(sys, "frozen"):
            return _FILE
        file = _FILE.rstrip("c")  # .pyc, says PyInstaller
        if not os.path.isfile(file):
            what = f"{file} is not there for {self.interpreter} to load: pack it there as a data file"
            raise self.not_started([command], f"{what} (freeze_support tells how)")
        return file

    def _whole(self, path: str) -> str:
        whole = os.path.normpath(os.path.join(self.folder, path))
        if not os.path.isabs(whole):
            raise self.not_started([], "there is no current folder")
        return whole

    def _existing(self, path: str) -> str:
        """A file in the folder, or a program on the path."""
        whole = self._whole(path)
        if os.path.isfile(whole):
            return whole
        which = _import("shutil").which
        found = None if os.path.dirname(path) else which(path)
        if found is not None:
            return str(found)
        why = "it is a folder" if os.path.isdir(whole) else "there is no such file"
        words = path.split()
        if len(words) > 1 and which(words[0]):
            why += f"; a program with arguments is a list: {words}"
        elif ".py" in path and not path.endswith((".py", ".pyw")):
            why += "; what is in a file is named after a colon: 'path/to/file.py:Attr'"
        elif not path.endswith(".py") and all(part.isidentifier() for part in path.split(".")):
            why += "; what is in a module is named after a colon: 'module:Attr'"
        raise self.not_started([path], f"{whole}: {why}")

    def _program(self, argv: list[str]) -> str:
        """The file that a single digest is of. A program of an argument list is looked up here, and run by
        its path then."""
        if isinstance(self.command, str):
            return self._existing(_split_spec(self.command)[1])
        if _script_of(argv) is argv[0] and not os.path.dirname(argv[0]):
            argv[0] = _import("shutil").which(argv[0], path=self.environ().get("PATH")) or argv[0]
        return _script_of(argv)

    def _check_file(self, argv: list[str], path: str, expected: str) -> None:
        """Raises ChecksumError, or LaunchError for a file that cannot be read."""
        whole = self._whole(path)
        digest = _import("hashlib").sha256()
        try:
            with open(whole, "rb") as file:
                for block in iter(partial(file.read, 1 << 20), b""):
                    digest.update(block)
        except OSError as error:
            raise self.not_started(argv, f"{whole} cannot be checked: {error.strerror}") from None
        actual = digest.hexdigest()
        if actual != expected:
            reason = f"{whole} is not the file expected: its SHA-256 is {actual}, not {expected}"
            raise self.not_started(argv, reason, ChecksumError, path=whole, expected=expected, actual=actual)

    # -- and around it

    def environ(self) -> dict[str, str]:
        """What the plugin's environment has beside the address and the key."""
        env = {name: value for name, value in os.environ.items()
               if (self.inherit_env or name in _SYSTEM_VARIABLES) and not name.startswith("MINIPLUG_")}
        if isinstance(self.command, str) and not self.is_own:
            for name in ("PYTHONHOME", "PYTHONEXECUTABLE", "PYTHONPATH", "__PYVENV_LAUNCHER__"):
                env.pop(name, None)
            for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LIBPATH"):
                before = env.pop(f"{name}_ORIG", "") if hasattr(sys, "frozen") else ""
                if before or getattr(sys, "_MEIPASS", "\0") in env.get(name, ""):
                    env[name] = before  # what was there before the frozen application
        env.update((_variable(name), value) for name, value in (self.env or {}).items())
        if self.sha256:
            env[_SOURCE_ONLY] = "1"
        if any(path and path.endswith(".py") for path in self.sha256):
            env["PYTHONPYCACHEPREFIX"] = os.devnull  # no bytecode cache for what it imports either
        env[_COOKIE_KEY] = self.handshake.magic_cookie_key
        env[_variable(self.handshake.magic_cookie_key)] = self.handshake.magic_cookie_value
        env.update({_PERSIST: "1"} if self.persist else {})
        return env

    def above(self) -> list[Any]:
        """What is being started, from the first host down to this process, while this one does not serve yet:
        [[the program, None for a spec; where its host listens], ...].

        Raises RuntimeError if this plugin must not be launched there: one whose module launches what imports
        it would go on for ever.
        """
        above: list[Any] = json.loads(_environment.get(_LOADING) or os.environ.get(_LOADING) or "[]")
        for program, address in above:
            if program in (None, self.identity()):
                what = f"the plugin {self.name!r} is not launched: this process is being started as a plugin"
                how = "A host's module that it imports has to have what launches plugins under"
                raise RuntimeError(f'{what}, and does not serve yet. {how}  if __name__ == "__main__":')
            try:
                if not _WINDOWS and address:
                    _connect(address, _HELLO_SECONDS).close()
            except OSError:
                raise RuntimeError("a host above this process, which does not serve yet, is gone") from None
        return above

    def identity(self) -> str | None:
        """By which a program knows itself, whatever its arguments. (A spec's process launches nothing.)"""
        if isinstance(self.command, str):
            return None if _split_spec(self.command)[2] else os.path.realpath(self._whole(self.command))
        script = _script_of(self.command or [""])
        if script.endswith((".py", ".pyw")):
            return os.path.realpath(self._whole(script))
        end = self.command.index("-m") + 2 if "-m" in self.command else len(self.command)
        return " ".join(self.command[:end])

    def log(self) -> Any:
        return self.logger or _import("logging").getLogger(f"miniplug.{self.name}")

    def attaches_to(self) -> dict[str, Any] | None:
        """The config of the process to attach to, if it is not to be started."""
        text = os.environ.get(_ATTACH)
        if self.config is not None or not text or self.process is not type(self)._process:
            return self.config
        try:
            configs = json.loads(text)
            if not isinstance(configs, dict) or not all(isinstance(each, dict) for each in configs.values()):
                raise ValueError("it does not name the plugin that it is for")
            config = _checked_config(configs[self.name]) if self.name in configs else None
        except (ValueError, RecursionError) as error:
            reason = f"the variable {_ATTACH} is not {{NAME: config}} as JSON: {error}"
            raise self.not_attached(reason) from None
        if config is None:
            self.log().info("launched: %s names %s, and not %r", _ATTACH, [*configs], self.name)
        else:
            self.log().info("attaching to the process %s: so says %s", config["pid"], _ATTACH)
        return config

    # -- why it does not start

    def not_started(self, argv: list[str], reason: str, kind: type[LaunchError] = LaunchError,
                    **carried: Any) -> LaunchError:
        words = _last_words(carried.get("output", ()))
        return kind(f"the plugin {self.name!r} did not start: {reason}{words}", command=argv, **carried)

    def not_attached(self, reason: str, kind: type[LaunchError] = LaunchError, **carried: Any) -> LaunchError:
        return kind(f"there is no attaching to the plugin {self.name!r}: {reason}", **carried)

    def no_process(self, argv: list[str], error: Exception) -> LaunchError:
        """Why the operating system did not start it."""
        known: dict[type, str] = {FileNotFoundError: "there is no such program",
                                  PermissionError: "it is not executable for this user"}
        place = self.place()
        if place is not None and not os.path.isdir(place):
            return self.not_started(argv, f"cwd={place!r}: there is no such folder")
        return self.not_started(argv, f"{argv[0]}: {known.get(type(error), error)}")

    def no_plugin(self, argv: list[str]) -> str:
        """What to do about a program that has ended well, and was no plugin."""
        hint = "it is no plugin, or does not call miniplug.serve()"
        if not isinstance(self.command, str):
            return hint
        _, source, attribute = _split_spec(self.command)
        if len(argv) == 1:
            hint += f" (what ran is {argv[0]})"
        elif not attribute:
            hint += f"; or it has what is to be served, which is named after a colon: '{source}:Attr'"
        if self.python is not None:
            hint += f"; or python={self.python!r} is no Python"
        return hint


class _Run:
    """One process of a plugin, from its start to its end: what it says, the session with it, why it ended.

    It is there before its session is (`open`). When `gone` is set the last line is delivered, the process
    reaped, `exit_code` known; when `ended` is set all that follows holds: the calls have failed, and the
    supervisor knows. Who asks for its end sets `asked` first: an end that nobody asked for is a crash.

    Its threads: a reader for each output stream; a watcher, which waits for the process and is the one that
    reaps it; and a minder, if there is a heartbeat or an idle timeout. Any thread may call its methods, and
    none of them waits without a bound. `_claim` is held for good by who ends the run: the watcher once the
    process has ended, or else who lets go of that.
    """

    def __init__(self, supervisor: _Supervisor, process: Any, sinks: Sequence[_Sink | None] = (),
                 config: dict[str, Any] | None = None, settled: threading.Event | None = None) -> None:
        self.supervisor, self.recipe, self.process = supervisor, supervisor.recipe, process
        self.pid: int = process.pid
        self.owned = config is None  # whether the process is to end with it
        self.config = config  # what another host needs to attach, of a process that stays without this one
        self.stays = config is not None  # when this host goes
        self.session: _Session | None = None
        self.asked = False
        self.exit_code: int | None = None
        self.gone, self.ended = threading.Event(), threading.Event()
        self.ended_at = 0.0  # on the monotonic clock
        self._settled = settled or threading.Event()  # set when it has connected, was refused, or has ended
        self._why = ""  # what is said of one that had to be killed
        self.verdict = ""  # and of one that crashed and is not started again
        self._claim = threading.Lock()
        self._exited = False
        self._readers: list[threading.Thread] = []
        files = (process.stdout, process.stderr)
        self._streams = [_Lines(file, sink) for file, sink in zip(files, sinks) if file and sink]
        self._wake: list[int] = []  # a pipe: a byte in it wakes the readers
        _runs.add(self)
        try:
            self._wake.extend(os.pipe() if self._streams else ())
            for stream in self._streams:
                what = stream.read_until, lambda: self._exited, self._wake[0]
                self._readers.append(_start_thread("miniplug-output", *what))
            _start_thread("miniplug-watch", self._watch)
        except BaseException:  # no descriptor or thread to be had
            self.signal(kill=True)
            self._watch()
            raise

    # -- its beginning

    def open(self, channel: _Channel, terms: _Terms) -> None:
        """Have a session with it, over an authenticated channel. Raises LaunchError."""
        recipe = self.recipe
        session = _open_session(channel, terms, recipe.max_message, _Served({}), self._lost)
        session.call_timeout = recipe.call_timeout
        self.session = session
        if not self.owned:
            session.keep_reading()  # so that the end is seen though nobody calls
        if self.gone.is_set():  # just before
            self._end_session()
        elif self.owned and "persist" in terms.features:
            self._keep(session)
        if recipe.heartbeat or recipe.idle_timeout:
            _start_thread("miniplug-mind", self._mind, session)

    def _keep(self, session: _Session) -> None:
        """It has said that it stays when this host goes: learn how to attach, and have nothing end it."""
        try:
            config = session.call(0, "reattachConfig", (), {}, _HELLO_SECONDS)
            self.config, self.stays = _checked_config(config), True
            self.process.keep()
        except (PluginError, ValueError, _Sealed) as error:
            words = f"the plugin {self.recipe.name!r} stays, and does not say how to attach to it: {error}"
            raise LaunchError(words) from None

    @property
    def takes_calls(self) -> bool:
        session = self.session
        return session is not None and session.ended is None and not (self.asked or self.gone.is_set())

    def _mind(self, session: _Session) -> None:
        """See that it answers, and is used. In rounds: that this host stood still for once tells nothing."""
        heartbeat, idle = self.recipe.heartbeat or _FOREVER, self.recipe.idle_timeout or _FOREVER
        pause = min(heartbeat / 4, idle / 8)
        silent = unused = 0.0
        while not self.gone.wait(pause) and session.ended is None:
            silent = 0.0 if heartbeat == _FOREVER or session.probe() else silent + pause
            if silent >= heartbeat:
                fate = "killed" if self.owned else "given up"
                self._why = f"answered no ping for {heartbeat:g} s and was {fate}"
                return self.signal(kill=True)
            unused = unused + pause if session.unused() else 0.0
            if unused >= idle:
                self.supervisor.retire(self)
        return None

    # -- its end

    def ask(self, grace: float) -> None:
        """Ask it to end. What is another host's is let go of."""
        self.asked = True
        if not self.owned:
            self.signal(kill=False)
        else:
            self._say_stop(grace)

    def _say_stop(self, grace: float) -> None:
        if self.session is not None and self.session.ended is None:
            self.session.ask_to_end(grace)

    def signal(self, kill: bool) -> None:
        self.process.signal(kill)

    def wait(self, seconds: float = -1) -> bool:
        """Wait until it is over. False if it is not within that many seconds."""
        return self.ended.wait(None if seconds < 0 else min(seconds, _FOREVER))

    def kill(self) -> None:
        """End it at once. What is another host's is asked to end, and then let go of."""
        self.asked = True
        if not self.owned:
            self._say_stop(0.0)
            self.wait(1.0)
        self.signal(kill=True)
        self.wait(2.0)

    def undo(self) -> None:
        """It was not to be started, or attached to."""
        (self.kill if self.owned else self.detach)()

    def detach(self) -> None:
        """Let go of a process that stays without this one."""
        self.asked = True
        if not self.owned:
            self.signal(kill=False)
            self.wait(2.0)
        elif self._claim.acquire(False):
            self._end_session()  # at which it turns its output away
            for reader in self._readers:
                reader.join(0.3)
            self._stop_reading(0.3)
            if not any(reader.is_alive() for reader in self._readers):  # on Windows they may read to its end
                self._close_files()
            self._over()

    def drain(self, seconds: float) -> None:
        """Another run has taken its place: end it as soon as it is not busy, or after so many seconds."""
        assert self.session is not None
        self.stays = False
        deadline, pause = time.monotonic() + seconds, 0.001
        while not self.session.seal() and time.monotonic() < deadline:
            self.ended.wait(pause)
            pause = min(2 * pause, 0.05)
        _end_runs([self], _GRACE)

    def _watch(self) -> None:
        self.process.await_exit()
        if self._claim.acquire(False):
            self.signal(kill=True)  # what it has left behind
            if self.config is not None and self.owned:
                _remove_stale(self.config["address"], 0.5)
            self._stop_reading(1.0)
            crashed = self.session is not None and not self.asked
            self.exit_code = self.process.reap()
            self.ended_at = time.monotonic()
            self._over()
            if crashed:
                self.supervisor.tell_exit()
        else:
            self.ended.wait()
            self.process.reap()
        for reader in self._readers:
            reader.join()  # somebody's callable may hang
        self._close_files()

    def _over(self) -> None:
        self.gone.set()
        _runs.discard(self)
        if self.session is not None:
            self.session.end(EOFError())
        self.supervisor.notice()
        self._settled.set()
        self.ended.set()
        self._end_session()

    def _end_session(self) -> None:
        if self.session is not None:
            self.session.end(EOFError())
            self.session.references.close()
            self.session.references.served.close()
            self.session.dispose()

    def _stop_reading(self, seconds: float) -> None:
        """Have the readers end, once nothing more comes, and wait for each at most that long."""
        self._exited = True
        if self._wake:
            os.write(self._wake[1], b"x")
        for reader in self._readers:
            reader.join(seconds)

    def _close_files(self) -> None:
        for stream in self._streams:
            stream.file.close()
        wake, self._wake = self._wake, []
        for fd in wake:
            os.close(fd)

    def disown(self) -> None:
        """In a forked child of the host: nothing here is ours."""
        self.process.disown()
        self.gone = self.ended = threading.Event()  # a thread that is not here may hold the old ones' locks
        self.ended.set()
        self._close_files()

    # -- why it ended

    def _lost(self, cause: BaseException) -> Callable[[list[str]], BaseException]:
        """The connection has ended: find out why, and give what makes the error to raise."""
        hopeless = not self.owned or isinstance(cause, ProtocolError)
        if hopeless or not (self.asked or self.gone.wait(0.5)):
            self.signal(kill=True)
        self.gone.wait(0.0 if self.asked else 2.0)
        return partial(self._error, self.asked, cause)

    def _error(self, asked: bool, cause: BaseException, calls: list[str]) -> BaseException:
        name = f"the plugin {self.recipe.name!r}"
        return PluginClosed(f"{name} was closed") if asked else self._crash(name, cause, calls)

    def error(self) -> BaseException:
        """What calls on it raise, as it takes none any more."""
        ended = self.session.ended if self.session is not None else None
        return self._error(self.asked, EOFError(), []) if ended is None else ended([])

    def _crash(self, name: str, cause: BaseException, calls: list[str]) -> PluginCrashed:
        words, signal_name = self.end_words()
        verdict = "" if calls or not self.owned else self.verdict
        during = f" during {', '.join(f'{method}()' for method in calls[:5])}" if calls else ""
        tail = self.tail()
        kind, text = PluginCrashed, f"{name} {self._why or words}{verdict}{during}{_last_words(tail)}"
        if isinstance(cause, ProtocolError):
            kind, text = ProtocolError, f"{name} broke the protocol and was ended{during}: {cause}"
        return kind(text, exit_code=self.exit_code, signal_name=signal_name, output=tail, calls=list(calls))

    def end_words(self) -> tuple[str, str | None]:
        """How it ended, in words, and the name of the signal if it was one."""
        words, name = _end_words(self.exit_code)
        return words + self.process.excess, name

    def tail(self) -> list[str]:
        """The last lines of stderr, or else of stdout."""
        return next((stream.last() for stream in reversed(self._streams) if stream.tail), [])


class _Start:
    """One try to bring a run up, made by a thread of its own, from nothing to a session (`open`).

    `thread` is that one's number: it alone may call on `run` until on_start has returned. The supervisor's
    `news` protects all fields: `over` is set when it has succeeded, when it has failed, and at once when the
    plugin is closed; then `error` says why.
    """

    def __init__(self, supervisor: _Supervisor, not_before: float, counts: bool) -> None:
        self.supervisor, self.recipe = supervisor, supervisor.recipe
        self.not_before = not_before  # the pause before it lasts until then, on the monotonic clock
        self.counts = counts  # as a restart
        self.thread = 0
        self.run: _Run | None = None
        self._above: list[Any] = []
        self.over = False
        self.error: BaseException | None = None

    def open(self) -> None:
        """Raises LaunchError, PluginClosed, or RuntimeError where nothing may be launched."""
        _set_exit_hooks()
        config = self.recipe.attaches_to()
        if config is not None:
            return self._attach(config)
        guarded = self.recipe.process is _PosixProcess
        if guarded or _WINDOWS:
            self._above = self.recipe.above()
        if guarded:
            _guardian.hire()
        argv: list[str] = []
        try:
            argv = self.recipe.argv()
            self._launch(argv)
        except (OSError, RuntimeError) as error:  # no descriptor or thread to be had
            if isinstance(error, PluginError):
                raise
            raise self.recipe.not_started(argv, str(error)) from None
        finally:
            if guarded:
                _guardian.leave()
        return None

    def _launch(self, argv: list[str]) -> None:
        """Start a process, and wait until it has connected, was refused, or has ended."""
        recipe, key = self.recipe, os.urandom(32)
        came: list[tuple[_Channel, Any]] = []
        arrival = threading.Event()

        def greet(channel: _Channel, address: str) -> _Terms:
            hello = _Hello(channel, address, key, "host")
            return hello.as_host(recipe.protocol_versions, recipe.max_message)

        def arrived(*what: Any) -> None:
            came.append(what)
            arrival.set()

        door = _Door(greet, arrived, made=_guardian.watch)
        folder = door.listener.folder
        try:
            run = self._spawn(argv, door.listener, key, arrival)
            in_time = arrival.wait(recipe.start_timeout)
            if run.gone.is_set():
                door.settle(0.2)  # it may have been refused just before
            if came and isinstance(came[0][1], _Terms):
                run.open(*came[0])
            if not run.takes_calls:
                raise self._failure(run, argv, in_time, door.strangers, came[0][1] if came else None)
        finally:
            door.close()
            _guardian.forget(folder)
            if self.run is None or self.run.session is None:
                for channel, _ in came:  # too late
                    channel.close()

    def _spawn(self, argv: list[str], listener: _Listener, key: bytes, settled: threading.Event) -> _Run:
        recipe, logger = self.recipe, self.recipe.log()
        env = {**recipe.environ(), _ADDRESS: listener.address, _AUTHKEY: key.hex(),
               _LOADING: json.dumps([*self._above, [recipe.identity(), listener.address]]),
               _LOG_LEVEL: str(logger.getEffectiveLevel()), _NO_STDIN: "1" * (recipe.stdin == "discard")}
        for folder in listener.passed_over:
            logger.info("its socket is in %s, not in %s", listener.folder or listener.address, folder)
        if recipe.limits and recipe.limits._not_enforced():
            logger.warning("this system has no limit of %s: it runs without", recipe.limits._not_enforced())
        words = {"discard": _DEVNULL, "inherit": None}
        stdin = words[recipe.stdin] if isinstance(recipe.stdin, str) else recipe.stdin
        sinks = _sink(recipe.stdout, logger, "stdout"), _sink(recipe.stderr, logger, "stderr")
        stdout, stderr = (None if sink is None else _PIPE for sink in sinks)
        try:
            process = recipe.process(argv, recipe.limits, recipe.stdin == "inherit" and os.isatty(0), env=env,
                                     cwd=recipe.place(), stdin=stdin, stdout=stdout, stderr=stderr)
        except (OSError, ValueError) as error:
            raise recipe.no_process(argv, error) from None
        run = _Run(self.supervisor, process, sinks, settled=settled)
        self.supervisor.admit(self, run)
        return run

    def _failure(self, run: _Run, argv: list[str], in_time: bool, strangers: int, refusal: Any) -> Exception:
        """Why the plugin did not come up."""
        recipe = self.recipe
        if run.asked:
            return self.supervisor.is_closed()
        if isinstance(refusal, HandshakeError):
            run.wait(1.0)  # it says on stderr that it was refused
            return recipe.not_started(argv, str(refusal), HandshakeError, **vars(refusal))
        if not in_time:
            run.kill()
            others = f" ({strangers} callers without the key were turned away)" if strangers else ""
            reason = f"it did not connect within {recipe.start_timeout:g} s{others}"
            return recipe.not_started(argv, f"{reason}; does it call miniplug.serve()?", output=run.tail())
        kind, reason = LaunchError, f"it {run.end_words()[0]}"
        words = "EOFError: EOF when reading", "bdb.BdbQuit", "Quitting pdb"  # the last since Python 3.14
        asked = "".join(run.tail()[-1:]).startswith(words)
        if asked and recipe.stdin == "discard":
            reason += "; its stdin is discarded: stdin='inherit' gives it the host's"
        if run.exit_code == 0:
            kind = HandshakeError
            reason += f" without connecting: {recipe.no_plugin(argv)}"
        return recipe.not_started(argv, reason, kind, exit_code=run.exit_code, output=run.tail())

    def _attach(self, config: dict[str, Any]) -> None:
        recipe, address = self.recipe, config["address"]
        try:
            channel = _connect(address, _HELLO_SECONDS)
        except (OSError, ValueError) as error:
            gone = isinstance(error, (FileNotFoundError, ConnectionRefusedError))
            ended = f"nobody listens at {address}, so the plugin has ended"
            problem = ended if gone else f"{address} cannot be reached"
            raise recipe.not_attached(f"{problem} ({error})") from None
        try:
            hello = _Hello(channel, address, bytes.fromhex(config["authkey"]), "host")
            terms = hello.as_host(recipe.protocol_versions, recipe.max_message)
            run = _Run(self.supervisor, _NoProcess(channel, config["pid"]), config=config)
            self.supervisor.admit(self, run)
            run.open(channel, terms)
        except BaseException as error:
            channel.close()
            if isinstance(error, LaunchError):
                raise recipe.not_attached(str(error), type(error), **vars(error)) from None
            if isinstance(error, (OSError, EOFError, PluginError)):
                reason = f"what listens at {address} is no plugin: {error!r}"
                raise recipe.not_attached(reason, HandshakeError) from None
            raise

    def configure(self, plugin: Plugin) -> None:
        on_start = self.recipe.on_start
        try:
            if on_start is not None and self.objection() is None:
                on_start(plugin)
        except StopIteration as error:  # which would end a loop of the caller's, and no asyncio future takes
            raise RuntimeError("on_start raised StopIteration") from error

    def objection(self) -> BaseException | None:
        """Why what has started cannot serve after all."""
        run = self.run
        if self.over or run is None or run.session is None:
            return self.error or self.supervisor.is_closed()
        return None if run.takes_calls else run.error()


class _Supervisor:
    """Which run the calls on a plugin go to, and when another one is started. One word tells where it stands:

        "down"      nobody serves: it was never started, was idle, or has crashed; a call starts it
        "starting"  `start` is under way, and calls wait for it
        "up"        `run` serves. With a `start` too, restart() has another one made to take its place
        "closed"    somebody has ended it; only start() starts it. With a `start`, that is being undone

        down --call, start()--> starting --it serves--> up --crash, idle--> down (or starting, with a `start`)
        starting --it fails--> down      any --close(), kill(), detach(), exit--> closed --start()--> starting

    `news` protects all fields and is notified of each change. It is held for moments: nothing is started,
    ended, sent or called back under it; a thread that waits for it looks again within a second, in case that
    a signal handler has changed something between its look and its sleep. Any thread may call any method.
    """

    def __init__(self, recipe: _Recipe, plugin: Plugin) -> None:
        self.recipe, self._plugin = recipe, plugin
        self._owner = os.getpid()
        self.news = threading.Condition()  # with an RLock: a signal handler may close the plugin
        self.state = "down"
        self.start: _Start | None = None
        self.run: _Run | None = None  # the latest
        self.open: _Session | None = None  # that of `run`, if any thread may call on it just now
        self.restarts = 0
        self.crash: _Run | None = None  # the run that has crashed, until another serves
        self.tries: list[float] = []  # when calls have had it started after that, within the window
        self.down_at = 0.0  # since when it is down

    # -- for calls

    def session(self, asked: _Call | None = None) -> _Session:
        """The session that this thread is to call on. Waits for a start, at most until the deadline of what
        is asked. Raises PluginClosed, PluginCrashed, or why it did not start."""
        self._check_owner()
        while True:
            session = self.open
            if session is not None and not session.sealed:
                return session
            with self.news:
                session = self._mine()
                start = self._wanted() if session is None else None
            if session is not None:
                return session
            assert start is not None
            self._await(start, asked)
            if start.error is not None:
                raise start.error

    def put_off(self, call: Any, begin: Callable[[float | None], Any], seconds: float | None) -> bool:
        """Have a submitted call begin in a thread of its own, if it has to wait for a start."""
        self._check_owner()
        with self.news:
            try:
                waits = self._mine() is None and self._wanted() is not None
            except PluginError:
                waits = False  # it fails at once
        if waits:
            _aside("miniplug-submit", self._begin, call, begin, seconds)
        return waits

    @staticmethod
    def _begin(call: Any, begin: Callable[[float | None], Any], seconds: float | None) -> None:
        try:
            begin(seconds)
        except BaseException as error:
            call._fail(error)

    def _mine(self) -> _Session | None:
        """The session that this thread may call on now."""
        start = self.own_start()
        run = start.run if start is not None else self.run if self.state == "up" else None
        return run.session if run is not None and run.takes_calls else None

    def _check_owner(self) -> None:
        """Before any lock: in a forked child a thread that is not there may hold it."""
        if self._owner != os.getpid():
            where = "belongs to the process that this one was forked from: launch another here"
            raise PluginError(f"the plugin {self.recipe.name!r} {where}")

    def own_start(self) -> _Start | None:
        """The start that this thread takes part in: it runs on_start, or what the calls of that call back."""
        start = self.start
        if start is None or start.thread == threading.get_ident():
            return start
        if start.run is None:
            return None
        request = _current.get()
        while request is not None and request.session is not start.run.session:
            request = request.outer
        return start if request is not None else None

    def own_run(self) -> _Run | None:
        """The run that this thread has to do with."""
        start = self.own_start()
        return self.run if start is None or start.run is None else start.run

    # -- starting

    def _wanted(self) -> _Start:
        """The start that calls wait for, which begins now if none is under way. Raises why there is none."""
        self.notice()
        own = self.own_start()
        if self.state == "closed":
            raise self.is_closed()
        if own is not None and own.run is not None and own.run.session is not None:
            raise own.run.error()  # it has crashed while on_start runs
        if self.start is not None:
            return self.start
        if self.crash is None:
            return self._started(0.0)
        most, window = self.recipe.max_restarts, self.recipe.restart_window
        self.tries = [each for each in self.tries if self.down_at - each < window]
        if len(self.tries) >= most:
            used_up = f" in {window:g} s are used up" if most else ""
            self.crash.verdict = f", and is not started again (max_restarts={most}{used_up}): start() it"
            raise self.crash.error()
        pause = min(_PAUSE * 2 ** min(len(self.tries), 10), _LONGEST_PAUSE)
        self.tries.append(time.monotonic())
        return self._started(self.down_at + pause, counts=True)

    def _started(self, not_before: float, counts: bool = False) -> _Start:
        start = self.start = _Start(self, not_before, counts)
        self.state = self.state if self.state == "up" else "starting"
        self.open = None
        try:
            _start_thread("miniplug-start", self._bring_up, start)
        except RuntimeError as error:
            self._fail(start, self.recipe.not_started([], str(error)))
        return start

    def start_up(self) -> None:
        """Start it, unless it is up. Who is interrupted while it waits for that ends it."""
        self._check_owner()
        if self.own_start() is not None:
            return
        with self.news:
            while self.start is not None and self.start.over:  # it is being undone
                self.news.wait(1.0)
            self.notice()
            if self.state == "up":
                return
            begins = self.start is None
            if begins:
                self.tries.clear()
            start = self.start or self._started(0.0)
            start.not_before = 0.0
            self.news.notify_all()
        self._finish(start, begins)

    def swap(self) -> _Run | None:
        """Have another run take the place of this one. Returns this one, or None if it was not up."""
        self._check_owner()
        if self.own_start() is not None:
            raise RuntimeError("on_start cannot restart the plugin")
        with self.news:
            while self.start is not None:
                self.news.wait(1.0)
            self.notice()
            old = self.run if self.state == "up" else None
            if old is not None and not old.owned:
                who = f"the plugin {self.recipe.name!r} belongs to another host"
                raise PluginError(f"{who}: that can restart it")
            start = None if old is None else self._started(0.0)
        if start is None:
            self.start_up()
        else:
            self._finish(start, True)
        return old

    def _finish(self, start: _Start, begun: bool) -> None:
        try:
            self._await(start)
        except BaseException:
            if begun:
                self.cancel(start)
            raise
        if start.error is not None:
            raise start.error

    def _await(self, start: _Start, asked: _Call | None = None) -> None:
        with self.news:
            while not start.over:
                left = asked.left() if asked is not None else None
                if left == 0.0:
                    raise _too_late(asked)  # type: ignore[arg-type]
                self.news.wait(1.0 if left is None else min(left, 1.0))

    def cancel(self, start: _Start) -> None:
        """Whoever wanted it was interrupted."""
        with self.news:
            if not start.over:
                start.over, start.error = True, self.is_closed()
            self.news.notify_all()
        if start.run is not None:
            start.run.undo()

    # -- the thread that starts

    def _bring_up(self, start: _Start) -> None:
        start.thread = threading.get_ident()
        old = self.run
        error: BaseException | None = None
        try:
            self._pause(start)
            if old is not None and self.state != "up":
                old.wait()  # it is on its way out, which has a bound
            if not start.over:
                start.open()
                start.configure(self._plugin)
        except BaseException as problem:
            error = problem
        with self.news:
            error = error or start.objection()
            if error is None:
                self._succeed(start)
        if error is not None:
            if start.run is not None:
                start.run.undo()
            with self.news:
                self._fail(start, error)

    def _pause(self, start: _Start) -> None:
        with self.news:
            while not start.over and start.not_before > time.monotonic():
                self.news.wait(min(start.not_before - time.monotonic(), 1.0))

    def admit(self, start: _Start, run: _Run) -> None:
        """There is a process, which will have a session."""
        with self.news:
            start.run = run
            if self.state != "up":
                self.run = run
            unwanted = start.over
        if unwanted:
            run.undo()

    def _succeed(self, start: _Start) -> None:
        self.restarts += start.counts
        self.run, self.crash, self.state = start.run, None, "up"
        self.open = start.run.session  # type: ignore[union-attr]
        self._settle(start)

    def _fail(self, start: _Start, error: BaseException) -> None:
        start.error = start.error or error
        if self.state == "starting":
            self.state, self.down_at = "down", time.monotonic()
        elif self.state == "up":
            self.open = self.run.session  # type: ignore[union-attr]
        self._settle(start)

    def _settle(self, start: _Start) -> None:
        start.over = True
        self.start = None
        self.news.notify_all()

    # -- its end

    def notice(self) -> None:
        """Look whether the run that serves has ended. Calls and the run itself do, whichever is first."""
        with self.news:
            run = self.run
            if self.state != "up" or run is None or run.takes_calls:
                return
            self.state, self.open = "down" if self.start is None else "starting", None
            self.down_at = run.ended_at or time.monotonic()
            self.crash = self.crash if run.asked else run
            self.news.notify_all()

    def retire(self, run: _Run) -> None:
        """End a run that nobody uses, unless somebody does just now. The next call starts another."""
        with self.news:
            idle = self.open is run.session is not None and run.takes_calls and run.session.seal()
            run.asked = run.asked or idle
            self.notice()
        if idle:
            _end_runs([run], _GRACE)

    def close(self) -> list[_Run]:
        """Start nothing more, and let go who waits for that. Returns the runs that are to be ended."""
        if self._owner != os.getpid():
            return []  # a thread that is not here may hold the lock
        with self.news:
            self.state, self.open = "closed", None
            start = self.start
            if start is not None and not start.over:
                start.over, start.error = True, self.is_closed()
            runs = [run for run in list(_runs) if run.supervisor is self]
            for run in runs:
                run.asked = True
            self.news.notify_all()
        return runs

    def is_closed(self) -> PluginClosed:
        state = "is closed: start() it again" if self.state == "closed" else "was closed while it started"
        return PluginClosed(f"the plugin {self.recipe.name!r} {state}")

    def tell_exit(self) -> None:
        if self.recipe.on_exit is not None:
            _guard(self.recipe.on_exit, self._plugin, what="on_exit")


_runs: set[_Run] = set()  # all that have not ended
_hooks_set: list[bool] = []


def _end_runs(runs: Sequence[_Run], grace: float) -> None:
    """End runs side by side: ask them, after `grace` seconds terminate, a second later kill. Returns when
    they are gone."""
    for run in runs:
        run.ask(grace)
    deadline = time.monotonic() + (grace if any(run.session for run in runs) else 0.0)
    for kill in (False, True):
        runs = [run for run in runs if not run.wait(_left(deadline))]
        for run in runs:
            run.signal(kill)
        deadline = time.monotonic() + 1.0
    for run in runs:
        run.wait(_left(deadline))


def _close_all() -> None:
    """At interpreter exit."""
    runs = [run for run in list(_runs) if run.recipe.managed or run.stays]
    for run in runs:
        run.supervisor.news.acquire()  # for good: what waits for a start has no one to tell any more
        run.supervisor.close()
        if run.stays:
            run.detach()
    _end_runs([run for run in runs if not run.stays], _GRACE)
    _guardian.at_exit()


def _disown_all() -> None:
    while _runs:
        _runs.pop().disown()
    _guardian.disown()


def _set_exit_hooks() -> None:
    """With the first launch: close what is open at exit, and own nothing in a forked child."""
    if not _hooks_set:
        _hooks_set.append(True)
        _import("atexit").register(_close_all)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_disown_all)


def _settle_with(future: Any, function: Callable[..., Any], *args: Any) -> None:
    future.set_running_or_notify_cancel()
    try:
        future.set_result(function(*args))
    except BaseException as error:
        future.set_exception(error)


async def _in_thread(function: Callable[..., Any], *args: Any, undo: Callable[[], Any] | None = None) -> Any:
    """Call what blocks in a thread: one of its own, as those of the loop may all wait for the plugin. It is
    waited for also when the task is cancelled, so that nothing is left half done; `undo` is called then,
    before and after it has returned."""
    asyncio, future = _import("asyncio"), _import("concurrent.futures").Future()
    call = asyncio.wrap_future(future)
    _aside("miniplug-async", _settle_with, future, function, *args)
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        if undo is not None:
            undo()
        await asyncio.wait([call])
        if undo is not None and not call.exception():
            undo()
        raise


class _Dispensed(_Target):
    """What a plugin serves under a name: an object of the session of each run in turn, `at` these numbers.
    It is dispensed anew in a run that it does not know, by one thread: `_lock` is for that."""

    __slots__ = ("_dispense", "_lock", "_supervisor", "at")

    def __init__(self, supervisor: _Supervisor, dispense: Callable[[_Session, float | None], _Target],
                 first: _Target) -> None:
        self.at: dict[_Session, _Target] = {}
        super().__init__(first.session, 0)  # what is given back are those
        self.identity = first.identity
        self._supervisor, self._dispense = supervisor, dispense
        self._lock = threading.RLock()
        self._add(first)

    def _add(self, target: _Target) -> None:
        known = {session: each for session, each in self.at.items() if session.ended is None}
        self.at = {**known, target.session: target}
        for each in (self, target):
            target.session.borrowed.discard(id(each))  # it keeps no run up

    def here(self) -> tuple[_Session, int] | None:
        session = self._supervisor.open
        target = self.at.get(session)  # type: ignore[arg-type]
        return None if target is None else (session, target.number)  # type: ignore[return-value]

    def number_at(self, session: _Session) -> int | None:
        return self.at[session].number if session in self.at else None

    def find(self, asked: _Call) -> tuple[_Session, int]:
        if self.released:
            raise DeadReference(f"{self.label} was released")
        session = self._supervisor.session(asked)  # not under the lock: on_start may want that
        if session not in self.at:
            if not self._lock.acquire(timeout=_left(asked.deadline)):
                raise _too_late(asked)
            try:
                if session not in self.at:
                    self._add(self._dispense(session, asked.left()))
            finally:
                self._lock.release()
        return session, self.at[session].number

    def put_off(self, *what: Any) -> bool:
        return self._supervisor.put_off(*what)

    def release(self) -> None:
        self.released = True
        for target in self.at.values():
            target.release()


class Plugin:
    """A plugin, as its host holds it: something to start, call and end, as often as you like.

    The parameters are those of `launch`, which makes one and starts it. One that was only made starts on
    first use. As a context manager it starts and closes. Any thread may use it. After `close()` calls raise
    PluginClosed, after a crash PluginCrashed (unless `max_restarts` has it start again), until `start()`;
    then the proxies that were dispensed work again, on fresh instances.
    """

    def __init__(self, command: _Command, *, name: str | None = None, handshake: Handshake = Handshake(),
                 protocol_versions: Iterable[int] | None = None, python: _Path | None = None,
                 env: Mapping[str, str] | None = None, inherit_env: bool = True, cwd: _Path | None = None,
                 start_timeout: float | None = 60.0, call_timeout: float | None = None,
                 stdin: str | IO[Any] = "discard", stdout: _Output = "log", stderr: _Output = "log",
                 logger: logging.Logger | None = None, sha256: str | Mapping[_Path, str] | None = None,
                 limits: Limits | None = None, max_restarts: int = 0, restart_window: float = 60.0,
                 heartbeat: float | None = None, idle_timeout: float | None = None,
                 on_start: Callable[[Plugin], Any] | None = None,
                 on_exit: Callable[[Plugin], Any] | None = None, managed: bool = True, persist: bool = False,
                 max_message: int = _MAX_MESSAGE) -> None:
        options = dict(locals())
        del options["self"]
        self._set_up(_Recipe(**options))

    def _set_up(self, recipe: _Recipe) -> Plugin:
        _refuse_monkey_patches()
        self.name = recipe.name
        self._supervisor = _Supervisor(recipe, self)
        return self

    # -- its life

    def start(self) -> Plugin:
        """Start the plugin, unless it runs. Raises LaunchError (and its kinds) when it does not come up."""
        self._supervisor.start_up()
        return self

    def restart(self, drain: float | None = 30.0) -> Plugin:
        """Swap in a fresh process. Returns when that serves; calls go there from then on, and none is lost or
        refused.

        Calls in flight, streams and references finish in the old process, for at most `drain` seconds (None:
        no limit), behind the caller. What is cut off then raises PluginClosed, a reference DeadReference; a
        notification that still runs sees `cancelled()`. If the new process does not come up, the old one
        stays, and this raises what `start` does. A plugin that does not run is started.
        """
        seconds = _checked_timeout(drain, "drain")
        old = self._supervisor.swap()
        if old is not None:
            _aside("miniplug-drain", old.drain, _FOREVER if seconds is None else seconds)
        return self

    def close(self, grace: float | None = _GRACE) -> None:
        """End the plugin: ask it, after `grace` seconds (None: never) terminate it, then kill it, and all
        that it started. Returns within `grace` + 2 seconds, after its last line of output. Calls in flight
        raise PluginClosed. Closing what is closed does nothing."""
        seconds = _checked_timeout(grace, "grace")
        _end_runs(self._supervisor.close(), _FOREVER if seconds is None else seconds)

    def kill(self) -> None:
        """End the plugin and all that it started at once, without asking. (One that was attached to is asked,
        and then let go of.)"""
        for run in self._supervisor.close():
            run.kill()

    def detach(self) -> None:
        """Let go of the plugin, and leave it running, for this host or another one to `attach` to.

        Raises PluginError for one that cannot stay: `launch(persist=True)` makes one that can, and so does
        `serve(persist=True)`. To detach from what does not run does nothing.
        """
        run = self._supervisor.own_run()
        if run in _runs and run is not None:
            if run.config is None:
                raise self._cannot_stay()
            self._supervisor.close()
            run.detach()

    def _cannot_stay(self) -> PluginError:
        how = "does not stay without its host: launch it with persist=True"
        return PluginError(f"the plugin {self.name!r} {how}")

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait until the process that runs now has ended, at most `timeout` seconds. Returns its exit code,
        or None if it still runs. (Another one may have taken its place by then.)"""
        run = self._supervisor.own_run()
        if run is None:
            return None
        run.wait(-1 if timeout is None else max(0.0, timeout))
        return run.exit_code

    def __enter__(self) -> Plugin:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close()

    async def astart(self) -> Plugin:
        """As `start`, without blocking the event loop. Cancelled, it leaves no plugin that was not there."""
        undo = None if self.running else self.kill
        return await _in_thread(self.start, undo=undo)  # type: ignore[no-any-return]

    async def aclose(self, grace: float | None = _GRACE) -> None:
        """As `close`, without blocking the event loop."""
        await _in_thread(self.close, grace)

    async def __aenter__(self) -> Plugin:
        return await self.astart()

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<Plugin {self.name!r}, {f'pid {self.pid}' if self.running else 'not running'}>"

    @property
    def running(self) -> bool:
        """Whether the plugin has started and its process has not ended."""
        run = self._supervisor.own_run()
        return run is not None and run.session is not None and not run.gone.is_set()

    @property
    def pid(self) -> int | None:
        """The number of the plugin's process, or None without one."""
        run = self._supervisor.own_run()
        return run.pid if run is not None and not run.gone.is_set() else None

    @property
    def exit_code(self) -> int | None:
        """How the last process ended: its exit status, negative for a signal; None if none has ended."""
        run = self._supervisor.own_run()
        return run.exit_code if run is not None else None

    @property
    def restarts(self) -> int:
        """How often it was started anew because it had crashed."""
        return self._supervisor.restarts

    @property
    def protocol_version(self) -> int:
        """The version of the interface that host and plugin have agreed on."""
        return self._supervisor.session().protocol_version

    @property
    def info(self) -> dict[str, Any]:
        """What the plugin says about itself: the `info` given to `serve`."""
        return self._ask_system("info", (), dict)  # type: ignore[no-any-return]

    # -- its use

    if TYPE_CHECKING:  # an interface makes a _T: mypy takes no abstract class for a type[_T]
        @overload
        def dispense(self, name: str | None = None, interface: None = None, *,
                     timeout: float | None = None) -> Any: ...
        @overload
        def dispense(self, name: str | None, interface: Callable[..., _T], *,
                     timeout: float | None = None) -> _T: ...
        @overload
        def dispense(self, name: str | None = None, *, interface: Callable[..., _T],
                     timeout: float | None = None) -> _T: ...

    def dispense(self, name: str | None = None, interface: Any = None, *,
                 timeout: float | None = None) -> Any:
        """A proxy for the plugin of that name, or for the only one there is. The name "system" gives the
        introspection. It has the plugin's public methods, not its attributes and properties. A function that
        is served can be called.

        `interface`: an ABC, Protocol or class; the plugin must have its public methods, and take every call
        that they allow. The proxy is an instance of it, for type checkers and (not a Protocol) for
        isinstance(). `timeout`: the deadline of each call in seconds, instead of `call_timeout`.

        Raises PluginNotFound, InterfaceMismatch, and whatever the plugin's factory raised.
        """
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name={name!r}: it is a str; an interface is given as dispense(interface=...)")
        interface = getattr(interface, "__origin__", interface)  # of Store[int] it is Store
        if interface is not None and not isinstance(interface, type):
            raise TypeError(f"interface={interface!r}: it is an ABC, a Protocol or another class")
        seconds = _checked_timeout(timeout)
        found = self._ask_system("dispense", (name,), _Remote)

        def dispense(session: _Session, seconds: float | None) -> _Target:
            lent = self._ask(_Remote, session, 0, "dispense", (name,), {}, seconds)
            return lent._target  # type: ignore[no-any-return]

        target = _Dispensed(self._supervisor, dispense, found._target)
        target.label, target.timeout = f"the plugin {name or self.name!r}", seconds
        if type(found) is _Method and interface is None:
            return _Method(target, "")  # what is served is a function
        proxy = _Proxy(target, found._names if type(found) is _Proxy else [])
        if interface is not None:
            proxy._adopt(interface)
        return proxy

    def _ask_system(self, method: str, args: Sequence[Any], kind: type) -> Any:
        """Call a method of `system` that has to return a `kind`."""
        seconds = self._supervisor.recipe.call_timeout
        return _reach(self._system, partial(self._ask, kind), method, args, {}, seconds)

    def _system(self, asked: _Call) -> tuple[_Session, int]:
        return self._supervisor.session(asked), 0

    def _ask(self, kind: type, session: _Session, *what: Any) -> Any:
        result = session.call(*what)
        if not issubclass(type(result), kind) or (kind is _Remote and result._target.session is not session):
            session.end(ProtocolError(f"system.{what[1]}() returned a {type(result).__name__}"))
            assert session.ended is not None
            raise session.ended([what[1]])
        return result

    def describe(self) -> dict[str, dict[str, MethodInfo]]:
        """What the plugins can do: ``{plugin: {method: MethodInfo(name, signature, doc)}}``.

        Raises MethodNotFound for a plugin in another language that does not say.
        """
        try:
            found = self._ask_system("describe", (), dict)
        except MethodNotFound:  # it is not written with miniplug
            return self._describe_one_by_one()
        found.pop("system", None)
        return {plugin: {name: MethodInfo(name, *each[:2])
                         for name, each in _checked_description(methods).items()}
                for plugin, methods in found.items()}

    def _describe_one_by_one(self) -> dict[str, dict[str, MethodInfo]]:
        found: dict[str, dict[str, MethodInfo]] = {}
        try:
            system = self.dispense("system")
            names = system.listMethods()
        except (MethodNotFound, PluginNotFound):
            text = f"the plugin {self.name!r} does not say what it can do"
            raise MethodNotFound(text, name="describe") from None
        for full in names:
            plugin, _, name = full.rpartition(".")
            if plugin != "system":
                info = MethodInfo(name, system.methodSignature(full), system.methodHelp(full))
                found.setdefault(plugin, {})[name] = info
        return found

    def reattach_config(self) -> dict[str, Any]:
        """What another host needs to `attach`, as a plain dict that json can store: ``network``,
        ``address``, ``authkey``, ``pid`` and ``protocol_version``. Who has it can call the plugin. Raises
        PluginError for one that does not persist."""
        session = self._supervisor.session()
        config = next((run.config for run in list(_runs) if run.session is session), None)
        if config is None:
            raise self._cannot_stay()
        return {**config, "protocol_version": session.protocol_version}

    def ping(self, timeout: float = 5.0) -> float:
        """Seconds that a message takes to the plugin and back. Raises CallTimeout after `timeout` seconds."""
        def ping(session: _Session, *what: Any) -> float:
            return session.ping(what[-1])

        return _reach(self._system, ping, "ping", (), {}, timeout)  # type: ignore[no-any-return]


# Without these a Windows program does not start; on POSIX there are none such.
_SYSTEM_VARIABLES = ("SYSTEMROOT SYSTEMDRIVE WINDIR COMSPEC PATHEXT TEMP TMP" if _WINDOWS else "").split()

# Run by the plugin's interpreter: this very file is miniplug there, under the name that it has in the host as
# well. Loaded like this, and not by its path, it comes from the bytecode cache; or from the zip file that the
# host is packed in. The first lines are for any Python at all.
_BOOTSTRAP = """
import sys
if sys.path[:1] == [""]:  # what lies in the current folder, a json.py say, is not what is imported here
    del sys.path[0]
if sys.version_info < (3, 8):
    version = sys.version.split()[0]
    sys.exit("miniplug needs Python 3.8 or newer, and this is " + version + ": " + sys.executable)
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("miniplug", sys.argv[1])
module = sys.modules["miniplug"] = module_from_spec(spec)
if __import__("os").path.isfile(sys.argv[1]):
    spec.loader.exec_module(module)
else:
    from zipimport import zipimporter
    folder, name = __import__("os").path.split(sys.argv[1])
    exec(zipimporter(folder).get_code(name[:-3]), vars(module))
module._run_plugin(*sys.argv[2:])
"""


_FROZEN = "--miniplug-plugin"  # the first argument of a frozen application that is to be a plugin
_frozen_mains: list[bool] = []  # not empty: it looks for that


def _split_spec(command: str) -> tuple[str, str, str]:
    """``name=source:Attr`` to its parts. The attribute is empty if it is no spec."""
    head, _, attribute = command.rpartition(":")
    drive = len(head) == 1 and _WINDOWS  # C:program
    dotted = all(part.isidentifier() for part in attribute.split("."))
    if not head or drive or attribute.endswith(".py") or not dotted:
        return "", command, ""
    name, equals, source = head.partition("=")
    if not equals or not name.isidentifier():
        name, source = attribute.rpartition(".")[2].lower(), head
    module = all(part.replace("-", "_").isidentifier() for part in source.split("."))
    if not (module or source.endswith(".py")):  # a program with a colon in its name
        return "", command, ""
    return name, source, attribute


def _default_name(command: str | list[str]) -> str:
    """A plugin's name in logs and errors: that of a spec, or else of the program or script."""
    if isinstance(command, str):
        name, script, _ = _split_spec(command)
    else:
        name, script = "", _script_of(command or [""])
    return name or os.path.splitext(os.path.basename(script))[0] or "plugin"


def _script_of(argv: Sequence[str]) -> str:
    """The Python script in an argument list, or else the program."""
    return next((part for part in argv if part.endswith((".py", ".pyw"))), argv[0])


def _checked_command(command: _Command) -> str | list[str]:
    try:
        if isinstance(command, (str, bytes, os.PathLike)):
            return os.fsdecode(command)
        return [os.fsdecode(part) for part in command]
    except TypeError:
        wanted = "a path, a spec such as 'path/to/file.py:Attr', or a list of str and paths"
        raise TypeError(f"command={command!r}: it is {wanted}") from None


def _checked_digests(sha256: Any, command: str | list[str]) -> dict[str | None, str]:
    """{path: digest}, the path None for the plugin itself. Raises ValueError and TypeError."""
    if isinstance(sha256, str) and isinstance(command, str):
        _, source, attribute = _split_spec(command)
        if attribute and not source.endswith(".py"):
            where = f"where the module {source!r} lies is not known beforehand"
            raise ValueError(f"sha256={sha256!r}: {where}; give {{path: digest}}")
    given = {None: sha256} if isinstance(sha256, str) else {} if sha256 is None else sha256
    if not hasattr(given, "items"):
        raise TypeError(f"sha256={sha256!r}: it is 64 hexadecimal digits, or {{path: digest}}")
    for digest in given.values():
        if not isinstance(digest, str) or len(digest) != 64 or digest.strip("0123456789abcdefABCDEF"):
            raise ValueError(f"sha256={digest!r}: it is 64 hexadecimal digits")
    return {path and os.fsdecode(path): digest.lower() for path, digest in given.items()}


def _sink(output: _Output, logger: logging.Logger, stream: str) -> _Sink | None:
    """What takes the lines of an output stream; None for one that goes where the host's own goes."""
    if isinstance(output, str):
        return {"inherit": None, "log": _LogSink(logger, stream), "discard": lambda line: None}[output]
    if callable(output):
        return output
    write, encoding = output.write, getattr(output, "encoding", None) or "utf-8"
    return lambda line: write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")


if TYPE_CHECKING:
    def _like(other: Callable[_P, Any]) -> Callable[[Callable[..., Plugin]], Callable[_P, Plugin]]: ...
else:
    def _like(other):
        """For help(), editors and type checkers: the decorated function takes what `other` takes."""
        return lambda function: vars(function).update(__wrapped__=other) or function


del Plugin.__init__.__annotations__["return"]  # or help() would say that launch returns None


@_like(Plugin)
def launch(command: _Command, **options: Any) -> Plugin:
    """Start a plugin and return it, ready to `dispense`. ``with launch(...) as plugin`` closes it at the end.

    `command`: an argument list, run as it is; or the path of a program, a ``.py`` file being run under
    `python`; or a spec, ``"module:Attr"``, ``"path/to/file.py:Attr"`` or ``"name=path/to/file.py:Attr"``,
    which this very file serves under `python`, where miniplug need not be installed. The options:

    - `name` (str): what logs and errors call it; by default made from the command.
    - `handshake` (Handshake), `protocol_versions` (ints; default: the handshake's): what the host can speak.
      The highest version that both have is used.
    - `python` (path): the interpreter; by default this one, with its flags. A spec or a ``.py`` file imports
      what lies beside the file, or for ``"module:Attr"`` in `cwd`, and what is installed there; for more give
      a ``PYTHONPATH`` in `env`. Another interpreter gets none of this one's own variables.
    - `env` (dict of str): added to the environment, and wins over it. `inherit_env` (bool, default True):
      False starts from nothing but what the system needs. `cwd` (path): where it runs, and where relative
      paths in `command`, `python` and `sha256` start; all are made absolute at once.
    - `start_timeout` (seconds, default 60): how long it may take to connect. `call_timeout` (seconds, default
      None: no limit): the deadline of every call that has no other.
    - `stdin`: ``"discard"`` (default), ``"inherit"`` (on a terminal the plugin shares the host's process
      group then), or a file. `stdout`, `stderr`: ``"log"`` (default), ``"inherit"``, ``"discard"``, a
      callable that takes each line of text, or a text file to write them to.
    - `logger` (logging.Logger, default ``miniplug.NAME``): the parent of those that the plugin's records and
      lines go to: its own loggers' names, ``stdout`` at INFO, ``stderr`` at WARNING, tracebacks at ERROR.
    - `max_restarts` (int, default 0) in any `restart_window` (seconds, default 60): after a crash the next
      call starts the plugin anew, and proxies stay good. A pause goes before, from 0.1 seconds on, and twice
      as long each time; calls wait through it, their deadlines running. The calls in flight fail with
      PluginCrashed and are never run again. Past the limit calls raise the last one, until `start`.
    - `heartbeat` (seconds, default None): a plugin that answers no ping for so long counts as crashed, and
      is killed. It may be as busy as it likes, as long as other threads of it can run.
    - `idle_timeout` (seconds, default None): the plugin is closed when for so long no call, stream or
      reference (other than what is dispensed) has been open, and starts again on the next call. Of a
      notification only the sending counts.
    - `on_start`: ``on_start(plugin)`` runs after every start; until it returns, only the calls of its own
      thread get through, and what those call back. If it raises, the process is ended, and whoever started
      it gets that. `on_exit`: ``on_exit(plugin)`` runs in a thread of miniplug's, once for each time that the
      process ends unasked.
    - `sha256`: the digest in hex of the program, or of the spec's or script's file (of an argument list the
      first ``.py`` file in it, or else its program); or ``{path: digest}``. It is checked before anything
      runs. Somebody who can write to the file can still swap it after the check, and what it imports is not
      checked unless it is named. Nothing that is checked is run from a bytecode cache.
    - `limits` (Limits): what it may use at most. `max_message` (bytes, default 256 MiB, at least 4096): the
      longest message that the host takes.
    - `managed` (bool, default True): closed at interpreter exit at the latest. `persist` (bool, default
      False): it stays when this host goes, unless this one closes it, and can be attached to: see `attach`.

    Raises LaunchError, HandshakeError, ChecksumError, PluginClosed, and what `on_start` raises; TypeError or
    ValueError for an option that is none; RuntimeError in a process that is being started as a plugin itself
    and imports a host's module that launches this one, for want of an ``if __name__ == "__main__":``.
    """
    return Plugin(command, **options).start()


def attach(config: Mapping[str, Any], *, name: str | None = "attached", handshake: Handshake = Handshake(),
           protocol_versions: Iterable[int] | None = None, call_timeout: float | None = None,
           heartbeat: float | None = None, logger: logging.Logger | None = None,
           max_message: int = _MAX_MESSAGE) -> Plugin:
    """Connect to a plugin that runs already, and return it, ready to `dispense`. `config` is what its
    `reattach_config` gave.

    The process is not this host's: `close`, the end of a ``with`` and interpreter exit disconnect; `kill`
    asks it to end, and disconnects. What it prints does not come here. After a `close` `start` connects
    again. The options are those of `launch` that apply. If the environment variable ``MINIPLUG_ATTACH`` is
    ``{NAME: config}`` as JSON, `launch` attaches in the same way for a plugin of that name.

    Raises LaunchError if there is no such plugin (any more), or its kinds HandshakeError and
    AuthenticationError.
    """
    options = dict(locals())
    del options["config"]
    recipe = _Recipe(["attach"], **options)
    try:
        recipe.config = _checked_config(config)
    except ValueError as error:
        raise recipe.not_attached(str(error)) from None
    return Plugin.__new__(Plugin)._set_up(recipe).start()


def local(plugins: Mapping[Any, Any], *, info: Mapping[str, Any] | None = None, max_workers: int = 64,
          name: str | None = "local", handshake: Handshake = Handshake(),
          protocol_versions: Iterable[int] | None = None, call_timeout: float | None = None,
          heartbeat: float | None = None, logger: logging.Logger | None = None,
          max_message: int = _MAX_MESSAGE) -> Plugin:
    """Serve plugins in this very process, for tests: over the same session and codec, started and ready to
    `dispense`.

    `plugins`, `info` and `max_workers` are those of `serve`; the options those of `launch` that apply. What a
    plugin prints or logs goes where the process's own does, and what ends a process (``os._exit``, a crash)
    ends this one.

    Raises what `serve` and `launch` raise.
    """
    options = {key: value for key, value in locals().items() if key not in ("plugins", "info", "max_workers")}
    recipe = _Recipe(["local"], **options)
    versions = _versions(plugins, handshake)

    def server() -> _Server:
        return _Server(versions, info, max_workers, max_message)

    def start(argv: Sequence[str], limits: Any, terminal: bool, **popen: Any) -> _NoProcess:
        address, key = popen["env"][_ADDRESS], bytes.fromhex(popen["env"][_AUTHKEY])
        channel = _connect(address, _HELLO_SECONDS)
        thread = _start_thread("miniplug-local", _serve_here, server(), channel, address, key)
        return _NoProcess(channel, os.getpid(), thread)

    server()  # raises here what it raises
    recipe.process = start
    return Plugin.__new__(Plugin)._set_up(recipe).start()


def _serve_here(server: _Server, channel: _Channel, address: str, key: bytes) -> None:
    try:
        server.attend(channel, server.greet(channel, address, key, {"matches": True}))
    except (OSError, EOFError, PluginError):
        channel.close()  # the host's end tells why
    server.close()


# === 11. discovery ======================================================================================

def discover(directory: _Path, pattern: str = "*") -> list[Path]:
    """The files in a folder that `launch` can run, sorted, as absolute paths.

    `pattern` is a glob, relative to the folder: ``"*/plugin.py"`` finds one in each folder there, ``**``
    stands for any folders below. A file can be run that ends with ``.py`` or ``.pyw``, or is executable (on
    Windows: an ``.exe``, ``.com``, ``.bat`` or ``.cmd``). Left out is what has a name that begins with ``.``
    or ``_``, or lies in such a folder. Nothing is run or imported. For a spec add ``:Attr``.

    Raises OSError for a folder that cannot be read, and ValueError for a pattern that is empty or absolute,
    TypeError for one that is no str.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"pattern={pattern!r}: it is a glob, a str")
    if os.path.isabs(pattern) or os.path.normpath(pattern) == ".":
        raise ValueError(f"pattern={pattern!r}: it is a glob relative to the folder")
    folder = _import("pathlib").Path(directory).absolute()
    os.scandir(folder).close()  # raises, where to look for matches would find nothing
    return sorted(path for path in set(folder.glob(pattern)) if os.path.isfile(path) and _is_program(path)
                  and not any(part[0] in "._" for part in path.relative_to(folder).parts))


def _is_program(path: Path) -> bool:
    if _WINDOWS:
        return path.suffix.lower() in (".py", ".pyw", ".exe", ".com", ".bat", ".cmd")
    return path.suffix in (".py", ".pyw") or os.access(path, os.X_OK)


def discover_entry_points(group: str, *, python: _Path | None = None) -> dict[str, str]:
    """The installed distributions' entry points of a group: name to spec, such as ``{"csv":
    "shop.export:Csv"}``.

    With `python` those of that interpreter's environment, which is run for a moment. Nothing is imported.
    Where two have the same name, that which comes first on ``sys.path`` counts, as it does in an import. A
    distribution that is broken, and an entry that names no attribute of a module, is left out with a warning
    in the log.

    Raises TypeError for a `group` that is no str, and LaunchError for a `python` that does not run.
    """
    if not isinstance(group, str):
        raise TypeError(f"group={group!r}: it is the name of a group, a str")
    if python is not None:
        with launch("miniplug:discover_entry_points", name="entry_points", python=python) as plugin:
            return dict(plugin.dispense()(group))
    found: dict[str, str] = {}
    warn = _import("logging").getLogger("miniplug").warning
    for distribution in _import("importlib.metadata").distributions():
        try:
            for name, value in _entries(distribution.read_text("entry_points.txt") or "", group):
                spec = "".join(value.partition("[")[0].split())  # without the extras that it may name
                _, source, attribute = _split_spec(spec)
                if name and attribute and all(part.isidentifier() for part in source.split(".")):
                    found.setdefault(name, spec)
                else:
                    warn("the entry point %r names no attribute of a module: %s", name, value)
        except Exception as error:  # whatever is wrong with it
            where = getattr(distribution, "_path", "a distribution")
            warn("the entry points of %s cannot be read: %s: %s", where, type(error).__name__, error)
    return found


def _entries(text: str, group: str) -> Iterable[tuple[str, str]]:
    """The names and values of a group. (With some Pythons one bad entry hides all others of its
    distribution.)"""
    section = None
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            section = line.strip("[]").strip()
        elif section == group and line and not line.startswith(("#", ";")):
            name, _, value = line.partition("=")
            yield name.strip(), value.strip()


# === 12. command line ===================================================================================

def _run_plugin(name: str, verb: str, *arguments: str, **options: Any) -> None:
    """Be the plugin: ``serve SPEC...``, or ``run SCRIPT`` with this module as its miniplug. `name`: by which
    a host has imported it."""
    sys.meta_path.insert(0, _Finder(name))
    sys.excepthook = _show_error
    _take_environment()
    if _ADDRESS in _environment:
        _prepare_output()
    _run_script(*arguments) if verb == "run" else _serve_specs(*arguments, **options)


def _show_error(kind: type[BaseException], error: BaseException, frames: Any) -> None:
    """As sys.excepthook: the traceback without the frames of miniplug and of importing that come first."""
    here = _show_error.__code__.co_filename
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith((here, "<")):
        frames = frames.tb_next
    sys.__excepthook__(kind, error.with_traceback(frames), frames)


def _run_script(path: str) -> None:
    main: Any = type(sys)("__main__")
    main.__file__ = path
    sys.modules["__main__"] = main
    sys.argv[:] = [path]
    sys.path.insert(0, os.path.dirname(path))
    with open(path, "rb") as file:
        exec(compile(file.read(), path, "exec", dont_inherit=True), vars(main))  # not this file's __future__


def _serve_specs(*specs: str, address: str | None = None, authkey_file: str | None = None,
                 persist: bool = False) -> None:
    """Serve what the specs name, under whatever cookie and version the host asks for."""
    plugins: dict[str, Any] = {}
    how = "To serve it by hand, for a host to attach to, add --persist or --listen ADDRESS."
    _refuse_by_hand(address, persist, how)
    _environment.setdefault(_LOADING, '[[null, ""]]')
    for spec in specs:
        name, source, attribute = _split_spec(spec)
        if not attribute:
            sys.exit(f"miniplug: {spec!r} is no spec: write module:Attr or path/to/file.py:Attr")
        if name in ("system", *plugins):
            sys.exit(f"miniplug: the name {name!r} is taken: write NAME={spec}")
        plugins[name] = _load(source, attribute)
    try:
        secret = os.urandom(32)
        if authkey_file:
            with open(authkey_file, "rb") as file:
                secret = _checked_key(file.read(1 << 16).decode("ascii", "replace").strip())
        _serve(_Server({None: plugins}, None, 64, _MAX_MESSAGE), {"matches": True}, address, secret, persist)
    except (OSError, ValueError) as error:
        sys.exit(f"miniplug: {error}")


class _Finder:
    """An import hook. It gives this very module under every name that leads to its file, and under the host's
    name for it: in a second copy nothing would be registered, served or cancelled. And for a spec's file it
    finds the standard library first: a plugin's string.py would break what it imports."""

    library: Sequence[str] = ()

    def __init__(self, name: str) -> None:
        self._names = {"miniplug", name}
        self._machinery = _import("importlib.machinery")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        find, found = self._machinery.PathFinder.find_spec, None
        if name not in self._names and f"{name.rpartition('.')[2]}.py" == os.path.basename(_FILE):
            found = find(name, path)
        if name in self._names or (found and os.path.realpath(str(found.origin)) == os.path.realpath(_FILE)):
            return self._machinery.ModuleSpec(name, self)
        return find(name, self.library) if path is None and self.library else None

    def create_module(self, spec: Any) -> ModuleType:
        return sys.modules["miniplug"]

    def exec_module(self, module: ModuleType) -> None:
        """It has run."""


def _load(source: str, attribute: str) -> Any:
    """Import a spec's module, by path or by name, and get the attribute."""
    found = _load_file(os.path.abspath(source)) if source.endswith(".py") else _load_module(source)
    for part in attribute.split("."):
        if not hasattr(found, part):
            sys.exit(f"miniplug: {_no_method(part, dir(found), source, 'attribute')}")
        found = getattr(found, part)
    return found


def _load_file(path: str) -> ModuleType:
    if not os.path.isfile(path):
        sys.exit(f"miniplug: there is no file {path}")
    library = os.path.dirname(getattr(os, "__file__", ""))  # frozen, it has none
    _Finder.library = [library, os.path.join(library, "lib-dynload"), os.path.join(sys.base_prefix, "DLLs")]
    find = _import("importlib.machinery").PathFinder.find_spec
    name = os.path.splitext(os.path.basename(path))[0]
    if name in sys.modules or name in sys.builtin_module_names or find(name, _Finder.library):
        name = f"_plugin_{name}"
    sys.path.insert(0, os.path.dirname(path))
    util = _import("importlib.util")
    spec = util.spec_from_file_location(name, path)
    module: ModuleType = util.module_from_spec(spec)
    sys.modules[name] = module
    if _SOURCE_ONLY in _environment:
        exec(spec.loader.source_to_code(spec.loader.get_data(path), path), vars(module))
    else:
        spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    folder = "the current folder, which is gone"
    try:
        folder = os.getcwd()
        sys.path.insert(0, folder)
    except OSError:
        pass
    try:
        return _import(name)  # type: ignore[no-any-return]
    except ModuleNotFoundError as error:
        if not error.name or not f"{name}.".startswith(f"{error.name}."):
            raise  # it lacks something itself
        sys.exit(f"miniplug: there is no module {error.name!r} in {folder}, nor among the packages of "
                 f"{sys.executable}; cwd or PYTHONPATH names another folder, and path/to/file.py:Attr a file")


def freeze_support() -> None:
    """Let a frozen application serve its own plugins: the first statement of its main program.

    Such an application starts its own executable again for a spec or a ``.py`` file. There this function is
    the plugin's main loop, and does not return; otherwise it does nothing. The plugin can import what is
    frozen into the application, and what lies beside its own file.

    With `python=` that interpreter loads this file from where ``miniplug.__file__`` says: pack it there as a
    data file, too (PyInstaller: ``--add-data miniplug.py:.``; of a copy that is vendored as
    ``app._vendor.miniplug``, ``--add-data app/_vendor/miniplug.py:app/_vendor``).
    """
    if not hasattr(sys, "frozen"):
        return
    if sys.argv[1:2] != [_FROZEN]:
        _frozen_mains.append(True)
        return
    sys.modules["miniplug"] = sys.modules[__name__]  # it may be vendored under another name
    _run_plugin(__name__, *sys.argv[2:])
    sys.exit()


def _call_once(given: Any) -> None:
    name, _, method = given.method.rpartition(".")
    if method.startswith("_"):  # which a proxy has of its own
        raise _no_method(method, None, "a plugin")
    arguments = []
    for argument in given.arguments:
        try:
            arguments.append(json.loads(argument))
        except ValueError:
            arguments.append(argument)
    with _opened(given) as plugin:
        result = getattr(plugin.dispense(name or None), method)(*arguments)
        for each in result if isinstance(result, Stream) else (result,):
            print(_printable(each), flush=True)


def _printable(value: Any) -> str:
    """A value as JSON if it is JSON, else as Python writes it."""
    try:
        if not _portable.dumps(value, "")[2]:
            return json.dumps(value, ensure_ascii=sys.stdout.encoding.lower() != "utf-8", allow_nan=False)
    except NotSerializable:
        pass
    return repr(value)


def _inspect(given: Any) -> None:
    with _opened(given) as plugin:
        for key, value in plugin.info.items():
            print(f"{key}: {_printable(value)}")
        for name, methods in sorted(plugin.describe().items()):
            print(name)
            for method in methods.values():
                print(_import("textwrap").indent(_outline(*method), "    "))


def _opened(given: Any) -> Plugin:
    """The plugin that a verb names, started, whatever version it speaks."""
    sink = "log" if given.verbose else "discard"
    if given.verbose:
        _import("logging").basicConfig(format="%(name)s %(levelname)s: %(message)s")
        _import("logging").getLogger("miniplug").setLevel("DEBUG")
    return launch(given.plugin, protocol_versions=range(100), python=given.python, stdout=sink, stderr=sink)


def _one_line(error: BaseException) -> str:
    """An error's most telling line."""
    if isinstance(error, RemoteError):
        return f"{error.type_name}: {error.message}".partition("\n")[0].rstrip(": ")
    output = [line for line in getattr(error, "output", ()) if line.strip()]
    fatal = [line for line in output if line.startswith("Fatal Python error: ")]  # no later line says more
    return " ".join([str(error).partition("\n")[0], *(fatal or output)[-1:]])


def _doctor(given: Any) -> int:
    """What this machine allows, each as a line. The last is whether a plugin runs here, and that counts."""
    python = given.python or sys.executable
    rows = []
    for what, check in _CHECKS.items():
        try:
            works, detail = check(python)
        except (OSError, PluginError) as error:
            works, detail = False, _one_line(error)
        rows.append({"check": what, "ok": works, "detail": detail})
    if given.json:
        print(json.dumps({"ok": works, "checks": rows}, indent=2))
    else:
        for row in rows:
            print(f"{'ok' if row['ok'] else 'no':<4}{row['check']:<16}{row['detail']}")
    return 0 if works else 1


def _check_transport(python: str) -> tuple[bool, str]:
    listener = _Listener()
    kind = "a named pipe" if _WINDOWS else "a Unix socket" if listener.folder else "TCP: the key alone guards"
    listener.close()
    return True, "; not in ".join([f"{kind}, {listener.address}", *listener.passed_over])


def _check_loopback(python: str) -> tuple[bool, str]:
    with socket.create_server(("127.0.0.1", 0)) as server, \
            socket.create_connection(server.getsockname(), 2.0) as one, server.accept()[0] as other:
        one.sendall(b"x")
        other.settimeout(2.0)
        return other.recv(1) == b"x", "127.0.0.1"


def _check_fips(python: str) -> tuple[bool, str]:
    try:
        _import("hashlib").md5(b"")
        return True, "off"
    except ValueError:
        return True, "on: no MD5, and miniplug needs none"


def _check_plugin(python: str) -> tuple[bool, str]:
    start = time.monotonic()
    with launch("os:path", python=python, start_timeout=20.0, stdout="discard", stderr="discard") as plugin:
        plugin.dispense(timeout=20.0).basename("a/b")
        return True, f"runs: {(time.monotonic() - start) * 1e3:.0f} ms to the first answer"


_CHECKS: dict[str, Callable[[str], tuple[bool, str]]] = {
    "miniplug": lambda python: (True, f"{__version__}, {_FILE}, {sys.version.split()[0]} on {sys.platform}"),
    "transport": _check_transport,
    "loopback TCP": _check_loopback,
    "FIPS mode": _check_fips,
    "process tree": lambda python: (True, f"a {'job' if _WINDOWS else 'process group'} for each plugin"),
    "a plugin": _check_plugin,
}


def _parser(argparse: Any) -> Any:
    class Parser(argparse.ArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> None:
            self.exit(2, f"{self.prog}: {message} (--help tells more)\n")

    what = "Plugins that run as subprocesses and are called like local objects."
    parser = Parser(prog="python -m miniplug", description=what)
    parser.add_argument("--version", action="version", version=f"miniplug {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    add = verbs.add_parser("serve", help="be a plugin: serve what the specs name").add_argument
    add("specs", metavar="SPEC", nargs="+", help="module:Attr, path/to/file.py:Attr or NAME=one of these")
    add("--listen", metavar="ADDRESS", help="where hosts attach: a path with a / in it, or 127.0.0.1:PORT")
    add("--authkey-file", metavar="FILE", help="has the key that they must hold, in hexadecimal digits")
    add("--persist", action="store_true", help="stay when the last host is gone")

    call = verbs.add_parser("call", help="run a plugin, call it once, print the result").add_argument
    inspect = verbs.add_parser("inspect", help="run a plugin, and tell what it can do").add_argument
    doctor = verbs.add_parser("doctor", help="what this machine allows; whether a plugin runs").add_argument
    for add in (call, inspect, doctor):
        add("--python", metavar="PATH", help="the interpreter for the plugin")
    for add in (call, inspect):
        add("--verbose", "-v", action="store_true", help="what the plugin writes goes to stderr")
        add("plugin", metavar="PLUGIN", help="a program, a .py file or a spec such as path/to/file.py:Attr")
    call("method", metavar="METHOD", help="METHOD, or NAME.METHOD if it serves several plugins")
    call("arguments", metavar="ARG", nargs="*", help="JSON, or else a string; after -- also with a dash")
    doctor("--json", action="store_true")
    return parser


def _main(arguments: Sequence[str] | None = None) -> None:
    given = _parser(_import("argparse")).parse_args(arguments)
    if given.verb == "serve":  # whose errors are the plugin's own
        _run_plugin(__name__, "serve", *given.specs, address=given.listen, persist=given.persist,
                    authkey_file=given.authkey_file)
        return
    try:
        sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        status = {"call": _call_once, "inspect": _inspect, "doctor": _doctor}[given.verb](given)
        sys.stdout.flush()
        sys.exit(status)
    except PluginError as error:
        sys.exit(f"miniplug: {_one_line(error)}")
    except OSError as error:  # what is printed cannot be written; or nobody reads it, as behind ``head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what the interpreter flushes at its end
        sys.exit(1 if isinstance(error, BrokenPipeError) else f"miniplug: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if _AS_PROGRAM:  # what the plugin imports as miniplug must be this module, and no second copy of it
    _this: Any = sys.modules["__main__"]
    for _each in [*sys.modules.values()]:
        if _each is not _this and getattr(_each, "__dict__", {}).get("__file__") == __file__:
            _this = _each  # the package that holds this file has imported it already
    sys.modules["miniplug"] = _this
    _this._main()
