"""The commands of `rtlynx`, a file for each kind.

Each imports what it needs when it runs: `rtlynx --help` needs typer and rich alone.
"""

from rtlynx.cli.app import run
from rtlynx.cli.commands import calibrate, demo, evaluate, inspect, kernels

__all__ = ["calibrate", "demo", "evaluate", "inspect", "kernels", "run"]
