import numpy as np
import torch
from skimage.data import astronaut

from diffbir.dataset.degradations.levels import round_to_8_bits
from diffbir.dataset.transfer import pack, unpack
from diffbir.utils.image import to_tensor


def item(hq: np.ndarray, lq: np.ndarray) -> dict:
    return {"hq": torch.from_numpy(hq), "lq": torch.from_numpy(lq), "prompt": "a photo", "seed": 3}


def test_all_levels_survive_to_the_last_bit_at_a_quarter_of_the_size():
    """However they were computed: by division of bytes, of floats, or in place."""
    levels = np.arange(256, dtype=np.float32).reshape(1, 16, 16)
    pair = {"hq": to_tensor(astronaut()[:16, :16]), "lq": torch.from_numpy(round_to_8_bits(levels / 255))}
    pair["teacher"] = pair["lq"].flip(-1)
    batch = pack([pair, pair])
    assert batch["hq"].dtype == batch["lq"].dtype == batch["teacher"].dtype == torch.uint8
    assert torch.equal(batch["lq"][0], torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16))
    back = unpack(batch)
    for key in ("hq", "lq", "teacher"):
        assert back[key].dtype == torch.float32
        assert torch.equal(back[key], torch.stack([pair[key]] * 2))


def test_images_of_other_values_stay_as_they_are():
    """A sharpened target, values out of range, and a batch with a single such image."""
    rng = np.random.default_rng(0)
    byte = round_to_8_bits(rng.random((3, 4, 4), dtype=np.float32))
    for other in (rng.random((3, 4, 4), dtype=np.float32), byte + 1, -byte, byte + np.float32(1e-7)):
        items = [item(byte, byte), item(other, byte)]
        batch = pack(items)
        assert batch["hq"].dtype == torch.float32
        assert batch["lq"].dtype == torch.uint8
        assert torch.equal(unpack(batch)["hq"], torch.stack([x["hq"] for x in items]))


def test_the_rest_of_a_batch_is_collated_as_ever():
    byte = np.zeros((3, 2, 2), np.float32)
    items = [item(byte, byte), item(byte, byte)]
    batch = unpack(pack(items))
    assert batch["prompt"] == ["a photo"] * 2 and batch["seed"].tolist() == [3, 3]
    assert items[0]["hq"].dtype == torch.float32  # items are left alone
    latents = pack([{"latent": torch.zeros(2, dtype=torch.uint8), "prompt": ""}])
    assert unpack(latents)["latent"].dtype == torch.uint8
