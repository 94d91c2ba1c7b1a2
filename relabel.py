"""After training, a private classifier says what the synthetic images show.

    # a base for the classifier: a network that knows public images, here characters
    python relabel.py --config examples/mnist/dp_lora.yaml --synthetic runs/mnist/images \\
        --target_epsilon 10 --output_dir runs/mnist/relabelled \\
        --extractor classifier --classifier_weights runs/characters.safetensors \\
        --public_data FOLDER

An image drawn for "the digit 4" may look like a 9, and a classifier that learns from it learns
that. So a linear classifier of the features of a public network is trained on the private images
by DP-SGD, every image in every step, and each synthetic image gets the label, and the prompt, that
it finds likeliest. It is good at little noise: few weights, and features that were never private.
What it costs joins the ledger and the new set's statement; --target_epsilon is for all.

Images of the same adapter that are drawn later, or others to be kept, are named at no cost by the
classifier that is there: relabel.py --labeller runs/mnist/relabelled --synthetic runs/mnist/more.
That reads no private image and has no budget, so --output_dir then gets set/, with the statement
of the classifier, and relabelled.png, and what else is said of private images is not used.

In --output_dir: labeller.safetensors, the classifier, with its statement privacy.json;
relabelled.png, images that changed their class, a column for each that they came to; and set/, as
sample.py leaves one. With --resume_from_checkpoint latest an interrupted run goes on. --config may
be that of a training script, whose other options are ignored, but those of what is spent.
"""

from utils.arguments.evaluation import ExtractorArguments
from utils.arguments.means import LaterModelArguments
from utils.arguments.methods import OF_TRAINING, SHARED, refuse_of_training
from utils.arguments.parsing import parse
from utils.arguments.publishing import PublishSetArguments
from utils.arguments.relabelling import RelabellingArguments
from utils.errors import UsageError, run_script


def main():
    args, extractor, model, data, privacy, training, hub = parse(
        *(RelabellingArguments, ExtractorArguments, LaterModelArguments),
        *SHARED[1:4],
        PublishSetArguments,
        description=__doc__,
        others=OF_TRAINING,
    )
    # Imported late, since it takes seconds: a mistake on the command line should not wait for it.
    if args.labeller is not None:
        from utils.methods.naming import name_more

        return name_more(args, extractor, privacy, training, hub)
    budget = "--relabel_epsilon or --target_epsilon"
    refuse_of_training("a classifier that names images", privacy, training, budget)
    if training.num_units is not None:
        raise UsageError("--num_units: a classifier needs the images, whose classes it learns")
    from utils.methods.relabelling import run_relabelling

    run_relabelling(args, extractor, model, data, privacy, training, hub)


if __name__ == "__main__":
    run_script(main)
