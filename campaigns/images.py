"""The campaign of attack.py on images: attack every victim, score what came out, and write the report."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from attacks import ATTACKS, attack_together
from campaigns.sources import LeakSource, batch_victims, check_attack_applies, open_campaign, score_round
from eval.fft2d import fft2d
from eval.lpips import load_lpips
from reports.attack import save_pictures, write_report
from reports.watch import watcher
from utils.distributed import Processes
from utils.progress import track
from utils.runs import Run


def further_metrics(lpips: str | None, trunk: str | None) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return the scores beside the usual ones, by name: FFT2D, and LPIPS with this network, its weights in `trunk`."""
    network = load_lpips(lpips, trunk) if lpips else None
    return {"fft2d": fft2d} | ({network.name: network} if network else {})


def attack_images(
    run: Run,
    peers: Processes,
    victims: LeakSource,
    paths: Sequence[Path],
    scale: dict,
    *,
    name: str,
    options: dict,
    together: int | str | None,
    watch_every: int,
    metrics: dict[str, Callable[[Tensor, Tensor], Tensor]],
    success_psnr: float,
) -> None:
    """Attack `victims` one group after another, and write results.json, pictures and report into the run folder.

    Args:
        paths: the private images, as far as they are at hand.
        scale: mean and std of the model's input.
        name, options: the attack, and its options.
        together: victims attacked as one problem, 'auto', or None for the default (see AttackConfig.victims_at_once).
        watch_every: iterations between pictures of a running optimisation; 0 takes none.
        metrics: scores beside the usual ones, by name.
        success_psnr: PSNR in dB above which a reconstruction counts as a success.
    """
    attack = ATTACKS[name]
    check_attack_applies(run, victims, name, options)
    campaign = open_campaign(run, victims, paths, peers)
    groups = batch_victims(run, victims, campaign, together, attack, options)
    for group in track(groups, len(groups), "attack", run.log if peers.is_main else None):
        rounds = [victims.round(batch) for batch in group]
        watch = watcher(run, watch_every, [batch[0] for batch in group], scale)
        results, seconds = peers.timed(attack_together, attack, rounds, watch, options)
        for batch, one, result in zip(group, rounds, results, strict=True):
            views, scores = score_round(one, result, metrics)
            rows = campaign.rows(batch, scores, {"seconds": seconds / sum(map(len, group))} | result.diagnostics)
            save_pictures(run.folder, rows, views)
            campaign.add(rows)
    if rows := campaign.merge():
        run.results(write_report(run, rows, *victims.told(name, options), success_psnr))
        campaign.close()
