#!/bin/sh
# Build and run every test; called by `make test` from the top folder.
#
# Each tests/test_*.c includes the implementation and is built with every compiler found, and once
# more with sanitizers: test_kernels with all instruction sets, the others with scalar kernels (a
# sanitizer build of all tiers takes a minute each).
# What a machine lacks is counted as skipped. The last line is "N passed, N failed".
#   PARTS="units shape compile link options examples cli kill mpi fuzz"   only some of it
WARN='-Wall -Wextra -pedantic -Wconversion -Wsign-conversion -Wshadow -Wundef'
out=build/tests
passed=0 failed=0 skipped=0
parts=${PARTS:-units shape compile link options examples cli kill mpi fuzz}
mkdir -p $out
OMP_WAIT_POLICY=passive; export OMP_WAIT_POLICY     # threads that wait do not take the other job's time
part() { case " $parts " in *" $1 "*) return 0 ;; esac; return 1; }

pass() { passed=$((passed + 1)); }
fail() { failed=$((failed + 1)); echo "FAILED: $1"; }
skip() { skipped=$((skipped + 1)); echo "skipped: $1"; }

# check NAME COMMAND...: one test is one command that succeeds
check() {
    name=$1; shift
    if "$@" >"$out/$name.log" 2>&1; then pass; else fail "$name"; tail -n 15 "$out/$name.log"; fi
}

# count NAME CODE: add up the log of a program that ends with "N passed, N failed[, N skipped]"
count() {
    line=$(grep -E '[0-9]+ passed, [0-9]+ failed' "$out/$1.log" | tail -n 1)
    p=$(echo "$line" | sed -n 's/.*\b\([0-9][0-9]*\) passed.*/\1/p')
    f=$(echo "$line" | sed -n 's/.*\b\([0-9][0-9]*\) failed.*/\1/p')
    s=$(echo "$line" | sed -n 's/.*\b\([0-9][0-9]*\) skipped.*/\1/p')
    passed=$((passed + ${p:-0})) failed=$((failed + ${f:-0})) skipped=$((skipped + ${s:-0}))
    echo "$1: ${line:-no result} (exit $2)"
    if [ "$2" != 0 ] || [ -z "$line" ]; then
        [ "${f:-0}" = 0 ] && fail "$1"
        grep -iE 'fail|error|: [a-z]+: ' "$out/$1.log" | head -n 15
    fi
}
# suite NAME COMMAND..
suite() {
    name=$1; shift
    "$@" >"$out/$name.log" 2>&1
    count "$name" $?
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

cpus=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# The longest first, so that all processors are busy until the end.
units="layer networks ops kernels"
for t in tests/test_*.c; do
    t=$(basename "$t" .c); t=${t#test_}
    case " $units " in *" $t "*) ;; *) units="$units $t" ;; esac
done

# units CC TAG FLAGS..: build and run every test program, as many at a time as there are processors.
# A program never runs beside itself: the tests write files of their own into this folder.
units() {
    cc=$1 tag=$2; shift 2
    for t in $units; do
        n=test_$t.$tag flags=$*
        [ "$tag" = san ] && flags="$flags $(san_flags "$t")"
        rm -f "$out/$n" "$out/$n.log" "$out/$n.code"
        build="$cc -std=gnu99 -Wall -Wextra $flags -I. -Itests tests/test_$t.c -o $out/$n -lm >$out/$n.build.log 2>&1"
        echo "$build && { $out/$n >$out/$n.log 2>&1; echo \$? >$out/$n.code; }"
    done | tr '\n' '\0' | xargs -0 -n 1 -P "$cpus" sh -c
    for t in $units; do
        n=test_$t.$tag
        if [ -f "$out/$n.code" ] && [ ! -s "$out/$n.build.log" ]; then count "$n" "$(cat "$out/$n.code")"
        else fail "build $n"; head -n 15 "$out/$n.build.log"; fi
    done
}
# Scalar kernels but for the test of the kernels; no optimizer where running takes less than building.
san_flags() {
    case $1 in
    kernels) echo "-O0" ;;
    layer|networks|ops|distill|oom|single) echo "-O1 -DSDQ_NO_SIMD" ;;
    *) echo "-O0 -DSDQ_NO_SIMD" ;;
    esac
}

if part units; then
    for c in $compilers; do units "$c" "$(basename "$c")" -O2 $(openmp "$c"); done
fi

printf 'int main(void){return 0;}' >"$out/san.c"
san=${CC:-cc} san_options="-gline-tables-only -fsanitize=address,undefined -fno-sanitize-recover=undefined,float-cast-overflow"
if command -v clang >/dev/null 2>&1; then san=clang; else san_options="-g ${san_options#* }"; fi
if $san $san_options "$out/san.c" -o "$out/san" 2>/dev/null && "$out/san"; then
    part units && units "$san" san $san_options
    if part fuzz; then
        compile fuzz "$san" -std=gnu99 -Wall -Wextra $san_options -O0 -DSDQ_NO_SIMD -I. tests/fuzz.c -o "$out/fuzz-san" -lm
        suite fuzz "$out/fuzz-san" "${FUZZ_SECONDS:-5}" "${FUZZ_SEED:-1}"
    fi
else
    skip "sanitizers: not available"
fi

if part shape; then
    suite mutations-fit sh tests/mutations.sh fit
    if python3 -c '' 2>/dev/null; then suite lint python3 tools/lint.py; else skip "lint: no python3"; fi
fi

# The header in every language it promises, without a warning.
printf '#define SDQ_IMPLEMENTATION\n#include "sdq.h"\n' >"$out/impl.c"
cp "$out/impl.c" "$out/impl.cc"
printf '#include "sdq.h"\nint main(void) { sdq_ctx *c; if (sdq_ctx_create(0, &c)) return 1; sdq_ctx_free(c); return 0; }\n' \
    >"$out/user.c"
cxx_of() { echo "$1" | sed 's/clang$/clang++/; s/gcc$/g++/; s/^cc$/c++/'; }
if part compile; then for c in $compilers; do
    tag=$(basename "$c")
    for std in c99 c11 c17; do
        compile "$tag-$std" "$c" -std=$std $WARN -Wstrict-prototypes -fsyntax-only -I. "$out/impl.c"
        compile "$tag-$std-no-simd" "$c" -std=$std $WARN -Wstrict-prototypes -DSDQ_NO_SIMD -DSDQ_NO_MMAP -fsyntax-only -I. \
            "$out/impl.c"
        compile "$tag-$std-user" "$c" -std=$std $WARN -Wstrict-prototypes -fsyntax-only -I. "$out/user.c"
    done
    cxx=$(cxx_of "$c")
    if command -v "$cxx" >/dev/null 2>&1; then
        for std in c++11 c++17; do
            compile "$(basename "$cxx")-$std" "$cxx" -std=$std $WARN -fsyntax-only -I. "$out/impl.cc"
        done
    else
        skip "$cxx: not installed"
    fi
    # the warnings that need the optimizer
    compile "$tag-O2" "$c" -std=c99 $WARN -Wstrict-prototypes -O2 -I. -c "$out/impl.c" -o "$out/impl.$tag.o"
done; fi

# Two translation units, only sdq_ symbols, no writable globals.
only_sdq() {    # OBJECT
    nm -g --defined-only "$1" | awk 'NF == 3 { n++; if ($3 !~ /^sdq_[a-z0-9]/ || $2 == "C") { print; bad = 1 } } END { exit bad || n < 100 }'
}
no_globals() {  # OBJECT: sections of writable data are empty
    size -A "$1" | awk '$1 ~ /^\.(data|bss|tdata|tbss)/ && $1 !~ /^\.data\.rel\.ro/ { t += $2 } END { exit t > 0 }'
}
two_units() {   # CC-OF-IMPLEMENTATION SOURCE
    ${CC:-cc} -O0 -I. -c "$out/user.c" -o "$out/user.o" && $1 -O0 -DSDQ_NO_SIMD -I. -c "$2" -o "$out/two.o" \
        && ${CC:-cc} "$out/user.o" "$out/two.o" -o "$out/two" -lm && "$out/two"
}
if part link; then
    for c in $compilers; do
        tag=$(basename "$c")
        [ -f "$out/impl.$tag.o" ] && [ "$out/impl.$tag.o" -nt sdq.h ] || $c -std=c99 -O2 -I. -c "$out/impl.c" -o "$out/impl.$tag.o"
        check "symbols-$tag" only_sdq "$out/impl.$tag.o"
        check "no-globals-$tag" no_globals "$out/impl.$tag.o"
        check "two-units-$tag" two_units "$c" "$out/impl.c"
    done
    cxx=${CXX:-c++}
    if command -v "$cxx" >/dev/null 2>&1; then check two-units-c++ two_units "$cxx -std=c++11" "$out/impl.cc"
    else skip "$cxx: not installed"; fi
fi

# The options of the manual, alone and together; an object shows whether the option did anything.
opt() {         # NAME FLAGS..: compile into NAME.o without a warning
    name=$1; shift
    compile "option-$name" ${CC:-cc} -std=c99 $WARN -Wno-unused-function -O0 "$@" -I. -c "$out/impl.c" -o "$out/$name.o"
}
has() { nm "$out/$1.o" | grep -qE " $2\$"; }
lacks() { [ -f "$out/$1.o" ] && ! has "$1" "$2"; }
# Two files with private copies, and a third that renamed the header.
static_units() {
    printf '#define SDQ_STATIC\n#define SDQ_IMPLEMENTATION\n#include "sdq.h"\nint other(void); int main(void) { sdq_ctx *c; if (sdq_ctx_create(0, &c)) return 1; sdq_ctx_free(c); return other(); }\n' >"$out/static1.c"
    printf '#define SDQ_STATIC\n#define SDQ_IMPLEMENTATION\n#include "sdq.h"\nint other(void); int other(void) { sdq_ctx *c; if (sdq_ctx_create(0, &c)) return 1; sdq_ctx_free(c); return 0; }\n' >"$out/static2.c"
    for i in 1 2; do
        ${CC:-cc} -std=c99 -Wall -Wextra -Werror -O0 -DSDQ_NO_SIMD -I. -c "$out/static$i.c" -o "$out/static$i.o" || return 1
        if nm -g --defined-only "$out/static$i.o" | grep ' sdq_'; then return 1; fi
    done
    ${CC:-cc} "$out/static1.o" "$out/static2.o" -o "$out/static" -lm && "$out/static"
}
renamed() {
    mkdir -p "$out/renamed"
    cp sdq.h "$out/renamed/tiny.h"
    printf '#define SDQ_SELF "tiny.h"\n#define SDQ_IMPLEMENTATION\n#include "tiny.h"\n#include "tiny.h"\n' >"$out/renamed/impl.c"
    ${CC:-cc} -std=c99 -Wall -Wextra -Werror -O0 -I"$out/renamed" -c "$out/renamed/impl.c" -o "$out/renamed.o"
}
refused() {     # FLAGS..: must not compile, and says why
    ! ${CC:-cc} "$@" -fsyntax-only -I. "$out/impl.c" 2>"$out/refused.err" && grep -q 'error.*sdq.h promises' "$out/refused.err"
}
if part options; then
    opt plain
    opt no-simd -DSDQ_NO_SIMD
    opt no-mmap -DSDQ_NO_MMAP
    opt no-assert '-DSDQ_ASSERT(x)=((void)0)'
    opt static -DSDQ_STATIC
    opt all -DSDQ_NO_SIMD -DSDQ_NO_MMAP '-DSDQ_ASSERT(x)=((void)0)' -DSDQ_STATIC
    check plain-has-all sh -c "nm $out/plain.o >$out/plain.nm && grep -q sdq__k_table_scalar $out/plain.nm && grep -q ' mmap' $out/plain.nm \
        && grep -q ' __assert' $out/plain.nm"
    case $(uname -m) in x86_64) check plain-has-simd has plain sdq__k_table_avx512vnni ;; *) skip "SIMD: no x86-64" ;; esac
    check no-simd-has-none lacks no-simd 'sdq__k_table_avx.*'
    check no-mmap-has-none lacks no-mmap '(mmap|munmap)(64)?(@.*)?'
    check no-assert-has-none lacks no-assert '__assert.*'
    check all-has-none lacks all '(mmap|munmap|__assert.*|sdq__k_table_avx.*)'
    check static-units static_units
    check renamed renamed
    check fast-math-refused refused -ffast-math
fi

if part examples; then
# Examples, each built by the command at its top.
for e in examples/*.c; do
    n=$(basename "$e" .c)
    [ "$n" = train_mpi ] && continue        # needs MPI: tests/test_mpi.sh
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
fi
part cli && suite cli sh tests/test_cli.sh
part kill && suite kill sh tests/test_kill.sh
if part mpi; then
    if command -v mpicc >/dev/null 2>&1 && command -v mpirun >/dev/null 2>&1; then suite mpi sh tests/test_mpi.sh
    else skip "MPI: no mpicc, mpirun (Debian: openmpi-bin, libopenmpi-dev)"; fi
fi

echo "$skipped skipped"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
