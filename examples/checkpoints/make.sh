#!/usr/bin/env bash
# Makes the checkpoints of this folder, and evaluates them: twenty minutes of one CPU core. Run it from the checkout's root.
#   bash examples/checkpoints/make.sh OUT
set -euo pipefail
out=$1

scd data record metaworld/push-v3 --episodes 100 --action-noise 0.1 --out "$out/push.zarr" --seed 0
scd train metaworld_state --dataset "$out/push.zarr" --out "$out/push" --threads 1 --max-steps 1500 --seed 0 \
    --set model.width=64 model.num_heads=2 model.encoder_layers=4 model.decoder_layers=2
scd eval "$out/push" --env metaworld/push-v3 --episodes 100 --out "$out/push-evaluation"

scd data record scd_memory/cue-reach:delay=mixed --episodes 600 --action-noise 0.015 --disturbances 0.02 \
    --out "$out/cue_reach.zarr" --seed 0
scd train memory_state --dataset "$out/cue_reach.zarr" --out "$out/cue_reach" --threads 1 --seed 0 \
    --set model.width=64 model.num_heads=2 model.add_context=true
scd eval "$out/cue_reach" --env scd_memory/cue-reach:delay=50 --episodes 100 --out "$out/cue_reach-evaluation"

for name in push cue_reach; do
    newest=$(ls -d "$out/$name"/checkpoints/step_* | tail -n 1)
    mkdir -p "examples/checkpoints/$name"
    for file in manifest.json model.safetensors config.json dataset.json normalization.json metrics.json origin.json; do
        cp "$newest/$file" "examples/checkpoints/$name/"
    done
done
