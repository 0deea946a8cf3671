"""A plugin for the tests that has never heard of miniplug: it does what it is told."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time


class Workshop:
    def __init__(self):
        self.entered = threading.Event()
        self.go = threading.Event()
        self.running = 0
        self.most = 0
        self.lock = threading.Lock()

    def greet(self, name):
        """Say hello."""
        return f"Hello, {name}!"

    def echo(self, *args, **kwargs):
        return kwargs if kwargs else args[0] if len(args) == 1 else list(args)

    def pid(self):
        return os.getpid()

    def group(self):
        return os.getpgrp()

    def python(self):
        return list(sys.version_info[:2]), sys.executable

    def env(self):
        return dict(os.environ)

    def child_env(self):
        """What a child of the plugin's sees."""
        code = "import os, json; print(json.dumps(dict(os.environ)))"
        return subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout.decode()

    def cwd(self):
        return os.getcwd()

    def path0(self):
        return sys.path[0]

    def read_stdin(self):
        return sys.stdin.read()

    def modules(self):
        return sorted(sys.modules)

    # -- trouble

    def fail(self, kind="ValueError", *args):
        raise __import__("builtins").__dict__[kind](*args)

    def fail_own(self):
        class Own(KeyError):
            pass

        try:
            {}["inner"]
        except KeyError as error:
            raise Own("outer", 7) from error

    def open_missing(self):
        open("/no/such/file/anywhere")  # noqa: SIM115

    def exit(self, status):
        sys.exit(status)

    def hard_exit(self, status):
        os._exit(status)

    def say_and_die(self, text):
        print("out:", text)
        print("err:", text, file=sys.stderr)
        os._exit(3)

    def kill_self(self, name):
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(60)

    def segfault(self):
        import faulthandler

        getattr(faulthandler, "_read_null" if os.name == "nt" else "_sigsegv", faulthandler._sigsegv)()

    def abort(self):
        os.abort()

    def unserializable(self):
        return [1, {"deep": object()}]

    def ignore_sigterm(self):
        # in a thread there is no signal.signal(): the mask of the whole process is set through the main thread's
        import ctypes

        ctypes.CDLL(None).signal(int(signal.SIGTERM), ctypes.c_void_p(1))

    # -- time

    def sleep(self, seconds):
        time.sleep(seconds)
        return seconds

    def spin(self):
        while True:
            pass

    def stick(self):
        """Stuck in C code that holds the GIL for ever."""
        import ctypes

        ctypes.PyDLL("kernel32").Sleep(-1) if os.name == "nt" else ctypes.PyDLL(None).pause()

    def enter_and_wait(self, seconds=30.0):
        """Say that it has begun (see `await_entered`) and wait for `let_go`."""
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        self.entered.set()
        went = self.go.wait(seconds)
        with self.lock:
            self.running -= 1
        return went

    def start_and_wait(self):
        print("started", flush=True)
        return self.enter_and_wait()

    def await_entered(self):
        return self.entered.wait(30)

    def await_running(self, count):
        deadline = time.monotonic() + 20
        while self.running < count and time.monotonic() < deadline:
            time.sleep(0.001)
        return self.running

    def let_go(self):
        self.go.set()

    def until_cancelled(self, path):
        """Run until the caller has given up, and leave a file that says so."""
        import miniplug

        self.entered.set()
        deadline = time.monotonic() + 20
        while not miniplug.cancelled() and time.monotonic() < deadline:
            time.sleep(0.001)
        with open(path, "w") as file:
            file.write(str(miniplug.cancelled()))

    # -- output

    def say(self, text, stream="stdout"):
        print(text, file=getattr(sys, stream), flush=True)

    def write_bytes(self, data, fd=1):
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view):]

    def log(self, level, message, name="shop", **extra):
        logging.getLogger(name).log(level, message, extra=extra)

    def log_exception(self, message):
        try:
            raise LookupError("logged")
        except LookupError:
            logging.getLogger("shop").exception(message)

    def print_traceback(self):
        import traceback

        try:
            raise LookupError("printed")
        except LookupError:
            traceback.print_exc()

    def start_thread_that_fails(self):
        def fail():
            raise RuntimeError("in a thread")

        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()

    # -- children

    def spawn(self, detached=False, holds_pipes=True, code="import time; time.sleep(600)"):
        """Start a child that sleeps, or runs that code, and return its pid."""
        streams = None if holds_pipes else subprocess.DEVNULL
        flags = subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP if os.name == "nt" and detached else 0
        self.child = subprocess.Popen([sys.executable, "-c", code], start_new_session=detached, creationflags=flags,
                                      stdout=streams, stderr=streams)
        return self.child.pid
