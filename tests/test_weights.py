"""Tests of all formats of weights and of files that are rejected."""

import argparse
import os
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch

from models import TwinsError, load_weights, read_weights
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def donor():
    return timm.create_model("alt_gvt_tiny", num_classes=10)


def assert_same_weights(model, state):
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("holder", [None, "model", "state_dict"])
def test_formats_of_weights(tmp_path, donor, holder, prefix):
    state = {prefix + name: tensor for name, tensor in donor.state_dict().items()}
    torch.save({holder: state, "epoch": 3} if holder else state, tmp_path / "weights.pth")
    model = timm.create_model("alt_gvt_tiny", num_classes=10)
    report = load_weights(model, tmp_path / "weights.pth")
    assert_same_weights(model, donor.state_dict())
    assert (report.loaded, report.adapted, report.skipped) == (len(state), [], [])


def test_safetensors(tmp_path, donor):
    safetensors.torch.save_file(donor.state_dict(), tmp_path / "model.safetensors")
    model = timm.create_model("alt_gvt_tiny", num_classes=10)
    load_weights(model, tmp_path / "model.safetensors")
    assert_same_weights(model, donor.state_dict())


def test_safetensors_is_only_needed_for_its_files(tmp_path, donor, monkeypatch):
    safetensors.torch.save_file(donor.state_dict(), tmp_path / "model.safetensors")
    torch.save(donor.state_dict(), tmp_path / "model.pth")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(TwinsError, match=r"model\.safetensors: install safetensors to read it \(pip install safetens"):
        read_weights(tmp_path / "model.safetensors")
    assert len(read_weights(tmp_path / "model.pth")) == len(donor.state_dict())


@pytest.mark.slow
def test_the_models_import_without_safetensors():
    code = "import sys; sys.modules['safetensors'] = sys.modules['safetensors.torch'] = None; import models"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_weights_of_the_timm_model(tmp_path):
    depths = (1, 1, 2, 1)
    source = timm.create_model("twins_svt_small", depths=depths)
    torch.save(source.state_dict(), tmp_path / "timm.pth")
    model = timm.create_model("alt_gvt_small", depths=depths)
    load_weights(model, tmp_path / "timm.pth")
    assert_same_weights(model, source.state_dict())


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema"])
def test_moving_average(tmp_path, donor, key):
    ema = {name: tensor + 1 for name, tensor in donor.state_dict().items()}
    torch.save({"model": donor.state_dict(), key: ema}, tmp_path / "checkpoint.pth")
    assert torch.equal(read_weights(tmp_path / "checkpoint.pth", ema=True)["norm.bias"], ema["norm.bias"])
    assert torch.equal(read_weights(tmp_path / "checkpoint.pth")["norm.bias"], donor.norm.bias)
    torch.save({"model": donor.state_dict(), "model_ema": None}, tmp_path / "plain.pth")
    with pytest.raises(ValueError, match=r"plain\.pth: contains no moving average"):
        read_weights(tmp_path / "plain.pth", ema=True)


def test_checkpoints_of_the_original_with_a_namespace(tmp_path, donor):
    args = argparse.Namespace(model="alt_gvt_tiny", lr=5e-4)
    torch.save({"model": donor.state_dict(), "args": args}, tmp_path / "original.pth")
    assert set(read_weights(tmp_path / "original.pth")) == set(donor.state_dict())


def test_finetuning_adapts_stem_and_head(tmp_path, donor):
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    model = timm.create_model("alt_gvt_tiny", num_classes=7, in_chans=1)
    head = model.head.weight.clone()
    report = load_weights(model, tmp_path / "weights.pth", finetune=True)
    assert report.skipped == ["head.weight", "head.bias"]
    assert report.adapted == ["patch_embeds.0.proj.weight (3 -> 1 input channels)"]
    assert report.loaded == len(donor.state_dict()) - 3
    assert "skipped head.weight, head.bias" in str(report)
    assert torch.equal(model.head.weight, head)
    stem = donor.patch_embeds[0].proj.weight
    torch.testing.assert_close(model.patch_embeds[0].proj.weight, stem.sum(dim=1, keepdim=True))
    torch.testing.assert_close(model.blocks[2][1].mlp.fc2.weight, donor.blocks[2][1].mlp.fc2.weight)


def test_finetuning_with_the_same_classes_keeps_the_head(tmp_path, donor):
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    model = timm.create_model("alt_gvt_tiny", num_classes=10)
    assert load_weights(model, tmp_path / "weights.pth", finetune=True).skipped == []
    assert torch.equal(model.head.weight, donor.head.weight)


@pytest.mark.parametrize("options", [{}, {"out_indices": (0, 1)}, {"stage_norm": True}], ids=str)
def test_features_take_the_weights_of_a_classifier(tmp_path, donor, options):
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    model = timm.create_model("alt_gvt_tiny", features_only=True, **options)
    report = load_weights(model, tmp_path / "weights.pth")
    expected = donor.state_dict()
    for name, tensor in model.model.state_dict().items():
        assert name.startswith("norm_list.") or torch.equal(tensor, expected[name]), name
    own = model.model.state_dict()
    assert set(report.skipped) == {name for name in expected if name not in own}
    assert set(report.new) == {name for name in own if name not in expected}
    assert report.loaded + len(report.skipped) == len(expected)
    with pytest.raises(ValueError, match="do not fit"):
        load_weights(timm.create_model("pcpvt_tiny", features_only=True), tmp_path / "weights.pth")


@pytest.mark.parametrize("finetune", [False, True])
def test_weights_of_another_model_are_refused(tmp_path, donor, finetune):
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    model = timm.create_model("pcpvt_tiny", num_classes=10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="do not fit") as caught:
        load_weights(model, tmp_path / "weights.pth", finetune=finetune)
    message = str(caught.value)
    assert "missing: blocks.0.0.attn.q.weight" in message
    assert "unexpected: blocks.0.0.attn.qkv.weight" in message
    assert "mismatched: blocks.0.0.mlp.fc1.weight (64, 32) in the file, (256, 32) in the model" in message
    assert "do not fit the model; choose the model that was trained with these weights. " in message
    assert len(message.removeprefix(str(tmp_path))) < 350
    assert "\n" not in message
    assert_same_weights(model, before)


def test_another_class_count_is_refused_without_finetuning(tmp_path, donor):
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"--finetune.*head\.bias \(10,\) in the file, \(7,\) in the model"):
        load_weights(timm.create_model("alt_gvt_tiny", num_classes=7), tmp_path / "weights.pth")


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def write_zip_with_code(path):
    torch.save({"model": {"weight": torch.ones(2)}, "extra": Exploit()}, path)


def write_pickle_with_code(path):
    path.write_bytes(pickle.dumps(Exploit()))


def write_truncated(path):
    torch.save({"model": {"weight": torch.ones(300, 300)}}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_truncated_legacy(path):
    torch.save({"model": {"weight": torch.ones(300)}}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("zip.pth", write_zip_with_code, r"rejected, because loading it could execute code \((posix|nt)\.mkdir\)"),
        ("pickle.pth", write_pickle_with_code, r"rejected, because loading it could execute code"),
        ("cut.pth", write_truncated, "cannot be read as weights; the file is damaged, truncated"),
        ("cut_legacy.pth", write_truncated_legacy, "cannot be read as weights; the file is damaged, truncated"),
        ("text.pth", lambda path: path.write_text("a page about weights\n"), "cannot be read as weights"),
        ("html.pth", lambda path: path.write_text("<html>404</html>"), "cannot be read as weights"),
        ("empty.pth", lambda path: path.touch(), "cannot be read as weights"),
        ("text.safetensors", lambda path: path.write_text("a page"), "cannot be read as weights"),
        ("list.pth", lambda path: torch.save([torch.ones(1)], path), "contains a list, not a checkpoint"),
        ("other.pth", lambda path: torch.save({"epoch": 3}, path), "contains no weights; .* but the file has epoch"),
        ("missing.pth", lambda path: None, "there is no such file"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, monkeypatch, name, write, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        read_weights(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()
