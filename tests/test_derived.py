"""What is made of parameters and kept, while threads ask for it and drop it."""

import sys
import threading

import pytest
import torch

from rtlynx.nn.cached_tensor import CachedTensor


@pytest.fixture
def many_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("many_switches")
def test_threads_get_a_right_tensor_while_others_drop_it():
    sources = [torch.full((4,), float(value)) for value in range(3)]
    derived, wrong, done = CachedTensor(), [], threading.Event()

    def ask(source):
        try:
            for _ in range(3000):
                made = derived.get((source,), "key", lambda: source + 1)
                if made is None or made[0] != source[0] + 1:
                    wrong.append(made)
                derived.kept  # noqa: B018
        except Exception as error:  # a thread's own would be lost
            wrong.append(error)

    def drop():
        while not done.is_set():
            derived.drop()

    askers = [threading.Thread(target=ask, args=(source,)) for source in (*sources, sources[0])]
    droppers = [threading.Thread(target=drop) for _ in range(2)]
    for thread in (*askers, *droppers):
        thread.start()
    for thread in askers:
        thread.join()
    done.set()
    for thread in droppers:
        thread.join()
    assert wrong == []


def test_dropped_between_two_reads():
    """Another thread's `drop`, at the worst moment: while `get` compares what is kept."""
    source = torch.ones(4)
    derived = CachedTensor()

    class Key:
        def __eq__(self, other):
            derived.drop()
            return isinstance(other, Key)

        __hash__ = None

    derived.get((source,), Key(), lambda: source + 1)
    again = derived.get((source,), Key(), lambda: source + 1)
    assert torch.equal(again, source + 1)
    assert derived.kept is None
