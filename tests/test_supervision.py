"""A plugin that stays up: restarts, heartbeats, starting on demand, idling, and swapping a process for another."""

import asyncio
import gc
import glob
import os
import random
import sys
import threading
import time

import pytest
from conftest import TEMPORARY, WINDOWS, WORKSHOP, alive, freeze, run_python, until

import miniplug

posix = pytest.mark.skipif(WINDOWS, reason="it takes signals")

SHOP = """
    import os, time

    class Shop:
        configured = False

        def pid(self):
            return os.getpid()

        def configure(self):
            Shop.configured = True

        def ready(self):
            return Shop.configured

        def work(self, seconds=0.0):
            time.sleep(seconds)
            return os.getpid()

        def count(self, path):
            with open(path, "a") as file:
                file.write("x")
            os._exit(3)

        def die(self, status=3):
            os._exit(status)

        def numbers(self, count, pause=0.0):
            for number in range(count):
                time.sleep(pause)
                yield number

        def lend(self):
            return lambda: os.getpid()

        def keep(self, function):
            self.kept = function

        def drop(self):
            del self.kept

        def call(self, function):
            return function()
"""


@pytest.fixture
def shop(write):
    """A spec of a plugin whose state belongs to its process."""
    return write("shop.py", SHOP) + ":Shop"


def crash(proxy, status=3):
    with pytest.raises(miniplug.PluginCrashed) as caught:
        proxy.die(status)
    assert caught.value.exit_code == status
    return caught.value


def in_threads(count, function):
    """Run a function in threads, side by side, and give back what each returned or raised."""
    results = [None] * count

    def run(number):
        try:
            results[number] = function()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


# -- restarts

def test_after_a_crash_the_next_call_starts_it_anew(shop):
    with miniplug.launch(shop, max_restarts=3, stderr="discard") as plugin:
        proxy, first = plugin.dispense(), plugin.pid
        assert plugin.restarts == 0
        crash(proxy)
        assert not plugin.running and plugin.exit_code == 3 and plugin.pid is None and plugin.restarts == 0  # it is lazy
        second = proxy.pid()
        assert second != first and plugin.pid == second and plugin.running and plugin.exit_code is None
        assert plugin.restarts == 1
        assert plugin.dispense().pid() == second


def test_a_call_in_flight_fails_and_never_runs_twice(shop, tmp_path):
    with miniplug.launch(shop, max_restarts=9, stderr="discard") as plugin:
        proxy = plugin.dispense()
        calls = [proxy.work.submit(30) for _ in range(5)]
        with pytest.raises(miniplug.PluginCrashed) as caught:
            proxy.count(str(tmp_path / "runs"))
        assert set(caught.value.calls) == {"work", "count"}
        for call in calls:
            assert isinstance(call.exception(10), miniplug.PluginCrashed)
        assert proxy.pid() == plugin.pid
        assert (tmp_path / "runs").read_text() == "x" and plugin.restarts == 1


def test_a_call_that_comes_after_the_end_is_not_failed_with_those_before(shop):
    """By a second thread that ends the session: it is never among the calls of one that has ended."""

    class Calls(dict):
        def __setitem__(self, number, call):
            session.calls[number] = call
            session.end(EOFError())

    with miniplug.launch(shop, max_restarts=1, stderr="discard") as plugin:
        proxy, supervisor, session = plugin.dispense(), plugin._supervisor, plugin._supervisor.run.session
        crash(proxy)
        session.caller._calls = Calls()
        supervisor.open = session  # as if this call had looked just before the end
        assert proxy.pid.submit().result(30) == plugin.pid and plugin.restarts == 1


def test_past_the_limit_calls_raise_the_last_crash_until_start(shop):
    with miniplug.launch(shop, max_restarts=2, stderr="discard") as plugin:
        proxy = plugin.dispense()
        for status in (1, 2, 3):
            crash(proxy, status)
        for _ in range(2):
            with pytest.raises(miniplug.PluginCrashed) as caught:
                proxy.pid()
            assert caught.value.exit_code == 3 and caught.value.calls == []
            with pytest.raises(miniplug.PluginCrashed):
                proxy.pid.submit()
            with pytest.raises(miniplug.PluginCrashed):
                plugin.dispense()
        assert plugin.restarts == 2 and not plugin.running
        plugin.start()
        assert proxy.pid() == plugin.pid and plugin.restarts == 2
        crash(proxy)
        assert proxy.pid() == plugin.pid and plugin.restarts == 3  # start() has forgiven what was before


def test_an_error_past_the_limit_says_what_to_do(shop):
    with miniplug.launch(shop, max_restarts=1, restart_window=50, stderr="discard") as plugin:
        proxy = plugin.dispense()
        assert "start()" not in str(crash(proxy)) + str(crash(proxy))
        with pytest.raises(miniplug.PluginCrashed, match=r"start\(\) it again \(max_restarts=1 in 50 s\)"):
            proxy.pid()
    with miniplug.launch(shop, stderr="discard") as plugin:
        proxy = plugin.dispense()
        crash(proxy)
        with pytest.raises(miniplug.PluginCrashed, match=r"start\(\) it again \(max_restarts=0 in 60 s\)"):
            proxy.pid()


@pytest.mark.parametrize("how", ["wait", "running", "the crash itself", "close"])
def test_who_knows_that_it_has_ended_can_start_it(shop, monkeypatch, how):
    """However long what follows from the end takes: the start does not take the old session for a living one."""
    held = threading.Event()
    dispose = miniplug._Session.dispose

    def dispose_slowly(session):
        held.wait(1.0)
        dispose(session)

    with miniplug.launch(shop, stderr="discard") as plugin:
        proxy, pid, run = plugin.dispense(), plugin.pid, plugin._supervisor.run
        monkeypatch.setattr(miniplug._Session, "dispose", dispose_slowly)
        if how == "the crash itself":
            crash(proxy)
        elif how == "close":
            plugin.close()
        else:
            proxy.die.notify(7)
            until(lambda: not plugin.running) if how == "running" else plugin.wait()
        assert not plugin.running and plugin.pid is None
        if how == "wait":
            assert run.session.ended is not None and plugin._supervisor.state == "down"
        plugin.start()
        assert plugin.pid != pid and proxy.pid() == plugin.pid
        held.set()


def test_what_follows_from_an_end_holds_when_wait_returns(shop, monkeypatch):
    entered, held = threading.Event(), threading.Event()
    end = miniplug._Session.end

    def end_slowly(session, cause):
        entered.set()
        held.wait(30)
        end(session, cause)

    with miniplug.launch(shop, stderr="discard") as plugin:
        proxy = plugin.dispense()
        monkeypatch.setattr(miniplug._Session, "end", end_slowly)
        proxy.die.notify(7)
        assert entered.wait(30)
        until(lambda: not plugin.running)
        assert plugin.wait(0.05) == plugin.exit_code and not plugin._supervisor.run.ended.is_set()
        plugin._supervisor.notice()
        with pytest.raises(miniplug.PluginCrashed, match=r"exited with status 7; start\(\) it again"):
            plugin._supervisor.session()
        held.set()
        assert plugin.wait() == 7 and plugin._supervisor.state == "down"


def test_wait_tells_of_the_process_that_it_waited_for(shop, monkeypatch):
    with miniplug.launch(shop, stderr="discard") as plugin:
        run = plugin._supervisor.run
        ended = run.ended.wait

        def wait(seconds):
            assert ended(30)
            monkeypatch.undo()
            plugin.start()  # as another thread does just then
            return True

        plugin.dispense().die.notify(7)
        monkeypatch.setattr(run.ended, "wait", wait)
        assert plugin.wait() == 7 and plugin.running
        assert plugin.wait(-1) is None and plugin.wait(0) is None  # a deadline that has passed is no endless one


def test_restarts_outside_the_window_do_not_count(shop):
    with miniplug.launch(shop, max_restarts=1, restart_window=600, stderr="discard") as plugin:
        proxy = plugin.dispense()
        crash(proxy)
        assert proxy.pid() and plugin.restarts == 1
        plugin._supervisor.tries = [each - 601 for each in plugin._supervisor.tries]  # as if time had passed
        crash(proxy)
        assert proxy.pid() and plugin.restarts == 2
        crash(proxy)
        with pytest.raises(miniplug.PluginCrashed):
            proxy.pid()


def test_pauses_grow(shop, monkeypatch):
    monkeypatch.setattr(miniplug, "_PAUSE", 0.05)
    with miniplug.launch(shop, max_restarts=4, stderr="discard") as plugin:
        proxy, pauses = plugin.dispense(), []
        for _ in range(4):
            crash(proxy)
            begun = time.monotonic()
            proxy.pid()
            pauses.append(time.monotonic() - begun)
        assert pauses[1] >= 0.08 and pauses[2] >= 0.18 and pauses[3] >= 0.38


def test_calls_made_in_the_pause_wait_with_their_deadlines_running(shop, monkeypatch):
    monkeypatch.setattr(miniplug, "_PAUSE", 600.0)
    with miniplug.launch(shop, max_restarts=3, stderr="discard") as plugin:
        proxy = plugin.dispense()
        crash(proxy)
        begun = time.monotonic()
        for attempt in (proxy.pid.timeout(0.1), lambda: proxy.pid.timeout(0.1).submit().result(30),
                        lambda: plugin.ping(0.1), lambda: proxy.pid.timeout(0.1).notify()):
            with pytest.raises(miniplug.CallTimeout) as caught:
                attempt()
            assert caught.value.seconds == 0.1 and caught.value.method in ("pid", "ping")
        assert time.monotonic() - begun < 5
        call, given_up, late = proxy.pid.submit(), proxy.pid.submit(), proxy.pid.timeout(0.1).submit()
        assert not call.done() and given_up.cancel()
        assert isinstance(late.exception(30), miniplug.CallTimeout) and not call.done()
        waiting = threading.Thread(target=proxy.pid)
        waiting.start()
        assert not call.done() and plugin.restarts == 0
        plugin.start()  # cuts the pause short
        assert call.result(30) == plugin.pid == proxy.pid()
        waiting.join(30)
        assert not waiting.is_alive()


def test_close_cuts_the_pause_short(shop, monkeypatch):
    monkeypatch.setattr(miniplug, "_PAUSE", 600.0)
    with miniplug.launch(shop, max_restarts=3, stderr="discard") as plugin:
        proxy = plugin.dispense()
        crash(proxy)
        call = proxy.pid.submit()
        results = []
        waiting = threading.Thread(target=lambda: results.extend(in_threads(3, proxy.pid)))
        waiting.start()
        until(lambda: plugin._supervisor.start is not None)
        plugin.close()
        assert isinstance(call.exception(10), miniplug.PluginClosed)
        waiting.join(10)
        assert [type(each) for each in results] == [miniplug.PluginClosed] * 3


def test_many_threads_that_hit_one_crash_make_one_restart(shop):
    starts = []
    with miniplug.launch(shop, max_restarts=100, stderr="discard", on_start=lambda plugin: starts.append(plugin.pid)) as plugin:
        proxy = plugin.dispense()
        for number in range(1, 4):
            begun = threading.Barrier(17)

            def call(begun=begun):
                begun.wait()
                try:
                    return proxy.work(0.01)
                except miniplug.PluginCrashed:
                    return proxy.work()  # it was in flight

            def end(begun=begun):
                begun.wait()
                try:
                    proxy.die()
                except miniplug.PluginCrashed:
                    pass

            killer = threading.Thread(target=end)
            killer.start()
            results = in_threads(16, call)
            killer.join()
            assert proxy.pid() == plugin.pid  # those threads may all have been quicker than the crash
            assert len(starts) == number + 1 and plugin.restarts == number and set(results) <= set(starts[-2:])


def test_a_start_that_fails_fails_those_who_wait_for_it_and_counts(write, monkeypatch):
    path = write("shop.py", SHOP)
    with miniplug.launch(path + ":Shop", max_restarts=2, stderr="discard") as plugin:
        proxy = plugin.dispense()
        crash(proxy)
        os.rename(path, path + ".away")
        results = []
        waiting = threading.Thread(target=lambda: results.extend(in_threads(8, proxy.pid)))
        go, start = threading.Event(), miniplug._Run.open
        monkeypatch.setattr(miniplug._Run, "open", lambda self: go.wait(30) and start(self))
        calls = [proxy.pid.submit() for _ in range(8)]
        waiting.start()
        until(lambda: len(plugin._supervisor.news._waiters) == 16)
        go.set()
        waiting.join(30)
        results += [call.exception(30) for call in calls]
        assert [type(each) for each in results] == [miniplug.LaunchError] * 16
        with pytest.raises(miniplug.LaunchError):
            proxy.pid()
        with pytest.raises(miniplug.PluginCrashed) as caught:
            proxy.pid()
        assert caught.value.exit_code == 3 and plugin.restarts == 0
        os.rename(path + ".away", path)
        with pytest.raises(miniplug.PluginCrashed):
            proxy.pid()
        plugin.start()
        assert proxy.pid() == plugin.pid


def test_a_notification_and_a_description_start_it_too(shop, monkeypatch):
    monkeypatch.setattr(miniplug, "_PAUSE", 0.0)
    with miniplug.launch(shop, max_restarts=9, stderr="discard") as plugin:
        proxy = plugin.dispense()
        crash(proxy)
        proxy.configure.notify()
        until(proxy.ready)
        crash(proxy)
        assert "pid" in plugin.describe()["shop"]
        crash(proxy)
        assert plugin.ping() < 5
        crash(proxy)
        assert plugin.info == {} and plugin.protocol_version == 1 and plugin.restarts == 4


def test_asyncio_is_not_blocked_while_it_restarts(shop, monkeypatch):
    monkeypatch.setattr(miniplug, "_PAUSE", 0.3)

    async def main():
        async with miniplug.Plugin(shop, max_restarts=3, stderr="discard") as plugin:
            proxy = await asyncio.get_running_loop().run_in_executor(None, plugin.dispense)
            with pytest.raises(miniplug.PluginCrashed):
                await proxy.die.submit()
            ticks = 0
            calls = [asyncio.ensure_future(asyncio.wrap_future(proxy.pid.submit())) for _ in range(20)]
            while not all(call.done() for call in calls):
                ticks += 1
                await asyncio.sleep(0.01)
            assert ticks > 10 and {call.result() for call in calls} == {plugin.pid}
            stream = await proxy.numbers.submit(3)
            assert [number async for number in stream] == [0, 1, 2]

    asyncio.run(main())


def test_asyncio_can_close_what_all_threads_of_the_loop_wait_for(shop):
    async def main():
        loop = asyncio.get_running_loop()
        async with miniplug.Plugin(shop) as plugin:
            proxy = plugin.dispense()
            calls = [loop.run_in_executor(None, proxy.work, 60) for _ in range(40)]  # more than it has threads
            until(lambda: len(plugin._supervisor.run.session.calls) > 4)
            await asyncio.wait_for(plugin.aclose(0.1), 20)
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(end) for end in ends} == {miniplug.PluginClosed}

    asyncio.run(main())


# -- on_start

def test_on_start_runs_after_every_start_before_other_calls_get_through(shop):
    held, go, seen = threading.Event(), threading.Event(), []
    go.set()
    proxies = []

    def on_start(plugin):
        assert plugin.running and plugin.pid is not None
        held.set()
        assert go.wait(30)
        proxy = proxies[0] if proxies else plugin.dispense()  # an old one works as well as a new one
        assert proxy.ready() is False
        proxy.configure()
        seen.append(plugin.dispense().pid())

    with miniplug.launch(shop, max_restarts=9, stderr="discard", on_start=on_start) as plugin:
        proxy = plugin.dispense()
        proxies.append(proxy)
        assert proxy.ready() and seen == [plugin.pid]
        for number in range(2, 4):
            crash(proxy)
            held.clear()
            go.clear()
            results = []
            waiting = threading.Thread(target=lambda results=results: results.extend(in_threads(4, proxy.ready)))
            waiting.start()
            call = proxy.ready.submit()
            assert held.wait(30)
            with pytest.raises(miniplug.CallTimeout):
                proxy.ready.timeout(0.05)()
            with pytest.raises(miniplug.CallTimeout):
                plugin.ping(0.05)
            assert not results and not call.done()
            go.set()
            waiting.join(30)
            assert results == [True] * 4 and call.result(30) is True and len(seen) == number
        plugin.close()
        plugin.start()
        assert len(seen) == 4 and proxy.ready()


def test_when_on_start_raises_whoever_started_it_gets_that_and_the_process_is_ended(shop):
    fail, pids, exits = [True], [], []

    def on_start(plugin):
        pids.append(plugin.pid)
        if fail:
            raise LookupError("no configuration")

    with pytest.raises(LookupError, match="no configuration"):
        miniplug.launch(shop, on_start=on_start, stderr="discard")
    assert len(pids) == 1 and not alive(pids[0])
    plugin = miniplug.Plugin(shop, on_start=on_start, on_exit=exits.append, max_restarts=2, stderr="discard")
    with pytest.raises(LookupError):
        plugin.dispense()  # on first use as well
    assert not plugin.running and plugin.pid is None
    fail.clear()
    with plugin:
        proxy = plugin.dispense()
        crash(proxy)
        fail.append(True)
        with pytest.raises(LookupError):
            proxy.pid()
        fail.clear()
        assert proxy.pid() == plugin.pid and plugin.restarts == 1
        until(lambda: exits == [plugin])  # for the crash alone
    assert not any(map(alive, pids))


def test_a_crash_in_on_start_fails_the_start_even_if_on_start_hides_it(shop):
    def on_start(plugin):
        with pytest.raises(miniplug.PluginCrashed):
            plugin.dispense().die()
        with pytest.raises(miniplug.PluginCrashed):
            plugin.dispense()

    with pytest.raises(miniplug.PluginCrashed):
        miniplug.launch(shop, on_start=on_start, stderr="discard")


def test_on_start_may_close_it_but_not_restart_it(shop):
    def close(plugin):
        plugin.start()  # it has
        plugin.close()

    with pytest.raises(miniplug.PluginClosed):
        miniplug.launch(shop, on_start=close)
    with pytest.raises(RuntimeError, match="on_start"):
        miniplug.launch(shop, on_start=lambda plugin: plugin.restart())


@pytest.mark.parametrize("end", ["close", "kill"])
def test_calls_that_wait_for_an_on_start_that_hangs_end_with_the_plugin(shop, end):
    """Only then can one end that on_start waits for."""
    held, waiting = threading.Event(), []

    def on_start(plugin):
        if held.is_set():
            return
        call = threading.Thread(target=lambda: waiting.extend(in_threads(1, plugin.dispense)))
        call.start()
        until(lambda: plugin._supervisor.start is not None)
        held.set()
        call.join(30)

    plugin = miniplug.Plugin(shop, on_start=on_start)
    starting = threading.Thread(target=in_threads, args=(1, plugin.start))
    starting.start()
    assert held.wait(30) and not waiting
    begun = time.monotonic()
    getattr(plugin, end)()
    starting.join(10)
    assert time.monotonic() - begun < 5
    until(lambda: [type(each) for each in waiting] == [miniplug.PluginClosed])
    with plugin:
        assert plugin.dispense().pid() == plugin.pid


def test_what_on_starts_calls_call_back_gets_through(shop):
    """In whatever thread it runs."""
    seen = []

    def on_start(plugin):
        proxy = plugin.dispense()

        def back():
            with pytest.raises(RuntimeError, match="on_start"):
                plugin.restart()
            return [plugin.start().pid, proxy.pid(), plugin.dispense().pid(), proxy.pid.submit().result(10)]

        seen.append([proxy.call(back), proxy.call.submit(back).result(10)])

    with miniplug.launch(shop, on_start=on_start) as plugin:
        assert seen == [[[plugin.pid] * 4] * 2]
        plugin.restart()
        assert seen[1:] == [[[plugin.pid] * 4] * 2]


def test_on_start_that_raises_stop_iteration(shop):
    """An asyncio future takes none: whoever awaited the start would wait for ever."""
    plugin = miniplug.Plugin(shop, on_start=lambda plugin: next(iter(())))

    async def main():
        with pytest.raises(RuntimeError, match="on_start raised StopIteration"):
            await asyncio.wait_for(plugin.astart(), 20)

    asyncio.run(main())
    with pytest.raises(RuntimeError, match="on_start raised StopIteration"):
        plugin.dispense()


# -- on_exit

def test_on_exit_is_called_once_for_each_end_that_nobody_asked_for(shop):
    exits = []

    def on_exit(plugin):
        exits.append((plugin.running, plugin.exit_code, threading.current_thread().name.startswith("miniplug")))

    with miniplug.launch(shop, max_restarts=9, stderr="discard", on_exit=on_exit, idle_timeout=5) as plugin:
        proxy = plugin.dispense()
        for status in (3, 4):
            crash(proxy, status)
            until(lambda status=status: exits[-1:] == [(False, status, True)])
            proxy.pid()
        plugin.restart()
        plugin.close()
        plugin.start()
        plugin.kill()
    assert len(exits) == 2


def test_what_on_exit_raises_is_logged_and_it_may_start_the_plugin(shop, caplog):
    started = threading.Event()

    def on_exit(plugin):
        plugin.start()
        started.set()
        raise LookupError("in on_exit")

    with miniplug.launch(shop, stderr="discard", on_exit=on_exit) as plugin:
        crash(plugin.dispense())
        assert started.wait(30) and plugin.running
        until(lambda: "on_exit raised" in caplog.text)
        assert "in on_exit" in caplog.text
        plugin._on_exit = None


# -- heartbeat

@pytest.mark.parametrize("moment", ["idle", "in a call", "in a stream", "holding the GIL"])
def test_what_does_not_answer_is_killed_and_starts_again(shop, moment):
    exits = []
    spec = WORKSHOP if moment == "holding the GIL" else shop
    with miniplug.launch(spec, max_restarts=3, heartbeat=0.6, on_exit=exits.append, stderr="discard") as plugin:
        proxy, pid = plugin.dispense(), plugin.pid
        begun = time.monotonic()
        if moment == "idle":
            freeze(pid)
        elif moment == "holding the GIL":
            with pytest.raises(miniplug.PluginCrashed, match=r"no ping for 0\.6 s during stick") as caught:
                proxy.stick()
            assert (caught.value.signal_name, plugin.exit_code) == ((None, 1) if WINDOWS else ("SIGKILL", -9))
        elif moment == "in a call":
            call = proxy.work.submit(60)
            freeze(pid)
            with pytest.raises(miniplug.PluginCrashed, match=r"no ping for 0\.6 s"):
                proxy.pid()
            assert isinstance(call.exception(1), miniplug.PluginCrashed)
        else:
            stream = proxy.numbers(3, 0.1)
            assert next(stream) == 0
            freeze(pid)
            with pytest.raises(miniplug.PluginCrashed, match="no ping"):
                list(stream)
        until(lambda: not plugin.running)
        assert time.monotonic() - begun < 5
        until(lambda: exits == [plugin])
        assert proxy.pid() != pid and plugin.restarts == 1


def test_a_busy_plugin_is_not_declared_dead(shop):
    with miniplug.launch(WORKSHOP, heartbeat=0.5, stderr="discard") as plugin:
        proxy, pid = plugin.dispense(), plugin.pid
        spinning = proxy.spin.submit()
        assert proxy.sleep(1.5) == 1.5 and plugin.pid == pid
        assert not spinning.done()
        plugin.kill()
    with miniplug.launch([sys.executable, "-c", "import miniplug, time\nminiplug.serve({'p': time}, max_workers=1)"],
                         heartbeat=0.5, env={"PYTHONPATH": os.path.dirname(miniplug.__file__)}) as plugin:
        proxy, pid = plugin.dispense(), plugin.pid
        for call in [proxy.sleep.submit(0.4) for _ in range(3)]:  # one after the other
            assert call.result(30) is None
        assert plugin.pid == pid


@posix
def test_a_host_that_stood_still_does_not_blame_the_plugin(write, shop):
    """Stopped for many heartbeats, and going on, the host finds the answer late, and the plugin well."""
    script = write("host.py", f"""
        import os, signal, subprocess, sys, time
        import miniplug

        with miniplug.launch({shop!r}, heartbeat=0.5) as plugin:
            proxy, pid = plugin.dispense(), plugin.pid
            for _ in range(3):
                waker = subprocess.Popen(["/bin/sh", "-c", f"sleep 0.7; kill -CONT {{os.getpid()}}"])
                os.kill(os.getpid(), signal.SIGSTOP)
                waker.wait()
            time.sleep(0.5)
            assert plugin.pid == pid == proxy.pid()
            print("well")
    """)
    assert run_python(script) == (0, "well\n", "")


def test_a_host_that_stood_still_several_times_before_it_could_read_the_answer(shop, monkeypatch):
    """However long that was, each time counts as a quarter of the heartbeat."""
    rounds = []

    class Gone:
        def wait(self, seconds):
            rounds.append(seconds)
            return len(rounds) > 3

    with miniplug.launch(shop, heartbeat=1000) as plugin:
        run, proxy = plugin._supervisor.run, plugin.dispense()
        monkeypatch.setattr(run.session, "probe", lambda: False)
        monkeypatch.setattr(run, "gone", Gone())
        run._mind(run.session)
        monkeypatch.undo()
        assert rounds == [250] * 4 and not run._why and proxy.pid() == plugin.pid


def test_heartbeats_do_not_keep_what_is_closed(shop):
    def minders():
        return [thread for thread in threading.enumerate() if thread.name == "miniplug-mind"]

    with miniplug.launch(shop, heartbeat=5, idle_timeout=600) as plugin:
        assert plugin.dispense().pid() == plugin.pid
        assert len(minders()) == 1
    until(lambda: not minders())


def test_two_alarms_of_the_same_moment(shop):
    """Clocks are coarse on some platforms."""
    with miniplug.launch(shop) as one, miniplug.launch(shop) as other:
        for plugin in (one, other):
            miniplug._pool.alarm(time.monotonic() // 1 + 600, plugin.close)
        assert one.ping() + other.ping() < 10


def test_a_plugin_in_this_process_has_a_heartbeat_too():
    with miniplug.local({"clock": time}, heartbeat=0.5) as plugin:
        plugin.dispense().sleep(0.8)
        assert plugin.running


# -- on demand

def test_one_that_was_only_made_starts_once_on_first_use(shop):
    starts = []
    plugin = miniplug.Plugin(shop, on_start=lambda plugin: starts.append(plugin.pid))
    assert not plugin.running and plugin.pid is None and plugin.exit_code is None and plugin.restarts == 0
    pids = in_threads(16, lambda: plugin.dispense().pid())
    assert starts == [plugin.pid] and set(pids) == {plugin.pid}
    plugin.close()


def test_a_first_use_that_fails_fails_all_who_waited_and_the_next_tries_again(write):
    path = write("late.py", "raise SystemExit('not now')")
    plugin = miniplug.Plugin(path + ":Late", stderr="discard")
    assert {type(each) for each in in_threads(8, plugin.dispense)} == {miniplug.LaunchError}
    write("late.py", SHOP.replace("Shop", "Late"))
    with plugin:
        assert plugin.dispense().pid() == plugin.pid


def test_an_idle_plugin_is_closed_and_starts_on_the_next_call(shop):
    exits = []
    with miniplug.launch(shop, idle_timeout=0.2, on_exit=exits.append) as plugin:
        proxy = plugin.dispense()
        first, begun = proxy.pid(), time.monotonic()
        until(lambda: not plugin.running)
        assert time.monotonic() - begun >= 0.2 and plugin.pid is None and plugin.exit_code == 0
        second = proxy.pid()
        assert second != first and plugin.pid == second and plugin.restarts == 0
        until(lambda: not plugin.running)
        assert proxy.pid.submit().result(30) not in (first, second)
        until(lambda: not plugin.running)
        assert plugin.dispense().pid() == plugin.pid
        assert exits == []


def test_what_is_under_way_keeps_it_up(shop):
    """A call, a stream, a reference either way: as long as there is one, it is not idle."""
    with miniplug.launch(shop, idle_timeout=0.1) as plugin:
        proxy, pid = plugin.dispense(), plugin.pid
        assert proxy.work(0.5) == pid

        stream = proxy.numbers(2)
        until_later(0.4)
        assert list(stream) == [0, 1] and plugin.pid == pid

        function = proxy.lend()
        until_later(0.4)
        assert function() == pid
        del function
        gc.collect()

        proxy.keep(lambda: None)  # the plugin holds it
        until_later(0.4)
        assert proxy.pid() == pid
        proxy.drop()
        until(lambda: not plugin.running)


def until_later(seconds):
    end = time.monotonic() + seconds
    until(lambda: time.monotonic() > end)


def test_no_call_is_lost_to_the_idle_timeout(shop):
    """Calls that come just when it is being closed start it again."""
    with miniplug.launch(shop, idle_timeout=0.04) as plugin:
        proxy, pids = plugin.dispense(), set()
        end = time.monotonic() + 1.5

        def call():
            dice = random.Random(threading.get_ident())
            while time.monotonic() < end or len(pids) < 2:  # on a busy machine it is idle later
                pids.add(proxy.pid() if dice.random() < 0.5 else proxy.pid.submit().result(30))
                time.sleep(dice.uniform(0.03, 0.08))
            return "done"

        assert in_threads(2, call) == ["done"] * 2


def test_what_has_crashed_is_not_closed_as_idle(shop):
    with miniplug.launch(shop, idle_timeout=60, stderr="discard") as plugin:
        proxy, run = plugin.dispense(), plugin._supervisor.run
        crash(proxy)
        plugin._supervisor.retire(run)  # as when it was found idle just before
        with pytest.raises(miniplug.PluginCrashed):
            proxy.pid()


# -- restart

def test_restart_under_load_loses_and_refuses_nothing(shop):
    with miniplug.launch(shop, stderr="discard") as plugin:
        proxy, stop = plugin.dispense(), threading.Event()
        seen = [[] for _ in range(8)]

        def work(mine):
            dice = random.Random(id(mine))
            while not stop.is_set():
                choice = dice.randrange(6)
                if choice == 0:
                    assert list(proxy.numbers(100)) == list(range(100))
                elif choice == 1:
                    assert proxy.lend()() > 0
                elif choice == 2:
                    mine.append(proxy.work.submit(0.002).result(30))
                elif choice == 3:
                    mine.append(plugin.dispense().pid())
                else:
                    mine.append(proxy.work(0.0 if choice == 4 else 0.001))
            return "done"

        results = []
        workers = [threading.Thread(target=lambda mine=mine: results.extend(in_threads(1, lambda: work(mine)))) for mine in seen]
        for worker in workers:
            worker.start()
        pids = [plugin.pid]
        for _ in range(5):
            assert plugin.restart() is plugin
            pids.append(plugin.pid)
            count = [len(mine) for mine in seen]
            until(lambda count=count: all(len(mine) > before for mine, before in zip(seen, count)), 30)
            assert {mine[-1] for mine in seen} <= set(pids[-2:])
        stop.set()
        for worker in workers:
            worker.join(30)
        assert results == ["done"] * 8
        assert len(set(pids)) == 6 and plugin.restarts == 0
        assert {pid for mine in seen for pid in mine} <= set(pids)
        gc.collect()
        until(lambda: [pid for pid in pids if alive(pid)] == [plugin.pid])  # the others are drained


def test_restart_lets_the_old_process_finish_what_is_there(shop):
    with miniplug.launch(shop) as plugin:
        proxy, old = plugin.dispense(), plugin.pid
        call, function, stream = proxy.work.submit(0.5), proxy.lend(), proxy.numbers(200, 0.002)
        assert next(stream) == 0
        plugin.restart()
        assert proxy.pid() == plugin.pid != old
        assert function() == old and list(stream) == list(range(1, 200)) and call.result(10) == old
        until_later(0.2)
        assert function() == old  # a live reference keeps it
        miniplug.release(function)
        until(lambda: not alive(old))
        assert proxy.pid() == plugin.pid


def test_what_restart_cuts_off(shop):
    exits = []
    with miniplug.launch(shop, on_exit=exits.append) as plugin:
        proxy = plugin.dispense()
        call, function, stream = proxy.work.submit(60), proxy.lend(), proxy.numbers(10, 10.0)
        begun = time.monotonic()
        plugin.restart(drain=0.2)
        with pytest.raises(miniplug.PluginClosed):
            call.result(10)
        with pytest.raises(miniplug.PluginClosed):
            next(stream)
        assert time.monotonic() - begun < 5
        with pytest.raises(miniplug.DeadReference):
            function()
        assert proxy.pid() == plugin.pid and exits == []


def test_close_ends_what_is_being_drained_too(shop):
    plugin = miniplug.launch(shop)
    proxy, pids = plugin.dispense(), []
    calls = []
    for _ in range(3):
        calls.append(proxy.work.submit(60))
        pids.append(plugin.pid)
        plugin.restart()
    begun = time.monotonic()
    plugin.close(grace=0.5)
    assert time.monotonic() - begun < 2.5
    assert [type(call.exception(1)) for call in calls] == [miniplug.PluginClosed] * 3
    assert not any(map(alive, pids))


def test_on_start_in_restart_sees_the_new_process_and_the_others_the_old_one(shop):
    held, go, seen = threading.Event(), threading.Event(), []
    proxies = []

    def on_start(plugin):
        if proxies:
            held.set()
            assert go.wait(30)
            assert proxies[0].ready() is False
            proxies[0].configure()
            seen.append((plugin.pid, proxies[0].pid(), plugin.dispense().pid(), proxies[0].pid.submit().result(30)))

    with miniplug.launch(shop, on_start=on_start) as plugin:
        proxy, old = plugin.dispense(), plugin.pid
        proxies.append(proxy)
        restarting = threading.Thread(target=plugin.restart)
        restarting.start()
        assert held.wait(30)
        for _ in range(3):
            assert proxy.pid() == plugin.dispense().pid() == proxy.pid.submit().result(30) == plugin.pid == old
        assert proxy.ready() is False
        go.set()
        restarting.join(30)
        new = plugin.pid
        assert new != old and seen == [(new, new, new, new)] and proxy.pid() == new and proxy.ready()


def test_when_the_new_process_does_not_come_up_the_old_one_stays(write):
    path = write("shop.py", SHOP)
    fail = []

    def on_start(plugin):
        if fail:
            proxy.pid()
            raise LookupError

    with miniplug.launch(path + ":Shop", stderr="discard", on_start=on_start) as plugin:
        proxy, pid = plugin.dispense(), plugin.pid
        call = proxy.work.submit(0.5)
        fail.append(True)
        with pytest.raises(LookupError):
            plugin.restart()
        assert proxy.pid() == pid == plugin.pid
        os.rename(path, path + ".away")
        with pytest.raises(miniplug.LaunchError):
            plugin.restart()
        assert call.result(10) == proxy.pid() == pid


def test_restart_starts_what_does_not_run(shop):
    plugin = miniplug.Plugin(shop, stderr="discard")
    proxy = plugin.restart().dispense()
    crash(proxy)
    plugin.restart()
    assert proxy.pid() == plugin.pid and plugin.restarts == 0
    plugin.close()
    with plugin.restart():
        assert proxy.pid() == plugin.pid


def test_a_crash_while_it_is_replaced_is_made_up_for_by_the_new_process(shop):
    held, go = threading.Event(), threading.Event()

    def on_start(plugin):
        if held.is_set():
            assert go.wait(30)

    with miniplug.launch(shop, on_start=on_start, stderr="discard", max_restarts=1) as plugin:
        proxy = plugin.dispense()
        held.set()
        restarting = threading.Thread(target=plugin.restart)
        restarting.start()
        until(lambda: plugin._supervisor.start.session is not None)
        crash(proxy)
        call = proxy.pid.submit()
        assert not call.done()
        go.set()
        restarting.join(30)
        assert call.result(30) == plugin.pid and plugin.restarts == 0


def test_instances_stay_with_their_proxies_over_a_restart(write):
    path = write("counter.py", """
        class Counter:
            def __init__(self):
                self.count = 0

            def add(self):
                self.count += 1
                return self.count
    """)
    proxies = []

    def on_start(plugin):
        for proxy in proxies:
            assert proxy.add() == 1  # replayed into the instance that it keeps

    with miniplug.launch(path + ":Counter", on_start=on_start) as plugin:
        proxies += [plugin.dispense(), plugin.dispense()]
        assert proxies[0].add() == 1 and proxies[0].add() == 2
        plugin.restart()
        assert [proxy.add() for proxy in proxies] == [2, 2]


# -- all of it at once

def test_start_close_restart_crash_and_calls_at_once_neither_hang_nor_leak(shop):
    plugin = miniplug.Plugin(shop, stderr="discard", max_restarts=1000, heartbeat=5, idle_timeout=0.05)
    proxy = plugin.start().dispense()
    end = time.monotonic() + 2.5
    allowed = (miniplug.PluginCrashed, miniplug.PluginClosed, miniplug.DeadReference, miniplug.LaunchError, miniplug.CallTimeout)

    def act():
        dice = random.Random(threading.get_ident())
        acts = [lambda: plugin.start(), lambda: plugin.close(0.2), lambda: plugin.restart(0.1), plugin.kill, proxy.die,
                lambda: proxy.lend()(), lambda: list(proxy.numbers(10)), proxy.pid.timeout(0.05), proxy.pid.notify,
                lambda: proxy.pid.submit().result(20), lambda: plugin.dispense().pid(), lambda: time.sleep(0.1)]
        weights = [6, 1, 2, 1, 2, 5, 5, 5, 5, 5, 5, 3]
        while time.monotonic() < end:
            try:
                dice.choices(acts, weights)[0]()
            except allowed:
                pass
        return "done"

    assert in_threads(8, act) == ["done"] * 8
    plugin.start()
    assert proxy.pid() == plugin.pid
    plugin.close()


def test_the_host_may_exit_at_any_of_these_moments(write, shop):
    script = write("host.py", f"""
        import sys, threading
        import miniplug

        miniplug._PAUSE = 600
        plugin = miniplug.launch({shop!r}, max_restarts=3, heartbeat=1, idle_timeout=600, stderr="discard")
        proxy = plugin.dispense()
        print(plugin.pid)
        calls = [proxy.work.submit(60)]
        plugin.restart()
        print(plugin.pid)
        other = miniplug.launch({shop!r}, max_restarts=3, stderr="discard")
        thing = other.dispense()
        print(other.pid)
        try:
            thing.die()
        except miniplug.PluginCrashed:
            calls.append(thing.pid.submit())  # waits in the pause
        configured = threading.Event()

        def on_start(plugin):
            print(plugin.pid, flush=True)
            configured.set()
            threading.Event().wait()

        third = miniplug.Plugin({shop!r}, on_start=on_start)
        threading.Thread(target=third.start, daemon=True).start()
        configured.wait()
        sys.stdout.flush()
    """)
    begun = time.monotonic()
    status, out, err = run_python(script)
    assert (status, err) == (0, "") and time.monotonic() - begun < 15
    pids = [int(line) for line in out.split()]
    assert len(pids) == 4
    until(lambda: not any(map(alive, pids)))


def test_no_folder_is_left_where_the_host_exits_while_a_thread_starts_a_plugin(write):
    """That thread stops in its tracks: nothing may be left to it."""
    script = write("host.py", """
        import sys, threading
        import miniplug

        plugin = miniplug.Plugin([sys.executable, "-c", "import time; time.sleep(600)"])
        threading.Thread(target=plugin.start, daemon=True).start()
        while plugin.pid is None:
            pass
    """)
    folders = os.path.join(TEMPORARY, "miniplug-*")
    before = {*glob.glob(folders)}  # what another module's tests have killed by hand
    for _ in range(3):
        status, _, err = run_python(script)
        assert (status, err) == (0, "")
        until(lambda: {*glob.glob(folders)} <= before)  # a guardian is about to remove it


@pytest.mark.parametrize("options", [{"heartbeat": -0.1}, {"idle_timeout": -1}, {"restart_window": "soon"},
                                     {"heartbeat": float("nan")}])
def test_what_is_no_number_of_seconds_is_refused(shop, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        miniplug.Plugin(shop, **options)


@pytest.mark.parametrize("restarts", [None, -1, "3", 1.5, True])
def test_what_is_no_number_of_restarts_is_refused(shop, restarts):
    with pytest.raises(ValueError, match="max_restarts"):
        miniplug.Plugin(shop, max_restarts=restarts)


@pytest.mark.parametrize("option", ["on_start", "on_exit"])
def test_what_is_no_function_is_refused(shop, option):
    with pytest.raises(TypeError, match=f"{option}='configure': it is a function"):
        miniplug.Plugin(shop, **{option: "configure"})


@pytest.mark.parametrize("seconds", ["2", float("nan"), -1])
def test_what_is_no_time_to_end_in_is_refused_before_anything_ends(shop, seconds):
    with miniplug.launch(shop) as plugin:
        proxy, pid = plugin.dispense(), plugin.pid
        with pytest.raises(ValueError, match="drain"):
            plugin.restart(seconds)
        with pytest.raises(ValueError, match="grace"):
            plugin.close(seconds)
        assert proxy.pid() == pid


def test_no_limit_to_the_time_to_end_in(shop):
    with miniplug.launch(shop) as plugin:
        proxy, old = plugin.dispense(), plugin.pid
        call = proxy.work.submit(0.3)
        plugin.restart(drain=None)
        assert proxy.pid() == plugin.pid and call.result(10) == old
        until(lambda: not alive(old))
        plugin.close(grace=None)
        assert plugin.exit_code == 0
