"""Strict loading of weights in all released formats, with a report.

The files are `.pth` and `.safetensors`. They hold a bare state dict, or a checkpoint of the original or of this code
(`model`, `model_ema`) or of timm (`state_dict`, `state_dict_ema`). Parameter names may have the prefixes of
DistributedDataParallel and torch.compile. Code in a file is never executed.
"""

import argparse
import os
import pickle
import pickletools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.models import adapt_input_conv
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from .twins import TwinsError

MODEL_KEYS = ("model", "state_dict")
EMA_KEYS = ("model_ema", "state_dict_ema")
# Modules of a classifier that a backbone may lack: dense tasks and timm's `features_only` use only some.
OPTIONAL = ("norm.", "head.", "patch_embeds.", "pos_block.", "blocks.")


@dataclass
class LoadReport:
    """Report of a load: names of tensors, and their number."""

    source: str  # name of the weights
    loaded: int = 0  # without a change
    adapted: list[str] = field(default_factory=list)  # loaded with a change
    skipped: list[str] = field(default_factory=list)  # in the source, but not loaded
    new: list[str] = field(default_factory=list)  # in the model, but not in the source

    def __str__(self) -> str:
        text = f"{self.source}: loaded {self.loaded} tensors"
        for what, names in (("adapted", self.adapted), ("skipped", self.skipped), ("new", self.new)):
            if names:
                text += f"; {what} {', '.join(names)}"
        return text


def load_weights(model: nn.Module, path: str | Path, *, ema: bool = False, finetune: bool = False) -> LoadReport:
    """Load weights from a file into a model; see `read_weights` and `load_state_dict`.

    A model built with `features_only=True` takes the weights of a classifier, see `load_backbone`.
    """
    state = read_weights(path, ema=ema)
    if isinstance(model, FeatureGetterNet):
        return load_backbone(model.model, state, source=str(path), finetune=finetune)
    return load_state_dict(model, state, source=str(path), finetune=finetune)


def read_weights(path: str | Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Read weights, or with `ema` their moving average, in any of the formats above; return a state dict of our models.

    Raises:
        TwinsError: If the file is missing or damaged, would execute code, or does not contain these weights.
    """
    content = read_file(path)
    keys = EMA_KEYS if ema else MODEL_KEYS
    holder = next((key for key in keys if isinstance(content.get(key), dict)), None)
    if holder is not None:
        content = content[holder]
    elif ema:
        raise TwinsError(f"{path}: contains no moving average (EMA) of the weights; load the weights themselves")
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise TwinsError(
            f"{path}: contains no weights; a state dict is expected, bare or under one of {', '.join(keys)}, "
            f"but the file has {shorten(content, 6)}"
        )
    # Without the prefixes of DistributedDataParallel and torch.compile.
    return {re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")): tensor for name, tensor in content.items()}


def read_file(path: str | Path) -> dict:
    """Read a checkpoint to the CPU without executing code; raises a TwinsError as `read_weights` does."""
    path = Path(path)
    if not os.path.isfile(path):
        what = "this is a folder; name a file in it" if os.path.isdir(path) else "there is no such file"
        raise TwinsError(f"{path}: {what}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # safetensors is optional

            return load_file(path)
        # Checkpoints of the original contain their arguments as a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise TwinsError(f"{path}: install safetensors to read it (pip install safetensors)") from error
    except OSError as error:
        raise TwinsError(f"{path}: cannot be read ({error})") from error
    except Exception as error:  # torch and safetensors raise many kinds of errors for a bad file
        raise TwinsError(f"{path}: {_why_unreadable(path, error)}") from error
    if not isinstance(content, dict):
        raise TwinsError(f"{path}: contains a {type(content).__name__}, not a checkpoint; a dict is expected")
    return content


def load_state_dict(model: nn.Module, state: dict[str, Tensor], *, source: str, finetune: bool = False) -> LoadReport:
    """Load a state dict strictly into a model and return a report.

    Args:
        model: Model of this package or of timm.
        state: Tensors by parameter name.
        source: Name of the weights, used in messages.
        finetune: True to adapt stem and head: for another number of input channels the weights of the stem are summed
            or repeated, as timm does; for another number of classes the head keeps its initialisation.

    Raises:
        TwinsError: If keys are missing, unexpected or of another shape. The model is unchanged.
    """
    own = model.state_dict()
    state = dict(state)
    report = LoadReport(source)
    if finetune:
        _adapt_stem(model, own, state, report)
        _drop_head(model, own, state, report)
    missing = [name for name in own if name not in state and name not in report.skipped]
    unexpected = [name for name in state if name not in own]
    mismatched = [
        f"{name} {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if missing or unexpected or mismatched:
        lists = {"missing": missing, "unexpected": unexpected, "mismatched": mismatched}
        lists = {what: names for what, names in lists.items() if names}
        limit = 4 - len(lists)  # the message stays short
        found = "; ".join(f"{len(names)} {what}: {shorten(names, limit)}" for what, names in lists.items())
        raise TwinsError(f"{source}: these weights do not fit the model; {_remedy(model, lists)}. {found}")
    model.load_state_dict(state, strict=False)
    report.loaded = len(state) - len(report.adapted)
    return report


def load_backbone(backbone: nn.Module, state: dict[str, Tensor], *, source: str, finetune: bool = False) -> LoadReport:
    """Load the weights of a classifier strictly into a backbone; see `load_state_dict`.

    The head, the final norm and the stages that the backbone does not have are skipped. Norms between stages, which a
    classifier does not have, keep their initialisation.

    Raises:
        TwinsError: If the weights do not fit, or are the weights of a whole segmentation or detection network.
    """
    if any(name.startswith("backbone.") for name in state):
        raise TwinsError(f"{source}: contains a whole network, not a classifier; start from it with --finetune")
    own = backbone.state_dict()
    modules = {_module(name) for name in own}
    used = {name: tensor for name, tensor in state.items() if not name.startswith(OPTIONAL) or _module(name) in modules}
    new = {name: own[name] for name in own if name.startswith("norm_list.") and name not in used}
    report = load_state_dict(backbone, new | used, source=source, finetune=finetune)
    report.loaded -= len(new)
    report.new += new
    report.skipped += [name for name in state if name not in used]
    return report


def _adapt_stem(model: nn.Module, own: dict[str, Tensor], state: dict[str, Tensor], report: LoadReport) -> None:
    """Sum or repeat the weights of the first convolution to fit the number of input channels."""
    for module in _layer_names(model, "first_conv"):
        name = f"{module}.weight"
        if name not in state or name not in own:
            continue
        channels = own[name].shape[1]
        if channels != 3 == state[name].shape[1]:  # other than RGB weights are reported as mismatched
            state[name] = adapt_input_conv(channels, state[name])
            report.adapted.append(f"{name} (3 -> {channels} input channels)")


def _drop_head(model: nn.Module, own: dict[str, Tensor], state: dict[str, Tensor], report: LoadReport) -> None:
    """Skip heads for another number of classes."""
    for module in _layer_names(model, "classifier"):
        names = [f"{module}.weight", f"{module}.bias"]
        if any(name in own and name in state and own[name].shape != state[name].shape for name in names):
            for name in names:
                if state.pop(name, None) is not None:
                    report.skipped.append(name)


def _layer_names(model: nn.Module, role: str) -> tuple[str, ...]:
    """Return the names of the layers with a role in the timm configuration of a model."""
    names = getattr(model, "pretrained_cfg", {}).get(role) or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _module(name: str) -> str:
    """Return the first two parts of a parameter name, such as `blocks.3`."""
    return ".".join(name.split(".")[:2])


def _remedy(model: nn.Module, lists: dict[str, list[str]]) -> str:
    heads = tuple(f"{name}." for name in (*_layer_names(model, "classifier"), *_layer_names(model, "first_conv")))
    if heads and list(lists) == ["mismatched"] and all(name.startswith(heads) for name in lists["mismatched"]):
        return (
            "they are for another number of classes or channels: use the data and options of their training, or adapt "
            "them by fine-tuning (--finetune)"
        )
    return "choose the model that was trained with these weights"


def shorten(names: Iterable[str], limit: int = 5) -> str:
    """Return the first `limit` names and the number of the others."""
    names = [str(name) for name in names]
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + rest


def _why_unreadable(path: Path, error: Exception) -> str:
    foreign = re.search(r"GLOBAL (\S+)", str(error))
    if foreign or (isinstance(error, pickle.UnpicklingError) and _is_pickle(path)):
        what = foreign[1] if foreign else "it is a plain pickle"
        return f"rejected, because loading it could execute code ({what}); a file of tensors is expected"
    return "cannot be read as weights; the file is damaged, truncated or of another format. Download or copy it again"


def _is_pickle(path: Path) -> bool:
    """Return True if a file is a valid pickle, without executing it."""
    try:
        return len(list(pickletools.genops(path.read_bytes()))) > 1
    except Exception:  # genops raises many kinds of errors for invalid data
        return False
