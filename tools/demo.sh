#!/bin/sh
# The whole chain on the small model, with few steps and prompts: some minutes on two cores.
# Called by `make demo` from the top folder. MODEL, DATA and OUT can be set for another model.
set -e
model=${MODEL:-examples/emoji/model} data=${DATA:-examples/emoji/data} out=${OUT:-build/demo}
steps=20 guidance=4 sdq=build/sdq
mkdir -p "$out"
run() {
    printf '\n$ sdq'
    for word; do case $word in *' '*) printf ' "%s"' "$word";; *) printf ' %s' "$word";; esac; done
    echo
    "$sdq" "$@"
}

echo "A demonstration: $steps denoising steps and a few prompts. make eval measures in earnest."

# 1. ranges from the sampler's own trajectories, weights to int8
run quantize --model "$model" --data "$data/train" --calib-prompts 8 --calib-steps $steps --calib-guidance $guidance \
    --out "$out/ptq.safetensors"

# 2. a short training with quantization, the float network as the teacher
rm -f "$out/qat.state"
run train --what qat --model "$model" --data "$data/train" --calib-prompts 8 --calib-steps $steps \
    --calib-guidance $guidance --steps 30 --batch 4 --state "$out/qat.state" --log "$out/qat.csv" --out "$out/qat.safetensors"

# 3. which evaluations should stay float
cp "$out/qat.safetensors" "$out/schedule.safetensors"
run schedule --model "$model" --unet "$out/schedule.safetensors" --data "$data/train" --count 4 --steps $steps \
    --guidance-scale $guidance --target-psnr 50 --max-float 6

# 4. one picture three times
for precision in fp32 int8 mixed; do
    run txt2img --model "$model" --unet "$out/qat.safetensors" --precision $precision -p "red apple" --seed 7 \
        --steps $steps --guidance-scale $guidance --out "$out/$precision.png"
done

# 5. the table, the strip of pictures and the report
run eval --model "$model" --data "$data/train" --held "$data/val_comp,$data/val_novel" --steps $steps \
    --guidance-scale $guidance --prompts-limit 12 --trajectories 4 --strip 6 --log "$out/qat.csv" --out "$out" \
    --net "int8-ptq:int8:$out/ptq.safetensors" --net "int8:int8:$out/qat.safetensors" \
    --net "mixed:k=3:$out/qat.safetensors" --net "schedule:schedule:$out/schedule.safetensors"

echo; echo "Look at $out/strip.png and $out/report.html."
