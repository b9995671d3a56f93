"""What is built and installed from a copy of the checkout: wheel, sdist, strict editable install.

Each install lies in a virtual environment of its own, made without downloads: a .pth file lets it
see the packages of the running one. Everything runs outside the checkout.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "engine": "flashddpm",
    "kernels": "flashddpm/kernels",
    "benchmarks": "flashddpm/benchmarks",
}
# pip's words, in its warnings, for an index that did not answer.
UNREACHABLE = re.compile(r"connection broken by|could not be resolved|Could not fetch URL", re.I)


def run(command: list, cwd: Path, check: bool = True, **variables: str):
    """Run a command with this environment, less what would change Python's paths."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, **variables},
        capture_output=True,
        text=True,
        timeout=240,
    )
    if check:
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


def source_files() -> list[str]:
    """The files that a commit of the checkout would hold, or those of an unpacked sdist."""
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others"]
    try:
        listed = subprocess.run(
            [*listing, "--exclude-standard"], capture_output=True, text=True, check=True
        ).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        listed = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*")]
        made = re.compile(r"(^|/)(\.venv|\.git|build|dist|runs|__pycache__|\.\w+_cache)/|egg-info")
        listed = [name for name in listed if not made.search(name)]
    return sorted(name for name in listed if name and (ROOT / name).is_file())


@pytest.fixture(scope="module")
def sources() -> list[str]:
    return source_files()


@pytest.fixture(scope="module")
def tree(sources, tmp_path_factory) -> Path:
    """A copy of the sources, to build in."""
    folder = tmp_path_factory.mktemp("tree")
    for name in sources:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return folder


def pip_wheel(source: Path, out: Path) -> Path:
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-w", out]
    run([sys.executable, "-P", "-m", "pip", "wheel", "-q", *options, source], out)
    [wheel] = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    return pip_wheel(tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    run([sys.executable, "-P", "-c", code], tree)
    [archive] = out.glob("*.tar.gz")
    return archive


class Install(NamedTuple):
    folder: Path
    python: Path
    package: Path
    """Where flashddpm/__init__.py must come from."""


def make_venv(folder: Path) -> Path:
    """A virtual environment that also sees the packages that this process sees."""
    venv.create(folder, symlinks=True, with_pip=False)
    [site_packages] = folder.glob("lib/python*/site-packages")
    running = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site_packages / "running.pth").write_text("\n".join(running) + "\n")
    return site_packages


def pip_install(site_packages: Path, *what) -> None:
    """Install into a virtual environment; what the .pth file lets it see does not count."""
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed"]
    python = site_packages.parents[2] / "bin/python"
    command = [sys.executable, "-P", "-m", "pip", "--python", python, "install", "-q"]
    run([*command, *options, *what], site_packages)


@pytest.fixture(scope="module")
def wheel_install(wheel, tmp_path_factory) -> Install:
    folder = tmp_path_factory.mktemp("wheel-venv")
    site_packages = make_venv(folder)
    pip_install(site_packages, wheel)
    return Install(folder, folder / "bin/python", site_packages / "flashddpm")


@pytest.fixture(scope="module", params=["wheel", "sdist", "editable"])
def install(request, tmp_path_factory) -> Install:
    if request.param == "wheel":
        return request.getfixturevalue("wheel_install")
    folder = tmp_path_factory.mktemp(f"{request.param}-venv")
    site_packages = make_venv(folder)
    if request.param == "sdist":
        archive = request.getfixturevalue("sdist")
        built = pip_wheel(archive, tmp_path_factory.mktemp("wheel-of-sdist"))
        pip_install(site_packages, built)
        return Install(folder, folder / "bin/python", site_packages / "flashddpm")
    tree = request.getfixturevalue("tree")
    pip_install(site_packages, "--config-settings", "editable_mode=strict", "-e", tree)
    [links] = (tree / "build").glob("__editable__*")
    return Install(folder, folder / "bin/python", links / "flashddpm")


def package_files(names: list[str]) -> set[str]:
    """Where the sources belong in an install: modules, py.typed and the bundled models."""
    result = set()
    for name in names:
        folder, _, rest = name.partition("/")
        if folder in FOLDERS and (rest.endswith((".py", "py.typed")) or rest.startswith("models/")):
            result.add(f"{FOLDERS[folder]}/{rest}")
    return result


def test_wheel_holds_the_package_and_nothing_else(wheel, sources):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = package_files(sources)
    assert "flashddpm/py.typed" in expected and "flashddpm/kernels/__init__.py" in expected
    assert {name for name in names if ".dist-info/" not in name} == expected
    tops = {name.split("/")[0].split("-")[0] for name in names}
    assert tops == {"flashddpm"}, "nothing else may be installed at the top, kernels least of all"


def test_sdist_holds_the_sources(sdist, sources):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = (*FOLDERS, "tests", "docs", ".ci")
    expected = {name for name in sources if name.startswith(tuple(f"{f}/" for f in folders))}
    assert "tests/conftest.py" in expected
    expected |= {
        "setup.py",
        "pyproject.toml",
        "Makefile",
        "README.md",
        "CONTRIBUTING.md",
        "LICENSE",
    }
    assert expected - names == set(), "MANIFEST.in must name these"


LOOK = """
import importlib.metadata, importlib.util, json, pathlib
import flashddpm, flashddpm.benchmarks, flashddpm.kernels
folder = pathlib.Path(flashddpm.__file__).parent
specs = [importlib.util.find_spec(name) for name in ("engine", "kernels", "benchmarks")]
print(json.dumps({
    "modules": [m.__file__ for m in (flashddpm, flashddpm.kernels, flashddpm.benchmarks)],
    "versions": [flashddpm.__version__, importlib.metadata.version("flashddpm")],
    "files": [str(p.relative_to(folder.parent)) for p in folder.rglob("*") if p.is_file()],
    "top_level": [spec.origin for spec in specs if spec is not None],
}))
"""


def test_install_imports_from_anywhere(install, sources, tmp_path):
    seen = json.loads(run([install.python, "-c", LOOK], tmp_path).stdout)
    package = install.package
    folders = (package, package / "kernels", package / "benchmarks")
    assert seen["modules"] == [str(folder / "__init__.py") for folder in folders]
    declared = re.search(r'^    version="(.+)",$', (ROOT / "setup.py").read_text(), re.M)
    assert declared and seen["versions"] == [declared[1]] * 2
    files = {name for name in seen["files"] if "__pycache__" not in name}
    assert files == package_files(sources)
    ours = [path for path in seen["top_level"] if path and path.startswith(str(install.folder))]
    assert ours == [] and not any(str(ROOT) in (path or "") for path in seen["top_level"])


def test_command_answers(install, tmp_path):
    result = run([install.folder / "bin/flashddpm", "--help"], tmp_path)
    assert "Usage" in result.stdout


def test_module_answers(wheel_install, tmp_path):
    result = run([wheel_install.python, "-m", "flashddpm", "--help"], tmp_path)
    assert "Usage" in result.stdout


SLOW_TO_IMPORT = ("PIL", "diffusers", "hypothesis", "matplotlib", "pytest", "typer")


@pytest.mark.parametrize("triton", ["present", "absent"])
def test_import_is_light_and_needs_no_triton(triton, tmp_path):
    code = f"""
import sys
if {triton == "absent"}:
    sys.modules["triton"] = None
import flashddpm
print([name for name in {SLOW_TO_IMPORT} if name in sys.modules])
"""
    assert run([sys.executable, "-P", "-c", code], tmp_path).stdout.strip() == "[]"


WITH_DIFFUSERS = """
import importlib.util
import flashddpm, flashddpm.kernels
from diffusers import DDPMScheduler, UNet2DModel
print(flashddpm.__file__)
print(importlib.util.find_spec("kernels").origin)
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    """A distribution named ``kernels``, with the metadata that diffusers asks for."""
    folder = tmp_path_factory.mktemp("stand-in")
    (folder / "kernels").mkdir()
    (folder / "kernels/__init__.py").write_text("get_kernel = None\n")
    (folder / "kernels-0.17.2.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n"
    (folder / "kernels-0.17.2.dist-info/METADATA").write_text(metadata)
    return folder


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory) -> Path:
    """Hugging Face's own ``kernels``, from the package index."""
    folder = tmp_path_factory.mktemp("hugging-face")
    options = ["--no-deps", "--only-binary=:all:", "--retries=1", "--timeout=20", "--target"]
    command = [sys.executable, "-P", "-m", "pip", "install", *options, folder, "kernels"]
    result = run(command, folder, check=False)
    if result.returncode and UNREACHABLE.search(result.stdout + result.stderr):
        pytest.skip("the package index cannot be reached: Hugging Face's kernels not tested")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("kernels", ["stand_in", "hugging_face"])
def test_lives_beside_hugging_faces_kernels(kernels, request, wheel_install):
    """Even in the checkout's root, where the folder kernels/ lies."""
    target = request.getfixturevalue(kernels)
    command = [wheel_install.python, "-P", "-c", WITH_DIFFUSERS]
    output = run(command, ROOT, PYTHONPATH=str(target)).stdout.split()
    assert output == [
        str(wheel_install.package / "__init__.py"),
        str(target / "kernels/__init__.py"),
    ]
