"""miniplug: plugins that run as subprocesses and are called like local objects.

One file, standard library only, Python 3.8 and up. Vendor it or install it.

A plugin that never heard of miniplug::

    # greeter.py
    class GreeterHello:
        def greet(self, name):
            return f"Hello, {name}!"

and its host::

    import miniplug

    with miniplug.launch("greeter.py:GreeterHello") as plugin:
        greeter = plugin.dispense()
        print(greeter.greet("world"))

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
if _AS_PROGRAM:  # what the plugin imports as miniplug must be this module, not a second copy of it
    sys.modules["miniplug"] = sys.modules["__main__"]
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
    from typing import IO, Any, Callable, Iterable, Mapping, NoReturn, Sequence, TextIO, TypeVar, Union, overload

    _T = TypeVar("_T")
    _F = TypeVar("_F", bound=Callable[..., Any])
    _Path = Union[str, "os.PathLike[str]"]
    _Command = Union[_Path, Sequence[_Path]]
    _Output = Union[str, Callable[[str], Any], TextIO]
    _Bytes = Union[bytes, bytearray, memoryview]
    _Content = tuple[bytes, Sequence[_Bytes], int, Sequence[int]]  # a body, buffers, 1 if tagged, what it lends

__version__ = "0.1.0"

__all__ = ["AuthenticationError", "Call", "CallTimeout", "ChecksumError", "DeadReference", "Handshake", "HandshakeError",
           "InterfaceMismatch", "LaunchError", "Limits", "MessageTooLarge", "MethodInfo", "MethodNotFound", "NotSerializable",
           "Plugin", "PluginClosed", "PluginCrashed", "PluginError", "PluginNotFound", "ProtocolError", "RemoteError", "Stream",
           "__version__", "attach", "cancelled", "discover", "discover_entry_points", "freeze_support", "launch", "local", "ref",
           "register", "release", "serve"]

_WINDOWS = os.name == "nt"
_posix: Any = os  # for what Windows lacks, which type checkers know
_network: Any = socket


# === 1. errors ==========================================================================================

class PluginError(Exception):
    """The base of every error of miniplug's. What an error carries beside its text are attributes of it."""

    def __init__(self, message: str = "", **carried: Any) -> None:
        super().__init__(message)
        for name, value in carried.items():
            setattr(self, name, value)


class LaunchError(PluginError, OSError):
    """The plugin never came up. `command`: what was run. `exit_code`: how it ended, negative for a signal, or None.
    `output`: the last lines it wrote to stderr, or else to stdout."""

    command: list[str] | None = None
    exit_code: int | None = None
    output: Sequence[str] = ()


class HandshakeError(LaunchError):
    """The program is no plugin, or not one for this host. `host`, `plugin`: dicts of what each side has."""

    host: Mapping[str, Any] = {}
    plugin: Mapping[str, Any] = {}


class ChecksumError(LaunchError):
    """A file is not the one expected, and nothing was run. `path`: of the file. `expected`, `actual`: SHA-256 in hex digits."""

    path: str = ""
    expected: str = ""
    actual: str = ""


class PluginCrashed(PluginError, ConnectionError):
    """The plugin died in use. `exit_code`: negative for a signal, or None. `signal_name`: such as ``"SIGSEGV"``, or None.
    `output`: the last lines of its stderr. `calls`: the names of the methods that were being called."""

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
    """The plugin has no such public method. `name`: what was asked for. `matches`: the names that come close."""

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
    """A method raised. `type_name`: the exception's type. `message`: its text; this error's own begins with the
    type. `remote_traceback`: the plugin's own, as text. A builtin or registered exception arrives as its own
    type too, with its own text: ``except ValueError`` and ``except RemoteError`` both catch a plugin's
    ValueError, and an ExceptionGroup is one of what has arrived so."""

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


if TYPE_CHECKING:  # at run time these, and Call, are made when they are first asked for, as their bases are slow to import

    class AuthenticationError(LaunchError, multiprocessing.AuthenticationError):
        """The other side does not hold the key."""

    class CallTimeout(PluginError, TimeoutError):
        """The deadline passed. `method`: what was called. `seconds`: how long it was given."""

        method: str = ""
        seconds: float = 0.0


def __getattr__(name: str) -> Any:
    known: dict[str, Any] = {"__module__": __name__}
    if name in globals():
        return globals()[name]
    if name == "AuthenticationError":
        bases = [LaunchError, _import("multiprocessing").AuthenticationError]
        known["__doc__"] = "The other side does not hold the key."
    elif name == "CallTimeout":
        bases = [PluginError, TimeoutError]
        if sys.version_info < (3, 11):  # where asyncio and concurrent.futures have timeouts of their own
            bases += [_import("asyncio").TimeoutError, _import("concurrent.futures").TimeoutError]
        known["__doc__"] = "The deadline passed. `method`: what was called. `seconds`: how long it was given."
        known.update(method="", seconds=0.0)
    elif name == "Call":
        bases = [_Awaitable, _import("concurrent.futures").Future]
        known["__doc__"] = "A call that was submitted: a concurrent.futures.Future that can also be awaited in asyncio."
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, type(name, tuple(bases), known))  # one class, however many threads ask at once


def _import(name: str) -> Any:
    __import__(name)
    return sys.modules[name]


def _is_ctrl_c(error: BaseException) -> bool:
    """Whether this is for the program, and not just something that was raised."""
    return issubclass(type(error), KeyboardInterrupt) and threading.current_thread() is threading.main_thread()


def _innermost(frame: Any, functions: Sequence[Any], *owners: Any) -> Any:
    """Which of some methods of these objects runs in this frame, or in the nearest one below it; or None. What a signal handler
    or a finalizer interrupts goes on only after it, and may be what it waits for."""
    codes = {id(function.__code__): function for function in functions}
    while frame is not None:
        if id(frame.f_code) in codes and any(frame.f_locals.get("self") is owner for owner in owners):
            return codes[id(frame.f_code)]
        frame = frame.f_back
    return None


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


class _Packer:
    """One value on its way out, of one thread. `fit` gives what the encoder is to write for it, `tag` is the
    encoder's hook. `careful`: the encoder has tripped over it, as it does over NaN and lone surrogates."""

    __slots__ = ("_arrays", "_fine", "_lend", "buffers", "lent", "tagged")

    def __init__(self, codec: _Codec, careful: bool = False) -> None:
        self.buffers: list[_Bytes] = []  # that go beside the message
        self.lent: list[int] = []  # the numbers of what was lent
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

    def dumps(self, value: Any, label: str) -> _Content:
        """The bytes, the buffers beside them, 1 if there are tags, and the numbers of what was lent.
        Raises NotSerializable, naming the place; `label` names the value."""
        try:
            if type(value) in _FINE:
                return _encode(value).encode(), (), 0, ()
            return self._pack(_Packer(self), value)
        except Exception:
            return self._pack_carefully(value, label)

    def dumps_call(self, target: int, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> _Content:
        """The same of a call."""
        try:
            if not kwargs and _FINE.issuperset(map(type, args)):
                return _encode((target, method, args, kwargs)).encode(), (), 0, ()
            return self._pack(_Packer(self), (target, method, args, kwargs), call=True)
        except Exception:
            return self._pack_carefully([target, method, [*args], kwargs], "call")

    def _pack(self, packer: _Packer, value: Any, call: bool = False) -> _Content:
        try:
            text = _writer(packer.tag)(packer.fit_call(*value) if call else packer.fit(value))
            return text.encode(), packer.buffers, packer.tagged, packer.lent
        except BaseException:
            self.unlend(packer.lent)
            raise

    def _pack_carefully(self, value: Any, label: str) -> _Content:
        """The same of what the encoder has tripped over, or what cannot be written at all."""
        try:
            return self._pack(_Packer(self, careful=True), value)
        except RecursionError:
            if _is_deep():
                raise
            raise NotSerializable(f"{label} is nested too deeply, or contains itself", path=label) from None
        except Exception as error:
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
                self.unlend(self._pack(_Packer(self, careful=True), part)[3])
            except Exception as reason:
                return self._blame(place, part, reason)
        return path, type(value), error

    def loads(self, body: _Bytes, buffers: Sequence[_Bytes], tagged: int) -> Any:
        """The value. Raises ProtocolError for what is malformed, _Undecodable for what cannot be made
        here."""
        try:
            text = str(body, "utf-8").strip(" \t\r\n")
            long = len(text) > _MAX_DIGITS and any(map(_LONG_NUMBER.match, itertools.repeat(text),
                                                       range(0, len(text), _MAX_DIGITS // 2)))
            scan = self._scan if tagged else _scan
            if buffers or long:
                hook = _Unpacker(self.borrow, buffers).unmark if tagged else None
                scan = _scanner(hook, _make_integer if long else None)
            value, end = scan(text, 0)
            if end != len(text):
                raise ValueError("more than one value")
            return value
        except (NotSerializable, DeadReference, MethodNotFound) as error:  # the latter two of what comes home
            raise _Undecodable(error) from error
        except Exception as error:
            if isinstance(error, RecursionError) and _is_deep():
                raise  # it is the caller's stack that is full
            raise ProtocolError(f"a malformed value: {_shown(error)}") from None

    joins = True  # until the session is rebuilt: this, and what follows

    def dumps_short(self, value: Any, label: str) -> Any:
        content = self.dumps(value, label)
        plain = len(content[0]) <= 3072 and not (content[1] or content[2] or content[3])
        return content[0] if plain else content

    def loads_plain(self, data: bytes) -> Any:
        return self.loads(data, (), 0) if data else None

    def join(self, values: Sequence[bytes]) -> bytes:
        return b"[" + b",".join(values) + b"]"


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
# Whole frames, in the framing of multiprocessing.connection: a 4-byte big-endian length, or -1 and 8 bytes, and then
# that much. On POSIX the socket is read directly: one system call takes as many frames as have come, where the
# standard Connection needs two for each. On Windows the frames are the messages of a named pipe.
#
# One thread at a time may receive; any may send. A signal handler that raises (Ctrl-C in the main thread) strikes when
# a call returns, before its result is kept. So that no byte and no lock is lost then, results that matter are put into
# a list by map(), which is one step for the interpreter; what belongs together changes with no call in between; and a
# frame stays the next one until the channel's `state` is set to its `next`.

_LENGTH = struct.Struct("!i")
_LONG = b"\xff\xff\xff\xff"  # a length of -1: the 8 bytes behind it are the length
_READ_SIZE = 1 << 16
_DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)
_A_WHILE = 0.1  # seconds of waiting after which a thread looks whether it waits for itself
_FOREVER = 2e6  # seconds, 23 days: a longer wait is more milliseconds than poll() takes
_TOGETHER = 64  # so many frames at most leave with one system call
_POSTED_LIMIT = 1 << 18  # chunks, twice those of the longest message, that a peer who never reads may leave here


def _left(deadline: float | None) -> float:
    """Seconds until a time.monotonic() deadline, not below 0; without one -1, which locks take for "no limit"."""
    return -1 if deadline is None else min(_FOREVER, max(0.0, deadline - time.monotonic()))


class _Channel:
    """What socket and pipe have in common: sending."""

    prefixed = False  # whether a frame on its way has its length before it

    def __init__(self) -> None:
        self._sending = threading.Lock()  # held by whoever writes
        self._posted: deque[_Bytes] = deque()  # what is to be written, by whoever does next
        self._sent: list[Any] = []  # how far the writing is, of the first of them
        self.state: Any = None  # how far the reading is; and how far once the frame that recv returned is taken: who is done
        self.next: Any = None  # with a frame sets the one to the other
        self.more = False  # whether more has come, for sure, behind the frame that recv returned
        self.gone: Callable[[OSError], Any] = lambda error: None  # told when somebody has closed the descriptor beneath us

    def recv(self, limit: int, deadline: float | None = None) -> bytes | None:
        """The next frame, or the same again until it is taken; or None past the deadline.

        Raises EOFError at the end, OSError for a broken connection, and ProtocolError for a frame over `limit` bytes.
        """
        raise NotImplementedError

    def _wire(self, frames: Sequence[_Bytes]) -> list[_Bytes]:
        return list(frames)

    def _put(self, deadline: float | None) -> None:
        """Write the batch, or go on with it. Raises TimeoutError past the deadline, OSError for a broken connection."""

    def close(self) -> None:
        """Give the descriptor back. Not while another thread receives."""

    def shutdown(self) -> None:
        """End the connection both ways and wake whoever reads or writes."""

    def send(self, frames: Sequence[_Bytes], deadline: float | None = None) -> None:
        """Send frames, whole and together. Past the deadline raises TimeoutError, and what has begun is finished
        behind the caller. Raises OSError when the connection is broken."""
        self._write(self._wire(frames), deadline)
        self.flush()  # what was posted just before the lock was free again

    def send_now(self, frame: bytes) -> bool:
        """Send a short frame, with its length before it if it is to be `prefixed`, without waiting. False if it cannot go at
        once, and has not. If the connection is broken, it is ended: what had come before is still received."""
        return False

    def send_small(self, *frames: bytes) -> None:
        """The same with waiting, for what `send_now` has not sent. Without a frame: go on with what has begun."""
        try:
            self._write(list(frames), None)
            self.flush()
        except OSError:
            self.shutdown()

    def post(self, frames: Sequence[_Bytes], later: bool = False) -> None:
        """Send frames without waiting: a reader calls this. What cannot go now goes with what is sent next. `later`: so does
        this, or with the next `flush`."""
        self._posted.extend(self._wire(frames))
        if len(self._posted) > _POSTED_LIMIT:
            self.shutdown()
        if not later or len(self._posted) >= _TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Send what was posted, without waiting."""
        while self._posted and not self._sending.locked():
            try:
                self._write([], 0.0)
            except TimeoutError:  # a thread goes on with it
                return
            except OSError:
                self.shutdown()
                return

    def _write(self, chunks: list[_Bytes], deadline: float | None) -> None:
        """Write what was posted and the chunks, or raise TimeoutError: a deadline of 0 is not to wait at all. What has
        been taken up is never given up."""
        holds: list[bool] = []
        late = False  # whether it ends before that, by the deadline or Ctrl-C
        try:
            if self._sending.locked() and self.is_writing():
                return self._posted.extend(chunks)  # that one sends it as well
            holds.extend(map(self._sending.acquire, (True,), (_left(deadline),)))
            if not holds[0]:
                raise TimeoutError
            late = True
            self._posted.extend(chunks)
            self._put(deadline)
            late = False
        except OSError as error:
            if not isinstance(error, TimeoutError):  # the connection is broken
                late, self._sent = False, []
                self._posted.clear()
            raise
        finally:
            if holds and holds[0]:
                self._sending.release()
                if late:
                    _start_thread("miniplug-send", self.send_small)

    def is_writing(self) -> bool:
        """Whether this thread is in the midst of writing, further down than the caller."""
        return _innermost(sys._getframe(2), [_Channel._write, type(self).send_now], self) is not None


class _SocketChannel(_Channel):
    """Frames over a connected stream socket."""

    prefixed = True

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self.sock: Any = sock
        sock.setblocking(True)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # chunks that have come, where in the first of them the next frame begins, and, if that one is long and read into
        # place, [its file, its size, [how much has come, ...]]
        self.state = ([], 0, [])

    def recv(self, limit: int, deadline: float | None = None) -> bytes | None:
        come = self.state[0]
        if not come and deadline is None and not self._posted:  # the usual case
            come.extend(map(self.sock.recv, (_READ_SIZE,)))
            data = come[0]
            if len(data) > 4:
                (size,) = _LENGTH.unpack_from(data)
                if size == len(data) - 4 and size <= limit:
                    self.next = ([], 0, [])
                    self.more = False
                    return data[4:]  # type: ignore[no-any-return]
        return self._recv_in_parts(limit, deadline)

    def _recv_in_parts(self, limit: int, deadline: float | None) -> bytes | None:
        while not self.state[2]:
            come, at, _ = self.state
            if come and not come[-1]:
                raise EOFError
            if len(come) > 1:
                come, at = [come[0][at:] + b"".join(come[1:])], 0
                self.state = (come, at, [])
            data = come[0] if come else b""
            start = at + (12 if data.startswith(_LONG, at) else 4)
            if start <= len(data):
                size = int.from_bytes(data[at:start][-8:], "big", signed=True)
                if not 0 <= size <= limit:
                    raise ProtocolError(f"a frame of {size} bytes, where at most {limit} are allowed")
                end = start + size
                if end <= len(data):
                    self.more = end < len(data)
                    self.next = (come[:], end, []) if self.more else ([], 0, [])
                    return data[start:end]
                if size > _READ_SIZE:
                    self._begin_large(data[start:], size)
                    continue
            if not self._await(deadline):
                return None
            come.extend(map(self.sock.recv, (_READ_SIZE,)))
        return self._recv_large(deadline)

    def _begin_large(self, begun: bytes, size: int) -> None:
        """Have the rest of a frame read into place: a file in memory gives its bytes away without a copy."""
        file = io.BytesIO(bytes(size))
        with file.getbuffer() as view:
            view[: len(begun)] = begun
        self.state = ([begun], 0, [file, size, [len(begun)]])  # not empty: this is not the usual case

    def _recv_large(self, deadline: float | None) -> bytes | None:
        file, size, counts = self.state[2]
        while sum(counts) < size:
            if not self._await(deadline):
                return None
            with file.getbuffer() as view, view[sum(counts) :] as rest:
                counts.extend(map(self.sock.recv_into, (rest,)))
            if not counts[-1]:
                raise EOFError
        self.next, self.more = ([], 0, []), False
        return file.getvalue()  # type: ignore[no-any-return]

    def _await(self, deadline: float | None) -> bool:
        """Wait until something has come, what was posted being sent meanwhile. False past the deadline."""
        self.flush()
        return deadline is None or _wait_for(self.sock, False, deadline)

    def send_now(self, frame: bytes) -> bool:
        if self._posted or self._sending.locked():
            return False
        try:
            with self._sending:
                if self._posted:
                    return False
                sent = self.sock.send(frame, _DONT_WAIT)
                if sent != len(frame):
                    self._posted.appendleft(frame[sent:])
            if self._posted:
                self.flush()
        except BlockingIOError:
            return False
        except OSError:
            self.shutdown()
        return True

    def _wire(self, frames: Sequence[_Bytes]) -> list[_Bytes]:
        chunks: list[_Bytes] = []
        for frame in frames:
            size = len(frame)
            head = _LENGTH.pack(size) if size <= 0x7FFFFFFF else _LONG + size.to_bytes(8, "big")
            chunks += (head + frame,) if size < _READ_SIZE else (head, frame)  # to copy little is cheaper than to gather
        return chunks

    def _put(self, deadline: float | None) -> None:
        flags = 0 if deadline is None else _DONT_WAIT
        while self._posted:
            self._sent = [sum(self._sent)]
            if self._sent[0] >= len(self._posted[0]):  # it is taken out and counted in one step
                self._sent.extend(map(int.__neg__, map(len, itertools.starmap(self._posted.popleft, ((),)))))
                continue
            chunks = [self._posted[index] for index in range(min(len(self._posted), _TOGETHER))]
            chunks[0] = memoryview(chunks[0])[self._sent[0] :]
            try:
                self._sent.extend(map(self.sock.sendmsg, (chunks,), ((),), (flags,)))
            except BlockingIOError:
                if not _wait_for(self.sock, True, deadline):
                    raise TimeoutError from None

    def shutdown(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            errno = _import("errno")
            if error.errno in (errno.EBADF, errno.ENOTSOCK):  # it wakes nobody who reads
                self.gone(error)

    def close(self) -> None:
        self.shutdown()
        self.state = ([b""], 0, [])
        with self._sending:
            try:
                self.sock.close()
            except OSError:
                pass  # somebody else has closed the descriptor


def _wait_for(sock: socket.socket | int, writing: bool, deadline: float | None) -> bool:
    """Wait until the socket can be read or written. False past the deadline."""
    select = _import("select")
    poll = select.poll()  # not select(), which knows only descriptors below 1024
    poll.register(sock, select.POLLOUT if writing else select.POLLIN)
    return bool(poll.poll(None if deadline is None else _left(deadline) * 1000))


class _PipeChannel(_Channel):
    """Frames as the messages of a named pipe of Windows, by overlapped reads and writes. `connection` owns its handle.

    A read or write that is under way stays so when its caller leaves at a deadline; the next one goes on with it. What is
    waited for are events, and never the handle: it is used only to begin one, and so `shutdown` can close it at any time,
    or the last to use it does. No lock is held meanwhile: a finalizer may run in there, and wait for somebody else.
    """

    _FIRST = 8192  # bytes that are read at first; of a longer message Windows then tells how much is left

    def __init__(self, connection: Any) -> None:
        super().__init__()
        self._connection = [connection]  # taken out by whoever closes it
        self._handle: int | None = connection.fileno()  # None when it is to be used no more
        self._users: list[None] = []  # one for each use of it
        self._down = _import("_overlapped").Overlapped()  # whose event is set when the connection has been ended
        # what has come of the message, how much more to read, and the read that is under way: None when all is here
        self.state = (b"", self._FIRST, [])

    def recv(self, limit: int, deadline: float | None = None) -> bytes | None:
        api = _import("_winapi")
        while True:
            come, size, reading = self.state
            if reading is None:
                self.next = (b"", self._FIRST, [])
                return bytes(come)
            try:
                if not self._begun(reading, api.ReadFile, (size,), deadline):
                    return None
                _, error = reading[0][0].GetOverlappedResult(True)
                rest = self._left_of_message() if error == api.ERROR_MORE_DATA else 0
            except BrokenPipeError:
                raise EOFError from None
            come += reading[0][0].getbuffer()
            if len(come) + rest > limit:
                raise ProtocolError(f"a frame of {len(come) + rest} bytes, where at most {limit} are allowed")
            self.state = (come, rest, [] if rest else None)

    def _put(self, deadline: float | None) -> None:
        while self._posted or self._sent:
            first = itertools.starmap(self._posted.popleft, ((),))
            if not self._begun(self._sent, _import("_winapi").WriteFile, first, deadline):
                raise TimeoutError
            self._sent[0][0].GetOverlappedResult(True)
            self._sent = []

    def _begun(self, under_way: list[Any], function: Callable[..., Any], what: Iterable[Any], deadline: float | None) -> bool:
        """Begin a read or write, of what is taken out of `what` in the same step, unless one is under way; and wait until it is
        done. False past the deadline; raises BrokenPipeError if the connection is or has been ended here."""
        api = _import("_winapi")
        if not under_way:
            self._use(lambda handle: under_way.extend(map(function, (handle,), what, (True,))))
        while under_way[0][1] == api.ERROR_IO_PENDING:
            wait = api.INFINITE if deadline is None else int(_left(deadline) * 1000 + 0.999)
            try:
                which = api.WaitForMultipleObjects([self._down.event, under_way[0][0].event], False, wait)
            except InterruptedError:  # a signal, whose handler has returned
                continue
            if which == api.WAIT_OBJECT_0:
                raise BrokenPipeError
            return bool(which != api.WAIT_TIMEOUT)
        return True

    def _use(self, function: Callable[[int], Any]) -> Any:
        """Call what takes the handle, which is not closed meanwhile. Raises BrokenPipeError if it is to be used no more."""
        self._users.append(None)
        try:
            if self._handle is None:
                raise BrokenPipeError
            return function(self._handle)
        finally:
            self._users.pop()
            if self._handle is None:
                self._let_go()

    def _left_of_message(self) -> int:
        return int(self._use(_import("_winapi").PeekNamedPipe)[1])

    def _let_go(self) -> None:
        """Close the handle, once nobody uses it. What is under way has to end before."""
        if self._users:
            return
        try:
            connection = self._connection.pop()
        except IndexError:
            return  # somebody else does, or has
        for operation, _ in [*(self.state[2] or ()), *self._sent]:
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
        with self._sending:
            del self._users[:]  # in case Ctrl-C has left one
            self._let_go()


def _transport(address: str) -> str:
    return "pipe" if address.startswith("\\\\") else "unix" if "/" in address else "tcp"


def _endpoint(address: str) -> tuple[int, Any]:
    """The family of a socket, and where it is connected to. Raises ValueError for what is no address of this machine."""
    if _transport(address) == "unix":
        return _network.AF_UNIX, address
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    here = host == "::1" or (host.startswith("127.") and host.replace(".", "").isdecimal())
    if not (here and port.isdecimal() and int(port) < 1 << 16):
        raise ValueError(f"{address!r} is no address: that is a path with a / in it, 127.0.0.1:PORT or [::1]:PORT")
    return (socket.AF_INET6 if ":" in host else socket.AF_INET), (host, int(port))


def _connect(address: str, timeout: float) -> _Channel:
    """A channel to `address`: a path, a pipe's name or ``host:port``. Raises OSError."""
    if _transport(address) == "pipe":
        return _PipeChannel(_import("multiprocessing.connection").Client(address, "AF_PIPE"))
    family, target = _endpoint(address)
    sock = socket.socket(family)
    try:
        sock.settimeout(timeout)
        deadline = time.monotonic() + timeout
        while True:
            try:
                sock.connect(target)
                return _SocketChannel(sock)
            except BlockingIOError:  # Linux says so of a Unix socket whose backlog is full
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.01)
    except BaseException:
        sock.close()
        raise


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

    The folder has mode 0700, so that only this user gets as far as the handshake. `address` is what _connect takes; one
    that is given is used instead, and the OSError or ValueError raised if it cannot be.
    """

    def __init__(self, address: str = "", name: str = "") -> None:
        """`name`: what its folder is to be called, where it makes one."""
        self.folder = ""
        self.passed_over: list[str] = []  # the temp folders that would not do, and why
        self.address = address or rf"\\.\pipe\miniplug-{os.urandom(16).hex()}"
        if address and (_transport(address) == "pipe") != _WINDOWS:
            problem = "here that is the name of a pipe" if _WINDOWS else "that is the name of a pipe of Windows"
            raise ValueError(f"{address!r} is no address: {problem}")
        if _WINDOWS:
            self._listener: Any = _import("multiprocessing.connection").Listener(self.address, "AF_PIPE")
        else:
            self._listener = self._bind(address) if address else self._bind_anywhere(name or _folder_name())
            self._listener.setblocking(False)
        _listeners.add(self)

    def _bind(self, address: str) -> socket.socket:
        family, target = _endpoint(address)
        if _transport(address) == "tcp":
            sock = socket.create_server(target, family=family)
            self.address = address[: address.rindex(":")] + f":{sock.getsockname()[1]}"
            return sock
        self.address = os.path.abspath(address)
        _remove_stale(self.address)
        sock = socket.socket(family)
        try:
            sock.bind(self.address)
            os.chmod(self.address, 0o600)
            sock.listen(128)
            return sock
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError):
                raise
            if error.errno is None:  # the path is too long
                raise OSError(f"{error}: {address!r}") from None
            raise OSError(error.errno, error.strerror, address) from None  # it has named no file

    def _bind_anywhere(self, name: str) -> socket.socket:
        for base in _temp_folders():
            self.folder = os.path.join(base, name)
            try:
                if len(os.fsencode(self.folder)) > 101:  # BSD has 104 for "/s" and NUL too
                    raise OSError("its path is too long for a socket")
                os.mkdir(self.folder, 0o700)
                return self._bind(os.path.join(self.folder, "s"))
            except OSError as error:
                self._remove()
                self.passed_over.append(f"{base} ({error.strerror or error})")
        self.folder = ""
        return self._bind("127.0.0.1:0")  # no folder to be had: the key alone keeps others out

    def accept(self) -> _Channel | None:
        """The next connection; or None, if half a second brings none (on Windows it waits on). Raises OSError when
        accepting fails."""
        if _WINDOWS:
            return _PipeChannel(self._listener.accept())
        if not _wait_for(self._listener, False, time.monotonic() + 0.5):
            return None
        return _SocketChannel(self._listener.accept()[0])

    def close(self) -> None:
        _listeners.discard(self)
        self._listener.close()
        self._remove()

    def _remove(self) -> None:
        if _transport(self.address) == "unix":
            _remove_socket(self.address, self.folder)


def _remove_socket(path: str, folder: str) -> None:
    for remove, name in ((os.unlink, path), (os.rmdir, folder)):
        try:
            remove(name)
        except OSError:
            pass


def _remove_stale(path: str, seconds: float = 0.0) -> None:
    """Remove the socket that a process which was killed has left, and the folder if it had made one for it. Others that are
    being killed may hold it open for that many seconds."""
    deadline = time.monotonic() + seconds
    try:
        while _transport(path) == "unix" and _import("stat").S_ISSOCK(os.lstat(path).st_mode):  # and nothing else
            try:
                _connect(path, 1.0).close()
                if time.monotonic() >= deadline:
                    return
                time.sleep(0.01)
            except ConnectionRefusedError:
                os.unlink(path)
                folder = os.path.dirname(path)
                name = os.path.basename(folder)
                if name.startswith("miniplug-") and len(name) == len(_folder_name()):  # not one of the user's
                    os.rmdir(folder)
    except OSError:
        pass  # there is nothing, or somebody else was quicker


# === 4. handshake =======================================================================================
#
# Three passes, mutual, after ISO/IEC 9798-4: each side proves that it holds the key by a MAC over both nonces.
#
#     host    {"miniplug": 1, "role": "host", "nonce", "protocol_versions", "codec", "max_message", "features"}
#     plugin  {"miniplug": 1, "role": "plugin", "nonce", "protocol_versions", "codecs", "max_message", "features", "cookie"}
#     plugin  {"proof"}
#     host    {"protocol_version", "codec"}, or {"refusal"}
#     host    {"proof"}
#
# A proof is HMAC-SHA256 over the role's name, the address and all messages before it, each with its length before it,
# so that nothing can be changed, replayed, reflected, or relayed to another address.

_HELLO_LIMIT = 4096  # bytes; until the key is proven nothing else is decoded
_HELLO_SECONDS = 5.0
_WIRE_VERSION = 1


class Handshake(namedtuple("Handshake", "protocol_version magic_cookie_key magic_cookie_value",
                           defaults=(1, "MINIPLUG_COOKIE", "b7fb5a3f2d4a4c0e9a5f6b1c"))):
    """What a host and its plugins agree on beforehand. Immutable.

    `protocol_version` (int, default 1) is the version of the interface that they share; count it up when that
    changes. `magic_cookie_key` and `magic_cookie_value` (str) name an environment variable and what the host sets it
    to: they tell a person who starts a plugin by hand, or a host that starts the wrong program, what is wrong. They
    are no security measure.
    """

    __slots__ = ()


# What a handshake settles; the other side's limit in bytes, and its features.
_Terms = namedtuple("_Terms", "protocol_version max_message features", defaults=((),))
_FEATURES = ("arrays",)  # what each side tells that it knows, beside those of a plugin alone


class _Hello:
    """One run of the handshake over one channel, for either role. Its methods raise AuthenticationError, HandshakeError,
    ProtocolError, OSError and EOFError."""

    def __init__(self, channel: _Channel, address: str, key: bytes, role: str) -> None:
        self._channel, self._address, self._key, self._role = channel, address, key, role
        self._said: list[bytes] = []
        self._deadline = time.monotonic() + _HELLO_SECONDS

    def say(self, **message: Any) -> None:
        self._said.append(_encode(message).encode())
        self._channel.send([self._said[-1]], self._deadline)

    def hear(self) -> dict[str, Any]:
        frame = self._channel.recv(_HELLO_LIMIT, self._deadline)
        if frame is None:
            raise TimeoutError(f"no answer within {_HELLO_SECONDS:g} s")
        self._said.append(bytes(frame))
        self._channel.state = self._channel.next
        try:
            message = json.loads(self._said[-1])
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise ProtocolError("what came is no handshake")
        return message

    def greet(self, versions: Sequence[int], max_message: int, features: Sequence[str] = (), **others: Any) -> None:
        self.say(miniplug=_WIRE_VERSION, role=self._role, nonce=os.urandom(16).hex(), protocol_versions=list(versions),
                 max_message=max_message, features=[*_FEATURES, *features], **others)

    def hear_greeting(self, role: str) -> dict[str, Any]:
        """The other side's greeting, checked as far as either role needs it."""
        theirs = self.hear()
        versions = theirs.get("protocol_versions")
        if theirs.get("miniplug") != _WIRE_VERSION or theirs.get("role") != role:
            raise ProtocolError(f"the other side is no miniplug {role} of wire version {_WIRE_VERSION}")
        if not isinstance(versions, list) or [*map(type, versions), type(theirs.get("max_message"))] != [int] * (len(versions) + 1):
            raise ProtocolError("the other side's greeting is incomplete")
        theirs["features"] = theirs["features"] if isinstance(theirs.get("features"), list) else []
        return theirs

    def prove(self) -> None:
        self.say(proof=self._mac(self._role))

    def check(self, role: str) -> None:
        """Hear the other side's proof."""
        expected = self._mac(role)
        proof = str(self.hear().get("proof"))
        if not _import("hmac").compare_digest(expected.encode(), proof.encode("utf-8", "replace")):
            raise __getattr__("AuthenticationError")(f"the {role} at {self._address} does not hold the key")

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
        cookie = theirs.get("cookie")
        refusal = ""
        if isinstance(cookie, dict) and cookie.get("matches") is not True:
            refusal = (f"it is a plugin for another host: it expects another magic cookie in {cookie.get('key')!r}; "
                       "is the handshake given to launch() the one that it serves with?")
        elif not common:
            older = "plugin" if max(theirs["protocol_versions"], default=0) < max(versions) else "host"
            refusal = (f"no common protocol version: the host has {list(versions)}, the plugin has "
                       f"{theirs['protocol_versions']}; the {older} is the older one, bring it up to date")
        elif "json" not in (theirs["codecs"] if isinstance(theirs.get("codecs"), list) else ()):
            refusal = f"the plugin does not know the codec 'json', only {theirs.get('codecs')}"
        self.say(**({"refusal": refusal} if refusal else {"protocol_version": max(common), "codec": "json"}))
        self.prove()
        if refusal:
            raise HandshakeError(refusal, host={"protocol_versions": list(versions), "codec": "json"}, plugin=theirs)
        return _Terms(max(common), theirs["max_message"], theirs["features"])

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


class _Door:
    """Where the other side comes in. Each caller is greeted on a thread of its own, with a deadline, and let in if it holds
    the key. A wrong, slow or silent caller holds up nobody.

    `greet` runs the handshake; `arrived` is called with the channel and the terms, or with a HandshakeError, on that thread. The
    door closes before it is called, and lets in nobody else, unless it `stays` open.
    """

    _CROWD = 64  # callers in the handshake at once; past that the one that has been there longest has to go

    def __init__(self, greet: Callable[[_Channel, str], _Terms], arrived: Callable[[_Channel, Any], None],
                 address: str = "", stays: bool = False, name: str = "") -> None:
        self.listener = _Listener(address, name)
        self.strangers = 0
        self._greet = greet
        self._arrived = arrived
        self._stays = stays
        self._lock = threading.Lock()  # protects the following two
        self._open = True
        self._callers: dict[int, _Channel] = {}
        try:
            self._thread = _start_thread("miniplug-door", self._accept)
        except BaseException:
            self.listener.close()
            raise

    def _accept(self) -> None:
        channel = None
        while self._open:
            if channel is not None:
                _aside("miniplug-hello", self._meet, channel)
            try:
                channel = self.listener.accept()
            except OSError:  # out of descriptors, or a caller that left at once
                channel = None
                time.sleep(0.05)
        if channel is not None:
            channel.close()
        self.listener.close()

    def _meet(self, channel: _Channel) -> None:
        result: Any = None
        with self._lock:
            if len(self._callers) >= self._CROWD:
                next(iter(self._callers.values())).shutdown()
            self._callers[id(channel)] = channel
            if not self._open:
                channel.shutdown()
        try:
            result = self._greet(channel, self.listener.address)
        except HandshakeError as error:
            result = error
        except Exception:  # a stranger, whatever it is that he did
            self.strangers += 1
        with self._lock:
            enters = self._open and result is not None
            self._open = self._open and (self._stays or not enters)
            if enters and not isinstance(result, Exception):
                del self._callers[id(channel)]  # first: whoever hears of it may close the door, which ends those in it
        if not enters or isinstance(result, Exception):
            channel.close()
        if enters:
            self._arrived(channel, result)
        with self._lock:
            self._callers.pop(id(channel), None)

    def settle(self, seconds: float) -> None:
        """Wait until nobody is being greeted, at most that long."""
        deadline = time.monotonic() + seconds
        while self._callers and time.monotonic() < deadline:
            time.sleep(0.005)

    def close(self) -> None:
        """Let nobody in any more; returns when no thread, socket or file is left."""
        with self._lock:
            self._open = False
            callers = list(self._callers.values())
        for channel in callers:
            channel.shutdown()
        try:
            _connect(self.listener.address, 1.0).close()  # wakes the thread
        except OSError:
            pass  # it has closed the listener; or without a descriptor for this it looks by itself
        self._thread.join(2.0)


# === 5. session =========================================================================================
#
# Calls, answers and streams, both ways, over one channel. The two sides are one class: each numbers its own calls, and
# answers those of the other. A frame is a header and a body in the codec, then the buffers that go beside it:
#
#     offset  size  field
#          0     1  wire version
#          1     1  kind
#          2     2  flags: 1 the body has tags, 2 whoever does not know the kind may ignore it, 4 a stream follows
#          4     4  how many buffers follow, each a frame of its own
#          8     8  the number of the call it is about, counted by the side that made the call
#         16     8  in a call: the number of the receiver's call on whose behalf it is made, or 0
#
# Reading. At most one thread reads at a time: `_reader` holds who does, put there by setdefault(), which is one step, so
# that Ctrl-C cannot come between having it and knowing it. It hands on at once what is not its own. Which thread that is:
#
#   - A thread that waits for an answer reads, if nobody does; otherwise it sleeps until its answer has come or
#     it is woken to read. Whoever stops reading wakes the next (`_pass_on`).
#   - Where calls come in (in a plugin always, in a host while it has lent something), or an answer is due that no
#     thread waits for, a thread of the pool reads while no caller does. It runs the call it has read itself, the
#     quickest way by far, and `_reader` is empty meanwhile. The clock looks on every few milliseconds while there
#     is traffic: when one call has outlasted a whole tick, it has another thread read. A method that was that slow
#     gets another reader at once the next time.
#   - A call made on behalf of one that a thread waits for is run by that thread; where none waits, by a thread of the
#     pool, outside `max_workers`. So calls may nest to any depth.
#
# Sleeping and waking. A thread first says that it will sleep (`_waiting`, `_idle`), then looks once more, then sleeps;
# whoever has something for it does that first, then looks who sleeps. So no wake-up is lost. A spurious one is harmless.
#
# Streams. The answer to a call may be a stream: items, several to a message, until an end or an error. The caller
# may leave _WINDOW of them unread; for each one that it reads it gives credit for another, some together. Without
# credit the producer is set aside, and holds no thread.

_HEADER = struct.Struct("!BBHIQQ")
_BODY = _HEADER.size
_FIRST = struct.Struct("!QQQ")  # the same with its first four fields as one number, to tell the usual messages by
_PREFIXED = struct.Struct("!iBBHIQQ")  # the same with the frame's length before it
_CALL, _NOTIFY, _RESULT, _ERROR, _ITEM, _END, _CREDIT, _CANCEL, _RELEASE, _PING, _PONG, _SHUTDOWN = range(1, 13)
_TAGGED, _IGNORABLE, _STREAM = 1, 2, 4
_PLAIN_CALL, _PLAIN_RESULT = (_FIRST.unpack(_HEADER.pack(_WIRE_VERSION, kind, 0, 0, 0, 0))[0] for kind in (_CALL, _RESULT))
_WINDOW = 64  # items of a stream that may be on their way or unread
_GATHER = 0.001  # seconds after a message of items in which the next ones wait for each other
_TICK = 0.005  # seconds that a call may hold up the others, before another thread reads
_QUIET_TICKS = 2  # after so many without traffic the clock sleeps
_IDLE_SECONDS = 10.0  # after which a thread of the pool that has nothing to do ends

_current: ContextVar[_Request | None] = ContextVar("miniplug", default=None)  # the call that runs here
_loop_threads: set[int] = set()  # those that run event loops of ours


def cancelled() -> bool:
    """Whether the caller has given up the call that this method runs for: timed out, cancelled or gone.

    A long method asks now and then, and returns when it is true. Outside a call it is False.
    """
    request = _current.get()
    return request is not None and request.cancelled


class _Gate:
    """A lock used as a wake-up: `wait` returns True once `open` was called since it last did."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wait(self, seconds: float = -1) -> bool:
        return self._lock.acquire(True, min(seconds, threading.TIMEOUT_MAX))

    def open(self) -> None:
        try:
            self._lock.release()
        except RecursionError:  # a RuntimeError too, and another matter
            raise
        except RuntimeError:
            pass  # it is open


class _Here(threading.local):
    """What each thread waits at, and for how many calls: a finalizer or a signal handler may call in the midst of that."""

    waits = 0

    def __init__(self) -> None:
        self.gate = _Gate()


_here = _Here()


class _Clock:
    """One thread for all sessions of this process, while there are any: it looks on while calls run, ends submitted
    calls at their deadlines, and gives back what the garbage collector has found."""

    def __init__(self) -> None:
        self._gate = _Gate()
        self._lock = threading.RLock()  # protects the following three; a signal handler may take it again
        self._sessions: set[_Session] = set()
        self._alarms: list[tuple[float, int, int, _Session]] = []  # a heap of (deadline, number of the call, id, session)
        self._open = 0  # how many of them counted the last time
        self._runs = False

    def add(self, session: _Session) -> None:
        with self._lock:
            self._sessions.add(session)
            try:
                self._start()
            except RuntimeError:
                pass  # no thread to be had now; a deadline asks again

    def _start(self) -> None:
        if not self._runs:
            _start_thread("miniplug-clock", self._run)
            self._runs = True

    def remove(self, session: _Session) -> None:
        with self._lock:
            self._sessions.discard(session)
            self._alarms = sorted(alarm for alarm in self._alarms if alarm[3] is not session)
        self.wake()

    def alarm(self, deadline: float, number: int, session: _Session) -> None:
        """Have `session.expire(number)` called at a time. Raises RuntimeError if no thread can be started."""
        with self._lock:
            if session not in self._sessions:
                return  # it has ended meanwhile
            self._start()
            if len(self._alarms) > 2 * self._open + 1000:  # most of them are answered by now
                self._alarms = sorted(alarm for alarm in self._alarms if not alarm[1] or alarm[1] in alarm[3]._calls)
                self._open = len(self._alarms)
            _import("heapq").heappush(self._alarms, (deadline, number, id(session), session))
            first = self._alarms[0][3] is session
        if first:
            self.wake()

    def wake(self) -> None:
        """Have it look. (Finalizers call this: it takes no lock.)"""
        self._gate.open()

    def _run(self) -> None:
        while True:
            with self._lock:
                sessions = list(self._sessions)
                self._runs = bool(sessions)
                if not sessions:
                    return
                due = []
                while self._alarms and self._alarms[0][0] <= time.monotonic():
                    due.append(_import("heapq").heappop(self._alarms))
                next_alarm = self._alarms[0][0] if self._alarms else None
            for _, number, _, session in due:
                session.expire(number)
            busy = [session for session in sessions if session.look_on()]
            self._gate.wait(_TICK if busy else _left(next_alarm))


_clock = _Clock()
_forks = 0  # how many forks are between the process that began and this one


def _after_fork() -> None:
    global _forks
    _forks += 1
    for session in _clock._sessions:
        if isinstance(session, _Session):
            session.abandon()
    for listener in _listeners:
        listener._listener.close()
    _listeners.clear()
    _clock.__init__()  # type: ignore[misc]  # its thread is gone


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Call:
    """A call of ours. `inbox` is what has come about it, as (kind, value): an answer, or a stream's parts."""

    inbox: Any = ()
    gate: _Gate | None = None  # of the thread that waits, if it sleeps
    nested: deque[_Request] | None = None  # calls made on behalf of this one, for the thread that waits
    takes_nested = True  # from before it is sent, as they may come before that thread waits
    sent = False  # whether it was, before it came to _ask
    streams = False
    deadline: float | None = None
    watcher: Callable[[_Call], None] | None = None  # called by the reader when something has come, where no thread waits
    received = 0  # items that have come, counted by the reader
    granted = _WINDOW  # items for which there was credit, counted by who reads the stream

    def __init__(self, number: int, method: str, seconds: float | None, watcher: Callable[[_Call], None] | None = None) -> None:
        self.number = number
        self.method = method
        self.seconds = seconds
        if seconds is not None:
            self.deadline = time.monotonic() + seconds
        if watcher is not None:
            self.watcher = watcher
            self.takes_nested = False

    def left(self) -> float | None:
        """Seconds until the deadline, or None without one."""
        return None if self.deadline is None else _left(self.deadline)

    def arrive(self, part: tuple[int, Any], once: Iterable[tuple[int, Any]] = ()) -> None:
        """Take what has come. That may be repeated, with the same `once`, which gives `part` the first time."""
        if self.streams:
            self.inbox.extend(once)
        else:
            self.inbox = (part,)
        if self.gate is not None:
            self.gate.open()
        if self.watcher is not None:
            self.watcher(self)


def _waits_for_itself(call: _Call) -> Exception:
    return RuntimeError(f"{call.method}() would wait for ever: called by a signal handler, a __del__ or a decode, it has "
                        "interrupted what is to bring the answer; use submit or notify there")


def _too_late(call: _Call) -> Exception:
    text = f"{call.method}() took longer than {call.seconds:g} s"
    return __getattr__("CallTimeout")(text, method=call.method, seconds=call.seconds)  # type: ignore[no-any-return]


class _Sealed(Exception):
    """The session takes no more calls: this one was not sent, and may go elsewhere."""


class _Request:
    """A call of the other side's, to be answered."""

    cancelled = False
    nested = False  # whether one of our calls waits for it: then it runs outside max_workers
    outer: _Request | None = None  # the call in which this one is run
    in_row = False  # whether the thread that runs it goes on with another call at once: then their answers leave together
    producer: _Producer | None = None  # of the stream that is its answer
    task: Any = None  # asyncio's, where it runs as one

    def __init__(self, session: _Session, number: int, body: Any, wants_answer: bool = True) -> None:
        self.session = session
        self.number = number
        self.method: str = body[1]
        self.body = body  # [target, method, args, kwargs]; None once it has run
        self.wants_answer = wants_answer

    def cancel(self) -> None:
        self.cancelled = True
        task = self.task
        if task is not None:
            self.session.references.on_loop(task.cancel)
        if self.producer is not None:
            self.producer.grant(0)  # it is closed, if it waits for credit


def _renamed(error: PluginError, old: str, new: str) -> PluginError:
    """The same error, with the place that it names told in full."""
    error.args = (str(error).replace(old, new, 1),)
    if isinstance(error, NotSerializable):
        error.path = error.path.replace(old, new, 1)
    return error


def _is_call(body: Any) -> bool:
    """Whether it is one; what a later version of the protocol may add behind is cut off."""
    if type(body) is not list or len(body) < 4:
        return False
    if len(body) > 4:
        del body[4:]
    return type(body[1]) is str and type(body[2]) is list and type(body[3]) is dict


class _Message:
    """A message that has come. What it carries is put into a queue by `once`: that may be repeated, and is one step, so that
    nothing is lost or doubled when Ctrl-C strikes in between."""

    checked = False  # whether it is counted, as an answer, or is among those to be answered, as a call
    request: _Request | None = None  # what was made of it, as a call

    def __init__(self, kind: int, flags: int, number: int, parent: int, value: Any) -> None:
        self.kind = kind
        self.flags = flags
        self.number = number
        self.parent = parent
        self.value = value
        self.once: Any = iter(((kind, value),))


class _Producer:
    """The sending end of a stream: it takes from an iterator what the other side has given credit for.

    Items that come quickly gather, and leave together; a slow producer's leave one by one, when they are made.
    """

    def __init__(self, request: _Request, iterator: Any) -> None:
        self._request = request
        self._session = request.session
        self.iterator = iterator
        self._granted = _WINDOW  # for how many items there was credit, in all
        self._parked = False  # whether it waits for credit; then `resume` goes on with it
        self._lock = threading.Lock()  # protects the former two, from those that grant
        self._used = 0  # how many items were made
        self._items: deque[Any] = deque()
        self._flushing = threading.Lock()  # held while items leave, so that they leave in order
        self._last = 0.0  # when some left
        self._count = 0  # how many have
        self._size = 0  # of those in _items, in bytes
        self._failure: BaseException | None = None  # an item that could not travel
        self._cut = False  # whether that one was found when it was to leave

    def grant(self, credit: int) -> None:
        with self._lock:
            self._granted += credit
            parked, self._parked = self._parked, False
        if parked:
            self._session.resume(self._request)

    def may_go_on(self) -> bool:
        """Use one credit. False: it is parked, until there is some or the stream is given up."""
        if self._used >= self._granted:
            self.flush()
            with self._lock:
                self._parked = self._used >= self._granted and not self._request.cancelled
                if self._parked:
                    return False
        self._used += 1
        return True

    def put(self, item: Any) -> None:
        """Encode an item, now, as its maker may change it; and send it, or let it wait for others."""
        if self._session._forks != _forks:
            _leave_fork(None)
        joins = self._session.codec.joins
        try:
            content = self._session.codec.dumps_short(item if joins else [item], "an item")
        except PluginError as error:
            self._fail(error)
            return
        if type(content) is bytes:
            content = (content, (), False, ())
        self._items.append(content)
        self._size += len(content[0])
        late = time.monotonic() - self._last > _GATHER
        if late or content[1] or not joins or len(self._items) >= _WINDOW // 2 or self._size >= _READ_SIZE:
            self.flush()
        elif len(self._items) == 1:
            self._session.flush_later(self)

    def _fail(self, error: PluginError) -> None:
        """An item cannot travel: that ends the stream, once all before it have left."""
        place = "an item" if self._session.codec.joins else "an item[0]"
        self._failure = _renamed(error, place, f"item {self._count + len(self._items)} of {self._request.method}()")

    def flush(self) -> None:
        """Send what has gathered."""
        with self._flushing:
            self._size = 0
            group: list[Any] = []  # what goes in one message: items without buffers
            size = 0
            while self._items:
                content = self._items.popleft()
                alone = content[1] or not self._session.codec.joins
                if group and (alone or size + len(content[0]) >= self._session.send_limit - 2):
                    self._send(group)
                    group, size = [], 0
                group.append(content)
                size += len(content[0]) + 1
                if alone:
                    self._send(group)
                    group, size = [], 0
            if group:
                self._send(group)
            self._last = time.monotonic()

    def _send(self, group: list[Any]) -> None:
        if self._cut or self._request.cancelled:
            for content in group:
                self._session.references.unlend(content[3])
            return
        codec = self._session.codec
        data = codec.join([content[0] for content in group]) if codec.joins else group[0][0]
        lent = [number for content in group for number in content[3]]
        try:
            self._session.send(_ITEM, self._request.number, (data, group[0][1], any(content[2] for content in group), lent))
            self._count += len(group)
        except PluginError as error:  # too large: nothing comes after it
            self._cut = True
            self._fail(error)

    def run(self) -> None:
        """Produce, until the end or until there is no credit."""
        try:
            while self.may_go_on():
                if self.over:
                    return self.end(None)
                self.put(next(self.iterator))
        except StopIteration:
            self.end(None)
        except BaseException as error:
            self.end(error)
        return None

    async def run_async(self) -> None:
        """The same for an async iterator."""
        try:
            while self.may_go_on():
                if self.over:
                    await self._close()
                    break
                self.put(await self.iterator.__anext__())
            else:
                self._request.task = None  # parked
                return
            self.end(None)
        except StopAsyncIteration:
            self.end(None)
        except BaseException as error:
            self.end(error)

    @property
    def over(self) -> bool:
        """Whether nobody wants more."""
        return self._request.cancelled or self._failure is not None

    async def _close(self) -> None:
        if hasattr(self.iterator, "aclose"):
            await self.iterator.aclose()

    def end(self, error: BaseException | None) -> None:
        """Send the rest and the end, and be done with the call."""
        if self._session._forks != _forks:
            _leave_fork(error)
        self.flush()
        try:
            if hasattr(self.iterator, "close"):
                self.iterator.close()
        except BaseException as problem:
            error = error or problem
        own, error = (False, error) if self._failure is None else (True, self._failure)
        if error is None:
            self._session.answer(self._request, _END)
            self._session.finish(self._request)
        else:
            self._session.fail(self._request, error, own)


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
    """How many calls may run at once. All sessions of a plugin share them."""

    def __init__(self, count: int) -> None:
        self.free = [True] * count  # as long as how many more calls may run
        self.queue: deque[_Request] = deque()  # calls that wait for a slot
        self.lock = threading.Lock()  # protects taking from the queue


class _NoChannel(_Channel):
    """What a session has in a forked child instead of its connection."""

    def _write(self, chunks: list[_Bytes], deadline: float | None) -> None:
        _leave_fork(None)  # it comes back from a generator or a coroutine, say


class _Session:
    """Both directions of one connection, for any thread.

    `references` is what this side serves and lends (_References); `borrow(session, tag, state)` makes the proxy for what
    the other side lends. `lost` is called when the connection has ended, with the cause; it returns what turns the names
    of the methods whose calls are lost into the exception that they raise.
    """

    __slots__ = ("_called", "_calls", "_drained", "_filled", "_forks", "_garbage", "_half", "_idle", "_inline", "_late", "_lock",
                 "_lost", "_lost_calls", "_numbers", "_pack", "_partial", "_queue", "_quiet", "_reader", "_ready",
                 "_recv_limit", "_requests", "_room", "_seen", "_serving", "_slots", "_slow", "_taking",
                 "_ticking", "_unattended", "_vacant", "_waiting", "borrowed", "call_timeout", "cause", "channel", "closing",
                 "codec", "ended", "finished", "look", "protocol_version", "references", "sealed", "send_limit", "stale")

    def __init__(self, channel: _Channel, terms: _Terms, max_message: int, references: Any, borrow: Callable[..., Any],
                 lost: Callable[[BaseException], Callable[[list[str]], BaseException]],
                 serving: bool = False, slots: _Slots | None = None) -> None:
        self.channel = channel
        self.protocol_version: int = terms.protocol_version
        self.references = references
        self.call_timeout: float | None = None  # the deadline of calls that have no other
        self.ended: Callable[[list[str]], BaseException] | None = None  # makes the error, once it has
        self.cause: BaseException | None = None  # why it has
        self._lost_calls: list[str] = []  # the methods that were being called then
        self.stale = False  # whether callers have to look first where to call: here it has begun just now, or is over
        self.sealed = False  # whether it takes no more calls
        self.borrowed: set[int] = set()  # the ids of what stands here for objects of the other side's
        self.look: Callable[[], None] = lambda: None  # called at alarms with the number 0
        self.closing: float | None = None  # the grace in seconds, once the host has said stop; -1 if it is gone without a word
        self.finished = _Gate()  # opens when the other side says stop or is gone
        self._forks = _forks
        self._garbage: deque[tuple[int, int]] = deque()  # (kind, number) of messages that finalizers want sent
        self.codec = _Codec(self._lend, references.unlend, lambda tag, state: borrow(self, tag, state))
        self.codec.arrays = "arrays" in terms.features
        self.send_limit: int = terms.max_message
        channel.gone = lambda error: None if self.ended is not None else self.end(error)
        self._pack: Callable[..., bytes] = _PREFIXED.pack if channel.prefixed else lambda size, *fields: _HEADER.pack(*fields)
        self._recv_limit = max_message + _BODY
        self._lost = lost
        self._serving = serving
        self._numbers = itertools.count(1)
        self._calls: dict[int, _Call] = {}  # ours, open
        self._waiting: dict[int, _Call] = {}  # those of them for which a thread waits
        self._unattended: set[int] = set()  # those whose answer must be read though no thread waits
        self._requests: dict[int, _Request] = {}  # theirs, open
        self._reader: dict[int, Any] = {}  # who reads: {0: their call, or their gate}, or nobody
        self._called = False  # whether a thread was woken to read that has not looked around yet
        self._vacant = _Gate()  # opens when somebody has stopped reading after the end
        self._partial: Any = None  # a message whose buffers have not all come yet
        self._filled = 0  # how many have
        self._room = 0  # how many bytes the others may have
        self._half: _Message | None = None  # a message that is being handed on
        self._lock = threading.RLock()  # protects _idle, and that what waits is told of nested calls
        self._idle: list[_Gate] = []  # threads of the pool that sleep, the latest last
        slots = slots or _Slots(64)
        self._slots, self._queue, self._taking = slots.free, slots.queue, slots.lock
        self._ready: deque[tuple[Callable[[Any], Any], Any]] = deque()  # what waits for a thread: (function, argument)
        self._late: deque[_Producer] = deque()  # with items that wait for others
        self._drained = _Gate()  # opens when the last call has ended after the host said stop
        self._ticking = False  # whether the clock looks on
        self._quiet = 0  # ticks without traffic
        self._inline: _Request | None = None  # the call that a reader ran last
        self._seen: _Request | None = None  # by the clock
        self._slow: set[str] = set()  # methods that outlasted a tick the last time
        _clock.add(self)
        if serving:
            self._wake()

    # -- calling

    def call(self, target: int, method: str, args: Sequence[Any], kwargs: dict[str, Any], timeout: float | None = None) -> Any:
        """Call and wait for the answer, which may be a _Call that streams. Raises what the method raised, CallTimeout
        after `timeout` seconds, and what `lost` said when the connection ends."""
        if _loop_threads and threading.get_ident() in _loop_threads:
            raise RuntimeError(f"{method}() would block the event loop of the async methods: await {method}.submit(...)")
        content: Any = self.codec.dumps_call(target, method, args, kwargs)
        number = next(self._numbers)
        if len(content[0]) <= 3072 and not (content[1] or content[2] or content[3]):  # until the session is rebuilt
            content = content[0]
        if type(content) is bytes and timeout is None and not self._reader and _current.get() is None:
            value = self._call_alone((number, method), content)
            return self._ask(value, _CALL, content) if type(value) is _Call else value
        return self._ask(_Call(number, method, timeout), _CALL, content)

    def submit(self, watcher: Callable[[_Call], None], target: int, method: str, args: Sequence[Any], kwargs: dict[str, Any],
               timeout: float | None) -> _Call:
        """Call, and have `watcher` called, by whoever reads, when the answer has come. Raises what sending raises."""
        call = _Call(next(self._numbers), method, timeout, watcher)
        try:
            self._start(call, _CALL, self.codec.dumps_call(target, method, args, kwargs))
        except TimeoutError:
            self.give_up(call)
            call.arrive((_ERROR, _too_late(call)))
        except BaseException:
            self.give_up(call)
            raise
        if call.deadline is not None and call.deadline < float("inf"):
            _clock.alarm(call.deadline, call.number, self)
        return call

    def notify(self, target: int, method: str, args: Sequence[Any], kwargs: dict[str, Any], timeout: float | None) -> None:
        """Call, and want no answer. Raises what sending raises."""
        call = _Call(next(self._numbers), method, timeout)
        content = self.codec.dumps_call(target, method, args, kwargs)
        self._calls[call.number] = call  # until it is sent
        try:
            if self.sealed:
                raise _Sealed
            self.send(_NOTIFY, call.number, content, 0, call.deadline)
            self._pass_on()  # it may lend something
        except TimeoutError:
            raise _too_late(call) from None
        finally:
            self._calls.pop(call.number, None)

    def ping(self, timeout: float) -> float:
        """Seconds that a message takes there and back. Raises as `call` does."""
        start = time.perf_counter()
        self._ask(_Call(next(self._numbers), "ping", timeout), _PING, (b"", (), False, ()))
        return time.perf_counter() - start

    def next(self, call: _Call) -> tuple[int, Any]:
        """The next part of a stream: (_ITEM, items), (_END, None) or (_ERROR, exception). Raises as `call` does."""
        if _loop_threads and threading.get_ident() in _loop_threads and not call.inbox:
            raise RuntimeError(f"{call.method}() would block the event loop of the async methods: use async for")
        call.deadline = None if call.seconds is None else time.monotonic() + call.seconds
        try:
            self._wait(call)
        except BaseException as error:
            self.give_up(call)
            if type(error) is TimeoutError:
                raise _too_late(call) from None
            raise
        part: tuple[int, Any] = call.inbox.popleft()
        return part

    def watch(self, call: _Call, watcher: Callable[[_Call], None]) -> None:
        """Have `watcher` called, by whoever reads, when something comes about the call, though no thread waits."""
        call.watcher = watcher
        self._unattended.add(call.number)
        if call.inbox or call.number not in self._calls:
            watcher(call)
        self._pass_on()

    def unwatch(self, call: _Call) -> None:
        call.watcher = None
        self._unattended.discard(call.number)

    def _lend(self, value: Any, lent: list[int]) -> tuple[str, Any] | None:
        return self.references.lend(self, value, lent)  # type: ignore[no-any-return]

    def _call_alone(self, call: tuple[int, str], content: bytes) -> Any:
        """The usual case: as the reader, send a call and receive its plain answer. Returns that, or, if it takes another way,
        a _Call, which may be `sent`."""
        reader = self._reader
        try:
            if reader.setdefault(0, call) is not call:
                return _Call(*call, None)
            value = self._exchange(call[0], call[1], content)
            del reader[0]  # no call comes before this, in which Ctrl-C could strike
        except BaseException as error:
            fatal = isinstance(error, Exception) and not isinstance(error, RecursionError)
            if fatal:
                self.end(error)
            if reader.get(0) is call:
                del reader[0]
            self._stop_reading()
            if fatal:
                raise self.ended(self._lost_calls) from None  # type: ignore[misc]
            self.post(_CANCEL, call[0])
            raise
        if self._waiting or self._unattended or self._serving or self.references.lends or self.ended is not None:
            self._stop_reading()
        return value

    def _exchange(self, number: int, method: str, content: bytes) -> Any:
        channel = self.channel
        if self.sealed or self._garbage or self._partial is not None or len(content) > self.send_limit:
            return _Call(number, method, None)
        if not channel.send_now(self._pack(len(content) + _BODY, _WIRE_VERSION, _CALL, 0, 0, number, 0) + content):
            return _Call(number, method, None)
        frame: Any = channel.recv(self._recv_limit)
        if len(frame) > _BODY:
            first, answered, _ = _FIRST.unpack_from(frame)
            if first == _PLAIN_RESULT and answered == number:
                value = self.codec.loads_plain(frame[_BODY:])
                channel.state = channel.next
                return value
        call = self._calls[number] = _Call(number, method, None)
        call.sent = True
        if self.ended is not None:  # just before this one was there to be failed with the others
            self._calls.pop(number, None)
        return call

    def _stop_reading(self) -> None:
        """Another thread may want to read, or to close."""
        if self.ended is not None:
            self._vacant.open()
        self._pass_on()

    def _start(self, call: _Call, kind: int, content: Any) -> None:
        number = call.number
        self._calls[number] = call
        request = _current.get()
        while request is not None and request.session is not self:
            request = request.outer  # this side is called through another session
        if self.sealed:
            raise _Sealed
        if call.watcher is not None:
            self._unattended.add(number)
            self._pass_on(self._wake)  # first: without a thread to read the answer nothing is sent
        self.send(kind, number, content, 0 if request is None else request.number, call.deadline)

    def _ask(self, call: _Call, kind: int, content: Any) -> Any:
        try:
            if not call.sent:
                self._start(call, kind, content)
                if self.channel._posted and self.channel.is_writing():
                    raise _waits_for_itself(call)
            if not self._read_if_free(call) or not call.inbox:
                self._wait(call)
            elif self._waiting or self._unattended or self._serving or self.references.lends:
                self._pass_on()
        except BaseException as error:
            self.give_up(call)
            if type(error) is TimeoutError:
                raise _too_late(call) from None
            raise
        kind, value = call.inbox[0]
        if kind == _ERROR:
            raise value
        if call.streams:
            call.inbox.popleft()
            return call
        return value

    def give_up(self, call: _Call) -> None:
        """Want nothing more of a call. The other side is told, unless it is over."""
        self._leave(call)
        self._unattended.discard(call.number)
        if self._calls.pop(call.number, None) is not None and self.ended is None:
            self._cancel(call)

    def _cancel(self, call: _Call) -> None:
        self.post(_CANCEL, call.number)
        if call.streams and not self._serving:  # its producer may wait to send: read until a ping is answered
            ping = _Call(next(self._numbers), "ping", None, lambda call: None)
            self._calls[ping.number] = ping
            self._unattended.add(ping.number)
            self.post(_PING, ping.number)
            self._pass_on()

    def expire(self, number: int) -> None:
        """The deadline of a submitted call has come."""
        if not number:
            return self.look()
        call = self._calls.get(number)
        if call is not None and not call.streams:
            self.give_up(call)
            call.arrive((_ERROR, _too_late(call)))
        return None

    def probe(self) -> bool:
        """Ping without waiting, unless the last such ping is still out. Returns whether it was not."""
        if 0 in self._unattended:
            return False
        self._unattended.add(0)
        self.post(_PING, 0)
        self._pass_on()
        return True

    def credit(self, call: _Call, count: int) -> None:
        """So many items of a stream have been read."""
        call.granted += count
        if self.ended is None and call.number in self._calls:
            self.post(_CREDIT, call.number, count)

    def discard(self, kind: int, number: int) -> None:
        """Have a message sent: finalizers call this, which may run at any moment, inside any lock."""
        if self.ended is None:
            self._garbage.append((kind, number))
            _clock.wake()

    def post(self, kind: int, number: int, value: Any = None) -> None:
        """Send a small message without waiting."""
        body = b"" if value is None else self.codec.dumps(value, "a message")[0]
        self.channel.post([_HEADER.pack(_WIRE_VERSION, kind, 0, 0, number, 0) + body])

    def send(self, kind: int, number: int, content: Any, parent: int = 0, deadline: float | None = None, flags: int = 0,
              wait: bool = True, later: bool = False) -> None:
        """Send what the codec made, which is bytes if it is plain and short. Raises MessageTooLarge, and TimeoutError past
        the deadline."""
        if type(content) is bytes:
            if deadline is None and wait and not (later or self._garbage) and len(content) <= self.send_limit:
                frame = self._pack(len(content) + _BODY, _WIRE_VERSION, kind, flags, 0, number, parent) + content
                if not self.channel.send_now(frame):
                    self.channel.send_small(frame)
                return
            content = (content, (), False, ())
        body, buffers, tagged, lent = content
        size, limit = len(body), self.send_limit
        if buffers:
            size += sum(map(len, buffers))
        try:
            if size > limit:
                text = f"a message of {size} bytes, where the other side takes {limit}: raise its max_message, or send it in parts"
                raise MessageTooLarge(text, size=size, limit=limit)
            if self._garbage:
                self._take_out()
            header = _HEADER.pack(_WIRE_VERSION, kind, flags | _TAGGED if tagged else flags, len(buffers), number, parent)
            if wait and not (later and size < _INLINE):
                self.channel.send([header + body, *buffers], deadline)
            else:
                self.channel.post([header + body, *buffers], later)
        except (MessageTooLarge, TimeoutError):
            self.references.unlend(lent)
            raise
        except OSError:
            self.channel.shutdown()  # what had come before is still read, up to the end of the connection

    def _take_out(self) -> None:
        """Send what finalizers have asked for."""
        while self._garbage and len(self.channel._posted) < 1000:  # the rest when these have left
            try:
                kind, number = self._garbage.popleft()
            except IndexError:  # another thread was quicker
                return
            call = self._calls.pop(number, None) if kind == _CANCEL else None
            if call is not None:
                self._cancel(call)
            elif kind == _RELEASE:
                self.post(kind, number)

    # -- waiting and reading

    def _wait(self, call: _Call) -> None:
        """Wait until something has come about the call, reading while nobody else does. Raises TimeoutError."""
        call.gate = gate = _here.gate
        _here.waits += 1
        self._waiting[call.number] = call
        call.takes_nested = True
        try:
            while not call.inbox:
                if call.nested:
                    request = call.nested.popleft()
                    self._leave(call)  # as this thread is busy now
                    self.run(request)
                    self._waiting[call.number] = call
                    call.takes_nested = True
                elif call.deadline is not None and time.monotonic() >= call.deadline:
                    raise TimeoutError
                elif self.ended is not None and call.number not in self._calls:
                    if not call.inbox:  # it is not one of those that the end has failed just now
                        part = (_ERROR, self.ended([call.method]))
                        call.arrive(part, [part])
                elif not self._read_if_free(call):
                    left = _left(call.deadline)
                    if not gate.wait(left if 0 <= left < _A_WHILE else _A_WHILE) and not call.inbox:
                        if _innermost(sys._getframe(), _INDISPENSABLE, self, self.references) not in (None, _Session.run):
                            raise _waits_for_itself(call)
                        gate.wait(_left(call.deadline))
        finally:
            _here.waits -= 1
            if _here.waits:
                gate.open()  # that may have been meant for the call below
            self._leave(call)

    def _leave(self, call: _Call) -> None:
        """This thread waits no more for the call: others take over what it would have done."""
        with self._lock:  # no nested call is added after this
            call.takes_nested = False
            self._waiting.pop(call.number, None)
        while call.nested:
            self.defer(self.run, (call.nested.popleft(),))
        self._pass_on()

    def _pass_on(self, wake: Callable[[], None] | None = None) -> None:
        """Where somebody should read and nobody does, wake one who will."""
        if not self._reader:
            for call in list(self._waiting.values()):
                if call.gate is not None:
                    call.gate.open()
                    return
            if self._wants_reader() and not self._called:
                try:
                    self._called = True
                    (wake or self._wake_if_possible)()
                except BaseException:  # Ctrl-C, or a full stack
                    self._called = False
                    raise

    def _wants_reader(self) -> bool:
        """Whether somebody must read though nobody waits."""
        return self.ended is None and bool(self._serving or self._unattended or self._requests or self.references.lends)

    def _read_if_free(self, call: _Call) -> bool:
        """Read, unless another thread does, until something has come about the call or it has a nested one, or past the
        deadline. Returns whether none did."""
        reader = self._reader
        try:
            if reader.setdefault(0, call) is not call:
                return False
            while not call.inbox and not call.nested:
                if self._partial is None:
                    frame = self.channel.recv(self._recv_limit, call.deadline)
                    if frame is None:
                        break
                    if self._is_answer(frame):
                        continue
                message = self._receive(call.deadline)
                if message is None:
                    break
                self._handle_elsewhere(message)
                self._half = message = None
            del reader[0]  # no call comes before this, in which Ctrl-C could strike
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, RecursionError):
                self.end(error)
                return True
            if self._half is not None:  # Ctrl-C, or the caller's stack is full: what has been read is handed on before that
                self._handle_elsewhere(self._half)  # goes its way (each step may be repeated)
            raise
        finally:
            if reader.get(0) is call:
                del reader[0]
            if self.ended is not None:
                self._vacant.open()
        return True

    def _is_answer(self, frame: bytes) -> bool:
        """Hand the usual answer on, if the frame is one. (Ctrl-C may strike anywhere: then the frame comes again.)"""
        if len(frame) <= _BODY:
            return False
        first, number, _ = _FIRST.unpack_from(frame)
        call = self._calls.get(number) if first == _PLAIN_RESULT else None
        if call is None or call.streams:
            return False
        call.arrive((_RESULT, self.codec.loads_plain(frame[_BODY:])))
        self.channel.state = self.channel.next
        self._calls.pop(number, None)
        self._unattended.discard(number)
        return True

    def _receive(self, deadline: float | None = None) -> _Message | None:
        """The next message; or None past the deadline."""
        self._half = None
        if self._partial is None:
            frame = self.channel.recv(self._recv_limit, deadline)
            if frame is None:
                return None
            self._begin(frame)
        return self._complete(deadline)

    def _begin(self, frame: bytes) -> None:
        """A message begins with this frame."""
        if len(frame) < _BODY:
            raise ProtocolError(f"a frame of {len(frame)} bytes, which is shorter than a header")
        version, kind, flags, count, number, parent = _HEADER.unpack_from(frame)
        if version != _WIRE_VERSION or count > _MAX_BUFFERS:
            raise ProtocolError(f"a header with wire version {version} and {count} buffers")
        partial = (kind, flags, number, parent, frame[_BODY:], [None] * count)
        room = self._recv_limit - len(frame)
        self._partial, self._filled, self._room, self.channel.state = partial, 0, room, self.channel.next

    def _complete(self, deadline: float | None) -> _Message | None:
        """Read the buffers of the message that has begun. None past the deadline."""
        kind, flags, number, parent, body, buffers = self._partial
        while self._filled < len(buffers):
            buffer = self.channel.recv(self._room, deadline)
            if buffer is None:
                return None
            room = self._room - len(buffer)
            buffers[self._filled] = buffer
            self._filled, self._room, self.channel.state = self._filled + 1, room, self.channel.next
        try:
            value = self.codec.loads(body, buffers, bool(flags & _TAGGED)) if body else None
            if kind == _ERROR:
                value = _decode_error(value)
        except _Undecodable as error:  # well-formed, but not to be had here: it fails that call only
            if kind not in (_CALL, _NOTIFY, _RESULT, _ERROR, _ITEM):
                raise ProtocolError(str(error)) from None
            if kind == _ITEM:
                self.post(_CANCEL, number)
            if kind not in (_CALL, _NOTIFY):
                kind, error = _ERROR, error.args[0]
            value = error
        self._half = _Message(kind, flags, number, parent, value)
        self._partial = None
        return self._half

    def _handle(self, message: _Message) -> _Request | None:
        """Hand a message on. Returns a call of the other side's that is to be run, if it is one."""
        kind, flags, number, value = message.kind, message.flags, message.number, message.value
        if kind in (_CALL, _NOTIFY):
            return self._accept(message)
        if kind in (_RESULT, _ERROR, _PONG, _ITEM, _END):
            call = self._calls.get(number)  # None: given up meanwhile
            if call is not None:
                if not message.checked:
                    message.checked = True
                    self._check_answer(call, kind, flags, value)
                call.arrive((kind, value), message.once)
                if not call.streams or kind in (_ERROR, _END):
                    self._calls.pop(number, None)
                    self._unattended.discard(number)
            elif not number:
                self._unattended.discard(0)  # what `probe` waits for
        elif kind == _PING:
            self.post(_PONG, number)
        elif kind in (_CANCEL, _CREDIT, _RELEASE):
            for _ in message.once:
                self._steer(kind, number, value)
        elif kind == _SHUTDOWN and self._serving:
            self.stop(max(0.0, float(value)) if type(value) in (int, float) else 0.0)
        elif not flags & _IGNORABLE:
            raise ProtocolError(f"a message of the unknown kind {kind}")
        return None

    def _check_answer(self, call: _Call, kind: int, flags: int, value: Any) -> None:
        if kind == _RESULT and flags & _STREAM and not call.streams:
            call.streams, call.inbox = True, deque()
        elif kind != _ERROR and call.streams != (kind in (_ITEM, _END)):
            raise ProtocolError(f"a message of kind {kind} about a call that {'streams' if call.streams else 'does not stream'}")
        elif kind == _ITEM:
            if type(value) is not list or call.received + len(value) > call.granted:
                raise ProtocolError("items of a stream are a list, and no more than there is credit for")
            call.received += len(value)

    def _steer(self, kind: int, number: int, value: Any) -> None:
        """The other side gives a call or a reference up, or a stream credit."""
        request = self._requests.get(number)  # None: it has ended meanwhile
        if kind == _RELEASE:
            self.references.release(number)
        elif kind == _CANCEL:
            if request is not None:
                request.cancel()
        elif type(value) is not int or not 0 < value <= _WINDOW:
            raise ProtocolError(f"a credit of {value!r} items")
        elif request is not None and request.producer is not None:
            request.producer.grant(value)

    def _accept(self, message: _Message) -> _Request | None:
        """Take up a call. None if it is refused, or if it is nested, and has found a thread by that."""
        body, parent = message.value, self._calls.get(message.parent) if message.parent else None
        unknown, body = (body, [0, "", [], {}]) if type(body) is _Undecodable else (None, body)
        if not _is_call(body):
            raise ProtocolError("a call is [target, method, [argument, ...], {name: argument, ...}]")
        request = message.request
        if request is None:
            request = message.request = _Request(self, message.number, body, message.kind == _CALL)
            request.nested = parent is not None
            message.once = iter((request,))
        if self._requests.get(request.number, request) is not request:
            raise ProtocolError("the number of a call is that of another one")
        if not message.checked:
            self._requests[request.number] = request
            message.checked = True
        if unknown or self.closing is not None:
            self.fail(request, unknown or PluginClosed("the plugin is shutting down"), own=True, wait=False)
            return None
        if parent is None:
            return request
        with self._lock:
            if parent.takes_nested:
                parent.nested = deque() if parent.nested is None else parent.nested
                parent.nested.extend(message.once)
                if parent.gate is not None:
                    parent.gate.open()
                return None
        self.defer(self.run, message.once)
        return None

    def _handle_elsewhere(self, message: _Message) -> None:
        """Hand a message on, and have a thread of the pool run a call, as soon as there is a slot."""
        if self._handle(message) is not None:
            self.defer(self._run_in_slot, message.once)

    # -- running calls

    def run(self, request: _Request) -> None:
        """Run a call of the other side's and answer it, or go on with its stream. Whatever the method raises is an
        answer too."""
        request.outer = outer = _current.get()
        _current.set(request)
        own = True  # whether a PluginError would be about this call itself
        try:
            if request.producer is not None:
                return request.producer.run()
            target, method, args, kwargs = request.body
            function = self.references.resolve(target, method)
            own = target == 0
            value = function(*args, **kwargs)
            if self._forks != _forks:
                _leave_fork(None)
            if type(value) not in _ATOMS or not request.wants_answer or request.in_row or request.cancelled:
                return self._conclude(request, value)
            content = self.codec.dumps_short(value, "the result")
            if type(content) is bytes and len(content) <= self.send_limit:  # the usual case
                frame = self._pack(len(content) + _BODY, _WIRE_VERSION, _RESULT, 0, 0, request.number, 0) + content
                if not self.channel.send_now(frame):
                    self.channel.send_small(frame)
                self._requests.pop(request.number, None)
                if self.closing is not None:
                    self.finish(request)
            else:
                self._conclude(request, value)
        except BaseException as error:
            fail = partial(self.fail, error=error, own=own and isinstance(error, PluginError))
            if issubclass(type(error), RecursionError) and _is_deep():  # no room here to tell of it
                self.defer(fail, (request,))
            else:
                fail(request)
            if _is_ctrl_c(error):
                raise  # the answer is for the other side; the user of this one wants an end
        finally:
            _current.set(outer)
            request.body = args = kwargs = None  # not kept alive by a frame that lingers
        return None

    def _conclude(self, request: _Request, value: Any) -> None:
        """Answer with what a method has returned."""
        if self._forks != _forks:
            _leave_fork(None)
        kind = type(value)
        if kind not in _ATOMS:
            if hasattr(kind, "__await__"):
                return self._run_as_task(request, self._await(request, value))
            if hasattr(kind, "__next__") or hasattr(kind, "__anext__"):
                return self._stream(request, value)
        try:
            if request.wants_answer and not request.cancelled:
                self.send(_RESULT, request.number, self.codec.dumps_short(value, "the result"), later=request.in_row)
        except PluginError as error:  # it cannot travel
            name = f"{request.method}()" if request.method else "the function"
            return self.fail(request, _renamed(error, "the result", f"the result of {name}"), own=True)
        return self.finish(request)

    def _stream(self, request: _Request, iterator: Any) -> None:
        request.producer = _Producer(request, iterator)
        self.answer(request, _RESULT, flags=_STREAM)
        request.cancelled = request.cancelled or not request.wants_answer  # nobody will read it
        if hasattr(type(iterator), "__anext__") or threading.get_ident() in _loop_threads:
            self.resume(request)
        else:
            request.producer.run()

    def resume(self, request: _Request) -> None:
        """Go on with a stream."""
        assert request.producer is not None
        if hasattr(type(request.producer.iterator), "__anext__"):
            self._run_as_task(request, request.producer.run_async())
        elif request.nested:
            self.defer(self.run, (request,))
        elif self._take_slot(request):  # first: a thread for each that finds no slot would be one too many
            self.defer(self._run_with_slot, (request,))

    def _run_as_task(self, request: _Request, coroutine: Any) -> None:
        """Run a coroutine on the event loop that the async methods share."""
        request.in_row = False
        def begin() -> None:
            _current.set(request)
            request.task = task = _import("asyncio").ensure_future(coroutine)
            if request.cancelled and request.producer is None:  # only once it has begun, or nothing would finish the request
                _import("asyncio").get_running_loop().call_soon(task.cancel)

        if not self.references.on_loop(begin):
            coroutine.close()
            self.fail(request, PluginClosed("the plugin is shutting down"), own=True)

    async def _await(self, request: _Request, awaitable: Any) -> None:
        try:
            value = await awaitable
            request.task = None
            self._conclude(request, value)
        except BaseException as error:
            self.fail(request, error, False)

    def finish(self, request: _Request) -> None:
        """The call has been answered."""
        self._requests.pop(request.number, None)
        if self.closing is not None and not self._requests:
            self._drained.open()

    def answer(self, request: _Request, kind: int, value: Any = None, label: str = "", wait: bool = True, flags: int = 0) -> None:
        if request.wants_answer and not request.cancelled:
            content = self.codec.dumps(value, label) if label else (b"", (), False, ())
            self.send(kind, request.number, content, wait=wait, flags=flags)

    def fail(self, request: _Request, error: BaseException, own: bool = False, wait: bool = True) -> None:
        """Answer with an exception."""
        if self._forks != _forks:
            _leave_fork(error)
        tell: Callable[[], dict[str, Any]]
        for tell in (partial(_encode_error, error, own), partial(_encode_error, error, own, bare=True),
                     partial(dict, message="an exception that cannot be told")):
            try:
                self.answer(request, _ERROR, tell(), "the exception", wait)
                break
            except BaseException as problem:  # its arguments cannot travel, or are too long, or it is a trap
                if _is_ctrl_c(problem):
                    raise
        if not request.wants_answer:
            _import("traceback").print_exception(type(error), error, error.__traceback__)
        self.finish(request)

    # -- the pool

    def defer(self, function: Callable[[Any], Any], arguments: Iterable[Any]) -> None:
        """Have threads of the pool call a function with each of these, in this order but side by side."""
        self._ready.extend(zip(itertools.repeat(function), arguments))
        try:
            self._wake()
        except RecursionError:
            raise
        except RuntimeError as error:  # no thread to be had: that fails the call, unless a thread has taken it meanwhile
            waiting = [self._ready.pop()] if self._ready else []
            for item in waiting:
                if isinstance(item[1], _Request):
                    self.fail(item[1], error, wait=False)
                    if item[0] == self._run_with_slot:
                        self._slots.append(True)
                else:
                    self._ready.append(item)

    def _wake(self) -> None:
        """Have a thread of the pool look for something to do. Raises RuntimeError if none can be started."""
        with self._lock:
            if self._idle:
                self._idle[-1].open()  # if there is no room for that on the stack, it stays there
                del self._idle[-1]
                return
        try:
            _start_thread("miniplug-worker", self._work)
        except RuntimeError:
            self._called = False
            raise

    def _wake_if_possible(self) -> None:
        try:
            self._wake()
        except RecursionError:
            raise
        except RuntimeError:  # no thread to be had: the calls wait for each other, and the clock tries until there is one
            if not self._ticking:
                self._tick()

    def _work(self) -> None:
        """A thread of the pool: run what is ready, read while nobody does, or sleep."""
        gate = _Gate()
        try:
            while True:
                self._called = False  # it looks what there is only after this
                task = self._next()
                if task is not None:
                    task[0](task[1])
                elif self._wants_reader() and self._reader.setdefault(0, gate) is gate:
                    self._read_as_pool(gate)
                elif not self._sleep(gate):
                    return
        except BaseException as error:  # what it was to do would be waited for in vain (no memory is left, say)
            self.end(error)

    def _next(self) -> tuple[Callable[[Any], Any], Any] | None:
        try:
            task = self._ready.popleft()
        except IndexError:
            return None
        if self._ready:
            self._wake_if_possible()
        return task

    def _sleep(self, gate: _Gate) -> bool:
        """Sleep until there may be something to do. False: for a long time there was nothing, or it is all over."""
        with self._lock:
            self._idle.append(gate)
        busy = bool(self._ready) or (self._wants_reader() and not self._reader)
        if not busy and gate.wait(_IDLE_SECONDS if self.ended is None else 0):
            return True
        with self._lock:
            if gate in self._idle:
                self._idle.remove(gate)
                return busy
        return gate.wait()  # it was woken just now

    def _take_slot(self, request: _Request) -> bool:
        """Whether a call may run now; else it runs when there is a slot. (To take from a list and to add to it are one step
        each. Who queues looks for a slot after that, and who gives one back looks at the queue after that.)"""
        try:
            self._slots.pop()
            return True
        except IndexError:
            self._queue.append(request)
            if self._slots:
                self._start_queued()
            return False

    def _start_queued(self) -> None:
        with self._taking:
            if not (self._queue and self._slots):
                return
            try:
                self._slots.pop()
            except IndexError:
                return  # whoever was quicker looks at the queue
            request = self._queue.popleft()
        request.session.defer(request.session._run_with_slot, (request,))

    def _run_in_slot(self, request: _Request) -> None:
        if self._take_slot(request):
            self._run_with_slot(request)

    def _run_with_slot(self, request: _Request) -> None:
        """Run a call that has a slot, and with the same slot those that wait for one."""
        self.run(request)
        while self._queue:
            with self._taking:
                waiting = self._queue.popleft() if self._queue else None
            if waiting is None:
                break
            waiting.session.run(waiting)
        self._slots.append(True)
        if self._queue:
            self._start_queued()

    def _read_as_pool(self, gate: _Gate) -> None:
        """As the reader: read, and run each call at once, until another thread has taken over."""
        reader, channel, requests, loads = self._reader, self.channel, self._requests, self.codec.loads_plain
        try:
            while self.ended is None and (self._serving or self._wants_reader()):
                request: _Request | None = None
                if self._partial is None:
                    frame: Any = channel.recv(self._recv_limit)
                    if len(frame) > _BODY:
                        first, number, parent = _FIRST.unpack_from(frame)
                        if first == _PLAIN_CALL and not parent and self.closing is None:  # the usual case
                            body = loads(frame[_BODY:])
                            if _is_call(body) and number not in requests:
                                channel.state = channel.next
                                request = requests[number] = _Request(self, number, body)
                                request.in_row = channel.more
                        elif first == _PLAIN_RESULT and self._is_answer(frame):
                            continue
                if request is None:
                    request = self._take_up()
                if request is None or not self._take_slot(request):
                    continue
                self._inline = request
                del reader[0]  # nobody reads while this thread runs the call
                if request.method in self._slow:
                    self._run_slow(request)
                else:
                    if not self._ticking:
                        self._tick()
                    self._run_with_slot(request)
                if reader.setdefault(0, gate) is not gate:
                    return channel.flush()  # it goes on with no other call after all
        except BaseException as error:  # also what a plugin raises in every thread it finds
            self.end(error)
        if reader.get(0) is gate:
            del reader[0]
            self._stop_reading()
        return None

    def _take_up(self) -> _Request | None:
        """Receive a message of any kind. A call that is to be run is returned, any other is handed on."""
        request = self._handle(self._receive())  # type: ignore[arg-type]
        self._half = None
        return request

    def _run_slow(self, request: _Request) -> None:
        """The same for a method that was slow the last time: another thread reads from the start."""
        start = time.monotonic()
        self._pass_on()
        self._run_with_slot(request)
        if time.monotonic() - start < _TICK:
            self._slow.discard(request.method)

    # -- the clock

    def _tick(self) -> None:
        """Have the clock look on."""
        self._ticking = True
        _clock.wake()

    def flush_later(self, producer: _Producer) -> None:
        self._late.append(producer)
        if not self._ticking:
            self._tick()

    def look_on(self) -> bool:
        """Called by the clock every tick, and when it is woken: have another thread read when one call takes long. Returns
        whether it shall look again."""
        if self._garbage and self.ended is None:
            self._take_out()
            if self._garbage:
                self._ticking, self._quiet = True, 0
        self.channel.flush()
        if self._late:
            self.defer(_Producer.flush, {self._late.popleft() for _ in range(len(self._late))})
        inline = self._inline
        if inline is not self._seen:
            self._seen, self._quiet = inline, 0
        elif not self._ticking or self.ended is not None:
            return False
        elif not self._reader and self._wants_reader():  # that call has taken a whole tick
            self._slow.update((inline.method,) if inline is not None else ())
            self._pass_on()
        else:
            self._quiet += 1
        if self._quiet >= _QUIET_TICKS:
            self._quiet = 0
            self._ticking = False
            # a call that began, or items that came, just now may not have seen that
            self._ticking = bool(self._late) or (not self._reader and self._wants_reader())
        return self._ticking

    # -- ending

    def stop(self, grace: float) -> None:
        """Take no more calls and tell those that run that they are given up."""
        self.closing = grace
        for request in list(self._requests.values()):
            request.cancel()
        self.finished.open()

    def drain(self, seconds: float) -> None:
        """Wait until the calls that run have ended, at most that long."""
        deadline = time.monotonic() + seconds
        while self._requests and self._drained.wait(_left(deadline)):
            pass

    def busy(self) -> bool:
        """Whether any call or stream is under way, or a reference left, either way."""
        alone = type(self._reader.get(0)) is tuple
        return bool(alone or self._calls or self._requests or self.borrowed or self.references.lends)

    def seal(self) -> bool:
        """Take no more calls, unless it is busy. Returns whether it takes none. (A call is among `_calls` before it looks
        whether it may be sent: so none slips through.)"""
        with self._lock:
            self.sealed = True
            self.sealed = self.ended is not None or not self.busy()
            return self.sealed

    def end(self, cause: BaseException) -> None:
        """The connection has ended: fail every call that waits, and let every thread go."""
        with self._lock:
            self.cause = cause = self.cause or cause  # the first one is the reason of the others
        make_error = self._lost(cause)
        with self._lock:
            if self.ended is not None:
                return
            alone = self._reader.get(0)
            self._lost_calls = [alone[1]] if type(alone) is tuple else []
            self._lost_calls += [call.method for call in list(self._calls.values())]
            self.ended = make_error
            self.stale = self.sealed = True
            idle, self._idle = self._idle, []
        self.channel.shutdown()
        for call in list(self._calls.values()):
            part = (_ERROR, make_error(self._lost_calls))
            call.arrive(part, [part])
            self._calls.pop(call.number, None)
        self.stop(-1.0 if self.closing is None else self.closing)
        for gate in idle:
            gate.open()
        _clock.remove(self)

    def abandon(self) -> None:
        """In a forked child: leave the connection to its parent."""
        self.ended = lambda calls: PluginError("the connection belongs to the process that this one was forked from")
        self.stale = self.sealed = True
        self.channel.sock.close()  # type: ignore[attr-defined]
        self.channel, self._reader = _NoChannel(), {}

    def dispose(self) -> None:
        """Close the channel, once nobody uses it. Not for a thread that reads."""
        self.channel.shutdown()
        for _ in range(5):
            if self._reader.setdefault(0, self) is self:
                self.channel.close()
                break
            self._vacant.wait(0.1)  # in vain, if somebody has closed the descriptor: that wakes nobody who reads


# === 6. dispatcher ======================================================================================
#
# Names to methods, as xmlrpc.server does it: a method is looked up on the served object, a name that begins with an
# underscore never is, and an object with a _dispatch(method, args, kwargs) of its own answers every name itself.

def _has_method(obj: Any, name: str) -> bool:
    """Whether an object has that public method. Looked up on the class, so that no property is run."""
    found = callable(getattr(_class_of(obj), name, None)) or callable(getattr(obj, "__dict__", {}).get(name))
    return found and not name.startswith("_")


def _class_of(obj: Any) -> Any:
    return obj if isinstance(obj, type) else type(obj)


def _method_names(obj: Any) -> list[str] | None:
    """The public methods of an object, sorted; None if it answers every name."""
    if issubclass(type(obj), _Remote):
        return None if obj._names is None else list(obj._names)
    if callable(getattr(_class_of(obj), "_dispatch", None)):
        return None
    if hasattr(type(obj), "__code__") or hasattr(type(obj), "__self__"):
        return []  # a function: there is nothing to it but to be called
    return sorted(name for name in {*dir(_class_of(obj)), *getattr(obj, "__dict__", ())} if _has_method(obj, name))


def _no_method(name: str, names: Iterable[str] | None, where: str) -> MethodNotFound:
    matches = _import("difflib").get_close_matches(name, list(names or ()), cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""
    if name.startswith("_"):
        hint = ": names that begin with an underscore are private to the plugin"
    text = f"{where} has no method {name!r}{hint}" if name else f"{where} cannot be called itself, only its methods"
    return MethodNotFound(text, name=name, matches=matches)


def _makes_instances(served: Any) -> bool:
    """Whether what is served is a class or a zero-argument factory, and not the object itself."""
    if isinstance(served, type) or not callable(served):
        return isinstance(served, type)
    if not hasattr(type(served), "__code__"):  # no plain function
        return type(served).__name__ in ("partial", "method", "builtin_function_or_method")
    code = served.__code__
    needed = code.co_argcount - len(served.__defaults__ or ()) + code.co_kwonlyargcount - len(served.__kwdefaults__ or ())
    return bool(needed == 0 and not code.co_flags & 0x0C)  # with *args or **kwargs it is there to be called


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
        asyncio = _import("asyncio")
        asyncio.set_event_loop(self._loop)
        _loop_threads.add(threading.get_ident())
        try:
            while not self._closing:
                try:
                    self._loop.run_forever()
                except BaseException:  # some task that the plugin has started calls sys.exit()
                    _import("traceback").print_exc()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            _loop_threads.discard(threading.get_ident())
            self._loop.close()

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
        self._shared: dict[str, tuple[Any, Any]] = {}  # objects that all callers share, and their context managers
        self._lock = threading.Lock()  # protects the following two
        self._loop: _Loop | None = None
        self._closed = False

    def find(self, name: str | None) -> tuple[str, Any]:
        """What is served under a name, or the only plugin. Raises PluginNotFound."""
        if name is None and len(self.plugins) == 1:
            (name,) = self.plugins
        if name is None or name not in self.plugins:
            names = sorted(self.plugins)
            problem = "several plugins are served, name one" if name is None else f"no plugin {name!r} is served"
            raise PluginNotFound(f"{problem}: there {'is' if len(names) == 1 else 'are'} {', '.join(names)}", names=names)
        return name, self.plugins[name]

    def shared(self, name: str) -> Any:
        """The object that all callers share; of a class or factory the one instance that describes the others."""
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
        managers, self._shared = [manager for _, manager in self._shared.values()], {}
        for manager in reversed(managers):
            _exit(manager)


def _enter(obj: Any) -> tuple[Any, Any]:
    """Enter a context manager: (what it serves, the manager). Any other object serves itself: (object, None)."""
    if hasattr(type(obj), "__enter__") and hasattr(type(obj), "__exit__"):
        return type(obj).__enter__(obj), obj
    return obj, None


def _exit(manager: Any) -> None:
    """Exit a context manager, if there is one. What that raises goes to stderr, and so to the host's log."""
    try:
        if manager is not None:
            type(manager).__exit__(manager, None, None, None)
    except Exception:
        _import("traceback").print_exc()


# -- references: objects that stay where they are, and are called from the other side

class _Ref:
    """An object that is to be passed by reference. One that is dispensed has a context manager, or None, to be exited."""

    def __init__(self, obj: Any, *manager: Any) -> None:
        self.object = obj
        self.manager = manager


def ref(obj: Any) -> Any:
    """Pass `obj` by reference: the other side gets a proxy for it. To be used in an argument or a return value.

    The object stays here and is called from there, until the other side has released it or let go of its last proxy
    for it, or the connection ends. Sent back, it arrives as itself. Functions go by reference on their own.
    """
    return _Ref(obj)


class _Target:
    """What a proxy and its methods share. `at`: the session, and the number that the object is lent under there, or None
    once it is released; the two in one, so that they change together.

    What a plugin serves (`plugin`, and its `name`) is at several sessions in turn, or two at once while one of them is
    replaced: `before` is the other one.
    """

    __slots__ = ("at", "before", "identity", "label", "lock", "name", "plugin", "timeout")

    def __init__(self, session: _Session, number: int) -> None:
        self.at: tuple[_Session, int | None] = (session, number)
        self.before = self.at
        self.identity = self.at  # what it stands for, also when it is released or dispensed anew
        self.lock = threading.RLock()  # it is dispensed anew once
        self.label = "the object"
        self.timeout: float | None = None
        self.plugin: Any = None
        self.name: str | None = None
        session.borrowed.add(id(self))

    def live(self, asked: _Call) -> tuple[_Session, int]:
        """Where to call. Raises DeadReference, and what a plugin raises that cannot be called."""
        session, number = self.at
        if number is None:
            raise DeadReference(f"{self.label} was released")
        if not (session.stale or session.sealed):
            return session, number
        if self.plugin is not None:
            return self.plugin._renew(self, asked)  # type: ignore[no-any-return]
        if session.ended is not None:
            raise DeadReference(f"{self.label} is gone: the connection to its owner has ended")
        return session, number

    def release(self) -> None:
        session, number = self.at
        self.at = (session, None)
        session.borrowed.discard(id(self))
        if number:
            session.discard(_RELEASE, number)

    def __del__(self) -> None:
        if hasattr(self, "at"):
            self.release()


def _reach(find: Callable[[_Call], tuple[_Session, int]], function: Callable[..., Any], method: str, args: Sequence[Any],
           kwargs: dict[str, Any], seconds: float | None) -> tuple[_Session, Any]:
    """Call `function` with the session and number that `find` gives, and with other ones if that takes no calls by then.
    Returns the session, and what the function returned. To find it, too, is within the deadline."""
    asked = _Call(0, method, seconds)
    while True:
        try:
            session, number = find(asked)
            return session, function(session, number, method, args, kwargs, asked.left())
        except _Sealed:
            pass
        except __getattr__("CallTimeout"):
            if asked.left() != 0.0:  # it is another one's, such as on_start's
                raise
            raise _too_late(asked) from None


class _Remote:
    """What stands for an object of the other side's: a proxy, or a method of one. Equal ones stand for the same object."""

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
        raise NotSerializable("a proxy cannot be copied or pickled: it stays in its process", type_name="proxy")


def release(proxy: Any) -> None:
    """Give back what the other side has lent; a call on `proxy` raises DeadReference from then on.

    It is given back by itself when its last proxy is collected. Raises TypeError for what is no proxy.
    """
    if not issubclass(type(proxy), _Remote):
        raise TypeError(f"{type(proxy).__name__} is no proxy: there is nothing to give back")
    proxy._target.release()


class _Loan:
    """An object lent to the other side, and the context manager to exit with the loan, if any."""

    __slots__ = ("count", "key", "known", "manager", "methods", "object")

    def __init__(self, obj: Any, key: Any, manager: Any = None) -> None:
        self.object = obj
        self.key = key
        self.manager = manager
        self.methods = _method_names(obj)
        self.known = {name: name for name in self.methods or ()}
        self.count = 0  # how often it was sent, and not given back


class _References:
    """What one side has lent over one session, by number. 0 is `system`, which lends what is served."""

    def __init__(self, served: _Served) -> None:
        self.served = served
        self.on_loop = served.on_loop
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()  # protects the following three
        self._loans: dict[int, _Loan] = {0: _Loan(_System(self), None)}
        self._lent: dict[Any, int] = {}  # the numbers of what may be lent again, by identity
        self._exiting: list[threading.Thread] = []  # those that exit a context manager
        self.lends = False  # whether anything is lent

    def resolve(self, target: Any, method: str) -> Callable[..., Any]:
        """The function that a call runs. An empty name calls the object itself. Raises MethodNotFound, DeadReference."""
        loan = self._loans.get(target) if type(target) is int else None
        if loan is not None and method in loan.known:  # not by the string that has come: classes cache those they are asked by
            return getattr(loan.object, loan.known[method])  # type: ignore[no-any-return]
        loan = self.loan(target)
        obj = loan.object
        if not method and callable(obj):
            return obj  # type: ignore[no-any-return]
        if loan.methods is None and not method.startswith("_"):
            return lambda *args, **kwargs: obj._dispatch(method, args, kwargs)
        if not _has_method(obj, method):
            raise _no_method(method, loan.methods, "the plugin")
        return getattr(obj, method)  # type: ignore[no-any-return]

    def loan(self, number: Any) -> _Loan:
        loan = self._loans.get(number) if type(number) is int else None
        if loan is None:
            raise DeadReference(f"reference {number!r} is not lent, or no longer")
        return loan

    def dispense(self, name: str | None) -> _Ref:
        """Raises PluginNotFound, and what the plugin's factory raises."""
        if name == "system":
            return _Ref(self._loans[0].object)
        name, served = self.served.find(name)
        return _Ref(*_enter(served())) if _makes_instances(served) else _Ref(self.served.shared(name), None)

    def lend(self, session: _Session, value: Any, lent: list[int]) -> tuple[str, Any] | None:
        """The tag and state of what goes by reference, or None. The number of a new loan is added to `lent`."""
        kind = type(value)
        obj, manager = (value.object, value.manager) if kind is _Ref else (value, ())
        if issubclass(type(obj), _Remote):
            home, number = obj._target.at
            if home is session and number is not None:
                return "$own", [number, obj._name]  # it goes home
        elif kind is not _Ref and (not callable(value) or isinstance(value, type)):
            return None
        owner = getattr(obj, "__self__", None)  # a bound method is made anew each time
        function = getattr(obj, "__func__", None) or getattr(obj, "__name__", None)
        key: Any = (id(obj),) if owner is None else (id(owner), function)
        key = object() if manager else key
        with self._lock:
            number = 0 if obj is self._loans[0].object else self._lent.get(key)
            if number is None:
                loan = _Loan(obj, key, *manager)  # a finalizer may run in there, and lend and release as well
                number = self._lent.setdefault(key, next(self._numbers))
                self._loans.setdefault(number, loan)
            loan = self._loans[number]
            loan.count += 1
            self.lends = True
        lent.append(number)
        return "$ref", [number, loan.methods, callable(obj)]

    def own(self, number: Any, method: Any) -> Any:
        """What comes home. Raises DeadReference, MethodNotFound."""
        if method is not None and type(method) is not str:
            raise ValueError(f"a method named {method!r}")
        return self.loan(number).object if not method else self.resolve(number, method)

    def release(self, number: int) -> None:
        """Take one count of a loan back. To exit it may take long: a thread of its own does that."""
        with self._lock:
            loan = self._loans.get(number) if number else None
            if loan is None:
                return
            loan.count -= 1
            if loan.count > 0:
                return
            del self._loans[number], self._lent[loan.key]
            self.lends = len(self._loans) > 1
            if loan.manager is None:
                return
            exiting = [thread for thread in self._exiting if thread.is_alive()]
            try:
                self._exiting = [*exiting, _start_thread("miniplug-exit", _exit, loan.manager)]
                return
            except RuntimeError:
                pass  # no thread to be had
        _exit(loan.manager)

    def unlend(self, lent: Iterable[int]) -> None:
        """What was lent for a message that was not sent."""
        for number in lent:
            self.release(number)

    def close(self) -> None:
        """The connection has ended: exit the context managers, the latest first."""
        with self._lock:
            loans = [loan for number, loan in self._loans.items() if number]
            self._loans, self._lent, self.lends = {0: self._loans[0]}, {}, False
        for thread in self._exiting:
            thread.join()
        for loan in reversed(loans):
            _exit(loan.manager)


class _System:
    """The reserved target ``system``: what a plugin tells about itself. Method names are written ``plugin.method``."""

    def __init__(self, references: _References) -> None:
        self._references = references

    def dispense(self, name: str | None = None) -> Any:
        """Lend the plugin of that name, or the only one."""
        return self._references.dispense(name)

    def info(self) -> dict[str, Any]:
        """What the plugin says about itself."""
        return self._references.served.info

    def reattachConfig(self) -> dict[str, Any] | None:
        """What another host needs to attach: network, address, authkey and pid. None if nobody can."""
        return self._references.served.config

    def listMethods(self) -> list[str]:
        """The names of all methods."""
        return [f"{plugin}.{name}" for plugin in self._names() for name in _method_names(self._object(plugin)) or ()]

    def methodHelp(self, name: str) -> str:
        """A method's docstring, or an empty string."""
        return self._described(name)[1] or ""

    def methodSignature(self, name: str) -> str | None:
        """A method's signature as text, such as ``(name: str) -> str``; None if it is not known."""
        return self._described(name)[0]  # type: ignore[no-any-return]

    def describe(self, target: str | int | None = None) -> dict[str, Any]:
        """The methods of a plugin, or of the reference of that number: {method: [signature, doc, parameters]}, where a
        parameter is [name, kind, default, annotation], and the last one the result's. Of all plugins: {plugin: methods}."""
        if target is None:
            return {plugin: self.describe(plugin) for plugin in self._names()}
        obj = self._references.loan(target).object if type(target) is int else self._object(str(target))
        methods = {name: _describe(getattr(obj, name)) for name in _method_names(obj) or ()}
        return {"": _describe(obj), **methods} if type(target) is int and callable(obj) else methods

    def _names(self) -> list[str]:
        return ["system", *sorted(self._references.served.plugins)]

    def _object(self, plugin: str) -> Any:
        return self if plugin == "system" else self._references.served.shared(plugin)

    def _described(self, name: str) -> list[Any]:
        plugin, _, method = name.rpartition(".")
        methods = self.describe(plugin)
        if method not in methods:
            raise _no_method(method, methods, f"the plugin {plugin!r}")
        return methods[method]  # type: ignore[no-any-return]


def _describe(function: Any) -> list[Any]:
    """A function as [signature, doc, parameters]: text, and None for what is not known. See _System.describe."""
    inspect = _import("inspect")
    doc = inspect.getdoc(function)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return [None, doc, None]

    def text(value: Any, show: Callable[[Any], str]) -> str | None:
        return None if value is inspect.Parameter.empty else show(value)

    parameters = [[each.name, int(each.kind), text(each.default, repr), text(each.annotation, inspect.formatannotation)]
                  for each in signature.parameters.values()]
    result = ["return", 0, None, text(signature.return_annotation, inspect.formatannotation)]
    return [str(signature), doc, [*parameters, result]]


# === 7. proxies =========================================================================================

MethodInfo = namedtuple("MethodInfo", "name signature doc")
MethodInfo.__doc__ = "What `Plugin.describe` tells of a method: `name`, `signature` (text, or None) and `doc` (text, or None)."


class _Method(_Remote):
    """A method of the other side's, or with an empty name what can only be called itself, a function: call it."""

    __slots__ = ("_about", "_name", "_target", "_timeout")

    def __init__(self, target: _Target, name: str, timeout: float | None = None) -> None:
        self._target = target
        self._name = name
        self._timeout = timeout
        self._about: list[Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        target = self._target
        session, number = target.at
        if not session.stale and number is not None:
            seconds = self._timeout
            if seconds is None:
                seconds = session.call_timeout if target.timeout is None else target.timeout
            try:
                value = session.call(number, self._name, args, kwargs, seconds)
                return Stream(session, value) if type(value) is _Call else value
            except _Sealed:
                pass
        session, value = _reach(target.live, _Session.call, self._name, args, kwargs, self._seconds())
        return Stream(session, value) if type(value) is _Call else value

    def submit(self, *args: Any, **kwargs: Any) -> Call:
        """Call, and do not wait: returns a Call, a concurrent.futures.Future that asyncio can await."""
        call: Call = __getattr__("Call")(self.__name__)
        target, what = self._target, (self._name, args, kwargs)
        session, number = target.at
        if not session.stale and number is not None:
            try:
                call._begin(session, number, *what, self._seconds())
                return call
            except _Sealed:
                pass
        begin = partial(_reach, target.live, call._begin, *what)
        if target.plugin is None or not target.plugin._put_off(call, begin, self._seconds()):
            begin(self._seconds())
        return call

    def notify(self, *args: Any, **kwargs: Any) -> None:
        """Call, and want no answer. What the method raises goes to the plugin's stderr."""
        _reach(self._target.live, _Session.notify, self._name, args, kwargs, self._seconds())

    def timeout(self, seconds: float | None) -> _Method:
        """The same method with a deadline: past `seconds` a call raises CallTimeout. None: the default one."""
        return _Method(self._target, self._name, _checked_timeout(seconds))

    def _seconds(self) -> float | None:
        target = self._target
        if self._timeout is not None:
            return self._timeout
        return target.at[0].call_timeout if target.timeout is None else target.timeout

    # What help() shows is asked of the plugin. It takes for a function what has a __get__.

    @property
    def __name__(self) -> str:
        return self._name or "function"

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self._described()[1]  # type: ignore[no-any-return]

    @property
    def __signature__(self) -> Any:
        signature = _signature(self._described()[2])
        if signature is None:
            raise AttributeError("__signature__")
        return signature

    def __get__(self, instance: Any, owner: Any = None) -> _Method:
        return self

    def _described(self) -> list[Any]:
        if self._about is None:
            self._about = _ask_description(self._target).get(self._name) or [None, None, None]
        return self._about

    def __repr__(self) -> str:
        return f"<method {self._name} of {self._target.label}>" if self._name else f"<proxy of {self._target.label}>"


def _checked_count(count: Any, name: str, least: int = 0) -> int:
    """Raises ValueError for what is no whole number, or less than that."""
    if type(count) is not int or count < least:
        raise ValueError(f"{name}={count!r}: it is a whole number, at least {least}")
    return count


def _checked_timeout(seconds: Any, name: str = "timeout") -> float | None:
    """Raises ValueError for what is no number of seconds, and no None."""
    if seconds is not None and (not isinstance(seconds, (int, float)) or not seconds >= 0):
        raise ValueError(f"{name}={seconds!r}: it is a number of seconds, or None for no limit")
    return None if seconds is None else float(seconds)


class _Proxy(_Remote):
    """An object of the other side's: it has the object's public methods."""

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        """What help() shows: the methods, with their signatures and docs, if they can be asked for."""
        try:
            about = _ask_description(self._target)
        except (PluginError, RuntimeError):  # gone, or asked on the thread of an event loop
            about = {}
        return "\n\n".join(_outline(name, *(about.get(name) or (None, None))[:2]) for name in self._names or about)

    def __init__(self, target: _Target, names: Sequence[str] | None) -> None:
        vars(self).update(_target=target, _names=names, _interface=_Proxy)

    def __getattr__(self, name: str) -> Any:
        if "_target" not in self.__dict__:
            raise AttributeError(name)
        target, names = self.__dict__["_target"], self.__dict__["_names"]
        if name.startswith("_") or (names is not None and name not in names):
            raise _no_method(name, names, target.label)
        method = self.__dict__[name] = _Method(target, name)  # found there the next time
        return method

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{self._target.label} has methods only: what is set here would not reach it ({name!r})")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Method(self._target, "")(*args, **kwargs)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *(self._names or ())})

    def __repr__(self) -> str:
        return f"<proxy of {self._target.label}>"

    def _dispatch(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return getattr(self, method)(*args, **kwargs)  # so that a proxy can be served in turn

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self.__dict__["_interface"]  # what isinstance() believes, also of an ABC

    def _adopt(self, interface: type) -> None:
        """Be an instance of the interface. Raises InterfaceMismatch unless all of it is there, and takes its arguments."""
        differences = _differences(interface, self._names, lambda: _ask_description(self._target))
        if differences:
            text = f"{self._target.label} is no {interface.__name__}: " + "; ".join(differences)
            raise InterfaceMismatch(text, differences=differences)
        vars(self)["_interface"] = interface


def _borrow(session: _Session, tag: str, state: Any) -> Any:
    """What a reference that has come stands for. Raises ValueError for what is none, DeadReference and MethodNotFound."""
    number, second, *rest = state if type(state) is list else (None, None)
    if tag == "$own":
        return session.references.own(number, second)
    named = second is None or (type(second) is list and all(isinstance(name, str) for name in second))
    if type(number) is not int or not 0 <= number < 1 << 64 or not named:
        raise ValueError(f"{tag}: {state!r}")
    target = _Target(session, number)
    return _Method(target, "") if second == [] and rest[:1] == [True] else _Proxy(target, second)


_INDISPENSABLE = (  # they hold what a thread needs that brings an answer; but not while `run` runs a method
    _Session.run, _Session._call_alone, _Session._read_if_free, _Session._read_as_pool, _Session._leave, _Session._accept,
    _Session._wake, _Session._sleep, _Session._take_slot, _Session._run_with_slot, _References.lend, _References.release)


def _open_session(channel: _Channel, terms: _Terms, max_message: int, served: _Served, *others: Any) -> _Session:
    """A session that serves to the other side, and makes proxies for what that one lends."""
    return _Session(channel, terms, max_message, _References(served), _borrow, *others)


# -- what interfaces and descriptions are made of

class _Text(str):
    """Stands for a default or an annotation of which only the text is known."""

    __repr__ = str.__str__


def _ask_description(target: _Target) -> dict[str, Any]:
    """{method: [signature, doc, parameters]}, as far as the other side tells."""
    def ask(session: _Session, number: int, method: str, *others: Any) -> Any:
        return session.call(0, method, (number,), *others[1:])

    try:
        return _checked_description(_reach(target.live, ask, "describe", (), {}, target.at[0].call_timeout)[1])
    except MethodNotFound:  # it is not written with miniplug
        return {}


def _outline(name: str, signature: str | None, doc: str | None) -> str:
    """A method, and what it says about itself below it."""
    return name + (signature or "(...)") + (f"\n{_indented(doc)}" if doc else "")


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def _checked_description(found: Any) -> dict[str, Any]:
    """As much of what `describe` told as is what it should be."""
    methods = found if type(found) is dict else {}
    return {name: each for name, each in methods.items() if type(each) is list and len(each) == 3}


def _signature(parameters: Any) -> Any:
    """An inspect.Signature made from what `describe` tells; None if it is not known."""
    inspect = _import("inspect")

    def value(text: Any) -> Any:
        return inspect.Parameter.empty if text is None else _Text(text)

    try:
        *others, (_, _, _, result) = parameters
        made = [inspect.Parameter(name, inspect._ParameterKind(kind), default=value(default), annotation=value(annotation))
                for name, kind, default, annotation in others]
        return inspect.Signature(made, return_annotation=value(result))
    except (TypeError, ValueError):
        return None


def _differences(interface: type, names: Sequence[str] | None, describe: Callable[[], dict[str, Any]]) -> list[str]:
    """In which ways something with methods of these names (None: all) is not the interface, in words."""
    inspect = _import("inspect")
    abstract = sorted(getattr(interface, "__abstractmethods__", ()))
    found = [f"{name!r} is private, and cannot be called on a plugin" for name in abstract if name.startswith("_")]
    found += [f"{name!r} is a property, and a plugin has methods only" for name in dir(interface)
              if not name.startswith("_") and isinstance(inspect.getattr_static(interface, name), property)
              and (name in abstract or getattr(interface, "_is_protocol", False))]
    wanted = _method_names(interface) or []
    found += [f"it has no method {name!r}" for name in wanted if names is not None and name not in names]
    described = describe() if names is not None else {}
    for name in wanted:
        theirs = _signature(described.get(name, (None, None, None))[2])
        if theirs is not None:
            found += _refusals(name, inspect.getattr_static(interface, name), theirs)
    return found


def _refusals(name: str, method: Any, theirs: Any) -> list[str]:
    """A call that the interface's method allows and the plugin's does not take, in words; or nothing."""
    inspect = _import("inspect")
    own = not isinstance(method, (staticmethod, classmethod))
    try:
        mine = inspect.signature(getattr(method, "__func__", method))
    except (TypeError, ValueError):
        return []
    parameters = list(mine.parameters.values())[own or isinstance(method, classmethod):]
    for count, keywords in _allowed_calls(parameters):
        try:
            theirs.bind(*[None] * count, **dict.fromkeys(keywords))
        except TypeError as error:
            shown = ", ".join(["..."] * count + [f"{keyword}=..." for keyword in keywords])
            wanted = mine.replace(parameters=parameters)
            return [f"{name}{theirs} does not take all that {name}{wanted} allows: {name}({shown}): {error}"]
    return []


def _allowed_calls(parameters: Sequence[Any]) -> Iterable[tuple[int, list[str]]]:
    """The shapes of calls that these parameters allow, as (how many by position, names of the others): each count with no
    optional name, with every single one, and with all. What takes those takes all."""
    only, either, var, keyword, rest = ([each for each in parameters if each.kind == kind] for kind in range(5))
    positional = [*only, *either]
    least = sum(each.default is each.empty for each in only)
    for count in range(least, len(positional) + 1 + 3 * len(var)):
        named = [each for each in either if each not in positional[:count]] + keyword
        needed = [each.name for each in named if each.default is each.empty]
        optional = [each.name for each in named if each.default is not each.empty] + ["any_other_name"] * len(rest)
        for chosen in ([], *([name] for name in optional), optional):
            yield count, needed + chosen


# -- calls and streams

class _Awaitable:
    """What Call adds to concurrent.futures.Future."""

    if TYPE_CHECKING:
        _condition: Any
        _done_callbacks: list[Any]

    def __init__(self, method: str) -> None:
        super().__init__()
        self._method = method
        self._session: _Session | None = None
        self._call: _Call | None = None

    def _begin(self, session: _Session, *what: Any) -> None:
        if self.done():  # cancelled before it could be sent, or lost with the session that took no more calls
            return
        self._session = session
        self._call = session.submit(self._arrive, *what)
        if self.cancelled():  # meanwhile, by a signal handler
            session.give_up(self._call)

    def _arrive(self, call: _Call) -> None:
        """Called by whoever reads, once the answer has come. Callbacks may take long: a thread of the pool runs them."""
        self._call = call
        if call.inbox and self._session is not None:
            self._session.unwatch(call)  # what comes next are items, which the stream takes
        with self._condition:
            quick = not any(map(_may_block, self._done_callbacks))
            if quick and call.inbox:
                self._settle(call)
        if call.inbox and not quick and self._session is not None:
            self._session.defer(self._settle, (call,))

    def _settle(self, call: _Call) -> None:
        future: Any = self
        session: Any = self._session
        try:
            kind, value = call.inbox[0]
            if kind == _ERROR:
                future.set_exception(value)
            else:
                if call.streams:
                    session.unwatch(call)
                    call.inbox.popleft()
                    value = Stream(session, call)
                future.set_result(value)
        except _import("concurrent.futures").InvalidStateError:
            pass  # cancelled meanwhile, or settled before

    def cancel(self) -> bool:
        """Give the call up, here and at the plugin, unless it has been answered."""
        base: Any = super()
        with self._condition:
            if self.done():
                return self.cancelled()
            callbacks, self._done_callbacks = self._done_callbacks, []  # they run without the lock, which a reader may want
            base.cancel()
            base.set_running_or_notify_cancel()
        if self._session is not None and self._call is not None:
            self._session.give_up(self._call)
        for callback in callbacks:
            base.add_done_callback(callback)
        return True

    if TYPE_CHECKING:
        def cancelled(self) -> bool: ...
        def done(self) -> bool: ...

    def __await__(self) -> Any:
        return _import("asyncio").wrap_future(self).__await__()

    def __repr__(self) -> str:
        state = "cancelled" if self.cancelled() else "answered" if self.done() else "pending"
        return f"<Call of {self._method}(), {state}>"


def _may_block(callback: Any) -> bool:
    """asyncio's own callbacks only send word to a loop."""
    return str(getattr(callback, "__module__", "")).split(".")[0] != "asyncio"  # None for those written in C


if TYPE_CHECKING:
    import concurrent.futures

    class Call(_Awaitable, concurrent.futures.Future[Any]):
        """A call that was submitted: a concurrent.futures.Future that can also be awaited in asyncio."""


class Stream:
    """What a method gives that returns a generator or an iterator: iterate with ``for`` or ``async for``.

    Few items wait here unread, however slow the reader is. `close()` (or `aclose()`, or the end of ``with``) gives the
    rest up and closes the plugin's generator; so does letting go of the stream. An exception of the generator's is
    raised where it happened. Each item has the deadline that the call had.
    """

    def __init__(self, session: _Session, call: _Call) -> None:
        self._session = session
        self._call = call
        self._lock = threading.Lock()  # protects the following; held by the thread that waits for items
        self._items: Any = iter(())
        self._size = 0  # how many items the latest message had
        self._waiters: list[Any] = []  # futures of the tasks that wait for items
        self._owed = 0  # for how many read ones no credit was given yet
        self._over = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Any:
        for item in self._items:
            return item
        with self._lock:
            while True:
                for item in self._items:
                    return item
                if self._over:
                    raise StopIteration
                self._give_credit()
                try:
                    self._take(*self._session.next(self._call))
                except BaseException as error:
                    self._over = self._over or not isinstance(error, StopIteration)
                    raise

    def _give_credit(self) -> None:
        """For what has been read: all that has come."""
        self._owed, self._size = self._owed + self._size, 0
        if self._owed >= _WINDOW // 2:
            self._session.credit(self._call, self._owed)
            self._owed = 0

    def _take(self, kind: int, value: Any) -> None:
        """Take a part of the stream. Raises StopIteration at the end, and what the generator raised."""
        if kind == _ITEM:
            self._give_credit()
            self._items, self._size = iter(value), len(value)
        else:
            self._over = True
            raise value if kind == _ERROR else StopIteration

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Any:
        while True:
            for item in self._items:
                return item
            if self._over:
                raise StopAsyncIteration
            if not self._call.inbox:
                self._give_credit()
                await self._news()
            elif self._lock.acquire(False):
                try:
                    self._take(*self._call.inbox.popleft())
                except StopIteration:
                    raise StopAsyncIteration from None
                finally:
                    self._lock.release()

    async def _news(self) -> None:
        """Wait until something has come."""
        asyncio = _import("asyncio")
        future = _import("concurrent.futures").Future()
        self._waiters.append(future)
        self._session.watch(self._call, self._tell)
        try:
            await asyncio.wait_for(asyncio.wrap_future(future), self._call.seconds)
        except asyncio.TimeoutError:
            self.close()
            raise _too_late(self._call) from None
        finally:
            self._waiters.remove(future)
            if not self._waiters:
                self._session.unwatch(self._call)

    def _tell(self, call: _Call) -> None:
        """Something has come: every task looks."""
        for future in list(self._waiters) if call.inbox else ():
            try:
                future.set_result(None)
            except _import("concurrent.futures").InvalidStateError:
                pass  # cancelled, or told before

    def close(self) -> None:
        """Give the rest up: the plugin's generator is closed. Closing what has ended does nothing."""
        if not self._over:
            self._over = True
            self._session.give_up(self._call)
            self._call.arrive((_END, None), [(_END, None)])  # for a thread that waits
            if self._lock.locked() and self._session.ended is None:
                self._session.post(_PING, 0)  # that thread may be the one that reads
        self._items = iter(())

    async def aclose(self) -> None:
        """As `close`."""
        self.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_over", True):
            self._session.discard(_CANCEL, self._call.number)

    def __repr__(self) -> str:
        return f"<stream of {self._call.method}(), {'ended' if self._over else 'open'}>"


# === 8. serve ===========================================================================================

_ADDRESS, _AUTHKEY, _LOG_LEVEL = "MINIPLUG_ADDRESS", "MINIPLUG_AUTHKEY", "MINIPLUG_LOG_LEVEL"
_PERSIST, _PIPES = "MINIPLUG_PERSIST", "MINIPLUG_PIPES"  # stay when the host goes; which of the output streams it reads
_ATTACH = "MINIPLUG_ATTACH"  # {NAME: config} as JSON: where a host attaches instead of launching
_COOKIE_KEY = "MINIPLUG_COOKIE_KEY"  # names the variable of the magic cookie
_SOURCE_ONLY = "MINIPLUG_SOURCE_ONLY"  # a spec's file was checked: what a bytecode cache holds is another file
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


def serve(plugins: Mapping[Any, Any], *, info: Mapping[str, Any] | None = None, handshake: Handshake = Handshake(),
          address: str | None = None, authkey: bytes | str | None = None, persist: bool = False,
          max_workers: int = 64, max_message: int = _MAX_MESSAGE) -> None:
    """Serve plugins to the host that started this process, until it says stop or is gone; then return.

    `plugins` maps a name to an object or a function with arguments, which all callers share; or to a class or
    zero-argument factory, which makes an instance for each `dispense`. Mapped by int instead, it is one such mapping for
    each protocol version. An object that is a context manager is entered before its first call and exited at the end.

    `info` is a plain dict about the plugin that the host reads as `Plugin.info`. Calls run in threads, at most
    `max_workers` at once (1: one after another). A message of more than `max_message` bytes (at least 4096) is refused.

    `persist=True`: stay when the host goes, for it or another one to `attach` to, until one of them says stop. Any number
    of hosts may be there at once. `address` is where they attach: a path with a ``/`` in it, ``127.0.0.1:PORT`` or, on
    Windows, the name of a pipe; by default a private place of its own. `authkey` is the key that they have to hold: at
    least 16 bytes, or as many in hexadecimal digits; by default a fresh one.

    Started by hand with `persist` or an `address`, it prints what `attach` needs, as a line of JSON, and serves until
    Ctrl-C, or without `persist` until its last host is gone. Else, started by hand, it says on stderr that this is a
    plugin, and exits with status 1 (SystemExit); so it does when the host refuses the plugin, which the host
    reports. Raises ValueError or TypeError for what cannot be served, and OSError for an `address` that is not to be had.
    """
    server = _Server(_versions(plugins, handshake), info, max_workers, max_message)
    _take_environment()
    key = _variable(handshake.magic_cookie_key)
    cookie = os.environ.pop(key, None) or _environment.pop(key, None)  # it may be set by somebody who is no host
    _serve(server, {"key": key, "matches": cookie == handshake.magic_cookie_value}, address, authkey, persist)


def _serve(server: _Server, cookie: Mapping[str, Any], address: str | None, authkey: bytes | str | None, persist: bool) -> None:
    """The plugin's main loop."""
    host, key = _environment.get(_ADDRESS), _environment.pop(_AUTHKEY, "")
    server.stays = persist = persist or _PERSIST in _environment
    _refuse_by_hand(address, persist, "In Python, miniplug.launch() with its path and handshake does.")
    if host == "":
        raise RuntimeError("this process has served its host already: serve() works once")
    _environment[_ADDRESS] = ""
    _prepare_output()
    echoes = _terminal_echoes()
    try:
        if persist or address is not None:
            passed_over = server.listen(address or "", os.urandom(32) if authkey is None else _checked_key(authkey))
            _heed_signals(host is not None)
        if host is None:
            for folder in passed_over:
                print(f"miniplug: it listens at {server.config['address']}, not in {folder}", file=sys.stderr, flush=True)
            print(json.dumps(server.config), flush=True)
        else:
            server.serve_launcher(host, key, cookie)
        server.wait()
    except KeyboardInterrupt:
        if host is not None and not persist:
            raise
    finally:
        cut_off = server.close()
        if cut_off and echoes:
            _turn_echo_on()


def _refuse_by_hand(address: str | None, persist: bool, hint: str) -> None:
    """Exit with a word if there is neither a host that has started this process nor a place for one to attach to."""
    if _ADDRESS not in _environment and not persist and address is None:
        sys.exit(f"This program is a plugin: the application that it belongs to starts it, not a person. ({hint})")


def _checked_key(key: bytes | str) -> bytes:
    """A key that is given as bytes or in hexadecimal digits. Raises ValueError."""
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
        raise ValueError(f"{takes}, and {', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} missing or of another type")
    if _transport(config["address"]) != config["network"] or (config["network"] == "pipe") != _WINDOWS:
        raise ValueError(f"{config['address']!r} is no address for the network {config['network']!r} here")
    if config["network"] != "pipe":
        _endpoint(config["address"])
    _checked_key(config["authkey"])
    return {key: config[key] for key in kinds}


def _heed_signals(launched: bool) -> None:
    """Of a plugin that listens: SIGTERM ends it orderly, as Ctrl-C does, and the end of its host's terminal does not."""
    signal = _import("signal")
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if not _WINDOWS:
            signal.signal(signal.SIGHUP, signal.SIG_IGN if launched else signal.default_int_handler)


class _Server:
    """What this process serves, and the hosts that it serves it to, each over a session of its own."""

    def __init__(self, versions: Mapping[Any, Mapping[str, Any]], info: Mapping[str, Any] | None, max_workers: int,
                 max_message: int) -> None:
        """A version None stands for whatever a host asks for."""
        self.stays = False  # also when its hosts are gone
        self.config: dict[str, Any] = {}  # what another host needs to attach
        self._served = {version: _Served(plugins, info) for version, plugins in versions.items()}
        self._max_message = _checked_count(max_message, "max_message", _HELLO_LIMIT)
        self._slots = _Slots(_checked_count(max_workers, "max_workers", 1))
        self._door: _Door | None = None
        self._lock = threading.Lock()  # protects the following five
        self._sessions: list[_Session] = []  # those that are not disposed of
        self._threads: list[threading.Thread] = []  # that attend to those who have come through the door
        self._hosts = 0  # how many are there
        self._attended = False  # whether one has been
        self._grace = _GRACE  # in seconds, that the calls have and what is served
        self._over = threading.Event()  # set once it is to end

    def greet(self, channel: _Channel, address: str, key: bytes, cookie: Mapping[str, Any]) -> _Terms:
        """Run the handshake. From now on this host counts as one that is there: it may know before this side that it is in."""
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
        """Let hosts attach. They need no cookie: it is not they who start this program. Returns the temp folders that would
        not do, and why."""
        self._door = _Door(lambda channel, address: self.greet(channel, address, key, {"matches": True}),
                           self._arrived, address, stays=True)
        address = self._door.listener.address
        self.config.update(network=_transport(address), address=address, authkey=key.hex(), pid=os.getpid(),
                           protocol_version=max((each for each in self._served if each is not None), default=1))
        for served in self._served.values():
            served.config = self.config
        return self._door.listener.passed_over

    def _arrived(self, channel: _Channel, terms: Any) -> None:
        if isinstance(terms, _Terms):  # or the host has refused this plugin
            with self._lock:
                self._threads = [*(each for each in self._threads if each.is_alive()), threading.current_thread()]
            self.attend(channel, terms)

    def serve_launcher(self, address: str, key: str, cookie: Mapping[str, Any]) -> None:
        """Serve the host that started this process. Exits with a word if there is none, or if it refuses."""
        gone = _outlet() if self.stays else None
        try:
            channel = _connect(address, _HELLO_SECONDS)
            terms = self.greet(channel, address, _checked_key(key), cookie)
        except HandshakeError as error:
            sys.exit(f"miniplug: the host refused this plugin: {error}")
        except (OSError, EOFError, ValueError, PluginError) as error:
            sys.exit(f"miniplug: no host at {address}: {type(error).__name__}: {error}")
        cause = self.attend(channel, terms, gone)
        orderly = isinstance(cause, (EOFError, ConnectionError)) and not isinstance(cause, ProtocolError)
        if not (self.stays or cause is None or orderly):
            sys.exit(f"miniplug: the connection to the host has failed: {type(cause).__name__}: {cause}")

    def attend(self, channel: _Channel, terms: _Terms, gone: Callable[[], None] | None = None) -> BaseException | None:
        """Serve one host, until it says stop or is gone: then `gone` is called, at once. Returns why the session has ended."""
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
        session.finished.wait()
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

    def close(self) -> bool:
        """Let nobody in any more, and end the sessions and what is served. Returns whether calls of theirs still run."""
        self.stop()
        if self._door is not None:
            self._door.close()
        for thread in self._threads:
            thread.join()
        sessions = list(self._sessions)
        self._part(sessions, self._served.values())
        return any(session._requests for session in sessions)


def _terminal_echoes() -> bool:
    """Whether stdin is a terminal that shows what is typed."""
    try:
        termios = _import("termios")
        return bool(termios.tcgetattr(0)[3] & termios.ECHO)
    except Exception:  # termios.error is no OSError; and on Windows there is none of it
        return False


def _turn_echo_on() -> None:
    """A call that asks for a password is cut off by the end of this process, and can do it no more. Only if it looks like
    that: a terminal in the foreground that gives whole lines and shows none of them."""
    try:
        termios = _import("termios")
        settings = termios.tcgetattr(0)
        if settings[3] & termios.ICANON and _posix.tcgetpgrp(0) == _posix.getpgrp():
            settings[3] |= termios.ECHO
            termios.tcsetattr(0, termios.TCSANOW, settings)
    except Exception:
        pass  # the terminal is gone


def _outlet() -> Callable[[], None]:
    """What a plugin that stays calls when its host is gone: from then on output goes nowhere. Until then this process
    holds the pipes to the host open itself, where there is a /proc, so that no write fails meanwhile."""
    pipes = []
    null = os.open(os.devnull, os.O_RDWR)
    for fd in _environment.pop(_PIPES, ""):
        try:
            pipes.append(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY))
        except OSError:
            pass

    def close() -> None:
        try:
            for fd in (1, 2):
                os.dup2(null, fd)
            while pipes:
                _start_thread("miniplug-drain", _drain, pipes.pop())
        except (OSError, RuntimeError):
            pass  # no thread to be had: children that write will have to wait

    return close


def _drain(pipe: int) -> None:
    """Read what nobody wants, so that children which have inherited the pipe go on, until they have ended."""
    while os.read(pipe, 1 << 16):
        pass
    os.close(pipe)


def _versions(plugins: Mapping[Any, Any], handshake: Handshake) -> Mapping[int, Mapping[str, Any]]:
    """{version: {name: object, ...}, ...}. Raises ValueError or TypeError for what cannot be served."""
    versions = plugins if plugins and all(type(key) is int for key in plugins) else {handshake.protocol_version: plugins}
    for version, mapping in versions.items():
        _checked_count(version, "protocol_version")
        if not mapping or not all(isinstance(name, str) for name in mapping):
            raise TypeError("plugins is {name: object, ...}, or {version: {name: object, ...}, ...}, and not empty")
        if "system" in mapping:
            raise ValueError("the name 'system' is reserved: give the plugin another one")
    return versions


# -- output and logging: lines on stderr, in the format of hclog, one JSON object each

_LEVELS = {"error": 40, "warn": 30, "info": 20, "debug": 10, "trace": 5}


def _prepare_output() -> None:
    """Have every line leave at once, as UTF-8; a segmentation fault tell where; and logging speak to the host."""
    streams: list[Any] = [sys.stdout, sys.stderr]
    for stream in streams:
        try:
            if not stream.isatty():
                stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
        except (AttributeError, OSError, ValueError):
            pass  # there is none, it is closed, or it is the plugin's own
    try:
        _import("faulthandler").enable(all_threads=False)
    except (AttributeError, OSError, ValueError, RuntimeError):
        pass  # no stderr to write to
    level = int(_environment.pop(_LOG_LEVEL, -1))
    if level >= 0 and "logging" in sys.modules:
        _set_up_logging(sys.modules["logging"], level)
    elif level >= 0:
        sys.meta_path.insert(0, _LoggingHook(level))
    if level >= 0 and not _WINDOWS and _posix.getpgrp() != os.getpid() and threading.current_thread() is threading.main_thread():
        signal = _import("signal")
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it shares the terminal, whose Ctrl-C is the host's


class _LoggingHook:
    """An import hook that sets logging up when somebody imports it, so that nobody pays for it who does not."""

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
    """Send the root logger's records to the host, unless the plugin has handlers there or calls basicConfig."""
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
    trace = [formatter.formatException(record.exc_info) if record.exc_info else record.exc_text, record.stack_info]
    if any(trace):
        fields["@traceback"] = "\n".join(filter(None, trace))
    known = _standard_fields()
    fields.update((key, value) for key, value in vars(record).items() if key not in known and not key.startswith("@"))
    return json.dumps(fields, default=repr, skipkeys=True)


def _standard_fields() -> set[str]:
    """The attributes that every log record has, and those that formatting adds: what a plugin's field may not be."""
    record = _import("logging").makeLogRecord({})
    return {*vars(record), *dir(type(record)), "message", "asctime"}


# === 9. process =========================================================================================
#
# Start a process, hear what it says, and end it with all that it started. On POSIX the process leads a session of its
# own, so that one signal reaches its group and the terminal's Ctrl-C does not; on Windows it is in a job object. The
# host's own end, SIGKILL included: on Windows the job closes with the host's handle; on POSIX a guardian waits, a shell
# that reads from a pipe of the host's and kills the group when that ends, once the plugin had time to end by itself.

_PIPE, _DEVNULL = -1, -3  # as in subprocess, which is slow to import
_SHELL = "/system/bin/sh" if hasattr(sys, "getandroidapilevel") else "/bin/sh"
_GUARDIAN_SECONDS = 3
_GUARDIAN = """
seen() {  # what tells the process from a later one of the same number: when it started
    if [ -d /proc/self ]; then
        read -r stat 2>/dev/null <"/proc/$pid/stat" || return 1
        stat=${stat##*) }; set -- $stat; found=${20}
    else
        found=$(ps -o lstart= -p "$pid") || return 1
    fi
}
name=$1 rounds=$2
shift 2
read -r pid group && seen && start=$found
read -r end
for base; do
    rm -f -- "$base/$name/s" 2>/dev/null
    rmdir -- "$base/$name" 2>/dev/null
done
pause() {
    sleep .1 2>/dev/null || sleep 1
    rounds=$((rounds - 1))
}
if [ -z "$pid" ]; then  # the host had no time to tell: whom it has started, the environment tells, where there is /proc
    while [ "$rounds" -gt 0 ]; do pause; done
    for file in $(grep -ls -- "/$name/s" /proc/[0-9]*/environ); do
        pid=${file#/proc/} pid=${pid%/*}
        kill -s KILL -- "-$pid" "$pid" 2>/dev/null
    done
    exit 0
fi
while [ "$rounds" -gt 0 ] && seen && [ "$found" = "$start" ]; do pause; done
if seen && [ "$found" != "$start" ]; then exit 0; fi  # a later process has the number: then nobody is left in the group
kill -s KILL -- "$group$pid" 2>/dev/null
"""


def _popen(argv: Sequence[str], **options: Any) -> Any:
    """A subprocess.Popen, unbuffered. The pipes are made here: what Popen has opened when it finds no descriptor for the
    next, it leaves open."""
    given = {name: options.pop(name, None) for name in ("stdin", "stdout", "stderr")}
    theirs: list[int] = []
    ours: dict[str, int] = {}
    try:
        for name, stream in given.items():
            if stream == _DEVNULL:
                given[name] = os.open(os.devnull, os.O_RDWR)
                theirs.append(given[name])
            elif stream == _PIPE:
                reading, writing = os.pipe()
                given[name], ours[name] = (reading, writing) if name == "stdin" else (writing, reading)
                theirs.append(given[name])
        process = _import("subprocess").Popen(argv, bufsize=0, **given, **options)
    except BaseException:
        for fd in ours.values():
            os.close(fd)
        raise
    finally:
        for fd in theirs:
            os.close(fd)
    for name, fd in ours.items():
        setattr(process, name, open(fd, "wb" if name == "stdin" else "rb", buffering=0))  # noqa: SIM115 -- it is the process's
    return process


class Limits(namedtuple("Limits", "memory cpu_seconds open_files")):
    """What a plugin, and each process that it starts, may use at most. None, the default, is no limit. Immutable.

    - `memory` (bytes): on POSIX the address space of each process, on Windows what all of them have allocated together.
      An allocation past it fails: in Python that is a MemoryError. macOS enforces none. Runtimes that reserve much
      address space (Node's, Go's, Java's) need far more than they use.
    - `cpu_seconds`: on POSIX the processor time of each process, in whole seconds, rounded up; on Windows that of all of
      them together. What goes over it is ended, and PluginCrashed says so.
    - `open_files` (a count): descriptors in each process; to open one more fails with OSError. Windows has no such limit.

    A limit that this system does not have is not set, and the plugin's logger warns of it. A stricter one that the host
    itself is under stays. Raises ValueError for what is no positive number.
    """

    __slots__ = ()

    def __new__(cls, memory: int | None = None, cpu_seconds: float | None = None, open_files: int | None = None) -> Limits:
        for name, value in (("memory", memory), ("cpu_seconds", cpu_seconds), ("open_files", open_files)):
            whole = name != "cpu_seconds"
            kinds = (int,) if whole else (int, float)
            if value is not None and (type(value) is bool or not isinstance(value, kinds) or not 0 < value < float("inf")):
                raise ValueError(f"{name}={value!r}: it is a positive {'whole number' if whole else 'number'}, or None")
        return super().__new__(cls, memory, cpu_seconds, open_files)

    def _not_enforced(self) -> str | None:
        """The name of a limit that this system does not have."""
        name = "open_files" if _WINDOWS else "memory" if sys.platform == "darwin" else None
        return name if name and getattr(self, name) is not None else None

    def _as_job(self, stays: bool = False) -> bytes:
        """As JOBOBJECT_EXTENDED_LIMIT_INFORMATION of Windows, for a job that ends with its last handle, unless it stays."""
        time_limit, memory_limit, kill_on_close = 0x4, 0x200, 0x2000  # of the whole job, both
        flags = kill_on_close * (not stays) | time_limit * bool(self.cpu_seconds) | memory_limit * bool(self.memory)
        ticks = min(int((self.cpu_seconds or 0) * 10**7), (1 << 63) - 1)  # of 100 ns
        memory = min(self.memory or 0, (1 << 8 * struct.calcsize("N")) - 1)
        return struct.pack("qqINNINII6Q4N", 0, ticks, flags, *[0] * 12, 0, memory, 0, 0)

    def _command(self, argv: Sequence[str], env: Mapping[str, str]) -> list[str]:
        """A command that sets the limits and then becomes `argv`, so that they hold for it and whatever it starts.

        A shell does that: nothing of Python's runs between fork and exec, and nothing of the plugin's before they hold.
        """
        if not os.path.exists(_SHELL):
            raise OSError(f"its limits cannot be set: there is no {_SHELL}")
        resource = _import("resource")
        seconds = None if self.cpu_seconds is None else int(-(-self.cpu_seconds // 1))
        memory = None if sys.platform == "darwin" else self.memory
        steps = []
        for option, kind, value, unit in (("-S -t", "CPU", seconds, 1), ("-H -t", "CPU", seconds and seconds + 1, 1),
                                          ("-v", "AS", memory, 1024), ("-n", "NOFILE", self.open_files, 1)):
            if value is not None:
                hard = resource.getrlimit(getattr(resource, f"RLIMIT_{kind}"))[1]
                value = value if hard == resource.RLIM_INFINITY else min(value, hard)
                steps.append(f"ulimit {option} {max(1, value // unit)}")
        if "PWD" not in env:
            steps.append("unset PWD")  # which the shell has set
        lost = [f"{name}={value}" for name, value in env.items() if not (name.isascii() and name.isidentifier())]
        again = ["env", *lost] if lost else []  # some shells drop variables with such names
        return [_SHELL, "-c", " && ".join([*steps, 'exec "$@"']), "miniplug-limits", *again, *argv]

    def _broken(self, code: int, seconds: float) -> str:
        """Which limit a process went over that ended so, after so many seconds of processor time, as words; or none."""
        killed, time_up = -9, 1816 if _WINDOWS else -24  # SIGXCPU; at the hard limit it is SIGKILL
        if self.cpu_seconds is not None and (code == time_up or (code == killed and seconds >= self.cpu_seconds)):
            return f", over its limit of {self.cpu_seconds:g} cpu_seconds"
        if self.memory is not None and code < 0 and code not in (killed, -15):
            return f", perhaps for its limit of {self.memory} bytes of memory"
        return ""


class _Tree:
    """What the kinds of process trees have in common."""

    excess = ""  # which limit it went over, in words, once it is reaped

    def look(self) -> None:
        """Note who is in the tree, where nothing tells that later."""


def _start_guardian(name: str) -> Any:
    """Have a guardian wait for the end of this host; first of all, as what comes into being later it cleans up as well: the
    folder of that name, and the process that it is told of. None where there can be none."""
    argv = [_SHELL, "-c", _GUARDIAN, "miniplug-guardian", name, str(_GUARDIAN_SECONDS * 10), *_temp_folders()]
    try:
        return None if _WINDOWS else _popen(argv, stdin=_PIPE, stdout=_DEVNULL, stderr=_DEVNULL, cwd="/",
                                            env={"PATH": os.defpath}, start_new_session=True)
    except OSError:
        return None  # no shell: the plugin still ends by itself when its connection does


def _dismiss(guardian: Any) -> None:
    """There is nothing left for it to do: the folder goes before it, as at interpreter exit the thread that would remove
    that may not come to it any more."""
    if guardian is not None:
        name, _, *bases = guardian.args[4:]
        for folder in (os.path.join(base, name) for base in bases):
            _remove_socket(os.path.join(folder, "s"), folder)
        guardian.kill()
        guardian.wait()
        guardian.stdin.close()


class _PosixTree(_Tree):
    """A process and its group. No signal is sent once the process is reaped, when its number may be another's."""

    def __init__(self, argv: Sequence[str], shares_terminal: bool, guardian: Any, limits: Limits | None, **popen: Any) -> None:
        self._guardian = guardian
        self._lock = threading.Lock()  # protects that nobody is signalled after the reaping
        self._reaped = False
        self._lost = False  # whether somebody else in this host has reaped it, so that nobody knows how it ended
        self._leads = not shares_terminal
        self._below: dict[int, str] = {}  # without a group: what it started, as far as known, and when each of that began
        self._limits = limits
        argv = limits._command(argv, popen["env"]) if limits else argv
        try:
            self.popen = _popen(argv, start_new_session=self._leads, **popen)
            if self._guardian is not None:
                self._guardian.stdin.write(b"%d %s\n" % (self.popen.pid, b"-" * self._leads))
        except BrokenPipeError:
            pass  # somebody killed the guardian
        except BaseException:
            _dismiss(guardian)
            raise

    def signal(self, kill: bool) -> None:
        """Terminate the whole tree, or kill it."""
        number = 9 if kill else 15
        self.look()
        with self._lock:
            for pid, start in self._below.items():
                _signal(pid, start, number)
            try:
                if not self._reaped:
                    (_posix.killpg if self._leads else os.kill)(self.popen.pid, number)
            except OSError:
                pass  # there is nobody left (or only the dead, which macOS calls a lack of permission)

    def look(self) -> None:
        """Note who is in the tree, if no group tells: whose parent has ended is found no more."""
        with self._lock:
            if self._leads or self._reaped:
                return
            processes = _processes()
            family = [self.popen.pid, *(pid for pid, start in self._below.items() if processes.get(pid, (0, ""))[1] == start)]
            for parent in family:  # it grows while it is walked
                family += [pid for pid, (above, _) in processes.items() if above == parent and pid not in family]
            self._below = {pid: processes[pid][1] for pid in family[1:]}

    def await_exit(self) -> None:
        """Wait until the process has ended. It stays unreaped, so that its number stays its own."""
        try:
            if hasattr(os, "waitid"):
                _posix.waitid(_posix.P_PID, self.popen.pid, _posix.WEXITED | _posix.WNOWAIT)
            else:  # macOS before Python 3.13: a group keeps the number while anybody is in it
                self.popen.wait()
        except ChildProcessError:
            self._lost = True

    def reap(self) -> int | None:
        with self._lock:
            used = 0.0
            if self.popen.returncode is None and not self._lost:
                try:
                    _, status, usage = _posix.wait4(self.popen.pid, 0)
                    signalled = _posix.WIFSIGNALED(status)
                    self.popen.returncode = -_posix.WTERMSIG(status) if signalled else _posix.WEXITSTATUS(status)
                    used = usage.ru_utime + usage.ru_stime
                except ChildProcessError:
                    self._lost = True
            code = self.popen.wait()
            self._reaped = True
        _dismiss(self._guardian)
        self.excess = self._limits._broken(code, used) if self._limits and not self._lost else ""
        return None if self._lost else int(code)

    def keep(self) -> None:
        """It is to stay when this process goes."""
        _dismiss(self._guardian)

    def disown(self) -> None:
        """In a forked child of the host: let go of what would keep the guardian waiting."""
        self._reaped = True
        self.popen.returncode = 0
        if self._guardian is not None:
            self._guardian.returncode = 0
            self._guardian.stdin.close()


def _processes(only: int | None = None) -> dict[int, tuple[int, str]]:
    """Every process, or one: {its number: (its parent's, when it began)}. The latter tells it from a later one with its
    number."""
    found: dict[int, tuple[int, str]] = {}
    if os.path.isdir("/proc/self"):
        for pid in filter(str.isdigit, os.listdir("/proc") if only is None else [str(only)]):
            try:
                with open(f"/proc/{pid}/stat", "rb") as stat:
                    fields = stat.read().decode("ascii", "replace").rpartition(") ")[2].split()
                found[int(pid)] = int(fields[1]), fields[19]
            except (OSError, ValueError, IndexError):
                pass  # it has just ended
        return found
    subprocess = _import("subprocess")
    try:
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,lstart="], stdout=subprocess.PIPE, check=False).stdout
    except OSError:
        return {}
    for pid, parent, start in (line.split(None, 2) for line in listing.decode("ascii", "replace").splitlines()):
        found[int(pid)] = int(parent), start
    return found


def _signal(pid: int, start: str, number: int) -> None:
    """Signal a process, but none that has its number now."""
    try:
        fd = _posix.pidfd_open(pid)  # whoever has the number: the descriptor stands for nobody else
    except (AttributeError, OSError):
        fd = -1  # there are none here, or the process has ended
    try:
        if _processes(pid).get(pid, (0, ""))[1] == start:
            if fd >= 0:
                _import("signal").pidfd_send_signal(fd, number)
            else:
                os.kill(pid, number)
    except OSError:
        pass  # it has ended
    finally:
        if fd >= 0:
            os.close(fd)


class _Job:
    """A job object of Windows, which ends with its last handle, and all in it. These are its system calls, with their types:
    ctypes takes what it is not told for an int, and would cut a handle in two."""

    def __init__(self) -> None:
        ctypes = _import("ctypes")
        handle, pointer, number, success = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int
        self._lock = threading.Lock()  # protects that nothing is done to whatever has the number of a closed handle
        self._kernel = ctypes.WinDLL("kernel32")
        for name, result, *types in (("CreateJobObjectW", handle, pointer, pointer),
                                     ("SetInformationJobObject", success, handle, success, pointer, number),
                                     ("AssignProcessToJobObject", success, handle, handle),
                                     ("TerminateJobObject", success, handle, number),
                                     ("CloseHandle", success, handle)):
            function = getattr(self._kernel, name)
            function.restype, function.argtypes = result, types
        self._resume = ctypes.WinDLL("ntdll").NtResumeProcess
        self._resume.restype, self._resume.argtypes = success, [handle]
        self._handle = self._kernel.CreateJobObjectW(None, None)

    def limit(self, settings: bytes) -> bool:
        """Set its limits, a JOBOBJECT_EXTENDED_LIMIT_INFORMATION. False if Windows refuses."""
        return bool(self._kernel.SetInformationJobObject(self._handle, 9, settings, len(settings)))

    def begin(self, process: int, needed: bool = False) -> bool:
        """Put a process in that was started suspended, and let it run. False if Windows refuses the former; raises OSError
        for the latter, and for both if the job is `needed`."""
        added = self._kernel.AssignProcessToJobObject(self._handle, process)
        if needed and not added:
            raise OSError("its limits cannot be set: Windows refuses to put it into a job")
        status = self._resume(process)
        if status < 0:
            raise OSError(f"it cannot be let run: status 0x{status & 0xFFFFFFFF:08X}")
        return bool(added)

    def end(self) -> None:
        """End all that is in it."""
        with self._lock:
            if self._handle is not None:
                self._kernel.TerminateJobObject(self._handle, 1)

    def close(self) -> None:
        with self._lock:
            handle, self._handle = self._handle, None
            if handle is not None:
                self._kernel.CloseHandle(handle)


class _WindowsTree(_Tree):
    """A process in a job object, which ends with its last handle: with the host, however that ends."""

    def __init__(self, argv: Sequence[str], shares_terminal: bool, guardian: Any, limits: Limits | None, **popen: Any) -> None:
        suspended, new_group, no_window = 0x4, 0x200, 0x08000000
        self._limits = limits
        self._job = _Job()
        try:
            if not self._job.limit((limits or Limits())._as_job()) and limits:
                raise OSError("its limits cannot be set: Windows refuses them")
            # a group of its own hears no Ctrl-C, not even in the host's console
            self.popen = _popen(argv, creationflags=suspended | new_group | (0 if shares_terminal else no_window), **popen)
            self._job.begin(int(self.popen._handle), bool(limits))
        except BaseException:
            if hasattr(self, "popen"):
                self.popen.kill()
            self._job.close()
            raise

    def keep(self) -> None:
        """It is to stay when this process goes."""
        self._job.limit((self._limits or Limits())._as_job(stays=True))

    def signal(self, kill: bool) -> None:
        """Kill the whole tree: Windows has no gentler way for a process without a window."""
        self._job.end()
        try:
            self.popen.kill()  # in case there is no job
        except OSError:
            pass  # it has ended

    def await_exit(self) -> None:
        self.popen.wait()

    def reap(self) -> int:
        self._job.close()
        code = int(self.popen.wait())
        self.excess = self._limits._broken(code, 0.0) if self._limits else ""
        return code


class _Peer:
    """The process at the other end of a connection, held so that no later one of its number can be meant. Raises OSError
    or AttributeError where the operating system does not tell which it is, or cannot hold it."""

    def __init__(self, channel: Any) -> None:
        if _WINDOWS:
            number = _import("ctypes").c_ulong()
            kernel = _import("ctypes").WinDLL("kernel32")
            if not kernel.GetNamedPipeServerProcessId(_import("ctypes").c_void_p(channel._handle), _import("ctypes").byref(number)):
                raise OSError("there is no telling")
            self.pid = int(number.value)
            self._handle = _import("_winapi").OpenProcess(0x100001, False, self.pid)  # PROCESS_TERMINATE, SYNCHRONIZE
            self._ways: tuple[int, ...] = (1,)  # the exit code
        else:
            self.pid = struct.unpack("3i", channel.sock.getsockopt(socket.SOL_SOCKET, _network.SO_PEERCRED, 12))[0]
            self._handle = _posix.pidfd_open(self.pid)
            leads = _posix.getpgid(self.pid) == self.pid
            self._ways = (4, 0) if leads else (0,)  # PIDFD_SIGNAL_PROCESS_GROUP, which Linux knows since 6.9

    def wait(self, seconds: float) -> bool:
        """Wait until it has ended. False if it has not within that many seconds."""
        if _WINDOWS:
            return bool(_import("_winapi").WaitForSingleObject(self._handle, int(seconds * 1000)) == 0)
        return _wait_for(self._handle, False, time.monotonic() + seconds)

    def kill(self) -> None:
        """Kill it, and what there is of the group that it leads, also when it has ended itself."""
        for way in self._ways:
            try:
                if _WINDOWS:
                    _import("_winapi").TerminateProcess(self._handle, way)
                else:
                    _import("signal").pidfd_send_signal(self._handle, 9, None, way)
                break
            except OSError:
                pass  # there is nobody left

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            _import("_winapi").CloseHandle(self._handle) if _WINDOWS else os.close(self._handle)


class _PeerTree(_Tree):
    """Stands for a process that somebody else has started, to which there is but a connection. `peer`: the process, where
    the operating system proves that it is the one of that number."""

    stdout = stderr = None

    def __init__(self, channel: _Channel, pid: int) -> None:
        """To be made before the handshake: the process that answers then has been alive, and had its number, meanwhile."""
        self.popen, self.pid = self, pid
        self.peer: _Peer | None = None
        self._channel = channel
        self._let_go = threading.Event()
        try:
            peer = _Peer(channel)
            self.pid = peer.pid
            self.peer = peer if peer.pid == pid != os.getpid() else None
        except (OSError, AttributeError):
            pass

    def signal(self, kill: bool) -> None:
        """Cut the connection: that is its end here."""
        self._channel.shutdown()
        self._let_go.set()

    def await_exit(self) -> None:
        self._let_go.wait()

    def reap(self) -> None:
        self.peer = None

    def disown(self) -> None:
        """A forked child has nothing of it."""


_LINE_LIMIT = 16 << 20  # bytes; a longer line is delivered in pieces, as it must be kept until its end
_TAIL_LINES = 30  # how many last lines an error carries
_RECORD_LIMIT = 1 << 14  # how much of a log record is kept for that


class _Lines:
    """Bytes to lines: one output stream of a plugin. `deliver` takes each line as text; `tail` keeps the last ones."""

    def __init__(self, file: IO[bytes], deliver: Callable[[str], Any]) -> None:
        self.file = file
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self.log = deliver if isinstance(deliver, _LogSink) else None
        self._deliver = deliver
        self._line = bytearray()  # as much of it as has come

    def read(self) -> bool:
        """Read what there is and deliver its lines. False at the end."""
        try:
            data = os.read(self.file.fileno(), 1 << 16)
        except OSError:
            data = b""
        first, *others = data.split(b"\n")
        self._line += first
        for line in others:
            self._end_line()
            self._line += line
        if len(self._line) >= _LINE_LIMIT or (self._line and not data):
            self._end_line()
        return bool(data)

    def _end_line(self) -> None:
        line, self._line = self._line, bytearray()
        text = line[: -1 if line.endswith(b"\r") else None].decode("utf-8", "backslashreplace")
        self.tail.append(text[:_RECORD_LIMIT] if text.startswith("{") else _cut(text))
        _guard(self._deliver, text)

    def last(self) -> list[str]:
        """The last lines, for people: a log record reads as one does in a log."""
        lines = [line for text in self.tail for line in _readable(text).splitlines() or [""]]
        return [_cut(line) for line in lines[-_TAIL_LINES:]]

    def flush(self) -> None:
        """Nothing more has come for a moment: a traceback that the log holds back goes on."""
        if self.log is not None:
            _guard(self.log.flush)

    def await_more(self, seconds: float | None, wake: int) -> bool:
        """Wait for something to read, until there is something in `wake`. False if there is nothing."""
        if not _WINDOWS:
            poll = _import("select").poll()
            poll.register(self.file, 1)  # POLLIN
            poll.register(wake, 1)
            ready = poll.poll(None if seconds is None else seconds * 1000)
            return self.file.fileno() in dict(ready)
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


def _readable(line: str) -> str:
    """A log record as text, with its traceback on lines of its own. Any other line is itself."""
    try:
        fields = json.loads(line) if line.startswith("{") else {}
        message, level, trace = fields["@message"], str(fields.get("@level", "info")), fields.get("@traceback")
        more = "".join(f" {key}={value}" for key, value in fields.items() if not key.startswith("@"))
        return f"[{level.upper()}] {fields.get('@module', '')}: {message}{more}" + (f"\n{trace}" if trace else "")
    except (ValueError, KeyError, RecursionError):
        return line


def _guard(function: Callable[..., Any], *args: Any, what: str = "what takes a plugin's output") -> None:
    """Call what the host has given us (a callable, a log handler). What it raises is logged, and stops nothing."""
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

    def __call__(self, line: str) -> None:
        if self.trace and self._goes_on(line):
            self.trace.append(line)
            return
        self.flush()
        if self._stderr and line.startswith(self._HEADS):
            self.trace = [line]
        elif not (self._stderr and line.startswith("{") and self._record(line)):
            self._logger.log(30 if self._stderr else 20, "%s", line)

    def _goes_on(self, line: str) -> bool:
        """Whether the traceback does: up to the line that names the exception, and then with the next of a chain."""
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
            fields = json.loads(line)
            message, level = fields.pop("@message"), fields.pop("@level", "info").lower()
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            return False
        if not isinstance(message, str):
            return False
        name, number = fields.pop("@module", ""), fields.pop("@levelno", None)
        number = number if type(number) is int else _LEVELS.get(level, 20)
        logger = self._parent.getChild(name) if isinstance(name, str) and name not in ("", "root") else self._parent
        if not logger.isEnabledFor(number):
            return True
        record = logger.makeRecord(logger.name, number, "(plugin)", 0, "%s", (message,), None)
        trace = fields.pop("@traceback", None)
        record.exc_text = trace if isinstance(trace, str) else None  # which formatters print below the message
        try:
            when = fields.pop("@timestamp").replace("Z", "+00:00")
            created = _import("datetime").datetime.fromisoformat(when).timestamp()
            time.localtime(created)  # formatters do that, and no platform can for every time
            record.created, record.msecs = created, created % 1 * 1000
        except (KeyError, AttributeError, TypeError, ValueError, OverflowError, OSError):
            pass  # then it is the time of its arrival
        known = _standard_fields()
        vars(record).update((key, value) for key, value in fields.items() if key not in known)
        logger.handle(record)
        return True


_WINDOWS_ERRORS = {
    0xC0000005: "an access violation", 0xC000001D: "an illegal instruction", 0xC0000094: "a division by zero",
    0xC00000FD: "a stack overflow", 0xC0000135: "a DLL that is missing", 0xC000013A: "Ctrl-C",
    0xC0000142: "a DLL that did not start", 0xC0000374: "a heap that is corrupt", 0xC0000409: "abort() or a buffer overrun",
    0xE06D7363: "a C++ exception"}


def _end_words(code: int | None) -> tuple[str, str | None]:
    """How a process ended, in words, and the name of the signal if it was one."""
    if code is None:
        return "ended", None
    if 0xC0000000 <= code < 0xF0000000:  # an error of Windows, or one that a language has numbered for itself
        return f"died of {_WINDOWS_ERRORS.get(code, 'an unhandled exception')} (status 0x{code:08X})", None
    if code >= 0:
        return f"exited with status {code}", None
    try:
        name = _import("signal").Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"died of {name}", name


def _last_words(lines: Sequence[str]) -> str:
    return ". The last it wrote:" + "".join(f"\n    {line}" for line in lines[-20:]) if lines else ""


# === 10. plugin =========================================================================================

class _Run:
    """One generation of a plugin, from its start to its end: what serves it, what that says, and the session with it.

    `tree` is a process, or stands for one: it has a `popen` (with pid, stdout and stderr), is ended by `signal`, and gone
    when `await_exit` returns; then `reap` gives the exit code. `disown` forgets it, in a forked child. The run is there
    before its session is (`open`). `ended` is set when it is over: the tree is gone, the last line delivered, the
    process reaped and `exit_code` known. `news` is set by then, too. `config`: what another host needs to attach, of a
    process that stays without this one.
    """

    owned = True  # whether the process is to end with it

    def __init__(self, plugin: Plugin, tree: Any, sinks: Sequence[Callable[[str], Any] | None], news: threading.Event) -> None:
        self.plugin, self.name, self._tree, self._news = plugin, plugin.name, tree, news
        self.session: _Session | None = None
        self.exit_code: int | None = None
        self.config: dict[str, Any] | None = None
        self.stays = False  # when this process goes
        self.closing = self._exited = False
        self._ending = threading.Lock()  # held by the thread that ends it
        self.ended = threading.Event()
        self.ended_at = 0.0  # when, on the monotonic clock
        self.verdict = ""  # what is said once it has crashed, and is not started again
        self._hung = ""  # what is said of one that had to be killed, as it did not answer
        self._looked = self._silent = self._unused = 0.0  # when `_look` looked last; seconds without an answer, without a call
        self._number = 0  # of the latest call by then
        self._threads: list[threading.Thread] = []
        popen = tree.popen
        self.pid: int = popen.pid
        self._streams = [_Lines(file, sink) for file, sink in zip((popen.stdout, popen.stderr), sinks) if file and sink]
        self._wake: tuple[int, ...] = ()  # a byte in this pipe wakes the threads that read the output
        _running.add(self)
        plugin._expect(self)
        try:
            self._wake = os.pipe() if self._streams else ()
            for stream in self._streams:
                self._threads.append(_start_thread("miniplug-output", self._read, stream))
            _start_thread("miniplug-watch", self._watch)
        except BaseException:  # no thread to be had
            self.signal(kill=True)
            self._watch()
            raise

    def _read(self, stream: _Lines) -> None:
        """Deliver lines until the stream ends, or the process has and nothing more comes: a process that left the group
        may hold the pipe open for ever."""
        last = float("inf")
        more = True
        while more and time.monotonic() < last:
            exited = self._exited
            if exited:
                last = min(last, time.monotonic() + 0.8)
            if stream.await_more(0.0 if exited else 0.1 if stream.log and stream.log.trace else None, self._wake[0]):
                more = stream.read()
            else:
                more = not exited
                stream.flush()
        stream.flush()

    def _watch(self) -> None:
        self._tree.await_exit()
        if self._ending.acquire(False):
            asked = self.closing
            self.signal(kill=True)  # what it has left behind
            if self.config is not None and self.owned:
                _remove_stale(self.config["address"], 0.5)
            self._stop_reading(1.0)
            self.exit_code = self._tree.reap()
            self.ended_at = time.monotonic()
            self.ended.set()
            self.over()
            on_exit = self.plugin._on_exit
            if on_exit is not None and self.session is not None and not asked:
                _guard(on_exit, self.plugin, what="on_exit")
        else:  # it was detached
            self.ended.wait()
            self._tree.reap()
        for thread in self._threads:
            thread.join()  # somebody's callable may hang
        self._close_files()

    def detach(self) -> None:
        """Let go of a process that stays without this one."""
        self.closing = True
        if self._ending.acquire(False):
            self.over()  # at the connection's end it turns its output away
            for thread in self._threads:
                thread.join(0.3)
            self._stop_reading(0.3)
            if not any(thread.is_alive() for thread in self._threads):  # on Windows they may read until the process ends
                self._close_files()
            self.ended.set()

    def _stop_reading(self, seconds: float) -> None:
        """Have the threads that read the output end, once nothing more comes, and wait for each at most that long."""
        self._exited = True
        if self._wake:
            os.write(self._wake[1], b"x")
        for thread in self._threads:
            thread.join(seconds)

    def _close_files(self) -> None:
        for stream in self._streams:
            stream.file.close()
        wake, self._wake = self._wake, ()
        for fd in wake:
            os.close(fd)

    def open(self, channel: _Channel, terms: _Terms, max_message: int, call_timeout: float | None) -> None:
        """Have a session with it, over an authenticated channel. It stays `stale` until on_start has run."""
        self.session = session = _open_session(channel, terms, max_message, _Served({}), self.lost)
        session.call_timeout, session.stale, session.look = call_timeout, True, self._look
        self._looked = time.monotonic()
        self._look()
        if self.ended.is_set():  # just before
            self.over()

    def keep(self) -> None:
        """It has said that it stays when this host goes: learn how to attach to it, and have nothing end it then."""
        assert self.session is not None
        try:
            config = self.session.call(0, "reattachConfig", (), {}, _HELLO_SECONDS)
            self.config, self.stays = _checked_config(config), True
            self._tree.keep()
        except (PluginError, ValueError, _Sealed) as error:
            raise LaunchError(f"the plugin {self.name!r} stays, and does not say how to attach to it: {error}") from None

    def over(self) -> None:
        """The process has ended."""
        _running.discard(self)
        self._news.set()
        if self.session is not None:
            self.session.end(EOFError())
            self.session.references.close()
            self.session.references.served.close()
            self.session.dispose()

    @property
    def crashed(self) -> bool:
        """Whether it has served, and ended unasked."""
        return self.session is not None and self.session.ended is not None and not self.closing

    def _look(self) -> None:
        """Look after it, on the clock's thread, several times in a heartbeat and an idle timeout. Nothing here waits."""
        session, heartbeat, idle = self.session, self.plugin._heartbeat, self.plugin._idle_timeout
        periods = [limit / parts for limit, parts in ((heartbeat, 4), (idle, 8)) if limit is not None]
        if session is None or session.ended is not None or not periods:
            return
        now = time.monotonic()
        passed = min(now - self._looked, min(periods))  # while this host itself stood still, that tells nothing
        self._looked = now
        if heartbeat is not None:
            self._silent = 0.0 if session.probe() else self._silent + passed
            if self._silent >= heartbeat:
                self._hung = f"answered no ping for {heartbeat:g} s and was {'killed' if self.owned else 'given up'}"
                self.signal(kill=True)
        if idle is not None:
            before, self._number = self._number, next(session._numbers)
            unused = self._number == before + 1 and not session.stale and not session.busy()
            self._unused = self._unused + passed if unused else 0.0
            if self._unused >= idle and not self.closing:
                try:
                    _start_thread("miniplug-idle", self.plugin._close_idle, self)
                except RuntimeError:
                    pass  # no thread to be had: the next time
        _clock.alarm(now + min(periods), 0, session)
        if session.ended is not None:  # just now
            _clock.remove(session)

    def drain(self, seconds: float) -> None:
        """Another run has taken its place: end it as soon as it is not busy, or after so many seconds."""
        assert self.session is not None
        self.stays = False
        deadline, pause = time.monotonic() + seconds, 0.001
        while not self.session.seal() and time.monotonic() < deadline:
            self.ended.wait(pause)
            pause = min(2 * pause, 0.05)
        _close_runs([self], _GRACE)

    def wait(self, seconds: float = -1) -> bool:
        """Wait until it is over. False if it is not within that many seconds."""
        return self.ended.wait(None if seconds < 0 else min(seconds, _FOREVER))

    def signal(self, kill: bool) -> None:
        self._tree.signal(kill)

    def end_words(self) -> tuple[str, str | None]:
        """How it ended, in words, and the name of the signal if it was one."""
        words, name = _end_words(self.exit_code)
        return words + self._tree.excess, name

    def tail(self) -> list[str]:
        """The last lines of stderr, or else of stdout."""
        return next((stream.last() for stream in reversed(self._streams) if stream.tail), [])

    def lost(self, cause: BaseException) -> Callable[[list[str]], BaseException]:
        """The connection has ended: find out why, and give what makes the error to raise."""
        if not self.closing and (isinstance(cause, ProtocolError) or not self.wait(0.5)):
            self.signal(kill=True)
            self.wait(2.0)
        if self.closing:
            return lambda calls: PluginClosed(f"the plugin {self.name!r} was closed")
        return lambda calls: self._crash(cause, calls)

    def _crash(self, cause: BaseException, calls: list[str]) -> PluginCrashed:
        how, signal_name = self.end_words()
        how = (self._hung or how) + (self.verdict if not calls else "")
        during = f" during {', '.join(f'{method}()' for method in calls[:5])}" if calls else ""
        tail = self.tail()
        kind, text = PluginCrashed, f"the plugin {self.name!r} {how}{during}{_last_words(tail)}"
        if isinstance(cause, ProtocolError):
            kind, text = ProtocolError, f"the plugin {self.name!r} broke the protocol and was ended{during}: {cause}"
        return kind(text, exit_code=self.exit_code, signal_name=signal_name, output=tail, calls=list(calls))

    def ask(self, grace: float) -> None:
        """Ask it to end."""
        self.closing = True
        self._tree.look()
        if self.session is not None and self.session.ended is None:
            self.session.post(_SHUTDOWN, 0, grace)

    def kill(self) -> None:
        self.closing = True
        self.signal(kill=True)
        self.wait(2.0)

    def kill_process(self) -> None:
        self.kill()

    def disown(self) -> None:
        """In a forked child of the host, where there are no Windows trees: nothing here is ours."""
        self._tree.disown()
        self.ended = threading.Event()  # a thread that is not here may hold the lock of the other one
        self.ended.set()
        self._close_files()
        if self.session is not None:
            self.session.ended = lambda calls: _not_owned(self.name)


class _AttachedRun(_Run):
    """One whose process is not this one's: it ends with the connection."""

    owned = False

    def open(self, *others: Any) -> None:
        super().open(*others)
        assert self.session is not None
        self.session._unattended.add(-1)  # so that somebody reads, and sees the end, though nobody calls
        self.session._pass_on()

    def lost(self, cause: BaseException) -> Callable[[list[str]], BaseException]:
        self.signal(kill=True)
        return super().lost(cause)

    def ask(self, grace: float) -> None:
        self.closing = True
        self.signal(kill=False)

    def detach(self) -> None:
        self.ask(0.0)
        self.wait(2.0)

    def kill_process(self) -> None:
        """Ask it to end. What does not is killed, if the operating system proves which it is."""
        peer = self._tree.peer
        super().ask(0.0)
        assert self.config is not None
        if peer is not None:
            peer.wait(1.0)
            peer.kill()
            peer.wait(1.0)
            _remove_stale(self.config["address"])
        self.wait(1.0)
        self.ask(0.0)
        self.wait(1.0)


def _not_owned(name: str) -> PluginError:
    return PluginError(f"the plugin {name!r} belongs to the process that this one was forked from: launch another here")


_PAUSE = 0.1  # seconds between a crash and the next start; twice that when it has crashed just before, and so on
_LONGEST_PAUSE = 10.0
_running: set[_Run] = set()  # all that have not ended
_hooks_set: list[bool] = []


def _close_runs(runs: Sequence[_Run], grace: float) -> None:
    """End runs side by side: ask them, after `grace` seconds terminate, a second later kill. Returns when they are gone."""
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
    runs = [run for run in list(_running) if run.plugin._managed or run.stays]
    for run in runs:
        run.plugin._closed = True
        if run.stays:
            run.detach()
    _close_runs([run for run in runs if not run.stays], _GRACE)


def _disown_all() -> None:
    while _running:
        _running.pop().disown()


def _set_exit_hooks() -> None:
    """With the first launch: close what is open at exit, and own nothing in a forked child. Doing it twice is harmless."""
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
    """Call what blocks in a thread: one of its own, as those of the loop may all wait for the plugin. It is waited for also
    when the task is cancelled, so that nothing is left half done; `undo` is called then, before and after it has returned."""
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


class _Room:
    """Where calls wait while their plugin starts: submitted ones here, the others for `done`. To the clock it is a session."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: BaseException | None = None  # why it did not start
        self._numbers = itertools.count(1)
        self._calls: dict[int, Any] = {}  # (Call, what begins it, what was asked)
        _clock.add(self)  # type: ignore[arg-type]

    def look_on(self) -> bool:
        return False

    def enter(self, call: Any, begin: Callable[[float | None], Any], asked: _Call) -> None:
        """Have `begin(seconds left)` called once it has started. Past the deadline the Call fails."""
        number = next(self._numbers)
        self._calls[number] = (call, begin, asked)
        if asked.deadline is not None and asked.deadline < float("inf"):
            _clock.alarm(asked.deadline, number, self)  # type: ignore[arg-type]
        if self.done.is_set():  # just before
            self.leave(self.error)

    def leave(self, error: BaseException | None) -> None:
        """It has started, or not: all who wait go on. (Only the first time counts.)"""
        if not self.done.is_set():
            self.error = error
            self.done.set()
        for number in list(self._calls):
            self._settle(number)
        _clock.remove(self)  # type: ignore[arg-type]

    def expire(self, number: int) -> None:
        """The deadline of a call has come. Its callbacks may take long, and the clock must not."""
        _aside("miniplug-late", self._settle, number)

    def _settle(self, number: int) -> Any:
        """A call's turn or deadline has come."""
        call, begin, asked = self._calls.pop(number, (None, None, None))
        if asked is None:
            return None
        error = self.error if self.done.is_set() else _too_late(asked)
        try:
            if error is None:
                return begin(asked.left())
        except BaseException as problem:
            error = problem
        asked.inbox = ((_ERROR, error),)
        return call._settle(asked)


class Plugin:
    """A plugin, as its host holds it: something to start, call and end, as often as you like.

    The parameters are those of `launch`, which makes one and starts it. One that was only made starts on first use.
    As a context manager it starts and closes. Any thread may use it. After `close()` calls raise PluginClosed, after
    a crash PluginCrashed (unless `max_restarts` has it start again), until `start()`; then the proxies that were
    dispensed work again, on fresh instances.
    """

    def __init__(self, command: _Command, *, name: str | None = None, handshake: Handshake = Handshake(),
                 protocol_versions: Iterable[int] | None = None, python: _Path | None = None,
                 env: Mapping[str, str] | None = None, inherit_env: bool = True, cwd: _Path | None = None,
                 start_timeout: float = 60.0, call_timeout: float | None = None, stdin: str | IO[Any] = "discard",
                 stdout: _Output = "log", stderr: _Output = "log", logger: logging.Logger | None = None,
                 max_restarts: int = 0, restart_window: float = 60.0, heartbeat: float | None = None,
                 idle_timeout: float | None = None, on_start: Callable[[Plugin], Any] | None = None,
                 on_exit: Callable[[Plugin], Any] | None = None,
                 sha256: str | Mapping[_Path, str] | None = None, limits: Limits | None = None,
                 managed: bool = True, persist: bool = False, max_message: int = _MAX_MESSAGE) -> None:
        for stream, value in (("stdin", stdin), ("stdout", stdout), ("stderr", stderr)):
            words = ("discard", "inherit", "log")[: 2 if stream == "stdin" else 3]
            if isinstance(value, str) and value not in words:
                raise ValueError(f"{stream}={value!r}: it is one of {words}, or a file")
        if logger is not None and not hasattr(logger, "getChild"):
            raise TypeError(f"logger={logger!r}: it is a logging.Logger (that of a LoggerAdapter is its .logger)")
        if limits is not None and not isinstance(limits, Limits):
            raise TypeError(f"limits={limits!r}: it is a miniplug.Limits")
        if not hasattr(handshake, "magic_cookie_value"):  # that of another copy of this file will do
            raise TypeError(f"handshake={handshake!r}: it is a miniplug.Handshake")
        for variable, value in (env or {}).items():
            if not (isinstance(variable, str) and isinstance(value, str)):
                raise TypeError(f"env={{{variable!r}: {value!r}}}: names and values are str")
        single = isinstance(command, (str, bytes, os.PathLike))
        try:
            self._command = os.fsdecode(command) if single else [os.fsdecode(part) for part in command]  # type: ignore
        except TypeError:
            wanted = "a path, a spec such as 'path/to/file.py:Attr', or a list of str and paths"
            raise TypeError(f"command={command!r}: it is {wanted}") from None
        self._limits = limits
        self._sha256 = _checked_digests(sha256, self._command)
        self.name: str = name or _default_name(self._command)
        self._handshake = handshake
        self._versions = sorted(_checked_count(version, "protocol_versions")
                                for version in protocol_versions or [handshake.protocol_version])
        self._python = None if python is None else os.fsdecode(python)
        self._env = dict(env or {})
        self._inherit_env = inherit_env
        self._cwd = None if cwd is None else os.fsdecode(cwd)
        limit = _checked_timeout(start_timeout, "start_timeout")
        self._start_timeout = _FOREVER if limit is None else min(limit, _FOREVER)
        self._call_timeout = _checked_timeout(call_timeout, "call_timeout")
        self._stdin = stdin
        self._outputs = (stdout, stderr)
        self._logger = logger
        self._managed = managed
        self._persist = persist
        self._config: dict[str, Any] | None = None  # of a process that is attached to
        self._max_message = _checked_count(max_message, "max_message", _HELLO_LIMIT)
        self._max_restarts = _checked_count(max_restarts, "max_restarts")
        self._restart_window = _checked_timeout(restart_window, "restart_window") or 0.0
        self._heartbeat = _checked_timeout(heartbeat, "heartbeat")
        self._idle_timeout = _checked_timeout(idle_timeout, "idle_timeout")
        if 0.0 in (self._restart_window, self._heartbeat, self._idle_timeout):
            raise ValueError("restart_window, heartbeat and idle_timeout are more than 0 seconds")
        for option, function in (("on_start", on_start), ("on_exit", on_exit)):
            if function is not None and not callable(function):
                raise TypeError(f"{option}={function!r}: it is called with the plugin, so it is a function")
        self._on_start = on_start
        self._on_exit = on_exit
        self._owner = os.getpid()
        self._run: _Run | None = None  # the latest one, to which calls go
        self._closed = False
        self._starting = threading.RLock()  # held by the thread that starts it; protects the following
        self._starter = 0  # the number of that thread
        self._coming: _Run | None = None  # what it starts: only its own calls go there
        self._crash: _Run | None = None  # the run that has crashed, until another serves in its place
        self._down_at = 0.0  # when the last try to start another one ended
        self._tries: list[float] = []  # when there were such tries
        self._restarts = 0
        self._lock = threading.RLock()  # protects that there is one room; a signal handler may close the plugin
        self._room: _Room | None = None  # with the calls that wait for a start
        self._stir = threading.Event()  # set by what cuts a pause short

    _tree: Callable[..., Any] = _WindowsTree if _WINDOWS else _PosixTree  # starts the process

    # -- its life

    def start(self) -> Plugin:
        """Start the plugin, unless it runs. Raises LaunchError (and its kinds) when it does not come up."""
        if self._owner != os.getpid():
            raise _not_owned(self.name)
        if self._live() is not None:  # also while on_start runs, for what that calls
            return self
        with self._starting:
            if self._live() is None:
                self._closed = False
                self._tries.clear()
                self._begin()
        return self

    def restart(self, drain: float | None = 30.0) -> Plugin:
        """Swap in a fresh process. Returns when that serves; calls go there from then on, and none is lost or refused.

        Calls in flight, streams and references finish in the old process, for at most `drain` seconds (None: no limit),
        behind the caller. What is cut off then raises PluginClosed, a reference DeadReference; a notification that still
        runs sees `cancelled()`. If the new process does not come up, the old one stays, and this raises what `start` does.
        A plugin that does not run is started.
        """
        if self._owner != os.getpid():
            raise _not_owned(self.name)
        if self._starts() is not None:
            raise RuntimeError("on_start cannot restart the plugin")
        seconds = _checked_timeout(drain, "drain")
        with self._starting:
            old, session = self._run, self._live()
            if session is None or old is None:
                return self.start()
            if not old.owned:
                raise PluginError(f"the plugin {self.name!r} belongs to another host: that can restart it")
            session.stale = True  # so that a call of on_start's finds the new one
            try:
                self._begin()
            except BaseException:
                session.stale = session.sealed
                raise
            _aside("miniplug-drain", old.drain, _FOREVER if seconds is None else seconds)
        return self

    def close(self, grace: float | None = _GRACE) -> None:
        """End the plugin: ask it, after `grace` seconds (None: never) terminate it, then kill it, and all that it started.

        Returns within `grace` + 2 seconds, after its last line of output. Calls in flight raise PluginClosed.
        Closing what is closed does nothing.
        """
        seconds = _checked_timeout(grace, "grace")
        self._turn_away()
        _close_runs(self._runs(), _FOREVER if seconds is None else seconds)

    def kill(self) -> None:
        """End the plugin and all that it started at once, without asking. (One that was attached to is asked: see `attach`.)"""
        self._turn_away()
        for run in self._runs():
            run.kill_process()

    def _turn_away(self) -> None:
        """It is closed from now on, also for the calls that wait for a start, which may last as long as on_start likes."""
        if self._owner != os.getpid():
            return  # a thread that is not here may hold the locks
        self._closed = True
        self._stir.set()
        with self._lock:
            room, self._room = self._room, None
        if room is not None:  # the callbacks of submitted calls may take long
            _aside("miniplug-closed", room.leave, self._is_closed())

    def _runs(self) -> list[_Run]:
        """Those of this plugin that have not ended. (In a forked child there are none.)"""
        return [run for run in list(_running) if run.plugin is self]

    def detach(self) -> None:
        """Let go of the plugin, and leave it running, for this host or another one to `attach` to.

        Raises PluginError for one that cannot stay: `launch(persist=True)` makes one that can, and so does
        `serve(persist=True)`. To detach from what does not run does nothing.
        """
        run = self._own()
        if run in self._runs() and run is not None:
            if not run.stays:
                raise self._cannot_stay()
            self._turn_away()
            run.detach()

    def _cannot_stay(self) -> PluginError:
        return PluginError(f"the plugin {self.name!r} does not stay without its host: launch it with persist=True")

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait until the process that runs now has ended, at most `timeout` seconds. Returns its exit code, or None if it
        still runs. (Another one may have taken its place by then.)"""
        run = self._own()
        if run is None:
            return None
        run.wait(-1 if timeout is None else max(0.0, timeout))
        return run.exit_code

    def __enter__(self) -> Plugin:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close()

    async def astart(self) -> Plugin:
        """As `start`, without blocking the event loop. Cancelled, it leaves no plugin that was not there before."""
        return await _in_thread(self.start, undo=None if self.running else self.kill)  # type: ignore[no-any-return]

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
        run = self._own()
        return run is not None and run.session is not None and not run.ended.is_set()

    @property
    def pid(self) -> int | None:
        """The number of the plugin's process, or None without one."""
        run = self._own()
        return run.pid if run is not None and not run.ended.is_set() else None

    @property
    def exit_code(self) -> int | None:
        """How the last process ended: its exit status, negative for a signal; None if it runs or never ran."""
        run = self._own()
        return run.exit_code if run is not None else None

    @property
    def restarts(self) -> int:
        """How often it was started anew because it had crashed."""
        return self._restarts

    @property
    def protocol_version(self) -> int:
        """The version of the interface that host and plugin have agreed on."""
        return self._session().protocol_version

    @property
    def info(self) -> dict[str, Any]:
        """What the plugin says about itself: the `info` given to `serve`."""
        return self._ask_system("info", (), dict)  # type: ignore[no-any-return]

    # -- its use

    if TYPE_CHECKING:  # an interface is given as something that makes a _T, since mypy takes no abstract class for a type[_T]
        @overload
        def dispense(self, name: str | None = None, interface: None = None, *, timeout: float | None = None) -> Any: ...
        @overload
        def dispense(self, name: str | None, interface: Callable[..., _T], *, timeout: float | None = None) -> _T: ...
        @overload
        def dispense(self, name: str | None = None, *, interface: Callable[..., _T], timeout: float | None = None) -> _T: ...

    def dispense(self, name: str | None = None, interface: Any = None, *, timeout: float | None = None) -> Any:
        """A proxy for the plugin of that name, or for the only one there is. The name "system" gives the introspection.
        It has the plugin's public methods, not its attributes and properties. A function that is served can be called.

        `interface`: an ABC, Protocol or class; the plugin must have its public methods, and take every call that they
        allow. The proxy is an instance of it, for type checkers and (not a Protocol) for isinstance(). `timeout`: the
        deadline of each call in seconds, instead of `call_timeout`.

        Raises PluginNotFound, InterfaceMismatch, and whatever the plugin's factory raised.
        """
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name={name!r}: it is a str; an interface is given as dispense(interface=...)")
        interface = getattr(interface, "__origin__", interface)  # of Store[int] it is Store
        if interface is not None and not isinstance(interface, type):
            raise TypeError(f"interface={interface!r}: it is an ABC, a Protocol or another class")
        proxy = self._ask_system("dispense", (name,), _Remote)
        target: _Target = proxy._target
        target.label = f"the plugin {name or self.name!r}"
        target.timeout = _checked_timeout(timeout)
        target.name, target.plugin = name, self
        target.at[0].borrowed.discard(id(target))  # it finds its object anew in every run
        if interface is not None:
            proxy = proxy if type(proxy) is _Proxy else _Proxy(target, [])  # what is served is a function
            proxy._adopt(interface)
        return proxy

    def _renew(self, target: Any, asked: _Call) -> tuple[_Session, int]:
        """Where the calls on a proxy go now. It is dispensed anew in another run than before."""
        session = self._session(asked)
        if not target.lock.acquire(timeout=_left(asked.deadline)):
            raise _too_late(asked)
        try:
            if target.before[0] is session:
                target.at, target.before = target.before, target.at
            elif target.at[0] is not session:  # nothing here waits for a start: on_start may want this lock
                fresh = self._ask(_Remote, session, 0, "dispense", (target.name,), {}, asked.left())._target
                target.at, target.before = fresh.at, target.at
                fresh.at = (session, None)  # the caller gives it back, not this one
            return target.at  # type: ignore[no-any-return]
        finally:
            target.lock.release()

    def _ask_system(self, method: str, args: Sequence[Any], kind: type) -> Any:
        """Call a method of `system` that has to return a `kind`."""
        return _reach(self._system, partial(self._ask, kind), method, args, {}, self._call_timeout)[1]

    def _system(self, asked: _Call) -> tuple[_Session, int]:
        return self._session(asked), 0

    def _ask(self, kind: type, session: _Session, *what: Any) -> Any:
        result = session.call(*what)
        if not issubclass(type(result), kind) or (kind is _Remote and result._target.at[0] is not session):
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
            return {plugin: {name: MethodInfo(name, *each[:2]) for name, each in _checked_description(methods).items()}
                    for plugin, methods in found.items() if plugin != "system"}
        except MethodNotFound:  # it is not written with miniplug
            return self._describe_one_by_one()

    def _describe_one_by_one(self) -> dict[str, dict[str, MethodInfo]]:
        found: dict[str, dict[str, MethodInfo]] = {}
        try:
            system = self.dispense("system")
            names = system.listMethods()
        except (MethodNotFound, PluginNotFound):
            raise MethodNotFound(f"the plugin {self.name!r} does not say what it can do", name="describe") from None
        for full in names:
            plugin, _, name = full.rpartition(".")
            if plugin != "system":
                info = MethodInfo(name, system.methodSignature(full), system.methodHelp(full))
                found.setdefault(plugin, {})[name] = info
        return found

    def reattach_config(self) -> dict[str, Any]:
        """What another host needs to `attach`, as a plain dict that json can store: ``network``, ``address``, ``authkey``,
        ``pid`` and ``protocol_version``. Who has it can call the plugin. Raises PluginError for one that does not persist."""
        session = self._session()
        run = next((run for run in self._runs() if run.session is session), None)
        if run is None or run.config is None:
            raise self._cannot_stay()
        return {**run.config, "protocol_version": session.protocol_version}

    def ping(self, timeout: float = 5.0) -> float:
        """Seconds that a message takes to the plugin and back. Raises CallTimeout after `timeout` seconds."""
        def ping(session: _Session, *what: Any) -> float:
            return session.ping(what[-1])

        return _reach(self._system, ping, "ping", (), {}, timeout)[1]  # type: ignore[no-any-return]

    # -- supervision

    def _starts(self) -> _Run | None:
        """What is being started, if this thread takes part in that: it runs on_start, or what on_start's calls call back."""
        coming = self._coming
        if coming is None or self._starter == threading.get_ident():
            return coming
        request = _current.get()
        while request is not None and request.session is not coming.session:
            request = request.outer
        return coming if request is not None else None

    def _own(self) -> _Run | None:
        """The run that this thread has to do with."""
        return self._starts() or self._run

    def _live(self) -> _Session | None:
        """The session that calls of this thread go to, if there is one now."""
        starts = self._starts()
        run = starts or self._run
        if run is None or run.session is None or run.session.sealed or run.closing or (run is self._coming and not starts):
            return None
        return run.session

    def _session(self, asked: _Call | None = None) -> _Session:
        """The session to call on. Waits, at most until the deadline of what is asked, while the plugin starts. Raises
        PluginClosed, PluginCrashed, or why it did not start."""
        while True:
            session = self._live()
            if session is not None:
                return session
            refusal = self._refusal()
            if refusal is not None:
                raise refusal
            room = self._enter()
            if not room.done.wait(None if asked is None else asked.left()):
                raise _too_late(asked)  # type: ignore[arg-type]
            if room.error is not None:
                raise room.error

    def _put_off(self, call: Any, begin: Callable[[float | None], Any], seconds: float | None) -> bool:
        """Have `begin(seconds left)` called when the plugin has started. False if there is nothing to wait for."""
        if self._live() is not None or self._refusal() is not None:
            return False
        self._enter().enter(call, begin, _Call(0, call._method, seconds))
        return True

    def _refusal(self) -> BaseException | None:
        """What a call raises instead of starting the plugin, if it does."""
        if self._owner != os.getpid():
            return _not_owned(self.name)
        starts = self._starts()
        session = starts.session if starts is not None else None
        if session is not None and session.ended is not None:
            return session.ended([])
        if self._closed:
            return self._is_closed()
        crash, _, tries = self._setback()
        if crash is not None and tries >= self._max_restarts:
            assert crash.session is not None and crash.session.ended is not None
            used_up = f" in {self._restart_window:g} s are used up" if self._max_restarts else ""
            if crash.owned:
                crash.verdict = f", and is not started again (max_restarts={self._max_restarts}{used_up}): start() it"
            return crash.session.ended([])
        return None

    def _is_closed(self) -> PluginClosed:
        return PluginClosed(f"the plugin {self.name!r} is closed: start() it again")

    def _setback(self) -> tuple[_Run | None, float, int]:
        """What the next start makes up for: a run that crashed, or None; when that was, or the last try to make up for it;
        and how many tries there had been in the window before."""
        run = self._run
        crash, when = (run, run.ended_at) if run is not None and run.crashed else (self._crash, self._down_at)
        return crash, when, sum(when - each < self._restart_window for each in self._tries)

    def _enter(self) -> _Room:
        """Where to wait for the start that is under way for the calls, or begins now."""
        with self._lock:
            begins = self._room is None
            room = self._room = self._room or _Room()
        if begins:
            _aside("miniplug-start", self._start_again, room)
        return room

    def _start_again(self, room: _Room) -> None:
        """Start it for the calls that wait, after a pause if it has crashed."""
        error: BaseException | None = None
        try:
            crash, when, tries = self._setback()
            self._stir.clear()
            if crash is not None and self._live() is None and not self._closed:
                self._stir.wait(max(0.0, when + min(_PAUSE * 2 ** min(tries, 10), _LONGEST_PAUSE) - time.monotonic()))
            with self._starting:
                if self._live() is None and not room.done.is_set():
                    self._make_up()
        except BaseException as problem:
            error = problem
        with self._lock:
            self._room = None if self._room is room else self._room
        room.leave(error)

    def _make_up(self) -> None:
        refusal = self._refusal()
        if refusal is not None:
            raise refusal
        crash, now = self._setback()[0], time.monotonic()
        if crash is not None:
            self._tries = [*(each for each in self._tries if now - each < self._restart_window), now]
        self._begin()
        self._restarts += crash is not None

    def _begin(self) -> None:
        """Start it, and let the others in once on_start has returned. `_starting` is held."""
        run = self._run
        if run is not None and (run.closing or (run.session and run.session.ended)):
            run.wait()  # it is on its way out, which has a bound
        self._crash = self._setback()[0]
        self._starter = threading.get_ident()
        try:
            self._open()
            self._configure()
            refusal = None if self._live() else self._refusal()
            if refusal is not None:
                raise refusal
        except BaseException:
            run, self._coming = self._coming, None
            if run is not None:
                run.kill()
            self._down_at = time.monotonic()
            raise
        self._run = run = self._coming
        assert run is not None and run.session is not None
        run.session.stale = run.session.sealed
        self._crash = self._coming = None
        self._stir.set()

    def _configure(self) -> None:
        try:
            if self._on_start is not None:
                self._on_start(self)
        except StopIteration as error:  # which would end a loop of the caller's, and no asyncio future takes
            raise RuntimeError("on_start raised StopIteration") from error

    def _close_idle(self, run: _Run) -> None:
        """End a run that nobody uses. The next call starts another."""
        if self._starting.acquire(blocking=False):
            assert run.session is not None
            idle = run is self._run and run.session.ended is None and run.session.seal()
            if idle:
                run.closing = True
            self._starting.release()
            if idle:
                _close_runs([run], _GRACE)

    def _expect(self, run: _Run) -> None:
        """A run has been made, and will have a session."""
        self._coming = run
        if self._run is None or self._run.ended.is_set():
            self._run = run

    # -- starting

    def _open(self) -> None:
        """Make a run, which is `_coming` from then on, and have a session with it: start a process, or attach to one. Raises
        LaunchError."""
        _set_exit_hooks()
        config = self._attached_to()
        if config is not None:
            self._attach(config)
            return
        try:
            argv = self._argv()
            self._check_files(argv)
        except FileNotFoundError as error:  # what is relative to the current folder, where that is gone
            raise self._not_started([], f"there is no current folder: {error}") from None
        key = os.urandom(32)
        news = threading.Event()  # set when the plugin has connected, was refused, or has ended
        came: list[tuple[_Channel, Any]] = []

        def greet(channel: _Channel, address: str) -> _Terms:
            return _Hello(channel, address, key, "host").as_host(self._versions, self._max_message)

        def arrived(channel: _Channel, result: Any) -> None:
            came.append((channel, result))
            news.set()

        door = run = guardian = None
        name = _folder_name()
        try:
            guardian = _start_guardian(name) if self._tree is _PosixTree else None
            door = _Door(greet, arrived, name=name)
            run = self._spawn(argv, door.listener, key, news, guardian)
            in_time = self._closed or news.wait(self._start_timeout)
            if run.ended.is_set():
                door.settle(0.2)  # it may have been refused just before
            if came and isinstance(came[0][1], _Terms):
                run.open(*came[0], self._max_message, self._call_timeout)
            if run.session is None or run.session.ended is not None or self._closed:
                raise self._failure(run, argv, in_time, door.strangers, came[0][1] if came else None)
        except BaseException as error:
            if run is not None:
                run.kill()
            else:
                _dismiss(guardian)
            if isinstance(error, (OSError, RuntimeError)) and not isinstance(error, PluginError):
                raise self._not_started(argv, str(error)) from None  # no descriptor or thread to be had
            raise
        finally:
            if door is not None:
                door.close()
            if run is None or run.session is None:
                for channel, _ in came:  # too late
                    channel.close()
        if "persist" in came[0][1].features:
            run.keep()

    def _attached_to(self) -> dict[str, Any] | None:
        """The config of the process that is to be attached to, if one is."""
        text = os.environ.get(_ATTACH)
        if self._config is not None or not text:
            return self._config
        try:
            configs = json.loads(text)
            if not isinstance(configs, dict):
                raise ValueError("it is no object")
            return _checked_config(configs[self.name]) if self.name in configs else None
        except (ValueError, RecursionError) as error:
            raise self._not_attached(f"the variable {_ATTACH} is not {{NAME: config}} as JSON: {error}") from None

    def _attach(self, config: dict[str, Any]) -> None:
        address = config["address"]
        try:
            channel = _connect(address, _HELLO_SECONDS)
        except (OSError, ValueError) as error:
            gone = isinstance(error, (FileNotFoundError, ConnectionRefusedError))
            problem = f"nobody listens at {address}, so the plugin has ended" if gone else f"{address} cannot be reached"
            raise self._not_attached(f"{problem} ({error})") from None
        try:
            tree = _PeerTree(channel, config["pid"])
            hello = _Hello(channel, address, bytes.fromhex(config["authkey"]), "host")
            terms = hello.as_host(self._versions, self._max_message)
            run = _AttachedRun(self, tree, (), threading.Event())
            run.config, run.stays = config, True
            run.open(channel, terms, self._max_message, self._call_timeout)
        except BaseException as error:
            channel.close()
            if isinstance(error, LaunchError):
                raise self._not_attached(str(error), type(error), **vars(error)) from None
            if isinstance(error, (OSError, EOFError, PluginError)):
                raise self._not_attached(f"what listens at {address} is no plugin: {error!r}", HandshakeError) from None
            raise
        if self._closed:
            self.close()
            raise PluginClosed(f"the plugin {self.name!r} was closed while it started")

    def _not_attached(self, reason: str, kind: type[LaunchError] = LaunchError, **carried: Any) -> LaunchError:
        return kind(f"there is no attaching to the plugin {self.name!r}: {reason}", **carried)

    def _spawn(self, argv: list[str], listener: _Listener, key: bytes, news: threading.Event, guardian: Any) -> _Run:
        logger = self._logger or _import("logging").getLogger(f"miniplug.{self.name}")
        env = self._environ()
        env.update({_ADDRESS: listener.address, _AUTHKEY: key.hex(), _LOG_LEVEL: str(logger.getEffectiveLevel())})
        env.update({_PERSIST: "1"} if self._persist else {})
        stdin = {"discard": _DEVNULL, "inherit": None}[self._stdin] if isinstance(self._stdin, str) else self._stdin
        sinks = [_sink(output, logger, name) for output, name in zip(self._outputs, ("stdout", "stderr"))]
        terminal = self._stdin == "inherit" and os.isatty(0)
        for folder in listener.passed_over:
            logger.info("its socket is in %s, not in %s", listener.folder or listener.address, folder)
        if self._limits and self._limits._not_enforced():
            logger.warning("this system has no limit of %s: it runs without", self._limits._not_enforced())
        out, err = (None if sink is None else _PIPE for sink in sinks)
        env[_PIPES] = "".join(fd for fd, stream in (("1", out), ("2", err)) if stream)
        try:
            tree = self._tree(argv, stdin=stdin, stdout=out, stderr=err, shares_terminal=terminal, guardian=guardian,
                              limits=self._limits, env=env, cwd=self._cwd)
            return _Run(self, tree, sinks, news)
        except (OSError, ValueError) as error:
            known: dict[type, str] = {FileNotFoundError: "there is no such program",
                                      PermissionError: "it is not executable for this user"}
            problem = f"{argv[0]}: {known.get(type(error), error)}"
            if self._cwd is not None and not os.path.isdir(self._cwd):
                problem = f"cwd={self._cwd!r}: there is no such folder"
            raise self._not_started(argv, problem) from None

    def _environ(self) -> dict[str, str]:
        """What the plugin's environment has beside the address and the key."""
        env = {name: value for name, value in os.environ.items()
               if (self._inherit_env or name in _SYSTEM_VARIABLES) and not name.startswith("MINIPLUG_")}
        env.update((_variable(name), value) for name, value in self._env.items())
        if self._sha256:
            env[_SOURCE_ONLY] = "1"
        if any(path and path.endswith(".py") for path in self._sha256):
            env["PYTHONPYCACHEPREFIX"] = os.devnull  # no bytecode cache for what it imports either
        env[_COOKIE_KEY] = self._handshake.magic_cookie_key
        env[_variable(self._handshake.magic_cookie_key)] = self._handshake.magic_cookie_value
        return env

    def _failure(self, run: _Run, argv: list[str], in_time: bool, strangers: int, refusal: Any) -> PluginError:
        """Why the plugin did not come up."""
        if self._closed:
            return PluginClosed(f"the plugin {self.name!r} was closed while it started")
        if isinstance(refusal, HandshakeError):
            run.wait(1.0)  # it says on stderr that it was refused
            return self._not_started(argv, str(refusal), HandshakeError, host=refusal.host, plugin=refusal.plugin)
        kind, code = LaunchError, run.exit_code
        reason = f"it {run.end_words()[0]}"
        if not in_time:
            run.kill()
            others = f" ({strangers} callers without the key were turned away)" if strangers else ""
            reason = f"it did not connect within {self._start_timeout:g} s{others}; does it call miniplug.serve()?"
            code = None
        elif code == 0:
            kind, reason = HandshakeError, reason + " without connecting: it is no plugin, or does not call miniplug.serve()"
        return self._not_started(argv, reason, kind, exit_code=code, output=run.tail())

    def _not_started(self, argv: list[str], reason: str, kind: type[LaunchError] = LaunchError, **carried: Any) -> LaunchError:
        text = f"the plugin {self.name!r} did not start: {reason}{_last_words(carried.get('output', ()))}"
        return kind(text, command=argv, **carried)

    def _argv(self) -> list[str]:
        """What to run. Raises LaunchError if that can be told to fail."""
        command = self._command
        if not command:
            raise self._not_started([], "the command is empty")
        if not isinstance(command, str):
            return [*command]
        name, source, attribute = _split_spec(command)
        path = source if attribute and not source.endswith(".py") else self._existing(source)
        if not attribute and not path.endswith((".py", ".pyw")):
            return [path]
        python = self._python or sys.executable or ""
        known = os.path.basename(python).lower().startswith(("python", "pypy", "graalpy")) and not hasattr(sys, "frozen")
        bootstrap = [python, "-c", _BOOTSTRAP, os.path.abspath(__file__), __name__]
        if self._python is None and not known:
            reason = f"this application ({python or 'an embedded Python'}) has no interpreter of its own to run it"
            if not _frozen_mains:
                freeze = ", or call miniplug.freeze_support() first in its main program" if hasattr(sys, "frozen") else ""
                raise self._not_started([command], f"{reason}: pass python='/path/to/python'{freeze}")
            bootstrap = [python, _FROZEN]
        return [*bootstrap, *(["serve", f"{name}={path}:{attribute}"] if attribute else ["run", path])]

    def _check_files(self, argv: list[str]) -> None:
        """Compare files with their digests in `sha256`. Raises ChecksumError, or LaunchError for one that cannot be read."""
        for path, expected in self._sha256.items():
            if path is None:
                path = self._checked_program(argv)
            whole = os.path.abspath(os.path.join(self._cwd or "", path))
            digest = _import("hashlib").sha256()
            try:
                with open(whole, "rb") as file:
                    for block in iter(partial(file.read, 1 << 20), b""):
                        digest.update(block)
            except OSError as error:
                raise self._not_started(argv, f"{whole} cannot be checked: {error.strerror}") from None
            actual = digest.hexdigest()
            if actual != expected:
                reason = f"{whole} is not the file expected: its SHA-256 is {actual}, not {expected}"
                raise self._not_started(argv, reason, ChecksumError, path=whole, expected=expected, actual=actual)

    def _checked_program(self, argv: list[str]) -> str:
        """The file that a single digest is of. A program of an argument list is looked up here, and run by its path then."""
        if isinstance(self._command, str):
            return self._existing(_split_spec(self._command)[1])
        if _script_of(argv) is argv[0] and not os.path.dirname(argv[0]):
            argv[0] = _import("shutil").which(argv[0], path=self._environ().get("PATH")) or argv[0]
        return _script_of(argv)

    def _existing(self, path: str) -> str:
        whole = os.path.abspath(os.path.join(self._cwd or "", path))
        found = whole if os.path.isfile(whole) else _import("shutil").which(path) if not os.path.dirname(path) else None
        if found is None:
            why = "it is a folder" if os.path.isdir(whole) else "there is no such file"
            words = path.split()
            is_line = len(words) > 1 and _import("shutil").which(words[0])
            hint = f"; a program with arguments is a list: {words}" if is_line else ""
            raise self._not_started([path], f"{whole}: {why}{hint}")
        return str(found)


# Without these a Windows program does not start; on POSIX there are none such.
_SYSTEM_VARIABLES = ("SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "COMSPEC", "PATHEXT", "TEMP", "TMP") if _WINDOWS else ()

# Run by the plugin's interpreter: this very file is miniplug there, under the name that it has in the host as well.
# Loaded like this, and not by its path, it comes from the bytecode cache; or from the zip file that the host is packed in.
# The first lines are for any Python at all.
_BOOTSTRAP = """
import sys
if sys.path[:1] == [""]:  # what lies in the current folder, a json.py say, is not what is imported here
    del sys.path[0]
if sys.version_info < (3, 8):
    sys.exit("miniplug needs Python 3.8 or newer, and this is " + sys.version.split()[0] + ": " + sys.executable)
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("miniplug", sys.argv[1])
module = sys.modules["miniplug"] = module_from_spec(spec)
if __import__("os").path.isfile(sys.argv[1]):
    spec.loader.exec_module(module)
else:
    from zipimport import zipimporter
    folder, name = __import__("os").path.split(sys.argv[1])
    exec(zipimporter(folder).get_code(name[:-3]), vars(module))
sys.meta_path.insert(0, module._Alias(sys.argv[2]))
module._run_plugin(*sys.argv[3:])
"""


_FROZEN = "--miniplug-plugin"  # the first argument of a frozen application that is to be a plugin
_frozen_mains: list[bool] = []  # not empty: it looks for that


class _Alias:
    """An import hook that gives this very module under the name, too, by which the host has vendored it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return _import("importlib.machinery").ModuleSpec(name, self) if name == self._name else None

    def create_module(self, spec: Any) -> ModuleType:
        return sys.modules[__name__]

    def exec_module(self, module: ModuleType) -> None:
        """It has run."""


def _split_spec(command: str) -> tuple[str, str, str]:
    """``name=source:Attr`` to its parts; the attribute is empty if it is no spec. The name is the attribute's by default."""
    head, _, attribute = command.rpartition(":")
    drive = len(head) == 1 and _WINDOWS  # C:program
    if not head or drive or attribute.endswith(".py") or not all(part.isidentifier() for part in attribute.split(".")):
        return "", command, ""
    name, equals, source = head.partition("=")
    if not equals or not name.isidentifier():
        name, source = attribute.rpartition(".")[2].lower(), head
    if os.path.dirname(source) and not source.endswith(".py"):  # no module's name: a program whose own has a colon
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


def _checked_digests(sha256: str | Mapping[_Path, str] | None, command: _Command) -> dict[str | None, str]:
    """{path: digest}, the path None for the plugin itself. Raises ValueError."""
    if isinstance(sha256, str) and isinstance(command, (str, os.PathLike)):
        _, source, attribute = _split_spec(os.fspath(command))
        if attribute and not source.endswith(".py"):
            raise ValueError(f"sha256={sha256!r}: where the module {source!r} lies is not known beforehand; give {{path: digest}}")
    given = {None: sha256} if isinstance(sha256, str) else {} if sha256 is None else sha256
    if not isinstance(given, _import("collections.abc").Mapping):
        raise TypeError(f"sha256={sha256!r}: it is 64 hexadecimal digits, or {{path: digest}}")
    for digest in given.values():
        if not isinstance(digest, str) or len(digest) != 64 or digest.strip("0123456789abcdefABCDEF"):
            raise ValueError(f"sha256={digest!r}: it is 64 hexadecimal digits")
    return {None if path is None else os.fsdecode(path): digest.lower() for path, digest in given.items()}


def _sink(output: _Output, logger: logging.Logger, stream: str) -> Callable[[str], Any] | None:
    """What takes the lines of an output stream; None for one that goes where the host's own goes."""
    if isinstance(output, str):
        return {"inherit": None, "log": _LogSink(logger, stream), "discard": lambda line: None}[output]
    if callable(output):
        return output
    write, encoding = output.write, getattr(output, "encoding", None) or "utf-8"
    return lambda line: write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def _like(other: Callable[..., Any]) -> Callable[[_F], _F]:
    """For help() and editors: the decorated function takes what `other` takes."""
    return lambda function: vars(function).update(__wrapped__=other) or function


del Plugin.__init__.__annotations__["return"]  # or help() would say that launch returns None


@_like(Plugin)
def launch(command: _Command, **options: Any) -> Plugin:
    """Start a plugin and return it, ready to `dispense`. ``with launch(...) as plugin:`` closes it at the end.

    `command`: an argument list, run as it is; or the path of a program, a ``.py`` file being run under `python`; or a
    spec, ``"module:Attr"``, ``"path/to/file.py:Attr"`` or ``"name=path/to/file.py:Attr"``, which this
    very file serves under `python`, where miniplug need not be installed. The options, all by keyword:

    - `name` (str): what logs and errors call it; by default made from the command.
    - `handshake` (Handshake), `protocol_versions` (ints; default: the handshake's): what the host can speak. The
      highest version that both have is used.
    - `python` (path): the interpreter; by default this one. A spec or a ``.py`` file imports what lies beside the file, or
      for ``"module:Attr"`` in `cwd`, and what is installed there. For what lies elsewhere give a ``PYTHONPATH`` in `env`.
    - `env` (dict of str): added to the environment, and wins over it. `inherit_env` (bool, default True): False starts
      from nothing but what the system needs. `cwd` (path): where it runs; a relative path in `command` starts there.
    - `start_timeout` (seconds, default 60): how long it may take to connect.
    - `call_timeout` (seconds, default None: no limit): the deadline of every call that has no other.
    - `stdin`: ``"discard"`` (default), ``"inherit"``, or a file. With ``"inherit"`` on a terminal the plugin
      shares the host's process group.
    - `stdout`, `stderr`: ``"log"`` (default), ``"inherit"``, ``"discard"``, a callable that takes each line of text, or
      a text file to write them to.
    - `logger` (logging.Logger, default ``miniplug.NAME``): the parent of the loggers that the plugin's records and
      lines go to: its own loggers' names, ``stdout`` at INFO, ``stderr`` at WARNING, tracebacks at ERROR.
    - `max_restarts` (int, default 0) in any `restart_window` (seconds, default 60): after a crash the next call starts the
      plugin anew, and proxies stay good. A pause goes before, from 0.1 seconds on, and twice as long each time; calls wait
      through it, their deadlines running. The calls in flight fail with PluginCrashed and are never run again. Past the
      limit calls raise the last PluginCrashed, until `start`.
    - `heartbeat` (seconds, default None): a plugin that answers no ping for so long counts as crashed, and is killed. It
      may be as busy as it likes, as long as other threads of it can run.
    - `idle_timeout` (seconds, default None): the plugin is closed when for so long no call, stream or reference (other than
      what is dispensed) has been open, and starts again on the next call. Of a notification only the sending counts.
    - `on_start` (callable): ``on_start(plugin)`` runs after every start; until it returns, only the calls of its own thread
      get through, and what those call back. If it raises, the process is ended, and whoever started it gets that: `start`,
      or the calls that waited.
    - `on_exit` (callable): ``on_exit(plugin)`` runs in a thread of miniplug's, once for each time that the process ends unasked.
    - `sha256`: the digest in hex of the program, or of the spec's or script's file (not of the interpreter; of an
      argument list that is the first ``.py`` file in it, or else its program); or ``{path: digest}``, relative to
      `cwd`. It is checked before anything runs. Somebody who can write to the file can still swap it between the check
      and the start, and what it imports is not checked unless it is named. What is checked is not run from a bytecode
      cache; where ``.py`` files are named, no cache is used at all.
    - `limits` (Limits): what it may use at most.
    - `managed` (bool, default True): closed at interpreter exit at the latest.
    - `persist` (bool, default False): it stays when this host goes, also by interpreter exit, unless this one closes it,
      and can be attached to: see `attach`.
    - `max_message` (bytes, default 256 MiB, at least 4096): the longest message the host takes.

    Raises LaunchError, HandshakeError, ChecksumError or PluginClosed, and what `on_start` raises; ValueError for an option
    that is none.
    """
    return Plugin(command, **options).start()


def attach(config: Mapping[str, Any], **options: Any) -> Plugin:
    """Connect to a plugin that runs already, and return it, ready to `dispense`. `config` is what its `reattach_config` gave.

    The process is not this host's: `close`, the end of a ``with`` and interpreter exit only disconnect. `kill` asks it to
    end; what does not is killed if the operating system proves that it is the plugin (on Linux and Windows), and a process
    that merely has its number never is. What it prints does not come here. After a `close` `start` connects again.

    The options are those of `launch` that apply: `name`, `handshake` (for its version), `protocol_versions`,
    `max_message`, `call_timeout`, `heartbeat`, `logger`. If the environment variable ``MINIPLUG_ATTACH`` is
    ``{NAME: config}`` as JSON, `launch` attaches in the same way for a plugin of that name.

    Raises LaunchError if there is no such plugin (any more), or its kinds HandshakeError and AuthenticationError.
    """
    plugin = Plugin(["attach"], **{"name": "attached", **_applicable("attach", options)})
    try:
        plugin._config = _checked_config(config)
    except ValueError as error:
        raise plugin._not_attached(str(error)) from None
    return plugin.start()


def _applicable(function: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of `launch`, if they go without a process. Raises TypeError."""
    known = {"name", "handshake", "protocol_versions", "max_message", "call_timeout", "logger", "heartbeat"}
    if not options.keys() <= known:
        raise TypeError(f"{function}() takes no {', '.join(sorted(options.keys() - known))}: it starts no process")
    return options


class _LocalTree(_Tree):
    """Stands for a process where a thread of this one serves the plugins, over a connection like any other."""

    stdout = stderr = None

    def __init__(self, serve: Callable[[_Channel, str, bytes], Any], **popen: Any) -> None:
        self.popen, self.pid = self, os.getpid()
        env = popen["env"]
        self._channel = _connect(env[_ADDRESS], _HELLO_SECONDS)
        self._thread = _start_thread("miniplug-local", serve, self._channel, env[_ADDRESS], bytes.fromhex(env[_AUTHKEY]))

    def signal(self, kill: bool) -> None:
        """Cut the connection: that is its end."""
        self._channel.shutdown()

    def await_exit(self) -> None:
        self._thread.join()

    def reap(self) -> int:
        return 0

    def disown(self) -> None:
        """A forked child has no thread of it."""


class _Local(Plugin):
    """A plugin whose process is this one."""

    def _attached_to(self) -> None:
        """Nothing."""

    def __init__(self, plugins: Mapping[Any, Any], info: Mapping[str, Any] | None, max_workers: int, **options: Any) -> None:
        super().__init__(["local"], **{"name": "local", **options})
        versions = _versions(plugins, self._handshake)
        _Server(versions, info, max_workers, self._max_message)  # raises here what it raises

        def serve(channel: _Channel, address: str, key: bytes) -> None:
            server = _Server(versions, info, max_workers, self._max_message)
            try:
                server.attend(channel, server.greet(channel, address, key, {"matches": True}))
            except (OSError, EOFError, PluginError):
                channel.close()  # the host's end tells why
            server.close()

        self._tree = lambda argv, **popen: _LocalTree(serve, **popen)


def local(plugins: Mapping[Any, Any], *, info: Mapping[str, Any] | None = None, max_workers: int = 64, **options: Any) -> Plugin:
    """Serve plugins in this very process, for tests: over the same session and codec, started and ready to `dispense`.

    `plugins`, `info` and `max_workers` are those of `serve`; the options those of `launch` that apply: `name`,
    `handshake`, `protocol_versions`, `max_message`, `call_timeout`, `logger`, `heartbeat`. What a plugin prints or
    logs goes where the process's own does, and what ends a process (``os._exit``, a crash) ends this one.

    Raises what `serve` and `launch` raise.
    """
    return _Local(plugins, info, max_workers, **_applicable("local", options)).start()


# === 11. discovery ======================================================================================

def discover(directory: _Path, pattern: str = "*") -> list[Path]:
    """The files in a folder that `launch` can run, sorted, as absolute paths.

    `pattern` is a glob, relative to the folder: the default finds all that lie in it, ``"*.py"`` the Python files,
    ``"*/plugin.py"`` one in each folder there. A file can be run that ends with ``.py`` or ``.pyw``, or is
    executable (on Windows: an ``.exe``, ``.com``, ``.bat`` or ``.cmd``). Folders are none, and what has a name that begins with
    ``.`` or ``_`` is left out, as is what lies in such a folder: ``__init__.py``, ``__pycache__``, ``.venv``.
    Nothing is run or imported. ``**`` stands for any folders below, links not followed. For a spec add the attribute:
    ``f"{path}:Tool"``.

    Raises FileNotFoundError, NotADirectoryError or PermissionError for the folder, and ValueError for a pattern that is
    empty or absolute. What lies in the folder and cannot be looked at is left out.
    """
    folder = _import("pathlib").Path(directory).absolute()
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file, not a folder")
    os.scandir(folder).close()  # raises, where looking for matches would find nothing
    parts = [part for part in pattern.replace(os.sep, "/").split("/") if part not in ("", ".")]
    if not parts or os.path.isabs(pattern):
        raise ValueError(f"pattern={pattern!r}: it is a glob relative to the folder")
    programs = (".exe", ".com", ".bat", ".cmd")
    return sorted(path for path in map(type(folder), set(_matches(str(folder), parts))) if path.suffix in (".py", ".pyw")
                  or (path.suffix.lower() in programs if _WINDOWS else os.access(path, os.X_OK)))


def _matches(folder: str, parts: Sequence[str]) -> Iterable[str]:
    """The files below a folder that match the parts of a pattern, without those that are hidden. (In Path.glob, one link that
    leads astray, or to where this user may not look, hides others, or is an error, as the Python has it.)"""
    (part, *rest), fnmatch = parts, _import("fnmatch").fnmatch
    if part == "**":
        yield from _matches(folder, rest or ["*"])
    try:
        names = os.listdir(folder)
    except OSError:
        return  # it is no folder, or may not be looked at
    for name in names:
        path = os.path.join(folder, name)
        if name.startswith((".", "_")):
            continue
        if part == "**":
            if os.path.isdir(path) and not os.path.islink(path):
                yield from _matches(path, parts)
        elif fnmatch(name, part):
            if rest:
                yield from _matches(path, rest)
            elif os.path.isfile(path):
                yield path


def discover_entry_points(group: str) -> dict[str, str]:
    """The installed distributions' entry points of a group: name to spec, such as ``{"csv": "shop.export:Csv"}``.

    Nothing is imported. Where two have the same name, that which comes first on ``sys.path`` counts, as it does in an
    import; and of a distribution that is installed twice only the first. A distribution that is broken, and an entry that
    names no attribute of a module, is left out with a warning in the log.
    """
    found: dict[str, str] = {}
    logger = _import("logging").getLogger("miniplug")
    for distribution in _import("importlib.metadata").distributions():
        try:
            entries = [entry for entry in distribution.entry_points if entry.group == group]
            for entry in entries if entries and not _is_hidden(distribution) else ():
                spec = "".join(entry.value.partition("[")[0].split())  # without the extras that it may name
                _, source, attribute = _split_spec(spec)
                if attribute and all(part.isidentifier() for part in source.split(".")):
                    found.setdefault(entry.name, spec)
                else:
                    logger.warning("the entry point %r names no attribute of a module: %s", entry.name, entry.value)
        except Exception as error:  # whatever is wrong with it
            where = getattr(distribution, "_path", "a distribution")
            logger.warning("the entry points of %s cannot be read: %s: %s", where, type(error).__name__, error)
    return found


def _is_hidden(distribution: Any) -> bool:
    """Whether another of its name comes before it on sys.path, so that what it names is not there to import."""
    try:
        name = distribution.metadata["Name"]
        first = _import("importlib.metadata").distribution(name) if name else distribution
        return str(first.locate_file("")) != str(distribution.locate_file(""))
    except Exception:
        return False  # it has no name by which it could be found


# === 12. command line ===================================================================================

def _run_plugin(verb: str, *arguments: str, **options: Any) -> None:
    """Be the plugin: ``serve SPEC...``, or ``run SCRIPT`` with this module as its miniplug."""
    sys.excepthook = _show_error
    _take_environment()
    if _ADDRESS in _environment:
        _prepare_output()
    _run_script(*arguments) if verb == "run" else _serve_specs(*arguments, **options)


def _show_error(kind: type[BaseException], error: BaseException, frames: Any) -> None:
    """As sys.excepthook: the traceback without the frames of miniplug and of importing that come first."""
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith((_show_error.__code__.co_filename, "<")):
        frames = frames.tb_next
    sys.__excepthook__(kind, error.with_traceback(frames), frames)


def _run_script(path: str) -> None:
    main: Any = type(sys)("__main__")
    main.__file__, main.__builtins__ = path, builtins
    sys.modules["__main__"] = main
    sys.argv[:] = [path]
    sys.path.insert(0, os.path.dirname(path))
    with open(path, "rb") as file:
        exec(compile(file.read(), path, "exec", dont_inherit=True), vars(main))  # not this file's __future__


def _serve_specs(*specs: str, address: str | None = None, authkey_file: str | None = None, persist: bool = False) -> None:
    """Serve what the specs name, under whatever cookie and version the host asks for."""
    plugins: dict[str, Any] = {}
    _refuse_by_hand(address, persist, "To serve it by hand, for a host to attach to, add --persist or --listen ADDRESS.")
    for spec in specs:
        name, source, attribute = _split_spec(spec)
        if not attribute:
            sys.exit(f"miniplug: {spec!r} is no spec: write module:Attr or path/to/file.py:Attr")
        if name == "system" or name in plugins:
            sys.exit(f"miniplug: the name {name!r} is {'reserved' if name == 'system' else 'taken'}: write name={spec}")
        plugins[name] = _load(source, attribute)
    try:
        authkey = _read_key(authkey_file) if authkey_file else None
        _serve(_Server({None: plugins}, None, 64, _MAX_MESSAGE), {"matches": True}, address, authkey, persist)
    except (OSError, ValueError) as error:
        sys.exit(f"miniplug: {error}")


def _read_key(path: str) -> bytes:
    """The key in a file, in hexadecimal digits. Raises OSError or ValueError, which name the file and not what is in it."""
    with open(path, "rb") as file:
        text = file.read(1 << 16).decode("ascii", "replace").strip()
    try:
        return _checked_key(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


class _StandardLibrary:
    """An import hook that finds the standard library first. Else a new file in a folder of plugins, called string.py or
    calendar.py, would break what it imports itself, and its neighbours."""

    def __init__(self) -> None:
        library = os.path.dirname(getattr(os, "__file__", ""))
        self._path = [library, os.path.join(library, "lib-dynload"), os.path.join(sys.base_prefix, "DLLs")]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if path is not None else _import("importlib.machinery").PathFinder.find_spec(name, self._path)


def _load(source: str, attribute: str) -> Any:
    """Import a spec's module, by path or by name, and get the attribute."""
    if source.endswith(".py"):
        path = os.path.abspath(source)
        name = os.path.splitext(os.path.basename(path))[0]
        standard = _StandardLibrary()
        if name in sys.modules or standard.find_spec(name):
            name = f"_plugin_{name}"
        sys.meta_path.insert(sys.meta_path.index(_import("importlib.machinery").PathFinder), standard)
        sys.path.insert(0, os.path.dirname(path))
        util = _import("importlib.util")
        spec = util.spec_from_file_location(name, path)
        found = sys.modules[name] = util.module_from_spec(spec)
        if _SOURCE_ONLY in _environment:
            exec(spec.loader.source_to_code(spec.loader.get_data(path), path), vars(found))
        else:
            spec.loader.exec_module(found)
    else:
        try:
            sys.path.insert(0, os.getcwd())
        except OSError:
            pass  # it is gone
        found = _import(source)
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [name for name in dir(found) if not name.startswith("_")]
            matches = _import("difflib").get_close_matches(part, public)
            sys.exit(f"miniplug: {source} has no attribute {attribute!r}" + (f"; did you mean {matches[0]!r}?" if matches else ""))
        found = getattr(found, part)
    return found


def freeze_support() -> None:
    """Let a frozen application serve its own plugins: the first statement of its main program, as multiprocessing's is.

    Without an interpreter beside it (no `python=`), such an application starts its own executable again for a spec or a
    ``.py`` file. There this function is the plugin's main loop, and does not return; otherwise it does nothing. The plugin
    can import what is frozen into the application, and what lies beside its own file.

    (With `python=`, put ``miniplug.py`` beside the frozen application as a data file, for that interpreter to load.)
    """
    if not hasattr(sys, "frozen"):
        return
    if sys.argv[1:2] != [_FROZEN]:
        _frozen_mains.append(True)
        return
    sys.meta_path.insert(0, _Alias("miniplug"))  # it may be vendored under another name
    _run_plugin(*sys.argv[2:])
    sys.exit()


def _call_once(given: Any) -> int:
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
    return 0


def _printable(value: Any) -> str:
    """A value as JSON if it is JSON, else as Python writes it."""
    try:
        if not _portable.dumps(value, "")[2]:
            return json.dumps(value, ensure_ascii=sys.stdout.encoding.lower() != "utf-8", allow_nan=False)
    except NotSerializable:
        pass
    return repr(value)


def _inspect(given: Any) -> int:
    with _opened(given) as plugin:
        for key, value in plugin.info.items():
            print(f"{key}: {_printable(value)}")
        for name, methods in sorted(plugin.describe().items()):
            print(name)
            for method in methods.values():
                print(_indented(_outline(*method)))
    return 0


def _opened(given: Any) -> Plugin:
    """The plugin that a verb names, started."""
    if given.verbose:
        _import("logging").basicConfig(format="%(name)s %(levelname)s: %(message)s")
        _import("logging").getLogger("miniplug").setLevel(given.verbose)
    output = "log" if given.verbose else "discard"
    return launch(given.plugin, handshake=Handshake(given.protocol_version, *given.cookie), python=given.python,
                  stdout=output, stderr=output)


def _one_line(error: BaseException) -> str:
    """An error's most telling line."""
    if isinstance(error, RemoteError):
        return f"{error.type_name}: {error.message}".partition("\n")[0].rstrip(": ")
    output = [line for line in getattr(error, "output", ()) if line.strip()]
    fatal = [line for line in output if line.startswith("Fatal Python error: ")]  # of what comes after it, no line says much
    return " ".join([str(error).partition("\n")[0], *(fatal or output)[-1:]])


def _doctor(given: Any) -> int:
    checks = list(_examine(given.python))
    healthy = checks[-1][1] is True
    if given.json:
        print(json.dumps({"ok": healthy, "checks": [dict(zip(("check", "ok", "detail"), each)) for each in checks]}, indent=2))
    else:
        for what, works, detail in checks:
            print(f"{'-' if works is None else 'ok' if works else 'no':<4}{what:<16}{detail}")
    return 0 if healthy else 1


def _examine(python: str | None) -> Iterable[tuple[str, bool | None, str]]:
    """What this machine allows: (what, whether it does, more about it). The last is whether a plugin runs."""
    yield "miniplug", True, f"{__version__}, {os.path.abspath(__file__)}"
    found = _import("shutil").which(python or sys.executable) is not None
    yield "interpreter", found, f"{python or sys.executable}, under {sys.version.split()[0]} on {sys.platform}"
    try:
        listener = _Listener()
        listener.close()
        kind = "a named pipe" if _WINDOWS else "a Unix socket" if listener.folder else "a TCP port that the key alone guards"
        yield "transport", True, f"{kind}, {listener.address}"
        for folder in listener.passed_over:
            yield "temp folder", False, folder
        if listener.folder:
            yield "temp folder", True, os.path.dirname(listener.folder)
    except OSError as error:
        yield "transport", False, str(error)
    try:
        socket.create_server(("127.0.0.1", 0)).close()
        yield "loopback TCP", True, "127.0.0.1"
    except OSError as error:
        yield "loopback TCP", False, str(error)
    try:
        _import("hashlib").md5(b"")
        yield "FIPS mode", None, "off"
    except ValueError:
        yield "FIPS mode", True, "on: no MD5, and miniplug needs none"
    yield "process groups", None if _WINDOWS else True, "none on Windows" if _WINDOWS else "one for each plugin"
    yield "job objects", True if _WINDOWS else None, "one for each plugin" if _WINDOWS else "only on Windows"
    if not _WINDOWS:
        found = os.path.exists(_SHELL)
        yield "guardian", found, f"{_SHELL}{'' if found else ' is not there: no guardian if the host is killed, and no limits'}"
    start = time.monotonic()
    try:
        with launch("doctor=os:path", python=python, start_timeout=20.0, stdout="discard", stderr="discard") as plugin:
            plugin.dispense(timeout=20.0).basename("a/b")
            seconds = time.monotonic() - start
            yield "a plugin", True, f"runs: {seconds * 1e3:.0f} ms to the first answer, {plugin.ping() * 1e6:.0f} µs a ping"
    except PluginError as error:
        yield "a plugin", False, _one_line(error)


def _parser(argparse: Any) -> Any:
    """The command line. Each verb sets `run`, which is called with what was given and returns the exit status."""

    class Parser(argparse.ArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> None:
            self.exit(2, f"{self.prog}: {message} (--help tells more)\n")

    def cookie(text: str) -> list[str]:
        if not all(text.partition("=")):
            raise ValueError
        return text.split("=", 1)

    def version(text: str) -> int:
        return _checked_count(int(text), "N")

    parser = Parser(prog="python -m miniplug", description="Plugins that run as subprocesses and are called like local objects.")
    parser.add_argument("--version", action="version", version=f"miniplug {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    serve = verbs.add_parser("serve", help="be a plugin: serve what the specs name")
    serve.add_argument("specs", metavar="SPEC", nargs="+", help="module:Attr, path/to/file.py:Attr or NAME=one of these")
    serve.add_argument("--listen", metavar="ADDRESS", help="where hosts attach: a path with a / in it, or 127.0.0.1:PORT")
    serve.add_argument("--authkey-file", metavar="FILE", help="has the key that they must hold, in hexadecimal digits")
    serve.add_argument("--persist", action="store_true", help="stay when the last host is gone")
    serve.set_defaults(run=lambda given: _run_plugin("serve", *given.specs, address=given.listen, persist=given.persist,
                                                     authkey_file=given.authkey_file))

    call = verbs.add_parser("call", help="run a plugin, call it once, print the result")
    inspect = verbs.add_parser("inspect", help="run a plugin, and tell what it can do")
    doctor = verbs.add_parser("doctor", help="what this machine allows, and whether a plugin runs here")
    for verb in (call, inspect, doctor):
        verb.add_argument("--python", metavar="PATH", help="the interpreter for the plugin")
    for verb in (call, inspect):
        verb.add_argument("--verbose", "-v", action="store_const", const="DEBUG", help="what the plugin writes goes to stderr")
        verb.add_argument("--cookie", metavar="KEY=VALUE", type=cookie, default=(), help="the magic cookie, if it wants one")
        verb.add_argument("--protocol-version", metavar="N", type=version, default=1)
        verb.add_argument("plugin", metavar="PLUGIN", help="a program, a .py file or a spec such as path/to/file.py:Attr")
    call.add_argument("method", metavar="METHOD", help="METHOD, or NAME.METHOD if it serves several plugins")
    call.add_argument("arguments", metavar="ARG", nargs="*", help="JSON, or else a string; after -- it may begin with a dash")
    doctor.add_argument("--json", action="store_true")
    for verb, run in ((call, _call_once), (inspect, _inspect), (doctor, _doctor)):
        verb.set_defaults(run=run)
    return parser


def _main(arguments: Sequence[str]) -> None:
    given = _parser(_import("argparse")).parse_args(arguments)
    if given.verb == "serve":  # whose errors are the plugin's own
        sys.exit(given.run(given))
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 -- it was closed: nobody reads
    try:
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        status = given.run(given)
        sys.stdout.flush()
        sys.exit(status)
    except (PluginError, MemoryError, RecursionError) as error:
        sys.exit(f"miniplug: {_one_line(error)}")
    except OSError as error:  # what is printed cannot be written; or nobody reads it, as behind ``head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what the interpreter flushes at its end
        sys.exit(1 if isinstance(error, BrokenPipeError) else f"miniplug: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if _AS_PROGRAM:
    _main(sys.argv[1:])
