"""Show, verify and plan what privacy costs.

    python privacy_report.py show runs/digits/adapter        # a folder, a ledger or a Hub id
    python privacy_report.py verify runs/digits/adapter      # exit code 1 if anything is wrong

    # how much noise does epsilon 8 need? and what does noise 1.1 cost?
    python privacy_report.py plan --num_units 60000 --expected_batch_size 2000 \\
        --max_train_steps 200 --target_delta 1e-6 --target_epsilon 8
    python privacy_report.py plan --num_units 60000 --expected_batch_size 2000 \\
        --max_train_steps 200 --target_delta 1e-6 --noise_multiplier 1.1
    python privacy_report.py plan --config examples/mnist/dp_lora.yaml --num_units 60000

    # hand back what a run that will not be resumed had reserved
    python privacy_report.py give_up runs/ledger.jsonl RUN

`show` prints every event and the epsilon they come to, by two accountants (PLD, PRV) and under both
relations (adding or removing one unit, replacing one), and draws epsilon over the steps and against
delta. `verify` recomputes the statement from its events, and checks the files, the ledger's chain
and the checkpoints, as far as they are there: what was downloaded has no ledger.
"""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from utils.accounting import account, calibrate_noise_multiplier, make_plan, pld_epsilon
from utils.arguments import PrivacyArguments, read_yaml
from utils.errors import UsageError, run_script
from utils.ledger import Ledger, charged_steps, is_live, page_of
from utils.privacy_plots import draw_spent, draw_trade_off
from utils.verification import problems_of, read_source


def show(args) -> None:
    source = read_source(args.path, args.revision)
    events, delta = source.events(), source.delta()
    if not events:
        raise UsageError(f"{args.path} has no events: nothing was spent")
    spent = account(events, delta)
    rows = [{**event, "epsilon": pld_epsilon([event], delta)} for event in events]
    report = {
        "delta": delta,
        "events": rows,
        "epsilon": {
            "pld": spent.both_relations(),
            "prv": {"add_or_remove_one": spent.prv, "replace_one": spent.prv_replace_one},
        },
        "runs": _runs(source.ledger.records()) if source.ledger else [],
    }
    print("purpose     steps  sampling rate  noise multiplier  epsilon alone")
    for row in rows:
        print(
            f"{row['purpose']:10} {row['steps']:6}  {row['sampling_rate']:13.6g}  "
            f"{row['noise_multiplier']:16.4f}  {row['epsilon']:13.3f}"
        )
    for run in report["runs"]:
        print(f"run {run['run']}: {run['released']} of {run['planned']} steps, {run['state']}")
    print(f"\ntogether, at delta {delta:g}    PLD      PRV")
    print(f"add or remove one   {spent.add_or_remove_one:8.3f} {spent.prv:8.3f}")
    print(f"replace one         {spent.replace_one:8.3f} {spent.prv_replace_one:8.3f}")
    draw_spent(events, delta, args.plot)
    print(f"see {args.plot}")
    if args.json:
        print(json.dumps(report))


def _runs(records: list[dict]) -> list[dict]:
    runs = []
    for run in dict.fromkeys(r["run"] for r in records):
        own = [r for r in records if r["run"] == run]
        given_up = own[-1]["kind"] == "give_up"
        state = "given up" if given_up else "unfinished" if is_live(records, run) else "finished"
        planned = [r for r in own if r["kind"] == "reserve"][-1]["event"]["steps"]
        released = charged_steps(records, run, live=False)
        runs.append({"run": run, "released": released, "planned": planned, "state": state})
    return runs


def verify(args) -> None:
    source = read_source(args.path, args.revision)
    problems = problems_of(source)
    if problems:
        print(f"{args.path} does not verify:", file=sys.stderr)
        for problem in problems:
            print(f"- {problem}", file=sys.stderr)
        sys.exit(1)
    if source.statement is not None:
        epsilon = source.statement["epsilon"]
        print(
            f"ok: epsilon {epsilon['add_or_remove_one']:.3f} at delta "
            f"{source.statement['delta']:g} (replace one: {epsilon['replace_one']:.3f}) follows "
            "from the events of the statement"
        )
    if source.statement is not None and source.folder is not None:
        print(f"ok: the {len(source.statement['files'])} published file(s) are those paid for")
    if source.ledger is not None:
        print("ok: the ledger is whole, and agrees with the statement and the checkpoints")
    else:
        print("its ledger is not here, and was not checked")


PLANNED = ["expected_batch_size", "max_train_steps", "target_delta"]
BUDGETS = ["target_epsilon", "noise_multiplier"]


def fill_in(args) -> None:
    """Take from `--config` what the command line does not say.

    Raises:
        UsageError: neither says it.
    """
    config = {} if args.config is None else read_yaml(args.config)
    noise = [] if args.noise_multiplier or args.target_epsilon else BUDGETS
    for name in [*PLANNED, *noise]:
        if getattr(args, name) is None and config.get(name) is not None:
            setattr(args, name, float(config[name]))
    missing = [f"--{name}" for name in PLANNED if getattr(args, name) is None]
    if missing:
        raise UsageError(f"give {', '.join(missing)}, or a --config that does")
    args.max_train_steps = int(args.max_train_steps)


def plan(args) -> None:
    fill_in(args)
    privacy = PrivacyArguments(
        target_epsilon=args.target_epsilon,
        target_delta=args.target_delta,
        noise_multiplier=args.noise_multiplier,
        expected_batch_size=args.expected_batch_size,
    )
    chosen = make_plan(args.num_units, privacy, args.max_train_steps)
    spent = account([chosen.event()], chosen.delta)
    print(
        f"N {chosen.num_units}, B {chosen.expected_batch_size:g} (q = {chosen.sampling_rate:.5g}), "
        f"{chosen.steps} steps, delta {chosen.delta:g}: noise multiplier "
        f"{chosen.noise_multiplier:.4f} is epsilon {spent.add_or_remove_one:.3f} "
        f"(replace one: {spent.replace_one:.3f})"
    )
    targets = sorted({0.5, 1.0, 2.0, 4.0, 8.0, args.target_epsilon or 8.0})
    table = []
    for target in tqdm(targets, "calibrating", leave=False):
        sigma = calibrate_noise_multiplier(target, chosen.delta, chosen.sampling_rate, chosen.steps)
        table.append({"epsilon": target, "noise_multiplier": sigma})
    print("\nepsilon  noise multiplier  noise on the mean, in units of C")
    for row in table:
        sigma = row["noise_multiplier"]
        print(f"{row['epsilon']:7g}  {sigma:16.4f}  {sigma / chosen.expected_batch_size:.3g}")
    draw_trade_off(chosen, args.plot)
    print(f"see {args.plot}")
    if args.json:
        print(
            json.dumps({"plan": chosen.event(), "epsilon": spent.both_relations(), "table": table})
        )


def give_up(args) -> None:
    path = Path(args.ledger)
    if not path.is_file():
        raise UsageError(f"there is no ledger {path}")
    ledger = Ledger(path)
    page_of(ledger, args.run).give_up()
    released = charged_steps(ledger.records(), args.run)
    print(f"run {args.run} is charged for the {released} steps that it released, and no more")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for work, help_line in (
        (show, "every event, the epsilon of all, two plots"),
        (verify, "recompute and compare; exit code 1 if anything is wrong"),
    ):
        command = commands.add_parser(work.__name__, help=help_line, description=help_line)
        command.add_argument(
            "path", help="run folder, ledger (.jsonl), statement (.json) or Hub id"
        )
        command.add_argument("--revision", help="revision of a Hub id")
        command.set_defaults(work=work)
        if work is show:
            _add_outputs(command, "privacy_report.png")
    command = commands.add_parser("plan", help="how much noise for how much epsilon")
    command.add_argument("--num_units", type=int, required=True, help="N")
    command.add_argument("--config", help="YAML file of a run, for what is not given here")
    command.add_argument("--expected_batch_size", type=float, help="B, units a step")
    command.add_argument("--max_train_steps", type=int, help="private steps")
    command.add_argument("--target_delta", type=float, help="below 1/N")
    command.add_argument("--target_epsilon", type=float, help="find the noise for it")
    command.add_argument("--noise_multiplier", type=float, help="or find the epsilon of this noise")
    _add_outputs(command, "privacy_plan.png")
    command.set_defaults(work=plan)
    command = commands.add_parser("give_up", help="hand back what a dead run had reserved")
    command.add_argument("ledger", help="ledger file")
    command.add_argument("run", help="run, as `show` names it")
    command.set_defaults(work=give_up)
    return parser.parse_args()


def _add_outputs(command: argparse.ArgumentParser, plot: str) -> None:
    command.add_argument("--plot", default=plot, help="picture to draw (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="print one JSON object at the end")


def main():
    args = parse()
    args.work(args)


if __name__ == "__main__":
    run_script(main)
