#!/usr/bin/env python3
"""The shape of sdq.h, checked: `make lint`. Prints every broken rule, then "N passed, N failed".

Rules: contents = marks in order; a private name stands in its own section; a section calls only
sections above it; lines <= 100 columns, ASCII, no tabs or trailing blanks, no notes to self;
functions <= 120 lines (kernels 200); every public function is declared once, documented and
defined; nothing prints, exits, reads the environment or a clock; the licence ends the file.
"""
import re
import sys

# The prefixes of each section's private functions: sdq__<prefix>...
PREFIX = {
    "util": "u_", "error": "fail err_", "parallel": "par_", "cpu": "cpu_",
    "memory": "mem_ alloc free strdup grow push",       # words used everywhere: short on purpose
    "kernel-list": "k_", "random": "rng_", "tensor": "t_ keep", "qmath": "q_",
    "gemm": "gemm_ qgemm_ win_", "attention": "att_ qatt_", "tape": "tape_", "ops": "op_", "layer": "ly_",
    "io": "io_", "json": "js_ str_", "safetensors": "st_", "image": "img_", "dataset": "data_",
    "tokenizer": "tok_", "optim": "opt_", "single-file": "sf_", "model": "md_", "blocks": "bk_", "text": "tx_",
    "unet": "un_", "vae": "va_", "model-file": "md_", "scheduler": "sch_", "pipeline": "pl_",
    "report": "rep_", "tasks": "task_", "recipe": "rc_", "calibrate": "cal_", "distill": "ds_",
    "convert": "cv_", "schedule": "se_",
}
# (rule, what): why it is right as it is. An exception that no longer applies is an error, too.
EXCEPTIONS = {
    ("contents", "impl-end"): "closes the pragmas of >>impl; nothing to look up there",
    ("prefix", "sdq__md_levels"): "reads a list of the configuration for the UNet and the VAE",
    ("upward", "sdq__md_is>sdq_part_name"): "the public table of names stands with its own kind",
    ("upward", "sdq__pl_load_one>sdq_model_load_int8"):
        "a pipeline may have an int8 network; its file format belongs to >>convert",
    ("upward", "sdq__pl_look>sdq_model_peek_int8"): "the same",
}
BANNED = ("printf fprintf vprintf vfprintf puts fputs putchar perror abort exit _exit _Exit "
          "quick_exit system getenv time clock clock_gettime gettimeofday rand srand random").split()
LINE, FUNCTION, KERNEL = 100, 120, 200

failures = {}
used = set()


def report(rule, what, line, text):
    if (rule, what) in EXCEPTIONS:
        used.add((rule, what))
    else:
        failures.setdefault(rule, []).append("%s:%d: %s: %s" % (path, line, rule, text))


def strip(text):
    """The same text without comments, strings and characters; lines stay where they are."""
    def blank(match):
        return re.sub(r"[^\n]", " ", match.group(0))
    return re.sub(r'/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', blank, text, flags=re.S)


class Function:
    def __init__(self, name, first, last, body, public, proto):
        self.name, self.first, self.last, self.body = name, first, last, body
        self.public, self.proto = public, proto


def functions(code):
    """Every function at column 0: prototypes and definitions, with their lines (from 1)."""
    found, i = [], 0
    while i < len(code):
        line = code[i]
        if not re.match(r"[A-Za-z_]", line) or "(" not in line or re.match(r"typedef|extern \"C\"", line):
            i += 1
            continue
        first, head = i, line
        while not re.search(r"[{;]\s*$|}\s*$", head) and i + 1 < len(code) and i - first < 20:
            i += 1
            head += "\n" + code[i]
        match = re.match(r"[^(=]*?\b(sdq_\w+|SDQ__[KN]\(\w+\))\s*\(", head)
        brace = head.find("{")
        if match and "=" not in head[:match.end()]:
            last = i
            if brace >= 0 and not re.search(r"}\s*$", head):
                while last + 1 < len(code) and code[last] != "}":
                    last += 1
            found.append(Function(match.group(1), first + 1, last + 1,
                                  "\n".join(code[first:last + 1]), head.startswith("SDQ_API"), brace < 0))
            i = last
        i += 1
    return found


def check_lines(lines):
    for n, line in enumerate(lines, 1):
        if len(line) > LINE:
            report("columns", n, n, "%d columns" % len(line))
        if not all(" " <= c <= "~" for c in line) or line.endswith(" "):
            report("ascii", n, n, "not printable ASCII, or a blank at the end")
        if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line):
            report("notes", n, n, line.strip())


def check_contents(lines, marks):
    begin = next(i for i, line in enumerate(lines) if line.startswith(" * Contents"))
    end = next(i for i in range(begin, len(lines)) if "====" in lines[i])
    listed = [m for line in lines[begin + 1:end] for m in re.findall(r">>([a-z][a-z-]*)", line)]
    real = []
    for name, n in marks:
        if name in listed:
            real.append(name)
        else:
            report("contents", name, n, ">>%s is not in the table of contents" % name)
    for name in listed:
        if name not in real:
            report("contents", name, begin + 1, ">>%s is listed, but no section has this mark" % name)
    if sorted(real) == sorted(listed) and real != listed:
        wrong = next(a for a, b in zip(listed, real) if a != b)
        report("contents", "order", begin + 1, "order differs from >>%s on" % wrong)


def check_sections(found, section, order):
    home = {}
    for f in found:
        s = section(f.first)
        if not f.proto and not s.startswith("api-"):
            home.setdefault(f.name, s)
        if f.name.startswith("sdq__") and s in PREFIX:
            if not any(f.name[5:].startswith(p) for p in PREFIX[s].split()):
                report("prefix", f.name, f.first, "%s in >>%s" % (f.name, s))
        elif f.name.startswith("sdq__") and s not in ("impl", "kernel-text"):
            report("prefix", f.name, f.first, "%s in >>%s, which has no prefix here" % (f.name, s))
        if f.proto and f.name.startswith("sdq__"):
            report("upward", f.name, f.first, "forward declaration of %s" % f.name)
    for f in found:
        s = section(f.first)
        if f.proto or s.startswith("api-") or s == "kernel-text":
            continue
        for name in sorted(set(re.findall(r"\bsdq_\w+(?=\s*\()", f.body))):
            if name in home and order[home[name]] > order[s]:
                report("upward", f.name + ">" + name, f.first, "%s in >>%s calls %s of >>%s"
                       % (f.name, s, name, home[name]))


def check_api(lines, found, section):
    declared = {}
    for f in found:
        s = section(f.first)
        if not f.public:
            continue
        if s.startswith("api-"):
            if f.name in declared:
                report("api", f.name, f.first, "%s is declared twice" % f.name)
            declared[f.name] = f
        elif f.proto:
            report("api", f.name, f.first, "%s is declared outside the interface" % f.name)
    defined = [f.name for f in found if f.public and not f.proto]
    for name, f in declared.items():
        if defined.count(name) != 1:
            report("api", name, f.first, "%s is defined %d times" % (name, defined.count(name)))
        # A comment on its line, or above it in the same group (no blank line between).
        top = f.first - 1
        while lines[top - 1] and "*/" not in lines[top - 1]:
            top -= 1
        if not any("/*" in line for line in lines[f.first - 1:f.last]) and "*/" not in lines[top - 1]:
            report("documented", name, f.first, "%s has no comment" % name)
    for name in defined:
        if name not in declared:
            report("api", name, 1, "%s is defined but not declared" % name)


def check_functions(found, code, section):
    for f in found:
        limit = KERNEL if section(f.first) == "kernel-text" else FUNCTION
        if f.last - f.first + 1 > limit:
            report("length", f.name, f.first, "%s has %d lines" % (f.name, f.last - f.first + 1))
    word = re.compile(r"\b(?:(?:%s)\s*\(|stdout\b|stderr\b|stdin\b|errno\b)" % "|".join(BANNED))
    for n, line in enumerate(code, 1):
        if section(n) != "" and word.search(line):
            report("silent", n, n, line.strip())


def main():
    global path
    path = sys.argv[1] if len(sys.argv) > 1 else "sdq.h"
    with open(path, encoding="latin-1") as f:
        text = f.read()
    lines, code = text.split("\n"), strip(text).split("\n")
    marks = [(m.group(1), n) for n, line in enumerate(lines, 1)
             for m in [re.match(r"(?:/\*| \*) >>([a-z][a-z-]*)\b", line)] if m]
    order = {name: i for i, (name, _) in enumerate(marks)}
    where, current = [""], ""
    starts = {n: name for name, n in marks}
    for n in range(1, len(lines) + 1):
        current = starts.get(n, current)
        where.append(current)
    found = functions(code)
    if len(found) < 500 or len(marks) < 40:     # a parser that finds nothing would pass everything
        report("parse", "", 1, "only %d functions and %d marks were found" % (len(found), len(marks)))
    check_lines(lines)
    check_contents(lines, marks)
    check_sections(found, lambda n: where[n], order)
    check_api(lines, found, lambda n: where[n])
    check_functions(found, code, lambda n: where[n])
    tail = "\n".join(lines[marks[-1][1]:])
    if marks[-1][0] != "licence" or "Permission is hereby granted" not in tail or "WITHOUT WARRANTY" not in tail:
        report("licence", "", len(lines), "the file does not end with its licence")
    for key in sorted(set(EXCEPTIONS) - used):
        failures.setdefault("exceptions", []).append("%s: the exception %s is not needed" % (path, key))
    rules = ("parse columns ascii notes contents prefix upward api documented length silent licence "
             "exceptions").split()
    for rule in rules:
        for text in failures.get(rule, [])[:12]:
            print(text)
        if len(failures.get(rule, [])) > 12:
            print("%s: %d more" % (rule, len(failures[rule]) - 12))
    bad = sum(rule in failures for rule in rules)
    print("lint: %d functions; %d passed, %d failed" % (len(found), len(rules) - bad, bad))
    return bad != 0


path = "sdq.h"
if __name__ == "__main__":
    sys.exit(main())
