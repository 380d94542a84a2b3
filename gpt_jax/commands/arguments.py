"""Command lines: one style of help, and errors of one line that name the flag that was meant."""

import argparse
import difflib
import shlex
import sys
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from gpt_jax.checks import RENAMED
from gpt_jax.config import Config, flatten, parse_setting
from gpt_jax.config_files import read_config
from gpt_jax.errors import UserError
from gpt_jax.paths import EXAMPLE_CONFIG, command

# Names that nanoGPT and others use, and ours. Settings of the same name are found without this table.
OTHER_NAMES = {
    "start": "--prompt",
    "max_new_tokens": "--length",
    "out_dir": "--workdir",
    "output": "--out",
    "out_file": "--out",
    "eval_interval": "--config.train.eval_every",
    "log_interval": "--config.train.log_every",
    "eval_iters": "--config.train.eval_tokens (tokens, not batches)",
    "wandb_log": "--config.train.wandb",
    "dataset": "--config.data.path",
    "data": "--config.data.path",
    "lr": "--config.optimizer.learning_rate",
    "gradient_accumulation_steps": "--config.train.grad_accum_steps",
    "block_size": "--config.model.context",
    "n_embd": "--config.model.d_model",
    "max_iters": "--config.train.steps",
    "warmup_iters": "--config.optimizer.warmup_steps",
    "lr_decay_iters": "--config.train.steps",
    "decay_lr": "--config.optimizer.schedule",
    "min_lr": "--config.optimizer.min_lr_ratio (min_lr / learning_rate)",
    "beta1": "--config.optimizer.b1",
    "beta2": "--config.optimizer.b2",
    "grad_clip": "--config.optimizer.clip_norm",
}
# Flags without an equivalent here, and what to do instead.
NO_FLAG = {
    "epochs": "give the number of updates, --config.train.steps",
    "device": "set the environment variable JAX_PLATFORMS, as in JAX_PLATFORMS=cpu",
    "compile": "leave it out, since programs are always compiled",
    "eval_only": "python -m gpt_jax evaluate does that",
}


class ArgumentParser(argparse.ArgumentParser):
    """argparse with short errors, and with `--config FILE --config.group.name=value` for some commands."""

    def __init__(self, name: str, purpose: str, examples: Sequence[str], takes_config: bool = False):
        """`--help` shows the purpose and the examples; an example is what follows the name of the command."""
        start = command(name)
        super().__init__(
            prog=start,
            usage=argparse.SUPPRESS,
            description=purpose,
            epilog="\n".join(["examples:", *(f"  {start} {example}" for example in examples)]),
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=26, width=78),
            add_help=False,
            allow_abbrev=False,
        )
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
        self.color = False  # Python 3.14 would colour the help, and a command's stdout escapes that
        if takes_config:
            about = "a config file, such as configs/smoke.py; --config.train.steps=500 changes a setting"
            self.add_argument("--config", type=Path, metavar="FILE", help=about)
            for setting in flatten(Config()):
                self.add_argument(f"--config.{setting}", default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The values of the flags of a command line; None: the process's own.

        Raises:
            UserError: an unknown flag, a missing or bad value, or a positional argument.
        """
        joined = list(self._join(sys.argv[1:] if args is None else args))
        flags = self._option_string_actions
        try:
            values, unknown = self.parse_known_args(joined, namespace)
        except UserError:  # a missing flag may be there under another name
            unknown = [a for a in joined if a.startswith("--") and a.partition("=")[0] not in flags]
            if not unknown:
                raise
        if unknown:
            own = [flag[2:] for flag in flags if flag.startswith("--") and "." not in flag]
            raise UserError(describe_unknown(unknown[0], own))
        return values

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`, instead of printing the usage and ending the process."""
        raise UserError(message.removeprefix("argument "))

    def _join(self, args: Sequence[str]) -> Iterator[str]:
        """`--flag value` as `--flag=value`: argparse would take a value such as --hello for a flag."""
        flags, rest = self._option_string_actions, iter(args)
        for argument in rest:
            takes_value = argument in flags and flags[argument].nargs is None
            value = next(rest, None) if takes_value else None
            if value is not None and value.startswith("--") and value.partition("=")[0] in flags:
                meant = shlex.quote(f"{argument}={value}")
                raise UserError(f"{argument} needs a value; if {value} is the value, write {meant}")
            yield argument if value is None else f"{argument}={value}"


def config_of(flags: argparse.Namespace) -> Config:
    """The settings of the config file, with those of the command line.

    Raises:
        UserError: the file is missing or cannot be used, or a setting is wrong.
    """
    if flags.config is None:
        raise UserError(f"--config is missing: try --config {EXAMPLE_CONFIG}")
    prefix = "config."
    given = {flag.removeprefix(prefix): text for flag, text in vars(flags).items() if flag.startswith(prefix)}
    return read_config(flags.config, {name: parse_setting(name, text) for name, text in given.items()})


def describe_unknown(argument: str, own: Collection[str]) -> str:
    """An error for an unknown argument; `own` are the flags of the command, without dashes."""
    shown = argument.partition("=")[0].removeprefix("--config.")
    meant = _meant(shown.lstrip("-").replace("-", "_").removeprefix("config."), own)
    if not argument.startswith("-") and (not meant or "=" not in argument):
        return _describe_no_flag(argument, own)
    kind = "setting" if argument.startswith("--config.") else "flag"
    what = f"unknown {kind} {shown if shown.isprintable() else repr(shown)}"
    if meant is None:
        return f"{what}: --help lists the flags"
    if not meant.startswith("--"):
        return f"{what}: {meant}"
    if meant.removeprefix("--").partition(".")[0] in own:
        return f"{what}: did you mean {meant}?"
    owner = "train" if meant.startswith("--config.") else "sample"
    return f"{what}: {command(owner)} has {meant}"


def _meant(name: str, own: Collection[str]) -> str | None:
    """The flag that somebody means, or other advice."""
    flags = {flag: f"--{flag}" for flag in own}
    settings = {setting: f"--config.{setting}" for setting in flatten(Config())}
    by_last_part = {setting.rpartition(".")[2]: flag for setting, flag in settings.items()}
    renamed = {old: f"it is now called {new}" for old, new in RENAMED.items()}
    known = by_last_part | settings | renamed | OTHER_NAMES | NO_FLAG | flags
    if name in known:
        return known[name]
    # Only a misspelling of something that this command has.
    near = difflib.get_close_matches(name, known if "config" in own else flags, n=1, cutoff=0.75)
    return known[near[0]] if near else None


def _describe_no_flag(argument: str, own: Collection[str]) -> str:
    """The error for an argument without dashes."""
    path = Path(argument)
    fits = {"config": path.suffix == ".py", "workdir": path.is_dir(), "text": path.is_file(), "prompt": True}
    guess = next((name for name in fits if fits[name] and name in own), None)
    advice = f"did you mean --{guess} {shlex.quote(argument)}?" if guess else "flags begin with --"
    return f"unexpected argument {argument!r}: {advice}"
