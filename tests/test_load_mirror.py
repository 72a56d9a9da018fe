"""Checkpoints in object stores, by fsspec's store in memory: what is copied, what is read by ranges, what goes wrong."""

import json
import pathlib
import shutil

import fsspec
import numpy as np
import pytest

from refusal_jax import UserError, load_model, make_mesh
from refusal_jax.checkpoints import ranges
from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.checkpoints.load import load_decoder
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.checkpoints.tensor_files import SINGLE, TensorFiles

ADDRESS = "memory://bucket/models/tiny"


@pytest.fixture
def store(llama, tmp_path, monkeypatch):
    """A store that holds `llama`, and a home of its own for mirrors."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    files = fsspec.filesystem("memory")
    for path in llama.iterdir():
        files.pipe_file(f"{ADDRESS}/{path.name}", path.read_bytes())
    files.pipe_file(f"{ADDRESS}/original/params.json", b"{}")
    files.pipe_file(f"{ADDRESS}/.gitattributes", b"")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def test_folders_are_what_they_are(tmp_path):
    assert checkpoint_folder(tmp_path) == tmp_path
    assert checkpoint_folder(pathlib.Path("some/folder")) == pathlib.Path("some/folder")


def test_small_files_are_copied_and_weights_are_not(llama, store):
    folder = checkpoint_folder(ADDRESS)
    names = {path.name for path in llama.iterdir()} - {SINGLE}
    assert {path.name for path in folder.iterdir()} == names | {f"{SINGLE}.remote", ".mirror.json", ".origin.json"}
    assert all((folder / name).read_bytes() == (llama / name).read_bytes() for name in names)
    assert folder == checkpoint_folder(f"{ADDRESS}/") == checkpoint_folder(pathlib.Path(ADDRESS))


def test_the_model_is_the_same(model, store):
    there = load_model(ADDRESS)
    assert there.chat.render("Hello") == model.chat.render("Hello")
    for path, weight in model.decoder.weights().items():
        np.testing.assert_array_equal(there.decoder.weights()[path], weight)


def test_the_model_is_the_same_on_a_mesh(model, store, monkeypatch):
    monkeypatch.setattr(ranges, "REQUEST", 300)  # less than a tensor, more than a row
    weights = load_decoder(ADDRESS, mesh=make_mesh(fsdp=2, model=4)).weights()
    for path, weight in model.decoder.weights().items():
        np.testing.assert_array_equal(weights[path], weight)


def test_runs_that_lie_apart_come_in_few_requests(store, monkeypatch):
    files = TensorFiles.open(checkpoint_folder(ADDRESS))
    asked, cat = [], type(store).cat_file
    monkeypatch.setattr(
        type(store), "cat_file", lambda self, p, start, end: asked.append(end - start) or cat(self, p, start, end)
    )
    name = "model.layers.0.mlp.down_proj.weight"  # [32, 48]
    part = files.read(name, (slice(0, 10), slice(8, 16)))
    assert asked == [9 * 48 * 4 + 8 * 4] and files.bytes_read == asked[0]
    monkeypatch.setattr(ranges, "REQUEST", 48 * 4 * 2 + 32)
    np.testing.assert_array_equal(files.read(name, (slice(0, 10), slice(8, 16))), part)
    assert asked[1:] == [2 * 48 * 4 + 32] * 3 + [32]


def test_what_changed_is_copied_again(store, monkeypatch):
    folder = checkpoint_folder(ADDRESS)
    before, copied, cat = checkpoint_fingerprint(folder), [], type(store).cat_file
    monkeypatch.setattr(type(store), "cat_file", lambda self, p, **more: copied.append(p) or cat(self, p, **more))
    assert checkpoint_fingerprint(checkpoint_folder(ADDRESS)) == before and not copied
    store.pipe_file(f"{ADDRESS}/generation_config.json", b'{"eos_token_id": 5}')
    store.pipe_file(f"{ADDRESS}/new.json", b"{}")
    store.rm_file(f"{ADDRESS}/tokenizer_config.json")
    checkpoint_folder(ADDRESS)
    assert [path.rsplit("/", 1)[1] for path in copied] == ["generation_config.json", "new.json"]
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 5}
    assert not (folder / "tokenizer_config.json").exists()
    (folder / "config.json").unlink()
    (folder / ".mirror.json").write_text("[]")
    assert checkpoint_fingerprint(checkpoint_folder(ADDRESS)) != before and (folder / "config.json").exists()
    other = checkpoint_fingerprint(folder)
    store.pipe_file(f"{ADDRESS}/{SINGLE}", store.cat_file(f"{ADDRESS}/{SINGLE}") + b"1")
    assert checkpoint_fingerprint(checkpoint_folder(ADDRESS)) != other  # of the weights by their stub


def test_sharded_checkpoints_and_missing_shards(llama, store):
    index = {"weight_map": dict.fromkeys(TensorFiles.open(llama).tensors, "a.safetensors")}
    store.pipe_file(f"{ADDRESS}/model.safetensors.index.json", json.dumps(index).encode())
    store.mv(f"{ADDRESS}/{SINGLE}", f"{ADDRESS}/a.safetensors")
    assert load_decoder(ADDRESS).cfg.n_layers == 3
    store.rm_file(f"{ADDRESS}/a.safetensors")
    with pytest.raises(UserError, match=r"lacks 1 of the 1 weight files .*a\.safetensors"):
        load_decoder(ADDRESS)


def test_pickled_weights_are_named(store):
    store.mv(f"{ADDRESS}/{SINGLE}", f"{ADDRESS}/pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds pickled weights \(pytorch_model\.bin\)"):
        load_decoder(ADDRESS)


def test_stubs_count_in_mirrors_only(store, tmp_path, llama):
    elsewhere = shutil.copytree(checkpoint_folder(ADDRESS), tmp_path / "elsewhere")
    with pytest.raises(UserError, match="has neither model.safetensors nor"):
        load_decoder(elsewhere)
    stub = {"address": f"file://{llama / SINGLE}", "size": 8, "stamp": ""}
    store.pipe_file(f"{ADDRESS}/{SINGLE}.remote", json.dumps(stub).encode())
    written = (checkpoint_folder(ADDRESS) / f"{SINGLE}.remote").read_text()
    assert json.loads(written)["address"] == f"{ADDRESS}/{SINGLE}"


def test_a_file_that_changes_while_being_read(store):
    files = TensorFiles.open(checkpoint_folder(ADDRESS))
    store.pipe_file(f"{ADDRESS}/{SINGLE}", store.cat_file(f"{ADDRESS}/{SINGLE}")[:-8])
    with pytest.raises(UserError, match=r"could not be read \(the store sent [\d,]+ of [\d,]+ bytes"):
        for name in files.tensors:
            files.read(name)
    store.rm_file(f"{ADDRESS}/{SINGLE}")
    with pytest.raises(UserError, match=r"could not be read \(FileNotFoundError"):
        files.read(name)


class HttpError(Exception):
    """As object stores' libraries raise."""

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


@pytest.mark.parametrize(
    "error,message",
    [
        (FileNotFoundError("x"), "was not found: there is no such bucket, or no files in that folder"),
        (HttpError("The specified bucket does not exist", 404), "was not found .*bucket does not exist"),
        (
            ImportError("Install gcsfs"),
            r"cannot be used without .* \(Install gcsfs\).*pip install 'refusal-jax\[gcs\]'",
        ),
        (PermissionError("no"), "may not be used by you .*gcloud auth application-default login"),
        (HttpError("Anonymous caller does not have storage.objects.list access", 401), "may not be used by you"),
        (OSError("Forbidden: https://storage"), "may not be used by you"),
        (RuntimeError("Your default credentials were not found"), "may not be used by you"),
        (TimeoutError("slow"), r"could not be used \(TimeoutError: slow\)\. Check the address and the network"),
    ],
)
def test_what_stores_say(error, message, store, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    with pytest.raises(UserError, match=f"gs://bucket/model {message}"):
        checkpoint_folder("gs://bucket/model")


def test_addresses_of_nothing(store):
    with pytest.raises(UserError, match="memory://bucket/nowhere was not found"):
        load_model("memory://bucket/nowhere")
    with pytest.raises(UserError, match="memory://bucket/models was not found.*no files in that folder"):
        load_model("memory://bucket/models")
    with pytest.raises(UserError, match=r"gopher://x/y could not be used \(ValueError: Protocol not known"):
        load_model("gopher://x/y")


def test_a_damaged_stub(store):
    folder = checkpoint_folder(ADDRESS)
    (folder / f"{SINGLE}.remote").write_text("{}")
    with pytest.raises(
        UserError, match=r"safetensors\.remote is damaged: it lacks address and size\. Remove its folder"
    ):
        TensorFiles.open(folder)
