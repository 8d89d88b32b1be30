"""`python -m rtlynx`, also under torchrun."""

from rtlynx.cli import main

main()
