"""While a plugin is loaded its process launches nothing of what is being started above it: else a host's module that
its own plugin imports would go on for ever."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import WINDOWS, alive, until

import miniplug

ROOT = os.path.dirname(os.path.abspath(miniplug.__file__))
GUARD = 'if __name__ == "__main__":'

# Each module tells that it has run, as a process is easily missed.
HEAD = """
import os, sys
import miniplug
FOLDER = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(FOLDER, "levels"), "a") as levels:
    levels.write(f"{os.getpid()} {__name__}\\n")
if len(open(levels.name).readlines()) > 30:
    os._exit(9)  # it has failed: this machine is to survive that
"""
HOST = HEAD + """
class Greeter:
    def greet(self, name):
        return f"Hello, {name}!"

plugin = miniplug.launch(COMMAND)
print(plugin.dispense().greet("you"))
plugin.close()
"""
PLUGIN = HEAD + """
sys.path.insert(0, FOLDER)
from host import Greeter
if __name__ == "__main__":
    miniplug.serve({"greeter": Greeter})
"""


def run(*arguments, path=ROOT):
    env = dict(os.environ, PYTHONPATH=path)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, env=env, timeout=50, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def levels(folder):
    """The pids of the processes that have run a module of ours."""
    try:
        return sorted({int(line.split()[0]) for line in (folder / "levels").read_text().splitlines()})
    except FileNotFoundError:
        return []


COMMANDS = {
    "a spec": "os.path.join(FOLDER, 'plugin.py') + ':Greeter'",
    "the host itself": "__file__ + ':Greeter'",
    "a script": "os.path.join(FOLDER, 'plugin.py')",
    "an argument list": "[sys.executable, os.path.join(FOLDER, 'plugin.py')]",
    "other arguments each time": "[sys.executable, os.path.join(FOLDER, 'plugin.py'), str(os.getpid())]",
    "the host itself as a list": "[sys.executable, __file__]",
    "a module to run": "[sys.executable, '-m', 'plugin', str(os.getpid())]",
    "a module's spec": "'plugin:Greeter', cwd=FOLDER",
    "what is discovered": "str([path for path in miniplug.discover(FOLDER, '*.py') if path.name == 'host.py'][0])",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_an_unguarded_host_is_an_error_at_the_first_level(write, tmp_path, command):
    host = write("host.py", HOST.replace("COMMAND", command))
    write("plugin.py", PLUGIN)
    status, out, err = run(host, path=str(tmp_path) + os.pathsep + ROOT)
    assert status == 1 and "Hello" not in out
    assert "RuntimeError: the plugin " in err and GUARD in err
    assert len(levels(tmp_path)) == 2


def test_served_by_hand(write, tmp_path):
    host = write("host.py", HOST.replace("COMMAND", "__file__ + ':Greeter'"))
    status, _, err = run("-m", "miniplug", "serve", "--persist", host + ":Greeter")
    assert status == 1 and GUARD in err and len(levels(tmp_path)) == 1


def test_a_program_that_serves_by_hand(write, tmp_path):
    path = write("host.py", HEAD + """
miniplug.launch([sys.executable, __file__])
miniplug.serve({"thing": object()}, persist=True)
""")
    status, _, err = run(path)
    assert status == 1 and GUARD in err and len(levels(tmp_path)) == 2


@pytest.mark.parametrize("verb", [["inspect"], ["call", "--"]])
def test_on_the_command_line(write, tmp_path, verb):
    host = write("host.py", HOST.replace("COMMAND", "__file__ + ':Greeter'"))
    arguments = [host + ":Greeter", *(["greet", "you"] if "call" in verb else [])]
    status, _, err = run("-m", "miniplug", *verb, *arguments)
    assert status == 1 and GUARD in err and len(err.splitlines()) == 1 and len(levels(tmp_path)) == 1


def test_two_that_launch_each_other(write, tmp_path):
    for name, other in (("one", "other"), ("other", "one")):
        write(f"{name}.py", HEAD + f"""
miniplug.launch(os.path.join(FOLDER, "{other}.py"))
miniplug.serve({{"thing": object()}})
""")
    status, _, err = run(str(tmp_path / "one.py"))
    assert status == 1 and GUARD in err and len(levels(tmp_path)) == 3  # the first was started by a person


NESTED = HEAD + """
class Outer:
    def __init__(self, plugin=None):
        self.plugin = plugin

    def ask(self):
        with miniplug.launch(os.path.join(FOLDER, "inner.py") + ":Inner") as plugin:
            return plugin.dispense().answer()

    def kept(self):
        return self.plugin.dispense().answer()
"""


@pytest.mark.parametrize("command", ["outer.py:Outer", "outer.py", ["python", "outer.py"]])
def test_a_method_may_launch(write, tmp_path, command):
    write("outer.py", NESTED + "if __name__ == '__main__': miniplug.serve({'outer': Outer()})\n")
    write("inner.py", "class Inner:\n    def answer(self): return 42\n")
    command = [sys.executable, *command[1:]] if isinstance(command, list) else command
    with miniplug.launch(command, cwd=tmp_path, env={"PYTHONPATH": ROOT}) as plugin:
        assert plugin.dispense().ask() == 42


def test_a_script_may_launch_plugins_of_its_own_before_it_serves(write, tmp_path):
    path = write("outer.py", NESTED + f"ROOT = {ROOT!r}" + """
plugin = miniplug.launch([sys.executable, os.path.join(FOLDER, "middle.py")], env={"PYTHONPATH": ROOT})
miniplug.serve({"outer": Outer(plugin)})
plugin.close()
""")
    write("middle.py", HEAD + """
plugin = miniplug.launch(os.path.join(FOLDER, "inner.py") + ":Inner")

class Middle:
    def answer(self):
        return plugin.dispense().answer()

miniplug.serve({"middle": Middle()})
plugin.close()
""")
    write("inner.py", "class Inner:\n    def answer(self): return 42\n")
    with miniplug.launch(path) as plugin:
        assert plugin.dispense().kept() == 42


def test_what_is_loaded_may_attach(write, tmp_path):
    path = write("shop.py", HEAD + """
class Shop:
    def greet(self): return "hello"

if "CONFIG" in os.environ:
    import json
    with miniplug.attach(json.loads(os.environ["CONFIG"])) as plugin:
        said = plugin.dispense().greet()

class Other:
    def said(self): return said
""")
    with miniplug.launch(path + ":Shop", persist=True) as first:
        config = json.dumps(first.reattach_config())
        other = miniplug.launch(path + ":Other", env={"CONFIG": config})
        assert other.dispense().said() == "hello"
        other.close()


@pytest.mark.skipif(WINDOWS, reason="there the job ends all at once")
@pytest.mark.parametrize("how", ["signal.SIGKILL", "signal.SIGTERM"])
def test_whatever_a_chain_is_it_ends_with_its_first_host(write, tmp_path, how):
    """Each level is another program as far as anybody can tell, so that none is refused while the first host is there."""
    chain = write("chain.txt", f"""
        import os, sys
        import miniplug
        number = int(sys.argv[1])
        with open({str(tmp_path / "levels")!r}, "a") as levels:
            levels.write(f"{{os.getpid()}}\\n")
        assert number < 60  # it has failed: this machine is to survive that
        miniplug.launch([sys.executable, "-c", CODE, str(number + 1)])
    """)
    code = f"import os; CODE = os.environ['CHAIN']; exec(open({chain!r}).read())"
    first = subprocess.Popen([sys.executable, "-c", code, "0"], env=dict(os.environ, PYTHONPATH=ROOT, CHAIN=code),
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: len(levels(tmp_path)) >= 4, 30)
    first.send_signal(getattr(signal, how.split(".")[1]))
    first.wait()
    until(lambda: not any(map(alive, levels(tmp_path))), 5)
    assert len(levels(tmp_path)) < 40
