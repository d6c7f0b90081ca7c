"""Fine-tuning with frozen stages: `--freeze`."""

import re

import pytest
import timm
import torch

import models  # noqa: F401  registers the models
from tests.helpers import ROOT, TINY
from tests.test_dense_options import TASKS


def test_frozen_stages_keep_their_weights(image_folder, tmp_path, run_in_process):
    donor = timm.create_model("alt_gvt_tiny", num_classes=3)
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    command = [*TINY, "--data-path", image_folder, "--output_dir", tmp_path / "run", "--warmup-epochs", "0"]
    command += ["--finetune", tmp_path / "weights.pth", "--drop-path", "0.3", "--auto-resume", "--lr", "1e-2"]
    for epochs in ("1", "2"):
        output, message = run_in_process(*command, "--freeze", "2", "--epochs", epochs)
        assert message is None, output
    content = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
    initial = donor.state_dict()
    frozen = {name for name in initial if re.match(r"(patch_embeds|pos_block|blocks)\.[01]\.", name)}
    assert {name for name in initial if torch.equal(content["model"][name], initial[name])} == frozen
    assert len(content["optimizer"]["state"]) == len(initial) - len(frozen)
    trained = sum(tensor.numel() for name, tensor in initial.items() if name not in frozen)
    assert f"parameters, {trained} of them trained, 3 classes" in output
    for freeze in ("0", "1"):
        _, message = run_in_process(*command, "--epochs", "3", "--freeze", freeze)
        assert "its optimizer does not fit these options" in message
        assert len(message.splitlines()) == 1


def test_frozen_stages_have_no_drop_path():
    torch.manual_seed(0)
    model = timm.create_model("alt_gvt_tiny", drop_path_rate=0.9)
    images = torch.randn(2, 3, 64, 64)
    for count in range(5):
        model.freeze_stages(count)
        model.train()
        runs = [model.forward_intermediates(images, intermediates_only=True) for _ in range(4)]
        random = [not all(torch.equal(maps[0], others) for others in maps[1:]) for maps in zip(*runs, strict=True)]
        assert random[:count] == [False] * count
        assert all(random[max(count, 1) :])  # the first stage has a single block, without drop path
        model(images).sum().backward()
        without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        assert without == {
            name for name in without if re.match(rf"(patch_embeds|pos_block|blocks)\.[0-{count}]\.", name)
        }
        assert ("blocks.0.0.attn.qkv.weight" in without) == (count > 0)
        model.zero_grad(set_to_none=True)


@pytest.mark.usefixtures("small_sets")
@pytest.mark.parametrize(("task", "prefix"), [("segmentation", "backbone."), ("detection", "backbone.body.")])
def test_frozen_stages_of_a_backbone_keep_their_weights(task, prefix, tmp_path):
    script, config, changes = TASKS[task]
    donor = timm.create_model("alt_gvt_tiny")
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    options = ["--freeze", "2", "--pretrained", str(tmp_path / "weights.pth"), "--work-dir", str(tmp_path / "run")]
    options += ["--device", "cpu", "--num_workers", "0"]
    script.main([str(ROOT / config), *options, "--cfg-options", *changes.split(), "weight_decay=0.5"])
    content = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
    initial = {name: tensor for name, tensor in donor.state_dict().items() if not name.startswith(("norm.", "head."))}
    kept = {name for name, tensor in initial.items() if torch.equal(content["model"][f"{prefix}{name}"], tensor)}
    assert kept == {name for name in initial if re.match(r"(patch_embeds|pos_block|blocks)\.[01]\.", name)}
