"""The files of configs/: each loads, says what it does, and agrees with the paper and with the hardware it names."""

import importlib.util
import pathlib
import re
from typing import NamedTuple

import pytest
from real_models import REAL_MODELS

from refusal_jax.models.hf_config import from_hf
from refusal_jax.plan.chips import Slice
from refusal_jax.plan.planner import WANTED, ranked_meshes
from refusal_jax.study.checks import check_settings
from refusal_jax.study.config import get_config
from refusal_jax.study.study import workload

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
BY_REPO = {real.repo: real for real in REAL_MODELS.values()}
CHIP_GB = {"v5e": 16, "v6e": 32, "v5p": 95}


class Paper(NamedTuple):
    """What the paper used for a model, and its Table 5."""

    repo: str
    template: str
    refusal_tokens: tuple[int, ...]
    dtype: str
    position: int
    layer: int
    bypass: float
    induce: float
    kl: float


QWEN, GEMMA, LLAMA_2 = (
    ("chatml", (40, 2121), "float16"),
    ("gemma", (235285,), "bfloat16"),
    ("llama-2", (306,), "float16"),
)
YI, LLAMA_3 = ("chatml", (59597,), "float16"), ("llama-3", (40,), "bfloat16")
PAPER = {
    "qwen_1_8b": Paper("Qwen/Qwen-1_8B-Chat", *QWEN, -1, 15, -4.415, 1.641, 0.077),
    "qwen_7b": Paper("Qwen/Qwen-7B-Chat", *QWEN, -1, 17, -5.355, 1.107, 0.069),
    "qwen_14b": Paper("Qwen/Qwen-14B-Chat", *QWEN, -1, 23, -5.085, 1.606, 0.014),
    "qwen_72b": Paper("Qwen/Qwen-72B-Chat", *QWEN, -1, 62, -4.246, 1.885, 0.034),
    "yi_6b": Paper("01-ai/Yi-6B-Chat", *YI, -5, 20, -6.693, 1.968, 0.046),
    "yi_34b": Paper("01-ai/Yi-34B-Chat", *YI, -1, 37, -11.14, 1.865, 0.069),
    "gemma_2b": Paper("google/gemma-2b-it", *GEMMA, -2, 10, -14.435, 6.709, 0.067),
    "gemma_7b": Paper("google/gemma-7b-it", *GEMMA, -1, 14, -12.239, 6.851, 0.091),
    "llama_2_7b": Paper("meta-llama/Llama-2-7b-chat-hf", *LLAMA_2, -1, 14, -5.295, 5.941, 0.073),
    "llama_2_13b": Paper("meta-llama/Llama-2-13b-chat-hf", *LLAMA_2, -1, 26, -4.377, 2.794, 0.092),
    "llama_2_70b": Paper("meta-llama/Llama-2-70b-chat-hf", *LLAMA_2, -1, 21, -4.565, 5.191, 0.036),
    "llama_3_8b": Paper("meta-llama/Meta-Llama-3-8B-Instruct", *LLAMA_3, -5, 12, -9.715, 7.681, 0.064),
    "llama_3_70b": Paper("meta-llama/Meta-Llama-3-70B-Instruct", *LLAMA_3, -5, 25, -7.839, 0.126, 0.021),
}
OTHERS = set(
    """
    llama_3_1_8b qwen2_5_7b qwen3_8b mistral_7b gemma_2_9b gemma_3_4b phi_4 olmo_2_7b granite_3_1_8b glm_4_9b
    mixtral_8x7b qwen3_30b_a3b olmoe_1b_7b
    """.split()
)
MODELS = sorted(OTHERS | set(PAPER))
EXPECTED = re.compile(
    r"Expected:  position (-\d+)(?: \(.*?\))?, layer (\d+), bypass (-\d+\.\d+), induce (\d\.\d{3}), KL (0\.\d{3})\n"
    r" +\(paper, Table 5: its splits, (float16|bfloat16) on GPUs; on other hardware within 0\.61, 0\.33 and 0\.008\)\n"
)
HARDWARE = re.compile(r"Hardware:  TPU (v\d[a-z])-(\d+) \((\d+) x (\d+) GB\); weights ([\d.]+) GB in bfloat16(.*)\n")


def load(name: str):
    """Docstring and settings of a config file."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.__doc__, module.get_config()


def flat(config, prefix="") -> dict:
    """A config's settings by dotted name."""
    return {
        key: value
        for name, part in config.items()
        for key, value in (flat(part, f"{prefix}{name}.") if hasattr(part, "items") else {prefix + name: part}).items()
    }


def repo_of(text: str) -> str:
    return re.search(r"hf download (\S+) ", text)[1]


def test_the_papers_models_and_one_of_each_family_have_a_config():
    assert {path.stem for path in CONFIGS.glob("*.py")} == {"base", "demo", *MODELS}
    families = {BY_REPO[repo_of(load(name)[0])].config["model_type"] for name in MODELS}
    others = {"gemma3_text", "glm"}  # their architectures run as gemma3 and, but for two norms, as glm4
    assert families | others == {real.config["model_type"] for real in REAL_MODELS.values()}


@pytest.mark.parametrize("name", ["base", "demo", *MODELS])
def test_a_config_works_and_names_itself(name):
    text, config = load(name)
    check_settings(config)
    assert {key: type(value) for key, value in flat(config).items()} == {
        key: type(value) for key, value in flat(get_config()).items()
    }
    assert f"refusal-jax study --config=configs/{name}.py " in text
    assert set(config.data.values()) >= {"bundled"}  # no file that is not there
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", MODELS)
def test_a_models_commands_fit_together(name):
    text, _ = load(name)
    repo = repo_of(text)
    assert repo in BY_REPO
    assert f"hf download {repo} --local-dir hf/{name}" in text
    assert f"--model=hf/{name} --workdir=runs/{name}\n" in text
    assert "--config.data.harmful_train=FILE" in text
    assert ("gated" in text) == repo.startswith(("meta-llama/", "google/"))


@pytest.mark.parametrize("name", MODELS)
def test_the_model_fits_the_suggested_hardware(name):
    """On some mesh of the named chips, with the cache of many replies; the head of the config says how much that is."""
    text, config = load(name)
    kind, chips, count, memory, weights, rest = HARDWARE.search(text).groups()
    real, ways = BY_REPO[repo_of(text)], int(chips)
    assert ways == int(count) and int(memory) == CHIP_GB[kind]
    assert weights == f"{real.parameters * 2e-9:.1f}"
    assert rest == ("" if ways == 1 else f", {real.parameters * 2e-9 / ways:.1f} GB a chip")
    work = workload(from_hf(real.config), "bfloat16", config, 128)
    assert ranked_meshes(work, Slice.parse(f"{kind}-{chips}"), WANTED.with_settings(config))


@pytest.mark.parametrize("name", PAPER)
def test_settings_and_expected_results_of_the_papers_models(name):
    (text, config), paper = load(name), PAPER[name]
    assert repo_of(text) == paper.repo and "as in the paper" in text
    assert (config.chat_template, config.refusal_tokens) == (paper.template, paper.refusal_tokens)
    position, layer, bypass, induce, kl, dtype = EXPECTED.search(text).groups()
    numbers = int(position), int(layer), float(bypass), float(induce), float(kl)
    assert (dtype, *numbers) == (paper.dtype, *paper[4:])
    assert paper.layer < int(0.8 * from_hf(BY_REPO[paper.repo].config).n_layers)  # what the selection rule demands
    assert paper.kl <= config.select.kl_threshold and paper.induce >= config.select.induce_threshold


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_other_models_leave_the_papers_choices_to_the_data(name):
    text, config = load(name)
    assert config.refusal_tokens == () and config.chat_template == "" and config.thinking is False
    assert "Expected:" not in text and "paper's splits" in text
