"""Gemma 3 as a GGUF file: names, norms and configuration as Hugging Face has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.checkpoints import PIECES, source
from helpers.tiny import float_session, random_ids, read_weights, run
from helpers.tiny_gemma3 import GGUF_CONFIG, gemma3_checkpoint, gemma3_gguf
from pocketlm.errors import CheckpointError, UnsupportedModelError
from pocketlm.tokenizer import Tokenizer
from pocketlm_exporters.checkpoint import Checkpoint, open_checkpoint
from pocketlm_exporters.checkpoint.gguf_families import FAMILIES
from pocketlm_exporters.checkpoint.gguf_file import GgufFile

LOCAL, GLOBAL = "sliding_attention", "full_attention"


def opened(folder: Path, **options: Any) -> Checkpoint:
    gemma3_gguf(folder / "tiny.gguf", **options)
    return open_checkpoint(source(folder / "tiny.gguf"))


def test_every_tensor_comes_back_under_its_hugging_face_name(tmp_path: Path) -> None:
    tensors = gemma3_gguf(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(source(tmp_path / "tiny.gguf"))
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        # Adding one and taking it away again costs the last bit.
        np.testing.assert_allclose(checkpoint.tensors[name], tensor, atol=1e-6, err_msg=name)
    table = "model.embed_tokens.weight"
    assert (checkpoint.tensors[table] == tensors[table]).all()


def test_the_graph_is_that_of_the_safetensors_folder(tmp_path: Path) -> None:
    ids = random_ids(60, vocabulary=len(PIECES))
    logits = []
    # The file says nothing of the pattern: six, as in all models of the family.
    same = gemma3_checkpoint(vocab_size=len(PIECES), sliding_window_pattern=6)
    for name, checkpoint in (("gguf", opened(tmp_path)), ("folder", same)):
        logits.append(run(float_session(checkpoint, read_weights(checkpoint), tmp_path / name), ids))
    assert np.ptp(logits[0]) > 1
    assert np.abs(logits[0] - logits[1]).max() < 1e-3


def test_the_configuration(tmp_path: Path) -> None:
    config = dict(opened(tmp_path).config)
    extra = {key: config.pop(key) for key in ("attention_bias", "mlp_bias", "rope_scaling")}
    assert extra == {"attention_bias": False, "mlp_bias": False, "rope_scaling": None}
    assert config == {**GGUF_CONFIG, "sliding_window_pattern": 6, "final_logit_softcapping": None}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"attention.sliding_window_pattern": 2}, {"sliding_window": 24, "sliding_window_pattern": 2}),
        ({"attention.sliding_window_pattern": [True, False, True]}, {"layer_types": [LOCAL, GLOBAL, LOCAL]}),
        ({"attention.sliding_window": None}, {"sliding_window_pattern": 1}),
        ({"attention.sliding_window": 0}, {"sliding_window_pattern": 1}),
        ({"rope.freq_base_swa": 500.0}, {"rope_local_base_freq": 500.0}),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
            {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
    ],
)
def test_what_a_file_may_say(tmp_path: Path, metadata: dict[str, Any], expected: dict[str, Any]) -> None:
    checkpoint = opened(tmp_path, metadata={f"gemma3.{key}": value for key, value in metadata.items()})
    assert {key: checkpoint.config[key] for key in expected} == expected
    read_weights(checkpoint)


def test_the_largest_model_scales_queries_by_its_width(tmp_path: Path) -> None:
    """Only the configuration is looked at: 62 layers would not fit into the tiny file."""
    gemma3_gguf(tmp_path / "tiny.gguf", {"gemma3.block_count": 62, "gemma3.attention.head_count": 2})
    config = FAMILIES["gemma3"].config(GgufFile(tmp_path / "tiny.gguf"), "here")
    assert config["query_pre_attn_scalar"] == 32
    gemma3_gguf(tmp_path / "tiny.gguf", {"gemma3.block_count": 61})
    config = FAMILIES["gemma3"].config(GgufFile(tmp_path / "tiny.gguf"), "here")
    assert config["query_pre_attn_scalar"] == 16


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"metadata": {"gemma3.attention.sliding_window_pattern": [True, False]}},
            CheckpointError,
            r"sliding_window_pattern has 2 flags, expected one for each of 3 layers",
        ),
        (
            {"metadata": {"gemma3.attention.scale": 0.5}},
            UnsupportedModelError,
            r"says gemma3\.attention\.scale = 0\.5, which pocketlm has no code for",
        ),
        (
            {"metadata": {"gemma3.rope.freq_base": None}},
            CheckpointError,
            r"says nothing about gemma3\.rope\.freq_base",
        ),
        (
            {"metadata": {"gemma3.block_count": 2}},
            CheckpointError,
            r"more layers than the 2 that gemma3\.blo",
        ),
        (
            {"change": {"blk.1.post_ffw_norm.weight": None}},
            CheckpointError,
            r"no tensor model\.layers\.1\.post_feedforward_layernorm\.weight, which a gemma3_text",
        ),
        (
            {"change": {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}},
            CheckpointError,
            r"self_attn\.q_norm\.weight has the shape \(8,\), expected \(16,\)",
        ),
        (
            {"change": {"blk.0.ffn_gate_exps.weight": np.ones((8, 8), np.float32)}},
            UnsupportedModelError,
            "which is not part of the gemma3 architecture",
        ),
    ],
)
def test_what_is_refused(
    tmp_path: Path, options: dict[str, Any], kind: type[CheckpointError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        opened(tmp_path, **options)


def test_softcapped_logits_are_refused_when_the_decoder_is_read(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, metadata={"gemma3.final_logit_softcapping": 30.0})
    with pytest.raises(UnsupportedModelError, match=r"final_logit_softcapping is 30\.0"):
        read_weights(checkpoint)


def test_runs_of_spaces_and_the_end_of_a_turn(tmp_path: Path) -> None:
    """User-defined pieces are matched in the text, spaces as they are, before anything is merged."""
    pieces = ["<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "\n", "  ", "   "]
    pieces += ["▁", "a", "b", "▁a", "<0xC3>", "<0xA9>"]
    types = [2, 3, 3, 3, 3, 4, 4, 4, 1, 1, 1, 1, 6, 6]
    metadata = {
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [-float(n) for n in range(len(pieces))],
        "tokenizer.chat_template": "<start_of_turn>{{ messages[0].content }}<end_of_turn>",
    }
    table = {"token_embd.weight": np.ones((len(pieces), GGUF_CONFIG["hidden_size"]), np.float32)}
    checkpoint = opened(tmp_path, metadata=metadata, change=table)
    tokenizer = Tokenizer(checkpoint.tokenizer_json, checkpoint.chat_template, checkpoint.tokens)
    tokens = ["a", "  ", "b", "▁a", "   ", "\n", "a", "<0xC3>", "<0xA9>"]
    assert tokenizer.encode("a  b a   \naé", add_bos=False) == [pieces.index(token) for token in tokens]
    assert tokenizer.decode(tokenizer.encode("a  b a   \naé")) == "a  b a   \naé"
    assert checkpoint.tokens.eos == (pieces.index("<eos>"), pieces.index("<end_of_turn>"))
    assert tokenizer.encode_chat([{"role": "user", "content": "a"}])[-1] == pieces.index("<end_of_turn>")
