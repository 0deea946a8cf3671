"""What the tests share: plugins written on the fly, and the proof that nothing is left behind."""

import atexit
import contextlib
import ctypes
import gc
import glob
import multiprocessing.connection
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time

import by_hand
import pytest

import miniplug

HERE = os.path.dirname(os.path.abspath(__file__))
WORKSHOP = os.path.join(HERE, "workshop.py") + ":Workshop"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it to what is in the background, and its children
    signal.signal(signal.SIGINT, signal.default_int_handler)

WINDOWS = os.name == "nt"
WINE = WINDOWS and hasattr(ctypes.WinDLL("ntdll"), "wine_get_version")
TEMPORARY = tempfile.mkdtemp(prefix="mp-")  # of this run alone: what is left there is ours
atexit.register(shutil.rmtree, TEMPORARY, True)
if not WINDOWS:
    os.environ["TMPDIR"] = TEMPORARY
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell starts what runs in the background like this
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each plugin that starts compiles the library anew
os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = os.path.join(TEMPORARY, "bytecode")
if sys.flags.dont_write_bytecode:  # plugins inherit that too: so let one that has not have it written first
    subprocess.run([sys.executable, miniplug.__file__, "doctor"], stdout=subprocess.DEVNULL, check=False)


def pytest_make_parametrize_id(val):
    """pytest puts a test's name into the environment, where Windows has 32,767 characters for a variable."""
    return f"{type(val).__name__}-{len(val)}" if isinstance(val, (str, bytes)) and len(val) > 1000 else None


def writer(folder):
    """What writes a source file, dedented, into that folder, and returns its path."""

    def write(name, source):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def write(tmp_path):
    return writer(tmp_path)


@pytest.fixture
def workshop():
    """A plugin that does what it is told, and its proxy."""
    with miniplug.launch(WORKSHOP) as plugin:
        yield plugin.dispense()


def connection_of(sock):
    """What Listener and Client make of a socket."""
    return multiprocessing.connection.Connection(sock.detach())


def channels():
    """Two channels that are connected with each other: over a pair of sockets, or on Windows over a named pipe."""
    if not WINDOWS:
        return [miniplug._Channel(connection_of(end)) for end in socket.socketpair()]
    listener = miniplug._Listener()
    try:
        return [miniplug._connect(listener.address, 5.0), listener.accept()]
    finally:
        listener.close()


def accepted(listener):
    """Its next connection, however long that takes."""
    while True:
        try:
            return listener.accept()
        except socket.timeout:
            pass


def channel_and_end():
    """A channel, and the other end of its connection to be spoken by hand."""
    if not WINDOWS:
        ours, theirs = socket.socketpair()
        return miniplug._Channel(connection_of(ours)), theirs
    listener = miniplug._Listener()
    try:
        end = by_hand.connect(listener.address)
        return listener.accept(), end
    finally:
        listener.close()


stream = pytest.mark.skipif(WINDOWS, reason="on a named pipe a frame is a message: it has no length before it, and is never cut")


def not_under_wine(reason):
    """Skip a test for what Wine, and not Windows, cannot do."""
    return pytest.mark.skipif(WINE, reason=f"Wine: {reason}")


def until(condition, seconds=10.0):
    """Wait for what no event tells of (another process's end, say), and fail when it does not come."""
    deadline = time.monotonic() + seconds * (4 if WINE else 1)  # which is slow, and tells nothing about Windows by that
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.003)


def swallow(function, *args):
    """Call what is cut off by the test, and rightly so."""
    try:
        function(*args)
    except miniplug.PluginError:
        pass


def alive(pid):
    """Whether there is such a process that has not ended; a zombie has."""
    if WINDOWS:
        import _winapi

        try:
            handle = _winapi.OpenProcess(0x100000, False, pid)  # SYNCHRONIZE
        except OSError:
            return False
        ended = _winapi.WaitForSingleObject(handle, 0) == _winapi.WAIT_OBJECT_0
        _winapi.CloseHandle(handle)
        return not ended
    if not os.path.isdir("/proc/self"):
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], stdout=subprocess.PIPE, check=False).stdout
        return state[:1] not in (b"", b"Z")
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b") ")[2][:1] not in (b"Z", b"X")
    except OSError:
        return False


def freeze(pid, on=True):
    """Stop a process, or let it go on."""
    if not WINDOWS:
        os.kill(pid, signal.SIGSTOP if on else signal.SIGCONT)
        if on and hasattr(os, "waitid"):  # it may run on for a moment after it has got the signal
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
        return None
    import _winapi

    handle = _winapi.OpenProcess(0x800, False, pid)  # PROCESS_SUSPEND_RESUME
    native = ctypes.WinDLL("ntdll")
    (native.NtSuspendProcess if on else native.NtResumeProcess)(ctypes.c_void_p(handle))
    return _winapi.CloseHandle(handle)


def leftover_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("miniplug")]


def descriptors():
    """What this process has open: {descriptor: what it is of}."""
    found = {}
    for fd in os.listdir("/proc/self/fd") if not WINDOWS and os.path.isdir("/proc/self/fd") else ():
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            pass  # that of the listing
    return found


def _sockets():
    return set(glob.glob(os.path.join(TEMPORARY, "miniplug-*")))


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """What the imports and earlier modules' tests have made is not looked through again after each test."""
    gc.collect()
    if hasattr(gc, "freeze"):  # PyPy has none
        gc.freeze()


@pytest.fixture(autouse=True)
def nothing_left():
    """After each test: no thread, descriptor, process or file of miniplug's that was not there before."""
    before, folders, others = descriptors(), _sockets(), leftover_threads()  # what one test has left is not the next one's fault
    yield
    gc.collect()
    until(lambda: set(leftover_threads()) <= set(others), 15)
    until(lambda: opened_since(before) == {}, 5)
    until(lambda: _sockets() <= folders, 5)
    if not WINDOWS:
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)  # no child, not even a zombie


def opened_since(before):
    """Descriptors that were not there before, but for those that the interpreter or pytest keep for themselves."""
    return {fd: target for fd, target in descriptors().items()
            if fd not in before and "urandom" not in target and "pytest" not in target}


def by_hand_environment():
    """In which miniplug and what the tests share can be imported."""
    return dict(os.environ, PYTHONPATH=os.pathsep.join([os.path.dirname(HERE), HERE]))


def run_python(path, *args, **options):
    """Run a script with this interpreter and with miniplug importable; returns (status, stdout, stderr)."""
    env = by_hand_environment()
    done = subprocess.run([sys.executable, path, *args], capture_output=True, stdin=subprocess.DEVNULL, env=env,
                          timeout=50, text=True, check=False, **options)
    return done.returncode, done.stdout, done.stderr
