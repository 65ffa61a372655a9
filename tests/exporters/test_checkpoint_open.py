"""The choice of a reader, and any damage at all: a Checkpoint or a CheckpointError, nothing else."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pocketlm_exporters.checkpoint as package
from helpers.checkpoints import source, tiny_folder, tiny_gguf
from pocketlm.errors import CheckpointError, UnsupportedModelError
from pocketlm_exporters.checkpoint import open_checkpoint


def test_the_public_names() -> None:
    assert package.__all__ == ["Checkpoint", "Tensors", "open_checkpoint"]


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "model.bin")
    assert open_checkpoint(source(tmp_path / "model.bin")).source.kind == "gguf"
    tiny_folder(tmp_path / "model.gguf")
    assert open_checkpoint(source(tmp_path / "model.gguf")).source.kind == "safetensors"


def test_both_formats_give_the_same_checkpoint(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "tiny.gguf")
    tiny_folder(tmp_path / "tiny")
    a, b = (open_checkpoint(source(tmp_path / name)) for name in ("tiny.gguf", "tiny"))
    assert set(a.tensors) == set(b.tensors)
    assert all((a.tensors[name] == b.tensors[name]).all() for name in a.tensors)
    assert {key: a.config[key] for key in b.config if key in a.config}.items() <= b.config.items()
    assert (a.tokens.bos, a.tokens.eos) == (b.tokens.bos, b.tokens.eos)


@pytest.mark.parametrize("start", [b"\x80\x02}q\x00.", b"PK\x03\x04rest"])
def test_pickles_are_refused(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(start)
    with pytest.raises(UnsupportedModelError, match="Python pickle, which can run any code"):
        open_checkpoint(source(tmp_path / "model.gguf"))


def test_a_single_safetensors_file_needs_its_folder(tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    for name in ("model.safetensors", "model"):
        (tmp_path / "model.safetensors").rename(tmp_path / name)
        with pytest.raises(CheckpointError, match=r"is a single safetensors file\. Give its folder"):
            open_checkpoint(source(tmp_path / name))
        (tmp_path / name).rename(tmp_path / "model.safetensors")


def test_a_folder_of_gguf_files(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match=r"is a folder with GGUF files. Give the file itself.*a\.gguf"):
        open_checkpoint(source(tmp_path))


def test_what_is_nothing_at_all(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Dear diary")
    with pytest.raises(CheckpointError, match="is no checkpoint: it begins with b'Dear diar'"):
        open_checkpoint(source(tmp_path / "notes.txt"))
    with pytest.raises(CheckpointError, match="cannot be read: No such file or directory"):
        open_checkpoint(source(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="it is no checkpoint folder"):
        open_checkpoint(source(tmp_path))


def test_a_file_that_fails_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: Path, **_: object) -> str:
        raise OSError(5, "Input/output error", str(path))

    tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr("pocketlm_exporters.checkpoint.gguf.sha256_of", failing)
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
        open_checkpoint(source(tmp_path / "tiny.gguf"))


# ------------------------------------------------------------------ any damage


def survives(path: Path) -> None:
    """Opens and reads everything; CheckpointError is the only way not to."""
    try:
        checkpoint = open_checkpoint(source(path))
        for name in checkpoint.tensors:
            assert checkpoint.tensors[name].shape
    except CheckpointError as error:
        assert len(str(error)) < 2_000


@st.composite
def damage(draw: st.DrawFn, sizes: dict[str, int]) -> tuple[str, list[tuple[int, bytes]], int]:
    """(file, bytes to write at positions, size to cut to). Half of the writes go into the beginning."""
    name = draw(st.sampled_from(sorted(sizes)))
    size = sizes[name]
    position = st.one_of(st.integers(0, size - 1), st.integers(0, min(size, 3_000) - 1))
    extremes = st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\x7f\xff"])
    content = st.one_of(st.binary(min_size=1, max_size=8), extremes)
    writes = draw(st.lists(st.tuples(position, content), max_size=4))
    return name, writes, draw(st.one_of(st.just(size), st.integers(0, size)))


def spoil(content: bytes, writes: list[tuple[int, bytes]], size: int) -> bytes:
    spoiled = bytearray(content)
    for position, new in writes:
        spoiled[position : position + len(new)] = new
    return bytes(spoiled[:size])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    tiny_gguf(folder / "tiny.gguf", biases=True)
    tiny_folder(folder / "tiny", {"tokenizer_config.json": {"bos_token": "<s>"}})
    return folder


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_damage_to_a_gguf_file(sound: Path, data: st.DataObject) -> None:
    content = (sound / "tiny.gguf").read_bytes()
    _, writes, size = data.draw(damage({"tiny.gguf": len(content)}))
    (sound / "spoiled.gguf").write_bytes(spoil(content, writes, size))
    survives(sound / "spoiled.gguf")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_damage_to_a_safetensors_folder(sound: Path, data: st.DataObject) -> None:
    contents = {path.name: path.read_bytes() for path in sorted((sound / "tiny").iterdir())}
    name, writes, size = data.draw(damage({file: len(content) for file, content in contents.items()}))
    spoiled = sound / "spoiled"
    spoiled.mkdir(exist_ok=True)
    for file, content in contents.items():
        (spoiled / file).write_bytes(spoil(content, writes, size) if file == name else content)
    survives(spoiled)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = {
    "config.json": ["hidden_size", "num_hidden_layers", "head_dim", "vocab_size", "bos_token_id",
                    "eos_token_id", "model_type", "quantization_config", "tie_word_embeddings"],
    "tokenizer_config.json": ["chat_template", "bos_token", "eos_token", "add_bos_token", "tokenizer_class"],
    "generation_config.json": ["bos_token_id", "eos_token_id"],
    "model.safetensors.index.json": ["weight_map"],
    "tokenizer.json": ["added_tokens", "model", "normalizer", "pre_tokenizer", "post_processor", "decoder"],
}  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.data())
@example(None)
def test_any_value_in_the_json_files(sound: Path, data: st.DataObject | None) -> None:
    contents = {path.name: path.read_bytes() for path in sorted((sound / "tiny").iterdir())}
    name, key, value = "config.json", "vocab_size", 2**70  # more than any machine's integer
    if data is not None:
        name = data.draw(st.sampled_from(sorted(KEYS)))
        key, value = data.draw(st.sampled_from(KEYS[name])), data.draw(json_values)
    document = json.loads(contents.get(name, b"{}"))
    contents[name] = json.dumps({**document, key: value}).encode("utf-8", "surrogatepass")
    folder = sound / "values"
    folder.mkdir(exist_ok=True)
    for file in set(KEYS) | set(contents):
        if file in contents:
            (folder / file).write_bytes(contents[file])
        else:
            (folder / file).unlink(missing_ok=True)
    survives(folder)
