"""Faults that strike a checkpoint: a save ended at any place, files damaged, files made to do harm."""

import errno
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from disturb import files_of, spoil

from gpt_jax.errors import RunError, UserError
from gpt_jax.interchange.trained_model import load
from gpt_jax.paths import ROOT as REPOSITORY
from gpt_jax.storage import checkpoints as checkpoint
from gpt_jax.storage.checkpoints import METADATA, Checkpoints, read_metadata
from gpt_jax.storage.integrity import CHECKSUMS, DamagedError, seal
from gpt_jax.storage.metadata import FormatError, Metadata
from gpt_jax.trainer.run import train

pytestmark = pytest.mark.faults
slow = pytest.mark.slow
MANY = 10_000  # more file operations than a save has


def struck(library, folder, action, first, last=MANY, stride=1, log=None):
    """What `save_driver.py` says of each case, until one reached the end of the save untouched."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "LD_PRELOAD": str(library), "FAULT_ROOT": str(folder), "FAULT_DO": str(action),
        "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    if log:
        environment["FAULT_LOG"] = str(log)
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "tests" / "save_driver.py"), str(folder), str(first), str(last),
         str(stride)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
    )  # fmt: skip
    cases = []
    limit = threading.Timer(600, process.kill)
    limit.start()
    with process.stdout:
        for line in process.stdout:
            cases.append(json.loads(line))
            # How many operations there are changes a little with the order of threads.
            if len(cases) > 3 and all(case["status"] == 0 for case in cases[-3:]):
                process.kill()
                break
    limit.cancel()
    process.wait()
    return cases


def parts(quick_stride, n_parts):
    """A quick walk over every so many operations, and a slow one over all in several parts."""
    walk = [pytest.param(part, n_parts, marks=slow) for part in range(1, n_parts + 1)]
    return [pytest.param(3, quick_stride), *walk]


@pytest.mark.parametrize("first, stride", parts(23, 4))
@pytest.mark.parametrize(
    "action, statuses",
    [
        ("kill", {-9}),
        (errno.ENOSPC, {1}),
        pytest.param("tear", {-9}, marks=slow),
        pytest.param(errno.EIO, {1}, marks=slow),
    ],
)
def test_a_save_ended_between_any_two_file_operations(
    faults_library, tmp_path, action, statuses, first, stride
):
    """Killed, killed within a write, or with every later operation failing (ENOSPC, EIO)."""
    cases = struck(faults_library, tmp_path, action, first, stride=stride)
    done = [case for case in cases if case["status"] in statuses]
    assert len(done) > 100 / stride, cases
    assert {case["status"] for case in cases} <= statuses | {0}, cases
    assert not [case for case in cases if case["wrong"]]


def test_files_are_on_the_disk_before_names_and_names_before_deletions(faults_library, tmp_path):
    """write, fsync, rename, fsync of the folder, and only then the old ones go."""
    log = tmp_path / "log"
    struck(faults_library, tmp_path / "ops", "kill", MANY, MANY, log=log)
    lines = [line.split("\t") for line in log.read_text(encoding="utf-8").splitlines()]
    base = str(tmp_path / "ops" / "struck")
    done = lines.index(["rename", f"{base}/40.unfinished", f"{base}/40"])
    sealed = tmp_path / "ops" / "struck" / "40"
    names = [""] + [str(path.relative_to(sealed)) for path in sealed.rglob("*")]
    assert len(names) > 20
    checked = 0
    for name in names:
        path = f"{base}/40.unfinished/{name}".rstrip("/")
        synced = [n for n, line in enumerate(lines) if line[:2] == ["fsync", path] and n < done]
        assert synced, f"{name} is not forced to the disk before the rename"
        # What changes a file, and what changes the names in a folder.
        changes = [
            n for n, (what, a, b) in enumerate(lines)
            if n < done and (
                (what == "write" and a == path)
                or (what in ("open", "mkdir", "delete", "rename")
                    and path in (a, b, os.path.dirname(a), os.path.dirname(b)))
            )
        ]  # fmt: skip
        assert max(changes, default=0) < synced[-1], name
        checked += bool(changes)
    assert checked >= 3  # our own files and the folder; the store's were written under another name
    named = next(n for n, line in enumerate(lines) if line[:2] == ["fsync", base] and n > done)
    removed = [n for n, (what, a, _) in enumerate(lines) if what in ("rename", "delete") and "/10" in a]
    assert done < named < removed[0]
    assert lines[removed[0]] == ["rename", f"{base}/10", f"{base}/10.deleted"]


@pytest.mark.slow
def test_what_the_saving_thread_raises_ends_training(tiny_config, tmp_path, monkeypatch):
    config = tiny_config()
    assert train(config, tmp_path / "run") == 0

    def broken(folder):
        raise ValueError(f"cannot seal {folder.name}")

    monkeypatch.setattr(checkpoint, "seal", broken)
    longer = tiny_config(train={"steps": 50})
    message = (
        "step 30 could not be saved in .*: ValueError: cannot seal 30.unfinished; the one of step 20 is kept"
    )
    with pytest.raises(RunError, match=message):
        train(longer, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["10", "20"]
    monkeypatch.undo()
    assert train(longer, tmp_path / "run") == 0


@pytest.fixture(scope="module")
def trained(tiny_run):
    """A small run with two checkpoints; tests take copies of it."""
    assert Checkpoints(tiny_run / "checkpoints").steps() == [10, 20]
    return tiny_run


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.slow
def test_every_file_damaged_in_every_way_is_noticed_and_named(workdir):
    """Each deleted, truncated, and with its first, middle and last byte changed; and 200 random bytes."""
    step = workdir / "checkpoints" / "20"
    checkpoints = Checkpoints(workdir / "checkpoints")
    chance = random.Random(0)
    files = files_of(step)
    places = [(path, how, place) for path in files for how, place in (
        ("delete", 0), ("truncate", 0), ("flip", 0), ("flip", path.stat().st_size // 2), ("flip", -1),
    )]  # fmt: skip
    for path in chance.choices(files, k=200):
        places.append((path, "flip", chance.randrange(path.stat().st_size)))
    checkpoints.verify(20)
    for path, how, place in places:
        good = path.read_bytes()
        spoil(path, how, place)
        with pytest.raises(DamagedError, match=re.escape(str(path.relative_to(step)))):
            checkpoints.verify(20)
        path.write_bytes(good)
    (step / "params" / "new").write_text("x", encoding="utf-8")
    with pytest.raises(DamagedError, match="params/new is not listed in SHA256SUMS"):
        checkpoints.verify(20)
    (step / "params" / "new").unlink()
    checkpoints.verify(20)
    assert len(places) > 300


def test_a_damaged_checkpoint_is_never_sampled_from(workdir, capsys):
    good = load(workdir, "last").params
    spoil(files_of(workdir / "checkpoints" / "20" / "params")[0], "flip", 3)
    run = load(workdir, "last")
    assert run.step == 10 and run.metadata.step == 10
    assert re.search(
        r"WARNING: checkpoint \S+/20 is damaged: params/\S+ was changed. Trying an older",
        capsys.readouterr().err,
    )
    assert not np.array_equal(run.params["final_norm"]["scale"], good["final_norm"]["scale"])
    spoil(workdir / "checkpoints" / "10" / METADATA, "delete")
    with pytest.raises(RunError, match=r"are damaged \(20, 10\); nothing was changed"):
        load(workdir, "best")


def test_a_renamed_checkpoint_is_not_taken_for_another_step(workdir, capsys):
    (workdir / "checkpoints" / "20").rename(workdir / "checkpoints" / "99")
    assert load(workdir, "last").step == 10
    assert "checkpoints/99: metadata.json: it belongs to step 20. Trying an older" in capsys.readouterr().err


def test_what_becomes_known_later(tmp_path):
    """It is read with the metadata, decides about the best, and goes with its checkpoint."""
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder)
    items = {"params": {"a": jnp.ones(3)}}
    for step in (10, 20):
        checkpoints.save(step, items, {"step": step, "val_loss": None, "unfinished": {"step": step}})
    checkpoints.amend(10, {"val_loss": 1.0, "unfinished": None})
    checkpoints.amend(20, {"val_loss": 2.0})
    checkpoints.amend(20, {"val_loss_part": 0.5})  # a second change does not undo the first
    checkpoints.close()

    checkpoints = Checkpoints(folder)
    assert checkpoints.metadata(10) == {"step": 10, "val_loss": 1.0, "unfinished": None}
    assert checkpoints.metadata(20) == {
        "step": 20, "val_loss": 2.0, "unfinished": {"step": 20}, "val_loss_part": 0.5,
    }  # fmt: skip
    assert checkpoints.best_first() == [20, 10] and checkpoints.selection_key(20) == (0.5, -20)
    checkpoints.verify(10)
    checkpoints.verify(20)
    for step in (30, 40):
        checkpoints.save(step, items, {"step": step, "val_loss": None})
    checkpoints.wait()
    assert sorted(path.name for path in folder.iterdir()) == ["20", "20.amended.json", "30", "40"]
    checkpoints.close()


@pytest.mark.parametrize("how", ["delete", "truncate", "flip", "of another", "pipe"])
def test_a_damaged_amendment_is_as_none(tmp_path, how):
    """What it said can be computed again; what it belongs to is whole."""
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder)
    for step in (10, 20):
        checkpoints.save(step, {"params": {"a": jnp.full(3, step)}}, {"step": step, "val_loss": 3.0})
        checkpoints.amend(step, {"val_loss": 1.25})
    path = folder / "20.amended.json"
    if how == "of another":
        shutil.copy(folder / "10.amended.json", path)
    elif how == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        spoil(path, how, path.read_text(encoding="utf-8").index("25"))
    assert checkpoints.metadata(20) == {"step": 20, "val_loss": 3.0}
    assert checkpoints.best_first() == [10, 20]
    checkpoints.verify(20)
    shutil.rmtree(folder / "10")
    checkpoints.prepare()
    assert not (folder / "10.amended.json").exists()
    checkpoints.close()


def test_a_checkpoint_that_is_deleted_meanwhile_is_no_damage(workdir, capsys, monkeypatch):
    """A sampler reads while a trainer deletes."""
    verify = Checkpoints.verify

    def deleted(self, step):
        if step == 20:
            shutil.rmtree(self.folder / "20")
        verify(self, step)

    monkeypatch.setattr(Checkpoints, "verify", deleted)
    assert load(workdir, "last").step == 10
    assert capsys.readouterr().err == ""


def test_an_array_of_another_shape_is_named_with_both(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"params": {"a": {"kernel": jnp.zeros((2, 3))}, "old": jnp.zeros(1)}}, {})
    checkpoints.wait()
    a = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    with pytest.raises(UserError, match=r"params.a.kernel has shape \(2, 3\) there, \(2, 4\) in the model"):
        checkpoints.restore(1, {"params": {"a": {"kernel": a}}})
    a = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    with pytest.raises(UserError, match=r"params.old has shape \(1,\) there, none in the model"):
        checkpoints.restore(1, {"params": {"a": {"kernel": a}}})
    with pytest.raises(UserError, match=r"params.new has shape none there, \(2, 3\) in the model"):
        checkpoints.restore(
            1, {"params": {"a": {"kernel": a}, "old": jax.ShapeDtypeStruct((1,), jnp.float32), "new": a}}
        )
    checkpoints.close()


# Files made to do harm: their checksums are right, since whoever made them made those too.


class Harmful:
    """Unpickled, it makes the file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


def only(workdir, step):
    """Leave one checkpoint, so that no other can be taken."""
    for path in (workdir / "checkpoints").iterdir():
        if path.name != str(step):
            shutil.rmtree(path)
    return workdir / "checkpoints" / str(step)


def reseal(step):
    (step / CHECKSUMS).unlink(missing_ok=True)
    seal(step)


def test_a_pickle_anywhere_runs_no_code(workdir, tmp_path):
    step, canary = only(workdir, 20), tmp_path / "canary"
    harm = pickle.dumps(Harmful(canary))
    pickle.loads(harm)
    assert canary.exists()  # it works
    canary.unlink()
    refused = 0
    for path in files_of(step):
        if path.name == CHECKSUMS:
            continue
        good = path.read_bytes()
        path.write_bytes(harm)
        reseal(step)
        try:
            load(workdir)
        except (UserError, RunError):
            refused += 1
        assert not canary.exists(), path
        path.write_bytes(good)
    assert refused >= 4  # metadata.json, and what of params holds arrays; the rest is not read


@pytest.mark.parametrize("name", ["../../../outside", "/etc/hostname", "params/../../../outside", "a\nb"])
def test_names_that_lead_outside_lead_nowhere(workdir, name):
    step = only(workdir, 20)
    (workdir.parent / "outside").write_text("x", encoding="utf-8")
    lines = (step / CHECKSUMS).read_text(encoding="utf-8").rpartition("# ")[0] + f"{'0' * 64}  {name}\n"
    (step / CHECKSUMS).write_text(
        f"{lines}# {hashlib.sha256(lines.encode()).hexdigest()}\n", encoding="utf-8"
    )
    with pytest.raises(RunError, match="are damaged"):
        load(workdir)


@pytest.mark.parametrize("kind", ["link", "folder link", "step link", "pipe", "pipe for checksums"])
def test_links_and_pipes_are_refused(workdir, tmp_path, kind):
    step = only(workdir, 20)
    target = {"folder link": step / "params", "step link": step}.get(
        kind, step / (CHECKSUMS if "checksums" in kind else METADATA)
    )
    target.rename(tmp_path / "elsewhere")
    if "pipe" in kind:
        os.mkfifo(target)
    else:
        target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="are damaged"):
        load(workdir)


HOSTILE_LOADER = r"""
import json, re, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from gpt_jax.errors import RunError, UserError
from gpt_jax.interchange.trained_model import load
load(sys.argv[2])

def peak():  # KiB, of this program alone: ru_maxrss begins at its parent's
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])

before = peak()
for workdir in sys.argv[3:]:
    try:
        load(workdir)
        said = "loaded"
    except (RunError, UserError) as error:
        said = str(error)
    print(json.dumps([workdir, said, peak() - before]), flush=True)
block = np.ones(2**27)
print(json.dumps(["1 GiB", "made", peak() - before]))
"""


def hostile_length(step):
    """An OCDBT file begins with 4 bytes of its own and 8 of its length."""
    for path in (step / "params").rglob("manifest.ocdbt"):
        data = bytearray(path.read_bytes())
        data[4:12] = (10 * 2**30).to_bytes(8, "little")
        path.write_bytes(data)


def hostile_shape(step):
    """An array of 64 GB that takes no room: settings, metadata and store agree, and no chunk is there."""
    metadata = json.loads((step / METADATA).read_text(encoding="utf-8"))
    metadata["config"]["model"]["d_mlp"] = 10**9
    (step / METADATA).write_text(json.dumps(metadata), encoding="utf-8")
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{step / 'params'}/"}).result()
    for key, old, new in (("blocks.mlp.up.kernel", 64, 10**9), ("blocks.mlp.down.kernel", 64, 10**9)):
        name = f"{key}/.zarray".encode()
        array = json.loads(store.read(name).result().value)
        for field in ("shape", "chunks"):
            array[field] = [new if size == old else size for size in array[field]]
        store.write(name, json.dumps(array).encode()).result()
    for path in (step / "params" / "array_metadatas").iterdir():
        path.unlink()


def hostile_settings(step):
    metadata = json.loads((step / METADATA).read_text(encoding="utf-8"))
    metadata["config"]["model"] |= {"n_layer": 2**31, "d_model": 2**31, "n_head": 1, "d_mlp": 2**31}
    (step / METADATA).write_text(json.dumps(metadata), encoding="utf-8")


def hostile_depth(step):
    for path in (step / METADATA, step / "params" / "_METADATA", step / "_CHECKPOINT_METADATA"):
        path.write_text("[" * 1_000_000, encoding="utf-8")


def hostile_nesting(step):
    """Not deep enough for the JSON parser to give up."""
    (step / METADATA).write_text('{"config": ' + "[" * 700 + "]" * 700 + "}", encoding="utf-8")


def hostile_size(step):
    with (step / METADATA).open("r+b") as file:
        file.truncate(2**33)  # 8 GB, of which none is on the disk


HOSTILE = [hostile_length, hostile_shape, hostile_settings, hostile_depth, hostile_nesting, hostile_size]


@slow
def test_bombs_are_refused_in_bounded_time_and_memory(trained, tmp_path):
    for make in HOSTILE:
        shutil.copytree(trained, tmp_path / make.__name__)
        step = only(tmp_path / make.__name__, 20)
        make(step)
        reseal(step)
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE_LOADER, str(REPOSITORY), str(trained),
         *(str(tmp_path / make.__name__) for make in HOSTILE)],
        capture_output=True, text=True, encoding="utf-8", timeout=120,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    )  # fmt: skip
    said = {
        Path(workdir).name: (said, grown)
        for workdir, said, grown in map(json.loads, done.stdout.splitlines())
    }
    assert said.pop("1 GiB", ("", 0))[1] > 900_000, done.stderr  # the measure does grow
    assert said.keys() == {make.__name__ for make in HOSTILE}, done.stderr
    for name, (what, grown) in said.items():
        assert what != "loaded", name
        assert grown < 1_000_000, f"{name}: {grown} KiB"  # the 8 GB file is read for its checksum, in parts
    assert re.search(r"claims 128,\d+,\d+,\d+ bytes of params in [\d,]{6,8} on disk", done.stderr), (
        done.stderr
    )


@pytest.mark.slow
def test_ten_thousand_mutated_metadata_files(workdir):
    """Each is read as what it says, or refused in one line; never anything else."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    path = workdir / "checkpoints" / "20" / METADATA
    good = path.read_bytes()
    chance = random.Random(0)
    refused = read = 0
    tokens = [
        b"null",
        b"true",
        b"-1",
        b"1e999",
        b"NaN",
        b"[]",
        b"{}",
        b'"x"',
        b"9" * 30,
        b"9" * 400,
        b"9" * 5000,
        b"0.5",
        b"\xff",
    ]
    for _ in range(10_000):
        data = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            place = chance.randrange(len(data))
            match chance.randrange(4):
                case 0:
                    data[place] = chance.randrange(256)
                case 1:
                    del data[place : place + chance.randrange(1, 30)]
                case 2:
                    data[place:place] = chance.choice(tokens)
                case 3:  # a value by another one
                    values = list(re.finditer(rb'(?<=: )("[^"]*"|[\d.]+|null|true|false)', data))
                    value = chance.choice(values)
                    data[value.start() : value.end()] = chance.choice(tokens)
        path.write_bytes(data)
        try:
            assert isinstance(read_metadata(checkpoints, 20), Metadata)
            read += 1
        except (DamagedError, FormatError) as error:  # a mutated name is one of another version
            assert "\n" not in str(error)
            refused += 1
        assert checkpoints.best_first()[-1] in (10, 20)
    assert refused > 5_000 and read > 100, (refused, read)
