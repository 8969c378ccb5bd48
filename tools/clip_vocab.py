#!/usr/bin/env python3
"""Write tools/clip_vocab.inc, CLIP's 48,894 merges as a C initializer.

    tools/clip_vocab.py bpe_simple_vocab_16e6.txt.gz      from github.com/openai/CLIP, clip/

    static const char clip_merges[][97] = {
    #include "clip_vocab.inc"
    };
    sdq_tokenizer_create(ctx, clip_merges[0], sizeof clip_merges, NULL, &tokenizer);

Row 0 is a mark, every other row holds 16 merges: the ids of both parts, three digits of base 64
each (A-Z a-z 0-9 + /), the high one first. The rows' ends are zeros, which the reader passes over.
"""
import argparse
import gzip
import hashlib
import pathlib
import string

SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
COUNT, ROW = 48894, 16


def first_tokens():
    """The 512 tokens before the merges: GPT-2's alphabet, then the same at a word's end."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    signs = [chr(b) for b in shown] + [chr(256 + i) for i in range(len(hidden))]
    return signs + [s + "</w>" for s in signs]


def pack(merges):
    ids = {token: i for i, token in enumerate(first_tokens())}
    out = []
    for line in merges:
        left, right = line.split(" ")
        out.append("".join(DIGITS[ids[x] >> s & 63] for x in (left, right) for s in (12, 6, 0)))
        ids.setdefault(left + right, len(ids))
    assert len(ids) == 512 + len(merges), "two merges give the same token"
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("--out", default=pathlib.Path(__file__).with_name("clip_vocab.inc"),
                        type=pathlib.Path)
    args = parser.parse_args()
    merges = gzip.open(args.source).read().decode("utf-8").split("\n")[1:1 + COUNT]
    assert hashlib.sha256("\n".join(merges).encode()).hexdigest() == SHA256, "not CLIP's merges"
    packed = pack(merges)
    licence = args.source.with_name("LICENSE").read_text(encoding="utf-8").strip()
    text = ("/* CLIP's byte-pair merges, written by tools/clip_vocab.py; see there for the form.\n"
            f" * {COUNT} merges of bpe_simple_vocab_16e6.txt, github.com/openai/CLIP;\n"
            f" * sha256 of their text {SHA256}\n *\n"
            + "".join(f" * {line}".rstrip() + "\n" for line in licence.split("\n")) + " */\n"
            '"#sdq-merges-64",\n')
    for i in range(0, COUNT, ROW):
        text += '"' + "".join(packed[i:i + ROW]) + '",\n'
    args.out.write_text(text, encoding="ascii")
    print(f"{args.out}: {len(text)} bytes")


if __name__ == "__main__":
    main()
