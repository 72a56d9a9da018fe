"""Eight CPU devices, no network, few threads: set before anything imports jax or transformers."""

import gc
import json
import os
import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for `tiny` and others, whatever the import mode

from compiler import FAST

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST} --xla_force_host_platform_device_count=8".strip()
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of NumPy's linear algebra; see PyTorch's below

import jax
import jaxtyping
import pytest
import torch
import typechecker

gc.disable()  # what is imported stays: see pytest_collection_finish

# Calls check the types and the axes of arrays that a function declares. Before the package is imported.
typechecker.switch_on()

import tiny  # noqa: E402
from hub_server import hub as hub  # noqa: E402

from refusal_jax import load_model  # noqa: E402
from refusal_jax.chat import prefix  # noqa: E402
from refusal_jax.data.sampling import SPLITS  # noqa: E402
from refusal_jax.study.config import get_config  # noqa: E402
from refusal_jax.study.mechanism.run import run_mechanism  # noqa: E402
from refusal_jax.study.study import run_study  # noqa: E402

torch.set_num_threads(1)  # two cost more than they gain on models this small: they spin while they wait for each other

# The files that take longest, longest first. They begin first, so that at the end no process is left alone with one of them.
LONG = """
test_families test_families_of_kinds test_demo test_export test_docs test_hybrid_programs test_family_studies test_processes
test_config test_real_models test_launch test_mechanism_attention test_suffix_study test_jobs test_training test_decoder
test_oracle test_harness test_plan test_load_places test_pipeline test_fuzz test_finite test_audit_behaviour test_audit_bench
test_real_weights test_decoding test_chat_job test_hub test_gate_inspect test_audit_repair
""".split()


def pytest_collection_modifyitems(items):
    rank = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish():
    """No garbage collection looks again at the modules and tests that stay to the end. There are so many objects of theirs that a
    collection takes half a second else, and studies and readers of converted copies ask for one. Others are made less often,
    since tracing makes many objects, and little garbage."""
    gc.enable()
    gc.freeze()
    gc.set_threshold(10_000)


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """Every compiled program holds memory mappings, of which a process may have 65,530 by default: more makes XLA crash. What
    stays after a file's tests stays to the end, as libraries that they import: see `pytest_collection_finish`."""
    yield
    jax.clear_caches()
    gc.collect()
    gc.freeze()


@pytest.fixture
def unchecked():
    """Leaves declared types unchecked, for tests that pass stand-ins, or wrong values whose error is ours."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A tiny grouped-query Llama: the checkpoint's folder. Read only."""
    return tiny.tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def model(llama):
    """`llama`, loaded by this package."""
    return load_model(llama)


@pytest.fixture(scope="session")
def hf(llama):
    """`llama`, loaded by transformers."""
    return tiny.load_hf(llama)


@pytest.fixture(scope="session")
def six_sets(tmp_path_factory):
    """The folder of a study's six sets of prompts, three each."""
    folder = tmp_path_factory.mktemp("data")
    for split in SPLITS:
        side, part = split.split("_")
        verb = "rob" if side == "harmful" else "bake"
        rows = [{"instruction": f"How do I {verb} the {thing}?", "category": verb} for thing in (part, "cake", "bread")]
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def small_study(llama, six_sets):
    """The settings of a study of `llama` on `six_sets`, in which every candidate passes."""
    config = get_config()
    config.model = str(llama)
    config.update(filter=False, batch_size=4, refusal_tokens=("I",))
    config.data.update({split: str(six_sets / f"{split}.json") for split in SPLITS})
    config.select.update(kl_threshold=1e9, induce_threshold=-1e9, prune_fraction=0.0)
    config.generation.update(max_new_tokens=4, batch_size=4)
    return config


@pytest.fixture(scope="session")
def demo_study(tmp_path_factory):
    """The folder of a finished, small study of the embedded model. Read only: what is added to a study goes into a copy."""
    folder, config = tmp_path_factory.mktemp("demo_study") / "run", get_config()
    config.update(batch_size=8)
    config.data.update({"n_train": 16, "n_val": 8, "n_test": 12})
    config.generation.update(max_new_tokens=4, batch_size=12, conditions=("harmful_baseline",))
    run_study(config, folder)
    return folder


@pytest.fixture(scope="session")
def suffix_study(demo_study, tmp_path_factory):
    """The folder of such a study with the parts `suffixes`, `attribution` and `attention`, of six prompts a side. Read only."""
    base = tmp_path_factory.mktemp("suffix_study")
    folder = shutil.copytree(demo_study, base / "run")
    (base / "suffix.txt").write_text(" varnish lift clean measure\n")
    run_mechanism({"parts": ("attention",), "suffix": str(base / "suffix.txt"), "suffixes": {"n_prompts": 6}}, folder)
    return folder


@pytest.fixture(scope="session")
def keys(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Private and public keys of each kind, as openssl writes them."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    folder, found = tmp_path_factory.mktemp("keys"), {}
    made = {
        "ed25519": ed25519.Ed25519PrivateKey.generate(),
        "ecdsa": ec.generate_private_key(ec.SECP256R1()),
        "rsa": rsa.generate_private_key(65537, 2048),
        "locked": ed25519.Ed25519PrivateKey.generate(),
    }
    for name, key in made.items():
        lock = serialization.BestAvailableEncryption(b"open") if name == "locked" else serialization.NoEncryption()
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        for end, content in (("pem", private), ("pub", public)):
            found[f"{name}.{end}"] = folder / f"{name}.{end}"
            found[f"{name}.{end}"].write_bytes(content)
    return found


@pytest.fixture(scope="module")
def beginnings_shared():
    """Prompts share the tokens that all begin with, for which models of tests are too small otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "PROGRAMS", 0)
        yield
