"""Sample videos from a trained model.

    python -m sora_train.sample run_dir=runs/demo prompt="a small red ring drifts left over a dark field"
        [out=clip.mp4] [negative="..."] [image=first.png | video=before.mp4] [end_image=last.png | end_video=after.mp4]
        [strength=0.6] [seconds=2] [whole=true] [loop=true] [overlap=2] [memory=true] [height=32] [width=32] [seed=0]
        [count=1] [guidance=3] [steps=20] [solver=euler] [shift=1] [guidance_interval=[0,1]] [guidance_rescale=0]
        [format=mp4|webm|gif|frames|png] [fps=8] [crf=18] [lora=[a.safetensors:0.8,b.safetensors]]
        [checkpoint=1000] [weights=ema|raw] [dtype=fp32|bf16] [vae=FOLDER] [rope_scaling=ntk rope_factors=[2,1,1]]
        [expand=true expand_url=http://localhost:8000/v1]
        [release=FOLDER|off] [release.sign=false] [release.mark=false] [release.guard=false]
    python -m sora_train.sample run_dir=runs/demo shots='[{"seconds": 1, "caption": "a red ring"}, ...]'
    python -m sora_train.sample run_dir=runs/demo prompts=prompts.txt|.csv|.jsonl [out=FOLDER]
    python -m sora_train.sample run_dir=runs/demo [count=8] [out=FOLDER]
    python -m sora_train.sample from=clip.json [key=value ...]

`run_dir` is a run, an export, the folder of a released Wan pipeline, or (with such a folder as `base`) a transformer in
the layout of Wan's own repository, a folder or a file. A prompt is used exactly as typed. Without a prompt, held-out
captions are sampled into run_dir/samples/held_out. `image` or `video` is the beginning of the clip, `end_image` or
`end_video` its end; with both, the part between them is generated. With `strength` below 1, `video` is varied instead
of continued. Videos with more `seconds` than the model was trained on are generated piece by piece, or in one piece
with `whole=true`. Beside each video a contact sheet (PNG) and a record of all settings (JSON) are written; `from`
generates the video of such a record again. Of several samples, existing ones with the same settings are kept. After
`python -m sora_train.release init`, prompts and videos are checked, marked and signed, unless `release=off`. Under
torchrun all ranks share the tokens of each clip, for clips too long for one rank. See docs/sampling.md.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

from sora_train.config.schema import Config
from sora_train.core.cli import InputError, run
from sora_train.data.order.plan import Position
from sora_train.data.shards import Shards
from sora_train.generation.expansion import expand_all
from sora_train.generation.options import Job, Options, jobs_of, parse
from sora_train.generation.samples import make_all
from sora_train.operations.source import Source
from sora_train.release.chosen import safeguards_for

_HELD_OUT = 8  # captions sampled when none is given


def main() -> int:
    """Sample the videos that the options select, and print their paths."""
    o, recorded = parse(__doc__)
    model = Source(o)
    safeguards = safeguards_for(o.release, sign=o.sign, mark=o.mark, guard=o.guard)
    jobs = jobs_of(o) or _held_out(model.config, o)
    if o.expand:
        jobs = expand_all(jobs, o, model.config, model.world.size)
    make_all(model, jobs, recorded, safeguards)
    return 0


def _held_out(config: Config, o: Options) -> list[Job]:
    """Jobs that sample the first `_HELD_OUT` held-out captions, each in the size of its clip."""
    plan = Shards(config).held_out(config)
    if plan is None:
        raise InputError('the run has no held-out shards; give prompt="..."')
    every = (visit for _, slots in plan.from_position(Position()) for slot in slots for visit in slot)
    folder = Path(o.out) if o.out is not None else Path(o.run_dir) / "samples" / "held_out"
    jobs = []
    for n, visit in enumerate(islice((visit for visit in every if visit.frames > 1), o.count or _HELD_OUT)):
        caption = plan.index.captions(visit.sample)[0][0]
        frames, height, width = visit.size
        its = replace(
            o, prompt=caption, seed=o.seed + n, seconds=frames / config.data.made_fps, height=height, width=width,
            count=None,
        )  # fmt: skip
        jobs.append(Job(its, folder / f"{n:02d}", caption))
    return jobs


if __name__ == "__main__":
    run(main)
