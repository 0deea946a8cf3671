"""What goes wrong in the host, against when it does: an answer or a clear error within a bound, nothing left behind, and all is
well once the trouble is over."""

import asyncio  # noqa: F401  # where it is imported on first use, that is not what is short here
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from conftest import WINDOWS, descriptors
from stage import PROMPT, make_scene, within  # noqa: F401

import miniplug

NO_DESCRIPTOR, NO_THREAD = "Too many open files", "can't start new thread"

# -- faults


@contextlib.contextmanager
def no_descriptor(scene):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, descriptors())) + 1, hard))
    taken = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        scene.trouble = NO_DESCRIPTOR
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def no_thread(scene):
    """There is no room for another stack."""
    import resource

    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), hard))
    stack = threading.stack_size(256 << 20)
    try:
        with pytest.raises(RuntimeError):
            threading.Thread(target=print).start()
        scene.trouble = NO_THREAD
        yield
    finally:
        threading.stack_size(stack)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def full_disk(scene):
    """That of the folder for temporary files, which has no room for a folder."""
    folder = scene.folder / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=1", "none", str(folder)], stderr=subprocess.DEVNULL,
                      check=False).returncode:
        pytest.skip("only root may mount a disk")
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(folder)
    try:
        with pytest.raises(OSError, match="No space left"):
            (folder / "x").mkdir()
        yield
    finally:
        os.environ["TMPDIR"] = before
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def no_folder(scene):
    before, folder = os.getcwd(), scene.folder / "gone"
    folder.mkdir()
    os.chdir(folder)
    folder.rmdir()
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def no_environment(scene):
    before = dict(os.environ)
    os.environ.clear()
    try:
        yield
    finally:
        os.environ.update(before)


@contextlib.contextmanager
def default_timeout(scene):
    socket.setdefaulttimeout(0.001)
    try:
        yield
    finally:
        socket.setdefaulttimeout(None)


@contextlib.contextmanager
def forked_child(scene):
    """It lives through all of it, with a copy of all that the host has open."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    try:
        yield
    finally:
        os.close(writing)
        os.waitpid(child, 0)


def fail(*args):
    raise SystemExit("what the host has given raises")


@contextlib.contextmanager
def raising_callables(scene):
    """All that miniplug calls for the host: see OPTIONS."""
    yield


# -- moments


def starting(scene):
    if scene.trouble:
        with pytest.raises(miniplug.LaunchError, match=scene.trouble):
            scene.start()
        assert not scene.plugin.running
        return
    scene.start()
    assert scene.proxy.greet("you") == "Hello, you!"


def closing(scene):
    scene.plugin.close()
    assert scene.plugin.exit_code == 0


def in_a_call(scene):
    assert scene.proxy.greet("you") == "Hello, you!"


def in_a_submitted_call(scene):
    try:
        assert scene.proxy.greet.submit("you").result(PROMPT) == "Hello, you!"
    except RuntimeError as error:  # there was no thread to read the answer, and so it was not sent
        assert scene.trouble == NO_THREAD and NO_THREAD in str(error)


def in_a_stream(scene):
    assert list(scene.proxy.items("nothing")) == [1, 2, 3]


def in_a_callback(scene):
    assert scene.proxy.call_back(lambda: scene.proxy.greet("you")) == "Hello, you!"


def at_a_deadline(scene):
    with pytest.raises(miniplug.CallTimeout):
        scene.proxy.wait.timeout(0.05)()


def crashing(scene):
    scene.proxy.strike("print_a_line")
    with pytest.raises(miniplug.PluginCrashed) as caught:
        scene.proxy.strike("hard_exit")
    assert caught.value.exit_code == scene.plugin.exit_code == 7


EVERY = (starting, in_a_call, in_a_submitted_call, in_a_stream, in_a_callback, at_a_deadline, crashing, closing)
AROUND = (starting, in_a_call, crashing, closing)  # how it is called does not matter there
ROWS = {no_descriptor: EVERY, no_thread: EVERY, forked_child: EVERY, full_disk: AROUND, no_folder: AROUND,
        no_environment: AROUND, default_timeout: AROUND, raising_callables: AROUND}
OPTIONS = {raising_callables: {"stdout": fail, "stderr": fail, "on_exit": fail}}
ON_WINDOWS = (default_timeout, raising_callables)  # the others are POSIX's; there no program starts without SYSTEMROOT


@pytest.mark.parametrize(("fault", "moment"), [
    pytest.param(fault, moment, id=f"{fault.__name__}-{moment.__name__}")
    for fault, moments in ROWS.items() if not WINDOWS or fault in ON_WINDOWS for moment in moments])
def test_a_fault_of_the_host(scene, fault, moment):
    if (fault, moment) == (no_folder, starting) and sys.version_info[:3] == (3, 13, 0):
        pytest.skip("Python 3.13.0 itself cannot import socket where the working directory is gone")
    scene.make(**OPTIONS.get(fault, {}))
    if moment is not starting:
        scene.start()
    with fault(scene), within(PROMPT):
        moment(scene)
    if not scene.plugin.running:
        scene.start()
    assert scene.proxy.greet("you") == "Hello, you!"


# -- Ctrl-C


def wait_in_a_callback(scene):
    scene.proxy.call_back(threading.Event().wait)


def wait_while_it_starts(scene):
    signal.setitimer(signal.ITIMER_REAL, 0)  # not while it closes
    scene.plugin.close()
    signal.setitimer(signal.ITIMER_REAL, 0.15)
    scene.start("wait_for_ever")


def wait_while_it_closes(scene):
    scene.proxy.strike_at_the_end("wait_for_ever")
    scene.plugin.close(20)


@pytest.mark.skipif(WINDOWS, reason="there is no timer that interrupts")
@pytest.mark.parametrize("wait", [
    lambda scene: scene.proxy.wait(), lambda scene: scene.proxy.wait.submit().result(),
    lambda scene: list(scene.proxy.items("wait_for_ever")), wait_in_a_callback, wait_while_it_starts, wait_while_it_closes,
], ids=["in a call", "in a submitted call", "in a stream", "in a callback", "starting", "closing"])
def test_the_host_is_interrupted(scene, wait):
    """Ctrl-C gets through, whatever the host waits for, and disturbs nothing else."""
    def interrupt(number, frame):
        raise KeyboardInterrupt

    scene.start()
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.15)
    try:
        with within(PROMPT), pytest.raises(KeyboardInterrupt):
            wait(scene)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if wait is wait_while_it_closes:
        scene.plugin.kill()
    if not scene.plugin.running:
        scene.start()
    with within(PROMPT):
        assert scene.proxy.greet("you") == "Hello, you!"
