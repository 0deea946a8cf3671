"""What goes wrong in a plugin, against when it does. Whatever it is, the host sees the right thing within a bound and nothing is
left behind (conftest.py looks at that after each cell); and the plugin, or its next run, answers as if nothing had been."""

import contextlib
import os
import signal

import pytest
from conftest import WINDOWS, not_under_wine
from stage import PROMPT, SHORT, make_scene, within  # noqa: F401

import miniplug

# -- what is to come of it

ANSWERS = "the plugin goes on, and answers"
RAISES = "the method raises that, and the plugin goes on"
DIES = "the plugin dies, with that exit code"
BREAKS = "the plugin has broken the protocol, and is ended for it"
CUT = "the plugin has no connection any more, and is ended or ends itself"
HANGS = "the plugin never answers: a deadline helps"
SOME = "chance decides whether it goes on, raises MemoryError, or dies"

LIFE = ("in on_start", "in restart", "while it drains", "supervised", "attached")
ALL = ("starting", "idle", "in a call", "in a stream", "in a callback", "closing")
ENDS = ("starting", "in a call", "closing")  # how else it may end is told by the rows that have all
CALLS = ("in a call", "in a stream", "in a callback")
AROUND = ("starting", "idle", "in a call", "closing")  # what is done to the whole process does not depend on the kind of call

# Where a row has few moments, at the others it would tell no more than another row does.
ROWS = {  # what the victim does: what comes of it, the exit code or the exception's type, when it is tried
    "kill": (DIES, 9 if WINDOWS else -9, (*ALL, *LIFE)),
    "segfault": (DIES, 0xC0000005 if WINDOWS else -11, ENDS),
    "hard_exit_in_a_thread": (DIES, 7, ALL),
    "terminate": (DIES, 15 if WINDOWS else -15, ("in a call",)),
    "interrupt": (DIES, -2, ("in a call", "closing")),
    "interrupt_a_thread": (DIES, -2, ("in a call",)),
    "abort": (DIES, None if WINDOWS else -6, ("in a call",)),  # there 3 or 0xC0000409, as the C library likes
    "hard_exit": (DIES, 7, ("in a call", "closing")),
    "write_and_exit": (DIES, 7, ("in a call", "in a stream")),
    "become_another_program": (CUT, None, ENDS),
    "stop": (HANGS, None, (*ALL, *LIFE)),
    "hold_the_gil": (HANGS, None, ("starting", "in a call", "in a callback", "closing")),
    "wait_for_ever": (HANGS, None, ("in a call", "in a stream", "closing")),  # a thread that waits is no fault
    # exceptions
    "sys_exit": (RAISES, "SystemExit", ALL),
    "raise_an_exception": (RAISES, "LookupError", (*ALL, *LIFE)),
    "raise_a_base_exception": (RAISES, "victim.raise_a_base_exception.<locals>.Own", ENDS),
    "recurse": (RAISES, "RecursionError", ("in a call",)),
    "sys_exit_in_a_thread": (ANSWERS, None, ("idle", "in a call")),
    "raise_in_a_thread": (ANSWERS, None, ("idle", "in a call")),
    "raise_in_every_thread": (SOME, None, ("idle", *CALLS)),  # of which there is one only in the beginning
    # the connection
    "close_the_connection": (CUT, None, (*ALL, *LIFE)),
    "close_every_descriptor": (CUT, None, AROUND),
    "shut_the_connection_down": (CUT, None, ("starting", "idle", "closing")),
    "truncate_a_frame": (BREAKS if WINDOWS else CUT, None, ("starting", "in a stream")),
    "corrupt_a_frame": (BREAKS, None, (*ALL, *LIFE)),
    "babble": (BREAKS, None, ALL),
    "lose_the_door": (DIES, 1, ("starting",)),  # later there is none
    # resources
    "ask_for_too_much_memory": (RAISES, "MemoryError", ALL),
    "eat_all_memory": (SOME, None, (*ALL, *LIFE)),
    "eat_memory_without_end": (SOME, None, ("under a limit",)),
    "eat_all_descriptors": (ANSWERS, None, (*ALL, *LIFE)),
    "eat_all_threads": (ANSWERS, None, ALL),
    "fill_a_disk": (ANSWERS, None, AROUND),
    # children
    "fork": (ANSWERS, None, ("idle", "in a call")),
    "fork_and_go_on_in_both": (ANSWERS, None, (*CALLS, "closing")),  # in the beginning either may be the plugin
    "fork_a_child_that_stays": (ANSWERS, None, AROUND),
    "fork_a_child_that_stays_and_exit": (DIES, 7, (*AROUND, *LIFE)),
    "start_a_child_that_stays": (ANSWERS, None, ENDS),
    "start_a_child_that_stays_and_exit": (DIES, 7, AROUND),
    "start_a_stray_and_exit": (DIES, 7, ENDS),
    "kill_a_child": (ANSWERS, None, ("in a call",)),
    "kill_the_guardian": (ANSWERS, None, ("starting", "in a call")),
    # its output
    "close_the_output": (ANSWERS, None, AROUND),
    "close_the_streams": (ANSWERS, None, AROUND),
    "replace_the_streams": (ANSWERS, None, AROUND),
    "print_megabytes": (ANSWERS, None, (*AROUND, *LIFE)),
    "print_a_long_line": (ANSWERS, None, ENDS),
    # what all share in a process
    "lose_all_imports": (ANSWERS, None, AROUND),
    "lose_the_environment": (ANSWERS, None, ("starting", "in a call")),
    "lose_the_folder": (ANSWERS, None, AROUND),
    "block_all_signals": (ANSWERS, None, ENDS),
    "set_a_default_timeout": (ANSWERS, None, ("starting", "in a call")),
}
POSIX_ONLY = {
    "interrupt", "interrupt_a_thread", "become_another_program", "close_every_descriptor", "ask_for_too_much_memory",
    "eat_all_memory", "eat_all_descriptors", "eat_all_threads", "fill_a_disk", "fork", "fork_and_go_on_in_both",
    "fork_a_child_that_stays", "fork_a_child_that_stays_and_exit", "start_a_stray_and_exit", "kill_the_guardian", "lose_the_door",
    "lose_the_folder", "block_all_signals",
}

WINDOWS_OWN = {  # where Windows has ways of its own; a start takes long there, so of the other rows there is one cell each
    "kill", "segfault", "stop", "hold_the_gil", "close_the_connection", "shut_the_connection_down", "truncate_a_frame",
    "corrupt_a_frame", "babble", "eat_memory_without_end",
}

EXCEPTIONS = {  # cells that come out differently
    ("become_another_program", "starting"): (HANGS, None),  # it never connects
    ("sys_exit", "starting"): (DIES, 5),
    ("raise_an_exception", "starting"): (DIES, 1),
    ("raise_a_base_exception", "starting"): (DIES, 1),
    ("ask_for_too_much_memory", "starting"): (DIES, 1),
    ("eat_all_memory", "starting"): (DIES, None),
    ("eat_all_descriptors", "starting"): (DIES, 1),
    ("eat_all_threads", "starting"): (DIES, 1),
    ("lose_all_imports", "starting"): (DIES, 1),
    # all that is done to another connection, which has proven no key
    ("close_the_connection", "starting"): (ANSWERS, None),
    ("close_every_descriptor", "starting"): (ANSWERS, None),
    ("shut_the_connection_down", "starting"): (ANSWERS, None),
    ("truncate_a_frame", "starting"): (ANSWERS, None),
    ("corrupt_a_frame", "starting"): (ANSWERS, None),
    ("babble", "starting"): (ANSWERS, None),
    # the exit status of what is raised in the end, or found by Python itself when it ends
    ("sys_exit", "closing"): (DIES, 5),
    ("raise_an_exception", "closing"): (ANSWERS, None),  # as it is logged
    ("raise_a_base_exception", "closing"): (DIES, 1),
    ("ask_for_too_much_memory", "closing"): (ANSWERS, None),
    ("replace_the_streams", "closing"): (DIES, 120),
    ("babble", "closing"): (HANGS, None),  # nobody reads that any more
    ("become_another_program", "closing"): (HANGS, None),
}


def cells():
    for fault, (kind, detail, moments) in ROWS.items():
        if WINDOWS and fault not in WINDOWS_OWN:
            moments = () if fault in POSIX_ONLY else set(moments) & {"in a call"}
        for moment in moments:
            as_if = "starting" if moment == "in restart" else moment
            marks = [not_under_wine("a job limits no memory")] if moment == "under a limit" else []
            yield pytest.param(fault, moment, *EXCEPTIONS.get((fault, as_if), (kind, detail)), id=f"{fault}-{moment}", marks=marks)


def test_the_table_is_in_order():
    assert all(moment in ROWS[fault][2] for fault, moment in EXCEPTIONS) and set(ROWS) >= POSIX_ONLY | WINDOWS_OWN


def strike_idle(scene, fault):
    scene.proxy.strike_later(fault)
    os.write(scene.trigger, b"x")


ACTS = {
    "in a call": lambda proxy, fault: proxy.strike(fault),
    "in a stream": lambda proxy, fault: list(proxy.items(fault)),
    "in a callback": lambda proxy, fault: proxy.call_back(lambda: proxy.strike(fault)),
}


@pytest.mark.parametrize(("fault", "moment", "kind", "detail"), list(cells()))
def test_a_fault(scene, fault, moment, kind, detail):
    if moment == "starting":
        starting(scene, fault, kind, detail)
    elif moment == "idle":
        scene.start()
        idle(scene, fault, kind, detail)
    elif moment in ACTS:
        scene.start()
        calling(scene, fault, kind, detail, ACTS[moment])
    else:
        globals()[moment.replace(" ", "_")](scene, fault, kind, detail)
    afterwards(scene, kind)


def afterwards(scene, kind):
    """It answers; or its next run does."""
    if kind == SOME and scene.plugin.running:
        with within(PROMPT):
            survive(scene.plugin, scene.proxy.greet, "you")
        scene.plugin.kill()
    if not scene.plugin.running:
        scene.start()
    with within(PROMPT):
        assert scene.proxy.greet("you") == "Hello, you!"


def starting(scene, fault, kind, detail):
    if kind == ANSWERS:
        scene.start(fault)
        return
    if kind == HANGS:
        scene.plugin._supervisor.recipe.start_timeout = 2 * SHORT
    with within(PROMPT), pytest.raises((miniplug.LaunchError, miniplug.PluginCrashed)) as caught:
        scene.start(fault)
    scene.plugin._supervisor.recipe.start_timeout = 20
    assert not scene.plugin.running
    if kind == DIES and detail is not None:
        assert caught.value.exit_code == detail


def check_end(plugin, error, kind, detail):
    """The error says how it ended, and so does the plugin."""
    assert type(error) is (miniplug.ProtocolError if kind == BREAKS else miniplug.PluginCrashed)
    assert not plugin.running and plugin.pid is None and plugin.exit_code == error.exit_code
    if kind == DIES and detail is not None:
        assert error.exit_code == detail
        assert error.signal_name == (signal.Signals(-detail).name if detail < 0 else None)


def idle(scene, fault, kind, detail):
    strike_idle(scene, fault)
    plugin, proxy = scene.plugin, scene.proxy
    if kind in (ANSWERS, RAISES):
        assert proxy.await_struck() is True
    elif kind == SOME:
        with within(PROMPT):
            survive(plugin, proxy.await_struck)
    elif kind == HANGS:
        with within(PROMPT), pytest.raises(miniplug.CallTimeout):
            while plugin.wait(0.01) is None:  # it may answer until it is struck
                proxy.greet.timeout(SHORT)("you")
        plugin.kill()
    else:
        with within(PROMPT), pytest.raises(miniplug.PluginCrashed) as caught:
            while True:
                plugin.wait(0.01)
                proxy.greet("you")
        check_end(plugin, caught.value, kind, detail)


def survive(plugin, function, *args):
    """Call what may fail as it likes, but comes to an end."""
    try:
        function(*args)
    except miniplug.RemoteError as error:
        assert error.type_name in ("MemoryError", "SystemExit")
    except miniplug.PluginCrashed:
        assert not plugin.running


def calling(scene, fault, kind, detail, act):
    """With another call in flight."""
    plugin, proxy = scene.plugin, scene.proxy
    other = proxy.wait.submit()  # which is cut off with it
    if kind == ANSWERS:
        with within(PROMPT):
            assert act(proxy, fault) in (fault, [1, 2, 3])
    elif kind == RAISES:
        with within(PROMPT), pytest.raises(miniplug.RemoteError) as caught:
            act(proxy, fault)
        assert caught.value.type_name == detail
    elif kind == HANGS:
        proxy = plugin.dispense(timeout=SHORT)
        with within(PROMPT), pytest.raises(miniplug.CallTimeout):
            act(proxy, fault)
        plugin.kill()
        with pytest.raises(miniplug.PluginClosed):
            other.result(PROMPT)
        return
    elif kind == SOME:
        with within(PROMPT):
            survive(plugin, act, proxy, fault)
        return
    else:
        with within(PROMPT), pytest.raises(miniplug.PluginCrashed) as caught:
            act(proxy, fault)
        check_end(plugin, caught.value, kind, detail)
        with pytest.raises(miniplug.PluginCrashed) as caught:
            other.result(PROMPT)
        check_end(plugin, caught.value, kind, detail)
        return
    with within(PROMPT):
        proxy.release()
        assert other.result(PROMPT) is True
        with pytest.raises(LookupError, match="as it should"):
            proxy.fail()


def closing(scene, fault, kind, detail):
    """In the end of the context manager that it is."""
    scene.start()
    scene.proxy.strike_at_the_end(fault)
    grace = SHORT if kind == HANGS else PROMPT
    with within(grace + 2):
        scene.plugin.close(grace)
    assert not scene.plugin.running
    code = scene.plugin.exit_code
    if kind == HANGS:
        assert WINDOWS or code in (-9, -15)
    elif kind == DIES and detail is not None:
        assert code == detail
    elif kind == ANSWERS:
        assert code == 0 or (code, fault) == (120, "fill_a_disk")  # as Python exits where its last output cannot be written


def in_on_start(scene, fault, kind, detail):
    """In a call that on_start makes: its error fails the start."""
    scene.make(on_start=lambda plugin: plugin.dispense(timeout=SHORT if kind == HANGS else None).strike(fault))
    expected = {ANSWERS: (), RAISES: miniplug.RemoteError, HANGS: miniplug.CallTimeout, SOME: miniplug.PluginError}
    with within(PROMPT):
        try:
            scene.plugin.start()
        except expected.get(kind, miniplug.PluginCrashed):
            assert not scene.plugin.running
        else:
            assert kind in (ANSWERS, SOME)
    scene.plugin.kill()
    scene.make()


def in_restart(scene, fault, kind, detail):
    """In the new process while it starts: if that does not come up, the old one stays."""
    scene.start()
    before = scene.plugin.pid
    scene.strike_at_the_start(fault)
    if kind == HANGS:
        scene.plugin._supervisor.recipe.start_timeout = 2 * SHORT
    with within(PROMPT):
        if kind == ANSWERS:
            scene.plugin.restart()
        else:
            with pytest.raises(miniplug.LaunchError):
                scene.plugin.restart()
    scene.plugin._supervisor.recipe.start_timeout = 20
    assert scene.plugin.running and (scene.plugin.pid == before) is (kind != ANSWERS)


def while_it_drains(scene, fault, kind, detail):
    """In the old process, after the new one has taken its place, which notices nothing."""
    scene.start()
    plugin, proxy = scene.plugin, scene.proxy
    proxy.strike_later(fault)
    other = proxy.await_struck.submit()
    assert proxy.greet("you") == "Hello, you!"  # so that one, too, has come there
    before = plugin.pid
    plugin.restart(drain=PROMPT)
    assert plugin.pid != before
    os.write(scene.trigger, b"x")
    with within(PROMPT):
        assert proxy.greet("you") == "Hello, you!"
        if kind == HANGS:
            plugin.close(SHORT)
        if kind in (ANSWERS, RAISES):
            assert other.result(PROMPT) is True
        elif kind == SOME:
            with contextlib.suppress(miniplug.RemoteError, miniplug.PluginCrashed):
                other.result(PROMPT)
        else:
            with pytest.raises(miniplug.PluginClosed if kind == HANGS else miniplug.PluginCrashed):
                other.result(PROMPT)
    assert plugin.running is (kind != HANGS) and plugin.restarts == 0


def supervised(scene, fault, kind, detail):
    """In a call, where it starts anew by itself."""
    ends = []
    scene.make(max_restarts=1, heartbeat=SHORT, on_exit=lambda plugin: ends.append(plugin.exit_code))
    scene.start()
    before = scene.plugin.pid
    with within(PROMPT):
        if kind == ANSWERS:
            assert scene.proxy.strike(fault) == fault
        elif kind == RAISES:
            with pytest.raises(miniplug.RemoteError):
                scene.proxy.strike(fault)
        elif kind == SOME:
            survive(scene.plugin, scene.proxy.strike, fault)
            return
        else:
            with pytest.raises(miniplug.PluginCrashed):
                scene.proxy.strike(fault)
        assert scene.proxy.greet("you") == "Hello, you!"
    died = kind not in (ANSWERS, RAISES)
    assert (scene.plugin.pid != before) is died and scene.plugin.restarts == len(ends) == died


def attached(scene, fault, kind, detail):
    """In a call of another host's. What becomes of its connection is nothing to the one that has launched the plugin."""
    scene.make(persist=True)
    scene.start()
    with miniplug.attach(scene.plugin.reattach_config()) as guest:
        proxy = guest.dispense(timeout=SHORT if kind == HANGS else None)
        with within(PROMPT):
            if kind == ANSWERS:
                assert proxy.strike(fault) == fault
                assert proxy.greet("you") == "Hello, you!"
            elif kind == SOME:
                survive(guest, proxy.strike, fault)
            else:
                error = {RAISES: miniplug.RemoteError, HANGS: miniplug.CallTimeout, BREAKS: miniplug.ProtocolError}
                with pytest.raises(error.get(kind, miniplug.PluginCrashed)):
                    proxy.strike(fault)
    if kind in (CUT, BREAKS):
        assert scene.proxy.greet("you") == "Hello, you!"
    elif kind == HANGS:
        scene.plugin.kill()
    elif kind == DIES:
        assert scene.plugin.wait(PROMPT) == detail


def under_a_limit(scene, fault, kind, detail):
    """That the host has set."""
    scene.make(limits=miniplug.Limits(memory=400 << 20))
    scene.start()
    with within(PROMPT), pytest.raises((miniplug.RemoteError, miniplug.PluginCrashed)):
        scene.proxy.strike(fault)
