"""What accelerators can do, by their makers' public figures, and how much of it a training step uses."""

from dataclasses import dataclass

from gpt_jax.config import ModelConfig


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them.

    Attributes:
        name: as in a topology, "v5e".
        kinds: JAX's `device_kind` of such a device contains one of these.
        memory: bytes.
        flops: peak arithmetic on bfloat16, dense, a second.
        bandwidth: bytes a second to and from its memory.
    """

    name: str
    kinds: tuple[str, ...]
    memory: float
    flops: float
    bandwidth: float


# Sources: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e); NVIDIA's data sheets for the A100 (SXM, 40 and
# 80 GB), H100 (SXM), H200 (SXM) and B200 (in a DGX). Of several that fit, the first.
CHIPS = (
    Chip("v4", ("TPU v4",), 32e9, 275e12, 1228e9),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 16e9, 197e12, 819e9),
    Chip("v5p", ("TPU v5",), 95e9, 459e12, 2765e9),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 32e9, 918e12, 1640e9),
    Chip("a100-40gb", ("A100-SXM4-40GB", "A100-PCIE-40GB"), 40e9, 312e12, 1555e9),
    Chip("a100", ("A100",), 80e9, 312e12, 2039e9),
    Chip("h100", ("H100 80GB HBM3",), 80e9, 989e12, 3352e9),
    Chip("h200", ("H200",), 141e9, 989e12, 4800e9),
    Chip("b200", ("B200",), 180e9, 2250e12, 8000e9),
)


def find_chip(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`, None for one that is not in the table."""
    fitting = (chip for chip in CHIPS if any(kind in device_kind for kind in chip.kinds))
    return next(fitting, None)


def flops_per_token(config: ModelConfig, vocab_size: int) -> int:
    """Floating-point operations of a training step for each token, what is recomputed left out.

    Six for each weight of a matrix product (two forward, four backward), and 12 L D T for attention, as if
    there were no mask (Chowdhery et al. 2022, "PaLM", appendix B).
    """
    attention = 4 * config.d_model * config.d_model
    mlp = (3 if config.activation == "swiglu" else 2) * config.d_model * config.mlp_width
    weights = config.n_layer * (attention + mlp) + config.d_model * vocab_size
    return 6 * weights + 12 * config.n_layer * config.d_model * config.context


def utilization(tokens_per_second: float, flops: int, device_kind: str, n_devices: int) -> float | None:
    """Model FLOPs utilization, MFU: the part of the peak bfloat16 arithmetic that training makes use of.

    Args:
        tokens_per_second: trained on, by all devices together.
        flops: for each token, from `flops_per_token`.
        device_kind: what JAX calls the devices.
        n_devices: how many there are.

    Returns:
        In [0, 1], or None for a chip that is not in the table.
    """
    chip = find_chip(device_kind)
    return None if chip is None else tokens_per_second * flops / (n_devices * chip.flops)


def least_seconds(chip: Chip, flops: float, n_bytes: float) -> tuple[float, float]:
    """What so much arithmetic and so much traffic take at least, each by itself, in seconds."""
    return flops / chip.flops, n_bytes / chip.bandwidth
