#!/usr/bin/env python3
"""Write the golden files of the tests, tests/golden/, with torch, diffusers and transformers.

    pip install torch==2.8.0 diffusers==0.39.0 transformers==4.57.6 safetensors==0.8.0 accelerate
    tools/golden.py [--only ops,models,schedulers,random,tokenizer] [--out DIR]
                    [--clip-bpe bpe_simple_vocab_16e6.txt.gz]

Seeds are fixed: another run on the same kind of CPU gives the same bytes. Names and layouts are in
tests/golden/README.md; manifest.json has the versions and the sha256 of every file. The tokenizer
part needs CLIP's merges (openai/CLIP, clip/bpe_simple_vocab_16e6.txt.gz); without them
tokenizer.json stays as it is.
"""
import argparse
import gzip
import hashlib
import importlib.metadata
import json
import math
import pathlib
import platform
import tempfile

import torch
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
PARTS = ("ops", "models", "schedulers", "random", "tokenizer")
PACKAGES = ("torch", "diffusers", "transformers", "tokenizers", "safetensors", "numpy")
SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
          skip_prk_steps=True, set_alpha_to_one=False)


def write_ops(out, _):
    import golden_ops
    save_file(golden_ops.build(), out / "ops.safetensors")


def write_models(out, _):
    import diffusers
    import golden_models
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    golden_models.build(out)


def trajectory(scheduler, steps, noise, fixed, seed):
    """All tensors of one run whose model is out = 0.25 * scaled input + 0.05 * fixed."""
    scheduler.set_timesteps(steps)
    rng = torch.Generator().manual_seed(seed)
    sample, samples = noise * scheduler.init_noise_sigma, []
    extra = {} if type(scheduler).__name__ in ("PNDMScheduler",) else {"generator": rng}
    for t in scheduler.timesteps:
        out = 0.25 * scheduler.scale_model_input(sample, t) + 0.05 * fixed
        sample = scheduler.step(out, t, sample, **extra).prev_sample
        samples.append(sample)
    result = {"timesteps": scheduler.timesteps.float(), "samples": torch.cat(samples),
              "init_noise_sigma": torch.tensor([float(scheduler.init_noise_sigma)])}
    if getattr(scheduler, "sigmas", None) is not None:
        result["sigmas"] = scheduler.sigmas.float().clone()
    return result


def write_schedulers(out, _):
    import diffusers
    import golden_models
    diffusers.logging.set_verbosity_error()  # schedulers warn about each other's config keys
    rng = torch.Generator().manual_seed(77)
    randn = lambda *shape: torch.randn(*shape, generator=rng)
    noise, fixed = randn(1, 4, 5, 3), randn(1, 4, 5, 3)
    tensors, runs = {"noise": noise, "fixed": fixed}, []
    for name, (kind, extra, _steps) in golden_models.SCHEDULERS.items():
        for prediction, spacing in (("epsilon", "leading"), ("epsilon", "linspace"),
                                    ("epsilon", "trailing"), ("v_prediction", "leading")):
            if name == "lcm" and spacing != "leading":
                continue  # it has its own timesteps
            for steps in (4, 10, 20, 25, 50):
                base = diffusers.PNDMScheduler(prediction_type=prediction, timestep_spacing=spacing,
                                               **SD)
                base.register_to_config(clip_sample=False)
                scheduler = kind.from_config(base.config, **extra)
                run = f"{name}/{prediction}/{spacing}/{steps}"
                for key, value in trajectory(scheduler, steps, noise, fixed, 7).items():
                    tensors[f"{run}/{key}"] = value
                runs.append({"name": run, "scheduler": name, "prediction": prediction,
                             "spacing": spacing, "steps": steps, "seed": 7,
                             "evaluations": len(scheduler.timesteps)})
    ddpm = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012,
                                   beta_schedule="scaled_linear")
    x, e, t = randn(5, 4, 3, 2), randn(5, 4, 3, 2), torch.tensor([0, 1, 499, 981, 999])
    tensors.update({"alphas_cumprod": ddpm.alphas_cumprod, "betas": ddpm.betas,
                    "add_noise/x": x, "add_noise/noise": e, "add_noise/t": t.int(),
                    "add_noise/y": ddpm.add_noise(x, e, t),
                    "add_noise/velocity": ddpm.get_velocity(x, e, t)})
    save_file({k: v.contiguous() for k, v in tensors.items()}, out / "schedulers.safetensors")
    note = "model output = 0.25 * scale_model_input(sample) + 0.05 * fixed; sample = noise * init"
    (out / "schedulers.json").write_text(json.dumps({"note": note, "runs": runs}, indent=1) + "\n")


def philox(seed, count, offset):
    """Normals of torch's CUDA stream: Philox4x32-10 of (offset, 0, i, 0), sine of Box-Muller."""
    values = []
    for i in range(count):
        c, k = [offset, 0, i, 0], [seed & 0xffffffff, seed >> 32]
        for _ in range(10):
            a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(b >> 32) ^ c[1] ^ k[0], b & 0xffffffff, (a >> 32) ^ c[3] ^ k[1], a & 0xffffffff]
            k = [(k[0] + 0x9E3779B9) & 0xffffffff, (k[1] + 0xBB67AE85) & 0xffffffff]
        u = c[0] * 2.0 ** -32 + 2.0 ** -33
        v = (c[1] * 2.0 ** -32 + 2.0 ** -33) * 2 * math.pi
        values.append(math.sqrt(-2 * math.log(u)) * math.sin(v))
    return torch.tensor(values, dtype=torch.float32)


def write_random(out, _):
    tensors = {}
    for seed in (0, 42, 123456789, 2 ** 32 + 5, 2 ** 64 - 1):
        signed = seed - 2 ** 64 if seed >= 2 ** 63 else seed
        for n in (1, 3, 15, 16, 17, 31, 33, 1000):
            fresh = lambda: torch.Generator().manual_seed(signed)
            tensors[f"randn/{seed}/{n}"] = torch.randn(n, generator=fresh())
            tensors[f"rand/{seed}/{n}"] = torch.rand(n, generator=fresh())
            tensors[f"randint1000/{seed}/{n}"] = torch.randint(1000, (n,), generator=fresh()).int()
        rng = torch.Generator().manual_seed(signed)  # one stream: odd lengths cache a normal
        for i, n in enumerate((3, 1, 17, 2, 60, 5, 1, 16, 1)):
            tensors[f"stream/{seed}/{i}"] = torch.randn(n, generator=rng)
    for seed, offset in ((0, 0), (0, 1), (42, 0), (2 ** 33 + 9, 3)):
        tensors[f"philox/{seed}/{offset}"] = philox(seed, 19, offset)
    known = torch.tensor([-0.92466249, -0.42534395, -2.6438458, 0.14518386, -0.1208665])
    first = tensors["philox/0/0"]  # as published for torch on CUDA
    assert torch.allclose(first[:5], known, atol=2e-6) and abs(first[11] - 2.26550495) < 2e-6
    save_file(tensors, out / "random.safetensors")


TEXTS = [  # the texts of the first lines have published ids; see KNOWN
    "a photo of an astronaut riding a horse on mars", "a lovely cat",
    "don't   STOP!! 4k, 1920x1080",
    "a café in São Paulo", "a 🐱 cat", "日本の桜", "ﬁne Ⅳ İstanbul ß", "l’été 100%", "Привет мир",
    "The Milky Way lies in the sky, with the golden snow mountain lies below, high definition",
    # space, case, punctuation
    "", " ", "\t\n\r ", "  two   spaces\tand\ttabs\n", "A", "a.", "...", "!!!???", "a,b;c:d",
    "UPPER lower MiXeD", "I'm we've they'll he'd it's you're can't", "I’m we’ve ‘quoted’",
    "'s 't 'x", "DON'T I'LL YOU'RE", "rock'n'roll", "snake_case kebab-case a/b\\c",
    "e-mail@x.org #1",
    "(((best quality))), [bad]", "50% off: $3.99 + £2 = €5", "<|startoftext|>", "a <|endoftext|> b",
    "<|ENDOFTEXT|>", "<start> <|x|>", "a\u00a0b", "a\u2003b\u3000c\u2028d",
    "zero\u200bwidth\u200djoin",
    "\ufeffbom", "soft\u00adhyphen", "nul\x01\x02 bell\x07", "del\x7f\x85next", "\x1f\x1c\x0b\x0c",
    # letters and marks
    "cafe\u0301 A\u030a n\u0303", "e\u0301\u0323 q\u0307\u0323", "ΣΊΣΥΦΟΣ ΟΔΟΣ Σ ΑΣ.", "σς ΑΣΑ",
    "İI ıi İİ", "STRASSE Straße ẞ", "ǅ ǈ Ǌ ǲ", "Ω Å K Å", "ﬀ ﬃ ﬆ", "naïve œuvre Æsir þorn",
    "Zażółć gęślą jaźń", "Tiếng Việt đẹp", "ไทย สวัสดี", "नमस्ते दुनिया", "हिन्दी क्षत्रिय",
    "مرحبا بالعالم",
    "שלום עולם", "שׁ\u05b8לוֹם", "안녕하세요 세계", "\u1112\u1161\u11ab", "가나", "你好，世界！", "漢字かなカナ",
    "ｆｕｌｌ ｗｉｄｔｈ １２３", "𝒜𝔅ℂ 𝟘𝟙", "𐐀𐐨 Ꭰꭰ Ꙃꙃ", "\u1e9e\u0130\u0345", "ΐ ΰ ᾳ ᾼ",
    # digits and symbols
    "x² y³ ½ ¾ ⅔", "Ⅰ Ⅱ ⅻ ↂ", "①②③ ㊿ 🄁", "٠١٢ ०१२ 五", "12345 3.14 1e-5", "a1b2c3", "→ ↔ ⇒ ∀x∈ℝ",
    "©®™ §¶",
    # emoji
    "🐱", "👩‍🚀", "👍🏽 👋🏿", "🏳️‍🌈 🇩🇪🇫🇷", "1️⃣ #️⃣", "❤️ ❤ ☺︎", "👨‍👩‍👧‍👦 family", "🫠🪿🫨",
    "cat🐱dog", "woman astronaut: medium-light skin tone", "kiss: woman, man, dark skin tone",
    "flag: curaçao", "keycap: 10", "japanese “open for business” button", "piñata", "zzyzx qwrtp",
    "\U0010ffff \ue000", "a" * 100, "word " * 90, "é" * 40, "🐱" * 50,
    "supercalifragilisticexpialidocious",
    "ab" * 300,
]
KNOWN = {0: [320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496], 1: [320, 2165, 2368],
         2: [847, 713, 1691, 748, 275, 330, 267, 272, 280, 273, 271, 343, 272, 271, 279, 271],
         3: [320, 15304, 530, 45911, 21628], 4: [320, 22979, 2368],
         5: [39121, 44353, 21575, 162, 94, 506],
         6: [171, 105, 223, 1422, 158, 227, 367, 328, 16384, 11231, 127, 509],
         7: [331, 728, 503, 3459, 39694, 272, 271, 271, 260],
         8: [26302, 16370, 29503, 110, 22176, 141, 480, 38018, 16701, 141, 478],
         9: [518, 21120, 923, 3205, 530, 518, 2390, 267, 593, 518, 3878, 2583, 3965, 3205, 3788,
             267, 1400, 11405]}


def write_tokenizer(out, args):
    import transformers
    from emoji_vocab import save_tokenizer
    if not args.clip_bpe:
        return print("  no --clip-bpe: tokenizer.json kept")
    transformers.logging.set_verbosity_error()  # texts longer than the model
    body = gzip.open(args.clip_bpe, "rt", encoding="utf-8").read().split("\n")[1:48895]
    with tempfile.TemporaryDirectory() as folder:
        _, clip = save_tokenizer(pathlib.Path(folder), [tuple(m.split()) for m in body], 77)
    emoji = transformers.CLIPTokenizerFast.from_pretrained(ROOT / "examples/emoji/model/tokenizer")
    cases = []
    for text in TEXTS:
        case = {"text": text}
        for key, tokenizer in (("clip", clip), ("emoji", emoji)):
            case[key] = tokenizer(text, add_special_tokens=False).input_ids
            case[key + "_padded"] = tokenizer(text, padding="max_length", truncation=True).input_ids
        cases.append(case)
    for i, ids in KNOWN.items():
        assert cases[i]["clip"] == ids, TEXTS[i]
    lines = ",\n".join(json.dumps(c) for c in cases)
    sha = hashlib.sha256("\n".join(body).encode()).hexdigest()
    (out / "tokenizer.json").write_text(
        f'{{"clip_merges_sha256": "{sha}",\n"cases": [\n{lines}\n]}}\n')
    print(f"  {len(cases)} texts, merges {sha}")


def write_manifest(out):
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)  # save_file writes 0600
    digest = lambda f: hashlib.sha256(f.read_bytes()).hexdigest()
    files = sorted(f for f in out.rglob("*") if f.is_file() and f.name != "manifest.json")
    manifest = {
        "generator": "tools/golden.py", "python": platform.python_version(),
        "packages": {p: importlib.metadata.version(p) for p in PACKAGES},
        "seeds": "fixed in tools/golden*.py",
        "files": {f.relative_to(out).as_posix(): {"bytes": f.stat().st_size, "sha256": digest(f)}
                  for f in files if f.name != "README.md"},
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{len(files)} files, {sum(f.stat().st_size for f in files)} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "tests/golden")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to write, by commas")
    parser.add_argument("--clip-bpe", help="bpe_simple_vocab_16e6.txt.gz of openai/CLIP")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.only.split(","):
        print(part)
        globals()[f"write_{part}"](args.out, args)
    write_manifest(args.out)


if __name__ == "__main__":
    main()
