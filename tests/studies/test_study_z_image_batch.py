"""Z-Image's pictures prepared together: diffusers' numbers, and diffusers' way where they differ."""

import copy

import pytest
import torch
from helpers import output, tiny_z_image, z_image_call
from z_image_batch import batch_equal_pictures


@pytest.fixture
def model():
    return tiny_z_image()


def test_equal_pictures_give_the_same_numbers(model):
    call = z_image_call(batch=3)
    expected = output(model, call)
    batch_equal_pictures(model)
    assert torch.equal(output(model, call), expected)


def test_it_prepares_them_together(model):
    batch_equal_pictures(model)
    grids = []
    stock = type(model).create_coordinate_grid
    model.create_coordinate_grid = lambda *args, **kwargs: grids.append(1) or stock(*args, **kwargs)
    output(model, z_image_call(batch=2))
    few = len(grids)
    grids.clear()
    output(model, z_image_call(batch=9))
    assert len(grids) == few


@pytest.mark.parametrize("what", ["pictures", "captions"])
def test_unequal_ones_go_diffusers_way(model, what):
    call, other = z_image_call(batch=2), z_image_call(seed=1, side=20)
    if what == "pictures":
        call["x"][1] = other["x"][0]
    else:
        call["cap_feats"][1] = torch.cat([other["cap_feats"][0]] * 3)
    with torch.no_grad():
        expected = model(**call, return_dict=False)[0]
        batch_equal_pictures(model)
        y = model(**call, return_dict=False)[0]
    assert all(map(torch.equal, y, expected))


def test_a_copy_prepares_with_its_own_tokens(model):
    batch_equal_pictures(model)
    call = z_image_call(batch=2)
    expected = output(model, call)
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, call), expected)
    with torch.no_grad():
        twin.cap_pad_token += 1
    assert not torch.equal(output(twin, call), expected)
    assert torch.equal(output(model, call), expected)
