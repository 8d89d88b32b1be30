"""What the scripts of this folder share: where results go, and options."""

import argparse
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "results"


def options_parser(description: str | None, seconds: float | None = None) -> argparse.ArgumentParser:
    """The options that benchmarks share; those of windows where `seconds` gives their default length."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if seconds is not None:
        parser.add_argument("--seconds", type=float, default=seconds, help="length of a window")
        parser.add_argument("--rounds", type=int, default=2, help="windows of each variant")
    parser.add_argument("--commit", help="what the figures belong to, where the tree has no .git")
    parser.add_argument("--out", type=Path, help="default: a file in benchmarks/results")
    return parser
