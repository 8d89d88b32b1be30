"""What users type and write into files, and what comes of the odd ones: one line that says what to do."""

import codecs
import json
import os
import subprocess
import sys

import pytest
import torch

from rtlynx import Recipe
from rtlynx.cli.inputs import calibration_options, pairs, read_prompts, recipe_of
from rtlynx.cli.main import main
from rtlynx.evaluate import demo, full_demo
from rtlynx.models.pipelines import load_model

FLUX = ("calibrate", "zoo:flux-emoji", "--out", "x")


def refused(done, code: int, said: str) -> None:
    found, out, error = done
    assert (found, out) == (code, ""), error
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert said in error


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


# ---------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    "data",
    [
        b"red heart\nhot dog\n",
        codecs.BOM_UTF8 + b"red heart\r\n\r\nhot dog",
        codecs.BOM_UTF16_LE + "red heart\nhot dog\n".encode("utf-16-le"),
        codecs.BOM_UTF16_BE + "red heart\nhot dog".encode("utf-16-be"),
        codecs.BOM_UTF32_LE + "red heart\r\n hot dog \n".encode("utf-32-le"),
    ],
)
def test_prompts_in_the_encodings_that_editors_write(tmp_path, data):
    file = tmp_path / "prompts.txt"
    file.write_bytes(data)
    assert read_prompts(file) == ["red heart", "hot dog"]


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_only_line_feeds_end_a_prompt(tmp_path, inside):
    file = tmp_path / "prompts.txt"
    file.write_bytes(f"red{inside}heart\nhot dog\r\n".encode())
    assert read_prompts(file) == [f"red{inside}heart", "hot dog"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no prompts"),
        (b" \n\t\r\n", "no prompts"),
        (codecs.BOM_UTF8, "no prompts"),
        (b"red heart\nhot\0dog\n", "line 2: a NUL character"),
        ("red heart\n".encode("utf-16-le"), "line 1: a NUL character"),
        (b"red heart\n\nfl\xe8che\n", "line 3: not UTF-8 text"),
        (
            codecs.BOM_UTF16_LE + "a\nb\n".encode("utf-16-le") + b"\x00\xd8\x41\x00",
            "line 3: not UTF-16-LE text",
        ),
    ],
)
def test_files_that_hold_no_prompts_are_named_with_the_line(command, tmp_path, data, said):
    file = tmp_path / "prompts.txt"
    file.write_bytes(data)
    done = command(*FLUX, "--prompts", file)
    refused(done, 1, said)
    assert str(file) in done[2]


@pytest.mark.parametrize("option", ["--prompts", "--recipe"])
def test_what_is_no_file_is_refused_without_waiting(command, tmp_path, option):
    os.mkfifo(tmp_path / "pipe")
    refused(command(*FLUX, option, tmp_path / "pipe"), 1, "pipe is not a regular file")
    refused(command(*FLUX, option, tmp_path), 1, "is a folder")
    refused(command(*FLUX, option, "/dev/zero"), 1, "/dev/zero is not a regular file")
    refused(command(*FLUX, option, tmp_path / "none"), 1, "none: No such file or directory")


@pytest.mark.parametrize("data", [b"\xff\xfe\xff", b"caf\xe9", b"{", b"[]", b'{"n": "x"}', b"[" * 100_000])
def test_recipe_files_that_are_none_are_named(command, tmp_path, data):
    file = tmp_path / "recipe.json"
    file.write_bytes(data)
    refused(command(*FLUX, "--recipe", file), 1, str(file))


# --------------------------------------------------------------------------------------------- settings


def test_values_are_json_or_text():
    given = ["a=1", "b=2.5", "c=true", "d=x=y", 'e={"f": [1]}', "g=null", "h=", " i =no"]
    expected = {"a": 1, "b": 2.5, "c": True, "d": "x=y", "e": {"f": [1]}, "g": None, "h": "", "i": "no"}
    assert pairs(given, "--pipeline") == expected


@pytest.mark.parametrize(
    ("word", "value"),
    [("yes", True), ("On", True), ("TRUE", True), ("no", False), ("off", False), ("False", False)],
)
def test_yes_and_no_are_what_they_say(word, value):
    assert calibration_options([f"sequential={word}"], None, {}).sequential is value
    assert recipe_of(None, [f"refit={word}"], Recipe).refit is value


def test_none_is_no_branch_and_no_budget_but_a_norm():
    recipe = recipe_of(None, ["rank=none", "budget=None", "precision=bf16"], Recipe.recommended)
    assert (recipe.rank, recipe.budget) == (None, None)
    assert recipe_of(None, ["norm=none", "rank=none"], Recipe).norm == "none"


@pytest.mark.parametrize("name", ["recommended", "paper", "immediate", "dense_fp8"])
def test_recipes_go_by_their_names(name):
    assert recipe_of(name) == getattr(Recipe, name)()
    assert recipe_of(name, ["modulation=fp8"]) == getattr(Recipe, name)(modulation="fp8")


@pytest.mark.parametrize(
    "item",
    ["sequential=maybe", "sequential=2", "sequential=", "seed=x", "seed=1.5", "batch_size=true",
     "batch_size=2.0", "memory_gb=lots", "memory_gb=NaN", "heldout=Infinity", "memory_gb=1e999", "seed=null",
     "seed=" + "9" * 5000],
)  # fmt: skip
def test_options_of_the_wrong_type_are_refused_by_name(item):
    with pytest.raises(ValueError, match=f"--option {item.partition('=')[0]}: "):
        calibration_options([item], None, {})


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            (*FLUX, "--pipeline", "guidance"),
            2,
            "--pipeline takes KEY=VALUE, got 'guidance'; try: rtlynx calibrate",
        ),
        ((*FLUX, "--pipeline", "=3"), 2, "KEY=VALUE"),
        ((*FLUX, "--set", "rank=3", "--set", "rank=4"), 2, "--set gives 'rank' twice"),
        ((*FLUX, "--option", "seed=1", "--option", "seed =1"), 2, "--option gives 'seed' twice"),
        ((*FLUX, "--pipeline", "guidance_scale=NaN"), 1, "--pipeline guidance_scale: NaN"),
        ((*FLUX, "--set", 'budget={"saving": 0.5, "saving": 0.9}'), 1, "given twice"),
        ((*FLUX, "--set", "formats=" + "[" * 100_000), 1, "--set formats: "),
        ((*FLUX, "--work", __file__), 1, "--work"),
        ((*FLUX, "--device", "nonsense"), 1, "no device is called 'nonsense'"),
        ((*FLUX, "--device", ""), 1, "no device is called ''"),
        ((*FLUX, "--device", "meta"), 1, "meta"),
        ((*FLUX, "--device", "xpu"), 1, "xpu"),
        (("evaluate", "zoo:flux-emoji", "--checkpoint", "x", "--images", "0"), 2, "--images"),
        (("evaluate", "zoo:flux-emoji", "--checkpoint", "x", "--images", "-1"), 2, "--images"),
        (("evaluate", "zoo:flux-emoji", "--checkpoint", "x", "--seed", "-1"), 2, "--seed"),
        (("evaluate", "zoo:flux-emoji", "--checkpoint", "x", "--seed", str(2**64)), 2, "--seed"),
        (("evaluate", "zoo:flux-emoji", "--checkpoint", "x", "--pipeline", "steps"), 2, "KEY=VALUE"),
        (("evaluate", "some/folder", "--checkpoint", "x"), 2, "give --prompts FILE"),
        (("demo", "--images", "0"), 2, "--images"),
        (("demo", "--images", "-1"), 2, "--images"),
        (("demo", "--steps", "0"), 2, "--steps"),
        (("demo", "--seed", "-1"), 2, "--seed"),
        (("inspect", "zoo:flux-emoji", "--activations", "-1"), 2, "--activations"),
        (("inspect", "some/folder", "--activations", "1"), 2, "only zoo models"),
        (
            ("inspect", "zoo:flux-emoji", "--checkpoint", "x", "--set", "n=1"),
            2,
            "leave out --recipe and --set",
        ),
        (("bench", "--seconds", "nan"), 2, "--seconds"),
        (("bench", "--seconds", "inf"), 2, "--seconds"),
        (("bench", "--model", "flux1-dev", "--shapes", "flux-o"), 2, "leave out --shapes"),
        (("bench", "--out", "."), 1, "--out"),
        (("inspect",), 2, "model"),
        (("nonsense",), 2, "try: rtlynx --help"),
    ],
)
def test_nonsense_is_refused_in_one_line(command, arguments, code, said):
    refused(command(*arguments), code, said)
    assert os.listdir() == []


@pytest.mark.parametrize("command_name", ["calibrate", "convert"])
def test_an_occupied_target_is_refused_before_the_model_is_looked_at(command, tmp_path, command_name):
    (tmp_path / "mine").write_text("years of work")
    refused(command(command_name, "no/such/model", "--out", tmp_path / "mine"), 1, "mine")


def test_the_help_says_the_demos_own_defaults(command):
    code, out, _ = command("demo", "--help")
    assert code == 0
    words = " ".join(out.replace("│", " ").split())
    assert f"[default: ({demo.IMAGES}; {full_demo.IMAGES} with --full)]" in words
    assert f"[default: ({demo.STEPS}; {full_demo.STEPS} with --full)]" in words


# ---------------------------------------------------------------------------------- devices and folders


def test_cards_that_are_not_there_are_refused(monkeypatch, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(command(*FLUX, "--device", "cuda"), 1, "device cuda: this PyTorch")
    with pytest.raises(ValueError, match="device cuda:1: this PyTorch"):
        load_model("zoo:flux-emoji", device="cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused(command(*FLUX, "--device", "cuda:99"), 1, "device cuda:99: there is only cuda:0 to cuda:1")


@pytest.mark.parametrize("name", ["config.json", "model_index.json"])
@pytest.mark.parametrize(
    "data",
    [b"[]", b"3", b"null", b"{", b"", b"\xff\xfe", b'{"_class_name": ', b"{}", b'{"_class_name": 3}',
     b'{"_class_name": []}',
     b'{"_class_name": "NoSuchModel"}', b'{"_class_name": "FluxTransformer2DModel", "num_layers": "x"}',
     b'{"_class_name": "FlowMatchEulerDiscreteScheduler"}', b'{"_class_name": "is_torch_available"}',
     b'{"_class_name": "DiffusionPipeline"}', b'{"_class_name": "__version__"}',
     b'{"_class_name": "FluxPipeline", "transformer": [1, 2]}'],
)  # fmt: skip
def test_folders_that_are_no_models_are_named(command, tmp_path, name, data):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).write_bytes(data)
    code, out, error = command("inspect", folder)
    assert (code, out) == (1, "")
    last = error.splitlines()[-1]  # diffusers may have logged something before
    assert last.startswith("error: ")
    assert str(folder) in last


def test_a_pipe_as_configuration_is_no_model(command, tmp_path):
    os.mkfifo(tmp_path / "config.json")
    refused(command("inspect", tmp_path), 1, "no config.json")


# ---------------------------------------------------------------------------------------- other failures


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried 9 GiB"), "out of memory. CUDA out of memory. T"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (KeyError("surprise"), "unexpected KeyError: 'surprise' (RTLYNX_TRACEBACK=1 shows where)"),
        (AssertionError(), "unexpected AssertionError (RTLYNX_TRACEBACK=1"),
        (ValueError(), "unexpected ValueError"),
        (RecursionError("too deep"), "too deep"),
        (OSError(28, "No space left on device", "/disk/file"), "/disk/file: No space left on device"),
        (RuntimeError("two\nlines \x1b[31m"), "two lines [31m"),
    ],
)  # fmt: skip
def test_any_failure_is_one_line(command, monkeypatch, error, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("rtlynx.models.pipelines.load_model", fail)
    refused(command("inspect", "zoo:flux-emoji"), 1, said)
    monkeypatch.setenv("RTLYNX_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main()


def test_an_interrupt_is_one_line_and_130(command, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("rtlynx.models.pipelines.load_model", interrupt)
    assert command("inspect", "zoo:flux-emoji") == (130, "", "interrupted\n")


def test_a_figure_that_is_infinite_is_null_in_json(command, monkeypatch):
    overview = {"layers": [], "sparse_share": float("nan"), "extra_bytes": float("inf")}
    monkeypatch.setattr("rtlynx.models.pipelines.load_model", lambda *_, **__: torch.nn.Linear(4, 4))
    monkeypatch.setattr("rtlynx.cli.inspection.describe", lambda *_, **__: overview)
    code, out, _ = command("inspect", "zoo:flux-emoji", "--json")
    assert code == 0
    assert json.loads(out) == {
        "layers": [],
        "sparse_share": None,
        "extra_bytes": None,
        "activation_energy_kept": {},
    }


def unwritable(target) -> int:
    read, write = os.pipe()
    os.close(read)
    if target == "full":
        os.close(write)
        write = os.open("/dev/full", os.O_WRONLY)
    return write


@pytest.mark.parametrize(
    ("arguments", "target"),
    [("--version", "closed"), ("--version", "full"), ("--help", "closed"), ("--help", "full")],
)  # fmt: skip
def test_output_that_cannot_be_written_is_no_traceback(arguments, target):
    write = unwritable(target)
    done = subprocess.run(
        [sys.executable, "-m", "rtlynx", *arguments.split()], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == ("" if target == "closed" else "error: [Errno 28] No space left on device\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("target", ["closed", "full"])
def test_a_result_that_cannot_be_written_is_no_traceback(target, tmp_path, monkeypatch):
    """As above, after some work; a fork has imported what that takes."""
    monkeypatch.setattr(sys, "argv", ["rtlynx", "inspect", "zoo:flux-emoji", "--json"])
    write, said = unwritable(target), tmp_path / "said"
    child = os.fork()
    if not child:
        code = 99
        try:
            os.dup2(write, 1)
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
            sys.stdout, sys.stderr = (open(of, "w", closefd=False) for of in (1, 2))  # noqa: SIM115
            try:
                main()
            except SystemExit as stop:
                code = stop.code
            sys.stdout.flush()  # as Python does when it exits
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert said.read_text() == ("" if target == "closed" else "error: [Errno 28] No space left on device\n")
