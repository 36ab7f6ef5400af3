"""Sampling: a known field leads exactly to its data, what is given comes back as it was, neighbours don't matter."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sora_train.config.schema import SOLVERS, FlowConfig, Prediction
from sora_train.core.batch import LatentPack
from sora_train.flow.ode import Held, Request, generate, noise_of
from sora_train.flow.patches import patchify
from sora_train.models.text.encoder import TextEncoder, tokenize_captions
from sora_train.models.video_model import VideoModel
from sora_train.models.wan.family import WAN
from sora_train.models.wan.model import DiT

CPU = torch.device("cpu")
GRIDS = ((3, 2, 2), (1, 3, 2), (2, 2, 4))
FLOW = FlowConfig(shift=2.0, sampling_steps=7, guidance=3.0)


def latents(grid: tuple[int, int, int], seed: int) -> Tensor:
    return torch.randn(4, grid[0], 2 * grid[1], 2 * grid[2], generator=torch.Generator().manual_seed(seed))


def run(network: nn.Module, requests: list[Request], flow: FlowConfig = FLOW) -> list[Tensor]:
    return generate(network, requests, flow, 4, 2, lambda texts: tokenize_captions(texts, 64, 32), device=CPU)


class Field(nn.Module):
    """A velocity that is known: `formula` of x, the time of each token, and whether its clip has a caption."""

    def __init__(self, formula: object) -> None:
        super().__init__()
        self.formula, self.times, self.sizes = formula, [], []

    def forward(self, pack: LatentPack) -> Tensor:
        t_N1 = pack.video.t_M[pack.video.t_of_N].unsqueeze(1)
        told = torch.tensor([n > 1 for n in pack.video.layout.texts]).repeat_interleave(
            torch.tensor(pack.video.layout.lengths)
        )
        self.times.append(pack.video.t_M.max().item())
        self.sizes.append(len(pack.video.x_NP))
        return self.formula(pack.video.x_NP, t_N1, told.unsqueeze(1).float())  # type: ignore[operator]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 7])
def test_the_field_of_known_data_leads_to_that_data(solver: str, guidance: float, steps: int) -> None:
    """Where all noise flows to one x0, the velocity at (x, t) is (x - x0) / t, and its paths are straight."""
    wanted = [latents(grid, n) for n, grid in enumerate(GRIDS)]
    x0 = torch.cat([patchify(x, 2) for x in wanted]).repeat(1 if guidance == 1.0 else 2, 1)
    flow = replace(FLOW, solver=solver, guidance=guidance, sampling_steps=steps)
    field = Field(lambda x, t, told: (x - x0) / t)
    results = run(field, [Request("x", grid, 5 + n) for n, grid in enumerate(GRIDS)], flow)
    for result, target in zip(results, wanted, strict=True):
        torch.testing.assert_close(result, target, rtol=1e-4, atol=1e-4)


def test_times_go_from_noise_to_data_along_the_shift() -> None:
    field = Field(lambda x, t, told: 0 * x)
    run(field, [Request("x", GRIDS[0], 0)], replace(FLOW, sampling_steps=4))
    assert field.times == pytest.approx([1.0, 2 * 0.75 / 1.75, 2 / 3, 0.4])


def test_clips_of_one_batch_go_along_their_own_shifts() -> None:
    """GRIDS have 12, 6 and 16 tokens; with a shift of 2 at 6 tokens, the second goes as above."""
    seen: list[list[float]] = []

    class Times(nn.Module):
        def forward(self, pack: LatentPack) -> Tensor:
            seen.append(
                [float(pack.video.t_M[part].max()) for part in pack.video.t_of_N.split(pack.video.layout.lengths)]
            )
            return torch.zeros_like(pack.video.x_NP)

    flow = replace(FLOW, sampling_steps=4, guidance=1.0, shift_tokens=6)
    run(Times(), [Request("x", grid, 0) for grid in GRIDS], flow)
    for place, grid in enumerate(GRIDS):
        shift = 2.0 * math.sqrt(math.prod(grid) / 6)
        expected = [shift * t / (1 + (shift - 1) * t) for t in (1.0, 0.75, 0.5, 0.25)]
        assert [times[place] for times in seen] == pytest.approx(expected)


def test_guidance_goes_beyond_the_conditional_velocity() -> None:
    request = Request("a caption", GRIDS[0], 3)
    noise = noise_of(request, 4, 2)
    for guidance, moved in ((1.0, 1.0), (3.0, 3.0), (0.0, 0.0)):
        (result,) = run(Field(lambda x, t, told: told.expand_as(x)), [request], replace(FLOW, guidance=guidance))
        torch.testing.assert_close(result, noise - moved, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("adams_bashforth", 2)])
def test_solvers_have_their_order_of_convergence_with_steps_of_any_length(solver: str, order: int) -> None:
    """dx/dt = x from t = 1 to 0 ends at noise / e; twice the steps, half or a quarter of the error."""
    request = Request("", GRIDS[1], 3)
    target = noise_of(request, 4, 2) / math.e
    errors = []
    for steps in (32, 64):
        flow = replace(FLOW, solver=solver, sampling_steps=steps, guidance=1.0, shift=2.0)
        (result,) = run(Field(lambda x, t, told: x), [request], flow)
        errors.append((result - target).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


def test_guidance_holds_within_its_interval_and_elsewhere_costs_nothing() -> None:
    request = Request("a caption", GRIDS[0], 3)
    noise = noise_of(request, 4, 2)
    flow = replace(FLOW, shift=1.0, sampling_steps=4, guidance=3.0, guidance_interval=(0.4, 0.8))
    field = Field(lambda x, t, told: told.expand_as(x))
    (result,) = run(field, [request], flow)
    torch.testing.assert_close(result, noise - (2 * 1.0 + 2 * 3.0) / 4, rtol=1e-5, atol=1e-5)  # 0.75 and 0.5 are in it
    assert field.sizes == [12, 24, 24, 12]


def test_rescaled_guidance_has_the_deviation_of_the_conditional_velocity() -> None:
    request = Request("a caption", GRIDS[0], 3)
    noise = noise_of(request, 4, 2)
    flow = replace(FLOW, sampling_steps=1, guidance=3.0)
    for rescale, factor in ((0.0, 3.0), (1.0, 1.0), (0.5, 2.0)):
        field = Field(lambda x, t, told: told * x)
        (result,) = run(field, [request], replace(flow, guidance_rescale=rescale))
        torch.testing.assert_close(result, noise - factor * noise, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def model() -> VideoModel:
    torch.manual_seed(0)
    network = VideoModel(DiT(16, 24, 2, 2, 48, 16), TextEncoder(16, 1, 2, 64), WAN)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network.eval()


def test_predicted_data_leads_to_the_data() -> None:
    """A network that knows the data: the last step, from t = 0.05 of 20, isn't cut short."""
    wanted = latents(GRIDS[0], 1)
    known = patchify(wanted, 2)
    flow = replace(FLOW, prediction=Prediction.x0, guidance=1.0, sampling_steps=20, shift=1.0)
    (result,) = run(Field(lambda x, t, told: known.expand_as(x)), [Request("x", GRIDS[0], 5)], flow)
    torch.testing.assert_close(result, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("places", [(0,), (0, 1), (2,), (0, 2), (1,)])
def test_given_frames_come_back_exactly_and_the_rest_depends_on_them(
    model: VideoModel, places: tuple[int, ...], solver: str
) -> None:
    known = latents((3, 2, 2), 9)
    flow = replace(FLOW, solver=solver, sampling_steps=3)
    results = []
    for moved in (known, known + 1.0):
        given = tuple((place, moved[:, place : place + 1]) for place in places)
        results += run(model, [Request("a clip", GRIDS[0], 3, given)], flow)
        assert torch.equal(results[-1][:, list(places)], moved[:, list(places)])
    rest = [place for place in range(3) if place not in places]
    assert (results[0][:, rest] - results[1][:, rest]).abs().max() > 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_a_clip_is_held_to_is_let_go_frame_by_frame(solver: str) -> None:
    """Of two held frames the first is held to the end, the other for half of the way; then the network has its way."""
    wanted, known, noise = (latents((3, 2, 2), n) for n in (1, 2, 3))
    x0 = patchify(wanted, 2)
    request = Request("x", GRIDS[0], 5, held=Held(known[:, :2], noise[:, :2]))
    flow = replace(FLOW, solver=solver, guidance=1.0, sampling_steps=8)
    (result,) = run(Field(lambda x, t, told: (x - x0) / t), [request], flow)
    torch.testing.assert_close(result[:, 0], known[:, 0], rtol=1e-4, atol=1e-4)
    near = 0.03 if solver == "adams_bashforth" else 1e-4  # it carries the slope before the release one step on
    torch.testing.assert_close(result[:, 1:], wanted[:, 1:], rtol=1e-4, atol=near)
    assert (result[:, 0] - wanted[:, 0]).abs().max() > 1


def test_what_a_clip_is_held_to_at_its_end_is_let_go_from_the_front() -> None:
    wanted, known, noise = (latents((3, 2, 2), n) for n in (1, 2, 3))
    x0 = patchify(wanted, 2)
    flow = replace(FLOW, solver="euler", guidance=1.0, sampling_steps=8)
    for release, free in ((True, 2), (False, 1)):
        request = Request("x", GRIDS[0], 5, held_end=Held(known[:, 1:], noise[:, 1:], release))
        assert torch.equal(noise_of(request, 4, 2)[:, 1:], noise[:, 1:])
        (result,) = run(Field(lambda x, t, told: (x - x0) / t), [request], flow)
        torch.testing.assert_close(result[:, :free], wanted[:, :free], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result[:, free:], known[:, free:], rtol=1e-4, atol=1e-4)


def test_guidance_leads_away_from_the_negative_prompt() -> None:
    """Where a caption moves the velocity by its number of tokens, guidance weighs two captions against each other."""
    lengths: list[tuple[int, ...]] = []

    class Told(nn.Module):
        def forward(self, pack: LatentPack) -> Tensor:
            layout = pack.video.layout
            lengths.append(layout.texts)
            per_clip = torch.tensor(layout.texts, dtype=torch.float32)
            return 0 * pack.video.x_NP + per_clip.repeat_interleave(torch.tensor(layout.lengths)).unsqueeze(1)

    flow = replace(FLOW, guidance=3.0, sampling_steps=1, shift=1.0)
    request = Request("one two", (1, 1, 1), 5, negative="one two three four")
    (result,) = run(Told(), [request], flow)
    noise = noise_of(request, 4, 2)
    assert lengths == [(3, 5)]
    torch.testing.assert_close(result, noise - (5 + 3 * (3 - 5)))


def test_held_frames_go_the_way_from_their_noise_and_are_no_given_ones() -> None:
    known, noise = latents((3, 2, 2), 2), latents((3, 2, 2), 3)
    request = Request("x", GRIDS[0], 5, held=Held(known[:, :2], noise[:, :2]))
    own = noise_of(replace(request, held=None), 4, 2)
    assert torch.equal(noise_of(request, 4, 2), torch.cat((noise[:, :2], own[:, 2:]), dim=1))
    times: list[set[float]] = []

    def still(x: Tensor, t: Tensor, told: Tensor) -> Tensor:
        times.append(set(t.flatten().tolist()))
        return 0 * x

    flow = replace(FLOW, guidance=1.0, sampling_steps=4)
    (result,) = run(Field(still), [request], flow)
    half = 2 * 0.5 / 1.5  # of the way, at a shift of 2
    torch.testing.assert_close(result[:, 0], known[:, 0])
    torch.testing.assert_close(result[:, 1], torch.lerp(known[:, 1], noise[:, 1], half))
    torch.testing.assert_close(result[:, 2], own[:, 2])
    assert all(len(now) == 1 and 0.0 not in now for now in times), "one timestep for all frames"
    with pytest.raises(ValueError, match="at frame 0 don't fit"):
        run(Field(still), [replace(request, held=Held(latents((4, 2, 2), 1), noise))], flow)


def test_from_a_partly_noised_clip_the_strength_says_how_far_from_it_a_result_may_go(model: VideoModel) -> None:
    start = latents(GRIDS[0], 7)
    fixed = Field(lambda x, t, told: 0 * x)
    noise = noise_of(Request("", GRIDS[0], 3), 4, 2)
    requests = [Request("x", GRIDS[0], 3, start_CTHW=start, strength=s) for s in (0.25, 1.0)]
    for request, result in zip(requests, run(fixed, requests), strict=True):
        torch.testing.assert_close(result, start + request.strength * (noise - start))
    assert fixed.times[0] == 1.0
    alone = Field(lambda x, t, told: 0 * x)
    run(alone, requests[:1])
    assert alone.times[0] == pytest.approx(0.25)
    together = run(model, requests)
    torch.testing.assert_close(together[0], run(model, requests[:1])[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(together[1], run(model, [Request("x", GRIDS[0], 3)])[0], rtol=1e-3, atol=1e-3)


def test_each_shot_looks_at_its_own_caption_alone() -> None:
    """Each token is told how many words its caption has."""
    request = Request("", (3, 2, 2), 3, shots=((1, "one"), (2, "two words and more")))

    class Words(nn.Module):
        def forward(self, pack: LatentPack) -> Tensor:
            queries, texts = pack.video.layout.queries, torch.tensor(pack.video.layout.texts)
            return texts.repeat_interleave(torch.tensor(queries)).unsqueeze(1).expand_as(pack.video.x_NP).float()

    flow = replace(FLOW, guidance=1.0)
    noise = noise_of(request, 4, 2)
    moved = (noise - run(Words(), [request], flow)[0]).mean((0, 2, 3))
    assert moved.tolist() == pytest.approx([2.0, 5.0, 5.0], rel=1e-4)  # with the start token
    with pytest.raises(ValueError, match=r"shots of \[1, 1\] latent frames don't fill 3"):
        run(Words(), [replace(request, shots=((1, "a"), (1, "b")))])


def test_shots_of_one_caption_are_a_clip_with_that_caption(model: VideoModel) -> None:
    (one,) = run(model, [Request("a caption", GRIDS[0], 3)])
    (two,) = run(model, [Request("", GRIDS[0], 3, shots=((1, "a caption"), (2, "a caption")))])
    (other,) = run(model, [Request("", GRIDS[0], 3, shots=((1, "a caption"), (2, "another thing")))])
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)
    assert (other - one).abs().max() > 1e-3


def test_latents_that_do_not_fit_are_an_error(model: VideoModel) -> None:
    with pytest.raises(ValueError, match="at frame 2 don't fit"):
        run(model, [Request("x", GRIDS[0], 3, given=((2, latents((2, 2, 2), 1)),))])


def test_a_result_does_not_depend_on_its_neighbours(model: VideoModel) -> None:
    requests = [
        Request(f"clip {n}", grid, n, ((1, latents((1, *grid[1:]), 4)),) if n == 2 else ())
        for n, grid in enumerate(GRIDS)
    ]
    together = run(model, requests)
    for request, result in zip(requests, together, strict=True):
        torch.testing.assert_close(run(model, [request])[0], result, rtol=1e-3, atol=1e-3)


def test_the_seed_is_the_noise(model: VideoModel) -> None:
    one, same, other = (run(model, [Request("x", GRIDS[0], seed)])[0] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=0.1)
