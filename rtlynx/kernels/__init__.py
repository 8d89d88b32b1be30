"""The operations under `SparseLinear`, from plain PyTorch on any device to Hopper's sparse tensor cores.

reference.py : selection and product in plain PyTorch; what the kernels do not serve runs here.
fp8.py : the same two operations in eight bits, and dense fp8 products by PyTorch's own kernel.
choice.py : which of the two a call gets.
ops.py : the torch operators `rtlynx::compress`, `rtlynx::gemm` and `rtlynx::linear`.
chains.py : the elementwise chains in front of layers, for the operators of the next two.
producers.py : operators that compress what an elementwise chain yields: `rtlynx::adaln_compress` and others.
quantizers.py : operators that quantise all of it, for dense fp8: `rtlynx::adaln_quantize` and others.
operators.py : how operators are registered.
blocks.py : the packed format between the kernels, in plain PyTorch; the truth that they are tested against.
sm90 : device code and what launches it; jit.py compiles it at first use.
"""
