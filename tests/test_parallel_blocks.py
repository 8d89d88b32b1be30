"""Blocks of models that two processes share: fused as in one process, and compiled, each as one graph."""

from functools import partial

import pytest
import torch
import torch._dynamo.testing
import torch.distributed._functional_collectives as funcol
from fusion_helpers import count_calls, serve, unfused
from helpers import MODELS, in_dtype, output, relative_error
from parallel_helpers import even, ring, run_together, tensor_parallel, ulysses
from process_helpers import PROCESSES

from rtlynx import Recipe, densify, sparsify
from rtlynx.timing.communication import ARRANGEMENTS, Traffic

RECIPES = {
    "norm": Recipe.immediate(tp_degree=2),
    "no-norm": Recipe.immediate(tp_degree=2, norm="none"),
    "fp8": Recipe.immediate(tp_degree=2, norm="none", precision="fp8"),
    "whole": Recipe.dense_fp8(),
    "mixed": Recipe.immediate(tp_degree=2, norm="none", precision="fp8", formats={"*.to_k": "fp8-dense"}),
}
TENSOR = [
    *(("flux", recipe) for recipe in ("norm", "fp8", "whole")),
    *(("flux2", recipe) for recipe in ("fp8", "whole")),
    *(("qwen", recipe) for recipe in ("no-norm", "mixed")),
]
# How often each kind of input is compressed or quantised in a call.
DOUBLE_AND_SINGLE = {"adaln": 3, "gelu": 1, "concat_gelu": 1}
EXPECTED = {
    # Row-parallel layers with norm compensation read tensors.
    ("flux", "norm"): {"adaln_compress": 3},
    # The text stream is dense fp8: q, k, v and both layers of its MLP.
    ("flux", "fp8"): {
        **{f"{name}_compress": n for name, n in DOUBLE_AND_SINGLE.items()},
        **{"adaln_quantize": 2, "gelu_quantize": 1},
    },
    ("flux", "whole"): {"adaln_quantize": 5, "gelu_quantize": 2, "concat_gelu_quantize": 1},
    ("flux2", "fp8"): {
        **{"adaln_compress": 3, "silu_gate_compress": 1, "concat_silu_gate_compress": 1},
        **{"adaln_quantize": 2, "silu_gate_quantize": 1},
    },
    ("flux2", "whole"): {"adaln_quantize": 5, "silu_gate_quantize": 2, "concat_silu_gate_quantize": 1},
    ("qwen", "no-norm"): {"adaln_compress": 2, "gelu_compress": 1},
    ("wan", "no-norm"): {"adaln_compress": 3, "gelu_compress": 1},
}


def made(name, recipe, spread, *, first):
    build, call = MODELS[name]
    model = build().bfloat16()
    model = sparsify(spread(model), RECIPES[recipe]) if first else spread(sparsify(model, RECIPES[recipe]))
    return model, in_dtype(call(), torch.bfloat16)


def fused(name, recipe, spread, first, folder):
    """Outputs of blocks fused and layer by layer, and how often each prologue ran."""
    with pytest.MonkeyPatch.context() as patch:
        serve(patch)
        count = count_calls(patch)
        model, call = made(name, recipe, spread, first=first)
        y = output(model, call)
        counts = {key: torch.tensor(n) for key, n in count.items()}
        return {"y": y, **counts}


def hooked(folder):
    """One that watches a layer gets its input, a tensor."""
    with pytest.MonkeyPatch.context() as patch:
        serve(patch)
        model, call = made("flux", "no-norm", tensor_parallel, first=True)
        seen = []
        layer = model.single_transformer_blocks[0].attn.to_q
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        y = output(model, call)
        return {"y": y, "seen": seen[0].to_local() if hasattr(seen[0], "to_local") else seen[0]}


def undone(folder):
    with pytest.MonkeyPatch.context() as patch:
        serve(patch)
        before = output(
            tensor_parallel(MODELS["flux"][0]().bfloat16()), in_dtype(MODELS["flux"][1](), torch.bfloat16)
        )
        model, call = made("flux", "norm", tensor_parallel, first=True)
        output(model, call)
        return {"before": before, "after": output(densify(model), call)}


def sent(spread, folder):
    """Bytes that this process sends in the collectives of one call, counted where they are called."""
    total = 0

    def counted(original, share):
        def call(x, *args, **kwargs):
            nonlocal total
            total += x.numel() * x.element_size() * share
            return original(x, *args, **kwargs)

        return call

    model = spread(MODELS["flux"][0]().bfloat16())
    call = in_dtype(MODELS["flux"][1](), torch.bfloat16)
    kept = (PROCESSES - 1) / PROCESSES
    shares = {"all_to_all_single": kept, "all_gather_tensor": PROCESSES - 1, "all_reduce": 2 * kept}
    with pytest.MonkeyPatch.context() as patch:
        for name, share in shares.items():
            patch.setattr(funcol, name, counted(getattr(funcol, name), share))
        output(model, call)
    return {"bytes": torch.tensor(total)}


def compiled(name, recipe, spread, first, folder):
    with pytest.MonkeyPatch.context() as patch:
        serve(patch)
        torch._dynamo.reset()
        model, call = made(name, recipe, spread, first=first)
        expected = output(model, call)
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        y, again = output(model, call), output(model, call)
        return {"y": y, "again": again, "expected": expected, "graphs": torch.tensor(counter.frame_count)}


COMPILED = {
    "tensor": ("qwen", "norm", tensor_parallel, True),
    "ulysses": ("qwen", "fp8", even, False),
}
SPLIT = ("qwen", "wan")
SENT = {"Ulysses": even, "ring": ring, "tensor parallel": tensor_parallel}
CASES = {
    **{f"tensor-{m}-{r}": partial(fused, m, r, tensor_parallel, True) for m, r in TENSOR},
    **{f"ulysses-{m}-no-norm": partial(fused, m, "no-norm", ulysses, False) for m in SPLIT},
    **{f"sent-{name}": partial(sent, spread) for name, spread in SENT.items()},
    "hooked": hooked,
    "undone": undone,
    **{f"compiled-{name}": partial(compiled, *of) for name, of in COMPILED.items()},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_together(tmp_path_factory.mktemp("blocks"), CASES)


@pytest.fixture
def one_process(monkeypatch):
    """(model, recipe) -> the outputs of one process: layer by layer, and in float32."""
    serve(monkeypatch)

    def outputs(name, recipe):
        model, call = made(name, recipe, lambda model: model, first=True)
        exact = output(model.float(), in_dtype(call, torch.float32))
        model, _ = made(name, recipe, lambda model: model, first=True)
        return output(unfused(model), call), exact

    return outputs


def counts_of(tensors):
    return {name: int(n) for name, n in tensors.items() if name.endswith(("_compress", "_quantize"))}


@pytest.mark.parametrize(("model", "recipe"), TENSOR)
def test_shards_that_read_one_prologue_share_it(results, one_process, model, recipe):
    plain, exact = one_process(model, recipe)
    for theirs in results.tensors(f"tensor-{model}-{recipe}"):
        assert relative_error(theirs["y"], exact) < 1.5 * relative_error(plain, exact)
        assert counts_of(theirs)
        if (model, recipe) in EXPECTED:
            assert counts_of(theirs) == EXPECTED[model, recipe]


@pytest.mark.parametrize("model", SPLIT)
def test_blocks_whose_inputs_are_split_stay_fused(results, one_process, model):
    plain, exact = one_process(model, "no-norm")
    for theirs in results.tensors(f"ulysses-{model}-no-norm"):
        assert counts_of(theirs) == EXPECTED[model, "no-norm"]
        assert relative_error(theirs["y"], exact) < 1.5 * relative_error(plain, exact)


def test_whoever_hooks_a_shard_sees_its_input(results, one_process):
    plain, exact = one_process("flux", "no-norm")
    for theirs in results.tensors("hooked"):
        assert theirs["seen"].shape == (1, 72, 128)
        assert relative_error(theirs["y"], exact) < 1.5 * relative_error(plain, exact)


def test_dense_again_a_sharded_model_reads_tensors(results):
    for theirs in results.tensors("undone"):
        assert torch.equal(theirs["before"], theirs["after"])


@pytest.mark.parametrize("name", COMPILED)
def test_blocks_compile_as_one_graph_each(results, name):
    for theirs in results.tensors(f"compiled-{name}"):
        assert torch.equal(theirs["y"], theirs["expected"])
        assert torch.equal(theirs["again"], theirs["expected"])
        assert theirs["graphs"] == 1


@pytest.mark.parametrize("name", SENT)
def test_the_plan_on_paper_counts_what_is_sent(results, name):
    """A block of each kind: two attentions, three sums."""
    velocity = 0 if name == "tensor parallel" else 64 * 16 * 2 / PROCESSES
    for theirs in results.tensors(f"sent-{name}"):
        expected = ARRANGEMENTS[name](Traffic(128, attentions=2, sums=3), 72, PROCESSES) + velocity
        assert theirs["bytes"].item() == expected
