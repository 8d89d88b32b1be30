"""The operations under `SparseLinear`. Here in plain PyTorch, correct on any device."""
