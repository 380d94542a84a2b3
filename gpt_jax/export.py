"""The old form of `python -m gpt_jax export`."""

from gpt_jax.commands.main import old_form

old_form("export", __name__)
