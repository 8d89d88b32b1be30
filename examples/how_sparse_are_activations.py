"""How much of each layer's input 2:4 keeps, layer by layer, while a pipeline draws.

The share is of the squared magnitudes. Random normal numbers would give what the last line says: the more a
layer lies above it, the less it loses.

python examples/how_sparse_are_activations.py
python examples/how_sparse_are_activations.py --model Tongyi-MAI/Z-Image-Turbo --prompt "a lynx" --steps 9
"""

import argparse

import diffusers
import rtlynx_zoo as zoo
import torch

from rtlynx.evaluate.activations import activation_energy_kept
from rtlynx.evaluate.layers import gaussian_energy_kept


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a diffusers model; without it, the small one that ships with rtlynx")
    parser.add_argument("--prompt", default="fox")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()

    if options.model:
        pipe = diffusers.DiffusionPipeline.from_pretrained(options.model, dtype=torch.bfloat16).to("cuda")
    else:
        pipe = zoo.load()

    settings = {"num_inference_steps": options.steps}
    kept = activation_energy_kept(pipe, [options.prompt], pipeline_kwargs=settings)
    for name, share in sorted(kept.items(), key=lambda item: item[1]):
        print(f"{share:.3f}  {name}")
    print(f"{gaussian_energy_kept():.3f}  independent normal numbers")


if __name__ == "__main__":
    main()
