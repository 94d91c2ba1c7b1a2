"""Small networks of one's own, trained on public images, whose features are compared."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from utils.arguments.evaluation import EvaluateArguments, ExtractorArguments
from utils.data.image_column import find_image_column
from utils.data.images import ImageRows, keep_readable, read_pixel_batches
from utils.data.rows import load_split, read_labels
from utils.errors import UsageError
from utils.files import replace_file, resolve_if_there
from utils.ledger.public_sets import refuse_as_public, refuse_own_images
from utils.metrics.synthetic_accuracy.classifiers import CLASSIFIERS, Recipe, train_classifier

NETWORK, LEARNED_FROM = "network", "public_data"  # in the metadata of the file


def train_extractor(args: ExtractorArguments, path: Path, device: torch.device) -> None:
    """Train the classifier on `--public_data`, and save it in fp16, whole or not at all.

    Raises:
        UsageError: there is no `--public_data`, or see `refuse_as_public`.
    """
    if args.public_data is None:
        raise UsageError(
            f"--classifier_weights {path} does not exist: to train it, name --public_data, "
            "labelled images that anyone may see"
        )
    pixels, labels = [], []
    for number, source in enumerate(args.public_data):
        refuse_as_public("--public_data", source)
        rows = load_split(source, None, None, "train")
        column = find_image_column(rows, None, "--public_data with one column of images")
        images, _ = keep_readable(ImageRows(rows, column))
        own = read_labels(images.rows, args.public_label_column)
        labels += [(number, label) for label in own]
        pixels += read_pixel_batches(images, 32, 256)
    names = {name: number for number, name in enumerate(sorted(set(labels)))}
    numbers = torch.tensor([names[label] for label in labels])
    recipe = Recipe(args.public_network, len(names), args.public_steps, 0)
    model = train_classifier(torch.cat(pixels), numbers, recipe, device)
    halves = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    sources = json.dumps([resolve_if_there(source) for source in args.public_data])
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as aside:
        save_file(halves, aside, {NETWORK: args.public_network, LEARNED_FROM: sources})
        aside.chmod(0o644)  # safetensors writes files that only their owner may read


def load_extractor(path: Path) -> nn.Module:
    """What `train_extractor` saved, on the processor.

    Raises:
        UsageError: see `_read_metadata`; or it is another file.
    """
    try:
        model, weights = CLASSIFIERS[_read_metadata(path).get(NETWORK, "cnn")], load_file(path)
        model = model(len(weights["1.1.bias"]))
        model.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise UsageError(
            f"--classifier_weights {path} is not what --public_data makes: name a file that is "
            "not there, to train one"
        ) from error
    return model


def list_public_data(args: ExtractorArguments) -> list[str]:
    """The images that are taken as public when features are compared, folders and Hub ids: what the
    classifier is to learn from, or learned from, as far as its file says.

    Raises:
        UsageError: what it learned from is known by now to be private (`refuse_as_public`).
    """
    named, weights = list(args.public_data or []), args.classifier_weights
    if args.extractor != "classifier" or weights is None or not Path(weights).is_file():
        return named
    learned_from = json.loads(_read_metadata(Path(weights)).get(LEARNED_FROM, "[]"))
    for source in learned_from:
        refuse_as_public(f"--classifier_weights {weights} learned from", source)
    return [*named, *learned_from]


def refuse_as_learned_from(args: EvaluateArguments, extractor: ExtractorArguments) -> None:
    """Refuse an extractor whose `--public_data` are among the images to protect: who lets private
    images vote by its features would take it as public.

    Raises:
        UsageError: they are the private images, or test images that are not said to be public.
    """
    learned_from = list_public_data(extractor)
    if args.has_private:
        refuse_own_images(learned_from, args.private_dataset_name or args.private_data_dir)
    test = args.test_dataset_name or args.test_data_dir
    if test is not None and not args.test_is_public:
        otherwise = "what is public must lie elsewhere, or the test images be --test_is_public"
        refuse_own_images(learned_from, test, otherwise)


def _read_metadata(path: Path) -> dict[str, str]:
    """Raises: UsageError if it is no safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise UsageError(f"--classifier_weights {path} cannot be read: {error}") from error
