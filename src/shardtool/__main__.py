"""`python -m shardtool`."""

from shardtool.cli.main import run

if __name__ == "__main__":
    run()
