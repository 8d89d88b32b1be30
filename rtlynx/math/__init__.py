"""Pure maths on tensors: which activations are kept, e4m3, the packed tiles, the reference product."""
