#!/usr/bin/env python3
"""The peers' side of bench.py, with the protocol of sdq_run.c.

    tools/peers/peer_run.py MODEL CACHE THREADS

A line on stdin names a work below or says "quit"; the answer is "SECONDS PEAK_BYTES BYTES".
MODEL is a diffusers folder, CACHE what openvino_models.py made of it.
"""
import pathlib
import sys
import time

SIDE, TOKENS, CONTEXT = 64, 77, 768
OPENVINO = {  # model, precision of what is not int8
    "openvino-unet-fp32": ("unet_fp32", "f32"),
    "openvino-unet-bf16": ("unet_fp32", "bf16"),
    "openvino-unet-int8": ("unet_int8", "f32"),
    "openvino-unet-int8-bf16": ("unet_int8", "bf16"),
    "openvino-vae-fp32": ("vae_fp32", "f32"),
    "openvino-vae-bf16": ("vae_fp32", "bf16"),
}
TORCH = ("torch-unet-fp32", "torch-vae-fp32")


def resident():
    """Bytes of resident memory: the most so far, and now."""
    lines = [x.split() for x in pathlib.Path("/proc/self/status").read_text().splitlines()]
    kb = {x[0]: int(x[1]) for x in lines if x[0] in ("VmHWM:", "VmRSS:")}
    return kb["VmHWM:"] * 1024, kb["VmRSS:"] * 1024


def openvino_work(name, cache, threads):
    import numpy
    import openvino
    model, precision = OPENVINO[name]
    compiled = openvino.Core().compile_model(cache / f"{model}.xml", "CPU", {
        "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY"})
    request = compiled.create_infer_request()
    rng = numpy.random.RandomState(0)
    inputs = {0: rng.randn(1, 4, SIDE, SIDE).astype("f")}
    if "unet" in model:
        inputs[1] = numpy.array([500], compiled.input(1).element_type.to_dtype())
        inputs[2] = rng.randn(1, TOKENS, CONTEXT).astype("f")
    return lambda: request.infer(inputs)


def torch_work(name, folder, threads):
    """In the memory format that a first run finds faster, contiguous or channels_last."""
    import diffusers
    import torch
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    load = lambda kind, part: kind.from_pretrained(folder, subfolder=part,
                                                   torch_dtype=torch.float32).eval()
    latent = torch.randn(1, 4, SIDE, SIDE)
    if "unet" in name:
        net = load(diffusers.UNet2DConditionModel, "unet")
        context, at = torch.randn(1, TOKENS, CONTEXT), torch.tensor([500])
        work = lambda x: net(x, at, encoder_hidden_states=context, return_dict=False)
    else:
        net = load(diffusers.AutoencoderKL, "vae")
        work = lambda x: net.decode(x, return_dict=False)
    formats, times = (torch.contiguous_format, torch.channels_last), []
    for form in formats:
        net.to(memory_format=form)
        x = latent.contiguous(memory_format=form)
        work(x)
        start = time.perf_counter()
        work(x)
        times.append(time.perf_counter() - start)
    best = formats[times.index(min(times))]
    print(f"{name}: contiguous {times[0]:.2f} s, channels_last {times[1]:.2f} s", file=sys.stderr)
    net.to(memory_format=best)
    latent = latent.contiguous(memory_format=best)
    return lambda: work(latent)


def main():
    folder, cache, threads = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
    works = {}
    for line in sys.stdin:
        name = line.strip()
        if name == "quit":
            break
        if name not in works:
            if name not in OPENVINO and name not in TORCH:
                sys.exit(f"no such work: {name}")
            works[name] = openvino_work(name, cache, threads) if name in OPENVINO \
                else torch_work(name, folder, threads)
        start = time.perf_counter()
        works[name]()
        seconds = time.perf_counter() - start
        print(f"{seconds:.6f}", *resident(), flush=True)


if __name__ == "__main__":
    main()
