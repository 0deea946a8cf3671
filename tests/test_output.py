"""What a plugin prints and logs reaches the host: in order, whole, and without ever hurting it."""

import io
import json
import logging
import os
import sys
import threading
import zipfile

import pytest
from conftest import WORKSHOP, swallow, until

import miniplug


class Collector(logging.Handler):
    """Keeps records, and tells when one has come."""

    def __init__(self):
        super().__init__(0)
        self.records = []
        self.changed = threading.Condition()

    def emit(self, record):
        with self.changed:
            self.records.append(record)
            self.changed.notify_all()

    def await_message(self, message, count=1):
        def there():
            return [record for record in self.records if record.getMessage() == message]

        with self.changed:
            assert self.changed.wait_for(lambda: len(there()) >= count, 20), [r.getMessage() for r in self.records]
            return there()[count - 1]


@pytest.fixture
def log():
    """A logger of its own at level DEBUG, and what it collects."""
    logger = logging.getLogger("host.plugins.shop")
    collector = Collector()
    logger.addHandler(collector)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield collector
    logger.removeHandler(collector)


@pytest.fixture
def shop(log):
    with miniplug.launch(WORKSHOP, logger=logging.getLogger("host.plugins.shop")) as plugin:
        yield plugin.dispense()


def test_stdout_and_stderr_lines_are_logged(shop, log):
    shop.say("to stdout")
    shop.say("to stderr", "stderr")
    out, err = log.await_message("to stdout"), log.await_message("to stderr")
    assert (out.name, out.levelname) == ("host.plugins.shop.stdout", "INFO")
    assert (err.name, err.levelname) == ("host.plugins.shop.stderr", "WARNING")


def test_the_default_logger():
    collector = Collector()
    logging.getLogger("miniplug.pub").addHandler(collector)
    logging.getLogger("miniplug.pub").setLevel(logging.INFO)
    with miniplug.launch(WORKSHOP, name="pub") as plugin:
        plugin.dispense().say("hello")
        assert collector.await_message("hello").name == "miniplug.pub.stdout"
    logging.getLogger("miniplug.pub").removeHandler(collector)


def test_records_keep_level_name_and_fields(shop, log):
    shop.log(logging.WARNING, "100% sure", "shop.till", price=12, tags=["a"])
    record = log.await_message("100% sure")
    assert (record.name, record.levelno) == ("host.plugins.shop.shop.till", logging.WARNING)
    assert (record.price, record.tags) == (12, ["a"])
    assert abs(record.created - __import__("time").time()) < 60
    shop.log(25, "in between", "")
    record = log.await_message("in between")
    assert (record.name, record.levelno) == ("host.plugins.shop", 25)
    shop.log(logging.CRITICAL, "critical")
    assert log.await_message("critical").levelname == "CRITICAL"
    shop.log(logging.INFO, "two\nlines")
    assert log.await_message("two\nlines").levelname == "INFO"


def test_the_plugin_logs_at_the_level_of_the_hosts_logger(log):
    logger = logging.getLogger("host.plugins.shop")
    logger.setLevel(logging.ERROR)
    with miniplug.launch(WORKSHOP, logger=logger) as plugin:
        shop = plugin.dispense()
        logger.setLevel(logging.DEBUG)  # so that whatever were sent would be seen
        shop.log(logging.WARNING, "not sent")
        shop.log(logging.ERROR, "sent")
        log.await_message("sent")
    assert not [record for record in log.records if record.getMessage() == "not sent"]


def test_exceptions_are_logged_with_their_traceback(shop, log):
    shop.log_exception("it failed")
    record = log.await_message("it failed")
    assert record.levelno == logging.ERROR
    text = logging.Formatter().format(record)
    assert text.startswith("it failed\nTraceback") and text.endswith("LookupError: logged")


def test_a_printed_traceback_is_one_record(shop, log):
    shop.print_traceback()
    until(lambda: [record for record in log.records if "LookupError: printed" in record.getMessage()])
    (record,) = [record for record in log.records if "LookupError" in record.getMessage()]
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith("Traceback (most recent call last):\n")
    assert record.getMessage().endswith("\nLookupError: printed")


def test_a_chained_traceback_and_one_of_a_thread(write, log):
    path = write("plugin.py", """
        import threading, traceback
        class P:
            def chained(self):
                try:
                    try:
                        1 / 0
                    except ZeroDivisionError as error:
                        raise KeyError("outer") from error
                except KeyError:
                    traceback.print_exc()
                print("after", flush=True)
            def in_a_thread(self):
                thread = threading.Thread(target=lambda: 1 / 0, name="worker")
                thread.start()
                thread.join()
    """)
    with miniplug.launch(path + ":P", logger=logging.getLogger("host.plugins.shop")) as plugin:
        plugin.dispense().chained()
        plugin.dispense().in_a_thread()
    errors = [record.getMessage() for record in log.records if record.levelno == logging.ERROR]
    assert len(errors) == 2, errors
    assert "ZeroDivisionError" in errors[0] and "direct cause" in errors[0] and errors[0].endswith("KeyError: 'outer'")
    assert errors[1].startswith("Exception in thread worker") and errors[1].endswith("ZeroDivisionError: division by zero")


def test_import_time_output_and_logging(write, log):
    path = write("plugin.py", """
        import logging, sys
        print("printed at import")
        print("to stderr at import", file=sys.stderr)
        logging.getLogger("early").info("logged at import")
        class P:
            pass
    """)
    with miniplug.launch(path + ":P", logger=logging.getLogger("host.plugins.shop")):
        pass
    assert log.await_message("logged at import").name == "host.plugins.shop.early"
    assert log.await_message("printed at import").name.endswith("stdout")
    assert log.await_message("to stderr at import").name.endswith("stderr")


def test_the_plugins_own_configuration_wins(write, log):
    path = write("plugin.py", """
        import logging
        logging.basicConfig(format="mine: %(message)s", level=logging.ERROR)
        logging.getLogger("x").warning("not shown")
        logging.getLogger("x").error("shown")
        class P: pass
    """)
    with miniplug.launch(path + ":P", logger=logging.getLogger("host.plugins.shop")):
        pass
    assert [record.getMessage() for record in log.records] == ["mine: shown"]


def test_a_plugin_that_does_not_log_does_not_import_logging(write):
    path = write("plugin.py", "import sys\nclass P:\n    def modules(self): return sorted(sys.modules)\n")
    with miniplug.launch(path + ":P") as plugin:
        assert "logging" not in plugin.dispense().modules()


def test_everything_before_a_crash_arrives():
    lines = []
    plugin = miniplug.launch(WORKSHOP, stdout=lines.append)
    shop = plugin.dispense()
    shop.write_bytes(b"".join(b"%d\n" % number for number in range(20000)))
    with pytest.raises(miniplug.PluginCrashed):
        shop.say_and_die("last words")
    assert lines == [*map(str, range(20000)), "out: last words"]


@pytest.mark.skipif(os.name == "nt", reason="there the job ends whatever could hold the pipe")
def test_the_last_words_arrive_though_another_process_holds_the_pipe(write):
    path = write("plugin.py", """
        import os, subprocess, sys
        class P:
            def leave(self):
                stray = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
                os.write(1, b"%d\\nno end" % stray.pid)
                os._exit(3)
    """)
    lines = []
    with miniplug.launch(f"{path}:P", stdout=lines.append) as plugin:
        with pytest.raises(miniplug.PluginCrashed):
            plugin.dispense().leave()
        os.kill(int(lines[0]), 9)
    assert lines[1:] == ["no end"]


def test_lines_of_any_length_and_any_bytes():
    lines = []
    with miniplug.launch(WORKSHOP, stdout=lines.append) as plugin:
        shop = plugin.dispense()
        shop.write_bytes(b"x" * 3000000 + b"\n")
        shop.write_bytes(bytes(range(256)) + b"\n\n\r\n\xff\xfe no end")
    assert lines[0] == "x" * 3000000
    assert lines[1:3] == [bytes(range(10)).decode(), "\x0b\x0c"]
    assert lines[3] == bytes(range(14, 128)).decode() + "".join(f"\\x{byte:02x}" for byte in range(128, 256))
    assert lines[4:] == ["", "", "\\xff\\xfe no end"]


def test_a_line_beyond_all_bounds_comes_in_pieces(monkeypatch):
    monkeypatch.setattr(miniplug, "_LINE_LIMIT", 100000)
    lines = []
    with miniplug.launch(WORKSHOP, stdout=lines.append) as plugin:
        plugin.dispense().write_bytes(b"y" * 1000000)
    assert "".join(lines) == "y" * 1000000 and max(map(len, lines)) < 200000


MALFORMED = [
    "{", "{}", "[1, 2]", "7", "null", '{"a": 1}', '{"@message": 5}', '{"@message": null, "@level": "info"}', '{"@message": ["x"]}',
    "[" * 100000, '{"@message": ' + "[" * 100000, '{"@message": 1' + "0" * 10000 + "}",
    '{"\ud800": "\udfff"}', "{" + "\x00" * 10,
]


def test_malformed_lines_are_logged_as_they_are(shop, log):
    for line in MALFORMED:
        shop.write_bytes(line.encode("utf-8", "surrogatepass") + b"\n", 2)
    shop.say("the end", "stderr")
    log.await_message("the end")
    messages = [record.getMessage() for record in log.records]
    assert len(messages) == len(MALFORMED) + 1
    assert messages[:9] == MALFORMED[:9]


def test_hostile_records_do_no_harm(shop, log):
    deep = []
    for _ in range(400):
        deep = [deep]
    hostile = [
        {"@message": "m", "msg": "x", "args": [1], "getMessage": "x", "levelno": "x", "name": "y", "exc_info": [1, 2, 3], "": 1},
        {"@message": "%s %d %(x)s", "@level": "no such level"},
        {"@message": "time", "@timestamp": "yesterday"},
        {"@message": "time2", "@timestamp": 10**400},
        {"@message": "time3", "@timestamp": "9999-12-31T23:59:59Z"},
        {"@message": "level", "@levelno": 10**100},
        {"@message": "module", "@module": "..a..b."},
        {"@message": "trace", "@traceback": {"a": 1}, "__class__": "x", "__dict__": "y"},
        {"@message": "deep", **dict.fromkeys(("@level", "@levelno", "@module", "@timestamp", "@traceback", "more"), deep)},
    ]
    for fields in hostile:
        shop.write_bytes(json.dumps(fields).encode() + b"\n", 2)
    shop.say("the end", "stderr")
    log.await_message("the end")
    formatter = logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s")
    for record in log.records:
        formatter.format(record)
    messages = {record.getMessage() for record in log.records}
    assert {"m", "%s %d %(x)s", "time", "time2", "time3", "level", "module", "trace", "deep"} <= messages


def test_a_callable_that_raises_stops_nothing(log, caplog):
    seen = []

    def take(line):
        seen.append(line)
        raise SystemExit("from the callable")

    with miniplug.launch(WORKSHOP, stdout=take) as plugin:
        plugin.dispense().say("one")
        plugin.dispense().say("two")
    assert seen == ["one", "two"]
    assert "what takes a plugin's output raised" in caplog.text


def test_a_log_handler_that_raises_stops_nothing(shop, log):
    class Bad(logging.Handler):
        def handle(self, record):
            raise RuntimeError("bad handler")

    bad = Bad()
    logging.getLogger("host.plugins.shop.stdout").addHandler(bad)
    shop.say("one")
    shop.say("two")
    logging.getLogger("host.plugins.shop.stdout").removeHandler(bad)
    until(lambda: shop.say("three") or [r for r in log.records if r.getMessage() == "three"])


def test_sinks(capfd, tmp_path):
    text = io.StringIO()
    with open(str(tmp_path / "out"), "w", encoding="utf-8") as file, \
            miniplug.launch(WORKSHOP, stdout=file, stderr=text) as plugin:
        plugin.dispense().say("grüße")
        plugin.dispense().say("to stderr", "stderr")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "grüße\n"
    assert text.getvalue() == "to stderr\n"
    with miniplug.launch(WORKSHOP, stdout="discard", stderr="discard") as plugin:
        plugin.dispense().say("nobody hears")
    assert capfd.readouterr().out == ""
    with miniplug.launch(WORKSHOP, stdout="inherit") as plugin:
        plugin.dispense().say("everybody hears")
    assert capfd.readouterr().out.splitlines() == ["everybody hears"]


def test_output_nobody_reads_quickly_does_not_disturb_the_calls():
    """The plugin fills its stdout pipe while the host's callable hangs; calls go on, and close is bounded."""
    hold, held = threading.Event(), threading.Event()

    def take(line):
        held.set()
        hold.wait(20)

    plugin = miniplug.launch(WORKSHOP, stdout=take)
    shop = plugin.dispense()
    threading.Thread(target=lambda: swallow(shop.write_bytes, b"line\n" * 100000), daemon=True).start()
    assert held.wait(20)
    assert shop.greet("x") == "Hello, x!"
    start = __import__("time").monotonic()
    plugin.close(0.3)
    assert __import__("time").monotonic() - start < 2.3
    hold.set()


def test_a_plugin_that_replaces_its_streams(write, log):
    path = write("plugin.py", """
        import io, sys, os, logging
        class P:
            def replace(self):
                sys.stdout = sys.stderr = io.StringIO()
                print("into the void")
                logging.getLogger("x").warning("still logged")
            def close(self):
                os.close(1)
                return "closed"
    """)
    with miniplug.launch(path + ":P", logger=logging.getLogger("host.plugins.shop")) as plugin:
        plugin.dispense().replace()
        log.await_message("still logged")
        assert plugin.dispense().close() == "closed"
        assert plugin.ping() > 0


def test_miniplug_sets_no_level_and_no_propagate():
    with miniplug.launch(WORKSHOP, name="untouched") as plugin:
        plugin.dispense().say("x")
    for name in ("miniplug", "miniplug.untouched", "miniplug.untouched.stdout"):
        assert logging.getLogger(name).level == logging.NOTSET and logging.getLogger(name).propagate


@pytest.mark.skipif(os.name == "nt" or sys.version_info < (3, 11), reason="exception groups are new")
def test_an_exception_group_is_one_record(write, log):
    path = write("plugin.py", """
        import traceback
        class P:
            def group(self):
                try:
                    raise ExceptionGroup("several", [ValueError(1), TypeError(2)])
                except ExceptionGroup:
                    traceback.print_exc()
                print("plain line", flush=True)
    """)
    with miniplug.launch(path + ":P", logger=logging.getLogger("host.plugins.shop")) as plugin:
        plugin.dispense().group()
    errors = [record.getMessage() for record in log.records if record.name.endswith("stderr")]
    assert len(errors) == 1 and "ValueError: 1" in errors[0] and "TypeError: 2" in errors[0]


def test_the_last_words_of_a_crash_are_log_records_as_text(write):
    path = write("plugin.py", """
        import logging, os, sys
        class Plugin:
            def die(self):
                print('{"a": 1}', file=sys.stderr)
                print('{"@message": "", "@traceback": ' + '[' * 900 + ']' * 900 + '}', file=sys.stderr)
                print('{"@message": ' + '[' * 900 + ']' * 900 + '}', file=sys.stderr)
                logging.getLogger("shop.disk").warning("%s is full", "x", extra={"free": 12})
                try:
                    {}["key" * 1000]
                except KeyError:
                    logging.exception("no key")
                os._exit(3)
    """)
    with miniplug.launch(path + ":Plugin", stderr="discard") as plugin:
        with pytest.raises(miniplug.PluginCrashed) as caught:
            plugin.dispense().die()
        output = caught.value.output
    del output[1:3]  # too deep for some
    assert output[:4] == ['{"a": 1}', "[WARN] shop.disk: x is full", "[ERROR] root: no key",
                          "Traceback (most recent call last):"]
    assert output[-1].startswith("KeyError: 'keykey") and len(output[-1]) < 1100
    assert "    [WARN] shop.disk: x is full\n" in str(caught.value)


# -- what it may cost the host

def sink(name="host.plugins.shop", stream="stderr"):
    """What takes the lines of a stream, and is spoken to here as a reader does."""
    return miniplug._LogSink(logging.getLogger(name), stream)


def lines_of(data, deliver=None, chunk=1 << 16):
    """What a reader delivers of these bytes, when they come in chunks; and the reader."""
    lines = []
    reader = miniplug._Lines(None, deliver or lines.append)
    for start in range(0, len(data), chunk):
        reader._take(data[start : start + chunk])
    reader._take(b"")
    return lines, reader


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("data, lines", [
    (b"a\nb\r\nc\rd", ["a", "b", "c", "d"]), (b"10%\r20%\r30%\r\ndone\n", ["10%", "20%", "30%", "done"]),
    (b"\r10%\r20%", ["", "10%", "20%"]), (b"\n\n\r\n\r\r", ["", "", "", "", ""]), (b"\r\n", [""]), (b"", []),
    ("ü\r\u20ac\r".encode(), ["ü", "\u20ac"]), (b"\xff\rx\xe2\x82", ["\\xff", "x\\xe2\\x82"]), (b"a\x0bb\x1cc\n", ["a\x0bb\x1cc"]),
])
def test_a_line_ends_with_a_carriage_return_too(data, lines, chunk):
    assert lines_of(data, chunk=chunk)[0] == lines


def test_a_progress_bar_is_seen_while_it_moves(write):
    """Each step before the next one is even begun."""
    path = write("plugin.py", """
        import sys
        class P:
            def __init__(self): self.steps = 0
            def step(self):
                self.steps += 10
                sys.stdout.write(f"{self.steps}%\\r")
                sys.stdout.flush()
            def finish(self): print("done")
    """)
    lines, came = [], threading.Event()

    def take(line):
        lines.append(line)
        came.set()

    with miniplug.launch(f"{path}:P", stdout=take) as plugin:
        bar = plugin.dispense()
        for step in ("10%", "20%", "30%"):
            came.clear()
            bar.step()
            assert came.wait(20) and lines[-1] == step
        bar.finish()
    assert lines == ["10%", "20%", "30%", "done"]


MODULES = ["a." * 40000 + "a", "x" * 80000, "." * 1000, "deep." * 30 + "x", "plain", ".", "..", "a..b", ".a", "a.", "", "root"]


@pytest.mark.parametrize("parent", ["host.plugins.shop", ""])
def test_a_plugin_makes_no_loggers(log, parent):
    """Each would stay for the host's life. The record has the name all the same, if that is not too long."""
    logger, collector = logging.getLogger(parent), Collector()
    take = miniplug._LogSink(logger, "stderr")
    before = [*logging.Logger.manager.loggerDict]
    logger.addHandler(collector)
    for module in MODULES:
        take(json.dumps({"@message": "m", "@module": module, "@level": "error"}))
    logger.removeHandler(collector)
    assert [*logging.Logger.manager.loggerDict] == before
    prefix = f"{parent}." * bool(parent)
    assert [record.name for record in collector.records] == [
        prefix + module if module not in ("", "root") and len(module) <= 200 else logger.name for module in MODULES]


def test_a_record_goes_to_the_nearest_logger_that_the_host_has(log):
    nearest = logging.getLogger("host.plugins.shop.till")
    collector = Collector()
    nearest.addHandler(collector)
    nearest.setLevel(logging.ERROR)
    take = sink()
    for module in ("till", "till.drawer.left", "tillage", "..", "till..drawer"):
        for level in ("warn", "error"):
            take(json.dumps({"@message": "m", "@module": module, "@level": level}))
    nearest.setLevel(logging.NOTSET)
    assert [record.name[18:] for record in collector.records] == ["till", "till.drawer.left", "till..drawer"]
    assert [record.name[18:] for record in log.records] == [
        "till", "till.drawer.left", "tillage", "tillage", "..", "..", "till..drawer"]


def test_a_logger_is_not_asked_for_any_number_of_levels(log):
    """It keeps each for ever."""
    take = sink()
    logger = logging.getLogger("host.plugins.shop")
    for number in [*range(-50, 5000), 10**300]:
        take(json.dumps({"@message": "m", "@levelno": number, "@level": "warn"}))
    assert len(getattr(logger, "_cache", ())) < 150
    assert {record.levelno for record in log.records} == {*range(10, 101), 30}  # the logger's own level is 10


def test_a_traceback_without_end_comes_in_pieces(log):
    take = sink()
    lines = [f"  File {number}" + 300 * "." for number in range(10000)]
    assert sum(map(len, lines)) > 2 << 20
    take("Traceback (most recent call last):")
    most = 0
    for number, line in enumerate(lines):
        take(line)
        if number % 200 == 0:
            most = max(most, sum(map(len, take.trace)))
    take("ValueError: the end")
    take.flush()
    assert most <= 1 << 20
    text = "\n".join(record.getMessage() for record in log.records).splitlines()
    assert text == ["Traceback (most recent call last):", *lines, "ValueError: the end"]


def test_a_traceback_of_one_long_line_too(log):
    take = sink()
    take("Traceback (most recent call last):")
    take(" " + "x" * 1001)
    take("ValueError: the end")
    assert take.trace == [] and len(log.records) == 3


@pytest.mark.parametrize("value, text", [
    ("[" * 20 + "]" * 20, False), ("[" * 100000 + "]" * 100000, True),
    ("1" * 1000, False), ("1" * 10001, True), ("[" + "1" * 10001 + "]", True),
    ("1e999", False), ('"' + "x" * (1 << 20) + '"', False),
])
def test_a_record_that_is_too_much_is_text(log, value, text):
    line = f'{{"@message":"m","field":{value}}}'
    sink()(line)
    (record,) = log.records
    assert record.getMessage() == (line if text else "m")
    logging.Formatter().format(record)


def test_a_record_of_many_fields_costs_what_it_is_long(log):
    fields = {f"f{number}": number for number in range(50000)}
    sink()(json.dumps({"@message": "m", **fields}))
    assert log.records[0].f49999 == 49999


def test_half_of_a_character_can_be_written(log, tmp_path):
    """JSON can name what is none; no file takes it."""
    take = sink()
    take('{"@message":"a\\ud800b","@module":"\\udfff","x\\ud800":"\\ud800","@traceback":"t\\udc00"}')
    take('{"@message":"whole \\ud83d\\ude00"}')
    handler = logging.FileHandler(str(tmp_path / "log"), encoding="utf-8")
    for record in log.records:
        handler.emit(record)
    handler.close()
    text = (tmp_path / "log").read_text(encoding="utf-8")
    assert text == "a\\ud800b\nt\\udc00\nwhole \U0001f600\n"


def test_of_the_report_of_a_crash_the_head_is_kept():
    """faulthandler begins with what the program was at."""
    report = ["Fatal Python error: Segmentation fault", "", "Current thread 0x1 (most recent call first):",
              *(f'  File "deep.py", line {number} in f' for number in range(100)), "", "Extension modules: a, b"]
    _, reader = lines_of("\n".join(["before", *report]).encode())
    last = reader.last()
    assert last == [*report[:15], *report[-15:]]
    _, reader = lines_of("\n".join(["before", *report[:10]]).encode())
    assert reader.last() == ["before", *report[:10]]


def test_the_innermost_frames_of_a_deep_crash_are_told(write):
    path = write("plugin.py", """
        import faulthandler
        def down(depth):
            if depth:
                return down(depth - 1)
            crash()
        def crash():
            faulthandler._sigabrt()
        class P:
            def crash(self):
                down(300)
    """)
    with miniplug.launch(f"{path}:P", stderr="discard") as plugin, pytest.raises(miniplug.PluginCrashed) as caught:
        plugin.dispense().crash()
    heads = [line for line in caught.value.output if "Fatal Python error" in line]
    assert heads and any(line.endswith("in crash") for line in caught.value.output), caught.value.output
    assert "in crash" in str(caught.value)


def test_a_record_that_json_cannot_write_arrives_all_the_same(write, log):
    path = write("plugin.py", """
        import logging
        class Bad:
            def __repr__(self): raise ValueError
        class P:
            def log(self):
                own = {"a": 1}
                own["own"] = own
                deep = []
                for _ in range(100000):
                    deep = [deep]
                logging.getLogger("x").warning("told", extra={"own": own, "bad": Bad(), "deep": deep})
    """)
    with miniplug.launch(f"{path}:P", logger=logging.getLogger("host.plugins.shop")) as plugin:
        plugin.dispense().log()
        record = log.await_message("told")
    assert record.name == "host.plugins.shop.x" and record.levelno == logging.WARNING


def test_logging_that_comes_from_a_zip_file(write, log, tmp_path):
    """Its loader is that of all that is in there, as it is where Python itself lies in a zip file."""
    archive = str(tmp_path / "library.zip")
    with zipfile.ZipFile(archive, "w") as packed:
        packed.write(logging.__file__, "logging/__init__.py")
        packed.writestr("other.py", "VALUE = 5")
    program = write("shop.py", """
        import miniplug
        class Shop:
            def log(self, text):
                import logging
                import other
                logging.getLogger("till").warning(text)
                return [other.VALUE, logging.__file__]
        miniplug.serve({"shop": Shop()})
        """)
    path = os.pathsep.join([archive, os.path.dirname(miniplug.__file__)])
    logger = logging.getLogger("host.plugins.shop")
    with miniplug.launch([sys.executable, program], env={"PYTHONPATH": path}, logger=logger) as plugin:
        value, path = plugin.dispense().log("it works")
    assert value == 5 and path.startswith(archive)
    assert log.await_message("it works").name == "host.plugins.shop.till"


def test_a_record_that_follows_a_traceback_of_several_lines_is_one_of_its_own(caplog):
    caplog.set_level(1)
    take = miniplug._LogSink(logging.getLogger("after"), "stderr")
    for line in ("Traceback (most recent call last):", '  File "x.py", line 1, in <module>', "RuntimeError: bad", "    detail: 5",
                 '{"@level": "error", "@levelno": 50, "@module": "disk", "@message": "disk full"}', "plain"):
        take(line)
    take.flush()
    assert [(record.levelname, record.getMessage()) for record in caplog.records[1:]][-2:] == [
        ("CRITICAL", "disk full"), ("WARNING", "plain")]
