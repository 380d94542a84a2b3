"""The commands: train.py, sample.py and `python -m gpt_jax COMMAND`."""
