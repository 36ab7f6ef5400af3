"""A mistake costs a moment, one line that names the key and what to do, and exit code 2 in run_dir/exit.json too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from sora_train.config.hydra import as_typed, run_hydra
from sora_train.config.load import build, load, to_dict
from sora_train.config.schema import Config
from sora_train.core.cli import InputError, nearest
from sora_train.core.options import options
from sora_train.data.shards import Shards
from tests.load import cpu_s

ROOT = Path(__file__).parents[2]
Answer = Callable[..., str]


def shards_of(config: Config) -> int:
    Shards(config)
    return 0


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Answer]:
    """Give a command line; get the one line that it is refused with, also left in exit.json."""
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments: str, once: bool = False) -> str:
        """With `once` Hydra composes once, and not before that to see whether this is a sweep."""
        GlobalHydra.instance().clear()
        monkeypatch.setattr("sys.argv", ["train", *["--run"][:once], *arguments, "run_dir=run"])
        with pytest.raises(InputError) as caught:
            run_hydra(shards_of)
        line = str(caught.value)
        assert "\n" not in line and line
        note = json.loads((tmp_path / "run" / "exit.json").read_text())
        assert (note["code"], note["reason"]) == (2, line)
        return line

    yield refuse
    GlobalHydra.instance().clear()


@pytest.fixture
def refusal(compose_tree: Callable[..., DictConfig]) -> Answer:
    """Give an experiment and overrides; get the line with which the configuration is refused.

    The experiment is composed once for all tests, which costs most of a refusal; the command itself says it as well
    (`answer`).
    """

    def refuse(experiment: str, *overrides: str) -> str:
        tree = compose_tree(experiment)
        with pytest.raises(InputError) as caught:
            for override in OverridesParser.create().parse_overrides(list(overrides)):
                OmegaConf.update(tree, override.key_or_group, override.value(), force_add=override.is_add())
            shards_of(build(tree))
        line = str(caught.value)
        assert "\n" not in line and line
        return line

    return refuse


def test_an_unknown_key_is_answered_with_the_nearest(answer: Answer) -> None:
    assert answer("experiment=demo_vae", "optim.lrr=1") == "there is no key 'optim.lrr'; did you mean 'optim.lr'?"
    assert answer("experiment=demo_vae", "+optim.lrr=1") == "there is no key 'optim.lrr'; did you mean 'optim.lr'?"
    assert answer("experiment=demo_vae", "data.max_frame=9") == (
        "there is no key 'data.max_frame'; did you mean 'data.max_frames'?"
    )


def test_a_comma_says_how_to_write_what_it_may_mean(answer: Answer) -> None:
    assert answer("experiment=demo_vae", "data.fps=23,976").startswith(
        "Ambiguous value for argument 'data.fps=23,976': write [a,b] for a list, "
    )


@pytest.mark.parametrize("flag", ["--local_rank=0", "--local-rank=1"])
def test_what_launchers_add_to_the_command_is_passed_over(answer: Answer, flag: str) -> None:
    assert answer(flag, "experiment=demo_vae", "optim.lrr=1").startswith("there is no key 'optim.lrr'")


@pytest.mark.parametrize("override", ["steps=abc", "optim.lr=fast", "data.slots=1.5", "precision=fp8", "data.fit=pad"])
def test_a_wrong_type_names_its_key_and_its_value(answer: Answer, override: str) -> None:
    key, _, value = override.partition("=")
    line = answer("experiment=demo_vae", override)
    assert line.startswith(f"{key}: ") and value in line


@pytest.mark.parametrize(
    ("choice", "known"),
    [("experiment=demoo", "demo"), ("model=demmo", "demo"), ("deepspeed=zero7", "zero"), ("data=foldr", "folder")],
)
def test_an_unknown_choice_is_answered_with_the_nearest(answer: Answer, choice: str, known: str) -> None:
    first = ["steps=5"] if choice.startswith("experiment") else ["experiment=demo_vae"]
    line = answer(*first, choice)
    assert line.startswith(f"there is no {choice}; did you mean '{known}")


@pytest.mark.parametrize("choice", ["deepspeed=null", "experiment=3", "experiment=[demo,null]", "model={a: 1}"])
def test_a_choice_that_is_no_name_is_answered_with_those_there_are(answer: Answer, choice: str) -> None:
    group = choice.partition("=")[0]
    assert answer("steps=5", choice).startswith(f"{choice}: give the name of a file of conf/{group}/, or a list; ")


def test_a_value_without_a_key_is_refused(answer: Answer) -> None:
    assert answer("experiment=demo_vae", "=3") == "=3: there is no key before the '='"


def test_what_has_no_value_is_named(answer: Answer) -> None:
    assert answer().startswith("steps has no value; give steps=... or choose an experiment=")
    assert answer("experiment=demo_vae", "data=folder").startswith("data.sources.mine.shards has no value")


def test_a_missing_vae_is_named_with_what_to_do(answer: Answer) -> None:
    assert answer("experiment=demo") == (
        "no VAE at vae.path=runs/demo_vae/export; train one (experiment=demo_vae) and export it there"
    )
    assert answer("experiment=demo", "vae.path=null").startswith("vae.path is not set; train a VAE")


@pytest.mark.parametrize(
    ("key", "ours"), [("train_batch_size", "data.slots"), ("fp16", "precision"), ("gradient_clipping", "optim.clip")]
)
def test_a_deepspeed_key_that_follows_from_ours_is_refused(answer: Answer, key: str, ours: str) -> None:
    assert answer("experiment=demo_vae", f"+deepspeed.{key}=8") == (
        f"deepspeed.{key} follows from {ours}; set that instead"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["steps=0"], "steps=0 must be above 0"),
        (["data.slots=-1"], "data.slots=-1 must be above 0"),
        (["data.fill=1.5"], "data.fill=1.5 must be in (0, 1]"),
        (["data.max_bad_fraction=2"], "data.max_bad_fraction=2.0 must be in (0, 1]"),
        (["deepspeed.zero_optimization.stage=4"], "deepspeed.zero_optimization.stage=4; known: 0, 1, 2, 3"),
        (["+deepspeed.zero_optimization.round_robin_gradients=true"], "round_robin_gradients"),
        (["logging.writers=[tensorbord]"], "logging.writers has no ['tensorbord']; known: tensorboard, wandb, p"),
        (["data.decoders=[decrod]"], "data.decoders has no ['decrod']; did you mean 'decord'?"),
        (["data.decoders=[]"], "data.decoders=[]: name at least one"),
        (["data.decoders=[pyav,pyav]"], "and each once"),
        (["data.limits.pixels=0"], "data.limits.pixels=0 must be above 0"),
        (["data.cache.gib=0"], "data.cache.gib=0.0 must be above 0"),
        (["+data.storage.s3=anon"], "data.storage.s3 must be a map of options, e.g. +data.storage.s3.anon=true"),
        (["data.commands=['rm -rf']"], "data.commands=['rm -rf'] must be names of programs, without arguments"),
        (["parallel.accumulation=0"], "parallel.accumulation=0 must be above 0"),
        (["data.slots=4", "data.pack_slots=2"], "data.pack_slots=2: method=autoencoder has no sequence to share"),
        (["vae.blocks=[1]"], "vae.widths and vae.blocks need one entry per level"),
        (["optim.ema_lengths=[0.1,0.3]"], "optim.ema_lengths=[0.1, 0.3] must be different numbers in (0, 0.28)"),
        (["checkpoint.snapshots=0"], "checkpoint.snapshots=0 must be above 0"),
        (["checkpoint.mirror=/mnt/x"], "checkpoint.mirror=/mnt/x must be a URL such as s3://bucket/runs/x"),
        (["checkpoint.mirror='s3:///'"], "checkpoint.mirror=s3:/// must be a URL"),
        (["checkpoint.mirror=https://host/x"], "checkpoint.mirror=https://host/x: nothing can be written to http"),
        (["checkpoint.mirror='ftp://me:hush@host/x'"], "checkpoint.mirror holds a password; give it by the env"),
        (["text_encoder.heads=3"], "text_encoder.width=128 must be a multiple of its heads"),
        (["flow.caption_dropout=10"], "flow.caption_dropout=10.0 must be in [0, 1]"),
        (["optim.text_lr_scale=-1"], "optim.text_lr_scale=-1.0 must not be below 0"),
        (["optim.weight_decay=-1"], "optim.weight_decay=-1.0 must not be below 0"),
        (["optim.ema_decay=-1"], "optim.ema_decay=-1.0 must be in [0, 1)"),
        (["optim.decay_fraction=3"], "optim.decay_fraction=3.0 must be in [0, 1]"),
        (["optim.betas=[0.9]"], "optim.betas"),
        (["optim.betas=[0.9,1.5]"], "must be in [0, 1)"),
        (["optim.lr=inf"], "optim.lr=inf must be above 0"),
        (["optim.eps=nan"], "optim.eps=nan must be above 0"),
        (["optim.schedule=cosin"], "optim.schedule=cosin; did you mean 'cosine'?"),
        (["threads=-1"], "threads=-1 must be above 0"),
        (["seed=-1"], "seed=-1 must be 0 to"),
        (["text_encoder.max_tokens=0"], "text_encoder.max_tokens=0 must be above 0"),
        (["logging.prometheus_port=70000"], "must be a port, 0 to 65535"),
        (["+deepspeed.zero_optimisation.stage=3"], "did you mean 'zero_optimization'?"),
        (["deepspeed.zero_optimization=null"], "deepspeed.zero_optimization is null"),
    ],
)
def test_every_rule_across_keys_names_its_keys(refusal: Answer, overrides: list[str], message: str) -> None:
    assert message in refusal("experiment=demo_vae", *overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("deepspeed=zero3", "an autoencoder runs"),
        ("optim.rates={text: -1}", "optim.rates={'text': -1.0} must not be below 0"),
        ("deepspeed.zero_optimisation.stage=3", "no deepspeed.zero_optimisation; did you mean 'zero_optimization'?"),
        ("deepspeed.zero_optimization.reduce_buket_size=3", "did you mean 'reduce_bucket_size'?"),
        ("data.storage.s3=anon", "data.storage.s3 must be a map of options"),
    ],
)
def test_rules_hold_whatever_hydra_makes_of_an_override(answer: Answer, override: str, message: str) -> None:
    assert message in answer("experiment=demo_vae", override, once=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.heads=5"], "model.width=128 must be an even multiple of model.heads=5"),
        (["+flow.tasks.text_to_vidio=1"], "did you mean 'text_to_video'?"),
        (
            [f"flow.tasks.{task}=0" for task in ("text_to_video", "image_to_video", "extension")],
            "flow.tasks: no weight may be below 0, and one must be above",
        ),
        (["flow.solver=rk4"], "flow.solver='rk4'; known: adams_bashforth, euler, heun"),
        (["data.pack_slots=3"], "data.pack_slots=3 must be a power of two: 1, 2, 4, 8, ..."),
        (["data.pack_slots=8", "data.slots=7"], "data.pack_slots=8: a step has only data.slots=7; lower it to 4"),
        (
            ["data.pack_slots=2", "parallel.sequence=2"],
            "data.pack_slots=2 has the plan say how many ranks share",
        ),
        (["data.pack_slots=2", "parallel.accumulation=1"], "data.pack_slots=2 needs a forward pass per slot"),
    ],
)
def test_rules_of_a_diffusion_run(refusal: Answer, tmp_path: Path, overrides: list[str], message: str) -> None:
    shape = to_dict(Config(run_dir="x", steps=1))["vae"]
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({k: v for k, v in shape.items() if k != "path"}))
    assert message in refusal("experiment=demo", f"vae.path={tmp_path}/vae", *overrides)


def test_shards_that_are_not_there_are_named(answer: Answer, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for pattern in ("my/train.tar", "empty/*.tar", "empty"):
        line = answer("experiment=demo_vae", f"data.sources.demo.shards=[{pattern}]")
        assert line.startswith(f"no shard at '{pattern}'") and "data.sources" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1,\nb: {", "mine.yaml can't be read: line 2: expected the node content"),
        (b"steps: 3\nsteps: 4\n", "mine.yaml can't be read: line 2: found duplicate key steps"),
        (b'steps: "\x01"', "mine.yaml"),
        (b"# caf\xe9\nsteps: 3\n", "mine.yaml can't be read: 'utf-8' codec"),
        (b"- 1\n- 2\n", "mine.yaml must hold keys with values"),
        (b"", "mine.yaml must hold keys with values"),
        (b"plugins: mine", "mine.yaml: plugins: mine must be a list, e.g. [mine]"),
        (b"plugins: [no.such]", "plugins: no.such can't be imported"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(answer: Answer, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/mine.yaml").write_bytes(content)
    assert message in answer("--config-dir", "mine", "experiment=mine")


def test_a_folder_that_holds_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no run .*config\.yaml.*check run_dir"):
        load(tmp_path)


def test_secrets_are_masked_in_what_is_written(tmp_path: Path) -> None:
    config = Config(run_dir="x", steps=1, deepspeed={"comet": {"api_key": "abc", "note": "fine", "password": None}})
    assert to_dict(config)["deepspeed"]["comet"] == {"api_key": "***", "note": "fine", "password": None}


def test_the_nearest_of_the_known_keys() -> None:
    assert nearest("optm.lr", ["optim.lr", "steps"]) == "did you mean 'optim.lr'?"
    assert nearest("zzz", ["b", "a"]) == "known: a, b"


def test_the_tools_options_are_answered_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from data_tools.make_demo import Options

    for argument, message in (("owt=x", "did you mean 'out'"), ("out", "not of the form key=value")):
        monkeypatch.setattr("sys.argv", ["tool", argument])
        with pytest.raises(InputError, match=message):
            options(Options, "usage")


@pytest.mark.parametrize(
    "value",
    ["2024_11", "010", "yes", "1e3", "runs/lr=1e-3", "runs/测试", "a b", "s (1)", "x,y", "it's", "{a}",
     "[b]", "a: b", "#1",
     "a\\",
     "runs/plain", "\\'", "-1"],
)  # fmt: skip
def test_text_reaches_the_configuration_as_it_was_typed(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    GlobalHydra.instance().clear()
    monkeypatch.setattr("sys.argv", ["train", "--run", "experiment=demo_vae", f"run_dir={value}", "hydra.run.dir=."])

    def job(config: Config) -> int:
        seen.append(config.run_dir)
        return 0

    assert run_hydra(job) == 0
    assert seen == [value]


def test_a_home_that_the_shell_left_is_refused(answer: Answer) -> None:
    assert "write $HOME or the whole path" in answer("experiment=demo_vae", "data.sources.demo.shards=[~/a/*.tar]")


def test_what_is_quoted_and_what_is_no_text_stays_hydras() -> None:
    for same in (
        "run_dir='a b'",
        "vae.path=null",
        "run_dir=${oc.env:HOME}",
        "optim.lr=1e-3",
        "data.validation=[a,b]",
        "-m",
    ):
        assert as_typed(same) == same
    assert as_typed("vae.path=2024_11") == "vae.path='2024_11'"


def test_lists_of_text_and_maps_with_keys_of_their_own_need_no_quoting_and_no_plus() -> None:
    assert as_typed("data.validation=[a-{0..3}.tar,b]") == "data.validation=['a-{0..3}.tar','b']"
    assert as_typed("data.validation=one.tar") == "data.validation=['one.tar']"
    assert as_typed("data.sources.mine.shards=[my (1)/*.tar]") == "++data.sources.mine.shards=['my (1)/*.tar']"
    assert as_typed("data.storage={s3: {anon: true}}") == "++data.storage={s3: {anon: true}}"
    assert as_typed("+data.storage.s3.anon=true") == "+data.storage.s3.anon=true"
    assert as_typed("data.captions.long=2") == "++data.captions.long=2"


def test_new_entries_of_maps_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []
    GlobalHydra.instance().clear()
    typed = ("data.storage={s3: {anon: true}}", "data.storage.gs.token=x", "optim.rates={text.*: 0.1}",
             "data.sources.more.shards=[a-{0..3}.tar]", "data.sources.more.filter=duration >= 2")  # fmt: skip
    monkeypatch.setattr("sys.argv", ["train", "experiment=demo_vae", "run_dir=run", *typed, "hydra.run.dir=."])
    assert run_hydra(lambda config: seen.append(config) or 0) == 0  # type: ignore[func-returns-value]
    (config,) = seen
    assert config.data.storage == {"s3": {"anon": True}, "gs": {"token": "x"}}
    assert config.optim.rates == {"text.*": 0.1}
    assert config.data.sources["more"].shards == ["a-{0..3}.tar"]
    assert config.data.sources["more"].filter == "duration >= 2" and "demo" in config.data.sources


def test_a_run_folder_is_a_folder_that_all_ranks_name_alike(
    answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    monkeypatch.setenv("SORA_EXIT_FILE", str(told))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for run_dir, said in (
        ("s3://bucket/x", "run_dir=s3://bucket/x must be a folder .* checkpoint.mirror=s3://bucket/x"),
        ("runs/${now:%H}", "each rank would take a time of its own"),
        ("", "run_dir is empty; name the folder"),
    ):
        GlobalHydra.instance().clear()
        monkeypatch.setattr("sys.argv", ["train", "experiment=demo_vae", f"run_dir={run_dir}"])
        with pytest.raises(InputError, match=said):
            run_hydra(shards_of)
        assert told.read_text() == "code 2\n" and [path.name for path in tmp_path.iterdir()] == ["told"]
        told.unlink()


def test_a_launch_script_is_told_the_folder_and_the_code_wherever_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SORA_EXIT_FILE", "told")
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/mine.yaml").write_text("# @package _global_\nrun_dir: my runs/x\n")
    GlobalHydra.instance().clear()
    arguments = ["--config-dir", "conf", "experiment=[demo_vae,mine]", "steps=0"]
    monkeypatch.setattr("sys.argv", ["train", *arguments])
    with pytest.raises(InputError, match="steps=0 must be above 0"):
        run_hydra(shards_of)
    assert (tmp_path / "told").read_text() == f"before \nrun_dir {tmp_path}/my runs/x\ncode 2\n"


def test_a_sweep_that_is_told_to_stop_starts_no_further_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()
    monkeypatch.setattr("sys.argv", ["train", "-m", "experiment=demo_vae", "run_dir=s", "seed=0,1,2"])
    seen: list[int] = []

    def job(config: Config) -> int:
        seen.append(config.seed)
        return 75 if config.seed == 1 else 0

    assert run_hydra(job) == 75 and seen == [0, 1]


def test_deepspeeds_keys_are_those_that_are_installed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from sora_train.config.deepspeed_keys import ZERO

    fields = DeepSpeedZeroConfig.model_fields
    assert set(ZERO) >= {*fields, *(field.alias for field in fields.values() if field.alias)}


VAE = "experiment=demo_vae"
COMMANDS = {
    "typo": ([VAE, "optim.lrr=1"], "optim.lrr"),
    "no vae": (["experiment=demo", "vae.path=nowhere"], "vae.path=nowhere"),
    "no shard": ([VAE, "data.sources.demo.shards=[nowhere/*.tar]"], "nowhere/*.tar"),
    "sweep under torchrun": (["-m", VAE, "optim.lr=1e-3,2e-3"], "-m sweeps"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_says_it_in_one_line_and_exits_with_2(name: str, tmp_path: Path) -> None:
    arguments, named = COMMANDS[name]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if name == "sweep under torchrun":
        environment |= {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "1"}
    before = cpu_s()
    done = subprocess.run(
        [sys.executable, "-m", "sora_train.train", *arguments, "run_dir=run"],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=250,
    )  # fmt: skip
    took = cpu_s() - before
    print(f"{name}: {took:.1f} s")
    assert done.returncode == 2
    errors = done.stderr.splitlines()
    assert len([line for line in errors if line.startswith("error: ")]) == 1
    assert named in errors[-1] and "Traceback" not in done.stderr
    note = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert note["code"] == 2 and errors[-1] == f"error: {note['reason']}"
    assert took <= 10.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.filter='height >'"], "data.filter='height >' is no expression"),
        (["+data.sources.demo.filter='os.listdir()'"], ".demo.filter='os.listdir()': 'os.listdir()' is not"),
        (["+data.sources.demo.weight=1", "+data.sources.b.shards=[x]"], "have a weight and others none; give it to"),
        (["+data.sources.demo.weight=1", "+data.sources.demo.repeat=2"], "a source has a weight or a repeat, not both"),
        (["+data.sources.demo.weight=-1"], "data.sources.*.weight: no weight may be below 0"),
        (["+data.captions.plain=0"], "data.captions: no weight may be below 0, and one must be above"),
        (["data.stages=[{until_step: 5}]"], "data.stages[0].until_step=5: the last stage alone has none"),
        (["data.stages=[{},{}]"], "data.stages[0].until_step=None: the last stage alone has none"),
        (["data.stages=[{until_step: 5},{until_step: 5},{}]"], "data.stages[1].until_step=5 must be above 5"),
        (["data.stages=[{max_pixels: 0}]"], "data.stages[0].max_pixels=0 must be above 0"),
        (["data.stages=[{weights: {demmo: 1}}]"], "there is no source ['demmo']; did you mean 'demo'?"),
        (["data.stages=[{max_pixel: 1}]"], "max_pixel"),
    ],
)
def test_a_mistake_in_the_mix_names_its_key(refusal: Answer, arguments: list[str], message: str) -> None:
    assert message in refusal("experiment=demo_vae", *arguments)


@pytest.mark.parametrize("named", ["[]", "[cat]"])
@pytest.mark.parametrize("command", ["touch marker", "cat x.tar; touch marker", "cat $(touch marker)"])
def test_a_command_in_a_shard_name_is_refused_before_anything_runs(
    answer: Answer, tmp_path: Path, command: str, named: str
) -> None:
    line = answer("experiment=demo_vae", f"data.sources.demo.shards=['pipe:{command}']", f"data.commands={named}")
    assert "commands in shard names are not run" in line or "no shell reads it" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"], "no marker"
