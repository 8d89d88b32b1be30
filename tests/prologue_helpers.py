"""What tests of prologues share: inputs, formulas, and what kernels are handed."""

import ctypes
import math
import struct

import torch

from rtlynx.cuda.sm90.prologues import PROLOGUES

K = 64
NAMES = tuple(name for name in PROLOGUES if name != "identity")
MODULATED = ("adaln", "rms_adaln", "rmsnorm")
OF_TOKENS = ("adaln_of_tokens", "rms_adaln_of_tokens")
ANY_AXES = ("gelu", "silu_gate", "concat_gelu", "concat_silu_gate")  # of tokens of any shape


def normal(*shape, seed=0, scale=1.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).bfloat16()


def make_inputs(name, *leading, k=K, batch=None):
    """Inputs of `name` for (*leading, k); modulations for each batch."""
    batch = batch or (leading[0] if len(leading) == 2 else 1)
    x = normal(*leading, k, seed=1)
    if name in ("adaln", "rms_adaln"):
        return x, normal(batch, k, seed=2), normal(batch, k, seed=3), 1e-6
    if name == "adaln_by_token":
        choice = torch.randint(5, leading, generator=torch.Generator().manual_seed(4), dtype=torch.int32)
        return x, normal(5, k, seed=2), normal(5, k, seed=3), choice, 1e-6
    if name == "rmsnorm_by_token":
        choice = torch.randint(5, leading, generator=torch.Generator().manual_seed(4), dtype=torch.int32)
        return x, normal(k, seed=2), normal(5, k, seed=3), choice, 1e-5
    if name in OF_TOKENS:
        own = normal(*leading, 3, k, seed=2).unbind(-2)
        return x, own[0], own[2], normal(k, seed=3), normal(k, seed=4), 1e-6
    if name == "rmsnorm":
        return x, normal(k, seed=2), normal(batch, k, seed=3), 1e-5
    if name == "gelu":
        return (x,)
    if name == "silu_gate":
        return tuple(normal(*leading, 2 * k, seed=1).chunk(2, dim=-1))
    second = k - k // 4
    second *= 2 if name == "concat_silu_gate" else 1
    return normal(*leading, k // 4, seed=1), normal(*leading, second, seed=2)


def by_formula(name, *inputs):
    """The prologue in float64."""
    wide = [one.double() if isinstance(one, torch.Tensor) else one for one in inputs]
    first = wide[0]
    if name == "adaln_by_token":
        _, second, third, _, eps = wide
        rows = inputs[3].flatten().tolist()
        alone = [
            by_formula("adaln", token[None], second[row], third[row], eps)
            for token, row in zip(first.flatten(0, -2), rows, strict=True)
        ]
        return torch.cat(alone).view(first.shape)
    if name == "rmsnorm_by_token":
        _, weight, scale, _, eps = wide
        normed = first / (first.square().mean(-1, keepdim=True) + eps).sqrt()
        return normed * weight * scale[inputs[3].long()]
    if name in OF_TOKENS:
        _, shift, scale, common_shift, common_scale, eps = wide
        centred = first if name.startswith("rms") else first - first.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return normed * (1 + common_scale + scale) + common_shift + shift
    if name in MODULATED:
        _, second, third, eps = wide
        along = (-1, 1, K) if first.ndim == 3 else (-1, K)
        if name == "adaln":
            centred = first - first.mean(-1, keepdim=True)
            normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
            return normed * (1 + third.view(along)) + second.view(along)
        normed = first / (first.square().mean(-1, keepdim=True) + eps).sqrt()
        if name == "rms_adaln":
            return normed * (1 + third.view(along)) + second.view(along)
        return normed * second * third.view(along)
    if name == "silu_gate":
        return first / (1 + (-first).exp()) * wide[1]
    last = wide[-1]
    if name == "concat_silu_gate":
        return torch.cat([first, by_formula("silu_gate", *last.chunk(2, dim=-1))], dim=-1)
    activated = 0.5 * last * (1 + (math.sqrt(2 / math.pi) * (last + 0.044715 * last**3)).tanh())
    return activated if name == "gelu" else torch.cat([first, activated], dim=-1)


def in_memory(address, count):
    """A vector, as the kernel finds it."""
    buffer = (ctypes.c_uint16 * count).from_address(address)
    return torch.frombuffer(buffer, dtype=torch.bfloat16).clone()


def read_matrix(structure, offset, rows, columns):
    """A Matrix of prologues.cuh: its rows, and the batch of each."""
    address, batch_stride, row_stride, together = struct.unpack_from("<Qqqi", structure, offset)
    batches = [row // together for row in range(rows)]
    starts = [b * batch_stride + row % together * row_stride for row, b in enumerate(batches)]
    return torch.stack([in_memory(address + 2 * start, columns) for start in starts]), batches


def read_bound(x):
    """What the kernel makes of a bound prologue, from its bytes, in float64 rounded as the test wants it."""
    name, parameters = x.prologue.name, x.parameters
    if name == "adaln_by_token":
        rows, _ = read_matrix(parameters, 0, x.rows, x.columns)
        shift, scale, choice, stride, last, eps = struct.unpack_from("<QQQiif", parameters, 32)
        chosen = (ctypes.c_int32 * x.rows).from_address(choice)
        starts = [2 * min(max(one, 0), last) * stride for one in chosen]
        pairs = [(in_memory(shift + at, x.columns), in_memory(scale + at, x.columns)) for at in starts]
        made = [by_formula("adaln", row[None], *pair, eps) for row, pair in zip(rows, pairs, strict=True)]
        return torch.cat(made)
    if name == "rmsnorm_by_token":
        rows, _ = read_matrix(parameters, 0, x.rows, x.columns)
        weight, scale, choice, stride, last, eps = struct.unpack_from("<QQQiif", parameters, 32)
        chosen = [min(max(one, 0), last) for one in (ctypes.c_int32 * x.rows).from_address(choice)]
        scales = torch.stack([in_memory(scale + 2 * one * stride, x.columns) for one in chosen])
        return by_formula(name, rows, in_memory(weight, x.columns), scales, torch.arange(x.rows), eps)
    if name in OF_TOKENS:
        rows, _ = read_matrix(parameters, 0, x.rows, x.columns)
        *addresses, stride, eps = struct.unpack_from("<QQQQif", parameters, 32)
        assert stride % 8 == 0
        own = (
            torch.stack([in_memory(at + 2 * row * stride, x.columns) for row in range(x.rows)])
            for at in addresses[:2]
        )
        return by_formula(name, rows, *own, *(in_memory(at, x.columns) for at in addresses[2:]), eps)
    if name in MODULATED:
        rows, batches = read_matrix(parameters, 0, x.rows, x.columns)
        first, second, stride, eps = struct.unpack_from("<QQif", parameters, 32)
        made = []
        for row, batch in zip(rows, batches, strict=True):
            offset = 2 * batch * stride
            one = in_memory(first + (0 if name == "rmsnorm" else offset), x.columns)
            made.append(by_formula(name, row[None], one, in_memory(second + offset, x.columns), eps)[0])
        return torch.stack(made)
    if name == "identity":
        return read_matrix(parameters, 0, x.rows, x.columns)[0]
    if name == "concat_gelu":
        (first,) = struct.unpack_from("<i", parameters, 64)
        widths = (first, x.columns - first)
    elif name == "concat_silu_gate":
        first, half = struct.unpack_from("<ii", parameters, 64)
        assert first + half == x.columns
        widths = (first, 2 * half)
    else:
        widths = (x.columns,) * x.prologue.inputs
    matrices = (read_matrix(parameters, 32 * i, x.rows, width)[0] for i, width in enumerate(widths))
    return by_formula(name, *matrices)


def misaligned(x):
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


def laid_out_otherwise(inputs):
    """The inputs with tokens of other strides, in several ways."""
    for change in (
        lambda x: torch.cat([x[:, :5], x], dim=1)[:, 5:],
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.mT.contiguous().mT,
    ):
        moved = [change(one) if getattr(one, "ndim", 0) == 3 else one for one in inputs]
        assert not moved[0].is_contiguous()
        yield moved


def along_tokens(one):
    """Whether an input of (B, T) tokens has a row or an entry for each."""
    return isinstance(one, torch.Tensor) and (one.ndim == 3 or not one.is_floating_point())


def is_tokens(one):
    return isinstance(one, torch.Tensor) and one.ndim > 1 and one.shape[-2] == 7
