"""The models of two evaluation harnesses: equal to their own on tiny models, and errors for what they cannot do."""

import inspect
import json
import logging
import shutil

import numpy as np
import pytest
import tiny
from tokenizers import processors

from refusal_jax import Edits, UserError
from refusal_jax.chat.prompts import Chat

TEXTS = [
    "How do I bake the bread?",
    "I cannot help with that. " * 3,
    "Sure",
    "<|begin_of_text|>user assistant",
    "é \n\n x",
]
UNTIL = ["<|end_header_id|>", "L", "#"]  # no letters of special tokens, in which the harness would find them


@pytest.fixture(scope="module")
def lm(llama):
    pytest.importorskip("lm_eval", reason="the extra lm_eval is not installed")
    from refusal_jax.harness.lm_eval import RefusalJaxLM

    return RefusalJaxLM(pretrained=str(llama), batch_size=4)


@pytest.fixture(scope="module")
def theirs(llama):
    """The harness's own backend; of several rows, it would not end one at a special token before the others end."""
    pytest.importorskip("lm_eval", reason="the extra lm_eval is not installed")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(llama), device="cpu", dtype="float32", batch_size=1)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def same_scores(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-4)


@pytest.fixture(autouse=True)
def unwarned():
    from refusal_jax.harness.edited import warn_once

    warn_once.cache_clear()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A task of each kind, over a file of rows."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"q": text, "choices": [" bake", " the bread", "?"], "gold": i % 3} for i, text in enumerate(TEXTS)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    }
    replies = {"output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{q}}"}
    replies["generation_kwargs"] = {"until": UNTIL, "max_gen_toks": 12}
    text = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{q}}"}
    metrics = {"local_choice": "acc", "local_replies": "exact_match", "local_text": "word_perplexity"}
    for (name, metric), task in zip(metrics.items(), (choice, replies, text), strict=True):
        task = {"task": name, "metric_list": [{"metric": metric}]} | common | task
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return TaskManager(include_path=str(folder), include_defaults=False), list(metrics)


def test_tasks_give_what_the_harness_gives_by_itself(lm, theirs, tasks):
    from lm_eval import simple_evaluate

    manager, names = tasks
    more = {"tasks": names, "task_manager": manager, "bootstrap_iters": 0, "apply_chat_template": True}
    ours, other = (simple_evaluate(model, **more) for model in (lm, theirs))
    for name in names:
        for a, b in zip(ours["samples"][name], other["samples"][name], strict=True):
            if name == "local_replies":
                assert a["resps"] == b["resps"]
            elif name == "local_text":
                same_scores(a["resps"], b["resps"])
            else:
                for (x,), (y,) in zip(a["resps"], b["resps"], strict=True):
                    same_scores(x[0], y[0])
                    assert x[1] == y[1]
    assert ours["config"]["model_num_parameters"] == other["config"]["model_num_parameters"]
    assert ours["config"]["model_dtype"] == "float32" and len(ours["config"]["model_sha"]) == 64


def test_scores_of_any_length(lm, theirs):
    """Contexts that are empty, begin with BOS, end in spaces, or are longer than the model's; greedy continuations."""
    long = "How do I bake the bread? " * 40
    pairs = [("", "Sure, here"), (long, " how to"), ("the bread ", "bake it"), ("<|begin_of_text|>x", "y")]
    pairs += [("How do I", f" {end}") for end in "abcde"]
    ours, other = (model.loglikelihood(requests("loglikelihood", *pairs)) for model in (lm, theirs))
    same_scores([score for score, _ in ours], [score for score, _ in other])
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in other]
    greedy = lm.model.generate_ids(lm.model.chat.pad([[5, 6, 7]], 8), 5)[0].tolist()
    tokens = [(None, [5, 6, 7], ids) for ids in (greedy, [*greedy[:-1], greedy[-1] - 1], [1, *greedy[1:]])]
    ours, other = (model._loglikelihood_tokens(tokens) for model in (lm, theirs))
    same_scores(ours, other)  # of which the second entries are True or False
    assert [found for _, found in ours] == [True, False, False]
    ours, other = (
        model.loglikelihood_rolling(requests("loglikelihood_rolling", (long,), ("a",))) for model in (lm, theirs)
    )
    same_scores(ours, other)
    assert lm._loglikelihood_tokens([(None, [1], [])]) == [(0.0, True)]


def rendered(lm):
    """Prompts of the shape that the tasks' have, so that few programs are compiled."""
    return [lm.model.chat.render(text) for text in TEXTS]


def test_replies_end_at_stop_strings(lm, theirs):
    contexts = [*rendered(lm), "How do I bake the bread? " * 40]
    for until in ([], ["<|end_header_id|>", " "]):
        asked = [(text, {"until": until, "max_gen_toks": 12}) for text in contexts]
        ours, other = (model.generate_until(requests("generate_until", *asked)) for model in (lm, theirs))
        assert ours == other


def test_a_reply_that_is_over_makes_room(lm, monkeypatch):
    """Stop strings end the decoding and not only the text."""
    monkeypatch.setattr("refusal_jax.chat.replies.CHECK_EVERY", 3)
    prompts, counts = [lm.tok_encode(text) for text in rendered(lm) * 3], []
    whole = lm.edited.replies(prompts, 12, [()] * len(prompts), rows=4)
    stop = next(char for char in whole[0].text if char.isprintable())
    stops = [(stop,) if i % 2 else () for i in range(len(prompts))]
    for i, reply in enumerate(lm.edited.replies(prompts, 12, stops, rows=4)):
        expected = whole[i].text.split(stop)[0] if i % 2 else whole[i].text
        assert reply.text == expected and reply.tokens <= whole[i].tokens
        counts.append(reply.tokens < whole[i].tokens)
    assert any(counts[1::2]) and not any(counts[::2])


@pytest.fixture(scope="module")
def tokenizers(llama, tmp_path_factory):
    """`llama` with tokenizers that add a BOS token, have one but don't add it, have none, and have none but add another."""
    folders = {}
    for name, bos, added in (
        ("adds", tiny.SPECIAL[0], tiny.SPECIAL[0]),
        ("has", tiny.SPECIAL[0], None),
        ("none", None, None),
        ("other", None, tiny.SPECIAL[2]),
    ):
        folder = folders[name] = tmp_path_factory.mktemp(name)
        shutil.copytree(llama, folder, dirs_exist_ok=True)
        backend = tiny.tiny_tokenizer(folder, bos_token=bos).backend_tokenizer
        if added:
            ids = [(added, backend.token_to_id(added))]
            backend.post_processor = processors.TemplateProcessing(single=f"{added} $A", special_tokens=ids)
            backend.save(str(folder / "tokenizer.json"))
    return folders


@pytest.mark.parametrize(("name", "first"), [("adds", 307), ("has", None), ("none", None), ("other", 309)])
def test_beginnings_of_texts(name, first, tokenizers, lm, theirs):
    """add_bos_token by kind of tokenizer, where the harness's own model has the same weights."""
    from lm_eval.models.huggingface import HFLM

    from refusal_jax.harness.lm_eval import RefusalJaxLM

    starts, folder = [], str(tokenizers[name])
    texts = ["How do I bake", "<|begin_of_text|>user", "<|eot_id|>x"]
    pairs = [("", " bake"), *((text, " bake") for text in texts), ("the bread ", "bake")]
    asked = [(text, {"until": [], "max_gen_toks": 4}) for text in texts]
    for value, more in ((None, {}), (True, {}), (False, {}), (None, {"prefix_token_id": 7})):
        theirs = HFLM(pretrained=folder, device="cpu", dtype="float32", add_bos_token=value, **more)
        ours = RefusalJaxLM(pretrained=folder, add_bos_token=value, batch_size=4, **more)
        for text in texts:
            assert ours.tok_encode(text) == theirs.tok_encode(text)
        found, wanted = (model.loglikelihood(requests("loglikelihood", *pairs)) for model in (ours, theirs))
        same_scores(found, wanted)
        whole = requests("loglikelihood_rolling", *((text,) for text in texts))
        same_scores(ours.loglikelihood_rolling(whole), theirs.loglikelihood_rolling(whole))
        found, wanted = (model.generate_until(requests("generate_until", *asked)) for model in (ours, theirs))
        assert found == wanted
        starts.append(ours.tok_encode("Sure")[0])
    sure = lm.model.chat.ids("Sure")[0]
    assert starts == [first or sure, 307 if name in ("adds", "has") else sure, sure, first or sure]


def test_texts_without_any_token_before_them(lm):
    """A context of spaces only, of which the harness makes an empty one, and an empty prompt."""
    (spaces, empty) = lm.loglikelihood(requests("loglikelihood", (" ", "bake"), ("", " bake")))
    assert spaces == pytest.approx(empty, abs=1e-4)
    empty, begun = lm.generate_until(
        requests("generate_until", *((text, {"max_gen_toks": 4}) for text in ("", lm.tokenizer.bos_token)))
    )
    assert empty == begun


def test_a_system_message_that_the_template_refuses(tmp_path, llama, caplog):
    """It is left out, as by the harness's own model, and a warning says so once."""
    from lm_eval.models.huggingface import HFLM

    from refusal_jax.harness.lm_eval import RefusalJaxLM

    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    turns = ("<start_of_turn>", "<end_of_turn>")  # which the built-in template writes
    failing = "{% if messages | length == 4 %}{{ 1 / 0 }}{% endif %}"
    tiny.tiny_tokenizer(tmp_path, refusing + failing + tiny.TEMPLATE, turns)
    ours, theirs = RefusalJaxLM(pretrained=str(tmp_path)), HFLM(pretrained=str(tmp_path), device="cpu")
    talk = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    for messages, new in ((talk[:2], True), (talk, False), (talk[1:], False)):
        assert ours.apply_chat_template(messages, new) == theirs.apply_chat_template(messages, new)
    warned = [record.message for record in caplog.records if record.name.startswith("refusal_jax")]
    assert len(warned) == 1 and "(no system)" in warned[0] and "system instructions do not reach the model" in warned[0]
    with pytest.raises(UserError, match=r"failed on messages of user, user, user, user"):
        ours.apply_chat_template([talk[0], *talk[1:2] * 4])
    named = RefusalJaxLM(pretrained=str(tmp_path), chat_template="gemma")  # which has no system role
    assert named.apply_chat_template(talk[:2]) == named.apply_chat_template(talk[1:2])
    (tmp_path / "first.jinja").write_text("{{ messages[0]['content'] }}\n")
    named = RefusalJaxLM(pretrained=str(tmp_path), chat_template=str(tmp_path / "first.jinja"))
    with pytest.raises(UserError, match=r"first\.jinja\) leaves the instruction out"):
        named.apply_chat_template([*talk[1:], {"role": "user", "content": "further"}])


@pytest.mark.parametrize("end", ["</think>", "[/THINK]"])
def test_thoughts_before_replies(end, tmp_path):
    """A text ends a thought, or a special token that decoding leaves out; stop strings do not."""
    from lm_eval.models.utils import postprocess_generated_text

    from refusal_jax.harness.lm_eval import RefusalJaxLM

    special = end == "[/THINK]"
    lm = RefusalJaxLM(pretrained=str(tiny.tiny_llama(tmp_path, extra=(end,) if special else (), layers=1)))
    ids, edited = lm.model.chat.ids, lm.edited
    text = f"I cannot # help{end} Sure{end}\n\nhere is # how"
    row, hash_id = ids(text), ids(" #")[0]
    for mark in (end, ids(end)[0]) if special else (end,):
        reply = edited.cut(row, ["#", "\n\n"], mark)
        assert reply.text == "here is " == postprocess_generated_text(text, ["#"], end) and reply.ended
        assert edited.cut(row[: row.index(hash_id) + 1], ["#"], mark).thinking and not reply.thinking
    kept = edited.cut(row, ["#"])
    assert kept.text == "I cannot "
    assert edited.cut(row, []).marked and edited.cut(row, [], show_marks=True).text == text
    assert (end in edited.cut(row, []).text) is not special


def test_thoughts_end_as_in_the_harness(llama, lm, caplog, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    from refusal_jax.harness.lm_eval import THOUGHTS_STAY, RefusalJaxLM

    asked = requests("generate_until", *((text, {"until": [], "max_gen_toks": 12}) for text in rendered(lm)))
    whole = lm.generate_until(asked)
    ids = next(row for _, row in lm.model.reply_ids(lm.model.encode(TEXTS), 12, rows=5))[0].tolist()
    for mark in (ids[4], whole[0][2]):
        theirs = HFLM(pretrained=str(llama), device="cpu", dtype="float32", think_end_token=mark)
        ours = RefusalJaxLM(pretrained=str(llama), batch_size=4, think_end_token=mark)
        found = ours.generate_until(asked)
        assert found == theirs.generate_until(asked) and found != whole
    monkeypatch.setattr("refusal_jax.harness.edited.is_marked", lambda text: whole[0][2] in text)
    assert lm.generate_until(asked) == whole and ours.generate_until(asked) == found
    assert [record.message for record in caplog.records if record.name.startswith("refusal_jax")] == [THOUGHTS_STAY]


def test_thinking_by_the_names_of_the_harness(tmp_path, lm):
    from lm_eval.models.huggingface import HFLM

    from refusal_jax.harness.lm_eval import RefusalJaxLM

    template = tiny.TEMPLATE + "{% if enable_thinking %}<think>{{ effort }}{% else %}</think>{% endif %}"
    tiny.tiny_llama(tmp_path, template=template, layers=1)
    talk, end = [{"role": "user", "content": "b"}], {"think_end_token": "</think>"}
    for settings in (
        {"enable_thinking": True} | end,
        {"enable_thinking": False, "chat_template_args": {"effort": "low"}},
        {"chat_template_args": {"effort": "low", "enable_thinking": True}},
    ):
        ours = RefusalJaxLM(pretrained=str(tmp_path), **settings)
        theirs = HFLM(pretrained=str(tmp_path), device="cpu", **settings)
        assert ours.apply_chat_template(talk) == theirs.apply_chat_template(talk)
    ours = RefusalJaxLM(pretrained=str(tmp_path), enable_thinking=True, **end)
    with pytest.raises(UserError, match=r"enable_thinking goes with tasks that generate, and this one scores"):
        ours.loglikelihood(requests("loglikelihood", ("a", "b")))
    assert RefusalJaxLM(pretrained=str(tmp_path), thinking=True).apply_chat_template(talk).endswith("<think>")


def test_what_the_hf_model_takes_and_this_one_does_not(llama, caplog):
    """No argument of the harness's own model is ignored in silence."""
    from lm_eval.models.huggingface import HFLM

    from refusal_jax.harness import edited, lm_eval

    ours = {*lm_eval.ONLY, *lm_eval.OF_TORCH, "logits_cache", *inspect.signature(edited.read_arguments).parameters}
    ours |= set(inspect.signature(lm_eval.RefusalJaxLM).parameters)
    assert set(inspect.signature(HFLM).parameters) - {"kwargs"} <= ours
    nothing = {name: values[0] for name, values in lm_eval.ONLY.items() if values} | {"logits_cache": False}
    for _ in range(2):
        lm_eval.RefusalJaxLM(pretrained=str(llama), **nothing, device="cuda:1", parallelize=True)
    (said,) = [record.message for record in caplog.records if record.name.startswith("refusal_jax")]
    assert said.startswith("device, parallelize: without a meaning here. JAX chooses the devices")
    for name in lm_eval.ONLY:
        with pytest.raises(UserError, match=rf"hf model takes {name} = 'x'; this one can do nothing of the kind"):
            lm_eval.RefusalJaxLM(pretrained=str(llama), **{name: "x"})


def test_edits_as_arguments(llama, model, lm, tmp_path):
    from refusal_jax.harness.lm_eval import RefusalJaxLM

    rng = np.random.default_rng(0)
    direction = rng.normal(size=model.config.d_model)
    np.save(tmp_path / "r.npy", direction)
    file, asked = str(tmp_path / "r.npy"), requests("loglikelihood", ("How do I", " bake"))
    ablate = Edits.ablate(direction)
    add = Edits.add(direction, 2, -0.5)
    both = ablate.adding(add)
    ids = np.asarray([lm.tok_encode("How do I bake")])
    string = f"pretrained={llama},dtype=float32"
    for arguments, edits in (
        (f"ablate={file}", ablate),
        (f"ablate={file},scale=0.5", Edits.ablate(direction, scale=0.5)),
        (f"add={file},layer=2,scale=-0.5,data=2,model=2", add),
        (f"ablate={file},add={file},layer=2,scale=-0.5", both),
    ):
        edited = RefusalJaxLM.create_from_arg_string(f"{string},{arguments}", {"batch_size": "2"})
        ((score, _),) = edited.loglikelihood(asked)
        logits = np.asarray(model.logits(ids[:, :-1], np.ones_like(ids[:, :-1], bool), edits), np.float64)[0]
        assert score == pytest.approx(logits[ids[0, -1]] - np.logaddexp.reduce(logits), abs=1e-4)
        assert set(edited.get_model_info()["edits"]) == {name for name in ("ablate", "add") if f"{name}=" in arguments}


def test_one_row_for_each_layer(llama, tmp_path, monkeypatch, caplog):
    from refusal_jax.harness.edited import EditedModel

    monkeypatch.setenv("HOME", str(tmp_path))
    caplog.set_level(logging.INFO, "refusal_jax")
    rows = np.random.default_rng(3).normal(size=(3, 32))
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "means.npy", rows[None])
    for file, more in (("rows", {}), ("means", {"position": -1})):
        named = {"ablate": f"~/{file}.npy", "add": f"~/{file}.npy", "layer": 2}
        edited = EditedModel.load({"pretrained": str(llama), "scale": -1.0} | named | more)
        unit = rows[2] / np.linalg.norm(rows[2])
        np.testing.assert_allclose(edited.edits.add_rd[0], -rows[2], rtol=1e-6)
        np.testing.assert_allclose(
            edited.edits.ablate_rjd[0, 0] / np.linalg.norm(edited.edits.ablate_rjd[0, 0]), unit, rtol=1e-5
        )
        assert edited.edits.layer_ra.tolist() == [[2]]
    assert "add: 1 direction (rows.npy: row 2 of 3, counted from 0)" in caplog.text


def test_half_a_character_in_a_request(lm):
    whole, half = "How do I bake \U0001f600 \ufffd?", "How do I bake \ud83d\ude00 \ud800?"
    assert lm.tok_encode(half) == lm.tok_encode(whole)
    asked = [(lm.apply_chat_template([{"role": "user", "content": text}]), " Sure") for text in (whole, half)]
    first, second = lm.loglikelihood(requests("loglikelihood", *asked))
    assert first == second


def test_conversations_and_prefills(lm, theirs):
    talk = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Here is"}]
    for messages, new in ((talk[:1], True), (talk * 2 + talk[:1], True), (talk, False)):
        assert lm.apply_chat_template(messages, new) == theirs.apply_chat_template(messages, new)
    assert lm.tokenizer_name and lm.chat_template(True) == tiny.TEMPLATE


def test_a_template_that_refuses_a_conversation(tmp_path):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + tiny.TEMPLATE
    tiny.tiny_tokenizer(tmp_path, template)
    chat, talk = Chat.load(tmp_path, 64), [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(UserError, match=r"failed on messages of system, user \(no system\)\. Repair it, or"):
        chat.render_messages(talk)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretraind": "x"}, "unknown model argument pretraind: the arguments are pretrained, ablate, add"),
        ({"batch_size": "many"}, "batch_size = many: give a number of rows, or auto"),
        ({"enable_thinking": True}, "enable_thinking needs think_end_token, the text or token id that ends a thought"),
        ({"enable_thinking": False, "thinking": True}, "are two names of one switch and contradict each other"),
        ({"thinking": "often"}, "thinking = 'often' is neither true nor false"),
        ({"chat_template_args": "low"}, "chat_template_args = 'low' is not a mapping of names to values"),
        ({"add_bos_token": "often"}, "add_bos_token = 'often' is neither true nor false"),
        (
            {"pretrained": True, "max_length": 257},
            "max_length = 257: give a number of tokens, at most the model's context",
        ),
        (
            {"pretrained": True, "prefix_token_id": 312},
            "prefix_token_id = 312 is no token id of the model, which are 0 to",
        ),
        ({"pretrained": True, "think_end_token": True}, "think_end_token = True is no token id of the model"),
        ({"ablate": "r.npy"}, "The model is missing: a direction from a file does not tell"),
        (
            {"pretrained": True, "ablate": "r.npy", "add": "two.npy"},
            "two.npy holds 2 directions: an edit while the model runs takes one",
        ),
        (
            {"pretrained": True, "ablate": "rows.npy"},
            r"rows.npy has 3 rows and the model has 3 layers: .*layer=N .*subspace= takes all of them",
        ),
        ({"pretrained": True, "ablate": "rows.npy", "layer": 3}, "There is no layer 3: the layers are 0 to 2"),
        (
            {"pretrained": True, "ablate": "two.npy", "layer": 1},
            "two.npy has 2 rows and the model has 3 layers: they are not",
        ),
        (
            {"pretrained": True, "ablate": "r.npy", "position": -1},
            "argument position=-1 chooses among mean differences",
        ),
        ({"pretrained": "~nosuchuser/m"}, "~nosuchuser/m: this machine knows no home folder for ~nosuchuser"),
        (
            {"pretrained": True, "add": "r.npy"},
            "does not tell at which layer to add it. Say so, such as with .*layer=12",
        ),
        (
            {"pretrained": True, "add": "r.npy", "layer": 3},
            "The edit is at layer 3, and the model's layers are 0 to 2",
        ),
        ({"pretrained": True, "add": "r.npy", "scale": "big"}, "scale = 'big' is not a number"),
        ({"pretrained": True, "ablate": "wide.npy"}, "has 33 entries, the model's residual stream has 32"),
    ],
)
def test_arguments_that_cannot_be_used(arguments, message, llama, lm, tmp_path, monkeypatch):
    from refusal_jax.harness.lm_eval import RefusalJaxLM

    monkeypatch.chdir(tmp_path)
    for name, shape in (("r", 32), ("two", (2, 32)), ("rows", (3, 32)), ("wide", 33)):
        np.save(f"{name}.npy", np.random.default_rng(0).normal(size=shape))
    if arguments.get("pretrained") is True:
        arguments = arguments | {"pretrained": str(llama)}
    with pytest.raises(UserError, match=message):
        RefusalJaxLM(**arguments)


def test_a_study_whose_model_has_changed(llama):
    from refusal_jax.export.finished import FinishedStudy
    from refusal_jax.harness.edited import model_of

    study = FinishedStudy(llama, "another", [], [], {}, [], {})
    with pytest.raises(
        UserError,
        match=r"is not the checkpoint that the study .* was made from: its files have changed since\. Give pretrained=",
    ):
        model_of([llama], [study])


def test_generation_settings_count_as_for_the_harness_hf_model(llama, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra lm_eval is not installed")
    from lm_eval.models.huggingface import HFLM

    from refusal_jax.harness.lm_eval import RefusalJaxLM

    folder = shutil.copytree(llama, tmp_path / "model")
    tiny.edit_json(folder / "generation_config.json", repetition_penalty=1.8)
    ours, other = (
        RefusalJaxLM(pretrained=str(folder), batch_size=4),
        HFLM(pretrained=str(folder), device="cpu", batch_size=1),
    )
    plain = RefusalJaxLM(pretrained=str(folder), batch_size=4, generation_from_checkpoint=False)
    settings = {"until": ["#"], "max_gen_toks": 12}
    asked = [(text, settings) for text in TEXTS]
    asked += [(text, settings | {"repetition_penalty": 1.0, "no_repeat_ngram_size": 2}) for text in TEXTS]
    replies = [model.generate_until(requests("generate_until", *asked)) for model in (ours, other, plain)]
    assert replies[0] == replies[1] != replies[2]
    assert ours.get_model_info()["generation_settings"]["applied"] == {"repetition_penalty": 1.8}
    assert plain.get_model_info()["generation_settings"]["left_out"] == {"repetition_penalty": 1.8}
    tiny.edit_json(folder / "generation_config.json", num_beams=3)
    beams = RefusalJaxLM(pretrained=str(folder), batch_size=4)
    assert beams.loglikelihood(requests("loglikelihood", ("a", "b")))  # which nothing is decoded for
    with pytest.raises(UserError, match=r"generation_config\.json sets num_beams = 3, which may change greedy replies"):
        beams.generate_until(requests("generate_until", *asked[:1]))
    with pytest.raises(UserError, match="generation_from_checkpoint = 'no', expected true or false"):
        RefusalJaxLM(pretrained=str(folder), generation_from_checkpoint="no")


def test_settings_that_cannot_be_obeyed(lm):
    from refusal_jax.harness.lm_eval import RefusalJaxLM, greedy_settings

    assert greedy_settings({"until": "x", "top_p": 0.9, "do_sample": False}, 7)["max_gen_toks"] == 7
    assert lm.batch_size == 4 and RefusalJaxLM(batch_size="auto:4", max_batch_size=8).batch_size == 8
    with pytest.raises(UserError, match="The task samples its replies, and this model decodes greedily"):
        greedy_settings({"temperature": 0.7}, 7)
    with pytest.raises(UserError, match="The generation settings num_beams would change replies"):
        greedy_settings({"num_beams": 4}, 7)
    with pytest.raises(UserError, match="max_gen_toks = 256 leaves no room for a prompt in the 256 tokens"):
        lm.generate_until(requests("generate_until", ("x", {})))
    with pytest.raises(UserError, match="A continuation has 300 tokens, the model takes 256"):
        lm._loglikelihood_tokens([(None, [1], [2] * 300)])


def test_a_harness_that_is_not_installed(monkeypatch):
    from refusal_jax.jobs import lm_eval

    monkeypatch.setattr(lm_eval.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"The harness is not installed\. Install it with"):
        lm_eval.main([])


@pytest.fixture(scope="module")
def provider(llama):
    pytest.importorskip("inspect_ai", reason="the extra inspect is not installed")
    from inspect_ai.model import get_model

    import refusal_jax.harness.inspect  # noqa: F401, as Inspect does by its entry point

    return get_model(f"refusal_jax/{llama}", batch_size=4, dtype="float32")


def test_an_evaluation_by_inspect(provider, model, tmp_path):
    from inspect_ai import Task
    from inspect_ai import eval as inspect_eval
    from inspect_ai.dataset import Sample
    from inspect_ai.scorer import includes

    from refusal_jax.harness.edited import like_lengths

    texts = [text for text in TEXTS if len(text) < 30]
    prompts = [model.chat.ids(model.chat.render(text)) for text in texts]
    ((_, length),) = like_lengths(prompts)
    wanted = model.chat.decode(model.generate_ids(model.chat.pad(prompts, length), 20))
    samples = [Sample(text, target=reply) for text, reply in zip(texts, wanted, strict=True)]
    task = Task(dataset=samples, scorer=includes(ignore_case=False))
    (log,) = inspect_eval(task, model=provider, max_tokens=20, log_dir=str(tmp_path), display="none")
    assert log.status == "success", log.error
    assert log.results.scores[0].metrics["accuracy"].value == 1
    assert [sample.output.completion.strip() for sample in log.samples] == wanted
    assert {sample.output.stop_reason for sample in log.samples} <= {"stop", "max_tokens"}
    assert all(
        sample.output.usage.input_tokens > 5 and sample.output.usage.output_tokens <= 20 for sample in log.samples
    )


def test_inspect_with_the_generation_settings_of_the_checkpoint(llama, tmp_path):
    pytest.importorskip("inspect_ai", reason="the extra inspect is not installed")
    from inspect_ai.model import get_model

    folder = shutil.copytree(llama, tmp_path / "model")
    tiny.edit_json(folder / "generation_config.json", repetition_penalty=1.8)
    outputs = []
    for more, key in (({}, "left_out"), ({"generation_from_checkpoint": True}, "applied")):
        outputs.append(ask(get_model(f"refusal_jax/{folder}", dtype="float32", memoize=False, **more), max_tokens=12))
        assert outputs[-1].metadata["generation_settings"][key] == {"repetition_penalty": 1.8}
    assert outputs[0].completion != outputs[1].completion


def ask(provider, text="Sure", tools=(), **config):
    import asyncio

    from inspect_ai.model import ChatMessageSystem, ChatMessageUser, GenerateConfig

    talk = text if isinstance(text, list) else [ChatMessageSystem(content="x"), ChatMessageUser(content=text)]
    return asyncio.run(provider.api.generate(talk, list(tools), "auto", GenerateConfig(**config)))


def test_what_inspect_asks(provider, monkeypatch):
    from inspect_ai.model import ChatMessageTool, ChatMessageUser, ContentImage
    from inspect_ai.tool import ToolInfo

    reply = ask(provider, max_tokens=20, temperature=0, top_p=1)
    stop = reply.completion.strip()[-1]
    cut = ask(provider, max_tokens=20, stop_seqs=[stop])
    assert cut.completion == reply.completion.split(stop)[0] and cut.stop_reason == "stop"
    assert ask(provider, "How do I bake the bread? " * 40).stop_reason == "model_length"
    with pytest.raises(UserError, match=r"The task gives the model tools \(look\), and this provider has none"):
        ask(provider, tools=[ToolInfo(name="look", description="looks")])
    with pytest.raises(UserError, match=r"temperature = 0\.7, num_choices = 2: this provider decodes greedily"):
        ask(provider, temperature=0.7, num_choices=2)
    with pytest.raises(UserError, match="A message of the task holds image: this provider reads text only"):
        ask(provider, [ChatMessageUser(content=[ContentImage(image="x.png")])])
    with pytest.raises(UserError, match="A message of the task holds a tool's result"):
        ask(provider, [ChatMessageTool(content="x")])
    with pytest.raises(UserError, match="batch_size = 0: give a number of rows"):
        type(provider.api)("study", batch_size=0)

    def broken(*_, **__):
        raise UserError("the model broke")

    monkeypatch.setattr(type(provider.api.edited), "replies", broken)
    with pytest.raises(UserError, match="the model broke"):
        ask(provider)


def test_thoughts_become_reasoning_in_inspect(provider, monkeypatch):
    from inspect_ai.model import ChatMessageAssistant, ContentReasoning, ContentText

    from refusal_jax.harness.edited import EditedModel, Reply
    from refusal_jax.harness.inspect import as_text

    reply = Reply("<think>why</think>\n\nSure", 9, True, False, True)
    monkeypatch.setattr(EditedModel, "replies", lambda self, prompts, *_, show_marks: [reply] * len(prompts))
    output = ask(provider)
    assert output.completion == "Sure"
    assert output.message.content == [ContentReasoning(reasoning="why"), ContentText(text="Sure")]
    assert as_text(output.message)["content"] == "<think>\nwhy\n</think>\n\nSure"
    assert as_text(ChatMessageAssistant(content="Sure")) == {"role": "assistant", "content": "Sure"}
