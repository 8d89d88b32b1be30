"""Results files of steps and layers with figures made up for tests, where docs/ looks for them."""

import json

HOW = {"batch": 1, "text_tokens": 512, "attention": "sdpa", "ours": "ours", "resolution": 1024}


def step(name, gpu_ms, wall_ms=None, **more):
    """A variant's row; wall time is 1 ms more than GPU time where no other is given."""
    wall_ms = gpu_ms + 1 if wall_ms is None and gpu_ms is not None else wall_ms
    return {"name": name, "gpu_ms": gpu_ms, "wall_ms": wall_ms, "peak_gib": 10.0, "reason": None, **more}


def step_results(model, card, rows, **size):
    """`rows`: those of `step`, or variant -> GPU ms."""
    rows = [step(name, ms) for name, ms in rows.items()] if isinstance(rows, dict) else rows
    device = {"device": f"NVIDIA {card}", "power_limit_w": 700.0, "torch": "2", "cuda": "13", "commit": "abc"}
    return {"model": model, **HOW, **device, **size, "variants": rows}


def write_results(root, name, document):
    """Into a repository of its own; gives its root."""
    file = root / "benchmarks" / "results" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document))
    return root


def write_step(root, model, card, rows, **size):
    return write_results(root, f"step-{model}-{card.lower()}", step_results(model, card, rows, **size))
