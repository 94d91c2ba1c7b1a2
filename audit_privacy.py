"""Audit: which epsilon does a real training run provably exceed? Less than the reported one?

    python audit_privacy.py                      # the engine, on real handwritten digits
    python audit_privacy.py --mutants            # and broken on purpose, six ways: are they caught?
    python audit_privacy.py --mutant no_noise    # one of them
    python audit_privacy.py --canaries images    # a weaker, more realistic attacker
    python audit_privacy.py --replay --mutants   # another audit, in half a minute: see below
    python audit_privacy.py --pretrained_model_name_or_path MODEL --train_data_dir scans \\
        --caption_column text --target_epsilon 4 --noise_multiplicity 8    # your own set-up

Canaries are put among the training images, each in or out by a coin; the real training loop runs;
an attacker who sees what it released guesses which were in (Steinke, Nasr and Jagielski 2023). With
`--canaries gradients` each canary's gradient has a separate direction, and the largest norm that
clipping allows; the attacker sees the noisy sum of every step: the worst case that epsilon must
cover. With `images` the canaries are images of noise, and the attacker sees their loss before and
after.

Writes audit.json and audit.png to --output_dir. A bound far below the reported epsilon proves
little by itself; that the mutants are caught proves that the audit can see. On your own images, the
audit is a private run: it is recorded in a ledger, what it finds goes into OUTPUT_DIR/private and
is not for publication, and mutants, which protect nobody, are refused.

`--replay` takes some steps of the real loop with and without one unit, all randomness the same:
nobody else may be sampled or computed otherwise, the sum may move by at most C, and the noise must
be there. It catches all six mutants, also shuffled batches, which guessing cannot see. It reads no
images. Add --replay_audit to a training script to do that with your model and arguments, before
anything is spent.
"""

import json
import sys
from pathlib import Path

from utils.arguments.audit import MUTANTS, AuditArguments, check_images, names_images
from utils.arguments.parsing import parse
from utils.arguments.training import DataArguments
from utils.errors import run_script


def print_table(findings: list[dict]) -> None:
    print(f"\n{'training loop':28} reported   proven  right guesses")
    for f in findings:
        verdict = "CAUGHT" if f["caught"] else "not caught" if f["mutant"] else "as it should be"
        print(
            f"{f['mutant'] or 'as it is':28} {f['reported_epsilon']:8.2f} {f['lower_bound']:8.2f}"
            f"  {f['right']:4} of {f['guesses']}  {verdict}"
        )


def build_report(findings: list[dict], args: AuditArguments) -> dict:
    """What audit.json holds: the finding on the loop as it is, and those on the mutants."""
    keys = ("mutant", "reported_epsilon", "lower_bound", "caught", "right", "guesses", "score")
    rows = [{key: finding[key] for key in keys} for finding in findings]
    return rows[0] | {
        "confidence": args.confidence,
        "delta": args.target_delta,
        "canaries": args.canaries,
        "num_canaries": args.num_canaries,
        "mutants": {row["mutant"]: row for row in rows[1:] if row["mutant"]},
    }


def replay_all(args: AuditArguments, data: DataArguments) -> None:
    """Replay the loop as it is, and mutants if asked for; exit code 1 if a finding is wrong."""
    from utils.audit.audited_run import audit_by_replay

    names = [args.mutant, *(MUTANTS if args.mutants else [])]
    findings = {name: audit_by_replay(args, data, name) for name in names}
    for name, finding in findings.items():
        verdict = "as it should be" if finding["passed"] else "; ".join(finding["problems"])
        print(f"{name or 'as it is':28} {verdict}")
    report = findings.pop(args.mutant) | {"mutants": findings}
    if args.json:
        print(json.dumps(report))
    is_wrong = report["passed"] == bool(args.mutant)
    if is_wrong or any(finding["passed"] for finding in findings.values()):
        sys.exit(1)


def main():
    args, data = parse(AuditArguments, DataArguments, description=__doc__)
    check_images(args, data)
    if args.replay:
        replay_all(args, data)
        return
    # Imported now, since it takes seconds: a mistake on the command line should not wait for it.
    from utils.audit.audited_run import audit
    from utils.audit.auditing import plot_findings
    from utils.data.folders import refuse_among_images
    from utils.files import make_private, private_folder, write_durably
    from utils.ledger.public_sets import refuse_as_public

    if args.data_is_public:
        refuse_as_public("--data_is_public:", data.train_data_dir or data.dataset_name)
    output_dir, is_private = Path(args.output_dir), names_images(data) and not args.data_is_public
    refuse_among_images(output_dir, data.train_data_dir, data.dataset_name)
    make_private(private_folder(output_dir))
    runs = [(args.target_epsilon, args.mutant)]
    if args.mutants:
        runs += [(args.mutant_epsilon, name) for name in (None, *MUTANTS)]
    findings = []
    for epsilon, mutant in runs:
        print(f"auditing the loop {mutant or 'as it is'}, at epsilon {epsilon:g}", flush=True)
        findings.append(audit(args, data, epsilon, mutant))

    if is_private:
        output_dir = private_folder(output_dir)
    plot_findings(findings, output_dir / "audit.png")
    report = build_report(findings, args) | {"covered_by_epsilon": not is_private}
    write_durably(output_dir / "audit.json", json.dumps(report, indent=2) + "\n")
    print_table(findings)
    print(f"see {output_dir / 'audit.png'}")
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    run_script(main)
