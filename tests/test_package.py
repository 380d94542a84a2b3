"""The package as a wheel, installed in a folder of its own: everything is in it, and it works anywhere."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

import gpt_jax
from gpt_jax.paths import ROOT as REPOSITORY

TINY = (
    "--config.model.d_model=16", "--config.model.context=16", "--config.train.steps=4",
    "--config.train.eval_every=2", "--config.train.sample_length=0", "--config.optimizer.warmup_steps=1",
    "--config.mesh.data=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since setuptools writes into the source."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(REPOSITORY / "gpt_jax", source / "gpt_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", folder, source], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder with the installed wheel."""
    folder = tmp_path_factory.mktemp("site-packages")
    pip = [sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--target", folder]
    subprocess.run([*pip, wheel], check=True)
    return folder


def run(site, *arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=cwd, env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip


def test_the_wheel_has_every_module_and_nothing_else(wheel):
    ours = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "gpt_jax").rglob("*.py")}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == ours
    assert wheel.name.startswith(f"gpt_jax-{gpt_jax.__version__}-")


@pytest.mark.slow
def test_an_installed_package_trains_and_samples_elsewhere(site, text_file, tmp_path):
    (tmp_path / "artifacts").mkdir()
    shutil.copy(text_file, tmp_path / "artifacts" / "input.txt")
    shutil.copy(REPOSITORY / "configs" / "smoke.py", tmp_path)
    done = run(site, "gpt_jax", "train", "--config=smoke.py", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("To sample: python -m gpt_jax sample"), done.stdout
    assert (tmp_path / "artifacts" / "smoke" / "checkpoints" / "4").is_dir()
    done = run(site, "gpt_jax", "sample", "--length=10", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "artifacts" / "output.txt").read_text(encoding="utf-8")) == 10


def test_what_is_missing_elsewhere_is_one_line(site, tmp_path):
    shutil.copy(REPOSITORY / "configs" / "smoke.py", tmp_path)
    done = run(site, "gpt_jax", "train", "--config=smoke.py", *TINY, cwd=tmp_path)
    text = tmp_path / "artifacts" / "input.txt"
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"error: text file {text} does not exist: give the path of a UTF-8 text file with "
        f"--config.data.path=FILE\n"
    )
    done = run(site, "gpt_jax", "sample", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"error: no trained run in {tmp_path / 'artifacts'}: train one with python -m gpt_jax train "
        f"--config FILE, or name one with --workdir\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["smoke.py"]
