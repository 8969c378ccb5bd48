"""Tiny complete pipelines in the diffusers layout and what diffusers computes with them.

For tools/golden.py. Bare modules and UNet gradients are evaluated in float64 (the truth, rounded
once); txt2img runs in float32 as users run it. Weights are random but every norm and bias differs
from its neutral value, so that a forgotten one shows.
"""
import json
import shutil

import torch
from diffusers import (AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler,
                       EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, LCMScheduler,
                       PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from emoji_vocab import save_tokenizer, word_merges

WORDS = "a the red blue cat dog face heart flag of with on smiling sun moon hand woman man skin"
CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"
SCHEDULERS = {  # name: class, extra config, steps in the golden run
    "pndm": (PNDMScheduler, {}, 6),
    "ddim": (DDIMScheduler, {}, 5),
    "euler": (EulerDiscreteScheduler, {}, 5),
    "euler_a": (EulerAncestralDiscreteScheduler, {}, 5),
    "dpmpp2m": (DPMSolverMultistepScheduler, {}, 6),
    "dpmpp2m_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, 6),
    "lcm": (LCMScheduler, {}, 4),
}
# attention: which levels of the UNet have it; vae: channels per level; size: width, height of the
# txt2img picture; odd: latent height, width that no power of two divides.
MODELS = {
    "sd1-a": dict(  # the shape of SD1.5, small
        unet=dict(block_out_channels=(8, 16, 16), layers_per_block=1, attention_head_dim=2,
                  norm_num_groups=4, cross_attention_dim=32, sample_size=8),
        attention=(1, 1, 0), vae=dict(block_out_channels=(6, 12), layers_per_block=1,
                                      norm_num_groups=3, scaling_factor=0.18215),
        text=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                  intermediate_size=64, hidden_act="quick_gelu"),
        length=12, size=(16, 16), odd=(9, 7)),
    "sd1-b": dict(  # two layers per block, heads per level, no attention in the first level
        unet=dict(block_out_channels=(6, 12, 12), layers_per_block=2, attention_head_dim=(2, 2, 3),
                  norm_num_groups=3, cross_attention_dim=20, sample_size=10),
        attention=(0, 1, 1), vae=dict(block_out_channels=(8, 12, 12), layers_per_block=1,
                                      norm_num_groups=4, scaling_factor=0.439),
        text=dict(hidden_size=20, num_hidden_layers=3, num_attention_heads=4,
                  intermediate_size=52, hidden_act="quick_gelu"),
        length=11, size=(24, 40), odd=(9, 7)),
    "sd2-a": dict(  # SD2: linear projections, v prediction, erf gelu, half-precision files
        unet=dict(block_out_channels=(8, 16, 16), layers_per_block=1, attention_head_dim=(1, 2, 4),
                  norm_num_groups=4, cross_attention_dim=24, sample_size=8,
                  use_linear_projection=True),
        attention=(1, 1, 0), vae=dict(block_out_channels=(6, 12), layers_per_block=2,
                                      norm_num_groups=6, scaling_factor=0.18215),
        text=dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
                  intermediate_size=96, hidden_act="gelu"),
        length=14, size=(16, 24), odd=(7, 10), pad="!", prediction="v_prediction",
        dtype={"unet": torch.float16, "text_encoder": torch.bfloat16}),
    "bk-a": dict(  # a distilled relative: no mid block, sharded file; 3x5 latents, a 4-level VAE
        unet=dict(block_out_channels=(10, 15), layers_per_block=1, attention_head_dim=5,
                  norm_num_groups=5, cross_attention_dim=16, sample_size=4, mid_block_type=None),
        attention=(1, 1), vae=dict(block_out_channels=(4, 8, 8, 8), layers_per_block=1,
                                   norm_num_groups=2, scaling_factor=0.3),
        text=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1,
                  intermediate_size=40, hidden_act="quick_gelu"),
        length=9, size=(40, 24), odd=(5, 3), shard="100KB"),
}
PROMPTS = ("a smiling cat with the red heart, 2 dogs", "blue moon")


def randomize(module, rng):
    """Unit-gain weights, norms around 1, visible biases."""
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=rng)
        if p.dim() > 1:
            gain = 0.5 if "embedding" in name else p[0].numel() ** -0.5
            p.data = noise * gain
        else:
            p.data = 1 + 0.2 * noise if name.endswith("weight") else 0.1 * noise
    return module.eval().requires_grad_(False)


def make_pipeline(folder, spec, seed):
    """Build and save the pipeline; reload it: the files' rounding (f16, bf16) counts."""
    rng = torch.Generator().manual_seed(seed)
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer, _ = save_tokenizer(folder / "tokenizer", word_merges(WORDS.split()), spec["length"],
                                  spec.get("pad", "<|endoftext|>"))
    vocab = len(tokenizer)
    kinds = [CROSS if a else PLAIN for a in spec["attention"]]
    parts = {
        "unet": UNet2DConditionModel(
            down_block_types=tuple(k.format("Down") for k in kinds),
            up_block_types=tuple(k.format("Up") for k in kinds[::-1]), **spec["unet"]),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(spec["vae"]["block_out_channels"]),
            up_block_types=("UpDecoderBlock2D",) * len(spec["vae"]["block_out_channels"]),
            latent_channels=4, sample_size=64, **spec["vae"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(
            vocab_size=vocab, max_position_embeddings=spec["length"], bos_token_id=vocab - 2,
            eos_token_id=vocab - 1, pad_token_id=tokenizer.pad_token_id, projection_dim=16,
            **spec["text"])),
    }
    for name, part in parts.items():
        randomize(part, rng).to(spec.get("dtype", {}).get(name, torch.float32))
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        skip_prk_steps=True, set_alpha_to_one=False,
        prediction_type=spec.get("prediction", "epsilon"))
    scheduler.register_to_config(clip_sample=False)
    pipe = StableDiffusionPipeline(
        **parts, tokenizer=tokenizer, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")  # write ours again: no extra files
    save_tokenizer(folder / "tokenizer", word_merges(WORDS.split()), spec["length"],
                   spec.get("pad", "<|endoftext|>"))
    if "shard" in spec:
        (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
        parts["unet"].save_pretrained(folder / "unet", max_shard_size=spec["shard"])
    for file in folder.glob("*/*.safetensors"):  # one metadata key: the byte order is fixed
        save_file(load_file(file), file, {"format": "pt"})
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None,
                                                   torch_dtype=torch.float32)


def modules(pipe, spec, put, rng):
    """Every bare module on given inputs, in float64 (the text encoder's class has float32 only)."""
    unet, vae, text = pipe.unet.double(), pipe.vae.double(), pipe.text_encoder
    randn = lambda *shape: torch.randn(*shape, generator=rng)
    ids = pipe.tokenizer(list(PROMPTS), padding="max_length", truncation=True,
                         return_tensors="pt").input_ids
    put("text.input_ids", ids)
    put("text.last_hidden_state", text(ids).last_hidden_state)
    side = spec["unet"]["sample_size"]
    context = randn(2, spec["length"], spec["unet"]["cross_attention_dim"])
    for name, (h, w), t in (("unet", (side, side), [981, 7]), ("unet-odd", spec["odd"], [1, 520])):
        sample, t = randn(2, 4, h, w), torch.tensor(t)
        unet.requires_grad_(name == "unet")
        out = unet(sample.double(), t, context.double()).sample
        for key, value in (("sample", sample), ("timestep", t),
                           ("encoder_hidden_states", context), ("out", out)):
            put(f"{name}.{key}", value)
        if name == "unet":
            noise = randn(*sample.shape)
            loss = ((out - noise.double()) ** 2).mean()
            loss.backward()
            put("unet.noise", noise)
            put("unet.loss", loss)
            for key, p in unet.named_parameters():
                put(f"unet.grad/{key}", p.grad)
    unet.requires_grad_(False)
    factor = pipe.vae_scale_factor
    image = randn(2, 3, 4 * factor, 6 * factor).clamp(-1, 1)
    posterior = vae.encode(image.double()).latent_dist
    latent = randn(2, 4, 5, 3)
    for key, value in (("vae-encoder.image", image), ("vae-encoder.mean", posterior.mean),
                       ("vae-encoder.logvar", posterior.logvar), ("vae-decoder.latent", latent),
                       ("vae-decoder.image", vae.decode(latent.double()).sample)):
        put(key, value)
    pipe.to(torch.float32)


def txt2img(pipe, spec, put):
    """The whole pipeline to its latents for each scheduler; returns what was asked for."""
    runs, base = {}, pipe.scheduler.config
    pipe.set_progress_bar_config(disable=True)
    width, height = spec["size"]
    for number, (name, (kind, extra, steps)) in enumerate(SCHEDULERS.items()):
        pipe.scheduler = kind.from_config(base, **extra)
        run = {"prompt": PROMPTS[0], "negative_prompt": "the red flag", "width": width,
               "height": height, "steps": steps, "guidance_scale": 5.0, "seed": 40 + number,
               "scheduler": name, "tensor": f"txt2img.{name}.latents"}
        latents = pipe(run["prompt"], height, width, steps, guidance_scale=5.0,
                       negative_prompt=run["negative_prompt"], output_type="latent",
                       generator=torch.Generator().manual_seed(run["seed"])).images
        put(run["tensor"], latents)
        runs[name] = run
    pipe.scheduler = PNDMScheduler.from_config(base)
    run = {**runs["pndm"], "seed": 3, "guidance_scale": 1.0, "negative_prompt": "", "steps": 4,
           "tensor": "txt2img.image.latents", "image": "txt2img.image"}
    arguments = dict(height=height, width=width, num_inference_steps=4, guidance_scale=1.0)
    for key, kind in (("tensor", "latent"), ("image", "np")):  # NHWC in 0..1 for the image
        put(run[key], torch.as_tensor(pipe(
            run["prompt"], **arguments, output_type=kind,
            generator=torch.Generator().manual_seed(3)).images))
    runs["image"] = run
    return runs


def build(out, report=print):
    """Write models/<name>/, <name>.safetensors and <name>.json below `out`."""
    for number, (name, spec) in enumerate(MODELS.items()):
        pipe = make_pipeline(out / "models" / name, spec, 1000 + number)
        tensors = {}

        def put(key, value):
            value = value.detach()
            value = value.float() if value.is_floating_point() else value.to(torch.int32)
            tensors[key] = value.reshape(value.shape or (1,)).clone(
                memory_format=torch.contiguous_format)
        modules(pipe, spec, put, torch.Generator().manual_seed(2000 + number))
        runs = txt2img(pipe, spec, put)
        save_file(tensors, out / f"{name}.safetensors")
        (out / f"{name}.json").write_text(json.dumps(
            {"model": f"models/{name}", "txt2img": runs}, indent=1, ensure_ascii=False) + "\n")
        for key in ("unet.out", "text.last_hidden_state", "vae-decoder.image", "vae-encoder.mean",
                    "txt2img.pndm.latents", "txt2img.lcm.latents"):
            report(f"  {name} {key} {tuple(tensors[key].shape)} std {tensors[key].std():.3f}")
        grads = [v.abs().max().item() for k, v in tensors.items() if "grad/" in k]
        report(f"  {name} gradients of {len(grads)} tensors: {min(grads):.1e} .. {max(grads):.1e}")
