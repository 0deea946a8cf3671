"""What there is to launch: files in a folder, entry points of what is installed."""

import logging
import os
import pathlib
import subprocess
import sys
import zipfile

import pytest
from conftest import HERE, WINDOWS

import miniplug

PLUGIN = "class Tool:\n    def hello(self): return __file__\n"


def program(path):
    """Write what the system takes for a program. Returns its path."""
    path = f"{path}.bat" if WINDOWS else str(path)
    with open(path, "w", encoding="utf-8") as file:
        file.write("@echo off\n" if WINDOWS else "#!/bin/sh\n")
    os.chmod(path, 0o755)
    return path


def names(found):
    return [path.name for path in found]


def test_files_that_can_be_launched(write, tmp_path):
    for name in ("zeta.py", "alpha.py", "window.pyw", "read me.txt", "alpha.py~", "alpha.pyc", ".hidden.py", "__init__.py",
                 "_private.py", "folder/inside.py", "folder.py/inside.py", "__pycache__/zeta.py", ".venv/bin.py"):
        write(name, PLUGIN)
    tool = program(tmp_path / "tool")
    program(tmp_path / ".hidden")
    found = miniplug.discover(tmp_path)
    assert names(found) == ["alpha.py", os.path.basename(tool), "window.pyw", "zeta.py"]
    assert all(path.is_absolute() for path in found)
    assert miniplug.discover(str(tmp_path)) == found


def test_what_was_found_is_launched(write, tmp_path, monkeypatch):
    write("plugins/ünï cödé.py", PLUGIN)
    monkeypatch.chdir(tmp_path)
    (path,) = miniplug.discover("plugins")
    with miniplug.launch(f"{path}:Tool", cwd=os.path.dirname(str(tmp_path))) as plugin:  # wherever it runs
        assert plugin.dispense().hello() == str(tmp_path / "plugins" / "ünï cödé.py")


def test_patterns(write, tmp_path):
    for name in ("one.py", "two.py", "a/plugin.py", "b/plugin.py", "b/other.py", ".c/plugin.py", "_d/plugin.py"):
        write(name, PLUGIN)
    program(tmp_path / "tool")
    assert names(miniplug.discover(tmp_path, "*.py")) == ["one.py", "two.py"]
    assert names(miniplug.discover(tmp_path, "t*.py")) == ["two.py"]
    assert [path.parent.name for path in miniplug.discover(tmp_path, "*/plugin.py")] == ["a", "b"]
    assert miniplug.discover(tmp_path, "*.exe") == []
    assert len(miniplug.discover(tmp_path, "**/*.py")) == len(miniplug.discover(tmp_path, "**/**/*.py")) == 5
    assert len(miniplug.discover(tmp_path, "**/*")) == 6
    assert names(miniplug.discover(tmp_path, "./b//plugin.py")) == names(miniplug.discover(tmp_path, os.path.join("a", "*")))
    assert names(miniplug.discover(tmp_path, "[ot]*.py")) == ["one.py", "two.py"]
    assert miniplug.discover(tmp_path / "a", "../*") == miniplug.discover(tmp_path, "one.py/*") == []


@pytest.mark.parametrize("pattern", ["", ".", "/", os.path.abspath("*")])
def test_a_pattern_that_is_none(tmp_path, pattern):
    with pytest.raises(ValueError, match="a glob relative to the folder"):
        miniplug.discover(tmp_path, pattern)


@pytest.mark.skipif(WINDOWS, reason="links and modes are POSIX")
def test_links_are_followed_and_modes_count(write, tmp_path):
    write("elsewhere/real.py", PLUGIN)
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "link.py").symlink_to(tmp_path / "elsewhere" / "real.py")
    (folder / "dangling.py").symlink_to(tmp_path / "nowhere.py")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(str(folder / "pipe.py"))
    (folder / "data").write_text("no program")
    (folder / "astray.py").symlink_to("x" * 300)  # no file has so long a name, which is an error of its own
    assert names(miniplug.discover(folder)) == ["link.py"]
    (folder / "astray.py").unlink()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    write("plugins/deep/plugin.py", PLUGIN)
    assert names(miniplug.discover(folder, "*/*.py")) == ["plugin.py", "real.py", "link.py"]  # the last one through the loop
    assert names(miniplug.discover(folder, "**/*.py")) == ["plugin.py", "link.py"]


def test_a_folder_that_is_none(write, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        miniplug.discover(tmp_path / "nothing")
    with pytest.raises(OSError if WINDOWS else NotADirectoryError, match=r"file\.py"):
        miniplug.discover(write("file.py", ""))
    (tmp_path / "empty").mkdir()
    assert miniplug.discover(tmp_path / "empty") == []


# -- entry points


@pytest.fixture
def site(write, tmp_path, monkeypatch):
    """Install distributions in folders on sys.path: site(folder, name, entry_points.txt)."""
    def site(folder, name, entry_points, version="1.0"):
        info = f"{folder}/{name}-{version}.dist-info"
        write(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        if isinstance(entry_points, bytes):
            (tmp_path / info / "entry_points.txt").write_bytes(entry_points)
        else:
            write(f"{info}/entry_points.txt", entry_points)
        if str(tmp_path / folder) not in sys.path:
            monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / folder)])

    return site


def test_entry_points_are_names_and_specs(site, write):
    site("lib", "shop", """
        [my.plugins]
        csv = shop_exports_xyz:Csv
        nested = shop_exports_xyz : Outer.Inner
        extra = shop_exports_xyz:Extra [fast, more]

        [console_scripts]
        shop = shop_exports_xyz:main
    """)
    site("lib", "other", "[my.plugins]\nother=other_xyz:Plugin\n")
    write("lib/shop_exports_xyz.py", "raise SystemExit('imported')")
    assert miniplug.discover_entry_points("my.plugins") == {
        "csv": "shop_exports_xyz:Csv", "nested": "shop_exports_xyz:Outer.Inner", "extra": "shop_exports_xyz:Extra",
        "other": "other_xyz:Plugin"}
    assert not {"shop_exports_xyz", "other_xyz"} & set(sys.modules)  # nothing is imported
    assert miniplug.discover_entry_points("no.such.group") == {}


@pytest.mark.parametrize("broken", ["this is no ini file\n", b"[my.plugins]\nbad = \xff\xfe:\n", "[my.plugins\nx=y:Z\n",
                                    "[my.plugins]\nbad = no_attribute\n", "[my.plugins]\nbad = a:b:c ???\n", "[my.plugins]\nbad\n"])
def test_a_broken_distribution_hides_no_other(site, broken, caplog):
    site("lib", "aaa", broken)
    site("lib", "zzz", "[my.plugins]\ngood = zzz_xyz:Good\n")
    with caplog.at_level(logging.WARNING, "miniplug"):
        found = miniplug.discover_entry_points("my.plugins")
    assert found["good"] == "zzz_xyz:Good" and "bad" not in found


def test_what_is_left_out_is_told(site, caplog):
    site("lib", "aaa", "[my.plugins]\nbad = module_alone\n")
    site("lib", "abb", "[my.plugins]\nfile = folder/file.py:Attr\nabove = ..module:Attr\n")
    site("lib", "bbb", b"[my.plugins]\nworse = \xff:X\n")
    with caplog.at_level(logging.WARNING, "miniplug"):
        assert miniplug.discover_entry_points("my.plugins") == {}
    assert "names no attribute of a module: bad = module_alone" in caplog.text
    assert "names no attribute of a module: file = folder/file.py:Attr" in caplog.text and "..module:Attr" in caplog.text
    assert "bbb-1.0.dist-info cannot be read: UnicodeDecodeError" in caplog.text


def test_the_first_on_the_path_counts(site, tmp_path):
    site("early", "shop", "[my.plugins]\ncsv = new_xyz:Csv\n", "2.0")
    site("late", "shop", "[my.plugins]\ncsv = old_xyz:Csv\nxml = old_xyz:Xml\n", "1.0")
    assert miniplug.discover_entry_points("my.plugins") == {"csv": "new_xyz:Csv", "xml": "old_xyz:Xml"}


def test_a_distribution_without_a_name_counts(site, tmp_path):
    site("lib", "shop", "[my.plugins]\ncsv = shop_xyz:Csv\n")
    site("lib", "nameless", "[my.plugins]\nother = other_xyz:Other\n")
    (tmp_path / "lib" / "nameless-1.0.dist-info" / "METADATA").unlink()
    assert miniplug.discover_entry_points("my.plugins") == {"csv": "shop_xyz:Csv", "other": "other_xyz:Other"}


def test_one_in_a_zip_file_counts(tmp_path, monkeypatch):
    with zipfile.ZipFile(str(tmp_path / "lib.zip"), "w") as file:
        file.writestr("zipped-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: zipped\nVersion: 1.0\n")
        file.writestr("zipped-1.0.dist-info/entry_points.txt", "[my.plugins]\nzipped = zipped_xyz:Zipped\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "lib.zip")])
    assert miniplug.discover_entry_points("my.plugins") == {"zipped": "zipped_xyz:Zipped"}


def test_what_was_found_runs_where_it_is_installed(site, write, tmp_path):
    """A spec of an installed distribution: host and plugin find the module on the same path."""
    site("lib", "shop", "[my.plugins]\ngreeter = installed_xyz:Greeter\n")
    write("lib/installed_xyz.py", "class Greeter:\n    def greet(self, name): return f'Hello, {name}!'\n")
    host = write("host.py", """
        import miniplug
        for name, spec in miniplug.discover_entry_points("my.plugins").items():
            with miniplug.launch(spec, name=name) as plugin:
                print(name, plugin.dispense().greet("world"))
    """)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path / "lib"), os.path.dirname(HERE)]))
    assert subprocess.check_output([sys.executable, host], env=env, universal_newlines=True) == "greeter Hello, world!\n"


def test_a_bad_entry_hides_no_other_of_its_distribution(site, caplog):
    """Some Pythons raise for the first, whichever group it is in, and others leave out what comes with it."""
    site("lib", "shop", """
        [my.plugins]
        first = shop_xyz:First
        bad = ???
        = shop_xyz:Nameless
        alone
        # comment = shop_xyz:Comment
        ; comment = shop_xyz:Comment
          indented=shop_xyz:Indented
        with:colon = shop_xyz:Colon
        last = shop_xyz:Last
        [other]
        = !
        []
        x = y
    """)
    with caplog.at_level(logging.WARNING, "miniplug"):
        found = miniplug.discover_entry_points("my.plugins")
    assert found == {"first": "shop_xyz:First", "indented": "shop_xyz:Indented", "with:colon": "shop_xyz:Colon",
                     "last": "shop_xyz:Last"}
    assert all(f"names no attribute of a module: {line}\n" in caplog.text for line in ("bad = ???", "alone", "= shop_xyz:Nameless"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another environment: its interpreter, and the folder where it has its packages."""
    folder = tmp_path_factory.mktemp("other") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = str(folder / "Scripts" / "python.exe") if WINDOWS else str(folder / "bin" / "python")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return python, pathlib.Path(subprocess.check_output([python, "-c", where], universal_newlines=True).strip())


def test_the_entry_points_of_another_environment(site, other, monkeypatch, caplog, tmp_path):
    """Without its plugins being imported, without miniplug in it, and without what is installed here."""
    python, packages = other
    info = packages / "shop-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shop\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[my.plugins]\ncsv = shop_there:Csv\nbad = alone\n")
    (packages / "shop_there.py").write_text(
        "import sys\nprint('imported', file=sys.stderr)\nclass Csv:\n    def where(self):\n        return sys.prefix\n")
    site("lib", "here", "[my.plugins]\nhere = here_xyz:Here\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING, "miniplug"):
        assert miniplug.discover_entry_points("my.plugins", python=python) == {"csv": "shop_there:Csv"}
        assert miniplug.discover_entry_points("no.group", python=pathlib.Path(python)) == {}
    assert "names no attribute of a module: bad = alone" in caplog.text and "imported" not in caplog.text
    assert "here" in miniplug.discover_entry_points("my.plugins")
    with miniplug.launch("shop_there:Csv", python=python) as plugin:
        assert os.path.samefile(plugin.dispense().where(), os.path.dirname(os.path.dirname(python)))


def test_an_interpreter_that_does_not_run_is_told(tmp_path):
    with pytest.raises(miniplug.LaunchError, match=r"python: \["):
        miniplug.discover_entry_points("my.plugins", python=tmp_path / "python")


@pytest.mark.parametrize("call, words", [
    (lambda: miniplug.discover_entry_points(5), "group=5: it is a str"),
    (lambda: miniplug.discover_entry_points(None), "group=None: "),
    (lambda: miniplug.discover(".", 5), "pattern=5: it is a str"),
    (lambda: miniplug.discover(".", ["*.py"]), r"pattern=\['\*.py'\]: it is a str"),
])
def test_what_is_no_text_is_told_by_its_name(call, words):
    with pytest.raises(TypeError, match=words):
        call()
