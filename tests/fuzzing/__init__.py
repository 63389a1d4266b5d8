"""Fuzzing of everything that reads a checkpoint: valid tiny ones are broken, and the tool must notice or be right.

    scripts/fuzz [--seconds N | --count N] [READER...]

`seeds` builds the checkpoints, `mutations` breaks one file of a copy, `worker` runs the real commands in a process of
its own under limits, `oracle` reads what was accepted with torch and safetensors alone, and `campaign` counts.
"""
