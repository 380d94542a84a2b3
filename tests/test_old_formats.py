"""Models written by older versions of the code stay readable: loaded, evaluated, sampled, trained on.

tests/data/README.md says how the files were made.
"""

import json
import shutil

import pytest

import gpt_jax
from gpt_jax.config import REPOSITORY, Config
from gpt_jax.corpus import read_text
from gpt_jax.trainer import train

DATA = REPOSITORY / "tests" / "data"
VALIDATION = slice(1800, None)  # of the 2,000 characters of text.txt

# Losses and texts as the code that wrote the files gave them.
OLD_MODELS = {
    "run_v1": (10, 2.0910552, "to be be be be be be be be be be be be be be "),
    "export_v1": (20, 2.4570806, "to be" + 40 * " "),
}


@pytest.mark.parametrize("name", OLD_MODELS)
def test_an_old_model_is_read_and_sampled(name):
    step, val_loss, text = OLD_MODELS[name]
    run = gpt_jax.load(DATA / name)
    assert run.step == step
    assert run.loss(read_text(DATA / "text.txt")[0][VALIDATION]) == pytest.approx(val_loss, abs=1e-5)
    assert "to be" + run.generate("to be", length=40, greedy=True) == text


def test_an_old_run_trains_on_nearly_as_it_would_have(tmp_path, capsys):
    """Muon with a moving average and skipped spikes, bigrams, convolution, dropout in two micro-batches.

    The losses are those of today's dropout masks; it drew them in another way and reached 1.9038 and 1.9066.
    """
    workdir = tmp_path / "run"
    shutil.copytree(DATA / "run_v1", workdir)
    values = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    values["data"]["path"] = str(DATA / "text.txt")
    values["mesh"]["data"] = 1  # the tests have eight devices, and four windows cannot be shared by them
    assert train(Config.from_stored(values), workdir) == 0
    said = capsys.readouterr().out
    assert "dtype   the checkpoint does not record its precision: continuing in float32" in said
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [5, 10, 15, 20]
    assert records[-1]["train_loss"] == pytest.approx(1.9035196, abs=1e-3)
    assert records[-1]["val_loss"] == pytest.approx(1.9065072, abs=1e-3)
