"""Reconstruct private images or sentences from the gradients a victim shares, and score what came out.

python attack.py --attack closed_form --model deit_small --images DIR --output DIR
python attack.py --attack token_rows --model text_small --data.kind text --data.path DIR --output DIR
--leak F: what a real client sent; --server NAME: a malicious server; --resume auto: continue; torchrun: share out.
"""

from options import AttackConfig
from utils.commandline import options, read_options
from utils.errors import run_command


def main(argv: list[str] | None = None) -> None:
    config, resolved = read_options(AttackConfig, argv)  # torch loads below: --help need not wait
    import torch

    from attacks import ATTACKS
    from attacks.threat_model.client import Client
    from attacks.threat_model.recorded import list_leaks
    from attacks.threat_model.victim import build_victim
    from campaigns.audit import audit, write_security
    from campaigns.campaign import run_campaign
    from campaigns.scoring import scoring_of
    from campaigns.sentences import open_sentence_campaign
    from campaigns.sources import attack_scale, private_labels, recorded, send, simulated, sized
    from data.images import list_images
    from defenses import build_defense
    from models.jigsaw import Jigsaw
    from utils.distributed import processes
    from utils.runs import open_run

    attack_options = options(config.attack_options, ATTACKS[config.attack], "attack_options")
    defense = build_defense(config.defense, config.defense_options, config.data.kind)
    how = {"at_once": config.victims_at_once, "watch_every": config.watch_every}
    scoring = scoring_of(config.attack, config.lpips, config.lpips_trunk, config.success_psnr)
    paths = list_images(config.images, **config.listing()) if config.images else []
    torch.backends.cudnn.allow_tf32 = False  # a shared gradient rounded to 10 bits would pass for a defence
    with processes(config.device) as peers, open_run(config.output, resolved, peers, **config.folder()) as run:
        if config.data.kind == "text":
            source, scoring = open_sentence_campaign(run, peers, defense, **config.sentences(str(defense)))
            return run_campaign(run, peers, source, scoring, name=config.attack, options=attack_options, **how)
        model = build_victim(**sized(config.victim(), config.leak)).to(peers.device, getattr(torch, config.dtype))
        scale = attack_scale(model, config.mean, config.std, config.leak, run.notes)
        model, sent = send(model, scale, config.server_images, **config.sent())
        if config.metric_only:
            return write_security(run, model, **config.shapes())
        if config.audit:
            return audit(run, peers, model, paths, scale, **config.audit_terms())
        if config.leak:
            source = recorded(list_leaks(config.leak), model, paths, scale=scale, sent=sent, **config.leak_terms())
        else:
            jigsaw = Jigsaw(model.grid, config.mask_ratio, **config.sampler("image"), seed=config.seed)
            classes = private_labels(model, config.images, run.notes, config.attributes, paths)
            client = Client(model, jigsaw, defense, config.seed, config.terms(scale), classes, **config.client())
            source = simulated(client, paths, config.batch_size, config.threat_model(str(defense)) | sent)
        run_campaign(run, peers, source, scoring, name=config.attack, options=attack_options, **how)


if __name__ == "__main__":
    run_command(main)
