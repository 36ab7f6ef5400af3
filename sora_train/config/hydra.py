"""Hydra for the entry points: compose conf/, build the typed configuration, report mistakes in one line."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sora_train.config.catalogue import help_text
from sora_train.config.files import reason
from sora_train.config.load import build, known_keys
from sora_train.config.plugins import named_plugins
from sora_train.config.registry import FAMILIES, load_plugins
from sora_train.config.schema import Config, VaeConfig
from sora_train.core.cli import BAD_INPUT, STOPPED, InputError, nearest
from sora_train.core.options import check_home, list_items
from sora_train.core.world import from_environment

_OWN_LAUNCHER = re.compile("BasicLauncher|TorchrunLauncher")  # launchers that pass on the exit codes of jobs
_WITH_VALUE = (  # flags of Hydra whose value is the next argument
    "--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p", "--cfg", "-c",
    "--experimental-rerun",
)  # fmt: skip
_LOCAL_RANK = ("--local_rank=", "--local-rank=")  # as the launchers of DeepSpeed and torch.distributed add it
_HERE = Path(__file__).parents[1]
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"  # in a wheel, or in a checkout


def store_schema() -> None:
    """Register the schema with Hydra: all keys with their defaults, and each model family as a choice of `model`.

    Only values are registered, not types: `load.build` checks types, and reports a mistake in one line. Existing
    entries are kept, so that this can be called again after plugins have registered families.
    """
    store = ConfigStore.instance()
    if "schema.yaml" not in store.repo:
        store.store(name="schema", node=_values(Config))
        store.store(group="vae", name="base", node=_values(VaeConfig))
    for name in FAMILIES.names():
        if f"{name}.yaml" not in store.repo.get("model", {}):
            store.store(group="model", name=name, node=_values(FAMILIES.get(name).settings))


def _values(schema: Any) -> Any:
    return OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(schema), enum_to_str=True))


store_schema()


def run_hydra(job: Callable[[Config], int], need_vae: bool = True, usage: str = "") -> int:
    """Compose the configuration from the command line and run `job` with it (once per job of a `-m` sweep).

    Args:
        job: Function of the configuration that returns an exit code.
        need_vae: Raise if `vae.path` names a VAE that doesn't exist.
        usage: Text that `--help` prints before the catalogue of conf/.

    Returns:
        The highest exit code of the jobs.

    Raises:
        InputError: The configuration is wrong. The message is written to run_dir/exit.json too, because torchrun
            turns every exit code into 1.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text(usage, CONF))
        return 0
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv[1:] = _flags_first([a for a in sys.argv[1:] if not a.startswith(_LOCAL_RANK)])
    codes: list[int] = []
    mistakes: list[InputError] = []

    def main(tree: DictConfig) -> None:
        """Run one job: that of the command line, or one of a sweep."""
        if STOPPED in codes:  # a signal stopped the sweep in an earlier job
            return
        is_here = _OWN_LAUNCHER.search(str(HydraConfig.get().launcher))  # others run jobs in separate processes
        try:
            _check_run_dir(tree)
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                _refuse_sweep_under_torchrun()
                with open_dict(tree):
                    tree.run_dir = f"{tree.run_dir}/{job_name()}"
            note_start(tree.run_dir)
            codes.append(job(build(tree, need_vae)))
        except InputError as error:  # raised again below: Hydra would print its own message above it
            if not is_here:
                raise
            mistakes.append(error)
        if not is_here and codes[-1]:
            raise InputError(f"{tree.run_dir} ended with code {codes[-1]}; its exit.json says why")

    main.codes = codes  # type: ignore[attr-defined]  # hydra_plugins' launcher, whose jobs are processes, appends here
    try:
        load_plugins(named_plugins(sys.argv[1:], CONF))
        store_schema()
        _prepare_arguments()
        hydra.main(version_base="1.3", config_path=str(CONF.resolve()), config_name="train")(main)()
        if mistakes:
            raise mistakes[0]
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        message = _one_line(error)
        _leave_note(message)
        raise InputError(message) from error
    except InputError as error:
        _leave_note(str(error))
        raise
    return max(codes, default=0)


def _prepare_arguments() -> None:
    """Check all overrides, and rewrite them in `sys.argv` for Hydra's parser (`as_typed`), except in a sweep."""
    check_home(sys.argv[1:])
    for argument in sys.argv[1:]:
        _check_choice(argument)
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        _refuse_sweep_under_torchrun()
    else:
        sys.argv[1:] = [as_typed(argument) for argument in sys.argv[1:]]


def _check_choice(argument: str) -> None:
    """Raise InputError for an override without a key, or one of a config group whose value isn't a name or names."""
    group, equals, value = argument.lstrip("+").partition("=")
    if equals and not group:
        raise InputError(f"{argument}: there is no key before the '='")
    if not equals or not (CONF / group).is_dir():
        return
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return  # reported when Hydra parses it
    chosen = override.value()
    names = chosen if isinstance(chosen, list) else [chosen]
    if not override.is_sweep_override() and not all(isinstance(name, str) for name in names):
        known = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        raise InputError(f"{argument}: give the name of a file of conf/{group}/, or a list; {nearest(value, known)}")


def _flags_first(arguments: list[str]) -> list[str]:
    """Move flags before overrides, because Hydra's parser fails on overrides after a flag that follows others."""
    flags: list[str] = []
    overrides: list[str] = []
    for place, argument in enumerate(arguments):
        is_value = place > 0 and arguments[place - 1] in _WITH_VALUE
        (flags if is_value or argument.startswith("-") else overrides).append(argument)
    return flags + overrides


def as_typed(argument: str) -> str:
    """Rewrite an override so that Hydra parses its value as the text that was typed.

    Text, and items of lists of text, are quoted if Hydra's grammar would parse them as another value: `run_dir=2024_11`
    is a folder and not a number, `shards=[a-{0..3}.tar]` a pattern. Quoted values, null and interpolations are left to
    Hydra. New entries of maps with arbitrary keys (`data.storage.s3.anon`, `deepspeed.zero_optimization.stage`) need no
    `+`.
    """
    key, equals, value = argument.partition("=")
    if not equals:
        return argument
    if _is_open(key):
        argument = f"++{argument}"  # new keys are allowed there, so the user need not type a +
    kind = _kind(key)
    if not value or value == "null" or "${" in value or value[0] in "'\"" or kind not in (str, str | None, list[str]):
        return argument
    typed = list_items(key, value) if kind == list[str] else value
    try:
        read = OverridesParser.create().parse_override(argument).value()
    except HydraException:
        read = None
    if read == typed:
        return argument
    start = argument.partition("=")[0]
    if isinstance(typed, str):
        return f"{start}={_quoted(typed)}"
    return f"{start}=[{','.join(map(_quoted, typed))}]"


def _quoted(text: str) -> str:
    return str(QuotedString(text, Quote.single).with_quotes())


def _kind(key: str) -> Any:
    """Type of the value of a dotted key of the configuration; None if it isn't known."""
    kind: Any = Config
    for part in key.split("."):
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            kind = (get_type_hints(kind) if is_dataclass(kind) else {}).get(part)
    return kind


def _is_open(key: str) -> bool:
    """Tell whether a dotted key of the configuration is a map with arbitrary keys, or inside one.

    A key without a dot (`deepspeed=zero2`) chooses a file of conf/.
    """
    kind: Any = Config
    for part in key.split(".") if "." in key else ():
        kind = (get_type_hints(kind) if is_dataclass(kind) else {}).get(part)
        if get_origin(kind) is dict:
            return True
    return False


def write_exit(run_dir: str | Path, code: int, reason: str) -> None:
    """Write run_dir/exit.json, from which the launch scripts read the exit code."""
    path = Path(run_dir) / "exit.json"
    _tell_script(f"code {code}")
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"code": code, "reason": reason, "time": time.time()}) + "\n")
        temporary.replace(path)
    except OSError as error:  # e.g. a full disk; it must not replace the error that ended the run
        print(f"warning: {path} can't be written ({error}): code {code}, {reason}", file=sys.stderr, flush=True)


def note_start(run_dir: str) -> None:
    """Tell this machine's launch script the run folder, and inode and time of an exit.json of an earlier start."""
    if from_environment().local_rank > 0 or not os.environ.get("SORA_EXIT_FILE"):
        return
    path = Path(run_dir).absolute()
    try:
        stat = (path / "exit.json").stat()
        before = f"{stat.st_ino} {stat.st_mtime_ns}"
    except OSError:
        before = ""
    _tell_script(f"before {before}")
    _tell_script(f"run_dir {path}")


def _tell_script(line: str) -> None:
    """Append a line to the file SORA_EXIT_FILE, in which a launch script reads how the run ended.

    See `final_code` in common.sh. Does nothing without that variable.
    """
    if told := os.environ.get("SORA_EXIT_FILE"):
        with suppress(OSError), Path(told).open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(line + "\n")


def _check_run_dir(tree: DictConfig) -> None:
    """Raise InputError for a `run_dir` that is empty or a URL, or whose time stamp would differ between ranks."""
    written = str((OmegaConf.to_container(tree, resolve=False) or {}).get("run_dir", ""))  # type: ignore[union-attr]
    if not written.strip():
        raise InputError("run_dir is empty; name the folder of the run, e.g. run_dir=runs/first")
    if "://" in written:
        raise InputError(
            f"run_dir={written} must be a folder of this machine; copies of its checkpoints go to checkpoint.mirror="
            f"{written}"
        )
    if "${now" in written and from_environment().size > 1:
        raise InputError(f"run_dir={written}: each rank would take a time of its own; name the folder")


def _value_of(argument: str) -> str:
    """The value of an override without its quotes, or the text after `=` if Hydra can't parse it."""
    try:
        return str(OverridesParser.create().parse_override(as_typed(argument)).value())
    except HydraException:
        return argument.partition("=")[2]


def _leave_note(message: str) -> None:
    run_dir = next((_value_of(a) for a in sys.argv[1:] if a.startswith("run_dir=")), "")
    if run_dir and "${" not in run_dir and "://" not in run_dir and os.environ.get("RANK", "0") == "0":
        write_exit(run_dir, BAD_INPUT, message)
    else:
        _tell_script(f"code {BAD_INPUT}")


def _refuse_sweep_under_torchrun() -> None:
    if from_environment().launched:
        raise InputError(
            "-m sweeps start several runs one after the other, which torchrun's ranks can't do together; "
            "sweep with `python -m sora_train.train -m ...`, or start torchrun once per setting"
        )


def job_name() -> str:
    """Folder name of a sweep's job: its number and swept overrides, without characters that Hydra needs quoted."""
    hydra_config = HydraConfig.get()
    swept = [override for override in hydra_config.overrides.task if override not in sys.argv]
    return f"{hydra_config.job.num}-" + re.sub(r"[^\w.-]+", "_", ",".join(swept).replace("=", "-"))[:80].strip("_")


def _one_line(error: Exception) -> str:
    """Reduce an error of Hydra or YAML to one line; for an unknown key or choice, name the nearest."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem_mark.name} can't be read: {reason(error)}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    unknown = re.search(r"Could not override '([\w.@/]+)'|Key '([\w.]+)' is not in struct", str(error))
    if unknown:
        key = unknown[1] or unknown[2]
        return f"there is no key {key!r}; {nearest(key, known_keys())}"
    option = re.search(r"Could not find '([\w./]+)'|In '[\w./]+': Could not find '([\w./]+)'", str(error))
    if option:
        group, _, name = (option[1] or option[2]).rpartition("/")
        folder = CONF / group
        known = sorted(p.stem for p in folder.glob("*.yaml")) if folder.is_dir() else []
        return f"there is no {group or 'config'}={name}; {nearest(name, known)}" if known else lines[0]
    if isinstance(error, OverrideParseException) and {"-m", "--multirun"} & set(sys.argv[1:]):
        quoted = f"in a sweep Hydra's grammar reads every value: quote text, 'run_dir=\"a b\"' ({lines[0]})"
        return f"{error.override}: {quoted}"
    if missing := re.search(r"Missing mandatory value: ([\w.]+)", str(error)):
        return f"{missing[1]} has no value; give {missing[1]}=..."
    if lines and lines[0].startswith("Ambiguous value"):
        return f"{lines[0]}: write [a,b] for a list, 'key=\"a,b\"' for text, a point in a number, or add -m for a sweep"
    return lines[0] if lines else type(error).__name__
