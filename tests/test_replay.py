"""Calibration in several passes: blocks behind it do not run again, and it finds the same."""

import pytest
import torch
from guidance_helpers import FLUX
from helpers import MODELS
from torch import nn

from rtlynx import CalibrationOptions, Recipe, calibrate
from rtlynx.calibration.output_error import OutputError
from rtlynx.models import sparse_layers

RECIPE = Recipe(rank=None, ridge=0.1)
SEEN = 2  # calls that tell the order of blocks and their tokens
IN_ONE, BY_BLOCK = (CalibrationOptions(heldout=0.5, memory_gb=memory) for memory in (4.0, 1e-9))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.ran = 0

    def forward(self, x):
        self.ran += 1
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """Blocks in a row. With `remembering` the last reads also what the first gave, as in a U-Net."""

    def __init__(self, remembering=False):
        super().__init__()
        self.blocks, self.remembering = nn.ModuleList(Block() for _ in range(4)), remembering

    def forward(self, x):
        given = []
        for block in self.blocks:
            if self.remembering and block is self.blocks[-1]:
                x = x - given[0]
            x = block(x)
            given.append(x)
        return x


def calibrated(model, calls, options):
    calibrate(model, calls=calls, recipe=RECIPE, options=options, progress=False)
    return {name: layer.weight for name, layer in sparse_layers(model).items()}


def stack_of(remembering=False):
    torch.manual_seed(0)
    return Stack(remembering)


def inputs(count=4):
    return [{"x": torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(i))} for i in range(count)]


@pytest.mark.parametrize("remembering", [False, True])
def test_blocks_behind_a_pass_run_again_only_where_they_must(remembering):
    model, calls = stack_of(remembering), inputs()
    found = calibrated(model, calls, BY_BLOCK)
    expected = calibrated(stack_of(remembering), calls, IN_ONE)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    # All calls run it in the first pass, one in each other, to see that it need not, and all again in the
    # last where that reads what the first gave.
    again = len(calls) if remembering else 0
    assert model.blocks[0].ran == len(calls) + 3 + SEEN + again
    assert "forward" not in vars(model.blocks[0])


@pytest.mark.parametrize("most", [0.0, 3000.0])
def test_blocks_run_again_where_their_outputs_take_too_much(most, monkeypatch):
    monkeypatch.setattr("rtlynx.calibration.replay._MOST_BYTES", most)
    model, calls = stack_of(), inputs()
    found = calibrated(model, calls, BY_BLOCK)
    expected = calibrated(stack_of(), calls, IN_ONE)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert model.blocks[0].ran == 4 * len(calls) + SEEN


class Leaving(Stack):
    """In some calls a block does not run, as in skip-layer guidance."""

    def forward(self, x, without=None):
        for i, block in enumerate(self.blocks):
            x = x if i == without else block(x)
        return x


@pytest.mark.parametrize("without", [0, 1, 2, 3])
@pytest.mark.parametrize("where", [1, 3])
def test_calls_that_leave_a_block_out_count_as_they_are(without, where):
    def made():
        torch.manual_seed(0)
        return Leaving()

    calls = inputs()
    calls[where]["without"] = without
    expected = calibrated(made(), calls, IN_ONE)
    for memory in (1e-9, 2.6e-4):  # for one block, for two
        found = calibrated(made(), calls, CalibrationOptions(heldout=0.5, memory_gb=memory))
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("without", [0, 1, 2, 3])
def test_errors_are_right_where_calls_leave_a_block_out(without):
    model = Answers(False)
    model.stack.__class__ = Leaving
    calls = [{"hidden_states": call["x"]} for call in inputs()]
    calls[2]["without"] = without
    error = OutputError(model, calls, FLUX, order=[f"stack.blocks.{i}" for i in range(4)])
    plain = OutputError(model, calls, FLUX)
    for i in (0, 2, 3):  # (the format of the other is fixed)
        block = model.stack.blocks[i]
        weight = block.up.weight.detach().clone()
        with error.behind(f"stack.blocks.{i}"):
            block.up.weight.data *= 2.0
            found = error()
        assert found == plain() > 0
        block.up.weight.data.copy_(weight)


class Answers(nn.Module):
    """A stack that takes and gives what transformers do."""

    def __init__(self, remembering):
        super().__init__()
        self.stack = stack_of(remembering)

    def forward(self, hidden_states, return_dict=False, **others):
        return (self.stack(hidden_states, **others),)


@pytest.mark.parametrize("remembering", [False, True])
def test_blocks_before_a_change_run_once_for_its_error(remembering):
    model, calls = Answers(remembering), [{"hidden_states": call["x"]} for call in inputs()]
    blocks, order = model.stack.blocks, [f"stack.blocks.{i}" for i in range(4)]
    error = OutputError(model, calls, FLUX, order=order)
    plain = OutputError(model, calls, FLUX)
    before = blocks[0].ran
    for name, block in zip(order, blocks, strict=True):
        for change in (0.5, 2.0):
            weight = block.up.weight.detach().clone()
            with error.behind(name):
                block.up.weight.data *= change
                found = error()
            ran = blocks[0].ran
            assert found == plain() > 0
            blocks[0].ran = ran
            block.up.weight.data.copy_(weight)
    # In the two changes of its own, and once to know what it gives. Where the last block reads that too, it
    # can stand in for itself, but not the second block for both.
    assert blocks[0].ran - before == (7 if remembering else 3) * len(calls)
    assert error() == 0
    assert "forward" not in vars(blocks[0])


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_gets_the_same_weights_block_by_block(name):
    make, call = MODELS[name]
    calls = [call(seed) if seed else call() for seed in range(3)]
    found = calibrated(make(), calls, BY_BLOCK)
    expected = calibrated(make(), calls, IN_ONE)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
