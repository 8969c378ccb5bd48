#!/bin/sh
# Are the tests awake? Each line below breaks a copy of sdq.h in one place; the named test program
# must then fail. `make mutations`; takes minutes, so it is not part of `make test`.
# ONLY=TEXT: the lines with this text. `sh tests/mutations.sh fit`, which is part of `make test`, only
# asks whether every script still finds what it breaks.
#
#   name|test|filter|flags|sed script        flags: SIMD (all instruction sets, else scalar), O2, gcc
# A script that changes nothing, a copy that does not compile and a test that fails without any
# damage are not counted as caught.
out=build/mutations cc=${CC:-cc}
caught=0 missed=0 skipped=0
mkdir -p $out
export OMP_WAIT_POLICY=passive

list() {
    cat <<'EOF'
clamp of int8 inputs dropped|kernels|||s/SDQ__N(rint)(v), zero), 0.0f, 255.0f)/SDQ__N(rint)(v), zero), 0.0f, 300.0f)/
rows and columns of a kernel swapped|layer|exact_shapes||s/at\[t\] = k \/ g->kw \* g->w + k % g->kw;/at[t] = k % g->kw * g->w + k \/ g->kw;/
zero point added, not subtracted|kernels|||s/if (t->wsum) acc\[j\] -= /if (t->wsum) acc[j] += /
the wrong taps of the last row left out|layer|exact_shapes||s/(i == 1 \&\& t \/ 3 == 2)/(i == 1 \&\& t \/ 3 == 0)/
sums of weights keep taps that were left out|layer|exact_shapes||s/if (w->sorted \&\& w->zone\[i\].out\[t\]) continue;/;/
no guard against fused products|kernels||SIMD O2 gcc|/pragma GCC optimize("fp-contract=off")/d
one lane too many is loaded|kernels|||s/SDQ__N(load)(const float \*p, size_t n) { SDQ__LANES(l < n ? /SDQ__N(load)(const float *p, size_t n) { SDQ__LANES(l <= n ? /
half is rounded up, not to even|kernels|||s/SDQ__LANES(nearbyintf(a.f\[l\]))/SDQ__LANES(floorf(a.f[l] + 0.5f))/
half precision cut, not rounded|files|||s/((a - 0x38000000u + 0xfffu + ((a >> 13) \& 1u)) >> 13)/((a - 0x38000000u) >> 13)/
AdamW without bias correction|optim|||s/SDQ__N(sqrt)(SDQ__N(mul)(\*v, c->c2))/SDQ__N(sqrt)(*v)/
backward of a convolution not turned|layer|gradients||s/const size_t k = g->transposed ? taps - 1 - t : t;/const size_t k = t;/
gradient passes where the input was clipped|layer|clipped||s/if (in \&\& dx) dx\[j\] += g\[j\];/if (dx) dx[j] += g[j];/
size of an array not that of its shape|files|||s/if (bits \/ 8 != end - begin)/if (0)/
colour beside the palette|files|||s/if (v >= g->palette_size) return 0;/if (v > g->palette_size) return 0;/
the same random numbers in every step|optim|||s/(seed \* 1000003u + (uint64_t)step) \* 64u/(seed * 1000003u) * 64u/
noise level of the wrong formula|scheduler|||s/return sqrtf((1.0f - alpha) \/ alpha);/return sqrtf(1.0f - alpha);/
a recomputed block observes again|ops|checkpoint||s/return (l->observe \& what) != 0 \&\& !ctx->replay;/return (l->observe \& what) != 0;/
keys and values of OpenCLIP exchanged|single|same||s/: rest\[10\] == 'k' ? 2 : 3;/: rest[10] == 'k' ? 3 : 2;/
the VAE's decoder not turned around|single|same||s/half, s->levels - 1 - n\[0\], n\[1\],/half, n[0], n[1],/
the multiplier of a group of 4-bit weights left out|layer|exact||s/q\[i\] > 7 ? 7 : q\[i\]) \* m)/q[i] > 7 ? 7 : q[i]))/
multipliers of a file not checked|networks|four_file||s/if (l->mult\[i\] < 1 ||/if (l->mult[i] > 99 \&\&/
a damaged state changes the optimizer|optim|damaged||s/for (pass = 0; pass < 2; pass++)  /for (pass = 1; pass < 2; pass++)  /
EOF
}

# build FOLDER TEST FLAGS..: FOLDER holds the sdq.h to use
build() {
    dir=$1 t=$2; shift 2
    "$compiler" -std=gnu99 -O1 "$@" -I"$dir" -Itests "tests/test_$t.c" -o "$dir/$t" -lm >"$dir/build.log" 2>&1
}

list | grep -e "${ONLY:-.}" >$out/list
if [ "${1:-}" = fit ]; then
    while IFS='|' read -r name t filter flags script; do
        if sed "$script" sdq.h | cmp -s - sdq.h; then missed=$((missed + 1)); echo "FAILED: fits nothing: $name"
        else caught=$((caught + 1)); fi
    done <$out/list
    echo "mutations: $caught passed, $missed failed"
    [ $missed = 0 ]; exit
fi
n=0
while IFS='|' read -r name t filter flags script; do
    n=$((n + 1)) dir=$out/$n simd=-DSDQ_NO_SIMD compiler=$cc tag=plain
    case $flags in *SIMD*) simd= tag=simd ;; esac
    case $flags in *O2*) simd="$simd -O2" tag=O2 ;; esac
    case $flags in *gcc*) compiler=gcc ;; esac
    command -v "$compiler" >/dev/null 2>&1 || { skipped=$((skipped + 1)); echo "skipped  $name: no $compiler"; continue; }
    mkdir -p "$dir" "$out/$tag"
    sed "$script" sdq.h >"$dir/sdq.h"
    cp sdq.h "$out/$tag/sdq.h"
    if cmp -s sdq.h "$dir/sdq.h"; then why="the script changes nothing"
    elif ! build "$dir" "$t" $simd; then why="does not compile"
    else
        "$dir/$t" --filter "$filter" >"$dir/log" 2>&1; code=$?
        if [ $code = 0 ]; then why="test_$t passes"
        elif [ $code = 2 ]; then why="test_$t did not run"
        else
            # the same test of the undamaged file, built once
            case $(cat "$out/$tag/$t.of" 2>/dev/null) in
            $$) ;;
            *) build "$out/$tag" "$t" $simd; echo $$ >"$out/$tag/$t.of" ;;
            esac
            if "$out/$tag/$t" --filter "$filter" >"$out/$tag/log" 2>&1; then why=
            else why="test_$t fails without damage, too"; fi
        fi
    fi
    if [ -z "$why" ]; then
        caught=$((caught + 1))
        echo "caught   $name: test_$t$(sed -n 's/^FAILED \([^:]*\):.*/, \1/p' "$dir/log" | head -n 2 | tr -d '\n')"
    else
        missed=$((missed + 1)); echo "MISSED   $name: $why"
    fi
    rm -rf "$dir"
done <$out/list

echo "$skipped skipped"
echo "$caught caught, $missed missed"
[ $missed = 0 ]
