"""The old form of `python -m gpt_jax compile`."""

from gpt_jax.commands.main import old_form

old_form("compile", __name__)
