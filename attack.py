"""Reconstruct private images or sentences from the gradients a victim shares, and score what came out.

python attack.py --attack closed_form --model deit_small --images DIR --output DIR
python attack.py --attack token_rows --model text_small --data.kind text --data.path DIR --output DIR
--checkpoint F: a trained victim; --mask_ratio R: one that uses MJP; --resume auto: continue; torchrun shares them out.
"""

import torch

from attacks import ATTACKS, attack_together, worth_together
from attacks.security import describe, security
from attacks.victim import Client, build_victim
from config import AttackConfig
from data.images import class_folders, list_images, read_images
from data.transforms import IMAGENET_MEAN, IMAGENET_STD, denormalize
from defenses import build_defense
from eval.attack_report import save_pictures, write_report
from eval.fft2d import fft2d
from eval.lpips import load_lpips
from eval.reconstruction import judge
from eval.watch import watcher
from models.jigsaw import Jigsaw
from text_campaign import attack_sentences
from utils.campaign import Campaign
from utils.commandline import load, options
from utils.distributed import processes
from utils.errors import run_command
from utils.progress import track
from utils.runs import open_run


def main(argv: list[str] | None = None) -> None:
    config, resolved = load(AttackConfig, argv)
    attack, dtype = ATTACKS[config.attack], getattr(torch, config.dtype)
    attack_options = options(config.attack_options, attack, "attack_options")
    defense = build_defense(config.defense, config.defense_options, config.data.kind)
    lpips = [load_lpips(config.lpips, config.lpips_trunk)] if config.lpips else []
    metrics = {"fft2d": fft2d} | {metric.name: metric for metric in lpips}
    paths = list_images(config.images, config.num_images) if config.images and not config.metric_only else []
    torch.backends.cudnn.allow_tf32 = False  # a shared gradient rounded to 10 bits would pass for a defence
    with processes(config.device) as peers, open_run(config.output, resolved, peers, **config.folder()) as run:
        if config.data.kind == "text":
            given = {"attack": attack, "attack_options": attack_options, "defense": defense, "dtype": dtype}
            return attack_sentences(run, peers, **given, **config.sentences(str(defense)))
        model = build_victim(**config.victim()).to(peers.device, dtype)
        if config.metric_only:
            found = security(model, **config.shapes())
            run.log(describe(found))
            return run.results({"security": found})
        normalize = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} | (model.normalize or {})
        normalize |= {key: getattr(config, key) for key in ("mean", "std") if getattr(config, key)}
        jigsaw = Jigsaw(model.grid, config.mask_ratio, **config.sampler("image"), seed=config.seed)
        terms, classes = normalize | config.terms(), model.classes or class_folders(config.images)
        client = Client(model, jigsaw, defense, config.seed, terms, classes)
        campaign = Campaign(run.folder, [str(path) for path in paths], peers)
        if campaign.finished:
            run.log(f"continuing: {len(campaign.finished)} of {len(paths)} images are done{run.changes}")
        groups = campaign.todo(config.batch_size, config.victims_at_once or worth_together(attack, model))
        for group in track(groups, len(groups), "attack", run.log if peers.is_main else None):
            rounds = []
            for batch in group:
                chosen = [paths[index] for index in batch]
                images = read_images(chosen, model.arguments["image_size"], **normalize).to(peers.device, dtype)
                rounds.append(client.round(batch[0], images, [path.parent.name for path in chosen]))
            watch = watcher(run, config.watch_every, [batch[0] for batch in group], normalize)
            results, seconds = peers.timed(attack_together, attack, rounds, watch, attack_options)
            for batch, (private, _, _), result in zip(group, rounds, results, strict=True):
                views = [denormalize(x.cpu(), **normalize) for x in (private.original, private.shown, result.images)]
                found = result.labels if config.labels == "hidden" else None
                views, scores = judge(*views, private.hidden, private.labels, found, model.patch_size, metrics)
                rows = campaign.rows(batch, scores, {"seconds": seconds / sum(map(len, group))} | result.diagnostics)
                save_pictures(run.folder, rows, views)
                campaign.add(rows)
        if rows := campaign.merge():
            run.results(write_report(run, rows, config.threat_model(str(defense)), config.success_psnr))
            campaign.close()


if __name__ == "__main__":
    run_command(main)
