"""The container example. There is no container engine here: its Dockerfile is carried out in a root of Debian's packages,
and what it makes is run as an engine would run it, in namespaces of its own, as process 1. The same is done without a
Dockerfile in this machine's own root. Both need Linux, the right to make namespaces, and that one is root.

The first needs debootstrap and Debian's packages too, and a minute: it is run where MINIPLUG_TEST_CONTAINER=1.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import until
from readme import follow, run

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "container"
MISCHIEF = '''
import logging, os, signal, subprocess, sys, time

class Tool:
    def whoami(self):
        return [os.getuid(), os.getgid(), os.getgroups(), os.getppid(), os.path.realpath(sys.executable)]

    def write(self, path):
        with open(path, "w") as file:
            file.write("here")

    def crash(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def orphan(self):
        """Start a process that its parent does not wait for, in a session of its own; return its pid."""
        sleeper = "[sys.executable, '-c', 'import time; time.sleep(600)'], stdout=subprocess.DEVNULL, start_new_session=True"
        parent = f"import subprocess, sys; print(subprocess.Popen({sleeper}).pid)"
        return int(subprocess.check_output([sys.executable, "-c", parent]))

    def linger(self):
        logging.getLogger().warning("begun")
        time.sleep(1)
        return "done"
'''

# What an engine does: the root read-only, /proc for the new process namespace, and nothing to write to but a /tmp.
# $1: the root; $2: where it goes; $3: the user; $4: how /tmp is mounted, rw or ro; then NAME=FOLDER for each folder that
# is to be bound as /mnt/NAME; --; the command.
ENGINE = '''
set -e
root=$1 new=$2 user=$3 tmp=$4
shift 4
mount --rbind "$root" "$new"
mount -o remount,bind,ro "$new"
mount -t proc proc "$new/proc"
mount -t tmpfs tmpfs "$new/mnt"
while [ "$1" != -- ]; do
    mkdir "$new/mnt/${1%%=*}"
    mount --bind "${1#*=}" "$new/mnt/${1%%=*}"
    mount -o remount,bind,ro "$new/mnt/${1%%=*}"
    shift
done
shift
mount -o remount,ro "$new/mnt"
mount -t tmpfs -o "$tmp" tmpfs "$new/tmp"
mount -t tmpfs -o ro tmpfs "$new/var/tmp"
exec chroot "$new" setpriv --reuid "${user%:*}" --regid "${user#*:}" --clear-groups --no-new-privs --bounding-set=-all "$@"
'''


def may_make_namespaces():
    if sys.platform != "linux" or os.getuid() or not all(map(shutil.which, ("unshare", "setpriv", "chroot", "mount"))):
        return False
    probe = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    return subprocess.run(probe, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0


PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
namespaces = pytest.mark.skipif(not may_make_namespaces(), reason="no namespaces can be made here")


# -- without a container

@pytest.fixture
def clone(tmp_path):
    shutil.copy(str(ROOT / "miniplug.py"), str(tmp_path))
    shutil.copytree(str(EXAMPLE), str(tmp_path / "examples" / "container"), ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_it_does_what_its_readme_shows(clone):
    follow(EXAMPLE / "README.md", clone, elsewhere=[
        text for text in re.findall(r"```sh\n(.*?)```", (EXAMPLE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        if text.startswith(("docker ", "curl "))])


def test_the_readme_has_the_command_of_the_dockerfile():
    (command,) = re.findall(r"docker build .*", (EXAMPLE / "Dockerfile").read_text(encoding="utf-8"))
    assert command + "\n" in (EXAMPLE / "README.md").read_text(encoding="utf-8")


def test_it_says_what_it_takes(clone):
    done = run(clone, "examples/container/host.py", "many")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "usage: host.py [PORT], or host.py --check\n")


def test_a_plugin_that_does_not_compile_fails_the_check(clone):
    (clone / "examples" / "container" / "plugins" / "broken.py").write_text("def (", encoding="utf-8")
    assert run(clone, "examples/container/host.py", "--check").returncode == 1


# -- as process 1

def fields(pid):
    """What the kernel tells of a process: {name: value}. Empty if it is gone, with its zombie."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def children(pid):
    """The processes whose parent this is: {pid: fields}."""
    found = {int(name): fields(name) for name in os.listdir("/proc") if name.isdigit()}
    return {child: told for child, told in found.items() if told.get("PPid") == str(pid)}


class Container:
    """A running one. `first`: process 1, as its number is out here."""

    def __init__(self, folder, root, command, user="65532:65532", env=(), bound=(), tmp="rw"):
        (folder / "root").mkdir()
        self.process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "--pid", "--ipc", "--uts", "--fork", "--kill-child",
             "sh", "-c", ENGINE, "engine", str(root), str(folder / "root"), user, tmp, *bound, "--", *command, "0"],
            cwd="/", env={"PATH": PATH, **dict(env)}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, encoding="utf-8")
        self.said, self.first = [], None
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self):
        for line in self.process.stderr:
            self.said.append(line)

    def await_word(self, pattern):
        """Wait until it has said that, and return the match."""
        until(lambda: re.search(pattern, "".join(self.said)) or self.process.poll() is not None, 20)
        found = re.search(pattern, "".join(self.said))
        assert found, "".join(self.said)
        return found

    def __enter__(self):
        try:
            self.port = int(self.await_word(r"listening on port (\d+)").group(1))
            (self.first,) = children(self.process.pid)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        if self.first and self.process.poll() is None:
            os.kill(self.first, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        self.reader.join()
        self.process.stderr.close()

    def get(self, path):
        """(status, what is answered) of a request."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=20) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)["error"]

    def processes(self):
        """What runs in it: {number in there: number out here}."""
        space, found = os.stat(f"/proc/{self.first}/ns/pid"), {}
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError, KeyError):
                if os.path.samestat(os.stat(f"/proc/{name}/ns/pid"), space):
                    found[int(fields(name)["NSpid"].split()[-1])] = int(name)
        return found


def does_as_it_should(container, app, tmp):
    told = fields(container.first)
    assert told["NSpid"].split()[-1] == "1" and set(told["Uid"].split() + told["Gid"].split()) == {"65532"}
    assert (int(told["CapEff"], 16), int(told["CapBnd"], 16), told["NoNewPrivs"], told["Groups"]) == (0, 0, "1", "")
    assert container.get("text/slug?title=Hello,+world") == (200, "hello-world")
    assert {container.get(path)[0] for path in ("text/slog", "text/_session", "text", "txt/slug")} == {404}
    assert container.get("primes/factors?number=x")[0] == 500
    for path in (f"{app}/plugins/new.py", f"{app}/host.py", "/var/tmp/new", *(["/tmp/new"] if tmp == "ro" else [])):
        assert container.get(f"mischief/write?path={path}") == (500, f"OSError: [Errno 30] Read-only file system: '{path}'")

    status, error = container.get("mischief/crash")  # one request is lost,
    assert status == 502 and "SIGKILL" in error
    number = container.get("mischief/orphan")[1]  # and the next one has a fresh process
    orphan = container.processes()[number]
    until(lambda: fields(orphan)["PPid"] == str(container.first), 10)
    os.kill(orphan, signal.SIGKILL)
    until(lambda: fields(orphan) == {}, 10)  # no zombie either

    answers = []
    request = threading.Thread(target=lambda: answers.append(container.get("mischief/linger")))
    request.start()
    container.await_word("begun")
    os.kill(container.first, signal.SIGTERM)  # as ``docker stop``
    assert container.process.wait(20) == 0
    request.join()
    assert answers == [(200, "done")]  # what was in flight has been answered
    container.reader.join()
    assert container.said[-1] == "INFO service: stopped\n" and "Traceback" not in "".join(container.said)


def in_this_root(folder):
    """What Container takes for the example in this machine's own root, where only root may get at a Python or a clone."""
    app, prefix = folder / "app", os.path.realpath(sys.base_prefix)
    shutil.copytree(str(EXAMPLE), str(app), ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(str(ROOT / "miniplug.py"), str(app))
    (app / "plugins" / "mischief.py").write_text(MISCHIEF, encoding="utf-8")
    python = os.path.join("/mnt/python", os.path.relpath(os.path.realpath(sys.executable), prefix))
    return {"root": "/", "command": [python, "/mnt/app/host.py"], "bound": [f"app={app}", f"python={prefix}"],
            "env": {"LD_LIBRARY_PATH": "/mnt/python/lib"}}  # where a shared libpython is


@namespaces
@pytest.mark.parametrize("tmp", ["rw", "ro"])
def test_process_1_serves_reaps_and_ends_orderly(tmp_path, tmp):
    with Container(tmp_path, **in_this_root(tmp_path), tmp=tmp) as container:
        does_as_it_should(container, "/mnt/app", tmp)


@namespaces
@pytest.mark.parametrize("name, status", [("SIGINT", 0), ("SIGUSR1", 128 + 10)])
def test_process_1_passes_signals_on_and_ends_as_the_application(tmp_path, name, status):
    with Container(tmp_path, **in_this_root(tmp_path)) as container:
        os.kill(container.first, getattr(signal, name))
        assert container.process.wait(20) == status


# -- as the Dockerfile makes it

def call(*command, **options):
    """Run a command to its end."""
    done = subprocess.run([str(part) for part in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, encoding="utf-8", errors="replace", check=False, **options)
    assert done.returncode == 0, done.stdout


def instructions():
    """The Dockerfile's: [(word, rest)], continued lines joined."""
    text = re.sub(r"^#.*\n", "", (EXAMPLE / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line.split(None, 1) for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(word, rest) for word, rest in lines]


def build(folder):
    """Do what the Dockerfile says, of which this knows what that uses; return what Container takes for it."""
    stages, made = {}, {}
    for word, rest in instructions():
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            root, made = folder / f"stage{len(stages)}", {"env": {"PATH": PATH}}
            folder_now = "/"
            if base in stages:
                call("cp", "-a", stages[base], root)
            else:  # what stands in for the image of that name
                assert re.fullmatch(r"debian:13\.\d+-slim", base)
                call("debootstrap", "--variant=minbase", "trixie", root)
                shutil.copy("/etc/resolv.conf", str(root / "etc"))
            stages[name or "the last"] = root
        elif word == "RUN":
            call("chroot", root, "sh", "-c", f"cd {folder_now} && {rest}", env=made["env"])
        elif word == "WORKDIR":
            folder_now = rest
            (root / rest.lstrip("/")).mkdir()
        elif word == "COPY":
            *sources, target = rest.split()
            origin = stages[sources.pop(0).partition("=")[2]] if sources[0].startswith("--from=") else ROOT
            target = root / os.path.join(folder_now, target).lstrip("/")
            for source in (origin / source.lstrip("/") for source in sources):
                call("cp", "-a", *([f"{source}/.", target] if source.is_dir() else [source, target]))
        elif word == "ENV":
            made["env"].update(each.split("=", 1) for each in rest.split())
        elif word == "USER":
            made["user"] = rest
        elif word == "ENTRYPOINT":
            made["command"] = json.loads(rest)
        else:
            assert word == "EXPOSE"
    return {**made, "root": stages["the last"]}


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    yield build(folder)
    shutil.rmtree(str(folder))


@namespaces
@pytest.mark.timeout(400)
@pytest.mark.skipif(os.environ.get("MINIPLUG_TEST_CONTAINER") != "1", reason="takes a minute, and Debian's packages")
def test_what_the_dockerfile_makes(image, tmp_path):
    app = image["root"] / "app"
    assert sorted(path.name for path in app.rglob("*.py")) == ["host.py", "miniplug.py", "primes.py", "text.py"]
    assert [path for path in app.rglob("*.pyc") if path.name.startswith("miniplug.")]
    (app / "plugins" / "mischief.py").write_text(MISCHIEF, encoding="utf-8")
    with Container(tmp_path, **image) as container:
        does_as_it_should(container, "/app", "rw")
