"""The folders at the root are one package: linked, imported once, and all in the wheel."""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ir", "passes", "codegen", "runtime", "examples")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def package_files() -> list[Path]:
    """Every file that belongs in the wheel, relative to the root."""
    found = (p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return sorted(p.relative_to(ROOT) for p in found)


SOURCES = [p for p in package_files() if p.suffix == ".py"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads."""
    target = tmp_path_factory.mktemp("copy")
    for name in (*FOLDERS, "src"):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target / name)
    return target


def run_python(*arguments: str, folder: Path, path: str = "") -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("folder", FOLDERS)
def test_links_are_relative(folder: str) -> None:
    link = ROOT / "src" / "fxpress" / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../../{folder}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_of_sources_is_a_package(folder: str) -> None:
    missing = {p.parent for p in SOURCES if p.parts[0] == folder and not (ROOT / p.parent / "__init__.py").exists()}
    assert not missing


def test_no_module_is_loaded_twice() -> None:
    for source in SOURCES:
        if source.parts[0] in ("ir", "passes"):
            importlib.import_module(".".join(("fxpress", *source.with_suffix("").parts)).removesuffix(".__init__"))
    names = defaultdict(list)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and Path(file).resolve().is_relative_to(ROOT) and Path(file).resolve().relative_to(ROOT).parts[0] in FOLDERS:
            names[Path(file).resolve()].append(name)
    assert names
    assert {file: found for file, found in names.items() if len(found) > 1 or not found[0].startswith("fxpress.")} == {}


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_imports_inside_the_folders_are_relative(source: Path) -> None:
    absolute = []
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            absolute += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute.append(node.module or "")
    assert not [name for name in absolute if name.partition(".")[0] in ("fxpress", *FOLDERS)]


def test_wheel_holds_every_file(copy: Path) -> None:
    output = copy / "wheels"
    output.mkdir()
    run_python("-c", BUILD, str(output), folder=copy)
    (wheel,) = output.glob("fxpress-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"fxpress/{p.as_posix()}" for p in package_files()} | {f"fxpress/{n}" for n in ("__init__.py", "__main__.py", "py.typed")}
    assert not wanted - held
    assert not [n for n in held - wanted if ".dist-info/" not in n]
    assert any(n.endswith("LICENSE") for n in held)


def test_clones_without_symbolic_links_work(copy: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(copy, clone, symlinks=True)
    for folder in FOLDERS:
        link = clone / "src" / "fxpress" / folder
        link.unlink()
        link.write_text(f"../../{folder}", encoding="utf-8")  # what such a checkout leaves there
    loaded = run_python("-c", "import fxpress.ir.errors as e; print(e.__file__)", folder=tmp_path, path=str(clone / "src"))
    assert Path(loaded.strip()) == clone / "ir" / "errors.py"
