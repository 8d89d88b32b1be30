"""Make a pipeline sparse at once, without calibration, and draw the same picture before and after.

python examples/sparsify_a_pipeline.py                           the small model that ships with rtlynx
python examples/sparsify_a_pipeline.py --model black-forest-labs/FLUX.1-dev --prompt "a lynx in the snow"
"""

import argparse

import diffusers
import rtlynx_zoo as zoo
import torch

import rtlynx


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a diffusers model; without it, the small one that ships with rtlynx")
    parser.add_argument("--prompt", default="hot dog")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()

    if options.model:
        pipe = diffusers.DiffusionPipeline.from_pretrained(options.model, dtype=torch.bfloat16).to("cuda")
    else:
        pipe = zoo.load()

    def draw(file: str) -> None:
        seed = torch.Generator().manual_seed(0)
        picture = pipe(options.prompt, num_inference_steps=options.steps, generator=seed).images[0]
        picture.save(file)
        print("wrote", file)

    draw("dense.png")
    rtlynx.sparsify(pipe)  # 2:4 with norm compensation, text stream dense
    layers = [m for m in pipe.transformer.modules() if isinstance(m, rtlynx.SparseLinear)]
    print(f"{len(layers)} layers are sparse")
    draw("sparse.png")
    rtlynx.densify(pipe)  # and back: no weight was changed


if __name__ == "__main__":
    main()
