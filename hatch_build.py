"""What the build does beside copying: the stubs by which type checkers see the types of an installed copy."""

import shutil
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Stubs(BuildHookInterface):
    """Type checkers believe an installed package that says it is typed, but never a single module (PEP 561). So the wheel
    has a package of stubs, too, which is the library itself once more: an installed copy has the types of a vendored one.
    That of an editable install has those of the day it was made."""

    def initialize(self, version, build_data):
        self.folder = tempfile.TemporaryDirectory()
        stubs = shutil.copyfile(str(Path(self.root, "miniplug.py")), str(Path(self.folder.name, "__init__.pyi")))
        build_data["force_include"][stubs] = "miniplug-stubs/__init__.pyi"

    def finalize(self, version, build_data, artifact_path):
        self.folder.cleanup()
