"""Speed of vision against a plain loop, in one process: `python -m tests.bench.vision`.

The plain loop works as the public notebooks do: a DataLoader opens, augments and converts every
image in every epoch, one at a time, with PIL and torchvision, and the model trains in the default
memory layout. Both sides see the same JPEG files, the same model and the same batch size. Each
figure is the best of several repeats, because other work on the machine only ever adds time.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.models import resnet18

from mmforget.context import Context
from mmforget.engine import Engine, Runtime, epoch_order
from mmforget.images import ImageFile, open_images
from mmforget.methods.finetune import Finetune, FinetuneConfig
from mmforget.rng import Draws, generator
from mmforget.training import optimise
from mmforget.types import Splits
from mmforget.vision.adapter import FaceAdapter
from mmforget.vision.images import ImageData

SIZE, BATCH, CLASSES = 128, 64, 8


class PlainImages(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """The data set of the notebooks: opens and augments one image at a time."""

    def __init__(self, paths: list[Path], labels: list[int]) -> None:
        self.paths = paths
        self.labels = labels
        self.transform = transforms.Compose(
            [
                transforms.Resize(SIZE),
                transforms.RandomHorizontalFlip(),
                transforms.RandomAffine(0, shear=10, scale=(0.8, 1.2)),
                transforms.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.open(self.paths[index]).convert("RGB")
        return self.transform(image), self.labels[index]


def write_images(folder: Path, count: int) -> tuple[list[Path], list[int]]:
    """Write smooth random JPEG pictures: their size matters to speed, their content does not."""
    rng = np.random.default_rng(0)
    paths, labels = [], rng.integers(CLASSES, size=count).tolist()
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        paths.append(folder / f"{i:05d}.jpg")
        small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths, labels


def best(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Return the shortest wall time of several runs, seconds."""
    times = []
    for _ in range(repeats):
        sync(device)
        start = time.perf_counter()
        work()
        sync(device)
        times.append(time.perf_counter() - start)
    return min(times)


def sync(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def plain_batches(paths: list[Path], labels: list[int], workers: int) -> Iterator[Any]:
    """Yield one epoch of the plain loader."""
    data = PlainImages(paths, labels)
    yield from DataLoader(data, BATCH, shuffle=True, num_workers=workers)


def our_batches(data: ImageData, adapter: FaceAdapter, device: torch.device) -> Iterator[Any]:
    """Yield one epoch of prepared batches, as the training loop makes them."""
    order = epoch_order(len(data), 0, "bench")
    for k in range(0, len(order), BATCH):
        rows = order[k : k + BATCH]
        draws = Draws(0, k, total=len(rows), device=device)
        yield adapter.prepare(data.take(rows), draws, train=True)


def model(device: torch.device, layout: torch.memory_format) -> nn.Module:
    """Return ResNet-18 with an eight-way head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return resnet18(num_classes=CLASSES).to(device, memory_format=layout)


def passes(
    net: nn.Module, image: Tensor, label: Tensor, steps: int, precision: torch.dtype | None
) -> None:
    """Forward and backward alone: the floor under any training loop."""
    net.train()
    for _ in range(steps):
        net.zero_grad(set_to_none=True)
        with torch.autocast(image.device.type, precision, enabled=precision is not None):
            loss = nn.functional.cross_entropy(net(image).float(), label)
        loss.backward()


def plain_epoch(
    paths: list[Path], labels: list[int], net: nn.Module, workers: int, device: torch.device
) -> None:
    """One epoch as in the notebooks."""
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001)
    running = 0.0
    for image, label in plain_batches(paths, labels, workers):
        image, label = image.to(device), label.to(device)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(image), label)
        loss.backward()
        optimizer.step()
        running += loss.item()


def our_epoch(data: ImageData, adapter: FaceAdapter, engine: Engine, net: nn.Module) -> None:
    """One fine-tuning epoch through the project's own loop."""
    method = Finetune(FinetuneConfig(epochs=1, lr=0.001, momentum=0.0, batch_size=BATCH))
    ctx = Context(
        engine=engine,
        adapter=adapter,
        model=net,
        splits=Splits(data, data, data, data, data),
        reads=method.reads,
        label="bench",
        seed=0,
    )
    optimise(ctx, method)


def measure(device: torch.device, images: int, steps: int, repeats: int) -> dict[str, Any]:
    """Return all figures: rates in samples a second, and ratios."""
    workers = min(8, os.cpu_count() or 1)
    adapter = FaceAdapter(CLASSES, multilabel=False, augmented=True)
    last = torch.channels_last
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        paths, labels = write_images(Path(place), images)
        listing = [ImageFile(p.name, p, p.name) for p in paths]
        start = time.perf_counter()
        table = open_images(listing, SIZE, Path(place) / "store")
        found["decode_once_s"] = time.perf_counter() - start
        data = ImageData(table, np.array(labels))

        plain = best(lambda: list(plain_batches(paths, labels, workers)), repeats, device)
        ours = best(lambda: [None for _ in our_batches(data, adapter, device)], repeats, device)
        found["data_plain_per_s"] = images / plain
        found["data_ours_per_s"] = images / ours
        found["data_ratio"] = plain / ours

        rng = generator(0)
        image = torch.rand(BATCH, 3, SIZE, SIZE, generator=rng).to(device)
        label = torch.randint(CLASSES, (BATCH,), generator=rng).to(device)
        floors = {}
        for layout in (torch.contiguous_format, last):
            for precision in (None, torch.bfloat16):
                net = model(device, layout)
                x = image.to(memory_format=layout)
                passes(net, x, label, 1, precision)
                spent = best(lambda: passes(net, x, label, steps, precision), repeats, device)  # noqa: B023
                floors[layout, precision] = spent / steps
                name = f"{'nhwc' if layout == last else 'nchw'}_{'bf16' if precision else 'fp32'}"
                found[f"passes_{name}_s"] = spent / steps

        part = steps * BATCH
        fewer = ImageData(open_images(listing[:part], SIZE, Path(place) / "store"), data.labels)
        plain_net = model(device, torch.contiguous_format)
        plain_s = best(
            lambda: plain_epoch(paths[:part], labels[:part], plain_net, workers, device),
            repeats,
            device,
        )
        found["epoch_plain_fp32_s"] = plain_s
        for precision, name in ((None, "no"), (torch.bfloat16, "bf16")):
            engine = Engine(Runtime(device=str(device), precision=name, progress=False))
            net = engine.place(model(device, torch.contiguous_format))
            ours_s = best(lambda: our_epoch(fewer, adapter, engine, net), repeats, device)  # noqa: B023
            label_ = "bf16" if precision else "fp32"
            found[f"epoch_ours_{label_}_s"] = ours_s
            found[f"epoch_over_passes_{label_}"] = ours_s / (floors[last, precision] * steps)
            found[f"epoch_ratio_{label_}"] = plain_s / ours_s
    return found


def main() -> None:
    """Print the figures as a table and as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=1024, help="images of the data path")
    parser.add_argument("--steps", type=int, default=6, help="steps of a model epoch")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    device = torch.device(given.device)
    machine = platform.processor() or platform.machine()
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    found = measure(device, given.images, given.steps, given.repeats)
    print(f"machine: {machine}, {os.cpu_count()} cores, torch {torch.__version__}")
    for name, value in found.items():
        print(f"{name:28s} {value:12.3f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
