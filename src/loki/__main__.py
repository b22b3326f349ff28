"""`python -m loki`."""

from loki.cli.main import run

if __name__ == "__main__":
    run()
