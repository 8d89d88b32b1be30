"""A study small enough for a test: the zoo's pipeline around a tiny transformer."""

from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import tiny_flux
from make_variant import Calibration
from measure import Study
from picture_figures import Judges
from rtlynx_zoo.pipeline import EmojiPipeline
from rtlynx_zoo.prompts import ASSETS, calibration_prompts, demo_prompts
from study_model import StudyModel

STEPS = 3
SMALL = Calibration(steps=3, recorded=1, batch_size=4, prompts=2, train_steps=2)


def tiny_study_model(**changes):
    transformer = tiny_flux(
        in_channels=48, joint_attention_dim=384, pooled_projection_dim=384, attention_head_dim=32, **changes
    )
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(ASSETS / "scheduler", local_files_only=True)
    pipeline = EmojiPipeline(transformer, scheduler)
    return StudyModel("tiny", pipeline, tuple(calibration_prompts(8)), tuple(demo_prompts(8)))


def tiny_study():
    return Study(tiny_study_model(), Judges(None, None, "not in tests"), SMALL, batch_size=4, compared=2)


class TinySetup:
    """As `jobs.Setup`, of the tiny study: what processes make it from."""

    def study(self, device):
        return tiny_study()
