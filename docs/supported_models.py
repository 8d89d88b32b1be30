"""What is decided for every linear layer of diffusers' transformers: `python docs/supported_models.py`.

It writes docs/reference/layers-of-models.txt, which tests compare with the rules as they are, and from which
docs/update.py makes the table of models. Models are built on the meta device, in their default size.
"""

import functools
import importlib
import pkgutil
import re
import sys
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.models import transformers
from goals import targets
from overview import current_steps
from tables import Place, factor, in_words, read
from torch import nn

from rtlynx.models import architecture_of
from rtlynx.models.plan import ARCHITECTURES
from rtlynx.timing.card import card_slug
from rtlynx.timing.step_variants import DENSE_FP8, RECOMMENDED

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "compose")]
from all_pipelines import PIPELINES  # noqa: E402
from on_top_cases import CASES  # noqa: E402

LISTING = ROOT / "docs" / "reference" / "layers-of-models.txt"
COMMAND = "python docs/supported_models.py"
# Model class -> the full-size models of which a step is measured.
STEPS = {
    "ChromaTransformer2DModel": ("chroma",),
    "Flux2Transformer2DModel": ("flux2-klein", "flux2-dev"),
    "FluxTransformer2DModel": ("flux1-dev",),
    "HunyuanVideo15Transformer3DModel": ("hunyuan-video-1.5",),
    "LTX2VideoTransformer3DModel": ("ltx-2",),
    "QwenImageTransformer2DModel": ("qwen-image", "qwen-edit"),
    "SD3Transformer2DModel": ("sd3.5-large",),
    "WanTransformer3DModel": ("wan2.2-14b",),
    "ZImageTransformer2DModel": ("z-image",),
}
# Settings of classes whose defaults build no model: those of a released model, or the size of one block.
CONFIGS = {
    "DreamLiteTransformer2DModel": {
        "in_channels": 320,
        "cross_attention_dim": 2048,
        "num_attention_heads": 5,
        "attention_head_dim": 64,
        "use_linear_projection": True,
    },
    "EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "caption_channels": [4096, 4096],
        "llama_layers": list(range(48)),
    },
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2},
    "LatteTransformer3DModel": {
        "in_channels": 4,
        "patch_size": 2,
        "num_layers": 28,
        "attention_head_dim": 72,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
        "norm_type": "ada_norm_single",
        "num_embeds_ada_norm": 1000,
    },
    "LuminaNextDiT2DModel": {"num_kv_heads": 8},
    "OmniGenTransformer2DModel": {
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
    },
    "Transformer2DModel": {
        "in_channels": 320,
        "cross_attention_dim": 768,
        "num_attention_heads": 8,
        "attention_head_dim": 40,
    },
    "TransformerTemporalModel": {"in_channels": 320, "num_attention_heads": 8, "attention_head_dim": 40},
}


def classes() -> dict[str, type[nn.Module]]:
    """Every model class that diffusers defines among its transformers, by name."""
    found = {}
    for file in pkgutil.iter_modules(transformers.__path__):
        module = importlib.import_module(f"{transformers.__name__}.{file.name}")
        for name, one in vars(module).items():
            if isinstance(one, type) and issubclass(one, ModelMixin) and one.__module__ == module.__name__:
                found[name] = one
    return dict(sorted(found.items()))


def build(kind: type[nn.Module]) -> nn.Module:
    """A model without data."""
    with (
        torch.device("meta"),
        mock.patch.object(nn.Linear, "reset_parameters"),
    ):  # which takes most of the time
        return kind(**CONFIGS.get(kind.__name__, {}))


def listing() -> str:
    """The whole file."""
    head = f"By diffusers {version('diffusers')} - layer, how many, what is decided and by which rule.\n"
    return "\n".join([head, *(described(build(kind)) for kind in classes().values())])


@functools.cache
def pipelines() -> dict[str, list[str]]:
    """Model class -> diffusers' pipelines that take one as their transformer or prior, by their sources."""
    found: dict[str, list[str]] = {}
    for file in sorted((Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py")):
        for source in re.split(r"^class (?=\w+Pipeline\b)", file.read_text(), flags=re.MULTILINE)[1:]:
            name = source.partition("(")[0]
            init = re.search(r"def __init__\((.*?)\n    \)", source, re.DOTALL)
            arguments = (
                re.findall(r"^ +(?:transformer|prior)\w*: ([^=\n]+)", init[1], re.MULTILINE) if init else ()
            )
            for kind in {kind for argument in arguments for kind in re.findall(r"\w+", argument)}:
                found.setdefault(kind, []).append(name)
    return found


def calibrates(pipeline: str) -> bool:
    """Whether a test calibrates the pipeline of this name, with random weights of small models."""
    case = PIPELINES.get(pipeline)
    return case is not None and case.refusal is None


def sections(text: str) -> dict[str, str]:
    """What `text` says of each class."""
    return {part.partition(":")[0]: f"{part.rstrip()}\n" for part in text.split("\n\n")[1:]}


def described(model: nn.Module) -> str:
    """Lines about `model`, then one for each layer, indices of blocks as `*`."""
    decided = architecture_of(model).decisions(model)
    weights: Counter[str] = Counter()
    lines: dict[tuple[str, str], list[int]] = {}
    for name, one in decided.items():
        linear = model.get_submodule(name)
        size = linear.in_features * linear.out_features
        dense = isinstance(one, str)
        weights["dense" if dense else one.stream] += size
        parts = "" if dense or isinstance(one.parts, int) else f" of {' | '.join(map(str, one.parts))}"
        line = f"dense: {one}" if dense else f"{one.stream} {one.role}{parts}: {one.rule}"
        lines.setdefault((_without_indices(model, name), line), []).append(size)
    total = sum(weights.values())
    kinds = ["image", "joint", "text", *(["audio"] if weights["audio"] else []), "dense"]
    shares = ", ".join(f"{kind} {weights[kind] / total:.1%}" for kind in kinds)
    of_all = total / sum(parameter.numel() for parameter in model.parameters())
    kind = type(model)
    head = f"{kind.__name__}: {len(decided)} layers, {of_all:.1%} of all parameters; {shares}"
    used = f"  pipelines: {', '.join(pipelines().get(kind.__name__, ())) or 'none'}"
    compiled = f"  repeated blocks: {', '.join(getattr(kind, '_repeated_blocks', ())) or 'not declared'}"
    width = max(len(name) for name, _ in lines)
    rows = (f"  {name:{width}} {len(sizes):4} {line}" for (name, line), sizes in lines.items())
    return "\n".join([head, used, compiled, *rows, ""])


def _without_indices(model: nn.Module, name: str) -> str:
    """`name` with `*` for places in lists of modules of one class."""
    parts, module = [], model
    for part in name.split("."):
        listed = isinstance(module, nn.ModuleList | nn.ModuleDict) and part.isdigit()
        alike = listed and len({type(child) for child in module.children()}) == 1
        parts.append("*" if alike else part)
        module = module.get_submodule(part)
    return ".".join(parts)


def measured_step(results: dict) -> str:
    """Speed of a step over compiled bf16, and the card."""
    kinds = {"dense fp8": DENSE_FP8, "recommended": RECOMMENDED}
    speeds = {kind: targets.fastest(results["variants"], name)[0] for kind, name in kinds.items()}
    told = ", ".join(f"{kind} {factor(speed)}" for kind, speed in speeds.items() if speed is not None)
    return f"{told} ({card_slug(results['device']).upper()})" if told else "\N{EN DASH}"


def measured_steps(kind: str, steps: Mapping[str, Path]) -> str:
    """Of the full-size models of a class, from their results; each by name where the class has several."""
    names, dash = STEPS.get(kind, ()), "\N{EN DASH}"
    told = {name: measured_step(read(steps[name])) if name in steps else dash for name in names}
    if len(names) == 1 or set(told.values()) <= {dash}:
        return next(iter(told.values()), dash)
    return "; ".join(f"{in_words(name)}: {step}" for name, step in told.items())


def models_section(root: Path, _place: Place) -> str:
    """The table of models, of the listing as it is written and of steps as they were measured."""
    text = (root / LISTING.relative_to(ROOT)).read_text()
    steps = {model: root / file for model, file in current_steps(root).items()}
    lines = [
        "| model class | pipelines | known by name | fused norms and activations | calibrate in small "
        "| LoRA fused | `compile_repeated_blocks` | step on H100, H200 | can be sparse | text, audio "
        "| in linears |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, section in sections(text).items():
        head, used, blocks, *_ = section.splitlines()
        image, joint = (float(share) for share in re.findall(r"(?:image|joint) (\S+)%", head))
        few = sum(float(share) for share in re.findall(r"(?:text|audio) (\S+)%", head))
        [of_all] = re.findall(r"(\S+)% of all", head)
        names = [one for one in used.partition(": ")[2].split(", ") if one != "none"]
        pipelines, calibrated = [f"`{one}`" for one in names], [one for one in names if calibrates(one)]
        known = ARCHITECTURES.get(name)
        cells = [
            f"`{name}`",
            ", ".join(pipelines[:2]) + (f" and {len(pipelines) - 2} more" if pipelines[2:] else "")
            or "\N{EN DASH}",
            *("yes" if one else "no" for one in (known, known and known.fused)),
            f"{len(calibrated)} of {len(names)}" if calibrated else "\N{EN DASH}",
            # Fused blocks stay so with LoRAs.
            "yes" if known and known.fused else "no",
            "no" if blocks.endswith("not declared") else "yes",
            measured_steps(name, steps),
            *(f"{float(share):.0f} %" for share in (image + joint, few, of_all)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Of diffusers {text.split()[2]}."])


def on_top_section(_root: Path, _place: Place) -> str:
    """The table of what is drawn on top of models known by name, and of SD3."""
    drawn: dict[str, list[list[str]]] = {}
    for name, (_, case) in CASES.items():
        kind = str(case.models["transformer"][0])
        known = ARCHITECTURES.get(kind)
        fused = known is not None and bool(known.fused)
        drawn.setdefault(kind, [[], []])[fused].append(f"`{name}`" if name.endswith("Pipeline") else name)
    lines = ["| model class | drawn in fused blocks | drawn layer by layer |", "|---|---|---|"]
    for kind, (apart, fused_names) in sorted(drawn.items()):
        cells = [", ".join(names) or "\N{EN DASH}" for names in (fused_names, apart)]
        lines.append(f"| `{kind}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    LISTING.write_text(listing())


if __name__ == "__main__":
    main()
