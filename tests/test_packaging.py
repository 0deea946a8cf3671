"""What is built, what becomes of it where it is installed, and what type checkers see of it.

What this needs is the extra `release`, and a package index. Without them it is skipped, unless MINIPLUG_TEST_PACKAGING=1.
"""

import email
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from readme import follow, run, sections

import miniplug

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "tests" / "typed" / "program.py"
REQUIRED = os.environ.get("MINIPLUG_TEST_PACKAGING") == "1"
VERSION = miniplug.__version__
SCRIPTS, SUFFIX = ("Scripts", ".exe") if os.name == "nt" else ("bin", "")

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not REQUIRED and not all(map(find_spec, ("build", "twine", "mypy", "pyright"))),
                       reason="the extra `release` is not installed"),
]


def call(*command, **options):
    """Run a command to its end, and return what it printed."""
    done = subprocess.run([str(part) for part in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, encoding="utf-8", errors="replace", check=False, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def in_environment(folder, name):
    """A program in a virtual environment."""
    return folder / SCRIPTS / (name + SUFFIX)


def environment_of(python, folder, *arguments):
    """A virtual environment of that Python's, with what ``pip install`` makes of the arguments."""
    call(python, "-m", "venv", folder)
    call(in_environment(folder, "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the sdist, and the wheel that was made from it."""
    folder = tmp_path_factory.mktemp("built")
    done = run(ROOT, "-m", "build", "--outdir", folder)
    if done.returncode and not REQUIRED and "No matching distribution found for hatchling" in done.stdout + done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    return built / f"miniplug-{VERSION}-py3-none-any.whl"


@pytest.fixture(scope="module")
def sdist(built):
    return built / f"miniplug-{VERSION}.tar.gz"


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    """The sdist's folder."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(str(sdist)) as tar:
        tar.extractall(str(folder), **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder / f"miniplug-{VERSION}"


# -- what is built

def test_nothing_else_is_built(built):
    assert sorted(os.listdir(str(built))) == [f"miniplug-{VERSION}-py3-none-any.whl", f"miniplug-{VERSION}.tar.gz"]


def test_the_wheel_holds_the_library_and_its_stubs(wheel):
    source, info = (ROOT / "miniplug.py").read_bytes(), f"miniplug-{VERSION}.dist-info"
    with zipfile.ZipFile(str(wheel)) as archive:
        assert sorted(archive.namelist()) == sorted([
            "miniplug.py", "miniplug-stubs/__init__.pyi", f"{info}/METADATA", f"{info}/RECORD", f"{info}/WHEEL",
            f"{info}/entry_points.txt", f"{info}/licenses/LICENSE"])
        assert archive.read("miniplug.py") == archive.read("miniplug-stubs/__init__.pyi") == source
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only git knows which files there should be")
def test_the_sdist_holds_what_git_does(sdist):
    listed = call("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=str(ROOT)).split("\0")
    there = {name for name in listed if (ROOT / name).is_file()}
    with tarfile.open(str(sdist)) as tar:
        held = {member.name.partition("/")[2]: member for member in tar.getmembers()}
    assert set(held) - {"PKG-INFO"} == there
    assert all(member.isfile() for member in held.values())


def test_the_metadata(wheel, sdist):
    with zipfile.ZipFile(str(wheel)) as archive:
        metadata = archive.read(f"miniplug-{VERSION}.dist-info/METADATA").decode("utf-8")
    with tarfile.open(str(sdist)) as tar:
        assert tar.extractfile(f"miniplug-{VERSION}/PKG-INFO").read().decode("utf-8") == metadata
    told = email.message_from_string(metadata)
    assert (told["Name"], told["Version"], told["Requires-Python"]) == ("miniplug", VERSION, ">=3.8")
    assert (told["License-Expression"], told["License-File"], told["License"]) == ("MIT", "LICENSE", None)
    assert not [each for each in told.get_all("Classifier") if each.startswith("License")]  # the expression says it
    assert [each for each in told.get_all("Requires-Dist") if "extra ==" not in each] == []
    versions = re.findall(r"Python :: 3\.(\d+)$", "\n".join(told.get_all("Classifier")), re.MULTILINE)
    assert list(map(int, versions)) == list(range(8, 16))
    urls = dict(each.split(", ") for each in told.get_all("Project-URL"))
    assert sorted(urls) == ["Changelog", "Documentation", "Homepage", "Issues"]
    assert all(url.startswith("https://github.com/miniplug/miniplug") for url in urls.values())


def test_twine_accepts_both(wheel, sdist):
    call(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)


def test_the_tests_of_the_sdist_run(unpacked):
    assert not list(unpacked.rglob("__pycache__"))
    env = dict(os.environ, PYTEST_ADDOPTS="-n0 -p no:cacheprovider", PYTHONDONTWRITEBYTECODE="1")
    env.pop("PYTHONPATH", None)
    call(sys.executable, "-m", "pytest", "--collect-only", cwd=str(unpacked), env=env)
    printed = call(sys.executable, "-m", "pytest", "tests/test_readme.py", "tests/test_local.py", cwd=str(unpacked), env=env)
    assert re.search(r"^\d+ passed", printed, re.MULTILINE), printed


# -- where it is installed

def pythons():
    """The oldest and the newest Python of this machine's that miniplug is for: [(version, path)]."""
    paths = [sys.executable, *(shutil.which(f"python3.{minor}") for minor in range(8, 16))]
    if shutil.which("pyenv"):
        paths += glob.glob(os.path.join(call("pyenv", "root").strip(), "versions", "3.*", "bin", "python"))
    found = {}
    for path in filter(None, paths):
        done = subprocess.run([path, "-c", "import sys, venv, ensurepip; print(sys.version_info[:2])"], check=False,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if done.returncode == 0:
            found.setdefault(tuple(map(int, re.findall(rb"\d+", done.stdout))), path)
    known = sorted(version for version in found if version >= (3, 8))
    return [(version, found[version]) for version in dict.fromkeys([known[0], known[-1]])]


@pytest.fixture(scope="module", params=["wheel", "sdist"])
def installations(request, tmp_path_factory):
    """A virtual environment for the oldest and for the newest Python, into which pip has installed a file."""
    path = request.getfixturevalue(request.param)
    return [environment_of(python, tmp_path_factory.mktemp("installed"), path) for version, python in pythons()]


def test_it_can_be_used_where_it_is_installed(installations, tmp_path):
    (tmp_path / "greeter.py").write_text("class Greeter:\n def greet(self, name): return f'Hello, {name}!'\n", encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for folder in installations:
        python, miniplug_command = in_environment(folder, "python"), in_environment(folder, "miniplug")
        for command in ([miniplug_command], [python, "-m", "miniplug"]):
            assert call(*command, "--version", env=env, cwd=str(tmp_path)) == f"miniplug {VERSION}\n"
            for spec in ("greeter:Greeter", "greeter.py:Greeter"):
                assert call(*command, "call", spec, "greet", "world", env=env, cwd=str(tmp_path)) == '"Hello, world!"\n'
        code = "import miniplug; print(miniplug.launch('greeter:Greeter').dispense().greet('you'))"
        assert call(python, "-c", code, env=env, cwd=str(tmp_path)) == "Hello, you!\n"
        served = f"import miniplug, sys; miniplug.launch([{str(miniplug_command)!r}, 'serve', 'greeter:Greeter']).close()"
        assert call(python, "-c", served, env=env, cwd=str(tmp_path)) == ""


@pytest.mark.skipif(os.name == "nt", reason="its commands are for a POSIX shell")
def test_the_page_on_vendoring_tells_how_to_install_it(unpacked, tmp_path):
    (tmp_path / "path" / "to" / "the").mkdir(parents=True)
    shutil.copytree(str(unpacked), str(tmp_path / "path" / "to" / "the" / "clone"))
    follow(ROOT / "docs" / "vendoring.md", tmp_path, found=dict(sections(ROOT / "docs" / "vendoring.md"))["To install it"])
    assert call(tmp_path / ".venv" / "bin" / "miniplug", "--version") == f"miniplug {VERSION}\n"


# -- what type checkers see

@pytest.fixture(scope="module", params=["vendored", "installed", "editable"])
def checked(request, tmp_path_factory):
    """A folder with program.py, and the Python that runs it: with the library beside it, or installed there."""
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copy(str(PROGRAM), str(folder))
    if request.param == "vendored":
        shutil.copy(str(ROOT / "miniplug.py"), str(folder))
        venv.create(str(folder / "venv"))
    elif request.param == "installed":
        environment_of(sys.executable, folder / "venv", request.getfixturevalue("wheel"))
    else:
        environment_of(sys.executable, folder / "venv", "-e", request.getfixturevalue("unpacked"))
    return folder, in_environment(folder / "venv", "python")


def by_mypy(folder, python):
    """The lines of program.py that mypy refuses: {number: why}."""
    done = run(folder, "-m", "mypy", "--strict", "--no-error-summary", "--show-absolute-path", "--no-color-output",
               "--cache-dir", folder / "cache", "--python-version", "3.13", "--python-executable", python, "program.py")
    assert done.returncode in (0, 1) and not done.stderr, done.stdout + done.stderr
    found = re.findall(r"^(.+?):(\d+): error: (.*)", done.stdout, re.MULTILINE)
    assert {Path(path).name for path, _, _ in found} <= {"program.py"}, done.stdout
    return {int(line): why for _, line, why in found}


def by_pyright(folder, python):
    """The lines that pyright refuses."""
    (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict", "pythonVersion": "3.13"}', encoding="utf-8")
    done = run(folder, "-m", "pyright", "--outputjson", "--pythonpath", python, "program.py")
    assert done.returncode in (0, 1), done.stdout + done.stderr
    told = json.loads(done.stdout[done.stdout.index("{"):])["generalDiagnostics"]
    assert {Path(each["file"]).name for each in told} <= {"program.py"}
    return {each["range"]["start"]["line"] + 1: each["message"] for each in told}


def differences(refused):
    """What a checker sees in another way than program.py tells: [the line, and why]."""
    lines = PROGRAM.read_text(encoding="utf-8").splitlines()
    expected = {number for number, line in enumerate(lines, 1) if line.endswith("# error")}
    return {lines[number - 1].strip(): refused.get(number, "no error") for number in expected ^ set(refused)}


def test_type_checkers_see_every_type(checked):
    assert [differences(checker(*checked)) for checker in (by_mypy, by_pyright)] == [{}, {}]
