#!/usr/bin/env bash
# Train a demo text-to-video model from scratch: set up, make the demo data, train a VAE, encode latents, train a DiT,
# sample, evaluate.
#
#   ./launch/quickstart.sh
#
# It can be stopped at any time; the same command resumes it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

if (($# > 0)); then
    say "error: quickstart.sh takes no arguments; to train with other settings use ./launch/torchrun.sh"
    exit 2
fi

# Run a command. Each of them can be repeated: it skips finished work within seconds.
step() {
    local started=$SECONDS
    say ""
    show "$@"
    run_and_forward "$@"
    if ((status != 0)); then
        say "stopped with code $status after $((SECONDS - started)) s; give ./launch/quickstart.sh again to go on"
        exit "$status"
    fi
    say "done in $((SECONDS - started)) s"
}

step ./launch/setup.sh
enter_venv
use_private_extensions

step python -m data_tools.make_demo out=runs/demo_data
step ./launch/torchrun.sh experiment=demo_vae run_dir=runs/demo_vae
step python -m sora_train.export run_dir=runs/demo_vae out=runs/demo_vae/export format=safetensors
step torchrun --standalone --nproc-per-node "$(processes_here)" -m data_tools.encode_latents experiment=demo 'data.validation=[]' out=runs/demo_latents
step ./launch/torchrun.sh experiment=demo 'data.sources.demo.shards=[runs/demo_latents/demo/*.tar]' run_dir=runs/demo
step python -m sora_train.sample run_dir=runs/demo
step python -m sora_train.evaluate run_dir=runs/demo count=128

cat <<END

All done in $SECONDS s.
  runs/demo/samples/         videos for captions that training has never shown
  runs/demo/metrics.jsonl    the losses; to see them as curves: .venv/bin/tensorboard --logdir runs
  runs/demo/checkpoints/     the model; one more video from it:
    .venv/bin/python -m sora_train.sample run_dir=runs/demo prompt="a large red square moves slowly to the right over a dark field" out=clip.mp4
END
