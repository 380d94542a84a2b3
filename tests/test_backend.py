import pytest

from gpt_jax import backend
from gpt_jax.errors import UserError


def test_a_backend_that_computes_rightly_passes():
    backend.check_backend()


def test_a_backend_that_computes_wrongly_is_refused(monkeypatch):
    """As jaxlib 0.10.2 does: the last of 32,769 results is wrong, by less than a hundredth."""

    def wrong_jit(function):
        return lambda rows: function(rows).at[-1].multiply(0.998)

    monkeypatch.setattr(backend.jax, "jit", wrong_jit)
    with pytest.raises(UserError, match=r"computes wrongly on this cpu \(\d+ for 32768 squared\): install"):
        backend.check_backend()


@pytest.mark.parametrize(
    "platform, compute_capability, dtype",
    [
        ("cpu", "", "float32"),
        ("tpu", "", "bfloat16"),
        ("gpu", "7.0", "float32"),  # V100
        ("gpu", "7.5", "float32"),  # T4, Colab's free GPU
        ("gpu", "8.0", "bfloat16"),  # A100
        ("gpu", "8.9", "bfloat16"),  # L4
        ("gpu", "9.0", "bfloat16"),  # H100
        ("gpu", "10.0", "bfloat16"),  # B200
        ("gpu", "gfx942", "bfloat16"),  # AMD
    ],
)
def test_bfloat16_where_the_hardware_multiplies_in_it(platform, compute_capability, dtype):
    assert backend.auto_dtype(platform, compute_capability) == dtype


@pytest.mark.parametrize(
    "device, dtype, text",
    [
        (("cpu", ""), "float32", "float32"),
        (("gpu", "7.5"), "float32", "float32 (a GPU below compute capability 8.0 has no bfloat16 units)"),
        (("gpu", "9.0"), "bfloat16", "bfloat16"),
        (("gpu", "9.0"), "float32", "float32 (the model's matrix products in full float32)"),
        (("tpu", ""), "float32", "float32 (the model's matrix products in full float32)"),
    ],
)
def test_what_is_said_of_the_precision(device, dtype, text):
    assert backend.describe_dtype(dtype, *device) == text


def test_this_device_is_a_cpu():
    assert backend.first_device() == ("cpu", "")
    assert backend.resolve_dtype("auto") == "float32"
    assert backend.resolve_dtype("bfloat16") == "bfloat16"
