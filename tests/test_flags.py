"""Command lines: what is wrong in one is named in one line, with the flag that was meant."""

import importlib
import subprocess
import sys

import pytest
from conftest import some

from gpt_jax.commands import compile, evaluate, export, sample, train
from gpt_jax.commands.arguments import NO_FLAG, OTHER_NAMES, ArgumentParser
from gpt_jax.commands.main import COMMANDS, main
from gpt_jax.config import Config, flatten
from gpt_jax.errors import UserError
from gpt_jax.paths import ROOT as REPOSITORY

SMOKE = ["--config", str(REPOSITORY / "configs" / "smoke.py")]


def error_of(command, arguments):
    """The one line with which a command refuses its command line."""
    with pytest.raises(UserError) as error:
        command.main([str(argument) for argument in arguments])
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize("command", [train, compile])
@pytest.mark.parametrize(
    "flag, meant",
    [
        ("--batch_size=4", "--config.train.batch_size"),
        ("--n_layer=4", "--config.model.n_layer"),
        ("-n_layer=4", "--config.model.n_layer"),
        ("--n-head=4", "--config.model.n_head"),
        ("--seed=4", "--config.seed"),
        ("--model.n_layer=4", "--config.model.n_layer"),
        ("--config.n_layer=4", "--config.model.n_layer"),
        ("--config.model.n_layers=4", "--config.model.n_layer"),
        ("--config.block_size=4", "--config.model.context"),
        ("n_layer=4", "--config.model.n_layer"),
        ("--max_iters=4", "--config.train.steps"),
        ("--wrokdir=x", "--workdir"),
    ],
)
def test_the_setting_that_was_meant_is_named(command, flag, meant):
    if command is compile and "wrokdir" in flag:
        flag, meant = "--topologie=v5e:1x1", "--topology"
    message = error_of(command, [*SMOKE, flag])
    name = flag.partition("=")[0].lstrip("-").removeprefix("config.")
    assert f"{name}: did you mean {meant}?" in message and message.startswith("unknown ")


@pytest.mark.parametrize(
    "command, arguments, message",
    [
        (sample, ["--start", "X", "--max_new_tokens", 50], "unknown flag --start: did you mean --prompt?"),
        (sample, ["--max_new_tokens=50"], "unknown flag --max_new_tokens: did you mean --length?"),
        (sample, ["--out_dir=x"], "unknown flag --out_dir: did you mean --workdir?"),
        (sample, ["--temprature=1"], "unknown flag --temprature: did you mean --temperature?"),
        (sample, ["--num-samples", 2], "unknown flag --num-samples: did you mean --num_samples?"),
        (sample, ["-prompt", "x"], "unknown flag -prompt: did you mean --prompt?"),
        (sample, ["--n_layer=4"], "unknown flag --n_layer: python train.py has --config.model.n_layer"),
        (sample, ["--device=cpu"], "unknown flag --device: set the environment variable JAX_PLATFORMS"),
        (sample, ["--qqqqq"], "unknown flag --qqqqq: --help lists the flags"),
        (sample, ["--qq\nqq"], r"unknown flag '--qq\nqq': --help lists the flags"),
        (sample, ["ROMEO: what"], "unexpected argument 'ROMEO: what': did you mean --prompt 'ROMEO: what'?"),
        (sample, [REPOSITORY], f"did you mean --workdir {REPOSITORY}?"),
        (evaluate, [REPOSITORY], f"did you mean --workdir {REPOSITORY}?"),
        (evaluate, [REPOSITORY / "README.md"], f"did you mean --text {REPOSITORY / 'README.md'}?"),
        (evaluate, ["nothing"], "unexpected argument 'nothing': flags begin with --"),
        (evaluate, ["--init_from=x"], "unknown flag --init_from: python train.py has --config.init_from"),
        (train, [*SMOKE, "--init_from=x"], "unknown flag --init_from: did you mean --config.init_from?"),
        (export, ["--output=x"], "unknown flag --output: did you mean --out?"),
        (sample, ["--out_file=x"], "unknown flag --out_file: did you mean --out?"),
        (sample, ["--text=x"], "unknown flag --text: --help lists the flags"),
        (evaluate, ["--seed=3"], "unknown flag --seed: python train.py has --config.seed"),
        (evaluate, ["--promt=x"], "unknown flag --promt: --help lists the flags"),
        (train, [*SMOKE, "--data=x"], "unknown flag --data: did you mean --config.data.path?"),
        (train, [*SMOKE, "--wandb_log=True"], "unknown flag --wandb_log: did you mean --config.train.wandb?"),
        (train, [*SMOKE, "--lr=1"], "unknown flag --lr: did you mean --config.optimizer.learning_rate?"),
        (train, [*SMOKE, "--epochs=3"], "unknown flag --epochs: give the number of updates, --config.train"),
        (train, [*SMOKE, "--minute=3"], "unknown flag --minute: did you mean --minutes?"),
        (train, [*SMOKE, "--text=x"], "unknown flag --text: --help lists the flags"),
        (export, ["--out_dir=x"], "unknown flag --out_dir: did you mean --workdir?"),
        (train, [*SMOKE, "--start=x"], "unknown flag --start: python sample.py has --prompt"),
        (train, [*SMOKE, "--compile=False"], "unknown flag --compile: leave it out"),
        (train, [SMOKE[1]], f"unexpected argument {SMOKE[1]!r}: did you mean --config {SMOKE[1]}?"),
        (compile, [SMOKE[1]], f"did you mean --config {SMOKE[1]}?"),
        (train, [*SMOKE, "more"], "unexpected argument 'more': flags begin with --"),
        (train, ["--config.model.n_layer=4"], "--config is missing: try --config"),
        (train, [*SMOKE, "--config.train.accumulate=2"], "it is now called train.grad_accum_steps"),
    ],
    ids=str,
)  # fmt: skip
def test_the_flag_that_was_meant_is_named(command, arguments, message):
    assert message in error_of(command, arguments)


@pytest.mark.parametrize(
    "command, arguments, message",
    [
        (sample, ["--length"], "--length: expected one argument"),
        (
            sample,
            ["--length", "--seed", "3"],
            "--length needs a value; if --seed is the value, write --length=--seed",
        ),
        (sample, ["--length", "abc"], "--length: invalid int value: 'abc'"),
        (sample, ["--length", "1e4"], "--length: invalid int value: '1e4'"),
        (sample, ["--temperature", "warm"], "--temperature: invalid float value: 'warm'"),
        (sample, ["--temperature", "-1e3"], "temperature = -1000.0 must be"),
        (sample, ["--temperature", "-inf"], "temperature = -inf must be"),
        (sample, ["--top_k", "-3"], "top_k = -3 must be 1 or above"),
        (sample, ["--window", "whole"], "--window: invalid choice: 'whole'"),
        (sample, ["--greedy=1"], "--greedy: ignored explicit argument '1'"),
        (
            sample,
            ["--prompt", "--length"],
            "--prompt needs a value; if --length is the value, write --prompt=--",
        ),
        (sample, ["--prompt", "--help"], "if --help is the value, write --prompt=--help"),
        (evaluate, ["--which", "beste"], "--which: invalid choice: 'beste'"),
        (evaluate, ["--text"], "--text: expected one argument"),
        (evaluate, ["--workdir"], "--workdir: expected at least one argument"),
        (evaluate, ["--workdir", "--text", "a"], "--workdir: expected at least one argument"),
        (evaluate, ["--workdir", "a", "b", "--text", "c", "d"], "unexpected argument 'd': flags begin with"),
        (export, [], "the following arguments are required: --out"),
        (export, ["--out=x", "--dtype=int8"], "--dtype: invalid choice: 'int8'"),
        (train, [*SMOKE, "--workdir"], "--workdir: expected one argument"),
        (train, [*SMOKE, "--config.model.n_layer"], "--config.model.n_layer: expected one argument"),
        (
            train,
            [*SMOKE, "--config.model.n_layer=1e3"],
            "--config.model.n_layer=1e3 must be a whole number: write 1000",
        ),
        (
            train,
            [*SMOKE, "--config.model.n_layer", "two"],
            "--config.model.n_layer=two must be a whole number",
        ),
        (train, [*SMOKE, "--config.model.bigram=2"], "--config.model.bigram=2 must be True or False"),
        (train, [*SMOKE, "--config.train.steps=2147483648"], "train.steps can be"),
    ],
    ids=str,
)
def test_a_value_that_is_missing_or_wrong(command, arguments, message):
    assert message in error_of(command, arguments)


def parser():
    made = ArgumentParser("sample", "For a test.", ["--greedy"])
    made.add_argument("--prompt", default="")
    made.add_argument("--number", type=float)
    made.add_argument("--greedy", action="store_true")
    made.add_argument("--several", nargs="+", action="extend")
    return made


@pytest.mark.parametrize(
    "prompt", ["--hello", "-", "-x y", "--a=b", "=", "a=b", "", "\n", "--prompted", "-1", "é"]
)
def test_a_prompt_may_begin_with_dashes(prompt):
    for arguments in (["--prompt", prompt], [f"--prompt={prompt}"]):
        assert parser().parse_args([*arguments, "--greedy"]).prompt == prompt
    assert parser().parse_args(["--prompt=--greedy"]).prompt == "--greedy"
    assert not parser().parse_args(["--prompt=--greedy"]).greedy


@pytest.mark.parametrize(
    "arguments",
    [["--several", "a", "b", "c=d"], ["--several=a", "--several", "b", "c=d"], ["--several", "a", "--greedy",
     "--several=b", "--several=c=d"]],
)  # fmt: skip
def test_a_flag_may_take_several_values(arguments):
    for more in ([], ["--prompt", "--hello"]):
        assert parser().parse_args([*arguments, *more]).several == ["a", "b", "c=d"]
        assert parser().parse_args([*more, *arguments]).several == ["a", "b", "c=d"]
    assert parser().parse_args([]).several is None


@pytest.mark.parametrize("number", ["-1", "-.5", "-1e-5", "-inf", "3"])
def test_numbers_may_be_negative(number):
    assert parser().parse_args(["--number", number]).number == float(number)


def test_help_comes_before_everything_that_is_unknown(capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["--bogus", "--help"])
    assert ended.value.code == 0 and "--prompt PROMPT" in capsys.readouterr().out


def test_the_table_of_names_is_up_to_date():
    """Each flag that it names exists, and its names are no flags or settings here."""
    settings = flatten(Config())
    flags = {"--prompt", "--length", "--workdir", "--out"}
    for flag in OTHER_NAMES.values():
        flag = flag.partition(" ")[0]
        assert flag in flags or flag.removeprefix("--config.") in settings, flag
    last_parts = {name.rpartition(".")[2] for name in settings}
    assert last_parts & (OTHER_NAMES.keys() | NO_FLAG.keys()) == {"data"}  # mesh.data is not what is meant


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen(name, capsys):
    """Of 24 lines of 80 characters: the purpose, the flags, two examples."""
    command = importlib.import_module(f"gpt_jax.commands.{name}")
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and len(lines) <= 23 and max(map(len, lines)) <= 80
    assert lines[-3] == "examples:" and all(line.startswith("  python ") for line in lines[-2:])


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["--help"], 0, "usage: python -m gpt_jax COMMAND [flags]"),
        ([], 0, "usage: python -m gpt_jax COMMAND [flags]"),
        (["evalute"], 2, "error: unknown command 'evalute': did you mean evaluate?"),
        (
            ["tests"],
            2,
            f"error: unknown command 'tests': the commands are {', '.join(COMMANDS)}",
        ),
        (["export"], 2, "error: the following arguments are required: --out"),
    ],
    ids=str,
)
def test_the_command_with_subcommands(arguments, status, message, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["gpt-jax", *arguments])
    assert main() == status
    said = capfd.readouterr()
    assert (said.err if status else said.out).splitlines()[0] == message
    assert len((said.out + said.err).splitlines()) <= 23


@pytest.mark.parametrize("name", some("train", "sample", "evaluate", "export", "compile"))
def test_an_old_form_names_the_new_one(name):
    done = subprocess.run([sys.executable, "-m", f"gpt_jax.{name}", "--help"], capture_output=True, text=True)
    wanted = f"error: python -m gpt_jax.{name} is now called python -m gpt_jax {name}\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", wanted)
