"""What works where libraries are broken or absent: the version, the doctor, errors in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rtlynx import __version__

ROOT = Path(__file__).resolve().parent.parent
HEAVY = (
    "torch", "diffusers", "transformers", "torchao", "peft", "matplotlib", "jinja2", "torchmetrics", "PIL",
    "typer",
)  # fmt: skip
FAULTS = {
    "ImportError": 'raise ImportError("libfoo.so: cannot open shared object file")',
    "RuntimeError": 'raise RuntimeError("operator torchvision::nms does not exist")',
    "AttributeError": "import os; os.no_such_name",
    "SyntaxError": "def broken(:\n",
    "SystemExit": "raise SystemExit(3)",
}


def python(*arguments, path=(), **environment) -> subprocess.CompletedProcess:
    """Run Python with folders in front of what is installed."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)]), **environment}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120)


def rtlynx(*arguments, **kwargs) -> subprocess.CompletedProcess:
    return python("-m", "rtlynx", *arguments, **kwargs)


@pytest.fixture
def broken(tmp_path):
    """A folder in which packages raise at import."""

    def make(faults: dict[str, str]) -> Path:
        for name, fault in faults.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(FAULTS[fault])
        return tmp_path

    return make


def checks_of(done: subprocess.CompletedProcess) -> dict[str, dict]:
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def test_importing_rtlynx_imports_nothing_heavy_and_keeps_its_names():
    done = python(
        "-c",
        "import sys, rtlynx\n"
        f"loaded = [name for name in {HEAVY} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
        "assert set(rtlynx.__all__) <= set(dir(rtlynx))\n"
        "import rtlynx.math.selection, pickle\n"
        "assert rtlynx.Pattern is rtlynx.math.selection.Pattern\n"
        "assert pickle.loads(pickle.dumps(rtlynx.Recipe())) == rtlynx.Recipe()\n"
        "assert rtlynx.models.sparsify is rtlynx.sparsify\n"
        "assert not hasattr(rtlynx, 'no_such_name')\n"
        f"loaded = [name for name in {HEAVY[1:]} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
        "from rtlynx import *\n"
        "assert RTLynxConfig and sparsify is rtlynx.sparsify\n",
    )
    assert done.returncode == 0, done.stderr


# Each in a process of its own, forked from one that has imported what is beneath diffusers and rtlynx.
ORDERS = """
import os, sys, threading
from concurrent.futures import ThreadPoolExecutor
import torch._dynamo, transformers, peft, accelerate, safetensors.torch

def known():
    import inspect, diffusers.quantizers.auto as auto, rtlynx
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING['rtlynx'] is rtlynx.RTLynxConfig
    assert auto.AUTO_QUANTIZER_MAPPING['rtlynx'] is rtlynx.io.quantizer.RTLynxQuantizer
    assert 'DiffusersAutoQuantizer' in inspect.getsource(auto)
    assert not any('rtlynx' in type(finder).__module__ for finder in sys.meta_path)

def threads():
    import rtlynx
    start = threading.Barrier(3)
    def use(lines):
        start.wait()
        exec(lines, {})
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(use, ['from rtlynx import RTLynxConfig; RTLynxConfig()',
                            'from diffusers import FluxTransformer2DModel',
                            'from rtlynx import sparsify, calibrate, save']))

assert not {'diffusers', 'rtlynx'} & set(sys.modules)
for case in ('import rtlynx; from diffusers import FluxTransformer2DModel',
             'import diffusers.quantizers.auto, rtlynx',
             'import diffusers; from rtlynx import RTLynxConfig',
             'threads()'):
    child = os.fork()
    if not child:
        code = 1
        try:
            exec(case)
            known()
            code = 0
        except BaseException as error:
            print(case, repr(error))
        finally:
            sys.stdout.flush()
            os._exit(code)
    if os.waitpid(child, 0)[1] == 0:
        print('known', flush=True)  # or the next child has it in its buffer, too
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_diffusers_knows_the_method_in_every_order_of_imports_and_from_threads_at_once():
    done = python("-c", ORDERS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["known"] * 4, done.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_the_version_needs_nothing(broken, fault):
    path = broken(dict.fromkeys(("torch", "diffusers", "transformers", "typer", "rich", "numpy"), fault))
    done = rtlynx("--version", path=[path])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == __version__


@pytest.mark.parametrize("fault", ["RuntimeError"])
def test_plain_models_become_sparse_where_diffusers_is_broken(broken, fault):
    done = python(
        "-c",
        "import rtlynx, torch\n"
        "model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))\n"
        "rtlynx.sparsify(model)\n"
        "try:\n"
        "    rtlynx.RTLynxConfig()\n"
        "except ImportError as error:\n"
        "    print(error)\n",
        path=[broken(dict.fromkeys(("diffusers", "transformers", "peft", "accelerate"), fault))],
    )
    assert done.returncode == 0, done.stderr
    assert "does not know the quantizers of diffusers" in done.stdout


@pytest.mark.parametrize("faults", [
    {"typer": "RuntimeError", "diffusers": "ImportError", "transformers": "AttributeError",
     "peft": "SystemExit"},
    {"torch": "AttributeError", "rich": "ImportError", "numpy": "SystemExit", "matplotlib": "RuntimeError"},
])  # fmt: skip
def test_the_doctor_names_what_is_broken_and_why(broken, faults):
    done = rtlynx("doctor", "--json", path=[broken(faults)])
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    checks = checks_of(done)
    for name, fault in faults.items():
        assert checks[name]["ok"] is False
        assert checks[name]["detail"].startswith("broken: ")
        assert fault in checks[name]["detail"]
    assert checks["jinja2"]["detail"].startswith("works: ")
    if "torch" in faults:
        assert "not checked" in checks["reference on cpu"]["detail"]
    else:
        assert checks["reference on cpu"]["ok"] is True
    assert checks["kernel cache"]["ok"] is None


def test_the_doctor_tells_missing_from_broken(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata, sys\n"
        "gone = ('torch', 'diffusers', 'peft')\n"
        "sys.modules.update(dict.fromkeys(gone))\n"
        "known = importlib.metadata.version\n"
        "def version(name):\n"
        "    if name in gone:\n"
        "        raise importlib.metadata.PackageNotFoundError(name)\n"
        "    return known(name)\n"
        "importlib.metadata.version = version\n"
    )
    done = rtlynx("doctor", "--json", path=[tmp_path])
    checks = checks_of(done)
    assert done.returncode == 1
    assert checks["diffusers"] == {"name": "diffusers", "ok": False, "detail": "not installed"}
    assert checks["peft"]["ok"] is None  # nothing needs it
    assert "not checked" in checks["zoo:flux-emoji"]["detail"]


@pytest.mark.parametrize("names", [("torch",), ("diffusers",), ("typer",)])
def test_commands_say_in_one_line_that_a_library_is_broken(broken, names):
    path = broken(dict.fromkeys(names, "AttributeError"))
    done = rtlynx("inspect", "zoo:flux-emoji", path=[path])
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "no_such_name" in done.stderr
    assert "rtlynx doctor" in done.stderr
    if names == ("typer",):
        assert "Traceback" in rtlynx("inspect", "x", path=[path], RTLYNX_TRACEBACK="1").stderr


def test_an_interrupt_while_importing_is_one_line(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise KeyboardInterrupt")
    for arguments in (("inspect", "zoo:flux-emoji"), ("doctor",)):
        done = rtlynx(*arguments, path=[tmp_path])
        assert (done.returncode, done.stderr.strip(), done.stdout) == (130, "interrupted", "")
