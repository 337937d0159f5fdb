"""The optimizers as a package: what the wheel holds, that it needs torch alone; make's check."""

from __future__ import annotations

import email
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from running import ROOT

PACKAGE = {"error_broadcast", "forward_only", "hizoo", "zeroth_order"}
# In the wheel's process: what a step gives, and which modules it has loaded.
USE = """
import json, sys
sys.path[:] = [path for path in sys.path if not path.endswith("site-packages")] + sys.argv[1:]
import torch
import error_broadcast, forward_only, hizoo, zeroth_order
from hizoo import HiZOO, Layers
model = torch.nn.Linear(3, 1)
optimizer = HiZOO(model.parameters(), lr=1e-2, layers=Layers(model))
losses = [optimizer.step(lambda: model(torch.ones(2, 3)).square().mean()) for _ in range(50)]
files = [module.__file__ for module in (error_broadcast, forward_only, hizoo, zeroth_order)]
found = {"losses": losses, "files": files, "version": hizoo.__version__, "all": hizoo.__all__}
print(json.dumps(found | {"modules": list(sys.modules)}))
"""


def pip(*arguments: str | Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", *map(str, arguments), "-q", "--no-deps", "--no-index"],
        check=True,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made from a copy of the repository: building leaves files behind."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, source)
    for room in ROOT.glob("*/__init__.py"):
        shutil.copytree(room.parent, source / room.parent.name)
    pip("wheel", source, "--no-build-isolation", "--wheel-dir", folder)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_the_optimizers_alone_and_requires_torch_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata_name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(metadata_name))
        (licence,) = (name for name in names if name.endswith("LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
        own = {name for name in names if ".dist-info/" not in name}
        for name in own:
            assert archive.read(name) == (ROOT / name).read_bytes()
    expected = [
        ROOT / "hizoo.py",
        ROOT / "error_broadcast.py",
        ROOT / "forward_only.py",
        *(ROOT / "zeroth_order").glob("*.py"),
    ]
    assert own == {str(path.relative_to(ROOT)) for path in expected}
    (requirement,) = metadata.get_all("Requires-Dist")
    assert requirement.startswith("torch")
    assert metadata["Name"] == "hizoo" and metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "The HiZOO maintainers" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert metadata["Author"] == "The HiZOO maintainers"


def test_the_installed_wheel_needs_nothing_else_of_the_project(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    pip("install", wheel, "--target", target)
    site_packages = Path(torch.__file__).parent.parent
    process = subprocess.run(
        [sys.executable, "-I", "-c", USE, str(target), str(site_packages)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    own_files = (
        *("error_broadcast.py", "forward_only.py", "hizoo.py"),
        "zeroth_order/__init__.py",
    )
    assert found["files"] == [str(target / name) for name in own_files]
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert found["version"] == tomllib.load(file)["project"]["version"]
    assert set(found["all"]) >= {"HiZOO", "HiZOOConfig", "Layers"}
    assert found["losses"][-1] < 0.5 * found["losses"][0]
    loaded = {name.partition(".")[0] for name in found["modules"]}
    assert loaded.isdisjoint({"transformers", "accelerate", "peft", "datasets"})
    own = {path.stem for path in ROOT.glob("*.py")} | {p.parent.name for p in ROOT.glob("*/*.py")}
    assert loaded & own == PACKAGE


@pytest.mark.parametrize("version", ["3.10.13", "3.11.0"])
def test_make_says_in_one_line_that_python_is_too_old(tmp_path: Path, version: str) -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        oldest = tomllib.load(file)["project"]["requires-python"].removeprefix(">=")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.txt", "requirements-test.txt"):
        (tmp_path / name).touch()
    # A python that says it has this version, and makes an environment without anything in it.
    info = tuple(map(int, version.split(".")))
    python = tmp_path / "python"
    script = f"import sys; sys.version_info = {info}; exec(sys.argv[1])"
    python.write_text(
        f"#!/bin/sh\n[ $1 = -m ] && exit 7\nexec {sys.executable} -c '{script}' \"$2\"\n"
    )
    python.chmod(0o755)
    process = subprocess.run(
        ["make", "-s", "demo", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True
    )
    first = process.stderr.splitlines()[0]
    if version.startswith("3.10"):
        assert first == (
            f"{python} is Python 3.10, older than {oldest}: name a newer one, as in "
            "PYTHON=python3.12"
        )
    else:
        assert "Error 7" in first
    assert process.returncode == 2 and not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("file", ["bin/python", "bin/pip", "made-by-make"])
def test_make_neither_uses_nor_removes_the_environment_of_a_user(tmp_path: Path, file: str) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / ".venv" / file).parent.mkdir(parents=True)
    (tmp_path / ".venv" / file).touch()
    make = ["make", "-s", "PYTHON=false"]
    done = subprocess.run([*make, "demo"], cwd=tmp_path, capture_output=True, text=True)
    is_of_make = file == "made-by-make"  # its making was interrupted, and goes on
    refusal = "error: make has not made .venv (it has no made-by-make): remove it, or go without"
    assert done.stderr.startswith(refusal) != is_of_make and done.returncode == 2
    assert (tmp_path / ".venv" / file).exists() != is_of_make
    (tmp_path / ".venv" / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / ".venv" / file).touch()
    done = subprocess.run([*make, "clean"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ("" if is_of_make else "make has not made .venv: it stays\n")
    assert (tmp_path / ".venv" / file).exists() != is_of_make and done.returncode == 0
