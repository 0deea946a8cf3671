"""Plugins that were written from docs/protocol.md, without miniplug: in JavaScript, and in Python by hand."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import alive, until

import miniplug

HERE = os.path.dirname(os.path.abspath(__file__))
RAW = os.path.join(HERE, "plugins", "raw_plugin.py")
SCRIPT = os.path.join(HERE, "plugins", "foreign_plugin.mjs")
NODE = shutil.which("node")


@pytest.fixture(scope="module")
def node_command():
    if os.name == "nt" or NODE is None:
        pytest.skip("there is no node" if NODE is None else "it reads a stream, and a pipe here carries messages")
    version = subprocess.check_output([NODE, "--version"], universal_newlines=True)
    if int(version.lstrip("v").split(".")[0]) < 18:
        pytest.skip(f"node {version.strip()} is too old for this plugin")
    return [NODE, SCRIPT]


@pytest.fixture
def node(node_command):
    with miniplug.launch(node_command) as plugin:
        yield plugin


# -- JavaScript

PLAIN = [None, True, 0, -1.5, 2**53 - 1, "", "caf\u00e9 \U0001f600", [], [1, [2, {}]], {"a": {"b": [None]}},
         {"$a": 1, "b": 2}, "x" * 300_000]


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: ascii(value)[:20])
def test_javascript_keeps_plain_data(node, value):
    arrived = node.dispense("calculator").echo(value)
    assert arrived == value and type(arrived) is type(value)


def test_javascript_is_called_like_any_plugin(node):
    calculator = node.dispense("calculator")
    assert calculator.add(1, 2, 3) == 6
    assert calculator.divide(2, 3, digits=3) == 0.667
    assert {"add", "divide", "echo"} <= set(dir(calculator))
    assert node.info == {"runtime": "node"}
    assert node.ping() < 5
    assert calculator.environment() == []


def test_an_exception_of_javascript_is_a_remote_error(node):
    with pytest.raises(miniplug.RemoteError, match="division by zero") as caught:
        node.dispense("calculator").divide(1, 0)
    assert caught.value.type_name == "RangeError"
    assert "foreign_plugin.mjs" in caught.value.remote_traceback
    assert node.running


def test_what_javascript_does_not_have(node):
    calculator = node.dispense("calculator")
    assert not hasattr(calculator, "subtract")
    with pytest.raises(miniplug.MethodNotFound):
        calculator.subtract  # noqa: B018
    greeter = node.dispense("greeter")  # which answers every name, so the plugin is asked
    assert greeter.greet("node") == "Hello, node!"
    with pytest.raises(miniplug.MethodNotFound) as missing:
        greeter.shout("node")
    assert missing.value.name == "shout"
    with pytest.raises(miniplug.PluginNotFound) as unknown:
        node.dispense("nothing")
    assert unknown.value.names == ["calculator", "greeter"]


def test_javascript_answers_out_of_order(node):
    calculator = node.dispense("calculator")
    with pytest.raises(miniplug.CallTimeout):
        calculator.nap.timeout(0.05)(300_000)
    assert calculator.add(1, 1) == 2


def test_a_stream_of_javascript(node):
    calculator = node.dispense("calculator")
    assert list(calculator.count(1000)) == list(range(1000))
    assert list(calculator.count(0)) == []
    assert calculator.count.submit(3).result(10).__next__() == 0
    until(lambda: calculator.closed() == 3)


def test_a_stream_of_javascript_waits_for_its_reader(node):
    calculator = node.dispense("calculator")
    with calculator.count(10**9) as stream:
        assert [next(stream) for _ in range(200)] == list(range(200))
        assert calculator.add(1, 1) == 2
        assert calculator.closed() == 0
    until(lambda: calculator.closed() == 1)


def test_a_stream_of_javascript_that_fails(node):
    calculator = node.dispense("calculator")
    stream = calculator.count(10, fail_at=2)
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(miniplug.RemoteError, match="no further than 2") as caught:
        next(stream)
    assert caught.value.type_name == "RangeError"
    assert list(stream) == [] and calculator.closed() == 1


def test_javascript_calls_back(node):
    calculator = node.dispense("calculator")
    assert calculator.each(["a", "b"], lambda text: text.upper()) == ["A", "B"]
    assert calculator.each([1, 2], lambda number: calculator.add(number, 10)) == [11, 12]
    assert calculator.each.submit([3], abs).result(10) == [3]
    until(lambda: not node._supervisor.session().references.lends)  # all is given back


def test_an_exception_passes_through_javascript(node):
    def refuse(value):
        raise ValueError(value)

    with pytest.raises(ValueError, match="seven") as caught:
        node.dispense("calculator").each(["seven"], refuse)
    assert isinstance(caught.value, miniplug.RemoteError) and "refuse" in caught.value.remote_traceback


def test_notifying_javascript(node_command):
    lines = []
    with miniplug.launch(node_command, stderr=lines.append) as plugin:
        calculator = plugin.dispense("calculator")
        calculator.divide.notify(1, 0)
        calculator.count.notify(10)
        assert calculator.add(1, 1) == 2
    assert lines[0] == "RangeError: division by zero"


def test_a_log_record_of_javascript(node_command, caplog):
    with caplog.at_level(10), miniplug.launch(node_command, name="js") as plugin:
        plugin.dispense("calculator").log("careful")
    (record,) = [record for record in caplog.records if record.name.startswith("miniplug.js")]
    assert (record.name, record.levelname, record.getMessage()) == ("miniplug.js.calculator", "WARNING", "careful")
    assert record.length == 7


def test_javascript_closes_gracefully(node_command):
    plugin = miniplug.launch(node_command)
    plugin.dispense("calculator")
    plugin.close(grace=20)
    assert plugin.exit_code == 0 and not plugin.running


def test_a_crash_of_javascript_says_so(node_command):
    with miniplug.launch(node_command) as plugin:
        with pytest.raises(miniplug.PluginCrashed) as caught:
            plugin.dispense("calculator").leave(3)
        assert caught.value.exit_code == 3


def test_javascript_says_that_it_is_a_plugin(node_command):
    done = subprocess.run(node_command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,  # noqa: UP022
                          check=False, timeout=30)
    assert done.returncode == 1 and b"is a plugin" in done.stderr


def check_ends_with_host(write, command):
    host = write("host.py", f"""
        import sys, miniplug
        plugin = miniplug.launch({command!r})
        print(plugin.pid, flush=True)
        sys.stdin.read()
        """)
    environment = dict(os.environ, PYTHONPATH=os.path.dirname(HERE))
    process = subprocess.Popen([sys.executable, host], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    with process:
        pid = int(process.stdout.readline())
        assert alive(pid)
        process.kill()
    until(lambda: not alive(pid), 5)


def test_javascript_ends_with_its_host(node_command, write):
    check_ends_with_host(write, node_command)


# -- Python without miniplug

@pytest.fixture
def raw():
    with miniplug.launch([sys.executable, RAW], env={"PYTHONPATH": ""}) as plugin:
        yield plugin


def test_a_raw_plugin_is_called_like_any(raw):
    greeter = raw.dispense("greeter")
    assert greeter.greet("world") == greeter.greet(name="world") == "Hello, world!"
    assert raw.info == {"raw": True} and raw.ping() < 5


def test_a_raw_plugin_that_does_not_say_what_it_can_do(raw):
    with pytest.raises(miniplug.MethodNotFound, match="the plugin 'raw_plugin' does not say what it can do"):
        raw.describe()
    assert raw.running


def test_a_raw_plugins_exception_is_builtin_and_remote(raw):
    with pytest.raises(ValueError, match="no name") as caught:
        raw.dispense().greet("")
    assert isinstance(caught.value, miniplug.RemoteError)
    with pytest.raises(TypeError):
        raw.dispense().greet()


def test_a_raw_plugin_closes_gracefully():
    plugin = miniplug.launch([sys.executable, RAW])
    plugin.dispense()
    plugin.close(grace=20)
    assert plugin.exit_code == 0


def test_a_raw_plugin_is_told_why_it_is_refused():
    with pytest.raises(miniplug.HandshakeError, match="no common protocol version") as caught:
        miniplug.launch([sys.executable, RAW], protocol_versions=[7], stderr="discard")
    assert caught.value.plugin["protocol_versions"] == [1]


def test_a_raw_plugin_ends_with_its_host(write):
    check_ends_with_host(write, [sys.executable, RAW])


def test_a_raw_plugin_can_persist():
    owner = miniplug.launch([sys.executable, RAW], persist=True)
    config = owner.reattach_config()
    owner.detach()
    with miniplug.attach(config) as plugin, miniplug.attach(config) as other:
        assert plugin.dispense().greet("one") == "Hello, one!" and other.dispense().greet("two") == "Hello, two!"
    with miniplug.attach(config) as plugin:
        plugin.kill()
    until(lambda: not (alive(config["pid"]) or os.path.isdir(os.path.dirname(config["address"]))))
