#!/usr/bin/env python3
"""Draw training logs of sdq side by side: the loss by step, on a logarithmic scale.

    tools/loss_svg.py TITLE=LOG.csv [TITLE=LOG.csv ..] > loss.svg
    tools/loss_svg.py --thin N LOG.csv > SHORT.csv      one row for N: the mean of their losses
"""
import math
import sys

WIDTH, HEIGHT, LEFT, TOP, COLORS = 380, 190, 46, 26, ("#c22", "#26a", "#284", "#a52")


def read(path):
    """[(step, loss, rate, gradient norm)] of a log."""
    lines = open(path, encoding="utf-8").read().split("\n")
    rows = [line.split(",")[:4] for line in lines if line[:1].isdigit()]
    return [tuple(float(x) for x in row) for row in rows if row[1]]     # step 0 is only validated


def thin(rows, n):
    print("step,loss,rate,grad_norm")
    for i in range(0, len(rows) - n + 1, n):
        part = rows[i:i + n]
        loss, norm = (sum(r[k] for r in part) / n for k in (1, 3))
        print(f"{part[-1][0]:.0f},{loss:.6f},{part[-1][2]:.6g},{norm:.4f}")


def chart(title, rows, left, color):
    width = max(1, len(rows) // 150)        # a point is the mean of so many rows
    points = [(rows[i][0], sum(r[1] for r in rows[i:i + width]) / width)
              for i in range(0, len(rows) - width + 1, width)]
    logs = [math.log10(y) for _, y in points]
    low, high, last = min(logs), max(logs), points[-1][0]
    at = lambda x, y: (left + LEFT + (WIDTH - LEFT - 20) * x / last,
                       TOP + (HEIGHT - TOP - 24) * (high - y) / (high - low))
    line = " ".join("%.1f,%.1f" % at(x, math.log10(y)) for x, y in points)
    text = '<text x="%.0f" y="%.0f"%s>%s</text>'
    end = ' text-anchor="end"'
    return [text % (left + LEFT, 16, "", title),
            f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{line}"/>',
            text % (left + LEFT - 6, at(0, high)[1] + 4, end, f"{10 ** high:.2g}"),
            text % (left + LEFT - 6, at(0, low)[1] + 4, end, f"{10 ** low:.2g}"),
            text % (left + LEFT, HEIGHT - 6, "", "0"),
            text % (left + WIDTH - 20, HEIGHT - 6, end, f"{last:.0f} steps")]


def main():
    args = sys.argv[1:]
    if len(args) == 3 and args[0] == "--thin":
        return thin(read(args[2]), int(args[1]))
    if not args or "=" not in args[0]:
        sys.exit(__doc__)
    size = f'width="{WIDTH * len(args)}" height="{HEIGHT}"'
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" '
           f'font-size="12"><rect {size} fill="white"/>']
    for i, arg in enumerate(args):
        title, path = arg.split("=", 1)
        out += chart(title, read(path), i * WIDTH, COLORS[i % len(COLORS)])
    print("\n".join(out + ["</svg>"]))


if __name__ == "__main__":
    main()
