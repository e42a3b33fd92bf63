# For the studies beside it, which source it: where things are, and runs two at a time, one CPU thread each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=examples/studies
shared=${MEGNORM_SHARED:-../shared}/data
out=${OUT:-runs/studies}
jobs=${JOBS:-2}
export OMP_NUM_THREADS=1
[[ -d $shared ]] || { echo "$shared: not there; MEGNORM_SHARED names the folder that holds data/" >&2; exit 2; }

# train FOLDER ARGUMENTS...: megnorm train, beside at most $jobs - 1 others; not again once it has ended. A run that
# diverges ends with an error that counts as its result; what is wrong from the start ends the study.
train() {
    local run=$1
    shift
    if [[ -e $run/ended ]]; then return; fi
    while (($(jobs -rp | wc -l) >= jobs)); do wait -n || exit 2; done
    mkdir -p "$run"
    (
        code=0
        megnorm train "$@" train.out="$run" train.threads=1 metrics.progress=false >"$run/log.txt" 2>&1 || code=$?
        if [[ ! -s $run/metrics.jsonl ]]; then
            cat "$run/log.txt" >&2
            exit 2
        fi
        echo "$code" >"$run/ended"
        echo "$run: ended with $code"
    ) &
}

# finish: until all of them have ended.
finish() {
    local one
    for one in $(jobs -p); do wait "$one" || exit 2; done
}

# pairs: a vocabulary of English and German together, and both as token files, once.
pairs() {
    words=$out/data/bpe8k
    [[ -e $words/tokenizer.json ]] || megnorm tokenizer train --strict --input "$shared/parallel/train.en-de.tsv"* \
        --keys 0 1 --vocab-size 8192 --output "$words"
    for split in train valid; do
        if [[ -e $out/data/$split.en-de_1.idx ]]; then continue; fi
        megnorm preprocess --strict --quiet --input "$shared/parallel/$split.en-de.tsv"* --keys 0 1 --tokenizer "$words" \
            --output "$out/data/$split.en-de"
    done
    data=(data.path="$out/data/train.en-de" data.valid="$out/data/valid.en-de" data.tokenizer="$words")
}
