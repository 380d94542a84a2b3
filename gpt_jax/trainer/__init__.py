"""The trainer: a run from its settings to its end, from a command line or from Python."""
