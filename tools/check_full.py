#!/usr/bin/env python3
"""Compare `sdq` with diffusers at the full shapes of Stable Diffusion 1.5 and 2.1, random weights.

    tools/check_full.py WORK [--versions 1.5,2.1] [--sdq build/sdq] [--steps 4]

WORK is a folder: it receives the models sd1.5 and sd2.1 (2.1 and 2.6 GB) unless they are there,
made from --seed by tools/peers/random_sd.py. Then, as tools/check_diffusers.py does with a small
model: every network on the same random input (UNet: two samples), relative error at most 1e-4;
and the latents of a drawing with guidance from the same seed, at most 1e-3. Exits with 1 if
something is off. Needs 12 GB of memory and a few minutes per version.
"""
import argparse
import gc
import pathlib
import sys
import tempfile
import time

import diffusers
import torch

import check_diffusers
from peers import random_sd

SCHEDULER = {"1.5": "pndm", "2.1": "ddim"}      # their own


def check_version(check, version, args):
    model = args.work / f"sd{version}"
    if not (model / "model_index.json").exists():
        random_sd.write(model, version, args.model_seed, args.vocabulary)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        model, safety_checker=None, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    args.model, args.schedulers = model, SCHEDULER[version]
    print(f"Stable Diffusion {version}: {8 * pipe.unet.config.sample_size} pixels, "
          f"{pipe.scheduler.config.prediction_type}", flush=True)
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        if args.parts != "none":
            check_diffusers.check_modules(check, pipe, args, pathlib.Path(name))
        if args.steps:
            check_diffusers.check_latents(check, pipe, args, pathlib.Path(name))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--versions", default="1.5,2.1")
    parser.add_argument("--sdq", default="build/sdq", help="the built command")
    parser.add_argument("--parts", default=",".join(check_diffusers.PARTS), help="or 'none'")
    parser.add_argument("--steps", type=int, default=4, help="of the drawing; 0: none")
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--prompt", default="a photo of an astronaut riding a horse on mars")
    parser.add_argument("--negative", default="blurry")
    parser.add_argument("--seed", type=int, default=11, help="of inputs and latents")
    parser.add_argument("--model-seed", type=int, default=0, help="of the weights")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--vocabulary", type=pathlib.Path, default=random_sd.VOCAB,
                        help="CLIP's merges in the form of clip_vocab.inc")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    check, start = check_diffusers.Check(), time.time()
    for version in args.versions.split(","):
        check_version(check, version, args)
        gc.collect()
    print(f"{check.failed} failed, {time.time() - start:.0f} s")
    sys.exit(check.failed > 0)


if __name__ == "__main__":
    main()
