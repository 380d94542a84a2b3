"""What a run reports: metrics, terminal, messages, plots."""
