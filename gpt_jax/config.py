"""The settings of a run, as frozen dataclasses that check their values.

A config file (`configs/*.py`) returns an `ml_collections.ConfigDict`, which the command line can override.
`Config.from_dict` turns it into the dataclasses that the rest of the program reads.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

import ml_collections

from gpt_jax.errors import UserError

MAX_INT = 2**32  # no integer setting makes sense above this
MAX_UNROLLED = 64  # largest number of copies that a loop in the model's code may compile to
Dtype = Literal["float32", "bfloat16"]  # of the activations

# Old names of settings. Using one is an error that names the new one; stored runs are migrated when read.
RENAMED = {
    "model.embedding_skip": "model.x0_residual",
    "optimizer.final_fraction": "optimizer.min_lr_ratio",
    "optimizer.skip_above": "optimizer.skip_grad_norm_factor",
    "train.accumulate": "train.grad_accum_steps",
}


class UnknownSettingError(UserError):
    """A setting, or a choice for one, that does not exist."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer. The defaults are GPT-2's, without biases and dropout."""

    n_layer: int = 6
    n_head: int = 6
    d_model: int = 384
    context: int = 256  # T: how many tokens the model sees
    d_mlp: int = 0  # 0: 4 d_model, or 8/3 d_model (rounded up to a multiple of 8) for swiglu
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    activation: Literal["gelu", "relu2", "swiglu"] = "gelu"
    position: Literal["learned", "rope"] = "learned"
    rope_base: float = 10_000.0
    qk_norm: bool = False  # RMSNorm of queries and keys before their product
    bias: bool = False  # in the linear layers and LayerNorms
    bigram: bool = False  # bigram embedding: also embed each pair of a token and the one before it
    conv_width: int = 0  # width W of the causal convolution over time before the MLP; 0: none
    x0_residual: bool = False  # residual connection from the embedding (x0) to each block, with learned gates
    tied_embedding: bool = True  # the output head is the transposed token embedding
    zero_init: bool = False  # initialise the output projections of each block to zero
    init_std: float = 0.02
    dropout: float = 0.0  # on the embedding and on what each block adds
    attention_dropout: float = 0.0  # on the attention weights
    query_blocks: int = 1  # compute attention in this many blocks of queries, and skip the keys after each
    # Rematerialisation: what the backward pass recomputes instead of storing, which saves memory and costs
    # time. "elementwise": all but the results of matrix products with parameters; "block": all but the input
    # of each block; "auto": "nothing" on a CPU, "elementwise" elsewhere.
    remat: Literal["auto", "nothing", "elementwise", "block"] = "auto"
    # Unroll the scan over layers: faster steps on a CPU, longer compilation. "auto": on a CPU.
    unroll: Literal["auto", "yes", "no"] = "auto"
    # Type of the activations. "auto": bfloat16 on TPUs and on GPUs that support it, float32 elsewhere.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @property
    def d_head(self) -> int:
        """K: the width of one attention head."""
        return self.d_model // self.n_head

    @property
    def mlp_width(self) -> int:
        """F: the width of the MLP's hidden layer."""
        if self.d_mlp:
            return self.d_mlp
        if self.activation == "swiglu":
            return math.ceil(8 * self.d_model / 3 / 8) * 8
        return 4 * self.d_model

    def __post_init__(self) -> None:
        _positive(
            self, "model", "n_layer", "n_head", "d_model", "context", "rope_base", "init_std", "query_blocks"
        )
        _not_negative(self, "model", "d_mlp", "conv_width")
        _at_most(MAX_UNROLLED, self, "model", "conv_width", "query_blocks")
        _fraction(self, "model", "dropout", "attention_dropout")
        if self.d_model % self.n_head:
            raise UserError(
                f"model.d_model = {self.d_model} cannot be divided among model.n_head = {self.n_head} "
                f"heads: choose a width that is a multiple of {self.n_head}"
            )
        if self.position == "rope" and self.d_head % 2:
            raise UserError(
                f"model.position = 'rope' rotates pairs of channels, but a head is {self.d_head} wide "
                f"(d_model / n_head): choose an even width"
            )


@dataclass(frozen=True)
class DataConfig:
    """The text, split by position: its first part trains, the rest validates."""

    path: str = ""  # a UTF-8 text file; empty: tiny Shakespeare, artifacts/input.txt
    train_fraction: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.train_fraction < 1:
            raise UserError(
                f"data.train_fraction = {self.train_fraction} must lie between 0 and 1, both excluded"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, and the schedule of its learning rate: linear warm-up, then `schedule`."""

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3  # peak
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1  # final learning rate / peak learning rate
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.1  # decoupled; adamw: of all matrices, muon: of the matrices of the blocks
    clip_norm: float = 1.0  # clip the gradient to this global norm; 0: no clipping
    # Skip an update whose gradient norm is above this many times the median of the last 64; 0: never.
    skip_grad_norm_factor: float = 0.0
    # Decay of an exponential moving average (EMA) of the parameters, for constant learning rates; 0: none.
    ema_decay: float = 0.0
    muon_learning_rate: float = 0.02  # muon: peak for the matrices of the blocks; AdamW updates the rest
    muon_momentum: float = 0.95
    embedding_decay: float = 0.0  # muon: weight decay of the embeddings and the head

    def __post_init__(self) -> None:
        _positive(self, "optimizer", "learning_rate", "eps", "muon_learning_rate")
        _not_negative(
            self, "optimizer", "warmup_steps", "weight_decay", "embedding_decay", "clip_norm",
            "skip_grad_norm_factor",
        )  # fmt: skip
        _fraction(self, "optimizer", "b1", "b2", "ema_decay", "muon_momentum")
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"optimizer.min_lr_ratio = {self.min_lr_ratio} must lie in [0, 1]")


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, the batch size, and how often to evaluate, log and save."""

    steps: int = 5000
    batch_size: int = 64  # B: windows in one update
    # Gradient accumulation: micro-batches in one update. 0: one on a GPU or TPU; on a CPU micro-batches of
    # about 1,024 tokens, which need less memory and, since they fit its caches, less time. A run keeps the
    # number that it began with, because each micro-batch has its own dropout masks.
    grad_accum_steps: int = 0
    eval_every: int = 250  # steps between evaluations
    # Evaluate on the first `eval_tokens` tokens of the validation split; at the end of the run, the last and
    # the best checkpoint are evaluated on all of it. 0: always on all of it.
    eval_tokens: int = 0
    patience: int = 0  # stop after this many evaluations without a new best loss; 0: never
    log_every: int = 10  # steps between lines of metrics.jsonl
    save_minutes: float = 5.0  # save at least this often, besides the checkpoint at each evaluation
    sample_length: int = 200  # tokens of sample text at each evaluation; 0: none
    tensorboard: bool = False  # also write TensorBoard events: pip install -e '.[tensorboard]'

    def __post_init__(self) -> None:
        _positive(self, "train", "steps", "batch_size", "eval_every", "log_every", "save_minutes")
        _not_negative(self, "train", "grad_accum_steps", "sample_length", "eval_tokens", "patience")
        if self.eval_tokens == 1:
            raise UserError("train.eval_tokens = 1 must be 2 or more, since the first token is not predicted")
        if self.grad_accum_steps and self.batch_size % self.grad_accum_steps:
            raise UserError(
                f"train.batch_size = {self.batch_size} cannot be split into train.grad_accum_steps = "
                f"{self.grad_accum_steps} equal micro-batches"
            )


@dataclass(frozen=True)
class MeshConfig:
    """The mesh of devices: data parallel x fully sharded data parallel x tensor parallel."""

    data: int = 0  # 0: all devices / (fsdp x tensor)
    fsdp: int = 1  # also split each parameter and its optimizer state
    tensor: int = 1  # split attention heads and MLP channels

    def __post_init__(self) -> None:
        _not_negative(self, "mesh", "data")
        _positive(self, "mesh", "fsdp", "tensor")


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    seed: int = 1337
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed = {self.seed} must lie in [0, 2**32)")
        if self.optimizer.warmup_steps > self.train.steps:
            raise UserError(
                f"optimizer.warmup_steps = {self.optimizer.warmup_steps} is longer than the run: "
                f"train.steps = {self.train.steps}"
            )
        shards = max(self.mesh.data, 1) * self.mesh.fsdp
        devices = f"mesh.data x mesh.fsdp = {shards} devices"
        check_batch_split(self.train, shards, devices, "or smaller values of these two")
        _divides(self.mesh.fsdp, "mesh.fsdp", self.model.d_model, "model.d_model")
        _divides(self.mesh.tensor, "mesh.tensor", self.model.n_head, "model.n_head")
        _divides(self.mesh.tensor, "mesh.tensor", self.model.mlp_width, "the MLP width, model.d_mlp")

    @classmethod
    def from_dict(cls, values: dict[str, Any] | ml_collections.ConfigDict) -> "Config":
        """Check every key, type and range.

        Raises:
            UserError: one line that names the key, its value and what would be right.
        """
        if isinstance(values, ml_collections.ConfigDict):
            values = values.to_dict()
        return _build(cls, values, prefix="")

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain values."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """JSON, indented, keys in the order of the code."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_config_dict(self) -> ml_collections.ConfigDict:
        """A `ConfigDict` with every key, so that config files and the command line can override each."""
        return ml_collections.ConfigDict(self.to_dict())


def check_batch_split(train: TrainConfig, n_shards: int, devices: str, advice: str) -> None:
    """Check that devices can share a micro-batch equally.

    Args:
        train: the settings.
        n_shards: how many devices.
        devices: the same in words.
        advice: how to use fewer.

    Raises:
        UserError: they cannot.
    """
    batch_size, n_steps = train.batch_size, max(train.grad_accum_steps, 1)
    if batch_size // n_steps % n_shards == 0:
        return
    batch, fix = f"train.batch_size = {batch_size}", f"use a multiple of {n_shards * n_steps}"
    if n_steps > 1:
        batch = (
            f"a micro-batch of train.batch_size / train.grad_accum_steps = {batch_size} / {n_steps} = "
            f"{batch_size // n_steps}"
        )
        fix += " as train.batch_size"
        if batch_size % n_shards == 0:
            fix = f"use --config.train.grad_accum_steps={math.gcd(batch_size // n_shards, n_steps)}"
    raise UserError(f"{batch} cannot be split equally over {devices}: {fix}, {advice}")


def flatten(config: Config) -> dict[str, Any]:
    """`{"model.n_layer": 6, ...}`: the settings by their names on the command line."""
    flat: dict[str, Any] = {}
    for key, value in config.to_dict().items():
        if isinstance(value, dict):
            flat.update({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            flat[key] = value
    return flat


def unknown_setting(prefix: str, key: str, known: Iterable[str]) -> UnknownSettingError:
    """An error that names the nearest known setting, or the new name of an old one.

    Args:
        prefix: of the group, such as "model.".
        key: what was given.
        known: the settings of the group.
    """
    shown = key if key.isprintable() else repr(key)  # an error is one line
    if prefix + key in RENAMED:
        return UnknownSettingError(
            f"unknown setting {prefix}{shown}: it is now called {RENAMED[prefix + key]}"
        )
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
    return UnknownSettingError(f"unknown setting {prefix}{shown}: {hint}")


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{prefix[:-1] or 'config'} = {values!r} must be a group of settings")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise unknown_setting(prefix, str(key), fields)
        wanted = fields[key].type
        if dataclasses.is_dataclass(wanted):
            arguments[key] = _build(wanted, value, f"{prefix}{key}.")  # type: ignore[arg-type]
        else:
            arguments[key] = _checked(value, wanted, f"{prefix}{key}")
    return cls(**arguments)


def _checked(value: Any, wanted: Any, name: str) -> Any:
    """`value` as type `wanted`; an int serves as a float, a bool never as a number."""
    if get_origin(wanted) is Literal:
        if value not in get_args(wanted):
            choices = ", ".join(map(repr, get_args(wanted)))
            raise UnknownSettingError(f"{name} = {value!r} must be one of {choices}")
        return value
    if type(value) is int and abs(value) > MAX_INT:
        raise UserError(f"{name} must lie within {MAX_INT:,} of 0")
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise UserError(f"{name} = {value!r} must be of type {wanted.__name__}")
    if wanted is float and not math.isfinite(value):
        raise UserError(f"{name} = {value} must be a finite number")
    return value


def _positive(config: Any, group: str, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise UserError(f"{group}.{name} = {getattr(config, name)} must be above 0")


def _not_negative(config: Any, group: str, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            raise UserError(f"{group}.{name} = {getattr(config, name)} must be 0 or above")


def _at_most(limit: int, config: Any, group: str, *names: str) -> None:
    for name in names:
        if getattr(config, name) > limit:
            raise UserError(f"{group}.{name} = {getattr(config, name)} must be {limit} or below")


def _fraction(config: Any, group: str, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{group}.{name} = {getattr(config, name)} must lie in [0, 1)")


def _divides(divisor: int, divisor_name: str, number: int, name: str) -> None:
    if number % divisor:
        raise UserError(
            f"{name} = {number} cannot be split equally over {divisor_name} = {divisor} devices: use a "
            f"multiple of {divisor}, or another {divisor_name}"
        )
