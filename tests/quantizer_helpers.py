"""What the tests of `rtlynx.io.quantizer` share: comparing models, reading their folders."""

import copy
import json

import safetensors.torch
import torch
from helpers import flux_call, in_dtype, output

from rtlynx.models import state_of

TIMESTEPS = (1.0, 1.0, 0.8, 0.6)
TO_Q = "transformer_blocks.0.attn.to_q"
PROJ_OUT = "single_transformer_blocks.0.proj_out"
E4M3 = torch.float8_e4m3fn


def outputs(model, call=flux_call):
    """Outputs over some steps, of a copy: a file's tensors lie unaligned, which changes roundings."""
    model = copy.deepcopy(model)
    calls = [call(9, timestep=timestep) for timestep in TIMESTEPS]
    return [output(model, in_dtype(one, model.dtype)) for one in calls]


def assert_same(ours, theirs, call=flux_call):
    """The same function, made the same way."""
    for one, other in zip(outputs(ours, call), outputs(theirs, call), strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)
    assert state_of(ours).plan == state_of(theirs).plan
    assert state_of(ours).base == state_of(theirs).base
    before, after = theirs.state_dict(), ours.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name


def stored_tensors(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors.update(safetensors.torch.load_file(path))
    return tensors


def config_of(folder):
    return json.loads((folder / "config.json").read_text())
