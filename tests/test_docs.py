"""The guide and its sisters are followed to the letter: each part's files written, its commands run, its output compared.

A part is what stands below a heading. It is followed in a folder of its own, with the files of all parts before it.
"""

import ast
import importlib.util
import os
import pydoc
import re
import shutil
from pathlib import Path

import pytest
from conftest import WINDOWS, WINE
from readme import BLOCK, FILES, Follower, headings, links, sections, write

import miniplug

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "docs" / name for name in ("guide.md", "vendoring.md")]
PAGES = [ROOT / "README.md", *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
         *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/*/README.md"))]

# What the pages promise and the repository has not yet: link to reason. To be emptied.
NOT_YET: dict = {}

NEEDS = {"Tk": "tkinter", "Qt": "PySide6", "Numbers and large data": "numpy"}  # what a part imports: skipped without
POSIX_ONLY = ("Debugging", "Where to put it", "By its path")  # the commands are some for a POSIX shell
ELSEWHERE = "To install it"  # tests/test_packaging.py follows that part, which needs a package index


def parts():
    found_parts = []
    for page in DOCS:
        for number, (heading, found) in enumerate(sections(page)):
            if heading != ELSEWHERE:
                found_parts.append(pytest.param(page, number, found, id=f"{page.stem}: {heading}"))
    return found_parts


def installed(folder, project):
    """Put a project's module and entry points where pip would, and pip's own work aside: it needs an index."""
    text = (folder / project / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"', text, re.MULTILINE).group(1)
    (module,) = re.findall(r'^py-modules = \["(.+)"\]', text, re.MULTILINE)
    groups = re.findall(r'^\[project\.entry-points\."(.+)"\]\n((?:\w.*\n)*)', text, re.MULTILINE)
    site = folder / "site"
    info = site / f"{project.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("".join(f"[{name}]\n{lines}".replace('"', "") for name, lines in groups))
    shutil.copy(str(folder / project / f"{module}.py"), str(site))
    return site


@pytest.mark.parametrize("page, number, found", parts())
def test_a_part_shows_what_really_happens(page, number, found, tmp_path):
    heading = sections(page)[number][0]
    if heading in POSIX_ONLY and WINDOWS:
        pytest.skip("its commands are for a POSIX shell")
    if heading in NEEDS and not importlib.util.find_spec(NEEDS[heading]):
        pytest.skip(f"{NEEDS[heading]} is not installed")
    if heading == "Tk" and not (os.environ.get("DISPLAY") or (WINDOWS and not WINE)):
        pytest.skip("there is no display")
    shutil.copy(str(ROOT / "miniplug.py"), str(tmp_path))
    if page.stem == "vendoring" and heading != "Where to put it":  # what the commands of that part do
        for place in ("__init__.py", "_vendor/__init__.py", "_vendor/miniplug.py"):
            (tmp_path / "app" / place).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "app" / place).write_bytes((ROOT / "miniplug.py").read_bytes() if "mini" in place else b"")
    for _, earlier in sections(page)[:number]:
        for kind, text in earlier:
            if kind in FILES:
                write(tmp_path, text)
    follower = Follower(tmp_path)
    follower.environment["QT_QPA_PLATFORM"] = "offscreen"
    try:
        for kind, text in found:
            if text.startswith("python3 -m pip install ./"):
                for project in re.findall(r"\./(\S+)", text):
                    follower.environment["PYTHONPATH"] = str(installed(tmp_path, project))
            else:
                follower.follow([(kind, text)])
    finally:
        follower.close()


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_block_is_in_a_part_that_is_followed(page):
    assert sum(len(found) for _, found in sections(page)) == len(BLOCK.findall(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, anchor in links(page, ROOT):
        name = os.path.relpath(str(target), str(ROOT)).replace(os.sep, "/")
        assert target.exists() != (name in NOT_YET), name
        assert not anchor or target.suffix != ".md" or anchor in headings(target), f"{name}#{anchor}"


def test_files_that_contributing_names_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"(?:tests|docs|benchmarks|\.ci)/[\w./*-]*\w", text)
    assert len(named) > 30
    assert [name for name in named if not list(ROOT.glob(name)) and name not in NOT_YET] == []


def defined(file):
    """The names that a file has: functions, classes, what is assigned; of classes with a dot, too."""
    found = set()

    def add(node, prefix):
        for each in ast.iter_child_nodes(node):
            if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.update((each.name, prefix + each.name))
                add(each, f"{each.name}." if isinstance(each, ast.ClassDef) else prefix)
            elif isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store):
                found.update((each.attr, prefix + each.attr))
            elif isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
                found.update((each.id, prefix + each.id))
            else:
                add(each, prefix)

    add(ast.parse(file.read_text(encoding="utf-8")), "")
    return found


def test_what_the_review_names_is_there():
    text = (ROOT / "docs" / "review.md").read_text(encoding="utf-8")
    files = re.findall(r"`(tests/[\w./]+)`", text)
    tests = re.findall(r"`(test_\w+)`", text)
    names = re.findall(r"`((?!test_)_?[A-Za-z][\w.]*)`", text)
    assert len(files) > 20 and len(tests) > 30 and len(names) > 60
    assert [file for file in files if not (ROOT / file).exists()] == []
    known = set().union(*map(defined, (ROOT / "tests").rglob("test_*.py")))
    assert [test for test in tests if test not in known] == []
    known = defined(ROOT / "miniplug.py")
    assert [name for name in names if name not in known] == []


def test_names_in_the_head_of_the_file_are_there():
    head = (ROOT / "miniplug.py").read_text(encoding="utf-8").partition("\nfrom __future__")[0].rpartition('"""')[2]
    names = re.findall(r"\b_?[A-Z]\w+\.\w+|\b_[a-zA-Z]\w+", head)
    known = defined(ROOT / "miniplug.py")
    assert len(names) > 30 and [name for name in names if name not in known] == []


def test_the_file_is_made_of_what_can_be_read_at_once():
    source = (ROOT / "miniplug.py").read_text(encoding="utf-8")
    assert [line for line in source.splitlines() if len(line) > 110] == []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            lines, limit = node.end_lineno - node.lineno + 1, 300 if isinstance(node, ast.ClassDef) else 50
            assert lines <= limit, f"{node.name} has {lines} lines"


def test_reference_is_made_of_the_docstrings_as_they_are():
    spec = importlib.util.spec_from_file_location("make_reference", str(ROOT / "docs" / "make_reference.py"))
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    shown = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert shown == maker.reference(), "run: python docs/make_reference.py"


def test_help_tells_how_to_call_a_method():
    text = pydoc.plain(pydoc.render_doc(miniplug))
    for told in ("m.submit(", "m.notify(", "m.timeout(", "class Plugin(", "class Call(", "class Stream(", "class CallTimeout("):
        assert told in text, told


def test_what_is_not_yet_is_named_in_the_pages():
    known = {os.path.relpath(str(target), str(ROOT)).replace(os.sep, "/") for page in PAGES for target, _ in links(page, ROOT)}
    assert set(NOT_YET) <= known
