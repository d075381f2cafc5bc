"""Which attacks apply to what a server has, and why the others do not: said before any of them works.

A check takes a Leak and the options the attack will run with, looks at names, shapes and modules alone (a preview, see
`expected`, has no gradients yet) and raises UserError. Attacks by equations carry the one they refuse by (attacks/
checks.py); those of matching stand here, and tests/attacks/test_applicable.py holds them against what the attack does.
"""

from collections.abc import Sequence
from fnmatch import fnmatch
from inspect import signature

from torch import nn

from attacks import ATTACKS, SENTENCES
from attacks.checks import CROSS_ENTROPY, Check, check_dropout
from attacks.class_features import check_count
from attacks.closed_form import closed_form
from attacks.labels import BIAS_RULES, classifier_of
from attacks.leak import Aggregate, Leak, LocalSteps
from attacks.likelihood import Likelihood
from attacks.matching import MatchingOptions
from attacks.matching.problem import check_likelihood
from attacks.priors import BatchNormStatistics
from attacks.sentence import check_sentence
from utils.errors import UserError


def expected(
    model: nn.Module,
    batch_size: int,
    *,
    reveal_labels: bool,
    local: Sequence | None,
    withhold: Sequence[str] = (),
    aggregate: Aggregate | None = None,
    **terms,
) -> Leak:
    """A preview of the leaks of simulated clients: parameters stand in for gradients, of which only names and shapes
    mean anything. terms: as in attacks.victim.share."""
    shared = {
        name: value.detach()
        for name, value in model.named_parameters()
        if value.requires_grad
        and not any(fnmatch(name, pattern) for pattern in withhold)
        and not name.startswith("localization.")
    }
    side = model.arguments["image_size"]
    labels = next(model.parameters()).new_zeros(batch_size).long() if reveal_labels else None
    known = {key: terms[key] for key in ("training", "dropout_seed", "tier") if key in terms}
    local = LocalSteps(*local) if local else None
    return Leak(model, shared, (3, side, side), batch_size, labels, local=local, aggregate=aggregate, **known)


def applicable(leak: Leak, loss: str = CROSS_ENTROPY) -> dict[str, str]:
    """By name of every attack on images: why it does not apply to this leak with its default options, empty if it does.
    Those on sentences have no place in such a list."""
    return {name: obstacle(name, leak, {}, loss) for name in ATTACKS if name not in SENTENCES}


def obstacle(name: str, leak: Leak, options: dict, loss: str = CROSS_ENTROPY) -> str:
    """Why the attack does not apply with these options, empty if it does. loss: the client's, as leak files name it."""
    attack = ATTACKS[name]
    given = {key: item.default for key, item in signature(attack).parameters.items()} | options
    try:
        check_of(name)(leak, given, loss, name)
    except UserError as error:
        return str(error)
    return ""


def check_of(name: str) -> Check:
    """Return the check of an attack: its own, one of those below, or that of the matching loop."""
    attack = ATTACKS[name]
    return getattr(attack, "check", None) or CHECKS.get(name) or CHECKS[type(attack.preset)]


def describe(verdicts: dict[str, str]) -> str:
    """The result of `applicable` as lines of text."""
    fitting = [name for name, why in verdicts.items() if not why]
    lines = [f"attacks that apply: {', '.join(fitting) or 'none'}"]
    lines += [f"  {name:<20} no: {reason(name, why)}" for name, why in verdicts.items() if why]
    return "\n".join(lines)


def reason(name: str, why: str) -> str:
    """An obstacle without the name of its attack, for tables that have it in another column."""
    return why.removeprefix(f"attack '{name}' ")


def _matching(leak: Leak, options: dict, loss: str, name: str) -> None:
    if not leak.gradients:
        raise UserError("gradient matching needs at least one gradient: everything is withheld from this leak")
    if loss != CROSS_ENTROPY:
        raise UserError(f"attack '{name}' repeats the step with mean cross-entropy, and the client's loss is '{loss}'")
    check_dropout(leak, name, seed_helps=True)
    check_likelihood(leak, options["objective"])
    if options["objective"] == "likelihood":
        given = {key: options[key] for key in ("defense", "defense_options", "softness")}
        Likelihood(**given, batch_size=leak.batch_size)
    if options["init"] == "closed_form":
        closed_form.check(leak, {"underdetermined": True}, loss, "closed_form")
    if options["pos_embed_cosine"]:
        leak.gradient("pos_embed", name)
    if options["image_prior"] and not options["image_prior_checkpoint"]:
        raise UserError("the image prior needs a CNN with BatchNorm: pass image_prior_checkpoint, or image_prior 0")
    if options["batch_norm"]:
        with BatchNormStatistics(leak.model) as seen:
            if not seen.layers:
                raise UserError("the batch_norm prior needs a victim with BatchNorm layers: set batch_norm to 0")
    rule = options["labels"]
    if leak.labels is None and rule != "joint":
        _check_labels(leak, rule)
    if options["features"]:
        layer = classifier_of(leak.model, leak.image_shape)
        if any(f"{layer}.{part}" not in leak.gradients for part in ("weight", "bias")):
            raise UserError("the feature prior needs the gradients of the classifier's weight and bias: leave it out")


def _ats_aware(leak: Leak, options: dict, loss: str, name: str) -> None:
    base = options["base"]
    why = obstacle(base, leak, options["base_options"] or {}, loss) if base in ATTACKS else ""
    if why:
        raise UserError(why)


def _check_labels(leak: Leak, rule: str) -> None:
    if rule == "idlg" and leak.batch_size > 1:
        raise UserError(
            f"label rule 'idlg' reads one label, the batch has {leak.batch_size}: use bias_corrected, or yin if unique"
        )
    layer = classifier_of(leak.model, leak.image_shape)
    if rule == "class_features":
        leak.gradient(f"{layer}.bias" if layer else "bias", f"label rule {rule}")
        check_count(leak.batch_size, *leak.model.get_submodule(layer).weight.shape)
    leak.gradient(f"{layer}.{'bias' if rule in BIAS_RULES else 'weight'}" if layer else "weight", f"label rule {rule}")


def _text(leak: Leak, options: dict, loss: str, name: str) -> None:
    check_sentence(leak, name)


CHECKS: dict[str | type, Check] = {
    "ats_aware": _ats_aware,
    "text_dlg": _text,
    "tag": _text,
    MatchingOptions: _matching,
}
