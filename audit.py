"""What one shared gradient of a model gives away, measured within minutes, as one page for people.

python audit.py --model vit --output DIR
python audit.py --checkpoint F --images DIR --mask_ratio 0.27 --output DIR
python audit.py --check RECEIVED --reference BEFORE --output DIR: was the model a server sent tampered with?
"""

from options import AuditConfig
from utils.commandline import read_options
from utils.errors import run_command


def main(argv: list[str] | None = None) -> None:
    config, resolved = read_options(AuditConfig, argv)  # torch loads below: --help need not wait
    import torch

    from attacks.threat_model.victim import build_victim
    from campaigns.audit import audit
    from campaigns.sources import attack_scale
    from data.images import list_images
    from defenses.detector import check_model, findings_text
    from utils.distributed import processes
    from utils.runs import open_run

    paths = list_images(config.images, config.num_images) if config.images else []
    with processes(config.device) as peers, open_run(config.output, resolved, peers, **config.folder()) as run:
        if config.check:
            found = check_model(config.check, config.reference, config.images)
            run.log(findings_text(found))
            return run.results({"check": found})
        model = build_victim(**config.victim()).to(peers.device, getattr(torch, config.dtype))
        scale = attack_scale(model, config.mean, config.std, None, run.notes)
        audit(run, peers, model, paths, scale, **config.terms())


if __name__ == "__main__":
    run_command(main)
