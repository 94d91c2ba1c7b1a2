"""Show, verify, explain and plan what privacy costs.

    python privacy_report.py show runs/digits/adapter        # a folder, a ledger or a Hub id
    python privacy_report.py verify runs/digits/adapter      # exit code 1 if anything is wrong
    python privacy_report.py sign runs/digits/adapter --key ~/.ssh/id_ed25519
    python privacy_report.py officer runs/digits/adapter     # a page for whoever must sign

    # how much noise does epsilon 8 need? and what does noise 1.1 cost?
    python privacy_report.py plan --num_units 60000 --expected_batch_size 2000 \\
        --max_train_steps 200 --target_delta 1e-6 --target_epsilon 8
    python privacy_report.py plan --num_units 60000 --expected_batch_size 2000 \\
        --max_train_steps 200 --target_delta 1e-6 --noise_multiplier 1.1
    # of a run: its plan, whether it can work, and what it will take here; no image is needed
    python privacy_report.py plan --config examples/mnist/dp_lora.yaml --num_units 60000

    # hand back what a run that will not be resumed had reserved
    python privacy_report.py give_up runs/ledger.jsonl RUN

`show` prints every event, what it adds to those before it, and the epsilon they come to, by two
accountants (PLD, PRV) and under both relations (adding or removing one unit, replacing one), and
plots the stages as shares of the budget, epsilon over the steps, and against delta. `verify`
recomputes the statement from its events, and checks the files, the ledger's chain and the
checkpoints, as far as they are present: what was downloaded has no ledger.
"""

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from utils.arguments.parsing import parse_command, read_yaml
from utils.arguments.reports import (
    SCRIPTS,
    GiveUpArguments,
    OfficerArguments,
    PlanArguments,
    ShowArguments,
    SignArguments,
    VerifyArguments,
)
from utils.errors import CannotLoad, UsageError, run_script
from utils.privacy.accounting import quote

NUMBERS = ["expected_batch_size", "max_train_steps", "target_delta", "target_epsilon"]
NUMBERS += ["noise_multiplier"]
OWN_OPTIONS = {
    "dp-loda": {"activation", "negative_slope"},
    "dp-ldm": {"trainable", "trainable_blocks", "train_text_encoder", "text_encoder_rank"},
}


def show(args: ShowArguments) -> None:
    from utils.ledger.verification import read_source, summarise_spending
    from utils.privacy.plots import plot_spent

    source = read_source(args.path, args.revision)
    events, delta = source.events(), source.delta()
    if not events:
        raise UsageError(f"{args.path} has no events: nothing was spent")
    report = summarise_spending(source)
    if not report["private"]:
        print("NOT PRIVATE: the noise can be made again, so no epsilon holds; were it secret:")
    print("purpose     steps  sampling rate  noise multiplier  epsilon alone    adds")
    for row in report["events"]:
        print(
            f"{row['purpose']:10} {row['steps']:6}  {row['sampling_rate']:13.6g}  "
            f"{row['noise_multiplier']:16.4f}  {row['epsilon']:13.3f}  {row['adds']:6.3f}"
        )
    for run in report["runs"]:
        print(f"run {run['run']}: {run['released']} of {run['planned']} steps, {run['state']}")
    print(f"\ntogether, at delta {delta:g}    PLD      PRV")
    pld, prv = report["epsilon"]["pld"], report["epsilon"]["prv"]
    for what in ("add_or_remove_one", "replace_one"):
        print(f"{what.replace('_', ' '):17} {quote(pld[what]):>10} {quote(prv[what]):>8}")
    for rate, power in report["membership_inference"].items():
        found = f"at most {quote(power, 4)} are found"
        print(f"membership inference, false-positive rate {rate}: {found}")
    plot_spent(events, delta, args.plot)
    print(f"see {args.plot}")
    if args.json:
        print(json.dumps(report))


def verify(args: VerifyArguments) -> None:
    from utils.ledger.signatures import check_signature
    from utils.ledger.verification import describe_verified
    from utils.sampling.paid_sets import examine

    source, problems, known = examine(args.path, args.revision)
    said, folder = [], Path(args.path) if source.folder is None else source.folder
    if folder.is_dir() and source.statement is not None:
        said, wrong = check_signature(folder, args.signers)
        problems += wrong
    elif args.signers is not None:
        raise UsageError(f"--signers: {args.path} is not a folder or Hub id with a privacy.json")
    if problems:
        print(f"{args.path} does not verify:", file=sys.stderr)
        for problem in problems:
            print(f"- {problem}", file=sys.stderr)
        sys.exit(1)
    print("\n".join([*describe_verified(source), *known, *said]))


def sign(args: SignArguments) -> None:
    from utils.ledger.signatures import sign
    from utils.ledger.verification import find_problems, read_source

    problems = find_problems(read_source(args.path, None))
    if problems:
        raise UsageError(f"{args.path} does not verify, and is not signed: {problems[0]}")
    print(f"signed: {sign(Path(args.path), str(Path(args.key).expanduser()))}")


def officer(args: OfficerArguments) -> None:
    from utils.hub.officer import write_officers_page
    from utils.sampling.paid_sets import examine

    source, problems, known = examine(args.path, args.revision)
    if source.statement is None:
        raise UsageError(f"{args.path} holds no privacy.json: there is nothing to sign")
    write_officers_page(args.path, source, problems, known, Path(args.output_file))
    print(f"see {args.output_file}")
    if problems:
        print(f"{args.path} does not verify: {'; '.join(problems)}", file=sys.stderr)
        sys.exit(1)


def rehearse_run(args: PlanArguments, config: dict) -> dict:
    """What the training script of `--config` says of its plan, in a dry run without the images.

    Raises:
        CannotLoad: its model cannot be reached.
        UsageError: see the script.
    """
    named = [m for m in OWN_OPTIONS if OWN_OPTIONS[m] & set(config)]
    named += [m for m in OWN_OPTIONS if m.replace("-", "_") in Path(args.config).name]
    script = SCRIPTS[args.method or (named or ["dp-lora"])[0]]
    given = {name: getattr(args, name) for name in ("num_units", *NUMBERS[:-1])}
    whole = ("num_units", "max_train_steps")
    words = []
    for name, value in given.items():
        if value is not None:
            words += [f"--{name}", str(int(value) if name in whole else value)]
    for stage in ("release_means", "select_saliency"):
        if config.get(stage) is not None:
            words += [f"--{stage}", "false"]
            print(f"planned as if there were no --{stage}: {script}.py --dry_run plans all")
    before, shown = sys.argv, io.StringIO()
    with TemporaryDirectory() as folder, contextlib.redirect_stdout(shown):
        sys.argv = [f"{script}.py", "--config", args.config, "--dry_run", *words]
        sys.argv += ["--output_dir", folder]
        try:
            importlib.import_module(script).main()
        finally:
            sys.argv = before
    return json.loads(shown.getvalue())


def fill_in(args: PlanArguments, config: dict) -> None:
    """Take from `--config` what the command line does not say.

    Raises:
        UsageError: neither says it, or the file has no number there.
    """
    needed = NUMBERS[:3]
    budget = ["target_epsilon", "noise_multiplier"]
    unset = [] if args.noise_multiplier or args.target_epsilon else budget
    for name in [*needed, *unset]:
        if getattr(args, name) is None and config.get(name) is not None:
            try:
                setattr(args, name, float(config[name]))
            except (TypeError, ValueError) as error:
                told = f"{name}: {config[name]} is not a number"
                raise UsageError(f"--config {args.config}: {told}") from error
    if args.config is not None and (args.expected_batch_size or 0) > args.num_units:
        print(f"--expected_batch_size {args.num_units}: all that there are", file=sys.stderr)
        args.expected_batch_size = args.num_units  # as the script does
    missing = [f"--{name}" for name in needed if getattr(args, name) is None]
    if missing:
        raise UsageError(f"give {', '.join(missing)}, or a --config that does")


def plan(args: PlanArguments) -> None:
    config, run = {} if args.config is None else read_yaml(args.config), None
    names_model = config.get("pretrained_model_name_or_path") is not None
    if names_model and args.noise_multiplier is None:  # of another budget than the file's
        try:
            run = rehearse_run(args, config)
        except CannotLoad as error:
            print(f"not timed here: {error}", file=sys.stderr)
        else:
            args.expected_batch_size = run["expected_batch_size"]
            args.max_train_steps = run["steps"]
    if unseen := [f"--{s}" for s in BEFORE if config.get(s) and run is None]:
        print(f"warning: without what {' and '.join(unseen)} cost", file=sys.stderr)
    fill_in(args, config)
    from utils.privacy.accounting import account
    from utils.privacy.plan import calibrate_table, make_plan
    from utils.privacy.plots import plot_noise_trade_off

    chosen = make_plan(
        target_epsilon=args.target_epsilon,
        noise_multiplier=args.noise_multiplier,
        num_units=args.num_units,
        expected_batch_size=args.expected_batch_size,
        steps=int(args.max_train_steps),
        max_grad_norm=1.0,
        delta=args.target_delta,
        prior=tuple(run["prior"]) if run else (),
    )
    spent = account(chosen.events(), chosen.delta)
    after = "".join(f" after {event['purpose']}" for event in chosen.prior)
    print(
        f"N {chosen.num_units}, B {chosen.expected_batch_size:g} (q = {chosen.sampling_rate:.5g}), "
        f"{chosen.steps} steps, delta {chosen.delta:g}: noise multiplier "
        f"{chosen.noise_multiplier:.4f}{after} is epsilon {quote(spent.add_or_remove_one)} "
        f"(replace one: {quote(spent.replace_one)})"
    )
    table = calibrate_table(chosen, {0.5, 1.0, 2.0, 4.0, 8.0, args.target_epsilon or 8.0})
    print("\nepsilon  noise multiplier  noise on the mean, in units of C")
    for row in table:
        sigma = row["noise_multiplier"]
        print(f"{row['epsilon']:7g}  {sigma:16.4f}  {sigma / chosen.expected_batch_size:.3g}")
    plot_noise_trade_off(chosen, args.plot)
    print(f"see {args.plot}")
    if args.json:
        print(
            json.dumps(
                {
                    "plan": chosen.event(),
                    "epsilon": spent.both_relations(),
                    "table": table,
                    "run": run,
                }
            )
        )


def give_up(args: GiveUpArguments) -> None:
    from utils.ledger.charges import count_charged_steps
    from utils.ledger.ledger import Ledger, find_branch

    path = Path(args.ledger)
    if not path.is_file():
        raise UsageError(f"there is no ledger {path}")
    ledger = Ledger(path)
    find_branch(ledger, args.run).give_up()
    released = count_charged_steps(ledger.records(), args.run)
    print(f"run {args.run} is charged for the {released} steps that it released, and no more")


BEFORE = ("warm_start", "saliency_file")  # what a run may build on
PICTURES = (".png", ".pdf", ".svg")
WORK = {
    ShowArguments: show,
    VerifyArguments: verify,
    SignArguments: sign,
    OfficerArguments: officer,
    PlanArguments: plan,
    GiveUpArguments: give_up,
}


def main():
    commands = {work.__name__: kind for kind, work in WORK.items()}
    args = parse_command(commands, description=__doc__)
    for name in {"plot", "output_file"} & set(vars(args)):
        path = Path(getattr(args, name))
        if not path.resolve().parent.is_dir():
            raise UsageError(f"--{name} {path}: there is no such folder")
        if path.is_dir():
            raise UsageError(f"--{name} {path} is a folder: name a file in it")
        if name == "plot" and path.suffix.lower() not in PICTURES:
            raise UsageError(f"--plot {path} must end in one of {', '.join(PICTURES)}")
    WORK[type(args)](args)


if __name__ == "__main__":
    run_script(main)
