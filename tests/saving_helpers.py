"""Two models to save over each other and ways to stop a saver: kills and Ctrl-C."""

import copy
import os
import signal
import sys
from pathlib import Path

import pytest
from checkpoint_helpers import make
from helpers import tiny_flux

import rtlynx
from rtlynx import Recipe, load
from rtlynx.models import sparse_layers

NAMES = ["rtlynx.json", "rtlynx.safetensors"]
CHANGES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.chmod", "fcntl.flock"}


def small():
    return tiny_flux(num_single_layers=0)


# Copied for each load: seeds are no matter for threads.
BASE = small()


def two_models():
    """Two sparse models with other tensors, which `stored` tells apart."""
    fp8 = {"precision": "fp8"}
    return {
        "all": make(Recipe.immediate(**fp8), small),
        "some": make(Recipe.immediate(**fp8, skip=("*.to_q",)), small),
    }


def stored(folder):
    """Which of `models` is in `folder`; it must load."""
    layers = sparse_layers(load(copy.deepcopy(BASE), folder))
    return "all" if any(name.endswith(".to_q") for name in layers) else "some"


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def in_child(work):
    """Run `work` in a child process; whether it came to its end."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status == 0


def killed_at(count, work):
    """Do `work` in a child, killed before its `count`-th change of the file system; whether it ended."""

    def child():
        left = [count]

        def hook(event, _arguments):
            if event in CHANGES:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()

    return in_child(child)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills children that were forked")

PACKAGE = Path(rtlynx.__file__).parent
TRACED = {str(PACKAGE / "storage" / name) for name in ("checkpoint_folder.py", "temporaries.py", "files.py")}


class Interrupter:
    """Raises KeyboardInterrupt the n-th time that a line of the files in `TRACED` is reached."""

    def __init__(self, line=None):
        self.line, self.lines, self.raised = line, {}, False

    def __call__(self, frame, event, _argument):
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            place = (frame.f_code.co_filename, frame.f_lineno)
            self.lines[place] = self.lines.get(place, 0) + 1
            if self.line == (place, self.lines[place]) and not self.raised:
                self.raised = True
                raise KeyboardInterrupt
        return self

    def run(self, work):
        before = sys.gettrace()
        sys.settrace(self)
        try:
            work()
        except KeyboardInterrupt:
            return False
        finally:
            sys.settrace(before)
        return True


def lines_of(work):
    """The lines that `work` reaches, the first and the last time of each."""
    tracer = Interrupter()
    assert tracer.run(work)
    return sorted({(place, count) for place, last in tracer.lines.items() for count in {1, last}})
