"""The command line: one short file per verb. Nothing here imports torch until a verb runs."""

from interleaf.cli.app import main

__all__ = ["main"]
