"""The configs of configs/: each loads, says what it does, and agrees with the paper and with the hardware it names."""

import dataclasses
import importlib.util
import pathlib
import subprocess
import sys
from typing import NamedTuple

import pytest
from real_models import REAL_MODELS

from refusal_jax import UserError
from refusal_jax.jobs.command_line import config_file
from refusal_jax.models.hf_config import from_hf
from refusal_jax.plan.chips import Slice
from refusal_jax.plan.costs import estimate
from refusal_jax.plan.planner import WANTED, ranked_meshes
from refusal_jax.plan.programs import USUAL_LENGTH, Shapes, programs
from refusal_jax.study.checks import check_settings
from refusal_jax.study.config import get_config
from refusal_jax.study.study import workload

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
BY_REPO = {real.repo: real for real in REAL_MODELS.values()}


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


def load(file: str):
    """Returns a config file as a module."""
    spec = importlib.util.spec_from_file_location(file, CONFIGS / f"{file}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAPERS, FAMILIES = load("paper"), load("families")
FILES = {"paper": PAPERS, "families": FAMILIES}
MODELS = [(file, name) for file, module in FILES.items() for name in module.MODELS]


def test_the_papers_models_and_one_of_each_family_have_a_config():
    assert {path.stem for path in CONFIGS.glob("*.py")} == {"base", "demo", "paper", "families", "gate"}
    assert list(PAPERS.MODELS) == list(PAPER) and not set(FAMILIES.MODELS) & set(PAPER)
    families = {BY_REPO[FILES[file].MODELS[name].repo].config["model_type"] for file, name in MODELS}
    others = {
        "gemma3_text",
        "gemma4_text",
        "glm",
        "ministral3",
        "qwen3_5_text",
        "qwen3_5_moe_text",
    }  # their architectures run as gemma3 and, but for two norms, as glm4
    assert families | others == {real.config["model_type"] for real in REAL_MODELS.values()}


@pytest.mark.parametrize("file,name", [("base", ""), ("demo", ""), *MODELS])
def test_a_config_works_and_its_file_names_itself(file, name):
    module = load(file)
    config = module.get_config(name) if name else module.get_config()
    check_settings(config)
    assert f"refusal-jax study --config=configs/{file}.py{':NAME' if name else ''} " in module.__doc__
    assert set(config.data.values()) >= {"bundled"}  # no file that is not there
    assert max(map(len, module.__doc__.splitlines())) <= 120


@pytest.mark.parametrize("file,name", MODELS)
def test_a_models_commands_fit_together(file, name):
    said, model = FILES[file].described(name), FILES[file].MODELS[name]
    assert f"hf download {model.repo} --local-dir hf/{name}" in said and FILES[file].NOTES.get(name, "") in said
    assert f"--config=configs/{file}.py:{name} --model=hf/{name} --workdir=runs/{name}\n" in said
    assert model.repo in BY_REPO and "gated" in FILES[file].__doc__


@pytest.mark.parametrize("file,name", MODELS)
def test_the_model_fits_the_suggested_hardware(file, name):
    """On some mesh of the named chips, with the cache of many replies."""
    model = FILES[file].MODELS[name]
    real = BY_REPO[model.repo]
    assert model.gigabytes == round(real.parameters * 2e-9, 1)
    config = FILES[file].get_config(name)
    work = workload(from_hf(real.config), "bfloat16", config, 128)
    where, sizes = Slice.parse(model.hardware), WANTED.with_settings(config)
    mesh = ranked_meshes(work, where, sizes)[0]
    if file == "paper":
        work = dataclasses.replace(work, length=USUAL_LENGTH)
        seconds = sum(p.runs * estimate(work, p, mesh, where) for p in programs(Shapes(work, None), sizes))
        assert model.minutes == pytest.approx(seconds / 60, rel=0.2)


@pytest.mark.parametrize("name", PAPER)
def test_settings_and_expected_results_of_the_papers_models(name):
    model, paper, config = PAPERS.MODELS[name], PAPER[name], PAPERS.get_config(name)
    assert (model.repo, model.family.dtype) == (paper.repo, paper.dtype)
    assert (config.chat_template, config.refusal_tokens) == (paper.template, paper.refusal_tokens)
    assert dataclasses.astuple(PAPERS.TABLE_5[name]) == paper[4:]
    assert paper.layer < int(0.8 * from_hf(BY_REPO[paper.repo].config).n_layers)  # what the selection rule demands
    assert paper.kl <= config.select.kl_threshold and paper.induce >= config.select.induce_threshold


@pytest.mark.parametrize("name", FAMILIES.MODELS)
def test_other_models_leave_the_papers_choices_to_the_data(name):
    assert FAMILIES.get_config(name) == get_config()


@pytest.mark.parametrize("file", FILES)
def test_a_name_that_is_not_there(file):
    with pytest.raises(
        UserError, match=rf"configs/{file}\.py holds several configs\. Write .*:NAME, with one of .*llama_3"
    ):
        FILES[file].get_config()
    first = next(iter(FILES[file].MODELS))
    with pytest.raises(UserError, match=rf"{file}\.py has no entry '{first}x'\. Did you mean {first}\? Write .*:NAME"):
        FILES[file].get_config(first + "x")


def test_a_config_file_explains_its_models():
    done = subprocess.run([sys.executable, CONFIGS / "paper.py", "yi_6b"], capture_output=True, text=True, check=True)
    assert "hf download 01-ai/Yi-6B-Chat" in done.stdout and "layer 20, bypass -6.693" in done.stdout


def test_configs_under_their_older_names():
    for file, name in MODELS:
        assert config_file(f"configs/{name}.py").endswith(f"configs/{file}.py:{name}")
