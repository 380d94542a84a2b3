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
