"""Draw the public set: digits of the fonts that matplotlib ships, re-drawn with a pen.

    python examples/digits/draw_public.py --output_dir runs/digits/public
    python examples/digits/draw_public.py --output_dir /tmp/few --num_train 200 --num_validation 100

Every image starts from a glyph of a font. Three in four are thinned to a skeleton and drawn again
with a pen of random width, after a random slant, rotation and elastic bend, sometimes with a stroke
missing, broken or prolonged; the others keep the printed outline. The validation split uses fonts
that the training split never sees. No handwritten digit is involved anywhere.

Writes train.parquet and validation.parquet (columns image, label), which
`datasets.load_dataset(OUTPUT_DIR)` reads, and preview.png.
"""

import argparse
import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from scipy.ndimage import convolve, label
from skimage.morphology import skeletonize
from tqdm import tqdm

TRAIN_FONTS = """DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSans-BoldOblique DejaVuSansMono
    DejaVuSansMono-Bold DejaVuSansMono-BoldOblique DejaVuSerif DejaVuSerif-Bold
    DejaVuSerif-BoldItalic STIXGeneral STIXGeneralBol STIXGeneralBolIta
    cmr10 cmb10 cmss10""".split()
HELD_OUT_FONTS = "DejaVuSansMono-Oblique DejaVuSerif-Italic STIXGeneralItalic cmtt10".split()
SIZE = 32  # pixels, the side of every image
GLYPH = 128  # pixels, the side of the canvas on which glyphs are traced
POINTS = 160  # points that stand for one skeleton
FAR = 1e3  # where points go that must leave no ink


def glyph_mask(font_name: str, digit: int) -> np.ndarray:
    """The filled glyph as a boolean [GLYPH, GLYPH] array, centred, 96 pixels high."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font_name}.ttf"
    font = ImageFont.truetype(str(path), 128)
    canvas = PILImage.new("L", (256, 256))
    ImageDraw.Draw(canvas).text((64, 40), str(digit), font=font, fill=255)
    glyph = canvas.crop(canvas.getbbox())
    glyph = glyph.resize((max(8, round(glyph.width * 96 / glyph.height)), 96))
    canvas = PILImage.new("L", (GLYPH, GLYPH))
    canvas.paste(glyph, ((GLYPH - glyph.width) // 2, 16))
    return np.asarray(canvas) > 127


def neighbour_count(skeleton: np.ndarray) -> np.ndarray:
    return convolve(skeleton.astype(int), np.ones((3, 3), int), mode="constant") - 1


def terminal_branches(skeleton: np.ndarray) -> list[np.ndarray]:
    """Masks of the branches that end freely: the pieces left after the junctions are cut out."""
    degree = neighbour_count(skeleton)
    junctions = skeleton & (degree > 2)
    pieces, count = label(skeleton & ~junctions, structure=np.ones((3, 3)))
    ends = skeleton & (degree == 1)
    masks = [pieces == i for i in range(1, count + 1)]
    return [mask for mask in masks if (mask & ends).any() and junctions.any()]


def skeleton_variants(mask: np.ndarray) -> list[np.ndarray]:
    """The glyph's skeleton without its spurs, then the same with one short branch left out.

    Each is an array of (x, y) points in [-1, 1], one a pixel.
    """
    skeleton = skeletonize(mask)
    for _ in range(3):
        for branch in terminal_branches(skeleton):
            if branch.sum() < 10:
                skeleton = skeletonize(skeleton & ~branch)
    total = skeleton.sum()
    short = [b for b in terminal_branches(skeleton) if b.sum() < 0.3 * total]
    drawings = [skeleton] + [skeleton & ~branch for branch in short]
    return [np.argwhere(d)[:, ::-1] / (GLYPH / 2) - 1.0 for d in drawings]


def uniform(generator, low, high, *shape):
    return low + (high - low) * torch.rand(*shape, generator=generator)


def affine(generator, count: int) -> torch.Tensor:
    """[count, 2, 2] matrices: stretch, then slant (mostly to the right), then rotation."""
    angle = uniform(generator, -0.22, 0.22, count)
    slant = uniform(generator, -0.55, 0.25, count)
    width = uniform(generator, 0.65, 1.25, count)
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    ones, zeros = torch.ones(count), torch.zeros(count)
    shear = torch.stack([width, slant, zeros, ones], 1).view(-1, 2, 2)
    return rotation @ shear


def bend(generator, xy: torch.Tensor, strength: float = 0.10) -> torch.Tensor:
    """Add a smooth random displacement field (three plane waves an axis) to [count, points, 2]."""
    count = len(xy)
    waves = uniform(generator, -3.5, 3.5, count, 2, 6)
    phases = uniform(generator, 0, 2 * math.pi, count, 1, 6)
    amplitudes = strength * torch.randn(count, 1, 6, generator=generator)
    ripple = amplitudes * torch.sin(xy @ waves + phases)  # [count, points, 6]
    return xy + torch.stack([ripple[..., :3].sum(-1), ripple[..., 3:].sum(-1)], -1)


def break_strokes(generator, xy: torch.Tensor, probability: float = 0.12) -> torch.Tensor:
    """Lift the pen somewhere: points near a random point of the stroke leave no ink."""
    count = len(xy)
    centre = xy[torch.arange(count), torch.randint(POINTS, (count,), generator=generator)]
    radius = uniform(generator, 0.08, 0.2, count, 1)
    chosen = torch.rand(count, 1, generator=generator) < probability
    lifted = chosen & ((xy - centre[:, None]).norm(dim=-1) < radius)
    return xy.masked_fill(lifted[..., None], FAR)


def prolong_strokes(generator, xy: torch.Tensor, probability: float = 0.2) -> torch.Tensor:
    """Enter or leave with a short extra stroke at the digit's top left or bottom."""
    count, length = len(xy), 24
    corner = torch.tensor([[-0.7, -1.0], [0.3, 1.0], [-0.7, 1.0]])
    corner = corner[torch.randint(3, (count,), generator=generator)]
    nearest = (xy - corner[:, None]).norm(dim=-1).argmin(1)
    start = xy[torch.arange(count), nearest]
    angle = uniform(generator, 0, 2 * math.pi, count)
    reach = uniform(generator, 0.1, 0.35, count)
    tip = torch.stack([angle.cos(), angle.sin()], -1) * reach[:, None]
    tail = start[:, None] + torch.linspace(0, 1, length)[None, :, None] * tip[:, None]
    chosen = torch.rand(count, 1, 1, generator=generator) < probability
    return torch.cat([xy, torch.where(chosen, tail, start[:, None])], dim=1)


def fit_to_frame(generator, xy: torch.Tensor) -> torch.Tensor:
    """Scale and centre [count, points, 2] to a random box of the image, in pixels."""
    inked = xy[..., :1].abs() < FAR / 2
    low = xy.masked_fill(~inked, FAR).amin(1, keepdim=True)
    high = xy.masked_fill(~inked, -FAR).amax(1, keepdim=True)
    side = uniform(generator, 0.52, 0.84, len(xy), 1, 1) * SIZE
    scale = side / (high - low).amax(-1, keepdim=True)
    shift = uniform(generator, -1.5, 1.5, len(xy), 1, 2)
    return (xy - (low + high) / 2) * scale + SIZE / 2 + shift


def ink(generator, xy: torch.Tensor) -> torch.Tensor:
    """Draw [count, points, 2] with a soft round pen: [count, SIZE, SIZE] in [0, 1]."""
    count = len(xy)
    axis = torch.arange(SIZE) + 0.5
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(1, -1, 2)
    radius = uniform(generator, 0.55, 2.1, count, 1)
    pressure = torch.sin(xy[..., 1] * uniform(generator, 0.05, 0.25, count, 1))
    radius = radius * (1 + uniform(generator, 0.0, 0.3, count, 1) * pressure)
    distance = torch.cdist(pixels.expand(count, -1, -1), xy) - radius[:, None]
    softness = uniform(generator, 0.25, 0.7, count, 1)
    return torch.sigmoid(-distance.amin(-1) / softness).view(count, SIZE, SIZE)


def draw_with_pen(generator, points: torch.Tensor) -> torch.Tensor:
    """[count, POINTS, 2] skeletons in [-1, 1] -> [count, SIZE, SIZE] drawings in [0, 1]."""
    xy = bend(generator, points @ affine(generator, len(points)).transpose(1, 2))
    xy = prolong_strokes(generator, break_strokes(generator, xy))
    return ink(generator, fit_to_frame(generator, xy))


def draw_printed(generator, masks: torch.Tensor) -> torch.Tensor:
    """[count, GLYPH, GLYPH] filled glyphs -> warped prints [count, SIZE, SIZE]."""
    count = len(masks)
    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(1, -1, 2)
    zoom = uniform(generator, 0.95, 1.35, count, 1, 1)
    grid = bend(generator, grid.expand(count, -1, -1) * zoom, 0.04)
    grid = (grid @ affine(generator, count).transpose(1, 2)).view(count, SIZE, SIZE, 2)
    soft = F.avg_pool2d(F.avg_pool2d(masks[:, None].float(), 7, 1, 3), 7, 1, 3)
    sampled = F.grid_sample(soft, grid, align_corners=False)[:, 0]
    threshold = uniform(generator, 0.25, 0.65, count, 1, 1)
    return torch.sigmoid((sampled - threshold) * 12)


def finish(generator, images: torch.Tensor) -> torch.Tensor:
    """Blur a third of the drawings through a coarse scan, and vary how dark the ink is."""
    count = len(images)
    coarse = F.interpolate(images[:, None], size=SIZE // 4, mode="area")
    coarse = F.interpolate(coarse, size=SIZE, mode="bicubic")[:, 0]
    scanned = torch.rand(count, 1, 1, generator=generator) < 0.3
    images = torch.where(scanned, coarse * 1.15, images)
    return (images * uniform(generator, 0.8, 1.05, count, 1, 1)).clamp(0, 1)


class Alphabet:
    """Glyph masks and skeletons of some fonts, from which random digits are drawn."""

    def __init__(self, fonts: list[str]):
        self.masks, self.skeletons = {}, {}
        for digit in range(10):
            glyphs = [glyph_mask(font, digit) for font in fonts]
            self.masks[digit] = torch.stack([torch.from_numpy(g) for g in glyphs])
            self.skeletons[digit] = [skeleton_variants(g) for g in glyphs]

    def random_skeleton(self, rng: np.random.Generator, digit: int) -> np.ndarray:
        variants = self.skeletons[digit][rng.integers(len(self.skeletons[digit]))]
        whole = rng.random() < 0.6
        points = variants[0 if whole else rng.integers(len(variants))]
        return points[np.linspace(0, len(points) - 1, POINTS).astype(int)]

    def draw(self, rng, generator, digits: np.ndarray) -> torch.Tensor:
        """[count] digits -> [count, SIZE, SIZE] drawings in [0, 1]."""
        skeletons = np.stack([self.random_skeleton(rng, d) for d in digits])
        pen = draw_with_pen(generator, torch.from_numpy(skeletons).float())
        masks = torch.stack([self.masks[d][rng.integers(len(self.masks[d]))] for d in digits])
        printed = draw_printed(generator, masks)
        is_printed = torch.rand(len(digits), 1, 1, generator=generator) < 0.25
        return finish(generator, torch.where(is_printed, printed, pen))


def draw_split(fonts: list[str], count: int, seed: int, name: str) -> Dataset:
    alphabet = Alphabet(fonts)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    digits = rng.permutation(np.arange(count) % 10)
    batches = [
        alphabet.draw(rng, generator, chunk)
        for chunk in tqdm(np.array_split(digits, math.ceil(count / 256)), desc=f"drawing {name}")
    ]
    pixels = (torch.cat(batches) * 255).round().to(torch.uint8).numpy()
    features = Features({"image": Image(), "label": ClassLabel(names=[str(d) for d in range(10)])})
    rows = {"image": [PILImage.fromarray(p) for p in pixels], "label": digits.tolist()}
    return Dataset.from_dict(rows, features=features)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_train", type=int, default=60_000)
    parser.add_argument("--num_validation", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    train = draw_split(TRAIN_FONTS, args.num_train, args.seed, "train")
    validation = draw_split(HELD_OUT_FONTS, args.num_validation, args.seed + 1, "validation")
    train.to_parquet(args.output_dir / "train.parquet")
    validation.to_parquet(args.output_dir / "validation.parquet")

    tiles = [
        np.hstack([np.asarray(train[20 * r + c]["image"]) for c in range(20)]) for r in range(8)
    ]
    PILImage.fromarray(np.vstack(tiles)).save(args.output_dir / "preview.png")
    print(f"{len(train)} training and {len(validation)} validation images in {args.output_dir}")


if __name__ == "__main__":
    main()
