#!/bin/sh
# Build and run every test; called by `make test` from the top folder.
#
# Each tests/test_*.c includes the implementation and is built with every compiler found, and once
# more with sanitizers (scalar kernels only: a sanitizer build of all tiers takes very long).
# What a machine lacks is counted as skipped. The last line is "N passed, N failed".
WARN='-Wall -Wextra -pedantic -Wconversion -Wsign-conversion -Wshadow -Wundef'
out=build/tests
passed=0 failed=0 skipped=0
mkdir -p $out

pass() { passed=$((passed + 1)); }
fail() { failed=$((failed + 1)); echo "FAILED: $1"; }
skip() { skipped=$((skipped + 1)); echo "skipped: $1"; }

# check NAME COMMAND...: one test is one command that succeeds
check() {
    name=$1; shift
    if "$@" >"$out/$name.log" 2>&1; then pass; else fail "$name"; tail -n 15 "$out/$name.log"; fi
}

# suite NAME PROGRAM: a test program that ends with "N passed, N failed[, N skipped]"
suite() {
    "$2" >"$out/$1.log" 2>&1; code=$?
    line=$(grep -E '[0-9]+ passed, [0-9]+ failed' "$out/$1.log" | tail -n 1)
    p=$(echo "$line" | sed -n 's/.*\b\([0-9][0-9]*\) passed.*/\1/p')
    f=$(echo "$line" | sed -n 's/.*\b\([0-9][0-9]*\) failed.*/\1/p')
    s=$(echo "$line" | sed -n 's/.*\b\([0-9][0-9]*\) skipped.*/\1/p')
    passed=$((passed + ${p:-0})) failed=$((failed + ${f:-0})) skipped=$((skipped + ${s:-0}))
    echo "$1: ${line:-no result} (exit $code)"
    if [ "$code" != 0 ] || [ -z "$line" ]; then
        [ "${f:-0}" = 0 ] && fail "$1"
        grep -iE 'fail|error' "$out/$1.log" | head -n 15
    fi
}

openmp() { printf 'int main(void){return 0;}' | $1 -fopenmp -x c - -o /dev/null 2>/dev/null && echo -fopenmp; }

compilers=${CC:-cc}
if command -v clang >/dev/null 2>&1; then compilers="$compilers clang"; else skip "clang: not installed"; fi

# compile TAG COMMAND...: zero warnings is a test of its own
compile() {
    tag=$1; shift
    if "$@" >"$out/$tag.build.log" 2>&1 && [ ! -s "$out/$tag.build.log" ]; then pass
    else fail "build $tag"; head -n 15 "$out/$tag.build.log"; fi
}

# two builds at a time: the machine the project is tested on has two cores
jobs=0
spawn() { "$@" & jobs=$((jobs + 1)); if [ $jobs -ge 2 ]; then wait; jobs=0; fi; }

build_all() {   # CC TAG FLAGS...
    cc=$1 tag=$2; shift 2
    for t in tests/test_*.c; do
        n=$(basename "$t" .c)
        rm -f "$out/$n.$tag"
        spawn sh -c "$cc -std=gnu99 $* -I. -Itests $t -o $out/$n.$tag -lm >$out/$n.$tag.build.log 2>&1"
    done
    wait; jobs=0
}

run_all() {     # TAG
    for t in tests/test_*.c; do
        n=$(basename "$t" .c)
        if [ -x "$out/$n.$1" ]; then suite "$n.$1" "$out/$n.$1"
        else fail "build $n.$1"; head -n 15 "$out/$n.$1.build.log"; fi
    done
}

for c in $compilers; do
    tag=$(basename "$c")
    build_all "$c" "$tag" -O2 $(openmp "$c")
    run_all "$tag"
done

printf 'int main(void){return 0;}' >"$out/san.c"
san=${CC:-cc}
command -v clang >/dev/null 2>&1 && san=clang       # several times faster at it than gcc
if $san -fsanitize=address,undefined "$out/san.c" -o "$out/san" 2>/dev/null && "$out/san"; then
    build_all "$san" san -g -O1 -DSDQ_NO_SIMD -fsanitize=address,undefined \
        -fno-sanitize-recover=undefined,float-cast-overflow
    run_all san
else
    skip "sanitizers: not available"
fi

# The header in every language it promises, without a warning.
printf '#define SDQ_IMPLEMENTATION\n#include "sdq.h"\n' >"$out/impl.c"
cp "$out/impl.c" "$out/impl.cc"
printf '#include "sdq.h"\nint main(void) { sdq_ctx *c; if (sdq_ctx_create(0, &c)) return 1; sdq_ctx_free(c); return 0; }\n' \
    >"$out/user.c"
for c in $compilers; do
    tag=$(basename "$c")
    for std in c99 c11 c17; do
        compile "$tag-$std" "$c" -std=$std $WARN -Wstrict-prototypes -fsyntax-only -I. "$out/impl.c"
    done
    cxx=$(echo "$c" | sed 's/clang$/clang++/; s/gcc$/g++/; s/^cc$/c++/')
    if command -v "$cxx" >/dev/null 2>&1; then
        for std in c++11 c++17; do
            compile "$(basename "$cxx")-$std" "$cxx" -std=$std $WARN -fsyntax-only -I. "$out/impl.cc"
        done
    else
        skip "$cxx: not installed"
    fi
    compile "$tag-no-simd" "$c" -std=c99 $WARN -DSDQ_NO_SIMD -DSDQ_NO_MMAP -fsyntax-only -I. "$out/impl.c"
done

# Two translation units, only sdq_ symbols, no writable globals.
check two-units sh -c "${CC:-cc} -O1 -I. -c $out/impl.c -o $out/impl.o && ${CC:-cc} -O1 -I. -c $out/user.c -o $out/user.o \
    && ${CC:-cc} $out/user.o $out/impl.o -o $out/two -lm && $out/two"
check symbols sh -c "! nm -g --defined-only $out/impl.o | awk '\$3 !~ /^sdq_/ {print; bad=1} END {exit !bad}'"
check no-globals sh -c "size -A $out/impl.o | awk '\$1==\".data\"||\$1==\".bss\"{t+=\$2} END {exit t>0}'"

# Examples, each built by the command at its top.
for e in examples/*.c; do
    n=$(basename "$e" .c)
    check "example-$n" ${CC:-cc} -std=c99 -Wall -Wextra -O1 $(openmp "${CC:-cc}") -I. "$e" -o "$out/$n" -lm
done
check example-cpp ${CXX:-c++} -std=c++11 -Wall -Wextra -O1 $(openmp "${CC:-cc}") -I. examples/cpp.cc -o "$out/cpp"
check run-custom-network sh -c "$out/custom_network | grep -q 'fake == int8: yes'"
model=examples/emoji/model
if [ -f $model/unet/diffusion_pytorch_model.safetensors ]; then
    check run-quantize sh -c "$out/quantize $model $out/q.safetensors 'red apple' 'grinning face' | grep -q 'wrote'"
    check run-txt2img sh -c "$out/txt2img $model 'red apple' 7 $out/a.png | grep -q '51 evaluations, 51 in float'"
    check run-txt2img-int8 sh -c "$out/txt2img $model 'red apple' 7 $out/b.png $out/q.safetensors | grep -q '51 evaluations, 6 in float'"
    rm -f $out/train.state
    check run-train sh -c "cd $out && ./train ../../$model 6 t.safetensors 'red apple' | grep -q 'wrote'"
    # one hash of a mixed-precision run on every instruction set and thread count
    for t in scalar avx2 avx512 avx512vnni; do
        for n in 1 2; do
            build/sdq txt2img --model $model --unet $out/q.safetensors --precision mixed -k 1 -p 'red heart' --steps 2 \
                --seed 5 --tier $t --threads $n --save-latents $out/$t$n.st -o $out/h.png >/dev/null 2>$out/hash.log \
                || { skip "picture on $t: $(tail -n 1 $out/hash.log)"; continue; }
            check "picture-hash-$t-$n" cmp $out/$t$n.st $out/scalar1.st
        done
    done
    check run-cpp sh -c "$out/cpp $model 'red apple' $out/c.png | grep -q '64 x 64 pixels'"
else
    skip "examples that need the emoji model: it is not there"
fi
[ -f tests/test_cli.sh ] && suite cli tests/test_cli.sh

echo "$skipped skipped"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
