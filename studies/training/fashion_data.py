"""Fashion-MNIST as one archive, from the Debian package dataset-fashion-mnist; nothing is downloaded.

    apt-get install dataset-fashion-mnist
    cd studies && python -m training.fashion_data --out fashion.npz

70,000 grey pictures of clothing in ten classes (Xiao, Rasul and Vollgraf, Fashion-MNIST, 2017; MIT licence,
© Zalando SE). Two black pixels are put around each, so that patches of 4x4 tile it. The archive holds:

    pictures (60000, 32, 32, 1) uint8           labels (60000,) int64
    test_pictures (10000, 32, 32, 1) uint8      test_labels (10000,) int64
"""

import argparse
import gzip
import math
import struct
from pathlib import Path

import numpy as np
from rtlynx_zoo.pipeline import FashionPipeline
from rtlynx_zoo.prompts import FASHION_CLASSES
from rtlynx_zoo.text import FASHION_TABLE, encode_tokens
from safetensors.numpy import save_file

from rtlynx.storage.files import atomic_file

FOLDER = Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "apt-get install dataset-fashion-mnist"
UNSIGNED_BYTE = 8  # code of the type in the header of an idx file


def read_idx(file: Path) -> np.ndarray:
    """The array of unsigned bytes in a gzipped idx file (big-endian header: 0, 0, type, axes, sizes).

    Raises
    ------
    ValueError
        If it is no such file, or its size is not what its header says.
    """
    try:
        raw = gzip.decompress(file.read_bytes())
        zero, kind, axes = struct.unpack_from(">HBB", raw)
        shape = struct.unpack_from(f">{axes}I", raw, 4)
    except (OSError, EOFError, struct.error) as error:
        raise ValueError(f"{file} is no gzipped idx file ({error}): {PACKAGE} brings it") from error
    if (zero, kind) != (0, UNSIGNED_BYTE) or len(raw) != 4 + 4 * axes + math.prod(shape):
        raise ValueError(f"{file} is no idx file of bytes, or is cut off: {PACKAGE} brings it whole")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def read_part(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, 32, 32, 1) uint8 and labels (n,) int64 of "train" or "t10k".

    Raises
    ------
    ValueError
        If a file is damaged, or the two do not fit each other.
    """
    pictures = read_idx(folder / f"{name}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{name}-labels-idx1-ubyte.gz")
    if pictures.ndim != 3 or labels.shape != pictures.shape[:1] or labels.max() >= len(FASHION_CLASSES):
        raise ValueError(f"{name} in {folder}: pictures {pictures.shape}, labels {labels.shape}")
    border = (FashionPipeline.size - pictures.shape[1]) // 2
    padded = np.pad(pictures, ((0, 0), (border, border), (border, border)))
    return padded[..., None], labels.astype(np.int64)


def write_text_table(folder: Path) -> None:
    """Token states of the ten classes by MiniLM, which ship with the model."""
    states = [encode_tokens(name).numpy() for name in FASHION_CLASSES]
    lengths = np.array([len(part) for part in states])
    save_file({"tokens": np.concatenate(states), "lengths": lengths}, folder / FASHION_TABLE.name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the .npz archive to write")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the package's idx files")
    parser.add_argument("--assets", type=Path, help="also write the shipped text table into this folder")
    args = parser.parse_args()
    try:
        pictures, labels = read_part(args.folder, "train")
        test_pictures, test_labels = read_part(args.folder, "t10k")
    except ValueError as error:
        parser.error(str(error))
    with atomic_file(args.out) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file, pictures=pictures, labels=labels, test_pictures=test_pictures, test_labels=test_labels
        )
    if args.assets:
        write_text_table(args.assets)
    print(f"{args.out}: {len(labels)} pictures to train on, {len(test_labels)} of the test")


if __name__ == "__main__":
    main()
