"""What is Windows' own: its system calls, over a fake of them that runs anywhere; and on a Windows Python the real ones."""

import ctypes
import gc
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import venv

import pytest
from conftest import HERE, WINDOWS, WORKSHOP, alive, channels, until

import miniplug

windows = pytest.mark.skipif(not WINDOWS, reason="needs Windows, or Wine")


# -- the job's system calls, faked

JOB, PROCESS = 0x7FFF00000010, 0x7FFF00000020  # handles that an int of 32 bits cannot hold


class Function:
    """A function of a library, called as ctypes would: an int, given or returned, is cut to 32 bits."""

    restype = ctypes.c_int

    def __init__(self, name, said, results):
        self.name, self.said, self.results = name, said, results

    def __call__(self, *args):
        values = [getattr(each, "value", each) for each in args]
        for given, value in zip(args, values):
            whole = not isinstance(given, int) or ctypes.c_int(given).value == given
            assert whole, f"{self.name} loses a part of {value:#x}"
        self.said.append((self.name, *values))
        return self.restype(self.results.get(self.name, 1)).value


class Process:
    """What _popen returns."""

    pid, stdout, stderr, _handle = 7, None, None, PROCESS

    def __init__(self, said):
        self.said = said

    def wait(self):
        return 3

    def kill(self):
        self.said.append(("kill",))


@pytest.fixture
def system(monkeypatch):
    """(what was called, what the functions return: 1 by default)."""
    said, results = [], {"CreateJobObjectW": JOB, "NtResumeProcess": 0}

    class Library:
        def __init__(self, name):
            assert name in ("kernel32", "ntdll")

        def __getattr__(self, name):
            function = Function(name, said, results)
            setattr(self, name, function)
            return function

    def popen(argv, creationflags, **options):
        said.append(("popen", argv, creationflags, options))
        if "error" in results:
            raise results["error"]
        return Process(said)

    monkeypatch.setattr(ctypes, "WinDLL", Library, raising=False)
    monkeypatch.setattr(miniplug, "_popen", popen)
    return said, results


def names(said):
    return [each[0] for each in said]


def test_a_process_is_in_the_job_before_it_runs(system):
    said, _ = system
    tree = miniplug._WindowsProcess(["prog"], None, False, cwd="C:\\")
    assert names(said) == ["popen", "CreateJobObjectW", "SetInformationJobObject", "AssignProcessToJobObject", "NtResumeProcess"]
    assert said[0] == ("popen", ["prog"], 0x08000204, {"cwd": "C:\\"})  # suspended, a new group, and no window
    assert said[3] == ("AssignProcessToJobObject", JOB, PROCESS) and said[4] == ("NtResumeProcess", PROCESS)
    tree.await_exit()
    assert tree.reap() == 3 and said[-1] == ("CloseHandle", JOB)


def test_the_job_kills_what_is_in_it_when_it_is_closed(system):
    said, _ = system
    miniplug._WindowsProcess(["prog"], None, False).reap()
    _, job, kind, settings, size = said[2]
    assert (job, kind, size, len(settings)) == (JOB, 9, 144 if sys.maxsize > 1 << 32 else 112, size)
    assert struct.unpack_from("<I", settings, 16) == (0x2000,)  # the third field, after two of 64 bits
    assert settings.count(0) == size - 1


def test_a_plugin_on_the_hosts_terminal_has_a_group_of_its_own_and_no_console(system):
    said, _ = system
    miniplug._WindowsProcess(["prog"], None, True).reap()
    assert said[0][2] == 0x00000204


def test_the_whole_job_is_ended_and_nothing_after_it_is_closed(system):
    said, _ = system
    tree = miniplug._WindowsProcess(["prog"], None, False)
    tree.signal(kill=False)
    assert said[-2:] == [("TerminateJobObject", JOB, 1), ("kill",)]
    tree.reap()
    del said[:]
    tree.signal(kill=True)
    tree.reap()
    assert "TerminateJobObject" not in names(said) and "CloseHandle" not in names(said)


def test_a_process_that_cannot_be_made_leaves_no_job(system):
    said, results = system
    results["error"] = FileNotFoundError("prog")
    with pytest.raises(FileNotFoundError):
        miniplug._WindowsProcess(["prog"], None, False)
    assert names(said) == ["popen"]


def test_a_process_that_cannot_be_let_run_is_killed(system):
    said, results = system
    results["NtResumeProcess"] = -0x3FFFFFDE
    with pytest.raises(OSError, match="Windows refuses"):
        miniplug._WindowsProcess(["prog"], None, False)
    assert names(said)[-2:] == ["kill", "CloseHandle"]


def test_without_a_job_the_process_itself_is_ended(system):
    """Windows refuses, as it did to processes in a job before Windows 8."""
    said, results = system
    results.update(CreateJobObjectW=0, SetInformationJobObject=0, AssignProcessToJobObject=0)
    tree = miniplug._WindowsProcess(["prog"], None, False)
    assert ("NtResumeProcess", PROCESS) in said
    tree.signal(kill=True)
    assert names(said)[-1] == "kill" and "TerminateJobObject" not in names(said)
    tree.reap()
    assert "CloseHandle" not in names(said)


@pytest.mark.parametrize("refused", ["SetInformationJobObject", "AssignProcessToJobObject"])
def test_with_limits_the_process_runs_in_the_job_or_not_at_all(system, refused):
    said, results = system
    results[refused] = 0
    with pytest.raises(OSError, match="Windows refuses"):
        miniplug._WindowsProcess(["prog"], miniplug.Limits(memory=1 << 30), False)
    assert "NtResumeProcess" not in names(said) and names(said)[-1] == "CloseHandle"
    assert "kill" in names(said)


# -- what processes say of their end

@pytest.mark.parametrize("code, words", [
    (0xC0000005, "exited with status 0xc0000005"),
    (3, "exited with status 3"),
    (1816, "exited with status 1816, over its limit of cpu_seconds"),
])
def test_a_status_in_words(code, words):
    assert miniplug._end_words(code) == (words, None)


# -- named pipes

def in_thread(function, *args):
    """Start a thread; returns a function that waits for it and gives what the function returned or raised."""
    outcome = []

    def run():
        try:
            outcome.append(function(*args))
        except BaseException as error:
            outcome.append(error)

    def result():
        thread.join(20)
        return outcome[0]

    thread = threading.Thread(target=run)
    thread.start()
    return result


@pytest.fixture
def pair():
    """Two channels past the handshake, which take messages of 10 MB."""
    both = channels()
    for channel in both:
        channel.begin(10_000_000, 10_000_000)
    yield both
    for channel in both:
        channel.close()


@pytest.fixture
def frames():
    """Two channels in the midst of the handshake."""
    both = channels()
    yield both
    for channel in both:
        channel.close()


def send(channel, body, *buffers, deadline=None):
    channel.send(0, 0, 0, (body, buffers, 0, []), 0, True, deadline)


def read(channel, count):
    """That many messages: what is in each, without its header, and its buffers."""
    messages = []
    while len(messages) < count:
        _, _, _, _, body, buffers = channel.receive().popleft()
        messages.append([body, *buffers])
    return messages


def test_both_ways_at_once_from_several_threads(pair):
    """Also with messages far longer than what a pipe has room for."""
    sizes = [0, 1, 8167, 8168, 8169, 8191, 8192, 8193, 65535, 65536, 3000000]  # the header has 24
    messages = [[[bytes([number]) * size, bytes([number]) * other, bytes([number])] for size, other in zip(sizes, sizes[::-1])]
                for number in range(4)]

    def write(channel, each):
        for message in each:
            send(channel, *message)

    for channel in pair:  # what one leaves to another that has just ended
        channel.later = lambda channel=channel: in_thread(channel.write, [])
    writers = [in_thread(write, channel, each) for channel in pair for each in messages]
    readers = [in_thread(read, channel, len(sizes) * 4) for channel in pair]
    for reader in readers:
        come = reader()
        for number, each in enumerate(messages):
            assert [message for message in come if message[2] == bytes([number])] == each  # each thread's in its order
    assert [writer() for writer in writers] == [None] * 8


@pytest.mark.parametrize("ending", ["shutdown", "other end", "close of the other end"])
def test_an_end_wakes_whoever_reads_and_whoever_writes(pair, ending):
    here, there = pair
    reading, writing = threading.Event(), threading.Event()
    reader = in_thread(lambda: reading.set() or here.receive())
    here.stuck = writing.set  # nobody reads there
    writer = in_thread(send, here, bytes(5000000))
    assert reading.wait(10) and writing.wait(10)
    {"shutdown": here.shutdown, "other end": there.shutdown, "close of the other end": there.close}[ending]()
    assert isinstance(reader(), miniplug._Broken) and writer() is None
    with pytest.raises(miniplug._Broken):
        here.receive()
    send(here, b"x")  # who reads is told, not who writes
    assert not here.posted and here.batch is None


def test_an_end_wakes_the_handshake(frames):
    here, there = frames
    begun = threading.Event()
    reader = in_thread(lambda: begun.set() or here.receive(time.monotonic() + 20).popleft())
    assert begun.wait(10)
    there.shutdown()
    assert isinstance(reader(), ConnectionError)
    with pytest.raises(ConnectionError):
        here.receive(time.monotonic() + 20)


def test_what_was_sent_before_the_end_is_read(pair):
    here, there = pair
    for number in range(5):
        send(here, b"%d" % number, b"and more")
    here.close()
    assert read(there, 5) == [[b"%d" % number, b"and more"] for number in range(5)]
    with pytest.raises(miniplug._Broken) as caught:
        there.receive()
    assert isinstance(caught.value.args[0], (EOFError, BrokenPipeError))


def test_what_follows_the_handshake_is_kept(frames):
    """Also if it has come with the handshake's last frame."""
    here, there = frames
    here.write(here.frame(b"a"))
    here.write(here.frame(b"b" * 4096))
    here.begin(1000, 1000)
    send(here, b"c", b"d")
    here.close()
    assert [there.receive(time.monotonic() + 20).popleft() for _ in range(2)] == [b"a", b"b" * 4096]
    there.begin(1000, 1000)
    assert read(there, 1) == [[b"c", b"d"]]
    with pytest.raises(miniplug._Broken):
        there.receive()


def test_a_deadline_leaves_a_read_and_a_write_where_they_are(pair, monkeypatch):
    monkeypatch.setattr(miniplug, "_FULL_BYTES", 1 << 20)
    here, there = pair
    with pytest.raises(miniplug._Late):
        here.receive(time.monotonic() + 0.02)
    long, later = os.urandom(5000000), threading.Event()
    here.later = later.set
    send(here, long, long, deadline=time.monotonic() + 20)  # a part of it
    assert later.is_set()
    with pytest.raises(miniplug._Late):
        there.receive(time.monotonic() + 0.02)
    writing = threading.Event()
    here.stuck = writing.set
    writer = in_thread(here.write, [])
    assert writing.wait(10)
    send(here, long, b"posted", deadline=time.monotonic() + 20)
    with pytest.raises(miniplug._Late):  # as there is much already
        send(here, long, b"never sent", deadline=time.monotonic() + 0.02)
    assert read(there, 2) == [[long, long], [long, b"posted"]] and writer() is None
    send(there, b"back")
    assert read(here, 1) == [[b"back"]]


def test_a_deadline_in_the_handshake(frames):
    here, there = frames
    with pytest.raises(TimeoutError):
        here.receive(time.monotonic() + 0.02).popleft()
    there.write(there.frame(b"late"))
    assert here.receive(time.monotonic() + 20).popleft() == b"late"


@pytest.mark.parametrize("sizes, said", [
    ([300000], "300024 bytes, where at most 200024"),
    ([200001], "200025 bytes, where at most 200024"),
    ([7000, 193001], "193001 bytes, where at most 193000"),
    ([0, 100000, 100000, 1], "1 bytes, where at most 0"),
])
def test_a_message_over_the_limit_is_not_read(pair, sizes, said):
    here, there = pair
    there.begin(200000, 10_000_000)
    writer = in_thread(lambda: [send(here, *map(bytes, each)) for each in ([0, 200000], [200000], sizes)])
    read(there, 2)
    with pytest.raises(miniplug.ProtocolError, match=said.split(",")[1] if WINDOWS else f"a frame of {said}"):
        there.receive()
    there.close()
    writer()


def test_a_frame_over_the_limit_is_not_read(frames):
    here, there = frames
    writer = in_thread(here.write, here.frame(bytes(300000)))
    with pytest.raises(miniplug.ProtocolError, match="bytes, where at most 4096"):
        there.receive(time.monotonic() + 20).popleft()
    there.close()
    writer()


def test_a_signal_handler_that_returns_breaks_nothing(pair):
    """It wakes the main thread, which waits on, also for a write that is half done."""
    here, there = pair
    struck = threading.Event()

    def strike():
        for _ in range(5):
            time.sleep(0.01)  # so that it strikes while the main thread waits: nothing tells when it does
            signal.raise_signal(signal.SIGINT) if WINDOWS else signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        assert struck.wait(10)

    signal.set_wakeup_fd(-1)  # on Windows asyncio may have left one
    before = signal.signal(signal.SIGINT if WINDOWS else signal.SIGUSR1, lambda *_: struck.set())
    try:
        striker = in_thread(strike)
        answer = in_thread(lambda: striker() or send(there, b"late"))
        assert read(here, 1) == [[b"late"]] and answer() is None
        struck.clear()
        striker = in_thread(strike)
        reader = in_thread(lambda: striker() or read(there, 1))
        send(here, bytes(5000000))
        assert reader() == [[bytes(5000000)]]
    finally:
        signal.signal(signal.SIGINT if WINDOWS else signal.SIGUSR1, before)


# -- processes

@windows
def test_no_handle_is_left():
    count = ctypes.c_uint32()

    def handles():
        gc.collect()
        assert ctypes.windll.kernel32.GetProcessHandleCount(ctypes.c_void_p(-1), ctypes.byref(count))
        return count.value

    def use(way):
        plugin = miniplug.launch(WORKSHOP)
        assert plugin.dispense().greet("x") == "Hello, x!"
        getattr(plugin, way)()
        with pytest.raises(miniplug.LaunchError):
            miniplug.launch([sys.executable, "-c", "import sys; sys.exit(3)"])

    use("close")
    before = handles()
    for way in ("close", "kill") * 3:
        use(way)
    until(lambda: handles() <= before)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The interpreter of a virtual environment: on Windows a small program that starts the real one."""
    folder = tmp_path_factory.mktemp("environment") / "with spaces"
    venv.create(str(folder), with_pip=False, symlinks=not WINDOWS)
    return str(folder / ("Scripts/python.exe" if WINDOWS else "bin/python"))


@pytest.mark.parametrize("end", ["close", "kill"])
def test_the_job_holds_a_virtual_environments_launcher_and_the_interpreter(environment, end):
    plugin = miniplug.launch(WORKSHOP, python=environment)
    shop = plugin.dispense()
    child, pids = shop.spawn(), [plugin.pid, shop.pid()]
    assert shop.python()[1].lower() == environment.lower()
    assert len(set(pids)) == 1 + WINDOWS and all(map(alive, pids))
    getattr(plugin, end)()
    until(lambda: not any(map(alive, [*pids, child])))


def test_a_crash_behind_the_launcher_is_told_as_it_was(environment):
    with miniplug.launch(WORKSHOP, python=environment, stderr="discard") as plugin:
        with pytest.raises(miniplug.PluginCrashed) as caught:
            plugin.dispense().hard_exit(77)
        assert caught.value.exit_code == 77


@windows
def test_a_host_without_a_console(write, tmp_path):
    """As a desktop application has it: no standard streams at all, and no window comes up."""
    host = write("host.py", f"""
        import ctypes, sys
        sys.path.insert(0, {os.path.dirname(HERE)!r})
        import miniplug
        for number in (-10, -11, -12):  # Wine hands down those of the system outside
            ctypes.windll.kernel32.SetStdHandle(number, None)
        sys.stdin = sys.stdout = sys.stderr = sys.__stdin__ = sys.__stdout__ = sys.__stderr__ = None
        with miniplug.launch({WORKSHOP!r}) as plugin:
            shop = plugin.dispense()
            shop.say("a line")
            said = shop.greet("x")
        with miniplug.launch({WORKSHOP!r}, stdin="inherit", stdout="inherit", stderr="inherit") as plugin:
            said += plugin.dispense().greet("y")
        open({str(tmp_path / "said")!r}, "w").write(said)
    """)
    subprocess.run([os.path.join(os.path.dirname(sys.executable), "pythonw.exe"), host], check=True, timeout=50)
    assert (tmp_path / "said").read_text() == "Hello, x!Hello, y!"


GREETER = "class Greeter:\n    def greet(self, name): return f'Hello, {name}!'\n"


def greets(spec, **options):
    with miniplug.launch(spec, **options) as plugin:
        return plugin.dispense().greet("x") == "Hello, x!" and plugin.name == "greeter"


@windows
def test_paths_of_windows(write):
    path = write("with spaces & more/grüße-☃/greeter.py", GREETER)
    drive, rest = os.path.splitdrive(path)
    assert len(drive) == 2
    assert greets(f"{path}:Greeter")
    assert greets(f"greeter={drive.lower()}{rest.replace(os.sep, '/')}:Greeter")
    assert greets("greeter.py:Greeter", cwd=os.path.dirname(path))
    assert greets(rf"\\?\{path}:Greeter")
    assert miniplug._split_spec(r"\\server\share\plugins\greeter.py:Greeter") == (
        "greeter", r"\\server\share\plugins\greeter.py", "Greeter")
    assert miniplug._split_spec(r"C:\plugins\greeter.exe") == ("", r"C:\plugins\greeter.exe", "")
    assert miniplug._split_spec("C:greeter") == ("", "C:greeter", "")


@windows
def test_a_long_path(write):
    """Longer than the 260 characters that Windows takes without this prefix."""
    path = os.path.dirname(write("x.py", "")) + "\\" + "\\".join(["a_long_name_of_a_folder" * 4] * 4) + "\\greeter.py"
    os.makedirs("\\\\?\\" + os.path.dirname(path))
    with open("\\\\?\\" + path, "w") as file:
        file.write(GREETER)
    assert len(path) > 300 and greets(f"\\\\?\\{path}:Greeter")


@windows
def test_variables_have_no_case(monkeypatch):
    """Two variables whose names differ in nothing else would be two in a child's block, and either may win."""
    monkeypatch.setenv("Some_Variable", "the host's")
    handshake = miniplug.Handshake(magic_cookie_key="Some_Cookie")
    with miniplug.launch(WORKSHOP, env={"some_variable": "the plugin's"}, handshake=handshake) as plugin:
        seen = plugin.dispense().env()
    assert seen["SOME_VARIABLE"] == "the plugin's"
    assert not [name for name in seen if "COOKIE" in name or name.startswith("MINIPLUG_")]
