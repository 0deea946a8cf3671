"""The examples, each run as its README says, in a copy of the repository where nothing is installed."""

import gc
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path
from textwrap import dedent

import pytest
from conftest import until
from readme import follow, run
from test_foreign import go_plugin, node_plugin, python_plugin
from test_host_end import on_a_terminal

import miniplug

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_INDEX = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}


def copy_of(folder):
    """A copy of the library and the examples, as a fresh clone has them."""
    shutil.copy(str(ROOT / "miniplug.py"), str(folder))
    shutil.copytree(str(ROOT / "examples"), str(folder / "examples"),
                    ignore=shutil.ignore_patterns(".venv", "__pycache__"))
    return folder


@pytest.fixture
def clone(tmp_path):
    return copy_of(tmp_path)


@pytest.fixture
def toolbox(clone):
    """The toolbox with only its plain plugins: run it with arguments. ``toolbox.plugins`` is their folder."""
    folder = clone / "examples" / "toolbox"
    shutil.rmtree(str(folder / "plugins" / "markdown"))

    def toolbox(*arguments, **environment):
        return run(clone, folder / "toolbox.py", *arguments, env={**os.environ, **environment})

    toolbox.plugins = folder / "plugins"
    return toolbox


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    """A copy whose Markdown plugin has its virtual environment. Skips if the library cannot be had."""
    folder = tmp_path_factory.mktemp("furnished")
    markdown = ROOT / "examples" / "toolbox" / "plugins" / "markdown"
    probe = run(folder, "-m", "pip", "download", "--quiet", "--retries", "0", "--timeout", "10", "--no-deps",
                "--dest", folder, "-r", markdown / "requirements.txt")
    if probe.returncode:
        pytest.skip(f"no package index can be reached: {probe.stderr.strip().splitlines()[-1:]}")
    copy_of(folder)
    made = run(folder, "examples/toolbox/toolbox.py", "markdown.render", "*once*")
    assert (made.returncode, made.stdout) == (0, "<p><em>once</em></p>\n")
    assert made.stderr == "markdown: making its virtual environment, this once\n"
    return folder


def test_the_list_of_examples_is_whole():
    folder = ROOT / "examples"
    listed = re.findall(r"\]\(([\w-]+)/README\.md\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(path.parent.name for path in folder.glob("*/README.md"))


# -- greeter

def test_greeter_does_what_its_readme_shows(clone):
    follow(ROOT / "examples" / "greeter" / "README.md", clone)


def test_greeter_needs_nothing_installed(clone):
    done = run(clone, "-S", "examples/greeter/host.py")
    assert done.stdout == "Hello, world!\n"
    assert done.stderr == "[DEBUG] miniplug.greeter.hello: message from GreeterHello.greet who=world\n"
    assert done.returncode == 0


def test_greeter_plugin_started_by_hand_says_what_it_is(clone):
    done = run(clone, "examples/greeter/plugin.py")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("This program is a plugin")
    assert len(done.stderr.splitlines()) == 1


# -- python, node, go: tests/test_foreign.py checks the plugins

@pytest.mark.parametrize("language, plugin", [("python", python_plugin), ("node", node_plugin), ("go", go_plugin)])
def test_a_language_does_what_its_readme_shows(clone, language, plugin):
    plugin(clone)  # which skips where it cannot be
    follow(ROOT / "examples" / language / "README.md", clone)


def test_the_hosts_of_the_languages_are_one():
    """So that each folder can be copied, it has a host of its own. They differ in how the plugin is started."""
    hosts = {}
    for language in ("python", "node", "go"):
        text = (ROOT / "examples" / language / "host.py").read_text(encoding="utf-8")
        _, launch, calls = text.partition("miniplug.launch(")
        assert launch and calls.partition("\n")[0].endswith(f'name="{language}") as plugin:')
        hosts[language] = calls.partition("\n")[2]
    assert hosts["python"] == hosts["node"] == hosts["go"]


def test_the_plugins_in_other_languages_are_short():
    """As the guide says."""
    for language, sources in (("node", "*.mjs"), ("go", "*.go")):
        files = (ROOT / "examples" / language).glob(sources)
        lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        assert 0 < len(lines) < 300, language
        assert max(len(line.expandtabs(4)) for line in lines) <= 110, language
    assert "in less than 300 lines" in (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


def test_the_plugin_in_go_is_formatted_and_vetted(tmp_path):
    go_plugin(tmp_path)  # which skips where it cannot be
    folder = str(ROOT / "examples" / "go")
    assert subprocess.check_output(["gofmt", "-l", "."], cwd=folder) == b""
    assert subprocess.call(["go", "vet", "."], cwd=folder) == 0


# -- toolbox

def test_toolbox_does_what_its_readme_shows(furnished):
    follow(ROOT / "examples" / "toolbox" / "README.md", furnished)


def test_toolbox_makes_a_virtual_environment_once(furnished):
    done = run(furnished, "examples/toolbox/toolbox.py", "markdown.outline", "examples/greeter/README.md")
    assert (done.returncode, done.stdout, done.stderr) == (0, '[\n  "Greeter"\n]\n', "")


def test_toolbox_makes_it_anew_for_other_requirements(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "toolbox"))
    import toolbox

    def run_quietly(purpose, *command):
        ran.append(command[2])
        (tmp_path / ".venv").mkdir(exist_ok=True)

    def commands_for(requirements):
        ran.clear()
        (tmp_path / "requirements.txt").write_text(requirements, encoding="utf-8")
        assert Path(toolbox.interpreter_for("x", tmp_path / "plugin.py")).parent.parent == tmp_path / ".venv"
        return list(ran)

    ran = []
    monkeypatch.setattr(toolbox, "run_quietly", run_quietly)
    assert commands_for("one==1") == ["venv", "pip"]
    assert commands_for("one==1") == []
    assert commands_for("one==2") == ["venv", "pip"]


def test_toolbox_without_an_index_loses_one_plugin(toolbox):
    shutil.copytree(str(ROOT / "examples" / "toolbox" / "plugins" / "markdown"), str(toolbox.plugins / "markdown"),
                    ignore=shutil.ignore_patterns(".venv", "__pycache__"))
    done = toolbox(**WITHOUT_INDEX)
    lines = [line for line in done.stdout.splitlines() if line.startswith("markdown")]
    assert len(lines) == 1
    assert lines[0].startswith("markdown: cannot install its requirements (is a package index in reach?): ERROR: ")
    assert "mistune==3.0.2" in lines[0]
    assert "units.size(count: int) -> str" in done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "markdown: making its virtual environment, this once\n")


POEM = b"Rose, a\nrose\n"


@pytest.mark.parametrize("arguments, printed", [
    (["units.convert", "1", "mi", "km"], "1.609344\n"),
    (["units.size", "1234567"], "1.177 MiB\n"),
    (["text.slug", "Crème brûlée, 2 ways"], "creme-brulee-2-ways\n"),
    (["text.slug", "2024"], "2024\n"),
    (["text.count", "poem.txt"], '{\n  "lines": 2,\n  "words": 3,\n  "characters": 13\n}\n'),
    (["text.frequent", "poem.txt", "1"], '{\n  "rose": 2\n}\n'),
    (["checksum.sha256", "poem.txt"], hashlib.sha256(POEM).hexdigest() + "\n"),
    (["checksum.digest", "poem.txt", "sha512"], hashlib.sha512(POEM).hexdigest() + "\n"),
])
def test_toolbox_runs_a_tool(toolbox, clone, arguments, printed):
    (clone / "poem.txt").write_bytes(POEM)
    done = toolbox(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, printed, "")


def test_toolbox_finds_duplicates(toolbox, clone):
    (clone / "twins" / ".hidden").mkdir(parents=True)
    paths = [os.path.join("twins", name) for name in ("a", "b", "other", "longer", os.path.join(".hidden", "c"))]
    for path, data in zip(paths, (b"same", b"same", b"else", b"longer", b"same")):
        (clone / path).write_bytes(data)
    assert json.loads(toolbox("checksum.duplicates", "twins").stdout) == [paths[:2]]


@pytest.mark.parametrize("arguments, error", [
    (["nope"], "nope: no such tool; without arguments this program lists those there are"),
    (["nope.at_all"], "nope.at_all: no such tool; without arguments this program lists those there are"),
    (["text.cont", "x"], "text.cont: the plugin 'text' has no method 'cont'; did you mean 'count'?"),
    (["units.convert", "1", "mi", "kg"], "units.convert: ValueError: no way from 'mi' to 'kg'"),
    (["checksum.sha256", "gone"], "checksum.sha256: FileNotFoundError: [Errno 2] No such file or directory: 'gone'"),
])
def test_toolbox_says_in_one_line_what_is_wrong(toolbox, arguments, error):
    done = toolbox(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", error + "\n")


def test_a_new_file_is_a_new_tool(toolbox):
    before = toolbox().stdout
    (toolbox.plugins / "shout.py").write_text(dedent('''
        class Tool:
            def loud(self, text: str, times=1):
                """Say it loud.

                More of it."""
                return text.upper() + times * "!"

            def undocumented(self): ...
    '''), encoding="utf-8")
    new = "shout.loud(text: str, times=1)\n    Say it loud.\nshout.undocumented()\n"
    after = toolbox()
    assert (after.returncode, after.stderr) == (0, "")
    assert new in after.stdout
    assert after.stdout.replace(new, "") == before
    assert toolbox("shout.loud", "hear me", "3").stdout == "HEAR ME!!!\n"


def test_a_new_folder_is_a_new_tool(toolbox):
    (toolbox.plugins / "more").mkdir()
    (toolbox.plugins / "more" / "helper.py").write_text("ANSWER = 42", encoding="utf-8")
    (toolbox.plugins / "more" / "plugin.py").write_text(
        "import helper\nclass Tool:\n def answer(self): return helper.ANSWER\n", encoding="utf-8")
    assert "more.answer()" in toolbox().stdout.splitlines()
    assert toolbox("more.answer").stdout == "42\n"


@pytest.mark.parametrize("source, error", [
    ("def (", "SyntaxError: invalid syntax"),
    ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ("class Tol: ...", "miniplug: module 'broken' has no attribute 'Tool'"),
    ("import os; os._exit(3)", "the plugin 'broken' did not start: it exited with status 3"),
    ("class Tool:\n def __init__(self): raise OSError('no disk')", "OSError: no disk"),
    ("class Tool: ...", "its class Tool has no public methods"),
    ("import os\nclass Tool:\n def __init__(self): os._exit(4)",
     "the plugin 'broken' exited with status 4 during listMethods()"),
])
def test_a_broken_plugin_hides_no_other(toolbox, source, error):
    others = toolbox().stdout
    path = toolbox.plugins / "broken.py"
    path.write_text(source, encoding="utf-8")
    done = toolbox()
    assert (done.returncode, done.stderr) == (0, "")
    broken = f"broken: {error.format(path=path)}\n"
    assert done.stdout == broken + others  # sorted by name, it comes first


# -- kv

def test_kv_does_what_its_readme_shows(clone):
    follow(ROOT / "examples" / "kv" / "README.md", clone)
    numbers = clone / "examples" / "kv" / "numbers.json"
    assert json.loads(numbers.read_text(encoding="utf-8")) == {"apples": 42}


@pytest.mark.parametrize("arguments, status, error", [
    (["get", "pears"], 1, "KeyError: 'pears'"),
    (["put", "pears", "many"], 1, "ValueError: invalid literal for int() with base 10: 'many'"),
    (["put", "pears"], 2, "usage: host.py put KEY NUMBER, or host.py get KEY"),
    ([], 2, "usage: host.py put KEY NUMBER, or host.py get KEY"),
])
def test_kv_says_in_one_line_what_is_wrong(clone, arguments, status, error):
    done = run(clone, "examples/kv/host.py", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", error + "\n")


def test_kv_plugin_started_by_hand_says_what_it_is(clone):
    done = run(clone, "examples/kv/plugin.py")
    assert done.returncode == 1 and done.stderr.startswith("This program is a plugin")


# -- two-versions

def test_two_versions_does_what_its_readme_shows(clone):
    follow(ROOT / "examples" / "two-versions" / "README.md", clone)
    written = json.loads((clone / "examples" / "two-versions" / "accounts.json").read_text(encoding="utf-8"))
    assert written["format"] == 2 and written["entries"][1] == {"name": "coffee and cake", "cents": 1250}


def test_two_versions_are_those_of_the_environments(clone):
    folder = clone / "examples" / "two-versions"
    (folder / "libraries" / "ledger-1.0" / "ledger-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: ledger\nVersion: 1.7\n", encoding="utf-8")
    done = run(clone, folder / "host.py")
    assert done.stdout.splitlines()[-1] == "both versions are still there: 1.7 and 2.0", done.stderr


def test_a_c_extension_crashes_alone(clone):
    folder = clone / "examples" / "two-versions"
    done = run(clone, folder / "host.py")
    assert done.returncode == 0, done.stderr
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    with miniplug.launch(f"{folder / 'native' / 'plugin.py'}:Native", env={"PYTHONPATH": str(folder / ".venv")},
                         stderr="discard") as plugin:
        native = plugin.dispense()
        assert native.kind() == ("compiled" if shutil.which("cc") and os.path.exists(header) else "ctypes")
        with pytest.raises(miniplug.PluginCrashed) as caught:
            native.at(0)
        assert caught.value.signal_name == "SIGSEGV" if os.name != "nt" else caught.value.exit_code


# -- lent-tree

def test_lent_tree_does_what_its_readme_shows(clone):
    follow(ROOT / "examples" / "lent-tree" / "README.md", clone)


def test_a_lent_tree_lives_as_long_as_the_host_has_it(clone, write, monkeypatch):
    folder = clone / "examples" / "lent-tree"
    monkeypatch.syspath_prepend(str(folder))
    import host
    monkeypatch.delitem(sys.modules, "host")
    documents = write("documents.py", f"""
        import gc, sys, xml.etree.ElementTree as ET
        sys.path.insert(0, {str(folder)!r})
        import plugin

        class Documents(plugin.Documents):
            def numbers(self, count):
                root = ET.Element("numbers")
                for number in range(count):
                    ET.SubElement(root, "number").text = str(number)
                return plugin.Element(root)

            def alive(self):
                return sum(type(thing) is plugin.Element for thing in gc.get_objects())
        """)
    with miniplug.launch(f"{documents}:Documents") as plugin:
        documents = plugin.dispense()
        root = documents.numbers(1000)
        children = list(root)
        assert [child.text for child in children[:3]] == ["0", "1", "2"] and {type(child) for child in children} == {host.Element}
        assert documents.alive() == 1001
        first, second = children[:2]
        del children
        until(lambda: gc.collect() is not None and documents.alive() == 3)
        root.move(first, second)  # they go home
        assert [child.text for child in second] == ["0"]
        with pytest.raises(ValueError):
            root.move(first, second)
        assert root.find("500").text == "500"
        until(lambda: gc.collect() is not None and documents.alive() == 3)


# -- streaming

def test_streaming_does_what_its_readme_shows(clone):
    follow(ROOT / "examples" / "streaming" / "README.md", clone)
    assert (clone / "primes.txt").read_text(encoding="ascii").split()[:9] == ["2", "3", "5", "7", "11", "13", "17", "19", "23"]
    assert not (clone / "primes.txt.part").exists()


@pytest.mark.parametrize("limit, count", [(0, 0), (2, 0), (3, 1), (100, 25), (65536, 6542), (65538, 6543), (200000, 17984)])
def test_streaming_finds_the_primes(clone, limit, count):
    done = run(clone, "examples/streaming/host.py", limit, "primes.txt")
    assert done.stdout == f"{count} primes below {limit} are in primes.txt\n"
    assert (done.returncode, done.stderr) == (0, "")


def test_streaming_says_what_it_takes(clone):
    done = run(clone, "examples/streaming/host.py", "many", "primes.txt")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "usage: host.py LIMIT FILE\n")


@pytest.mark.skipif(os.name == "nt", reason="there are no such terminals on Windows")
def test_ctrl_c_ends_the_stream_and_the_plugin_cleans_up(clone):
    host, plugin = (clone / "examples" / "streaming" / name for name in ("host.py", "plugin.py"))
    part, source = clone / "primes.txt.part", plugin.read_text(encoding="utf-8")

    def interrupt():
        """Have it begin, type Ctrl-C as soon as the bar shows, and return what it said."""
        status, said = on_a_terminal(str(host), (b"] ", b"\x03"), arguments=["1000000000", str(clone / "primes.txt")])
        assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 130, said
        assert not (clone / "primes.txt").exists()
        return said

    said = interrupt()
    assert b"[....." in said and b"interrupted: " in said and b"Traceback" not in said
    assert not part.exists()
    plugin.write_text(source.replace("os.remove(part)", "..."), encoding="utf-8")
    interrupt()
    assert part.exists()  # so there was something to clean up


# -- asyncio

def test_asyncio_does_what_its_readme_shows(clone):
    follow(ROOT / "examples" / "asyncio" / "README.md", clone)


def test_asyncio_server_answers_many_clients(clone):
    program = clone / "examples" / "asyncio" / "server.py"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def ask(*words):
        return run(clone, program, "ask", port, *words).stdout

    def listens():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    server = subprocess.Popen([sys.executable, str(program), "serve", str(port)])
    try:
        until(listens, 20)
        assert ask("total", 1, 3) == f"{1 * 1 + 1 + 2 * 2 + 1 + 3 * 3 + 1}\n"
        assert ask("watch", 1, 3) == "3\n1\n4\n"
        assert ask("total", "x", 3) == "error: invalid literal for int() with base 10: 'x'\n"
        assert ask("what") == "error: no such request: what\n"
        assert ask("total") == "error: list index out of range\n"
        assert ask("total", 1, 100) == "4770\n"
    finally:
        server.kill()
        server.wait()


def test_asyncio_says_what_it_takes(clone):
    done = run(clone, "examples/asyncio/server.py", "what")
    assert done.returncode == 2 and done.stderr.startswith("usage: server.py")
