"""How the kernels are built: a setuptools extension that may fail without failing the installation, but not in silence.

The compiler's output is kept in ``_kernels.log`` beside the library, so that `nm_compiler.runtime.native.library` can say why
there is none. ``NM_COMPILER_NATIVE=require`` makes a failure an error, ``NM_COMPILER_NATIVE=0`` builds nothing.
The library links to neither Python nor torch: one wheel serves all Python versions of a platform.
Only setuptools imports this module.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setuptools.command.bdist_wheel import bdist_wheel  # type: ignore[import-untyped, unused-ignore]
from setuptools.command.build_ext import build_ext  # type: ignore[import-untyped, unused-ignore]

LOG = "_kernels.log"


class BuildKernels(build_ext):  # type: ignore[misc, unused-ignore]
    """Compile; on failure leave the log and go on."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without the tag of a Python version: the library does not know Python."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Any) -> None:
        """Raises what the compiler's failure raised only under ``NM_COMPILER_NATIVE=require``."""
        wish = os.environ.get("NM_COMPILER_NATIVE", "")
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)
        if wish == "0":
            (library.parent / LOG).write_text("not built: NM_COMPILER_NATIVE=0\n")
            return
        failure: BaseException | None = None
        with _kept() as output:
            try:
                super().build_extension(ext)
            except (Exception, SystemExit) as error:  # setuptools has many
                failure = error
                traceback.print_exc()
        log = output()
        (library.parent / LOG).write_text(log)
        if failure is not None:
            sys.stderr.write(f"nm_compiler: no CPU kernels, layers will stay dense on CPUs.\n{log}")
            if wish == "require":
                raise failure

    def copy_extensions_to_source(self) -> None:
        """For an editable installation: the library, if there is one, and its log."""
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            made = Path(self.build_lib, self.get_ext_filename(ext.name))
            folder = Path(build_py.get_package_dir(ext.name.rpartition(".")[0]))
            for path in (made, made.with_name(LOG)):
                (folder / path.name).unlink(missing_ok=True)
                if path.exists():
                    shutil.copy(path, folder / path.name)

    def get_outputs(self) -> list[str]:
        """What was really made: a library, or only its log."""
        made = [Path(name) for name in super().get_outputs()]
        return [str(path) for name in made for path in (name, name.with_name(LOG)) if path.exists()]


class Wheel(bdist_wheel):  # type: ignore[misc, unused-ignore]
    """For every Python 3 of the platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none-<platform>``."""
        return "py3", "none", super().get_tag()[2]


@contextlib.contextmanager
def _kept() -> Iterator[Any]:
    """Keep what this process and its children write to standard output and error; gives back what reads it."""
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        sys.stderr.flush()
        saved = [os.dup(1), os.dup(2)]
        text = ""
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield lambda: text
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, old in enumerate(saved, 1):
                os.dup2(old, number)
                os.close(old)
            file.seek(0)
            text = file.read().decode(errors="replace")
