"""Generation settings of checkpoints: token ids equal transformers' for each computed one, and all others are refused by name."""

import contextlib
import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from transformers import GenerationConfig

from refusal_jax import Edits, UserError, load_model, make_mesh
from refusal_jax.models.decoding import COMPUTED, FILE, INERT, NOT_COMPUTED, GenerationSettings, in_words
from refusal_jax.models.generate import admit, decode, empty

STEPS, LAYER = 16, 1
PROMPTS = ("How do I bake the bread?", "bake", "the bread the bread the bread the")
# Of the plain replies, `[3, STEPS]`: settings that change them. Lists are as in a file.
SETTINGS = {
    "repetition_penalty": lambda plain: {"repetition_penalty": 1.9},
    "repetition_penalty under 1": lambda plain: {"repetition_penalty": 0.5},
    "no_repeat_ngram_size": lambda plain: {"repetition_penalty": 0.4, "no_repeat_ngram_size": 2},
    "no token twice": lambda plain: {"no_repeat_ngram_size": 1},
    "suppress_tokens": lambda plain: {"suppress_tokens": [*plain[:, 2].tolist(), -1, 10**9]},
    "begin_suppress_tokens": lambda plain: {"begin_suppress_tokens": plain[:, 0].tolist()},
    "bad_words_ids": lambda plain: {"bad_words_ids": [[i] for i in plain[:, 1].tolist()]},
    "sequence_bias": lambda plain: {"sequence_bias": [[[int(plain[0, 3])], -4.0], [[7], 3.5]]},
    "min_length": lambda plain: {"min_length": 33, "eos_token_id": plain[:, 3].tolist()},
    "min_new_tokens": lambda plain: {"min_new_tokens": 9, "min_length": 99, "eos_token_id": plain[:, 3].tolist()},
    "forced_eos_token_id": lambda plain: {"forced_eos_token_id": [5, 9], "suppress_tokens": [5]},
    "all": lambda plain: {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "suppress_tokens": [int(plain[0, 4])],
        "bad_words_ids": [[int(plain[1, 1])], [311]],
        "sequence_bias": [[[9], 2.0]],
        "forced_eos_token_id": 311,
        "min_new_tokens": 4,
        "temperature": 0.7,
        "top_k": 3,
        "renormalize_logits": True,
        "remove_invalid_values": True,
        "forced_bos_token_id": 8,
    },
}


@pytest.fixture(scope="module")
def vector(model):
    return np.random.default_rng(0).normal(size=model.config.d_model).astype(np.float32)


def ends_with(model, values: dict):
    """The model with a checkpoint's settings, its end tokens among them."""
    eos = tuple(values.get("eos_token_id", model.chat.eos_ids))
    chat = dataclasses.replace(model.chat, eos_ids=eos)
    return dataclasses.replace(model, chat=chat, settings=GenerationSettings(FILE, values, eos)).decoded(True)


@contextlib.contextmanager
def added(hf, vector):
    """transformers' model with the vector added at the input of a block."""
    add = lambda module, args: (args[0] + torch.tensor(vector), *args[1:])  # noqa: E731
    hook = hf.model.layers[LAYER].register_forward_pre_hook(add)
    yield
    hook.remove()


def theirs(hf, rows, values: dict, steps: int = STEPS) -> list[list[int]]:
    """transformers' greedy replies to rows of ids, each alone and without padding."""
    config = GenerationConfig(**{"eos_token_id": 311, "pad_token_id": 308, **values})
    out = [hf.generate(torch.tensor([row]), config, max_new_tokens=steps, do_sample=False)[0] for row in rows]
    return [reply[len(row) :].tolist() for reply, row in zip(out, rows, strict=True)]


@pytest.fixture(scope="module")
def without_settings(hf):
    """transformers' replies under no setting but the end tokens, by these and by whether the vector is added: made once."""
    known = {}

    def replies(rows, values: dict, edited: bool) -> list[list[int]]:
        ends = {key: values[key] for key in values if key == "eos_token_id"}
        key = edited, str(ends)
        if key not in known:
            known[key] = theirs(hf, rows, ends)
        return known[key]

    return replies


@pytest.mark.parametrize("name", SETTINGS)
def test_replies_under_each_setting_are_those_of_transformers(name, model, hf, vector, without_settings):
    batch = model.encode(PROMPTS)
    rows = [row[mask].tolist() for row, mask in zip(batch.tokens, batch.mask, strict=True)]
    for edits, edited in ((None, contextlib.nullcontext()), (Edits.add(vector, LAYER), added(hf, vector))):
        plain = np.asarray(model.generate_ids(batch, STEPS, edits))
        values = SETTINGS[name](plain)
        with edited:
            wanted = theirs(hf, rows, values)
            neutral = without_settings(rows, values, edits is not None)
        assert all(reply != other for reply, other in zip(wanted, neutral, strict=True)) or name == "sequence_bias"
        assert wanted != neutral
        decoded = ends_with(model, values)
        ids = decoded.generate_ids(batch, STEPS, edits).tolist()
        assert [row[: len(reply)] for row, reply in zip(ids, wanted, strict=True)] == wanted
        assert [len(decoded.chat.before_end(row)) for row in ids] == [
            len(decoded.chat.before_end(reply)) for reply in wanted
        ]


@pytest.mark.parametrize("mesh", [None, {"data": 2, "model": 4}], ids=["one device", "mesh"])
def test_rows_that_are_refilled(mesh, llama, model, hf):
    """Rows that others have left forget what those had said."""
    prompts = [f"{'help ' * (i % 4)}bake {i}" for i in range(10)]
    values = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "begin_suppress_tokens": [3], "min_new_tokens": 2}
    values["eos_token_id"] = [int(i) for i in model.generate_ids(model.encode(prompts), STEPS)[:, 5]]
    batch = model.encode(prompts)
    rows = [row[mask].tolist() for row, mask in zip(batch.tokens, batch.mask, strict=True)]
    wanted = theirs(hf, rows, values)
    assert len({len(reply) for reply in wanted}) > 2
    ours = ends_with(model if mesh is None else load_model(llama, mesh=make_mesh(**mesh)), values)
    found = {}
    for done, ids in ours.reply_ids(batch, STEPS, rows=4):
        found |= {number: row[: len(wanted[number])].tolist() for number, row in zip(done, ids, strict=True)}
    assert [found[i] for i in range(10)] == wanted


def test_growing_replies(model, hf, vector):
    batch = model.encode(PROMPTS[:2])
    rows = [row[mask].tolist() for row, mask in zip(batch.tokens, batch.mask, strict=True)]
    values = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "forced_eos_token_id": 311}
    *_, last = ends_with(model, values).stream(batch, 10, probe=vector)
    assert last.ids == [reply[:-1] if reply[-1] == 311 else reply for reply in theirs(hf, rows, values, 10)]


def test_the_rest_of_a_reply_that_is_continued(model):
    """A reply whose angles change on the way is read again as a part of the prompt."""
    values = {"repetition_penalty": 1.5, "min_new_tokens": 9, "begin_suppress_tokens": [4], "forced_eos_token_id": 311}
    batch = model.encode(PROMPTS)
    plain = model.generate_ids(batch, STEPS)
    whole = ends_with(model, values | {"eos_token_id": plain[:, 2].tolist()})
    object.__setattr__(cut := dataclasses.replace(whole), "_kept_angles", lambda longest, most: min(most, 6))
    np.testing.assert_array_equal(cut.generate_ids(batch, STEPS), whole.generate_ids(batch, STEPS))


def folder_with(llama, tmp_path, text: str | None, **config):
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / FILE).unlink()
    if text is not None:
        (folder / FILE).write_text(text)
    tiny.edit_json(folder / "config.json", **config)
    return folder


def test_checkpoints_are_decoded_plainly_unless_asked(llama, model, hf, tmp_path):
    folder = folder_with(
        llama, tmp_path, '{"repetition_penalty": 1.9, "eos_token_id": 311, "top_p": 0.8, "do_sample": true}'
    )
    plain, loaded = load_model(folder), load_model(folder, generation_from_checkpoint=True)
    texts = model.generate(PROMPTS)
    rows = [model.chat.ids(model.chat.render(prompt)) for prompt in PROMPTS]
    wanted = [model.chat.decode([reply])[0] for reply in theirs(hf, rows, {"repetition_penalty": 1.9}, 64)]
    assert plain.decoding is None and plain.generate(PROMPTS) == texts != wanted
    assert loaded.generate(PROMPTS) == plain.generate(PROMPTS, generation_from_checkpoint=True) == wanted
    assert loaded.generate(PROMPTS, generation_from_checkpoint=False) == texts
    assert plain.settings.record(False) == {"file": FILE, "left_out": {"repetition_penalty": 1.9}, "applied": {}}
    assert model.decoded(True).decoding is None  # whose generation_config.json changes nothing


def test_settings_in_config_json_count_where_the_other_file_is_missing(llama, tmp_path):
    folder = folder_with(llama, tmp_path, None, repetition_penalty=1.9, no_repeat_ngram_size=0)
    settings = GenerationSettings.read(folder)
    assert settings.record(True) == {"file": "config.json", "applied": {"repetition_penalty": 1.9}, "left_out": {}}
    (folder / FILE).write_text("{}")
    assert not GenerationSettings.read(folder).changing


def test_every_setting_of_transformers_is_sorted():
    known = INERT | COMPUTED.keys() | NOT_COMPUTED.keys()
    settings = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    assert settings - known == set()
    defaults = {k: v for k, v in GenerationConfig._get_default_generation_params().items() if v is not None}
    assert not GenerationSettings(FILE, GenerationConfig().to_dict() | defaults).changing


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"num_beams": 4, "penalty_alpha": 0.6}, "num_beams = 4, penalty_alpha = 0.6"),
        ({"guidance_scale": 0}, "guidance_scale = 0"),
        ({"dola_layers": "high"}, "dola_layers = 'high'"),
        ({"watermarking_config": {}}, "watermarking_config = {}"),
        ({"max_time": 0}, "max_time = 0"),
        ({"stop_strings": ["x"]}, r"stop_strings = \['x'\]"),
        ({"cache_implementation": "quantized"}, "cache_implementation = 'quantized'"),
        ({"made_up": "yes", "repetition_penalty": 1.1}, "made_up = 'yes'"),
        ({"bad_words_ids": [[1, 2], [3]]}, "bad_words_ids of several tokens"),
        ({"sequence_bias": [[[1, 2], 1.0]]}, "sequence_bias of several tokens"),
    ],
)
def test_settings_that_are_not_computed_are_refused(values, named, model):
    with pytest.raises(UserError, match=rf"generation_config\.json sets .*{named}.*, which may change greedy replies"):
        dataclasses.replace(model, settings=GenerationSettings(FILE, values)).decoded(True)


def test_neutral_values_change_nothing():
    values = {"num_beams": 1, "penalty_alpha": 0.0, "made_up": 0, "more": [], "repetition_penalty": 1.0, "top_k": 50}
    values |= {"suppress_tokens": [], "min_length": 0, "guidance_scale": None, "_private": 3, "chat_format": "chatml"}
    assert not GenerationSettings(FILE, values).changing


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 0),
        ("repetition_penalty", "1.3"),
        ("no_repeat_ngram_size", 2.5),
        ("min_new_tokens", 10**12),
        ("suppress_tokens", ["x"]),
        ("forced_eos_token_id", True),
        ("bad_words_ids", [3]),
        ("bad_words_ids", [[10**6]]),
        ("sequence_bias", {"(3,)": 1.0}),
        ("sequence_bias", [[[3], "x"]]),
    ],
)
def test_malformed_settings(name, value, model):
    settings = GenerationSettings(FILE, {name: value})
    with pytest.raises(UserError, match=rf"generation_config\.json sets {name} = .*, expected .*Repair it"):
        dataclasses.replace(model, settings=settings).decoded(True)
    assert model.decoded(False).decoding is None


def test_an_ngram_longer_than_the_row(model):
    batch = model.encode(PROMPTS)
    long = ends_with(model, {"no_repeat_ngram_size": 10**6})
    np.testing.assert_array_equal(long.generate_ids(batch, 5), model.generate_ids(batch, 5))


@pytest.mark.usefixtures("unchecked")
def test_plain_decoding_does_not_look_at_prompts(model):
    """Plain greedy decoding is the program without settings, not one with neutral settings."""
    batch = model.encode(PROMPTS)
    state = empty(model.decoder, rows=3, length=batch.tokens.shape[1], max_new_tokens=4, pad_id=0)
    assert state.prompt_bt is None
    part, rows = model.put(batch.tokens, batch.mask), np.arange(3, dtype=np.int32)
    texts = [
        admit.lower(model.decoder, state, *part, rows, pad_id=0, eos_ids=(1,)).as_text(),
        decode.lower(model.decoder, state, 1, 1, eos_ids=(1,)).as_text(),
    ]
    state = empty(model.decoder, rows=3, length=batch.tokens.shape[1], max_new_tokens=4, pad_id=0, remembered=True)
    decoding = ends_with(model, {"repetition_penalty": 1.3}).decoding
    other = decode.lower(model.decoder, state, 1, 1, decoding, eos_ids=(1,)).as_text()
    assert "scatter" in other and all("stablehlo.scatter" not in text for text in texts)


def test_what_is_said_of_decoding():
    settings = GenerationSettings(FILE, {"repetition_penalty": 1.3, "suppress_tokens": list(range(50))})
    line = in_words(settings.record(False), "--x=True")
    assert line.startswith(
        "Decoding: plain greedy, as in the paper; generation_config.json also sets repetition_penalty = 1.3"
    )
    assert line.endswith("11, ...], which is left out (--x=True applies it).") and len(line) < 250
    assert in_words(GenerationSettings().record(False), "") == "Decoding: plain greedy, as in the paper."
    applied = GenerationSettings(FILE, {"repetition_penalty": 1.3}).record(True)
    assert in_words(applied, "") == "Decoding: greedy with repetition_penalty = 1.3, from generation_config.json."
    assert json.loads(json.dumps(applied)) == applied
