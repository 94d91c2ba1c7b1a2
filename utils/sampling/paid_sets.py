"""Which runs of a ledger paid for a synthetic set: the epsilon of its images is credited to those
very images, and to no others."""

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from utils.errors import UsageError, on_main_process
from utils.files import LEDGER, SAMPLING_SETTINGS, private_folder
from utils.ledger.charges import select_run
from utils.ledger.checks import check_entry, check_statement
from utils.ledger.ledger import Ledger
from utils.ledger.public_sets import IS_PUBLIC
from utils.ledger.statement import add_doubts, begins_with, list_all_events, list_doubts
from utils.ledger.verification import Source, fetch_statement, find_problems, read_source
from utils.sampling.generation import ADAPTER_FILES, SET_DIGEST
from utils.sampling.shards import SET, hash_set
from utils.sampling.sources import ImageSource


@dataclass(frozen=True)
class PaidSet:
    """A synthetic set whose origin was checked.

    Attributes:
        runs: of the ledger, that its images come from; none if nothing private is behind them.
        statement: the set's own, verified; None where it needs none.
        settings: its sampling.json: how it was made. digest: of its files (`hash_set`).
    """

    runs: tuple[str, ...]
    statement: dict | None
    settings: dict
    digest: str

    def check_base(self, argument: str, statement: dict | None) -> None:
        """Whether `statement`, of what is made with this set, covers the private base model behind
        it, too; no ledger of these data has the events of that.

        Raises:
            UsageError: it does not.
        """
        behind = (self.statement or {}).get("base")
        if behind is not None and not begins_with(statement, behind):
            raise UsageError(
                f"{argument} was drawn from a base model that is a private result itself: what "
                "that cost would be missing here; use the same base model"
            )


def find_set_ledger(folder: str) -> Path | None:
    """The ledger that is likely to have paid for a set: of the run that left it, or of the adapter
    that it was drawn with."""
    beside = [Path(folder).resolve().parent]
    adapter = read_sampling(folder).get("adapter")
    if adapter is not None:
        beside.append(Path(adapter).parent if Path(adapter).is_file() else Path(adapter))
    found = (private_folder(place) / LEDGER for place in beside)
    return next((ledger for ledger in found if ledger.exists()), None)


def read_sampling(folder: str) -> dict:
    """The sampling.json of a set; empty without a valid one."""
    try:
        found = json.loads((Path(folder) / SAMPLING_SETTINGS).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def find_paid_set(folder: str, ledger: Ledger, argument: str, otherwise: str) -> PaidSet:
    """What paid for a synthetic set of release_means.py, curate.py or sample.py.

    The images must be those that were drawn: of a run's own set, the ledger has the digest; of one
    of sample.py, its sampling.json does, and the ledger has the weights that drew it.

    Args:
        argument: names the set in an error. otherwise: what to do if it has no statement.

    Raises:
        UsageError: there is no such folder; its statement is missing or does not hold; or the
            ledger does not know these very images, or what drew them.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"{argument} {folder} is not a folder")
    if (Path(folder) / SET).is_dir():
        raise UsageError(f"{argument} {folder}: its images are in {Path(folder) / SET}: name that")
    settings, digest = read_sampling(folder), hash_set(Path(folder))
    statement, _ = fetch_statement(folder)
    if statement is None:
        if settings.get(IS_PUBLIC) is True and settings.get(SET_DIGEST) == digest:
            return PaidSet((), None, settings, digest)  # sample.py drew it from a public model
        if settings.get(IS_PUBLIC) is True and SET_DIGEST in settings:
            raise UsageError(
                f"{argument} {folder} holds other images, or files, than were drawn: remove what "
                "was added, or draw it anew"
            )
        raise UsageError(
            f"{argument} {folder} has no privacy.json, so nobody can tell what it gives away; "
            f"{otherwise}"
        )
    problems = check_statement(statement) if statement.get("private") is not False else []
    if problems:
        raise UsageError(f"{argument} {folder}: {'; '.join(problems)}")
    records = ledger.records()
    wrote = [record for record in records if record["kind"] == "wrote"]
    found = [record for record in wrote if record["files"].get(SET) == digest]
    files = statement["files"].items()
    if settings.get(SET_DIGEST) == digest and is_drawn_with(statement, settings):
        found += [record for record in wrote if files <= record["files"].items()]
    if not found:
        raise UsageError(
            f"the ledger {ledger.path} did not pay for {argument} {folder}, or its images are "
            "not those that were drawn: name the ledger that it is in, or make it anew"
        )
    return PaidSet(list_runs_behind(records, found[-1]["run"]), statement, settings, digest)


def examine(path: str, revision: str | None) -> tuple[Source, list[str], list[str]]:
    """What `path` holds, what is wrong with it (`find_problems`), and what is known of its images,
    a sentence each, if it is a synthetic set, or left one: the weights behind the images of a set,
    which the statement accounts for, are not in their folder.

    Raises:
        UsageError: see `read_source`.
    """
    source = read_source(path, revision)
    settings = {} if source.folder is None else read_sampling(str(source.folder))
    is_set = bool({SET_DIGEST, ADAPTER_FILES} & set(settings)) and source.statement is not None
    if not is_set or source.extras or _holds_any(source.folder, source.statement):
        return source, *_check_with_set(source)
    alone = replace(source, folder=None, ledger=None)
    problems = find_problems(alone)
    if problems:
        return alone, problems, []
    return alone, *_check_images(source, settings)


def _check_with_set(source: Source) -> tuple[list[str], list[str]]:
    """What is wrong with a run, or with the set that it left in its folder, if there is one; and
    what is known of its images."""
    problems = find_problems(source)
    if problems or source.folder is None or not (source.folder / SET).is_dir():
        return problems, []
    if SET_DIGEST not in read_sampling(str(source.folder / SET)):
        return [f"{SET}/: not all of its images were drawn: give its command again"], []
    _, problems, known = examine(str(source.folder / SET), None)
    return [f"{SET}/: {problem}" for problem in problems], [f"{SET}/: {said}" for said in known]


def _holds_any(folder: Path, statement: dict) -> bool:
    """Whether files that a statement accounts for are there: then it is no set, whatever it says,
    and they are what must be checked."""
    files = statement.get("files")
    return not isinstance(files, dict) or any((folder / name).exists() for name in files)


def _check_images(source: Source, settings: dict) -> tuple[list[str], list[str]]:
    """What is wrong with the images of a set whose statement holds by itself, and what is known."""
    if SET_DIGEST not in settings:
        return ["not all of its images were drawn: give its sample.py command again"], []
    if hash_set(source.folder) != settings[SET_DIGEST]:
        return ["its images are not those that were drawn"], []
    statement = source.statement
    if settings.get(ADAPTER_FILES) and not is_drawn_with(statement, settings):
        return ["its statement is not that of the adapter that drew its images"], []
    ledger = find_set_ledger(str(source.folder))
    if ledger is None:
        return [], [
            "its images are those that its sampling.json names; the ledger that would have them on "
            "record is not here"
        ]
    try:
        paid = find_paid_set(str(source.folder), Ledger(ledger), "the set", "it cannot verify")
    except UsageError as error:
        return [str(error)], []
    if paid.runs[-1:] != (statement["ledger"]["run"],):
        return ["its statement is not that of the run that its images come from"], []
    problems = check_entry(statement, Ledger(ledger).records())
    if problems:
        return problems, []
    return [], ["ok: its images are those that the ledger of their run paid for"]


def is_drawn_with(statement: dict, settings: dict) -> bool:
    """Whether the weights that drew a set, by its sampling.json, are all those of a statement."""
    drawn_with = settings.get(ADAPTER_FILES, {}).items()
    weights = {file for file in statement["files"].items() if file[0].endswith(".safetensors")}
    return bool(weights) and weights <= drawn_with


def list_runs_behind(records: list[dict], run: str) -> tuple[str, ...]:
    """A run and those that it builds on; none if the ledger does not know it."""
    terms = [record for record in select_run(records, run) if record["kind"] == "reserve"]
    return (*terms[-1]["builds_on"], run) if terms else ()


def check_judge(folder: str | None, source: ImageSource) -> ImageSource:
    """`source`, among whose images a set is to choose (`--reject_by`), if its statement covers the
    set, too; with what is doubted about that.

    Raises:
        UsageError: see `find_covered_set`.
    """
    if folder is None:
        return source
    otherwise = "draw one with release_means.py"
    instead = "train with --warm_start from it, or leave --reject_by out"
    ledger = Ledger(find_set_ledger(folder) or private_folder(Path(folder).parent) / LEDGER)
    judge = on_main_process(
        lambda: find_covered_set(
            folder, ledger, source.statement, "--reject_by", otherwise, instead
        )
    )
    doubts = list_doubts(judge.statement)
    return replace(source, statement=add_doubts(source.statement, doubts)) if doubts else source


def find_covered_set(
    folder: str,
    ledger: Ledger,
    statement: dict | None,
    argument: str,
    otherwise: str,
    instead: str,
) -> PaidSet:
    """A set that `ledger` paid for, and whose whole cost is in `statement`; or that is public.

    A run may go on after its adapter was published, under the same name. So it is not enough that
    the statement's run builds on those of the set: each of the set's events, with its steps, must
    be among the statement's.

    Args:
        otherwise, instead: what to do if it has no statement; if it cost more.

    Raises:
        UsageError: see `find_paid_set`; or it cost what the statement does not cover.
    """
    paid = find_paid_set(folder, ledger, argument, otherwise)
    paid.check_base(f"{argument} {folder}", statement)
    run = (statement or {}).get("ledger", {}).get("run")
    unknown = set(paid.runs) - set(list_runs_behind(ledger.records(), run))
    if unknown or _count_events(paid.statement) - _count_events(statement):
        raise UsageError(
            f"{argument} {folder} has cost privacy that the statement does not cover: {instead}"
        )
    return paid


def _count_events(statement: dict | None) -> Counter:
    """How often each event is behind a result, those of its base model included."""
    events = [] if statement is None else list_all_events(statement)
    return Counter(json.dumps(event, sort_keys=True) for event in events)
