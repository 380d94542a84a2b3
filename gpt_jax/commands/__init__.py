"""The programs: what train.py, sample.py and python -m gpt_jax.<command> do."""
