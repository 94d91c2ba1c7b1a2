"""Publish what a training script left, or finish an upload that failed.

    python push_to_hub.py --output_dir runs/scans --hub_model_id user/scans
    python push_to_hub.py --output_dir runs/scans --dry_run           # which files would leave?
    python push_to_hub.py --output_dir runs/scans --hub_model_id user/scans \
        --metrics_file runs/synthetic/metrics.json                    # with evaluate.py's figures

Uploads the weights that privacy.json accounts for, privacy.json, the model card, sampling.json and
the samples, in one commit; nothing else ever leaves the folder. First it verifies them, as
`privacy_report.py verify` does: what does not verify, or is stamped NOT PRIVATE, is not published.
Doing it again is safe. Figures that read private images stay off the card unless
--publish_private_metrics asks for them.
"""

from dataclasses import dataclass
from pathlib import Path

from utils.arguments.parsing import option, parse
from utils.arguments.publishing import HubArguments, MetricsArguments
from utils.errors import UsageError, run_script


@dataclass
class PushArguments:
    """What to publish."""

    output_dir: str = option("folder of a finished run")
    dry_run: bool = option("verify them, print their names, and stop", False)


def main():
    push, hub, metrics = parse(PushArguments, HubArguments, MetricsArguments, description=__doc__)
    if hub.hub_model_id is None and not push.dry_run:
        raise UsageError("give --hub_model_id, the repository to publish in")
    if hub.hub_license is not None:
        raise UsageError(
            "--hub_license is for the scripts that write the card: here, edit `license` in the "
            "README.md of --output_dir"
        )
    # Imported now, since it takes seconds: a mistake on the command line should not wait for it.
    from utils.hub.upload import prepare_model, publish_model

    folder = Path(push.output_dir)
    if push.dry_run:
        print("\n".join(prepare_model(folder, metrics)[0]))
    else:
        print(f"published {publish_model(folder, hub, metrics)}")


if __name__ == "__main__":
    run_script(main)
