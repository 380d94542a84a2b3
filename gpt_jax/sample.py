"""The old form of `python -m gpt_jax sample`."""

from gpt_jax.commands.main import old_form

old_form("sample", __name__)
