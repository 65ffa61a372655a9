"""Folders in Hugging Face's layout as checkpoints: config.json, tokenizer.json and *.safetensors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pocketlm.errors import CheckpointError, UnsupportedModelError
from pocketlm.files import sha256_of
from pocketlm.hub import SourceFiles
from pocketlm.manifest import Source, Tokens
from pocketlm.progress import Progress, silent
from pocketlm_exporters.checkpoint.safetensors_weights import INDEX_NAME, SafetensorsWeights
from pocketlm_exporters.checkpoint.tensors import LazyTensors, check_decoder_shapes, stored_types
from pocketlm_exporters.checkpoint.types import Checkpoint
from pocketlm_exporters.checkpoint.vocabulary import (
    damage_reported,
    end_of_turn_ids,
    parse_tokenizer,
    special_ids,
)

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_TOKENIZER, _TOKENIZER_CONFIG, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_LLAMA_FAMILY = ("llama", "mistral")
# The largest tokenizer.json known has 35 MB; the bound keeps a wrong file from filling memory.
_MAX_TEXT_BYTES = 256 << 20
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can express them, UTF-8 cannot


def open_safetensors_folder(source: SourceFiles, *, progress: Progress = silent) -> Checkpoint:
    """The folder at `source.path` as a checkpoint.

    Decoders of the llama family are checked to be complete; others are opened as they are. Raises
    CheckpointError for a damaged or incomplete folder, UnsupportedModelError for weights that are
    quantized or stored as Python pickles.
    """
    folder = source.path
    config = _read_object(folder / _CONFIG)
    if config.get("quantization_config"):
        raise UnsupportedModelError(
            f"{folder} holds weights that are quantized already (quantization_config in {_CONFIG}). "
            "Take the model in full precision; pocketlm quantizes it."
        )
    weights = SafetensorsWeights(folder)
    if config.get("model_type") in _LLAMA_FAMILY:
        check_decoder_shapes(config, weights.shapes, str(folder))
    tokenizer_json, tokenizer = _read_tokenizer(folder, config.get("vocab_size"))
    settings = _read_object(folder / _TOKENIZER_CONFIG, optional=True)
    template = _chat_template(folder, settings)
    return Checkpoint(
        name=source.name,
        config=config,
        tensors=LazyTensors(weights.shapes, weights.read, str(folder)),
        tokenizer_json=tokenizer_json,
        chat_template=template,
        tokens=_Ids(folder, config, settings, tokenizer).tokens(template),
        source=Source(
            kind="safetensors",
            location=source.location,
            revision=source.revision,
            sha256=_sha256(folder, weights.files, progress),
            format=stored_types(iter(weights.types.values())),
        ),
        licence=source.licence,
    )


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_TEXT_BYTES:
            raise CheckpointError(
                f"{path} has more than {_MAX_TEXT_BYTES >> 20} MiB; it is not what its name says."
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise CheckpointError(f"{path} cannot be read: {reason}. Fetch the model again.") from error


def _read_object(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in the file; an empty one if the file may be missing and is."""
    if not path.is_file():
        if optional:
            return {}
        raise CheckpointError(
            f"{path.parent} has no {path.name}; it is no checkpoint folder, or an incomplete one."
        )
    try:
        data = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}. Fetch the model again.") from None
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path} holds a {type(data).__name__}, expected an object. Fetch the model again."
        )
    return data


def _read_tokenizer(folder: Path, vocabulary: object) -> tuple[str, Tokenizer]:
    """The tokenizer's JSON text and the tokenizer itself.

    Fine-tunes often add tokens ("[PAD]") without an embedding for them. The model cannot read such a
    token, so it is left out.
    """
    path = folder / _TOKENIZER
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {_TOKENIZER}. Write it with transformers: "
            f'AutoTokenizer.from_pretrained("{folder.name}", use_fast=True).save_pretrained("{folder.name}")'
        )
    text = _read_text(path)
    tokenizer = parse_tokenizer(text, str(path))
    if not isinstance(vocabulary, int) or isinstance(vocabulary, bool):
        return text, tokenizer  # the architecture says what it expects of a vocab_size
    if any(token_id >= vocabulary for token_id in tokenizer.get_added_tokens_decoder()):
        data = json.loads(text)
        data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < vocabulary]
        text = json.dumps(data, ensure_ascii=False)
        tokenizer = parse_tokenizer(text, str(path))
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocabulary:
        raise CheckpointError(
            f"{path} has a token with the id {largest}, but there are embeddings for {vocabulary} tokens "
            "only. Tokenizer and weights are not of the same model."
        )
    return text, tokenizer


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    if (folder / _TEMPLATE).is_file():
        return _read_text(folder / _TEMPLATE) or None
    templates = settings.get("chat_template")
    if isinstance(templates, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in templates if isinstance(item, dict)}
        templates = named.get("default")
    if templates is None or (isinstance(templates, str) and not _LONE_SURROGATE.search(templates)):
        return templates or None
    raise CheckpointError(
        f"{folder / _TOKENIZER_CONFIG}: chat_template is a {type(templates).__name__}, expected text "
        "(in valid Unicode) or a list of named texts."
    )


def _sha256(folder: Path, weights: list[str], progress: Progress) -> str:
    """Of the sorted lines that sha256sum prints for the files that are read."""
    names = {_CONFIG, _GENERATION, _TOKENIZER, _TOKENIZER_CONFIG, _TEMPLATE, INDEX_NAME, *weights}
    present = [name for name in names if (folder / name).is_file()]
    lines = sorted(f"{sha256_of(folder / name, progress=progress)}  {name}\n" for name in sorted(present))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class _Ids:
    """Finds the special tokens' ids in the files that may name them."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any], tokenizer: Tokenizer
    ) -> None:
        self._folder = folder
        self._configs = [_read_object(folder / _GENERATION, optional=True), config]
        self._settings = settings
        self._tokenizer = tokenizer
        self._ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self._contents = {token_id: content for content, token_id in self._ids.items()}

    def tokens(self, template: str | None) -> Tokens:
        bos = self._configured("bos_token_id") + self._named("bos_token")
        eos = self._configured("eos_token_id") + self._named("eos_token")
        eos += end_of_turn_ids(template, special_ids(self._tokenizer))
        first = bos[0] if bos else None
        return Tokens(bos=first, eos=tuple(dict.fromkeys(eos)), add_bos=self._adds(first))

    def _configured(self, key: str) -> list[int]:
        """As generation does it: generation_config.json's, else config.json's."""
        for config in self._configs:
            value = config.get(key)
            if value is None:
                continue
            ids = value if isinstance(value, list) else [value]
            for token_id in ids:
                if type(token_id) is not int or token_id not in self._contents:
                    raise CheckpointError(
                        f"{self._folder}: {key} is {value!r:.99}, expected the id of a token of {_TOKENIZER}."
                    )
            return list(ids)
        return []

    def _named(self, key: str) -> list[int]:
        token = self._settings.get(key)
        content = token.get("content") if isinstance(token, dict) else token
        token_id = self._ids.get(content) if isinstance(content, str) else None
        return [] if token_id is None else [token_id]

    def _adds(self, bos: int | None) -> bool:
        """Whether the tokenizer itself begins a text with `bos`."""
        if bos is None:
            return False
        said = self._settings.get("add_bos_token")
        # transformers makes this class's post-processor anew from the setting; others keep the file's.
        if isinstance(said, bool) and "LlamaTokenizer" in str(self._settings.get("tokenizer_class")):
            return said
        with damage_reported(str(self._folder / _TOKENIZER)):
            plain: list[int] = self._tokenizer.encode("a", add_special_tokens=False).ids
            whole: list[int] = self._tokenizer.encode("a", add_special_tokens=True).ids
        return whole[:1] == [bos] and plain[:1] != [bos]
