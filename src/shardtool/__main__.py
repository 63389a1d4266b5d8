"""`python -m shardtool`, and the `shardtool` command."""

import gc
import sys

# Imports and plans are many small objects without cycles: looking for cycles takes a quarter of their time.
COLLECT = (100_000, 20, 20)


def main() -> None:
    """Run the command line; Ctrl-C ends it with exit code 130 and no traceback, also while it is still importing."""
    gc.set_threshold(*COLLECT)
    try:
        from shardtool.cli.main import run  # noqa: PLC0415 - within the try

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None
    finally:
        gc.freeze()  # what is there at the end need not be looked through


if __name__ == "__main__":
    main()
