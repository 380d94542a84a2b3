"""The settings of a run, as frozen dataclasses that check their values.

A config file (`configs/*.py`) returns an `ml_collections.ConfigDict`, which the command line can override.
`Config.from_dict` turns it into the dataclasses that the rest of the program reads.
"""

import dataclasses
import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_collections
from flax.traverse_util import flatten_dict

from gpt_jax.checks import MAX_UNROLLED, build, check_divides, check_range, unknown_setting
from gpt_jax.errors import UserError

MAX_WINDOWS = 2**31  # windows of a run are numbered with 32 bits
Dtype = Literal["float32", "bfloat16"]  # of the activations
# Settings of a model that change how it is trained or computed; all others change what it computes.
FREE = (
    "context", "init_std", "zero_init", "dropout", "attention_dropout", "query_blocks", "remat", "unroll",
    "dtype", "lora_rank",
)  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer. The defaults are GPT-2's, without biases and dropout."""

    n_layer: int = 6
    n_head: int = 6
    d_model: int = 384
    context: int = 256  # T: how many tokens the model sees
    n_kv_head: int = 0  # grouped-query attention: heads of keys and values, each read by several; 0: n_head
    d_head: int = 0  # 0: d_model / n_head
    d_mlp: int = 0  # 0: 4 d_model, or 8/3 d_model (rounded up to a multiple of 8) for swiglu
    vocab_size: int = 0  # rows of the token embedding; 0: one for each token of the tokenizer
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 0.0  # added to the variance; 0: 1e-5 in layernorm, 1e-6 in rmsnorm
    activation: Literal["gelu", "gelu_exact", "relu2", "swiglu"] = "gelu"  # gelu is its tanh approximation
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
    # LoRA: train adapters of this rank in the linear layers of a model that `init_from` names; 0: train all.
    lora_rank: int = 0
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
    def head_width(self) -> int:
        """K: the width of one attention head."""
        return self.d_head or self.d_model // self.n_head

    @property
    def n_groups(self) -> int:
        """How many heads of queries share one head of keys and values."""
        return self.n_head // (self.n_kv_head or self.n_head)

    @property
    def epsilon(self) -> float:
        """What the norms add to the variance."""
        return self.norm_eps or (1e-6 if self.norm == "rmsnorm" else 1e-5)

    @property
    def mlp_width(self) -> int:
        """F: the width of the MLP's hidden layer."""
        if self.d_mlp:
            return self.d_mlp
        if self.activation == "swiglu":
            return math.ceil(8 * self.d_model / 3 / 8) * 8
        return 4 * self.d_model

    def vocabulary(self, n_tokens: int) -> int:
        """V: the rows of the token embedding, for a tokenizer of so many tokens; a UserError if too few."""
        if 0 < self.vocab_size < n_tokens:
            raise UserError(
                f"model.vocab_size = {self.vocab_size} must be {n_tokens} or above, the tokens of the "
                f"tokenizer, or 0"
            )
        return self.vocab_size or n_tokens

    def __post_init__(self) -> None:
        check_range(self, "model", "be above 0", "n_layer", "n_head", "d_model", "context")
        check_range(self, "model", "be above 0", "rope_base", "init_std", "query_blocks")
        check_range(self, "model", "be 0 or above", "d_mlp", "conv_width", "n_kv_head", "d_head", "lora_rank")
        check_range(self, "model", "be 0 or above", "vocab_size", "norm_eps")
        check_range(self, "model", f"be {MAX_UNROLLED} or below", "conv_width", "query_blocks")
        check_range(self, "model", "lie in [0, 1)", "dropout", "attention_dropout")
        if self.d_model % self.n_head and not self.d_head:
            raise UserError(
                f"model.d_model = {self.d_model} cannot be divided among model.n_head = {self.n_head} "
                f"heads: choose a width that is a multiple of {self.n_head}"
            )
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise UserError(
                f"model.n_kv_head = {self.n_kv_head} must divide model.n_head = {self.n_head}: each head of "
                f"keys and values is read by equally many heads of queries"
            )
        if self.position == "rope" and self.head_width % 2:
            raise UserError(
                f"model.position = 'rope' rotates pairs of channels, but a head is {self.head_width} wide "
                f"(model.d_head, or else d_model / n_head): choose an even width"
            )


@dataclass(frozen=True)
class DataConfig:
    """The text, split by position: the first part for training, the rest for validation."""

    # A UTF-8 text file, a .jsonl file (field "text"), either as .gz or .zst; a folder or a pattern of such
    # files; or token files. Empty: tiny Shakespeare, artifacts/input.txt.
    path: str = ""
    # "char", "byte", "gpt2", "bpe:8192" (trained on the text), or the path of a tokenizer.json; empty: that
    # of the token files, or else "char".
    tokenizer: str = ""
    extend_vocabulary: bool = False  # with init_from: add the characters that only this text has
    train_fraction: float = 0.9
    # Where the tokens of the training split are. "device": all on the device; "host": batches are read from
    # files while the device computes. The batches are the same. "auto": on the device up to 64 MiB.
    batches: Literal["auto", "device", "host"] = "auto"

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
    muon_learning_rate: float = 0.02  # muon: peak for the matrices of the blocks; AdamW updates the rest
    muon_momentum: float = 0.95
    embedding_decay: float = 0.0  # muon: weight decay of the embeddings and the head

    def __post_init__(self) -> None:
        check_range(self, "optimizer", "be above 0", "learning_rate", "eps", "muon_learning_rate")
        check_range(self, "optimizer", "be 0 or above", "warmup_steps", "clip_norm")
        check_range(self, "optimizer", "be 0 or above", "weight_decay", "embedding_decay")
        check_range(self, "optimizer", "lie in [0, 1)", "b1", "b2", "muon_momentum")
        check_range(self, "optimizer", "lie in [0, 1]", "min_lr_ratio")


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, the batch size, and how often to evaluate, log and save."""

    steps: int = 5000
    batch_size: int = 64  # B: windows in one update
    # Gradient accumulation: micro-batches in one update. 0: one on a GPU or TPU; on a CPU micro-batches of
    # about 1,024 tokens, which need less memory and, since they fit its caches, less time. A run keeps the
    # number that it began with, because each micro-batch has its own dropout masks, unless it resumes on
    # devices that cannot share such micro-batches equally.
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
    wandb: bool = False  # also log to Weights & Biases: pip install -e '.[wandb]'
    # Write a profiler trace of these updates, the first and the last, such as "100:105"; empty: none.
    profile_steps: str = ""

    @property
    def profiled(self) -> tuple[int, int]:
        """The first and the last update of the profiler trace; 0, 0: there is none."""
        match = re.fullmatch("([0-9]{1,10}):([0-9]{1,10})", self.profile_steps)
        return (int(match[1]), int(match[2])) if match else (0, 0)

    def __post_init__(self) -> None:
        check_range(self, "train", "be above 0", "steps", "batch_size")
        check_range(self, "train", "be above 0", "eval_every", "log_every", "save_minutes")
        check_range(self, "train", "be 0 or above", "grad_accum_steps", "sample_length")
        check_range(self, "train", "be 0 or above", "eval_tokens", "patience")
        if self.eval_tokens == 1:
            raise UserError("train.eval_tokens = 1 must be 2 or more, since the first token is not predicted")
        if self.grad_accum_steps and self.batch_size % self.grad_accum_steps:
            raise UserError(
                f"train.batch_size = {self.batch_size} cannot be split into train.grad_accum_steps = "
                f"{self.grad_accum_steps} equal micro-batches"
            )
        if self.profile_steps and not 0 < self.profiled[0] < self.profiled[1] <= self.steps:
            raise UserError(
                f"train.profile_steps = {self.profile_steps!r} must be the first and the last update, as in "
                f"'100:105', with 0 < first < last <= train.steps = {self.steps}"
            )


@dataclass(frozen=True)
class MeshConfig:
    """The mesh of devices: data parallel x fully sharded data parallel x tensor parallel."""

    data: int = 0  # 0: all devices / (fsdp x tensor)
    fsdp: int = 1  # also split each parameter and its optimizer state
    tensor: int = 1  # split attention heads and MLP channels

    def __post_init__(self) -> None:
        check_range(self, "mesh", "be 0 or above", "data")
        check_range(self, "mesh", "be above 0", "fsdp", "tensor")


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    seed: int = 1337
    # The folder of a trained model, of which the run takes parameters, vocabulary and shape: the settings of
    # `model` that are left at their defaults. Empty: random parameters.
    init_from: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed = {self.seed} must lie in [0, 2**32)")
        if self.data.extend_vocabulary and not self.init_from:
            raise UserError("data.extend_vocabulary = True is for a run with init_from: leave it out")
        if self.optimizer.warmup_steps > self.train.steps:
            raise UserError(
                f"optimizer.warmup_steps = {self.optimizer.warmup_steps} is longer than the run: "
                f"train.steps = {self.train.steps}"
            )
        if self.model.lora_rank and not self.init_from:
            raise UserError(
                f"model.lora_rank = {self.model.lora_rank} needs a model: name it with --config.init_from"
            )
        windows = self.train.steps * self.train.batch_size
        if windows >= MAX_WINDOWS:
            raise UserError(
                f"train.steps x train.batch_size = {windows:,} windows must be below {MAX_WINDOWS:,}: "
                f"train.steps can be {(MAX_WINDOWS - 1) // self.train.batch_size:,} at most"
            )
        shards = max(self.mesh.data, 1) * self.mesh.fsdp
        devices = f"mesh.data x mesh.fsdp = {shards} devices"
        check_batch_split(self.train, shards, devices, "or smaller values of these two")
        if not self.init_from:  # else the shape may be the parent's
            self.check_mesh()

    def check_mesh(self) -> None:
        """Raise `UserError` unless the model can be split equally over the mesh."""
        check_divides(self.mesh.fsdp, "mesh.fsdp", self.model.d_model, "model.d_model")
        n_kv_head = self.model.n_head // self.model.n_groups
        check_divides(self.mesh.tensor, "mesh.tensor", self.model.n_head, "model.n_head")
        check_divides(self.mesh.tensor, "mesh.tensor", n_kv_head, "model.n_kv_head")
        check_divides(self.mesh.tensor, "mesh.tensor", self.model.mlp_width, "the MLP width, model.d_mlp")

    @classmethod
    def from_dict(cls, values: dict[str, Any] | ml_collections.ConfigDict) -> "Config":
        """Check every key, type and range.

        Raises:
            UserError: one line that names the key, its value and what would be right.
        """
        if isinstance(values, ml_collections.ConfigDict):
            values = values.to_dict()
        return build(cls, values)

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
    """Check that `n_shards` devices can share a micro-batch equally.

    Raises:
        UserError: they cannot. It names them as `devices`, and ends with `advice` on how to use fewer.
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
    return dict(flatten_dict(config.to_dict(), sep="."))


def parse_setting(name: str, text: str) -> Any:
    """The value of a setting, such as "model.n_layer", from the command line.

    Raises:
        UserError: there is no such setting, or the text is not of its type.
    """
    defaults = flatten(Config())
    if name not in defaults:
        raise unknown_setting("", name, defaults)
    kind = type(defaults[name])
    try:
        return _BOOLS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        what = {bool: "True or False", int: "a whole number", float: "a number"}[kind]
        with suppress(ValueError, OverflowError):  # 1e3
            what += f": write {int(float(text))}" if kind is int and float(text).is_integer() else ""
        raise UserError(f"--config.{name}={text} must be {what}") from None


_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
