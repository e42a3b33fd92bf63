#!/usr/bin/env bash
# English to German, Post-LN and DeepNorm at the same three rates, BLEU and chrF of validation and test set.
#   bash examples/studies/translation.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
pairs
own=$out/translation
for rate in ${RATES:-5e-4 1e-3 2e-3}; do
    for scheme in postln deepnorm; do
        train "$own/$scheme-$rate" --config $here/translation.yaml "${data[@]}" model.norm.scheme=$scheme \
            optim.lr="$rate" "$@"
    done
done
finish
for run in "$own"/*-*/; do
    run=${run%/}
    if [[ -e $run/eval.jsonl || ! -d $run/checkpoints ]]; then continue; fi
    while (($(jobs -rp | wc -l) >= jobs)); do wait -n || exit 2; done
    megnorm eval "$run" --task translation --pairs "$shared/parallel/valid.en-de.tsv" "$shared/parallel/test.en-de.tsv" \
        --target de --beam 4 --device cpu ${LIMIT:+--limit "$LIMIT"} &
done
finish
python $here/summary.py translation "$own"
