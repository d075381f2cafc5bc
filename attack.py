"""Reconstruct private images from the gradients a victim shares, and score what came out.

python attack.py --attack closed_form --model deit_small --images DIR --output DIR
--checkpoint F attacks a trained victim, --mask_ratio R one that uses MJP; torchrun shares the victims out.
"""

import time
from functools import partial

import torch

from attacks import ATTACKS
from attacks.victim import build_victim, labels_of, prepare, share
from config import AttackConfig
from data.images import list_images, read_images
from data.transforms import IMAGENET_MEAN, IMAGENET_STD, denormalize
from defenses import DEFENSES
from eval.attack_report import METRICS, save_victims, summary_table, write_csv, write_page
from eval.reconstruction import finite, score, summarize
from models.jigsaw import Jigsaw
from utils.commandline import load, options, plain
from utils.distributed import processes
from utils.errors import run_command
from utils.progress import track
from utils.runs import command_line, open_run
from utils.seeds import derive_seed


def main(argv: list[str] | None = None) -> None:
    config, resolved = load(AttackConfig, argv)
    attack, defense, dtype = ATTACKS[config.attack], DEFENSES[config.defense], getattr(torch, config.dtype)
    attack_options = options(config.attack_options, attack, "attack_options")
    defense_options = options(config.defense_options, defense, "defense_options")
    torch.backends.cudnn.allow_tf32 = False  # a shared gradient rounded to 10 bits would pass for a defence
    paths = list_images(config.images, config.num_images)
    folder = {"overwrite": config.overwrite, "inputs": (config.checkpoint, config.images)}
    with processes(config.device) as peers, open_run(config.output, resolved, peers, **folder) as run:
        victim = {"checkpoint": config.checkpoint, "name": config.model, "image_size": config.image_size}
        hides = {"unknown": True} if config.model and config.mask_ratio > 0 else {}
        model = build_victim(**victim, seed=config.seed, **hides | plain(config.model_options)).to(peers.device, dtype)
        normalize = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} | (model.normalize or {})
        normalize |= {key: getattr(config, key) for key in ("mean", "std") if getattr(config, key)}
        blocks = {"min_block": config.min_block, "max_block": config.max_block}
        jigsaw = Jigsaw(model.grid, config.mask_ratio, config.mask_sampler, **blocks, seed=config.seed)
        mine = range(0, len(paths), config.batch_size)[peers.rank :: peers.world_size]
        patch, rows, pictures = model.patch_size, [], []
        for first in track(mine, len(mine), "attack", run.log if peers.is_main else None):
            chosen = paths[first : first + config.batch_size]
            noise, generator = (
                torch.Generator().manual_seed(derive_seed(config.seed, use, first)) for use in ("defense", "attack")
            )
            images = read_images(chosen, model.arguments.get("image_size", 224), **normalize).to(peers.device, dtype)
            private = prepare(
                model, images, labels_of(model, [path.parent.name for path in chosen], images), jigsaw, first
            )
            protect = partial(defense, generator=noise, **defense_options)
            leak = share(model, private, protect, config.labels == "known")
            peers.synchronize()  # the victim's step is not the attack's time
            began = time.perf_counter()
            result = attack(leak, generator=generator, **attack_options)
            seconds = (time.perf_counter() - began) / len(chosen)
            views = [denormalize(x.cpu(), **normalize) for x in (private.original, private.shown, result.images)]
            names = [f"{first + place:04d}_{path.stem}" for place, path in enumerate(chosen)]
            scores = score(*views, private.hidden, patch)
            for place, path in enumerate(chosen):
                about = {"index": first + place, "image": str(path), "label": int(private.labels[place])}
                about |= {"seconds": seconds} | {key: values[place].item() for key, values in scores.items()}
                rows.append(about | result.diagnostics)
            pictures += save_victims(run.folder, first, names, *views)
        rows, pictures = sorted(peers.gather(rows), key=lambda row: row["index"]), dict(peers.gather(pictures))
        summary = summarize(rows, METRICS)
        run.log(summary_table(summary))
        if peers.is_main:
            write_csv(run.folder, rows)
            write_page(run.folder, command_line(), pictures, rows, summary)
        run.results({"summary": summary, "per_image": [finite(row) for row in rows]})


if __name__ == "__main__":
    run_command(main)
