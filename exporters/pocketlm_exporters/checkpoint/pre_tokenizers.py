r"""How the byte-level BPE vocabularies of GGUF files cut text into words before merging.

A GGUF file says only a name, `tokenizer.ggml.pre`. The regular expressions behind the names are those of
the models' own Hugging Face tokenizers where known, of llama.cpp (`src/llama-vocab.cpp`) otherwise; both
agree on what they match. `\p{…}` classes and the engine (Oniguruma) are those of the `tokenizers` library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

from pocketlm.errors import UnsupportedModelError, did_you_mean


@dataclass(frozen=True)
class PreTokenizer:
    """Each step cuts the pieces of the step before; matches and what lies between them are pieces."""

    splits: tuple[str, ...] = ()
    digits_apart: bool = False  # first of all, each digit is a piece of its own
    gpt2_words: bool = False  # last of all, GPT-2's expression cuts words
    nfc: bool = False  # text is brought to Unicode normalization form C first
    ignore_merges: bool = False  # a word that is in the vocabulary is one token, whatever the merges say
    add_bos: bool = False  # what a file means that does not say `tokenizer.ggml.add_bos_token`

    def pre_tokenizer(self) -> Any:
        """For `Tokenizer.pre_tokenizer`."""
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if self.digits_apart else []
        steps += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.splits]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.gpt2_words))
        return pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(digits: str, *, contraction: str = _CONTRACTION + "|") -> str:
    """GPT-4's expression (cl100k) with at most so many digits in a piece."""
    return rf"{contraction}[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased_words(digits: str, contraction: str = "") -> str:
    """GPT-4o's expression (o200k): an upper-case letter begins a piece."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}{_UPPER}*{_LOWER}+{contraction}|{start}{_UPPER}+{_LOWER}*{contraction}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_GPT2 = PreTokenizer(gpt2_words=True)
_NEOX = PreTokenizer(gpt2_words=True, nfc=True)
_DIGITS = PreTokenizer(digits_apart=True, gpt2_words=True)
_LLAMA3 = PreTokenizer(splits=(_words(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_SMAUG = PreTokenizer(splits=(_words(r"\p{N}{1,3}"),))
_QWEN2 = PreTokenizer(splits=(_words(r"\p{N}"),), nfc=True)
_O200K = PreTokenizer(splits=(_cased_words(r"\p{N}{1,3}", _CONTRACTION + "?"),))
_ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
# Cased letters, escaped because several of them are lost when an editor normalizes the text.
_DEEPSEEK_LETTERS = (
    "[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-"
    "\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-"
    "\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf"
    "\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-"
    "\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e"
    "\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-"
    "\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-"
    "\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    # What llama.cpp does where a file names no pre-tokenizer.
    "default": PreTokenizer(
        splits=(
            r"[\p{P}\$\+<=>\^~\|]+",
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r"\p{N}+",
            r"[0-9][0-9][0-9]",
        )
    ),
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "mellum": _GPT2,
    "trillion": _GPT2,
    "mpt": _NEOX,
    "olmo": _NEOX,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "minerva-7b": _DIGITS,
    "command-r": PreTokenizer(digits_apart=True, gpt2_words=True, nfc=True),
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "midm-2.0": _LLAMA3,
    "smaug-bpe": _SMAUG,
    "dbrx": _SMAUG,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "tekken": PreTokenizer(splits=(_cased_words(r"\p{N}"),), ignore_merges=True, add_bos=True),
    "gpt-4o": _O200K,
    "llama4": _O200K,
    "seed-coder": PreTokenizer(
        splits=(
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",
        )
    ),
    "deepseek-coder": PreTokenizer(splits=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    "deepseek-llm": PreTokenizer(
        splits=(
            r"[\r\n]",
            rf"\s?{_DEEPSEEK_LETTERS}+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _CJK,
            r"\p{N}",
        )
    ),
    "deepseek-v3": PreTokenizer(
        splits=(
            r"\p{N}{1,3}",
            "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
            rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
        )
    ),
}


def find_pre_tokenizer(name: str, where: str) -> PreTokenizer:
    """The pre-tokenizer called `name`. Raises UnsupportedModelError, naming the known ones."""
    if name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    raise UnsupportedModelError(
        f"{where} needs the pre-tokenizer {name!r}, which pocketlm does not know."
        f"{did_you_mean(name, PRE_TOKENIZERS)} Known are {', '.join(PRE_TOKENIZERS)}. "
        "Export the model from its safetensors folder instead, which carries its own tokenizer.json."
    )
