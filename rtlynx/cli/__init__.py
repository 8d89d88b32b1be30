"""The command line. `main` needs the standard library alone."""
