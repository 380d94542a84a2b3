"""What README and docs/ name exists: links, files, modules, flags; and their commands work."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import pytest

from gpt_jax.commands.paths import ROOT as REPOSITORY
from gpt_jax.config import Config

PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]


MARK = "not run by the tests"


def command_lines(page):
    """The commands in the indented blocks of a page, with whether they are marked as not run.

    Continued lines are joined. A mark is a comment at the end of a line, or above a block.
    """
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = []
    for block in re.finditer(r"(?:^    .*\n)+", text, re.MULTILINE):
        above = text[: block.start()].rstrip().rpartition("\n")[2]
        for line in map(str.strip, block[0].splitlines()):
            if re.match(r"!?(python|pip|pytest) ", line):
                marked = f"# {MARK}" in line or above == f"<!-- {MARK} -->"
                found.append((re.split(r" +#", line)[0].lstrip("!"), marked))
    return found


def commands(page):
    """The commands of a page that run Python."""
    return [command for command, _ in command_lines(page) if "python " in command]


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_name_files_and_settings_that_exist(page):
    """Those that are not marked are also run below."""
    programs = (REPOSITORY / "gpt_jax" / "commands").glob("*.py")
    source = "".join(program.read_text(encoding="utf-8") for program in programs)
    by_absl = re.findall(r"flags\.DEFINE_\w+\(\s*\"(\w+)\"", source)
    by_argparse = re.findall(r"(?:add_argument|flag)\(\s*\"--(\w+)\"", source)
    flags = {"config", *by_absl, *by_argparse}
    settings = Config().to_config_dict()
    for command in commands(page):
        for program in re.findall(r"python (\S+\.py)", command):
            assert (REPOSITORY / program).is_file(), command
        for module in re.findall(r"python -m (gpt_jax\.\w+)", command):
            assert (REPOSITORY / f"{module.replace('.', '/')}.py").is_file(), command
        for config in re.findall(r"--config[ =](\S+)", command):
            assert (REPOSITORY / config).is_file(), command
        for path in re.findall(r"--config\.([\w.]+)=", command):
            group, name = path.split(".")
            assert name in settings[group], command
        if "benchmarks/" not in command:
            names = re.findall(r"--(\w+)(?![\w.])", command)
            assert set(names) <= flags, command


def test_commands_are_found():
    assert any("train.py" in command for command in commands(REPOSITORY / "README.md"))
    assert len(commands(REPOSITORY / "docs" / "usage.md")) >= 5
    marked = [command for page in PAGES for command, is_marked in command_lines(page) if is_marked]
    assert "pip install ." in marked and any("soak.py" in command for command in marked)


SMALL_TRAINING = (
    "--config.model.n_layer=1", "--config.model.n_head=2", "--config.model.d_model=16",
    "--config.model.context=16", "--config.model.query_blocks=1", "--config.train.steps=4",
    "--config.train.eval_every=2", "--config.train.batch_size=4", "--config.train.sample_length=5",
    "--config.optimizer.warmup_steps=1", "--config.mesh.data=1",
)  # fmt: skip


@pytest.fixture
def clone(tmp_path):
    """A copy of the repository with a small run, and the texts that the pages name."""
    for name in ("train.py", "sample.py", "gpt_jax", "configs"):
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "artifacts").mkdir()
    shutil.copy(REPOSITORY / "artifacts" / "input.txt", tmp_path / "artifacts")
    (tmp_path / "my.txt").write_text("to be, or not to be\n" * 50, encoding="utf-8")
    (tmp_path / "other.txt").write_text("that is the question\n" * 5, encoding="utf-8")
    run_command("python train.py --config configs/smoke.py", tmp_path)
    return tmp_path


def run_command(command, folder):
    """Run it with small settings; installing is left out, as that is done."""
    for part in command.split(" && "):
        if part.startswith("pip install -e ."):
            continue
        program, *arguments = shlex.split(part)
        assert program == "python", command
        target = " ".join(arguments[:2])
        extra = ("--length=20",) if "sample" in target else SMALL_TRAINING if "train" in target else ()
        done = subprocess.run(
            [sys.executable, *arguments, *extra], cwd=folder, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(folder)}, encoding="utf-8",
        )  # fmt: skip
        assert done.returncode == 0, f"{part}\n{done.stdout}{done.stderr}"


@pytest.mark.slow
def test_the_python_of_the_readme_works(clone):
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"(?:^    .*\n)+", text[text.index("    import gpt_jax") :], re.MULTILINE)[0]
    code = textwrap.dedent(lines).replace("artifacts/shakespeare_cpu", "artifacts/smoke").replace("500", "5")
    assert code.count("model.") == 4
    environment = os.environ | {"PYTHONPATH": str(clone)}
    subprocess.run([sys.executable, "-c", code], cwd=clone, env=environment, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_that_are_not_marked_work(page, clone):
    for command, is_marked in command_lines(page):
        if not is_marked:
            run_command(command, clone)
