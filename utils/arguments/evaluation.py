"""The options of evaluation: the sets, what is asked of them, and the feature extractor."""

import math
from dataclasses import dataclass

from utils.arguments.parsing import option
from utils.arguments.training import ModelArguments
from utils.arguments.values import INTENSITY_HELP, check_between, check_range
from utils.errors import UsageError

CLASSIFIERS = ["cnn", "wide-cnn", "resnet9", "wrn-40-4"]
LARGEST_SIDE = 64  # unless another was asked for: classifiers must be done in minutes
MEASURED = ["fidelity", "utility", "memorisation"]


@dataclass
class EvaluateArguments:
    """The sets, and what is asked of them."""

    synthetic: str = option("synthetic set: a folder that sample.py left, or a Hub id")
    synthetic_revision: str | None = option("revision of a synthetic set on the Hub", None)
    test_dataset_name: str | None = option(
        "real images that nothing was trained on: Hub id or folder of parquet files", None
    )
    test_data_dir: str | None = option("image folder, instead of --test_dataset_name", None)
    test_split: str | None = option(
        "split of the test images; default: test, or the only one there is", None
    )
    test_is_public: bool = option(
        "the test images may be shown, and numbers about them published", False
    )
    private_dataset_name: str | None = option(
        "images that the adapter was trained on, for memorisation: Hub id or folder of parquet "
        "files",
        None,
    )
    private_data_dir: str | None = option("image folder, instead of --private_dataset_name", None)
    private_split: str = option("split of the private images", "train")
    synthetic_image_column: str | None = option(
        "column of the synthetic images; default: image, or the only one that holds images", None
    )
    test_image_column: str | None = option("column of the test images; default: likewise", None)
    private_image_column: str | None = option(
        "column of the private images; default: likewise", None
    )
    synthetic_label_column: str = option("column of the synthetic labels, for utility", "label")
    test_label_column: str = option("column of the test labels", "label")
    private_label_column: str | None = option(
        "column of the private labels, for --train_on_real; default: that of the test labels", None
    )
    label_separator: str | None = option(
        "an image has any number of labels, with this between their names, such as '|': the area "
        "under the ROC curve of each is measured; default: a comma where the test labels are "
        "lists, else each image has one label",
        None,
    )
    intensity_range: list[float] | None = option(INTENSITY_HELP, None)
    metrics: list[str] | None = option(
        f"which of {', '.join(MEASURED)}; default: all that the sets allow", None
    )
    frechet_by_class: bool = option("also measure the Frechet distance class by class", False)
    evaluation_resolution: int | None = option(
        "side of the images for classifiers and neighbours; default: that of the first synthetic "
        f"image, at most {LARGEST_SIDE}",
        None,
    )
    classifiers: list[str] = option(f"any of {', '.join(CLASSIFIERS)}", ["cnn"])
    classifier_seeds: int = option("classifiers of each kind, each with another seed", 3)
    classifier_steps: list[int] = option(
        "optimizer steps, 128 images each: one number, or one for each of --classifiers; a first "
        "look by default: what takes longer to learn than digits seems worse than it is",
        [600],
    )
    train_on_real: bool = option(
        "for reference, also train the classifiers on the private images", False
    )
    compare: list[str] | None = option("metrics.json of other runs, for the report", None)
    output_file: str | None = option(
        "default: metrics.json in the folder that sample.py left, or else in runs/NAME", None
    )

    def __post_init__(self):
        for name, known in (("metrics", MEASURED), ("classifiers", CLASSIFIERS)):
            unknown = sorted(set(getattr(self, name) or []) - set(known))
            if unknown:
                raise UsageError(
                    f"--{name} {' '.join(unknown)}: unknown; there are: {', '.join(known)}"
                )
        check_range(self.intensity_range)
        if self.label_separator == "":
            raise UsageError("--label_separator must not be empty")
        if self.evaluation_resolution is not None:  # classifiers halve it three times
            check_between("evaluation_resolution", self.evaluation_resolution, 8, math.inf)
        if self.classifier_seeds < 1 or min(self.classifier_steps, default=0) < 1:
            raise UsageError("--classifier_seeds and --classifier_steps must be at least 1")
        if not self.classifiers or len(set(self.classifiers)) < len(self.classifiers):
            raise UsageError("--classifiers must name at least one network, and none twice")
        if len(self.classifier_steps) not in (1, len(self.classifiers)):
            raise UsageError(
                f"--classifier_steps has {len(self.classifier_steps)} numbers: give one for all, "
                f"or one for each of the {len(self.classifiers)} --classifiers"
            )
        if not self.has_private and (self.train_on_real or "memorisation" in (self.metrics or [])):
            raise UsageError(
                "memorisation and --train_on_real need the images that the adapter was trained on: "
                "give --private_dataset_name or --private_data_dir"
            )

    @property
    def steps_of_networks(self) -> dict[str, int]:
        steps = self.classifier_steps
        return dict(zip(self.classifiers, steps * len(self.classifiers), strict=False))

    @property
    def has_private(self) -> bool:
        return self.private_dataset_name is not None or self.private_data_dir is not None

    @property
    def test_source(self) -> tuple:
        """Arguments of `load_split`. Raises: UsageError if none or two are named."""
        if (self.test_dataset_name is None) == (self.test_data_dir is None):
            raise UsageError("give exactly one of --test_dataset_name and --test_data_dir")
        return (self.test_dataset_name, None, self.test_data_dir, self.test_split)

    @property
    def private_source(self) -> tuple:
        return (self.private_dataset_name, None, self.private_data_dir, self.private_split)


@dataclass
class GenerateFirstArguments(ModelArguments):
    """Generate the synthetic set first: the public pipeline, with the options of sample.py."""

    pretrained_model_name_or_path: str | None = option(
        "generate the images into --synthetic with this pipeline first; default: use those in it",
        None,
    )


@dataclass
class ExtractorArguments:
    """The network whose features are compared."""

    extractor: str = option(
        "efficientnet-lite0: ImageNet features that come with the requirements; inception: the "
        "usual one of FID, downloaded; clip; classifier: a small one, trained on --public_data",
        "efficientnet-lite0",
        choices=["efficientnet-lite0", "inception", "clip", "classifier"],
    )
    inception_weights: str | None = option(
        "file inception-2015-12-05.pt (TorchScript); default: downloaded once", None
    )
    clip_model: str = option(
        "CLIP of transformers: folder or Hub id", "openai/clip-vit-base-patch32"
    )
    classifier_weights: str | None = option(
        "safetensors file of the classifier extractor; made from --public_data if it is not there",
        None,
    )
    public_data: list[str] | None = option(
        "PUBLIC labelled images to train the classifier extractor on: folders or Hub ids, one or "
        "more; the classes of each are its own",
        None,
    )
    public_label_column: str = option("column of their labels", "label")
    public_network: str = option(
        f"any of {', '.join(CLASSIFIERS)}: the classifier that is made", "cnn", choices=CLASSIFIERS
    )
    public_steps: int = option("optimizer steps of its training, 128 images each", 1000)

    def __post_init__(self):
        check_between("public_steps", self.public_steps, 1, math.inf)
