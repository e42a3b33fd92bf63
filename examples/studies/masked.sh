#!/usr/bin/env bash
# A masked language model on English text, then classifiers from it and from scratch: three tasks, two rates, three seeds.
#   bash examples/studies/masked.sh
# The better rate of each, by the median of validation accuracy, is trained once more and judged by the test split.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
words=$shared/tokenizers/wordpiece8k-en
own=$out/masked
for split in train valid; do
    [[ -e $out/data/$split.text.idx ]] || megnorm preprocess --strict --quiet --input "$shared/text/$split.jsonl.gz" \
        --tokenizer "$words" --output "$out/data/$split.text"
done
began=$SECONDS
if [[ ! -e $own/pretraining/ended ]]; then # alone, on all cores
    OMP_NUM_THREADS=$jobs megnorm train --config $here/masked.yaml data.path="$out/data/train.text" \
        data.valid="$out/data/valid.text" data.tokenizer="$words" train.threads="$jobs" train.out="$own/pretraining" "$@"
    echo "$((SECONDS - began)) s" | tee "$own/pretraining/ended"
fi

# fine FOLDER TASK START RATE SPLIT
fine() {
    local from=()
    [[ $3 == pretrained ]] && from=(checkpoint.init_from="$own/pretraining")
    for seed in ${SEEDS:-1 2 3}; do
        train "$1/seed-$seed" --config $here/classes.yaml data.path="$shared/tasks/$2.train.tsv" \
            data.valid="$shared/tasks/$2.$5.tsv" data.tokenizer="$words" model.classes="${classes[$2]}" optim.lr="$4" \
            train.seed="$seed" "${from[@]}" ${FINE:-}
    done
}

declare -A classes=([wntopic]=10 [wnhyper]=2 [wnsense]=2)
for task in wntopic wnhyper wnsense; do
    for start in pretrained scratch; do
        for rate in ${RATES:-3e-4 1e-3}; do
            fine "$own/$task/$start/$rate" $task $start "$rate" valid
        done
    done
done
finish
for task in wntopic wnhyper wnsense; do
    for start in pretrained scratch; do
        fine "$own/$task/$start/test" $task $start "$(python $here/summary.py rate "$own/$task/$start")" test
    done
done
finish
python $here/summary.py masked "$own"
