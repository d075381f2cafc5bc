"""Which pictures took part in what was shared, by the span of one layer's gradient: a head, LoRA or adapters suffice.

python membership.py --model vit --share head --batch_size 32 --images DIR --others DIR --output DIR
python membership.py --leak F --checkpoint F --share lora --candidates DIR --others DIR --output DIR
"""

from options import MembershipConfig
from utils.commandline import read_options
from utils.errors import run_command


def main(argv: list[str] | None = None) -> None:
    config, resolved = read_options(MembershipConfig, argv)  # torch loads below: --help need not wait
    import torch

    from attacks.threat_model.client import Client
    from attacks.threat_model.recorded import list_leaks
    from attacks.threat_model.victim import build_victim
    from campaigns.membership import ask_membership
    from campaigns.sources import attack_scale, private_labels, recorded, send, simulated, sized
    from data.images import list_images
    from defenses import build_defense
    from models.jigsaw import Jigsaw
    from utils.distributed import processes
    from utils.runs import open_run

    defense = build_defense(config.defense, config.defense_options, "image")
    paths = list_images(config.images, **config.listing()) if config.images else []
    with processes(config.device) as peers, open_run(config.output, resolved, peers, **config.folder()) as run:
        model = build_victim(**sized(config.victim(), config.leak)).to(peers.device, getattr(torch, config.dtype))
        scale = attack_scale(model, config.mean, config.std, config.leak, run.notes)
        model, sent = send(model, scale, config.server_images, **config.sent())
        if config.leak:
            source = recorded(list_leaks(config.leak), model, [], scale=scale, sent=sent, **config.leak_terms())
        else:
            jigsaw = Jigsaw(model.grid, config.mask_ratio, **config.sampler("image"), seed=config.seed)
            classes = private_labels(model, config.images, run.notes, config.attributes, paths)
            client = Client(model, jigsaw, defense, config.seed, config.terms(scale), classes, **config.client())
            source = simulated(client, paths, config.batch_size, config.threat_model(str(defense)) | sent)
        ask_membership(run, source, **config.asked())


if __name__ == "__main__":
    run_command(main)
