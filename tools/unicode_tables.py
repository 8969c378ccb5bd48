#!/usr/bin/env python3
"""Make the Unicode tables of sdq.h's tokenizer section.

    apt-get install unicode-data
    tools/unicode_tables.py                 print the tables
    tools/unicode_tables.py --into sdq.h    replace them between their two mark lines

Four lists of integers, delta and run-length coded; >>tokenizer in sdq.h reads them.
  class   runs from U+0000 on: length * 4 + (0 other, 1 letter \\p{L}, 2 number \\p{N}, 3 space)
  ccc     runs of equal canonical combining class: gap since the last run, length, class
  lower   runs of lower-casing: gap, count, step, lower - code
  decomp  canonical decompositions, one level: gap, n, then n times (first - the last one
          in this run, second):
          second is 0 for a singleton, else 1 + an index into the marks, negated where composing
          is excluded; n < 0: -n singletons, the second left out. A list of marks stands before.
"""
import argparse
import pathlib

BEGIN = "/* unicode tables: begin (tools/unicode_tables.py) */"
END = "/* unicode tables: end */"


def ranges(line):
    """'0041..005A ; X' -> range"""
    first, _, last = line.split(";")[0].strip().partition("..")
    return range(int(first, 16), int(last or first, 16) + 1)


def read_data(folder):
    """code -> (category, ccc, decomposition, lower) of every assigned code point."""
    data, first = {}, 0
    for line in open(folder / "UnicodeData.txt", encoding="ascii"):
        f = line.rstrip("\n").split(";")
        code = int(f[0], 16)
        decomp = [int(c, 16) for c in f[5].split()] if f[5] and f[5][0] != "<" else []
        row = f[2], int(f[3]), decomp, int(f[13], 16) if f[13] else code
        if f[1].endswith(", First>"):
            first = code
        for c in range(first if f[1].endswith(", Last>") else code, code + 1):
            data[c] = row if c == code else (*row[:3], c)
    return data


def read_property(path, name):
    codes = set()
    for line in open(path, encoding="utf-8"):
        line = line.split("#")[0]
        if ";" in line and line.split(";")[1].strip() == name:
            codes.update(ranges(line))
    return codes


def class_runs(data, spaces):
    kind = [0] * 0x110000
    for code, row in data.items():
        kind[code] = {"L": 1, "N": 2}.get(row[0][0], 0)
    for code in spaces:
        kind[code] = 3
    out, start = [], 0
    for code in range(1, 0x110001):
        if code == 0x110000 or kind[code] != kind[start]:
            out.append((code - start) * 4 + kind[start])
            start = code
    return out


def ccc_runs(data):
    out, at = [], 0
    codes = sorted(c for c, row in data.items() if row[1])
    while codes:
        start, n = codes[0], 1
        while n < len(codes) and codes[n] == start + n and data[codes[n]][1] == data[start][1]:
            n += 1
        out += [start - at, n, data[start][1]]
        at, codes = start + n, codes[n:]
    return out


def lower_runs(data):
    out, at = [], 0
    codes = sorted(c for c, row in data.items() if row[3] != c)
    delta = {c: data[c][3] - c for c in codes}
    while codes:
        start, best = codes[0], (1, 1)
        for step in (1, 2):
            n = 1
            while delta.get(start + n * step) == delta[start]:
                n += 1
            best = max(best, (n, -step))
        n, step = best[0], abs(best[1])
        out += [start - at, n, step, delta[start]]
        at = start + (n - 1) * step
        used = {start + i * step for i in range(n)}
        codes = [c for c in codes if c not in used]
    return out


def decomp_runs(data, excluded):
    table = {c: row[2] for c, row in data.items() if row[2]}
    marks = sorted({d[1] for d in table.values() if len(d) == 2})
    assert all(len(d) in (1, 2) for d in table.values())
    assert not any(m in table for m in marks), "a second part decomposes"
    assert not any(0xAC00 <= c < 0xD7A4 for c in table), "Hangul is computed"
    codes, out, at = sorted(table), [], 0
    while codes:
        start, n = codes[0], 1
        single = len(table[start]) == 1
        while n < len(codes) and codes[n] == start + n and (len(table[codes[n]]) == 1) == single:
            n += 1
        out += [start - at, -n if single else n]
        last = 0
        for c in codes[:n]:
            d = table[c]
            out.append(d[0] - last)
            last = d[0]
            if not single:
                i = 1 + marks.index(d[1])
                out.append(-i if c in excluded else i)
        at, codes = start + n, codes[n:]
    gaps = [m - p for m, p in zip(marks, [0] + marks)]
    return gaps, out


def table_text(name, values):
    lines, line = [], "   "
    for v in values:
        item = f"{v},"
        if len(line) + len(item) > 99:
            lines.append(line)
            line = "   "
        line += (" " if line == "   " else "") + item
    lines.append(line.rstrip(","))
    head = f"static const int32_t sdq__tok_u_{name}[{len(values)}] = {{\n"
    return head + "\n".join(lines) + "};\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unicode", default="/usr/share/unicode", type=pathlib.Path)
    parser.add_argument("--into", type=pathlib.Path)
    args = parser.parse_args()
    data = read_data(args.unicode)
    spaces = read_property(args.unicode / "PropList.txt", "White_Space")
    excluded = read_property(args.unicode / "DerivedNormalizationProps.txt",
                             "Full_Composition_Exclusion")
    readme = (args.unicode / "ReadMe.txt").read_text(encoding="utf-8")
    version = readme.split("Version ")[1].split()[0]
    marks, decomp = decomp_runs(data, excluded)
    text = f"{BEGIN}\n/* Unicode {version} */\n"
    for name, values in (("class", class_runs(data, spaces)), ("ccc", ccc_runs(data)),
                         ("lower", lower_runs(data)), ("marks", marks), ("decomp", decomp)):
        text += table_text(name, values)
    text += END
    if not args.into:
        print(text)
        return
    source = args.into.read_text(encoding="utf-8")
    head, rest = source.split(BEGIN)
    args.into.write_text(head + text + rest.split(END)[1], encoding="utf-8")
    print(f"{args.into}: {len(text)} bytes of tables")


if __name__ == "__main__":
    main()
