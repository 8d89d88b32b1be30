"""The card that measures: what it is, its clock and power while it works, and what the figures belong to."""

import os
import subprocess
import sys
from pathlib import Path

import torch

try:
    import pynvml
except Exception:  # missing or broken: figures without clock and power then, and the results say null
    pynvml = None

ROOT = Path(__file__).resolve().parents[2]


class Card:
    """The current CUDA device, read through NVML.

    Raises
    ------
    RuntimeError
        In one sentence, if it is no Hopper card or there is none.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("the benchmark needs a Hopper card, and torch sees no CUDA device")
        properties = torch.cuda.get_device_properties()
        if (properties.major, properties.minor) != (9, 0):
            raise RuntimeError(
                f"the benchmark needs a Hopper card (compute capability 9.0), and this is {properties.name}"
            )
        self.name: str = properties.name
        self.l2_bytes: int = properties.L2_cache_size
        self._handle = None
        if pynvml is None:
            print("no clock and power in the results: pip install nvidia-ml-py", file=sys.stderr)
            return
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        except pynvml.NVMLError as error:
            print(f"no clock and power in the results: {error}", file=sys.stderr)

    @property
    def slug(self) -> str:
        """Short name for files: "h100" of "NVIDIA H100 80GB HBM3"."""
        return card_slug(self.name)

    def sample(self) -> tuple[float | None, float | None]:
        """SM clock in MHz and power in W, now."""
        if self._handle is None:
            return None, None
        try:
            return self._readings()
        except pynvml.NVMLError:  # a reading that fails spoils no window
            return None, None

    def _readings(self) -> tuple[float | None, float | None]:
        clock = pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_SM)
        # nvmlDeviceGetPowerUsage averages over a second on Hopper: it would mix neighbouring windows.
        field = pynvml.nvmlDeviceGetFieldValues(self._handle, [pynvml.NVML_FI_DEV_POWER_INSTANT])[0]
        milliwatts = field.value.uiVal if field.nvmlReturn == pynvml.NVML_SUCCESS else None
        return float(clock), None if milliwatts is None else milliwatts / 1000

    def describe(self, commit: str | None) -> dict:
        """Card, versions and commit, as results files begin."""
        limit = driver = None
        if self._handle is not None:
            limit = pynvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1000
            driver = pynvml.nvmlSystemGetDriverVersion()
        return {
            "device": self.name,
            "power_limit_w": limit,
            "driver": driver,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "commit": commit or commit_at_hand(),
        }


def card_slug(name: str) -> str:
    words = [
        word for word in name.replace("-", " ").split() if word.lower() not in ("nvidia", "geforce", "rtx")
    ]
    return words[0].lower()


def commit_at_hand() -> str | None:
    """RTLYNX_COMMIT where the tree has no .git, else git's, marked where rtlynx/ differs from it.

    None where the package was installed: whatever repository is around it then is another one.
    """
    if os.environ.get("RTLYNX_COMMIT"):
        return os.environ["RTLYNX_COMMIT"]
    if not (ROOT / ".git").exists():
        return None
    try:
        commit = _git("rev-parse", "HEAD")
        return f"{commit}-modified" if _git("status", "--porcelain", "rtlynx") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
