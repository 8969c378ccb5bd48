#!/usr/bin/env python3
"""Compare `sdq` with diffusers on one model folder: every module, and pictures' latents.

    tools/check_diffusers.py MODEL [--sdq build/sdq] [--schedulers pndm,ddim,...] [--steps 10]
    pip install torch==2.8.0 diffusers==0.39.0 transformers==4.57.6 safetensors==0.8.0 accelerate

Prints the relative error |sdq - diffusers| / |diffusers| of each output (Euclidean norms) and
exits with 1 if a module is off by more than 1e-4 or latents by more than 1e-3.
"""
import argparse
import pathlib
import subprocess
import sys
import tempfile

import diffusers
import torch
from safetensors.torch import load_file, save_file

PARTS = ("text", "unet", "vae-encoder", "vae-decoder")
MODULE_LIMIT, LATENT_LIMIT = 1e-4, 1e-3
SCHEDULERS = {
    "pndm": (diffusers.PNDMScheduler, {}),
    "ddim": (diffusers.DDIMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpmpp2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp2m_karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "lcm": (diffusers.LCMScheduler, {}),
}


class Check:
    """Counts the comparisons that fail."""

    def __init__(self):
        self.failed = 0

    def compare(self, name, mine, theirs, limit):
        if mine is None or mine.shape != theirs.shape:
            found = None if mine is None else tuple(mine.shape)
            return self.fail(name, f"expected shape {tuple(theirs.shape)}, found {found}")
        a, b = mine.double(), theirs.double()
        error = ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
        worst = (a - b).abs().max().item()
        good = error <= limit  # false for NaN
        self.failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {name:34} relative {error:.2e}  largest {worst:.2e}")

    def fail(self, name, why):
        self.failed += 1
        print(f"FAIL {name:34} {why}")


def run(command):
    """None, or what went wrong."""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode and f"exit status {done.returncode}: {done.stderr.strip()[-300:]}"


def module_cases(pipe, part, rng):
    """(inputs, expected outputs) of one part; NCHW, diffusers' names."""
    randn = lambda *shape: torch.randn(*shape, generator=rng)
    config, factor = pipe.unet.config, pipe.vae_scale_factor
    length = pipe.tokenizer.model_max_length
    side = config.sample_size
    if part == "text":
        ids = pipe.tokenizer(["a smiling cat", ""], padding="max_length", truncation=True,
                             return_tensors="pt").input_ids
        return {"input_ids": ids.int()}, {"last_hidden_state": pipe.text_encoder(ids)[0]}
    if part == "unet":
        inputs = {"sample": randn(2, config.in_channels, side, side),
                  "timestep": torch.tensor([981, 7], dtype=torch.int32),
                  "encoder_hidden_states": randn(2, length, config.cross_attention_dim)}
        return inputs, {"out": pipe.unet(*inputs.values()).sample}
    if part == "vae-encoder":
        image = randn(1, 3, side * factor, side * factor).clamp(-1, 1)
        posterior = pipe.vae.encode(image).latent_dist
        return {"image": image}, {"mean": posterior.mean, "logvar": posterior.logvar}
    latent = randn(1, pipe.vae.config.latent_channels, side, side)
    return {"latent": latent}, {"image": pipe.vae.decode(latent).sample}


def check_modules(check, pipe, args, folder):
    for part in args.parts.split(","):
        inputs, expected = module_cases(pipe, part, torch.Generator().manual_seed(args.seed))
        save_file(inputs, folder / "in.safetensors")
        error = run([args.sdq, "forward", args.model, "--part", part, "--in",
                     folder / "in.safetensors", "--out", folder / "out.safetensors"])
        if error:
            check.fail(part, error)
            continue
        outputs = load_file(folder / "out.safetensors")
        for name, theirs in expected.items():
            mine = outputs.get(name, outputs.get(f"{part}.{name}"))
            if mine is None and len(outputs) == 1:
                mine = next(iter(outputs.values()))
            check.compare(f"{part} {name}", mine, theirs, MODULE_LIMIT)


def check_latents(check, pipe, args, folder):
    base = pipe.scheduler.config
    for name in args.schedulers.split(","):
        kind, extra = SCHEDULERS[name]
        pipe.scheduler = kind.from_config(base, **extra)
        theirs = pipe(args.prompt, negative_prompt=args.negative, num_inference_steps=args.steps,
                      guidance_scale=args.guidance_scale, output_type="latent",
                      generator=torch.Generator().manual_seed(args.seed)).images
        error = run([args.sdq, "txt2img", "--model", args.model, "-p", args.prompt,
                     "-n", args.negative, "--steps", str(args.steps), "--guidance-scale",
                     str(args.guidance_scale), "--seed", str(args.seed), "--scheduler", name,
                     "--save-latents", folder / "latents.safetensors"])
        if error:
            check.fail(f"txt2img {name}", error)
            continue
        mine = load_file(folder / "latents.safetensors").get("latents")
        check.compare(f"txt2img {name}", mine, theirs, LATENT_LIMIT)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder in the diffusers layout")
    parser.add_argument("--sdq", default="build/sdq", help="the built command")
    parser.add_argument("--parts", default=",".join(PARTS), help="modules, or 'none'")
    parser.add_argument("--schedulers", default=",".join(SCHEDULERS), help="schedulers, or 'none'")
    parser.add_argument("--prompt", default="a smiling cat with the red heart")
    parser.add_argument("--negative", default="blue dog")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        args.model, safety_checker=None, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    check = Check()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if args.parts != "none":
            check_modules(check, pipe, args, folder)
        if args.schedulers != "none":
            check_latents(check, pipe, args, folder)
    print(f"{check.failed} failed")
    sys.exit(check.failed > 0)


if __name__ == "__main__":
    main()
