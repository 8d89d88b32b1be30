"""Every pipeline of diffusers that is built in small; docs/supported_models.py says which calibrate."""

from controlnet_pipelines import CONTROLNET_PIPELINES
from edit_pipelines import EDIT_PIPELINES
from flux_pipelines import FLUX_PIPELINES
from image_pipelines import IMAGE_PIPELINES
from video_pipelines import VIDEO_PIPELINES

PIPELINES = {**FLUX_PIPELINES, **IMAGE_PIPELINES, **VIDEO_PIPELINES, **EDIT_PIPELINES, **CONTROLNET_PIPELINES}
