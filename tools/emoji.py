#!/usr/bin/env python3
"""Draw the emoji data set: one 64x64 picture and one caption for each emoji.

    apt-get install fonts-noto-color-emoji unicode-data ; pip install pillow
    tools/emoji.py [OUT]              all pictures (default folder build/emoji)
    tools/emoji.py --subset [DIR]     the small set that is kept in examples/emoji/data

The folder gets train/, val_comp/ and val_novel/ with NNNN.png (NNNN = line of splits.tsv) and
metadata.jsonl: {"file_name", "text": lower-case name, "weight": 1 / number of skin tone variants
of the same concept in that folder}. Drawing samples with this weight gives every concept the same
chance. val_comp holds new combinations of known words, val_novel concepts never seen in training.
"""
import argparse
import collections
import json
import pathlib
import subprocess

from PIL import Image, ImageDraw, ImageFont

ROOT = pathlib.Path(__file__).resolve().parent.parent
SPLITS = ("train", "val_comp", "val_novel")
# Training pictures of the subset: single objects per group of emoji-test.txt, then whole families of
# tones: 498, as many as there are held-out names.
QUOTA = {"Smileys & Emotion": 80, "Animals & Nature": 60, "Food & Drink": 50, "Travel & Places": 50,
         "Activities": 25, "Objects": 50, "Symbols": 23, "Flags": 25, "People & Body": 15}
FAMILIES = 20

LICENSE = """The pictures in this folder are drawn by tools/emoji.py.

Pictures: Noto Color Emoji, Copyright Google Inc. and contributors,
  https://github.com/googlefonts/noto-emoji, SIL Open Font License 1.1
  (https://openfontlicense.org). Flags: public domain or otherwise exempt
  from copyright, as the font's authors state.
Captions: CLDR short names in emoji-test.txt of the Unicode Emoji data,
  Copyright Unicode, Inc., Unicode License (https://www.unicode.org/license.txt).
"""


def packaged(package, name):
    """Path of the file `name` of an installed Debian package."""
    paths = subprocess.check_output(["dpkg", "-L", package], text=True).split("\n")
    return next(p for p in paths if p.endswith("/" + name))


def base(name):
    """The concept of a name: all but its skin tones. 'man: dark skin tone, bald' -> 'man: bald'."""
    head, _, tail = name.partition(": ")
    rest = [p for p in tail.split(", ") if p and not p.endswith("skin tone")]
    return head + (": " + ", ".join(rest) if rest else "")


def read_names(emoji_test, splits):
    """[(number, split, name, text, group)] in the order of splits.tsv."""
    text, group, current = {}, {}, ""
    for line in open(emoji_test, encoding="utf-8"):
        if line.startswith("# group:"):
            current = line[8:].strip()
        elif "; fully-qualified" in line:
            codes, comment = line.split(";")[0], line.split("#", 1)[1]
            name = comment.split(maxsplit=2)[2].strip()
            text[name] = "".join(chr(int(c, 16)) for c in codes.split())
            group[name] = current
    rows = [line.rstrip("\n").split("\t") for line in open(splits, encoding="utf-8")][1:]
    return [(i, s, n, text[n], group[n]) for i, (s, n) in enumerate(rows)]


def draw(font, text):
    """The ink of every glyph lies in a 128x128 box; keep 140x140 around it, reduce to 64x64."""
    image = Image.new("RGB", (160, 160), "white")
    ImageDraw.Draw(image).text((12, 12), text, font=font, embedded_color=True)
    return image.crop((10, 6, 150, 146)).resize((64, 64), Image.LANCZOS)


def spread(items, count):
    """`count` of the items, evenly spaced."""
    return [items[i * len(items) // count] for i in range(min(count, len(items)))]


def choose(rows):
    """The subset: single concepts of every group, whole families of tones, all held-out names."""
    train = [r for r in rows if r[1] == "train"]
    family = collections.defaultdict(list)
    for r in train:
        family[base(r[2])].append(r)
    chosen = []
    for group, quota in QUOTA.items():
        single = [r for r in train if r[4] == group and len(family[base(r[2])]) == 1]
        chosen += spread(single, quota)
    toned = [f for f in family.values() if len(f) == 6]
    chosen += [r for f in spread(toned, FAMILIES) for r in f]
    chosen += [r for r in rows if r[1] != "train"]
    return sorted(chosen)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", default="build/emoji", help="output folder")
    parser.add_argument("--subset", nargs="?", const=str(ROOT / "examples/emoji/data"),
                        metavar="DIR", help="write only the small set, to DIR")
    parser.add_argument("--splits", default=ROOT / "examples/emoji/splits.tsv")
    parser.add_argument("--font", help="NotoColorEmoji.ttf (default: Debian's)")
    parser.add_argument("--names", help="emoji-test.txt (default: Debian's)")
    args = parser.parse_args()
    font = args.font or packaged("fonts-noto-color-emoji", "NotoColorEmoji.ttf")
    font = ImageFont.truetype(font, 109)  # its only size
    rows = read_names(args.names or packaged("unicode-data", "emoji-test.txt"), args.splits)
    out = pathlib.Path(args.subset or args.out)
    rows = choose(rows) if args.subset else rows
    for split in SPLITS:
        part = [r for r in rows if r[1] == split]
        variants = collections.Counter(base(r[2]) for r in part)
        folder = out / split
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.png"):
            old.unlink()
        with open(folder / "metadata.jsonl", "w", encoding="utf-8") as meta:
            for number, _, name, text, _ in part:
                file_name = f"{number:04d}.png"
                draw(font, text).save(folder / file_name, optimize=True)
                line = {"file_name": file_name, "text": name.lower(),
                        "weight": round(1 / variants[base(name)], 6)}
                meta.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(f"{folder}: {len(part)} pictures, {len(variants)} concepts")
    (out / "LICENSE.txt").write_text(LICENSE)


if __name__ == "__main__":
    main()
