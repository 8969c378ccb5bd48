#!/bin/sh
# examples/train_mpi.c: two processes do the training of one with twice the micro-batches.
# Called by tests/run.sh from the top folder, where mpicc and mpirun are there.
out=${OUT:-build/tests/mpi} model=tests/golden/models/sd1-a
passed=0 failed=0
rm -rf "$out"; mkdir -p "$out"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

ok() {          # NAME COMMAND..
    name=$1; shift
    if "$@" >"$out/log" 2>&1; then passed=$((passed + 1))
    else failed=$((failed + 1)); echo "FAILED $name"; tail -n 3 "$out/log"; fi
}
train() {       # PROCESSES STEPS NAME: NAME, NAME.state and NAME.log
    mpirun --allow-run-as-root --oversubscribe --bind-to none -n "$1" "$out/train_mpi" $model "$2" 2 "$out/$3" \
        "red apple" "grinning face" "japan" "night" "a moon" </dev/null >"$out/$3.log" 2>&1
}
both() { train 1 "$1" "one$1" && train 2 "$1" "two$1"; }
value() { sed -n "s/^$1 \([^ ]*\).*/\1/p" "$out/$2.log"; }
near() {        # A B LIMIT: relative
    awk -v a="$1" -v b="$2" -v l="$3" 'BEGIN { d = a > b ? a - b : b - a; print a, b, d / b; exit !(b > 0 && d <= l * b) }'
}

ok "build" mpicc -std=c99 -Wall -Wextra -Werror -O2 -I. examples/train_mpi.c -o "$out/train_mpi" -lm
# No step: ranges joined by minimum and maximum, states joined in order, pictures shared out.
ok "0 steps" both 0
ok "ranges" cmp "$out/one0" "$out/two0"
ok "pictures" [ "$(value PSNR one0)" = "$(value PSNR two0)" ]
ok "before: validation" near "$(value 'validation loss' two0)" "$(value 'validation loss' one0)" 1e-6
# The first step: m is a tenth of the gradient that was added up, v a thousandth of its square.
ok "1 step" both 1
ok "gradient" build/sdq info --compare "$out/one1.state" "$out/two1.state" --limit 1e-6
# Ten steps; measured: 4e-8. (On the emoji model, whose loss is nothing but the error of rounding, a
# last bit makes all that follows round in another way: two runs scatter by one per cent there.)
ok "10 steps" both 10
ok "validation" near "$(value 'validation loss' two10)" "$(value 'validation loss' one10)" 1e-3
# Two processes go on from the state of two, and end in the same bytes.
ok "4 steps" train 2 4 resumed
ok "and 10" train 2 10 resumed
ok "resumed" cmp "$out/resumed.state" "$out/two10.state"
ok "resumed file" cmp "$out/resumed" "$out/two10"
# A number of micro-batches that cannot be shared out.
ok "three processes" sh -c "! mpirun --allow-run-as-root --oversubscribe -n 3 $out/train_mpi $model 1 2 $out/x a b c d </dev/null"

echo "$passed passed, $failed failed"
[ $failed = 0 ]
