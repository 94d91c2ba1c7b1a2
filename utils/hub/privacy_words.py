"""A privacy statement in plain words, and in the terms of differential privacy."""

import math


def describe_plainly(statement: dict, what: str = "this repository") -> str:
    """The guarantee for a reader who knows no differential privacy and sees `what`."""
    if not statement["private"]:
        return f"**{statement['warning']}**"
    epsilon = statement["epsilon"]["add_or_remove_one"]
    factor = math.exp(min(epsilon, 700))
    odds = f"{factor:,.0f}" if 10 <= factor < 1e6 else f"{factor:.3g}"
    unit = "image" if statement["privacy_unit"] == "image" else "unit"
    weak = ""
    if epsilon > 5:
        weak = (
            " That is a worst case, over every attacker and every data set; at an epsilon this "
            "large it promises little by itself, though known attacks fall far short of it."
        )
    return (
        f"Nobody who sees {what}, whatever else they know, can tell with certainty "
        f"whether any one {unit} was among the training data. The odds that they gave to that "
        f"before change by a factor of at most e^epsilon = {odds}, except with probability "
        f"delta = {statement['delta']:g}.{weak}"
    )


def describe_formally(statement: dict) -> str:
    """The guarantee in the terms of differential privacy."""
    if not statement["private"]:
        return f"**{statement['warning']}**"
    epsilon, accountants = statement["epsilon"], statement["accountants"]
    unit = statement["privacy_unit"]
    units = "images" if unit == "image" else f"units ({unit})"
    return (
        f"Trained with DP-SGD on {statement['num_units']} private {units}: "
        f"**epsilon = {epsilon['add_or_remove_one']:.3f}, delta = {statement['delta']:g}**, for "
        f"adding or removing one of them (epsilon = {epsilon['replace_one']:.3f} for replacing "
        f"one). {' '.join(_event_in_words(event) for event in statement['events'])} Accountants: "
        f"PLD (dp-accounting) {accountants['pld']['epsilon']:.3f}, PRV (Opacus) "
        f"{accountants['prv']['epsilon']:.3f}. `privacy.json` holds every event, so the number can "
        f"be recomputed. Not covered: {', '.join(statement['not_covered'])}.{_total(statement)}"
    )


def _event_in_words(event: dict) -> str:
    rate, noise = f"{event['sampling_rate']:.5g}", f"{event['noise_multiplier']:.4f}"
    if event["purpose"] == "selection":
        return (
            f"What is trained was selected by one release of noisy scores (sampling rate {rate}, "
            f"noise multiplier {noise})."
        )
    if event["purpose"] == "mean embedding":
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
    epsilon = everything["epsilon"]
    return (
        f" Together with all else that its ledger records on these data: epsilon = "
        f"{epsilon['add_or_remove_one']:.3f} ({epsilon['replace_one']:.3f} for replacing one) at "
        f"delta = {everything.get('delta', statement['delta']):g}."
    )
