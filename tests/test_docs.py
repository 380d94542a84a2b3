"""What README and docs/ name exists: links, files, commands, flags; and their commands and Python work."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import pytest

import gpt_jax
from gpt_jax.commands.main import COMMANDS
from gpt_jax.config import Config, flatten
from gpt_jax.paths import ROOT as REPOSITORY

PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
BENCHMARKS = sorted((REPOSITORY / "benchmarks").glob("*.md"))
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


def command_of(arguments):
    """Which of our commands the arguments of python run, `train.py` or `-m gpt_jax train`; None: none."""
    if arguments[0] in ("train.py", "sample.py"):
        return arguments[0].removesuffix(".py")
    return arguments[2] if arguments[:2] == ["-m", "gpt_jax"] else None


def flags_of(name):
    """The flags that a command declares."""
    source = (REPOSITORY / "gpt_jax" / "commands" / f"{name}.py").read_text(encoding="utf-8")
    flags = set(re.findall(r"\bflag\(\s*\"--(\w+)\"", source))
    assert flags, name
    return flags | {"help"} | ({"config"} if "takes_config=True" in source else set())


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", [*PAGES, *BENCHMARKS], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_name_files_and_settings_that_exist(page):
    """Those that are not marked are also run below."""
    for command in [part for line in commands(page) for part in line.split(" && ")]:
        for program in re.findall(r"python (\S+\.py)", command):
            llama_cpp = "convert_hf_to_gguf.py"
            assert program == llama_cpp or (REPOSITORY / program).is_file(), command
        for config in re.findall(r"--config[ =](\S+)", command):
            assert (REPOSITORY / config).is_file(), command
        assert set(re.findall(r"--config\.([\w.]+)=", command)) <= flatten(Config()).keys(), command
        if re.match(r"python (?!-c|benchmarks/|convert_)", command):
            name = command_of(shlex.split(command)[1:])
            assert name in COMMANDS, command
            assert set(re.findall(r"--(\w+)(?![\w.])", command)) <= flags_of(name), command


def test_modules_are_called_by_their_present_names():
    """`python -m gpt_jax train`, in the text of the pages too, and no more `python -m gpt_jax.train`."""
    for page in (*PAGES, *BENCHMARKS):
        text = page.read_text(encoding="utf-8")
        assert "python -m gpt_jax." not in text, page
        named = set(re.findall(r"(?:python -m gpt_jax|gpt-jax) ([a-z]\w*)", text))
        assert named <= COMMANDS.keys(), page


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
    """A copy of the repository with small runs, and the texts that the pages name."""
    for name in ("train.py", "sample.py", "gpt_jax", "configs"):
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "artifacts").mkdir()
    shutil.copy(REPOSITORY / "artifacts" / "input.txt", tmp_path / "artifacts")
    shutil.copytree(REPOSITORY / "artifacts" / "pretrained", tmp_path / "artifacts" / "pretrained")
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
        extra = {"sample": ("--length=20",), "train": SMALL_TRAINING}.get(command_of(arguments), ())
        done = subprocess.run(
            [sys.executable, *arguments, *extra], cwd=folder, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(folder)}, encoding="utf-8",
        )  # fmt: skip
        assert done.returncode == 0, f"{part}\n{done.stdout}{done.stderr}"


def python_of(page):
    """The Python of a page: its indented block that imports gpt_jax."""
    text = page.read_text(encoding="utf-8")
    lines = re.search(r"(?:^    .*\n|^\n(?=    ))+", text[text.index("    import gpt_jax") :], re.MULTILINE)[
        0
    ]
    return textwrap.dedent(lines)


def test_the_python_of_the_pages_uses_what_there_is():
    assert len(re.findall(r"^model\.", python_of(REPOSITORY / "README.md"), re.MULTILINE)) == 6
    for page in ("README.md", "docs/usage.md"):
        names = set(re.findall(r"gpt_jax\.(\w+)", python_of(REPOSITORY / page)))
        assert names and names <= {*gpt_jax.__all__}, page


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/usage.md"])
def test_the_python_of_the_pages_works(page, clone):
    """With a small model and few steps; where a comment names a shape, the shape is that."""
    code = python_of(REPOSITORY / page)
    for found, small in (
        ("configs/shakespeare_cpu.py", "configs/smoke.py"),
        (", minutes=5", ""),
        ("500", "5"),
    ):
        code = code.replace(found, small)
    of_an_array = r"^(\w.*\S) +# float32 (\[[\d, ]+\]).*"
    code, n = re.subn(of_an_array, r"assert list((\1).shape) == \2", code, flags=re.MULTILINE)
    assert n == (2 if page == "README.md" else 0)
    environment = os.environ | {"PYTHONPATH": str(clone)}
    subprocess.run([sys.executable, "-c", code], cwd=clone, env=environment, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_that_are_not_marked_work(page, clone):
    for command, is_marked in command_lines(page):
        if not is_marked:
            run_command(command, clone)
