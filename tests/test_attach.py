"""Plugins that stay when their host goes, and hosts that attach to them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import HERE, WINDOWS, WORKSHOP, alive, freeze, until

import miniplug

posix = pytest.mark.skipif(WINDOWS, reason="the test looks at processes by POSIX means")
linux = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="nothing proves which process the peer is")
PROMPT = 3.0  # seconds; what takes longer has waited for somebody


@pytest.fixture
def owner():
    """A plugin that stays, by the host that has launched it."""
    with miniplug.launch(WORKSHOP, persist=True) as plugin:
        process = plugin._supervisor.run.process._popen
        yield plugin
    if process.returncode is None:  # a test that failed has detached from it
        process.kill()


@contextlib.contextmanager
def process(*arguments, **options):
    """A process of its own, with miniplug importable, whose first line on stdout is JSON: (process, what that says)."""
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([os.path.dirname(HERE), HERE]), **options.pop("env", {}))
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, env=env, universal_newlines=True, **options) as it:
        try:
            yield it, json.loads(it.stdout.readline())
        finally:
            it.kill()


def host(write, end, command=WORKSHOP, options="persist=True"):
    """A host in a process of its own, which launches a plugin and ends as `end` says."""
    path = write("host.py", f"""
import json, os, sys, time
import miniplug
plugin = miniplug.launch({command!r}, {options})
shop = plugin.dispense()
print(json.dumps(plugin.reattach_config()), flush=True)
{end}
""")
    return process(path)


def gone(config):
    """Whether the process has ended, and left nothing."""
    if WINDOWS:
        with contextlib.suppress(miniplug.LaunchError):
            miniplug.attach(config).close()
            return False
        return True
    return not alive(config["pid"]) and not os.path.exists(os.path.dirname(config["address"]))


# -- attaching

def test_a_host_attaches_to_what_another_has_launched(owner):
    config = json.loads(json.dumps(owner.reattach_config()))
    assert set(config) == {"network", "address", "authkey", "pid", "protocol_version"}
    assert config["pid"] == owner.pid and config["protocol_version"] == 1
    with miniplug.attach(config, name="again") as plugin:
        shop = plugin.dispense()
        assert shop.pid() == plugin.pid == owner.pid and plugin.name == "again" and plugin.running
        assert plugin.reattach_config() == config and plugin.ping() < PROMPT
        assert shop.echo(b"x" * 100000) == b"x" * 100000
    assert not plugin.running and plugin.pid is None and plugin.exit_code is None
    assert owner.dispense().greet("you") == "Hello, you!"
    with pytest.raises(miniplug.PluginClosed):
        shop.greet("you")
    plugin.start()
    assert shop.greet("again") == "Hello, again!"  # the same proxy
    plugin.detach()
    plugin.detach()
    assert owner.running


def test_each_host_has_its_own_references_and_all_share_what_is_served(write, owner):
    path = write("counter.py", """
        class Counter:
            def __init__(self): self.value, self.watchers = 0, []
            def watch(self, watcher): self.watchers.append(watcher)
            def add(self, amount):
                self.value += amount
                for watcher in self.watchers: watcher(self.value)
                return self.value
            def numbers(self):
                while True: yield self.value
        counter = Counter()
    """)
    with miniplug.launch(path + ":counter", persist=True) as first, miniplug.attach(first.reattach_config()) as second:
        seen = [], []
        for plugin, values in zip((first, second), seen):
            plugin.dispense().watch(values.append)
        assert [first.dispense().add(1), second.dispense().add(10)] == [1, 11]
        assert seen == ([1, 11], [1, 11])
        with miniplug.attach(first.reattach_config()) as third, third.dispense().numbers() as numbers:
            assert next(numbers) == 11
        with first.dispense().numbers() as numbers:
            assert next(numbers) == 11


def test_many_hosts_at_once_call_and_go(owner):
    config = owner.reattach_config()
    failures = []

    def attend(number):
        try:
            with miniplug.attach(config) as plugin:
                shop = plugin.dispense()
                assert [shop.echo(number + i) for i in range(20)] == [number + i for i in range(20)]
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=attend, args=(100 * number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert owner.dispense().greet("you") == "Hello, you!"


def test_at_most_max_workers_calls_run_whoever_makes_them(write):
    path = write("served.py", """
        import miniplug, workshop
        miniplug.serve({"shop": workshop.Workshop()}, persist=True, max_workers=1)
    """)
    with miniplug.launch(path, env={"PYTHONPATH": HERE}) as first, miniplug.attach(first.reattach_config()) as second:
        shops = first.dispense(), second.dispense()
        calls = [shop.sleep.submit(0.05) for shop in shops * 3]
        start = time.monotonic()
        for call in calls:
            call.result(10)
        assert time.monotonic() - start > 0.2


def test_an_object_made_for_one_host_is_exited_when_that_is_gone(write, tmp_path):
    path = write("managed.py", f"""
        class Managed:
            def __enter__(self): return self
            def __exit__(self, *error): open({str(tmp_path / 'exited')!r}, "a").close()
            def greet(self): return "hello"
    """)
    with miniplug.launch(path + ":Managed", persist=True) as owner:
        with miniplug.attach(owner.reattach_config()) as plugin:
            assert plugin.dispense().greet() == "hello"
            assert not (tmp_path / "exited").exists()
        until((tmp_path / "exited").exists)


def test_a_plugin_that_does_not_persist_says_so(workshop):
    with miniplug.launch(WORKSHOP) as plugin, pytest.raises(miniplug.PluginError, match="persist=True"):
        plugin.reattach_config()
    with miniplug.launch(WORKSHOP) as plugin:
        with pytest.raises(miniplug.PluginError, match="persist=True"):
            plugin.detach()
        assert plugin.dispense().greet("you") == "Hello, you!"
    with miniplug.local({"shop": object()}) as plugin, pytest.raises(miniplug.PluginError, match="persist=True"):
        plugin.reattach_config()


def test_options_that_make_no_sense_are_refused(owner):
    with pytest.raises(TypeError, match="env"):
        miniplug.attach(owner.reattach_config(), env={})


# -- a host goes, and another comes

@pytest.mark.parametrize("end", ["time.sleep(600)", "", "os._exit(3)", "plugin.detach()"])
def test_a_host_is_replaced_while_its_plugin_runs(write, end):
    """Also one that was killed: then neither the guardian nor the plugin itself ends the plugin."""
    with host(write, f"shop.echo.notify(1)\n{end}") as (first, config):
        if "sleep" in end:
            first.kill()
        assert first.wait(20) in (-9, 0, 1, 3)
    with miniplug.attach(config) as plugin:
        assert plugin.dispense().pid() == config["pid"]
        with miniplug.attach(config) as other:
            assert other.dispense().greet("two") == "Hello, two!"
    with pytest.raises(miniplug.PluginClosed):
        plugin.ping()
    with miniplug.attach(config) as plugin:
        plugin.kill()
        until(lambda: gone(config))
        assert not plugin.running


def test_a_plugin_that_persists_by_itself_needs_no_option_of_the_host(write):
    path = write("plugin.py", """
        import miniplug, workshop
        miniplug.serve({"shop": workshop.Workshop()}, persist=True)
    """)
    with host(write, "time.sleep(600)", path, f"env={{'PYTHONPATH': {HERE!r}}}") as (first, config):
        first.kill()
        first.wait()
    with miniplug.attach(config) as plugin:
        assert plugin.dispense().greet("you") == "Hello, you!"
        plugin.kill()
    until(lambda: gone(config))


@posix
def test_no_guardian_waits_for_its_hosts_end(owner):
    """It would kill the plugin some seconds after that."""
    assert miniplug._guardian._process is None
    with miniplug.launch(WORKSHOP) as plugin:
        guardian = miniplug._guardian._process.pid
        assert alive(guardian) and [*miniplug._guardian._told] == [f"-{plugin.pid}"]
    assert not alive(guardian)


@posix
@pytest.mark.parametrize("end", ["kill", "detach"])
def test_output_goes_nowhere_once_the_host_is_gone(write, tmp_path, end):
    """No write fails then, neither in the plugin nor in a child that it starts."""
    path = write("noisy.py", """
        import logging, os, subprocess, sys

        class Noisy:
            def talk(self):
                for _ in range(1000):
                    print("out" * 1000)
                    os.write(2, b"err" * 1000)
                    logging.warning("log")
                return subprocess.call([sys.executable, "-c", "print('x' * 1000000)"])
    """)
    with host(write, "time.sleep(600)" if end == "kill" else "plugin.detach()", path + ":Noisy",
              "persist=True, stdout='discard', stderr='discard'") as (first, config):
        with miniplug.attach(config) as plugin:
            assert plugin.dispense().talk() == 0  # while it is there
        if end == "kill":
            first.kill()
        first.wait(20)
    with miniplug.attach(config) as plugin:
        noisy = plugin.dispense()
        until(lambda: nowhere(config["pid"]))
        assert noisy.talk() == 0
        plugin.kill()
    until(lambda: gone(config))


def nowhere(pid):
    """Whether what the process writes goes nowhere, as far as can be seen."""
    try:
        return os.readlink(f"/proc/{pid}/fd/1") == os.readlink(f"/proc/{pid}/fd/2") == os.devnull
    except FileNotFoundError:
        time.sleep(1)  # there is no /proc
        return True


# -- the end of a plugin that stays

@pytest.mark.parametrize("end", ["close", "kill", "crash", "attached kill"])
def test_its_launcher_ends_it_as_any_other_and_no_file_is_left(end):
    plugin = miniplug.launch(WORKSHOP, persist=True)
    config = plugin.reattach_config()
    assert not gone(config)
    shop = plugin.dispense()
    if end == "crash":
        with pytest.raises(miniplug.PluginCrashed) as caught:
            shop.hard_exit(3)
        assert caught.value.exit_code == 3
    elif end == "attached kill":
        with miniplug.attach(plugin.reattach_config()) as other:
            other.kill()
        assert plugin.wait(10) == 0
    else:
        getattr(plugin, end)()
        assert plugin.exit_code is not None
    assert not plugin.running and gone(config)
    plugin.start()
    assert shop.greet("you") == "Hello, you!"
    plugin.close()


def test_attached_hosts_see_its_end():
    with miniplug.launch(WORKSHOP, persist=True) as owner, miniplug.attach(owner.reattach_config()) as plugin:
        shop = plugin.dispense()
        call = shop.enter_and_wait.submit()
        shop.await_entered()
        owner.kill()
        with pytest.raises(miniplug.PluginCrashed) as caught:
            call.result(10)
        assert caught.value.calls == ["enter_and_wait"] and not plugin.running
        with pytest.raises(miniplug.PluginCrashed):
            shop.greet("you")


def test_an_idle_host_sees_the_end_too(owner):
    with miniplug.attach(owner.reattach_config()) as plugin:
        owner.close()
        until(lambda: not plugin.running, 1.0)
        assert plugin.wait(0) is None


def test_the_process_that_was_detached_from_is_no_zombie_in_the_end(owner):
    config, pid = owner.reattach_config(), owner.pid
    shop = owner.dispense()
    owner.detach()
    owner.detach()
    assert not owner.running and owner.pid is None and not gone(config)
    with pytest.raises(miniplug.PluginClosed):
        shop.greet("you")
    owner.start()
    assert owner.pid != pid and shop.greet("you") == "Hello, you!"  # another one
    with miniplug.attach(config) as plugin:
        plugin.kill()
    until(lambda: gone(config))  # and nothing_left finds no zombie


@posix
def test_terminated_it_removes_its_folder(owner):
    config = owner.reattach_config()
    owner.detach()
    os.kill(config["pid"], signal.SIGTERM)
    until(lambda: gone(config))


def test_close_of_a_plugin_that_was_killed_meanwhile(owner):
    with miniplug.attach(owner.reattach_config()) as one, miniplug.attach(owner.reattach_config()) as two:
        one.kill()
        two.kill()
        one.kill()
    until(lambda: not owner.running)


# -- supervision

def test_what_takes_its_place_stays_and_what_is_replaced_does_not(owner):
    shop, old = owner.dispense(), owner.reattach_config()
    owner.restart()
    until(lambda: gone(old))
    config = owner.reattach_config()
    with pytest.raises(miniplug.PluginCrashed):
        shop.hard_exit(3)
    owner.start()
    assert gone(config) and not gone(owner.reattach_config()) and shop.greet("you") == "Hello, you!"


def test_an_attached_host_cannot_restart_what_another_has_launched(owner):
    with miniplug.attach(owner.reattach_config()) as plugin:
        with pytest.raises(miniplug.PluginError, match="belongs to another host"):
            plugin.restart()
        assert plugin.dispense().greet("you") == "Hello, you!"


def test_a_heartbeat_that_fails_gives_the_connection_up_and_not_the_process(owner):
    beat = 2.0 if WINDOWS else 0.2  # Wine is slow
    with miniplug.attach(owner.reattach_config(), heartbeat=beat) as plugin:
        shop = plugin.dispense()
        freeze(owner.pid)
        try:
            with pytest.raises(miniplug.PluginCrashed, match=f"answered no ping for {beat:g} s"):
                shop.greet("you")
        finally:
            freeze(owner.pid, False)
        assert owner.dispense().greet("you") == "Hello, you!"
        plugin.start()
        assert shop.greet("again") == "Hello, again!"


def test_an_on_start_that_fails_lets_go_of_what_was_attached_to(owner, monkeypatch):
    monkeypatch.setenv("MINIPLUG_ATTACH", json.dumps({"shop": owner.reattach_config()}))
    seen = []

    def on_start(plugin):
        seen.append(plugin.dispense().pid())
        raise LookupError("not today")

    with pytest.raises(LookupError):
        miniplug.launch(WORKSHOP, name="shop", on_start=on_start)
    assert seen == [owner.pid] and owner.dispense().greet("you") == "Hello, you!"


# -- nobody is harmed


def test_a_wrong_pid_harms_nobody(owner):
    """Neither while the plugin hears nor while it does not."""
    innocent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        config = {**owner.reattach_config(), "pid": innocent.pid}
        plugin = miniplug.attach(config)
        freeze(owner.pid)
        plugin.kill()
        assert not plugin.running and alive(owner.pid) and innocent.poll() is None
        freeze(owner.pid, False)
        assert owner.wait(10) == 0  # now it has heard
        for stale in (config, {**config, "network": "tcp", "address": "127.0.0.1:9"})[: 2 - WINDOWS]:
            with pytest.raises(miniplug.LaunchError, match="did not start"):
                miniplug.attach(stale)
        assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


# -- what is stale or wrong

@pytest.mark.parametrize("wrong", [
    None, 7, "x", [], {}, {"address": "/x"}, {"pid": "7"}, {"pid": True}, {"network": "carrier pigeon"}, {"network": "tcp"},
    {"authkey": "xyz"}, {"authkey": "00"}, {"authkey": 7}, {"network": "tcp", "address": "example.org:80"},
    {"network": "tcp", "address": "127.0.0.1:x"}, {"network": "tcp", "address": "127.0.0.1:70000"},
    {"network": "tcp", "address": "127.evil.org:80"}, {"network": "unix", "address": "/no/such/\0folder"},
    {"network": "unix", "address": "/no/such/folder"}, {"network": "unix", "address": "/" + "x" * 200},
    {"network": "pipe", "address": "\\\\.\\pipe\\none"}], ids=lambda wrong: str(wrong)[:40])
def test_a_config_that_is_none_is_a_launch_error(wrong):
    good = {"network": "unix", "address": "/no/such/folder", "authkey": "0" * 64, "pid": 1, "protocol_version": 1}
    with pytest.raises(miniplug.LaunchError, match="the plugin 'attached' did not start"):
        miniplug.attach({**good, **wrong} if isinstance(wrong, dict) and wrong else wrong)


@pytest.mark.parametrize("wrong", [{"pid": "7"}, {"address": None}, {"network": "x"}, {"authkey": ["5ec2e7"]}])
def test_what_is_wrong_with_a_config_is_told_and_the_key_is_not(wrong):
    good = {"authkey": "5ec2e7" * 8, "network": "unix", "address": "/no/such/folder", "pid": 1, "protocol_version": 1}
    with pytest.raises(miniplug.LaunchError) as caught:
        miniplug.attach({**good, **wrong})
    nobody = "is no address" if WINDOWS else "/no/such/folder: [Errno 2] No such file or directory"
    words = nobody if "network" in wrong else "it takes a dict with network, address, "
    assert words in str(caught.value)
    assert "5ec2e7" not in str(caught.value)


@posix
def test_a_place_that_cannot_be_reached_is_not_called_empty(tmp_path):
    """There may well be a plugin."""
    config = {"network": "unix", "address": f"/tmp/{'x' * 200}/s", "authkey": "0" * 64, "pid": 1, "protocol_version": 1}
    with pytest.raises(miniplug.LaunchError, match="AF_UNIX path too long"):
        miniplug.attach(config)
    with pytest.raises(miniplug.LaunchError, match="No such file or directory"):
        miniplug.attach({**config, "address": str(tmp_path / "s")})


def test_another_key_is_an_authentication_error(owner):
    config = owner.reattach_config()
    with pytest.raises(miniplug.AuthenticationError, match="does not hold the key"):
        miniplug.attach({**config, "authkey": "0" * 64})
    with miniplug.attach(config) as plugin:
        assert plugin.dispense().greet("you") == "Hello, you!"


def test_another_version_is_a_handshake_error(write):
    path = write("old.py", "import miniplug\nminiplug.serve({1: {'x': object()}, 3: {'x': object()}}, persist=True)\n")
    with miniplug.launch(path, protocol_versions=[1, 2, 3]) as owner:
        config = owner.reattach_config()
        assert config["protocol_version"] == 3
        with miniplug.attach(config, protocol_versions=[1, 2]) as plugin:
            assert plugin.protocol_version == plugin.reattach_config()["protocol_version"] == 1
        with pytest.raises(miniplug.HandshakeError, match="no common protocol version") as caught:
            miniplug.attach(config, handshake=miniplug.Handshake(protocol_version=2))
        assert caught.value.plugin["protocol_versions"] == [1, 3]


@posix
@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 200 OK\r\n\r\n", b"\0\0\0\2{}"])
def test_what_listens_there_now_is_something_else(says):
    with socket.create_server(("127.0.0.1", 0)) as server:
        def answer():
            sock, _ = server.accept()
            with sock:
                sock.sendall(says)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(4096):
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        config = {"network": "tcp", "address": f"127.0.0.1:{server.getsockname()[1]}", "authkey": "0" * 64, "pid": 1,
                  "protocol_version": 1}
        with pytest.raises(miniplug.HandshakeError, match="is no plugin"):
            miniplug.attach(config)
        thread.join(10)


@posix
def test_strangers_at_its_door_hold_up_nobody(owner):
    config = owner.reattach_config()
    strangers = []
    try:
        for number in range(80):
            strangers.append(socket.socket(socket.AF_UNIX))
            strangers[-1].connect(config["address"])
            if number % 2:
                strangers[-1].sendall(b"\xff" * 100)
        start = time.monotonic()
        with miniplug.attach(config) as plugin:
            assert plugin.dispense().greet("you") == "Hello, you!"
        assert time.monotonic() - start < PROMPT
    finally:
        for stranger in strangers:
            stranger.close()


def test_a_host_that_breaks_the_protocol_costs_its_connection_alone(owner):
    config = owner.reattach_config()
    channel = miniplug._connect(config["address"], 5.0)
    hello = miniplug._Hello(channel, config["address"], bytes.fromhex(config["authkey"]), "host")
    assert hello.as_host([1], 1 << 20).features == ["arrays", "persist"]
    channel.write(channel.frame(b"nonsense"))
    with pytest.raises((EOFError, ConnectionError)):
        channel.receive(time.monotonic() + 10).popleft()
    channel.close()
    assert owner.dispense().greet("you") == "Hello, you!"


@posix
def test_in_a_forked_child_an_attached_plugin_is_not_there(owner):
    with miniplug.attach(owner.reattach_config()) as plugin:
        shop = plugin.dispense()
        pid = os.fork()
        if not pid:
            status = 1
            with contextlib.suppress(BaseException):
                plugin.kill()
                plugin.close()
                try:
                    shop.greet("child")
                except miniplug.PluginError as error:
                    status = 0 if "forked" in str(error) else 2
            os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert shop.greet("you") == "Hello, you!"


# -- MINIPLUG_ATTACH

def test_the_environment_makes_launch_attach(owner, monkeypatch):
    monkeypatch.setenv("MINIPLUG_ATTACH", json.dumps({name: owner.reattach_config() for name in ("shop", "local")}))
    with miniplug.launch(["/no/such/program"], name="shop") as plugin:
        assert plugin.pid == owner.pid and plugin.dispense().env().get("MINIPLUG_ATTACH") is None
    assert owner.dispense().greet("you") == "Hello, you!"
    with miniplug.launch(WORKSHOP, name="other") as plugin:
        assert plugin.pid != owner.pid
    with miniplug.local({"x": object()}) as plugin:
        assert plugin.pid == os.getpid()


@pytest.mark.parametrize("text", ["{", "[]", '"shop"', '{"shop": {}}', '{"shop": null}', "[" * 20000], ids=range(6))
def test_an_environment_that_makes_no_sense_is_a_launch_error(text, monkeypatch):
    monkeypatch.setenv("MINIPLUG_ATTACH", text)
    with pytest.raises(miniplug.LaunchError, match=r"MINIPLUG_ATTACH is not \{NAME: config\} as JSON"):
        miniplug.launch(WORKSHOP, name="shop")


# -- by hand

def by_hand(*options):
    return process(miniplug.__file__, "serve", WORKSHOP, *options, stderr=subprocess.PIPE)


@posix  # nobody can be sent a Ctrl-C under Wine
@pytest.mark.parametrize("listen", ["path", "127.0.0.1:0", None])
def test_serve_by_hand_prints_what_attach_needs(tmp_path, listen):
    key = tmp_path / "key"
    key.write_text("0123456789abcdef" * 4 + "\n")
    address = os.path.relpath(str(tmp_path / "s")) if listen == "path" else listen
    options = ["--persist", "--authkey-file", str(key), *(["--listen", address] if address else [])]
    with by_hand(*options) as (plugin, config):
        assert config["pid"] == plugin.pid and config["authkey"] == "0123456789abcdef" * 4
        if listen == "path":
            assert config["network"] == "unix" and config["address"] == str(tmp_path / "s")
            assert os.stat(config["address"]).st_mode & 0o777 == 0o600
        for name in ("one", "two"):
            with miniplug.attach(config) as host:
                assert host.dispense("workshop").greet(name) == f"Hello, {name}!"
        plugin.send_signal(signal.SIGINT)
        assert plugin.wait(10) == 0
        assert plugin.stderr.read() == "" and plugin.stdout.read() == ""
        assert listen or gone(config)
        assert not os.path.exists(str(tmp_path / "s"))


def test_without_persist_it_ends_with_its_last_host():
    with by_hand("--listen", "") as (plugin, config):
        with miniplug.attach(config) as one:
            with miniplug.attach(config) as two:
                assert two.dispense().greet("you") == "Hello, you!"
            assert one.dispense().greet("you") == "Hello, you!"
        assert plugin.wait(10) == 0 and plugin.stderr.read() == ""


def test_a_script_by_hand_serves_those_who_attach(write, tmp_path):
    """Code after serve() runs at the end, and a host need not know the cookie, as it has not started the program."""
    address = rf"\\.\pipe\miniplug-test-{os.getpid()}" if WINDOWS else str(tmp_path / "s")
    path = write("script.py", f"""
        import miniplug, workshop
        key = b"sixteen bytes !!"
        miniplug.serve({{"shop": workshop.Workshop()}}, address={address!r}, authkey=key, persist=True,
                       handshake=miniplug.Handshake(2, "COOKIE", "yes"))
        print("after")
        try:
            miniplug.serve({{"shop": 1}}, persist=True)
        except RuntimeError as error:
            print(error)
    """)
    with process(path) as (plugin, config):
        assert config["authkey"] == b"sixteen bytes !!".hex() and config["protocol_version"] == 2
        assert config["address"] == address
        with miniplug.attach(config, handshake=miniplug.Handshake(2)) as host:
            host.dispense()
            host.kill()
        assert plugin.stdout.read() == "after\nthis process has served its host already: serve() works once\n"
        assert plugin.wait(10) == 0


@posix
def test_it_takes_the_place_of_one_that_was_killed(tmp_path):
    (tmp_path / "miniplug-x").mkdir()  # the folder is not its own
    address = str(tmp_path / "miniplug-x" / "s")
    with by_hand("--listen", address, "--persist") as (first, _):
        with pytest.raises(json.JSONDecodeError), by_hand("--listen", address) as (second, _):
            pass
        first.kill()
        first.wait()
        assert os.path.exists(address)
        with by_hand("--listen", address, "--persist") as (second, config), miniplug.attach(config) as host:
            host.kill()
            assert second.wait(10) == 0


@pytest.mark.parametrize("options, said", [
    (["--listen", "0.0.0.0:0"], "is no address"), (["--listen", "plugin.sock"], "is no address"),
    (["--listen", "/no/such/folder/s"], "No such file or directory: '/no/such/folder/s'"),
    (["--listen", "/" + "x" * 200], "xxx"), (["--listen", "127.0.0.1:70000"], "is no address"),
    (["--persist", "--authkey-file", "/no/such/file"], "No such file"),
    (["--persist", "--authkey-file", __file__], "authkey: it is at least 16 bytes")])
def test_bad_options_are_one_line(options, said):
    from conftest import run_python

    status, out, err = run_python(miniplug.__file__, "serve", WORKSHOP, *options)
    assert (status, out) == (1, "") and err.startswith("miniplug: ") and err.count("\n") == 1
    assert said in err or WINDOWS


@posix
def test_by_hand_it_listens_where_it_can(monkeypatch):
    """Where the temporary folder will not do."""
    monkeypatch.setenv("TMPDIR", "/proc")
    with by_hand("--persist") as (plugin, config):
        assert not config["address"].startswith("/proc")
        plugin.terminate()
        plugin.wait(20)
        assert not os.path.exists(os.path.dirname(config["address"]))


@posix
def test_what_is_no_socket_is_not_replaced(tmp_path):
    (tmp_path / "s").write_text("precious")
    with pytest.raises(OSError):
        miniplug._Listener(str(tmp_path / "s"))
    assert (tmp_path / "s").read_text() == "precious"


@pytest.mark.parametrize("key", [b"short", "00" * 15, "xyz"])
def test_a_short_key_is_refused(key):
    with pytest.raises(ValueError):
        miniplug._checked_key(key)
