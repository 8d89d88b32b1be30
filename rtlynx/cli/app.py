"""The application: its options, how it is run, what commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rtlynx._version import __version__
from rtlynx.cli.inputs import RECIPES, UsageError, read_prompts
from rtlynx.cli.output import say

app = typer.Typer(
    name="rtlynx",
    help="Faster diffusion transformers on Hopper GPUs, by fp8 and 2:4 sparsity.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Model = Annotated[
    str, typer.Argument(help="zoo:flux-emoji, or a local diffusers folder.", show_default=False)
]
_RECIPE = f"{', '.join(RECIPES)}, or a JSON file."
RecommendedRecipe = Annotated[str | None, typer.Option("--recipe", help=_RECIPE, show_default="recommended")]
ImmediateRecipe = Annotated[str | None, typer.Option("--recipe", help=_RECIPE, show_default="immediate")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one recipe setting; repeatable."),
]
PipelineSettings = Annotated[
    list[str] | None,
    typer.Option("--pipeline", metavar="KEY=VALUE", help="An argument of the pipeline call; repeatable."),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1 ...; default cuda where there is one.", show_default=False),
]
Seed = Annotated[int, typer.Option(help="Picture i starts from noise of seed + i.", min=0, max=2**32 - 1)]
PromptFile = Annotated[Path | None, typer.Option("--prompts", help="Text file, one prompt a line.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
# typer may bring a click of its own, so its base class is asked for here.
_ClickError: Any = typer.BadParameter.__mro__[2]


def run(arguments: list[str]) -> tuple[int, str | None]:
    """Run one command: the exit code, and what was wrong with how it was called.

    typer's own runner would turn errors and interrupts into output and codes of its own.
    """
    as_module = Path(sys.argv[0]).name == "__main__.py"
    program = "python -m rtlynx" if as_module else "rtlynx"
    command = typer.main.get_command(app)
    asked = arguments or ["--help"]
    try:
        with command.make_context(program, list(asked)) as context:
            command.invoke(context)
    except typer.Exit as stop:
        return (stop.exit_code if arguments else 2), None
    except typer.Abort:
        raise KeyboardInterrupt from None
    except UsageError as error:
        return 2, f"{error}; try: {program} {context.invoked_subcommand} --help"
    except _ClickError as error:
        where = error.ctx.command_path if error.ctx else program
        return 2, f"{error.format_message().rstrip('. ')}; try: {where} --help"
    return 0, None


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Faster diffusion transformers on Hopper GPUs, by fp8 and 2:4 sparsity."""
    if version:
        say(__version__)
        raise typer.Exit


def prompts_of(file: Path | None, model: str, *, held_out: bool = False) -> list[str]:
    if file is not None:
        return read_prompts(file)

    if not model.startswith("zoo:"):
        raise UsageError("give --prompts FILE: only zoo models bring prompts of their own")

    import rtlynx_zoo as zoo
    from rtlynx_zoo import prompts

    if not zoo.draws_emoji(model.removeprefix("zoo:")):
        return prompts.fashion_prompts(len(prompts.FASHION_CLASSES) if held_out else 512)
    return prompts.demo_prompts() if held_out else prompts.calibration_prompts(512)


def device_of(asked: str | None) -> str:
    """The device that was asked for, if it can be used, else what there is."""
    import torch

    from rtlynx.models.pipelines import usable_device

    if asked is None:
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    return usable_device(asked)
