"""Warnings at the start of a run about settings that are valid but probably not intended."""

from __future__ import annotations

from sora_train.config.registry import METHODS
from sora_train.config.released import expands_timesteps, flow_shift
from sora_train.config.schema import Config, Previews


def advice(config: Config) -> list[str]:
    """Warnings: previews that will not be made, and tasks that the released weights have not learned."""
    lines = []
    c = config.logging
    wanted = c.sample_every > 0 and c.sample_clips > 0
    if wanted and not c.prompts and c.previews is Previews.held_out and not config.data.validation:
        lines.append(
            "warning: there will be no previews, as data.validation is empty; give prompts of your own, "
            "'logging.prompts=[a red ring,two dogs]', or logging.previews=training"
        )
    if config.model.init_from is not None and METHODS.get(config.method).makes_videos:
        lines += _of_released(config, config.model.init_from)
    return lines


def _of_released(config: Config, base: str) -> list[str]:
    lines = []
    shift, tasks = flow_shift(base), config.flow.tasks
    if shift is not None and shift != config.flow.shift:
        lines.append(
            f"warning: flow.shift={config.flow.shift:g}, and the scheduler of model.init_from has {shift:g}; for the "
            f"noise that it was trained for: flow.shift={shift:g}"
        )
    others = [task for task, weight in tasks.items() if weight > 0 and task not in ("text_to_video", "image")]
    if others and not expands_timesteps(base):
        share = sum(tasks[task] for task in others) / sum(tasks.values())
        without = ", ".join(["text_to_video: 1", *(f"{task}: 0" for task in others)])
        lines.append(
            f"warning: {share:.0%} of the clips train {', '.join(others)}, which the text-to-video weights of "
            f"model.init_from have not learned; for text to video alone: 'flow.tasks={{{without}}}'"
        )
    return lines
