"""`python -m shardtool`, and the `shardtool` command."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it with exit code 130 and no traceback, also while it is still importing."""
    try:
        from shardtool.cli.main import run  # noqa: PLC0415 - within the try

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
