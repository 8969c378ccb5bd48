#!/bin/sh
# Training that is killed (SIGKILL) at random moments and goes on ends in the same model and state,
# byte for byte, as a run that was left alone, and its log has every step once. So do the caches of
# states and latents, and the best weights by validation.
# Called by tests/run.sh from the top folder. KILLS: how many a kind (20); SEED: other moments.
sdq=${SDQ:-build/sdq} out=${OUT:-build/tests/kill} kills=${KILLS:-20} seed=${SEED:-1}
model=tests/golden/models/sd1-a data=examples/emoji/data/train steps=80
passed=0 failed=0
rm -rf "$out"; mkdir -p "$out"

now() { date +%s%N | sed 's/......$//; s/N$/000/'; }      # milliseconds; whole seconds where date has no %N

# train N FLAGS..: the files of run N; any thread count gives the same bytes
train() {
    n=$1 threads=$2; shift 2
    case $name in *best*) set -- "$@" --cache "$out/$n.cache" --validate-every 7 --best "$out/$n.best" ;; esac
    exec "$sdq" train --model $model --data $data --size 16 --batch 2 --steps $steps --save-every 2 \
        --state "$out/$n.state" --log "$out/$n.csv" --out "$out/$n" --threads "$threads" "$@" \
        >"$out/$n.log" 2>&1
}

# same N: all files of run N are those of the quiet run; the seconds in the log may differ
same() {
    cmp "$out/quiet.state" "$out/$1.state" && diff -r "$out/quiet" "$out/$1" || return 1
    cut -d, -f1-8 "$out/$1.csv" >"$out/$1.rows"
    cmp "$out/quiet.rows" "$out/$1.rows" || return 1
    for f in best cache.states cache.latents; do
        [ ! -f "$out/quiet.$f" ] || cmp "$out/quiet.$f" "$out/$1.$f" || return 1
    done
}

# kind NAME FLAGS..: one quiet run, then runs that are killed until there were enough kills
kind() {
    name=$1; shift
    rm -rf "$out/quiet"* "$out/run"*
    began=$(now)
    if ! (train quiet 1 "$@"); then
        failed=$((failed + 1)); echo "FAILED $name: $(tail -n 1 "$out/quiet.log")"; return
    fi
    ms=$(($(now) - began)); [ $ms -lt 200 ] && ms=200
    cut -d, -f1-8 "$out/quiet.csv" >"$out/quiet.rows"
    rows=$(cut -d, -f1 "$out/quiet.rows" | grep -vx 0 | tr '\n' ' ')
    want="step $(awk -v n=$steps 'BEGIN { for (i = 1; i <= n; i++) printf "%d ", i }')"
    bad=; [ "$rows" = "$want" ] || bad="the log of the quiet run is not one row a step"
    awk -v s="$seed" -v ms=$ms -v n=$((kills * 20)) \
        'BEGIN { srand(s); for (i = 0; i < n; i++) printf "%.3f\n", rand() * ms / 1000 }' >"$out/moments"
    killed=0 runs=0 resumed=0
    while read -r moment && [ -z "$bad" ]; do
        [ $killed -ge "$kills" ] && moment=60
        (train run $((1 + killed % 2)) "$@") &
        pid=$!
        if [ "$moment" != 60 ]; then sleep "$moment"; kill -9 $pid 2>/dev/null; fi
        wait $pid 2>/dev/null; code=$?
        if grep -q 'going on from step' "$out/run.log"; then resumed=$((resumed + 1)); fi
        case $code in
        137) killed=$((killed + 1)); continue ;;
        0) same run >"$out/diff" 2>&1 || bad="after $killed kills: $(head -n 1 "$out/diff")" ;;
        *) bad="after $killed kills: $(tail -n 1 "$out/run.log")" ;;
        esac
        runs=$((runs + 1))
        rm -rf "$out/run" "$out/run."*
        [ $killed -ge "$kills" ] && break
    done <"$out/moments"
    [ -z "$bad" ] && [ $killed -lt "$kills" ] && bad="only $killed kills"
    [ -z "$bad" ] && [ $resumed -lt $((kills / 10)) ] && bad="only $resumed times anything was resumed"
    if [ -z "$bad" ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAILED $name: $bad"; fi
    echo "$name: killed $killed times, resumed $resumed times, $runs complete runs compared (seed $seed, $ms ms a run)"
}

kind vae --what vae --init
kind t2i --what t2i --vae $model --init --accumulate 2
kind qat --what qat --calib-prompts 1 --calib-steps 3 --range-conv static --map mid_block.resnets.1.conv2:mse:0.1
kind qat-reference --what qat --recipe reference --calib-batches 3
kind qat-best --calib-prompts 3 --calib-steps 3 --range-conv static --lr 1e-3
kind data-best --calib-prompts 2 --calib-steps 3 --noise-loss 1 --held 5

echo "$passed passed, $failed failed"
[ $failed = 0 ]
