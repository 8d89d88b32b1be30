"""rtlynx: 2:4 activation sparsity for diffusion transformers."""

__version__ = "0.1.0"
