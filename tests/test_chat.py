"""Chat prompts: rendering, padding, refusal openers, where replies end. Templates by family: test_templates.py."""

import dataclasses
import importlib.util
import io
import json
import re
import shutil

import numpy as np
import pytest
import tiny
from transformers import AutoTokenizer

from refusal_jax import UserError, load_model
from refusal_jax.chat import prompts
from refusal_jax.chat.model import demo_model_path
from refusal_jax.chat.padding import bucket
from refusal_jax.chat.prompts import Chat
from refusal_jax.chat.tokenizers import is_plain, load_tokenizer


def make_chat(folder, template=tiny.TEMPLATE, context=256, extra=(), **more) -> Chat:
    tiny.tiny_tokenizer(folder, template, extra, **more)
    return Chat.load(folder, context)


@pytest.fixture
def chat(model) -> Chat:
    return model.chat


def test_token_names_are_readable(chat):
    names = ["<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\\n\\n"]
    assert chat.token_names(chat.post_instruction_ids) == names


def test_template_without_anything_after_the_instruction(tmp_path):
    chat = make_chat(tmp_path, "{{ bos_token }}{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match="The chat template puts no tokens after the instruction"):
        _ = chat.post_instruction_ids


def test_template_that_trims(chat):
    np.testing.assert_array_equal(chat.encode(["  help \n"]).tokens, chat.encode(["help"]).tokens)


def test_no_system_prompt_and_one_bos(chat):
    text = chat.render("help")
    expected = f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhelp{tiny.AFTER_INSTRUCTION}"
    assert text == expected and chat.render("help", "Sure") == expected + "Sure"
    assert chat.ids(text).count(chat.tokenizer.bos_token_id) == 1


def test_template_that_fails(tmp_path):
    message = r"template \(tokenizer\) failed on a single user message \(system prompt needed\)\. Repair it, or"
    with pytest.raises(UserError, match=message):
        make_chat(tmp_path, "{{ raise_exception('system prompt needed') }}")


def test_the_ids_of_prompts_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "KEPT_PROMPTS", 2)
    chat, rendered = make_chat(tmp_path), []
    render = Chat.render
    monkeypatch.setattr(Chat, "render", lambda self, text, *more: rendered.append(text) or render(self, text, *more))
    ids = chat.prompt_ids("help")
    assert ids == chat.ids(render(chat, "help")) and chat.prompt_ids("help") is not ids
    assert chat.prompt_ids("help") == chat.prompt_ids("help") == ids and rendered == ["help"]
    other = dataclasses.replace(chat, template_arguments={"more": True})
    assert other.prompt_ids("help") == ids and rendered == ["help"] * 2
    chat.tokenizer.chat_template += "!"
    assert chat.prompt_ids("help") == [*ids, *chat.ids("!")] and rendered == ["help"] * 3
    for text in ("one", "two", "help"):
        chat.prompt_ids(text)
    assert rendered[3:] == ["one", "two", "help"]


def test_encode_pads_on_the_left(chat):
    texts = ["help", "How do I bake the bread? " * 3]
    batch = chat.encode(texts)
    lengths = [len(chat.ids(chat.render(text))) for text in texts]
    assert batch.tokens.shape == batch.mask.shape == (2, bucket(max(lengths)))
    assert batch.tokens.dtype == np.int32 and batch.mask.dtype == bool
    for row, text in enumerate(texts):
        ids = chat.ids(chat.render(text))
        assert batch.tokens[row, batch.mask[row]].tolist() == ids
        assert batch.mask[row].tolist() == [False] * (batch.mask.shape[1] - len(ids)) + [True] * len(ids)
        assert (batch.tokens[row, ~batch.mask[row]] == chat.pad_id).all()
    assert chat.encode(texts, 200).tokens.shape == (2, 200)


def test_padded_to_repeats_the_last_row(chat):
    batch = chat.encode(["help", "bake"]).padded_to(5)
    assert batch.tokens.shape[0] == batch.mask.shape[0] == 5
    for row in (2, 3, 4):
        np.testing.assert_array_equal(batch.tokens[row], batch.tokens[1])
        np.testing.assert_array_equal(batch.mask[row], batch.mask[1])


def test_buckets_are_few_and_not_much_longer():
    sizes = [bucket(length) for length in range(1, 4097)]
    assert all(size >= length for length, size in enumerate(sizes, 1))
    assert all(size <= 2 * length for length, size in enumerate(sizes, 1) if length >= 4)
    assert sizes == sorted(sizes) and len(set(sizes)) <= 32


def test_prompt_as_long_as_the_context_and_longer(chat):
    length = len(chat.ids(chat.render("help " * 9)))
    exact = dataclasses.replace(chat, context_length=length)
    assert exact.encode(["help " * 9]).tokens.shape == (1, length)
    short = dataclasses.replace(chat, context_length=length - 1)
    with pytest.raises(
        UserError, match=rf"Prompt 1 \('help help.*has {length} tokens, the model's context is {length - 1}"
    ):
        short.encode(["hi", "help " * 9])


@pytest.mark.parametrize("instructions", [[], (), "How do I bake?"])
def test_encode_needs_a_list(instructions, chat):
    with pytest.raises(UserError, match="encode takes a non-empty list of instructions"):
        chat.encode(instructions)


def test_half_a_character_is_replaced(model, tmp_path, caplog):
    whole, half = ["a \ufffd", "b \U0001f600"], ["a \ud800", "b \ud83d\ude00"]
    np.testing.assert_array_equal(model.encode(half).tokens, model.encode(whole).tokens)
    assert "Instructions: 1 text holds half of a surrogate pair" in caplog.text
    assert model.generate(half, 4) == model.generate(whole, 4)
    assert model.chat.opener_ids(["\udfff"]) == model.chat.opener_ids(["\ufffd"])
    chat = make_chat(tmp_path, tiny.TEMPLATE + r"{{ '\ud800' }}")  # jinja knows the escape
    assert chat.tokenizer.decode(chat.post_instruction_ids).endswith("\ufffd")


def test_refusal_openers(chat):
    first = chat.ids("I")[0]
    assert chat.opener_ids(("I",)) == (first,)
    assert chat.opener_ids(("I cannot", "I", first)) == (first,)  # only the first token counts, once
    assert chat.opener_ids((7, "I", 2)) == tuple(sorted({2, 7, first}))


@pytest.mark.parametrize("opener", ["", -1, 312, 10**9])
def test_refusal_openers_outside_the_vocabulary(opener, chat):
    with pytest.raises(UserError, match=rf"refusal token {opener!r} is not in the vocabulary of 312 tokens"):
        chat.opener_ids(("I", opener))


def test_no_refusal_openers(chat):
    with pytest.raises(UserError, match="no refusal tokens: give at least one opener"):
        chat.opener_ids(())


def test_decode_stops_at_the_first_end(chat):
    end, text = chat.eos_ids[0], chat.ids("I cannot help")
    bos = chat.tokenizer.bos_token_id
    rows = [[*text, end, *text], [bos, *text, 32, 32], [end, *text, 32], [*text, bos, bos]]
    width = max(map(len, rows))
    decoded = chat.decode(np.asarray([row + [end] * (width - len(row)) for row in rows]))
    assert decoded[0] == "I cannot help" and decoded[2] == "" and decoded[3] == "I cannot help"
    assert decoded[1] == "I cannot help" + chat.tokenizer.decode([32, 32])


def test_every_end_token_ends(chat):
    both = dataclasses.replace(chat, eos_ids=(40, 41))
    assert both.decode([[50, 41, 60], [50, 60, 40]]) == [chat.tokenizer.decode([50]), chat.tokenizer.decode([50, 60])]


def test_end_tokens_of_all_files(tmp_path):
    tokenizer = tiny.tiny_tokenizer(tmp_path)
    assert Chat.load(tmp_path, 64).eos_ids == (tokenizer.eos_token_id,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 5]}')
    assert Chat.load(tmp_path, 64).eos_ids == (9, 5, tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("generation", "config", "found"),
    [
        ({"eos_token_id": 9}, {"eos_token_id": 5}, (9,)),  # 5 may be an ordinary token, at which transformers goes on
        ({"eos_token_id": [9, None, 10]}, {"eos_token_id": 5}, (9, 10)),
        ({"eos_token_id": None}, {"eos_token_id": 5}, (5,)),
        ({"eos_token_id": []}, {"eos_token_id": [5, 6]}, (5, 6)),
        ({"eos_token_id": -1}, {"eos_token_id": [5, -1]}, (5,)),
        ({"eos_token_id": 10**6}, {"eos_token_id": 5}, (10**6,)),  # beyond the vocabulary, where it does no harm
        (None, {"eos_token_id": 5, "text_config": {"eos_token_id": 6}}, (5,)),
        (None, {"eos_token_id": None, "text_config": {"eos_token_id": [6, 7]}}, (6, 7)),
        ({}, {"text_config": {"eos_token_id": 6}}, (6,)),
        (None, {}, ()),
    ],
)
def test_end_tokens_of_the_file_that_counts(generation, config, found, tmp_path):
    tokenizer = tiny.tiny_tokenizer(tmp_path)
    for name, values in (("generation_config.json", generation), ("config.json", config)):
        if values is not None:
            (tmp_path / name).write_text(json.dumps(values))
    assert Chat.load(tmp_path, 64).eos_ids == (*found, tokenizer.eos_token_id)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", [True, "5", 2.5, 1000000000000, [9, 1000000000000], {"id": 3}])
def test_end_tokens_that_are_no_token_ids(file, value, tmp_path):
    (tmp_path / file).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=rf"{file} sets eos_token_id = {re.escape(repr(value))}, expected a token id"):
        make_chat(tmp_path)


def test_an_ordinary_token_of_the_tokenizer_does_not_end_replies(tmp_path):
    tokenizer = tiny.tiny_tokenizer(tmp_path)
    word = tokenizer.convert_ids_to_tokens(tokenizer("I", add_special_tokens=False).input_ids)[0]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    tiny.edit_json(tmp_path / "tokenizer_config.json", eos_token=word)
    assert Chat.load(tmp_path, 64).eos_ids == (9, tokenizer.convert_tokens_to_ids("<|eot_id|>"))


def test_an_ordinary_token_of_config_json_does_not_end_replies(llama, model, tmp_path):
    plain = model.generate_ids(model.encode(["help"]), 12)
    folder = shutil.copytree(llama, tmp_path / "model")
    tiny.edit_json(folder / "config.json", eos_token_id=int(plain[0, 4]))
    np.testing.assert_array_equal(load_model(folder).generate_ids(model.encode(["help"]), 12), plain)
    (folder / "generation_config.json").unlink()  # then transformers, too, takes it from there
    ended = load_model(folder)
    assert ended.chat.before_end(ended.generate_ids(model.encode(["help"]), 12)[0]) == plain[0, :4].tolist()


def test_ends_of_turns_end_replies_even_if_no_file_says_so(tmp_path):
    """First releases of Gemma and Llama 3 name only the end of the text, and would go on to talk to themselves."""
    extra = ("<end_of_turn>", "<eos>")
    chat = make_chat(tmp_path, extra=extra, eos_token="<eos>")
    turn, end = chat.tokenizer.convert_tokens_to_ids(list(extra))
    assert chat.eos_ids == (end, chat.tokenizer.convert_tokens_to_ids("<|eot_id|>"), turn)


def test_no_end_token(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "SPECIAL", ("<a>", "<b>", "<c>", "<d>", "<e>"))
    with pytest.raises(
        UserError, match="names no end-of-sequence token, neither in generation_config.json nor in config.json nor"
    ):
        make_chat(tmp_path, eos_token=None)


def test_an_end_token_of_ordinary_text_is_told(tmp_path, caplog):
    """transformers ends replies there, and so do we, but not without a word."""
    chat = make_chat(tmp_path)
    token = chat.ids(" cannot")[0]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [token, chat.eos_ids[0]]}))
    assert chat.load(tmp_path, 64).eos_ids[0] == token
    said = caplog.text
    assert f"names token {token}, " in said and "correct eos_token_id" in said and said.count("names token") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"is not valid JSON .*download it again"),
        ("[]", "holds a JSON list"),
        (None, "is a folder, expected a file"),
    ],
)
def test_damaged_generation_config(content, message, tmp_path):
    path = tmp_path / "generation_config.json"
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=rf"generation_config\.json {message}"):
        make_chat(tmp_path)


def test_padding_without_a_pad_token(tmp_path):
    chat = make_chat(tmp_path, pad_token=None)
    assert chat.pad_id == chat.eos_ids[0]


def test_folder_without_a_tokenizer(llama, tmp_path):
    with pytest.raises(UserError, match="has no tokenizer files"):
        Chat.load(tmp_path, 64)
    folder = shutil.copytree(llama, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(UserError, match="has no tokenizer files"):
        load_model(folder)


def test_damaged_tokenizer(tmp_path):
    tiny.tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text()[:500])
    with pytest.raises(UserError, match=r"tokenizer\.json is not valid JSON \(.+\)\. If it was edited by hand"):
        Chat.load(tmp_path, 64)


def test_a_plain_tokenizer_is_the_one_that_transformers_chooses(tmp_path):
    """For a Llama whose file names the plain class, all others are left unread; for other models transformers may know better."""
    folder, texts = demo_model_path(), (*prompts.PROBES, "<|begin_of_text|> Tell me, how?\n\n")
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert is_plain(folder) and type(ours) is type(theirs) and len(ours) == len(theirs)
    assert [ours(text).input_ids for text in texts] == [theirs(text).input_ids for text in texts]
    assert ours.chat_template == theirs.chat_template and ours.special_tokens_map == theirs.special_tokens_map
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(folder / name, tmp_path)
    tiny.edit_json(tmp_path / "config.json", model_type="qwen2")
    assert not is_plain(tmp_path)


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    folder = tmp_path / "model"
    tiny.tiny_tokenizer(folder)
    trace = tmp_path / "was-run"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass EvilTokenizer: pass\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    auto_map = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
    for name in (settings["tokenizer_class"], "EvilTokenizer"):
        tiny.edit_json(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class=name)
        try:
            Chat.load(folder, 64)
        except UserError as error:
            assert "could not be loaded" in str(error)
    assert not trace.exists()


def test_pad_token_without_an_embedding(llama, tmp_path):
    """Some checkpoints add a pad token to the tokenizer alone; its embedding row does not exist, so use another."""
    folder = shutil.copytree(llama, tmp_path / "model")
    tiny.tiny_tokenizer(folder, extra=("<pad>",), pad_token="<pad>")
    model = load_model(folder)
    batch = model.encode(["help", "How do I bake the bread?"])
    assert np.isfinite(np.asarray(model.logits(batch.tokens, batch.mask))).all()


def test_prompt_token_without_an_embedding(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    tiny.tiny_tokenizer(folder, extra=("<tool>",))
    model = load_model(folder)
    with pytest.raises(UserError, match="vocabulary"):
        model.encode(["use the <tool> please"])


def only_sentencepiece(folder, content: bytes):
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(content)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    "gone,message",
    [
        ({"sentencepiece"}, r"is read with sentencepiece, which is not installed\. Run: pip install sentencepiece\."),
        (
            {"sentencepiece", "google.protobuf"},
            r"is read with sentencepiece and protobuf, which are .*: pip install sentencepiece protobuf\.",
        ),
    ],
)
def test_a_sentencepiece_model_without_its_packages(gone, message, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    with pytest.raises(UserError, match=rf"has no tokenizer\.json, and its tokenizer\.model {message}"):
        Chat.load(only_sentencepiece(tmp_path / "model", b"\n\x0e\n\x05<unk>"), 64)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_that_is_no_sentencepiece_model(content, tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.model is neither a SentencePiece model nor a list of tiktoken's"):
        Chat.load(only_sentencepiece(tmp_path / "model", content), 64)


def test_a_sentencepiece_model(tmp_path):
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    file = io.BytesIO()
    texts = ["How do I bake the bread?", "I cannot help with that.", "[INST] [/INST]"] * 20
    trainer.train(
        sentence_iterator=iter(texts), model_writer=file, vocab_size=300, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    folder = only_sentencepiece(tmp_path / "model", file.getvalue())
    chat = Chat.load(folder, 64, chat_template="llama-2")
    ids = chat.ids(chat.render("How do I bake é?"))
    assert ids.count(chat.tokenizer.bos_token_id) == 1 and ids[0] == chat.tokenizer.bos_token_id
    assert chat.decode([ids]) == ["[INST] How do I bake é? [/INST]"]
    (folder / "tokenizer.model").write_bytes(file.getvalue()[:700])
    with pytest.raises(
        UserError, match=r"tokenizer\.model could not be read as a SentencePiece model or tiktoken's ranks"
    ):
        Chat.load(folder, 64)


def test_a_tokenizer_that_knows_no_token(tmp_path):
    tiny.tiny_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"] |= {"vocab": {}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 4}')
    with pytest.raises(
        UserError, match=r"The tokenizer of .* turns 'a' into no tokens: its vocabulary of 5 tokens is incomplete"
    ):
        Chat.load(tmp_path, 64, chat_template="llama-2")


def test_a_tokenizer_of_another_kind(tmp_path):
    tiny.tiny_tokenizer(tmp_path)
    tiny.edit_json(tmp_path / "tokenizer.json", model={"type": "Later", "vocab": {}})
    with pytest.raises(
        UserError, match=r"could not be loaded \(.+\)\. A file was edited .*newer packages than transformers"
    ):
        Chat.load(tmp_path, 64)
