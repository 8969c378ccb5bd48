#!/bin/sh
# examples/train_mpi.c: two processes do the training of one with twice the micro-batches.
# Called by tests/run.sh from the top folder, where mpicc and mpirun are there.
out=${OUT:-build/tests/mpi} model=${MODEL:-tests/golden/models/sd1-a} batches=2
passed=0 failed=0
rm -rf "$out"; mkdir -p "$out"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

ok() {          # NAME COMMAND..
    name=$1; shift
    if "$@" >"$out/log" 2>&1; then passed=$((passed + 1))
    else failed=$((failed + 1)); echo "FAILED $name"; tail -n 3 "$out/log"; fi
}
train() {       # PROCESSES STEPS NAME: NAME, NAME.state and NAME.log
    mpirun --allow-run-as-root --oversubscribe --bind-to none -n "$1" "$out/train_mpi" $model "$2" $batches "$out/$3" \
        "red apple" "grinning face" "japan" "night" "a moon" </dev/null >"$out/$3.log" 2>&1
}
both() { rm -f "$out/one$1.state" "$out/two$1.state"; train 1 "$1" "one$1" && train 2 "$1" "two$1"; }
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
# With one micro-batch in each of two processes gradients are added as one process adds them: after
# ten steps weights, moments, the mean of the loss, the int8 file and the validation loss are equal.
ok "10 steps" both 10
ok "state" cmp "$out/one10.state" "$out/two10.state"
ok "file" cmp "$out/one10" "$out/two10"
ok "validation" [ "$(value 'validation loss' two10)" = "$(value 'validation loss' one10)" ]
# Two processes go on from the state of two, and end in the same bytes.
ok "4 steps" train 2 4 resumed
ok "and 10" train 2 10 resumed
ok "resumed" build/sdq info --compare "$out/resumed.state" "$out/two10.state" --limit 0    # but for the best step
ok "resumed file" cmp "$out/resumed" "$out/two10"
# Four micro-batches, two in each: (a + c) + (b + d) is not ((a + b) + c) + d. The first step: m is a
# tenth of the gradient that was added up, v a thousandth of its square. Ten steps; measured: 3e-8.
batches=4
ok "1 step of four" both 1
ok "gradient" build/sdq info --compare "$out/one1.state" "$out/two1.state" --limit 1e-6
ok "10 steps of four" both 10
ok "near" near "$(value 'validation loss' two10)" "$(value 'validation loss' one10)" 1e-3
batches=2
# A number of micro-batches that cannot be shared out.
ok "three processes" sh -c "! mpirun --allow-run-as-root --oversubscribe -n 3 $out/train_mpi $model 1 2 $out/x a b c d </dev/null"

echo "$passed passed, $failed failed"
[ $failed = 0 ]
