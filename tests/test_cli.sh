#!/bin/sh
# The command line: golden outputs of every bare network and scheduler, int8, resuming, errors.
# Called by tests/run.sh from the top folder; SDQ is the command, build/sdq unless set.
sdq=${SDQ:-build/sdq} out=${OUT:-build/tests/cli} golden=tests/golden data=examples/emoji/data/train
passed=0 failed=0
rm -rf "$out"; mkdir -p "$out"

# ok NAME COMMAND..: it succeeds
ok() {
    name=$1; shift
    if "$@" >"$out/log" 2>&1; then passed=$((passed + 1))
    else failed=$((failed + 1)); echo "FAILED $name: $*"; tail -n 3 "$out/log"; fi
}
# says NAME STATUS TEXT COMMAND..: it ends with this status and one line on stderr that has the text
says() {
    name=$1 status=$2 text=$3; shift 3
    "$@" >/dev/null 2>"$out/err"; code=$?
    if [ $code = "$status" ] && [ "$(wc -l <"$out/err")" = 1 ] && grep -q -- "$text" "$out/err"; then passed=$((passed + 1))
    else failed=$((failed + 1)); echo "FAILED $name: status $code, $(cat "$out/err")"; fi
}
s() { "$sdq" "$@" --threads 1 --quiet; }
forward() {     # MODEL PART PREFIX COMPARE-PREFIX LIMIT FLAGS..
    m=$1 part=$2 prefix=$3 against=$4 limit=$5; shift 5
    s forward $golden/models/$m --part $part --prefix $prefix --in $golden/$m.safetensors --out "$out/o" "$@" &&
        s info --compare "$out/o" $golden/$m.safetensors --prefix $against --limit $limit
}

for m in sd1-a sd1-b sd2-a bk-a; do
    ok "$m text" forward $m text text text. 1e-4
    ok "$m unet" forward $m unet unet unet. 1e-4
    ok "$m unet-odd" forward $m unet unet-odd unet-odd. 1e-4
    ok "$m unet gradients" forward $m unet unet unet.grad/ 1e-3 --grad noise
    ok "$m encoder" forward $m vae-encoder vae-encoder vae-encoder. 1e-4
    ok "$m decoder" forward $m vae-decoder vae-decoder vae-decoder. 1e-4
done

# Latents of every scheduler: prompt, steps and seed are those of the golden run.
field() { sed -n "/\"$2\": {/,/}/s/.*\"$3\": \"\{0,1\}\([^\"]*\)\"\{0,1\},\{0,1\}$/\1/p" $golden/$1.json | sed 's/,$//'; }
latents() {     # MODEL RUN FLAGS..
    m=$1 r=$2; shift 2
    s txt2img --model $golden/models/$m -p "$(field $m $r prompt)" -n "$(field $m $r negative_prompt)" --steps "$(field $m $r steps)" \
        --cfg_scale "$(field $m $r guidance_scale)" --seed "$(field $m $r seed)" -W "$(field $m $r width)" -H "$(field $m $r height)" \
        --save-latents "$out/l" "$@" && s info --compare "$out/l" $golden/$m.safetensors --prefix txt2img.$r. --limit 1e-3
}
for m in sd1-a sd1-b sd2-a bk-a; do
    for r in pndm ddim euler euler_a dpmpp2m lcm; do ok "$m $r" latents $m $r --scheduler $r; done
    ok "$m karras" latents $m dpmpp2m_karras --sampling-method dpm++2m --karras
    ok "$m guidance 1" latents $m image
done

# The same numbers from any instruction set, and init-latents are diffusers' latents=.
model=$golden/models/sd1-a
for tier in scalar avx2 avx512 avx512vnni; do
    "$sdq" info | grep -q " $tier *yes" || continue
    s txt2img --model $model -p "a cat" --steps 4 --tier $tier --out "$out/$tier.png" >/dev/null
    ok "picture on $tier" cmp "$out/$tier.png" "$out/scalar.png"
done
ok "selftest" s selftest

# Quantize, draw, schedule; FAKE and INT8 of a network without bias correction are equal.
ok "quantize" s quantize --model $model --data $data --calib-prompts 2 --calib-steps 3 --bias-correction 0 --out "$out/q"
ok "calibrate" s calibrate --model $model --data $data --calib-prompts 1 --calib-steps 2 --range-conv static --json "$out/r.json"
same() { s forward $model --part unet --in $golden/sd1-a.safetensors --out "$out/a" --precision fake &&
    s forward $model --part unet --in $golden/sd1-a.safetensors --out "$out/b" --precision int8 --unet "$out/q" && cmp "$out/a" "$out/b"; }
ok "fake == int8" same
for p in int8 mixed; do ok "txt2img $p" s txt2img --model $model --unet "$out/q" --precision $p --k 1 -p cat --steps 4 --out "$out/$p.png"; done
ok "float list" s txt2img --model $model --unet "$out/q" --float-evals 0,4 -p cat --steps 4 --out "$out/list.png"
ok "k=1 is evaluations 0 and 4" cmp "$out/list.png" "$out/mixed.png"
ok "int8 only" s txt2img --model $model --unet "$out/q" --int8-only -p cat --steps 4 --out "$out/only.png"
ok "int8 only draws the same" cmp "$out/only.png" "$out/int8.png"
ok "schedule" s schedule --model $model --unet "$out/q" --data $data --count 2 --steps 4 --target-psnr 0 --max-float 2
ok "schedule is stored" sh -c "\"$sdq\" info \"$out/q\" | grep -q 'sdq.schedule: pndm 4 7.5 5 '"
ok "drawn by the schedule" sh -c "\"$sdq\" txt2img --model $model --unet \"$out/q\" -p cat --steps 4 --out \"$out/x.png\" --threads 1 -q | grep -q '2 float'"
head -c 20000 "$out/q" >"$out/cut"
says "truncated int8 file" 1 "cut" s txt2img --model $model --unet "$out/cut" -p cat --out "$out/x.png"
says "int8 file of another model" 1 "another UNet" s txt2img --model $golden/models/sd1-b --unet "$out/q" -p cat --out "$out/x.png"

# Training: a run that is stopped and goes on ends in the same files.
twice() {       # NAME FLAGS..: 12 steps at once; 12 steps, killed on the way
    n=$1; shift
    s train "$@" --steps 12 --save-every 2 --state "$out/$n.s1" --log "$out/$n.1.csv" --out "$out/$n.1" || return 1
    "$sdq" train "$@" --steps 12 --save-every 2 --state "$out/$n.s2" --log "$out/$n.2.csv" --out "$out/$n.2" --threads 1 -q & pid=$!
    while kill -0 $pid 2>/dev/null; do [ -f "$out/$n.s2" ] && kill -9 $pid 2>/dev/null; done
    wait $pid 2>/dev/null
    s train "$@" --steps 12 --save-every 2 --state "$out/$n.s2" --log "$out/$n.2.csv" --out "$out/$n.2" || return 1
    cmp "$out/$n.s1" "$out/$n.s2" && diff -r "$out/$n.1" "$out/$n.2" &&
        [ "$(cut -d, -f1-4 "$out/$n.1.csv")" = "$(cut -d, -f1-4 "$out/$n.2.csv")" ]
}
ok "train vae" twice vae --what vae --model $model --init --data $data --size 16 --batch 2
ok "train t2i" twice t2i --what t2i --model $model --vae "$out/vae.1" --init --data $data --size 16 --batch 2
ok "train qat" twice qat --what qat --model $model --data $data --batch 2 --calib-prompts 1 --calib-steps 3 --range-conv static \
    --map mid_block.resnets.1.conv2:mse:0.1
ok "train qat, reference" twice ref --what qat --recipe reference --model $model --data $data --size 16 --batch 2 --calib-batches 3

# Mistakes.
says "unknown flag" 2 "--nonsense" "$sdq" txt2img --nonsense 3
says "unknown command" 2 "draw" "$sdq" draw
says "missing flag" 2 "--model" "$sdq" txt2img -p cat
says "no number" 2 "--steps" "$sdq" txt2img --model $model --steps many
says "no such scheduler" 2 "--scheduler" "$sdq" txt2img --model $model --scheduler best
says "no such folder" 1 "nowhere" "$sdq" txt2img --model nowhere -p cat
for c in "" txt2img train calibrate quantize schedule eval forward info selftest bench; do
    ok "help of $c" sh -c "n=\$(\"$sdq\" $c --help | wc -l) && [ \$n -ge 3 ] && [ \$n -le 40 ]"
done

echo "$passed passed, $failed failed"
[ $failed = 0 ]
