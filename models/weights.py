"""Every format of released weights -> our parameter names, strictly, with a report.

Read are `.pth` and `.safetensors` files that hold a bare state dict, the original's and our checkpoints
(`model`, `model_ema`) and timm's (`state_dict`, `state_dict_ema`), with or without the prefixes that
DistributedDataParallel and torch.compile add. Nothing in a file is ever executed.
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
from torch import Tensor, nn

from models.twins import TwinsError

MODEL_KEYS = ("model", "state_dict")
EMA_KEYS = ("model_ema", "state_dict_ema")
CLASSIFIER = ("norm.", "head.")  # what a dense task has no use for


@dataclass
class LoadReport:
    """What a load did: the source, the tensors taken as they are, those adapted, skipped, and not in the source."""

    source: str
    loaded: int = 0
    adapted: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.source}: loaded {self.loaded} tensors"
        for what, names in (("adapted", self.adapted), ("skipped", self.skipped), ("new", self.new)):
            if names:
                text += f"; {what} {', '.join(names)}"
        return text


def load_weights(model: nn.Module, path: str | Path, *, ema: bool = False, finetune: bool = False) -> LoadReport:
    """Load the weights of a file into a model; see `read_weights` and `load_state_dict`."""
    return load_state_dict(model, read_weights(path, ema=ema), source=str(path), finetune=finetune)


def read_weights(path: str | Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Read a state dict from any of the formats above, in the names of our models.

    Args:
        path: The file.
        ema: Take the moving average of the weights instead of the weights themselves.

    Raises:
        TwinsError: If the file is missing or damaged, would execute code, or holds no such weights.
    """
    content = read_file(path)
    keys = EMA_KEYS if ema else MODEL_KEYS
    holder = next((key for key in keys if isinstance(content.get(key), dict)), None)
    if holder is not None:
        content = content[holder]
    elif ema:
        raise TwinsError(f"{path}: holds no moving average (EMA) of the weights; load the weights themselves")
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise TwinsError(
            f"{path}: holds no weights; a state dict is expected, bare or under one of {', '.join(keys)}, "
            f"but the file has {_shorten(content)}"
        )
    return {_plain_name(name): tensor for name, tensor in content.items()}


def read_file(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU without executing anything in it.

    Raises:
        TwinsError: If the file is missing, damaged, would execute code or holds no dict.
    """
    path = Path(path)
    if not os.path.isfile(path):
        what = "this is a folder; name a file in it" if os.path.isdir(path) else "there is no such file"
        raise TwinsError(f"{path}: {what}")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        # The original saved its arguments as a Namespace, a plain record of values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except TwinsError:
        raise
    except OSError as error:
        raise TwinsError(f"{path}: cannot be read ({error})") from error
    except Exception as error:  # the readers raise anything from KeyError to RuntimeError on a bad file
        raise TwinsError(f"{path}: {_why_unreadable(path, error)}") from error
    if not isinstance(content, dict):
        raise TwinsError(f"{path}: holds a {type(content).__name__}, not a checkpoint; a dict is expected")
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file  # here, for an installation without it reads .pth files
    except ImportError as error:
        raise TwinsError(f"{path}: install safetensors to read it (pip install safetensors)") from error
    return load_file(path)


def load_state_dict(model: nn.Module, state: dict[str, Tensor], *, source: str, finetune: bool = False) -> LoadReport:
    """Load a state dict into a model strictly, and say what was done.

    With `finetune`, and only then, the stem is adapted to another number of input channels (timm's rule: RGB
    weights are summed or repeated) and a head for another class count is left as it was initialised.

    Args:
        model: A model of this package or of timm.
        state: Names to tensors.
        source: What to call the weights in messages.
        finetune: Adapt stem and head instead of refusing them.

    Raises:
        TwinsError: If keys are missing, unexpected or of another shape; all are listed. The model is unchanged.
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
        found = "; ".join(f"{len(names)} {what}: {_shorten(names)}" for what, names in lists.items() if names)
        raise TwinsError(f"{source}: these weights do not fit the model; {found}. {_remedy(model, lists)}")
    model.load_state_dict(state, strict=False)
    report.loaded = len(state) - len(report.adapted)
    return report


def load_backbone(backbone: nn.Module, state: dict[str, Tensor], *, source: str) -> LoadReport:
    """Load the weights of a classifier into a backbone of a dense task, strictly; see `load_state_dict`.

    The head and the final norm of the classifier are skipped. The norms between stages that it does not have stay
    as they were initialised.

    Raises:
        TwinsError: If the weights do not fit, or are those of a whole network.
    """
    if any(name.startswith("backbone.") for name in state):
        raise TwinsError(f"{source}: holds a whole network, not a classifier; start from it with --finetune")
    used = {name: tensor for name, tensor in state.items() if not name.startswith(CLASSIFIER)}
    own = backbone.state_dict()
    new = {name: own[name] for name in own if name.startswith("norm_list.") and name not in used}
    report = load_state_dict(backbone, new | used, source=source)
    report.loaded -= len(new)
    report.new += new
    report.skipped += [name for name in state if name not in used]
    return report


def _adapt_stem(model: nn.Module, own: dict[str, Tensor], state: dict[str, Tensor], report: LoadReport) -> None:
    """Sum or repeat the first convolution's weights to the model's number of input channels."""
    for module in _layer_names(model, "first_conv"):
        name = f"{module}.weight"
        if name not in state or name not in own:
            continue
        channels = own[name].shape[1]
        if channels != 3 == state[name].shape[1]:  # the rule is for RGB weights; others are refused as mismatched
            state[name] = adapt_input_conv(channels, state[name])
            report.adapted.append(f"{name} (3 -> {channels} input channels)")


def _drop_head(model: nn.Module, own: dict[str, Tensor], state: dict[str, Tensor], report: LoadReport) -> None:
    """Skip heads whose class count is another one."""
    for module in _layer_names(model, "classifier"):
        names = [f"{module}.weight", f"{module}.bias"]
        if any(name in own and name in state and own[name].shape != state[name].shape for name in names):
            for name in names:
                if state.pop(name, None) is not None:
                    report.skipped.append(name)


def _layer_names(model: nn.Module, role: str) -> tuple[str, ...]:
    """Return the layers that timm's configuration of a model names for a role (one, several or none)."""
    names = getattr(model, "pretrained_cfg", {}).get(role) or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _plain_name(name: str) -> str:
    """Strip what DistributedDataParallel and torch.compile add to parameter names."""
    return re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", ""))


def _remedy(model: nn.Module, lists: dict[str, list[str]]) -> str:
    """Say what to do about weights that do not fit."""
    heads = tuple(f"{name}." for name in (*_layer_names(model, "classifier"), *_layer_names(model, "first_conv")))
    if heads and not lists["missing"] + lists["unexpected"] and all(m.startswith(heads) for m in lists["mismatched"]):
        return (
            "They were made for other classes or channels: give the data and options of their training, or adapt them "
            "by fine-tuning (--finetune)"
        )
    return "Choose the model that the weights were made for"


def _shorten(names: Iterable[str], limit: int = 6) -> str:
    names = [str(name) for name in names]
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + rest


def _why_unreadable(path: Path, error: Exception) -> str:
    """Say in a few words why torch or safetensors refused a file."""
    foreign = re.search(r"GLOBAL (\S+)", str(error))
    if foreign or (isinstance(error, pickle.UnpicklingError) and _is_pickle(path)):
        what = foreign[1] if foreign else "it is a plain pickle"
        return f"refused, because loading it could execute code ({what}); a file of tensors is expected"
    return "cannot be read as weights; the file is damaged, cut short or of another kind. Fetch or copy it again"


def _is_pickle(path: Path) -> bool:
    """Tell a whole pickle from garbage, without executing it."""
    try:
        return len(list(pickletools.genops(path.read_bytes()))) > 1
    except Exception:  # genops raises many kinds of errors on garbage
        return False
