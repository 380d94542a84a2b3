"""Command lines: errors of one line, which name the flag that was meant."""

import argparse
import difflib
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gpt_jax.commands.paths import command
from gpt_jax.config import Config, flatten
from gpt_jax.errors import UserError

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
    "wandb_log": "--config.train.tensorboard",
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
    "init_from": "name a run with --workdir; training resumes it",
    "eval_only": "python -m gpt_jax.evaluate does that",
}


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with errors of one line that name the flag that was meant."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)
        self.color = False  # Python 3.14 would colour the help, and a command's stdout escapes that

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The values of the flags of a command line; None: the process's own.

        Raises:
            UserError: an unknown flag, a missing or bad value, or a positional argument.
        """
        joined = list(self._join(sys.argv[1:] if args is None else args))
        try:
            values, unknown = self.parse_known_args(joined, namespace)
        except UserError:  # a missing flag may be there under another name
            unknown = [a for a in joined if a.startswith("--") and a.partition("=")[0] not in self._flags()]
            if not unknown:
                raise
        if unknown:
            raise UserError(describe_unknown(unknown[0], [flag.removeprefix("--") for flag in self._flags()]))
        return values

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`, instead of printing the usage and ending the process."""
        raise UserError(message.removeprefix("argument "))

    def _join(self, args: Sequence[str]) -> Iterator[str]:
        """`--flag value` as `--flag=value`: argparse would take a value such as --hello for a flag."""
        flags, rest = self._flags(), iter(args)
        for argument in rest:
            takes_value = argument in flags and flags[argument].nargs is None
            value = next(rest, None) if takes_value else None
            if value is None:
                yield argument
            elif value.partition("=")[0] in flags:
                meant = shlex.quote(f"{argument}={value}")
                raise UserError(f"{argument} needs a value; if {value} is the value, write {meant}")
            else:
                yield f"{argument}={value}"

    def _flags(self) -> dict[str, argparse.Action]:
        return {flag: action for flag, action in self._option_string_actions.items() if flag.startswith("--")}


def describe_unknown(argument: str, names: Iterable[str]) -> str:
    """An error for an argument that a command does not know.

    Args:
        argument: a flag, with or without its value, or something else.
        names: the command's own flags, without dashes.
    """
    name = argument.lstrip("-").partition("=")[0]
    meant = _meant(name.replace("-", "_").removeprefix("config."), names)
    if not argument.startswith("-") and (not meant or "=" not in argument):
        return _describe_no_flag(argument, names)
    kind = "setting" if argument.startswith("--config.") else "flag"
    shown = argument.partition("=")[0].removeprefix("--config.")
    what = f"unknown {kind} {shown if shown.isprintable() else repr(shown)}"
    if meant is None:
        return f"{what}: --help lists the flags"
    if not meant.startswith("--"):
        return f"{what}: {meant}"
    if _top(meant) in names:
        return f"{what}: did you mean {meant}?"
    owner = "train" if meant.startswith("--config.") else "sample"
    return f"{what}: {command(owner)} has {meant}"


def _meant(name: str, names: Iterable[str]) -> str | None:
    """The flag that somebody means, or other advice."""
    own = {own: f"--{own}" for own in names}
    settings = {setting: f"--config.{setting}" for setting in flatten(Config())}
    by_last_part = {setting.rpartition(".")[2]: flag for setting, flag in settings.items()}
    known = by_last_part | settings | OTHER_NAMES | NO_FLAG | own
    if name in known:
        return known[name]
    # Only a misspelling of something that this command has.
    near = difflib.get_close_matches(name, known if "config" in own else own, n=1, cutoff=0.75)
    return known[near[0]] if near else None


def _top(flag: str) -> str:
    return flag.removeprefix("--").partition(".")[0]


def _describe_no_flag(argument: str, names: Iterable[str]) -> str:
    """For an argument without dashes."""
    path = Path(argument)
    guesses = {
        "config": path.suffix == ".py",
        "workdir": path.is_dir(),
        "text": path.is_file(),
        "prompt": True,
    }
    guess = next((name for name, fits in guesses.items() if fits and name in names), None)
    advice = f"did you mean --{guess} {shlex.quote(argument)}?" if guess else "flags begin with --"
    return f"unexpected argument {argument!r}: {advice}"
