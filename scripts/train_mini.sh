#!/usr/bin/env bash
# The embedded model from photos to weights, on two CPU cores in some days, on a GPU in some hours. Each part goes on where
# it was stopped; OVERRIDES are given to every training, e.g. trainer.params.accelerator=gpu.
#
#   scripts/train_mini.sh PHOTOS VAL_PHOTOS [OVERRIDE ...]
#
# Afterwards runs/mini/*/weights hold what belongs into weights/mini: one_step.safetensors is one_step/weights/lora.safetensors.
set -euo pipefail
if [ $# -lt 2 ]; then sed -n '2,8s/^# \?//p' "$0"; exit 1; fi
photos=$(realpath "$1"); val=$(realpath "$2"); shift 2
cd "$(dirname "$0")/.."
python=${PYTHON:-python} runs=${RUNS:-runs/mini}
data=(photos="$photos" val_photos="$val" resume=auto)

"$python" scripts/train_autoencoder.py --config configs/train/mini/autoencoder.yaml "${data[@]}" run_dir="$runs/autoencoder" "$@"
autoencoder=(weights.autoencoder="$runs/autoencoder/weights/autoencoder.safetensors")
# What the autoencoder's latents are divided by, for the trainings below and for configs/model/mini/autoencoder.yaml.
scale=$("$python" scripts/latent_scale.py "$runs/autoencoder")
scale=(networks.autoencoder.params.scale_factor="$scale")

"$python" train_stage1.py --config configs/train/mini/stage1.yaml "${data[@]}" run_dir="$runs/stage1" "$@"
stage1=$runs/stage1/weights/stage1.safetensors

"$python" train_stage2.py --config configs/train/mini/stage2.yaml "${data[@]}" run_dir="$runs/stage2" \
    "${autoencoder[@]}" "${scale[@]}" weights.stage1="$stage1" "$@"

# Pairs of crops and what stage 1 makes of their damage, for the last training.
"$python" scripts/convert_weights.py --vgg16
for part in train val; do
    pairs=$runs/pairs/$part source=$photos count=${COUNT:-3000}
    if [ "$part" = val ]; then source=$val count=128; fi
    if [ ! -d "$pairs" ]; then
        "$python" scripts/make_testset.py "$source" --degradation configs/dataset/mini_heavy.yaml --size 192 --crop random \
            --count "$count" --output "$pairs"
    fi
    "$python" inference.py --input "$pairs/lq" --output "$pairs/reg" --stage 1 weights.stage1="$stage1"
done
"$python" train_stage2.py --config configs/train/mini/one_step_cached.yaml resume=auto run_dir="$runs/one_step" \
    pairs="$runs/pairs/train" val_pairs="$runs/pairs/val" "${autoencoder[@]}" "${scale[@]}" \
    weights.unet="$runs/stage2/weights/unet.safetensors" weights.branch="$runs/stage2/weights/branch.safetensors" "$@"
