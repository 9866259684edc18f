import numpy as np
import pytest
import torch

from helpers.files import StudyError
from helpers.models import ARCHS, build_model, count_parameters, load_weights, module_predictor, save_weights

MILLIONS = {"resnet18": 11.18, "resnet34": 21.29, "resnet50": 23.53}


@pytest.mark.parametrize("arch", ARCHS)
def test_each_arch_has_its_published_size_and_the_seed_decides_its_weights(arch):
    model = build_model(arch, seed=1)
    assert round(count_parameters(model) / 1e6, 2) == MILLIONS[arch]
    assert torch.equal(model.conv1.weight, build_model(arch, seed=1).conv1.weight)
    assert not torch.equal(model.conv1.weight, build_model(arch, seed=2).conv1.weight)
    assert module_predictor(model)(np.zeros((2, 3, 32, 32), np.float32)).shape == (2, 10)


def test_weights_files_that_cannot_be_used_end_in_a_sentence(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(StudyError, match="does not exist"):
        load_weights(path)
    save_weights(path, {"x": torch.zeros(3)}, {"arch": "resnet18"})
    with pytest.raises(StudyError, match="holds a resnet18, not a resnet50"):
        load_weights(path, "resnet50")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(StudyError, match="not a whole safetensors file"):
        load_weights(path)
    save_weights(path, {"x": torch.zeros(3)}, {"made": "elsewhere"})
    with pytest.raises(StudyError, match="does not say which arch"):
        load_weights(path)
