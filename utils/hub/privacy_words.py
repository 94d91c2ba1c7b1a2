"""A privacy statement in plain words, and in the terms of differential privacy."""

import math

from utils.ledger.statement import quote_total
from utils.privacy.accounting import quote

# Purposes of mechanisms that clip and noise gradients; the others release means or votes.
DP_SGD = ("training", "selection", "relabelling")


def describe_plainly(statement: dict, what: str = "this repository") -> str:
    """The guarantee for a reader who knows no differential privacy and sees `what`."""
    if not statement["private"]:
        return f"**{statement['warning']}**"
    epsilon, delta = quote_total(statement)
    factor = math.exp(min(epsilon, 700))
    scale = 1 if 10 <= factor < 1e6 else 10 ** (math.floor(math.log10(factor)) - 2)
    shown = math.ceil(factor / scale - 1e-9) * scale  # three digits, and never less than it is
    odds = f"{shown:,.0f}" if scale == 1 else f"{shown:.3g}"
    unit = name_one(statement)
    was = "image was" if unit == "image" else f"{unit}'s images were"
    weak = ""
    if epsilon > 5:
        weak = (
            " That is a worst case, over every attacker and every data set; at an epsilon this "
            "large it promises little by itself, though known attacks fall far short of it."
        )
    return (
        f"Nobody who sees {what}, whatever else they know, can tell with certainty "
        f"whether any one {was} among the training data. The odds that they gave to that "
        f"before change by a factor of at most e^epsilon = {odds}, except with probability "
        f"delta = {delta:g}.{weak}{describe_membership_inference(statement)}"
    )


def name_one(statement: dict) -> str:
    """Who or what is protected, as one calls it: an image; for a column patient_id, a patient."""
    column = statement["privacy_unit"].removeprefix("all images of one ")
    return column.removesuffix("_id").replace("_", " ")


def describe_membership_inference(statement: dict) -> str:
    """What an attacker can achieve who tries to tell who was in; nothing where it is not stated."""
    power = statement.get("membership_inference")
    if power is None:
        return ""
    unit, often, rarely = name_one(statement), power["0.01"], power["0.001"]
    return (
        f" Whoever tries to tell for each {unit} whether it was used, and is wrong about one in a "
        f"hundred of those that were not, is right about at most {per_hundred(often)} in a "
        f"hundred of those that were; if wrong about one in a thousand, about at most "
        f"{per_hundred(rarely)} in a hundred."
    )


def per_hundred(share: float) -> str:
    """Rounded up, so that it stays a bound."""
    return f"{math.ceil(1000 * share) / 10:g}"


def describe_formally(statement: dict) -> str:
    """The guarantee in the terms of differential privacy."""
    if not statement["private"]:
        return f"**{statement['warning']}**"
    epsilon, accountants = statement["epsilon"], statement["accountants"]
    unit = statement["privacy_unit"]
    trained = any(e["purpose"] in DP_SGD for e in statement["events"])
    units = "images" if unit == "image" else f"units ({unit})"
    return (
        f"{'Trained with DP-SGD' if trained else 'Made from noisy means or votes'} "
        f"{'on' if trained else 'of'} {statement['num_units']} private {units}: "
        f"**epsilon = {quote(epsilon['add_or_remove_one'])}, delta = {statement['delta']:g}**, for "
        f"adding or removing one of them (epsilon = {quote(epsilon['replace_one'])} for replacing "
        f"one). {' '.join(_event_in_words(event) for event in statement['events'])} Accountants: "
        f"PLD (dp-accounting) {quote(accountants['pld']['epsilon'])}, PRV (Opacus) "
        f"{quote(accountants['prv']['epsilon'])}. `privacy.json` holds every event, so the number "
        f"can be recomputed. Not covered: {', '.join(statement['not_covered'])}."
        f"{_total(statement)}{_base(statement)}"
    )


def _base(statement: dict) -> str:
    if "base" not in statement:
        return ""
    epsilon, delta = quote_total(statement)
    return (
        " The base model is a private result, too: with what was spent on it, epsilon = "
        f"{quote(epsilon)} at delta = {delta:g}."
    )


def _event_in_words(event: dict) -> str:
    rate, noise = f"{event['sampling_rate']:.5g}", f"{event['noise_multiplier']:.4f}"
    if event["purpose"] == "selection":
        return (
            f"What is trained was selected by one release of noisy scores (sampling rate {rate}, "
            f"noise multiplier {noise})."
        )
    if event["purpose"] == "curation":
        times = "once" if event["steps"] == 1 else f"{event['steps']} times"
        return (
            "Every unit voted for the synthetic images that look like its own, "
            f"{times}; the counts were released with noise (noise multiplier {noise})."
        )
    if event["purpose"] == "relabelling":
        return (
            "A classifier, which named the synthetic images, learned from every unit in "
            f"{event['steps']} steps, each released with noise (noise multiplier {noise})."
        )
    if event["purpose"] == "means":
        if event["sampling_rate"] < 1:
            return (
                f"Noisy means of {event['steps']} Poisson batches were released (sampling rate "
                f"{rate}, noise multiplier {noise})."
            )
        if event["steps"] > 1:
            return (
                "Noisy means and second moments of all images were released, "
                f"{event['steps']} times (noise multiplier {noise})."
            )
        return f"One noisy mean of features of all images was released (noise multiplier {noise})."
    return (
        f"{event['steps']} steps, each on a Poisson batch with sampling rate {rate}; every unit's "
        f"gradient, averaged over {event['noise_multiplicity']} draw(s), is clipped once to "
        f"{event['max_grad_norm']:g}; noise multiplier {noise}."
    )


def _total(statement: dict) -> str:
    everything = statement.get("ledger", {}).get("everything")
    if everything is None:
        return ""
    delta = everything.get("delta", statement["delta"])
    one, other = (everything["epsilon"][name] for name in ("add_or_remove_one", "replace_one"))
    return (
        f" Together with all else that its ledger records on these data: epsilon = {quote(one)} "
        f"({quote(other)} for replacing one) at delta = {delta:g}."
    )
