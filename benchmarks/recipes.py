"""Planned figures of the recipes at real scale, for the heads of conf/experiment and for docs/recipes.md.

    python -m benchmarks.recipes

A recipe is a file of conf/experiment whose head has a line `plan:`, the command that plans it. What `sora_train.plan`
forecasts for that command is written to the line `planned:` below it and to the table in docs/recipes.md.
tests/config/test_recipes.py compares them.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sora_train.config.hydra import CONF, as_typed
from sora_train.config.load import build
from sora_train.config.schema import Config
from sora_train.forecast.estimate import estimate, heaviest_pass
from sora_train.forecast.footprint import stage_of
from sora_train.forecast.forecast import by_stage
from sora_train.forecast.hardware import hardware
from sora_train.plan import Options

TABLE = Path(__file__).parents[1] / "docs" / "recipes.md"
_PLAN = re.compile(r"^#   plan: +python -m sora_train\.plan (.+)$", re.M)
_PLANNED = re.compile(r"^(#   planned:).*$", re.M)
_ROWS = re.compile(r"(<!-- recipes -->\n).*?(<!-- /recipes -->)", re.S)
_HEADS = ("experiment", "hardware", "ZeRO", "parameters", "tokens a step", "GiB a GPU", "s a step", "steps", "time",
          "GPU hours", "cost")  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A recipe and the forecast for it, as configured."""

    name: str
    config: Config
    options: Options
    parameters: int  # trained ones
    frozen: int
    peak: float  # GiB of one GPU
    fits: bool
    seconds: float  # of a step

    @property
    def hours(self) -> float:
        """Hours of the whole run."""
        return self.seconds * self.config.steps / 3600

    @property
    def dollars(self) -> float:
        """Cost of the whole run at the price in `forecast/hardware.py`."""
        return self.hours * self.options.world_size * hardware(self.options.hardware).dollars_per_hour

    def line(self) -> str:
        """The figures for the head of the recipe's file."""
        room = hardware(self.options.hardware).memory_gib
        return (
            f"{self.peak:.0f} of {room:.0f} GiB a GPU, {self.seconds:.3g} s a step; {_time(self.hours)}, "
            f"{_round(self.hours * self.options.world_size)} GPU hours, ${_round(self.dollars)}"
        )

    def row(self) -> tuple[str, ...]:
        """The figures for the table."""
        o, data = self.options, self.config.data
        trained = f"{_short(self.parameters)}" + (f" of {_short(self.parameters + self.frozen)}" if self.frozen else "")
        return (
            f"`{self.name}`", f"{o.world_size} {hardware(o.hardware).name}", str(stage_of(self.config)), trained,
            f"{data.slots * data.max_tokens:,}", f"{self.peak:.0f}", f"{self.seconds:.3g}", f"{self.config.steps:,}",
            _time(self.hours), _round(self.hours * o.world_size), f"${_round(self.dollars)}",
        )  # fmt: skip


def plans() -> dict[str, str]:
    """The arguments of `sora_train.plan` that plan each recipe, by its name."""
    found = {path.stem: _PLAN.search(path.read_text()) for path in sorted(CONF.glob("experiment/*.yaml"))}
    return {name: plan[1] for name, plan in found.items() if plan}


def configured(arguments: str) -> tuple[Config, Options]:
    """The configuration that a command plans, and the command's options."""
    given = dict(argument.partition("=")[::2] for argument in shlex.split(arguments))
    o = Options(int(given.pop("world_size")), given.pop("hardware"), encoded=given.pop("encoded", "") == "true")
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        tree = compose("train", [as_typed(f"{key}={value}") for key, value in given.items()] + ["run_dir=runs/planned"])
    assert not OmegaConf.missing_keys(tree)
    return build(tree, need_vae=False), o


def planned(name: str, config: Config, o: Options) -> Recipe:
    """Forecast a recipe."""
    figures = estimate(config, None, o.world_size, o.encoded)
    heaviest = heaviest_pass(config, None, o.world_size, o.per_node)
    stages = by_stage(config, figures, heaviest, hardware(o.hardware), o.per_node)
    found = stages[stage_of(config)]
    trained = figures.parameters - figures.frozen
    return Recipe(name, config, o, trained, figures.frozen, found.memory.peak / 2**30, found.fits, found.time.total)


def _time(hours: float) -> str:
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.0f} h" if hours >= 10 else f"{hours:.1f} h"


def _round(value: float) -> str:
    """Three digits: a forecast has no more."""
    return f"{float(f'{value:.3g}'):,.0f}"


def _short(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"


def main() -> None:
    """Plan all recipes and write their figures."""
    rows = [_HEADS, ("---",) * len(_HEADS)]
    for name, arguments in plans().items():
        recipe = planned(name, *configured(arguments))
        path = CONF / "experiment" / f"{name}.yaml"
        path.write_text(_PLANNED.sub(lambda m, r=recipe: f"{m[1]}  {r.line()}", path.read_text()))
        rows.append(recipe.row())
        print(name, recipe.line(), "" if recipe.fits else "DOES NOT FIT", flush=True)
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    TABLE.write_text(_ROWS.sub(lambda m: f"{m[1]}\n{table}\n\n{m[2]}", TABLE.read_text()))


if __name__ == "__main__":
    main()
