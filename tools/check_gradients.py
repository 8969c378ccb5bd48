#!/usr/bin/env python3
"""Compare the gradient of every tensor of a whole UNet with torch: float, 512x512, checkpointing.

    cc -O2 -fopenmp -I. tools/train_full.c -o build/train_full -lm
    tools/check_gradients.py MODEL WORK [--program build/train_full] [--seed 11]

MODEL is a diffusers folder, such as the random one of tools/check_full.py; WORK receives two files
of 3.4 GB at the size of Stable Diffusion 1.5, which are removed. The loss is MSE(unet(x), target).
The bound is that of tests/test_networks.c: with a torch's gradient g of a tensor and G the largest
norm of all, |sdq - g| <= 1e-3 max(|g|, 1e-4 G). Prints the worst tensors, also by |sdq - g| / |g|
alone; exits with 1 if one is beyond the bound. Needs 12 GB of memory and about three minutes.
"""
import argparse
import pathlib
import subprocess
import sys

import diffusers
import torch
from safetensors import safe_open
from safetensors.torch import save_file

LIMIT, FLOOR = 1e-3, 1e-4


def inputs(config, seed):
    rng = torch.Generator().manual_seed(seed)
    side = config.sample_size
    shape = (1, config.in_channels, side, side)
    return {"sample": torch.randn(*shape, generator=rng),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, 77, config.cross_attention_dim, generator=rng),
            "target": torch.randn(*shape, generator=rng)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--program", default="build/train_full")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    unet = diffusers.UNet2DConditionModel.from_pretrained(args.model, subfolder="unet",
                                                          torch_dtype=torch.float32)
    x = inputs(unet.config, args.seed)
    given, made = args.work / "gradient_in.safetensors", args.work / "gradients.safetensors"
    save_file(x, given)
    subprocess.run([args.program, args.model, f"in={given}", f"gradients={made}"], check=True)
    unet.enable_gradient_checkpointing()
    unet.train()
    y = unet(x["sample"], x["timestep"], x["encoder_hidden_states"]).sample
    torch.nn.functional.mse_loss(y, x["target"]).backward()
    largest = max(p.grad.norm().item() for p in unet.parameters())
    rows = []
    with safe_open(made, "pt") as mine:
        names = set(mine.keys())
        for name, p in unet.named_parameters():
            names.discard(name)
            g = p.grad
            distance, norm = (mine.get_tensor(name) - g).norm().item(), g.norm().item()
            rows.append((distance / max(norm, FLOOR * largest), distance / max(norm, 1e-30), norm,
                         name))
    given.unlink()
    made.unlink()
    for title, key in (("by the bound", 0), ("by its own norm", 1)):
        print(f"worst {title}:")
        for row in sorted(rows, key=lambda r: -r[key])[:5]:
            print(f"  {row[key]:.2e}  |g| {row[2]:.2e}  {row[3]}")
    bad = sum(not r[0] <= LIMIT for r in rows)      # counts NaN
    close = sum(r[1] <= 1e-4 for r in rows)
    print(f"{len(rows)} tensors, largest |g| {largest:.3g}; {close} within 1e-4 of their own norm; "
          f"{bad} beyond the bound, {len(names)} that torch does not have")
    sys.exit(bool(bad or names))


if __name__ == "__main__":
    main()
