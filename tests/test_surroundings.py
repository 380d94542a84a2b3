"""What the environment and a user's notebook set: missing platforms, and settings of JAX."""

import subprocess
import sys

import jax
import pytest
from test_commands import environment

import gpt_jax
from gpt_jax.jax_settings import default_jax_settings
from gpt_jax.paths import ROOT
from gpt_jax.sampling.rules import make_rules

PRETRAINED = ROOT / "artifacts" / "pretrained"
SETTINGS = {
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_TRANSFER_GUARD": "disallow",
}
COMMANDS = {
    "train": ("--config", "configs/smoke.py", "--workdir"),
    "sample": ("--length", "5", "--workdir", str(PRETRAINED), "--out"),
    "evaluate": ("--workdir", str(PRETRAINED)),
    "export": ("--workdir", str(PRETRAINED), "--out"),
}


def run(code, *arguments, **variables):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment() | variables, cwd=ROOT,
        capture_output=True, text=True, encoding="utf-8", timeout=300,
    )  # fmt: skip


def platform_error(name, install=""):
    return f"JAX_PLATFORMS = {name!r}: JAX finds only 1 x cpu (cpu); unset JAX_PLATFORMS" + install


@pytest.mark.parametrize(
    "name, install",
    [
        ("cuda", ', or install it: pip install "jax[cuda12]"'),
        ("gpu", ', or install it: pip install "jax[cuda12]"'),
        ("tpu", ', or install it: pip install "jax[tpu]"'),
        ("nosuch", ""),
    ],
)
def test_a_platform_that_is_missing(name, install, tmp_path):
    code = (
        "import gpt_jax, sys\ntry:\n gpt_jax.load(sys.argv[1])\nexcept gpt_jax.UserError as e:\n print(e)\n"
    )
    code += (
        "try:\n gpt_jax.train('configs/smoke.py', sys.argv[2])\nexcept gpt_jax.UserError as e:\n print(e)\n"
    )
    done = run(code, PRETRAINED, tmp_path / "run", JAX_PLATFORMS=name)
    assert done.stdout.splitlines() == [platform_error(name, install)] * 2, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_names_a_missing_platform(command, tmp_path):
    arguments = [*COMMANDS[command], *([str(tmp_path / "new")] if command != "evaluate" else [])]
    done = run("from gpt_jax.commands.main import main; raise SystemExit(main())", command, *arguments,
               JAX_PLATFORMS="nosuch")  # fmt: skip
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (2, ["error: " + platform_error("nosuch")])
    assert "Traceback" not in done.stderr and not (tmp_path / "new").exists()


TRAIN = """
import sys, gpt_jax
from gpt_jax.sampling.rules import make_rules
model = gpt_jax.train("configs/smoke.py", sys.argv[1], **{"train.steps": 12, "train.eval_every": 6})
print([line["val_loss"] for line in model.history if "val_loss" in line])
print(repr(model.generate("ROMEO:", length=20)), model.logits("To be").sum(), model.loss("To be, or"))
print("".join(piece[0] for piece in model.stream("ROMEO:", 20, make_rules())))
"""


def test_settings_of_jax_change_no_number(tmp_path):
    usual = run(TRAIN, tmp_path / "usual")
    assert usual.returncode == 0, usual.stderr
    strange = run(TRAIN, tmp_path / "strange", **SETTINGS)
    assert strange.returncode == 0, strange.stderr[-2000:]
    assert strange.stdout.splitlines()[-3:] == usual.stdout.splitlines()[-3:]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_one_setting_of_jax_changes_no_number(name, tmp_path):
    usual, strange = (
        run(TRAIN, tmp_path / "usual"),
        run(TRAIN, tmp_path / "strange", **{name: SETTINGS[name]}),
    )
    assert strange.returncode == 0, strange.stderr[-2000:]
    assert strange.stdout.splitlines()[-3:] == usual.stdout.splitlines()[-3:]


def test_the_settings_of_the_process_stay(tmp_path):
    with jax.default_prng_impl("rbg"), jax.numpy_dtype_promotion("strict"):
        stream = gpt_jax.load(PRETRAINED).stream("ROMEO:", 3, make_rules())
        next(stream)  # between two pieces the settings are the user's again
        assert jax.random.key_impl(jax.random.key(0)) == "rbg"
        with default_jax_settings():
            assert "fry" in str(jax.random.key_impl(jax.random.key(0)))
    assert "rbg" not in str(jax.random.key_impl(jax.random.key(0)))
