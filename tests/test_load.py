"""Checkpoints: what loads, on one device and on a mesh, and every way in which one can be broken."""

import json
import os
import shutil
import textwrap

import families
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import tiny
from exports import differences, exported
from safetensors.numpy import load_file, save_file

from refusal_jax import UserError, load_model, make_mesh
from refusal_jax.checkpoints.load import load_decoder, save_weights
from refusal_jax.checkpoints.tensor_files import INDEX, SINGLE
from refusal_jax.checkpoints.tensors import listed

Q0, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


@pytest.fixture
def folder(llama, tmp_path):
    """A copy of the tiny checkpoint, to be broken."""
    return shutil.copytree(llama, tmp_path / "model")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The checkpoint of `llama`, in several files with an index. Read only."""
    return tiny.tiny_llama(tmp_path_factory.mktemp("sharded"), shards="40KB")


@pytest.fixture
def shards(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "shards")


def change(folder, **changes):
    """Rewrites the single weight file, with tensors replaced, added or (None) removed."""
    tensors = load_file(folder / SINGLE) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / SINGLE, metadata={"format": "pt"})


def change_index(folder, name, file):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def same_weights(a, b):
    a, b = jax.device_get((a.weights(), b.weights()))
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype
        np.testing.assert_array_equal(a[path], b[path])


def test_shards_equal_the_single_file(llama, sharded):
    files = {path.name for path in sharded.glob("*.safetensors")}
    assert len(files) > 2 and SINGLE not in files and (sharded / INDEX).exists()
    same_weights(load_decoder(sharded), load_decoder(llama))


def test_weights_are_those_of_transformers(llama, hf):
    theirs = {name: value.numpy() for name, value in hf.state_dict().items()}
    weights = jax.device_get(load_decoder(llama).weights())
    np.testing.assert_array_equal(weights["blocks.down"][2], theirs["model.layers.2.mlp.down_proj.weight"])
    np.testing.assert_array_equal(weights["blocks.q"][0], theirs[Q0])
    np.testing.assert_array_equal(weights["unembed"], theirs["lm_head.weight"])


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_stored_dtypes(stored, tmp_path):
    folder = tiny.tiny_llama(tmp_path, layers=2, dtype=stored)
    theirs = tiny.load_hf(folder).state_dict()
    ours = jax.device_get(load_decoder(folder).weights())
    assert ours["blocks.q"].dtype == np.float32
    np.testing.assert_array_equal(ours["blocks.q"][0], theirs[Q0].numpy())
    np.testing.assert_array_equal(ours["final_norm"], theirs[NORM].numpy())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_save_is_load_backwards(dtype, tied, tmp_path):
    folder = tiny.tiny_llama(tmp_path / "a", layers=2, dtype=dtype, tied=tied, attention_bias=True, mlp_bias=True)
    again = shutil.copytree(folder, tmp_path / "b")
    decoder = load_decoder(folder, dtype)
    save_weights(decoder, again)
    before, after = ({k: v.tobytes() for k, v in load_file(f / SINGLE).items()} for f in (folder, again))
    assert before == after
    same_weights(decoder, load_decoder(again, dtype))
    written = (again / SINGLE).read_bytes()
    save_weights(load_decoder(again, dtype), again)
    assert (again / SINGLE).read_bytes() == written
    assert safetensors.safe_open(again / SINGLE, "np").metadata() == {"format": "pt"}
    assert tiny.load_hf(again, dtype).state_dict().keys() == tiny.load_hf(folder, dtype).state_dict().keys()


def test_missing_unknown_and_misshapen_tensors_come_in_one_error(folder):
    change(
        folder,
        model__norm__weight=None,
        model__layers__1__mlp__up_proj__weight=None,
        model__layers__9__mlp__up_proj__weight=np.zeros((2, 2), np.float32),
        lm_head__weight=np.zeros((3, 4), np.float32),
    )
    save_file(load_file(folder / SINGLE) | {Q0: np.zeros((32, 32), np.float64)}, folder / SINGLE)
    with pytest.raises(UserError, match=r"The tensors of .* do not fit its config\.json") as error:
        load_decoder(folder)
    for part in (
        "2 missing: model.layers.1.mlp.up_proj.weight; model.norm.weight",
        "1 unknown: model.layers.9.mlp.up_proj.weight",
        "1 misshapen: lm_head.weight is [3, 4], expected [312, 32]",
        f"1 of a dtype other than F32, F16, BF16: {Q0} is F64",
    ):
        assert part in str(error.value)


def test_many_problems_are_counted_not_listed():
    assert listed(["a", "b"]) == "a; b"
    assert listed(list("abcdefgh"), 3) == "a; b; c; and 5 more"


def test_tensors_that_inference_recomputes_are_ignored(folder):
    change(folder, model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(4, np.float32))
    assert load_decoder(folder).cfg.n_layers == 3


def test_a_tied_checkpoint_may_hold_its_unembedding(tmp_path):
    folder = tiny.tiny_llama(tmp_path, layers=1, tied=True)
    tensors = load_file(folder / SINGLE)
    assert "lm_head.weight" not in tensors
    change(folder, lm_head__weight=tensors["model.embed_tokens.weight"])
    assert "unembed" not in load_decoder(folder).weights()


@pytest.mark.parametrize("keep", [0, 5, 100, -10])
def test_truncated_file(keep, folder):
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is not a readable safetensors file .*download it again"):
        load_decoder(folder)


def test_file_that_is_something_else(shards):
    one = sorted(shards.glob("*.safetensors"))[1]
    one.write_bytes(b"<html>404 not found</html>" * 100)
    with pytest.raises(UserError, match=f"{one.name} is not a readable safetensors file"):
        load_decoder(shards)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(value, folder):
    down = load_file(folder / SINGLE)["model.layers.2.mlp.down_proj.weight"]
    down[3, 4] = value
    change(folder, model__layers__2__mlp__down_proj__weight=down)
    with pytest.raises(
        UserError, match=r"holds NaN or infinite weights \(as float32\): blocks\.down \(one or more of model\.layers\.0"
    ):
        load_decoder(folder)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_weights_that_a_dtype_cannot_hold(folder):
    change(folder, model__norm__weight=np.full(32, 1e6, np.float32))
    assert load_decoder(folder, "bfloat16").dtype == ml_dtypes.bfloat16
    with pytest.raises(UserError, match=r"\(as float16\): final_norm .*try bfloat16 or float32"):
        load_decoder(folder, "float16")


def test_unknown_dtype(llama):
    with pytest.raises(UserError, match="dtype 'int8' is not one of float32, bfloat16, float16"):
        load_model(llama, "int8")


def test_auto_dtype_is_float32_on_cpu(llama):
    assert load_model(llama, "auto").decoder.dtype == np.float32


@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/x.safetensors", "sub/x.safetensors", "..", ""])
def test_index_that_names_files_outside(name, shards):
    change_index(shards, NORM, name)
    with pytest.raises(UserError, match="names files outside the checkpoint's folder: .*Do not use this checkpoint"):
        load_decoder(shards)


def test_missing_shards(shards):
    files = sorted(shards.glob("*.safetensors"))
    files[0].unlink()
    files[2].unlink()
    message = rf"lacks 2 of the {len(files)} weight files .*{files[0].name}; {files[2].name}.*download is incomplete"
    with pytest.raises(UserError, match=message):
        load_decoder(shards)


@pytest.mark.parametrize("index", ['{"metadata": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}'])
def test_index_without_weight_map(index, shards):
    (shards / INDEX).write_text(index)
    with pytest.raises(UserError, match=r"index\.json has no usable weight_map"):
        load_decoder(shards)


def test_duplicate_tensors(shards):
    one, two = sorted(shards.glob("*.safetensors"))[:2]
    name = next(iter(load_file(one)))
    save_file(load_file(two) | {name: load_file(one)[name]}, two)
    with pytest.raises(UserError, match=f"contradict each other: {name} is in both {one.name} and {two.name}"):
        load_decoder(shards)


def test_index_that_misplaces_a_tensor(shards):
    files = sorted(path.name for path in shards.glob("*.safetensors"))
    where = json.loads((shards / INDEX).read_text())["weight_map"][NORM]
    wrong = next(name for name in files if name != where)
    change_index(shards, NORM, wrong)
    with pytest.raises(UserError, match=f"{INDEX} places {NORM} in {wrong}, which does not hold it"):
        load_decoder(shards)


def test_index_of_a_tensor_that_no_file_holds(shards):
    first = sorted(path.name for path in shards.glob("*.safetensors"))[0]
    change_index(shards, "model.ghost.weight", first)
    with pytest.raises(UserError, match=rf"places model\.ghost\.weight in {first}, which does not hold it"):
        load_decoder(shards)


def test_pickled_weights_are_refused(folder):
    (folder / SINGLE).unlink()
    with pytest.raises(UserError, match=r"has neither model\.safetensors nor .* Download \*\.safetensors into it"):
        load_decoder(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match=r"It holds pickled weights \(pytorch_model\.bin\), which can run code"):
        load_decoder(folder)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 8), (1, 8, 1), (4, 1, 2)])
def test_on_a_mesh(shape, llama, model):
    mesh = make_mesh(*shape)
    on_mesh = load_model(llama, mesh=mesh)
    tokens, mask = tiny.left_padded((5, 12, 9, 1), model.config.vocab_size)
    np.testing.assert_allclose(
        np.asarray(on_mesh.logits(tokens, mask)), np.asarray(model.logits(tokens, mask)), rtol=1e-4, atol=2e-5
    )
    gate = on_mesh.decoder.weights()["blocks.gate"]  # [3, 48, 32]: 48 over model, 32 over fsdp
    _, fsdp, ways = shape
    assert gate.addressable_shards[0].data.shape == (3, 48 // ways, 32 // fsdp)
    assert len(gate.sharding.device_set) == 8
    same_weights(on_mesh.decoder, model.decoder)


def test_axes_that_the_mesh_does_not_divide(llama, model):
    weights, whole = (m.decoder.weights() for m in (load_model(llama, mesh=make_mesh(model=5)), model))
    for path, array in weights.items():
        if path in ("embed", "unembed"):  # 312 rows and three of zeros
            assert array.shape == (315, 32) and array.addressable_shards[0].data.shape == (63, 32)
            assert not np.asarray(array[312:]).any()
        else:
            assert array.sharding.is_fully_replicated
        np.testing.assert_array_equal(np.asarray(array)[: len(whole[path])], whole[path])


def test_mesh_larger_than_the_machine():
    with pytest.raises(UserError, match="data=3 x fsdp=2 x model=2 needs 12 devices, there are 8. Ask for a smaller"):
        make_mesh(3, 2, 2)


@pytest.mark.parametrize("shape", [(0, 1, 1), (1, -1, 1)])
def test_mesh_without_devices(shape):
    with pytest.raises(UserError, match="mesh"):
        make_mesh(*shape)


def test_an_index_beside_a_single_file_that_it_does_not_name(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {Q0: "other.safetensors"}}))
    with pytest.raises(UserError, match="holds both model.safetensors and .*not clear which weights count"):
        load_model(folder)


def test_a_mixture_of_dtypes_loads_exactly(folder):
    tensors = load_file(folder / SINGLE)
    kinds = (np.float16, ml_dtypes.bfloat16, np.float32)
    mixed = {name: tensor.astype(kinds[i % 3]) for i, (name, tensor) in enumerate(sorted(tensors.items()))}
    save_file(mixed, folder / SINGLE, metadata={"format": "pt"})
    again = folder / "again"
    again.mkdir()
    shutil.copy(folder / "config.json", again)
    save_weights(load_decoder(folder), again)
    for name, tensor in load_file(again / SINGLE).items():
        np.testing.assert_array_equal(tensor, mixed[name].astype(np.float32))


def test_a_tied_checkpoint_with_another_unembedding(folder):
    tiny.edit_json(folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(
        UserError, match=r"ties its embeddings .* holds an lm_head\.weight that differs from model\.embed"
    ):
        load_decoder(folder)


@pytest.mark.parametrize(
    "ending,form",
    [("qweight", "AWQ or GPTQ"), ("g_idx", "GPTQ"), ("weight.absmax", "bitsandbytes"), ("weight_scale_inv", "fp8")],
)
def test_quantised_tensors_are_recognised(ending, form, folder):
    name = f"model.layers.0.mlp.up_proj.{ending}"
    save_file(load_file(folder / SINGLE) | {name: np.zeros(3, np.int32)}, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(
        UserError,
        match=rf"are quantised \({form}: it holds {name}, I32\), but its config.json has no quantization_config",
    ):
        load_decoder(folder)


def test_fp8_weights_without_scales(folder):
    tensors = load_file(folder / SINGLE)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(
        tensors | {name: tensors[name].astype(ml_dtypes.float8_e4m3fn)}, folder / SINGLE, metadata={"format": "pt"}
    )
    with pytest.raises(UserError, match=r"are quantised \(fp8: it holds model.*F8_E4M3\)"):
        load_decoder(folder)


PREFIXES = {
    "data parallel": (lambda name: f"module.{name}", "'module.' where none is expected"),
    "compiled": (lambda name: f"_orig_mod.{name}", "'_orig_mod.' where none is expected"),
    "merged in memory": (lambda name: f"base_model.model.{name}", "'base_model.model.' where none is expected"),
    "multimodal, 4": (lambda name: f"language_model.{name}", "'language_model.' where none is expected"),
    "multimodal, 5": (
        lambda name: name.replace("model.", "model.language_model.", 1),
        r"'model\.language_model\.' where 'model\.' is expected",
    ),
    "one layer": (lambda name: f"module.{name}" if ".2." in name else name, r"9 tensors are called otherwise"),
    "inside": (lambda name: name.replace("layers.0.", "layers.0._orig_mod."), r"layers\.0\._orig_mod\.\S+, expected"),
}


@pytest.mark.parametrize("sharded_too", [False, True])
@pytest.mark.parametrize("case", PREFIXES)
def test_names_that_differ_by_a_prefix(case, sharded_too, folder, shards, sharded, llama):
    """The error names the prefix, and its code makes a copy that loads."""
    rename, message = PREFIXES[case]
    source, whole = (shards, sharded) if sharded_too else (folder, llama)
    for path in source.glob("*.safetensors"):
        save_file({rename(n): t for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    if sharded_too:
        index = json.loads((source / INDEX).read_text())
        index["weight_map"] = {rename(n): file for n, file in index["weight_map"].items()}
        (source / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=message) as caught:
        load_decoder(source)
    assert "missing:" not in str(caught.value) and "unknown:" not in str(caught.value)
    exec(textwrap.dedent(str(caught.value).partition("\n\n")[2]), {})
    same_weights(load_decoder(f"{source}-renamed"), load_decoder(whole))


def test_names_with_a_prefix_and_a_tensor_missing(folder):
    tensors = load_file(folder / SINGLE)
    save_file({f"module.{n}": t for n, t in tensors.items() if n != NORM}, folder / SINGLE)
    with pytest.raises(UserError, match=rf"1 missing: {NORM}\. \d+ tensors are called otherwise"):
        load_decoder(folder)


def test_an_adapter_that_is_not_merged(folder):
    tensors = {f"base_model.model.{n}": t for n, t in load_file(folder / SINGLE).items()}
    tensors[f"base_model.model.{Q0}".replace("weight", "base_layer.weight")] = tensors.pop(f"base_model.model.{Q0}")
    tensors[f"base_model.model.{Q0}".replace("weight", "lora_A.default.weight")] = np.zeros((2, 32), np.float32)
    save_file(tensors, folder / SINGLE)
    with pytest.raises(UserError, match=r"saved from a PEFT model whose adapter is not merged: 2 tensors .*merge_and"):
        load_decoder(folder)


def test_an_adapter_in_place_of_weights(folder):
    (folder / SINGLE).unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a PEFT adapter of 'a base model', not a model"):
        load_decoder(folder)


def test_a_model_without_its_head(folder):
    change(folder, lm_head__weight=None)
    with pytest.raises(
        UserError, match=r"1 missing: lm_head\.weight\. .*config\.json must say tie_word_embeddings: true"
    ):
        load_decoder(folder)


@pytest.mark.parametrize("kind", ["folder", "pipe", "nothing"])
def test_weights_that_are_no_file(kind, folder):
    path = folder / SINGLE
    path.unlink()
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "nothing": lambda: path.symlink_to("gone")}[kind]()
    with pytest.raises(UserError, match=r"model\.safetensors could not be read \("):
        load_decoder(folder)


def test_weights_that_are_a_pointer_to_them(folder):
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=r"not a readable safetensors file .*run `git lfs pull`"):
        load_decoder(folder)


def test_names_that_are_code_are_not_part_of_what_users_copy(folder):
    tensors = load_file(folder / SINGLE)
    tensors = {f"module.{n}": t for n, t in tensors.items()} | {'module.x"); evil(".rotary_emb.inv_freq': np.ones(2)}
    save_file(tensors, folder / SINGLE)
    with pytest.raises(UserError, match="tensors are called otherwise") as caught:
        load_decoder(folder)
    assert "evil" not in str(caught.value).partition("\n\n")[2]


def test_a_mixture_with_a_layer_that_guesses_ahead(tmp_path):
    """Its tensors are passed over in loading and copied by an export; those of a layer after it are unknown. What decides between
    experts stays float32."""
    source = families.tiny_model(tmp_path / "source", "glm4_moe")
    tensors = load_file(source / SINGLE)
    correction = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[correction] = tensors[correction] + np.float32(6.9)
    tensors |= {n.replace("layers.2", "layers.3"): t for n, t in tensors.items() if "layers.2" in n}
    tensors["model.layers.3.eh_proj.weight"] = np.ones((32, 64), np.float32)
    save_file(tensors, source / SINGLE, {"format": "pt"})
    weights = jax.device_get(load_decoder(source, "bfloat16").weights())
    exact = {path for path, weight in weights.items() if weight.dtype == np.float32}
    assert exact == {"blocks.router", "blocks.router_correction"} and weights["blocks.q"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(weights["blocks.router_correction"][0], tensors[correction])
    exported(source, tmp_path / "out", verify=False)
    changed = differences(source, tmp_path / "out")
    assert "model.layers.2.mlp.shared_experts.down_proj.weight" in changed and not [
        n for n in changed if "layers.3" in n
    ]
    save_file(tensors | {"model.layers.4.eh_proj.weight": tensors[correction]}, source / SINGLE, {"format": "pt"})
    with pytest.raises(UserError, match=r"1 unknown: model\.layers\.4\.eh_proj\.weight"):
        load_decoder(source)
