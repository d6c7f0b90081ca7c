"""The package of models, installed as `twins_models`, used from other folders and beside other packages."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import distributions, version

import pytest

from tests.helpers import ROOT

SOURCES = ("pyproject.toml", "LICENSE", "models")  # all that the installation reads

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(int(version("setuptools").split(".")[0]) < 77, reason="needs setuptools 77 or newer"),
]


def install(folder, *options: str):
    """Install a copy of the sources without a network and return the folder of the installed package."""
    source, target = folder / "source", folder / "site"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    offline = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", str(target), *options, "."]
    subprocess.run(command, cwd=source, check=True, timeout=120)
    return target


@pytest.fixture(scope="module")
def site_folder(tmp_path_factory):
    return install(tmp_path_factory.mktemp("package"))


def run_python(code: str, site_folder, cwd, *args: str, **env: str) -> str:
    """Run code with an installed package and return what it prints."""
    start = "import site, sys; site.addsitedir(sys.argv[1])\n"
    command = [sys.executable, "-W", "ignore", "-c", start + code, str(site_folder), *args]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""} | env
    run = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


CREATE = """
import timm, twins_models
model = timm.create_model("alt_gvt_small")
print(type(model).__module__, len(twins_models.list_models()), "alt_gvt_small" in twins_models.list_models())
for name in ("models", "core", "transforms", "utils"):
    try:
        __import__(name)
        print(name, "is importable")
    except ImportError:
        pass
"""


def test_the_models_and_nothing_else_are_installed(site_folder, tmp_path):
    assert run_python(CREATE, site_folder, tmp_path) == "twins_models.twins 8 True"


def test_an_editable_installation_uses_the_sources(tmp_path):
    find = "import importlib.util; print(importlib.util.find_spec('twins_models').origin)"
    found = run_python(find, install(tmp_path, "--editable"), tmp_path)
    assert found == str(tmp_path / "source/models/__init__.py")


BOTH = """
import models, timm, torch, twins_models
networks = [models.twins.alt_gvt_tiny(num_classes=3), timm.create_model("alt_gvt_tiny", num_classes=3)]
print(*(type(network).__module__ for network in networks), models.list_models() == twins_models.list_models())
networks[0].load_state_dict(networks[1].state_dict())
images = torch.randn(2, 3, 224, 224)
results = []
for network in networks:
    outputs = network(images)
    results.append([outputs, *torch.autograd.grad(outputs.square().sum(), network.parameters())])
print(all(torch.equal(*pair) for pair in zip(*results, strict=True)))
"""


def test_the_repository_and_the_installed_package_work_in_one_process(site_folder):
    assert run_python(BOTH, site_folder, ROOT) == "models.twins twins_models.twins True\nTrue"


HUGGING_FACE = """
import datasets, timm, torch, twins_models
from timm.data import create_dataset, create_transform
samples = create_dataset("hfds/" + sys.argv[2], root=None, split="validation")
samples.transform = create_transform(64)
model = timm.create_model("alt_gvt_tiny", num_classes=3).eval()
logits = model(torch.stack([image for image, _ in samples]))
print(datasets.__name__, tuple(logits.shape), [label for _, label in samples])
"""


def test_the_package_works_beside_hugging_faces_datasets(site_folder, image_folder, tmp_path):
    if not any(distribution.name == "datasets" for distribution in distributions()):
        pytest.skip("Hugging Face's datasets is not installed")
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    printed = run_python(HUGGING_FACE, site_folder, tmp_path, str(image_folder), **offline)
    assert printed == f"datasets (21, 3) {[0] * 7 + [1] * 7 + [2] * 7}"
