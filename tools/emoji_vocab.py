#!/usr/bin/env python3
"""Write the tokenizer and the config files of the emoji model.

    tools/emoji.py ; tools/emoji_vocab.py        -> examples/emoji/model/
    pip install torch==2.8.0 diffusers==0.39.0 transformers==4.57.6

The vocabulary is CLIP's format (vocab.json + merges.txt), made from the words of the training
captions alone by byte-pair encoding, run until every word is one token; any other text falls
apart into known pieces and single bytes.
The configs are those of diffusers' and transformers' own classes.
"""
import argparse
import collections
import json
import pathlib

import regex
from transformers import CLIPTextConfig, CLIPTokenizer, CLIPTokenizerFast
from transformers.models.clip.tokenization_clip import bytes_to_unicode

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
START, END = "<|startoftext|>", "<|endoftext|>"


def word_merges(words):
    """Byte-pair merges (Sennrich et al. 2016) of the words, each counted once, until every word
    is one token. The most frequent pair goes first; ties go to the lexically first."""
    byte = bytes_to_unicode()
    split = []
    for word in sorted(words):
        symbols = [byte[b] for b in word.encode()]
        split.append(symbols[:-1] + [symbols[-1] + "</w>"])
    merges = []
    while True:
        pairs = collections.Counter(p for w in split for p in zip(w, w[1:]))
        if not pairs:
            return merges
        left, right = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append((left, right))
        for word in split:
            i = 0
            while i + 1 < len(word):
                if word[i] == left and word[i + 1] == right:
                    word[i:i + 2] = [left + right]
                i += 1


def save_tokenizer(folder, merges, length, pad=END):
    """Write a CLIP tokenizer folder and return both classes' reading of it."""
    folder.mkdir(parents=True, exist_ok=True)
    symbols = list(bytes_to_unicode().values())
    tokens = symbols + [s + "</w>" for s in symbols] + [a + b for a, b in merges] + [START, END]
    assert len(tokens) == len(set(tokens))
    write = lambda name, text: (folder / name).write_text(text, encoding="utf-8")
    write("vocab.json", json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
    write("merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {"bos_token": START, "eos_token": END, "pad_token": pad, "unk_token": END}
    write("special_tokens_map.json", json.dumps(special, indent=2) + "\n")
    config = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace",
              "model_max_length": length, "tokenizer_class": "CLIPTokenizer", **special}
    write("tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder), CLIPTokenizerFast.from_pretrained(folder)


def save_configs(folder, vocab, length):
    """model_index.json and one config for each part; no weights. Returns the parts."""
    from diffusers import (AutoencoderKL, PNDMScheduler, StableDiffusionPipeline,
                           UNet2DConditionModel)
    from transformers import CLIPTextModel
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 128, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1, cross_attention_dim=128, attention_head_dim=4, norm_num_groups=32)
    # scaling_factor is 1 / std of the training latents: a typical value until the VAE is trained
    vae = AutoencoderKL(
        sample_size=64, block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=16,
        latent_channels=4, scaling_factor=0.439,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=vocab, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=512, hidden_act="quick_gelu", max_position_embeddings=length,
        projection_dim=128, bos_token_id=vocab - 2, eos_token_id=vocab - 1, pad_token_id=vocab - 1))
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        skip_prk_steps=True, set_alpha_to_one=False, prediction_type="epsilon")
    scheduler.register_to_config(clip_sample=False)
    unet.save_config(folder / "unet")
    vae.save_config(folder / "vae")
    text.config.architectures, text.config.dtype = ["CLIPTextModel"], None
    text.config.save_pretrained(folder / "text_encoder")
    scheduler.save_config(folder / "scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).save_config(folder)
    return {"unet": unet, "vae": vae, "text_encoder": text}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="build/emoji", help="folder written by tools/emoji.py")
    parser.add_argument("--out", default=ROOT / "examples/emoji/model", type=pathlib.Path)
    parser.add_argument("--length", type=int, default=24, help="tokens of a prompt")
    args = parser.parse_args()
    lines = (pathlib.Path(args.data) / "train/metadata.jsonl").read_text(encoding="utf-8")
    captions = [json.loads(line)["text"] for line in lines.splitlines()]
    words = {w for c in captions for w in PATTERN.findall(c)}
    merges = word_merges(words)
    readings = save_tokenizer(args.out / "tokenizer", merges, args.length)
    for tokenizer in readings:
        bad = [w for w in words if len(tokenizer(w).input_ids) != 3]
        assert not bad, bad
        for text in ("ξένος 猫 naïve ⅔", "\x01 unseen zzz"):  # any text encodes
            assert tokenizer.unk_token_id not in tokenizer(text).input_ids[1:-1]
    longest = max(len(readings[1](c).input_ids) for c in captions)
    vocab = len(readings[0])
    print(f"{len(words)} words, {vocab} entries, longest caption {longest} tokens")
    for name, part in save_configs(args.out, vocab, args.length).items():
        print(f"{name}: {sum(p.numel() for p in part.parameters())} parameters")


if __name__ == "__main__":
    main()
