#!/bin/sh
# A training of a whole model that is killed (SIGKILL) at random moments and gone on with ends in the
# same int8 file and state, byte for byte, as one that was left alone.
#
#     tools/kill_full.sh MODEL [flags of sdq train ..]
#
# With the model of build/random_sd at full size, on two idle cores (all weights: about 20 minutes and
# 18 GB; the last four blocks: 10 minutes and 6 GB):
#
#     tools/kill_full.sh sd15 --train-set all
#     tools/kill_full.sh sd15 --train-set all --last-blocks 4
#
# STEPS (6) and KILLS (5): how many; SEED (1): other moments; OUT (build/kill_full): where files go,
# 12 bytes per trained weight for each of two states. Trajectories are sampled once, for both runs.
sdq=${SDQ:-build/sdq} out=${OUT:-build/kill_full} steps=${STEPS:-6} kills=${KILLS:-5} seed=${SEED:-1}
[ $# -gt 0 ] || { sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 2; }
model=$1; shift
mkdir -p "$out" && rm -f "$out"/whole* "$out"/killed* || exit 1
printf 'a red apple\na fox in the snow\n' >"$out/prompts.txt"

train() {       # NAME FLAGS..
    name=$1; shift
    exec "$sdq" train --model "$model" --prompts "$out/prompts.txt" --calib-prompts 2 --calib-steps 2 \
        --cache "$out/cache" --batch 2 --checkpoint --lr 3e-8 --ema 0 --steps "$steps" --save-every 1 \
        --state "$out/$name.state" --out "$out/$name.safetensors" "$@" >"$out/$name.log" 2>&1
}

# start NAME FLAGS..: in the background, until it steps: it has written a state or read one. Moments
# count from there, not from the preparations.
start() {
    rm -f "$out/$1.log"; touch "$out/mark"; sleep 0.05
    (train "$@") & pid=$!
    while kill -0 $pid 2>/dev/null && [ -z "$(find "$out/$1.state" -newer "$out/mark" 2>/dev/null)" ] \
        && ! grep -q 'going on from step' "$out/$1.log" 2>/dev/null; do sleep 0.05; done
}

start whole "$@"
began=$(date +%s)
wait $pid || { tail -n 1 "$out/whole.log"; exit 1; }
seconds=$(($(date +%s) - began + 1)) killed=0 tries=0
echo "left alone: $steps steps, $seconds s"
while [ $killed -lt "$kills" ] && [ $tries -lt $((kills * 10)) ]; do
    tries=$((tries + 1))
    moment=$(awk -v s=$((seed * 1000 + tries)) -v n=$seconds -v k="$kills" \
        'BEGIN { srand(s); rand(); printf "%.2f", rand() * n * 2 / k }')
    start killed "$@"
    sleep "$moment"; kill -9 $pid 2>/dev/null; wait $pid 2>/dev/null
    if [ $? = 137 ]; then
        killed=$((killed + 1))
        at=$(head -c 4000 "$out/killed.state" | LC_ALL=C sed -n 's/.*"step":"\([0-9]*\)".*/\1/p')
        echo "kill $killed: the state has $at steps"
    else                    # it was done before: once more from the start
        rm -f "$out"/killed.safetensors "$out"/killed.state
    fi
done
(train killed "$@") || { tail -n 1 "$out/killed.log"; exit 1; }
cmp "$out/whole.state" "$out/killed.state" && cmp "$out/whole.safetensors" "$out/killed.safetensors" \
    && [ $killed = "$kills" ] || { echo "FAILED: $killed kills"; exit 1; }
echo "$killed kills: state and int8 file are the same bytes ($(cksum <"$out/whole.safetensors"))"
