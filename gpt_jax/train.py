"""The old form of `python -m gpt_jax train`."""

from gpt_jax.commands.main import old_form

old_form("train", __name__)

raise ImportError("gpt_jax.train is a function, and no module: call gpt_jax.train(...)")
