"""A vision-language model from a local folder, as `transformers` saves one; no code of the folder is run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_tools.media_files import hash_of
from sora_train.core.chat_server import Reply
from sora_train.core.cli import InputError


def check_folder(folder: str) -> None:
    """Raise InputError for a folder without a model's config.json."""
    if not (Path(folder) / "config.json").is_file():
        raise InputError(f"captions={folder} is neither a server's address nor a folder with a config.json")


class LocalModel:
    """The model of a folder, on a GPU if there is one. Raises InputError for a folder without a model."""

    def __init__(self, folder: str) -> None:
        check_folder(folder)
        try:
            import torch
            from transformers import AutoModelForImageTextToText, AutoProcessor
        except ImportError as error:
            raise InputError(f"captions={folder} needs transformers: pip install -e '.[models]'") from error
        self._torch: Any = torch
        self.model = f"{Path(folder).resolve().name} {hash_of(Path(folder) / 'config.json')[:12]}"
        try:
            self._processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
            network: Any = AutoModelForImageTextToText.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype="auto"
            )
        except (OSError, ValueError) as error:
            raise InputError(f"captions={folder} can't be loaded: {str(error).splitlines()[0]}") from error
        self._network = network.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def ask(self, prompt: str, pictures: Sequence[bytes], temperature: float, max_tokens: int) -> Reply:
        """The model's answer to a prompt with JPEG pictures."""
        images = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
        text = self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self._processor(text=text, images=images or None, return_tensors="pt").to(self._network.device)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        with self._torch.inference_mode():
            answer = self._network.generate(**inputs, max_new_tokens=max_tokens, **sampling)
        new = answer[0, inputs["input_ids"].shape[1] :]
        return Reply(self._processor.decode(new, skip_special_tokens=True).strip(), len(new) >= max_tokens)

    def close(self) -> None:
        """Free the model's memory."""
        del self._network
