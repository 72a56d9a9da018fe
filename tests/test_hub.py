"""Checkpoints by their names on the hub: the real client against a hub of our own."""

import json
import logging
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from huggingface_hub import constants
from test_processes import Pair

from refusal_jax import UserError, load_model, make_mesh
from refusal_jax import hub as names
from refusal_jax.checkpoints import hub as fetching
from refusal_jax.checkpoints import ranges
from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.checkpoints.load import load_decoder
from refusal_jax.checkpoints.mirrors import source_name
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.checkpoints.tensor_files import INDEX, SINGLE, TensorFiles
from refusal_jax.hub import HubName, model_name, snapshot_name

NAME, (OLD, NEW) = "org/tiny", ("a" * 40, "b" * 40)
USELESS = {
    "original/consolidated.00.pth": b"x",
    "consolidated.safetensors": b"x",
    "pytorch_model.bin": b"x",
    "modeling_tiny.py": b"raise SystemExit",
    "tiny.gguf": b"x",
    ".gitattributes": b"",
}


@pytest.fixture
def tiny_hub(hub, llama):
    """A hub with `llama`, and beside it what is never to be fetched."""
    hub.add(NAME, llama, files=USELESS)
    return hub


def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def fetched(hub) -> set[str]:
    return {path.rpartition("/")[2] for _, method, path, _ in hub.asked if method == "GET" and "/api/" not in path}


@pytest.mark.parametrize(
    "text,found",
    [
        ("Qwen/Qwen2.5-0.5B", (HubName("Qwen/Qwen2.5-0.5B"), "")),
        ("a/b@main", (HubName("a/b", "main"), "")),
        ("a/b@refs/pr/3", (HubName("a/b", "refs/pr/3"), "")),
        ("a/b/c-Q4.gguf@v1", (HubName("a/b", "v1", "c-Q4.gguf"), "")),
        ("a/b/deep/c.gguf", (HubName("a/b", "", "deep/c.gguf"), "")),
        ("hf:a/b", (HubName("a/b"), "hf:")),
        ("hf:/a/b@x", (HubName("a/b", "x"), "hf://")),  # what pathlib leaves of it
        *(
            (text, None)
            for text in ("a", "a/b/c", "./a/b", "/a/b", "../b", "a/..", "a/b/", "a/../c.gguf", "~/b", "a b/c", "")
        ),
    ],
)
def test_what_names_look_like(text, found):
    assert model_name(text) == found


@pytest.mark.parametrize("text", ["hf:a", "hf://a/b/c", "hf:datasets/a/b"])
def test_names_that_are_none(text):
    with pytest.raises(UserError, match=f"{text} is not the name of a model on the hub. Write hf:"):
        checkpoint_folder(text)


def test_only_what_is_needed_is_fetched(tiny_hub, llama, model):
    folder = checkpoint_folder(NAME)
    assert fetched(tiny_hub) == {path.name for path in llama.iterdir()}
    assert {path.name for path in folder.iterdir()} == {path.name for path in llama.iterdir()} | {".origin.json"}
    assert checkpoint_fingerprint(folder) == checkpoint_fingerprint(llama)
    assert source_name(folder) == f"{NAME}@{OLD}" and source_name(llama) == str(llama)
    loaded = load_model(NAME)
    assert loaded.chat.render("Hello") == model.chat.render("Hello")
    for path, weight in model.decoder.weights().items():
        np.testing.assert_array_equal(loaded.decoder.weights()[path], weight)


def test_a_second_time_only_the_commit_is_asked_for(tiny_hub, monkeypatch):
    folder = checkpoint_folder(NAME)
    tiny_hub.asked.clear()
    assert checkpoint_folder(NAME) == folder and len(tiny_hub.asked) == 1
    assert checkpoint_folder(f"{NAME}@{OLD}") == folder and len(tiny_hub.asked) == 1
    offline(monkeypatch)
    assert checkpoint_folder(NAME) == checkpoint_folder(f"hf:{NAME}@main") == folder
    with pytest.raises(UserError, match=r"org/tiny@v2 is no folder here, and it is not wholly .*HF_HUB_OFFLINE is set"):
        checkpoint_folder(f"{NAME}@v2")


def test_what_another_tool_fetched_is_enough_without_a_network(tiny_hub, monkeypatch, llama):
    from huggingface_hub import snapshot_download

    snapshot = snapshot_download(NAME)
    offline(monkeypatch)
    assert checkpoint_fingerprint(checkpoint_folder(NAME)) == checkpoint_fingerprint(llama)
    pathlib.Path(snapshot, SINGLE).unlink()
    with pytest.raises(UserError, match=f"has neither {SINGLE} nor"):
        load_decoder(NAME)


def test_config_and_tokenizer_alone(tiny_hub):
    folder = checkpoint_folder(NAME, weights=False)
    assert SINGLE not in fetched(tiny_hub) and (folder / "tokenizer.json").exists() and not (folder / SINGLE).exists()
    assert checkpoint_folder(NAME) == folder and (folder / SINGLE).exists()
    assert checkpoint_folder(NAME, weights=False) == folder and (folder / SINGLE).exists()


def test_a_folder_of_that_name_wins(tiny_hub, llama, tmp_path, monkeypatch, caplog):
    (tmp_path / "org").mkdir()
    (tmp_path / NAME).symlink_to(llama)
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        assert checkpoint_folder(NAME) == pathlib.Path(NAME) and not tiny_hub.asked
    assert "org/tiny is read from the folder of that name; hf:org/tiny would be the hub's model." in caplog.text
    assert checkpoint_folder(pathlib.Path("org/other")) == pathlib.Path("org/other")  # a path is no name
    assert source_name(checkpoint_folder(f"hf:{NAME}")) == f"{NAME}@{OLD}"


def test_revisions(tiny_hub, llama):
    repository = tiny_hub.add(NAME, llama, commit=NEW, files={"generation_config.json": b"{}"})
    repository.revisions["v1.0"] = OLD
    assert source_name(checkpoint_folder(NAME)) == f"{NAME}@{NEW}"
    assert source_name(checkpoint_folder(f"{NAME}@v1.0")) == f"{NAME}@{OLD}"
    with pytest.raises(
        UserError, match=r"has no revision 'v1\.1' on the hub. Its branches .* main, v1\.0\. Did you mean v1\.0\?"
    ):
        checkpoint_folder(f"{NAME}@v1.1")


def test_a_session_keeps_the_commit(tiny_hub, llama, caplog):
    with names.session({}) as found:
        folder = checkpoint_folder(NAME)
        tiny_hub.add(NAME, llama, commit=NEW)
        assert checkpoint_folder(NAME) == folder and found == {NAME: OLD}
    with names.session(found) as again, caplog.at_level(logging.INFO):
        assert checkpoint_folder(NAME) == folder and again == found
    assert f"org/tiny is now at commit {NEW} on the hub. This run began with {OLD} and goes on with it" in caplog.text
    assert checkpoint_folder(NAME) != folder


def test_a_dropped_connection_goes_on_where_it_stopped(tiny_hub, monkeypatch, llama):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 250)
    tiny_hub.drop = 1000
    folder = checkpoint_folder(NAME)
    ranges = [asked for host, method, path, asked in tiny_hub.asked if host == "127.0.0.1" and method == "GET"]
    assert ranges == ["", "bytes=1000-"]
    assert (folder / SINGLE).read_bytes() == (llama / SINGLE).read_bytes()


def test_damaged_bytes(tiny_hub):
    tiny_hub.corrupt.add(SINGLE)
    with pytest.raises(
        UserError, match=r"model\.safetensors did not arrive as it is on the hub: its sha256 .*was removed"
    ):
        checkpoint_folder(NAME)
    tiny_hub.corrupt.clear()
    assert (checkpoint_folder(NAME) / SINGLE).exists()


def test_the_token_is_for_the_hub_alone(tiny_hub, monkeypatch):
    tiny_hub.repositories["models", NAME].gated = True
    with pytest.raises(
        UserError, match=r"org/tiny@a+ is gated: .*Accept them at http://localhost:\d+/org/tiny, and log in"
    ):
        checkpoint_folder(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert (checkpoint_folder(NAME) / SINGLE).exists() and set(tiny_hub.authorised) == {"localhost"}


@pytest.mark.parametrize(
    "name,message",
    [
        (
            "org/tinny",
            r"org/tinny is no folder here, and no model that the hub \(http.*\) shows you\. Did you mean org/tiny\?",
        ),
        ("other/tiny", r"Did you mean org/tiny\?|Near it are org/tiny"),
        ("who/knows", r"shows you\. Check the spelling \(ORG/NAME\); for a private model, log in"),
        ("org/prompts", r"org/prompts is a data set on the hub, not a model\. Name a model"),
        ("org/a--b", r"org/a--b cannot be the name of a model on the hub \(HFValidationError"),
    ],
)
def test_names_of_nothing(name, message, tiny_hub):
    tiny_hub.add("org/prompts", kind="datasets", files={"train.csv": b"goal\na\n"})
    with pytest.raises(UserError, match=message):
        checkpoint_folder(name)


CONFIG = {"config.json": b"{}"}


@pytest.mark.parametrize(
    "files,message",
    [
        (
            CONFIG | {"m-Q4.gguf": b"", "m-Q8.gguf": b""},
            r"GGUF files: m-Q4\.gguf, m-Q8\.gguf\. .* such as x/y/m-Q4\.gguf\.",
        ),
        (CONFIG | {"pytorch_model.bin": b""}, r"pickled weights \(pytorch_model\.bin\), which can run code"),
        (
            {"adapter_config.json": b'{"base_model_name_or_path": "a/b"}', "adapter_model.safetensors": b""},
            r"x/y is a PEFT adapter of 'a/b', not a model\. Merge the two:(\n.*)*from_pretrained\('x/y'",
        ),
        ({"consolidated.safetensors": b""}, r"has neither model\.safetensors nor .*Its safetensors are consolidated"),
        (
            {"README.md": b""},
            r"has neither model\.safetensors nor model\.safetensors\.index\.json\. Name the repository",
        ),
        ({SINGLE: b""}, r"x/y has no config\.json"),
        (
            CONFIG | {SINGLE: b"", INDEX: b'{"weight_map": {"a": "b.safetensors"}}', "b.safetensors": b""},
            r"holds both model\.safetensors and .*`hf download x/y --local-dir DIR`, remove one",
        ),
    ],
)
def test_repositories_of_other_things(files, message, hub):
    hub.add("x/y", files=files)
    with pytest.raises(UserError, match=message):
        checkpoint_folder("x/y")


def test_shards_that_the_index_names(hub, llama):
    index = {"weight_map": dict.fromkeys(TensorFiles.open(llama).tensors, "m-1.safetensors")}
    small = {path.name: path.read_bytes() for path in llama.iterdir() if path.name != SINGLE}
    whole = (llama / SINGLE).read_bytes()
    more = {INDEX: json.dumps(index).encode(), "m-1.safetensors": whole, "model.fp32.safetensors": b""}
    hub.add(NAME, files=small | more)
    assert load_decoder(NAME).cfg.n_layers == 3 and "model.fp32.safetensors" not in fetched(hub)


def test_no_network(tiny_hub, monkeypatch, caplog):
    tiny_hub.status = 503
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match=r"the hub \(http.*\) could not be reached \(HfHubHTTPError.*HF_ENDPOINT"):
        checkpoint_folder(NAME)
    tiny_hub.status = 0
    folder = checkpoint_folder(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://localhost:9")
    assert checkpoint_folder(NAME) == folder
    assert re.search(f"{NAME}: the hub could not be reached .*, so commit {OLD} of the cache is used", caplog.text)
    with pytest.raises(UserError, match=r"org/new is no folder .*could not be reached \(ConnectError"):
        checkpoint_folder("org/new")
    monkeypatch.undo()


def test_refusals_of_other_kinds(tiny_hub):
    tiny_hub.status = 418
    with pytest.raises(UserError, match=r"The hub did not give the model org/tiny \(HfHubHTTPError.*Check HF_TOKEN"):
        checkpoint_folder(NAME)


def test_full_disks(tiny_hub, monkeypatch):
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda folder: fetching.shutil._ntuple_diskusage(9, 9, 5))
    with pytest.raises(
        UserError, match=r"needs [\d,]+ bytes in the hub's cache .* 5 free.*set HF_HOME .* hf://org/tiny"
    ):
        checkpoint_folder(NAME)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda folder: fetching.shutil._ntuple_diskusage(9, 9, 1 << 40))
    error = OSError(28, "No space left on device", "/cache/x")

    def full(*args, **more):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(UserError, match=r"/cache/x could not be written: No space .* HF_HOME names the folder"):
        checkpoint_folder(NAME)
    error = RuntimeError("CAS said no")
    with pytest.raises(UserError, match=r"org/tiny@a+ could not be fetched \(RuntimeError: CAS said no\)\. Try again"):
        checkpoint_folder(NAME)


def test_gguf_files(hub, monkeypatch):
    parts = {f"q/m-0000{i}-of-00002.gguf": bytes([i]) for i in (1, 2)}
    hub.add("x/y", files=parts | {"other.gguf": b"", "README.md": b""})
    path = fetching.hub_mirror(HubName("x/y", "", "q/m-00001-of-00002.gguf"))
    assert path.read_bytes() == b"\1" and path.with_name("m-00002-of-00002.gguf").exists()
    assert fetched(hub) == {name.rpartition("/")[2] for name in parts}
    assert snapshot_name(path) == HubName("x/y", OLD, "q/m-00001-of-00002.gguf")
    with pytest.raises(UserError, match=r"has no file othr\.gguf\. It has other\.gguf, .*Did you mean other\.gguf\?"):
        checkpoint_folder("x/y/othr.gguf")
    offline(monkeypatch)
    assert fetching.hub_mirror(HubName("x/y", OLD, "q/m-00001-of-00002.gguf")) == path


def test_streaming_reads_ranges_only(tiny_hub, model, monkeypatch, llama, tmp_path):
    monkeypatch.setattr(fetching, "SMALL", 100)
    monkeypatch.setattr(ranges, "REQUEST", 5000)
    folder = checkpoint_folder(f"hf://{NAME}")
    assert SINGLE not in fetched(tiny_hub) and (folder / f"{SINGLE}.remote").exists()
    weights = load_decoder(f"hf://{NAME}", mesh=make_mesh(fsdp=2, model=4)).weights()
    for path, weight in model.decoder.weights().items():
        np.testing.assert_array_equal(weights[path], weight)
    assert not list(pathlib.Path(constants.HF_HUB_CACHE).rglob(SINGLE)) and tiny_hub.tickets == 1
    asked = [asked for host, _, _, asked in tiny_hub.asked if host == "127.0.0.1"]
    assert all(asked) and "bytes=0-7" in asked
    whole = checkpoint_folder(NAME)
    assert whole == folder and not (folder / f"{SINGLE}.remote").exists() and (folder / SINGLE).exists()
    assert checkpoint_folder(f"hf://{NAME}") == folder and (folder / SINGLE).exists()  # what is here is read here


def test_one_fingerprint_here_and_there(tiny_hub, monkeypatch, llama):
    from refusal_jax.checkpoints import fingerprint

    monkeypatch.setattr(fingerprint, "SMALL", 100)
    monkeypatch.setattr(fetching, "SMALL", 100)
    assert checkpoint_fingerprint(checkpoint_folder(f"hf://{NAME}")) == checkpoint_fingerprint(llama)
    assert checkpoint_fingerprint(checkpoint_folder(NAME)) == checkpoint_fingerprint(llama)


def test_streaming_survives_what_servers_do(tiny_hub, monkeypatch):
    monkeypatch.setattr(fetching, "SMALL", 100)
    monkeypatch.setattr(ranges, "WAIT", 0.01)
    files = TensorFiles.open(checkpoint_folder(f"hf://{NAME}"))
    name = "model.embed_tokens.weight"
    values = files.read(name)
    tiny_hub.stale = True  # the address has expired
    np.testing.assert_array_equal(files.read(name), values)
    assert tiny_hub.tickets == 2
    tiny_hub.drop = 1000
    np.testing.assert_array_equal(files.read(name), values)
    tiny_hub.repositories["models", NAME].commits[OLD][SINGLE] += b"1"
    tiny_hub.stale = True
    with pytest.raises(UserError, match=r"could not be read \(OSError: its size is \d+ there, expected \d+\)"):
        files.read(name)


def test_several_hosts_stream_unless_told_to_download(tiny_hub, monkeypatch):
    monkeypatch.setattr(fetching, "SMALL", 100)
    monkeypatch.setattr(names.distributed, "several", lambda: True)
    assert (checkpoint_folder(NAME) / f"{SINGLE}.remote").exists()
    with names.session({}, download=True):
        assert (checkpoint_folder(NAME) / SINGLE).exists()


def test_plans_by_name_and_the_environment(tiny_hub, tmp_path):
    """In a process of its own, because jobs share names of flags, and the client reads the environment once."""
    code = (
        "from refusal_jax.jobs.plan import named_model; name, cfg = named_model('org/tiny'); print(name, cfg.n_layers)"
    )
    ours = {"HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": str(tmp_path / "elsewhere"), "HF_TOKEN": "hf_secret"}
    env = {k: v for k, v in os.environ.items() if "OFFLINE" not in k} | ours
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "tiny 3\n", done.stderr
    assert SINGLE not in fetched(tiny_hub) and tiny_hub.authorised
    assert list((tmp_path / "elsewhere").rglob("config.json"))


PART = """
import sys
from refusal_jax import distributed
distributed.start(sys.argv[2], 2, int(sys.argv[1]))
import jax
from refusal_jax import load_model, make_mesh
from refusal_jax.checkpoints import hub
hub.SMALL = 100
model = load_model("org/tiny", mesh=make_mesh(fsdp=2, model=4))
tokens = [[1, 2, 3, 4]] * 2
logits = jax.experimental.multihost_utils.process_allgather(model.logits(tokens, [[True] * 4] * 2), tiled=True)
print(model.path.name, sum(path.name.endswith(".remote") for path in model.path.iterdir()), float(logits[0, 7]))
distributed.finish()
"""


def test_two_processes_read_their_slices_from_the_hub(tiny_hub, model, tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", constants.ENDPOINT)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "elsewhere"))
    pair = Pair(lambda i, port: ("python", "-c", PART, i, f"127.0.0.1:{port}"), tmp_path).wait()
    assert pair.codes == [0, 0], pair.err
    (name, stubs, logit), other = (out.split()[-3:] for out in pair.out)  # after what Gloo prints
    assert other == [name, stubs, logit] and (name, stubs) == (f"org--tiny-{OLD[:12]}", "1")
    tokens = np.asarray([[1, 2, 3, 4]])
    assert abs(float(logit) - float(model.logits(tokens, tokens > 0)[0, 7])) < 1e-4
    assert not list((tmp_path / "elsewhere").rglob(SINGLE))
    sent = [range_ for host, method, _, range_ in tiny_hub.asked if host == "127.0.0.1" and method == "GET"]
    assert sent and all(sent)
