"""Output errors of what replaces a layer's weight, from second moments alone."""

from __future__ import annotations

from torch import Tensor

from rtlynx.calibration.moments import Moments


class LayerErrors:
    """Squared output errors of a layer, or of several that share an input, on the tokens of `moments`.

    What does not depend on the replacement is computed once, so each replacement takes one product of
    (N, K) by (K, K).

    Parameters
    ----------
    moments : Moments
    weight : Tensor (N, K), W: the original

    Attributes
    ----------
    energy : Tensor (N,)
        Mean square of each output of X W^T.
    """

    def __init__(self, moments: Moments, weight: Tensor) -> None:
        self.moments, self.weight = moments, weight.to(moments.dense)
        self._wanted = self.weight @ moments.cross.T  # what S V^T has in common with X W^T, by entry of V
        self.energy = ((self.weight @ moments.dense) * self.weight).sum(1)

    def of(
        self,
        weight: Tensor,
        lowrank_a: Tensor | None = None,
        lowrank_b: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Mean square (N,) of S W'^T + X A B^T + d - X W^T.

        Parameters
        ----------
        weight : Tensor (N, K), W'
        lowrank_a : Tensor (r, K), A^T
        lowrank_b : Tensor (N, r), B
        shift : Tensor (N,), d: what is added to the bias
        """
        moments, weight = self.moments, weight.to(self.weight)
        error = self.energy + ((weight @ moments.kept - 2 * self._wanted) * weight).sum(1)
        if lowrank_a is not None and lowrank_b is not None:
            a, b = lowrank_a.to(self.weight), lowrank_b.to(self.weight)
            dense = a @ moments.dense
            error += 2 * (weight * (b @ (a @ moments.cross.T)) - self.weight * (b @ dense)).sum(1)
            error += ((b @ (dense @ a.T)) * b).sum(1)
        if shift is not None:
            missed = moments.mean_error(self.weight, weight, lowrank_a, lowrank_b)
            error += (2 * missed + shift.to(missed)) * shift.to(missed)
        return error

    def relative(self, errors: Tensor, rows: slice = slice(None)) -> float:
        """The sum of `errors` (N,) over `rows` per energy of the outputs there, 0 without any energy."""
        energy = float(self.energy[rows].sum())
        return float(errors[rows].sum().clamp(min=0)) / energy if energy > 0 else 0.0
