"""Draw the dense pictures that ship with a model: `cd studies && python -m training.dense_pictures`.

`rtlynx demo` compares with them and need not draw them. To be made again whenever the model is.
"""

import argparse

import rtlynx_zoo as zoo
from rtlynx_zoo import dense
from rtlynx_zoo.prompts import demo_prompts

from rtlynx.evaluate import sample_pictures
from rtlynx.evaluate.demo import GUIDANCE, IMAGES, MODEL, STEPS, sampling

SEED = 0


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    prompts = demo_prompts(IMAGES)
    pictures = sample_pictures(zoo.load(MODEL), prompts, **sampling(STEPS, SEED))
    settings = {"seed": SEED, "steps": STEPS, "guidance": GUIDANCE}
    dense.write(zoo.folder(MODEL), pictures, prompts, settings)


if __name__ == "__main__":
    main()
