import json

import pytest

from gpt_jax.checks import RENAMED
from gpt_jax.config import Config, flatten
from gpt_jax.errors import UserError
from gpt_jax.paths import ROOT as REPOSITORY
from gpt_jax.paths import text_file


def nested(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("model.n_layers", 4, "unknown setting model.n_layers: did you mean model.n_layer?"),
        ("model.n_\nlayer", 4, r"unknown setting model.'n_\\nlayer': did you mean model.n_layer"),
        ("nonsense", 4, "unknown setting nonsense: known: seed, init_from, model"),
        ("model", 4, "model = 4 must be a group of settings"),
        ("model.n_layer", "4", "model.n_layer = '4' must be of type int"),
        ("model.n_layer", 4.0, "model.n_layer = 4.0 must be of type int"),
        ("model.n_layer", True, "model.n_layer = True must be of type int"),
        ("model.n_layer", 0, "model.n_layer = 0 must be above 0"),
        ("model.conv_width", -1, "model.conv_width = -1 must be 0 or above"),
        ("model.conv_width", 65, "model.conv_width = 65 must be 64 or below"),
        ("model.query_blocks", 0, "model.query_blocks = 0 must be above 0"),
        ("model.query_blocks", 2**31, "model.query_blocks = 2147483648 must be 64 or below"),
        ("model.bias", 1, "model.bias = 1 must be of type bool"),
        ("model.n_head", 5, "model.d_model = 384 cannot be divided among model.n_head = 5"),
        ("model.dropout", 1.0, r"model.dropout = 1.0 must lie in \[0, 1\)"),
        (
            "model.norm",
            "batchnorm",
            "model.norm = 'batchnorm' must be one of 'layernorm', 'rmsnorm'",
        ),
        ("data.train_fraction", 1.0, "data.train_fraction = 1.0 must lie between 0 and 1"),
        ("optimizer.learning_rate", -1e-3, "optimizer.learning_rate = -0.001 must be above 0"),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate = nan must be a finite"),
        ("optimizer.warmup_steps", 6000, "optimizer.warmup_steps = 6000 is longer than the run"),
        ("optimizer.schedule", "cosin", "optimizer.schedule = 'cosin' must be one of"),
        ("train.steps", -1, "train.steps = -1 must be above 0"),
        (
            "train.grad_accum_steps",
            7,
            "train.batch_size = 64 cannot be split into train.grad_accum_steps",
        ),
        ("train.profile_steps", "5-6", "train.profile_steps = '5-6' must be the first and the last update"),
        ("train.profile_steps", "0:6", "as in '100:105', with 0 < first < last <= train.steps = 5000"),
        ("train.profile_steps", "6:6", "train.profile_steps = '6:6' must be"),
        ("train.profile_steps", "6:5001", "train.profile_steps = '6:5001' must be"),
        ("mesh.tensor", 4, "model.n_head = 6 cannot be split equally over mesh.tensor = 4 devices"),
        (
            "mesh.fsdp",
            5,
            "train.batch_size = 64 cannot be split equally over mesh.data x mesh.fsdp = 5 devices",
        ),
        (
            "mesh.data",
            128,
            "over mesh.data x mesh.fsdp = 128 devices: use a multiple of 128, or smaller values",
        ),
        ("seed", -1, "seed = -1 must lie in"),
    ],
)
def test_bad_values_are_named_in_one_line(key, value, message):
    with pytest.raises(UserError, match=message) as error:
        Config.from_dict(nested(key, value))
    assert "\n" not in str(error.value)


def test_rope_needs_pairs():
    with pytest.raises(UserError, match="'rope' rotates pairs of channels, but a head is 3 wide"):
        Config.from_dict({"model": {"d_model": 6, "n_head": 2, "position": "rope"}})


def test_an_int_serves_as_a_float():
    config = Config.from_dict({"optimizer": {"learning_rate": 1}})
    assert type(config.optimizer.learning_rate) is float


def test_json_and_config_dict_there_and_back():
    config = Config.from_dict({"seed": 7, "model": {"n_layer": 3}, "train": {"save_minutes": 0.5}})
    assert Config.from_dict(json.loads(config.to_json())) == config
    assert Config.from_dict(config.to_config_dict()) == config
    assert json.loads(config.to_json())["model"]["n_layer"] == 3
    assert flatten(config)["train.save_minutes"] == 0.5


def test_settings_cannot_change():
    with pytest.raises(AttributeError):
        Config().seed = 3


def test_paths():
    config = Config()
    assert text_file(config.data) == REPOSITORY / "artifacts" / "input.txt"
    relative = text_file(Config.from_dict({"data": {"path": "my.txt"}}).data)
    assert relative.is_absolute() and relative.name == "my.txt"


@pytest.mark.parametrize(
    "activation, d_mlp, width", [("gelu", 0, 512), ("swiglu", 0, 344), ("swiglu", 100, 100)]
)
def test_mlp_width(activation, d_mlp, width):
    model = {"d_model": 128, "n_head": 2, "activation": activation, "d_mlp": d_mlp}
    assert Config.from_dict({"model": model}).model.mlp_width == width


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_an_old_name_is_an_error_that_names_the_new_one(old, new):
    """In a config file; tests/test_commands.py tries it on the command line."""
    group, name = old.split(".")
    config = Config().to_config_dict()
    config[group][name] = 1
    with pytest.raises(UserError, match=f"^unknown setting {old}: it is now called {new}$"):
        Config.from_dict(config)
    new_group, new_name = new.split(".")
    assert new_name in Config().to_dict()[new_group]
