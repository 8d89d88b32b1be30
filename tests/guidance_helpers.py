"""Calls of the two guidance passes of one step."""

import torch
from helpers import flux_call, tiny_flux

from rtlynx.models.plan import architecture_of


def two_passes(seed=0, batch=2, timestep=0.5):
    """Conditional and null call at the same states; the null prompt is the same for all pictures."""
    conditional = flux_call(seed, batch, timestep)
    null = {**conditional, "encoder_hidden_states": torch.zeros(batch, 8, 64)}
    null["pooled_projections"] = torch.zeros(batch, 32)
    return conditional, null


def doubled(conditional, null):
    shared = ("img_ids", "txt_ids")
    return {
        name: value if name in shared else torch.cat((value, null[name]))
        for name, value in conditional.items()
    }


FLUX = architecture_of(tiny_flux())
