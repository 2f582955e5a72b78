import numpy as np
import pytest
import torch

from tests.nn.test_resnet38d import mxnet_file
from tissuehint.errors import InputError
from tissuehint.nn.mxnet_parameters import read_mxnet_parameters
from tissuehint.nn.resnet38d import ResNet38d

ARRAYS = {
    "arg:conv1a_weight": np.arange(2 * 3 * 2 * 2, dtype=np.float32).reshape(2, 3, 2, 2),
    "aux:bn7_moving_mean": np.linspace(-1, 1, 5),
}


@pytest.mark.parametrize("version", [0, 1, 2])
def test_every_version_reads_back(version, tmp_path):
    read = read_mxnet_parameters(mxnet_file(tmp_path / "some.params", ARRAYS, version))
    assert read.keys() == ARRAYS.keys()
    assert all(torch.equal(read[name], torch.from_numpy(array)) for name, array in ARRAYS.items())


@pytest.mark.parametrize("version", [0, 2])
def test_a_file_cut_anywhere_is_refused(version, tmp_path):
    whole = mxnet_file(tmp_path / "some.params", ARRAYS, version).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut.params").write_bytes(whole[:length])
        with pytest.raises(InputError, match="is not a whole parameter file of MXNet"):
            read_mxnet_parameters(tmp_path / "cut.params")


@pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(100), (0x112).to_bytes(8, "little") + b"\xff" * 99])
def test_another_format_is_refused(content, tmp_path):
    (tmp_path / "other.params").write_bytes(content)
    with pytest.raises(InputError, match="is not a whole parameter file of MXNet"):
        read_mxnet_parameters(tmp_path / "other.params")


def test_a_network_of_another_architecture_is_refused(tmp_path):
    with torch.device("meta"):
        network = ResNet38d()
    with pytest.raises(InputError, match=r"has 2 of the 191 tensors of the encoder; missing: b2\.bn_branch2a\.bias"):
        network.load(mxnet_file(tmp_path / "some.params", ARRAYS, 0))
