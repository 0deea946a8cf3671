"""A plugin that does itself harm: what, and when, it is told. Of miniplug it uses no more than the way to its connection."""

import gc
import os
import sys
import threading
import time

import miniplug

FOLDER = os.environ["VICTIM_FOLDER"]  # a file `at_start` here names what to do while it starts
WINDOWS = os.name == "nt"
SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]  # as any child would be, if slower to start than `sleep`
kept = []  # what is to stay in use


class Victim:
    def __init__(self):
        self.last = None
        self.lock = threading.Lock()
        self.released = threading.Event()
        self.struck = threading.Event()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.last:
            strike(self.last)

    def greet(self, name):
        return f"Hello, {name}!"

    def strike(self, fault):
        strike(fault)
        return fault

    def strike_at_the_end(self, fault):
        self.last = fault

    def strike_later(self, fault):
        """When a byte comes on stdin; the call is over by then."""
        def wait():
            os.read(0, 1)
            try:
                strike(fault)
            finally:
                self.struck.set()

        threading.Thread(target=wait, daemon=True).start()

    def await_struck(self):
        return self.struck.wait(20)

    def items(self, fault):
        yield 1
        yield 2
        strike(fault)
        yield 3

    def call_back(self, function):
        return function()

    def wait(self):
        """Be a call in flight, until `release`."""
        return self.released.wait(20)

    def release(self):
        self.released.set()

    def fail(self):
        raise LookupError("as it should")


def strike(fault):
    globals()[fault]()


class suppress:  # contextlib's takes long to import
    def __init__(self, kind):
        self.kind = kind

    def __enter__(self):
        pass

    def __exit__(self, kind, *error):
        return kind is not None and issubclass(kind, self.kind)


def connection():
    """The channel to the host, that which calls if there are several; before there is one, another one to where it will be,
    over which no key is proven."""
    request = miniplug._current.get()
    if request is not None:
        return request.session.channel
    found = [each for each in gc.get_objects() if isinstance(each, miniplug._Channel)]
    if not found:
        kept.append(miniplug._connect(miniplug._environment["MINIPLUG_ADDRESS"], 5.0))
    return found[0] if found else kept[-1]


def write(data):
    """Past the session, bytes to the host; on Windows as one message."""
    channel = connection()
    if WINDOWS:
        channel.write(channel.frame(data))
    else:
        channel.sock.sendall(data)


def note(pid):
    """Have the test end a process that left the group of this one."""
    with open(os.path.join(FOLDER, "strays"), "a") as file:
        file.write(f"{pid}\n")


def in_thread(function, *args):
    thread = threading.Thread(target=function, args=args)
    thread.start()
    thread.join()


def for_ever():
    threading.Event().wait()


def nothing():
    pass


# -- the end

def kill():
    os.kill(os.getpid(), 9)
    for_ever()


def terminate():
    os.kill(os.getpid(), 15)
    for_ever()


def interrupt():
    os.kill(os.getpid(), 2)
    for_ever()


def interrupt_a_thread():
    """That wakes no other; so the main thread, which it is for, finds it when it looks."""
    import signal

    signal.pthread_kill(threading.get_ident(), 2)
    for_ever()


def segfault():
    import faulthandler

    getattr(faulthandler, "_read_null", faulthandler._sigsegv)()  # the first is gone since 3.15


def abort():
    os.abort()


def hard_exit():
    os._exit(7)


def hard_exit_in_a_thread():
    in_thread(os._exit, 7)


def write_and_exit():
    """The last lines before the end are whole."""
    print("some last words", file=sys.stderr)
    os.write(2, b"y" * 70000)
    os._exit(7)


def become_another_program():
    os.execv(SLEEPER[0], SLEEPER)


# -- no end

def stop():
    if WINDOWS:
        import ctypes

        ctypes.WinDLL("ntdll").NtSuspendProcess(ctypes.c_void_p(-1))
    else:
        os.kill(os.getpid(), 19 if sys.platform == "linux" else 17)
        for_ever()  # it may strike another thread first


def hold_the_gil():
    import ctypes

    ctypes.PyDLL("kernel32").Sleep(600_000) if WINDOWS else ctypes.PyDLL(None).sleep(600)


def wait_for_ever():
    for_ever()


# -- exceptions

def sys_exit():
    sys.exit(5)


def raise_an_exception():
    raise LookupError("struck")


def raise_a_base_exception():
    class Own(BaseException):
        pass

    raise Own("struck")


def recurse():
    recurse()


def sys_exit_in_a_thread():
    in_thread(sys.exit, 5)


def raise_in_a_thread():
    in_thread(raise_an_exception)


def raise_in_every_thread():
    """As those do who want their threads to end: in miniplug's own as well."""
    import ctypes

    def begins(frame):
        """Whether it is still in threading's own steps: there it is Python's start() that would wait for ever."""
        while frame is not None and frame.f_code.co_filename == threading.__file__:
            frame = frame.f_back
        return frame is None

    settled = 0
    while settled < 20:  # looks in a row at which no thread was just starting
        settled = 0 if any(map(begins, sys._current_frames().values())) else settled + 1
        time.sleep(0.001)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.is_alive():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


# -- the connection

def close_the_connection():
    """The number itself, as code does that closes all but the standard streams."""
    channel = connection()
    if WINDOWS:
        import _winapi

        _winapi.CloseHandle(channel._handles[0])
    else:
        os.close(channel.sock.fileno())


def close_every_descriptor():
    connection()
    os.closerange(3, 256)


def shut_the_connection_down():
    connection().shutdown()


def truncate_a_frame():
    write(b"\1\1\0\0" if WINDOWS else b"\0\0\1\0half")
    connection().shutdown()


def corrupt_a_frame():
    frame = bytes([99]) * 40  # an unknown wire version
    write(frame if WINDOWS else b"\0\0\0\x28" + frame)


def babble():
    with suppress(OSError):  # it is cut off in the middle
        for _ in range(100):
            write(b"\x80ever so much" * 100)


def lose_the_door():
    """Somebody tidies the temporary folder up."""
    import shutil

    shutil.rmtree(os.path.dirname(miniplug._environment["MINIPLUG_ADDRESS"]))


# -- resources

def current_size():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def limit_memory(more):
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (current_size() + more, resource.RLIM_INFINITY))


def ask_for_too_much_memory():
    limit_memory(32 << 20)
    bytearray(64 << 20)


def eat_all_memory():
    limit_memory(16 << 20)
    size = 1 << 20
    while size:
        try:
            kept.append(bytearray(size))
        except MemoryError:
            size //= 2


def eat_memory_without_end():
    for _ in range(2000):  # or there is no limit
        kept.append(bytearray(1 << 20))  # noqa: PERF401 -- each one counts when the next cannot be had


def eat_all_descriptors():
    import resource

    with suppress(OSError):  # the first thread that ends wants this, or Python 3.8 aborts
        kept.append(__import__("ctypes").CDLL("libgcc_s.so.1"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with suppress(OSError):
        while True:
            kept.append(os.open(os.devnull, os.O_RDONLY))


def eat_all_threads():
    """No more can be started: there is no room for a stack of that size."""
    limit_memory(64 << 20)
    threading.stack_size(256 << 20)
    with suppress(RuntimeError):
        threading.Thread(target=for_ever, daemon=True).start()
        os.abort()  # there was room


def fill_a_disk():
    """Its output's, say: every write fails."""
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    os.dup2(full, 2)
    with suppress(OSError):
        print("lost", flush=True)


# -- children

def fork():
    """The child is gone before its parent goes on."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)


def fork_and_go_on_in_both():
    """The child comes back from the method, too."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)


def fork_a_child_that_stays():
    if not os.fork():
        time.sleep(600)


def fork_a_child_that_stays_and_exit():
    fork_a_child_that_stays()
    os._exit(7)


def start_a_child_that_stays():
    """With the pipes of this one."""
    import subprocess

    kept.append(subprocess.Popen(SLEEPER))


def start_a_child_that_stays_and_exit():
    start_a_child_that_stays()
    os._exit(7)


def start_a_stray_and_exit():
    """It leaves the group, and holds the pipes."""
    import subprocess

    note(subprocess.Popen(SLEEPER, start_new_session=True).pid)
    os._exit(7)


def kill_a_child():
    start_a_child_that_stays()
    kept[-1].kill()
    kept[-1].wait()


def kill_the_guardian():
    """All of a sudden there is nobody who would end it with the host; so it does that itself."""
    import subprocess

    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], stdout=subprocess.PIPE, check=True).stdout.decode()
    for line in listing.splitlines():
        pid, parent, args = line.split(None, 2)
        if int(parent) == os.getppid() and "miniplug-guardian" in args:
            os.kill(int(pid), 9)


# -- output

class Broken:
    """A stream that fails at everything."""

    def __getattr__(self, name):
        raise OSError(5, "broken")


def close_the_output():
    os.close(1)
    os.close(2)


def close_the_streams():
    sys.stdout.close()
    sys.stderr.close()


def replace_the_streams():
    sys.stdout, sys.stderr = Broken(), None


def print_a_line():
    print("a line")


def print_megabytes():
    for _ in range(64):
        print("x" * 65535)


def print_a_long_line():
    os.write(1, b"\xff\0" * 10)
    for _ in range(64):
        os.write(1, b"y" * 65536)


# -- what others share in the interpreter

def lose_all_imports():
    sys.path.clear()
    sys.meta_path.clear()
    sys.modules.pop("miniplug", None)
    sys.modules.pop("traceback", None)


def lose_the_environment():
    os.environ.clear()


def lose_the_folder():
    folder = os.path.join(FOLDER, "gone")
    os.mkdir(folder)
    os.chdir(folder)
    os.rmdir(folder)


def block_all_signals():
    """As far as a thread can: the handlers are the main thread's."""
    import signal

    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def set_a_default_timeout():
    import socket

    socket.setdefaulttimeout(0.001)


def script():
    with open(os.path.join(FOLDER, "at_start")) as file:
        return file.read()


if os.path.exists(os.path.join(FOLDER, "at_start")):
    strike(script())
