"""Models that cannot be made sparse as they are: refused by name before any work; wrappers: looked into."""

import contextlib

import pytest
import torch
from helpers import flux_call, output, relative_error, tiny_flux
from pipeline_helpers import TinyPipeline
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from rtlynx import CalibrationOptions, CheckpointError, Recipe, calibrate, densify, load, save, sparsify
from rtlynx.models import sparse_layers, state_of

NAME = "transformer_blocks.0.attn.to_q"
RECIPE = Recipe(rank=4, ridge=0.1)


def calibrated(model):
    options = CalibrationOptions(heldout=0.0)
    calibrate(model, calls=[flux_call(0), flux_call(1)], recipe=RECIPE, options=options, progress=False)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "refit"
    save(calibrated(tiny_flux()), folder)
    return folder


def short():
    """A model of one block: torch.compile takes seconds for each."""
    return tiny_flux(num_layers=0)


@pytest.fixture(scope="module")
def short_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "short"
    save(calibrated(short()), folder)
    return folder


WAYS = ("sparsify", "fp8", "calibrate", "load")


def make(model, way, folder):
    """Make `model` sparse in one of `WAYS`."""
    if way == "load":
        load(model, folder)
    elif way == "calibrate":
        calibrated(model)
    else:
        sparsify(model, Recipe.immediate(precision="fp8" if way == "fp8" else "bf16"))
    return model


def refused(model, way, folder, reason):
    """`make` refuses `model` for `reason`, and it is as before."""
    before = [(name, module, tuple(module._parameters.items())) for name, module in model.named_modules()]
    with pytest.raises((TypeError, ValueError), match=reason) as error:
        make(model, way, folder)
    assert "damaged" not in str(error.value)
    if way == "load" and isinstance(error.value, TypeError):
        raise AssertionError("what load refuses is a ValueError or CheckpointError")
    after = [(name, module, tuple(module._parameters.items())) for name, module in model.named_modules()]
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(before, after, strict=True))
    assert all(
        one[0] == two[0] and one[1] is two[1]
        for a, b in zip(before, after, strict=True)
        for one, two in zip(a[2], b[2], strict=True)
    )
    assert state_of(model) is None
    assert not model._forward_pre_hooks
    return str(error.value)


class Packed(torch.Tensor):
    """Stands in for the weights of quantisation libraries: a tensor subclass that unpacks when multiplied."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    def __init__(self, data):
        self.packed = data.to(torch.int8)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Quantised(nn.Module):
    """A layer that is none of nn.Linear's."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.detach().to(torch.int8))


def in_place(change):
    def apply(model):
        change(model.get_submodule(NAME))

    return apply


def instead(build):
    def apply(model):
        model.set_submodule(NAME, build(model.get_submodule(NAME)))

    return apply


def retyped(dtype):
    def apply(layer):
        layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)

    return in_place(apply)


def repacked(layer):
    layer.weight = nn.Parameter(Packed(layer.weight.detach()), requires_grad=False)


def flattened(layer):
    layer.weight = nn.Parameter(layer.weight.detach().flatten())


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


FOREIGN = {
    "tensor subclass": (in_place(repacked), r"holds a .*Packed as its weight"),
    "own forward": (instead(lambda old: Noisy(128, 128)), r"is a .*Noisy, with a forward of its own"),
    "no linear": (instead(Quantised), r"is a .*Quantised"),
    "eight bits": (retyped(torch.float8_e4m3fn), r"holds its weight as torch\.float8_e4m3fn"),
    "integers": (retyped(torch.int8), r"holds its weight as torch\.int8"),
    "flat": (in_place(flattened), r"maps .* with a weight of shape \(16384,\)"),
    "dynamic": (
        instead(lambda old: torch.ao.nn.quantized.dynamic.Linear(128, 128)),
        r"is a torch\.ao\.nn\.quantized\.dynamic.*Load the model unquantised",
    ),
    "lazy": (instead(lambda old: nn.LazyLinear(128)), "has no weight yet"),
    "parametrize": (
        in_place(lambda layer: parametrize.register_parametrization(layer, "weight", Half())),
        r"computes its weight.*remove_parametrizations",
    ),
    "orthogonal": (in_place(parametrizations.orthogonal), "computes its weight"),
    "weight_norm": (in_place(weight_norm), "computes its weight.*remove_weight_norm"),
    "new weight_norm": (in_place(parametrizations.weight_norm), "computes its weight"),
    "spectral_norm": (in_place(spectral_norm), "computes its weight"),
    "pruned": (in_place(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)), "computes its weight"),
    "biased": (
        in_place(lambda layer: parametrize.register_parametrization(layer, "bias", Half())),
        "computes its bias",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_layer_is_refused_by_name(kind, way, checkpoint):
    change, reason = FOREIGN[kind]
    model = tiny_flux()
    change(model)
    refused(model, way, checkpoint, rf"transformer_blocks\.0\.attn\.to_q {reason}")


@pytest.mark.parametrize("kind", ["own forward", "parametrize"])
def test_a_foreign_layer_that_stays_dense_is_left_alone(kind):
    model = tiny_flux()
    FOREIGN[kind][0](model)
    layer = model.get_submodule(NAME)
    sparsify(model, Recipe.immediate(skip=(NAME,)))
    assert model.get_submodule(NAME) is layer
    assert len(sparse_layers(model)) == 10
    output(model, flux_call())


def test_what_is_parametrised_outside_of_sparse_layers_does_not_matter():
    model = tiny_flux()
    weight_norm(model.x_embedder)
    output(sparsify(model), flux_call())


def test_a_model_of_nothing_but_foreign_layers_says_what_they_are():
    model = nn.Sequential(Quantised(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=r"no linear layers that can be made sparse \(it has Quantised\)"):
        sparsify(model)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao_first_is_refused(config, way, checkpoint):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = tiny_flux()
    quantization.quantize_(model, getattr(quantization, config)())
    message = refused(model, way, checkpoint, r"transformer_blocks\.0\.attn\.to_q holds a torchao")
    assert "Load the model unquantised" in message


# ------------------------------------------------------------------------------------------------- meta


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("part", ["whole", "block", "embedder"])
def test_a_model_on_meta_is_refused(part, way, checkpoint):
    model = tiny_flux()
    {"whole": model, "block": model.transformer_blocks, "embedder": model.x_embedder}[part].to("meta")
    refused(model, way, checkpoint, 'is on "meta", without data: load the weights first')


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_accelerate_has_dispatched_is_refused(way, checkpoint, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_flux()
    devices = {name: "cpu" for name, _ in model.named_children()} | {"single_transformer_blocks": "disk"}
    accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    refused(model, way, checkpoint, "then enable offloading")


# ------------------------------------------------------------------------------------------ one at two


def test_a_layer_under_two_names_is_refused():
    model = tiny_flux()
    model.transformer_blocks[0].attn.to_k = model.transformer_blocks[0].attn.to_q
    with pytest.raises(ValueError, match=r"attn\.to_q and .*attn\.to_k are one layer under two names"):
        sparsify(model)
    assert not sparse_layers(model)
    recipe = Recipe.immediate(skip=("*.to_q",))
    output(sparsify(model, recipe), flux_call())


def test_a_block_under_two_names_is_sparse_under_both():
    block = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model = nn.Sequential(nn.ModuleList([block, block]))
    sparsify(model)
    assert model[0][0] is model[0][1]
    assert len(sparse_layers(model)) == 2


@pytest.mark.parametrize("recipe", [Recipe.immediate(), Recipe.immediate(precision="fp8", dense_steps=1)])
def test_layers_that_share_a_parameter_do_not_disturb_each_other(recipe):
    def build(tied):
        model = tiny_flux()
        first, second = (model.get_submodule(f"transformer_blocks.0.attn.{one}") for one in ("to_q", "to_k"))
        second.weight = first.weight if tied else nn.Parameter(first.weight.detach().clone())
        return model

    tied, apart = (sparsify(build(one), recipe) for one in (True, False))
    for timestep in (1.0, 0.5):
        call = flux_call(timestep=timestep)
        assert torch.equal(output(tied, call), output(apart, call))
    call = flux_call(timestep=0.3)
    assert torch.equal(output(densify(tied), call), output(build(True), call))


# --------------------------------------------------------------------------------------------- wrappers


def compiled(model):
    return torch.compile(model, backend="eager")


def replicated(model):
    return nn.DataParallel(model)


WRAPPERS = {"compile": compiled, "DataParallel": replicated}
INSIDE = {"compile": lambda wrapper: wrapper._orig_mod, "DataParallel": lambda wrapper: wrapper.module}


@pytest.mark.parametrize(
    ("wrapper", "way"),
    [("compile", "sparsify"), *(("DataParallel", way) for way in WAYS)],
)
def test_a_wrapper_is_looked_into_and_runs_the_sparse_model(wrapper, way, short_checkpoint, tmp_path):
    torch._dynamo.reset()
    model = short()
    wrapped = WRAPPERS[wrapper](model)
    dense = output(wrapped, flux_call())  # (compiled now)
    expected = output(make(short(), way, short_checkpoint), flux_call())
    assert make(wrapped, way, short_checkpoint) is wrapped
    assert INSIDE[wrapper](wrapped) is model
    assert relative_error(output(wrapped, flux_call()), expected) < 1e-6
    save(wrapped, tmp_path / "saved")
    assert torch.equal(output(load(short(), tmp_path / "saved"), flux_call()), output(model, flux_call()))
    with pytest.raises(ValueError, match="sparse already"):
        sparsify(wrapped)
    if way == "sparsify":
        assert densify(wrapped) is wrapped
        assert relative_error(output(wrapped, flux_call()), dense) < 1e-6


def test_code_that_was_compiled_through_autograd_is_not_used_again():
    torch._dynamo.reset()
    model = short()
    wrapped = torch.compile(model, backend="aot_eager")
    output(wrapped, flux_call())
    sparsify(wrapped, Recipe.immediate(dense_steps=1))
    twin = sparsify(short(), Recipe.immediate(dense_steps=1))
    for timestep in (1.0, 0.5):
        call = flux_call(timestep=timestep)
        assert relative_error(output(wrapped, call), output(twin, call)) < 1e-5


@pytest.mark.parametrize(("way", "how"), [("fp8", "in place"), ("calibrate", "blocks")])
def test_what_was_compiled_in_place_before_is_compiled_anew(way, how, short_checkpoint):
    torch._dynamo.reset()
    model = short()
    if how == "in place":
        model.compile(backend="eager")
    else:
        model.compile_repeated_blocks(backend="eager")
    output(model, flux_call())
    expected = output(make(short(), way, short_checkpoint), flux_call())
    assert relative_error(output(make(model, way, short_checkpoint), flux_call()), expected) < 1e-6


@pytest.mark.parametrize("how", ["wrapper", "in place"])
def test_a_compiled_transformer_of_a_pipeline_is_calibrated(how):
    torch._dynamo.reset()
    options = CalibrationOptions(heldout=0.0, pipeline_kwargs={"num_inference_steps": 2})
    models = short(), short()
    calibrate(TinyPipeline(models[0]), ["a cat", "a dog"], RECIPE, options, progress=False)
    if how == "wrapper":
        pipeline = TinyPipeline(compiled(models[1]))
    else:
        models[1].compile(backend="eager")
        pipeline = TinyPipeline(models[1])
    output(pipeline.transformer, flux_call())
    calibrate(pipeline, ["a cat", "a dog"], RECIPE, options, progress=False)
    first, second = (next(iter(sparse_layers(model).values())) for model in models)
    assert relative_error(second.weight, first.weight) < 1e-5
    assert relative_error(output(pipeline.transformer, flux_call()), output(models[0], flux_call())) < 1e-5


def compiled_block(model):
    model.transformer_blocks[0] = compiled(model.transformer_blocks[0])


def checkpointed_block(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.transformer_blocks[0] = checkpoint_wrapper(model.transformer_blocks[0])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrap", [compiled_block, checkpointed_block])
def test_wrappers_inside_of_a_model_are_refused(wrap, way, checkpoint):
    model = tiny_flux()
    wrap(model)
    refused(model, way, checkpoint, r"transformer_blocks\.0, a \w+, wraps another module")


@contextlib.contextmanager
def one_process():
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_distributed_data_parallel_is_looked_into():
    with one_process():
        model = tiny_flux()
        wrapped = nn.parallel.DistributedDataParallel(model)
        expected = output(sparsify(tiny_flux()), flux_call())
        sparsify(wrapped)
        assert torch.equal(output(wrapped, flux_call()), expected)


def test_fully_sharded_data_parallel_is_refused(checkpoint):
    from torch.distributed.fsdp import FullyShardedDataParallel

    with one_process():
        model = FullyShardedDataParallel(tiny_flux(), device_id=torch.device("cpu"))
        for way in WAYS:
            with pytest.raises(ValueError, match="FullyShardedDataParallel wraps another module"):
                make(model, way, checkpoint)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


GRAPHS = {
    "script": lambda: torch.jit.script(Small()),
    "trace": lambda: torch.jit.trace(Small(), torch.randn(2, 16)),
    "export": lambda: torch.export.export(Small(), (torch.randn(2, 16),)).module(),
    "fx": lambda: torch.fx.symbolic_trace(Small()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs_are_refused(graph, inside):
    model = GRAPHS[graph]()
    if inside:
        model = nn.ModuleDict({"graph": model, "beside": Small()})
    with pytest.raises(ValueError, match="is a scripted, traced or exported graph"):
        sparsify(model)
    assert not sparse_layers(model)


@pytest.mark.parametrize("how", ["sparsify", "load"])
def test_a_model_that_holds_a_sparse_one_is_sparse_already(how, checkpoint):
    model = nn.ModuleDict({"inner": sparsify(tiny_flux())})
    with pytest.raises(ValueError, match="sparse already"):
        make(model, how, checkpoint)


def test_adapters_before_load_are_refused_with_the_true_reason(checkpoint):
    from peft import LoraConfig, get_peft_model

    model = tiny_flux()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="has adapters attached") as error:
        load(model, checkpoint)
    assert not isinstance(error.value, CheckpointError)
    with pytest.raises(ValueError, match="has adapters attached"):
        sparsify(get_peft_model(tiny_flux(), LoraConfig(r=2, target_modules=["to_q"])))
