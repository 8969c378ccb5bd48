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
cache_q() { s quantize --model $model --data $data --calib-prompts 2 --calib-steps 3 --bias-correction 0 --cache "$out/qcache" --out "$out/qc" && cmp "$out/q" "$out/qc"; }
ok "quantize through a cache" cache_q
ok "quantize from a cache" cache_q
ok "calibrate" s calibrate --model $model --data $data --calib-prompts 1 --calib-steps 2 --range-conv static --json "$out/r.json"
same() { s forward $model --part unet --in $golden/sd1-a.safetensors --out "$out/a" --precision fake &&
    s forward $model --part unet --in $golden/sd1-a.safetensors --out "$out/b" --precision int8 --unet "$out/q" && cmp "$out/a" "$out/b"; }
ok "fake == int8" same
for p in int8 mixed; do ok "txt2img $p" s txt2img --model $model --unet "$out/q" --precision $p --k 1 -p cat --steps 4 --out "$out/$p.png"; done
ok "float list" s txt2img --model $model --unet "$out/q" --float-evals 0,4 -p cat --steps 4 --out "$out/list.png"
ok "k=1 is evaluations 0 and 4" cmp "$out/list.png" "$out/mixed.png"
# the memory it says it needs, and what the process took: within 10 %
foreseen() { "$sdq" txt2img --threads 1 --model examples/emoji/model -p "red apple" --steps 4 -o "$out/m.png" "$@" 2>"$out/need" >"$out/took" \
    && awk '/memory needed/ { n = $3 } /peak memory/ { for (i = 1; i < NF; i++) if ($i == "memory") p = $(i + 1) }
            END { exit !(p > 0 && n / p > 0.9 && n / p < 1.1) }' "$out/need" "$out/took"; }
for size in 128 256; do
    ok "memory for $size pixels" foreseen -W $size -H $size
    ok "memory for $size pixels, in bands" foreseen -W $size -H $size --vae-tiling --vae int8
    ok "memory for $size pixels, all networks" foreseen -W $size -H $size --keep-loaded
done
ok "one hash on every instruction set" s bench --hash --model $model --unet "$out/q"
says "a hash of no file" 1 "cannot be opened" s bench --hash --model $model --unet "$out/nothing"
ok "int8 only" s txt2img --model $model --unet "$out/q" --int8-only -p cat --steps 4 --out "$out/only.png"
ok "int8 only draws the same" cmp "$out/only.png" "$out/int8.png"
ok "schedule" s schedule --model $model --unet "$out/q" --data $data --count 2 --steps 4 --target-psnr 0 --max-float 2
ok "schedule is stored" sh -c "\"$sdq\" info \"$out/q\" | grep -q 'sdq.schedule: pndm 4 7.5 5 '"
ok "drawn by the schedule" sh -c "\"$sdq\" txt2img --model $model --unet \"$out/q\" -p cat --steps 4 --out \"$out/x.png\" --threads 1 -q | grep -q '2 float'"
head -c 20000 "$out/q" >"$out/cut"
says "truncated int8 file" 1 "cut" s txt2img --model $model --unet "$out/cut" -p cat --out "$out/x.png"
says "int8 file of another model" 1 "another UNet" s txt2img --model $golden/models/sd1-b --unet "$out/q" -p cat --out "$out/x.png"

# A scheduler reads the folder's configuration as its own: the same keys, another class.
variant() {     # NAME: a copy of the model whose big files are links
    rm -rf "$out/$1"; mkdir -p "$out/$1"; cp -r $model/. "$out/$1/"
}
keys() {
    sed "s/PNDMScheduler/$2/; s/^{/{ $3/" $model/scheduler/scheduler_config.json >"$out/$1/scheduler/scheduler_config.json"
    sed "s/PNDMScheduler/$2/" $model/model_index.json >"$out/$1/model_index.json"
}
drawn() { s txt2img --model "$1" -p cat --steps 3 --seed 4 -W 16 -H 16 --save-latents "$out/$2" $3; }
variant v
class() {       # FLAG CLASS KEYS..: the flag on a PNDM folder equals the folder of that class
    keys v PNDMScheduler "$3" && drawn "$out/v" l1 "--scheduler $1" && keys v $2 "$3" && drawn "$out/v" l2 && cmp "$out/l1" "$out/l2"
}
ok "ddim as a folder of its own" class ddim DDIMScheduler ''
index() { keys v DDIMScheduler "" && drawn "$out/v" l1 && cp $model/scheduler/scheduler_config.json "$out/v/scheduler/" && drawn "$out/v" l2 &&
    cmp "$out/l1" "$out/l2" && drawn $model l2 && ! cmp -s "$out/l1" "$out/l2"; }
ok "the class is that of model_index.json" index
ok "euler with keys of its own" class euler EulerDiscreteScheduler '"final_sigmas_type": "sigma_min", "use_karras_sigmas": true,'
ok "those keys change the picture" sh -c "\"$sdq\" txt2img --model $model --scheduler euler -p cat --steps 3 --seed 4 -W 16 -H 16 --save-latents \"$out/l3\" -q && ! cmp -s \"$out/l1\" \"$out/l3\""
ok "dpm++2m as a folder of its own" class dpm++2m DPMSolverMultistepScheduler '"euler_at_final": true,'
keys v PNDMScheduler '"thresholding": true, "solver_type": "heun",'
ok "a key of other classes" drawn "$out/v" l1
says "a key of the class asked for" 1 "thresholding.*ddim" s txt2img --model "$out/v" --scheduler ddim -p cat -o "$out/x.png"
says "another one" 1 "solver_type" s txt2img --model "$out/v" --scheduler dpm++2m -p cat -o "$out/x.png"
sed -i 's/"skip_prk_steps": true/"skip_prk_steps": false/; s/"thresholding": true, //' "$out/v/scheduler/scheduler_config.json"
says "no Runge-Kutta start" 1 "skip_prk_steps" s txt2img --model "$out/v" -p cat -o "$out/x.png"
ok "which ddim does not need" drawn "$out/v" l1 "--scheduler ddim"
sed 's/"steps_offset": 1/"steps_offset": 3/; s/"clip_sample": false/"clip_sample": true/' $model/scheduler/scheduler_config.json >"$out/v/scheduler/scheduler_config.json"
adopted() { drawn "$out/v" l1 "--scheduler ddim" && drawn $model l2 "--scheduler ddim" && cmp "$out/l1" "$out/l2"; }
ok "steps_offset and clip_sample as the pipeline has them" adopted
rm "$out/v/scheduler/scheduler_config.json"
says "no scheduler" 1 "scheduler_config.json: is missing" s txt2img --model "$out/v" -p cat -o "$out/x.png"
says "logs that resuming cannot repeat" 2 "divisor of --save-every" s train --what vae --model $model --data $data --out "$out/v2" --steps 4 --save-every 4 --log-every 3
says "no log rows" 2 "1 or more" s train --what vae --model $model --data $data --out "$out/v2" --steps 4 --log-every 0
ok "in bands" sh -c "\"$sdq\" txt2img --model $model -p cat --steps 1 -o \"$out/b1.png\" && \"$sdq\" txt2img --model $model -p cat --steps 1 --vae-tiling -o \"$out/b2.png\" && cmp \"$out/b1.png\" \"$out/b2.png\""
ok "an int8 decoder" s txt2img --model $model --vae int8 -p cat --steps 1 -o "$out/x.png"
says "karras for pndm" 1 "Karras" s txt2img --model $model --karras -p cat -o "$out/x.png"
variant v; sed -i 's/"timestep_spacing": "leading"/"timestep_spacing": "trailing"/' "$out/v/scheduler/scheduler_config.json"
says "trailing, 61 steps" 1 "timestep_spacing" s txt2img --model "$out/v" --steps 61 -p cat -o "$out/x.png"

# A UNet that is told the guidance scale: one branch, no negative prompt, every scale another picture.
variant g; sed -i 's/"time_cond_proj_dim": null/"time_cond_proj_dim": 8/' "$out/g/unet/config.json"
ok "guidance as an input: weights" s train --what t2i --model "$out/g" --vae $model --init --data $data --size 16 --batch 1 --steps 1 --out "$out/g2"
guided() { s txt2img --model "$out/g2" -p cat --steps 2 --seed 4 -W 16 -H 16 --scheduler lcm --save-latents "$out/$1" --cfg-scale $2 -n "$3"; }
told() { guided l1 5 "" && guided l2 5 dog && cmp "$out/l1" "$out/l2" && guided l3 0.5 "" && ! cmp -s "$out/l1" "$out/l3" && guided l4 0 "" && ! cmp -s "$out/l3" "$out/l4"; }
ok "guidance as an input" told
says "guidance beyond the embedding" 1 "guidance scale" guided l1 1000 ""
ok "guidance as an input: quantized" s quantize --model "$out/g2" --data $data --calib-prompts 1 --calib-steps 2 --out "$out/gq"
ok "guidance as an input: searched" s schedule --model "$out/g2" --unet "$out/gq" --data $data --count 1 --steps 2 --target-psnr 0 --max-float 1 --dry-run

# Networks that do not fit together; folders that hold none.
variant v; sed -i 's/"model_max_length": 12/"model_max_length": 13/' "$out/v/tokenizer/tokenizer_config.json"
says "longer prompts than positions" 1 "model_max_length.*max_position_embeddings" s txt2img --model "$out/v" -p cat -o "$out/x.png"
says "a network's folder" 1 "not the folder of a pipeline" s info $model/unet
# A damaged int8 file, one of other weights, values that are not finite.
flip() { n=$(wc -c <"$1"); at=$((n / 2)); { head -c $at "$1"; printf 'Z'; tail -c $((n - at - 1)) "$1"; } >"$2"; }
flip "$out/q" "$out/flipped"
says "a byte of an int8 file" 1 "its hash is" s txt2img --model $model --unet "$out/flipped" -p cat -o "$out/x.png"
variant v; flip $model/unet/diffusion_pytorch_model.safetensors "$out/v/unet/diffusion_pytorch_model.safetensors"
says "int8 file of other weights" 1 "other float weights" s txt2img --model "$out/v" --unet "$out/q" -k 1 -p cat -o "$out/x.png"
ok "which can be drawn alone" s txt2img --model "$out/v" --unet "$out/q" --int8-only -p cat --steps 2 -o "$out/x.png"
n=$(wc -c <$model/unet/diffusion_pytorch_model.safetensors)
{ head -c $((n - 4)) $model/unet/diffusion_pytorch_model.safetensors; printf '\377\377\377\377'; } >"$out/v/unet/diffusion_pytorch_model.safetensors"
says "weights that are not numbers" 1 "not finite" s txt2img --model "$out/v" -p cat --steps 2 -o "$out/x.png"

# A model in one file: the tokenizer is in the command, the rest in the file; both layouts draw the same.
ok "random_sd" ${CC:-cc} -O1 -DSDQ_NO_SIMD tools/random_sd.c -o "$out/random_sd" -lm
says "random_sd without words" 2 "usage" "$out/random_sd"
one() { s txt2img --model "$out/$1" -p "a cat! on mars" -n dog --steps 2 --seed 4 -W 16 -H 16 --save-latents "$out/$2" -o "$out/x.png" $3; }
layouts() { "$out/random_sd" $1 $2 single "$out/$1.st" 3 && "$out/random_sd" $1 $2 folder "$out/$1" 3 && one $1.st l1 && one $1 l2 && cmp "$out/l1" "$out/l2"; }
ok "SD 1 in one file" layouts tiny1 F32
ok "SD 2 in one file" layouts tiny2 F16
told() { "$sdq" info "$1" >"$out/told"; shift; for t; do grep -q "$t" "$out/told" || { cat "$out/told"; return 1; }; done; }
ok "what SD 1 is" told "$out/tiny1.st" "Stable Diffusion 1 in a single file, mostly F32" "holds: text encoder, UNet, VAE" "predicts: noise"
ok "what SD 2 is" told "$out/tiny2.st" "Stable Diffusion 2 in a single file, mostly F16" "predicts: velocity"
ok "what a VAE is" told "$out/tiny2/vae/diffusion_pytorch_model.safetensors" "a VAE alone, mostly F16"
ok "what an int8 file is" told "$out/q" "a UNet quantized to int8" "sdq.recipe: range"
epsilon() { one tiny2.st l3 "--prediction epsilon" && ! cmp -s "$out/l2" "$out/l3" && one tiny2.st l3 "--prediction v" && cmp "$out/l2" "$out/l3"; }
ok "what SD 2 predicts can be said" epsilon
says "what a folder predicts" 1 "scheduler_config.json" one tiny2 l3 "--prediction v"
says "another prediction" 2 "epsilon|v" one tiny2.st l3 "--prediction x"
says "a network as a model" 1 "is a UNet alone" one tiny2/unet/diffusion_pytorch_model.safetensors l3
printf 'PK\3\4archive/data.pkl' >"$out/x.ckpt"
says "a pickle" 1 "is a pickle.*save_file" "$sdq" info "$out/x.ckpt"
single8() { s quantize --model "$out/tiny2.st" --data $data --calib-prompts 1 --calib-steps 2 --out "$out/q2" && one tiny2.st l1 "--unet $out/q2 -k 1" && one tiny2 l2 "--unet $out/q2 -k 1" && cmp "$out/l1" "$out/l2"; }
ok "int8 of a single file, used with both" single8
four() { s quantize --model "$out/tiny2.st" --data $data --calib-prompts 1 --calib-steps 2 --weight-bits 4 --weight-group 4 --out "$out/q4" && one tiny2.st l1 "--unet $out/q4 -k 0" && ! cmp -s "$out/l1" "$out/l2" && told "$out/q4" "weight_bits=4 weight_group=4" "U8 "; }
ok "weights of 4 bits" four
# Every shape is listed, every layer counted, and so is all the time.
tables() { s bench --model "$out/$1" --runs 1 --layers all --json "$out/b.json" >"$out/b" && awk '/^its layers/ { n = $3 } /^(linear|conv3x3)/ { r++; c += $5 }
    /^all (int8|float) ones/ { c -= $4; kinds++ } / all of it/ { whole = $4 > 0 && $5 == "100.0%" } END { exit !(n > 10 && r == n && c == 0 && kinds == 2 && whole) }' "$out/b"; }
ok "bench of a single file" tables tiny1.st
ok "bench of a folder" tables tiny2
study() { s study --model $model --data $data --held $data --rows static --row "mine:$over:--steps 2 --batch 2" --prompts-limit 2 --steps 2 --trajectories 1 --calib-prompts 1 --out "$out/study" "$@" >"$out/table"; }
rows() { [ "$(cut -d, -f1 "$out/study/study.csv" | tr '\n' ' ')" = "row static mine " ] && grep -q '^| mine | .* | static |' "$out/table"; }
over=static
ok "a study" study
ok "a study's rows" rows
cp "$out/table" "$out/table1"
ok "a study again" study
ok "a study again is equal" cmp "$out/table" "$out/table1"
over=
ok "a study over another row" study --over static
ok "a study over another row is equal" cmp "$out/table" "$out/table1"
says "a study over no row" 2 "--over nix: expected one of the rows" study --over nix
says "weights of 5 bits" 2 "8|4" s quantize --model "$out/tiny2.st" --data $data --weight-bits 5 --out "$out/q5"

# What the command line says before it works.
img() { s txt2img --model $model -p cat --steps 2 -W 16 -H 16 -o "$out/x.png" "$@"; }
says "a prompt without -p" 2 "a is no flag" s txt2img --model $model a cat
says "no prompt" 2 "--prompt is needed" s txt2img --model $model
says "seed beyond 2^64" 2 "--seed" img --seed 18446744073709551616
seeds() { img --seed -5 --save-latents "$out/l1" && img --seed 18446744073709551611 --save-latents "$out/l2" && cmp "$out/l1" "$out/l2"; }
ok "negative seeds are torch's" seeds
says "words with _ in them" 2 "cpu,torch,std-default" img --rng best
ok "and without" img --rng std_default
says "guidance that is no float" 2 "--guidance-scale 1e39" img --cfg-scale 1e39
says "prompt that is not UTF-8" 2 "UTF-8" s txt2img --model $model -p "$(printf 'a\377b')" -o "$out/x.png"
says "no folder for the picture" 1 "no/dir/x.png" s txt2img --model $model -p cat -o "$out/no/dir/x.png"
says "a folder as picture" 1 "is a folder" s txt2img --model $model -p cat -o "$out"
says "a picture of another kind" 2 ".png" s txt2img --model $model -p cat -o "$out/x.jpg"
says "no pictures" 2 "--batch-count 0" img -b 0
says "too many threads" 2 "--threads 20000" "$sdq" info --threads 20000
batch() { img -b 2 --seed 3 --save-latents "$out/l1" && img --seed 3 --save-latents "$out/l2" && "$sdq" info --tensors "$out/l1" | grep -q '\[2,4,8,8\]' &&
    head -c 1000 "$out/l1" | tail -c 500 | cmp - "$(head -c 1000 "$out/l2" | tail -c 500 >"$out/l3"; echo "$out/l3")"; }
ok "latents of two pictures" batch
says "an array that is not there" 1 "has no array sample" s forward $model --part unet --in "$out/l1" --out "$out/o"
ok "diffusers' spellings" img --num_inference_steps 2 --guidance_scale 3 --verbose

# Training: a run that is stopped and goes on ends in the same files.
step_of() { head -c 2000 "$1" 2>/dev/null | sed -n 's/.*"step":"\([0-9]*\)".*/\1/p'; }
twice() {       # NAME FLAGS..: 12 steps at once; 12 steps, killed on the way
    n=$1; shift
    s train "$@" --steps 12 --save-every 2 --state "$out/$n.s1" --log "$out/$n.1.csv" --out "$out/$n.1" || return 1
    "$sdq" train "$@" --steps 12 --save-every 2 --state "$out/$n.s2" --log "$out/$n.2.csv" --out "$out/$n.2" --threads 1 -q & pid=$!
    while kill -0 $pid 2>/dev/null; do case $(step_of "$out/$n.s2") in ''|0) ;; *) kill -9 $pid 2>/dev/null ;; esac; done
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

# Calibrating again would take days.
again() {
    ref() { s train --recipe reference --model $model --data $data --size 16 --batch 2 --state "$out/again.state" --out "$out/again" "$@"; }
    ref --steps 1 --calib-batches 3 || return 1
    ref --steps 2 --calib-batches 1000000000 & pid=$!
    (sleep 60; kill -9 $pid 2>/dev/null) >/dev/null 2>&1 & sleeper=$!
    wait $pid && kill $sleeper
}
ok "going on does not calibrate again" again
says "a state of another recipe" 1 "another model or recipe: range_conv=static there, range_conv=block here" \
    s train --recipe reference --model $model --data $data --size 16 --batch 2 --range-conv block --calib-batches 3 --steps 3 --state "$out/again.state" --out "$out/again"

says "coherent without trajectories" 2 "--coherent" s train --model $model --data $data --coherent 1 --noise-loss 1 --out "$out/x"

# Long runs. In this order: files of one test serve the next.
qat() { "$sdq" train --model $model --data $data --batch 2 --calib-prompts 2 --calib-steps 3 --range-conv static "$@" --threads 1; }
long() { qat --steps 6 --validate-every 2 --best "$out/best" --cache "$out/cache" --log "$out/long.csv" --out "$out/long" -q; }
ok "validation" long
rows() { [ "$(cut -d, -f1 "$out/long.csv" | tr '\n' ' ')" = "step 0 1 2 3 4 5 6 " ] &&
    [ "$(awk -F, 'NR > 1 && $1 % 2 == 0 && $8 != "" { n++ } NR > 1 && $5 != $2 { bad = 1 } END { print n, bad }' "$out/long.csv")" = "4 " ]; }
ok "rows of a log" rows
ok "best weights are a file" sh -c "'$sdq' info '$out/best' | grep -q array"
says "a stale cache" 1 "is stale" qat --steps 2 --cache "$out/cache" --seed 2 --out "$out/long2" -q
says "a best without validation" 2 "--validate-every" qat --best "$out/best" --out "$out/x" -q
says "a file that is no training's" 1 "not the state of a training" sh -c \
    "cp '$out/cache.states' '$out/none.state'; '$sdq' train --model $model --data $data --calib-prompts 1 --calib-steps 3 --state '$out/none.state' --out '$out/x' -q || { rm '$out/none.state'; exit 1; }"
says "a log with other columns" 1 "is not a log" sh -c \
    "'$sdq' train --model $model --data $data --batch 2 --calib-prompts 1 --calib-steps 3 --steps 1 --state '$out/l.state' --out '$out/x' -q && echo step,loss >'$out/l.csv' &&
     '$sdq' train --model $model --data $data --batch 2 --calib-prompts 1 --calib-steps 3 --steps 2 --state '$out/l.state' --log '$out/l.csv' --out '$out/x' -q"
says "a rate that is too high" 1 "training: the \(loss\|gradient\) of step [0-9]* is .*\(such an output is\|is that of\|first\|values of\)" \
    qat --train-set all --steps 40 --lr 1e18 --out "$out/x" -q
# A disk that is full: 512 bytes are all that a file can have.
cramped() { (trap '' XFSZ; ulimit -f 1; "$@"); }
ok "a state" qat --steps 2 --state "$out/full.state" --out "$out/x" -q
cp "$out/full.state" "$out/full.before"
says "a full disk" 1 "disk full.*earlier step is still there" cramped qat --steps 4 --state "$out/full.state" --out "$out/x" -q
ok "the state of before" cmp "$out/full.state" "$out/full.before"
says "a full disk at the end" 1 "disk full" cramped qat --steps 1 --out "$out/full" -q
ok "nothing is left of it" [ ! -e "$out/full" ] && [ ! -e "$out/full.tmp" ]
# SIGTERM: the state is written and the same command goes on, to the same bytes as without.
term() {
    "$sdq" train --model $model --data $data --batch 2 --calib-prompts 2 --calib-steps 3 --range-conv static \
        --steps 100000 --save-every 0 --save-minutes 0.005 --state "$out/term.state" --out "$out/term" -q & pid=$!
    while kill -0 $pid 2>/dev/null && [ ! -f "$out/term.state" ]; do :; done
    kill -TERM $pid; wait $pid; [ $? = 1 ] && [ -f "$out/term.state" ] || return 1
    n=$(step_of "$out/term.state")
    [ "${n:-0}" -gt 0 ] && [ "$n" -lt 100000 ] || return 1
    m=$((n + 3))
    qat --steps $m --state "$out/term.state" --out "$out/term" -q && qat --steps $m --state "$out/whole.state" --out "$out/whole" -q &&
        cmp "$out/term" "$out/whole" && cmp "$out/term.state" "$out/whole.state"
}
ok "SIGTERM" term

# Mistakes.
says "unknown flag" 2 "--nonsense" "$sdq" txt2img --nonsense 3
says "unknown command" 2 "draw" "$sdq" draw
says "missing flag" 2 "--model" "$sdq" txt2img -p cat
says "no number" 2 "--steps" "$sdq" txt2img --model $model --steps many
says "no such scheduler" 2 "--scheduler" "$sdq" txt2img --model $model --scheduler best
says "no such folder" 1 "nowhere" "$sdq" txt2img --model nowhere -p cat
says "a number below 0" 2 "a whole number from 0 up" "$sdq" txt2img --model $model -p cat --steps -1
says "an output without a name" 1 "has no name" "$sdq" txt2img --model $model -p cat -o ""
says "float ends of nothing" 1 "--unet" "$sdq" txt2img --model $model -p cat -k 1 -q
says "a layer that is not there" 1 "no.such" s quantize --model $model --data $data --keep-float no.such --calib-prompts 1 --calib-steps 1 --out "$out/x"
[ ! -c /dev/full ] || says "a full disk for what is printed" 1 "could not be written" sh -c "'$sdq' info >/dev/full"
for c in "" txt2img train calibrate quantize schedule eval study forward info selftest bench; do
    ok "help of $c" sh -c "n=\$(\"$sdq\" $c --help | wc -l) && [ \$n -ge 3 ] && [ \$n -le 40 ]"
done

echo "$passed passed, $failed failed"
[ $failed = 0 ]
