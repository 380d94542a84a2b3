"""What is on the disk: checkpoints, checksums, locks, the format and its versions."""
