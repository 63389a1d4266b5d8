"""Checkpoints: where formats (bytes) and families (names and axes) meet."""
