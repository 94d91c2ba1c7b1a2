"""After training, the private images vote for the synthetic ones that look like them.

    # the digits of make demo, and a little more of the budget: keep the better half
    python curate.py --config examples/digits/warm_start/dp_lora.yaml \\
        --synthetic runs/digits/images_private --curation_epsilon 1 \\
        --output_dir runs/digits/curated \\
        --extractor classifier --classifier_weights examples/digits/extractor.safetensors

    # Private Evolution: no training at all, from a public model's images
    python sample.py --pretrained_model_name_or_path examples/digits/base --output_dir runs/start \\
        --class_names 0 1 2 3 4 5 6 7 8 9 --caption_template "the digit {label}"
    python curate.py --config examples/digits/dp_lora.yaml --synthetic runs/start --rounds 4 \\
        --target_epsilon 1 --output_dir runs/evolved

Each private image votes for its nearest candidates of its class, in the features of a public
network; the counts are released with noise, and the candidates with the most votes are kept (Lin et
al. 2024). With --rounds, the winners are varied by image-to-image, and there is another vote. What
the votes cost joins the ledger and the new set's statement; --target_epsilon is for all.

In --output_dir: votes.safetensors, the noisy counts, with their statement privacy.json; votes.png,
the most and the least voted for; and set/, as sample.py leaves one. With --resume_from_checkpoint
latest an interrupted curation goes on. --config may be that of a training script, whose other
options are ignored, but those of what is spent.
"""

from utils.arguments.curation import CurationArguments
from utils.arguments.evaluation import ExtractorArguments
from utils.arguments.means import LaterModelArguments
from utils.arguments.methods import OF_TRAINING, SHARED, refuse_of_training
from utils.arguments.parsing import parse
from utils.arguments.publishing import PublishSetArguments
from utils.errors import UsageError, run_script


def main():
    args, extractor, model, data, privacy, training, hub = parse(
        *(CurationArguments, ExtractorArguments, LaterModelArguments),
        *SHARED[1:4],
        PublishSetArguments,
        description=__doc__,
        others=OF_TRAINING,
    )
    refuse_of_training("a vote", privacy, training, "--curation_epsilon or --target_epsilon")
    if training.num_units is not None:
        raise UsageError("--num_units: a vote needs the images, whose classes decide who votes")
    # Imported now, since it takes seconds: a mistake on the command line should not wait for it.
    from utils.methods.curation import run_curation

    run_curation(args, extractor, model, data, privacy, training, hub)


if __name__ == "__main__":
    run_script(main)
