"""A rehearsal of Colab: an empty folder, the setup cell that clones, an environment that has all packages but ours."""

import subprocess
import sys
import sysconfig
import venv

import pytest
from conftest import ROOT, run

from helpers.study.repository import repository_url


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """(python, folder, environment variables) of a make-believe Colab machine."""
    base = tmp_path_factory.mktemp("colab")
    venv.create(base / "env", with_pip=True)
    python = base / "env" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True
    ).stdout
    # Its setuptools is Python's old one; Colab builds with a new one, as this environment has it.
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"], check=True)
    # Packages of this environment become visible; helpers does not, because a .pth file inside them is not followed.
    with open(f"{site.strip()}/colab.pth", "w") as file:
        file.write(sysconfig.get_paths()["purelib"])
    (base / "fake" / "google" / "colab").mkdir(parents=True)
    (base / "fake" / "google" / "colab" / "__init__.py").touch()
    # What is committed and what is not yet: the working tree as a repository of its own.
    origin = base / "origin"
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).exists():
            (origin / name).parent.mkdir(parents=True, exist_ok=True)
            (origin / name).write_bytes((ROOT / name).read_bytes())
    identity = ["-c", "user.name=rehearsal", "-c", "user.email=rehearsal@example.org"]
    for command in (["init", "--quiet"], ["add", "--all"], [*identity, "commit", "--quiet", "-m", "rehearsal"]):
        subprocess.run(["git", *command], cwd=origin, check=True)
    (base / "content").mkdir()
    environment = {
        "COLAB_RELEASE_TAG": "release-colab-rehearsal",
        "PYTHONPATH": str(base / "fake"),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{origin}.insteadOf",
        "GIT_CONFIG_VALUE_0": repository_url(ROOT),
        # Nothing may be downloaded: what Colab's setup would install is here already, torch above all.
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
    }
    return python, base / "content", environment


def test_notebooks_run_alone_in_colab(colab):
    """Notebook 5 in an empty folder, with what it needs: it runs notebook 1 before it."""
    python, folder, environment = colab
    source = ROOT / "notebooks" / "05_onnx_openvino.ipynb"
    small = "{limit: 128, calibration_images: 32, arms: [fp32]}"
    done = run(
        *(python, "-m", "papermill", "--no-progress-bar", source, folder / "out.ipynb", "-y", small),
        cwd=folder,
        **environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for notebook in ("01_train", "05_onnx_openvino"):
        assert (folder / "study" / "runs" / "alone" / "records" / f"{notebook}-resnet18-tuned-s0.json").exists()
    used = run(
        python, "-c", "import torch, helpers; print(torch.__file__, helpers.__file__)", cwd=folder, **environment
    ).stdout
    torch_file, helpers_file = used.split()
    assert sys.prefix in torch_file and str(python.parent.parent) in helpers_file
