"""What must hold of the codec whatever arrives: shared by the tests and by the coverage-guided fuzzer beside this file.

`check_value` and `check_error` take bytes from the wire. They fail with AssertionError if code was run, if anything but a
documented exception was raised, or if it took more time or memory than is in proportion to the bytes.
"""

import builtins
import copy
import dataclasses
import enum
import math
import os
import pickle
import struct
import sys
import time
import traceback
import tracemalloc

import miniplug

BUILTIN_ERRORS = sorted(name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, Exception))

for path in (
    "datetime.date",
    "decimal.Decimal",
    "fractions.Fraction",
    "uuid.UUID",
    "pathlib.Path",
    "array.array",
    "collections.Counter",
):  # what the codec imports on first use
    miniplug._found(path)
try:
    import zoneinfo
    import zoneinfo._common

    ZONES = tuple(zoneinfo.TZPATH)
except ImportError:
    ZONES = ()

SECONDS, SECONDS_PER_BYTE = (
    1.0,
    40e-6,
)  # of processor time; what is meant is a tenth, but machines differ, and tracemalloc is slow
BYTES, BYTES_PER_BYTE = 1 << 20, 150
TEXT, TEXT_PER_BYTE = 20000, 60
FORBIDDEN = (
    "exec",
    "compile",
    "os.",
    "subprocess.",
    "socket.",
    "ctypes.",
    "pickle.",
    "shutil.",
    "open",
    "import",
    "sys.",
    "marshal.",
    "code.",
    "glob.",
    "urllib.",
    "winreg.",
    "signal.",
    "webbrowser.",
    "threading.",
    "_thread.",
)
ALLOWED = ("os.fspath", "sys._getframe", "sys._current_frames")


class Watch:
    """Sees what the interpreter does while it is on: `seen` is what it must not."""

    def __init__(self):
        self.on, self.seen = False, []

    def __call__(self, event, args):
        if not self.on or not event.startswith(FORBIDDEN) or event in ALLOWED:
            return
        if event == "import" and str(args[0]).partition(".")[0] in ("tzdata", "importlib", "zoneinfo"):
            return  # a time zone by name is looked for there, and nowhere else
        if event in ("open", "os.listdir", "os.scandir") and (
            str(args[0]).startswith(ZONES) or str(args[0]).startswith(tuple(path or os.curdir for path in sys.path))
        ):
            return  # the import system looks for tzdata
        self.seen.append((event, args))


watch = Watch()
sys.addaudithook(watch)


@miniplug.register(name="fuzz.Point")
@dataclasses.dataclass(frozen=True)
class Point:
    x: object
    y: object = 0


@miniplug.register(name="fuzz.Mode")
class Mode(enum.Flag):
    R = 1
    W = 2
    X = 4


@miniplug.register(name="fuzz.Failure")
class Failure(OSError):
    def __str__(self):
        return f"{self.code} {self.errno}"


@miniplug.register(name="fuzz.Syntax")
class Syntax(SyntaxError):
    pass


def codec():
    made = miniplug._Codec(lambda value, lent: None, lambda lent: None, lambda tag, state: Point(tag, str(state)[:10]))
    made.arrays = True
    return made


CODEC = codec()


def measured(function, size):
    """Call a function under watch, and within bounds for so many bytes that have come."""
    tracing = tracemalloc.is_tracing()
    if tracing:
        tracemalloc.clear_traces()
    start = time.process_time()
    watch.seen.clear()
    watch.on = True
    try:
        return function()
    finally:
        watch.on = False
        seconds = time.process_time() - start
        assert not watch.seen, watch.seen
        assert seconds < SECONDS + SECONDS_PER_BYTE * size, f"{seconds} s for {size} bytes"
        if tracing:
            used = tracemalloc.get_traced_memory()[1]
            assert used < BYTES + BYTES_PER_BYTE * size, f"{used} bytes for {size}"


def decoded(data, tagged=1, buffers=(b"a buffer", b"another")):
    """What some bytes are, or None if the codec refuses them."""
    try:
        return measured(lambda: CODEC.loads(data, buffers, tagged), len(data))
    except (miniplug.ProtocolError, miniplug._Undecodable) as error:
        assert len(str(error)) < 5000
        return None


def check_value(data, tagged=1):
    """A value from the wire is refused, or can be used, and sent on unchanged."""
    value = decoded(data, tagged)
    size = len(data) + 16
    try:
        body, buffers, tags, _ = measured(lambda: CODEC.dumps(value, "value"), size)
    except miniplug.NotSerializable:  # a reference, or too deep for a sender
        return value
    again = CODEC.loads(body, [bytes(buffer) for buffer in buffers], tags)
    assert picture(again) == picture(value)
    return value


def check_error(data):
    """An exception from the wire can be raised, printed, chained, copied and pickled, whatever is in it."""
    body = decoded(data)
    size = len(data) + 16
    error = measured(lambda: miniplug._decode_error(body), size)
    assert isinstance(error, miniplug.PluginError) and isinstance(error, Exception)
    assert not isinstance(error, miniplug.PluginCrashed)

    def use():
        texts = [str(error), repr(error)]
        try:
            raise error
        except Exception as caught:
            assert caught is error
        try:
            raise KeyError("next") from error
        except KeyError as later:
            texts += traceback.format_exception(type(later), later, later.__traceback__)
        if isinstance(error, miniplug.RemoteError):
            assert type(error.type_name) is str or "type_name" in str(body)
        for twin in (copy.copy(error), pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):  # noqa: S301
            assert isinstance(twin, miniplug.PluginError)
            texts.append(str(twin))
        if hasattr(Exception, "add_note"):
            error.add_note("noted")
        assert error.with_traceback(None) is error
        return texts

    watch_pickle, watch.on = watch.on, False  # unpickling is the host's own doing here
    start = time.process_time()
    texts = use()
    watch.on = watch_pickle
    assert time.process_time() - start < SECONDS + SECONDS_PER_BYTE * size * 10
    assert sum(map(len, texts)) < TEXT + TEXT_PER_BYTE * size
    told = miniplug._encode_error(error)  # it goes on to another process
    try:
        CODEC.dumps(told, "error")
    except miniplug.NotSerializable:
        CODEC.dumps(miniplug._encode_error(error, bare=True), "error")
    return error


def picture(value, level=0):
    """What tells apart what is not the same, types and all; NaN is NaN, and -0.0 is not 0.0."""
    kind = type(value)
    if kind is float:
        return "nan" if math.isnan(value) else struct.pack("d", value)
    if isinstance(value, (list, tuple)):
        return kind.__name__, [picture(part) for part in value]
    if kind in (set, frozenset):
        return kind.__name__, sorted((picture(part) for part in value), key=repr)
    if kind is dict:
        return kind.__name__, [(picture(key), picture(part)) for key, part in value.items()]
    if kind is complex:
        return "complex", picture(value.real), picture(value.imag)
    if dataclasses.is_dataclass(kind):
        return kind.__name__, [picture(getattr(value, field.name)) for field in dataclasses.fields(kind)]
    if kind is int:
        return hex(value)
    if kind is slice:
        return "slice", picture([value.start, value.stop, value.step])
    if kind.__name__ == "Fraction":
        return "Fraction", hex(value.numerator), hex(value.denominator)
    if kind.__name__ == "range":
        return "range", hex(value.start), hex(value.stop), hex(value.step)
    if isinstance(value, BaseException):
        return kind.__name__, picture(value.args), picture({key: part for key, part in vars(value).items() if key != "__notes__"})
    if kind.__repr__ is object.__repr__:
        return kind.__name__, [picture(getattr(value, name)) for name in kind.__slots__]
    return kind.__name__, repr(value), getattr(value, "fold", 0)
