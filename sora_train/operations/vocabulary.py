"""The tokenizer of a run's own text encoder (`text_encoder.tokenizer=bpe`): trained once, then a file of the run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.distributed as dist

from sora_train.config.registry import METHODS
from sora_train.config.schema import TOKENIZER, Config
from sora_train.core.cli import InputError
from sora_train.core.world import World
from sora_train.data.index.index import Index
from sora_train.data.read.decode import DecodeError
from sora_train.data.shards import Shards

_READ = 100_000  # samples whose captions are read, evenly spread over the training shards
_AT_ONCE = 16  # threads that read them


def with_tokenizer(config: Config, shards: Shards, world: World) -> Config:
    """Make the run's tokenizer if it has none yet; returns the configuration that names its file. Collective.

    It is that of `text_encoder.tokenizer_path`, or of the run or export in `init_from`, whose weights belong to it, or
    trained on the captions of the training shards. Ranks on other machines get its text from the main rank.

    Raises:
        InputError: On all ranks: the file of a run with checkpoints is gone, another one is named, or there are no
            captions.
    """
    if not METHODS.get(config.method).reads_captions:
        return config
    _check_start(config)
    if config.tokenizer_file is None:
        return config
    file = Path(config.run_dir) / TOKENIZER
    told = ["", ""]  # a mistake, the tokenizer's text
    if world.is_main:
        try:
            told[1] = _text(config, shards, file)
        except InputError as error:
            told[0] = str(error)
    if world.size > 1:
        dist.broadcast_object_list(told, 0)
    if told[0]:
        raise InputError(told[0])
    if world.local_rank == 0 and not file.is_file():
        half = file.with_suffix(f".{world.rank}.tmp")
        half.write_text(told[1])
        half.replace(file)
    if world.size > 1:
        dist.barrier()
    return replace(config, text_encoder=replace(config.text_encoder, tokenizer_path=str(file)))


def _check_start(config: Config) -> None:
    """Refuse weights of `init_from` whose text encoder was trained with words of the other kind."""
    start = config.init_from
    if start is None or config.text_encoder.path is not None:
        return
    has = (Path(start) / TOKENIZER).is_file()
    if has != (config.tokenizer_file is not None):
        kind = "bpe" if has else "hashed"
        raise InputError(f"init_from={start} was trained with text_encoder.tokenizer={kind}; set it so")


def _text(config: Config, shards: Shards, file: Path) -> str:
    given = config.text_encoder.tokenizer_path or (config.init_from and str(Path(config.init_from) / TOKENIZER))
    if given and not Path(given).is_file():
        raise InputError(f"there is no tokenizer at text_encoder.tokenizer_path={given}; null trains one")
    if file.is_file():
        text = file.read_text()
        if given and Path(given).read_text() != text:
            raise InputError(f"{file} is another tokenizer than {given}; name another run_dir, or leave that out")
        return text
    if any((file.parent / "checkpoints").glob("step-*")):
        raise InputError(f"{file} is missing, the tokenizer that the checkpoints there were trained with; put it back")
    return Path(given).read_text() if given else _trained(config, shards.load(config))


def _trained(config: Config, index: Index) -> str:
    from sora_train.models.text.subwords import train_subwords  # only here: the library takes time to import

    rows = np.flatnonzero(index.usable)
    some = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _READ)).astype(np.int64))] if len(rows) else rows

    def read(row: int) -> list[str]:
        try:
            return index.captions(row)[0]
        except DecodeError:  # the loader counts it
            return []

    with ThreadPoolExecutor(_AT_ONCE) as threads:
        captions = [caption for found in threads.map(read, map(int, some)) for caption in found]
    if not any(captions):
        raise InputError("text_encoder.tokenizer=bpe is trained on captions, and the training shards have none")
    return train_subwords(captions, config.text_encoder.buckets)
