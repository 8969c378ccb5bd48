#!/usr/bin/env python3
"""A training step of a whole Stable Diffusion 1.5 UNet at 512x512: torch and sdq, taking turns.

    VENV/bin/python tools/peers/train.py WORK [--runs 3] [--steps 2] [--options "recipe=static"]

WORK is the folder of bench.py: the random model WORK/sd15 is made unless it is there. Both sides
do quantization-aware training with distillation: a float teacher, a student whose convolutions
and linear layers are fake-quantized (torch: static input ranges and a scale per output channel),
with activation checkpointing, MSE to the teacher and to the noise, clipping, AdamW. Neither fits
beside the other into 24 GB, so every run is a process of its own, one after the other: a step to
warm up, then --steps that count. Prints the median seconds of each part, and the peak of memory.
"""
import argparse
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PARTS = ("teacher", "forward", "backward", "optimizer", "total")


def torch_steps(folder, steps, threads):
    """The peer's side, in a process of its own."""
    import copy
    import diffusers
    import torch
    from torch import nn
    from torch.nn import functional
    torch.set_num_threads(threads)
    torch.manual_seed(0)

    def fake_input(x):
        return torch.fake_quantize_per_tensor_affine(x, 0.05, 128, 0, 255)

    def fake_weight(w):
        scale = w.detach().abs().amax(dim=tuple(range(1, w.dim()))) / 127.5 + 1e-12
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(w, scale, zero, 0, -128, 127)

    student = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet",
                                                             torch_dtype=torch.float32)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    student.enable_gradient_checkpointing()
    student.train()
    for layer in student.modules():
        if isinstance(layer, nn.Linear):
            layer.forward = lambda x, l=layer: functional.linear(
                fake_input(x), fake_weight(l.weight), l.bias)
        elif isinstance(layer, nn.Conv2d):
            layer.forward = lambda x, l=layer: functional.conv2d(
                fake_input(x), fake_weight(l.weight), l.bias, l.stride, l.padding)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, foreach=False)
    x, noise = torch.randn(1, 4, 64, 64), torch.randn(1, 4, 64, 64)
    context, at = torch.randn(1, 77, 768), torch.tensor([500])
    for step in range(1, steps + 1):
        marks = [time.perf_counter()]
        with torch.no_grad():
            target = teacher(x, at, encoder_hidden_states=context).sample
        marks.append(time.perf_counter())
        y = student(x, at, encoder_hidden_states=context).sample
        loss = functional.mse_loss(y, noise) + functional.mse_loss(y, target)
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(time.perf_counter())
        times = [b - a for a, b in zip(marks, marks[1:])] + [marks[-1] - marks[0]]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"step {step}:", " ".join(f"{n} {t:.2f}" for n, t in zip(PARTS, times)),
              f"loss {loss.item():.6f} norm {norm.item():.4f} peak {peak:.2f} GiB", flush=True)


def measure(command):
    """Seconds of the parts of every step but the first, and the peak of memory in GiB."""
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, text=True)
    steps = []
    for line in process.stdout:
        print("   ", line, end="", file=sys.stderr)
        found = dict(re.findall(r"(\w+) ([\d.]+)", line.partition(":")[2]))
        if line.startswith("step"):
            steps.append({k: float(v) for k, v in found.items()})
    if process.wait() != 0 or len(steps) < 2:
        sys.exit(f"{command[0]} failed: status {process.returncode}, {len(steps)} steps")
    return steps[1:], max(s["peak"] for s in steps)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--runs", type=int, default=3, help="processes of each side")
    parser.add_argument("--steps", type=int, default=2, help="that count, of a process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--options", default="recipe=static", help="of tools/train_full.c")
    parser.add_argument("--only", choices=("torch", "sdq"), help="one side alone")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    model = args.work / "sd15"
    if args.peer:
        return torch_steps(model, args.steps + 1, args.threads)
    if not (model / "model_index.json").exists():
        import random_sd
        random_sd.write(model, "1.5", 0)
    program = args.work / "train_full"
    subprocess.run(["cc", "-O2", "-fopenmp", "-I", ROOT, ROOT / "tools/train_full.c", "-o",
                    program, "-lm"], check=True)
    commands = {
        "torch": [sys.executable, __file__, args.work, "--peer", "--steps", args.steps,
                  "--threads", args.threads],
        "sdq": [program, model, f"steps={args.steps + 1}", f"threads={args.threads}",
                *args.options.split()],
    }
    results = {name: [] for name in commands if args.only in (None, name)}
    peaks = dict.fromkeys(results, 0.0)
    for run in range(args.runs):
        for name in results:
            print(f"run {run + 1}, {name}", file=sys.stderr)
            steps, peak = measure(commands[name])
            results[name] += steps
            peaks[name] = max(peaks[name], peak)
    print("| program | " + " | ".join(PARTS) + " | of all steps | peak GiB |")
    print("|---|" + "---|" * (len(PARTS) + 2))
    for name, steps in results.items():
        totals = [s["total"] for s in steps]
        print(f"| {name} | " + " | ".join(f"{statistics.median(s[p] for s in steps):.2f}"
                                          for p in PARTS)
              + f" | {min(totals):.2f}-{max(totals):.2f} | {peaks[name]:.2f} |")
    if len(results) == 2:
        ratios = [a["total"] / b["total"] for a, b in zip(results["torch"], results["sdq"])]
        print(f"\ntorch / sdq: {statistics.median(ratios):.2f} (of {len(ratios)} pairs "
              f"{min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()
