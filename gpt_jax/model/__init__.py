"""The transformer. Start with `transformer.py`."""
