#!/usr/bin/env python3
"""Make tests/data/png.safetensors: small PNG files of every kind and what they must decode to.

    pip install pillow numpy safetensors ; tests/data/make.py

  file/NAME       U8: the PNG, written here by hand, so that every kind and filter occurs
  pixels/NAME     U8 [h,w,c]: what to expect, by formula
  source          U8 [h,w,3]: a picture; resize/WxH, fit/WxH: what Pillow makes of it
  white/NAME      U8 [h,w,3]: a picture with alpha put over white
"""
import pathlib
import random
import struct
import zlib

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

PASSES = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
          (0, 1, 1, 2)]
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def pack_row(values, depth):
    if depth == 16:
        return b"".join(struct.pack(">H", v) for v in values)
    bits = "".join(format(v, f"0{depth}b") for v in values)
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i:i + 8], 2) for i in range(0, len(bits), 8))


def filter_row(row, up, bpp, kind):
    out = bytearray([kind])
    for i, v in enumerate(row):
        a, b, c = (row[i - bpp] if i >= bpp else 0), up[i], (up[i - bpp] if i >= bpp else 0)
        nearest = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
        out.append((v - (0, a, b, (a + b) // 2, nearest)[kind]) & 255)
    return bytes(out)


def png(a, colour, depth, interlace, palette, transparency, rnd):
    h, w, s = a.shape
    raw = b""
    for x, y, dx, dy in PASSES if interlace else [(0, 0, 1, 1)]:
        up = None
        for line in a[y::dy, x::dx]:
            if not line.size:
                continue
            row = pack_row([int(v) for v in line.reshape(-1)], depth)
            raw += filter_row(row, up or bytes(len(row)), max(1, s * depth // 8), rnd.randrange(5))
            up = row
    data = zlib.compress(raw, rnd.choice([0, 1, 9]))
    out = b"\x89PNG\r\n\x1a\n"
    out += chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, interlace))
    out += chunk(b"gAMA", struct.pack(">I", 45455))
    out += chunk(b"PLTE", palette) if palette else b""
    out += chunk(b"tRNS", transparency) if transparency else b""
    half = len(data) // 2
    return out + chunk(b"IDAT", data[:half]) + chunk(b"IDAT", data[half:]) + chunk(b"IEND", b"")


def expected(a, colour, depth, palette, transparency):
    if colour == 3:
        entries = np.frombuffer(palette, np.uint8).reshape(-1, 3)
        out = entries[a[:, :, 0]]
        if transparency is None:
            return out
        alpha = np.full(len(entries), 255, np.uint8)
        alpha[:len(transparency)] = list(transparency)
        return np.concatenate([out, alpha[a]], 2)
    out = np.floor(a * 255 / (2**depth - 1) + 0.5).astype(np.uint8)
    if transparency is None:
        return out
    same = (a == np.frombuffer(transparency, ">u2")).all(2, keepdims=True)
    return np.concatenate([out, np.where(same, 0, 255).astype(np.uint8)], 2)


def resize(picture, w, h):
    """Rows first: Pillow before 13 in every case, and now in most."""
    return picture.resize((w, picture.height), Image.BILINEAR).resize((w, h), Image.BILINEAR)


def main():
    rng, rnd, out = np.random.default_rng(7), random.Random(7), {}
    for colour, depths in DEPTHS.items():
        for depth in depths:
            for interlace in (0, 1):
                for clear in (0, 1) if colour < 4 else (0,):
                    w, h = rnd.choice([(1, 1), (3, 5), (9, 7), (5, 2)])
                    palette = transparency = None
                    if colour == 3:
                        n = min(2**depth, 20)
                        a = rng.integers(0, n, (h, w, 1))
                        palette = rng.integers(0, 256, 3 * n, dtype=np.uint8).tobytes()
                        if clear:
                            transparency = rng.integers(0, 256, n // 2, dtype=np.uint8).tobytes()
                    else:
                        a = rng.integers(0, 2**depth, (h, w, SAMPLES[colour]))
                        if clear:
                            key = [int(v) for v in a[h // 2, w // 2]]
                            transparency = struct.pack(f">{len(key)}H", *key)
                    name = f"{colour}-{depth}{'i' if interlace else ''}{'t' if clear else ''}"
                    data = png(a, colour, depth, interlace, palette, transparency, rnd)
                    out["file/" + name] = np.frombuffer(data, np.uint8)
                    out["pixels/" + name] = expected(a, colour, depth, palette, transparency)
    y, x = np.mgrid[0:29, 0:43]
    source = np.stack([128 + 100 * np.sin(x / 4), 8 * y, (x * y) % 256], 2)
    source = np.clip(source + rng.normal(0, 9, source.shape), 0, 255).astype(np.uint8)
    picture = Image.fromarray(source)
    out["source"] = source
    for w, h in ((16, 16), (43, 29), (100, 7), (11, 60), (1, 1)):
        out[f"resize/{w}x{h}"] = np.asarray(resize(picture, w, h))
        bw, bh = (w, max(h, w * 29 // 43)) if w * 29 >= h * 43 else (max(w, h * 43 // 29), h)
        left, top = round((bw - w) / 2), round((bh - h) / 2)
        cut = resize(picture, bw, bh).crop((left, top, left + w, top + h))
        out[f"fit/{w}x{h}"] = np.asarray(cut)
    for name in ("6-8", "4-8"):
        p = out["pixels/" + name].astype(int)
        alpha, colours = p[..., -1:], p[..., :-1]
        white = (colours * alpha + 255 * (255 - alpha) + 127) // 255
        out["white/" + name] = np.broadcast_to(white, white.shape[:2] + (3,)).astype(np.uint8)
    out = {k: np.ascontiguousarray(v) for k, v in out.items()}
    save_file(out, pathlib.Path(__file__).with_name("png.safetensors"))


if __name__ == "__main__":
    main()
