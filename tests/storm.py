"""A host whose main thread is struck by exceptions while it calls, and its plugin. test_storm.py runs it; by hand:

    python3 tests/storm.py HOW WHAT COUNT [--threads] [--only KIND] [--most N] [--each] [--seed N]

HOW is `timer` (a SIGALRM handler raises, at random moments, and often once or twice more within microseconds) or `async`
(PyThreadState_SetAsyncExc, from another thread). WHAT is the exception: `KeyboardInterrupt`, `Struck`, which is an ordinary
one, or `Late`, which is a TimeoutError and so an OSError too.
After COUNT strikes it looks whether every answer was right, whether all that was raised has arrived at the caller, and
whether the session is good: no call, request, loan, slot or instance is left on either side. Exit status 0 if all is well;
otherwise it tells where the last strikes were. With --each it looks after each strike, which finds the one to blame.
"""

import _thread
import argparse
import collections
import contextlib
import ctypes
import faulthandler
import gc
import os
import random
import signal
import sys
import threading
import time
import weakref
import zlib

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import miniplug

STUCK = 20.0  # seconds after which a call counts as never to return
ENOUGH = 3.0  # in which what was given up must be gone, with --each
WORKERS = 6
MOST = 3  # strikes at one operation
PROGRAM = [sys.executable, os.path.abspath(__file__), "serve"]
PATIENCE = 5.0  # seconds that a call waits for being given up: a wake-up that is lost heals within one, and machines are busy

# -- what is looked at inside of a session: the only names of internals here. Each by the names that it may have.

CALLS, REQUESTS, SLEEPERS = ("calls", "_calls"), ("requests", "_requests"), ("sleepers", "_waiting")
UNATTENDED = "unattended", "_unattended"
OBJECTS, SLOTS, SESSION = ("objects", "_objects", "_loans"), ("free", "slots", "_slots"), "_Session"


def sessions():
    """Those of this process that have not ended."""
    found = [each for each in gc.get_objects() if type(each).__name__ == SESSION and type(each).__module__ == "miniplug"]
    return [each for each in found if each.cause is None]


def inside(session, names):
    """What has one of these names, and a length, in a session or in what it is made of."""
    parts = [session]
    for part in parts:
        for name in names:
            if hasattr(getattr(part, name, None), "__len__"):
                return getattr(part, name)
        if len(parts) < 100:
            parts += filter(is_part, map(part.__getattribute__, fields(part)))
    raise LookupError(f"a session has no {names}: say in tests/storm.py what it is called now")


def fields(thing):
    slots = [name for cls in type(thing).__mro__ for name in getattr(cls, "__slots__", ())]
    return [name for name in [*getattr(thing, "__dict__", ()), *slots] if hasattr(thing, name)]


def is_part(thing):
    return type(thing).__module__ == "miniplug" and not isinstance(thing, type)


def still_open(session):
    """{what: how many}, of what must be gone once nobody calls."""
    rooms = CALLS, REQUESTS, SLEEPERS, UNATTENDED
    return {names[0]: len([each for each in inside(session, names) if each != -1]) for names in rooms}  # -1: always


def holdings(session):
    """{what: how many}, of what must be the same whenever nobody calls."""
    return {"objects": len(inside(session, OBJECTS)), "slots": len(inside(session, SLOTS))}


def waits_in(function, thread=None):
    """Whether this function is what a thread, the main one by default, is in, and does not get on."""
    def stack():
        frame, found = sys._current_frames().get(thread or threading.main_thread().ident), []
        while frame is not None:
            found.append((frame.f_code, frame.f_lasti))
            frame = frame.f_back
        return found

    first = stack()
    time.sleep(0.02)
    return first == stack() and function.__code__ in dict(first)


# -- the plugin


class Service:
    """Counts what runs in it: what is given up must end."""

    def __init__(self):
        self.running = []
        self.lent = []
        self.marks = []
        self.outlasted = []
        self.go = threading.Event()
        self.barrier = threading.Barrier(WORKERS)

    @contextlib.contextmanager
    def noted(self, name):
        self.running.append(name)
        try:
            yield
        finally:
            self.running.remove(name)

    def echo(self, value):
        return value

    def sum(self, data):
        return zlib.crc32(data)

    def mark(self, number):
        self.marks.append(number)
        return number

    def count(self, end):
        with self.noted("count"):
            yield from range(end)

    def each(self, values, function):
        with self.noted("each"):
            return [function(value) for value in values]

    def deep(self, depth, function):
        with self.noted("deep"):
            return function(depth - 1)

    def lend(self, number):
        def lent(value):
            return [number, value]

        self.lent.append(weakref.ref(lent))
        return lent

    def wait_for_cancel(self, number):
        """Notes if nobody gave it up."""
        with self.noted("wait_for_cancel"):
            end = time.monotonic() + PATIENCE
            while not miniplug.cancelled():
                time.sleep(0.001)
                if time.monotonic() > end:
                    self.outlasted.append(number)
                    break

    def signal_and_wait(self, pid, number, _=None):
        os.kill(pid, number)
        self.wait_for_cancel(number)

    def signal_beside(self, others, pid, number):
        """Not before so many others run."""
        with self.noted("signal_beside"):
            while len(self.running) <= others:
                time.sleep(0.001)
            self.signal_and_wait(pid, number)

    def signal_after(self, count, pid, number):
        with self.noted("signal_after"):
            yield from range(count)
            os.kill(pid, number)
            self.wait_for_cancel(number)

    def wait_to_go(self):
        with self.noted("wait_to_go"):
            return self.go.wait(STUCK)

    def let_go(self):
        self.go.set()

    def inside(self):
        return list(self.running)

    def meet(self):
        """Returns when so many calls run at once as there are workers."""
        self.barrier.wait(STUCK)
        return True

    def left(self):
        """What of it is still there, but for the call that asks, and for the instance that was made to be described."""
        gc.collect()
        session, = sessions()
        found = still_open(session)
        found[REQUESTS[0]] -= 1
        lent = sum(each() is not None for each in self.lent)
        return {**found, "running": len(self.running), "lent": lent, "instances": max(0, Instance.entered - 1)}

    def holds(self):
        session, = sessions()
        return holdings(session)

    def noted_numbers(self):
        return self.marks, self.outlasted


class Instance:
    entered = 0

    def __enter__(self):
        Instance.entered += 1
        return self

    def __exit__(self, *_):
        Instance.entered -= 1

    def add(self, value):
        return value + 1


def serve():
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR1)
    miniplug.serve({"service": Service(), "instance": Instance}, max_workers=WORKERS)


# -- what strikes


class Struck(Exception):
    """What some library's timeout raises."""


class Late(TimeoutError):
    """What most people's raises. No operation of the storm's does by itself."""


EXCEPTIONS = {each.__name__: each for each in (KeyboardInterrupt, Struck, Late)}


class Striker:
    """Strikes the main thread `left` times more. `raised` are the exceptions, as far as they are known."""

    def __init__(self, kind, chance, most):
        self.kind = kind
        self.most = most
        self.chance = chance
        self.left = 0
        self.raised = []
        self.reach = 0.0  # seconds; about how long the operation takes

    def moment(self):
        """How long until the next strike."""
        return self.chance.uniform(1e-6, 1e-6 + 1.5 * self.reach)

    def strikes(self):
        return min(self.most, self.chance.choices(range(1, 1 + MOST), [7, 2, 1][:MOST])[0])


class Timer(Striker):
    def __enter__(self):
        self.before = signal.signal(signal.SIGALRM, self.strike)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGALRM, self.before)

    def arm(self):
        self.left, self.raised = self.strikes(), []
        signal.setitimer(signal.ITIMER_REAL, self.moment())

    def strike(self, number, frame):
        if self.left > 0:
            self.left -= 1
            if self.left:
                signal.setitimer(signal.ITIMER_REAL, self.chance.choice([1e-6, 1e-5, 1e-4]))
            self.raised.append(self.kind(f"strike {len(self.raised)}"))
            raise self.raised[-1]

    def disarm(self):
        self.left = 0
        signal.setitimer(signal.ITIMER_REAL, 0)


class Async(Striker):
    """What it raises is made by the interpreter, out of its sight; and it ends no wait."""

    def __enter__(self):
        self.main = ctypes.c_ulong(threading.get_ident())
        self.gate = threading.Lock()  # protects `left`
        self.armed, self.over = threading.Event(), False
        self.starting = []  # when threads were started that do not run yet
        self.before = _thread.start_new_thread
        if sys.version_info < (3, 12):
            threading._start_new_thread = _thread.start_new_thread = self.start_new_thread
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over = True
        self.armed.set()
        self.thread.join()
        if sys.version_info < (3, 12):
            threading._start_new_thread = _thread.start_new_thread = self.before

    def start_new_thread(self, function, args, kwargs={}):  # noqa: B006 -- it is only read
        """There a thread that does not run yet has the id of the one that starts it, and would be struck instead."""
        begun = [time.monotonic()]

        def run():
            begun.clear()
            function(*args, **kwargs)

        self.starting.append(begun)
        return self.before(run, ())

    def may_strike(self):
        self.starting = [begun for begun in self.starting if begun and time.monotonic() < begun[0] + 0.1]
        return self.left > 0 and not self.starting

    def arm(self):
        self.left = self.strikes()
        self.armed.set()

    def run(self):
        while self.armed.wait() and not self.over:
            self.armed.clear()
            time.sleep(self.moment())
            while self.left > 0:
                with self.gate:
                    if self.may_strike():
                        self.left -= 1
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(self.main, ctypes.py_object(self.kind))
                time.sleep(self.chance.choice([0, 1e-6, 1e-4]))

    def disarm(self):
        with self.gate:
            self.left = 0
            ctypes.pythonapi.PyThreadState_SetAsyncExc(self.main, None)  # what has not struck yet


# -- the host


def where(error):
    """The lines of miniplug's that it passed through, the one that was struck first; and the same of what came before it."""
    found, traceback = [], error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if code.co_filename == miniplug.__file__:
            found.insert(0, f"{code.co_name}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    before = f", after {where(error.__context__)}" if error.__context__ is not None else ""
    return f"{type(error).__name__} in {' < '.join(found[:6]) or 'no line of miniplug'}{before}"


def of_condition(error):
    """Whether a strike has come as Python's own threading.Condition lets go of its lock, which tells that instead."""
    return type(error) is RuntimeError and "release un" in str(error) and type(error.__context__) in EXCEPTIONS.values()


class Storm:
    def __init__(self, plugin, striker, chance):
        self.plugin, self.striker, self.chance = plugin, striker, chance
        self.service = plugin.dispense("service")
        self.described = plugin.describe()
        self.kinds = [getattr(self, name) for name in sorted(dir(self)) if name.startswith("do_")]
        self.lent = []  # weak references to all that was lent
        self.step = self.beat = self.hits = self.done = self.slow = 0
        self.marked = set()  # the numbers of calls that were made
        self.given_up = set()  # and of those that were given up
        self.stray, self.strays = [], 0  # what was raised in finalizers, from where nothing can get to the caller
        self.endless, self.next, self.gap = None, 0, 0
        self.last_strikes = collections.deque(maxlen=6)  # in words
        self.now, self.lasts = "", {}  # the kind of operation that runs, and how long each takes

    def run(self, count, each, before):
        while self.hits < count:
            self.step += 1
            self.beat += 1
            kind = self.chance.choice(self.kinds)
            self.now = kind.__name__
            self.caught, self.failure = [], None
            self.striker.reach = self.lasts[self.now]
            begun = time.monotonic()
            self.struck(kind, 1 + MOST)
            lasted = time.monotonic() - begun
            if self.failure is not None:
                self.last_strikes.append([self.now, *map(where, self.striker.raised or self.caught)])
                raise self.failure
            self.slow += lasted > 0.9
            self.hits += bool(self.caught)
            self.gap += len(self.caught)
            self.done += not self.caught
            if not self.caught:
                self.lasts[self.now] += (lasted - self.lasts[self.now]) / 5
            self.account()
            if each and self.caught:
                self.check_left(before, PATIENCE + ENOUGH)

    def struck(self, kind, depth):
        """Do it once, under strikes. What strikes while another is noted is noted further out; there are fewer than levels."""
        if not depth:
            return self.do(kind)
        try:
            self.struck(kind, depth - 1)
        except self.striker.kind as error:
            self.striker.disarm()
            self.caught.append(error)

    def do(self, kind):
        try:
            self.striker.arm()
            kind()
        except self.striker.kind:
            raise
        except BaseException as error:
            self.striker.disarm()
            if of_condition(error):
                raise error.__context__ from None
            self.failure = error
        self.striker.disarm()

    def account(self):
        """All that was raised has come here, if only as what the next was raised in the midst of."""
        if self.caught or self.striker.raised:
            self.last_strikes.append([self.now, *map(where, self.striker.raised or self.caught)])
        known = [id(each) for each in self.stray]
        for error in self.caught:
            while error is not None:
                known.append(id(error))
                error = error.__context__
        lost = [error for error in self.striker.raised if id(error) not in known]
        if len(self.striker.raised) > 1 and len(lost) < len(self.striker.raised):
            lost = []  # `raise ... from None`, or an `except` that ends well: the caller was told of the other
        assert not lost, f"{self.now}: of {self.striker.raised} {lost} did not arrive, but {self.caught}"
        self.strays += len(self.stray)
        self.stray.clear()

    def lend(self, function):
        self.lent.append(weakref.ref(function))
        return function

    def value(self):
        size = self.chance.choice([0, 10, 5000, 70_000, 400_000])
        return [self.step, ("x", b"b" * size), {"text": "y" * (size // 10)}]

    def do_call(self):
        assert self.service.echo(self.step) == self.step

    def do_calls(self):
        for number in range(5):
            assert self.service.echo([number, self.step]) == [number, self.step]

    def do_value(self):
        value = self.value()
        assert self.service.echo(value) == value

    def do_deadline(self):
        value = self.value()
        assert self.service.echo.timeout(STUCK)(value) == value

    def do_pass_deadline(self):
        self.given_up.add(self.step)  # struck or not
        try:
            self.service.wait_for_cancel.timeout(0.001)(self.step)
        except miniplug.CallTimeout:
            return
        raise AssertionError("it had no deadline")

    def do_send_much(self):
        data = bytes([self.step % 256]) * 3_000_000
        assert self.service.sum(data) == zlib.crc32(data)

    def do_submit(self):
        calls = [self.service.echo.submit((number, self.step)) for number in range(5)]
        assert [call.result(STUCK) for call in calls] == [(number, self.step) for number in range(5)]

    def do_cancel(self):
        assert self.service.wait_for_cancel.submit(self.step).cancel()
        self.given_up.add(self.step)

    def do_mark(self):
        step = self.step
        assert self.service.mark(step) == step
        self.marked.add(step)

    def do_notify(self):
        self.service.mark.notify(-self.step)
        self.marked.add(-self.step)

    def do_callback(self):
        step = self.step
        assert self.service.each([1, 2, 3], self.lend(lambda value: value + step)) == [1 + step, 2 + step, 3 + step]

    def do_nest(self):
        def down(depth):
            return self.service.deep(depth, self.lend(down)) if depth > 0 else "bottom"

        assert down(3) == "bottom"

    def do_borrow(self):
        lent = self.service.lend(self.step)
        assert lent("value") == [self.step, "value"]

    def do_stream(self):
        assert list(self.service.count(200)) == list(range(200))

    def do_leave_stream(self):
        stream = self.service.count(100_000)
        assert [next(stream) for _ in range(self.chance.randrange(90))][:3] in ([], [0], [0, 1], [0, 1, 2])
        if self.step % 2:
            stream.close()

    def do_go_on_with_stream(self):
        """A strike in the midst of it may cost the item, or the stream; but never an item without a strike."""
        for _ in range(20):
            if self.endless is None:
                self.endless, self.next, self.gap = self.service.count(1 << 40), 0, 0
            item = next(self.endless, None)
            if item is None:
                assert self.gap, "the stream ended by itself"
                self.endless = None
            else:
                assert self.next <= item <= self.next + self.gap, (self.next, item, self.gap)
                self.next, self.gap = item + 1, 0

    def do_ping(self):
        assert self.plugin.ping(STUCK) >= 0

    def do_describe(self):
        assert self.plugin.describe() == self.described

    def do_dispense(self):
        assert self.plugin.dispense("instance").add(self.step) == self.step + 1

    # -- afterwards

    def tell_strikes(self):
        for operation, *strikes in self.last_strikes:
            print(f"struck in {operation}:", *strikes, sep="\n    ", file=sys.stderr)

    def check_all(self):
        """One of each, undisturbed, and as many calls at once as there are workers."""
        for kind in self.kinds * 3:
            self.step += 1
            self.beat += 1
            self.now = kind.__name__
            begun = time.monotonic()
            kind()
            self.lasts[self.now] = time.monotonic() - begun
        for number in range(300):
            assert self.service.echo(number) == number
        for call in [self.service.meet.submit() for _ in range(WORKERS)]:
            assert call.result(STUCK)
        marks, outlasted = self.service.noted_numbers()
        assert len(set(marks)) == len(marks), "a call was made twice"
        assert self.marked <= set(marks), "a call that was answered was not made"
        assert not self.given_up & set(outlasted), "the plugin was not told that a call was given up"

    def left(self):
        self.beat += 1
        gc.collect()
        session, = sessions()
        lent = sum(each() is not None for each in self.lent)
        return {"host": {**still_open(session), "lent": lent}, "plugin": self.service.left()}

    def check_left(self, before, seconds=STUCK):
        """Nothing is left of what was given up. (Where a finalizer itself was struck, that is the interpreter's to answer.)"""
        if self.endless is not None:
            self.endless.close()
        self.endless, self.caught, self.striker.raised = None, [], []  # a traceback holds what its frames do
        end = time.monotonic() + seconds
        while any(count > self.strays for side in self.left().values() for count in side.values()):
            assert time.monotonic() < end, f"left: {self.left()}, {self.holds()} of {before}; {self.strays} in finalizers"
            time.sleep(0.02)
        while not self.holds_no_more_than(before):
            assert time.monotonic() < end, f"held: {self.holds()}, before: {before}; {self.strays} in finalizers"
            time.sleep(0.02)

    def holds_no_more_than(self, before):
        return all(now["slots"] == then["slots"] and now["objects"] <= then["objects"] + self.strays
                   for now, then in zip(self.holds(), before))

    def steadily_holds(self):
        """What is held when all that just ended has."""
        looks = [None]
        while looks[-5:] != [looks[-1]] * 5:
            time.sleep(0.01)
            looks.append(self.holds())
        return looks[-1]

    def holds(self):
        gc.collect()
        session, = sessions()
        return holdings(session), self.service.holds()


def other_calls(service, over, errors):
    number = 0
    try:
        while not over.is_set():
            number += 1
            assert service.echo((number,)) == (number,)
            if number % 50 == 0:
                assert list(service.count(100)) == list(range(100))
    except BaseException as error:
        errors.append(error)
        raise


def watch(storm, plugin):
    """Ends this process if nothing goes on."""
    seen = None
    while True:
        time.sleep(STUCK * 1.2)
        if seen == storm.beat:
            print(f"STUCK in {storm.now}, step {storm.step}", file=sys.stderr)
            storm.tell_strikes()
            for session in sessions():
                print({name: getattr(session, name) for name in fields(session)}, file=sys.stderr)
            faulthandler.dump_traceback(all_threads=True)
            if hasattr(faulthandler, "register"):
                os.kill(plugin.pid, signal.SIGUSR1)
                time.sleep(1)
            os._exit(3)
        seen = storm.beat


def go_through(storm, options):
    """The storm, and what is good before and after it; returns how long it took."""
    over, errors = threading.Event(), []
    sys.unraisablehook = lambda what: storm.stray.append(what.exc_value)
    storm.check_all()
    before = storm.steadily_holds()
    if options.only:
        storm.kinds = [getattr(storm, f"do_{options.only}")]
    others = [threading.Thread(target=other_calls, args=(storm.service, over, errors)) for _ in range(2 * options.threads)]
    for thread in others:
        thread.start()
    threading.Thread(target=watch, args=(storm, storm.plugin), daemon=True).start()
    begun = time.monotonic()
    try:
        storm.run(options.count, options.each, before)
    finally:
        over.set()
    for thread in others:
        thread.join(STUCK)
        assert not thread.is_alive(), "another thread's call never returned"
    assert not errors, errors
    seconds = time.monotonic() - begun
    storm.check_left(before)
    storm.check_all()
    storm.check_left(before)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("how", choices=["timer", "async"])
    parser.add_argument("what", choices=EXCEPTIONS)
    parser.add_argument("count", type=int)
    parser.add_argument("--threads", action="store_true", help="two other threads call too")
    parser.add_argument("--only", help="one kind of operation, such as call or stream")
    parser.add_argument("--most", type=int, default=MOST, choices=range(1, 1 + MOST), help="strikes at one operation")
    parser.add_argument("--each", action="store_true", help="look after each strike what is left")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    if options.each and options.threads:
        parser.error("--each cannot tell what the other threads have open")
    print("seed", options.seed, flush=True)
    chance = random.Random(options.seed)
    striker = {"timer": Timer, "async": Async}[options.how](EXCEPTIONS[options.what], chance, options.most)
    with miniplug.launch(PROGRAM, stderr="inherit") as plugin, striker:
        storm = Storm(plugin, striker, chance)
        try:
            seconds = go_through(storm, options)
        except BaseException:
            storm.tell_strikes()
            raise
        assert plugin.running and plugin.restarts == 0
    print(f"{storm.hits} of {storm.hits + storm.done} were struck, {storm.slow} took more than 0.9 s; {seconds:.1f} s in all")


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main()
