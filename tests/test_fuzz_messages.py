"""Whatever messages a plugin sends, in whatever order: the caller gets a value, or an error that is documented, and is not
left waiting; no code is run; and it does not take long."""

import abc
import inspect
import json
import os
import pydoc
import struct
import sys
import threading
import time

import pytest
from conftest import accepted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_fuzz_codec import error, oracle, plain, text_of, texts, wire

import miniplug

examples = int(os.environ.get("FUZZ_EXAMPLES", "0"))  # many, and others each time
SETTINGS = settings(deadline=None, max_examples=examples or 150, derandomize=not examples,
                    suppress_health_check=list(HealthCheck))
SECONDS = 3.0  # of processor time, for a few kilobytes
HEADER = struct.Struct("!BBHIQQ")
CALL, RESULT, ITEM, PING, PONG, DISPENSED = 1, 3, 5, 10, 11, b'{"$ref":[1,["plain"],false]}'
watch = oracle.Watch()


def _audit(event, args, watch=watch):  # which as a global is None when the interpreter ends
    usual = event.startswith(("socket.", "threading.", "_thread.", "sys."))  # what a session does by itself
    if not usual and "<unknown>" not in args[:2]:  # and how a traceback that is printed finds its carets
        watch(event, args)


sys.addaudithook(_audit)


class Peer:
    """A plugin that has the key. It is honest until somebody asks for `method`; then it sends these messages, and goes, or
    stays until the host has had enough."""

    def __init__(self, method, messages, stays=False):
        self._method, self._messages, self._stays = method, messages, stays
        self._listener, key = miniplug._Listener(), os.urandom(32)
        self.config = {"network": miniplug._transport(self._listener.address), "address": self._listener.address,
                       "authkey": key.hex(), "pid": 1, "protocol_version": 1}
        self._thread = threading.Thread(target=self._serve, args=(key,))
        self._thread.start()

    def _serve(self, key):
        channel = accepted(self._listener)
        try:
            hello = miniplug._Hello(channel, self._listener.address, key, "plugin")
            hello.as_plugin([1], 1 << 20, {"matches": True}, ["persist"])
            while True:
                frame = channel.receive(time.monotonic() + 60).popleft()
                _, kind, _, _, number, _ = HEADER.unpack_from(frame)
                if kind not in (CALL, PING):
                    continue
                method = json.loads(frame[24:])[1] if kind == CALL else "ping"
                if method == self._method:
                    break
                body = {"dispense": DISPENSED, "info": b"{}"}.get(method, b"1")
                self._send(channel, [(RESULT if kind == CALL else PONG, 1, number, 0, body, ())], number)
            self._send(channel, self._messages, number)
            while self._stays:
                channel.receive(time.monotonic() + 60).popleft()
        except (OSError, EOFError):
            pass  # the host has had enough
        finally:
            channel.close()

    def _send(self, channel, messages, asked):
        for kind, flags, number, parent, body, buffers in messages:
            number, parent = (asked if each == "asked" else each for each in (number, parent))
            header = HEADER.pack(1, kind, flags, len(buffers), number, parent)
            for frame in (header + body, *buffers):
                channel.write(channel.frame(frame))  # it may have to wait

    def close(self):
        self._thread.join()
        self._listener.close()


class Plain(abc.ABC):
    @abc.abstractmethod
    def plain(self, a=1): ...


# -- what the host does meanwhile. Of each: what is asked for at last, and the doing


def _describe(plugin):
    for name, methods in plugin.describe().items():
        assert type(name) is str and type(methods) is dict
        for method, info in methods.items():
            assert type(method) is str and info.name == method
            assert isinstance(info.signature, (str, type(None))) and isinstance(info.doc, (str, type(None)))


def _explain(plugin):
    method = plugin.dispense("x").plain
    assert isinstance(method.__doc__, (str, type(None)))
    assert isinstance(getattr(method, "__signature__", None), (inspect.Signature, type(None)))
    assert pydoc.plain(pydoc.render_doc(method)) and pydoc.render_doc(plugin.dispense("x"))


def _read(plugin):
    stream = plugin.dispense("x").plain()
    if isinstance(stream, miniplug.Stream):
        assert sum(1 for _ in stream) < 1000


USES = {
    "a call": ("plain", lambda plugin: plugin.dispense("x").plain()),
    "a call that lends": ("plain", lambda plugin: plugin.dispense("x").plain(miniplug.ref([1]), lambda: 2)),
    "a submitted call": ("plain", lambda plugin: plugin.dispense("x").plain.submit().result(50)),
    "a notification": ("ping", lambda plugin: (plugin.dispense("x").plain.notify(1), plugin.ping(50))),
    "a stream": ("plain", _read),
    "a ping": ("ping", lambda plugin: plugin.ping(50)),
    "a description": ("describe", _describe),
    "help": ("describe", _explain),
    "an interface": ("describe", lambda plugin: plugin.dispense("x", Plain)),
    "an instance": ("dispense", lambda plugin: plugin.dispense("x")),
    "information": ("info", lambda plugin: plugin.info),
}

# -- what the plugin sends

anything = plain | st.lists(plain, max_size=3) | st.dictionaries(texts, plain, max_size=2)  # what a tag is not
parameters = st.lists(st.tuples(st.sampled_from(["a", "self", "", "a b"]), st.integers(-1, 5), texts | st.none(), anything)
                      | anything, max_size=3)
methods = st.dictionaries(st.sampled_from(["plain", "", "x"]), st.tuples(anything, anything, parameters | anything) | anything)
descriptions = methods | st.dictionaries(texts, methods | anything, max_size=2)
usual_bodies = st.sampled_from([
    b"", b"null", b"1", b"[]", b"[1]", b"[" * 99, DISPENSED, b'{"$own":[1,null]}', b'{"$ref":[1,null,true]}', b"64", b"\xff",
    b'[0,"info",[],{}]', b'[0,"describe",[1],{}]', b'[1,"append",[1],{}]', b'[2,"",[],{}]', b'[0,"dispense",["x"],{}]',
    b'{"kind":"KeyError","args":[1],"home":1}'])


@st.composite
def as_json(draw, strategy):
    """(Not `map`, whose repr Hypothesis makes, which here is long.)"""
    return text_of(draw(strategy))


bodies = usual_bodies | st.one_of([as_json(each) for each in (wire, error, st.lists(wire, max_size=5), descriptions)])
numbers = st.sampled_from(["asked", "asked", "asked", 0, 1, 2, 3, (1 << 64) - 1])
usual = st.tuples(st.sampled_from([RESULT, 4, ITEM, 6]), st.sampled_from([0, 1, 4, 5]), numbers, st.just(0), bodies, st.just(()))
messages = st.tuples(st.integers(0, 13), st.integers(0, 7), numbers, numbers, bodies, st.lists(st.binary(max_size=5), max_size=1))
opened = st.just((RESULT, 4, "asked", 0, b"", ()))


def use(name, sent, watched=True, stays=False):
    """Have a host do that, and a plugin send this; returns what the host got or what was raised."""
    method, function = USES[name]
    peer = Peer(method, sent, stays)
    try:
        with miniplug.attach(peer.config, call_timeout=50) as plugin:
            watch.seen.clear()
            start = time.process_time()
            watch.on = watched
            try:
                return function(plugin)
            except Exception as caught:
                assert isinstance(caught, miniplug.PluginError), (name, sent, repr(caught))
                assert not isinstance(caught, miniplug.CallTimeout), (name, sent)
                return str(caught)
            finally:
                watch.on = False
                assert not watched or (time.process_time() - start < SECONDS and not watch.seen), (name, sent, watch.seen)
    except miniplug.LaunchError as caught:  # the `info` that attach asks for
        assert method == "info", caught
    finally:
        peer.close()


@pytest.fixture(autouse=True, scope="module")
def everything_is_imported():
    """What is loaded on first use is not loaded because of a message."""
    for name in USES:
        body = b'{"plain":["(a=1)","doc",[["a",1,"1",null],["return",0,null,null]]]}' if name != "an instance" else DISPENSED
        use(name, [(PONG if USES[name][0] == "ping" else RESULT, 1, "asked", 0, body, ())], False)
        use(name, [(4, 0, "asked", 0, b'{"own":true,"type":"MethodNotFound","message":"no"}', ())], False)
        use(name, [(RESULT, 4, "asked", 0, b"", ()), (ITEM, 1, "asked", 0, b'[{"$tuple":[]},{"$decimal":"1"}]', ())], False)


@SETTINGS
@given(st.sampled_from([*USES]), st.lists(messages | usual, max_size=6))
def test_any_messages(name, sent):
    use(name, sent)


@SETTINGS
@given(st.sampled_from(["a call", "a submitted call", "a stream"]), opened, st.lists(usual, max_size=6))
def test_any_stream(name, begun, sent):
    use(name, [begun, *sent])


@SETTINGS
@given(st.sampled_from(["a description", "help", "an interface"]), as_json(descriptions))
def test_any_description(name, told):
    use(name, [(RESULT, 0, "asked", 0, told, ())])


@pytest.mark.parametrize("name", [name for name, (method, _) in USES.items() if method not in ("info", "describe")])
@pytest.mark.parametrize("kind", [RESULT, 4, ITEM, 6, PONG])
def test_an_answer_of_the_wrong_kind_breaks_the_protocol(name, kind):
    """Also where nobody waits for it, as of a submitted call."""
    right = [PONG] if USES[name][0] == "ping" else [RESULT, 4]
    if kind not in right:
        for flags in (0, 4):
            answer = kind, flags, "asked", 0, b"[1]" if kind == ITEM else b"{}", ()
            assert "broke the protocol" in use(name, [answer], stays=True)
