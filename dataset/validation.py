"""A validation set over many ranks: each takes its part, and every image counts once."""

from collections.abc import Sequence

from torch.utils.data import Dataset

from diffbir.dataset.pairs import ImagePairs, Item


class Part(Dataset):
    """A rank's part of a validation set: neighbours, as many as every other rank has.

    Ranks must take the same number of steps, since sharded networks are gathered together. Where the set doesn't
    divide, the last parts are filled up with images that don't count.

    Items are those of the set with two entries more: `number`, where in the set the image is, which is what its noise
    belongs to; and `counts`, whether its figures are part of the means.
    """

    def __init__(self, dataset: Dataset | Sequence, rank: int, ranks: int):
        self.dataset, self.length = dataset, -(-len(dataset) // ranks)
        self.first = rank * self.length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Item:
        return self.__getitems__([i])[0]

    def __getitems__(self, places: Sequence[int]) -> list[Item]:
        """The items of one batch; an image that is skipped because it cannot be read is not among them."""
        size, positions = len(self.dataset), [self.first + i for i in places]
        numbers = [position % size for position in positions]
        if isinstance(self.dataset, ImagePairs):
            items = self.dataset.try_items(numbers)
        else:
            items = [self.dataset[number] for number in numbers]
        return [
            {**item, "number": number, "counts": position < size}
            for item, number, position in zip(items, numbers, positions, strict=True)
            if item is not None
        ]
