"""The host's end, however it comes, ends its plugins and what they started."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import HERE, WINDOWS, WORKSHOP, alive, freeze, run_python, until, writer

import miniplug

guarded = pytest.mark.skipif(WINDOWS, reason="on Windows the job does what a guardian does elsewhere")
terminal = pytest.mark.skipif(WINDOWS, reason="there are no such terminals on Windows")

HOST = """
import sys, threading, time
import miniplug

plugin = miniplug.launch({spec!r})
shop = plugin.dispense()
child = shop.spawn()
busy = {busy!r}
if busy:
    threading.Thread(target=getattr(shop, busy), daemon=True).start()
    if busy == "enter_and_wait":
        shop.await_entered()
print(plugin.pid, child, flush=True)
sys.stdin.readline()
{end}
"""


def run_host(write, end, busy=""):
    """Start a host in a process of its own. Returns it, and the pids of its plugin and of the plugin's child."""
    path = write("host.py", HOST.format(spec=WORKSHOP, busy=busy, end=end))
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([os.path.dirname(HERE), HERE]))
    host = subprocess.Popen([sys.executable, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, universal_newlines=True)
    pids = [int(pid) for pid in host.stdout.readline().split()]
    assert len(pids) == 2 and all(map(alive, pids))
    host.stdin.close()  # it goes on
    return host, pids


@pytest.mark.parametrize("end, status", [("", 0), ("raise SystemExit(3)", 3), ("raise ValueError('x')", 1),
                                         ("import os; os._exit(4)", 4)])
def test_returned_raised_exited(write, end, status, capfd):
    host, pids = run_host(write, end)
    assert host.wait(20) == status
    host.stdout.close()
    until(lambda: not any(map(alive, pids)), 5)


def start_stuck(write, folder):
    """A host whose plugin has not connected yet, and never will. Returns it, the plugin's pid and the door's folder."""
    plugin = write("plugin.py", f"""
        import os, time
        with open({str(folder / 'started')!r} + "x", "w") as file:
            file.write(f"{{os.getpid()}} {{os.environ.get('MINIPLUG_ADDRESS')}}")
        os.rename({str(folder / 'started')!r} + "x", {str(folder / 'started')!r})
        time.sleep(600)
    """)
    path = write("host.py", f"import miniplug, sys\nminiplug.launch([sys.executable, {plugin!r}])\n")
    host = subprocess.Popen([sys.executable, path], env=dict(os.environ, PYTHONPATH=os.path.dirname(HERE)))
    until((folder / "started").exists)
    pid, address = (folder / "started").read_text().split()
    assert WINDOWS or os.path.exists(address)
    return host, [int(pid)], "" if WINDOWS else os.path.dirname(address)


def start_foreign(write, folder):
    """A host of a plugin that knows nothing of the connection's end: a shell script that has handed it to nobody."""
    path = write("plugin.sh", f"""\
        #!/bin/sh
        echo $$ > {folder / 'x'} && mv {folder / 'x'} {folder / 'pid'}
        sleep 600
    """)
    os.chmod(path, 0o755)
    host_path = write("host.py", f"import miniplug\nminiplug.launch({path!r})\n")
    host = subprocess.Popen([sys.executable, host_path], env=dict(os.environ, PYTHONPATH=os.path.dirname(HERE)))
    until((folder / "pid").exists)
    return host, [int((folder / "pid").read_text())], ""


BUSY = ["", "enter_and_wait", "spin", "stick"]
SITUATIONS = [*BUSY, "stopped", "starting"] + ["foreign"] * (not WINDOWS)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Hosts in all situations, killed at one moment, as their plugins may take seconds to end: {situation: (when, pids of the
    plugin and of its child, the door's folder)}."""
    hosts = {}
    for situation in SITUATIONS:
        folder = tmp_path_factory.mktemp("killed")
        if situation == "starting":
            hosts[situation] = start_stuck(writer(folder), folder)
        elif situation == "foreign":
            hosts[situation] = start_foreign(writer(folder), folder)
        else:
            hosts[situation] = (*run_host(writer(folder), "time.sleep(600)", situation if situation in BUSY else ""), "")
        if situation == "stopped":
            freeze(hosts[situation][1][0])
    assert all(alive(pid) for _, pids, _ in hosts.values() for pid in pids)
    for host, _, _ in hosts.values():
        host.kill()
    when = time.monotonic()
    for host, _, _ in hosts.values():
        host.wait()
        if host.stdout is not None:
            host.stdout.close()
    return {situation: (when, pids, folder) for situation, (_, pids, folder) in hosts.items()}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_killed(killed, situation):
    """Also while the plugin is busy in a method, in a loop, stuck in C code with the GIL held, stopped, or not connected."""
    when, pids, folder = killed[situation]
    until(lambda: not any(map(alive, pids)), max(0.1, when + 5 - time.monotonic()))
    until(lambda: not os.path.exists(folder), max(0.1, when + 5 - time.monotonic()))


@guarded
def test_killed_before_there_is_a_plugin(write):
    """Nobody but the guardian can know of the door's folder then."""
    path = write("host.py", f"""
        import miniplug, os, signal

        def spawn(run, argv, above, listener, key):
            print(listener.folder, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

        miniplug._Run._spawn = spawn
        miniplug.launch({WORKSHOP!r})
    """)
    status, folder, _ = run_python(path)
    assert status == -signal.SIGKILL and folder.strip()
    until(lambda: not os.path.exists(folder.strip()), 5)


@guarded
def test_there_is_one_guardian_and_it_goes_with_the_last_plugin():
    plugins = [miniplug.launch(WORKSHOP) for _ in range(3)]
    guardian = miniplug._guardian._process.pid
    assert alive(guardian) and miniplug._guardian._told == {f"-{plugin.pid}" for plugin in plugins}
    for plugin in plugins:
        assert alive(guardian)
        plugin.close()
    assert not alive(guardian)


class Told:
    """A guardian's script, run by hand with a /proc of our making: a number cannot be made to come again at will."""

    def __init__(self, folder, rounds=5):
        self.proc = folder / "proc"
        self.proc.mkdir()
        script = miniplug._GUARDIAN.replace("/proc/self", str(self.proc))
        script = script.replace("/proc/${target#-}/stat", f"{self.proc}/${{target#-}}")
        assert script.count(str(self.proc)) == 2
        self.process = subprocess.Popen(["/bin/sh", "-c", script, "guardian", str(rounds)], stdin=subprocess.PIPE)

    def say(self, line):
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def started(self, pid, when):
        part = self.proc / f"{pid}.part"
        part.write_text(f"{pid} (a b) c) S " + "0 " * 18 + f"{when} 0\n")
        part.rename(self.proc / str(pid))

    def end(self):
        self.process.stdin.close()
        assert self.process.wait(10) == 0


@guarded
def test_a_guardian_kills_whom_it_was_told_of(tmp_path):
    told = Told(tmp_path)
    sleepers = [subprocess.Popen(["sleep", "600"], start_new_session=True) for _ in range(3)]
    for sleeper, sign in zip(sleepers, (b"-", b"", b"-")):
        told.started(sleeper.pid, 111)
        told.say(b"%s%d\n" % (sign, sleeper.pid))
    told.say(b"!-%d\n" % sleepers[2].pid)
    told.end()
    assert [sleeper.wait(10) for sleeper in sleepers[:2]] == [-9, -9] and sleepers[2].poll() is None
    sleepers[2].kill()
    sleepers[2].wait()


@guarded
def test_a_guardian_kills_nobody_who_has_the_number_now(tmp_path):
    """It is told of a process, which ends; then another one is said to have its number. Only the first may be killed."""
    bystander = subprocess.Popen(["sleep", "600"], start_new_session=True)
    fence = subprocess.Popen(["sleep", "600"], start_new_session=True)
    told = Told(tmp_path)
    for each in (bystander, fence):
        told.started(each.pid, 111)
        told.say(b"-%d\n" % each.pid)
    told.say(b"!-%d\n" % fence.pid)
    os.mkfifo(str(told.proc / "1"))  # once this has a reader, what was said before has been heard
    told.say(b"-1\n")
    with open(str(told.proc / "1"), "w"):
        pass
    told.started(bystander.pid, 222)
    told.end()
    for each in (bystander, fence):
        assert each.poll() is None
        each.kill()
        each.wait()


@guarded
def test_a_guardian_that_somebody_has_ended_is_replaced(write):
    """With SIGPIPE at its default, too, as command-line programs often have it. The new one knows of all."""
    path = write("host.py", f"""
        import miniplug, os, signal, sys
        sys.path.append({HERE!r})
        from conftest import freeze

        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        plugins = [miniplug.launch({WORKSHOP!r})]
        guardian = miniplug._guardian._process
        os.kill(guardian.pid, signal.SIGKILL)
        os.waitid(os.P_PID, guardian.pid, os.WEXITED | os.WNOWAIT)
        plugins.append(miniplug.launch({WORKSHOP!r}))
        plugins.pop(0).close()
        plugins.append(miniplug.launch({WORKSHOP!r}))
        assert miniplug._guardian._process.pid != guardian.pid and guardian.returncode == -9
        for plugin in plugins:
            freeze(plugin.pid)  # only a guardian can end them
        print(*[plugin.pid for plugin in plugins], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    status, out, err = run_python(path)
    assert status == -signal.SIGKILL, err
    pids = [int(pid) for pid in out.split()]
    assert len(pids) == 2
    until(lambda: not any(map(alive, pids)), 5)


@guarded
def test_nobody_waits_for_a_guardian_that_somebody_has_stopped():
    """Though what it is told fills its pipe."""
    with miniplug.launch(WORKSHOP) as plugin:
        freeze(miniplug._guardian._process.pid)
        for _ in range(100):
            miniplug._guardian.tell("!" + "1" * 10000)
        assert plugin.dispense().greet("x") == "Hello, x!"
    assert miniplug._guardian._process is None


@pytest.mark.skipif(WINDOWS or not os.path.isdir("/proc/self/fdinfo"), reason="only /proc tells of it")
def test_the_guardian_of_a_host_with_a_default_timeout_waits_for_it():
    """What does not block for the host may not do so for who inherits it either: the guardian would take that for the
    host's end."""
    import socket

    socket.setdefaulttimeout(0.01)
    try:
        with miniplug.launch(WORKSHOP):
            with open(f"/proc/{miniplug._guardian._process.pid}/fdinfo/0") as info:
                flags = int(re.findall(r"flags:\s*(\d+)", info.read())[0], 8)
            assert not flags & os.O_NONBLOCK
    finally:
        socket.setdefaulttimeout(None)


@guarded
def test_nobody_learns_the_name_of_a_folder_before_it_is_there(monkeypatch):
    """The arguments of a process can be read by every user: a name that is known beforehand can be taken."""
    told, made, mkdir, popen = [], [], os.mkdir, miniplug._popen

    def making(path, *others):
        assert not any(os.path.basename(path) in text for text in told)
        mkdir(path, *others)
        made.append(path)

    def starting(argv, **options):
        told.extend([*map(str, argv), *map(str, options["env"].values())])
        return popen(argv, **options)

    monkeypatch.setattr(miniplug.os, "mkdir", making)
    monkeypatch.setattr(miniplug, "_popen", starting)
    plugins = [miniplug.launch(WORKSHOP) for _ in range(3)]
    assert len({os.path.basename(path) for path in made}) == 3 and any("miniplug-guardian" in text for text in told)
    for plugin in plugins:
        plugin.close()


@guarded
def test_a_guardian_removes_only_what_was_made(tmp_path):
    """Not what has the name of a folder that is gone, nor what a link leads to."""
    for name in ("made", "gone", "a b", "miniplug-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "s").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "s").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    told = Told(tmp_path)
    for name in ("made", "gone", "a b", "link"):
        told.say(os.fsencode(f"{tmp_path / name}\n"))
    told.say(os.fsencode(f"!{tmp_path / 'gone'}\n"))
    told.end()
    assert sorted(os.listdir(str(tmp_path))) == ["gone", "link", "miniplug-0", "other", "proc"]
    assert all((tmp_path / name / "s").exists() for name in ("gone", "other", "miniplug-0"))


@guarded
def test_the_guardian_of_a_host_that_is_a_plugin_waits_less(write):
    """So that what a stuck plugin has launched ends in time, too: each guardian begins when its own host is gone."""
    path = write("host.py", f"""
        import miniplug, os, signal, sys
        sys.path.append({HERE!r})
        from conftest import freeze
        outer = miniplug.launch({write("outer.py", OUTER.format(spec=WORKSHOP))!r} + ":Outer")
        inner = outer.dispense().launch()
        print(outer.pid, inner, flush=True)
        freeze(inner)
        freeze(outer.pid)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    status, out, _ = run_python(path)
    assert status == -signal.SIGKILL
    pids = [int(pid) for pid in out.split()]
    until(lambda: not any(map(alive, pids)), 5)


OUTER = """
    import miniplug
    class Outer:
        def launch(self):
            self.plugin = miniplug.launch({spec!r})
            return self.plugin.pid
"""


def on_a_terminal(path, *steps, arguments=()):
    """Run a script as the foreground group of a pty; when it has said the first of a step (a pattern), type the second.
    Returns its wait status and all that it said."""
    import pty

    pid, terminal = pty.fork()
    if not pid:
        os.environ["PYTHONPATH"] = os.path.dirname(HERE)
        os.execv(sys.executable, [sys.executable, path, *arguments])
    said, left = b"", list(steps)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            data = os.read(terminal, 1000)
        except OSError:
            break
        if not data:
            break
        said += data
        while left and re.search(left[0][0], said):
            os.write(terminal, re.search(left[0][0], said).expand(left.pop(0)[1]))
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return status, said


@terminal
def test_ctrl_c_goes_to_the_host_alone(write):
    """A real terminal: the host is the foreground group of a pty, on which Ctrl-C is typed."""
    path = write("host.py", f"""
        import miniplug, time
        plugin = miniplug.launch({WORKSHOP!r}, stderr="inherit")
        shop = plugin.dispense()
        try:
            print("ready", flush=True)
            shop.enter_and_wait()
        except KeyboardInterrupt:
            print("interrupted; the plugin says", shop.greet("you"), flush=True)
        plugin.close()
        print("exit code", plugin.exit_code, flush=True)
    """)
    status, said = on_a_terminal(path, (b"ready", b"\x03"))
    assert status == 0, said
    assert b"interrupted; the plugin says Hello, you!" in said and b"exit code 0" in said
    assert b"Traceback" not in said


@terminal
def test_ctrl_c_with_a_plugin_that_shares_the_terminal(write):
    """stdin="inherit": it can ask on the terminal, and Ctrl-C there is still the host's alone."""
    plugin = write("asker.py", """
        import os
        class Asker:
            def ask(self, prompt):
                print(prompt, end="", flush=True)
                return input()
            def group(self): return os.getpgrp()
            def wait(self):
                import threading
                print("waiting", flush=True)
                threading.Event().wait(30)
    """)
    path = write("host.py", f"""
        import miniplug, os
        plugin = miniplug.launch({plugin + ":Asker"!r}, stdin="inherit", stdout="inherit", stderr="inherit")
        asker = plugin.dispense()
        print("answer", asker.ask("password? "), asker.group() == os.getpgrp(), flush=True)
        try:
            asker.wait()
        except KeyboardInterrupt:
            print("interrupted", asker.group() == os.getpgrp(), flush=True)
        plugin.close()
        print("exit code", plugin.exit_code, flush=True)
    """)
    status, said = on_a_terminal(path, (rb"password\?", b"secret\n"), (b"waiting", b"\x03"))
    assert status == 0, said
    assert b"answer secret True" in said and b"interrupted True" in said and b"exit code 0" in said, said


@terminal
def test_a_plugin_asks_for_a_password_on_the_terminal(write):
    """getpass opens the terminal itself: the plugin's output goes to the host's log as ever, and nothing is echoed."""
    plugin = write("asker.py", """
        import getpass
        class Asker:
            def ask(self): return getpass.getpass("password? ")[::-1]
    """)
    path = write("host.py", f"""
        import miniplug
        with miniplug.launch({plugin + ":Asker"!r}, stdin="inherit") as plugin:
            print("backwards", plugin.dispense().ask(), flush=True)
    """)
    status, said = on_a_terminal(path, (rb"password\? ", b"drowssap\n"))
    assert status == 0 and b"backwards password" in said and b"drowssap" not in said, said


@guarded
def test_a_host_without_a_shell(monkeypatch):
    """A machine that has no /bin/sh has no guardian, and plugins run all the same."""
    import subprocess as real

    class NoShell(real.Popen):
        def __init__(self, args, *others, **options):
            if args[0].endswith("/sh"):
                raise FileNotFoundError(args[0])
            super().__init__(args, *others, **options)

    monkeypatch.setattr(real, "Popen", NoShell)
    with miniplug.launch(WORKSHOP) as plugin:
        assert plugin.dispense().greet("x") == "Hello, x!"
