"""Settings check themselves, are read and written like nested dictionaries, and are recorded as they always were."""

import copy
import dataclasses
import json
import pickle

import pytest
from ml_collections import ConfigDict

from refusal_jax import UserError
from refusal_jax.errors import did_you_mean
from refusal_jax.files import to_json
from refusal_jax.settings import Settings
from refusal_jax.study.config import BehaviourSettings, StudyConfig, get_config

# What a manifest recorded for the defaults when they were an ml_collections.ConfigDict: runs of that time are resumed.
RECORDED = {
    "batch_size": 0, "cache": "", "chat_template": "", "dtype": "auto", "filter": True, "judges": ["substring_matching"],
    "model": "", "positions": None, "refusal_tokens": [], "thinking": False, "mesh": {"data": 0, "fsdp": 0, "model": 0},
    "data": {
        "harmful_test": "bundled", "harmful_train": "bundled", "harmful_val": "bundled", "harmless_test": "bundled",
        "harmless_train": "bundled", "harmless_val": "bundled", "n_test": 100, "n_train": 128, "n_val": 32,
        "over_refusal": [], "seed": 42,
    },
    "generation": {
        "batch_size": 0, "from_checkpoint": False, "max_new_tokens": 512, "conditions": [
            "harmful_baseline", "harmful_ablation", "harmful_actadd", "harmless_baseline", "harmless_actadd",
        ],
    },
    "loss": {"batch_size": 0, "chat_files": [], "text_files": [], "text_tokens": 256},
    "select": {
        "batch_size": 0, "full_grid": False, "induce_threshold": 0.0, "kl_threshold": 0.1, "prune_fraction": 0.2,
    },
}  # fmt: skip


def test_the_record_of_the_defaults():
    """The defaults are those of that time, and what manifests leave out (`study.run_stages`)."""
    later = {"download": False, "system_prompt": "", "behaviour": BehaviourSettings().to_dict()}
    assert json.loads(to_json(get_config().to_dict())) == RECORDED | later


def test_every_field_is_described():
    found = list(get_config().described())
    assert len({one.path for one in found}) == len(found) == 46
    assert all((len(one.meaning) > 15 and one.meaning[0].isalnum()) or one.meaning[0] in "(" for one in found)
    assert {one.path: one.value for one in found}["select.kl_threshold"] == 0.1


def test_old_config_files_work():
    """Attributes, items, nested updates, and the context that ConfigDict needs for new fields."""
    config = get_config()
    config.data.n_train = 5
    config["data"]["n_val"] = 4
    config.update({"select": {"kl_threshold": 1}, "judges": ["substring_extended"]}, model="m")
    config.update_from_flattened_dict({"mesh.model": 2, "refusal_tokens": ("I", 40)})
    with config.unlocked():
        config.positions = 3
    assert (config.data.n_train, config.data.n_val, config.model, config.positions) == (5, 4, "m", 3)
    assert config.judges == ("substring_extended",) and isinstance(config.select.kl_threshold, float)
    assert dict(config.mesh) == {"data": 0, "fsdp": 0, "model": 2}
    assert "select" in config and "selct" not in config and not hasattr(config, "selct") and config.get("x", 1) == 1
    copies = copy.deepcopy(config), pickle.loads(pickle.dumps(config)), StudyConfig.of(ConfigDict(config.to_dict()))
    assert all(one == config and one.data is not config.data for one in copies)
    config.data = {"n_train": 6}
    assert config.data.n_train == 6 and config.data.n_val == 32


WRONG = {
    "selct": ({"selct": {}}, r"^There is no setting config\.selct\. Did you mean select\?$"),
    "nested": ({"data": {"n_tain": 3}}, r"^There is no setting config\.data\.n_tain\. Did you mean n_train\?$"),
    "unlike": ({"mesh": {"zz": 3}}, r"config\.mesh\.zz\. The settings there are data, fsdp, model\.$"),
    "number": ({"select": {"kl_threshold": "high"}}, r"^config\.select\.kl_threshold = 'high', expected a number\.$"),
    "whole": ({"batch_size": 2.5}, r"config\.batch_size = 2\.5, expected a whole number"),
    "boolean": ({"batch_size": True}, r"config\.batch_size = True, expected a whole number"),
    "yes": ({"filter": "yes"}, r"config\.filter = 'yes', expected True or False"),
    "string": ({"model": 3}, r"config\.model = 3, expected a string"),
    "optional": ({"positions": "all"}, r"config\.positions = 'all', expected a whole number or None"),
    "tuple": ({"judges": "llm"}, r"config\.judges = 'llm', expected a tuple of strings"),
    "tokens": ({"refusal_tokens": (2.5,)}, r"config\.refusal_tokens = \(2\.5,\), expected a tuple of whole numbers and str"),
    "section": ({"data": 3}, r"config\.data = 3, expected a mapping of the settings of this section"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings(name):
    values, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        StudyConfig.of(values)


def test_attributes_that_are_no_fields():
    config = get_config()
    with pytest.raises(UserError, match=r"no setting config\.modl\. Did you mean model\?"):
        config.modl = "x"
    with pytest.raises(AttributeError, match=r"no setting config\.data\.n_trian\. Did you mean n_train\?"):
        print(config.data.n_trian)
    with pytest.raises(KeyError, match=r"no setting config\.x\."):
        print(config["x"])


def test_settings_of_another_module_are_copied():
    """A config file that is loaded twice has classes of its own, which are as good."""

    @dataclasses.dataclass
    class Other(Settings):
        model: str = "m"

    assert StudyConfig.of(Other()).model == "m" and len(Other()) == 1


def test_the_nearest_name():
    assert did_you_mean("Stuyd", ["study", "export"]) == " Did you mean study?"
    assert did_you_mean("llama3", ("llama-2", "llama-3", "gemma")) == " Did you mean llama-3?"
    assert did_you_mean("zzz", ["study"]) == "" and did_you_mean(None, []) == ""
