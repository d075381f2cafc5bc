"""The campaign of attack.py on sentences: which ones, what their gradients give away, and the report."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from attacks import attack_together
from attacks.threat_model.client import Client
from attacks.threat_model.local_step import describe_frozen
from attacks.threat_model.uses import used
from data.inputs import repeat_assumptions
from data.text import Encoder, fit_tokenizer, open_sentences, read_csv
from defenses.base import Defense
from eval.subject import open_text_model
from eval.text_scores import score_sentence
from models import build_model
from models.huggingface_models import is_huggingface
from models.token_jigsaw import TokenJigsaw
from reports.sentences import write_text_report
from reports.watch import watcher
from utils.campaign import Campaign
from utils.distributed import Processes
from utils.errors import UserError
from utils.files import existing_file
from utils.progress import track
from utils.runs import Run


def open_victim(
    peers: Processes, *, checkpoint: str | None, name: str | None, path: str, classes: int, encoding: dict,
    columns: dict, seed: int, options: dict,
) -> tuple[nn.Module, Encoder]:  # fmt: skip
    """The model whose gradients are shared, with its tokenizer: of a checkpoint, or named, randomly initialised, with a
    tokenizer trained on the training sentences of `path`. options: of the model."""
    if checkpoint or is_huggingface(name):
        return open_text_model(checkpoint or name, **options)
    encoder = Encoder(fit_tokenizer(peers, path, **encoding, **columns), encoding["max_length"])
    size = {"vocab_size": encoder.tokenizer.get_vocab_size(), "max_length": encoding["max_length"]}
    return build_model(name, num_classes=classes, seed=seed, **size | options).eval(), encoder


def choose(sentences, encoder: Encoder, number: int | None, shortest: int, longest: int) -> list[int]:
    """Indices of the sentences of `shortest` to `longest` tokens, special ones included; `number` spread over them."""
    fitting = [
        place for place, text in enumerate(sentences.texts) if text and shortest <= len(encoder(text)) <= longest
    ]
    if not fitting or (number or 1) > len(fitting):
        raise UserError(
            f"--num_images {number or 1}: only {len(fitting)} sentences have {shortest} to {longest} tokens "
            "(--data.min_tokens, --data.max_tokens)"
        )
    return [fitting[k * len(fitting) // number] for k in range(number)] if number else fitting


def attack_sentences(
    run: Run,
    peers: Processes,
    *,
    name: str,
    attack: Callable,
    attack_options: dict,
    victim: dict,
    data: dict,
    public: str | None,
    jigsaw: dict,
    defense: Defense,
    seed: int,
    dtype: torch.dtype,
    terms: dict,
    threat_model: dict,
    threshold: float,
    watch_every: int,
    together: int,
) -> None:
    """Attack the sentences of val.csv one by one and write the report.

    name: of the attack; victim: checkpoint, name, encoding and options of `open_victim`; data: path, columns,
    num_images, min_tokens and max_tokens; public: a CSV of sentences the server has; jigsaw: options of `TokenJigsaw`;
    the rest as in attack.py.
    """
    log = run.log if peers.is_main else None
    sentences = open_sentences(data["path"], "val", **data["columns"])
    about = {"path": data["path"], "classes": len(sentences.classes), "columns": data["columns"], "seed": seed}
    model, encoder = open_victim(peers, **victim, **about)
    repeat_assumptions(model, run.notes)
    model = model.to(peers.device, dtype)
    known = public_sentences(public, encoder, data["columns"])
    chosen = choose(sentences, encoder, data["num_images"], data["min_tokens"], data["max_tokens"])
    terms = {"mean": (0.0,), "std": (1.0,)} | terms
    if line := describe_frozen(model):
        run.log(line)
        threat_model = threat_model | {"frozen": line}
    client = Client(model, TokenJigsaw(**jigsaw, seed=seed), defense, seed, terms, model.classes or sentences.classes)
    names = [sentences.samples[place][0] for place in chosen]
    campaign = Campaign(run.folder, names, peers)
    run.start()
    if campaign.finished:
        run.log(f"continuing: {len(campaign.finished)} of {len(names)} sentences are done{run.changes}")
    groups = campaign.todo(1, together)
    for group in track(groups, len(groups), "attack", log):
        rounds = []
        for batch in group:
            text, label = sentences[chosen[batch[0]]]
            one = client.round(batch[0], encoder(text)[None].to(peers.device), [sentences.classes[label]])
            rounds.append(one._replace(leak=replace(one.leak, public=known)))
        watch = watcher(run, watch_every, [batch[0] for batch in group], None)
        results, seconds = peers.timed(attack_together, attack, rounds, watch, attack_options)
        for batch, one, result in zip(group, rounds, results, strict=True):
            row = score_victim(one.private, result.images[0].cpu(), encoder)
            row["label"] = int(one.private.labels)
            if one.leak.labels is None and result.labels is not None:
                row["label_found"] = 100.0 * bool(result.labels == one.private.labels)
            campaign.add(campaign.rows(batch, [row], {"seconds": seconds / len(group)} | result.diagnostics))
    if rows := campaign.merge():
        run.results(write_text_report(run, rows, name, used(threat_model, name, attack_options), threshold))
        campaign.close()


def public_sentences(path: str | None, encoder: Encoder, columns: dict) -> tuple[Tensor, ...]:
    """Token ids of the sentences in a CSV file that the server has; none without a file."""
    if path is None:
        return ()
    rows = read_csv(existing_file(path, "public sentences"), *columns.values())
    return tuple(encoder(text) for _, _, text in rows if text)


def score_victim(private, found: Tensor, encoder: Encoder) -> dict:
    """Scores of one reconstructed sentence, with its `words` and which of them were `masked`, for the report."""
    original, model_input, mask = private.images[0].cpu(), private.model_input[0].cpu(), private.mask[0].cpu()
    found = torch.nn.functional.pad(found, (0, len(original)))[: len(original)]
    ids = [value.tolist() for value in (found, original, model_input, mask)]
    scores = score_sentence(*ids, words=lambda inner: encoder.text(torch.tensor(inner, dtype=torch.int64)))
    views = {"original": original, "input": model_input, "reconstruction": found}
    words = {view: [encoder.token(place) for place in ids[1:-1].tolist()] for view, ids in views.items()}
    return scores | {"words": words, "masked": mask[1:-1].tolist()}
