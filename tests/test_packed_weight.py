"""Layers that hold a 2:4-sparse weight packed and nothing beside it; on the CPU, where a switch serves."""

import copy
from types import SimpleNamespace

import accelerate
import pytest
import torch
from fusion_helpers import drop_weights, serve, unfused
from helpers import flux_call, in_dtype, output, relative_error, tiny_flux
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rtlynx
import rtlynx.nn.call
import rtlynx.nn.packed_weight
from rtlynx import Pattern, SparseLinear
from rtlynx.io.checkpoint import describe
from rtlynx.math.fp8 import E4M3, quantize_weight
from rtlynx.math.tiles import pack_weight, unpack_weight
from rtlynx.models import sparse_layers
from rtlynx.models.fingerprint import model_fingerprint
from rtlynx.models.sparsify import extra_bytes
from rtlynx.nn.tensor_parallel import Shard, TensorParallelLinear
from rtlynx.ops import fp8_linear as fp8
from rtlynx.timing.step import held_bytes, twin_of

K, N = 256, 128  # whole tiles


def bits(weight):
    return weight.detach().view(torch.uint8)


def any_bits(n, k, seed):
    """A weight of any bytes, NaN and -0 among them, of which up to two in each group are not +0."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (n, k), generator=generator, dtype=torch.uint8)
    values = torch.where(torch.rand(n, k, generator=generator) < 0.2, 0x80, values)
    places = torch.rand(n, k // 4, 4, generator=generator).argsort(-1)
    counts = torch.randint(0, 3, (n, k // 4, 1), generator=generator)
    return torch.where((places < counts).flatten(1), values, 0).byte().view(E4M3)


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 140), groups=st.integers(1, 70), seed=st.integers(0, 999))
def test_what_is_packed_comes_back_bit_for_bit(n, groups, seed):
    weight = any_bits(n, 4 * groups, seed)
    again = unpack_weight(pack_weight(weight), *weight.shape)
    assert (again.dtype, again.is_contiguous()) == (E4M3, True)
    assert torch.equal(bits(again), bits(weight))


@pytest.mark.parametrize("n", [0, 1024, 1025, 2100])
def test_many_rows_come_back_in_their_order(n):
    weight = any_bits(n, 20, n)
    again = unpack_weight(pack_weight(weight), n, 20)
    assert torch.equal(bits(again), bits(weight))
    assert again.untyped_storage().nbytes() == n * 20


def test_groups_of_more_zeros_with_a_sign_keep_their_values():
    groups = [[0x80] * 4, [0x80, 0x38, 0x80, 0x80], [0x80, 0x38, 0x80, 0xB8], [0] * 4]
    weight = torch.tensor(groups, dtype=torch.uint8).view(E4M3)
    again = unpack_weight(pack_weight(weight), 4, 4)
    assert torch.equal(again.float(), weight.float())
    assert bits(again).tolist() == [[0x80, 0x80, 0, 0], [0x80, 0x38, 0, 0], [0, 0x38, 0, 0xB8], [0] * 4]


def test_tiles_of_another_size_are_refused():
    tiles = pack_weight(any_bits(64, 128, 0))
    with pytest.raises(ValueError, match=r"of a weight of shape \(65, 128\) are 10240 bytes"):
        unpack_weight(tiles, 65, 128)


# ------------------------------------------------------------------------------------------------ layers


@pytest.fixture
def card(monkeypatch):
    """Kernels serve, by their reference, while `present`, as where layers are on a Hopper card."""
    switch = SimpleNamespace(present=True)
    serve(monkeypatch)

    def supports(weight, k):
        return switch.present and not weight.is_meta

    monkeypatch.setattr(rtlynx.nn.packed_weight, "weight_sparse_supports", supports)
    monkeypatch.setattr(fp8, "scaled_mm_supports", lambda x, of: x.dtype is torch.bfloat16)
    return switch


def dense_layer(seed=0, cls=SparseLinear):
    torch.manual_seed(seed)
    layer = cls.from_linear(nn.Linear(K, N).bfloat16(), pattern=Pattern(1, 1), norm="none")
    scale = torch.rand(N) * 1e-3
    values = any_bits(N, K, seed)
    values = torch.where(bits(values) & 0x7F == 0x7F, 0, bits(values)).view(E4M3)  # no NaN
    layer.set_quantized(fp8.Fp8Parameters(values, scale, None, None, None)[:2], refitted=True, sparse=True)
    return layer.requires_grad_(False)


def layer_of(seed=0):
    layer = dense_layer(seed)
    layer.prepare()
    assert layer.holds_tiles
    return layer


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_same(ours, theirs):
    """The same weight and function."""
    x = tokens(2, 9, K)
    assert torch.equal(bits(ours.weight), bits(theirs.weight))
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_a_prepared_layer_holds_tiles_alone(card):
    layer, dense = layer_of(), dense_layer()
    assert_same(layer, dense)
    held = [*layer.parameters(), *layer.kept_copies()]
    held = [one for one in held if one is not layer.bias]
    assert sum(one.untyped_storage().nbytes() for one in held) == 0.625 * N * K
    assert layer.weight.shape == (N, K)
    assert (layer.weight.dtype, layer.weight.device, layer.weight.requires_grad) == (
        E4M3,
        torch.device("cpu"),
        False,
    )
    assert isinstance(layer.weight, nn.Parameter)


def test_where_no_kernel_serves_the_weight_stays_as_it_is(card):
    card.present = False
    layer = dense_layer()
    layer.prepare()
    assert layer.held_weight is layer.weight
    assert layer.weight.shape == (N, K)


def test_state_dicts_hold_the_weight(card):
    layer, dense = layer_of(), dense_layer()
    state, expected = layer.state_dict(), dense.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8))
    kept = layer.state_dict(keep_vars=True)
    assert isinstance(kept["weight"], nn.Parameter)
    assert kept["bias"] is layer.bias


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_are_loaded(card, assign):
    layer, other = layer_of(), layer_of(5)
    held, address = layer.held_weight, layer.held_weight.data_ptr()
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert_same(layer, other)
    assert layer.holds_tiles
    if not assign:  # CUDA graphs read that address, and hooks know that parameter
        assert layer.held_weight is held
        assert held.data_ptr() == address


def test_state_dicts_that_are_refused_or_lack_the_weight_change_nothing(card):
    layer, other = layer_of(), layer_of(5)
    state = other.state_dict()
    full = torch.ones(N, K).to(E4M3)
    with pytest.raises(RuntimeError, match="more than two nonzero entries"):
        layer.load_state_dict({**state, "weight": full})
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict({"weight": state["weight"][:, :128]}, strict=False)
    layer.load_state_dict({"bias": layer.bias.detach().clone()}, strict=False)
    assert_same(layer, layer_of())
    assert layer.holds_tiles


def test_a_weight_is_unpacked_where_it_goes_and_packed_where_it_comes_back(card):
    layer = layer_of()
    held = layer.held_weight
    card.present = False
    layer.to("cpu")
    assert layer.held_weight is held
    assert torch.equal(bits(held), bits(dense_layer().weight))
    card.present = True
    layer.to("cpu")
    assert layer.holds_tiles
    assert_same(layer, dense_layer())


@pytest.mark.parametrize("change", [lambda one: one.to(torch.bfloat16), lambda one: one.float().bfloat16()])
def test_casts_leave_it_alone(card, change, monkeypatch):
    layer = layer_of()
    tiles = layer.tiles
    with monkeypatch.context() as context:
        context.setattr(rtlynx.nn.packed_weight, "unpack_weight", None)
        change(layer)
    assert layer.tiles.data_ptr() == tiles.data_ptr()  # which CUDA graphs read
    assert_same(layer, dense_layer())


def test_casts_leave_what_a_hook_brought_under_inference_mode_alone(card):
    layer = layer_of()
    with torch.inference_mode():
        layer.held_weight.data = layer.held_weight.data.clone()
    card.present = False
    layer.to(torch.bfloat16)
    assert not layer.holds_tiles
    assert_same(layer, dense_layer())


def test_memory_without_values_waits_for_a_state_dict(card):
    layer = layer_of().to_empty(device="cpu")
    layer.load_state_dict(dense_layer().state_dict())
    assert_same(layer, dense_layer())


def test_a_weight_that_is_no_parameter_stays_as_it_is(card):
    layer, x = dense_layer(), tokens(3, K)
    layer.weight = layer._parameters.pop("weight").data  # as weight_norm and FSDP leave it
    with torch.no_grad():
        expected = layer(x)
        layer.eval()
        assert layer.weight.shape == (N, K)
        assert torch.equal(layer(x), expected)


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_a_move_to_meta_keeps_shapes(card):
    layer = layer_of()
    layer._parameters["weight"] = nn.Parameter(layer.held_weight.to("meta"), requires_grad=False)  # by a hook
    assert layer.weight.shape == (N, K)
    assert layer.weight.is_meta
    layer.load_state_dict(layer_of(5).state_dict())
    assert layer.held_weight.is_meta
    assert layer.holds_tiles
    assert layer_of().to("meta").state_dict()["weight"].shape == (N, K)


def test_copies_and_pickles(card, tmp_path):
    layer = layer_of()
    file = tmp_path / "layer.pt"  # (pickle itself knows no float8)
    torch.save(layer, file)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert twin.holds_tiles
        assert twin.held_weight.data_ptr() != layer.held_weight.data_ptr()
        assert_same(twin, layer)
    twin = twin_of(layer)
    assert twin.held_weight is layer.held_weight
    card.present = False
    read = torch.load(file, weights_only=False)
    assert not read.holds_tiles
    assert_same(read, dense_layer())


def test_under_inference_mode(card):
    layer = dense_layer()
    with torch.inference_mode():
        layer.prepare()
        layer.to("cpu")
        assert_same(layer, dense_layer())
    assert layer.holds_tiles
    layer.load_state_dict(layer_of(5).state_dict())
    layer.to("cpu")
    assert_same(layer, dense_layer(5))
    with torch.inference_mode():
        made = dense_layer(6)
    made.prepare()
    assert made.holds_tiles
    assert_same(made, dense_layer(6))
    made.to("cpu")
    assert_same(made, dense_layer(6))


def test_what_no_kernel_computes_reads_the_same_weight(card):
    layer, x = layer_of(), torch.randn(3, K)
    dense = dense_layer()
    card.present = False
    expected = dense(x)
    tiles_elsewhere = layer(x)  # a hook took them where no kernel reads them
    card.present = True
    assert torch.equal(layer(x), expected)
    assert torch.equal(tiles_elsewhere, expected)


def test_a_new_weight_takes_the_place_of_the_tiles(card):
    layer, other = layer_of(), dense_layer(5)
    layer.weight = nn.Parameter(other.weight.detach(), requires_grad=False)
    layer.bias, layer.weight_scale = other.bias, other.weight_scale
    assert not layer.holds_tiles
    assert_same(layer, other)
    layer.eval()
    assert layer.holds_tiles
    assert layer.kept_copies() == []
    assert_same(layer, other)


def test_rows_and_steps_that_run_dense_read_their_own_weight(card):
    layer, x = layer_of(), tokens(2, 9, K)
    original = tokens(N, K, seed=9)
    layer.weight_dense, layer.dense_steps = original, True
    with torch.no_grad(), rtlynx.nn.call.calling(dense=True):
        assert torch.equal(layer(x), nn.functional.linear(x, original, layer.bias))
    plain = layer.to_linear()
    assert torch.equal(plain.weight, original)
    assert type(plain) is nn.Linear


def test_compiled_code_reads_the_tiles_and_unpacks_nothing(card, monkeypatch):
    layer, x = layer_of(), tokens(2, 9, K)
    with torch.no_grad():
        expected = layer(x)

        def refuse(*args):
            raise AssertionError("unpacked")

        monkeypatch.setattr(rtlynx.nn.packed_weight, "unpack_weight", refuse)
        monkeypatch.setattr(fp8, "unpack_weight", refuse)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), expected)
        layer.bias.add_(1)
        assert torch.equal(compiled(x), layer(x))


def test_compiled_code_packs_nothing(card, monkeypatch):
    monkeypatch.setattr(fp8, "scaled_mm_supports", lambda x, of: of.packed is not None)  # (on a CPU)
    layer, x = layer_of(), tokens(3, K)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        expected = compiled(x)
        layer.unpack()  # as a hook brings it
        assert relative_error(compiled(x), expected) < 3e-3
        assert torch.equal(layer(x), expected)
        assert torch.equal(compiled(x), expected)  # by the copy that the call before packed


def test_compiled_code_where_no_kernel_serves_the_input_has_no_break(card):
    layer, x = layer_of(), torch.randn(3, K)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("dim", [0, 1])
def test_shards_are_packed(card, dim):
    layer, whole = dense_layer(cls=TensorParallelLinear), dense_layer().weight
    layer.eval()  # (packs it whole)
    mesh = SimpleNamespace(size=lambda: 2, get_local_rank=lambda: 1)
    layer.take_shard(Shard(dim, ((N, K)[dim],), mesh), layer)
    layer.prepare()
    assert layer.holds_tiles
    assert torch.equal(bits(layer.weight), bits(whole.chunk(2, dim)[1].contiguous()))


# ------------------------------------------------------------------------------------------------ models


def sparse_model(**changes):
    model = drop_weights(tiny_flux(**changes).bfloat16())
    layers = [layer for layer in sparse_layers(model).values() if layer.format.weight_sparse]
    assert layers
    assert all(layer.holds_tiles for layer in layers) or not any(layer.holds_tiles for layer in layers)
    return model, layers


def test_models_say_what_they_hold(card):
    model, layers = sparse_model()
    card.present = False
    dense, _ = sparse_model()
    assert layers[0].holds_tiles
    saved = sum(layer.in_features * layer.out_features - layer.held_weight.numel() for layer in layers)
    assert extra_bytes(dense) - extra_bytes(model) == saved
    assert held_bytes(dense) - held_bytes(model) == saved


def test_what_a_model_is_is_told_without_its_weights(card, monkeypatch):
    model, layers = sparse_model()
    card.present = False
    dense, _ = sparse_model()
    card.present = True
    monkeypatch.setattr(rtlynx.nn.packed_weight, "unpack_weight", None)
    assert layers[0].holds_tiles
    assert describe(model) == describe(dense)
    assert model_fingerprint(model) == model_fingerprint(dense)


def test_files_are_those_of_a_model_that_holds_weights(card, tmp_path):
    model, _ = sparse_model()
    rtlynx.save(model, tmp_path / "packed")
    model.save_pretrained(tmp_path / "whole-packed")
    read = rtlynx.load(tiny_flux().bfloat16(), tmp_path / "packed")
    whole = type(model).from_pretrained(tmp_path / "whole-packed", torch_dtype=torch.bfloat16)
    card.present = False
    dense, _ = sparse_model()
    rtlynx.save(dense, tmp_path / "dense")
    dense.save_pretrained(tmp_path / "whole-dense")
    for kind in ("", "whole-"):
        files = sorted(one.name for one in (tmp_path / f"{kind}dense").iterdir())
        assert files == sorted(one.name for one in (tmp_path / f"{kind}packed").iterdir())
        for name in files:
            ours, theirs = ((tmp_path / f"{kind}{one}" / name).read_bytes() for one in ("packed", "dense"))
            assert ours == theirs, name
    card.present = True
    call = in_dtype(flux_call(), torch.bfloat16)
    for one in (read, whole):
        assert any(layer.holds_tiles for layer in sparse_layers(one).values())
        assert torch.equal(output(one, call), output(model, call))


def test_sequential_offloading_brings_weights(card):
    model, layers = sparse_model()
    call = in_dtype(flux_call(), torch.bfloat16)
    before = output(unfused(model), call)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert layers[0].weight.is_meta
    assert torch.equal(output(model, call), before)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    model.eval()
    assert layers[0].holds_tiles
    assert torch.equal(output(unfused(model), call), before)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading_moves_tiles(card, kind):
    model, _ = sparse_model()
    call = in_dtype(flux_call(), torch.bfloat16)
    before = output(unfused(model) if kind == "leaf_level" else model, call)  # (hooks of leaves keep x whole)
    cpu = torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)
    assert torch.equal(output(model, call), before)


def test_group_offloading_to_disk_brings_tiles_back(card, tmp_path):
    model, layers = sparse_model()
    call = in_dtype(flux_call(), torch.bfloat16)
    before = output(unfused(model), call)
    cpu = torch.device("cpu")
    model.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    for layer in layers:
        layer.held_weight.data.view(torch.uint8).fill_(255)
    assert torch.equal(output(model, call), before)


def test_quantized_original_weights_stay_beside_tiles(card):
    layer, x = layer_of(), tokens(2, 9, K)
    layer.weight_dense, layer.weight_dense_scale = quantize_weight(tokens(N, K, seed=9))
    layer.dense_steps = True
    weight = layer.weight_dense
    layer.to(torch.bfloat16)
    assert layer.weight_dense is weight
    with torch.no_grad(), rtlynx.nn.call.calling(dense=False):
        assert torch.equal(layer(x), dense_layer()(x))
