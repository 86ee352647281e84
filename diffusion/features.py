"""What image sets are compared by: features of Inception, CLIP or a classifier.

Images are uint8 [B, 3, H, W] everywhere. Every extractor has a `name` that states its flavour:
distances of different flavours are not comparable.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmforget.checkpoint import load_model
from mmforget.errors import CheckpointError, ConfigError, DataError, MissingDependencyError

if TYPE_CHECKING:
    from mmforget.diffusion.classifiers import Classifier


class Extractor(Protocol):
    """Turns images into rows of features."""

    name: str

    def __call__(self, images: Tensor) -> Tensor:
        """Return features float32 [B, D] of images uint8 [B, 3, H, W], on its own device."""
        ...


def checked(images: Tensor) -> Tensor:
    """Return images as they are.

    Raises:
        DataError: They are not uint8 [B, 3, H, W]; NaN values are named.
    """
    if images.dtype != torch.uint8:
        spoilt = images.is_floating_point() and not bool(torch.isfinite(images).all())
        why = " with values that are not finite (a collapsed model?)" if spoilt else ""
        raise DataError(f"images must be uint8, 0 to 255; found {images.dtype}{why}")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise DataError(f"images must be [B, 3, H, W]; found {list(images.shape)}")
    return images


def decode(source: bytes | Path) -> Tensor:
    """Return one image, of a file or its bytes, as uint8 RGB [3, H, W].

    Raises:
        DataError: It cannot be decoded.
    """
    from PIL import Image

    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = "bytes" if isinstance(source, bytes) else str(source)
        raise DataError(f"{name}: this image cannot be decoded: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def image_batches(
    sources: Sequence[bytes | Path], batch_size: int = 32, workers: int = 4
) -> Iterator[Tensor]:
    """Yield images uint8 [B, 3, H, W] in order; a batch ends early where the size changes.

    One batch more is decoded, in threads, than is being used.
    """
    with ThreadPoolExecutor(workers) as pool:

        def read(start: int) -> list[Any]:
            return [pool.submit(decode, part) for part in sources[start : start + batch_size]]

        coming = read(0)
        for start in range(0, len(sources), batch_size):
            current, coming = coming, read(start + batch_size)
            same: list[Tensor] = []
            for image in (future.result() for future in current):
                if same and image.shape != same[0].shape:
                    yield torch.stack(same)
                    same = []
                same.append(image)
            yield torch.stack(same)


def parts(images: Tensor, size: int) -> Iterator[Tensor]:
    """Yield images in batches of `size`; one empty batch if there are none."""
    for start in range(0, max(len(images), 1), size):
        yield images[start : start + size]


def resized(images: Tensor, size: int | tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Return images uint8 [B, 3, h, w] resized as torchvision's `Resize` does PIL images.

    Pillow itself resizes (antialiased), because published scores went through it and torch's own
    antialiased resize differs from it by up to 2 levels.

    Args:
        images: uint8 [B, 3, H, W].
        size: Height and width; one number is the shorter side, the shape being kept.
        mode: "bilinear" or "bicubic".
    """
    from PIL import Image

    height, width = checked(images).shape[2:]
    if isinstance(size, int):
        short, long = sorted((height, width))
        other = int(size * long / short)
        size = (size, other) if height <= width else (other, size)
    if size == (height, width):
        return images
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    rows = images.permute(0, 2, 3, 1).cpu().numpy()
    out = np.empty((len(rows), *size, 3), np.uint8)
    for place, row in enumerate(rows):
        out[place] = np.asarray(Image.fromarray(row).resize((size[1], size[0]), filters[mode]))
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()


def centre_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the middle [B, 3, h, w] of images at least that large, as torchvision places it."""
    height, width = images.shape[2:]
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    return images[:, :, top : top + size[0], left : left + size[1]]


def normalised(
    images: Tensor, mean: Sequence[float], std: Sequence[float], device: torch.device | str
) -> Tensor:
    """Return (images/255 - mean)/std as float32 [B, 3, H, W] on a device."""
    scaled = images.to(device).float().div_(255)
    centre = torch.tensor(mean, device=scaled.device)[:, None, None]
    return scaled.sub_(centre).div_(torch.tensor(std, device=scaled.device)[:, None, None])


def cached_weights(url: str, given: str | Path | None, what: str) -> Path:
    """Return the file of published weights: the one given, or the one in torch's cache.

    Args:
        url: Where torchvision publishes them; their name in the cache.
        given: A file, or None to look into the cache.
        what: What they are, for the message.

    Raises:
        CheckpointError: There is no such file. Nothing is downloaded here.
    """
    path = Path(given) if given else Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if not path.is_file():
        raise CheckpointError(
            f"{what}: there is no {path}. Download {url}, and put it there or name its place in "
            f"`weights`"
        )
    return path


class CanvasInception:
    """Inception-v3 as UnlearnCanvas's FID uses it: not pytorch-fid, not clean-fid.

    torchvision's ImageNet weights; features are the mean over `Mixed_7c`, 2048. Images are scaled
    to [0, 1], then resized to 299 pixels like cv2 (bilinear, no antialias), then scaled to [-1, 1],
    and torchvision's `transform_input` normalises them once more.

    Args:
        weights: torchvision's `inception_v3_google` file; None: the one in torch's cache.
        device: Where it runs.

    Raises:
        CheckpointError: The weights are not there or do not fit.
    """

    name = "Inception-v3 of torchvision, UnlearnCanvas flavour (cv2 resize, normalised twice)"

    def __init__(
        self, weights: str | Path | None = None, device: str | torch.device = "cpu"
    ) -> None:
        from torchvision.models import Inception_V3_Weights

        url = Inception_V3_Weights.IMAGENET1K_V1.url
        path = cached_weights(url, weights, "Inception-v3 of torchvision")
        self.network = _inception(path, 1000, aux=True).to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return features float32 [B, 2048]."""
        scaled = checked(images).to(self.device).float().div_(255)
        small = functional.interpolate(scaled, (299, 299), mode="bilinear", align_corners=False)
        return _pooled(self.network, small * 2 - 1)


class FidInception:
    """Inception-v3 as pytorch-fid and most papers on COCO use it.

    The weights of the original TensorFlow network, whose average pools do not count their padding
    and whose last block takes a maximum. Images are resized to 299 pixels (bilinear, no antialias)
    and scaled to [-1, 1].

    Args:
        weights: The file `pt_inception-2015-12-05-6726825d.pth` of mseitzer/pytorch-fid.
        device: Where it runs.

    Raises:
        CheckpointError: The weights are not there or do not fit.
    """

    name = "Inception-v3 of 2015, pytorch-fid flavour (2048, no antialias)"
    url = (
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth"
    )

    def __init__(
        self, weights: str | Path | None = None, device: str | torch.device = "cpu"
    ) -> None:
        path = cached_weights(self.url, weights, "Inception-v3 of pytorch-fid")
        self.network = as_tensorflow(_inception(path, 1008, aux=False)).to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return features float32 [B, 2048]."""
        scaled = checked(images).to(self.device).float().div_(255)
        small = functional.interpolate(scaled, (299, 299), mode="bilinear", align_corners=False)
        return _pooled(self.network, small * 2 - 1)


class ClassifierFeatures:
    """The input of a classifier's head, for worlds that Inception does not know.

    Args:
        classifier: Whose features; its name becomes part of this one's.
    """

    def __init__(self, classifier: "Classifier") -> None:
        self.classifier = classifier
        self.name = f"penultimate features of {classifier.name} (no Inception: own scale)"

    def __call__(self, images: Tensor) -> Tensor:
        """Return features float32 [B, D]."""
        return self.classifier.features(images)


class OpenClip:
    """Image and text embeddings of a CLIP of open_clip, L2-normalised.

    Args:
        model: Its name, such as "ViT-L-14", "ViT-L-14-336" (CMMD) or "ViT-B-32".
        weights: File of its weights: open_clip's .safetensors or .bin, or a state dict. OpenAI's
            own .pt files are programs and are not opened; the hub has the same weights as tensors.
        quick_gelu: Whether activations are OpenAI's x·sigmoid(1.702 x): True for OpenAI's weights
            and those trained from them, False for LAION's. Weights do not tell; a wrong choice
            gives other embeddings without an error.
        device: Where it runs.

    Raises:
        MissingDependencyError: open_clip is not installed.
        ConfigError: No such model.
        CheckpointError: The weights cannot be read or do not fit.
    """

    def __init__(
        self,
        model: str,
        weights: str | Path,
        quick_gelu: bool = True,
        device: str | torch.device = "cpu",
    ) -> None:
        try:
            import open_clip
        except ImportError as error:
            raise MissingDependencyError("open_clip", "diffusion") from error
        if model not in open_clip.list_models():
            raise ConfigError(f"open_clip has no model {model!r}; see open_clip.list_models()")
        with torch.random.fork_rng(devices=[]):
            network: Any = open_clip.create_model(
                model, pretrained=None, load_weights=False, force_quick_gelu=quick_gelu
            )
        load_model(network, Path(weights))
        self.network = network.eval().requires_grad_(False).to(device)
        self.tokenizer = open_clip.get_tokenizer(model)
        settings = open_clip.get_model_preprocess_cfg(network)
        side = settings["size"]
        self.size = (side, side) if isinstance(side, int) else tuple(side)
        self.mean, self.std = settings["mean"], settings["std"]
        self.device = device
        self.name = f"open_clip {model} ({Path(weights).name}{', quick GELU' * quick_gelu})"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return image embeddings of length 1, float32 [B, D].

        The shorter side is resized (bicubic, Pillow) and the middle is cut out.
        """
        small = resized(checked(images), min(self.size), mode="bicubic")
        ready = normalised(centre_crop(small, self.size), self.mean, self.std, self.device)
        found: Tensor = self.network.encode_image(ready)
        return functional.normalize(found.float(), dim=1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return text embeddings of length 1, float32 [N, D]; texts are cut at 77 tokens."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        found: Tensor = self.network.encode_text(tokens)
        return functional.normalize(found.float(), dim=1)


def extract(extractor: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> Tensor:
    """Return the features of all batches, float32 [N, D] on the CPU; for KID and CMMD.

    Raises:
        DataError: There are no images.
    """
    found = [extractor(batch).cpu() for batch in batches]
    if not found:
        raise DataError("there are no images to compute features of")
    return torch.cat(found)


def as_tensorflow(network: Any) -> Any:
    """Make torchvision's Inception-v3 pool as the network of 2015 does, and return it.

    Args:
        network: Changed by hooks on the convolutions that follow the pools.
    """
    for block in (*_named(network, "5bcd"), *_named(network, "6bcde"), network.Mixed_7b):
        block.branch_pool.register_forward_pre_hook(_without_padding)
    entered: list[Tensor] = []
    network.Mixed_7c.register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    network.Mixed_7c.branch_pool.register_forward_pre_hook(
        lambda _, given: functional.max_pool2d(entered.pop(), 3, stride=1, padding=1)
    )
    return network


def _without_padding(_: nn.Module, given: tuple[Tensor]) -> Tensor:
    """Turn means over 3x3 places, zeros of the padding among them, into means over real places."""
    (pooled,) = given
    ones = torch.ones((1, 1, *pooled.shape[2:]), device=pooled.device, dtype=pooled.dtype)
    return pooled / functional.avg_pool2d(ones, 3, stride=1, padding=1)


def _named(network: Any, places: str) -> list[Any]:
    return [getattr(network, f"Mixed_{places[0]}{letter}") for letter in places[1:]]


def _inception(path: Path, classes: int, aux: bool) -> Any:
    """Return torchvision's network; it normalises inputs once more with its own weights alone."""
    from torchvision.models import inception_v3

    with torch.random.fork_rng(devices=[]):
        network = inception_v3(
            weights=None,
            num_classes=classes,
            aux_logits=aux,
            transform_input=aux,
            init_weights=False,
        )
    load_model(network, path)
    return network.eval().requires_grad_(False)


def _pooled(network: Any, ready: Tensor) -> Tensor:
    """Return the mean over the last block, [B, 2048], of inputs [B, 3, 299, 299] in [-1, 1]."""
    kept: list[Tensor] = []
    handle = network.Mixed_7c.register_forward_hook(lambda _, given, out: kept.append(out))
    try:
        network(ready)
    finally:
        handle.remove()
    return kept[0].mean(dim=(2, 3)).float()
