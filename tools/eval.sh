#!/bin/sh
# The table of the README: 50 PNDM steps, the held-out names and as many training prompts a row, the
# recipe's 300 training steps. A run that is stopped goes on where it was; further arguments are
# flags of sdq eval. All pictures are taken from build/emoji where tools/emoji.py has made them,
# else the few hundred of examples/emoji/data.
set -e
data=examples/emoji/data
[ -f build/emoji/train/metadata.jsonl ] && data=build/emoji
echo "pictures: $data"
exec build/sdq eval --model "${MODEL:-examples/emoji/model}" --data $data/train --held $data/val_comp,$data/val_novel \
    --steps 50 --guidance-scale 4 --scheduler pndm --log "${LOG:-examples/emoji/train.csv}" --out build/eval "$@"
