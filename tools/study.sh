#!/bin/sh
# What each part of quantizing and training is worth on the small model (tools/STUDY.md): writes
# tools/study.csv and build/study/study.md; about an hour of one idle core. A run that is stopped goes
# on where it was; further arguments are flags of sdq study, such as --rows static,static-300.
#   STUDY=ways         instead: cheaper ways of training, compared with all weights trained
#   STUDY=schedulers   instead: two rows with several schedulers and steps
set -e
data=examples/emoji/data out=${OUT:-build/study} bin=${SDQ:-build/sdq}
study() {
    "$bin" study --model "${MODEL:-examples/emoji/model}" --data $data/train --held $data/val_comp,$data/val_novel \
        --guidance-scale 4 "$@"
}
case "$STUDY" in
schedulers)
    for run in "pndm 50" "pndm 20" "ddim 20" "euler 20" "dpm++2m 20"; do
        set -- $run
        study --scheduler "$1" --steps "$2" --out "$out/$1-$2" --rows static,position --seeds 1 --calib-prompts 6
    done ;;
ways)
    study --scheduler dpm++2m --steps 20 --prompts-limit 72 --out "$out" --over four-weights-300 \
        --rows four-weights-300,four-scales,four-300,four-last-8,four-lora,four-moments8 "$@" ;;
*)
    study --scheduler dpm++2m --steps 20 --prompts-limit 72 --out "$out" "$@"
    cp "$out/study.csv" tools/study.csv ;;
esac
