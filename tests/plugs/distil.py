"""A method as a plugin: a student learns from the data, from a frozen teacher and from its own average; a critic beside
it learns where the student is wrong. Two engines, one registration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sora_train.config.registry import METHODS
from sora_train.config.schema import Config
from sora_train.core.batch import Pack
from sora_train.core.cli import InputError
from sora_train.methods.base import Engines, Network, StepResult
from sora_train.methods.diffusion.learner import DiffusionLearner, planned, start
from sora_train.methods.diffusion.method import Diffusion
from sora_train.models.video_model import planned_model, starting_model


class Distillation:
    """The networks: the diffusion learner's as student, a teacher of other weights, and a critic."""

    def __init__(self, inner: DiffusionLearner, teacher: Any, critic: Any, share: float) -> None:
        self.inner, self.share = inner, share  # of the distance to teacher and average in the loss
        self.networks = {
            "student": inner.networks["video"], "critic": Network(critic, [(critic, 0.5)], ema=False),
            "teacher": Network(teacher, None), "vae": inner.networks["vae"],
        }  # fmt: skip
        self.weight, self.preview = inner.weight, inner.preview

    def step(self, engines: Engines, packs: Sequence[Pack]) -> StepResult:
        student, critic, result = engines["student"], engines["critic"], StepResult()
        for pack in packs:
            latents = self.inner.prepare(pack)
            with torch.no_grad():
                target = self.networks["teacher"].module(latents)
                with engines.averaged("student"):
                    steady = student(latents)
            output = student(latents)
            loss = self.inner.objective.loss(output, pack, latents)
            wrong_NP = (output - 0.5 * (target + steady)).square()
            distance = self.share * (wrong_NP.mean(1) * latents.video.weight_N).sum()
            loss.sum, loss.terms["distance"] = loss.sum + distance, distance.detach()
            student.backward(loss.sum)
            critic.backward(((critic(latents) - wrong_NP.detach()).square().mean(1) * latents.video.weight_N).sum())
            result.losses.append((pack, loss))
        result.applied = all([student.step(), critic.step()])
        return result

    def validate(self, engines: Engines, pack: Pack) -> Tensor:
        return self.inner.loss(engines["student"], pack).sum


class Distil(Diffusion):
    fixed = (*Diffusion.fixed, "method_options")
    options = ("share",)

    def rules(self, config: Config) -> None:
        super().rules(config)
        share = config.method_options.get("share", 1.0)
        if not isinstance(share, (int, float)) or share < 0:
            raise InputError(f"method_options.share={share} must be a number from 0 on")

    def learner(self, config: Config, device: torch.device) -> Distillation:
        share = config.method_options.get("share", 1.0)
        return Distillation(start(config, device), starting_model(config), starting_model(config), share)

    def planned(self, config: Config) -> Distillation:
        return Distillation(planned(config), planned_model(config), planned_model(config), 1.0)


METHODS.register("distil", Distil())
