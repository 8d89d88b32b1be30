"""Without a card a file of tests on one is one test, that skips: thousands, one by one, took 14 s."""

import pytest
import torch


class Unrun(pytest.Item):
    def runtest(self):
        tests = pytest.Module.from_parent(self.parent.parent, path=self.path).collect()
        assert tests  # what cannot run here can be imported and collected nonetheless
        assert all("gpu" in test.keywords for test in tests)
        pytest.skip(f"{len(tests)} tests need a CUDA device, and torch sees none")

    def reportinfo(self):
        return self.path, 0, self.nodeid


class FileOfUnrun(pytest.File):
    def collect(self):
        test = Unrun.from_parent(self, name="all")
        test.add_marker("gpu")
        yield test


def pytest_pycollect_makemodule(module_path, parent):
    return None if torch.cuda.is_available() else FileOfUnrun.from_parent(parent, path=module_path)
