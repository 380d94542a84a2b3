"""The shapes of the models that the contests use."""

from dataclasses import dataclass, replace
from typing import Any, TypeVar

from gpt_jax.errors import UserError

Curves = TypeVar("Curves")


@dataclass(frozen=True)
class Shape:
    """A GPT-2 without biases, and its batch: what nanoGPT and this package both can be."""

    n_layer: int
    n_head: int
    d_model: int
    context: int
    vocab_size: int
    batch_size: int
    dropout: float

    @property
    def n_weights(self) -> int:
        """Weights that multiply each token: of the blocks and of the output head."""
        return self.n_layer * 12 * self.d_model**2 + self.vocab_size * self.d_model

    @property
    def flops_per_token(self) -> int:
        """Of a training step, as `gpt_jax.model.params.flops_per_token` counts them."""
        return 6 * self.n_weights + 12 * self.n_layer * self.d_model * self.context

    def __str__(self) -> str:
        return (
            f"{self.n_layer} layers, {self.n_head} heads, width {self.d_model}, context {self.context}, "
            f"vocabulary {self.vocab_size}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For a worker."""
        return dict(vars(self))


SHAPES = {
    "smoke": Shape(1, 2, 16, 16, 65, 4, 0.2),
    "0.8M": Shape(4, 4, 128, 64, 65, 12, 0.0),  # nanoGPT's recipe for a CPU
    "10.7M": Shape(6, 6, 384, 256, 65, 64, 0.2),  # its recipe for Shakespeare's characters
    "3M": Shape(4, 4, 256, 256, 65, 16, 0.0),  # in the middle of what a CPU trains
    "124M": Shape(12, 12, 768, 1024, 50304, 12, 0.0),  # GPT-2, for a GPU
}


def series(base: Shape) -> dict[str, list[tuple[int, Shape]]]:
    """Shapes that differ in one thing: what that is, and its amount and the shape of each."""
    by_width = [replace(base, d_model=width) for width in _times(base.d_model, 0.5, 1, 2)]
    by_context = [replace(base, context=context) for context in _times(base.context, 0.5, 1, 2, 4)]
    by_batch = [replace(base, batch_size=size) for size in _times(base.batch_size, 0.25, 1, 4)]
    return {
        "weights": [(shape.n_weights, shape) for shape in by_width],
        "context": [(shape.context, shape) for shape in by_context],
        "batch": [(shape.batch_size, shape) for shape in by_batch],
    }


def chosen(curves: dict[str, Curves], name: str | None) -> dict[str, Curves]:
    """The curves of this name; None: all.

    Raises:
        UserError: there are none.
    """
    if name is not None and name not in curves:
        raise UserError(f"by = {name} must be one of {', '.join(curves)}")
    return {what: curve for what, curve in curves.items() if name in (None, what)}


def _times(number: int, *factors: float) -> list[int]:
    return [int(number * factor) for factor in factors]
