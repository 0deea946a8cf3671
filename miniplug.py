# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the miniplug authors
# mypy: disable-error-code="no-any-return, type-arg"
"""miniplug: plugins that run as subprocesses and are called like local objects.

One file, standard library only, Python 3.8 and up. Vendor it or install it. A plugin::

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
    m.timeout(5)(...)  waits at most 5 seconds; so do m.timeout(5).submit(...) and .notify(...)

Whatever the plugin does in its process (raise, exit, crash) is an exception in the host, with the exit
code and the last lines it wrote. However the host ends, the plugin and all that it started end too. What it
prints and logs goes to the host's ``logging``. The two talk over a private socket or pipe, with a fresh key
for every launch, in JSON that keeps Python's types. Nothing that arrives is ever run as code.

The map of this file; each section uses only those above it:

     1 errors: what can go wrong, by name
     2 codec: values to bytes and back
     3 channel: whole messages over a socket or a pipe
     4 handshake: who are you, which version, do you hold the key
     5 session: calls and answers, both ways
     6 dispatcher: names to methods
     7 proxies: what the user of a plugin holds
     8 serve: the plugin's main loop, output and logging
     9 process: start, watch, limit and end a process tree
    10 plugin: launch, and what becomes of it
    11 discovery: what there is to launch
    12 command line: python -m miniplug
"""

# One call, `greeter.greet("world")`, there and back:
#
# In the host `_Method.__call__` asks its `_Target` where the object is now; the `_Supervisor` starts the
# plugin if it has to. `_Caller.call` makes a `_Call`, with an inbox; `_Codec.dumps` makes bytes of it, and
# `_Channel.send` a message. `_Reader.wait` takes the seat and reads, or sleeps while another thread reads.
#
# In the plugin `_Channel.receive` makes messages of bytes, and `_Reader.read` a `_Request` of a call.
# `_Runner.run` decodes it, in the thread that has read it if such are quick, and else first has another one
# read. `_References.resolve` finds the bound method, which is called; `_Runner.answer` or `fail` answers.
#
# In the host `_Reader.read` puts that into the inbox of the `_Call`, and `_Caller.value` decodes it, in the
# thread that called. A callback is the same with the sides exchanged: `_Runner.run_nested` runs it, in the
# thread that waits for the call on whose behalf it is made.
#
# Locks, outermost first. One is taken only under those of a line above it:
#
#   held while code of the user runs or a call is waited for, each for one thing alone:
#       _Served._entering (for each name), _References._exit_lock, Stream._lock, _Dispensed._lock
#   _Producer._lock, while a message is sent
#   _References._lock
#   _Supervisor.news; at interpreter exit _close_all keeps it, and all others may be taken under it
#   under which no other is taken: _Door._lock, _Served._lock, _Server._lock, _Guardian._lock, those of the
#       processes, and the condition of a Call
#
# The states of a plugin are drawn at `_Supervisor`, of a connection at `_Session`.
#
# Who holds `_Pool._lead`, `_Producer._turn` or `_Run._claim` has a work to do that others leave to it. A
# finalizer may run anywhere: so those only append to a queue.

from __future__ import annotations

import sys

_AS_PROGRAM = __name__ == "__main__"
if _AS_PROGRAM:
    __name__ = "miniplug"

import binascii
import builtins
import enum
import io
import itertools
import json
import json.encoder
import multiprocessing
import operator
import os
import re
import socket
import struct
import threading
import time
from collections import Counter, deque, namedtuple
from contextvars import ContextVar, copy_context
from functools import lru_cache, partial, reduce

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself is slow to import
    import logging
    from pathlib import Path
    from types import ModuleType
    from typing import IO, Any, Callable, Iterable, Mapping, NamedTuple, NoReturn, Sequence, Union, overload

    from typing_extensions import ParamSpec, TypeVar  # which type checkers have for every Python

    _T = TypeVar("_T")
    _I = TypeVar("_I", default=Any)
    _F = TypeVar("_F", bound=Callable[..., Any])
    _P = ParamSpec("_P")
    _Path = Union[str, "os.PathLike[str]"]
    _Command = Union[_Path, Sequence[_Path]]
    _Sink = Callable[[str], Any]  # what takes lines of output
    _Step = Union[Callable[[Any], Any], None]
    _Output = Union[str, _Sink, IO[str]]
    _Bytes = Union[bytes, bytearray, memoryview]
    _Message = tuple[Any, ...]  # kind, flags, number, parent, body, buffers
    # a value as bytes, those beside it, whether it is tagged, what it lends
    _Content = tuple[bytes, Sequence[_Bytes], int, list[int]]

__version__ = "0.1.0"

__all__ = [
    "AuthenticationError", "Call", "CallTimeout", "ChecksumError", "DeadReference", "Handshake",
    "HandshakeError", "InterfaceMismatch", "LaunchError", "Limits", "MessageTooLarge", "MethodInfo",
    "MethodNotFound", "NotSerializable", "Plugin", "PluginClosed", "PluginCrashed", "PluginError",
    "PluginNotFound", "ProtocolError", "RemoteError", "Stream", "__version__", "attach", "cancelled",
    "discover", "discover_entry_points", "freeze_support", "launch", "local", "ref", "register",
    "release", "serve",
]

_WINDOWS = os.name == "nt"
_posix: Any = os  # for what Windows lacks, as type checkers know
_FILE = os.path.abspath(__file__)


# === 1. errors ==========================================================================================

class PluginError(Exception):
    """The base of every error of miniplug's. What an error carries beside its text are attributes of it."""

    def __init__(self, message: str = "", **carried: Any) -> None:
        super().__init__(message)
        vars(self).update(carried)


class LaunchError(PluginError, OSError):
    """The plugin never came up. `command`: what was run. `exit_code`: negative for a signal, or None.
    `output`: the last lines it wrote to stderr, or else to stdout."""

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
    the type. `remote_traceback`: the plugin's own, as text. If it is builtin or registered, ``except`` of its
    own type catches it, too."""

    type_name: str = ""
    message: str = ""
    remote_traceback: str = ""
    _body: Any = None  # what it was made from

    def __reduce__(self) -> Any:
        return _reduce_error(self)


class _RemoteTraceback(Exception):
    """The cause of a RemoteError: it prints the plugin's own traceback."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class AuthenticationError(LaunchError, multiprocessing.AuthenticationError):
    """The other side does not hold the key."""


class _Overdue(PluginError, TimeoutError):
    """The deadline passed. `method`: what was called. `seconds`: how long it was given."""

    method: str = ""
    seconds: float = 0.0


if TYPE_CHECKING:
    class CallTimeout(_Overdue): ...


def _on_first_use(name: str) -> Any:
    """What has bases that are slow to import is made on first use."""
    if name in globals():
        return globals()[name]
    if name == "CallTimeout":
        bases: list[Any] = [_Overdue]
        if sys.version_info < (3, 11):  # where asyncio and concurrent.futures have timeouts of their own
            bases += [_import("asyncio").TimeoutError, _import("concurrent.futures").TimeoutError]
    elif name == "Call":
        bases = [_Awaitable, _import("concurrent.futures").Future]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = type(name, tuple(bases), {"__module__": __name__, "__doc__": bases[0].__doc__})
    return globals().setdefault(name, made)  # one class, however many threads ask at once


if not TYPE_CHECKING:  # or checkers would take any name for one of ours
    __getattr__ = _on_first_use


def _import(name: str) -> Any:
    __import__(name)
    return sys.modules[name]


def _in_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


def _is_ctrl_c(error: BaseException) -> bool:
    """Whether this is for the program."""
    return _in_main_thread() and issubclass(type(error), KeyboardInterrupt)


def _start_thread(name: str, target: Callable[..., Any], *args: Any) -> threading.Thread:
    thread: Any = threading.Thread(target=target, args=args, name=name, daemon=True)
    # start() would wait for ever for a thread that has no memory to begin
    thread._started.wait = partial(thread._started.wait, 1.0)
    thread.start()
    del thread._started.wait  # which is a cycle
    return thread


def _aside(name: str, function: Callable[..., Any], *args: Any) -> None:
    """Call a function in a thread of its own, or else here."""
    try:
        _start_thread(name, function, *args)
    except RuntimeError:
        function(*args)


def _until(condition: Callable[[], Any], seconds: float) -> None:
    """Look for what no event tells of, at first often, for at most so many seconds."""
    deadline, pause = time.monotonic() + seconds, 1e-4
    while not condition() and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(pause * 2, 0.01)


# === 2. codec ===========================================================================================
#
# JSON that keeps Python's types, by the json module's parts in C. What JSON has not is tagged: an object with
# one key, which begins with "$" (docs/protocol.md lists them). Before the encoder runs, `_fit` looks for what
# that does not know, or would change without a word, and copies with tags only there.

_MOST = 2**53 - 1  # of an integer that each JSON reader keeps (RFC 8259)
_LEAST = -_MOST
_MAX_BITS = 1 << 15  # of an integer: to print it takes a millisecond or two
_MAX_DIGITS = 10000  # of a Decimal, and its exponent either way
_MAX_ALIKE = 16  # values with one hash: each is compared with each
_MAX_COMBINATIONS = 1 << 14  # of an enum's flags: Python keeps each for ever
_MANY = 32  # items of a list that may go in a shorter form
_INLINE = 2048  # bytes that go in base64; longer ones go in a frame beside the message
_MAX_BUFFERS = 1 << 16  # such frames of one message
_PLAIN = frozenset((str, bool, type(None), float))  # the encoder may trip over one, but changes none
_ATOMS = _PLAIN | {int}
_TEXTS = frozenset((str,))
_NEVER = frozenset((bool, type(None)))  # it does not trip over these
_NESTS = frozenset((list, tuple, dict))
_CODES = {int: "q", float: "d"}  # of struct
_ORDER = "" if sys.byteorder == "little" else "<"  # of the bytes: struct takes longer if it is told
_SURROGATE = re.compile("[\ud800-\udfff]")
_flatten = itertools.chain.from_iterable


class _Undecodable(Exception):
    """What arrived is well-formed, and cannot be made here: why is its argument. That fails one call."""


@lru_cache(None)
def _found(path: Any) -> Any:
    """What a path such as "datetime.date.fromisoformat" names, imported only now."""
    if type(path) is not str:
        return path
    module, *names = path.split(".")
    return reduce(getattr, names, _import(module))


def _cut(text: str) -> str:
    return text if len(text) <= 1000 else text[:1000] + "..."


def _shown(value: Any) -> str:
    try:
        return _cut(repr(value))
    except Exception:  # a __repr__ that fails
        return "'?'"


# -- values and their states

def _name_of(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _base64(data: _Bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode()


def _bounded(value: int) -> int:
    if value.bit_length() > _MAX_BITS:
        raise NotSerializable(f"integers of more than {_MAX_BITS} bits do not travel: send hex(...)")
    return value


def _told_apart(values: Iterable[Any]) -> list[Any]:
    """The values for a set, or the keys. To tell many with one hash apart would take quadratic time."""
    held = [*values]
    if len(held) > _MAX_ALIKE and max(Counter(map(hash, held)).values()) > _MAX_ALIKE:
        raise NotSerializable(f"more than {_MAX_ALIKE} of its values have the same hash")
    return held


def _make_dict(state: list[Any]) -> dict[Any, Any]:
    if len(state) % 2:
        raise ValueError("a dict is keys and values by turns")
    return dict(zip(_told_apart(state[::2]), state[1::2]))


def _make_numbers(state: Any) -> list[Any]:
    code, data = state
    if code not in _CODES.values():
        raise ValueError('numbers are "q" or "d"')
    return [*struct.unpack(f"{_ORDER}{len(data) // 8}{code}", data)]


def _make_each(state: Any) -> list[Any]:
    tag, states = state
    if tag not in _EACH:
        raise ValueError(f"each is none of {tag!r}")
    makes = {kind: _MAKES[tag, kind] for kind in set(map(type, states))}
    return [makes[type(state)](state) for state in states]


def _make_array(state: Any) -> Any:
    code, size, order, data = state
    if type(data) is not bytes or order not in ("little", "big"):
        raise ValueError("an array is a letter, a size, a byte order, and bytes")
    if code not in _found("array.typecodes") or _found("array.array")(code).itemsize != size:
        raise NotSerializable(f"an array of {code!r} with items of {size} bytes is not to be had here")
    array = _found("array.array")(code, data)
    if order != sys.byteorder:
        array.byteswap()
    return array


def _moment(value: Any) -> Any:
    """A datetime or time as one text, if that says all; else as text without a zone, fold and zone."""
    zone, offset = value.tzinfo, ()
    if type(zone) is _found("datetime.timezone"):
        offset = zone.__getinitargs__()
    if not value.fold and (zone is None or (len(offset) == 1 and not offset[0].microseconds)):
        return value.isoformat()
    return [value.replace(tzinfo=None).isoformat(), value.fold, zone]


def _make_moment(name: str, state: Any) -> Any:
    text, fold, zone = state
    return _found(f"datetime.{name}.fromisoformat")(text).replace(fold=fold, tzinfo=zone)


def _make_zone(key: str) -> Any:
    try:
        return _found("zoneinfo.ZoneInfo")(key)
    except (ImportError, LookupError, OSError):  # Python 3.8, or no tzdata
        raise NotSerializable(f"the time zone {_shown(key)} is not to be had here") from None


def _decimal(held: Any) -> tuple[str, Any]:
    """A Decimal as text, and as itself; from either."""
    text, value = str(held), _found("decimal.Decimal")(held)
    if len(text) > _MAX_DIGITS or not -_MAX_DIGITS <= value.adjusted() <= _MAX_DIGITS:
        raise NotSerializable(f"decimals of more than {_MAX_DIGITS} digits, or exponents, do not travel")
    return text, value


def _make_registered(name: str, held: Any) -> Any:
    if name not in _registered:
        raise NotSerializable(f"a {_shown(name)} has come, which is not registered here: both sides have "
                              "to call miniplug.register")
    try:
        return _registered[name][1](held)
    except BaseException as error:
        if _is_ctrl_c(error):
            raise
        raise NotSerializable(f"a {name!r} cannot be made from what came: {_shown(error)}") from error


def _spread(make: Any) -> Any:
    return lambda items: _found(make)(*items)


# By the tag: the type; what gives its state, which may have tags in turn, or None if it needs no tag; by the
# type of the state on the wire the way back. Names are found on first use.
_FOREIGN = "PosixPath" if _WINDOWS else "WindowsPath"  # cannot exist here: it arrives as a pure one
_TAGS: dict[str, tuple[Any, Any, dict[type, Any]]] = {
    "$int": (int, lambda value: hex(_bounded(value)) if abs(value) > _MOST else None,
             {str: lambda text: _bounded(int(text, 16))}),
    "$float": (float, lambda value: None if value - value == 0.0 else repr(value), {str: float}),
    "$str": (str, lambda text: _SURROGATE.search(text) and _base64(text.encode("utf-8", "surrogatepass")),
             {str: lambda text: binascii.a2b_base64(text).decode("utf-8", "surrogatepass")}),
    "$tuple": (tuple, list, {list: tuple}),
    "$dict": (dict, lambda value: _told_apart(value) and [*_flatten(value.items())], {list: _make_dict}),
    "$numbers": (None, None, {list: _make_numbers}),
    "$each": (None, None, {list: _make_each}),
    "$bytes": (bytes, bytes, {str: binascii.a2b_base64}),
    "$bytearray": (bytearray, memoryview,  # a view, so that nobody resizes what is being sent
                   {str: lambda text: bytearray(binascii.a2b_base64(text))}),
    **{f"${kind.__name__}": (kind, _told_apart, {list: lambda held, kind=kind: kind(_told_apart(held))})
       for kind in (set, frozenset)},
    "$complex": (complex, lambda z: [z.real, z.imag], {list: _spread(complex)}),
    "$ellipsis": (type(...), lambda _: [], {list: lambda _: ...}),
    **{f"${kind.__name__}": (kind, lambda held: [held.start, held.stop, held.step], {list: _spread(kind)})
       for kind in (range, slice)},
    "$array": ("array.array", lambda a: [a.typecode, a.itemsize, sys.byteorder, a.tobytes()],
               {list: _make_array}),
    "$date": ("datetime.date", "datetime.date.isoformat", {str: "datetime.date.fromisoformat"}),
    **{f"${name}": (f"datetime.{name}", _moment,
                    {str: f"datetime.{name}.fromisoformat", list: partial(_make_moment, name)})
       for name in ("datetime", "time")},
    "$timedelta": ("datetime.timedelta", lambda d: [d.days, d.seconds, d.microseconds],
                   {list: _spread("datetime.timedelta")}),
    "$timezone": ("datetime.timezone", lambda zone: [*zone.__getinitargs__()],
                  {list: _spread("datetime.timezone")}),
    "$zone": ("zoneinfo.ZoneInfo", lambda zone: zone.__reduce__()[1][0], {str: _make_zone}),
    "$decimal": ("decimal.Decimal", lambda value: _decimal(value)[0], {str: lambda text: _decimal(text)[1]}),
    "$fraction": ("fractions.Fraction", lambda f: [f.numerator, f.denominator],
                  {list: lambda pair: _found("fractions.Fraction")(*map(int.__index__, pair))}),
    "$uuid": ("uuid.UUID", lambda value: f"{value.int:032x}", {str: "uuid.UUID"}),
    **{f"${name.lower()}": (f"pathlib.{name}", str, {str: f"pathlib.{'Pure' * (name == _FOREIGN)}{name}"})
       for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")},
    "$type": (None, None, {list: lambda held: _make_registered(*held)}),  # each has its own state
}
_OF_TYPE = {kind: tag for tag, (kind, _, _) in _TAGS.items()}
_EACH = frozenset((  # nothing that is much longer than its state
    "$tuple", "$dict", "$bytes", "$date", "$datetime", "$time", "$timedelta", "$decimal", "$uuid", "$type"))


class _Makes(dict):
    """The ways back, by the tag and the type of the state."""

    def __missing__(self, way: Any) -> Any:
        tag, kind = way
        self[way] = make = _found(_TAGS[tag][2][kind])
        return make


class _Ways(dict):
    """By the type of a value: its tag, and what gives its state; or "" and None: it may be registered yet."""

    def __missing__(self, kind: Any) -> Any:
        name = f"{kind.__module__}.".partition(".")[0] + "." + kind.__qualname__
        tag: Any = _OF_TYPE.get(kind) or _OF_TYPE.get(name)
        if tag is None or _found(_TAGS[tag][0]) is not kind:
            return "", None
        self[kind] = way = tag, _found(_TAGS[tag][1])
        return way


_MAKES = _Makes()
_WAYS = _Ways({memoryview: ("$bytes", memoryview.tobytes)})


# -- registered types

_registered: dict[str, tuple[type, Callable[[Any], Any]]] = {}  # by name: class, what makes one


if TYPE_CHECKING:  # a decorated class keeps its type
    @overload
    def register(cls: type[_T], *, name: str | None = None, encode: _Step = None,
                 decode: _Step = None) -> type[_T]: ...
    @overload
    def register(cls: None = None, *, name: str | None = None, encode: _Step = None,
                 decode: _Step = None) -> Callable[[type[_T]], type[_T]]: ...


def register(cls: Any = None, *, name: str | None = None, encode: _Step = None, decode: _Step = None) -> Any:
    """Let instances of `cls` travel by value. Both sides call it, usually in a module that they share.
    Returns `cls`, or without one a decorator: ``@register``, ``@register(name="user")``.

    - `cls` (a class, without its subclasses): dataclasses, enums, named tuples and exceptions know their own
      state, and come back without a call of ``__init__``. Any other class needs `encode` and `decode`.
    - `name` (str, default ``module.qualname``): what the wire calls it, the same on both sides.
    - `encode` (default None): from an instance to what can travel. `decode`: the way back; it should raise
      for what it does not expect. With ``encode=miniplug.ref`` instances are lent: `decode` gets a proxy.

    Raises TypeError for what is no class, or has no state that is known here; ValueError for a name that
    another class has, a class in ``__main__`` without `name`, and a type that travels anyway.
    """
    if cls is None:
        return partial(register, name=name, encode=encode, decode=decode)
    if not isinstance(cls, type):
        raise TypeError(f"register takes a class, not {cls!r}")
    if name is None and cls.__module__ == "__main__":
        raise ValueError(f"{cls.__qualname__} is in __main__, which the other side does not have: give name=")
    if (encode is None) != (decode is None):
        raise TypeError("encode and decode go together")
    if cls in (bool, type(None), list) or _WAYS[cls][0] not in ("", "$type"):
        raise ValueError(f"{cls.__qualname__} travels by itself")
    name = name or _name_of(cls)
    former = _registered.get(name, (cls,))[0]
    if _name_of(former) != _name_of(cls):
        raise ValueError(f"the name {name!r} is that of {former!r} already")
    state, make = (encode, decode) if encode and decode else _own_state(cls)
    _registered[name] = (cls, make)
    _WAYS.pop(former, None)
    _WAYS[cls] = "$type", lambda value: [name, state(value)]
    return cls


def _own_state(cls: Any) -> tuple[Any, Any]:
    if issubclass(cls, enum.Enum):
        # by name; a combination of flags, which need not have one, by its number
        return (lambda member: member._name_ if member._name_ in cls.__members__ else member._value_,
                partial(_make_member, cls))
    fields: Any = None
    if issubclass(cls, BaseException):
        fields = ()
    elif issubclass(cls, tuple):
        fields = getattr(cls, "_fields", None)
    elif all(base.__flags__ & 1 << 9 for base in cls.__mro__[:-1]):  # each is made by a class statement
        fields = getattr(cls, "__dataclass_fields__", None) and [
            field.name for field in _found("dataclasses.fields")(cls)]
    if fields is None or not {*_found("copyreg._slotnames")(cls)} <= {*fields}:
        raise TypeError(f"the state of {cls.__qualname__} is not known: give encode and decode")
    if issubclass(cls, BaseException):
        return _error_state, partial(_make_error, cls)
    return partial(_record_state, fields), partial(_make_record, cls, fields)


def _make_member(cls: Any, state: Any) -> Any:
    if type(state) is str:
        return cls[state]
    known = cls._value2member_map_
    if issubclass(cls, enum.Flag) and (state in known or len(known) < _MAX_COMBINATIONS):
        member = cls(state)
        if member._value_ == state:  # some enums, and Pythons, leave out flags without a name
            return member
    raise ValueError(f"it has no such member, or {_MAX_COMBINATIONS} combinations of its flags already")


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

_encoder: Any = json.encoder
_encode = _encoder.c_make_encoder(  # writes JSON, in pieces; its second argument is 0
    None, None, _encoder.encode_basestring, None, ":", ",", False, False, False)


# -- decoding

_SPACES = " \t\r\n"
_int_limit: Any = getattr(sys, "get_int_max_str_digits", int)  # new in Python 3.8.14 and its like; or 0


def _refuse(*what: Any) -> NoReturn:
    raise ValueError("this is not data")


def _make_integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:  # to read it takes quadratic time
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _scanner(hook: Any = None) -> Any:
    """What reads JSON: gives the value that begins at an index of a text, and where it ends. One made earlier
    is good for texts of up to _MAX_DIGITS: `int` may have no limit, or lose it."""
    integers = int if 0 < _int_limit() <= _MAX_DIGITS else _make_integer
    decoder: Any = json.JSONDecoder(object_hook=hook, parse_int=integers, parse_constant=_refuse)
    return decoder.scan_once


_scan = _scanner()


def _hook(borrow: Any, buffers: Sequence[_Bytes] = ()) -> Callable[[dict[str, Any]], Any]:
    """The scanner's hook: what gives the value that an object of a message with those buffers stands for."""
    left = dict(enumerate(buffers))  # taken once each: a short message must not fill the memory

    def unmark(mapping: dict[str, Any]) -> Any:
        if len(mapping) != 1:
            return mapping
        tag, state = mapping.popitem()
        make = _MAKES.get((tag, type(state)))
        if make is not None:
            return make(state)
        if tag[:1] != "$":
            return {tag: state}
        if tag == "$ref" or tag == "$own":
            return borrow(tag, state)
        if type(state) is int and (tag == "$bytes" or tag == "$bytearray"):
            return _TAGS[tag][0](left.pop(state))
        return _MAKES[tag, type(state)](state)

    return unmark


# -- the codec

def _is_deep() -> bool:
    """Whether most of this thread's stack is used up."""
    try:
        return bool(sys._getframe(sys.getrecursionlimit() // 2))
    except ValueError:
        return False


def _are_plain(kind: type, rows: Any) -> bool:
    """Whether the encoder changes nothing in many short lists or dicts, at C speed."""
    cells = rows
    if kind is dict:
        keys = [*map(type, _flatten(rows))]
        if keys.count(str) < len(keys) or min(map(len, rows)) < 2:
            return False
        cells = map(dict.values, rows)
    elif max(map(len, rows)) >= _MANY:
        return False
    cells = [*_flatten(cells)]
    integers = [cell for cell in cells if type(cell) is int] or [0]
    return {*map(type, cells)} <= _ATOMS and min(integers) >= _LEAST and max(integers) <= _MOST


def _explain(error: Any, label: str | None) -> None:
    """Raise it with its place: the traceback leads through all that holds what cannot travel."""
    steps: list[str] = []
    value, tag, is_state = error, "", False
    for frame, _ in _found("traceback.walk_tb")(error.__traceback__):
        names = frame.f_locals
        if frame.f_code is _Codec._tag.__code__:
            value, tag = names["value"], names.get("tag", "")
        elif frame.f_code is _Codec._fit.__code__:
            step = f"[{names['place']}]"
            if type(value) is dict:
                key = [*value][names["place"] // (2 if tag else 1)]  # with a tag, keys and values by turns
                step = f".{key}" if is_state and not tag else f"[{_shown(key)}]"
            is_state = tag == "$type"
            steps += [] if is_state else [step]
            tag = ""
    if value is not error:  # arguments have numbers, named ones names
        path = "".join((label or ("args" if steps[0][1].isdigit() else "kwargs"), *steps))
        name, why, cause = _name_of(type(value)), str(error), error.__cause__
        if type(error) is not NotSerializable:
            why, cause = _shown(error), error
        raise NotSerializable(f"{path} is of type {name}: {why}", path=path, type_name=name) from cause


class _Codec:
    """Values to bytes and back, for any number of threads. `lend`, `unlend` and `borrow` are what the session
    does with references: `lend` gives the tag and plain state of a value that goes by reference, or None, and
    appends the loan's number to a list, which `unlend` takes back. `arrays`: whether the other side knows
    "$numbers" and "$each"."""

    def __init__(self, lend: Any, unlend: Any, borrow: Any) -> None:
        self.lend, self.unlend, self.borrow = lend, unlend, borrow
        self.arrays = False
        self._scan = _scanner(_hook(borrow))

    def dumps(self, value: Any, label: str | None, lent: list[int] | None = None,
              plain: Any = _PLAIN) -> _Content:
        """The bytes, the buffers beside them, whether there are tags, and the numbers of what was lent: the
        list `lent`, if there is one, which knows each from the start. Raises NotSerializable, which names the
        place in `label`; None is that of a call, (target, method, args, kwargs). `plain`: the types of which
        it looks at none; without str and float it is careful."""
        if lent is None:
            lent = []
        try:
            if label is None:
                target, method, args, kwargs = value
                if not kwargs and plain.issuperset(map(type, args)):
                    return "".join(_encode(value, 0)).encode(), (), 0, lent
                out: Any = plain, [], lent
                fitted, named = self._fit(args, out), kwargs and self._tag(kwargs, out)
                tagged = fitted is not args or named is not kwargs
                whole = target, method, fitted, named
            else:
                its = type(value)
                if its in plain or (its is int and _LEAST <= value <= _MOST):
                    return "".join(_encode(value, 0)).encode(), (), 0, lent
                out = plain, [], lent
                whole = self._tag(value, out)
                tagged = whole is not value
            return "".join(_encode(whole, 0)).encode(), out[1], tagged, lent
        except BaseException as error:
            if plain is _NEVER:
                raise
            return self._dumps_carefully(value, label, lent, error)

    def _dumps_carefully(self, value: Any, label: str | None, lent: list[int], first: Any) -> _Content:
        """The same again: the encoder trips over NaN and lone surrogates, and of what cannot travel the place
        is to be named. Else the value is good, and what was raised `first` a signal handler's."""
        try:
            if not isinstance(first, Exception):
                raise first
            for last in (False, False, True):
                self.unlend(lent)
                try:
                    content = self.dumps(value, label, lent, _NEVER)
                    break
                except RecursionError:
                    if _is_deep():
                        raise
                    why = f"{label or 'the call'} is nested too deeply, or contains itself"
                    raise NotSerializable(why, path=label or "the call") from None
                except Exception as error:
                    if last:
                        _explain(error, label)
                        raise
            if isinstance(first, UnicodeEncodeError) or "JSON compliant" in str(first):
                return content
            raise first
        except BaseException:
            self.unlend(lent)
            raise

    def _fit(self, parts: Any, out: Any) -> Any:
        """The parts of a list or dict; or where the encoder would change one without a word, a tagged copy.
        `out` is `plain`, the buffers that go beside the message, and the numbers of what was lent."""
        plain, copy = out[0], None
        if len(parts) >= _MANY and plain is _PLAIN and type(parts) in _NESTS:  # no dict's
            copy = self._fit_many(parts, out)
            if copy is not None:
                return copy
        for place, part in enumerate(parts):
            its = type(part)
            if its not in plain and (its is not int or not _LEAST <= part <= _MOST):
                fitted = self._tag(part, out)
                if fitted is not part:
                    copy = copy or [*parts]
                    copy[place] = fitted
        return copy or parts

    def _tag(self, value: Any, out: Any) -> Any:
        """The value with its tag, or itself if it needs none; of a list or dict a copy, if there are tags in
        it."""
        kind = type(value)
        if kind is list:
            return self._fit(value, out)
        if kind is tuple:
            return {"$tuple": self._fit(value, out)}
        if (kind is dict and _TEXTS.issuperset(map(type, value))
                and (len(value) != 1 or next(iter(value))[:1] != "$")
                and (out[0] is _PLAIN or not any(map(_SURROGATE.search, value)))):
            state = value.values()
            fitted = self._fit(state, out)
            return value if fitted is state else dict(zip(value, fitted))
        tag, tell = _WAYS[kind]
        if tell is None:
            loan = self.lend(value, out[2])
            if loan is None:
                raise NotSerializable(
                    "register it with miniplug.register, lend it with miniplug.ref, or send plain data")
            return dict((loan,))
        state = tell(value)
        if state is None:
            return value
        if type(state) is list:
            return {tag: self._fit(state, out)}
        if type(state) is str:
            return {tag: state if out[0] is _PLAIN else self._tag(state, out)}
        if len(state) <= _INLINE or len(out[1]) == _MAX_BUFFERS:
            return {tag: binascii.b2a_base64(state, newline=False).decode()}
        out[1].append(state)
        return {tag: len(out[1]) - 1}

    def _fit_many(self, values: Any, out: Any) -> Any:
        """A long list in its shorter form, or itself if all of it is plain; else None."""
        kind: Any = type(values[0])
        if [*map(type, values)].count(kind) < len(values):
            return None
        if kind is str or kind in _NEVER or (kind in (list, dict) and _are_plain(kind, values)):
            return values
        if not self.arrays:
            return None
        if kind in _CODES:
            code = _CODES[kind]
            try:
                data = struct.pack(f"{_ORDER}{len(values)}{code}", *values)
            except struct.error:  # beyond 64 bits
                return None
            return {"$numbers": [code, self._tag(data, out)]}
        tag, tell = _WAYS[kind]
        if tag not in _EACH or kind is dict:
            return None
        if kind is bytes:
            if max(map(len, values)) > _INLINE:
                return None
            tell = _base64
        return {"$each": [tag, self._fit([*map(tell, values)], out)]}

    def loads(self, body: _Bytes, buffers: Sequence[_Bytes], tagged: int, first: Any = None) -> Any:
        """The value. Raises ProtocolError for what is malformed, _Undecodable for what cannot be here.
        `first`: what was raised when this was tried before."""
        try:
            text = str(body, "utf-8")
            scan = self._scan if tagged else _scan
            size = len(text)
            if buffers or size > _MAX_DIGITS:
                scan = _scanner(_hook(self.borrow, buffers) if tagged else None)
            value, end = scan(text, 0)
            if end != size and text[end:].strip(_SPACES):
                raise ValueError("more than one value")
            return value
        except RecursionError:
            if _is_deep():
                raise  # it is the caller's stack that is full
            raise ProtocolError("a malformed value: it is nested too deeply") from None
        except Exception as error:
            if first is not None:
                if isinstance(error, (NotSerializable, DeadReference, MethodNotFound)):
                    raise _Undecodable(error) from error
                raise ProtocolError(f"a malformed value: {_shown(error)}") from None
            first = error
        value = self.loads(bytes(body).lstrip(_SPACES.encode()), buffers, tagged, first)
        if isinstance(first, StopIteration):
            return value  # there were spaces before it
        raise first.__cause__ or first  # a signal handler's: the value itself is good


# -- exceptions

_MAX_PARTS = 1000  # of an exception group, all together
_MAX_LEVELS = 30  # of groups in groups
_TEXT_KEYS = "type", "message", "traceback", "kind"  # of an error's body
_FIELDS = "errno", "strerror", "filename", "filename2", "winerror", "lineno", "name", "path"  # of a builtin
_GROUPS: Any = getattr(builtins, "BaseExceptionGroup", ())  # new in Python 3.11


def _is_ending(kind: type) -> bool:
    """Whether this would end the program, loop or task that calls."""
    cancelled = (getattr(sys.modules.get(name), "CancelledError", SystemExit)
                 for name in ("asyncio.exceptions", "concurrent.futures._base"))
    return issubclass(kind, (SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration, StopAsyncIteration,
                             *cancelled))


def _can_be_raised(kind: type) -> bool:
    """Whether a call may raise this as itself; ours tell of the plugin."""
    is_ours = issubclass(kind, PluginError) and not issubclass(kind, RemoteError)
    return issubclass(kind, Exception) and not is_ours and not _is_ending(kind)


_OWN_ERRORS: dict[str, type[PluginError]] = {kind.__name__: kind for kind in (
    DeadReference, MessageTooLarge, MethodNotFound, NotSerializable, PluginClosed, PluginNotFound)}


def _encode_error(error: Any, own: bool = False, bare: bool = False) -> dict[str, Any]:
    """An exception as the body of an error message. `own`: one of miniplug's is about the call itself.
    `bare`: its texts alone, cut so that they go into any message."""
    kind = type(error)
    try:
        message = str(error)
    except BaseException:  # a __str__ that fails
        message = "(its text could not be made)"
    if own and not bare and kind in _OWN_ERRORS.values():
        return {"type": kind.__name__, "message": message, "own": True, "state": vars(error)}
    body: dict[str, Any] = {"type": _name_of(kind), "message": message, "traceback": _format_traceback(error)}
    if issubclass(kind, RemoteError) and error._body:  # it goes on, from another process
        body.update(type=error._body["type"], message=error._body["message"])
    builtin, is_group = _builtin_of(kind), issubclass(kind, _GROUPS)
    if is_group or (builtin is not Exception and _can_be_raised(kind)):
        body["kind"] = "ExceptionGroup" if is_group else builtin.__name__
    if bare:
        return {key: _cut(text) for key, text in body.items()}
    if "kind" in body:
        state = _error_state(error)
        body.update(args=state.pop("args"), state={
            name: held for name, held in state.items() if name[0] != "_" or name == "__notes__"})
    if is_group:
        body.update(args=[error.message], parts=[*map(_encode_error, error.exceptions)])
    elif _can_be_raised(kind):
        registered = [tell for tag, tell in map(_WAYS.__getitem__, kind.__mro__) if tag == "$type"]
        if registered:
            body["registered"] = registered[0](error)
    return body


def _theirs(frames: Any) -> Any:
    """Of a traceback what comes behind miniplug's own frames, and importlib's."""
    while frames is not None and (
            frames.tb_frame.f_globals is globals() or frames.tb_frame.f_code.co_filename[:7] == "<frozen"):
        frames = frames.tb_next
    return frames


def _format_traceback(error: BaseException) -> str:
    frames = _theirs(error.__traceback__)
    try:
        return "".join(_found("traceback.format_exception")(type(error), error, frames))
    except BaseException:  # such as a __repr__ that calls sys.exit()
        return "(its traceback could not be made)"


def _print_error(error: BaseException) -> None:
    """In one piece: it is one record of the host's log."""
    print(_format_traceback(error), end="", file=sys.stderr)


def _builtin_of(kind: type) -> Any:
    return next(base for base in kind.__mro__ if vars(builtins).get(base.__name__) is base)


def _error_state(error: Any) -> dict[str, Any]:
    """An exception's arguments and attributes, but for those of a RemoteError."""
    base = _builtin_of(type(error))
    state = {name: getattr(base, name).__get__(error) for name in _FIELDS if hasattr(base, name)}
    state.update(vars(error), args=[*error.args])
    if isinstance(error, RemoteError):
        for name in ("type_name", "remote_traceback", "_body", "_origin"):
            state.pop(name, None)
    return state


def _make_error(cls: Any, state: Any) -> Any:
    """An exception from its state, by the __init__ of its builtin base alone, without what would make it
    impossible or costly to raise, print or copy."""
    base, args = _builtin_of(cls), [*state["args"]]
    known = args[:1] if issubclass(base, SyntaxError) else args  # it is printed with a mark at its column
    error = base.__new__(cls, *known)
    base.__init__(error, *known)
    BaseException.__setattr__(error, "args", tuple(args))
    for name, held in state.items():
        is_hidden = name[:2] == "__" and not (name == "__notes__" and type(held) is list)
        if name in _FIELDS and hasattr(base, name):
            if isinstance(held, (str, bytes, os.PathLike)) or (type(held) is int and abs(held) < 1 << 64):
                getattr(base, name).__set__(error, held)
        elif name != "args" and not is_hidden and not callable(getattr(cls, name, 0)):
            vars(error)[name] = held  # where it cannot reach what the interpreter relies on
    return error


class _First:
    """The first base of a type that is made here: what an exception does to its subclasses is not done."""

    __reduce__ = RemoteError.__reduce__

    def __init_subclass__(cls) -> None:
        pass


@lru_cache(None)
def _remote_type(kind: type) -> Any:
    body = {key: getattr(kind, key) for key in ("__module__", "__qualname__")}
    return type(kind)(kind.__name__, (_First, kind, RemoteError), body)


def _decode_error(body: Any) -> Any:
    """The exception to raise for the body of an error message, whatever is wrong with that."""
    body = body if type(body) is dict else {}
    texts = {key: body[key] if type(body.get(key)) is str else "" for key in _TEXT_KEYS}
    body = {**body, **texts, "state": body["state"] if type(body.get("state")) is dict else {}}
    name, message, traceback, _ = texts.values()
    if body.get("own") and name in _OWN_ERRORS:
        own, state = _OWN_ERRORS[name], body["state"]
        kinds = {key: type(held) for key, held in vars(own).items() if key[0] != "_"}  # of what it carries
        return own(message, **{key: state[key] for key, kind in kinds.items()
                               if type(state.get(key)) is (list if kind is tuple else kind)})
    error = _raised_error(body)
    known = {"type_name": name, "message": message, "remote_traceback": traceback, **vars(error)}
    vars(error).update(known, _body=body, _origin=None)  # its own attributes win, but for the last two
    cause = _RemoteTraceback(traceback) if traceback else None
    BaseException.__setattr__(error, "__cause__", cause)  # it may be frozen
    return error


def _raised_error(body: dict[str, Any]) -> Any:
    """The RemoteError for a body: a registered exception too, or a builtin one, or that with no more than the
    text; else it is plain."""
    builtin = {**body, "registered": None}
    for told in (body, builtin, {**builtin, "state": {}, "args": [body["message"]]}):
        try:
            kind, state = _told(told)
            if _can_be_raised(kind):
                error = _make_error(_remote_type(kind), state)
                str(error), repr(error)
                return error
        except Exception:
            continue
    texts = filter(None, (body["type"].rpartition(".")[2], body["message"]))
    return RemoteError(": ".join(texts) or "the plugin failed and did not say how")


def _told(body: dict[str, Any]) -> Any:
    """The type and the state that a body tells."""
    if body.get("registered"):
        error = _make_registered(*body["registered"])
        return type(error), _error_state(error)
    args = body.get("args", [body["message"]])
    if body["kind"] == "ExceptionGroup":
        args = [args[0], _decode_parts(body["parts"])]
    return vars(builtins)[body["kind"]], {**body["state"], "args": args}


def _decode_parts(parts: Any) -> list[Any]:
    count, level = 0, parts
    for _ in range(_MAX_LEVELS):
        count += len(level)
        level = [part for held in level if type(held) is dict for part in held.get("parts", ())]
    if level or count > _MAX_PARTS:
        raise ValueError("too many exceptions")
    return [*map(_decode_error, parts)]


_portable = _Codec(lambda value, lent: None, lambda lent: None, _refuse)  # without references


def _reduce_error(error: RemoteError) -> Any:
    """What copy and pickle keep: the body that it was made from, as on the wire; and its texts, if that holds
    a reference, or is decoded where a type in it is not registered."""
    body = error._body or {"message": str(error)}
    texts = {key: body[key] for key in _TEXT_KEYS if key in body}
    try:
        content, buffers, tagged, _ = _portable.dumps(body, "it")
    except NotSerializable:
        return _decode_error, (texts,)
    return _restore_error, (texts, content, [*map(bytes, buffers)], tagged)


def _restore_error(texts: dict[str, str], *content: Any) -> Any:
    try:
        return _decode_error(_portable.loads(*content))
    except (ProtocolError, _Undecodable):
        return _decode_error(texts)


# === 3. channel =========================================================================================
#
# Whole messages over a connection that multiprocessing.connection has made, in its framing: a 4-byte
# big-endian length, or -1 and 8 bytes, and then that much. On Windows a frame is a message of a named pipe.
# A message is a frame of header and body, and one for each of its buffers.
#
# A signal handler may raise between any two steps. So one call of C both does and records what is read or
# written (`list.extend(map(recv, ...))`), what belongs together is one tuple, replaced by one store, and each
# other step may be repeated.

_WIRE_VERSION = 1
_HEADER = struct.Struct("!BBHIQQ")  # version, kind, flags, buffers, the call, on behalf of which call
_FRAME = struct.Struct("!iBBHIQQ")  # the same behind a length
_HEAD = _HEADER.size
_LENGTH, _LONG = struct.Struct("!i"), struct.Struct("!iQ")
_HELLO_LIMIT = 4096  # bytes of a frame of the handshake
_READ_SIZE = 1 << 16
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # SIGPIPE at its default would end the host
_DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0) | _NO_SIGNAL
_FOREVER = 2e6  # seconds; more would be too much for poll()
_LOOK_AGAIN = 1.0  # seconds after which who sleeps looks again, as a handler that raises may lose a wake-up
_TOGETHER = 32  # messages that leave with one system call at most
_FULL, _FULL_BYTES = 256, 1 << 24  # messages, bytes; while more is left to be written others wait
_POSTED_LIMIT = 1 << 17  # messages; more that the other side does not take end the connection
_IN_TIME = "no answer has come in time"
_IS_CLOSING = "the plugin is shutting down"
_ONCE = ((),)  # for starmap: call it once, without arguments

_get_ident = threading.get_ident
_consume: Any = deque(maxlen=0).extend  # run an iterator to its end, in one step
_ref_to: Any = _import("_weakref").ref


class _Broken(ConnectionError):
    """The connection has ended, for the OSError or EOFError that is the argument."""


class _Late(TimeoutError):
    """The deadline has passed."""


def _left(deadline: float | None) -> float:
    """Seconds until a time.monotonic() deadline, not below 0; without one -1, which stands for "no limit"."""
    return -1 if deadline is None else min(_FOREVER, max(0.0, deadline - time.monotonic()))


def _is_strike(error: OSError) -> bool:
    """Whether a signal handler has raised this in a system call: it comes from elsewhere, or has no errno.
    Else raises _Broken, unless the call would only have waited."""
    trace: Any = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    if error.errno is None or trace.tb_frame.f_globals.get("__name__") != __name__:
        return True  # not raised here: a frame that holds it would be a cycle, and keep a seat
    if not isinstance(error, BlockingIOError):
        raise _Broken(error) from None
    return False


def _quietly(function: Callable[..., Any], *arguments: Any, kind: Any = OSError) -> None:
    """Call a function, of which a `kind` of error does not matter."""
    try:
        function(*arguments)
    except kind:
        pass


def _count_alone() -> int:
    """How many references are seen to what only one place has, by a function that looks at it there."""
    place = {0: [0]}
    mine = place.get(0)
    return sys.getrefcount(mine)


_ALONE = _count_alone()


class _Seat(dict):
    """Who reads, or who writes: at most one thread at a time. For any thread; no lock.

    One step takes it, `setdefault(0, mine)`, and the first of a `finally` gives it back, with no call before,
    behind which a handler could strike. `mine` is a list with the thread's ident, made for this very taking:
    so a finalizer or handler knows a seat that its own thread has, further down. Before Python 3.11 one may
    strike there all the same: then the seat is lost, and nothing else refers to `mine`.
    """

    __slots__ = ()

    def __missing__(self, key: int) -> None:
        return None  # it is free

    def holder(self) -> int:
        """The thread's ident; 0 if the seat is free or lost."""
        mine = self.get(0)
        return 0 if mine is None or sys.getrefcount(mine) <= _ALONE else mine[0]

    def mend(self) -> None:
        """Free the seat if it is lost. For threads in which no handler strikes."""
        mine = self.get(0)
        if mine is not None and sys.getrefcount(mine) <= _ALONE:
            is_same = map(operator.is_, self.values(), (mine,))
            _consume(map(self.pop, itertools.compress((0,), is_same)))  # one step: it may be another's by now


class _Channel:
    """Messages over a connection, which it takes over; `_PipeChannel` has what is different on Windows.

    Any thread may write or shut down; one at a time receives or closes, and has `state`. `writer` is the seat
    of who writes, and protects `batch`.

    `state`: messages that have come; one whose buffers have not all come (see `_take`); the beginning of a
    frame's length; what was read behind that, in a list; a frame that is not whole, as (file, size, a list of
    how many bytes have come). Before `begin` the frames of the handshake come instead of messages.
    """

    stuck: Any = staticmethod(lambda *error: None)  # is called before a writer waits: somebody has to read
    later: Any = stuck  # when another thread has to go on writing
    gone: Any = stuck  # with the error, when the descriptors were closed beneath us
    _ticks = False  # whether each second a read that waits ends: so most deadlines need no poll()
    _gathers = True  # whether frames that are short may leave as one chunk
    limit = 0  # bytes of a message that comes, with its header; 0 in the handshake
    send_limit = _short = 0  # bytes of one that goes, without; and of one that is a single chunk

    def __init__(self, connection: Any) -> None:
        self.state: Any = deque(), None, b"", [], None
        self.posted: deque[list[_Bytes]] = deque()  # messages to be written, in chunks
        self.batch: Any = None  # chunks that are being written, and what each step has done
        self.writer = _Seat()
        self._take_over(connection)

    def _take_over(self, connection: Any) -> None:
        with connection:
            sock = socket.socket(fileno=os.dup(connection.fileno()))
        self.sock: Any = sock
        self._recv, self._send = sock.recv, sock.send
        try:
            self._end = sock.dup()  # ends the connection when somebody else has closed that number
        except OSError:
            sock.close()
            raise
        sock.setblocking(True)
        if sys.platform == "darwin":
            sock.setsockopt(socket.SOL_SOCKET, 0x1022, 1)  # SO_NOSIGPIPE, for want of MSG_NOSIGNAL
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        select = _import("select")
        self._readable = select.poll()  # select() takes no descriptor over 1023
        self._readable.register(sock, select.POLLIN)

    def begin(self, limit: int, send_limit: int) -> None:
        """From now on messages come, of at most so many bytes, and go."""
        self.limit, self.send_limit = limit + _HEAD, send_limit
        self._short = min(send_limit, _READ_SIZE - _HEAD - 1)

    def receive(self, deadline: float | None = None) -> deque[_Message]:
        """The messages that have come, at least one; who takes one removes it. Raises _Late, _Broken and
        ProtocolError."""
        while not self.state[0]:
            _, partial, rest, steps, cut = self.state
            try:
                if cut is not None:
                    self._fill(partial, cut, deadline)
                    continue
                if not steps:
                    if deadline is not None and (deadline - time.monotonic() < 1.0 or not self._ticks):
                        self._await_more(deadline)
                    steps.extend(map(self._recv, (_READ_SIZE,)))  # one step
            except OSError as error:
                if _is_strike(error):
                    raise
                continue
            if not steps[0]:
                raise _Broken(EOFError())
            self.state = self._parse(rest + steps[0] if rest else steps[0], partial)
        return self.state[0]

    def _await_more(self, deadline: float | None) -> None:
        if deadline is None:
            return
        if self.limit and not self._ticks:  # not before a call has a deadline: who is idle sleeps
            _quietly(self._tick)
        if not self._readable.poll(_left(deadline) * 1000):
            raise _Late(_IN_TIME)

    def _tick(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 1, 0))
        self._ticks = True

    def _fill(self, partial: Any, cut: Any, deadline: float | None) -> None:
        file, size, counts = cut
        have = sum(counts)
        if have < size:
            self._await_more(deadline)
            counts[:] = [have]
            with file.getbuffer() as view, view[have:] as missing:
                counts.extend(map(self.sock.recv_into, (missing,)))
            if not counts[-1]:
                raise _Broken(EOFError())
        else:
            come: deque[_Message] = deque()
            self.state = come, self._take(come, file.getvalue(), partial), b"", [], None

    def _parse(self, data: bytes, partial: Any) -> Any:
        """What `state` is with these bytes."""
        come: deque[Any] = deque()
        at, size = 0, len(data)
        while size - at >= 4:
            if partial is None and size - at >= 28:  # the usual case: a short message without buffers
                length, version, kind, flags, count, number, parent = _FRAME.unpack_from(data, at)
                end = at + 4 + length
                if end <= size and not count and version == _WIRE_VERSION and _HEAD <= length <= self.limit:
                    come.append((kind, flags, number, parent, data[at + 28 : end], ()))
                    if end == size:
                        return come, None, b"", [], None
                    at = end
                    continue
            start, (length,) = at + 4, _LENGTH.unpack_from(data, at)
            if length == -1:
                start = at + 12
                if start > size:
                    break
                _, length = _LONG.unpack_from(data, at)
            self._check_size(length, partial)
            end = start + length
            if end > size:
                file = io.BytesIO(bytes(length))  # it gives its bytes away without a copy
                return come, partial, b"", [], (file, length, [file.write(data[start:])])
            partial = self._take(come, data[start:end], partial)
            at = end
            if not self.limit:  # what follows may be a message
                return come, None, b"", [data[at:]] if at < size else [], None
        return come, partial, data[at:], [], None

    def _take(self, come: deque[Any], frame: bytes, partial: Any) -> Any:
        """A message that is complete with this frame goes to `come`. Of any other returns what there is:
        (message, how many buffers it has, how many have come, bytes that the rest may have)."""
        if not self.limit:
            come.append(frame)
            return None
        if partial is None:
            version, kind, flags, count, number, parent = _HEADER.unpack(frame[:_HEAD].ljust(_HEAD, b"\0"))
            if version != _WIRE_VERSION or count > _MAX_BUFFERS or len(frame) < _HEAD:
                raise ProtocolError(f"no header: {len(frame)} bytes, wire version {version}, {count} buffers")
            message: Any = kind, flags, number, parent, frame[_HEAD:], []
            have, room = 0, self.limit - len(frame)
        else:
            message, count, have, room = partial
            message[5][have:] = [frame]  # this may be a repetition
            have, room = have + 1, room - len(frame)
        if have < count:
            return message, count, have, room
        come.append(message)
        return None

    def _check_size(self, size: int, partial: Any) -> None:
        limit = (self.limit or _HELLO_LIMIT) if partial is None else partial[3]
        if not 0 <= size <= limit:
            raise ProtocolError(f"a frame of {size} bytes, where at most {limit} are allowed")

    @staticmethod
    def frame(body: _Bytes, head: bytes = b"") -> list[_Bytes]:
        size = len(head) + len(body)
        length = _LENGTH.pack(size) if size <= 0x7FFFFFFF else _LONG.pack(-1, size)
        return [length + head + body] if size < _READ_SIZE else [length + head, body]

    def send(self, kind: int, flags: int, number: int, content: _Content, parent: int = 0,
             wait: bool = True, deadline: float | None = None) -> None:
        """Write a message with what the codec has made. Raises MessageTooLarge, and what `write` does."""
        body, buffers, tagged, lent = content
        size = len(body)
        if size > self._short or buffers:
            size = self.check_size(content)
            head = _HEADER.pack(_WIRE_VERSION, kind, flags | tagged, len(buffers), number, parent)
            message = self.frame(body, head)
            for buffer in buffers:
                message += self.frame(buffer)
            if size < _READ_SIZE and self._gathers:
                message = [b"".join(message)]
        else:  # to copy little is cheaper than to gather
            head = _FRAME.pack(size + _HEAD, _WIRE_VERSION, kind, flags | tagged, 0, number, parent)
            message = [head + body]
        self.write(message, lent, wait, deadline)

    def check_size(self, content: _Content, more: int = 0) -> int:
        """The size of a message. Raises MessageTooLarge for what, with so many bytes more, is none."""
        size, limit = len(content[0]) + sum(map(len, content[1])) + more, self.send_limit
        if size > limit:
            text = f"a message of {size} bytes, where the other side takes {limit}: raise its max_message"
            raise MessageTooLarge(text, size=size, limit=limit)
        return size

    def write(self, message: list[_Bytes], lent: list[int] | None = None, wait: bool = True,
              deadline: float | None = None) -> None:
        """Write a message, in chunks, or leave it to the thread that writes; an empty one: go on with what is
        left. From the very step on that has it written for sure, `lent` is empty.

        What the other side does not take at once is left to `later`, or with `wait` and no deadline written
        here. With `wait`, wait first while much is left: past the deadline raises _Late, and sends nothing.
        """
        writer, posted, mine = self.writer, self.posted, [_get_ident()]
        if posted:
            self._await_turn(wait, deadline)
        try:
            if writer.setdefault(0, mine) is mine and not (posted or lent or self.batch) and message:
                counts: list[Any] = []
                self.batch = message, counts
                if self._transmit(message, counts, False):
                    self.batch = None
            else:
                # one step; the second part of it empties `lent`, and adds nothing
                clear: Any = itertools.compress(map(list.clear, [lent] if lent else ()), (0,))
                posted.extend(itertools.chain([message] if message else (), clear))
                if writer.setdefault(0, mine) is not mine:  # who writes may have looked at `posted` before
                    return
            if posted or self.batch is not None:
                self._write_all(wait and deadline is None)
        except _Broken:
            posted.clear()
            self.batch = None
            self.shutdown()  # what had come before is still read, up to the end of the connection
        finally:
            if writer[0] is mine:
                del writer[0]
            if (posted or self.batch is not None) and not writer.holder():
                self.later()  # what is left here, or was just now; or by who has lost the seat

    def _await_turn(self, wait: bool, deadline: float | None) -> None:
        posted = self.posted
        if len(posted) > _POSTED_LIMIT:
            self.shutdown()
        while wait and (len(posted) > _FULL or sum(map(len, itertools.chain(*posted.copy()))) > _FULL_BYTES):
            holder = self.writer.holder()
            if holder in (0, _get_ident()):  # this very thread writes, further down
                return
            if _left(deadline) == 0:
                raise _Late
            self.stuck()
            time.sleep(0.005)

    def _write_all(self, blocking: bool) -> None:
        posted, full = self.posted, False
        while self.batch is not None or posted:
            if self.batch is None:
                self.batch = ([], [])
                once = itertools.repeat((), min(len(posted), _TOGETHER))
                self.batch[0].extend(_flatten(itertools.starmap(posted.popleft, once)))
            chunks, counts = self.batch
            if self._transmit(chunks, counts, full):
                self.batch = None
            elif not blocking:
                return
            else:
                self.stuck()
                full = True

    def _transmit(self, chunks: list[_Bytes], counts: list[Any], blocking: bool) -> bool:
        """Write the batch. False if the other side takes no more for now."""
        flags = _NO_SIGNAL if blocking else _DONT_WAIT
        try:
            if len(chunks) == 1 and not counts:  # the usual case
                counts.extend(map(self._send, chunks, (flags,)))  # one step
                if counts[0] == len(chunks[0]):
                    return True
            while True:
                have, rest = sum(counts), []
                for chunk in chunks:
                    if have < len(chunk):
                        rest.append(memoryview(chunk)[have:] if have else chunk)
                    have = max(0, have - len(chunk))
                if not rest:
                    return True
                counts.extend(map(self.sock.sendmsg, (rest[:1000],), ((),), (flags,)))  # IOV_MAX is 1024
        except OSError as error:
            if _is_strike(error):
                raise
            return False

    def shutdown(self) -> None:
        """End the connection both ways, and wake whoever reads or writes."""
        try:
            self._end.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            errno = _import("errno")
            if error.errno in (errno.EBADF, errno.ENOTSOCK):
                self.gone(error)

    def abandon(self) -> None:
        """In a forked child, which ends if it would still write."""
        self.write = lambda *what: _leave_fork(None)  # type: ignore[method-assign]
        self.sock.close()
        self._end.close()

    def close(self) -> None:
        self.shutdown()
        # a number that was closed beneath us may be another file's now
        _quietly(lambda: os.path.sameopenfile(self.sock.fileno(), self._end.fileno()) or self.sock.detach())
        _quietly(self.sock.close)
        _quietly(self._end.close)


class _PipeChannel(_Channel):
    """Messages over a named pipe of Windows, by overlapped reads and writes. One that is under way stays so
    when its caller leaves; the next one goes on with it, as (operation, status).

    What is waited for are events, never the handle. One call of C takes that and begins with it, so it may be
    closed at any time.
    """

    _gathers = False  # each is a message of the pipe

    def _take_over(self, connection: Any) -> None:
        self._api = _import("_winapi")
        self._connections = [connection]  # taken out by who closes it
        self._handles = [connection.fileno()]  # or 0, with which nothing begins

    @staticmethod
    def frame(body: _Bytes, head: bytes = b"") -> list[_Bytes]:
        return [_LENGTH.pack(0) + head + body]  # the length is not sent

    def receive(self, deadline: float | None = None) -> deque[_Message]:
        while not self.state[0]:
            come, partial, have, reading, _ = self.state
            if not reading:
                self._step(reading, map(self._api.ReadFile, self._handles, (max(8192, len(have)),), (True,)))
            result = self._result(reading[0], _left(deadline))
            if result is None:
                raise _Late(_IN_TIME)
            have += bytes(reading[0][0].getbuffer())
            self._check_size(len(have), partial)
            if result[1] == self._api.ERROR_MORE_DATA:
                self.state = come, partial, have, [], None
            else:
                come = deque()
                self.state = come, self._take(come, have, partial), b"", [], None
        return self.state[0]

    def _transmit(self, chunks: list[_Bytes], counts: list[Any], blocking: bool) -> bool:
        """`counts` are the writes that have begun, one for each chunk, which is a frame."""
        while not counts or self._result(counts[-1], -1 if blocking else 0) is not None:
            if len(counts) == len(chunks):
                return True
            frame = memoryview(chunks[len(counts)])[_LENGTH.size :]
            self._step(counts, map(self._api.WriteFile, self._handles, (frame,), (True,)))
        return False

    def _result(self, begun: Any, seconds: float) -> Any:
        """How many bytes were read or written, and an error's number. None past so many seconds."""
        operation, status = begun
        wait = self._api.INFINITE if seconds < 0 else int(seconds * 1000 + 0.999)
        while status == self._api.ERROR_IO_PENDING:
            try:
                if self._api.WaitForMultipleObjects([operation.event], False, wait) == self._api.WAIT_TIMEOUT:
                    return None
                break
            except InterruptedError:  # by a signal
                pass
        results: list[Any] = []
        self._step(results, map(operation.GetOverlappedResult, (True,)))
        if results[0][1] == self._api.ERROR_OPERATION_ABORTED:  # by `shutdown`
            raise _Broken(EOFError())
        return results[0]

    @staticmethod
    def _step(results: list[Any], calls: Iterable[Any]) -> None:
        try:
            results.extend(calls)  # one step
        except OSError as error:
            if _is_strike(error):
                raise

    def shutdown(self) -> None:
        self._handles[0] = 0
        try:
            connection = self._connections.pop()
        except IndexError:
            return  # somebody else does, or has
        batch = self.batch or ((), ())
        for operation, _ in (*self.state[3], *batch[1][-1:]):  # what is under way has to end before
            _quietly(operation.cancel)
            _quietly(operation.GetOverlappedResult, True)
        connection.close()

    close = shutdown


# -- where a connection begins: with Listener and Client of multiprocessing.connection, but not their key
# exchange, which blocks accept() for everybody, can be relayed, and needs MD5 before Python 3.12


def _transport(address: str) -> str:
    return "pipe" if address.startswith("\\\\") else "unix" if "/" in address else "tcp"


_channel_over = _PipeChannel if _WINDOWS else _Channel


def _endpoint(address: str) -> Any:
    """What Listener and Client call an address. Raises ValueError for none of this machine."""
    if _transport(address) == ("pipe" if _WINDOWS else "unix"):
        return address
    port = None if _WINDOWS else re.fullmatch(r"(127\.[0-9.]+):([0-9]{1,5})", address)
    if port and int(port[2]) < 1 << 16:
        return port[1], int(port[2])
    kinds = r"\\.\pipe\NAME" if _WINDOWS else "a path with a / in it, or 127.0.0.1:PORT"
    raise ValueError(f"{address!r} is no address: here that is {kinds}")


def _connect(address: str, timeout: float) -> _Channel:
    """A channel to an address. Raises ValueError, OSError, past the timeout TimeoutError."""
    client, target = _import("multiprocessing.connection").Client, _endpoint(address)
    return _channel_over(_in_pool(client, target, timeout=timeout))  # one that comes late closes itself


def _temp_folders() -> list[str]:
    bases = os.environ.get("TMPDIR"), "/tmp", "/var/tmp", os.environ.get("XDG_RUNTIME_DIR")
    return [base for base in bases if base and os.path.isabs(base)]


_listeners: set[_Listener] = set()  # those that are open: a forked child closes its copies


class _Listener:
    """Where the other side connects: a socket in a folder of its own, which only this user can enter, a named
    pipe, or loopback TCP. Raises OSError and ValueError for an `address` that will not do. One thread may
    accept, another close."""

    def __init__(self, address: str = "") -> None:
        self.folder = ""  # the one that it has made
        self.passed_over: list[str] = []  # the temp folders that would not do, and why
        if _WINDOWS and not address:
            address = rf"\\.\pipe\miniplug-{os.urandom(16).hex()}"
        self.address = self._bind(address) if address else self._bind_anywhere()
        _listeners.add(self)

    def _bind(self, address: str) -> str:
        target, is_path = _endpoint(address), _transport(address) == "unix"
        if is_path:
            address = target = os.path.abspath(address)
            _remove_stale(address)
        try:
            self._listener = _import("multiprocessing.connection").Listener(target, backlog=4096)
            if is_path:
                os.chmod(address, 0o600)
        except OSError as error:  # it has named no file; without a number the path is too long
            errno = error.errno or _import("errno").ENAMETOOLONG
            raise OSError(errno, error.strerror or str(error), address) from None
        if not _WINDOWS:  # who accepts looks now and then whether that is still wanted
            self._listener._listener._socket.settimeout(0.5)
        return f"{target[0]}:{self._listener.address[1]}" if isinstance(target, tuple) else address

    def _bind_anywhere(self) -> str:
        for base in _temp_folders():
            folder = os.path.join(base, f"miniplug-{os.urandom(8).hex()}")
            try:
                os.mkdir(folder, 0o700)
                self.folder = folder  # from here on it is ours to remove
                return self._bind(os.path.join(folder, "s"))
            except OSError as error:
                _quietly(os.rmdir, self.folder)
                self.folder = ""
                self.passed_over.append(f"{base} ({error.strerror or error})")
        return self._bind("127.0.0.1:0")  # no folder to be had: the key alone keeps others out

    def accept(self) -> _Channel:
        """The next connection. Raises OSError, also when half a second brings none, but not on Windows."""
        return _channel_over(self._listener.accept())

    def close(self) -> None:
        _listeners.discard(self)
        _quietly(self._listener.close)  # which removes its socket
        _quietly(os.rmdir, self.folder)


def _remove_stale(path: str) -> bool:
    """Remove the socket of a process that was killed, at which nobody listens, and the folder made for it.
    False if somebody listens."""
    try:
        if not _WINDOWS and _import("stat").S_ISSOCK(os.lstat(path).st_mode):
            _connect(path, 1.0).close()
            return False
    except ConnectionRefusedError:
        folder = os.path.dirname(path)
        _quietly(os.unlink, path)
        if re.fullmatch("miniplug-[0-9a-f]{16}", os.path.basename(folder)):
            _quietly(os.rmdir, folder)
    except (OSError, RuntimeError):
        pass  # there is none; or no thread is to be had
    return True


# === 4. handshake =======================================================================================
#
# Three passes, mutual, after ISO/IEC 9798-4: the host's greeting; the plugin's, and its proof; what the host
# chooses, or a refusal, and its proof. A proof is an HMAC-SHA256 over the role's name, the address and all
# messages before it: nothing can be changed, replayed, reflected or relayed. Until the other side's was
# right, nothing is read but short JSON.

_HELLO_SECONDS = 5.0


if TYPE_CHECKING:
    class _Handshake(NamedTuple):
        protocol_version: int = 1
        magic_cookie_key: str = ""
        magic_cookie_value: str = ""
else:
    _Handshake = namedtuple("_Handshake", "protocol_version magic_cookie_key magic_cookie_value",
                            defaults=(1, "MINIPLUG_COOKIE", "b7fb5a3f2d4a4c0e9a5f6b1c"))


class Handshake(_Handshake):
    """What a host and its plugins agree on beforehand. Immutable.

    - `protocol_version` (int, default 1): of the interface that they share; count it up when that changes.
    - `magic_cookie_key`, `magic_cookie_value` (str): an environment variable that the host sets. It tells who
      starts a plugin by hand, or the wrong program, what is wrong. It is no security measure.
    """

    __slots__ = ()


_Terms = namedtuple("_Terms", "protocol_version max_message features")


def _sha256() -> Any:
    """Python's own, if it has one: to load OpenSSL for hmac would take a tenth of a plugin's start."""
    try:
        return _import("_sha256" if sys.version_info < (3, 12) else "_sha2").sha256
    except ImportError:
        return _import("hashlib").sha256


class _Hello:
    """One handshake over one channel, for either role, on one thread. Raises AuthenticationError,
    HandshakeError, ProtocolError and OSError."""

    def __init__(self, channel: _Channel, address: str, key: bytes, role: str) -> None:
        self._channel, self._address, self._key, self._role = channel, address, key, role
        self._other = "plugin" if role == "host" else "host"
        self._said: list[Any] = []  # all messages of either side
        self._deadline = time.monotonic() + _HELLO_SECONDS

    def say(self, **message: Any) -> None:
        self._said.append("".join(_encode(message, 0)).encode())
        self._channel.write(self._channel.frame(self._said[-1]))

    def hear(self) -> dict[str, Any]:
        self._said.append(self._channel.receive(self._deadline).popleft())
        try:
            message = json.loads(str(self._said[-1], "utf-8"))  # of bytes it would take UTF-16, too
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise ProtocolError("what came is no handshake")
        return message

    def greet(self, versions: Sequence[int], max_message: int, *features: str, **others: Any) -> None:
        self.say(miniplug=_WIRE_VERSION, role=self._role, nonce=os.urandom(16).hex(),
                 protocol_versions=list(versions), max_message=max_message,
                 features=["arrays", *features], **others)

    def hear_greeting(self) -> dict[str, Any]:
        theirs = self.hear()
        versions: Any = theirs.get("protocol_versions")
        kinds = type(versions), type(theirs.setdefault("features", [])), type(theirs.get("max_message"))
        said = theirs.get("miniplug"), theirs.get("role"), *kinds
        if said != (_WIRE_VERSION, self._other, list, list, int) or {*map(type, versions)} - {int}:
            raise ProtocolError(f"it does not greet as a {self._other} of wire version {_WIRE_VERSION}")
        return theirs

    def prove(self) -> None:
        self.say(proof=self._mac(self._role))

    def check(self) -> None:
        expected = self._mac(self._other)
        proof = ascii(self.hear().get("proof"))
        if not _import("_operator")._compare_digest(ascii(expected), proof):
            raise AuthenticationError(f"the {self._other} at {self._address} does not hold the key")

    def _mac(self, role: str) -> str:
        parts = role.encode(), os.fsencode(self._address), *self._said
        said = b"".join(struct.pack("!I", len(part)) + part for part in parts)
        sha256 = _sha256()
        key = (sha256(self._key).digest() if len(self._key) > 64 else self._key).ljust(64, b"\0")
        inner, outer = (bytes(byte ^ pad for byte in key) for pad in (0x36, 0x5C))
        return sha256(outer + sha256(inner + said).digest()).hexdigest()

    def as_host(self, versions: Sequence[int], max_message: int) -> _Terms:
        self.greet(versions, max_message, codec="json")
        theirs = self.hear_greeting()
        self.check()
        cookie, offered, refusal = theirs.get("cookie"), theirs["protocol_versions"], ""
        version = max({*versions}.intersection(offered), default=None)
        if isinstance(cookie, dict) and cookie.get("matches") is not True:
            refusal = f"it expects another magic cookie in {cookie.get('key')!r}: give launch() its handshake"
        elif version is None:
            refusal = f"no common protocol version: the host has {list(versions)}, the plugin has {offered}"
        self.say(**{"refusal": refusal} if refusal else {"protocol_version": version, "codec": "json"})
        self.prove()
        if refusal:
            raise HandshakeError(refusal, host={"protocol_versions": list(versions)}, plugin=theirs)
        return _Terms(version, theirs["max_message"], theirs["features"])

    def as_plugin(self, versions: Sequence[int] | None, max_message: int, cookie: Mapping[str, Any],
                  *features: str) -> _Terms:
        """`versions` None: whatever the host has."""
        theirs = self.hear_greeting()
        versions = theirs["protocol_versions"] if versions is None else versions
        self.greet(versions, max_message, *features, codecs=["json"], cookie=dict(cookie))
        self.prove()
        choice = self.hear()
        self.check()
        if "refusal" in choice:
            raise HandshakeError(str(choice["refusal"]), host=theirs)
        if choice.get("protocol_version") not in versions or choice.get("codec") != "json":
            raise ProtocolError("the host chose what the plugin has not offered")
        return _Terms(choice["protocol_version"], theirs["max_message"], theirs["features"])


def _come_in(address: str, greet: Callable[[_Channel], _Terms]) -> tuple[_Channel, _Terms]:
    """Connect to a door and run the handshake; at a TCP port, which strangers may crowd, again and again."""
    # in a crowd one try of the system's takes seconds
    limit, patience = (0.5, 30.0) if _transport(address) == "tcp" else (_HELLO_SECONDS, 0.0)
    deadline = time.monotonic() + patience
    while True:
        try:
            channel = _connect(address, limit)
            try:
                return channel, greet(channel)
            except BaseException:
                channel.close()
                raise
        except (ConnectionError, TimeoutError) as error:
            if isinstance(error, (PluginError, ConnectionRefusedError)) or time.monotonic() >= deadline:
                raise


class _Door:
    """Where the other side comes in, if it holds the key. Each caller is greeted on a thread of its own, and
    holds up nobody.

    `greet` runs the handshake; `arrived` is called on that thread with the channel, and the terms or, for one
    that is refused, the HandshakeError. Unless it `stays` open, the door closes before the first comes in.
    Any thread may close it. `_lock` protects `_open` and `callers`.
    """

    _CROWD = 128  # callers in the handshake at once

    def __init__(self, greet: Callable[[_Channel, str], _Terms], arrived: Callable[[_Channel, Any], None],
                 address: str = "", stays: bool = False) -> None:
        self.listener = _Listener(address)
        self._greet, self._arrived, self._stays = greet, arrived, stays
        self._lock, self._open = threading.Lock(), True
        self.callers: list[_Channel] = []
        try:
            self._thread = _start_thread("miniplug-door", self._accept)
        except BaseException:
            self.listener.close()
            raise

    def _accept(self) -> None:
        while self._open:
            try:
                channel = self.listener.accept()
            except (OSError, AttributeError):  # nobody for a while, no descriptor, or closed just now
                time.sleep(0.01)
                continue
            with self._lock:
                if not self._open:
                    channel.close()
                    return
                self.callers.append(channel)
                if len(self.callers) > self._CROWD:  # by chance: the oldest would be just proving the key
                    self.callers.pop(os.urandom(1)[0] % self._CROWD).shutdown()
            _aside("miniplug-hello", self._meet, channel)

    def _meet(self, channel: _Channel) -> None:
        terms: Any = None
        try:
            terms = self._greet(channel, self.listener.address)
        except HandshakeError as error:
            self._arrived(channel, error)
        except Exception:
            pass  # a stranger
        with self._lock:
            enters = terms is not None and self._open and channel in self.callers
            self._open = self._open and (self._stays or not enters)
            self.callers = [each for each in self.callers if each is not channel]
        if enters:  # who hears of it may close the door
            self._arrived(channel, terms)
        else:
            channel.close()

    def close(self) -> None:
        with self._lock:
            self._open = False
            for channel in self.callers:
                channel.shutdown()
        if _WINDOWS:  # where nothing else ends `accept`
            _quietly(lambda: _connect(self.listener.address, 1.0).close(), kind=(OSError, RuntimeError))
            _quietly(self._thread.join, 2.0, kind=RuntimeError)  # it may never have begun
        self.listener.close()


# === 5. session =========================================================================================
#
# Calls, answers and streams, both ways, over one channel. The two sides are one class: each numbers its own
# calls, and answers those of the other. The rooms, each with a job of its own:
#
#     _Pool       threads, for all sessions: what is to be done, now or at a time
#     _Reader     the seat: who reads what has come, and where it goes
#     _Attendant  who reads while no caller does, and runs what is quick at once
#     _Caller     our calls: send, wait, give up
#     _Runner     their calls: decode, run, answer
#     _Producer   one of their calls that is answered by a stream
#     _Session    what these share, and the end
#
# Reading. Whoever holds the seat reads, and only routes: an answer to its call's inbox, for who waits to
# decode it; a call made on behalf of one of ours to the thread, or the loop, that waits for that one; any
# other to the pool. A thread that waits takes the seat if it is free, else it sleeps.
#
# Sleeping. A sleeper first announces itself, then looks again; a waker first acts, then looks for sleepers.
# So no wake-up is lost, unless a handler raises in between: a sleeper looks again after a second.
#
# What a signal handler raises strikes the main thread between any two steps. What must not be struck a thread
# of the pool does. It is told by one call of C (`_pool.put`, `_move`), mostly the first thing in an `except`,
# where nothing strikes before it (from Python 3.11 on). Every other step may be repeated.
#
# Streams. A call may be answered by items, several to a message, until an end or an error. The caller may
# leave _WINDOW of them unread, and gives credit for what it has read. A producer without credit holds no
# thread.

_CALL, _NOTIFY, _RESULT, _ERROR, _ITEM, _END = 1, 2, 3, 4, 5, 6
_CREDIT, _CANCEL, _RELEASE, _PING, _PONG, _SHUTDOWN = 7, 8, 9, 10, 11, 12
_TAGGED, _IGNORABLE, _STREAM = 1, 2, 4
_CALL_TYPES = (str, list, dict)  # of what follows a call's target: method, arguments, those with names
_ANSWER_TYPES = _ATOMS | _NESTS | {bytes}  # what a method returns, mostly
_ANSWERS = frozenset((_RESULT, _ERROR, _ITEM, _END, _PONG))
_NOTHING: Any = (b"", (), 0, [])  # a content without a value
_ENDED: Any = (99, 0, 0, 0, b"", ())  # in every inbox, once the connection has ended
_CLOSED: Any = (_END, 0, 0, 0, b"", ())  # in the inbox of a call that was given up
_WINDOW = 64  # items of a stream that may be on their way or unread
_GATHER = 0.001  # seconds after a message of items in which the next ones wait for each other
_QUICK = 0.001  # seconds; a method whose last three runs took less is run by the thread that reads
_LOOK = 0.5  # seconds between two looks whether such a run takes long after all
_LAZY = 0.01  # seconds after a call until the attendant reads, where only what is lent asks for it
_IDLE_SECONDS = 10.0  # after which a thread of the pool that has nothing to do ends
_NESTED = 256  # calls on behalf of ours for which no thread waits that run at once
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
    """A lock used as a wake-up: to wait is to acquire it."""
    gate = threading.Lock()
    gate.acquire()
    return gate


def _open(gate: Any) -> None:
    _quietly(gate.release, kind=RuntimeError)  # it may be open


def _holding(lock: Any, function: Callable[..., Any], *arguments: Any, seconds: float = -1) -> Any:
    """Call a function with a lock held. False: another thread has had that for so many seconds. A handler may
    raise behind an `acquire`, from Python 3.14 on also as a `with` begins, and leave its lock held."""
    held: list[bool] = []
    try:
        held.extend(map(lock.acquire, (True,), (seconds,)))  # one step
        return held[0] and function(*arguments)
    finally:
        if held and held[0]:
            lock.release()


class _Pool:
    """Daemon threads for all sessions, as long as there is one.

    `put((function, *arguments))` has a thread call the function, in one step: for any thread, finalizers and
    signal handlers too. After a leading None the function must not wait: the leader calls it, so that such
    keep their order. The leader holds `_lead`, which protects `_alarms`, and waits for tasks; before it
    leaves with one it sees to it that another thread waits.
    """

    def __init__(self) -> None:
        self._tasks = _import("_queue").SimpleQueue()
        self.put: Callable[[tuple[Any, ...]], None] = self._tasks.put
        self._alarms: list[Any] = []  # (when, number, function), sorted
        self._numbers = itertools.count()
        self._lead = threading.Lock()
        self._waiting: list[None] = []  # counts, in one step, the threads that wait or are about to

    def alarm(self, when: float, function: Callable[[], Any]) -> None:
        """Have a thread call a function at a time.monotonic()."""
        self.put((float(when), next(self._numbers), function))

    def check(self) -> None:
        """See to it that a thread waits. Raises RuntimeError if none can be started."""
        if not self._waiting:
            _start_thread("miniplug-worker", self._work)

    def _work(self) -> None:
        taken: list[Any] = []  # the task: whatever is raised into this thread, that is done
        goes_on, failed = True, None
        while taken or goes_on or failed:
            try:
                if failed:
                    self._mend(failed)
                    failed = None
                if not taken:
                    goes_on = self._waits(taken)
                if taken:
                    function, *arguments = taken.pop()
                    function(*arguments)
            except BaseException as error:
                failed = type(error)
                _quietly(lambda: _import("traceback").print_exc(), kind=BaseException)  # without memory, say
            function = arguments = None

    def _mend(self, failed: Any) -> None:
        """An exception has ended a task: maybe that of who reads; or else who waits would wait in vain."""
        for session in list(_sessions):
            if failed is MemoryError and session.serving:
                session.end(MemoryError())
            session.reader.seat.mend()
            session.reader.pass_on()

    def _waits(self, taken: list[Any]) -> bool:
        """Wait for a task. False: there is nothing more to do here."""
        leads: list[bool] = []
        self._waiting.append(None)
        try:
            leads.extend(map(self._lead.acquire, (True,), (_IDLE_SECONDS,)))  # one step
            if leads[0]:
                self._next(taken)
        finally:
            if leads and leads[0]:
                self._lead.release()
            self._waiting.pop()
        if not leads[0]:  # for long: others are enough, unless one that goes now has counted on this one
            return not self._waiting and bool(_sessions or not self._tasks.empty())
        if not (taken or _sessions or not self._tasks.empty()):
            return False
        # last: who begins a session, or needs a task done, has looked whether one waits
        _quietly(self.check, kind=(RuntimeError, MemoryError))
        return True

    def _next(self, taken: list[Any]) -> None:
        """As who leads: take a task, unless no session is left."""
        alarms = self._alarms
        while not taken and (_sessions or not self._tasks.empty()):
            seconds = alarms[0][0] - time.monotonic() if alarms else _FOREVER
            if seconds <= 0:
                taken.append(alarms.pop(0)[2:])
                return
            try:
                taken.extend(map(self._tasks.get, (True,), (min(seconds, _FOREVER),)))  # one step
            except _import("_queue").Empty:
                continue
            if type(taken[0][0]) is float:
                _import("bisect").insort(alarms, taken.pop())
            elif taken[0][0] is None:
                _, function, argument = taken.pop()
                function(argument)
        if not taken:
            alarms.clear()


def _move(take: Callable[[], Any], *task: Any) -> None:
    """Have the pool do a task with what `take`, a queue's popleft, gives: in one step."""
    _consume(map(_pool.put, zip(*[(part,) for part in task], itertools.starmap(take, _ONCE))))


def _in_pool(function: Callable[..., Any], *arguments: Any, timeout: float = -1) -> Any:
    """Have the pool call a function, and wait for what it gives or raises. Past a timeout raises _Late."""
    results: list[Any] = []
    gate = _gate()

    def run() -> None:
        try:
            results.append((function(*arguments), None))
        except BaseException as error:
            results.append((None, error))
        _open(gate)

    _pool.put((run,))
    _pool.check()  # there may be no session
    if not gate.acquire(True, timeout):
        raise _Late(_IN_TIME)
    value, error = results.pop()
    if error is not None:
        raise error
    return value


_pool = _Pool()
_sessions: set[_Session] = set()  # those that have not ended: a forked child leaves them


def _after_fork() -> None:
    """In a forked child: the connections are its parent's, the threads are gone."""
    global _pool
    _pool = _Pool()
    while _sessions:
        _sessions.pop().abandon()
    for listener in _listeners:
        listener._listener.close()
    _listeners.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _leave_fork(error: BaseException | None) -> None:
    """End a forked child whose method has ended: it must neither answer nor serve beside its parent."""
    code: Any = error.code if isinstance(error, SystemExit) else int(error is not None)
    try:
        if error is not None and not isinstance(error, SystemExit):
            _import("traceback").print_exception(type(error), error, error.__traceback__)
        sys.stdout.flush()
    finally:
        os._exit(code & 0xFF if isinstance(code, int) else int(code is not None))


class _Call:
    """A call of ours. `inbox` is what has come about it: messages, each for one thread to take and decode; or
    first, while the thread that waits runs it, a call of the other side's."""

    home = True  # whether a thread waits, which runs calls on its behalf
    loop: Any = None  # the event loop that does, if it was submitted where one runs
    context: Any = None  # contextvars.Context, of the submit
    future: Any = None  # the Call that the user has
    gate: Any = None  # of the thread that waits, while it sleeps
    raised: Any = ()  # by calls on its behalf: (number, exception)
    given_up = False
    leaves = False  # whether it is being submitted: who does that then gives it up, once it is sent
    granted = _WINDOW  # for how many items there was credit
    session: Any = None  # of a submitted one
    watcher: Callable[[], Any] | None = None  # called when an item has come, where no thread waits

    def __init__(self, number: int, method: str, seconds: float | None) -> None:
        self.number = number
        self.method = method
        self.seconds = seconds
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.inbox: list[_Message] = []
        self.lent: list[int] = []  # references in it, until it is sent
        self.streams = False  # whether it is answered by a stream
        self.over = False  # whether it was answered, and that was decoded

    def left(self) -> float | None:
        return None if self.deadline is None else _left(self.deadline)

    def wake(self) -> None:
        if self.watcher is not None:
            self.watcher()
        gate = self.gate  # one look: who sleeps may go at any moment
        if gate is not None:
            _open(gate)


def _waits_for_itself(call: _Call) -> Exception:
    return RuntimeError(f"{call.method}() would wait for ever, for what it has interrupted: in a handler, "
                        "__del__ or decode use submit or notify")


def _refuse_to_block(instead: str) -> None:
    if _get_ident() in _loop_threads:
        raise RuntimeError(f"this would block the event loop of the async methods: {instead}")


def _too_late(call: _Call) -> Exception:
    text, kind = f"{call.method}() took longer than {call.seconds:g} s", _on_first_use("CallTimeout")
    return kind(text, method=call.method, seconds=call.seconds)


class _Sealed(Exception):
    """The session takes no more calls: this one was not sent, and may be sent over another session."""


class _Request:
    """A call of the other side's, to be answered. `inbox` is its message, until that is decoded."""

    outer: _Request | None = None  # the call in which this one is run
    loop: Any = None  # the host's event loop, where it runs on that
    task: Any = None  # asyncio's, where it runs as one
    producer: Any = None  # the _Producer of the stream that is its answer

    def __init__(self, session: _Session, message: _Message) -> None:
        self.session = session
        self.inbox = [message]
        self.kind, _, self.number, self.parent, _, _ = message
        self.begun = self.cancelled = False
        self.lent: list[int] = []  # references in the answer, until that is sent

    def slots(self) -> _Slots:
        runner = self.session.runner
        return runner.nested_slots if self.parent else runner.slots

    def cancel(self) -> None:
        self.cancelled = True
        task = self.task
        if task is not None:
            self.on_loop(task.cancel)
        if self.producer is not None:
            self.producer.resume()  # it is closed, if it waits for credit

    def on_loop(self, function: Callable[[], Any]) -> bool:
        """Have the loop that this runs on call a function: the host's, or ours. False if it is closed."""
        if self.loop is None:
            return self.session.references.on_loop(function)
        return _call_on(self.loop, function)


def _call_on(loop: Any, function: Callable[[], Any], context: Any = None) -> bool:
    try:
        loop.call_soon_threadsafe(function, context=context)
        return not loop.is_closed()  # closed just now it may keep that, and call nothing
    except RuntimeError:
        return False


class _Errand:
    """A function for an event loop to call. Should the loop be closed before, `lost` is called instead, as a
    finalizer."""

    def __init__(self, function: Callable[[], Any], lost: Callable[[], Any]) -> None:
        self._function, self._lost = function, lost

    def __call__(self) -> None:
        self._lost = bool
        self._function()

    def __del__(self) -> None:
        self._lost()


class _Slots:
    """How many calls may run at once, of all sessions of a plugin. For any thread; each step is one of C."""

    def __init__(self, count: int) -> None:
        self.free = [None] * count  # as long as how many more calls may run
        self._queue: deque[_Request] = deque()  # calls that wait for a slot

    def take(self, request: _Request) -> bool:
        """Whether a call may run now; else it runs when there is a slot."""
        try:
            self.free.pop()
            return True
        except IndexError:
            self._queue.append(request)
            self._share()  # one may be free by now
            return False

    def give_back(self) -> None:
        """The first call that waits has the slot, before any that comes; or it is free."""
        try:
            if self._queue:
                request = self._queue.popleft()
                return _pool.put((request.session.runner.run, request, self))
        except IndexError:
            pass  # another thread was quicker
        self.free.append(None)
        return self._share() if self._queue else None  # by now

    def _share(self) -> None:
        try:
            self.free.pop()
        except IndexError:
            return  # who has it gives it back
        self.give_back()


class _Reader:
    """Who reads what has come, and where it goes. Any thread may call `wait` and `pass_on`; the rest is for
    who holds the seat. Should a handler raise there, the message is still first in the channel's queue.

    The seat is taken by a caller that waits, until it has its answer; by a sleeper that the last one has
    woken; or else by the attendant.
    """

    def __init__(self, session: _Session) -> None:
        self._session = session
        self._channel = session.channel
        self._calls = session.calls
        self._requests = session.requests
        self._references = session.references
        self.seat = _Seat()
        self.sleepers: dict[int, _Call] = {}  # our calls whose threads sleep
        self.unattended: set[Any] = set()  # numbers of those for which somebody has to read though no thread
        # waits, and tasks that do; with -1 somebody always has to

    def wait(self, call: _Call) -> None:
        """Wait until something has come about the call, read while nobody else does, and run what is made on
        its behalf. Raises _Late past its deadline, RuntimeError if it would wait for itself."""
        seat, mine = self.seat, [_get_ident()]
        try:
            while True:
                if call.inbox:  # not looked at twice: something comes at any moment
                    if call.inbox[0][0] > _NOTIFY:
                        return
                    self.pass_on()
                    self._session.runner.run_nested(call)
                elif seat.setdefault(0, mine) is mine:
                    self.read(call)
                    del seat[0]
                else:
                    self._sleep(call)
        except (_Broken, ProtocolError) as error:
            if self._session.ended is None:
                self._session.end(error)
            call.inbox.append(_ENDED)  # it may have been given up already
        finally:
            if seat and seat[0] is mine:
                del seat[0]
            if self.sleepers or self.unattended or self._requests or self._references.lends:
                self.pass_on()

    def _sleep(self, call: _Call) -> None:
        seat, left = self.seat, _left(call.deadline)
        if left == 0:
            raise _Late
        try:
            call.gate = gate = _gate()
            self.sleepers[call.number] = call
            if not call.inbox and seat:
                holder = seat.holder()
                if holder == _get_ident():
                    raise _waits_for_itself(call)
                if not holder:
                    _pool.put((seat.mend,))
                gate.acquire(True, min(left, _LOOK_AGAIN) if left > 0 else _LOOK_AGAIN)
        finally:
            call.gate = None
            self.sleepers.pop(call.number, None)

    def pass_on(self) -> None:
        """Where somebody should read and nobody does, wake one who will."""
        if self.seat:
            return None
        for call in list(self.sleepers.values()):
            gate = call.gate
            if gate is not None:
                return _open(gate)
        if self._session.is_disposed:
            return self._channel.close()
        return self._session.attendant.come()

    def read(self, waiting: Any = None) -> _Request | None:
        """Hand on what comes, until there is something for the call that is `waiting`. Without one, as the
        attendant, until there is a call to be run, which is returned, or a caller may read."""
        channel = self._channel
        number, deadline = (-1, None) if waiting is None else (waiting.number, waiting.deadline)
        while waiting is None or not waiting.inbox:  # who read before may have brought it
            come = channel.receive(deadline)
            while come:
                message = come[0]
                kind, flags, its, parent, body, _ = message
                if flags & _TAGGED and body.find(b'"$own"') >= 0:  # `in` is slow
                    message = come[0] = self._references.held(message)
                if its == number and kind == _RESULT and not flags & _STREAM:
                    if flags:
                        waiting.inbox.extend(itertools.starmap(come.popleft, _ONCE))
                    else:  # nothing lent is in it, which could get lost
                        waiting.inbox.append(come.popleft())
                    if not come:
                        return None
                elif 0 < kind <= _NOTIFY:
                    request = self._route_call(come, message, its, parent, waiting is None)
                    if request is not None:
                        return request
                elif kind not in _ANSWERS:
                    self._session.steer(come, message)
                elif self._route_answer(come, message, waiting is None):
                    return None
            message = body = ()  # what has come is not kept alive by who waits for more
        return None

    def _route_answer(self, come: deque[_Message], message: _Message, attends: bool) -> bool:
        """Put a message into its call's inbox. Returns whether the attendant may go, as a caller is woken."""
        kind, flags, number = message[:3]
        call = self._calls.get(number)
        if call is None:  # it was given up
            self.unattended.discard(number)
            self.take(come, self._session.drop)
            return False
        opens = kind == _RESULT and flags & _STREAM
        if opens:
            call.streams = True
        inbox, future = call.inbox, call.future
        if kind == _ITEM and (len(inbox) > _WINDOW or (future is not None and not call.streams)):
            # each message has one at least
            raise ProtocolError("more items of a stream than there is credit for")
        if future is not None and kind != _ITEM and (opens or not call.streams):
            future._arrive(call, come, attends)
        else:
            inbox.extend(itertools.starmap(come.popleft, _ONCE))
        if kind != _ITEM and not opens:
            self._calls.pop(number, None)  # or who waits has done so, as it was quicker
        if call.given_up:  # meanwhile
            self._session.caller.forget(call, inbox)
        self.unattended.discard(number)
        sleeps = call.gate is not None
        call.wake()
        return sleeps and attends

    def _route_call(self, come: deque[_Message], message: _Message, number: int, parent: int,
                    attends: bool) -> _Request | None:
        """Give a call to who runs it. One on behalf of none the attendant runs itself: it is returned."""
        request = self._requests.get(number)
        if request is None:
            request = self._requests[number] = _Request(self._session, message)
        elif not request.inbox or request.inbox[0] is not message:
            raise ProtocolError("the number of a call is that of another one")
        if attends and not parent:
            come.popleft()
            return request
        call, runner = self._calls.get(parent), self._session.runner
        inbox: Any = () if call is None else call.inbox
        if call is not None and not inbox and call.home:  # in this order; that thread runs one, and no more
            inbox.extend(itertools.starmap(come.popleft, _ONCE))
            if call.given_up:  # meanwhile
                self._session.caller.forget(call, inbox)
            call.wake()
        elif call is not None and call.loop is not None:
            runner.run_on_loop(call, request)
            come.popleft()
        else:
            try:
                _pool.check()
            except RuntimeError as error:  # no thread to be had: that fails the call
                runner.fail(request, error, wait=False)
            _move(come.popleft, None, runner.run_message)
        return None

    @staticmethod
    def take(come: deque[_Message], function: Callable[[_Message], Any]) -> None:
        """Call a function with the first of `come`, once and for all: no handler must strike there."""
        if _in_main_thread():
            _move(come.popleft, function)
        else:
            function(come.popleft())


class _Attendant:
    """Who reads while no caller does: a thread of the pool, where calls come in at any time (in a plugin
    always, in a host while it has lent something), or an answer is due that no thread waits for. It runs
    what it has read; before a method that has not been quick it leaves. `_look` sees twice a second whether a
    quick one takes long after all.

    Any thread may call `come` and `watch`, the pool all else. `_right` is held by who attends or is about to.
    """

    def __init__(self, session: _Session) -> None:
        self._session = session
        self._reader = session.reader
        self._right = _Seat()
        self._inline = 0  # the number of the call that the attendant runs; negative when it has
        self._seen = 0  # that, at the last look
        self._watched = False
        self._coming = 0.0  # until then it is sure that somebody looks whether a thread should read

    def _is_wanted(self) -> bool:
        session = self._session
        wanted = self._reader.unattended or session.requests or session.references.lends
        return bool(wanted) and session.ended is None

    def come(self) -> None:
        """Nobody reads: have a thread read, if one must; where only what is lent asks for it, in a moment, so
        that who calls again at once finds the seat free."""
        if self._right.holder() or not self._is_wanted():
            return
        if self._reader.unattended:
            self._begin()
        elif time.monotonic() >= self._coming:
            soon = time.monotonic() + _LAZY
            _pool.alarm(soon, self._begin)
            self._coming = soon

    def _begin(self) -> None:
        if self._right.holder() or self._reader.seat or not self._is_wanted():
            return
        self._right.mend()
        mine = [-1]
        if self._right.setdefault(0, mine) is mine:
            _pool.put((self._attend, mine))

    def _attend(self, mine: list[int]) -> None:
        session, right, reader, runner = self._session, self._right, self._reader, self._session.runner
        mine[0], serves = _get_ident(), session.serving  # then it is wanted until the end
        seat, slots, number = reader.seat, runner.slots, 0
        try:
            while True:  # a condition here would keep Python 3.11 from making the loop quick
                if right.get(0) is not mine or not (serves or self._is_wanted()):
                    break
                self._inline = -number
                if seat.setdefault(0, mine) is not mine:
                    break
                request = reader.read()
                del seat[0]
                if request is None:
                    if not reader.unattended:
                        break  # the caller that was woken reads better
                elif slots.take(request):
                    self._inline = number = request.number
                    if not self._watched:
                        self.watch()
                    runner.run(request, slots, mine)
        except BaseException as error:  # the connection's end, or there is no memory
            session.end(error)
        finally:
            if seat.get(0) is mine:
                del seat[0]
            self.leave(mine)

    def leave(self, mine: list[int]) -> None:
        """Have another thread attend, in place of the one with this right."""
        if self._right.get(0) is mine:
            self._right.pop(0, None)  # `_look` may do so
        self._reader.pass_on()

    def watch(self) -> None:
        if not self._watched:
            _pool.alarm(time.monotonic() + _LOOK, self._look)
            self._watched = True

    def _look(self) -> None:
        """Whether a call has outlasted a whole look, or finalizers have left something."""
        session, inline, seen = self._session, self._inline, self._seen
        self._seen = inline
        if session.channel.posted:
            session.flush()
        if inline == seen and inline > 0 and self._right:
            if not self._reader.seat:
                self._right.pop(0, None)  # that one reads no more
                self._begin()
        elif inline == seen:
            self._watched = False  # first, then look once more
            if self._inline == inline and not session.channel.posted:
                return
        self._watched = True
        if session.ended is None:
            _pool.alarm(time.monotonic() + _LOOK, self._look)


class _Caller:
    """Our calls, from the proxy to the answer. For any thread; `give_up`, which clears up, for the pool."""

    def __init__(self, session: _Session) -> None:
        self._session = session
        self._reader = session.reader
        self._codec = session.codec
        self._numbers = session.numbers
        self._calls = session.calls
        self._next_alarm = 0.0

    def call(self, target: int, method: str, args: Sequence[Any], kwargs: dict[str, Any],
             seconds: float | None, kind: int = _CALL) -> Any:
        """Call and wait for the answer, which may be a Stream. Raises what the method raised, CallTimeout,
        _Sealed, and what `lost` made of the connection's end."""
        if _loop_threads and kind != _NOTIFY:
            _refuse_to_block(f"await {method}.submit(...)")
        call = _Call(next(self._numbers), method, seconds)
        try:
            what: Any = target, method, args, kwargs
            self._start(call, kind, _NOTHING if kind == _PING else self._codec.dumps(what, None, call.lent))
            if kind == _NOTIFY:
                self._reader.pass_on()  # it may lend something
                self._calls.pop(call.number, None)
                return None
            self._reader.wait(call)
            if call.streams:
                call.home = False  # before the message is taken out, at which the reader looks first
            else:
                self._calls.pop(call.number, None)
            return self.value(call, _RESULT if kind == _CALL else _PONG)
        except BaseException as error:
            if not call.over:
                _pool.put((self.give_up, call))
            if type(error) is _Late:
                raise _too_late(call) from None
            raise

    def notify(self, *call: Any) -> None:
        self.call(*call, kind=_NOTIFY)  # type: ignore[misc]

    def ping(self, seconds: float) -> float:
        start = time.perf_counter()
        self.call(0, "ping", (), {}, seconds, _PING)
        return time.perf_counter() - start

    def submit(self, future: Any, target: int, method: str, args: Sequence[Any], kwargs: dict[str, Any],
               seconds: float | None) -> _Call:
        """Call; the future, a Call, has the answer when it has come. Raises what sending raises."""
        call = future._call = _Call(next(self._numbers), method, seconds)
        call.session, call.home, call.leaves = self._session, False, True
        running = getattr(sys.modules.get("asyncio"), "_get_running_loop", None)  # it may be half imported
        call.loop = running and running()
        if call.loop is not None:
            call.context = copy_context()
        try:
            _pool.check()  # without a thread to read the answer nothing is sent
            self._reader.unattended.add(call.number)
            content = self._codec.dumps((target, method, args, kwargs), None, call.lent)
            self._start(call, _CALL, content, future)
            call.leaves = False
            if call.given_up:  # meanwhile
                _pool.put((self.give_up, call))
            self._reader.pass_on()
            if call.deadline is not None:
                self._ring(call.deadline)
        except BaseException as error:
            call.leaves = False
            _pool.put((self.give_up, call))
            if type(error) is not _Late:
                raise
            future._fail(_too_late(call))
        return call

    def next(self, call: _Call) -> None:
        """Wait for a message of a stream. Raises as `call` does; the stream gives the call up then."""
        if call.inbox:
            return
        _refuse_to_block("use async for")
        call.deadline = None if call.seconds is None else time.monotonic() + call.seconds
        try:
            call.home = True
            self._reader.wait(call)
        except _Late:
            raise _too_late(call) from None
        except IndexError:
            pass  # another thread has closed the stream, and emptied the inbox
        finally:
            call.home = False

    def _parent(self) -> int:
        """The number of the other side's call on whose behalf this thread calls, or 0."""
        request = _current.get()
        while request is not None and request.session is not self._session:
            request = request.outer  # this side is called through another session
        return 0 if request is None else request.number

    def _start(self, call: _Call, kind: int, content: Any, future: Any = None) -> None:
        session = self._session
        self._calls[call.number] = call
        if session.sealed:  # only now, as the end fails those that are there
            raise _Sealed
        if future is not None:
            call.future = future  # only now, as what is not sent may go elsewhere
            if call.inbox:  # it has ended meanwhile
                _pool.put((future._settle, call, _ENDED))
        parent = 0 if _current.get() is None else self._parent()
        channel = session.channel
        channel.send(kind, 0, call.number, content, parent, True, call.deadline)
        if channel.posted and channel.writer.holder() == _get_ident() and kind != _NOTIFY and future is None:
            raise _waits_for_itself(call)

    def value(self, call: _Call, expected: int = _RESULT, inbox: Any = None) -> Any:
        """What the first message of the inbox stands for: the answer, or items. Raises what it says, and
        StopIteration at the end of a stream."""
        inbox = inbox or call.inbox  # one look: a stream that is closed just now has a new one
        try:
            message, value = self._session.decode(inbox)
        except _Undecodable as error:
            raise error.args[0] from None
        except ProtocolError as error:
            raise self._session.failed(error, call) from None
        except IndexError:  # another thread has closed the stream
            raise StopIteration from None
        kind = message[0]
        if kind == expected:
            if message[1] & _STREAM:
                return Stream(self._session, call)
            call.over = True
            return value
        call.over = True
        if kind == _ERROR and expected != _PONG:
            raise self._raised(call, value)
        if message is _ENDED:
            raise self._session.ended(self._session.lost_calls)
        if kind == _END and (expected == _ITEM or call.given_up):
            raise StopIteration
        raise self._session.failed(ProtocolError(f"a message of kind {kind} answers {call.method}()"), call)

    def _raised(self, call: _Call, body: Any) -> Any:
        """The exception that a call has raised: what began here comes home as itself."""
        home = body.get("home") if type(body) is dict else None
        for number, error in [*call.raised]:
            if type(home) is int and number == home:
                return error
        error = _decode_error(body)
        if isinstance(error, RemoteError):
            vars(error)["_origin"] = (_ref_to(self._session), call.number)
        return error

    def give_up(self, call: _Call) -> None:
        """Want nothing more of a call; tell the other side, unless it is over."""
        session = self._session
        call.home, call.given_up = False, True
        if call.leaves:
            return
        self._reader.unattended.discard(call.number)
        self._reader.sleepers.pop(call.number, None)
        session.references.unlend(call.lent)
        is_open = self._calls.pop(call.number, None) is not None and session.ended is None
        if is_open:
            session.post(_CANCEL, call.number)
        self.forget(call, call.inbox)
        call.wake()
        if is_open and call.streams:
            self.probe(next(self._numbers))  # its producer may wait to send: read until that is answered
        self._reader.pass_on()

    def forget(self, call: _Call, inbox: list[_Message]) -> None:
        """Drop what is in an inbox that the call has or had."""
        call.inbox = [_CLOSED]
        while inbox:
            try:
                self._session.drop(inbox.pop(0))
            except IndexError:
                return  # another thread was quicker

    def probe(self, number: int = 0) -> bool:
        """Ping without waiting. False: the last such ping is still out."""
        if number in self._reader.unattended:
            return False
        self._reader.unattended.add(number)
        self._session.post(_PING, number)
        self._reader.pass_on()
        return True

    def _ring(self, when: float) -> None:
        if when < self._next_alarm or self._next_alarm <= time.monotonic():
            expire = _import("weakref").WeakMethod(self._expire)  # a session that is gone is not kept so long
            _pool.alarm(when, lambda: (expire() or bool)())
            self._next_alarm = when

    def _expire(self) -> None:
        now = time.monotonic()
        for call in list(self._calls.values()):
            future = call.future
            if future is None or call.deadline is None or call.streams:
                continue
            if call.deadline <= now:
                self.give_up(call)
                future._fail(_too_late(call))
            else:
                self._ring(call.deadline)


class _Runner:
    """Their calls: decode, run, answer. For threads of the pool; but `run` also for who waits for the call on
    whose behalf one is made, and `run_on_loop` for who routes."""

    def __init__(self, session: _Session, slots: _Slots) -> None:
        self._session = session
        self._channel = session.channel
        self._requests = session.requests
        self._codec = session.codec
        self.quick: dict[str, int] = {}  # by the method: how many times in a row it was, up to 3
        self.slots = slots
        self.nested_slots = _Slots(_NESTED)  # of their own: who waits for one may hold the last of the others

    def run_message(self, message: _Message) -> None:
        """Have the pool run the call that a message is, once there is a slot. One that was left half run
        fails. This does not wait."""
        request = self._requests.get(message[2])
        if request is not None and request.begun:
            self.fail(request, KeyboardInterrupt(), wait=False)
        elif request is not None:
            self._run_later(request)

    def _run_later(self, request: _Request) -> None:
        if request.slots().take(request):
            _pool.put((self.run, request, request.slots()))

    def run_in_slot(self, request: _Request) -> None:
        if request.slots().take(request):
            self.run(request, request.slots())

    def run_nested(self, call: _Call) -> None:
        """As the thread that waits for a call: run the one in its inbox."""
        inbox = call.inbox
        request = self._requests.get(inbox[0][2])
        if request is not None:
            self.run(request)
        if inbox:  # not given up meanwhile
            inbox.pop(0)  # not before: should this thread go, who gives the call up sees to it

    def run_on_loop(self, call: _Call, request: _Request) -> None:
        """Have the loop that waits for a call run one made on its behalf; the pool, if that is closed."""
        request.loop = call.loop
        lost = partial(_pool.put, (None, self.leave_loop, request))
        if not _call_on(call.loop, _Errand(partial(self.run, request), lost), call.context):
            lost()

    def leave_loop(self, request: _Request) -> None:
        if request.loop is not None and not request.begun:
            request.loop = None
            self._run_later(request)

    def _decode(self, request: _Request) -> Any:
        """The call that has come: [target, method, args, kwargs]. Without one it has been answered."""
        try:
            _, call = self._session.decode(request.inbox)
            call = call[:4] if type(call) is list else []
            if len(call) < 4 or (type(call[1]), type(call[2]), type(call[3])) != _CALL_TYPES:
                raise ProtocolError("a call is [target, method, [argument, ...], {name: argument, ...}]")
            if self._session.closing is not None:
                raise _Undecodable(PluginClosed(_IS_CLOSING))
            return call
        except _Undecodable as error:
            self.fail(request, error.args[0], own=True)
        except ProtocolError as error:
            self._session.end(error)
        return None

    def run(self, request: _Request, slots: _Slots | None = None, attends: Any = None) -> None:
        """Run a call of the other side's and answer it, or go on with its stream. Whatever the method raises
        is an answer too. `slots`: where a slot is given back. `attends`: the right of the attendant, who
        leaves with a method that may take long."""
        outer, runs = _current.get(), None  # whether the method runs; None: not yet
        try:
            _current.set(request)
            if request.begun:
                if request.producer is not None:
                    request.producer.go_on()
                return
            request.begun, request.outer = True, outer
            call = self._decode(request)
            if call is None:
                return
            target, method, args, kwargs = call
            quick = self.quick.get(method, 0)
            if attends and quick < 3:
                self._session.attendant.leave(attends)
            start = time.monotonic()
            function = self._session.references.resolve(target, method)
            runs = True
            value = function(*args, **kwargs)
            runs = False
            seconds = time.monotonic() - start
            if seconds > _QUICK or quick < 3:
                self._took(method, quick + 1 if seconds <= _QUICK else 0)
            if type(value) in _ANSWER_TYPES or not self._is_more(request, value):
                self.answer(request, value)
        except BaseException as error:
            own = not runs or target == 0  # whether an error of ours is about this call itself
            strikes = _in_main_thread() and not self._session.is_abandoned
            if strikes or issubclass(type(error), RecursionError):  # nothing strikes there, and there is room
                _pool.put((self.fail, request, error, own))
            else:
                self.fail(request, error, own)
            if _is_ctrl_c(error) or (runs is False and strikes):  # it is for who waits here, too
                raise
        finally:
            _current.set(outer)
            call = args = kwargs = None  # not kept alive by a frame that lingers
            if slots is not None:
                slots.give_back()

    def _took(self, method: str, quick: int) -> None:
        if len(self.quick) > 1000:
            self.quick.clear()  # an object that answers every name
        self.quick[method] = quick

    def answer(self, request: _Request, value: Any) -> None:
        if request.kind == _CALL and not request.cancelled:
            try:
                content = self._codec.dumps(value, "the result", request.lent)
                self._channel.send(_RESULT, 0, request.number, content)
            except PluginError as error:  # it cannot travel
                return self.fail(request, error, own=True)
        elif type(value) is _Ref:  # an instance that was dispensed in vain is to be exited
            self._session.references.lend(self._session, value, request.lent)
            self._session.references.unlend(request.lent)
        self._requests.pop(request.number, None)
        return None

    def fail(self, request: _Request, error: BaseException, own: bool = False, wait: bool = True) -> None:
        """Answer with an exception, unless it has been answered."""
        session, call = self._session, self._session.calls.get(request.parent)
        if session.is_abandoned:
            _leave_fork(error)
        if self._requests.get(request.number) is not request:
            return
        session.references.unlend(request.lent)
        if call is not None and not _is_ending(type(error)):
            raised = vars(call).setdefault("raised", deque(maxlen=_RAISED))  # one, also if two fail at once
            raised.append((request.number, error))  # it may come home
        if request.kind == _NOTIFY:
            _print_error(error)
        elif not request.cancelled:
            for tell in (partial(_encode_error, error, own), partial(_encode_error, error, bare=True), dict):
                try:
                    content = self._codec.dumps({**tell(), **self._home(error)}, "the exception")
                    self._channel.send(_ERROR, 0, request.number, content, wait=wait)
                    break
                except BaseException as problem:  # its arguments cannot travel, or it is a trap
                    if _is_ctrl_c(problem):
                        raise
            else:
                session.end(MemoryError())  # or what else may be: who waits would wait in vain
        self._requests.pop(request.number, None)

    def _home(self, error: BaseException) -> dict[str, Any]:
        """The number of the call that raised an exception here, which then came from the other side."""
        origin = vars(error).get("_origin") if issubclass(type(error), RemoteError) else None
        return {"home": origin[1]} if origin is not None and origin[0]() is self._session else {}

    def _is_more(self, request: _Request, value: Any) -> bool:
        """Whether what a method has returned is not its answer yet: a coroutine, or a stream."""
        kind = type(value)
        if hasattr(kind, "__await__"):
            self.run_as_task(request, partial(self._await, request, value))
        elif hasattr(kind, "__next__") or hasattr(kind, "__anext__"):
            request.producer = _Producer(request, value)
            if request.kind == _NOTIFY:
                request.cancelled = True  # nobody will read it
            else:
                self._channel.send(_RESULT, _STREAM, request.number, _NOTHING)
            request.producer.resume()
        else:
            return False
        return True

    def run_as_task(self, request: _Request, function: Callable[[], Any]) -> None:
        """Run an async function on the loop of who waits for it, or on that of the async methods."""
        def begin() -> None:
            asyncio = _import("asyncio")
            _current.set(request)
            task = asyncio.ensure_future(function())
            if request.producer is None:  # else the task that has the turn is the one
                request.task = task
                if request.cancelled:  # once it has begun, or nothing would end it
                    asyncio.get_running_loop().call_soon(task.cancel)

        lost = partial(_pool.put, (self.fail, request, PluginClosed(_IS_CLOSING), True))
        if not request.on_loop(_Errand(begin, lost)):
            lost()

    async def _await(self, request: _Request, awaitable: Any) -> None:
        try:
            value = await awaitable
            request.task = None
            if not self._is_more(request, value):
                self.answer(request, value)
        except BaseException as error:
            self.fail(request, error)


class _Producer:
    """The sending end of a stream: it takes from an iterator what the other side has given credit for. Items
    that come quickly leave together, a slow producer's one by one, when they are made.

    Any thread may call `grant` and `resume`. Who holds `_turn`, a thread or a task, produces. `_lock`
    protects `_group`, `_size` and `_last`, and is held while items leave, so that they leave in order.
    """

    def __init__(self, request: _Request, iterator: Any) -> None:
        self._request = request
        self._session = request.session
        self._iterator = iterator
        self._is_async = hasattr(type(iterator), "__anext__")
        self._credit = deque([None] * _WINDOW, _WINDOW)  # as long as how many more items may leave
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._group: list[Any] = []  # items that wait for others
        self._size = 0  # of those, in bytes
        self._last = 0.0  # when some left
        self._alarmed = False  # whether those that wait are seen to

    def grant(self, message: _Message) -> None:
        self._credit.extend([None] * int(message[4]))
        self.resume()

    def resume(self) -> None:
        """Have a task go on, if the iterator is async, else the pool; unless somebody does."""
        runner = self._session.runner
        if self._turn.locked():
            return
        if self._is_async:
            runner.run_as_task(self._request, self._produce)
        else:
            _pool.put((runner.run_in_slot, self._request))

    def go_on(self) -> None:
        """Produce in this thread, until the end or until there is no credit. (Nothing is awaited then.)"""
        _quietly(self._produce().send, None, kind=StopIteration)

    async def _produce(self) -> None:
        request, iterator = self._request, self._iterator
        end = StopAsyncIteration if self._is_async else StopIteration
        while request.cancelled or self._credit:
            if not self._turn.acquire(False):
                return
            ended, error = True, None
            if self._is_async:
                request.task = _import("asyncio").current_task()
            try:
                while self._credit and not request.cancelled:
                    self._credit.popleft()  # first: what comes for this item has room then
                    self._put(await iterator.__anext__() if self._is_async else next(iterator))
                ended = request.cancelled
                if ended and hasattr(iterator, "aclose"):
                    await iterator.aclose()
                self._flush()
            except end:
                pass
            except BaseException as problem:
                ended, error = True, problem
            if ended:
                request.task = None
                self._end(error)
                return  # with the turn: nobody else goes on
            self._turn.release()

    def _put(self, item: Any) -> None:
        """Encode an item, now, as its maker may change it; and send it, or let it wait for others."""
        session = self._session
        lent: list[int] = []
        try:
            content = session.codec.dumps(item, "an item", lent)
            session.channel.check_size(content, len("[]"))
        except PluginError:
            session.references.unlend(lent)
            raise
        size, alone = len(content[0]) + 1, bool(content[1])  # what has buffers leaves alone
        with self._lock:
            if alone or self._size + size + 1 > session.channel.send_limit:
                self._send()
            self._group.append(content)
            self._size += size
            now = time.monotonic()
            full = len(self._group) >= _WINDOW // 2 or self._size >= _READ_SIZE
            if alone or full or now - self._last > _GATHER:
                self._send()
            elif not self._alarmed:
                self._alarmed = True
                _pool.alarm(now + 3 * _GATHER, self._flush)

    def _flush(self) -> None:
        with self._lock:
            self._alarmed = False
            self._send()

    def _send(self) -> None:
        """Under the lock: send what has gathered, in one message."""
        group, self._group, self._size = self._group, [], 0
        lent = [number for content in group for number in content[3]]
        if self._request.cancelled:
            self._session.references.unlend(lent)
        elif group:
            body = b"[" + b",".join([content[0] for content in group]) + b"]"
            tagged = max(content[2] for content in group)
            self._session.channel.send(_ITEM, 0, self._request.number, (body, group[0][1], tagged, lent))
        self._last = time.monotonic()

    def _end(self, error: BaseException | None) -> None:
        request, session = self._request, self._session
        self._flush()
        try:
            if hasattr(self._iterator, "close"):
                self._iterator.close()
        except BaseException as problem:
            error = error or problem
        if error is not None:
            own = issubclass(type(error), (NotSerializable, MessageTooLarge))
            return session.runner.fail(request, error, own)
        if not request.cancelled:
            session.channel.send(_END, 0, request.number, _NOTHING)
        session.requests.pop(request.number, None)
        return None


class _Session:
    """Both directions of one connection, for any thread: what its rooms share, and its end.

    `references`: what this side serves and lends. `borrow(session, tag, state)` makes the proxy for what the
    other side lends. `lost(cause)` is called at the connection's end, and returns what makes the exception of
    the calls that are lost, from their methods' names.

        open --seal--> sealed --end--> ended       any --end--> ended

    `sealed`: it takes no more calls. `ended` is None until then.
    """

    def __init__(self, channel: _Channel, terms: _Terms, max_message: int, references: Any,
                 borrow: Callable[..., Any],
                 lost: Callable[[BaseException], Any],
                 serving: bool = False, slots: _Slots | None = None) -> None:
        self.channel = channel
        self.protocol_version: int = terms.protocol_version
        self.references = references
        self.codec = _Codec(partial(references.lend, self), references.unlend, partial(borrow, self))
        self.codec.arrays = "arrays" in terms.features
        self.call_timeout: float | None = None  # the deadline of calls that have no other
        self.serving = serving
        self.numbers = itertools.count(1)
        self.calls: dict[int, _Call] = {}  # ours, open
        self.requests: dict[int, _Request] = {}  # theirs, open
        self.borrowed: set[int] = set()  # ids of what stands here for the other side's objects
        self.sealed = False
        self.ended: Any = None  # once it has, makes the error of calls, from their methods' names
        self.cause: BaseException | None = None  # why it has
        self.lost_calls: list[str] = []  # the methods that were being called then
        self.is_abandoned = False  # in a forked child
        self.is_disposed = False  # whether who reads last closes the channel
        self.closing: float | None = None  # the grace in seconds, once the host has said stop; -1: it is gone
        self.finished = _gate()  # opens when the other side says stop or is gone
        self._lost = lost
        self._last_asked = 0  # the number taken by the last `unused`
        self.reader = _Reader(self)
        self.attendant = _Attendant(self)
        self.runner = _Runner(self, slots or _Slots(64))
        self.caller = _Caller(self)
        self.call, self.ping, self.probe = self.caller.call, self.caller.ping, self.caller.probe
        channel.stuck, channel.later = self.reader.pass_on, lambda: _pool.put((self.flush,))
        channel.gone = lambda error: None if self.cause is not None else self.end(error)
        channel.begin(max_message, terms.max_message)
        _sessions.add(self)
        try:
            _pool.check()
        except BaseException:
            _sessions.discard(self)
            channel.close()
            raise
        if serving:
            self.keep_reading()

    def post(self, kind: int, number: int, value: Any = None) -> None:
        content = _NOTHING if value is None else self.codec.dumps(value, "a message")
        self.channel.send(kind, 0, number, content, wait=False)

    def discard(self, notices: Iterable[list[_Bytes]]) -> None:
        """Have references given back, with what is sent next, or soon. For finalizers, inside any lock."""
        if self.ended is None:
            self.channel.posted.extend(notices)
            self.attendant.watch()

    def flush(self) -> None:
        """Write what is left. For threads of the pool."""
        self.channel.writer.mend()
        self.channel.write([])

    def steer(self, come: deque[_Message], message: _Message) -> None:
        """As the reader: the first of `come` is about a call, a reference, or the whole."""
        kind, flags, number, _, body, _ = message
        request = self.requests.get(number)  # None: it has ended meanwhile
        if kind == _RELEASE:
            return self.references.release(come, number)
        if kind == _CREDIT:
            count = self.codec.loads(body, (), 0) if body else None
            if type(count) is not int or not 0 < count <= _WINDOW:
                raise ProtocolError(f"a credit of {_shown(count)} items")
            if request is not None and request.producer is not None:
                return self.reader.take(come, request.producer.grant)
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

    def decode(self, inbox: list[_Message], safely: bool = False) -> Any:
        """Take the first message out, and give it and its value. References in it are borrowed where no
        handler strikes: so none gets lost halfway. Raises as the codec does, IndexError if there is none."""
        if inbox[0][1] & _TAGGED and not safely and inbox[0][4].find(b'"$ref"') >= 0 and _in_main_thread():
            return _in_pool(self.decode, inbox, True)
        message = inbox.pop(0)
        _, flags, _, _, body, buffers = message
        return message, self.codec.loads(body, buffers, flags & _TAGGED) if body else None

    def drop(self, message: _Message) -> None:
        """A message that nobody waits for any more: a call is run all the same, references are given back."""
        if message[0] in (_CALL, _NOTIFY):
            self.runner.run_message(message)
        elif message[1] & _TAGGED and self.ended is None:
            _quietly(self.decode, [message], True, kind=(_Undecodable, ProtocolError))

    def stop(self, grace: float) -> None:
        """Take no more of their calls, and tell those that run that they are given up."""
        self.closing = grace
        for request in list(self.requests.values()):
            request.cancel()
        _open(self.finished)

    def busy(self) -> bool:
        return bool(self.calls or self.requests or self.borrowed or self.references.lends)

    def unused(self) -> bool:
        """Whether it is not busy, and no call has begun since this was asked last, as the numbers tell. One
        thread asks."""
        before, self._last_asked = self._last_asked, next(self.numbers)
        return self._last_asked == before + 1 and not self.busy()

    def keep_reading(self) -> None:
        self.reader.unattended.add(-1)
        self.reader.pass_on()

    def ask_to_end(self, grace: float) -> None:
        self.post(_SHUTDOWN, 0, grace)

    def seal(self) -> bool:
        """Take no more calls, unless it is busy. Returns whether it takes none. (Who calls is among `calls`
        before it looks: so none slips through.)"""
        self.sealed = True
        self.sealed = not self.busy()
        if self.ended is not None:  # looked at last: it may be just now
            self.sealed = True
        return self.sealed

    def failed(self, error: BaseException, call: _Call) -> BaseException:
        """End the connection for what the other side should not have sent; returns what the call raises."""
        self.end(error)
        return self.ended([*dict.fromkeys([call.method, *self.lost_calls])])

    def end(self, cause: BaseException) -> None:
        """The connection has ended: fail every call, let every thread go. `cause`: a _Broken, or what the
        other side has done. The first one counts."""
        self.cause = self.cause or (cause.args[0] if type(cause) is _Broken else cause)
        self.channel.shutdown()
        make_error = self._lost(self.cause)
        if self.ended is None:
            self.lost_calls = [call.method for call in list(self.calls.values())]
            self.ended = make_error
        self.sealed = True
        self.reader.unattended.add(-1)  # who reads last closes the channel
        for call in list(self.calls.values()):
            call.inbox.append(_ENDED)
            future = call.future
            if future is not None and not call.streams:
                _pool.put((future._settle, call, _ENDED))
            self.calls.pop(call.number, None)
            call.wake()
        self.stop(-1.0 if self.closing is None else self.closing)
        _sessions.discard(self)
        if not _sessions:
            _pool.put((bool,))  # wakes who waits, who then ends as there is no session

    def abandon(self) -> None:
        """In a forked child: leave the connection to its parent."""
        text = "the connection is that of the process this one was forked from"
        self.ended = lambda calls: PluginError(text)
        self.sealed = self.is_abandoned = True
        self.channel.abandon()
        self.reader.seat = _Seat()

    def dispose(self) -> None:
        """Close the channel, once nobody reads."""
        self.channel.shutdown()
        self.is_disposed = True
        self.reader.pass_on()


# === 6. dispatcher ======================================================================================
#
# Names to methods, as xmlrpc.server does it: a method is looked up on the served object, never by a name that
# begins with "_"; and an object with its own _dispatch(method, args, kwargs) answers every name itself.

def _method_names(obj: Any) -> list[str] | None:
    """The public methods of an object, sorted; None if it answers every name. Runs no property."""
    kind = obj if isinstance(obj, type) else type(obj)
    if issubclass(type(obj), _Remote):
        return None if obj._names is None else list(obj._names)
    if callable(getattr(kind, "_dispatch", None)):
        return None
    if hasattr(type(obj), "__code__") or hasattr(type(obj), "__self__"):
        return []  # a function
    found = {name: getattr(kind, name, None) for name in dir(kind)}
    if kind is not obj:
        found.update(getattr(obj, "__dict__", {}))
    return sorted(name for name in found if not name.startswith("_") and callable(found[name]))


def _no_method(name: str, names: Iterable[str] | None, where: str) -> MethodNotFound:
    matches = _import("difflib").get_close_matches(name, list(names or ()), cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""
    if name.startswith("_"):
        hint = ": it is private"
    text = f"has no method {name!r}{hint}" if name else "cannot be called, only its methods"
    return MethodNotFound(f"{where} {text}", name=name, matches=matches)


def _signature(function: Any) -> Any:
    """inspect.signature(), also where a name in an annotation is missing: Python 3.14 looks for it."""
    how: dict[str, Any] = {}
    if sys.version_info >= (3, 14):
        how["annotation_format"] = _import("annotationlib").Format.FORWARDREF
    return _import("inspect").signature(function, **how)


def _makes_instances(served: Any) -> bool:
    """Whether what is served is a class, or a function that needs no argument, and not the object itself. One
    that may take any number is there to be called."""
    if isinstance(served, (type, partial)) or not callable(served):
        return isinstance(served, type)
    inspect = _import("inspect")  # slow to import
    if not inspect.isroutine(served):
        return False
    try:
        parameters = _signature(served).parameters.values()
    except ValueError:
        return False  # it does not tell
    if inspect.isbuiltin(served):
        return not parameters
    return all(each.default is not each.empty for each in parameters)


class _Loop:
    """An event loop on a thread of its own. Any thread may close it."""

    def __init__(self) -> None:
        self.loop = _import("asyncio").new_event_loop()
        self._closing = False
        self._thread = _start_thread("miniplug-loop", self._run)

    def _run(self) -> None:
        _import("asyncio").set_event_loop(self.loop)
        _loop_threads.add(threading.get_ident())
        try:
            while not self._closing:
                try:
                    self.loop.run_forever()
                except BaseException as error:  # a task calls sys.exit()
                    _print_error(error)
            self.loop.run_until_complete(self._cancel_all())
        finally:
            _loop_threads.discard(threading.get_ident())
            self.loop.close()

    async def _cancel_all(self) -> None:
        asyncio = _import("asyncio")
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.loop.shutdown_asyncgens()

    def close(self) -> None:
        self._closing = True
        if _call_on(self.loop, self.loop.stop):
            _quietly(self._thread.join, 1.0, kind=RuntimeError)  # a task may refuse to end


class _Served:
    """What this process serves to all who connect: plugins by name. For any thread."""

    def __init__(self, plugins: Mapping[str, Any], info: Mapping[str, Any] | None = None) -> None:
        self.plugins = plugins
        self.info = dict(info or {})
        self.config: dict[str, Any] | None = None  # what attach() takes, if a host can
        self._entering: dict[str, Any] = {}  # a lock for each name, held while that is entered
        self._shared: dict[str, tuple[Any, Any]] = {}  # by name: (object, context manager)
        self._lock = threading.Lock()  # protects the following two
        self._loop: _Loop | None = None
        self._closed = False

    def find(self, name: str | None) -> tuple[str, Any]:
        """What is served under a name, or the only plugin. Raises PluginNotFound."""
        names = sorted(self.plugins)
        if name is None and len(names) == 1:
            name = names[0]
        if name is None or name not in names:
            raise PluginNotFound(f"name={name!r}: what is served is {', '.join(names)}", names=names)
        return name, self.plugins[name]

    def shared(self, name: str) -> Any:
        """The object that all share; of a factory the instance that is described."""
        served = self.find(name)[1]
        with self._entering.setdefault(name, threading.RLock()):
            if self._closed:
                raise PluginClosed(_IS_CLOSING)
            if name not in self._shared:
                self._shared[name] = _enter(served() if _makes_instances(served) else served)
            if self._closed:  # meanwhile
                self.close()
                raise PluginClosed(_IS_CLOSING)
            return self._shared[name][0]

    def on_loop(self, function: Callable[[], Any]) -> bool:
        """Have the loop of the async methods call a function. False if it is closed."""
        with self._lock:
            if self._loop is None and not self._closed:
                self._loop = _Loop()
        return self._loop is not None and _call_on(self._loop.loop, function)

    def close(self) -> None:
        """End the event loop; exit the context managers, the latest first."""
        with self._lock:
            self._closed = True
        if self._loop is not None:
            self._loop.close()
        for name in [*self._shared][::-1]:  # another thread may do the same
            _exit(self._shared.pop(name, (None, None))[1])


def _enter(obj: Any) -> tuple[Any, Any]:
    """(what a context manager serves, the manager), or (any other object, None)."""
    if hasattr(type(obj), "__enter__") and hasattr(type(obj), "__exit__"):
        return type(obj).__enter__(obj), obj
    return obj, None


def _exit(manager: Any) -> None:
    try:
        if manager is not None:
            type(manager).__exit__(manager, None, None, None)
    except Exception as error:
        _print_error(error)


# -- references: objects that stay where they are

class _Ref:
    """An object to be passed by reference; a dispensed one with its context manager, or None."""

    def __init__(self, obj: Any, *manager: Any) -> None:
        self.object = obj
        self.manager = manager


def ref(obj: Any) -> Any:
    """Pass `obj` by reference, in an argument or a return value: the other side gets a proxy for it.

    The object stays here and is called from there, until the other side has let go of its last proxy or
    released it, or the connection ends. Sent back, it arrives as itself. Functions need no `ref`.
    """
    return _Ref(obj)


class _Target:
    """What a proxy and its methods share: where the object is."""

    released = False
    label = "the object"

    def __init__(self, session: _Session, number: int) -> None:
        self.session = session
        self.number = number
        self.place = session.caller, number
        self.timeout = session.call_timeout  # the deadline of its calls that have no other
        self.identity: Any = (session, number)  # also when it is dispensed anew
        notice: list[_Bytes] = [_FRAME.pack(_HEAD, _WIRE_VERSION, _RELEASE, 0, 0, number, 0)]
        self._notice = iter([notice] if number else ())  # posted by the step that takes it out
        session.borrowed.add(id(self))

    def here(self) -> tuple[_Caller, int] | None:
        """Where to call, if that is known without a look. The session may be sealed."""
        return None if self.released or self.session.sealed else self.place

    def number_at(self, session: _Session) -> int | None:
        return self.number if session is self.session and not self.released else None

    def find(self, asked: _Call) -> tuple[_Session, int]:
        """Where to call. Raises DeadReference, or what a plugin that cannot be called raises."""
        if self.released:
            raise DeadReference(f"{self.label} was released")
        if self.session.ended is not None:
            raise DeadReference(f"{self.label} is gone: the connection to its owner has ended")
        return self.session, self.number

    def waits(self) -> bool:
        return False

    def release(self) -> None:
        self.released = True
        self.session.discard(self._notice)
        self.session.borrowed.discard(id(self))

    def __del__(self) -> None:
        if hasattr(self, "_notice"):
            self.release()


def _reach(find: Callable[[_Call], tuple[_Session, int]], act: Callable[..., Any], method: str, args: Any,
           kwargs: Any, seconds: float | None) -> Any:
    """Call `act` with the session and number that `find` gives, again while that is sealed by then."""
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
        raise NotSerializable("a proxy cannot be copied or pickled", type_name="proxy")

    def __repr__(self) -> str:
        return f"<{self._name or 'proxy'} of {self._target.label}>"


def release(proxy: Any) -> None:
    """Give back what the other side has lent, before its last proxy is collected. A call on `proxy` raises
    DeadReference from then on. Raises TypeError for what is no proxy."""
    if not issubclass(type(proxy), _Remote):
        raise TypeError(f"{type(proxy).__name__} is no proxy")
    proxy._target.release()


class _Loan:
    """An object lent to the other side, and the context manager to exit with it."""

    def __init__(self, obj: Any, key: Any, manager: Any = None) -> None:
        self.object = obj
        self.key = key
        self.manager = manager
        self.methods = _method_names(obj)
        self.known = {name: name for name in self.methods or ()}
        self.sent: deque[None] = deque()  # one for each time it is out


class _Held(tuple):
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
        self._latest: deque[int] = deque(maxlen=1000)  # new numbers: one may be half lent
        self.lends = False  # whether anything is lent
        self._held: dict[int, Any] = {}  # weak references to loans given back, which a message may hold
        self._parting: list[_Loan] = []  # to be exited
        self._exit_lock = threading.RLock()  # held while they are

    def resolve(self, target: Any, method: str) -> Callable[..., Any]:
        """What a call runs; an empty name is the object itself. Raises MethodNotFound, DeadReference."""
        loan = self._loans.get(target) if type(target) is int else None
        if loan is None:
            loan = self.loan(target)
        obj, known = loan.object, loan.known.get(method)
        if known is not None:  # not by the string that has come: classes cache those they are asked by
            return getattr(obj, known)
        if not method and callable(obj):
            return obj
        if loan.methods is not None or method.startswith("_"):
            raise _no_method(method, loan.methods, "the plugin")
        if issubclass(type(obj), _Remote):
            return getattr(obj, method)
        return lambda *args, **kwargs: obj._dispatch(method, args, kwargs)

    def loan(self, number: Any) -> _Loan:
        loan = None
        if type(number) is int:
            loan = self._loans.get(number) or self._held.get(number, lambda: None)()
        if loan is None:
            raise DeadReference(f"reference {number!r} is not lent, or no longer")
        return loan

    def lend(self, session: _Session, value: Any, lent: list[int]) -> tuple[str, Any] | None:
        """The tag and state of what goes by reference, or None. A loan's number is added to `lent`."""
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
        return _holding(self._lock, self._lend, obj, key, manager, lent)

    def _lend(self, obj: Any, key: Any, manager: Any, lent: list[int]) -> tuple[str, Any]:
        number: Any = 0 if obj is self._loans[0].object else self._lent.get(key)
        loan = self._loans.get(number)
        if loan is None:  # it is new, or half lent: known here, but not lent
            loan = _Loan(obj, key, *manager)  # in there a finalizer may run, and lend the same
            number = self._lent.setdefault(key, next(self._numbers))
            self._latest.append(number)
            loan = self._loans.setdefault(number, loan)
        loan.sent.extend(map(lent.append, (number,)))  # one step: or it would be lent without a word
        self._lent[key], self._loans[number] = number, loan  # a finalizer's `unlend` takes what is half lent
        self.lends = True
        return "$ref", [number, loan.methods, callable(obj)]

    def held(self, message: _Message) -> _Message:
        """The message, holding what comes home in it: one behind it may give it back before."""
        *head, body, buffers = message
        if type(buffers) is _Held:
            return message
        held: Any = _Held(buffers)
        numbers = map(int, re.findall(rb'"\$own":\s*\[\s*(\d{1,18})\b', body))
        held.loans = [*map(self._loans.get, numbers)]
        return (*head, body, held)

    def own(self, number: Any, method: Any) -> Any:
        """What comes home. Raises DeadReference, MethodNotFound, ProtocolError."""
        if method is not None and type(method) is not str:
            raise ProtocolError(f"a method named {_shown(method)}")
        return self.resolve(number, method) if method else self.loan(number).object

    def release(self, come: deque[_Message], number: int) -> None:
        """As the reader: the first of `come` takes one count of a loan back."""
        loan = self._loans.get(number) if number else None
        self._latest.append(number)  # `unlend` looks again, should a handler raise behind the next step
        counts = itertools.starmap(loan.sent.pop if loan is not None else bool, _ONCE)
        _quietly(_consume, zip(itertools.starmap(come.popleft, _ONCE), counts), kind=IndexError)
        if loan is None or loan.sent:
            return
        if _holding(self._lock, self._drop, number, seconds=0) is False:
            # a finalizer that calls in the midst of `lend` may wait for us
            _pool.put((_holding, self._lock, self._drop, number))

    def _drop(self, number: int) -> None:
        """Under the lock: forget a loan that is out no more. The pool exits it, as that may take long."""
        loan = self._loans.get(number)
        if loan is None or loan.sent or not number:
            return
        self._held[number] = _ref_to(loan, lambda gone: self._held.pop(number, None))
        del self._loans[number]
        self._lent.pop(loan.key, None)
        self.lends = len(self._loans) > 1
        if loan.manager is not None:
            self._parting.append(loan)
            _pool.put((self._exit_parting,))

    def _exit_parting(self) -> None:
        with self._exit_lock:
            while self._parting:
                _exit(self._parting.pop().manager)

    def unlend(self, lent: Any) -> None:
        """Take back what was lent for a message that was not sent, and what is half lent or half dropped."""
        _holding(self._lock, self._unlend, lent)

    def _unlend(self, lent: Any) -> None:
        while lent:
            number = lent.pop()
            if number in self._loans:
                _quietly(self._loans[number].sent.pop, kind=IndexError)
            self._drop(number)
        for number in list(self._latest):
            self._drop(number)
        self.lends = len(self._loans) > 1

    def close(self) -> None:
        """The connection has ended: exit the context managers, the latest first."""
        with self._lock:
            loans, self._loans = self._loans, {0: self._loans[0]}
            self._lent, self.lends = {}, False
        self._parting.extend(loan for number, loan in loans.items() if number)
        self._exit_parting()


class _System:
    """The target ``system``: what a plugin tells about itself (docs/protocol.md, section 7)."""

    def __init__(self, references: _References) -> None:
        self._references = references
        self._served = references.served

    def dispense(self, name: str | None = None) -> Any:
        """A reference to that plugin, or to the only one."""
        if name == "system":
            return _Ref(self)
        name, served = self._served.find(name)
        if _makes_instances(served):
            return _Ref(*_enter(served()))
        return _Ref(self._served.shared(name), None)

    def info(self) -> dict[str, Any]:
        return self._served.info

    def reattachConfig(self) -> dict[str, Any] | None:
        return self._served.config

    def listMethods(self) -> list[str]:
        return [f"{plugin}.{name}" for plugin, methods in self.describe().items() for name in methods]

    def methodHelp(self, name: str) -> str:
        return self._described(name)[1] or ""

    def methodSignature(self, name: str) -> str | None:
        """A method's signature, such as ``(name: str) -> str``, or None."""
        return self._described(name)[0]

    def describe(self, target: str | int | None = None) -> dict[str, Any]:
        """{method: [signature, doc, parameters]} of a plugin, of a reference's number, or of each plugin."""
        if target is None:
            return {plugin: self.describe(plugin) for plugin in ("system", *sorted(self._served.plugins))}
        if type(target) is int:
            obj = self._references.loan(target).object
        else:
            obj = self if target == "system" else self._served.shared(str(target))
        methods = {name: _describe(getattr(obj, name)) for name in _method_names(obj) or ()}
        return {"": _describe(obj), **methods} if type(target) is int and callable(obj) else methods

    def _described(self, name: str) -> Any:
        plugin, _, method = name.rpartition(".")
        methods = self.describe(plugin)
        if method not in methods:
            raise _no_method(method, methods, f"the plugin {plugin!r}")
        return methods[method]


def _describe(function: Any) -> list[Any]:
    """A function as [signature, doc, [[name, kind, default, annotation], ...]], None for what is not known.
    The last row is the result."""
    inspect = _import("inspect")
    doc = inspect.getdoc(function)
    try:
        signature = _signature(function)
    except (TypeError, ValueError):
        return [None, doc, None]
    rows = [[each.name, int(each.kind), each.default, each.annotation]
            for each in signature.parameters.values()]
    rows.append(["return", 0, signature.empty, signature.return_annotation])
    for row in rows:
        for place, show in ((2, repr), (3, inspect.formatannotation)):
            row[place] = None if row[place] is signature.empty else show(row[place])
    return [str(signature), doc, rows]


# === 7. proxies =========================================================================================

class MethodInfo(namedtuple("_MethodInfo", "name signature doc")):
    """What `Plugin.describe` tells of a method: `name`, and as text or None its `signature` and `doc`."""

    __slots__ = ()
    if TYPE_CHECKING:
        name: str
        signature: str | None
        doc: str | None


_call = _Caller.call  # which Python 3.11 does not look up quickly


def _act_at(act: Callable[..., Any], session: _Session, *what: Any) -> Any:
    return act(session.caller, *what)


class _Method(_Remote):
    # A method of the other side's; with an empty name the object itself, which is called.

    __slots__ = ("_name", "_target", "_timeout")

    def __init__(self, target: _Target, name: str, timeout: float | None = None) -> None:
        self._target = target
        self._name = name
        self._timeout = target.timeout if timeout is None else timeout

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._act(_call, args, kwargs)

    def submit(self, *args: Any, **kwargs: Any) -> Call:
        """Call without waiting: returns a Call, a concurrent.futures.Future that asyncio can await."""
        call: Call = _on_first_use("Call")()
        try:
            self._act(call._begin, args, kwargs, call)
            return call
        except BaseException:
            _pool.put((call._withdraw,))
            raise

    def notify(self, *args: Any, **kwargs: Any) -> None:
        """Call, and want no answer. What the method raises goes to the plugin's stderr."""
        self._act(_Caller.notify, args, kwargs)

    def timeout(self, seconds: float | None) -> _Method:
        """The same method with a deadline: past `seconds` it raises CallTimeout. None: the default."""
        return type(self)(self._target, self._name, _checked_timeout(seconds))

    def _act(self, act: Callable[..., Any], args: Any, kwargs: Any, call: Any = None) -> Any:
        """Call `act` with who calls over the session where the object is now, and all that a call needs. One
        that was submitted, `call`, may begin later, if it has to wait for a start."""
        target, seconds = self._target, self._timeout
        place = target.here()
        if place is not None:
            try:
                return act(place[0], place[1], self._name, args, kwargs, seconds)
            except _Sealed:
                pass
        begin = partial(_reach, target.find, partial(_act_at, act), self._name, args, kwargs)
        if call and target.waits():
            return _aside("miniplug-submit", call._attempt, begin, seconds)
        return begin(seconds)


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
    if seconds is not None and not (isinstance(seconds, (int, float)) and seconds >= 0):
        raise ValueError(f"{name}={seconds!r}: it is a number of seconds, or None for no limit")
    return seconds


# What options take whose type in the signature is no class: the error, in words, as a test.
_TYPES: dict[str, tuple[type, str, Callable[[Any], Any]]] = {
    "_Path": (TypeError, "a path", lambda value: isinstance(value, (str, bytes, os.PathLike))),
    "Iterable[int]": (ValueError, "a list of whole numbers, each at least 0", lambda value: value and
                      isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)),
    "Mapping[str, str]": (TypeError, "a dict of str to str", lambda value: hasattr(value, "items") and
                          all(isinstance(part, str) for item in value.items() for part in item)),
    "str | IO[Any]": (ValueError, "'discard', 'inherit', or a file",
                      lambda value: value in ("discard", "inherit") or hasattr(value, "fileno")),
    "_Output": (ValueError, "'log', 'inherit', 'discard', a function, or a text file", lambda value:
                value in ("log", "inherit", "discard") or callable(value) or hasattr(value, "encoding")),
    "str | Mapping[_Path, str]": (ValueError, "64 hexadecimal digits, or {path: digest}", lambda value: all(
        isinstance(each, str) and re.fullmatch("[0-9a-fA-F]{64}", each)
        for each in (value.values() if hasattr(value, "values") else [value]))),
    "Callable[[Plugin], Any]": (TypeError, "a function", callable)}


def _check(function: Callable[..., Any], given: dict[str, Any]) -> None:
    """Check what a function was given by its signature. Raises TypeError, ValueError."""
    for name, value in given.items():
        wanted, none, _ = function.__annotations__.get(name, "").partition(" | None")
        if value is None and none:
            continue
        if wanted == "int":
            _checked_count(value, name, {"max_message": _HELLO_LIMIT, "max_workers": 1}.get(name, 0))
        elif wanted == "float":
            _checked_timeout(value, name)
        elif wanted in _TYPES:
            kind, words, is_right = _TYPES[wanted]
            if not is_right(value):
                raise kind(f"{name}={value!r}: it is {words}")
        elif wanted.replace(".", "").isidentifier():  # of another copy of this file, too
            if wanted.rpartition(".")[2] not in [each.__name__ for each in type(value).__mro__]:
                raise TypeError(f"{name}={value!r}: it is a {wanted}")


class _Proxy(_Remote):
    # An object of the other side's, with its public methods.

    def __init__(self, target: _Target, names: Sequence[str] | None) -> None:
        vars(self).update(_target=target, _names=names, _interface=_Proxy)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or (self._names is not None and name not in self._names):
            raise _no_method(name, self._names, self._target.label)
        method = self.__dict__[name] = _Method(self._target, name)  # found there the next time
        return method

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{self._target.label} has methods only, no {name!r} to set")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Method(self._target, "")(*args, **kwargs)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *(self._names or ())})

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self.__dict__["_interface"]  # what isinstance() believes, also of an ABC

    def _adopt(self, interface: type) -> None:
        """Be an instance of the interface. Raises InterfaceMismatch."""
        differences = _differences(interface, self._target, self._names)
        if differences:
            text = f"{self._target.label} is no {interface.__name__}: {'; '.join(differences)}"
            raise InterfaceMismatch(text, differences=differences)
        vars(self)["_interface"] = interface
        inspect = _import("inspect")
        for name in _method_names(interface) or ():
            declared = getattr(interface, name)
            if inspect.iscoroutinefunction(declared):
                vars(self)[name] = _AsyncMethod(self._target, name)
            elif inspect.isasyncgenfunction(declared):
                vars(self)[name] = _AsyncStream(self._target, name)


def _borrow(session: _Session, tag: str, state: Any) -> Any:
    """What a reference that has come stands for. Raises ProtocolError, DeadReference, MethodNotFound."""
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
    return _Session(channel, terms, max_message, _References(served), _borrow, *others)


# -- interfaces

def _ask_description(target: _Target) -> dict[str, Any]:
    """{method: [signature, doc, parameters]}, as far as the other side tells."""
    def ask(session: _Session, number: int, *others: Any) -> Any:
        return session.call(0, "describe", (number,), {}, others[-1])

    try:
        return _checked_description(_reach(target.find, ask, "describe", (), {}, target.session.call_timeout))
    except MethodNotFound:  # it is not written with miniplug
        return {}


def _checked_description(found: Any) -> dict[str, Any]:
    methods, texts = found if type(found) is dict else {}, {str, type(None)}
    return {name: each for name, each in methods.items() if type(name) is str and type(each) is list
            and len(each) == 3 and texts.issuperset(map(type, each[:2]))}


def _differences(interface: type, target: _Target, names: Sequence[str] | None) -> list[str]:
    """What keeps an object with methods of these names (None: all) from being the interface, in words."""
    inspect = _import("inspect")
    abstract = getattr(interface, "__abstractmethods__", ())
    described = {} if names is None else _ask_description(target)
    found = []
    for name in sorted({*dir(interface), *abstract}):
        is_private = name.startswith("_")
        if is_private or isinstance(inspect.getattr_static(interface, name), property):
            if name in abstract or (not is_private and getattr(interface, "_is_protocol", False)):
                what = "private" if is_private else "a property"
                found.append(f"{name!r} is {what}, and no public method")
        elif names is not None and callable(getattr(interface, name)):
            if name not in names:
                found.append(f"it has no method {name!r}")
            elif name in described:
                found += _refusals(interface, name, *described[name])
    return found


def _refusals(interface: type, name: str, shown: str, doc: str, parameters: Any) -> list[str]:
    """What the plugin's method does not take of the calls that the interface's allows, in words."""
    inspect = _import("inspect")
    try:
        mine = _signature(getattr(interface, name))
        *others, (_, _, _, _) = parameters  # the last is the result
        theirs = inspect.Signature(
            [inspect.Parameter(each, kind, default=mine.empty if default is None else default)
             for each, kind, default, _ in others])
    except (TypeError, ValueError):
        return []  # one of the two is not known
    if inspect.isfunction(inspect.getattr_static(interface, name)):
        mine = mine.replace(parameters=[*mine.parameters.values()][1:])  # without self
    try:
        for count, keywords in _allowed_calls(mine.parameters.values()):
            theirs.bind(*[None] * count, **dict.fromkeys(keywords))
    except TypeError as error:
        return [f"{name}{shown} does not take all that {name}{mine} allows: {error}"]
    return []


def _allowed_calls(parameters: Iterable[Any]) -> Iterable[tuple[int, list[str]]]:
    """The calls to try, as (how many by position, names of the others): for each count without optional
    names, and with all. What takes those takes all between."""
    only, either, more, named, others = ([each for each in parameters if each.kind == kind]
                                         for kind in range(5))
    positional = only + either
    least = sum(each.default is each.empty for each in only)
    for count in range(least, len(positional) + 1 + 3 * len(more)):
        rest = positional[max(count, len(only)):] + named
        yield count, [each.name for each in rest if each.default is each.empty]
        yield count, [each.name for each in rest] + ["any_other_name"] * len(others)


# -- calls and streams

if TYPE_CHECKING:
    import concurrent.futures

    _Future = concurrent.futures.Future[Any]
else:
    _Future = object  # until Call is made


class _Awaitable(_Future):
    """A call that was submitted: a concurrent.futures.Future that can also be awaited in asyncio."""

    _call: _Call | None = None
    _done_callbacks: list[Any]

    def _begin(self, caller: _Caller, *what: Any) -> None:
        if self._state != "PENDING":  # cancelled, or failed with a session
            return
        call = caller.submit(self, *what)
        if self._state[:9] == "CANCELLED":  # meanwhile, by a signal handler
            _pool.put((caller.give_up, call))

    def _withdraw(self) -> None:
        if self._call is not None:
            self._call.leaves = False  # a handler may have struck before
        self.cancel()

    def _arrive(self, call: _Call, come: deque[_Message], attends: bool) -> None:
        """As the reader: the answer has come. Where callbacks may take long, or a handler strike, the pool
        does the rest."""
        if attends and self._condition.acquire(False):  # who was struck in `result` may hold it for ever
            try:  # no callback is added meanwhile; ours only send word to a loop
                if all(type(each) is partial and each.func is _wake_task for each in self._done_callbacks):
                    return self._settle(call, come.popleft())
            finally:
                self._condition.release()
        return _move(come.popleft, self._settle, call)

    def _settle(self, call: _Call, message: _Message) -> None:
        call.session.reader.unattended.discard(call.number)  # the reader may have been struck before that
        if not call.streams:
            call.session.calls.pop(call.number, None)
        if self.done():
            call.session.drop(message)
            return
        try:
            value = call.session.caller.value(call, inbox=[message])
        except BaseException as error:
            self._fail(error)
        else:
            call.future = None  # a stream in it is to go when nobody wants it
            self._end(self.set_result, value)

    def _fail(self, error: BaseException) -> None:
        self._end(self.set_exception, error)

    def _attempt(self, function: Callable[..., Any], *args: Any) -> None:
        """Call a function; what that raises is the answer."""
        try:
            function(*args)
        except BaseException as error:
            self._fail(error)

    def _end(self, settle: Callable[[Any], Any], outcome: Any) -> None:
        _quietly(settle, outcome, kind=_import("concurrent.futures").InvalidStateError)

    def cancel(self) -> bool:
        """Give the call up, here and at the plugin, unless it has been answered."""
        with self._condition:
            if self.done():
                return self.cancelled()
            callbacks, self._done_callbacks = self._done_callbacks, []
            super().cancel()
            self.set_running_or_notify_cancel()
        call = self._call
        try:
            if call is not None and call.session is not None:
                _in_pool(call.session.caller.give_up, call)  # where no handler strikes
        finally:
            for callback in callbacks:  # only now: one may wait for what the call holds
                self.add_done_callback(callback)
        return True

    def __await__(self) -> Any:
        asyncio = _import("asyncio")
        if not self.done():
            waiter = asyncio.get_running_loop().create_future()
            self.add_done_callback(partial(_wake_task, waiter))
            try:
                yield from waiter
            except asyncio.CancelledError:
                self.cancel()
                raise
        try:
            return self.result()
        except _import("concurrent.futures").CancelledError:
            raise asyncio.CancelledError from None


def _wake_task(waiter: Any, call: Any) -> None:
    _call_on(waiter.get_loop(), lambda: waiter.done() or waiter.set_result(None))


if TYPE_CHECKING:
    class Call(_Awaitable): ...


class Stream:
    """What a method gives that returns a generator or an iterator: iterate with ``for`` or ``async for``.

    At most 64 items wait here unread. `close()`, `aclose()`, the end of ``with`` and letting go of it give
    the rest up and close the plugin's generator, whose exceptions are raised here. Each item has the deadline
    that the call had.
    """

    def __init__(self, session: _Session, call: _Call) -> None:
        self._session = session
        self._call = call
        self._lock: Any = threading.RLock()  # held by who goes on to the next message
        self._batch: Any = (iter(()), 0)  # the items of the latest message; how many have come in all
        self._waiters: list[Any] = []  # (loop, event) of the tasks that wait for items
        self._over = False
        call.watcher = partial(_wake, self._waiters)
        session.borrowed.add(id(self))  # until it is over: what has come may be unread

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Any:
        while True:
            for item in self._batch[0]:
                return item
            if self._over:
                raise StopIteration
            if self._lock._is_owned():
                raise _waits_for_itself(self._call)
            _holding(self._lock, self._advance, True)

    __aiter__ = __iter__

    async def __anext__(self) -> Any:
        while True:
            for item in self._batch[0]:
                return item
            if self._over:
                raise StopAsyncIteration
            _holding(self._lock, self._advance, False, seconds=0)
            await self._news()

    def _advance(self, wait: bool) -> None:
        """Go on to the next message, unless the latest is still being read; without `wait` if it has come."""
        call, batch = self._call, self._batch
        if self._over or batch[0].__length_hint__():
            return
        try:
            count = batch[1] + _WINDOW - call.granted
            if count >= _WINDOW // 2 and call.number in self._session.calls:
                call.granted += count
                self._session.post(_CREDIT, call.number, count)
            if wait:
                self._session.caller.next(call)
            if call.inbox and not self._over:
                self._take(call)
        except BaseException:
            _pool.put((self._session.caller.give_up, call))
            self._finish()
            raise

    def _take(self, call: _Call) -> None:
        try:
            values = self._session.caller.value(call, _ITEM)
        except StopIteration:
            self._finish()
            self._session.calls.pop(call.number, None)
            return
        received = self._batch[1] + len(values) if type(values) is list else 0
        if not values or not 0 < received <= call.granted:
            problem = ProtocolError("a stream's items are a list, no longer than there is credit for")
            raise self._session.failed(problem, call)
        self._batch = (iter(values), received)
        _wake(self._waiters)  # who looked just before

    async def _news(self) -> None:
        asyncio, call, reader = _import("asyncio"), self._call, self._session.reader
        waiter = asyncio.get_running_loop(), asyncio.Event()
        self._waiters.append(waiter)
        try:
            reader.unattended.add(waiter)
            if not (self._over or call.inbox or self._batch[0].__length_hint__()):
                reader.pass_on()
                await asyncio.wait_for(waiter[1].wait(), call.seconds)
        except asyncio.TimeoutError:
            if not call.inbox:  # what has come counts, also past the deadline
                self.close()
                raise _too_late(call) from None
        finally:
            self._waiters.remove(waiter)
            reader.unattended.discard(waiter)

    def _finish(self) -> None:
        self._batch = (iter(()), self._batch[1])
        self._over = True
        self._session.borrowed.discard(id(self))
        _wake(self._waiters)

    def close(self) -> None:
        """Give the rest up: the plugin's generator is closed."""
        if not self._over:
            _pool.put((self._session.caller.give_up, self._call))
            self._finish()

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
    """As the reader: something has come, every task looks."""
    for loop, event in list(waiters):
        _call_on(loop, event.set)


# === 8. serve ===========================================================================================

# The variables by which a host speaks to the plugin that it starts.
_ADDRESS, _AUTHKEY, _LOG_LEVEL = "MINIPLUG_ADDRESS", "MINIPLUG_AUTHKEY", "MINIPLUG_LOG_LEVEL"
_PERSIST = "MINIPLUG_PERSIST"  # stay when the host goes
_ATTACH = "MINIPLUG_ATTACH"  # {NAME: config} as JSON: where a host attaches instead of launching
_COOKIE_KEY = "MINIPLUG_COOKIE_KEY"  # names the variable of the magic cookie
_LOADING = "MINIPLUG_LOADING"  # what is being started, down to this process: see _Recipe.above
_GRACE = 2.0  # seconds that a plugin has to end by itself
_MAX_MESSAGE = 256 << 20

_environment: dict[str, str] = {}  # our variables, once taken out of os.environ


def _variable(name: str) -> str:
    """An environment variable's name as os.environ lists it."""
    return name.upper() if _WINDOWS else name


def _take_environment() -> None:
    cookie = _variable(os.environ.get(_COOKIE_KEY, "MINIPLUG_COOKIE"))
    for name in [name for name in os.environ if name.startswith("MINIPLUG_") or name == cookie]:
        _environment[name] = os.environ.pop(name)


def _refuse_monkey_patches() -> None:
    """Raises RuntimeError where there are green threads instead of the system's: waiting would hang."""
    for function in (socket.socket, threading.get_ident, time.sleep):
        library = str(getattr(function, "__module__", "")).partition(".")[0]
        if library in ("gevent", "eventlet"):
            raise RuntimeError(f"miniplug does not run under the monkey patches of {library}: have the "
                               "plugins in a process without them")


def serve(plugins: Mapping[Any, Any], *, info: Mapping[str, Any] | None = None,
          handshake: Handshake = Handshake(), address: str | None = None, authkey: bytes | str | None = None,
          persist: bool = False, max_workers: int = 64, max_message: int = _MAX_MESSAGE) -> None:
    """Serve plugins to the host that started this process, until it says stop or is gone; then return.

    `plugins` maps a name to an object or a function with arguments, which all callers share; or to a class or
    zero-argument factory, which makes an instance for each `dispense`; or an int, a protocol version, to such
    a mapping. A context manager is entered before its first call and exited at the end.

    `info` is a plain dict that the host reads as `Plugin.info`. Calls run in threads, at most `max_workers`
    at once (1: one after another). A message of more than `max_message` bytes (at least 4096) is refused.

    `persist=True`: stay when the host goes, for others to `attach` to, until one of them says stop. They
    attach at `address`: a path with a ``/`` in it, ``127.0.0.1:PORT`` or, on Windows, the name of a pipe; by
    default a private place. `authkey` is the key that they hold: at least 16 bytes, or as many in hexadecimal
    digits; by default a fresh one.

    Started by hand with `persist` or an `address`, it prints what `attach` needs, as JSON, and serves until
    Ctrl-C, or without `persist` until its last host is gone. Else it exits with status 1 (SystemExit).

    Raises ValueError or TypeError for what cannot be served, OSError for an `address` that is not to be had,
    and RuntimeError the second time, and under the monkey patches of gevent or eventlet.
    """
    _check(serve, locals())
    server = _Server(_versions(plugins, handshake), info, max_workers, max_message)
    secret = os.urandom(32) if authkey is None else _checked_key(authkey)
    _take_environment()
    key = _variable(handshake.magic_cookie_key)
    cookie = os.environ.pop(key, None) or _environment.pop(key, None)  # somebody may have set it by hand
    _serve(server, {"key": key, "matches": cookie == handshake.magic_cookie_value}, address, secret, persist)


def _serve(server: _Server, cookie: Mapping[str, Any], address: str | None, secret: bytes,
           persist: bool) -> None:
    _refuse_monkey_patches()
    host, key = _environment.get(_ADDRESS), _environment.pop(_AUTHKEY, "")
    server.stays = persist = persist or _PERSIST in _environment
    if host is None and not persist and address is None:
        sys.exit("This program is a plugin: an application starts it, with miniplug.launch(). By hand give "
                 "an address (--listen ADDRESS) or persist=True (--persist).")
    if host == "":
        raise RuntimeError("this process has served its host already: serve() works once")
    _environment[_ADDRESS] = ""
    _environment.pop(_LOADING, None)
    _prepare_output()
    try:
        if persist or address is not None:
            server.listen(address or "", secret)
            signal = _import("signal")
            if _in_main_thread() and signal.getsignal(15) == signal.SIG_DFL:
                signal.signal(15, signal.default_int_handler)  # SIGTERM ends it as Ctrl-C does
        if host is None:
            print(json.dumps(server.config), flush=True)
        else:
            server.serve_launcher(host, key, cookie)
        while not server.over.wait(0.5):
            pass  # a signal on Windows, or to another thread, does not interrupt it
    except KeyboardInterrupt:
        if host is not None and not persist:
            raise
    finally:
        server.close()


def _checked_key(key: bytes | str) -> bytes:
    try:
        data = bytes.fromhex(key) if isinstance(key, str) else bytes(memoryview(key))
    except (TypeError, ValueError):
        data = b""
    if len(data) < 16:
        raise ValueError("authkey: it is at least 16 bytes, or as many in hexadecimal digits")
    return data


def _checked_config(config: Any) -> dict[str, Any]:
    """Raises ValueError, which does not tell the key."""
    kinds = {"network": str, "address": str, "authkey": str, "pid": int, "protocol_version": int}
    if not (isinstance(config, dict) and all(type(config.get(key)) is kind for key, kind in kinds.items())):
        raise ValueError(f"it takes a dict with {', '.join(kinds)}, as Plugin.reattach_config() gives it")
    _checked_key(config["authkey"])
    return {key: config[key] for key in kinds}


class _Server:
    """What this process serves, and to whom, each over a session of its own.

    The main thread listens, serves the launcher, waits and closes; a thread of the door attends to each host
    that attaches; any may `stop` it. `_lock` protects `_sessions`, `_grace` and `over`.
    """

    def __init__(self, versions: Mapping[Any, Mapping[str, Any]], info: Mapping[str, Any] | None,
                 max_workers: int, max_message: int) -> None:
        """A version None stands for whatever a host asks for."""
        if not (info is None or hasattr(info, "keys")):
            raise TypeError(f"info={info!r}: it is a dict about the plugin, or None")
        self.stays = False  # also when its hosts are gone
        self.config: dict[str, Any] = {}  # what another host needs to attach
        self._served = {version: _Served(plugins, info) for version, plugins in versions.items()}
        self._max_message = max_message
        self._slots = _Slots(_checked_count(max_workers, "max_workers", 1))
        self._door: _Door | None = None
        self._parting = threading.Lock()  # held while a session is let go of
        self._lock = threading.Lock()
        self._sessions: list[_Session] = []  # those that are not disposed of
        self._grace = _GRACE  # in seconds, that the calls have and what is served
        self.over = threading.Event()  # set once it is to end

    def greet(self, key: bytes, cookie: Mapping[str, Any], channel: _Channel, address: str) -> _Terms:
        versions = None if None in self._served else sorted(self._served)
        hello = _Hello(channel, address, key, "plugin")
        return hello.as_plugin(versions, self._max_message, cookie, *["persist"] * self.stays)

    def listen(self, address: str, key: bytes) -> None:
        """Let hosts attach. They need no cookie: it is not they who start this program."""
        self._door = _Door(partial(self.greet, key, {"matches": True}), self._arrived, address, stays=True)
        address = self._door.listener.address
        version = max((each for each in self._served if each is not None), default=1)
        self.config.update(network=_transport(address), address=address, authkey=key.hex(), pid=os.getpid(),
                           protocol_version=version)
        for served in self._served.values():
            served.config = self.config

    def _arrived(self, channel: _Channel, terms: Any) -> None:
        if isinstance(terms, _Terms):  # or the host has refused this plugin
            self.attend(channel, terms)

    def serve_launcher(self, address: str, key: str, cookie: Mapping[str, Any]) -> None:
        """Exits if there is none, or if it refuses."""
        try:
            channel, terms = _come_in(
                address, lambda channel: self.greet(_checked_key(key), cookie, channel, address))
        except (OSError, EOFError, ValueError, PluginError) as error:
            sys.exit(f"miniplug: no host at {address} takes this plugin: {error!r}")
        cause = self.attend(channel, terms, launcher=True)
        if isinstance(cause, (ProtocolError, MemoryError)) and not self.stays:
            sys.exit(f"miniplug: the connection to the host has failed: {cause!r}")

    def attend(self, channel: _Channel, terms: _Terms, launcher: bool = False) -> BaseException | None:
        def lost(cause: BaseException) -> Any:
            if launcher and self.stays:
                _turn_output_away()
            return lambda calls: PluginClosed("the host is gone")

        served = self._served.get(terms.protocol_version) or self._served[None]
        with self._lock:
            if self.over.is_set():
                channel.close()
                return None
            session = _open_session(channel, terms, self._max_message, served, lost, True, self._slots)
            self._sessions.append(session)
        while not session.finished.acquire(True, _LOOK_AGAIN):
            pass  # what a signal raises just before this waits too
        grace = session.closing or 0.0
        if grace >= 0:
            self.stop(grace)
        elif not self.stays and all(each.closing is not None for each in list(self._sessions)):
            self.stop()  # the last one is gone
        with self._parting:
            if not self.over.is_set():  # else `close` does that
                self._part([session])
        return session.cause

    def _part(self, sessions: list[_Session], served: Iterable[_Served] = ()) -> None:
        """Give the calls that run their time; let go of sessions, and then of what is served."""
        deadline = time.monotonic() + self._grace / 2
        for session in sessions:
            _until(partial(operator.not_, session.requests), _left(deadline))
            session.references.close()
        for each in served:
            each.close()
        for session in sessions:
            session.dispose()
            self._sessions.remove(session)

    def stop(self, grace: float = _GRACE) -> None:
        with self._lock:
            self._grace = self._grace if self.over.is_set() else grace
            self.over.set()
            sessions = list(self._sessions)
        for session in sessions:
            session.stop(self._grace)

    def close(self) -> None:
        self.stop()
        if self._door is not None:
            self._door.close()
        with self._parting:
            self._part(list(self._sessions), self._served.values())


def _turn_output_away() -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _versions(plugins: Mapping[Any, Any], handshake: Handshake) -> Mapping[int, Mapping[str, Any]]:
    """{version: {name: object, ...}, ...}. Raises ValueError, TypeError."""
    by_version = hasattr(plugins, "keys") and plugins and all(type(key) is int for key in plugins)
    versions = plugins if by_version else {handshake.protocol_version: plugins}
    for version, mapping in versions.items():
        _checked_count(version, "protocol_version")
        if not (hasattr(mapping, "keys") and mapping and all(isinstance(name, str) for name in mapping)):
            takes = "{name: object, ...} or {version: {name: object, ...}, ...}"
            raise TypeError(f"plugins={_shown(plugins)}: it is {takes}, and not empty")
        if "system" in mapping:
            raise ValueError("plugins: the name 'system' is reserved: give the plugin another one")
    return versions


# -- output and logging in the plugin: lines on stderr, as hclog's JSON

_LEVELS = {"error": 40, "warn": 30, "info": 20, "debug": 10, "trace": 5}


def _prepare_output() -> None:
    """Every line leaves at once, as UTF-8; a crash tells where it was; logging speaks to the host."""
    stream: Any
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
        except Exception:
            pass  # there is none, it is closed, or it is the plugin's own
    _quietly(partial(_import("faulthandler").enable, all_threads=False), kind=Exception)  # there is no stderr
    level = int(_environment.pop(_LOG_LEVEL, -1))
    if level < 0:  # by hand
        return
    if "logging" in sys.modules:
        _set_up_logging(sys.modules["logging"], level)
    else:
        sys.meta_path.insert(0, _LoggingHook(level))
    if _in_main_thread() and not _WINDOWS and _posix.getpgrp() != os.getpid():
        signal = _import("signal")
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it shares the terminal, whose Ctrl-C is the host's


class _LoggingHook:
    """An import hook: logging is set up once somebody imports it, which is slow."""

    def __init__(self, level: int) -> None:
        self._level = level

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "logging":
            return None
        sys.meta_path.remove(self)
        spec = _import("importlib.util").find_spec(name)
        self._code, spec.loader = spec.loader.get_code, self  # a loader may be shared: it is left as it is
        return spec

    def create_module(self, spec: Any) -> None:
        pass  # an ordinary one

    def exec_module(self, module: ModuleType) -> None:
        exec(self._code("logging"), vars(module))
        _set_up_logging(module, self._level)


def _set_up_logging(logging: Any, level: int) -> None:
    """Send all records to the host, unless the plugin has handlers of its own, or calls basicConfig."""
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
    when = _found("datetime.datetime.fromtimestamp")(record.created, _found("datetime.timezone.utc"))
    trace = formatter.formatException(record.exc_info) if record.exc_info else record.exc_text
    fields = {"@level": next((name for name, number in _LEVELS.items() if record.levelno >= number), "trace"),
              "@levelno": record.levelno, "@module": record.name, "@message": record.getMessage(),
              "@timestamp": when.isoformat(timespec="microseconds"),
              "@traceback": "\n".join(filter(None, (trace, record.stack_info)))}
    blank = _import("logging").makeLogRecord({"message": "", "asctime": ""})  # what formatting adds
    more = {key: value for key, value in vars(record).items() if not hasattr(blank, key)}
    try:
        return json.dumps({**more, **fields}, default=repr, skipkeys=True)
    except Exception:  # one of them holds itself, say, or its repr raises
        return json.dumps(fields)


# -- a plugin's output in the host

_LINE_LIMIT = 4 << 20  # characters; a longer line is delivered in pieces
_TAIL_LINES = 30  # how many last lines an error carries


class _Lines:
    """One output stream of a plugin, read by one thread: bytes to lines, which `deliver` takes."""

    def __init__(self, file: IO[bytes], deliver: Callable[[str], Any]) -> None:
        self.file = file
        self.tail: deque[str] = deque(maxlen=200)
        self._log = deliver if isinstance(deliver, _LogSink) else None
        self._flush = partial(_guard, self._log.flush if self._log else bool)
        self._deliver = deliver
        self._decoder = _import("codecs").getincrementaldecoder("utf-8")("backslashreplace")
        self._line = io.StringIO()  # as much of it as has come
        self._returned = False  # whether the last line has ended with a \r, which a \n may follow

    def read_until(self, ended: Callable[[], bool], wake: int) -> None:
        """Read until the stream ends, or the process has: another one may hold the pipe open."""
        more, last = True, float("inf")
        while more and time.monotonic() < last:
            over = ended()
            last = min(last, time.monotonic() + 0.8) if over else last
            held = self._log and self._log.trace  # a traceback that may go on
            if self._await_more(0.0 if over else 0.1 if held else None, wake):
                data = os.read(self.file.fileno(), 1 << 16)
                self._take(data)
                more = bool(data)
            else:
                more = not over
                self._flush()
        self._take(b"")
        self._flush()

    def _await_more(self, seconds: float | None, wake: int) -> bool:
        """Whether there is something to read, within that time and before `wake` ends."""
        if not _WINDOWS:
            return self.file in _import("multiprocessing.connection").wait([self.file, wake], seconds)
        if seconds is None:
            return True  # reading itself is what waits
        handle = _import("msvcrt").get_osfhandle(self.file.fileno())
        peek = partial(_import("_winapi").PeekNamedPipe, handle, 0)
        try:
            _until(lambda: peek()[0], seconds)
            return bool(peek()[0])
        except OSError:
            return True  # its end

    def _take(self, data: bytes) -> None:
        """Deliver the lines of what has come; of nothing, at the end, what is left."""
        text = self._decoder.decode(data, final=not data)
        if text:
            text, self._returned = text[self._returned and text[0] == "\n" :], text[-1] == "\r"
        first, *others = re.split("\r\n?|\n", text)
        self._line.write(first)
        for text in others:
            self._end_line()
            self._line.write(text)
        if self._line.tell() >= (_LINE_LIMIT if data else 1):
            self._end_line()

    def _end_line(self) -> None:
        text, self._line = self._line.getvalue(), io.StringIO()
        self.tail.append(text[: 1 << 14])
        _guard(self._deliver, text)

    def last(self) -> list[str]:
        """The last lines, for people; of a long report of faulthandler's the first, too, which tell most."""
        lines = [_cut(line) for text in self.tail for line in _readable(text).splitlines() or [""]]
        heads = [place for place, line in enumerate(lines) if line.startswith("Fatal Python error: ")]
        lines = lines[min([*heads[-1:], max(len(lines) - _TAIL_LINES, 0)]) :]
        half = _TAIL_LINES // 2
        return lines if len(lines) <= _TAIL_LINES else [*lines[:half], *lines[-half:]]


def _record_of(line: str) -> dict[str, Any]:
    """The fields of a line of hclog's JSON. Of any other none."""
    try:
        fields = json.loads(line, parse_int=_make_integer) if line.startswith("{") else {}
    except (ValueError, RecursionError):
        fields = {}
    if not isinstance(fields.get("@message"), str):
        return {}
    return {key: _clean(value) for key, value in fields.items()
            if not key.startswith("@") or isinstance(value, (str, int))}


def _clean(value: Any) -> Any:
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _readable(line: str) -> str:
    """A log record as text. Any other line is itself."""
    fields = _record_of(line)
    if not fields:
        return line
    level = str(fields.get("@level", "info")).upper()
    trace = f"\n{fields['@traceback']}" if fields.get("@traceback") else ""
    return f"[{level}] {fields.get('@module', '')}: {fields['@message']}{trace}"


def _guard(function: Callable[..., Any], *args: Any, what: str = "what takes a plugin's output") -> None:
    """Call what the host has given us. What it raises is only logged."""
    try:
        function(*args)
    except BaseException:
        log = _import("logging").getLogger("miniplug").exception
        _quietly(log, "%s raised", what, kind=Exception)  # a log handler may be what raises


class _LogSink:
    """Lines to log records: hclog's JSON as it says, a traceback as one, any other line as it is."""

    _HEADS = ("Traceback (most recent call last):", "Exception in thread ", "  + Exception Group Traceback")
    _LINKS = (_HEADS[0], "During handling of the above exception,", "The above exception was the direct")

    def __init__(self, parent: logging.Logger, stream: str) -> None:
        self._parent = parent
        self._logger = parent.getChild(stream)
        self._prefix = self._logger.name[: -len(stream)]
        self._stderr = stream == "stderr"
        self.trace: list[str] = []  # the lines of a traceback, which may go on

    def __call__(self, line: str) -> None:
        if self.trace and len(self.trace) < 1000 and len(line) <= 1000 and self._goes_on(line):
            self.trace.append(line)
            return
        self.flush()
        fields = _record_of(line) if self._stderr else {}
        if self._stderr and line.startswith(self._HEADS):
            self.trace = [line]
        elif fields:
            self._record(fields)
        else:
            self._logger.log(30 if self._stderr else 20, "%s", line)

    def _goes_on(self, line: str) -> bool:
        """Whether the traceback does: up to the line that names the exception, or with one of a chain."""
        if not self.trace[-1].startswith((" ", *self._HEADS)):
            return not line or line.startswith(self._LINKS)
        return line.startswith(" ") or not self.trace[0].startswith(" ")

    def flush(self) -> None:
        lines, self.trace = self.trace, []
        if lines:
            self._logger.error("%s", "\n".join(lines).rstrip("\n"))

    def _record(self, fields: dict[str, Any]) -> None:
        level, word, module = (fields.pop(key, "") for key in ("@levelno", "@level", "@module"))
        if type(level) is not int or not 0 < level <= 100:  # a logger remembers each that it was asked for
            level = _LEVELS.get(str(word).lower(), 20)
        named = module not in ("", "root") and len(str(module)) <= 200
        name = f"{self._prefix}{module}" if named else self._parent.name
        logger = self._nearest(name)
        record = self._parent.makeRecord(name, level, "(plugin)", 0, fields.pop("@message"), (), None)
        record.exc_text = str(fields.pop("@traceback", "")) or None  # formatters print it below the message
        for key, value in fields.items():
            if not (key.startswith("@") or hasattr(record, key)):
                setattr(record, key, value)
        if logger.isEnabledFor(level):
            logger.handle(record)

    def _nearest(self, name: str) -> Any:
        """The logger of that name, or the nearest above it: one that were made would stay for good."""
        known = self._parent.manager.loggerDict
        while len(name) > len(self._prefix):
            if hasattr(known.get(name), "handlers"):  # else there is only the place of one
                return known[name]
            name = name.rpartition(".")[0]
        return self._parent


# === 9. process =======================================================================================
#
# Start a process, and end it with all that it started: on POSIX it leads a session of its own, which the
# terminal's Ctrl-C does not reach (with stdin="inherit" on a terminal it does not, and is ended alone); on
# Windows it is in a job object. When the host ends, the job does; on POSIX there is a guardian for that.
#
# Any thread may `signal` a process. The one that watches it calls `await_exit` and then `reap`, which gives
# the exit code. `keep`: it stays when the host goes. `disown`: for a forked child.

_PIPE, _DEVNULL = -1, -3  # as in subprocess, which is slow to import
_SHELL = "/bin/sh"


def _popen(argv: Sequence[str], **options: Any) -> Any:
    return _import("subprocess").Popen(argv, bufsize=0, **options)


if TYPE_CHECKING:
    class _Limits(NamedTuple):
        memory: int | None
        cpu_seconds: float | None
        open_files: int | None
else:
    _Limits = namedtuple("_Limits", "memory cpu_seconds open_files")


class Limits(_Limits):
    """What a plugin, and each process that it starts, may use at most. None, the default, is no limit.

    - `memory` (bytes): on POSIX the address space of each process, of which Node, Go and Java need far more
      than they use; on Windows what all of them have allocated together. An allocation past it fails: in
      Python that is a MemoryError. macOS enforces none.
    - `cpu_seconds`: on POSIX the processor time of each process, rounded up to whole seconds; on Windows
      that of all of them together. What goes over it is ended, and PluginCrashed says so.
    - `open_files` (a count): descriptors in each process; to open one more is an OSError. Not on Windows.

    A stricter one of the host's own stays. Immutable. Raises ValueError for what is no positive number.
    """

    __slots__ = ()

    def __new__(cls, memory: int | None = None, cpu_seconds: float | None = None,
                open_files: int | None = None) -> Limits:
        for name, count in (("memory", memory), ("open_files", open_files)):
            _checked_count(1 if count is None else count, name, 1)
        seconds = 1 if cpu_seconds is None else cpu_seconds
        if type(seconds) not in (int, float) or not 0 < seconds < float("inf"):
            raise ValueError(f"cpu_seconds={seconds!r}: it is a positive number, or None")
        return super().__new__(cls, memory, cpu_seconds, open_files)

    def _as_job(self, stays: bool = False) -> bytes:
        """JOBOBJECT_EXTENDED_LIMIT_INFORMATION of a job, which ends with its last handle or `stays`."""
        flags = 0x4 * bool(self.cpu_seconds) | 0x200 * bool(self.memory) | 0x2000 * (not stays)
        ticks = min(int((self.cpu_seconds or 0) * 10**7), (1 << 63) - 1)  # of 100 ns
        memory = min(self.memory or 0, (1 << 8 * struct.calcsize("N")) - 1)
        return struct.pack("qqINNINII6Q4N", 0, ticks, flags, *[0] * 12, 0, memory, 0, 0)

    def _command(self, argv: Sequence[str], env: Mapping[str, str]) -> list[str]:
        """A command that sets the limits and then becomes `argv`: a shell, as nothing of Python's may run
        between fork and exec."""
        seconds = self.cpu_seconds and int(-(-self.cpu_seconds // 1))
        steps = [("-S -t", "CPU", 1, seconds), ("-H -t", "CPU", 1, seconds and seconds + 1),
                 ("-n", "NOFILE", 1, self.open_files)]
        if sys.platform != "darwin":
            steps.append(("-v", "AS", 1024, self.memory))
        script, resource = "", _import("resource")
        for option, kind, unit, value in steps:
            if value is not None:
                hard = resource.getrlimit(getattr(resource, f"RLIMIT_{kind}"))[1]
                value = value if hard == resource.RLIM_INFINITY else min(value, hard)
                script += f"ulimit {option} {max(1, value // unit)} && "
        odd = [f"{name}={env[name]}" for name in env if not (name.isascii() and name.isidentifier())]
        again = ["env", *odd] if odd else []  # some shells drop variables with such names
        return [_SHELL, "-c", f'{script}exec "$@"', "miniplug-limits", *again, *argv]


# The guardian is told "-PID" of a process that leads a group, "PID" of one that leads none, "/FOLDER" of a
# door's folder; and the same after a "!" when that is gone. When the host is gone it gives them some time to
# end, kills the others and removes the folders. By when a process began it knows that its number is still its
# own. (A group's number stays while there is one: what a leader has left is killed.)
_GUARDIAN = """
runs() {
    target=${1#*@} found=
    if [ -d /proc/self ]; then
        read -r stat 2>/dev/null <"/proc/${target#-}/stat" && set -- "$1" ${stat##*) } && found=${21}
    else
        found=$(ps -o lstart= -p "${target#-}")
    fi
    [ "$found" ] && [ "$found" = "${1%%@*}" ]
}
rounds=$1
shift
while IFS= read -r line; do
    case $line in
    !*) for each; do
            shift
            [ "${each#*@}" = "${line#!}" ] || set -- "$@" "$each"
        done ;;
    /*) set -- "$@" "@$line" ;;
    *) runs "@$line"
       [ "$found" ] && set -- "$@" "$found@$line" ;;
    esac
done
while [ "$rounds" -gt 0 ] && [ $# -gt 0 ]; do
    for each; do
        runs "$each" && break
    done || break
    sleep .1 2>/dev/null || sleep 1
    rounds=$((rounds - 1))
done
for each; do
    runs "$each"
    case $found$target in
    /*) [ -h "$target" ] || { rm -f -- "$target/s" && rmdir -- "$target"; } ;;
    "${each%%@*}$target" | -*) kill -s KILL -- "$target" ;;
    esac
done 2>/dev/null
"""


class _Guardian:
    """A process that outlives this host by a moment, and ends what the host was to end. It is there while it
    is told of anything. Any thread may call this; `_lock` protects all of it; no write waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: Any = None
        self._pipe: list[int] = []  # both ends, so that no write to it raises SIGPIPE
        self._told: set[str] = set()  # what it is to end or to remove

    def tell(self, line: str) -> None:
        """Add what a line names, or after a "!" drop it: a process while its number is still its own."""
        if "\n" in line:
            return  # in the name of a folder: no line can say that
        with self._lock:
            if line.startswith("!"):
                self._told.discard(line[1:])
            else:
                self._told.add(line)
            if not self._told or self._process is None or self._process.poll() is not None:
                self._part()  # nothing is left; or it is the first, or somebody has killed it
                line = "\n".join(self._told)
                if self._told:
                    self._begin()
            for end in self._pipe[1:]:
                _quietly(os.write, end, os.fsencode(line) + b"\n")  # somebody may have stopped it

    def _begin(self) -> None:
        nested = _ADDRESS in {**_environment, **os.environ}  # another guardian waits for this host
        argv = [_SHELL, "-c", _GUARDIAN, "miniplug-guardian", "5" if nested else "30"]  # tenths of a second
        try:
            self._pipe.extend(os.pipe())
            _posix.set_blocking(self._pipe[1], False)
            self._process = _popen(argv, stdin=self._pipe[0], stdout=_DEVNULL, stderr=_DEVNULL, cwd="/",
                                   env={"PATH": os.defpath}, start_new_session=True)
        except OSError:  # no shell: a plugin still ends by itself when its connection does
            self._part()

    def _part(self) -> None:
        if self._process is not None:  # killed first: it would take the pipe's end for the host's
            self._process.kill()
            self._process.wait()
        self._process = None
        while self._pipe:
            os.close(self._pipe.pop())

    def disown(self) -> None:
        """In a forked child: let go of what would keep the guardian waiting."""
        if self._process is not None:
            self._process.returncode = 0
        self._part()
        self.__init__()  # type: ignore[misc]


_guardian = _Guardian()


class _PosixProcess:
    """`_lock` protects `_reaped`: after that its number may be another's, who is not signalled."""

    def __init__(self, argv: Sequence[str], limits: Limits | None, terminal: bool, **popen: Any) -> None:
        self._leads = not terminal
        self._lock = threading.Lock()
        self._reaped = False
        self._code: int | None = None
        argv = limits._command(argv, popen["env"]) if limits else argv
        self._popen = _popen(argv, start_new_session=self._leads, **popen)
        self.pid: int = self._popen.pid
        self.stdout, self.stderr = self._popen.stdout, self._popen.stderr
        self._name = f"{'-' if self._leads else ''}{self.pid}"
        _guardian.tell(self._name)

    def signal(self, kill: bool) -> None:
        with self._lock:
            if not self._reaped:
                _quietly(_posix.killpg if self._leads else os.kill, self.pid, 9 if kill else 15)

    def await_exit(self) -> None:
        """It stays unreaped, so that its number stays its own."""
        try:
            if hasattr(os, "waitid"):
                end = _posix.waitid(_posix.P_PID, self.pid, _posix.WEXITED | _posix.WNOWAIT)
                self._code = end.si_status if end.si_code == _posix.CLD_EXITED else -end.si_status
            else:  # macOS before Python 3.13: a group keeps the number while anybody is in it
                self._code = self._popen.wait()
                with self._lock:
                    self._reaped = not self._leads
        except ChildProcessError:
            pass  # somebody else in this host has reaped it: nobody knows how it ended

    def reap(self) -> int | None:
        self.keep()
        with self._lock:
            self._reaped = True
            self._popen.wait()
        return self._code

    def keep(self) -> None:
        _guardian.tell(f"!{self._name}")

    def disown(self) -> None:
        self._reaped = True
        self._popen.returncode = 0


class _WindowsProcess:
    """`_lock` protects `_job`: what has the number of a closed handle is left alone."""

    def __init__(self, argv: Sequence[str], limits: Limits | None, terminal: bool, **popen: Any) -> None:
        suspended, new_group, no_window = 0x4, 0x200, 0x08000000
        ctypes = _import("ctypes")
        self._limits = limits or Limits()
        self._lock = threading.Lock()
        self._system = ctypes.WinDLL("kernel32")
        self._system.CreateJobObjectW.restype = ctypes.c_void_p
        # a group of its own hears no Ctrl-C, not even in the host's console
        flags = suspended | new_group | (0 if terminal else no_window)
        self._popen = _popen(argv, creationflags=flags, **popen)
        self.pid: int = self._popen.pid
        self.stdout, self.stderr = self._popen.stdout, self._popen.stderr
        handle = ctypes.c_void_p(int(self._popen._handle))  # an int would be cut to 32 bits
        self._job = ctypes.c_void_p(self._system.CreateJobObjectW(None, None))
        held = self._limit() and self._system.AssignProcessToJobObject(self._job, handle)
        fails = limits and not held  # without limits it runs without a job, too
        if fails or ctypes.WinDLL("ntdll").NtResumeProcess(handle) < 0:
            self.signal(kill=True)
            self.reap()
            raise OSError("Windows refuses to limit it or to let it run")

    def _limit(self, stays: bool = False) -> bool:
        settings = self._limits._as_job(stays)
        return bool(self._system.SetInformationJobObject(self._job, 9, settings, len(settings)))

    def keep(self) -> None:
        self._limit(stays=True)

    def signal(self, kill: bool) -> None:
        """There is no gentler way for a process without a window."""
        with self._lock:
            if self._job:
                self._system.TerminateJobObject(self._job, 1)
        _quietly(self._popen.kill)  # in case there is no job

    def await_exit(self) -> None:
        self._popen.wait()

    def reap(self) -> int:
        with self._lock:
            job, self._job = self._job, None
            if job:
                self._system.CloseHandle(job)
        return int(self._popen.wait())


class _NoProcess:
    """Stands for another host's process, or for this one, where a `thread` serves."""

    stdout = stderr = None

    def __init__(self, end: Callable[[], Any], pid: int, thread: threading.Thread | None = None) -> None:
        self.pid, self._end, self._thread = pid, end, thread
        self._let_go = threading.Event()

    def signal(self, kill: bool) -> None:
        self._end()
        self._let_go.set()

    def await_exit(self) -> None:
        (self._thread.join if self._thread else self._let_go.wait)()

    def reap(self) -> int | None:
        return 0 if self._thread else None

    def disown(self) -> None:
        pass


def _end_words(code: int | None) -> tuple[str, str | None]:
    """How a process ended, and the name of the signal if it was one."""
    if code is None:
        return "ended", None
    over = ", over its limit of cpu_seconds" if code in (-24, 1816) else ""  # SIGXCPU; no more quota
    if code >= 0:  # Windows' own are known in hexadecimal
        return f"exited with status {code if code < 1 << 30 else hex(code)}{over}", None
    try:
        name = _import("signal").Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"died of {name}{over}", name


def _last_words(lines: Sequence[str]) -> str:
    return ". The last it wrote:" + "".join(f"\n    {line}" for line in lines) if lines else ""


# === 10. plugin =======================================================================================
#
# Four rooms: _Recipe, _Run, _Supervisor, and Plugin, which the user holds. Nothing is started, ended, sent or
# called back under the supervisor's lock, `news`.

_PAUSE = 0.1  # seconds between a crash and the next start; twice as long each time, up to 128 times
_Process: Any = _WindowsProcess if _WINDOWS else _PosixProcess


def _or_forever(seconds: float | None) -> float:
    return _FOREVER if seconds is None else min(seconds, _FOREVER)


# what a Windows program does not start without
_SYSTEM_VARIABLES = ("SYSTEMROOT SYSTEMDRIVE WINDIR COMSPEC PATHEXT TEMP TMP" if _WINDOWS else "").split()

# Run by the plugin's interpreter: this very file is miniplug there, from the bytecode cache, or the zip file
# that the host is packed in. The first lines are for any Python at all. In what is loaded here no garbage is
# ever looked for; and tempfile, which is slow, is only loaded when somebody uses it.
_BOOTSTRAP = """
import sys
if sys.path[:1] == [""]:  # a json.py that lies there is not meant
    del sys.path[0]
if sys.version_info < (3, 8):
    sys.exit("miniplug needs Python 3.8 or newer: this is " + sys.version)
import gc, os
gc.disable()
from _frozen_importlib import module_from_spec
from _frozen_importlib_external import PathFinder
folder, name = os.path.split(sys.argv[1])
spec = PathFinder.find_spec(name.partition(".")[0], [folder])
if spec is None:
    sys.exit(sys.argv[1] + " is not there: pack it as a data file")
module = sys.modules["miniplug"] = module_from_spec(spec)
module.__name__ = "miniplug"
exec(spec.loader.get_code(spec.name), vars(module))
def forget():
    if sys.modules.get("tempfile") is later:
        del sys.modules["tempfile"]
later = type(sys)("tempfile")
later.__getattr__ = lambda name: forget() or getattr(__import__("tempfile"), name)
sys.modules.setdefault("tempfile", later)
import multiprocessing.connection
forget()
getattr(gc, "freeze", bool)()
gc.enable()
module._run_plugin(*sys.argv[2:])
"""
_FROZEN = "--miniplug-plugin"  # the first argument of a frozen application that is to be a plugin
_frozen_mains: list[bool] = []  # not empty: it looks for that


def _current_folder() -> str:
    try:
        return os.getcwd()
    except OSError:
        return ""  # it is gone


_NAME = r"[^\W\d]\w*"
_SPEC = rf"(?:({_NAME})=)?(.+\.py|{_NAME}(?:[.-]\w+)*):({_NAME}(?:\.{_NAME})*)"


def _split_spec(command: str) -> tuple[str, str, str]:
    """``name=source:Attr`` to its parts. The attribute is empty if it is no spec."""
    match = re.fullmatch(_SPEC, command, re.DOTALL)
    if match is None or match[3].endswith(".py") or (_WINDOWS and match.start(3) == 2):  # C:program
        return "", command, ""
    name, source, attribute = match.groups()
    return name or attribute.rpartition(".")[2].lower(), source, attribute


def _sink(output: _Output, logger: logging.Logger, stream: str) -> _Sink | None:
    """What takes the lines of an output stream, or None if they go where the host's own go."""
    if isinstance(output, str):
        return {"inherit": None, "log": _LogSink(logger, stream), "discard": bool}[output]
    if callable(output):
        return output
    write, encoding = output.write, getattr(output, "encoding", None) or "utf-8"
    return lambda line: write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")


class _Recipe:
    """What a plugin is made from: the options, checked once, as attributes, and what is to be run. Any thread
    may read it: it does not change."""

    config: Any = None  # of a process to attach to
    process = _Process  # what starts one

    def __init__(self, command: Any, **options: Any) -> None:
        versions = options["protocol_versions"]
        if versions is None:
            versions = [getattr(options["handshake"], "protocol_version", 1)]
        options["protocol_versions"] = [*versions] if hasattr(versions, "__iter__") else versions
        _check(Plugin.__init__, options)
        vars(self).update(options)
        self.folder = _current_folder()  # what is relative starts there
        if self.cwd is not None:
            self.folder = os.path.join(self.folder, os.fsdecode(self.cwd))
        python = os.fsdecode(self.python or sys.executable or "")
        self.is_own = python == (sys.executable or "")
        self.interpreter = os.path.join(self.folder, python) if os.path.dirname(python) else python
        self.is_list = not isinstance(command, (str, bytes, os.PathLike))
        try:
            self.command = [os.fsdecode(part) for part in (command if self.is_list else [command])]
        except TypeError:
            raise TypeError(f"command={command!r}: it is a path, a spec, or a list of arguments") from None
        scripts = [part for part in self.command if part.endswith((".py", ".pyw"))]
        name, source, attribute = "", (scripts or self.command or [""])[0], ""
        if not self.is_list:
            name, source, attribute = _split_spec(source)
        self.name: str = self.name or name or os.path.splitext(os.path.basename(source))[0] or "plugin"
        self.label = f"the plugin {self.name!r}"
        self.is_module = attribute != "" and not source.endswith(".py")
        self.source = source if self.is_module else self._whole(source)
        self.task: list[str] = []  # what this very file does in the process, if that runs it
        if attribute:
            self.task = ["serve", f"{name}={self.source}:{attribute}"]
        elif scripts and not self.is_list:
            self.task = ["run", self.source]
        elif not self.is_list:
            self.command = [self.source]
        digests: Any = options["sha256"] or {}
        if isinstance(digests, str):
            if self.is_module:
                raise ValueError(f"sha256={digests!r}: of a module it is {{path: digest}}")
            digests = {self.source: digests}
        self.sha256 = {self._whole(os.fsdecode(path)): digest.lower() for path, digest in digests.items()}

    if TYPE_CHECKING:
        def __getattr__(self, name: str) -> Any: ...

    def log(self) -> Any:
        return self.logger or _import("logging").getLogger(f"miniplug.{self.name}")

    def not_started(self, argv: list[str], reason: str, kind: type[LaunchError] = LaunchError,
                    **carried: Any) -> LaunchError:
        words = _last_words(carried.get("output", ()))
        return kind(f"{self.label} did not start: {reason}{words}", command=argv, **carried)

    def argv(self) -> list[str]:
        """What to run. Raises LaunchError, and OSError for a file that cannot be read."""
        if not self.command:
            raise self.not_started([], "the command is empty")
        argv = [*self._loader(), *self.task] if self.task else [*self.command]
        if self._whole(argv[0]) in self.sha256:
            argv[0] = self._whole(argv[0])  # and not one of that name on the PATH
        if not (self.is_list or self.is_module or os.path.isfile(self.source)):
            how = "a spec is 'path/to/file.py:Attr' or 'module:Attr'; a program of the PATH is a list"
            raise self.not_started(argv, f"there is no such file as {self.source}; {how}")
        for path, expected in self.sha256.items():
            with open(path, "rb") as file:
                actual = _import("hashlib").sha256(file.read()).hexdigest()
            if actual != expected:
                reason = f"the SHA-256 of {path} is {actual}, not {expected}"
                raise self.not_started(argv, reason, ChecksumError,
                                       path=path, expected=expected, actual=actual)
        return argv

    def _loader(self) -> list[str]:
        python, frozen = self.interpreter, hasattr(sys, "frozen")
        if self.python is None:
            if _frozen_mains:
                return [python, _FROZEN]
            if frozen or not re.match("python|pypy|graalpy", os.path.basename(python), re.IGNORECASE):
                how = "pass python='/path/to/python', or call miniplug.freeze_support() in its main program"
                raise self.not_started([], f"{python} is no interpreter to run it: {how}")
        flags = _import("subprocess")._args_from_interpreter_flags() if self.is_own and not frozen else []
        if {*self.sha256} - {self.source}:  # -I and -E hear no variable
            flags = [*flags, "-X", f"pycache_prefix={os.devnull}"]
        return [python, *flags, "-c", _BOOTSTRAP, _FILE.rstrip("c"), __name__]  # .pyc, says PyInstaller

    def _whole(self, path: str) -> str:
        return os.path.normpath(os.path.join(self.folder, path))

    def failure(self, run: _Run, argv: list[str], refusal: Any, in_time: bool) -> LaunchError:
        kind, told = LaunchError, {}
        if isinstance(refusal, HandshakeError):
            run.ended.wait(1.0)  # it says on stderr that it was refused
            kind, reason, told = HandshakeError, str(refusal), vars(refusal)
        elif not in_time:
            _end_runs([run], None)
            reason = f"it did not connect within {self.start_timeout:g} s; does it call serve()?"
        elif run.exit_code == 0:
            kind, reason = HandshakeError, "it exited without connecting: it does not call serve()"
        else:
            reason = f"it {_end_words(run.exit_code)[0]}"
        carried = {"exit_code": run.exit_code, "output": run.output.tail(), **told}
        return self.not_started(argv, reason, kind, **carried)

    def environ(self) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items()
               if (self.inherit_env or name in _SYSTEM_VARIABLES) and not name.startswith("MINIPLUG_")}
        if not (self.is_list or self.is_own):
            for name in ("PYTHONHOME", "PYTHONEXECUTABLE", "PYTHONPATH", "__PYVENV_LAUNCHER__"):
                env.pop(name, None)
            for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LIBPATH"):
                before = env.pop(f"{name}_ORIG", "") if hasattr(sys, "frozen") else ""
                if before or getattr(sys, "_MEIPASS", "\0") in env.get(name, ""):
                    env[name] = before  # what was there before the frozen application
        env.update((_variable(name), value) for name, value in (self.env or {}).items())
        if {*self.sha256} - {self.source}:
            env["PYTHONPYCACHEPREFIX"] = os.devnull  # nor a bytecode cache for what it imports
        env[_COOKIE_KEY] = self.handshake.magic_cookie_key
        env[_variable(self.handshake.magic_cookie_key)] = self.handshake.magic_cookie_value
        if self.persist:
            env[_PERSIST] = "1"
        return env

    def above(self) -> list[Any]:
        """What is being started, from the first host down to this process, if that does not serve yet:
        [[identity, where its host listens], ...]. Raises RuntimeError if this plugin must not be launched
        there: a module that launches what imports it would go on for ever."""
        if self.process is not _Process:
            return []
        above: list[Any] = json.loads(_environment.get(_LOADING) or os.environ.get(_LOADING) or "[]")
        for program, address in above:
            if program in (None, self.identity()):
                why = "this process is still being started as one; what launches plugins stands under"
                raise RuntimeError(f'{self.label} is not launched: {why}  if __name__ == "__main__":')
            try:
                if not _WINDOWS:
                    _connect(address, _HELLO_SECONDS).close()
            except OSError:
                raise RuntimeError("a host above this process is gone") from None
        return above

    def identity(self) -> str | None:
        """By which a program knows itself, whatever its arguments; None for a spec."""
        if self.task[:1] == ["serve"]:
            return None
        if not self.is_list or self.source.endswith((".py", ".pyw")):
            return os.path.realpath(self.source)
        end = self.command.index("-m") + 2 if "-m" in self.command else None
        return " ".join(self.command[:end])

    def attaches_to(self) -> Any:
        """The config of the process to attach to, instead of starting one. Raises ValueError."""
        if self.config is not None:
            return _checked_config(self.config)
        text = os.environ.get(_ATTACH)
        if not text or self.process is not _Process:
            return None
        try:
            configs = {name: _checked_config(config) for name, config in json.loads(text).items()}
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{_ATTACH} is not {{NAME: config}} as JSON: {error}") from None
        config = configs.get(self.name)
        what = f"attached to, process {config['pid']}" if config else "launched"
        self.log().info("%s names %s: %r is %s", _ATTACH, [*configs], self.name, what)
        return config


class _Voice:
    """What a process says: a thread for each of its output streams delivers the lines."""

    def __init__(self, process: Any, sinks: Sequence[_Sink | None]) -> None:
        pairs = zip((process.stdout, process.stderr), sinks)
        self._streams = [_Lines(file, sink) for file, sink in pairs if file and sink]
        self._threads: list[threading.Thread] = []
        self._wake: list[int] = []  # a pipe, the end of which wakes them

    def start(self) -> None:
        self._wake.extend(os.pipe() if self._streams else ())
        for stream in self._streams:
            what = stream.read_until, lambda: len(self._wake) < 2, self._wake[0]
            self._threads.append(_start_thread("miniplug-output", *what))

    def stop(self) -> None:
        if self._wake:
            os.close(self._wake.pop())

    def close(self, seconds: float | None = None) -> None:
        """Close all, unless a thread goes on for longer."""
        for thread in self._threads:
            _quietly(thread.join, seconds, kind=RuntimeError)
        if not any(thread.is_alive() for thread in self._threads):
            for stream in self._streams:
                stream.file.close()
            while self._wake:
                os.close(self._wake.pop())

    def tail(self) -> list[str]:
        return next((stream.last() for stream in reversed(self._streams) if stream.tail), [])


class _Run:
    """One process of a plugin, from the wish to have it to its end. Any thread may call the methods.

    The thread `thread` brings it up, and alone may call on it until on_start has returned; one waits for the
    process and reaps it; another minds it. The supervisor's `news` protects `settled`, set when it serves or
    will not, and `failure`, why not. Once `gone` the last line is delivered and the process reaped; once
    `ended` its calls have failed, too. An end that was not `asked` for is a crash. `_claim` is held for good
    by who ends the run: who waits for the process, or who detaches.
    """

    thread = 0
    settled = asked = False
    failure: BaseException | None = None
    process: Any = None
    output: Any = None
    session: Any = None
    config: dict[str, Any] | None = None  # of a process that stays
    owned = True  # by this host
    exit_code: int | None = None
    _why = ""  # it had to be killed

    def __init__(self, supervisor: _Supervisor) -> None:
        self.supervisor, self.recipe = supervisor, supervisor.recipe
        self.gone, self.ended = threading.Event(), threading.Event()
        self._arrival = threading.Event()  # of its connection, or its end
        self._claim = threading.Lock()

    def open(self) -> None:
        recipe, above, argv = self.recipe, self.recipe.above(), []
        try:
            config = recipe.attaches_to()
            if config is not None:
                argv = [config["address"]]
                self._attach(config)
            else:
                argv = recipe.argv()
                self._launch(argv, above)
        except (LaunchError, PluginClosed):
            raise
        except (OSError, EOFError, RuntimeError, ValueError, PluginError, _Sealed) as error:
            is_none = isinstance(error, (EOFError, PluginError, _Broken))
            reason = ": ".join([*argv[:1], f"it is no plugin: {error!r}" if is_none else str(error)])
            raise recipe.not_started(argv, reason, HandshakeError if is_none else LaunchError) from None

    def _greet(self, key: bytes, channel: _Channel, address: str) -> _Terms:
        hello = _Hello(channel, address, key, "host")
        return hello.as_host(self.recipe.protocol_versions, self.recipe.max_message)

    def _attach(self, config: dict[str, Any]) -> None:
        channel = _connect(config["address"], _HELLO_SECONDS)
        self.config, self.owned = config, False
        try:
            terms = self._greet(bytes.fromhex(config["authkey"]), channel, config["address"])
            self._begin(_NoProcess(channel.shutdown, config["pid"]))
            self._meet(channel, terms)
        except BaseException:
            channel.close()
            raise

    def _launch(self, argv: list[str], above: list[Any]) -> None:
        key = os.urandom(32)
        came: list[Any] = []

        def arrived(*what: Any) -> None:
            came.extend(what)
            self._arrival.set()

        door = _Door(partial(self._greet, key), arrived)
        folder = door.listener.folder if self.recipe.process is _PosixProcess else ""
        try:
            if folder:
                _guardian.tell(folder)
            self._spawn(argv, above, door.listener, key)
            in_time = self._arrival.wait(_or_forever(self.recipe.start_timeout))
            if self.gone.is_set():
                _until(lambda: not door.callers, 0.2)  # it may have been refused just before
            if came and isinstance(came[1], _Terms):
                self._meet(*came[:2])
            if not self.takes_calls:
                raise self.recipe.failure(self, argv, came[1] if came else None, in_time)
        finally:
            door.close()
            if folder:
                _guardian.tell(f"!{folder}")
            for channel in came[::2] if self.session is None else ():  # too late
                channel.close()

    def _spawn(self, argv: list[str], above: list[Any], listener: _Listener, key: bytes) -> None:
        recipe, logger = self.recipe, self.recipe.log()
        env = {**recipe.environ(), _ADDRESS: listener.address, _AUTHKEY: key.hex(),
               _LOADING: json.dumps([*above, [recipe.identity(), listener.address]]),
               _LOG_LEVEL: str(logger.getEffectiveLevel())}
        stdin = {"discard": _DEVNULL, "inherit": None}.get(recipe.stdin, recipe.stdin)
        sinks = _sink(recipe.stdout, logger, "stdout"), _sink(recipe.stderr, logger, "stderr")
        stdout, stderr = (None if sink is None else _PIPE for sink in sinks)
        place = None if recipe.folder == _current_folder() else recipe.folder  # may be closed to us by now
        terminal = recipe.stdin == "inherit" and os.isatty(0)
        self._begin(recipe.process(argv, recipe.limits, terminal, env=env, cwd=place, stdin=stdin,
                                   stdout=stdout, stderr=stderr), sinks)

    def _begin(self, process: Any, sinks: Sequence[_Sink | None] = ()) -> None:
        self.process, self.output = process, _Voice(process, sinks)
        _runs.add(self)
        try:
            self.output.start()
            _start_thread("miniplug-watch", self._watch)
        except BaseException:  # no descriptor or thread to be had
            process.signal(kill=True)
            self._watch()
            raise
        if self.supervisor.state != "up":
            self.supervisor.run = self
        if self.settled:  # it came too late
            _end_runs([self], 0.0)

    def _meet(self, channel: _Channel, terms: _Terms) -> None:
        recipe = self.recipe
        self.session = session = _open_session(channel, terms, recipe.max_message, _Served({}), self._lost)
        session.call_timeout = recipe.call_timeout
        if not self.owned:
            session.keep_reading()  # or the end would not be seen
        if self.gone.is_set():
            self._over()  # once more, now that there is a session
        elif self.owned and "persist" in terms.features:  # it stays: nothing is to end it
            self.config = _checked_config(session.call(0, "reattachConfig", (), {}, _HELLO_SECONDS))
            self.process.keep()
        if recipe.heartbeat or recipe.idle_timeout:
            _start_thread("miniplug-mind", self._mind, session)

    @property
    def takes_calls(self) -> bool:
        session = self.session
        return session is not None and session.ended is None and not (self.asked or self.gone.is_set())

    def _mind(self, session: _Session) -> None:
        """See that it answers, and is used. (In rounds: this host may have stood still.)"""
        heartbeat, idle = self.recipe.heartbeat or _FOREVER, self.recipe.idle_timeout or _FOREVER
        pause = min(heartbeat / 4, idle / 8)
        silent = unused = 0.0
        while not self.gone.wait(pause) and session.ended is None:
            silent = 0.0 if heartbeat == _FOREVER or session.probe() else silent + pause
            unused = unused + pause if session.unused() else 0.0
            if unused >= idle:
                self.supervisor.retire(self)
            if silent >= heartbeat:
                self._why = f"answered no ping for {heartbeat:g} s"
                self.process.signal(kill=True)
                return

    def ask(self, grace: float | None) -> None:
        """Ask it to end, or without a grace kill it; another host's let go, or without a grace ask."""
        self.asked = True
        if self.owned == (grace is None):
            self.process.signal(kill=True)
        elif self.session is not None and self.session.ended is None:
            self.session.ask_to_end(grace or 0.0)

    def detach(self) -> None:
        """Once its supervisor is closed."""
        if not self.owned:
            _end_runs([self], 0.0)
        elif self._claim.acquire(False):
            self.session.channel.shutdown()  # at which it turns its output away
            self.output.close(0.3)
            self.output.stop()
            self.output.close(0.3)  # on Windows it may read on
            self._over()

    def drain(self, seconds: float) -> None:
        """End it, as soon as it is not busy, or after so many seconds."""
        _until(self.session.seal, seconds)
        if self.session.ended is None:  # else it has crashed, which its calls are told
            _end_runs([self], _GRACE)

    def _watch(self) -> None:
        self.process.await_exit()
        if self._claim.acquire(False):
            self.process.signal(kill=True)  # what it has left behind
            self.output.stop()
            self.output.close(1.0)
            if self.config is not None and self.owned:
                # a child may have the socket, too, and end later
                _until(partial(_remove_stale, self.config["address"]), 1.0)
            crashed = self.session is not None and not self.asked
            self.exit_code = self.process.reap()
            self._over()
            if crashed and self.recipe.on_exit is not None:
                _guard(self.recipe.on_exit, self.supervisor.plugin, what="on_exit")
        else:
            self.ended.wait()
            self.process.reap()
        self.output.close()  # somebody's callable may hang

    def _over(self) -> None:
        """It is gone, or let go of: end the session, and tell who waits."""
        self.gone.set()
        _runs.discard(self)
        self.supervisor.notice()
        session = self.session
        if session is not None:
            session.end(EOFError())
        self._arrival.set()
        self.ended.set()
        if session is not None:  # last: a handler that waits here may have struck who reads
            session.references.close()
            session.references.served.close()
            session.dispose()

    def _lost(self, cause: BaseException) -> Any:
        """The connection has ended: find out why. Returns what makes the error."""
        if not self.asked:
            if not self.owned or isinstance(cause, ProtocolError) or not self.gone.wait(0.5):
                self.process.signal(kill=True)
            self.gone.wait(2.0)
        self.supervisor.notice()  # before any call fails: the next one goes to another run
        return self.error

    def error(self, calls: Sequence[str] = (), verdict: str = "") -> BaseException:
        """What calls raise that it has cut off, or does not take any more."""
        name, tail = self.recipe.label, self.output.tail()
        if self.asked:
            return PluginClosed(f"{name} was closed")
        during = f" during {', '.join(f'{method}()' for method in calls[:5])}" if calls else verdict
        words, signal_name = _end_words(self.exit_code)
        kind, why = PluginCrashed, self._why or words
        if isinstance(self.session.cause, ProtocolError):
            kind, why = ProtocolError, f"broke the protocol and was ended ({self.session.cause})"
        text = f"{name} {why}{during}{_last_words(tail)}"
        return kind(text, exit_code=self.exit_code, signal_name=signal_name, output=tail, calls=[*calls])


class _Supervisor:
    """Which run calls go to, and when another one is started. Its `state`:

        "down"      nobody serves; a call starts it
        "starting"  `start` is under way, and calls wait for it
        "up"        `run` serves. With a `start` too, that is to take its place
        "closed"    only start() starts it. With a `start`, that is being undone

        down --call, start()--> starting --it serves--> up --crash, idle--> down (or starting, with a `start`)
        starting --it fails--> down      any --close(), kill(), detach(), exit--> closed --start()--> starting

    `news` protects all fields, for any thread. Who waits for it looks again within a second: a signal handler
    may change something before it sleeps.
    """

    state = "down"
    start: _Run | None = None  # comes up
    run: Any = None  # the latest that has, or had, a process
    open: _Session | None = None  # that of `run`, if any thread may call on it
    crash: _Run | None = None  # has crashed, until another serves
    restarts = 0
    down_at = not_before = 0.0  # on the monotonic clock; a start waits for the latter

    def __init__(self, recipe: _Recipe, plugin: Plugin) -> None:
        self.recipe, self.plugin = recipe, plugin
        self.owner = os.getpid()
        self.news = threading.Condition()  # of an RLock: a signal handler may close the plugin
        self.tries: list[float] = []  # when calls have had it started after a crash

    def session(self, asked: _Call | None = None) -> _Session:
        """That which this thread is to call on, after a start if need be."""
        while True:
            found = self.seek()
            if isinstance(found, _Session):
                return found
            self._await(found, asked)

    def own_start(self) -> _Run | None:
        """The start that this thread takes part in, as it runs on_start or what that has called back. Comes
        before any lock: in a forked child that may be held for ever."""
        if self.owner != os.getpid():
            raise PluginError(f"{self.recipe.label} belongs to the process that has forked this one")
        start = self.start
        if start is None or start.thread == _get_ident():
            return start
        return start if start.session and start.session.caller._parent() else None

    def seek(self) -> Any:
        """The session that this thread may call on, or the start to wait for, which may begin now."""
        own = self.own_start()
        with self.news:
            self.notice()
            run = own or (self.run if self.state == "up" else None)
            if run is not None and run.takes_calls:
                return run.session
            if self.state == "closed":
                raise self.is_closed()
            if own is not None:
                raise own.error()  # it has crashed in on_start
            return self.start or self._start_for_calls()

    def _start_for_calls(self) -> _Run:
        if self.crash is None:
            return self._begin()
        most, window = self.recipe.max_restarts, _or_forever(self.recipe.restart_window)
        self.tries = [each for each in self.tries if self.down_at - each < window]
        if len(self.tries) >= most:
            raise self.crash.error(verdict=f"; start() it again (max_restarts={most} in {window:g} s)")
        pause = _PAUSE * 2 ** min(len(self.tries), 7)
        self.tries.append(time.monotonic())
        return self._begin(pause=pause)

    def _begin(self, drain: float | None = None, pause: float | None = None) -> _Run:
        """Start another run, after a crash with a `pause`; to replace one that is up, with a `drain`."""
        start = self.start = _Run(self)
        self.not_before = self.down_at + (pause or 0.0)
        if self.state != "up":
            self.state = "starting"
        self.open = None
        try:
            _start_thread("miniplug-start", self._bring_up, start, drain, pause is not None)
        except RuntimeError as error:
            self._settle(start, self.recipe.not_started([], str(error)))
        return start

    def start_up(self, drain: float | None = None) -> None:
        """Start it, unless it is up; with `drain` replace that. Interrupted in its start, it is closed."""
        replace = drain is not None
        if self.own_start() is not None:
            if replace:
                raise RuntimeError("on_start cannot restart the plugin")
            return
        with self.news:
            while self.start is not None and (self.start.settled or replace):
                self.news.wait(1.0)  # until it is undone, or over
            self.notice()
            is_up = self.state == "up"
            if is_up and not replace:
                return
            if is_up and not self.run.owned:
                raise PluginError(f"{self.recipe.label} belongs to another host")
            begins = self.start is None and not is_up
            if begins:
                self.tries.clear()
            start = self.start or self._begin(drain if is_up else None)
            self.not_before = 0.0
            self.news.notify_all()
        try:
            self._await(start)
        finally:
            if begins and not start.settled:  # interrupted
                _end_runs(self.close(), None)

    def _await(self, start: _Run, asked: _Call | None = None) -> None:
        with self.news:
            while not start.settled:
                left = _or_forever(asked.left() if asked else None)
                if asked and left == 0.0:
                    raise _too_late(asked)
                self.news.wait(min(left, 1.0))
        if start.failure is not None:
            raise start.failure

    def _bring_up(self, start: _Run, drain: float | None, counts: bool) -> None:
        start.thread = _get_ident()
        old, on_start = self.run, self.recipe.on_start
        error: BaseException | None = None
        try:
            with self.news:
                while not start.settled and _left(self.not_before):
                    self.news.wait(min(_left(self.not_before), 1.0))
            if old is not None and self.state != "up":
                old.ended.wait()  # it is on its way out, which has a bound
            if not start.settled:
                start.open()
            if not start.settled and on_start is not None:
                on_start(self.plugin)
        except StopIteration:  # which no asyncio future takes
            error = RuntimeError("on_start raised StopIteration")
        except BaseException as problem:
            error = problem
        with self.news:
            error = start.failure or error or (None if start.takes_calls else start.error())
            if error is None:
                self.restarts += counts
                self._settle(start)
        if error is not None:
            if start.process is not None:
                _end_runs([start], 0.0)
            self._settle(start, error)
        elif drain is not None:
            old.drain(drain)

    def _settle(self, start: _Run, error: BaseException | None = None) -> None:
        with self.news:
            if error is None:
                self.run, self.crash, self.state = start, None, "up"
            elif self.state == "starting":
                self.state, self.down_at = "down", time.monotonic()
            self.open = self.run.session if self.state == "up" else None
            start.settled, start.failure, self.start = True, start.failure or error, None
            self.news.notify_all()

    def notice(self) -> None:
        """Look whether the run that serves has ended."""
        if self.state != "up":
            return  # without the lock: at interpreter exit it is held for good
        with self.news:
            run = self.run
            if self.state == "up" and not run.takes_calls:
                self.state, self.open = "down" if self.start is None else "starting", None
                self.down_at = time.monotonic()
                self.crash = self.crash if run.asked else run
                self.news.notify_all()

    def retire(self, run: _Run) -> None:
        """End a run that nobody uses, unless somebody does just now."""
        with self.news:
            if self.open != run.session or not run.takes_calls or not run.session.seal():
                return
            run.asked = True
            self.notice()
        _end_runs([run], _GRACE)

    def close(self) -> list[_Run]:
        """Start nothing more, and let go who waits. Returns the runs to end."""
        if self.owner != os.getpid():
            return []
        with self.news:
            self.state, self.open, start = "closed", None, self.start
            if start is not None and not start.settled:
                start.settled, start.failure = True, self.is_closed()
            runs = [run for run in list(_runs) if run.supervisor is self]
            for run in runs:
                run.asked = True
            self.news.notify_all()
        return runs

    def is_closed(self) -> PluginClosed:
        return PluginClosed(f"{self.recipe.label} is closed: start() it again")


_runs: set[_Run] = set()  # those with a process that has not ended


def _end_runs(runs: Sequence[_Run], grace: float | None) -> None:
    """End runs side by side: ask, after `grace` seconds terminate, a second later kill; without a grace at
    once. Returns when they are gone."""
    for run in runs:
        run.ask(grace)
    seconds = 1.0 if grace is None else grace if any(run.session for run in runs) else 0.0
    for kill in (False, True, True):
        deadline, seconds = time.monotonic() + seconds, 1.0
        runs = [run for run in runs if not run.ended.wait(_left(deadline))]
        for run in runs:
            run.process.signal(kill)


def _close_all() -> None:
    """At interpreter exit: let go of what stays, and end what is managed."""
    managed = []
    for run in list(_runs):
        stays = run.config is not None and run is run.supervisor.run  # else another has taken its place
        if stays or run.recipe.managed:
            run.supervisor.news.acquire()  # for good: nothing is started any more
            run.supervisor.close()
            if stays:
                run.detach()
            else:
                managed.append(run)
    _end_runs(managed, _GRACE)


def _disown_all() -> None:
    while _runs:
        run = _runs.pop()
        run.process.disown()
        run.output.close()
    _guardian.disown()


_import("atexit").register(_close_all)
if not _WINDOWS:
    _posix.register_at_fork(after_in_child=_disown_all)


async def _in_thread(function: Callable[..., Any], *args: Any, undo: Callable[[], Any] = bool) -> Any:
    """Call what blocks in a thread of its own: the loop's may all wait. Cancelled, it calls `undo` before and
    after that returns."""
    asyncio, call = _import("asyncio"), _on_first_use("Call")()
    _aside("miniplug-async", call._attempt, lambda: call.set_result(function(*args)))
    future = asyncio.wrap_future(call)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        undo()
        await asyncio.wait([future])
        undo()
        raise


def _ask(kind: type, session: _Session, *what: Any) -> Any:
    result = session.call(*what)
    if not issubclass(type(result), kind) or (kind is _Remote and result._target.session is not session):
        session.end(ProtocolError(f"system.{what[1]}() returned a {type(result).__name__}"))
        raise session.ended([what[1]])
    return result


class _Dispensed(_Target):
    """What a plugin serves under a name: an object of each run's session in turn, in `at`. `_lock` is held by
    who dispenses it anew."""

    def __init__(self, supervisor: _Supervisor, name: str | None, first: _Target) -> None:
        self.at: dict[Any, _Target] = {}  # by session
        super().__init__(first.session, 0)  # what is given back are those
        self.identity = first.identity
        self._supervisor, self._name = supervisor, name
        self._lock = threading.RLock()
        self._add(first)

    def _add(self, target: _Target) -> None:
        known = {session: each for session, each in self.at.items() if session.ended is None}
        self.at = {**known, target.session: target}
        for each in (self, target):
            target.session.borrowed.discard(id(each))  # it keeps no run up

    def here(self) -> tuple[_Caller, int] | None:
        return getattr(self.at.get(self._supervisor.open), "place", None)

    def number_at(self, session: _Session) -> int | None:
        return getattr(self.at.get(session), "number", None)

    def find(self, asked: _Call) -> tuple[_Session, int]:
        if self.released:
            raise DeadReference(f"{self.label} was released")
        session = self._supervisor.session(asked)  # not under the lock: on_start may want that
        target = _holding(self._lock, self._dispense, session, asked, seconds=_left(asked.deadline))
        if target is False:
            raise _too_late(asked)
        if self.released:  # meanwhile
            self.release()
        return session, target.number

    def _dispense(self, session: _Session, asked: _Call) -> _Target:
        target: Any = self.at.get(session)
        if target is None:  # nobody else has
            target = _ask(_Remote, session, 0, "dispense", (self._name,), {}, asked.left())._target
            self._add(target)
        return target

    def waits(self) -> bool:
        return isinstance(self._supervisor.seek(), _Run)

    def release(self) -> None:
        self.released = True
        known, self.at = self.at, {}
        for target in known.values():
            target.release()


class Plugin:
    """A plugin, as its host holds it: to start, call and end, as often as you like, from any thread.

    The parameters are those of `launch`. One that was only made starts on first use; ``with`` starts and
    closes it. After `close()` calls raise PluginClosed, after a crash PluginCrashed, until `start()`: then
    proxies work again, on fresh instances.
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
                 max_message: int = _MAX_MESSAGE):
        options = dict(locals())
        del options["self"]
        _refuse_monkey_patches()
        self._supervisor = _Supervisor(_Recipe(**options), self)
        self.name = self._supervisor.recipe.name

    def start(self) -> Plugin:
        """Start the plugin, unless it runs. Raises what `launch` does."""
        self._supervisor.start_up()
        return self

    def restart(self, drain: float | None = 30.0) -> Plugin:
        """Swap in a fresh process, or start one. Returns when that serves, and new calls go there.

        Calls in flight, streams and references finish in the old one, in at most `drain` seconds (None: no
        limit). What is cut off raises PluginClosed, a reference DeadReference. Raises what `start` does; the
        old process stays then.
        """
        self._supervisor.start_up(_or_forever(_checked_timeout(drain, "drain")))
        return self

    def close(self, grace: float | None = _GRACE) -> None:
        """End the plugin and all that it started: ask it, after `grace` seconds (None: never) terminate it, a
        second later kill it. Calls in flight raise PluginClosed."""
        seconds = _or_forever(_checked_timeout(grace, "grace"))
        _end_runs(self._supervisor.close(), seconds)

    def kill(self) -> None:
        """End the plugin and all that it started at once. One that was attached to is asked to."""
        _end_runs(self._supervisor.close(), None)

    def detach(self) -> None:
        """Leave it running, for a host to `attach` to. Raises PluginError for one that cannot stay."""
        run = self._run
        if run in _runs and (run.session is None or run.takes_calls):
            self.reattach_config()
            self._supervisor.close()
            run.detach()

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the process to end, at most `timeout` seconds. Returns its exit code, or None."""
        run = self._run
        if run is not None:
            run.ended.wait(_or_forever(timeout))
        return getattr(run, "exit_code", None)

    __enter__ = start

    def __exit__(self, *error: object) -> None:
        self.close()

    async def astart(self) -> Plugin:
        """As `start`, without blocking the event loop. Cancelled, it leaves none that was not there."""
        await _in_thread(self.start, undo=bool if self.running else self.kill)
        return self

    async def aclose(self, grace: float | None = _GRACE) -> None:
        """As `close`, without blocking the event loop."""
        await _in_thread(self.close, grace)

    __aenter__ = astart

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<Plugin {self.name!r}, pid {self.pid}>"

    @property
    def _run(self) -> Any:
        supervisor = self._supervisor
        return (supervisor.own_start() or supervisor.run) if supervisor.owner == os.getpid() else None

    @property
    def running(self) -> bool:
        """Whether it has started, and its process has not ended."""
        run = self._run
        return run is not None and run.session is not None and not run.gone.is_set()

    @property
    def pid(self) -> int | None:
        """The number of its process, or None without one."""
        run = self._run
        return None if run is None or run.gone.is_set() else run.process.pid

    @property
    def exit_code(self) -> int | None:
        """How the last process ended: negative for a signal; None if none has."""
        return getattr(self._run, "exit_code", None)

    @property
    def restarts(self) -> int:
        """How often it was started anew after a crash."""
        return self._supervisor.restarts

    @property
    def protocol_version(self) -> int:
        """The version that host and plugin have agreed on."""
        return self._supervisor.session().protocol_version

    @property
    def info(self) -> dict[str, Any]:
        """What the plugin says about itself: the `info` given to `serve`."""
        return self._ask_system(dict, "info")

    def dispense(self, name: str | None = None, interface: Callable[..., _I] | None = None, *,
                 timeout: float | None = None) -> _I:
        """A proxy for the plugin of that name, or for the only one there is, with its public methods.
        "system" is the introspection.

        `interface`: an ABC, Protocol or class, whose public methods the plugin must have, and take every call
        that they allow. The proxy is an instance of it, for type checkers and (not a Protocol) for
        isinstance(). `timeout`: the deadline of each call in seconds, instead of `call_timeout`.

        Raises PluginNotFound, InterfaceMismatch, and whatever the plugin's factory raised.
        """
        _check(Plugin.dispense, locals())
        wanted: Any = getattr(interface, "__origin__", interface)  # of Store[int] it is Store
        if wanted is not None and not isinstance(wanted, type):
            raise TypeError(f"interface={interface!r}: it is a class")
        found = self._ask_system(_Remote, "dispense", name)
        target = _Dispensed(self._supervisor, name, found._target)
        target.label = f"the plugin {name or self.name!r}"
        if timeout is not None:
            target.timeout = timeout
        proxy: Any = _Proxy(target, found._names)
        if wanted is not None:
            proxy._adopt(wanted)
        elif type(found) is _Method:
            proxy = _Method(target, "")  # what is served is a function
        return proxy

    def _ask_system(self, kind: type, method: str, *args: Any) -> Any:
        seconds = self._supervisor.recipe.call_timeout
        return _reach(self._find, partial(_ask, kind), method, args, {}, seconds)

    def _find(self, asked: _Call) -> tuple[_Session, int]:
        return self._supervisor.session(asked), 0

    def describe(self) -> dict[str, dict[str, MethodInfo]]:
        """What the plugins can do: ``{plugin: {method: MethodInfo(name, signature, doc)}}``. Raises
        MethodNotFound if the plugin, in another language, does not say."""
        found = self._ask_system(dict, "describe")
        return {plugin: {name: MethodInfo(name, *each[:2])
                         for name, each in _checked_description(methods).items()}
                for plugin, methods in found.items() if type(plugin) is str and plugin != "system"}

    def reattach_config(self) -> dict[str, Any]:
        """What another host needs to `attach`, as a dict for json. Who has it can call the plugin. Raises
        PluginError for one that does not persist."""
        session, config = self._supervisor.session(), self._run.config
        if config is None:
            raise PluginError(f"the plugin {self.name!r} ends with its host: launch it with persist=True")
        return {**config, "protocol_version": session.protocol_version}

    def ping(self, timeout: float = 5.0) -> float:
        """Seconds that a message takes to the plugin and back. Raises CallTimeout after `timeout` seconds."""
        return _reach(self._find, lambda session, *what: session.ping(what[-1]), "ping", (), {}, timeout)


def _like(other: Callable[_P, Any]) -> Callable[[Callable[..., Plugin]], Callable[_P, Plugin]]:
    """For help() and type checkers: the decorated function takes what `other` takes."""
    return lambda function: vars(function).update(__wrapped__=other) or function


@_like(Plugin)
def launch(command: _Command, **options: Any) -> Plugin:
    """Start a plugin and return it. ``with launch(...) as plugin`` closes it at the end.

    `command`: an argument list, run as it is; a program's path, a ``.py`` file being run under `python`; or a
    spec, ``"module:Attr"``, ``"path/to/file.py:Attr"`` or ``"name=path/to/file.py:Attr"``, which this very
    file serves under `python`. The options:

    - `name`: what logs and errors call it; by default made from the command.
    - `handshake`, `protocol_versions` (default: the handshake's): what the host can speak. The highest
      version that both can is used.
    - `python`: the interpreter, by default this one, with its flags. Another one gets none of this one's own
      variables. A spec or ``.py`` file imports what lies beside it, a module what is in `cwd`; for more give
      a ``PYTHONPATH`` in `env`.
    - `env`: added to the environment, or with `inherit_env=False` to what the system needs. `cwd`: where it
      runs, and where relative paths start.
    - `start_timeout`, `call_timeout`: seconds to connect in, and for a call without a deadline of its own.
    - `stdin`: ``"discard"``, ``"inherit"`` (a terminal too: then it shares the host's process group) or a
      file. `stdout`, `stderr`: ``"log"``, ``"inherit"``, ``"discard"``, a callable for each line, or a text
      file. `logger` (default ``miniplug.NAME``): the parent of its loggers; those of ``stdout`` (INFO) and
      ``stderr`` (WARNING, tracebacks ERROR) are among them.
    - `max_restarts` in any `restart_window` seconds: the next call after a crash starts it anew, after a
      pause of 0.1 seconds, and of twice as long each time. Calls in flight raise PluginCrashed and never run
      again; past the limit all do.
    - `heartbeat`: seconds without an answer to a ping that count as a crash. `idle_timeout`: seconds without
      a call, stream or reference after which it is closed, until the next call.
    - `on_start(plugin)` runs after every start; until it returns only its own calls get through. If it
      raises, the process is ended, and whoever started it gets that. `on_exit(plugin)` runs in a thread of
      miniplug's, each time that the process ends unasked.
    - `sha256`: the hex digest of the program, script or spec's file (not of the interpreter), or ``{path:
      digest}``, checked before anything runs (it can be swapped after that). No bytecode cache is used then.
    - `limits`: what it may use at most. `max_message`: bytes of the longest message that the host takes, at
      least 4096. `managed`: closed at interpreter exit. `persist`: it stays when this host goes, unless that
      closes it, and can be attached to.

    Raises LaunchError, HandshakeError, ChecksumError, PluginClosed, and what `on_start` raises; TypeError or
    ValueError for an option; RuntimeError in a plugin that is still being started: a host's module that it
    imports lacks an ``if __name__ == "__main__":``.
    """
    return Plugin(command, **options).start()


def attach(config: Mapping[str, Any], *, name: str | None = "attached", handshake: Handshake = Handshake(),
           protocol_versions: Iterable[int] | None = None, call_timeout: float | None = None,
           heartbeat: float | None = None, logger: logging.Logger | None = None,
           max_message: int = _MAX_MESSAGE) -> Plugin:
    """Connect to a plugin that runs. `config` is what its `reattach_config` gave; the options are those of
    `launch`, which attaches as well where the environment variable ``MINIPLUG_ATTACH`` is ``{NAME: config}``
    as JSON, and has its `name`.

    The process is not this host's: `close`, the end of ``with`` and interpreter exit disconnect; `kill` asks
    it to end first; `start` connects again. What it prints does not come here.

    Raises LaunchError if there is no such plugin, and its kinds HandshakeError and AuthenticationError.
    """
    options = dict(locals())
    del options["config"]
    plugin = Plugin(["attach"], **options)
    recipe = plugin._supervisor.recipe
    recipe.process, recipe.config = None, config or {}
    return plugin.start()


def local(plugins: Mapping[Any, Any], *, info: Mapping[str, Any] | None = None, max_workers: int = 64,
          name: str | None = "local", handshake: Handshake = Handshake(),
          protocol_versions: Iterable[int] | None = None, call_timeout: float | None = None,
          heartbeat: float | None = None, logger: logging.Logger | None = None,
          max_message: int = _MAX_MESSAGE) -> Plugin:
    """Serve plugins in this very process, for tests, over the same session and codec.

    `plugins`, `info` and `max_workers` are those of `serve`, the other options those of `launch`. What a
    plugin prints or logs goes where this process's own does. Raises what `serve` and `launch` raise.
    """
    options = {key: value for key, value in locals().items() if key not in ("plugins", "info", "max_workers")}
    plugin = Plugin(["local"], **options)
    make = partial(_Server, _versions(plugins, handshake), info, max_workers, max_message)
    make()  # raises here what it raises

    def start(*how: Any, **popen: Any) -> _NoProcess:
        server = make()
        thread = _start_thread("miniplug-local", _serve_here, server, popen["env"])
        return _NoProcess(partial(server.stop, 0.0), os.getpid(), thread)

    plugin._supervisor.recipe.process = start
    return plugin.start()


def _serve_here(server: _Server, env: Mapping[str, str]) -> None:
    try:
        server.serve_launcher(env[_ADDRESS], env[_AUTHKEY], {"matches": True})
    except SystemExit:
        pass  # the host's end tells why
    finally:
        server.close()


# === 11. discovery ======================================================================================

def discover(directory: _Path, pattern: str = "*") -> list[Path]:
    """The files in a folder that `launch` can run, sorted, as absolute paths.

    `pattern` is a glob, relative to the folder: ``"*/plugin.py"`` finds one in each folder there, ``**``
    stands for any folders below. A file can be run that ends with ``.py`` or ``.pyw``, or is executable (on
    Windows: an ``.exe``, ``.com``, ``.bat`` or ``.cmd``). Left out is what has, or lies in a folder that has,
    a name that begins with ``.`` or ``_``.

    Raises OSError for a folder that cannot be read, ValueError or TypeError for a pattern that is none.
    """
    _check(discover, locals())
    if _import("pathlib").PurePath(pattern).anchor or os.path.normpath(pattern) == ".":
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

    With `python` those of that interpreter's environment, which is run for a moment. Nothing is imported. Of
    two with one name that which comes first on ``sys.path`` counts. What is broken, or names no attribute of
    a module, is left out with a warning in the log.

    Raises TypeError for a `group` that is no str, and LaunchError for a `python` that does not run.
    """
    _check(discover_entry_points, locals())
    if python is not None:
        with launch("miniplug:discover_entry_points", name="entry_points", python=python) as plugin:
            return dict(plugin.dispense()(group))
    found: dict[str, str] = {}
    warn = _import("logging").getLogger("miniplug").warning
    for distribution in _import("importlib.metadata").distributions():
        try:
            text = distribution.read_text("entry_points.txt") or ""
        except Exception as error:  # whatever is wrong with it
            text, where = "", getattr(distribution, "_path", distribution)
            warn("the entry points of %s cannot be read: %r", where, error)
        section = ""
        for line in map(str.strip, text.splitlines()):  # importlib's way, one bad entry may hide others
            if line.startswith("["):
                section = line.strip("[] ")
            elif section == group and line and line[0] not in "#;":
                entry = re.fullmatch(_ENTRY, line)
                if entry:
                    found.setdefault(entry[1], f"{entry[2]}:{entry[3]}")
                else:
                    warn("the entry point names no attribute of a module: %s", line)
    return found


_ENTRY = rf"([^=]*[^=\s])\s*=\s*({_NAME}(?:\.\w+)*)\s*:\s*({_NAME}(?:\.\w+)*)\s*(?:\[.*)?"


# === 12. command line ===================================================================================

_importing: Any = _import("_frozen_importlib_external")  # importlib loads more


def _run_plugin(name: str, verb: str, *arguments: str, **options: Any) -> None:
    """Be the plugin: ``serve SPEC...``, or ``run SCRIPT``. `name`: by which a host has imported this file."""
    sys.meta_path.insert(0, _Finder(name))
    sys.excepthook = _show_error
    _take_environment()
    if _ADDRESS in _environment:
        _prepare_output()
    if verb == "run":
        sys.argv[:] = arguments
        _run_file(arguments[0], "__main__")
    else:
        _serve_specs(*arguments, **options)


def _show_error(kind: type[BaseException], error: BaseException, frames: Any) -> None:
    frames = _theirs(frames and frames.tb_next)
    sys.__excepthook__(kind, error.with_traceback(frames), frames)  # imports nothing: Ctrl-C stays one


def _run_file(path: str, name: str) -> ModuleType:
    """Run a file as the module of that name: what is there, not what a cache of bytecode has of it."""
    module = type(sys)(name)
    module.__file__ = path
    if name != "__main__":
        module.__spec__ = _importing.spec_from_file_location(name, path)
    sys.modules[name] = module
    sys.path.insert(0, os.path.dirname(path))
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)  # not this file's __future__
    exec(code, vars(module))
    return module


def _serve_specs(*specs: str, address: str | None = None, authkey_file: str | None = None,
                 persist: bool = False) -> None:
    plugins: dict[str, Any] = {}
    _environment.setdefault(_LOADING, '[[null, ""]]')
    for spec in specs:
        name, source, attribute = _split_spec(spec)
        if not attribute:
            sys.exit(f"miniplug: {spec!r} is no spec: write module:Attr or path/to/file.py:Attr")
        if name in ("system", *plugins):
            sys.exit(f"miniplug: the name {name!r} is taken: write NAME={spec}")
        found = _load_file(os.path.abspath(source)) if source.endswith(".py") else _load_module(source)
        try:
            plugins[name] = operator.attrgetter(attribute)(found)
        except AttributeError as error:
            sys.exit(f"miniplug: {error}")
    try:
        secret = os.urandom(32)
        if authkey_file:
            secret = _checked_key(_import("pathlib").Path(authkey_file).read_text("latin-1").strip())
        server = _Server({None: plugins}, None, 64, _MAX_MESSAGE)
        _serve(server, {"matches": True}, address, secret, persist)
    except (OSError, ValueError) as error:
        sys.exit(f"miniplug: {error}")


class _Finder:
    """An import hook. It gives this very module under every name that leads to its file, and under the host's
    name for it: in a second copy nothing would be registered. And for a spec's file it finds the standard
    library first: a plugin's string.py would break what it imports."""

    library: Sequence[str] = ()

    def __init__(self, name: str) -> None:
        self._names = {"miniplug", name}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        find, found = _importing.PathFinder.find_spec, None
        if f"{name.rpartition('.')[2]}.py" == os.path.basename(_FILE):
            found = find(name, path)
        if name in self._names or (found and os.path.realpath(str(found.origin)) == os.path.realpath(_FILE)):
            return _import("importlib.machinery").ModuleSpec(name, self)
        return find(name, self.library) if path is None and self.library else None

    def create_module(self, spec: Any) -> ModuleType:
        return sys.modules["miniplug"]

    def exec_module(self, module: ModuleType) -> None:
        pass  # it has run


def _load_file(path: str) -> ModuleType:
    if not os.path.isfile(path):
        sys.exit(f"miniplug: there is no file {path}")
    library = os.path.dirname(getattr(os, "__file__", ""))  # frozen, it has none
    _Finder.library = [library, os.path.join(library, "lib-dynload"), os.path.join(sys.base_prefix, "DLLs")]
    name, find = os.path.splitext(os.path.basename(path))[0], _importing.PathFinder.find_spec
    if name in sys.modules or name in sys.builtin_module_names or find(name, _Finder.library):
        name = f"_plugin_{name}"
    return _run_file(path, name)


def _load_module(name: str) -> ModuleType:
    folder = _current_folder()
    sys.path.insert(0, folder)
    try:
        return _import(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # it lacks something itself
        where = f"{folder!r} or for {sys.executable}: set cwd, or PYTHONPATH in env"
        sys.exit(f"miniplug: there is no module {error.name!r} in {where}")


def freeze_support() -> None:
    """Let a frozen application serve its own plugins: the first statement of its main program.

    It starts its own executable again for a spec or a ``.py`` file. There this function is the plugin's main
    loop, and does not return; otherwise it does nothing. The plugin can import what is frozen into the
    application, and what lies beside its own file.

    With `python=` that interpreter loads this file from where ``miniplug.__file__`` says: pack it there as a
    data file, too.
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
    name, _, method = given.METHOD.rpartition(".")
    if method.startswith("_"):  # which a proxy has of its own
        raise _no_method(method, None, "a plugin")
    with _opened(given) as plugin:
        found = plugin.dispense(name or None)
        function = found if type(found) is _Method else getattr(found, method)
        result = function(*map(_argument, given.ARG))
        for each in result if isinstance(result, Stream) else (result,):
            print(_printable(each), flush=True)


def _argument(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _printable(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return text if json.loads(text) == value else repr(value)
    except (TypeError, ValueError):
        return repr(value)


def _inspect(given: Any) -> None:
    indent = _import("textwrap").indent
    with _opened(given) as plugin:
        for name, methods in sorted(plugin.describe().items()):
            print(name)
            for method in methods.values():
                print(f"    {method.name}{method.signature or '(...)'}")
                print(indent(f"{method.doc}\n", " " * 8) if method.doc else "", end="")


def _opened(given: Any) -> Plugin:
    sink = "log" if given.verbose else "discard"
    if given.verbose:
        _import("logging").basicConfig(level="DEBUG")
    return launch(given.PLUGIN, protocol_versions=range(100), python=given.python, stdout=sink, stderr=sink)


def _one_line(error: BaseException) -> str:
    if isinstance(error, RemoteError):
        return f"{error.type_name}: {error.message}".partition("\n")[0].rstrip(": ")
    output = [line for line in getattr(error, "output", ()) if line.strip()]
    return " ".join([str(error).partition("\n")[0], *output[-1:]])


def _doctor(given: Any) -> int:
    checks: dict[str, Callable[[], str]] = {
        "miniplug": lambda: f"{__version__}, {_FILE}, {sys.version.split()[0]} on {sys.platform}",
        "transport": _check_listening,
        "loopback TCP": partial(_check_listening, "127.0.0.1:0"),
        "FIPS mode": _check_fips,
        "process tree": lambda: f"a {'job object' if _WINDOWS else 'group'} for each plugin",
        "a plugin": partial(_check_plugin, given.python),
    }
    rows = []
    for what, check in checks.items():
        try:
            works, detail = True, check()
        except (OSError, ValueError, PluginError) as error:
            works, detail = False, _one_line(error)
        rows.append({"check": what, "ok": works, "detail": detail})
        if not given.json:
            print(f"{'ok' if works else 'no':<4}{what:<16}{detail}")
    if given.json:
        print(json.dumps({"ok": works, "checks": rows}, indent=2))
    return 0 if works else 1


def _check_listening(address: str = "") -> str:
    listener = _Listener(address)
    listener.close()
    return "; not in ".join([listener.address, *listener.passed_over])


def _check_fips() -> str:
    try:
        _import("hashlib").md5(b"")
        return "off"
    except ValueError:
        return "on"


def _check_plugin(python: str | None) -> str:
    with launch("os:path", python=python, call_timeout=20.0, stdout="discard", stderr="discard") as plugin:
        plugin.dispense().basename("a/b")
        return "runs"


def _parser(argparse: Any) -> Any:
    class Parser(argparse.ArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> None:
            self.exit(2, f"{self.prog}: {message}\n")

    parser = Parser(prog="python -m miniplug")
    parser.add_argument("--version", action="version", version=f"miniplug {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    serve = verbs.add_parser("serve", help="be a plugin: serve what the specs name").add_argument
    call = verbs.add_parser("call", help="call a plugin once, print the result").add_argument
    inspect = verbs.add_parser("inspect", help="tell what a plugin can do").add_argument
    doctor = verbs.add_parser("doctor", help="what this machine allows").add_argument

    serve("SPEC", nargs="+", help="module:Attr, path/to/file.py:Attr or NAME=one of these")
    serve("--listen", metavar="ADDRESS", help="where hosts attach")
    serve("--authkey-file", metavar="FILE", help="has their key, in hexadecimal digits")
    serve("--persist", action="store_true", help="stay when the last host is gone")
    for add in (call, inspect, doctor):
        add("--python", help="the interpreter for the plugin")
    for add in (call, inspect):
        add("--verbose", "-v", action="store_true", help="what the plugin writes goes to stderr")
        add("PLUGIN", help="a program, a .py file, or a spec such as path/to/file.py:Attr")
    call("METHOD", help="or NAME.METHOD, if it serves several")
    call("ARG", nargs="*", help="JSON, or else a string")
    doctor("--json", action="store_true")
    return parser


def _main(arguments: Sequence[str] | None = None) -> None:
    given = _parser(_import("argparse")).parse_args(arguments)
    if given.verb == "serve":  # whose errors are the plugin's own
        _run_plugin(__name__, "serve", *given.SPEC, address=given.listen, persist=given.persist,
                    authkey_file=given.authkey_file)
        return
    try:
        _prepare_output()
        status = {"call": _call_once, "inspect": _inspect, "doctor": _doctor}[given.verb](given)
        print(end="", flush=True)
        sys.exit(status)
    except (PluginError, ValueError) as error:
        sys.exit(f"miniplug: {_one_line(error)}")
    except OSError as error:  # nobody reads what is printed, as behind ``head``; or the disk is full
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
