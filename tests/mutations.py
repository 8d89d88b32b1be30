"""Damage to files, seeded: what disks and strangers do to them."""

import hashlib
import json
import random

import safetensors.torch
import torch

DEEP = [[[[[[[[[[[[[[[[[[[[["deep"]]]]]]]]]]]]]]]]]]]]]
HOSTILE = [
    None, True, False, 0, -1, 1.5, 2**31, 2**62, 2**63, -(2**63), 10**30, float("nan"), float("inf"), 1e300,
    "", "x", "x" * 5000, "a\nb", "\ud800", [], {}, [2**62], [0] * 9, {"": 0}, DEEP, "fp4", "nan", "../..",
]  # fmt: skip


def signed(body):
    """`body` with a digest that matches."""
    body = {key: value for key, value in body.items() if key not in ("sha256", "quant_method")}
    return {**body, "sha256": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}


def flip(rng, data):
    """One bit flipped."""
    data = bytearray(data)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def truncate(rng, data):
    return data[: rng.randrange(len(data))]


def change_json(rng, body, keep=(), number=0):
    """`body` with one value anywhere made `HOSTILE[number]`, or one key gone or renamed; and its path."""
    body = json.loads(json.dumps(body))
    places = []

    def walk(value, path):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if not {key, *path} & set(keep):
                places.append((value, key, (*path, key)))
                if isinstance(item, dict | list):
                    walk(item, (*path, key))

    walk(body, ())
    deepest = rng.choice(sorted({len(path) for *_, path in places}))  # (or most would be in one table)
    holder, key, path = rng.choice([place for place in places if len(place[2]) == deepest])
    how = rng.choice(("replace", "replace", "replace", "delete", "rename"))
    if how == "replace":
        holder[key] = HOSTILE[number % len(HOSTILE)]
    elif isinstance(holder, list):
        holder.append(holder[key])
    elif how == "delete":
        del holder[key]
    else:
        holder[rng.choice(("", "x", f"{key}.x", "\n", "x" * 600))] = holder.pop(key)
    return body, path


def change_tensors(rng, data, among=None):
    """The safetensors file `data` with one tensor, or two, made wrong; how, and which."""
    tensors = safetensors.torch.load(data)
    name, other = rng.sample(among or sorted(tensors), 2)
    tensor = tensors[name]
    value = rng.choice((float("nan"), float("inf"), -float("inf")))
    if tensor.dtype is torch.float8_e4m3fn:  # it has no Inf
        value = float("nan")
    how = rng.choice(("missing", "renamed", "extra", "swapped", "dtype", "shape", "number", "sign", "zero"))
    if how == "missing":
        del tensors[name]
    elif how == "renamed":
        tensors[rng.choice((f"{name}x", "x", "", other))] = tensors.pop(name)
    elif how == "extra":
        tensors[f"{name}_2"] = tensor.clone()
    elif how == "swapped":
        tensors[name], tensors[other] = tensors[other], tensor
    elif how == "dtype":
        kinds = (torch.float64, torch.int32, torch.complex64, torch.bool, torch.float8_e5m2, torch.int64)
        tensors[name] = tensor.float().to(rng.choice(kinds))
    elif how == "shape":
        tensors[name] = rng.choice((tensor[:-1], tensor[None], tensor.flatten()[:1], tensor[:0])).clone()
    else:
        changed = tensor.float().clone().flatten()
        at = rng.randrange(len(changed))
        changed[at] = {"number": value, "sign": -changed[at], "zero": 0.0}[how]
        tensors[name] = changed.view(tensor.shape).to(tensor.dtype)
    return safetensors.torch.save(tensors, {"format": "pt"}), how, name


def rng(seed):
    return random.Random(seed)
