"""`python -m rtlynx`, also under torchrun."""

from rtlynx.cli.main import main

main()
