"""Streams of attention, and what must come of them in eight bits and in others, from a formula in float64."""

import torch

from rtlynx.math.attention import Stream

EPS = 1e-6
ROTARY = ("none", "complex", "complex of each batch", "cosine and sine")
LAYOUTS = ("dense", "one product", "heads first", "odd address", "one product, odd address")


def streams_of(
    batch=1, tokens=(5, 40), heads=3, width=64, rotary="complex", layout="dense", dtype=torch.bfloat16,
    device="cpu", seed=0,
):  # fmt: skip
    """Streams of so many tokens each. Heads differ in size, and values have a mean."""
    gen = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, device=device)

    def laid_out(*made):
        made = [one.to(dtype) for one in made]
        if "one product" in layout:
            joint = torch.cat([one.flatten(2) for one in made], -1)
            if "odd" in layout:
                joint = torch.cat([joint.flatten()[:1], joint.flatten()])[1:].view(joint.shape)
            return [one.unflatten(-1, (heads, width)) for one in joint.chunk(3, -1)]
        if layout == "heads first":
            return [one.transpose(1, 2).contiguous().transpose(1, 2) for one in made]
        if layout == "odd address":
            padded = [torch.cat([one.flatten()[:1], one.flatten()]) for one in made]
            return [one[1:].view(like.shape) for one, like in zip(padded, made, strict=True)]
        return made

    def factors(count):
        angles = 3 * normal(*((batch, count) if "each" in rotary else (count,)), width // 2)
        if rotary == "none":
            return ()
        both = torch.stack([angles.cos(), angles.sin()], -1)
        return (
            (both,) if "complex" in rotary else tuple(one.repeat_interleave(2, -1) for one in both.unbind(-1))
        )

    sizes = torch.logspace(-2, 2, heads, device=device).view(-1, 1)
    streams = []
    for count in tokens:
        q, k, v = (normal(batch, count, heads, width) * sizes for _ in "qkv")
        weights = ((1 + 0.3 * normal(width)).to(dtype) for _ in "qk")
        streams.append(Stream(*laid_out(q, k, v + 0.4 * sizes), *weights, factors(count)))
    return streams


def arguments_of(streams, eps=EPS, q_exponent=0, k_exponent=0):
    """Of the operator `rtlynx::attention_inputs`."""
    first, *others = streams
    return (
        *first[:3],
        [one for stream in others for one in stream[:3]],
        [one for stream in streams for one in stream[3:5]],
        [one for stream in streams for one in stream.rotary],
        *(eps, q_exponent, k_exponent),
    )


def exact_heads(streams, which, exponent=0, eps=EPS):
    """Queries (0) or keys (1) in float64, before they are rounded."""
    parts = []
    for stream in streams:
        x, weight = stream[which].double(), stream[3 + which].double()
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
        if stream.rotary:
            numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            if len(stream.rotary) == 2:
                pairs = torch.stack([one[..., ::2] for one in stream.rotary], -1)
            else:
                pairs = stream.rotary[0]
            turned = numbers * torch.view_as_complex(pairs.double().contiguous()).unsqueeze(-2)
            x = torch.view_as_real(turned).flatten(-2)
        parts.append(x * 2.0**exponent)
    return torch.cat(parts, 1)


def assert_rounded(y, exact, slack=1e-5, unit=1.0):
    """That `y` is a nearest number of its dtype to `exact`, or within `slack` of a tie.

    unit : about the size of what `exact` is a difference of, in float32
    """
    of = torch.finfo(y.dtype)
    exact = exact.double().clamp(of.min, of.max)
    step = torch.exp2(exact.abs().clamp_min(of.smallest_normal).log2().floor()) * of.eps
    off = (y.double() - exact).abs()
    wrong = ~(off <= 0.5 * step + slack * exact.abs().clamp_min(unit))
    assert not bool(wrong.any()), (
        f"{int(wrong.sum())} of {wrong.numel()} wrong, first at {wrong.nonzero()[:4].tolist()}: "
        f"{y.double()[wrong][:4].tolist()} for {exact[wrong][:4].tolist()}"
    )


def assert_right(made, streams, q_exponent=0, k_exponent=0):
    """That `made` is what attention in eight bits reads of `streams`."""
    q, k, v, scale, mean = made
    assert_rounded(q, exact_heads(streams, 0, q_exponent), unit=2.0**q_exponent)
    assert_rounded(k, exact_heads(streams, 1, k_exponent), unit=2.0**k_exponent)
    values = torch.cat([one.value for one in streams], 1).double()
    sample = values[:, ::11] if values.shape[1] > 256 else values
    largest = sample.abs().amax(1, keepdim=True)
    torch.testing.assert_close(scale.double(), (largest / 7).clamp_min(2.0**-126), rtol=1e-6, atol=0)
    assert bool(((mean.double() - sample.mean(1, keepdim=True)).abs() <= 1e-5 * largest).all())
    assert_rounded(v, (values - mean.double()) / scale.double())
    for one in made:
        assert one.is_contiguous()


def assert_normed(made, streams):
    """That `made` is what attention reads of `streams` in their own dtype: values where there are two."""
    assert len(made) == (3 if streams[1:] else 2)
    for one, which in zip(made[:2], (0, 1), strict=True):
        assert one.dtype is streams[0].query.dtype
        assert_rounded(one, exact_heads(streams, which))
    for one in made[2:]:
        assert torch.equal(one, torch.cat([stream.value for stream in streams], 1))
    for one in made:
        assert one.is_contiguous()
