#!/usr/bin/env bash
# A masked language model on English text, then classifiers from it and from scratch: three tasks, three seeds.
#   bash examples/studies/masked.sh
# The better rate of each, by the first seed's validation accuracy, is trained with all seeds and judged by the test split.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
words=$shared/tokenizers/wordpiece8k-en
own=$out/masked
for split in train valid; do
    [[ -e $out/data/$split.text.idx ]] || megnorm preprocess --strict --quiet --input "$shared/text/$split.jsonl.gz" \
        --tokenizer "$words" --output "$out/data/$split.text"
done
train "$own/pretraining" --config $here/masked.yaml data.path="$out/data/train.text" \
    data.valid="$out/data/valid.text" data.tokenizer="$words" "$@"

# fine FOLDER TASK START RATE SPLIT SEEDS
fine() {
    local from=()
    [[ $3 == pretrained ]] && from=(checkpoint.init_from="$own/pretraining")
    for seed in $6; do
        train "$1/seed-$seed" --config $here/classes.yaml data.path="$shared/tasks/$2.train.tsv" \
            data.valid="$shared/tasks/$2.$5.tsv" data.tokenizer="$words" model.classes="${classes[$2]}" optim.lr="$4" \
            train.seed="$seed" "${from[@]}" ${FINE:-}
    done
}

declare -A classes=([wntopic]=10 [wnhyper]=2 [wnsense]=2)
seeds=${SEEDS:-1 2 3}
for start in scratch pretrained; do # those from scratch are trained beside the masked model
    [[ $start == scratch ]] || finish
    for task in "${!classes[@]}"; do
        for rate in ${RATES:-3e-4 1e-3}; do
            fine "$own/$task/$start/$rate" "$task" $start "$rate" valid "${seeds%% *}"
        done
    done
done
finish
for task in "${!classes[@]}"; do
    for start in pretrained scratch; do
        rate=$(python $here/summary.py rate "$own/$task/$start")
        fine "$own/$task/$start/test" "$task" $start "$rate" test "$seeds"
    done
done
finish
python $here/summary.py masked "$own"
