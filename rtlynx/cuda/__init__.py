"""Kernels for Hopper cards: compiled at first use (`jit`), kept on disk (`cache`), launched (`driver`)."""
