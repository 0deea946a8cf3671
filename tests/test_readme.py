"""The README is followed to the letter: its files written, its commands run, its output compared."""

import os
import shutil
import stat
from pathlib import Path

import pytest
from readme import HOME, blocks, follow, targets

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def the_test_command():
    """The README's command for the tests. It is not run from the tests; `.ci/run` runs it."""
    commands = [text for kind, text in blocks(README) if kind == "sh" and "pytest" in text]
    assert len(commands) == 1
    return commands[0]


def test_readme_shows_what_really_happens(tmp_path):
    shutil.copy(str(ROOT / "miniplug.py"), str(tmp_path))
    shutil.copytree(str(ROOT / "examples" / "greeter"), str(tmp_path / "examples" / "greeter"))
    follow(README, tmp_path, elsewhere=[the_test_command()])


def test_readme_begins_with_the_two_commands():
    commands = [text for kind, text in blocks(README) if kind == "sh"]
    assert commands[:2] == ["python3 examples/greeter/host.py\n", the_test_command()]


def test_readme_is_short():
    """One screen and a half, and the table of the benchmarks."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition("<!-- begin: written by benchmarks/run.py -->")
    table, _, after = rest.partition("<!-- end -->")
    assert table and len((before + after).splitlines()) <= 130


def test_ci_runs_the_command_that_the_readme_gives():
    assert the_test_command() in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert f"run: {the_test_command()}" in workflow
    there = the_test_command().replace("python3", "python").replace("/bin/", "/Scripts/").replace("/", "\\").replace("'", "")
    assert f"run: {there}" in workflow  # as it reads on Windows


@pytest.mark.skipif(os.name == "nt", reason="there is no such bit on Windows")
def test_ci_is_executable():
    assert (ROOT / ".ci" / "run").stat().st_mode & stat.S_IXUSR


def test_links_of_the_readme_work_where_the_repository_is_not():
    """On a package index there is the README alone."""
    text = README.read_text(encoding="utf-8")
    table = text[text.index("<!-- begin: written by benchmarks/run.py -->") : text.index("<!-- end -->")]
    found = set(targets(text)) - set(targets(table))
    assert any(target.startswith(HOME) for target in found)
    assert [target for target in found if not target.startswith("https://")] == []
