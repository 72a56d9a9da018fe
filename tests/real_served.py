"""Compares the replies of real servers with ours, on the prompts that ship with this package.

  python tests/real_served.py                                   # the embedded model, behind each server that is there
  python tests/real_served.py --model=DIR --count=24            # another HF checkpoint in float32, such as a real model
  python tests/real_served.py --gguf=FILE --count=24            # a GGUF file behind llama.cpp, against our reading of it

`transformers serve` needs `pip install 'transformers[serving]'`, llama.cpp's server the program in LLAMA_SERVER or on the PATH.
For a checkpoint, llama.cpp gets it as GGUF in float32. Each line has the number of equal replies and of faults.
"""

import argparse
import contextlib
import pathlib
import shutil
import sys
import tempfile
import time

from gguf_files import write_gguf
from real_servers import llama_server, llama_serving, transformers_serving

from refusal_jax import load_model
from refusal_jax.chat.model import demo_model_path
from refusal_jax.data.prompts import BUNDLED, read_prompts
from refusal_jax.data.sources import resolve
from refusal_jax.endpoints.client import Endpoint
from refusal_jax.endpoints.endpoint import EndpointSettings
from refusal_jax.judges.rules import RuleJudge


def texts(count: int) -> list[str]:
    """Returns harmful and harmless prompts in turn."""
    sides = [read_prompts(resolve(BUNDLED, f"{side}_test"))[: count // 2] for side in ("harmful", "harmless")]
    return [row["instruction"] for pair in zip(*sides, strict=True) for row in pair]


def replies(path: pathlib.Path, prompts: list[str], tokens: int) -> list[str]:
    model, found = load_model(path), {}
    for index, part in model.replies(model.encode(prompts), tokens, rows=16):
        found |= dict(zip(index, part, strict=True))
    return [found[i] for i in range(len(prompts))]


def compare(title: str, url: str, name: str, prompts: list[str], ours: list[str], tokens: int, stream: bool) -> bool:
    settings = EndpointSettings(url=url, model=name, max_tokens=tokens, stream=stream, timeout_s=900.0, concurrency=2)
    endpoint, started = Endpoint(settings), time.monotonic()
    answers = endpoint.answers(prompts, quiet=True)
    same = sum(answer.text == one for answer, one in zip(answers, ours, strict=True))
    faults, seconds = sum(answer.text is None for answer in answers), time.monotonic() - started
    how, judge = "streamed" if stream else "whole", RuleJudge()
    theirs = [answer.text or "" for answer in answers]
    outcomes = [
        judge.judge([{"prompt": p, "response": r} for p, r in zip(prompts, said, strict=True)])
        for said in (ours, theirs)
    ]
    agree = sum(a == b for a, b in zip(*outcomes, strict=True))
    found = f"{same} of {len(ours)} replies equal ours, {agree} have the same outcome"
    print(f"{title}, {how}: {found}, {faults} faults, {seconds:.0f} s", flush=True)
    for concern in endpoint.identity().concerns:
        print(f"  {concern}")
    return same == len(ours)


def gguf_of(folder: pathlib.Path, scratch: pathlib.Path, pre: str) -> pathlib.Path:
    """Writes a checkpoint as GGUF in float32, with its chat template. pre: llama.cpp's name of how its tokenizer splits text."""
    copy = shutil.copytree(folder, scratch / "copy")
    template = (folder / "chat_template.jinja").read_text()
    return write_gguf(copy, scratch / "model.gguf", **{"tokenizer.chat_template": template, "tokenizer.ggml.pre": pre})


def main(options: argparse.Namespace) -> int:
    prompts, log = texts(options.count), pathlib.Path(tempfile.mkdtemp()) / "log"
    source = options.gguf or options.model or demo_model_path()
    ours, equal = replies(source, prompts, options.tokens), []
    with contextlib.ExitStack() as stack:
        if not options.gguf:
            scratch = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            with transformers_serving(log) as url:
                for stream in (False, True):
                    title = "transformers serve"
                    equal.append(compare(title, url, str(source), prompts, ours, options.tokens, stream))
            gguf = gguf_of(source, scratch, options.pre) if llama_server() else None
        else:
            gguf = options.gguf
        if llama_server() is None:
            print("llama.cpp's server is not there: set LLAMA_SERVER")
        else:
            with llama_serving(gguf, log, "--alias", "model") as url:
                for stream in (False, True):
                    equal.append(compare("llama-server", url, "model", prompts, ours, options.tokens, stream))
    return 0 if all(equal) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--gguf", type=pathlib.Path)
    parser.add_argument("--pre", default="llama-bpe", help="such as smollm, for SmolLM2")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=48)
    sys.exit(main(parser.parse_args()))
