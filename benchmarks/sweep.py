"""Train variations of a config, several seeds each, and compare their losses.

    python benchmarks/sweep.py --config configs/shakespeare_cpu.py --seeds 1 2 3 \\
        --grid optimizer.muon_learning_rate=0.01,0.02,0.04 --variant "model.bigram=True model.dropout=0.1" \\
        --out benchmarks/results/sweep.jsonl

--grid (each adds a dimension) and --variant (each adds a point, a list of settings) multiply; `key=value`
at the end holds for all (behind a flag other than --seeds). Writes one JSON line a run, and leaves out the
runs that the file already has, so the same command goes on after a stop; when the config itself has changed,
use a new file. From a NaN on, a run's loss is null. --together 8 trains up to 8
runs that differ only in seed, learning rates and weight decay at once (`jax.vmap` over runs), as a small
model uses little of a GPU. At the end, and with --show alone, prints a table: mean and spread over the seeds.
"""

import argparse
import ast
import itertools
import json
import runpy
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from facts import check_writable, commit, machine
from flax import linen as nn

from gpt_jax.checks import unknown_setting
from gpt_jax.commands.run_main import run_main
from gpt_jax.config import Config, flatten
from gpt_jax.data.batches import TokenWindows
from gpt_jax.data.corpus import load_corpus
from gpt_jax.data.tokens import Corpus
from gpt_jax.errors import UserError
from gpt_jax.model.loss import loss_of_tokens, next_token_loss
from gpt_jax.model.params import count_params, init_params
from gpt_jax.model.transformer import GPT
from gpt_jax.parallel.devices import describe_devices
from gpt_jax.paths import text_file
from gpt_jax.plan import make_plan
from gpt_jax.rng import INIT_STREAM, stream
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.state import TrainState
from gpt_jax.training.step import train_step

# Settings that may differ between runs of one program: the optimizer only multiplies by them.
TRACED = ("learning_rate", "muon_learning_rate", "weight_decay")
Settings = dict[str, Any]
Evaluation = tuple[int, float | None]
DEFAULTS = flatten(Config())


def parse_settings(text: str) -> Settings:
    """`"a.b=1 c.d=True"` as a dictionary; values are Python's, or else plain strings."""
    settings = {}
    for part in text.split():
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"{part!r} is not a setting: write key=value")
        settings[key] = _value(value)
    return settings


def all_settings(grids: list[str], variants: list[str], common: list[str]) -> Iterator[Settings]:
    """Every combination of a point of each grid and a variant."""
    dimensions = []
    for grid in grids:
        key, _, values = grid.partition("=")
        dimensions.append([{key: _value(value)} for value in values.split(",")])
    dimensions.append([parse_settings(variant) for variant in variants] or [{}])
    for point in itertools.product(*dimensions):
        settings = parse_settings(" ".join(common))
        for part in point:
            settings |= part
        yield settings


def with_settings(base: Config, settings: Settings, seed: int) -> Config:
    """A config with some settings changed.

    Raises:
        UserError: an unknown setting, or a bad value.
    """
    values = base.to_dict() | {"seed": seed}
    for key, value in settings.items():
        group, _, name = key.rpartition(".")
        if group not in values or name not in values[group]:
            raise unknown_setting(f"{group}." if group else "", name, values.get(group, values))
        values[group][name] = value
    return Config.from_dict(values)


def with_arrays(config: Config, arrays: dict[str, jax.Array]) -> optax.GradientTransformation:
    """The optimizer of a config, with arrays in place of some of its numbers.

    The optimizer only reads attributes. A `Config` could not hold arrays, as it checks its values.
    """
    settings: Any = SimpleNamespace(**vars(config.optimizer) | arrays)
    return make_optimizer(settings, config.train.steps)


def train_together(configs: list[Config], corpus: Corpus) -> tuple[list[list[Evaluation]], float, int]:
    """Train runs that differ in seed and `TRACED` settings alone, all at once.

    Returns:
        For each run its evaluations (step, loss by the headline protocol; None where the run has come to
        what is not finite); the seconds that all took, compilation left out; and the parameters of one
        model.
    """
    plan = make_plan(configs[0], devices=jax.devices()[:1])
    config = plan.config
    model = GPT(plan.config.model, corpus.tokenizer.vocab_size, plan.execution)
    seeds_R = jnp.array([c.seed for c in configs], jnp.uint32)
    traced_R = {name: jnp.array([getattr(c.optimizer, name) for c in configs]) for name in TRACED}

    def init(seed: jax.Array, traced: dict[str, jax.Array]) -> TrainState:
        params = nn.unbox(init_params(model, stream(seed, INIT_STREAM)))
        optimizer = with_arrays(config, traced)
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    def train(
        state: TrainState, seed: jax.Array, traced: dict[str, jax.Array], source: TokenWindows, n: jax.Array
    ) -> TrainState:
        optimizer = with_arrays(config, traced)

        def body(_: int, state: TrainState) -> TrainState:
            return train_step(state, source, seed, plan, model, optimizer, next_token_loss)[0]

        return jax.lax.fori_loop(0, n, body, state)

    states = jax.jit(jax.vmap(init))(seeds_R, traced_R)
    source = TokenWindows(jnp.asarray(corpus.train), config.train.batch_size, config.model.context)
    train_all = jax.jit(jax.vmap(train, in_axes=(0, 0, 0, None, None)), donate_argnums=0)
    compiled = train_all.lower(states, seeds_R, traced_R, source, jnp.int32(1)).compile()

    evaluations: list[list[Evaluation]] = [[] for _ in configs]
    begun, step = time.monotonic(), 0
    while step < config.train.steps:
        n = min(config.train.eval_every, config.train.steps - step)
        states = compiled(states, seeds_R, traced_R, source, jnp.int32(n))
        step += n
        for run in range(len(configs)):
            params = jax.tree.map(lambda leaf, run=run: leaf[run], states.params)
            # An update that is not finite is left out, and the same one is tried from there on.
            came_so_far = int(states.step[run]) == step
            loss = float("nan")
            if came_so_far:
                loss = loss_of_tokens(model, params, corpus.val, plan.micro_batch_size)
            evaluations[run].append((step, round(loss, 5) if np.isfinite(loss) else None))
    return evaluations, time.monotonic() - begun, count_params(params)


def sweep(
    base: Config, name: str, points: list[Settings], seeds: list[int], out: Path, together: int
) -> None:
    """Train what `out` does not have yet.

    Raises:
        UserError: `out` cannot be written, or has a line that is no run.
    """
    code = commit()  # that of the beginning: files may change while it runs
    check_writable("out", out)
    done = {_identity(line) for line in read_lines(out)}
    groups: dict[str, list[tuple[Settings, Config]]] = defaultdict(list)
    for settings, seed in itertools.product(points, seeds):
        config = with_settings(base, settings, seed)
        if _identity({"config": name, "settings": settings, "seed": seed}) not in done:
            groups[_shape_of(config)].append((settings, config))
    for group in groups.values():
        for first in range(0, len(group), together):
            part = group[first : first + together]
            first_config = part[0][1]  # all of a part share text and context
            data = first_config.data
            corpus = load_corpus(text_file(data), first_config.model.context, data.train_fraction)
            evaluations, seconds, n_params = train_together([config for _, config in part], corpus)
            for (settings, config), losses in zip(part, evaluations, strict=True):
                line = {
                    "config": name, "settings": settings, "seed": config.seed, "val_loss": losses[-1][1],
                    "not_default": {k: v for k, v in flatten(config).items() if v != DEFAULTS[k]},
                    "evaluations": losses, "parameters": n_params, "together": len(part),
                    "seconds": round(seconds, 1), "device": describe_devices(), "jax": jax.__version__,
                    "machine": machine(), "commit": code,
                }  # fmt: skip
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                loss = _loss_of(line)
                print(f"{loss:.4f}  seed {config.seed}  {seconds:.0f} s  {_show(settings)}", flush=True)


def print_table(lines: list[dict[str, Any]]) -> None:
    """Mean and spread over the seeds, lowest first."""
    losses: dict[tuple[str, str], list[float]] = defaultdict(list)
    for line in lines:
        losses[line["config"], _show(line["settings"])].append(_loss_of(line))
    print("   mean   spread  seeds  settings")
    for (name, settings), values in sorted(losses.items(), key=lambda item: float(np.mean(item[1]))):
        spread = max(values) - min(values) if max(values) < np.inf else np.inf
        print(f"{np.mean(values):7.4f}  {spread:7.4f}  {len(values):5}  {name} {settings}")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The runs that a file has; none where it is not there.

    Raises:
        UserError: a line is no run; a machine that stops while it writes can leave half of one.
    """
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            run = json.loads(line)
            if not {"config", "settings", "seed", "val_loss"} <= run.keys():
                raise ValueError(line)
        except (ValueError, AttributeError):
            raise UserError(f"out = {path}: line {number} is not a run: delete it") from None
        lines.append(run)
    return lines


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _loss_of(line: dict[str, Any]) -> float:
    return float("inf") if line["val_loss"] is None else line["val_loss"]


def _show(settings: Settings) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())


def _identity(line: dict[str, Any]) -> str:
    return json.dumps([line["config"], line["settings"], line["seed"]], sort_keys=True)


def _shape_of(config: Config) -> str:
    """Equal for runs that one program can train at once."""
    free = {"seed", *(f"optimizer.{name}" for name in TRACED)}
    return json.dumps({key: value for key, value in flatten(config).items() if key not in free})


def main() -> int:
    """Parse the flags, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flag = parser.add_argument
    flag("--config", help="a config file")
    flag("--out", type=Path, required=True, help="JSON lines, one a run; appended to")
    flag("--seeds", type=int, nargs="+", default=[1337])
    flag("--grid", action="append", default=[], metavar="KEY=V1,V2", help="values of a setting")
    flag("--variant", action="append", default=[], metavar="'K=V K=V'", help="a list of settings")
    flag("--together", type=int, default=1, help="runs trained at once, where their shapes agree (1)")
    flag("--show", action="store_true", help="train nothing, print the table of --out")
    flag("common", nargs="*", metavar="KEY=V", help="settings of all runs")
    flags = parser.parse_args()
    if flags.together < 1:
        raise UserError(f"together = {flags.together} must be 1 or above")
    if not flags.show:
        if flags.config is None:
            raise UserError("--config is missing: try --config configs/shakespeare_cpu.py")
        base = Config.from_dict(runpy.run_path(flags.config)["get_config"]())
        points = list(all_settings(flags.grid, flags.variant, flags.common))
        sweep(base, Path(flags.config).stem, points, flags.seeds, flags.out, flags.together)
    print_table(read_lines(flags.out))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
