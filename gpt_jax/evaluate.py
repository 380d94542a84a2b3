"""The old form of `python -m gpt_jax evaluate`."""

from gpt_jax.commands.main import old_form

old_form("evaluate", __name__)
