"""What is gathered of a model in several formats: sums in float64, each kept once, and then let go."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from calibration_helpers import calls
from formula_helpers import slow_mask
from helpers import TEXT_TOKENS, output, tiny_flux, watched
from process_helpers import in_two_processes
from safetensors.torch import load_file, save_file

from rtlynx import Budget, Recipe, calibrate
from rtlynx.calibration import run
from rtlynx.calibration.calls import CallStore
from rtlynx.calibration.collect import Collector, input_groups, inputs_of_groups, passes
from rtlynx.math.fp8 import quantize_tokens
from rtlynx.models import make_plan

AUTO = Recipe(rank=None, precision="auto", drop="auto", budget=Budget(error=0.1))
FORMATS = ("fp8-dense", "fp8-sparse", "fp8-weight-sparse")
ORDER = ["transformer_blocks.0", "single_transformer_blocks.0"]
FIELDS = ("dense", "cross", "kept", "dense_mean", "kept_mean")
SPLITS = {"fit": (0, 1), "heldout": (2,)}


def collected(shares=((0, 3), (3, 6), (6, 8))):
    """The groups of a tiny FLUX in all formats, of some calls in each of three batches."""
    model, data, store = tiny_flux(), calls(), CallStore()
    for number, (first, last) in enumerate(shares):
        store.put(number, data[first:last])
    plan = make_plan(model, AUTO)
    groups = input_groups(plan.alternatives())
    Collector(model, plan.architecture, store).collect(groups, SPLITS, ORDER[-1], lambda _: None)
    return groups


def formats_of_inputs(groups):
    found = {}
    for group in groups:
        found.setdefault(group.layers[0].candidate.reads, {})[group.layers[0].format.name] = group
    return {reads: by_format for reads, by_format in found.items() if len(by_format) > 1}


def size_in_bytes(groups):
    """Of all scatters that were gathered, each once."""
    inputs = inputs_of_groups(groups)
    every = [one for of in inputs for kinds in of.moments.values() for one in kinds.values()]
    return sum(t.nbytes for one in every for t in (one.dense, *one.cross, *one.kept))


def in_float64(x, layer):
    """Moments per token of `x` (M, K) by their definition, one group of entries at a time."""
    widths = layer.pattern.widths(x.shape[-1])
    sparse = layer.format.name == "fp8-sparse"
    mask = slow_mask(x, grouping=layer.pattern.grouping, widths=widths) if sparse else None
    s, x = quantize_tokens(x, mask).dequantize().double(), x.double()
    return x.T @ x / len(x), s.T @ x / len(x), s.T @ s / len(x), x.mean(0), s.mean(0)


@pytest.mark.parametrize(("split", "used"), [("fit", slice(0, 6)), ("heldout", slice(6, 8))])
def test_moments_of_each_format_are_sums_over_its_tokens(split, used):
    groups, model = collected(), tiny_flux()
    names = {group.layers[0].name for group in groups}
    with watched(model, names) as seen:
        for call in calls()[used]:
            output(model, call)
    inputs = formats_of_inputs(groups)
    assert any(set(by_format) == set(FORMATS) for by_format in inputs.values())
    for by_format in inputs.values():
        for group in by_format.values():
            layer = group.layers[0]
            x = torch.cat([x for x, _ in seen[layer.name]])
            if layer.candidate.stream == "joint" and layer.text_rows_dense:
                x = x[:, TEXT_TOKENS:]
            x = x.flatten(0, -2)
            found = group.combined(split, "tokens")
            assert group.count(split) == len(x)
            for name, wanted in zip(FIELDS, in_float64(x, layer), strict=True):
                off = float((getattr(found, name) - wanted).norm())
                assert off <= 1e-5 * float(wanted.norm()), (group.key, name)


def test_formats_of_an_input_share_what_they_see():
    for by_format in formats_of_inputs(collected()).values():
        dense, *others = (by_format[name] for name in FORMATS if name in by_format)
        for group in others:
            assert group.gathered is dense.gathered
            assert (group.way == dense.way) == (group.layers[0].format.name != "fp8-sparse")


def test_moments_are_gone_before_the_last_format_is_solved(monkeypatch):
    held, solve = [], run._Calibration._solve_together

    def watched_solve(self, group, layers, *moments):
        if len(group.gathered.ways) == 2:
            held.append((group.layers[0].format.name, bool(group.gathered.moments)))
        return solve(self, group, layers, *moments)

    monkeypatch.setattr(run._Calibration, "_solve_together", watched_solve)
    calibrate(tiny_flux(), calls=calls(), recipe=AUTO, progress=False)
    assert set(held) == {("fp8-dense", True), ("fp8-sparse", True), ("fp8-weight-sparse", False)}


def test_a_pass_takes_as_many_blocks_as_fit_into_memory():
    """To the byte: what is shared counts once."""
    groups = collected()
    need = size_in_bytes(groups)
    in_one, by_block = (list(passes(groups, ORDER, memory)) for memory in (need, need - 1))
    assert [len(batch) for batch in in_one] == [len(groups)]
    assert [{group.block for group in batch} for batch in by_block] == [{block} for block in ORDER]


# ------------------------------------------------------------------------------------------ two processes

# Calls of each batch that each process has.
SHARES = {
    "each some": (((0, 2), (3, 5), (6, 7)), ((2, 3), (5, 6), (7, 8))),
    "one none": (((0, 3), (3, 6), (6, 8)), ((0, 0),) * 3),
}


def _one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, shares in SHARES.items():
        groups = collected(shares[rank])
        for gathered in inputs_of_groups(groups):
            gathered.all_reduce(torch.device("cpu"))
        save_file(_tensors(groups), Path(folder) / f"{name}-{rank}.safetensors")
    dist.destroy_process_group()


def _tensors(groups):
    """The combined moments, and how many tokens they are of."""
    found = {}
    for group in groups:
        for split in SPLITS:
            moments = group.combined(split, "kinds")
            found |= {f"{group.key}.{split}.{name}": getattr(moments, name) for name in FIELDS}
            found[f"{group.key}.{split}.count"] = torch.tensor(group.count(split))
    return found


def test_two_processes_have_the_moments_of_one(tmp_path):
    in_two_processes(_one_of_two, str(tmp_path))
    wanted = _tensors(collected())
    for name in SHARES:
        ours, theirs = (load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in range(2))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
