"""This package as a contender, see contest.py.

Tasks: "train" does training steps; "memory" does one, and says what memory it takes; "sample" generates;
"products" does only the matrix products that a token needs, in the same kind of loop; "product" and "copy"
find what the machine can do at most.
"""

import ctypes
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gpt_jax.config import Config
from gpt_jax.data.batches import TokenWindows
from gpt_jax.model.loss import next_token_loss
from gpt_jax.model.params import count_params, init_params
from gpt_jax.model.transformer import GPT
from gpt_jax.parallel.devices import describe_devices
from gpt_jax.parallel.execution import resolve_execution
from gpt_jax.plan import make_plan
from gpt_jax.sampling.generate import generate_tokens
from gpt_jax.sampling.rules import make_rules
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.state import init_state
from gpt_jax.training.step import make_train_steps

Prepared = tuple[dict[str, Any], Callable[[], Any]]  # facts, and a piece of work


def config_of(shape: dict[str, Any]) -> Config:
    """nanoGPT's recipe for this shape."""
    values = Config().to_config_dict()
    values.model.update({name: shape[name] for name in ("n_layer", "n_head", "d_model", "context")})
    values.model.update(dropout=shape["dropout"], attention_dropout=shape["dropout"])
    values.optimizer.update(learning_rate=1e-3, b2=0.99, weight_decay=0.1, clip_norm=1.0, warmup_steps=100)
    values.train.update(steps=5000, batch_size=shape["batch_size"])
    return Config.from_dict(values)


def train(task: dict[str, Any]) -> Prepared:
    """`steps` updates in one call."""
    program, arguments, facts = compile_training(config_of(task["shape"]), task["shape"], task["steps"])

    def work() -> Any:
        arguments[0], metrics = program(*arguments)
        return arguments[0], metrics

    return facts, work


def memory(task: dict[str, Any]) -> Prepared:
    """The bytes that a step of the whole batch at once takes, as compiled and as Linux counts them."""
    values = config_of(task["shape"]).to_config_dict()
    values.model.remat = task["remat"]
    values.train.grad_accum_steps = 1
    program, arguments, facts = compile_training(Config.from_dict(values), task["shape"], 1)
    plan = program.memory_analysis()
    facts["arguments"] = plan.argument_size_in_bytes
    results = plan.output_size_in_bytes - plan.alias_size_in_bytes  # those with memory of their own
    facts["planned"] = plan.argument_size_in_bytes + results + plan.temp_size_in_bytes
    if jax.default_backend() == "cpu":
        with suppress(OSError):  # not Linux, or not allowed
            arguments[0], _ = program(*arguments)  # threads and libraries take memory once
            facts["measured"] = facts["arguments"] + growth_during(lambda: program(*arguments))
    return facts, lambda: None


def growth_during(work: Callable[[], Any]) -> int:
    """By how many bytes this process grows at most, as Linux counts them.

    Raises:
        OSError: this is not Linux, or the kernel does not allow it.
    """
    status = Path("/proc/self/status")
    time.sleep(1)  # threads may still free what they used
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed must not hide what is needed
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = kibibytes(status, "VmRSS")
    jax.block_until_ready(work())
    return 1024 * (kibibytes(status, "VmHWM") - before)


def kibibytes(status: Path, name: str) -> int:
    """A number of /proc/self/status."""
    lines = status.read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def compile_training(config: Config, shape: dict[str, Any], n_steps: int) -> tuple[Any, list[Any], Any]:
    """The compiled steps, their arguments, the state first, and facts."""
    plan = make_plan(config)
    model = GPT(plan.config.model, shape["vocab_size"], plan.execution)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = init_state(model, optimizer, plan.mesh, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, shape["vocab_size"], 2**20).astype(np.uint16)
    numbers = (np.uint32(0), np.int32(n_steps), np.int32(config.train.steps))
    source = TokenWindows(jnp.asarray(tokens), config.train.batch_size, config.model.context)
    arguments = [state, source, *numbers]
    begun = time.monotonic()
    program = make_train_steps(plan, model, next_token_loss, state, n_steps).lower(*arguments).compile()
    facts = {"compile_seconds": time.monotonic() - begun, "parameters": count_params(state.params)}
    return program, arguments, facts


def sample(task: dict[str, Any]) -> Prepared:
    """`length` tokens for each of `rows` prompts."""
    shape = task["shape"]
    config = config_of(shape).model
    model = GPT(config, shape["vocab_size"], resolve_execution(config))
    params = nn.unbox(jax.jit(lambda key: init_params(model, key))(jax.random.key(0)))
    prompt_BxP = np.zeros((task["rows"], task["prompt"]), np.int32)

    def work() -> Any:
        rules, key = make_rules(temperature=0.8), jax.random.key(0)
        return list(generate_tokens(model, params, prompt_BxP, task["length"], rules, key))

    return {"parameters": count_params(params)}, work


def products(task: dict[str, Any]) -> Prepared:
    """The matrix products of `length` tokens in `rows` texts, in a scan that also takes the largest logit."""
    shape = task["shape"]
    D, V = shape["d_model"], shape["vocab_size"]
    keys = iter(jax.random.split(jax.random.key(0), 4 * shape["n_layer"] + 2))

    def random(*size: int) -> jax.Array:
        return 0.02 * jax.random.normal(next(keys), size)

    layers = [
        (random(D, 3 * D), random(D, D), random(D, 4 * D), random(4 * D, D)) for _ in range(shape["n_layer"])
    ]
    head, x_BxD = random(D, V), random(task["rows"], D)

    @jax.jit
    def loop(x_BxD: jax.Array, layers: Any, head: jax.Array) -> Any:
        def token(x_BxD: jax.Array, _: None) -> Any:
            for qkv, out, up, down in layers:
                q, k, v = jnp.split(x_BxD @ qkv, 3, axis=1)  # all are used, so none is optimized away
                x_BxD = x_BxD + (q + k + v) @ out
                x_BxD = x_BxD + (x_BxD @ up) @ down
            # A call of a library, as the sampler has one: without any, XLA compiles the loop in another way.
            token_Bx1 = jax.lax.top_k(x_BxD @ head, 1)[1]
            return x_BxD / (1 + jnp.abs(x_BxD).max()), token_Bx1

        return jax.lax.scan(token, x_BxD, None, length=task["length"])

    return {}, lambda: loop(x_BxD, layers, head)


def product(task: dict[str, Any]) -> Prepared:
    """Square matrix products, one after the other."""
    a = jax.random.normal(jax.random.key(0), (task["size"], task["size"])) / task["size"] ** 0.5
    multiply = jax.jit(lambda a: jax.lax.fori_loop(0, task["times"], lambda _, b: a @ b, a))
    return {"devices": describe_devices()}, lambda: multiply(a)


def copy(task: dict[str, Any]) -> Prepared:
    """Read float32 numbers, and write them where they were."""
    numbers = [jnp.arange(task["numbers"], dtype=jnp.float32)]
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def work() -> Any:
        for _ in range(task["times"]):
            numbers[0] = add(numbers[0])
        return numbers[0]

    return {}, work


def main() -> None:
    """Prepare, and work when told to."""
    task = json.loads(sys.argv[1])
    tasks = {f.__name__: f for f in (train, memory, sample, products, product, copy)}
    facts, work = tasks[task["task"]](task)
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        begun = time.monotonic()
        jax.block_until_ready(work())
        print(time.monotonic() - begun, flush=True)


main()
