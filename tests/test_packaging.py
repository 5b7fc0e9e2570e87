"""The three packages nm_compiler, nm_compiler.passes and nm_compiler.runtime are one install, however they are got."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import nm_compiler

ROOT = Path(__file__).parents[1]
LINKED = ("passes", "runtime")
SOURCES = ("nm_compiler", *LINKED, "pyproject.toml", "README.md", "LICENSE")

with (ROOT / "pyproject.toml").open("rb") as _file:
    PROJECT = tomllib.load(_file)
LISTED: list[str] = PROJECT["tool"]["setuptools"]["packages"]


def files_on_disk() -> list[str]:
    """Every file of the three packages, as it should lie in site-packages. A new data file belongs in package-data."""
    found = []
    for top, name in (("nm_compiler", "nm_compiler"), ("passes", "nm_compiler/passes"), ("runtime", "nm_compiler/runtime")):
        for folder, _, files in os.walk(ROOT / top):  # does not follow the links
            if Path(folder).name != "__pycache__":
                inside = Path(name) / Path(folder).relative_to(ROOT / top)
                found += [
                    (inside / file).as_posix() for file in files if file not in LINKED and not file.startswith("_kernels.")
                ]
    return sorted(found)


def packages_on_disk() -> set[str]:
    """Every directory with Python files, by the name it is imported under."""
    return {file.rpartition("/")[0].replace("/", ".") for file in files_on_disk() if file.endswith(".py")}


def test_every_package_on_disk_is_listed_in_pyproject_and_the_other_way_round() -> None:
    assert sorted(LISTED) == sorted(packages_on_disk())


@pytest.mark.parametrize("name", LISTED)
def test_a_listed_package_has_an_init_file_and_imports(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__name__ == name
    assert module.__file__ is not None
    assert Path(module.__file__).name == "__init__.py"


@pytest.mark.required
@pytest.mark.parametrize("name", LINKED)
def test_the_link_inside_nm_compiler_points_at_the_top_level_folder(name: str) -> None:
    link = ROOT / "nm_compiler" / name
    if not link.is_symlink():
        pytest.skip("this checkout was made without symbolic links; the installed package does not need them")
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == (ROOT / name).resolve()


@pytest.mark.parametrize("name", LINKED)
def test_importing_a_bare_top_level_folder_says_what_to_import_instead(name: str) -> None:
    found = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert f"ImportError: import nm_compiler.{name}" in found.stderr


def test_the_package_says_that_it_is_typed_and_which_version_it_is() -> None:
    assert Path(nm_compiler.__file__).with_name("py.typed").is_file()
    assert nm_compiler.__version__ == PROJECT["project"]["version"]


def test_constraints_pin_every_direct_dependency_and_torch_without_a_local_version() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(line.count("==") == 1 and "+" not in line for line in lines)
    pinned = {line.split("==")[0]: line.split("==")[1] for line in lines}
    assert pinned["torch"] == "2.13.0"
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(extras) >= {"demo", "onnx", "hf", "tensorrt", "dev"}
    wanted = [*PROJECT["project"]["dependencies"], *(name for extra in extras.values() for name in extra)]
    names = {name.split("[")[0].split(">")[0].split("=")[0] for name in wanted} - {"nm_compiler"}
    assert names <= set(pinned)


def compile_quickly(project: Path) -> None:
    """Without the slow half of the sources, and unoptimized: `make` has compiled all of them as they are listed.

    They stay in the wheel, as those that others depend on; a shared library links without them.
    """
    slow = [f'    "runtime/native/sweep_{isa}.c",\n' for isa in ("avx512", "avx2", "portable")]
    text = project.read_text()
    for line in slow:
        assert text.count(line) == 1
        text = text.replace(line, "").replace("depends = [\n", f"depends = [\n{line}")
    assert text.count('"-O2"') == 1
    project.write_text(text.replace('"-O2"', '"-O0"'))


@pytest.mark.ci(here=["without links"])
@pytest.mark.parametrize("links", [True, False], ids=["with links", "without links"])
def test_a_wheel_holds_every_file_once_under_nm_compiler(tmp_path: Path, links: bool) -> None:
    """Without links, git leaves a text file that holds the target where each link would be."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "_kernels.*"))
        else:
            shutil.copy(source, tree / name)
    for name in LINKED:
        link = tree / "nm_compiler" / name
        link.unlink()
        link.symlink_to(f"../{name}") if links else link.write_text(f"../{name}")
    if links:
        compile_quickly(tree / "pyproject.toml")
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('..'))"
    wish = {"NM_COMPILER_NATIVE": "require"} if links else {"CC": "false"}  # a machine without a working compiler
    built = subprocess.run(
        [sys.executable, "-c", build], cwd=tree, capture_output=True, text=True, check=False, env={**os.environ, **wish}
    )
    assert built.returncode == 0, built.stderr
    assert built.stdout.split()[-1].startswith("nm_compiler-0.1.0-py3-none-"), "one wheel for every Python 3 of the platform"
    with zipfile.ZipFile(tmp_path / built.stdout.split()[-1]) as wheel:
        names = wheel.namelist()
        metadata = next(name for name in names if name.endswith(".dist-info/entry_points.txt"))
        assert "nm-compiler = nm_compiler.cli:main" in wheel.read(metadata).decode()
        kernels = "nm_compiler/runtime/native/_kernels"
        log = wheel.read(f"{kernels}.log").decode()
    made = {f"{kernels}.log", f"{kernels}.so"} if links else {f"{kernels}.log"}
    assert made == {name for name in names if name.startswith(kernels)}
    assert links or "CompileError" in log, "the log says why there are no kernels"
    assert sorted(name for name in set(names) - made if ".dist-info/" not in name) == files_on_disk()
