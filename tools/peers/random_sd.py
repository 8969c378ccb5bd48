#!/usr/bin/env python3
"""Write a Stable Diffusion pipeline of the exact shapes of 1.5 or 2.1 with random weights.

    tools/peers/random_sd.py FOLDER [--version 1.5|2.1] [--seed 0]

A diffusers folder with F16 safetensors (1.5: 2.1 GB) whose weights are drawn as diffusers and
transformers draw them after torch.manual_seed(SEED). Pictures of it are noise; times, memory and
the agreement of two programs are those of a trained model. The tokenizer is CLIP's, from
tools/clip_vocab.inc. For the versions of the packages see README.md.
"""
import argparse
import json
import pathlib
import re
import string
import sys

VOCAB = pathlib.Path(__file__).resolve().parents[1] / "clip_vocab.inc"
DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
SOT, EOT = "<|startoftext|>", "<|endoftext|>"
SIZE = {"1.5": 64, "2.1": 96}       # side of the latents
UNET = {
    "1.5": dict(cross_attention_dim=768, attention_head_dim=8),
    "2.1": dict(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20],
                use_linear_projection=True),
}
TEXT = {
    "1.5": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12, hidden_act="quick_gelu", projection_dim=768),
    "2.1": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23,
                num_attention_heads=16, hidden_act="gelu", projection_dim=512),
}
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                set_alpha_to_one=False, steps_offset=1)


def clip_merges(path):
    """The 48,894 merges of clip_vocab.inc as pairs, and all tokens in the order of their ids."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    signs = [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    tokens, pairs = signs + [s + "</w>" for s in signs], []
    rows = re.findall(r'^"([A-Za-z0-9+/]+)",$', path.read_text(encoding="ascii"), re.MULTILINE)
    for row in rows:
        digits = [DIGITS.index(c) for c in row]
        for i in range(0, len(digits), 6):
            a, b = (digits[k] << 12 | digits[k + 1] << 6 | digits[k + 2] for k in (i, i + 3))
            pairs.append((tokens[a], tokens[b]))
            tokens.append(tokens[a] + tokens[b])
    return pairs, tokens + [SOT, EOT]


def write_tokenizer(folder, version, vocabulary=VOCAB):
    pairs, tokens = clip_merges(vocabulary)
    pad = EOT if version == "1.5" else "!"
    folder.mkdir(parents=True, exist_ok=True)
    write = lambda name, text: (folder / name).write_text(text, encoding="utf-8")
    write("vocab.json", json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
    write("merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs))
    special = dict(bos_token=SOT, eos_token=EOT, unk_token=EOT, pad_token=pad)
    write("special_tokens_map.json", json.dumps(special))
    write("tokenizer_config.json", json.dumps(special | dict(
        tokenizer_class="CLIPTokenizer", model_max_length=77, do_lower_case=True,
        add_prefix_space=False, errors="replace")))


def networks(version, seed):
    """The three networks, each right after torch.manual_seed(seed)."""
    import diffusers
    import torch
    import transformers
    side = SIZE[version]
    make = {
        "unet": lambda: diffusers.UNet2DConditionModel(
            sample_size=side, in_channels=4, out_channels=4, layers_per_block=2,
            block_out_channels=(320, 640, 1280, 1280), **UNET[version]),
        "vae": lambda: diffusers.AutoencoderKL(
            in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512),
            layers_per_block=2, latent_channels=4, norm_num_groups=32, sample_size=8 * side,
            scaling_factor=0.18215),
        "text_encoder": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(
            vocab_size=49408, max_position_embeddings=77, layer_norm_eps=1e-5, bos_token_id=0,
            eos_token_id=2, pad_token_id=1, **TEXT[version])),
    }
    for name, build in make.items():
        torch.manual_seed(seed)
        yield name, build().eval().half()


def write(folder, version="1.5", seed=0, vocabulary=VOCAB):
    """Write the pipeline, model_index.json last: where it is, the folder is complete."""
    import diffusers
    folder = pathlib.Path(folder)
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__,
             "requires_safety_checker": False, "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {name: [None, None] for name in ("feature_extractor", "image_encoder",
                                              "safety_checker")}
    write_tokenizer(folder / "tokenizer", version, vocabulary)
    for name, network in networks(version, seed):
        network.save_pretrained(folder / name, safe_serialization=True)
        module = "transformers" if name == "text_encoder" else "diffusers"
        index[name] = [module, type(network).__name__]
    if version == "1.5":
        scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, **SCHEDULE)
    else:
        scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False,
                                            **SCHEDULE)
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--version", choices=SIZE, default="1.5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=pathlib.Path, default=VOCAB,
                        help="clip_vocab.inc, CLIP's merges")
    args = parser.parse_args()
    if (args.folder / "model_index.json").exists():
        sys.exit(f"{args.folder}: there is a pipeline already")
    write(args.folder, args.version, args.seed, args.vocabulary)


if __name__ == "__main__":
    main()
