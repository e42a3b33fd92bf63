#!/usr/bin/env bash
# 100-100 layers, and 500-500 narrower ones, 200 steps with DeepNorm and Post-LN at the same three rates.
#   bash examples/studies/depth.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
pairs
own=$out/depth
for depth in ${DEPTHS:-100 500}; do
    width=64
    ((depth > 100)) && width=32
    sizes=(model.encoder_layers="$depth" model.layers="$depth" model.width=$width model.ffn=$((4 * width)))
    sizes+=(model.heads=$((width / 32)))
    sizes+=(model.init.embedding_std="$(python -c "print($width ** -0.5)")")
    megnorm plan --config $here/depth.yaml --ranks 1 "${data[@]}" "${sizes[@]}" model.norm.scheme=deepnorm
    for rate in ${RATES:-5e-4 1e-3 2e-3}; do
        for scheme in deepnorm postln; do
            train "$own/$depth/$scheme-$rate" --config $here/depth.yaml "${data[@]}" "${sizes[@]}" \
                model.norm.scheme=$scheme optim.lr="$rate" "$@"
        done
    done
done
finish
python $here/summary.py depth "$own"
