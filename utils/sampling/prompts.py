"""The prompts of a synthetic set, from what the command line gives."""

from dataclasses import replace
from pathlib import Path

from utils.arguments.sampling import USUAL_TEMPLATE, SamplingArguments
from utils.data.rows import fill_template
from utils.errors import UsageError
from utils.files import read_text


def choose_template(args: SamplingArguments, recorded: list[dict]) -> SamplingArguments:
    """`args` with the template that makes prompts of class names: what was asked for, or the first
    that is recorded of a model."""
    if args.class_names is None or args.caption_template is not None:
        return args
    templates = [settings.get("caption_template") for settings in recorded]
    return replace(args, caption_template=next(filter(None, templates), USUAL_TEMPLATE))


def read_prompts(args: SamplingArguments) -> list[dict]:
    """One entry a prompt: its text, and its label where class names were given.

    Raises:
        UsageError: not exactly one source of prompts, a missing or empty file, a bad template.
    """
    given = [args.prompts is not None, args.prompts_file is not None, args.class_names is not None]
    if sum(given) != 1:
        raise UsageError("give exactly one of --prompts, --prompts_file and --class_names")
    if args.class_names is not None:
        return [
            {"text": fill_template(args.caption_template, name), "label": name}
            for name in args.class_names
        ]
    texts = args.prompts
    if args.prompts_file is not None:
        path = Path(args.prompts_file)
        if not path.is_file():
            raise UsageError(f"--prompts_file {path}: there is no such file")
        texts = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if not texts:
        raise UsageError("there are no prompts")
    return [{"text": text} for text in texts]
