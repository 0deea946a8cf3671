"""What a user may write, and what not, as type checkers see it. It is never run: test_packaging.py has it checked.

A line that ends with "# error" is one that a checker must refuse; every other must pass, as strict as it can be set.
"""

import abc
import asyncio
import concurrent.futures
import dataclasses
import enum
import logging
import multiprocessing
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, assert_type

import miniplug


class Greeter(abc.ABC):
    @abc.abstractmethod
    def greet(self, name: str) -> str: ...


class Speaker(Protocol):
    def say(self, text: str, *, times: int = 1) -> None: ...


class GreeterHello(Greeter):
    def greet(self, name: str) -> str:
        return f"Hello, {name}!"

    def count(self, limit: int) -> Iterator[int]:
        while not miniplug.cancelled():
            yield limit


# -- both sides

HANDSHAKE = miniplug.Handshake(protocol_version=1, magic_cookie_key="BASIC_PLUGIN", magic_cookie_value="hello")
assert_type(miniplug.Handshake().protocol_version, int)
assert_type(HANDSHAKE.magic_cookie_key, str)
assert_type(HANDSHAKE.magic_cookie_value, str)
miniplug.Handshake(2, "KEY", "value")
miniplug.Handshake(protocol_version="1")  # error
miniplug.Handshake(magic_cooky_key="KEY")  # error
HANDSHAKE.protocol_version = 2  # error


@miniplug.register
@dataclasses.dataclass
class Point:
    x: int
    y: int = 0

    def moved(self, by: int) -> "Point":
        return Point(self.x + by, self.y)


@miniplug.register(name="colour")
class Colour(enum.Enum):
    RED = 1


@miniplug.register()
class Pair(NamedTuple):
    left: int
    right: str


class Money:
    def __init__(self, cents: int) -> None:
        self.cents = cents


def as_cents(money: Money) -> int:
    return money.cents


assert_type(Point(1).moved(2), Point)
assert_type(Point(1).x, int)
Point("1")  # error
Point(1).moved("2")  # error
NUMBER: int = Colour.RED.value
print(Colour.BLUE)  # error
assert_type(Pair(1, "2").right, str)
Pair(1)  # error
assert_type(miniplug.register(Money, encode=as_cents, decode=Money), type[Money])
assert_type(miniplug.register(Money, name="money", encode=as_cents, decode=Money)(5).cents, int)
miniplug.register(Money, label="money")  # error
miniplug.register(Money, name=5)  # error
miniplug.register(5)  # error

LENT = miniplug.ref(GreeterHello())
miniplug.release(LENT)
miniplug.ref()  # error
assert_type(miniplug.__version__, str)


# -- in a plugin

def serve_them() -> None:
    miniplug.serve({"greeter": GreeterHello(), "class": GreeterHello, "factory": lambda: GreeterHello()})
    miniplug.serve({1: {"greeter": GreeterHello()}, 2: {"greeter": GreeterHello}}, handshake=HANDSHAKE)
    miniplug.serve({"greeter": GreeterHello()}, info={"version": "1.2", "needs": ["numpy"]}, address="/run/greeter",
                   authkey=b"x" * 32, persist=True, max_workers=1, max_message=1 << 20)
    miniplug.serve(GreeterHello())  # error
    miniplug.serve({}, max_worker=1)  # error
    miniplug.serve({}, persist="yes")  # error
    assert_type(miniplug.cancelled(), bool)
    miniplug.freeze_support()


# -- in a host

def take_line(line: str) -> None: ...


def configure(plugin: miniplug.Plugin) -> None: ...


def start_them(folder: pathlib.Path, logger: logging.Logger) -> None:
    miniplug.launch([sys.executable, folder / "plugin.py"])
    miniplug.launch("greeter.py:GreeterHello")
    miniplug.launch(folder / "plugin.py")
    assert_type(miniplug.launch(
        "greeter.py:GreeterHello", name="greeter", handshake=HANDSHAKE, protocol_versions=[1, 2], python=folder / "python",
        env={"LANG": "C"}, inherit_env=False, cwd=folder, start_timeout=5, call_timeout=2.5, stdin="inherit", stdout="log",
        stderr=take_line, logger=logger, sha256="0" * 64, limits=miniplug.Limits(memory=1 << 30), max_restarts=3,
        restart_window=10.0, heartbeat=5.0, idle_timeout=60, on_start=configure, on_exit=configure, managed=False,
        persist=True, max_message=1 << 20), miniplug.Plugin)
    miniplug.launch("greeter", stdin=sys.stdin, stdout=sys.stdout, stderr="discard", sha256={folder / "a": "0" * 64})
    miniplug.launch("greeter", sha256={"a.py": "0" * 64}, call_timeout=None, heartbeat=None, limits=None, python=None)
    miniplug.Plugin("greeter", name="greeter", max_restarts=3, on_exit=lambda plugin: print(plugin.exit_code))
    miniplug.launch()  # error
    miniplug.launch(5)  # error
    miniplug.launch("greeter", "second")  # error
    miniplug.launch("greeter", max_restart=3)  # error
    miniplug.launch("greeter", name=5)  # error
    miniplug.launch("greeter", handshake={"protocol_version": 1})  # error
    miniplug.launch("greeter", protocol_versions=1)  # error
    miniplug.launch("greeter", env={"N": 1})  # error
    miniplug.launch("greeter", inherit_env="no")  # error
    miniplug.launch("greeter", start_timeout="5")  # error
    miniplug.launch("greeter", call_timeout="5")  # error
    miniplug.launch("greeter", stdin=5)  # error
    miniplug.launch("greeter", stdout=5)  # error
    miniplug.launch("greeter", stderr=configure)  # error
    miniplug.launch("greeter", logger="greeter")  # error
    miniplug.launch("greeter", sha256=b"0")  # error
    miniplug.launch("greeter", limits={"memory": 1})  # error
    miniplug.launch("greeter", max_restarts=1.5)  # error
    miniplug.launch("greeter", restart_window="10")  # error
    miniplug.launch("greeter", heartbeat="5")  # error
    miniplug.launch("greeter", idle_timeout="5")  # error
    miniplug.launch("greeter", on_start=take_line)  # error
    miniplug.launch("greeter", on_exit=5)  # error
    miniplug.launch("greeter", managed="no")  # error
    miniplug.launch("greeter", persist="no")  # error
    miniplug.launch("greeter", max_message="1")  # error
    miniplug.launch("greeter", codec="json")  # error
    miniplug.Plugin("greeter", max_restart=3)  # error
    miniplug.Plugin("greeter", codec="json")  # error


def limit_it() -> None:
    limits = miniplug.Limits(memory=1 << 30, cpu_seconds=1.5, open_files=64)
    assert_type(limits.memory, int | None)
    assert_type(limits.cpu_seconds, float | None)
    assert_type(limits.open_files, int | None)
    miniplug.Limits(memory="1 GB")  # error
    miniplug.Limits(files=64)  # error
    limits.memory = 5  # error


def attach_to_it(config: dict[str, Any], logger: logging.Logger) -> None:
    assert_type(miniplug.attach(config), miniplug.Plugin)
    miniplug.attach(config, name="greeter", handshake=HANDSHAKE, protocol_versions=[1], call_timeout=5.0,
                    max_message=1 << 20, logger=logger, heartbeat=5.0)
    miniplug.attach("greeter")  # error
    miniplug.attach(config, cwd="/")  # error
    miniplug.attach(config, call_timout=5.0)  # error
    miniplug.attach(config, call_timeout="5")  # error
    miniplug.attach(config, logger="greeter")  # error


def serve_it_here(logger: logging.Logger) -> None:
    assert_type(miniplug.local({"greeter": GreeterHello()}), miniplug.Plugin)
    miniplug.local({1: {"greeter": GreeterHello}}, info={"version": 1}, max_workers=4, name="greeter", handshake=HANDSHAKE,
                   protocol_versions=[1], call_timeout=5.0, max_message=1 << 20, logger=logger, heartbeat=5.0)
    miniplug.local(GreeterHello())  # error
    miniplug.local({}, cwd="/")  # error
    miniplug.local({}, call_timout=5.0)  # error
    miniplug.local({}, heartbeat="5")  # error


def look_for_some(folder: pathlib.Path) -> None:
    assert_type(miniplug.discover(folder), list[pathlib.Path])
    assert_type(miniplug.discover("plugins", "*/plugin.py"), list[pathlib.Path])
    assert_type(miniplug.discover_entry_points("app.plugins"), dict[str, str])
    miniplug.discover_entry_points("app.plugins", python=folder / "python")
    for path in miniplug.discover(folder, pattern="*.py"):
        miniplug.launch(path)
        miniplug.launch(f"{path}:Tool")
    miniplug.discover(5)  # error
    miniplug.discover_entry_points("app.plugins", pyton=folder)  # error


# -- a plugin

def use_it(plugin: miniplug.Plugin) -> None:
    with plugin as started:
        assert_type(started, miniplug.Plugin)
    assert_type(plugin.start(), miniplug.Plugin)
    greeter = plugin.dispense("greeter", Greeter)
    assert_type(greeter, Greeter)
    assert_type(greeter.greet("world"), str)
    greeter.greet(5)  # error
    greeter.great("world")  # error
    assert_type(plugin.dispense("greeter", Greeter, timeout=5.0), Greeter)
    assert_type(plugin.dispense(interface=Greeter), Greeter)
    assert_type(plugin.dispense("hello", GreeterHello).count(3), Iterator[int])
    speaker: Speaker = plugin.dispense("speaker", Speaker)
    speaker.say("hello", times=2)
    speaker.say("hello", times="2")  # error
    anything = plugin.dispense()
    anything.whatever(1, two=3).submit(4).result()
    plugin.dispense("greeter", timeout=5).greet("world")
    plugin.dispense("greeter", timeout="5")  # error
    plugin.dispense(5)  # error
    for methods in plugin.describe().values():
        for name, method in methods.items():
            assert_type(name, str)
            assert_type(method, miniplug.MethodInfo)
            assert_type(method.name, str)
            assert_type(method.signature, str | None)
            assert_type(method.doc, str | None)
    assert_type(plugin.ping(), float)
    assert_type(plugin.ping(timeout=1.0), float)
    assert_type(plugin.reattach_config(), dict[str, Any])
    assert_type(plugin.restart(drain=5.0), miniplug.Plugin)
    plugin.restart(drain=None)
    plugin.close()
    plugin.close(grace=0.5)
    plugin.close(grace="1")  # error
    plugin.kill()
    plugin.detach()
    assert_type(plugin.wait(), int | None)
    assert_type(plugin.wait(timeout=5), int | None)
    assert_type(plugin.running, bool)
    assert_type(plugin.exit_code, int | None)
    assert_type(plugin.pid, int | None)
    assert_type(plugin.name, str)
    assert_type(plugin.info, dict[str, Any])
    assert_type(plugin.protocol_version, int)
    assert_type(plugin.restarts, int)
    plugin.running = True  # error
    plugin.stop()  # error


async def use_it_there() -> None:
    async with miniplug.Plugin("greeter.py:GreeterHello") as plugin:
        assert_type(plugin, miniplug.Plugin)
        assert_type(await plugin.astart(), miniplug.Plugin)
        await plugin.aclose()
        await plugin.aclose(grace=1.0)


# -- calls and streams

def call_it(call: miniplug.Call) -> None:
    future: concurrent.futures.Future[Any] = call
    future.add_done_callback(lambda done: print(done.result()))
    concurrent.futures.wait([call])
    assert_type(call.cancel(), bool)
    assert_type(call.done(), bool)
    assert_type(call.exception(timeout=5.0), BaseException | None)
    print(call.result(5.0).anything)
    call.results()  # error


async def await_it(call: miniplug.Call, stream: miniplug.Stream) -> None:
    print((await call).anything)
    await asyncio.wait_for(call, 5.0)
    async for item in stream:
        print(item.anything)
    await stream.aclose()


def read_it(stream: miniplug.Stream) -> None:
    for item in stream:
        print(item.anything)
    with stream:
        print(next(stream))
    stream.close()
    len(stream)  # error


# -- errors

def survive(function: Callable[[], None]) -> None:
    try:
        function()
    except miniplug.ChecksumError as error:
        assert_type(error.path, str)
        assert_type(error.expected, str)
        assert_type(error.actual, str)
    except miniplug.HandshakeError as error:
        assert_type(error.host, Mapping[str, Any])
        assert_type(error.plugin, Mapping[str, Any])
    except miniplug.AuthenticationError as error:
        refused: multiprocessing.AuthenticationError = error
        print(refused)
    except miniplug.LaunchError as error:
        assert_type(error.command, list[str] | None)
        assert_type(error.exit_code, int | None)
        assert_type(error.output, Sequence[str])
        assert_type(error.strerror, str | None)
        print(error.outputs)  # error
    except miniplug.ProtocolError as error:
        crashed: miniplug.PluginCrashed = error
        print(crashed)
    except miniplug.PluginCrashed as error:
        assert_type(error.exit_code, int | None)
        assert_type(error.signal_name, str | None)
        assert_type(error.output, Sequence[str])
        assert_type(error.calls, Sequence[str])
    except miniplug.PluginNotFound as error:
        assert_type(error.names, Sequence[str])
    except miniplug.CallTimeout as error:
        assert_type(error.method, str)
        assert_type(error.seconds, float)
    except miniplug.MethodNotFound as error:
        assert_type(error.name, str)
        assert_type(error.matches, Sequence[str])
    except miniplug.InterfaceMismatch as error:
        assert_type(error.differences, Sequence[str])
    except miniplug.NotSerializable as error:
        assert_type(error.path, str)
        assert_type(error.type_name, str)
    except miniplug.MessageTooLarge as error:
        assert_type(error.size, int)
        assert_type(error.limit, int)
    except miniplug.RemoteError as error:
        assert_type(error.type_name, str)
        assert_type(error.message, str)
        assert_type(error.remote_traceback, str)
    except (miniplug.PluginClosed, miniplug.DeadReference, miniplug.PluginError) as error:
        print(error)


def know_the_bases() -> None:
    launch: OSError = miniplug.LaunchError()
    crashed: ConnectionError = miniplug.PluginCrashed()
    closed: RuntimeError = miniplug.PluginClosed()
    not_found: LookupError = miniplug.PluginNotFound()
    dead: ReferenceError = miniplug.DeadReference()
    late: TimeoutError = miniplug.CallTimeout()
    no_method: AttributeError = miniplug.MethodNotFound()
    mismatch: TypeError = miniplug.InterfaceMismatch()
    unfit: TypeError = miniplug.NotSerializable()
    large: ValueError = miniplug.MessageTooLarge()
    print(launch, crashed, closed, not_found, dead, late, no_method, mismatch, unfit, large)
    wrong: ValueError = miniplug.PluginClosed()  # error
    print(wrong)


print(miniplug.no_such_name)  # error
