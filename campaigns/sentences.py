"""Sentences as victims: which ones, the clients that share their gradients, and how what comes out is scored."""

from dataclasses import replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from attacks.threat_model.client import Client, Round
from attacks.threat_model.leak import Reconstruction
from attacks.threat_model.local_step import causal, describe_frozen
from attacks.threat_model.terms import Terms
from campaigns.campaign import LeakSource, Scoring
from data.inputs import repeat_assumptions
from data.text import Encoder, fit_tokenizer, open_sentences, read_csv, sentence_files
from defenses.base import Defense
from eval.subject import open_text_model
from eval.text_scores import SENTENCE_METRICS, score_sentence
from models import build_model
from models.huggingface_models import is_huggingface
from models.text import PAD
from models.token_jigsaw import TokenJigsaw
from reports.sentences import write_text_report
from utils.distributed import Processes
from utils.errors import UserError
from utils.files import existing_file
from utils.runs import Run


def open_victim(
    peers: Processes, *, checkpoint: str | None, name: str | None, path: str, classes: int, encoding: dict,
    columns: dict, seed: int, options: dict,
) -> tuple[nn.Module, Encoder]:  # fmt: skip
    """Return the model whose gradients are shared, with its tokenizer: of a checkpoint, or named, randomly initialised,
    with a tokenizer trained on the training sentences of `path`. options: of the model."""
    if checkpoint or is_huggingface(name):
        return open_text_model(checkpoint or name, **options)
    encoder = Encoder(fit_tokenizer(peers, path, **encoding, **columns), encoding["max_length"])
    size = {"vocab_size": encoder.tokenizer.get_vocab_size(), "max_length": encoding["max_length"]}
    return build_model(name, num_classes=classes, seed=seed, **size | options).eval(), encoder


def choose(sentences, encoder: Encoder, number: int | None, shortest: int, longest: int) -> list[int]:
    """Return indices of the sentences of `shortest` to `longest` tokens, special ones included; `number` spread over
    them."""
    fitting = [
        place for place, text in enumerate(sentences.texts) if text and shortest <= len(encoder(text)) <= longest
    ]
    if not fitting or (number or 1) > len(fitting):
        raise UserError(
            f"--num_images {number or 1}: only {len(fitting)} sentences have {shortest} to {longest} tokens "
            "(--data.min_tokens, --data.max_tokens)"
        )
    return [fitting[k * len(fitting) // number] for k in range(number)] if number else fitting


def open_sentence_campaign(
    run: Run,
    peers: Processes,
    defense: Defense,
    *,
    victim: dict,
    data: dict,
    public: str | None,
    jigsaw: dict,
    seed: int,
    dtype: str,
    terms: Terms,
    threat_model: dict,
    threshold: float,
    batch_size: int,
) -> tuple[LeakSource, Scoring]:
    """Return (clients that share the gradient of sentences of val.csv, how reconstructions of them are scored).

    Args:
        victim: checkpoint, name, encoding and options of `open_victim`.
        data: path, columns, num_images, min_tokens and max_tokens.
        public: CSV file of sentences the server has, None for none.
        jigsaw: options of `TokenJigsaw`.
        dtype: precision of the victim's gradient, float32 or float64.
        terms: of a round.
        threat_model: who knows what, for people.
        threshold: percentage of tokens in place above which a reconstruction is a success.
        batch_size: sentences behind each gradient.
    """
    sentences = open_sentences(data["path"], "val", **data["columns"])
    about = {"path": data["path"], "classes": len(sentences.classes), "columns": data["columns"], "seed": seed}
    model, encoder = open_victim(peers, **victim, **about)
    repeat_assumptions(model, run.notes)
    model = model.to(peers.device, getattr(torch, dtype))
    known = public_sentences(public, encoder, data["columns"])
    chosen = choose(sentences, encoder, data["num_images"], data["min_tokens"], data["max_tokens"])
    if line := describe_frozen(model):
        threat_model = threat_model | {"frozen": line}
    client = Client(model, TokenJigsaw(**jigsaw, seed=seed), defense, seed, terms, model.classes or sentences.classes)

    def play(batch: range) -> Round:
        texts, labels = zip(*(sentences[chosen[place]] for place in batch), strict=True)
        ids = pad_sequence([encoder(text) for text in texts], batch_first=True, padding_value=PAD)  # (B, n)
        one = client.round(batch[0], ids.to(peers.device), [sentences.classes[label] for label in labels])
        return one._replace(leak=replace(one.leak, public=known))

    names = [sentences.samples[place][0] for place in chosen]
    scoring = Scoring(
        score=lambda one, result: ({}, score_victims(one, result, encoder)),
        report=lambda run, rows, attack, told: write_text_report(run, rows, SENTENCE_METRICS, attack, told, threshold),
    )
    behind = [sentence_files(data["path"], "train", "val")] * len(names)  # the first: of classes and tokens
    return LeakSource(names, batch_size, play, threat_model, behind=behind, kind="sentences"), scoring


def public_sentences(path: str | None, encoder: Encoder, columns: dict) -> tuple[Tensor, ...]:
    """Return the token ids of the sentences in a CSV file that the server has; none without a file."""
    if path is None:
        return ()
    rows = read_csv(existing_file(path, "public sentences"), *columns.values())
    return tuple(encoder(text) for _, _, text in rows if text)


def score_victims(one: Round, result: Reconstruction, encoder: Encoder) -> list[dict]:
    """Return a row for each sentence of a batch, found sentences matched to private ones by the most tokens in place:
    the order of a batch leaves no trace in its gradient."""
    private = one.private.model_input.cpu()  # (B, n)
    found = torch.nn.functional.pad(result.images.cpu(), (0, private.shape[1]))[:, : private.shape[1]]
    same = (found[:, None] == private[None]).sum(dim=2)  # (B found, B private)
    rows, columns = linear_sum_assignment(same.numpy(), maximize=True)
    return [score_victim(one, result, place, rows[columns == place][0], encoder) for place in range(len(private))]


def score_victim(one: Round, result: Reconstruction, place: int, number: int, encoder: Encoder) -> dict:
    """Return the scores of a sentence that was found, the number-th, beside the private one at a place of the batch,
    and its label, with its `words` and which of them were `masked`, for the report."""
    private, pad = one.private, one.leak.model.pad
    ids = private.images[place]
    length = len(ids) if pad is None else int((ids != pad).sum())
    original, model_input, mask = (
        value[place, :length].cpu() for value in (private.images, private.model_input, private.mask)
    )
    found = torch.nn.functional.pad(result.images[number].cpu(), (0, length))[:length]
    ids = [value.tolist() for value in (found, original, model_input, mask)]
    row = score_sentence(
        *ids, words=lambda own: encoder.text(torch.tensor(own, dtype=torch.int64)), inner=encoder.inner
    )
    views = {"original": original, "input": model_input, "reconstruction": found}
    row["words"] = {
        view: [encoder.token(token) for token in ids[encoder.inner].tolist()] for view, ids in views.items()
    }
    row["masked"] = mask[encoder.inner].tolist()
    if causal(one.leak.model):  # its targets are its tokens
        return row
    row["label"] = int(private.labels[place])
    if one.leak.labels is None and result.labels is not None:
        row["label_found"] = 100.0 * bool(result.labels[number] == private.labels[place])
    return row
