"""Reading pictures: decode, resize and crop, in images per second of one core; ImageFolder with PIL transforms against ours.

python benchmarks/decode.py photos/ --rounds 5
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import torch
from common import alternate, arguments, choice, machine, table
from handwritten import MEAN, STD
from torchvision import datasets, transforms

from finetune.data import FolderDataModule


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    with choice(options.root, options.train, options.val) as root:
        plain = [
            transforms.Resize(round(options.size / 0.875)),
            transforms.CenterCrop(options.size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
        varied = [transforms.RandomResizedCrop(options.size, (0.6, 1.0)), transforms.RandomHorizontalFlip(), *plain[2:]]
        for title, steps, augment in (
            ("evaluation: resize, centre crop", plain, "none"),
            ("training: random crop", varied, "light"),
        ):
            theirs = datasets.ImageFolder(str(root / "train"), transforms.Compose(steps))
            data = FolderDataModule(root, augment=augment, image_size=options.size, workers=0)
            ours = data.train_dataloader().dataset
            sides = {
                "ImageFolder, PIL": lambda theirs=theirs: per_picture(theirs),
                "toolkit": lambda ours=ours: per_picture(ours),
            }
            seconds = {name: [1000 * t for t in times] for name, times in alternate(sides, options.rounds).items()}
            heading = f"{title}, {options.size} px, {len(ours)} pictures of {Path(options.root).name}, one core\n{machine()}"
            print(table(heading, seconds, "ImageFolder, PIL", "ms a picture"))


def per_picture(dataset) -> float:  # noqa: ANN001
    begin = time.perf_counter()
    number = sum(1 for _ in itertools.starmap(dataset.__getitem__, ((i,) for i in range(len(dataset)))))
    return (time.perf_counter() - begin) / number


if __name__ == "__main__":
    main()
