"""What the processes of `test_clients.py` run. A process imports this file, so it imports little."""

import sys

import timm
import torch
import torch.nn.functional as F
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import models  # noqa: F401  registers our models

IMAGES = torch.randn(4, 3, 64, 96, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4)
LEARNING_RATE = 0.1


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("alt_gvt_tiny", num_classes=5)


def take_step(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Take one step of SGD and return the loss before it."""
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    torch.optim.SGD(model.parameters(), LEARNING_RATE).step()
    return loss.item()


def train_sharded(rank: int, folder: str) -> None:
    """Take one step of a model that FSDP2 shards over two processes, and write the result."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = make_model()
    for stage in model.blocks:
        for block in stage:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    part = slice(2 * rank, 2 * rank + 2)
    loss = take_step(model, IMAGES[part], LABELS[part])
    state = {key: parameter.full_tensor().detach() for key, parameter in model.named_parameters()}
    torch.save({"loss": loss, "state": state, "held": held}, f"{folder}/{rank}.pth")
    distributed.destroy_process_group()


def train_by_lightning(folder: str) -> None:
    """Take the same step in two processes of Lightning; the main one writes the weights."""
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = make_model()

        def training_step(self, batch, _):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), LEARNING_RATE)

    torch.set_num_threads(1)
    module = Classifier()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, LABELS), batch_size=2)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, **quiet)
    trainer.fit(module, loader)
    if trainer.is_global_zero:
        torch.save({"state": module.model.state_dict(), "steps": trainer.global_step}, f"{folder}/lightning.pth")


if __name__ == "__main__":
    train_by_lightning(sys.argv[1])  # Lightning starts this file again for the second process
