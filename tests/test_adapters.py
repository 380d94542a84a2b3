"""LoRA: what is trained, what is saved, and that the merged model is the trained one."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from test_foreign import random_model

import gpt_jax
from gpt_jax.adapters import adapting, join, merge, trained
from gpt_jax.errors import UserError
from gpt_jax.interchange.exporting import export
from gpt_jax.model.params import count_params, init_params, name_leaves

MODELS = {
    "gpt2": {"bias": True},
    "llama": {"norm": "rmsnorm", "position": "rope", "activation": "swiglu", "n_kv_head": 2, "d_head": 6},
    "rematerialised": {"remat": "elementwise", "unroll": "no"},
}
TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 60
TINY = {
    "model": {"n_layer": 2, "n_head": 2, "d_model": 16, "context": 16},
    "train": {"steps": 30, "batch_size": 8, "eval_every": 15, "sample_length": 0},
    "optimizer": {"warmup_steps": 2, "learning_rate": 1e-2},
}


@pytest.mark.parametrize("name", MODELS)
def test_merged_adapters_compute_what_intercepted_ones_do(name):
    model = random_model(**MODELS[name])
    with adapting(3):
        adapters = trained(nn.unbox(init_params(model.module, jax.random.key(2))))
    tokens = jnp.arange(20)[None]
    plain = model.module.apply({"params": model.params}, tokens)[0]

    def adapted(adapters):
        with adapting(3):
            return model.module.apply({"params": join(model.params, adapters)}, tokens)[0]

    np.testing.assert_array_equal(adapted(adapters), plain)  # B begins with zeros
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    merged = model.module.apply({"params": merge(model.params, adapters)}, tokens)[0]
    np.testing.assert_allclose(adapted(adapters), merged, rtol=0, atol=1e-4)
    assert abs(merged - plain).max() > 0.1
    kernels = [
        name for name in name_leaves(model.params) if name.startswith("blocks") and name.endswith("kernel")
    ]
    assert len(name_leaves(adapters)) == 2 * len(kernels)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A run on a text, and another text with the same characters."""
    folder = tmp_path_factory.mktemp("parent")
    (folder / "text.txt").write_text(TEXT)
    (folder / "other.txt").write_text(TEXT[::-1])
    gpt_jax.train(TINY | {"data": {"path": str(folder / "text.txt")}}, folder / "run")
    return folder


def settings(parent, **model):
    return TINY | {
        "data": {"path": str(parent / "other.txt")},
        "init_from": str(parent / "run"),
        "model": {"context": 16, "lora_rank": 2} | model,
    }


def test_only_adapters_are_trained_and_saved(parent, tmp_path):
    before = gpt_jax.load(parent / "run")
    model = gpt_jax.train(settings(parent), tmp_path / "run")
    other = (parent / "other.txt").read_text()
    assert model.loss(other) < before.loss(other) - 0.05
    assert model.config.model.lora_rank == 0  # merged
    assert model.metadata.val_loss == pytest.approx(model.history[-1]["val_loss"], rel=1e-5)
    changed = {
        name
        for (name, old), new in zip(
            name_leaves(before.params).items(), jax.tree.leaves(model.params), strict=True
        )
        if not np.array_equal(old, new)
    }
    assert changed == {
        f"blocks.{name}.kernel" for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    }
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    adapters = 2 * 2 * ((16 + 48) + (16 + 16) + (16 + 64) + (64 + 16))  # layers, rank, widths
    assert facts["trained_parameters"] == adapters < facts["parameters"] == count_params(before.params)
    saved = (tmp_path / "run" / "checkpoints" / "30" / "params" / "_METADATA").read_text()
    assert "lora_a" in saved and "kernel'" not in saved


def test_a_stopped_run_ends_with_the_same_adapters(parent, tmp_path):
    whole = gpt_jax.train(settings(parent), tmp_path / "whole")

    def stop(info):
        if info.step == 20:
            trainer.stop()

    callbacks = [gpt_jax.Callback(stop, every=10)]
    trainer = gpt_jax.Trainer(settings(parent), tmp_path / "parts", callbacks=callbacks)
    trainer.train()
    parts = trainer.train()
    assert parts.step == whole.step == 30
    jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)


def test_an_export_has_the_merged_parameters(parent, tmp_path):
    model = gpt_jax.train(settings(parent), tmp_path / "run")
    export(model, tmp_path / "exported")
    back = gpt_jax.load(tmp_path / "exported")
    jax.tree.map(np.testing.assert_array_equal, back.params, model.params)
    again = gpt_jax.train(settings(parent) | {"init_from": str(tmp_path / "run")}, tmp_path / "again")
    assert again.metadata.parent["path"] == str(tmp_path / "run")


def test_a_parent_that_is_gone_or_changed_is_one_line(parent, tmp_path):
    shutil.copytree(parent / "run", tmp_path / "parent")
    values = settings(parent) | {"init_from": str(tmp_path / "parent")}
    gpt_jax.train(values, tmp_path / "run")
    shutil.rmtree(tmp_path / "parent")
    with pytest.raises(UserError, match="which this run adapts, cannot be read: no trained model in"):
        gpt_jax.load(tmp_path / "run")
    with pytest.raises(UserError, match="which this run adapts, cannot be read: no trained model in"):
        gpt_jax.train(values, tmp_path / "run")
    gpt_jax.train(TINY | {"seed": 5, "data": {"path": str(parent / "text.txt")}}, tmp_path / "parent")
    with pytest.raises(UserError, match="has other parameters than"):
        gpt_jax.load(tmp_path / "run")


def test_settings_that_do_not_go_with_adapters_are_one_line(parent, tmp_path):
    with pytest.raises(UserError, match=r"model\.lora_rank = 2 needs a model.* --config\.init_from"):
        gpt_jax.train(TINY | {"model": {"lora_rank": 2}}, tmp_path / "run")
    text = tmp_path / "new.txt"
    text.write_text((TEXT + "0123456789\n") * 3)
    data = {"path": str(text), "extend_vocabulary": True}
    with pytest.raises(UserError, match=r"extend_vocabulary = True does not go with model\.lora_rank"):
        gpt_jax.train(settings(parent) | {"data": data}, tmp_path / "run")
    assert not (tmp_path / "run").exists()
