"""What is known per architecture, and how a model is made sparse with it."""

from rtlynx.models.plan import LayerPlan, Plan, architecture_of, make_plan
from rtlynx.models.sparsify import densify, sparse_layers, sparsify, state_of, target_model, transformers_of

__all__ = [
    "LayerPlan",
    "Plan",
    "architecture_of",
    "densify",
    "make_plan",
    "sparse_layers",
    "sparsify",
    "state_of",
    "target_model",
    "transformers_of",
]
