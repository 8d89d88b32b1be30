"""Torch operators over the kernels, each with a reference in plain PyTorch, and which call gets which."""
