"""The layers that every benchmark covers, and how many copies of their operands defeat the cache."""

from typing import NamedTuple


class Shape(NamedTuple):
    """A linear layer Y (M, N) = X (M, K) W^T, W (N, K)."""

    name: str
    m: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        """Of the dense product, which sparse ones are credited with too."""
        return 2 * self.m * self.k * self.n

    def teraflops(self, us: float) -> float:
        return self.flops / us * 1e-6


# The paper's three, then FLUX.1 and Z-Image at 1024x1024 after layers that read one input were joined.
SHAPES = (
    Shape("paper-a", 4096, 3072, 4096),
    Shape("paper-b", 4096, 12288, 4096),
    Shape("paper-c", 8192, 12288, 8192),
    Shape("flux-qkv", 4608, 3072, 9216),
    Shape("flux-o", 4096, 3072, 3072),
    Shape("flux-up", 4096, 3072, 12288),
    Shape("flux-down", 4096, 12288, 3072),
    Shape("flux-single-in", 4608, 3072, 21504),
    Shape("flux-single-out", 4608, 15360, 3072),
    Shape("zimage-qkv", 4128, 3840, 11520),
    Shape("zimage-w13", 4128, 3840, 20480),
    Shape("zimage-w2", 4128, 10240, 3840),
)


def chosen(names: str | None) -> tuple[Shape, ...]:
    """The shapes of a comma-separated list, all without one; ValueError for a name that is none."""
    if names is None:
        return SHAPES
    known = {shape.name: shape for shape in SHAPES}
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise ValueError(f"no shape is called {', '.join(unknown)}; there are {', '.join(known)}")
    return tuple(known[name] for name in names.split(","))


def paper_rank(k: int) -> int:
    """The paper's rank, 64 at K = 3072 and in proportion, rounded up to a multiple of 16."""
    return -(-64 * k // (3072 * 16)) * 16


def set_count(bytes_per_set: int, l2_bytes: int) -> int:
    """How many operand sets to rotate among so that they exceed three times the cache, at least 3."""
    return max(3, 3 * l2_bytes // bytes_per_set + 1)
