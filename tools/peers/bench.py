#!/usr/bin/env python3
"""sdq and what users would pick instead, alternating on this machine: a table in Markdown.

    tools/peers/bench.py WORK [--model FOLDER] [--runs 5] [--threads 2] [--only int8,fp32,...]

WORK is a folder for what is made once (about 10 GB): a random Stable Diffusion 1.5 unless --model
names a diffusers folder of its shapes, OpenVINO's networks, sdq's int8 files, sdq_run.

Every program is a process of its own that stays alive. The programs of a group load and warm up,
then each round runs every one of them once. Reported are medians, and the median of sdq's time
divided by the peer's of the same round: below 1, sdq is faster; several numbers are those of sdq's
rows, in their order. Memory is what is resident of the whole process, mapped files included: the
most it ever was, loading and warming up included, and at the end. The last column is the share of
the processors that other work took meanwhile: more than a few per cent spoil the numbers.
"""
import argparse
import datetime
import importlib.metadata
import multiprocessing
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import openvino_models
import random_sd

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CFLAGS = ["-O2", "-fopenmp"]
PACKAGES = ("openvino", "nncf", "torch", "diffusers")
# Groups: what it is, then (program, threads or None for --threads); sdq's own come first.
GROUPS = {
    "int8": ("UNet evaluation, int8",
             [("sdq unet-int8", None), ("sdq unet-int8-static", None),
              ("sdq unet-int8-attention16", None), ("sdq unet-int8-static-attention16", None),
              ("sdq unet-int8-attention", None),
              ("openvino-unet-int8", None), ("openvino-unet-int8-bf16", None)]),
    "fp32": ("UNet evaluation, fp32",
             [("sdq unet-fp32", None), ("openvino-unet-fp32", None),
              ("torch-unet-fp32", None)]),
    "vae": ("VAE decode",
            [("sdq vae-fp32", None), ("sdq vae-int8", None), ("openvino-vae-fp32", None), ("torch-vae-fp32", None)]),
    "scaling": ("UNet evaluation, int8, by threads",
                [("sdq unet-int8-attention16", 1), ("sdq unet-int8-attention16", 2),
                 ("openvino-unet-int8", 1), ("openvino-unet-int8", 2)]),
    "scaling-fp32": ("UNet evaluation, fp32, by threads",
                     [("sdq unet-fp32", 1), ("sdq unet-fp32", 2),
                      ("openvino-unet-fp32", 1), ("openvino-unet-fp32", 2)]),
    "picture": ("part of a picture",
                [("sdq unet-int8-attention16", None), ("sdq unet-fp32", None),
                 ("sdq vae-fp32", None),
                 ("openvino-unet-int8", None), ("openvino-unet-fp32", None),
                 ("openvino-vae-fp32", None)]),
    "bf16": ("for orientation: the peer in bf16, which sdq does not have",
             [("sdq unet-fp32", None), ("openvino-unet-bf16", None),
              ("sdq vae-fp32", None), ("openvino-vae-bf16", None)]),
}
# A picture of 50 steps: PNDM evaluates 51 times, the first and last three in float, each time with
# the prompt and without.
EVALUATIONS, FLOATS, BRANCHES = 51, 6, 2
SHOWN = {
    "sdq unet-int8": "sdq, a range per position, attention in float",
    "sdq unet-int8-static": "sdq, static ranges, attention in float",
    "sdq unet-int8-attention16": "sdq, the default recipe (per position, attention in 16 bits)",
    "sdq unet-int8-static-attention16": "sdq, static ranges, attention in 16 bits",
    "sdq unet-int8-attention": "sdq, a range per position, attention int8",
    "sdq vae-int8": "sdq int8, VAE",
    "sdq unet-fp32": "sdq fp32",
    "sdq vae-fp32": "sdq fp32, VAE",
    "openvino-unet-int8": "OpenVINO, rest fp32",
    "openvino-unet-int8-bf16": "OpenVINO, rest bf16",
    "openvino-unet-fp32": "OpenVINO fp32",
    "openvino-unet-bf16": "OpenVINO bf16",
    "openvino-vae-fp32": "OpenVINO fp32, VAE",
    "openvino-vae-bf16": "OpenVINO bf16, VAE",
    "torch-unet-fp32": "torch fp32",
    "torch-vae-fp32": "torch fp32, VAE",
}


class Program:
    """A living process that answers a line with the seconds of a run and its memory."""

    def __init__(self, name, threads, args):
        self.name, self.threads, self.seconds, self.memory = name, threads, [], None
        is_sdq = name.startswith("sdq ")
        self.line = name.removeprefix("sdq ")
        command = [args.work / "sdq_run"] if is_sdq else [sys.executable, HERE / "peer_run.py"]
        cache = args.work / ("int8" if is_sdq else "openvino")
        self.process = subprocess.Popen(
            [*command, args.model, cache, str(threads)], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": str(threads)})

    def ask(self, line=None):
        self.process.stdin.write((line or self.line) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().split()
        if len(answer) != 3:
            sys.exit(f"{self.name}: no answer, exit status {self.process.wait()}")
        self.memory = [float(x) / 2**20 for x in answer[1:]]
        return float(answer[0])

    def close(self):
        self.process.communicate("quit\n")


def compile_c(program, source, *headers):
    newest = max(p.stat().st_mtime for p in (ROOT / "sdq.h", source, *headers))
    if not program.exists() or program.stat().st_mtime < newest:
        subprocess.run([os.environ.get("CC", "cc"), *CFLAGS, "-I", ROOT, source, "-o", program,
                        "-lm"], check=True)


def apart(function, *args):
    """In a process of its own: what is large here counts in ru_maxrss of every program started."""
    child = multiprocessing.Process(target=function, args=args)
    child.start()
    child.join()
    if child.exitcode:
        sys.exit(f"{function.__module__}.{function.__name__}: exit status {child.exitcode}")


def build(args):
    """sdq_run, the model, OpenVINO's networks and sdq's int8 files, where missing or old."""
    if args.model is None:
        args.model = args.work / "sd15"
        if not (args.model / "model_index.json").exists():
            apart(random_sd.write, args.model, "1.5", args.seed)
    apart(openvino_models.write, args.model, args.work / "openvino")
    program = args.work / "sdq_run"
    compile_c(program, HERE / "sdq_run.c")
    compile_c(args.work / "sdq", ROOT / "tools" / "sdq.c", ROOT / "tools" / "sdq_bench.h")
    (args.work / "int8").mkdir(exist_ok=True)
    for name in ("unet-int8", "unet-int8-static", "unet-int8-attention16",
                 "unet-int8-static-attention16", "unet-int8-attention"):
        path = args.work / "int8" / f"{name}.safetensors"
        if not path.exists() or path.stat().st_mtime < program.stat().st_mtime:
            maker = Program(f"sdq {name}", args.threads, args)
            maker.ask(f"make {name}")
            maker.close()


def cpu_name():
    info = dict(line.split(":", 1) for line in
                pathlib.Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in info.items()}
    known = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8")
    flags = " ".join(f for f in known if f in info.get("flags", "").split())
    return (f"{info.get('model name', platform.processor())} (family {info.get('cpu family')}, "
            f"model {info.get('model')}; {flags})")


def describe(args):
    version = lambda *cmd: subprocess.run(cmd, capture_output=True, text=True,
                                          cwd=ROOT).stdout.strip().split("\n")[0]
    packages = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)
    print(f"CPU: {cpu_name()}, {os.cpu_count()} processors; load before: {os.getloadavg()[0]:.2f}")
    print(f"Versions: {packages}, Python {platform.python_version()}, "
          f"sdq {version('git', 'describe', '--always', '--dirty')}")
    print(f"sdq: {version(os.environ.get('CC', 'cc'), '--version')}, {' '.join(CFLAGS)}")
    print(f"Shapes: Stable Diffusion 1.5, 512x512 (latent 4x64x64, text 77x768), batch 1; "
          f"{args.threads} threads, {args.runs} alternating runs after a warm-up; "
          f"{datetime.date.today()}")
    print("sdq's evaluations reuse the prompt's keys and values and the time embeddings (0.5 % of "
          "the products), as its sampler does; the peers compute them every time.\n")


def ticks(living):
    """Time of all processors, what of it was work, and what of that these programs did."""
    cpu = [int(x) for x in pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:8]]
    mine = 0
    for pid in [os.getpid()] + [p.process.pid for p in living]:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        mine += int(fields[11]) + int(fields[12])
    return sum(cpu), cpu[0] + cpu[1] + cpu[2] + cpu[5] + cpu[6], mine


def run_group(args, name):
    title, programs = GROUPS[name]
    living = [Program(p, threads or args.threads, args) for p, threads in programs]
    for p in living:
        for _ in range(2):          # load, then a run with warm caches
            p.ask()
    before = ticks(living)
    for _ in range(args.runs):
        for p in living:
            p.seconds.append(p.ask())
    total, work, mine = (b - a for a, b in zip(before, ticks(living)))
    others = f"{100 * max(0, work - mine) / max(1, total):.0f} %"
    for p in living:
        p.close()
    ours = [p for p in living if p.name.startswith("sdq ")]
    for p in living:
        ratios = []
        for o in ours:
            same = o.threads == p.threads and ("vae" in o.name) == ("vae" in p.name)
            if name == "picture":
                same = same and ("int8" in o.name) == ("int8" in p.name)
            ratio = statistics.median(a / b for a, b in zip(o.seconds, p.seconds))
            ratios.append(f"{ratio:.2f}" if same and p not in ours else "")
        low, high, (peak, last) = min(p.seconds), max(p.seconds), p.memory
        print(f"| {title} | {SHOWN[p.name]} | {p.threads} | {statistics.median(p.seconds):.2f} | "
              f"{low:.2f}-{high:.2f} | {peak:.0f} / {last:.0f} | "
              f"{' / '.join(r for r in ratios if r)} | {others} |", flush=True)
    if name == "picture":
        picture(args, living)
    if name.startswith("scaling"):
        for one, two in ((living[0], living[1]), (living[2], living[3])):
            gain = statistics.median(a / b for a, b in zip(one.seconds, two.seconds))
            print(f"| {title} | {SHOWN[one.name]}: 1 thread / 2 threads | | {gain:.2f}x | | | | |")


def picture(args, living):
    """The same loop from the measured parts of both, and what sdq takes for a real one."""
    seconds = {p.name: p.seconds for p in living}
    whole = lambda int8, fp32, vae: [
        BRANCHES * ((EVALUATIONS - FLOATS) * i + FLOATS * f) + v for i, f, v in
        zip(seconds[int8], seconds[fp32], seconds[vae])]
    ours = whole("sdq unet-int8-attention16", "sdq unet-fp32", "sdq vae-fp32")
    theirs = whole("openvino-unet-int8", "openvino-unet-fp32", "openvino-vae-fp32")
    ratio = statistics.median(a / b for a, b in zip(ours, theirs))
    title = "picture from its parts: 50 steps PNDM, guidance, k = 3, VAE fp32"
    for shown, times, r in (("sdq", ours, ""), ("OpenVINO", theirs, f"{ratio:.2f}")):
        print(f"| {title} | {shown} | {args.threads} | {statistics.median(times):.1f} | "
              f"{min(times):.1f}-{max(times):.1f} | | {r} | |", flush=True)
    seconds, peak = drawn(args)
    print(f"| picture, drawn by `sdq txt2img`: loading, text, 51 evaluations of a batch of two, VAE, "
          f"PNG | sdq | {args.threads} | {seconds:.1f} | | {peak:.0f} | | |", flush=True)


def drawn(args):
    """Seconds of a whole sdq txt2img, and its ru_maxrss in MB (2^20 bytes)."""
    out = args.work / "picture.png"
    command = [args.work / "sdq", "txt2img", "--model", args.model, "--unet",
               args.work / "int8" / "unet-int8-attention16.safetensors", "--precision", "mixed", "-k", "3",
               "--steps", "50", "-p", "a photograph of an astronaut riding a horse", "--out", out,
               "--threads", str(args.threads), "--quiet"]
    begin = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"sdq txt2img: exit status {child.returncode}")
    return time.monotonic() - begin, usage.ru_maxrss / 2**10


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--model", type=pathlib.Path, help="diffusers folder [random, in WORK]")
    parser.add_argument("--seed", type=int, default=0, help="of the random model")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, with commas")
    args = parser.parse_args()
    names = args.only.split(",")
    if args.runs < 1 or not set(names) <= set(GROUPS):
        parser.error(f"--runs is 1 or more, --only takes {','.join(GROUPS)}")
    args.work.mkdir(parents=True, exist_ok=True)
    build(args)
    describe(args)
    print("| work | program | threads | seconds | of all runs | peak / now MB | sdq / peer "
          "| other work |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        run_group(args, name)


if __name__ == "__main__":
    main()
