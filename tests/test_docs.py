"""What README and docs/ name is there: links, files, modules, flags."""

import re

import pytest

from gpt_jax.config import REPOSITORY, Config

PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]


def commands(page):
    """The commands of a page: indented lines that run Python, continued lines joined, comments left out."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^    !?((?:pip install .*&& )?python .*)$", text, re.MULTILINE)
    return [line.split("#")[0].strip() for line in lines]


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_name_files_and_settings_that_exist(page):
    """Whether they work, other tests try."""
    programs = [REPOSITORY / "train.py", REPOSITORY / "sample.py", *(REPOSITORY / "gpt_jax").glob("*.py")]
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
