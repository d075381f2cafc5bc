"""What the words of a page mean, said when one is pointed at."""

GLOSSARY = {
    "PSNR (dB)": "peak signal-to-noise ratio against the private image, mean ± standard deviation over images; "
    "above 25 dB it is recognisable",
    "best (dB)": "the largest PSNR of an image",
    "no leak (dB)": "PSNR of one picture in the mean colour of the private image, which takes no gradient",
    "SSIM": "structural similarity to the private image; 1 is equal",
    "n": "how many images, or gradients, a mean is taken over",
    "std": "sample standard deviation",
    "perfect": "copies without any error, whose PSNR is infinite; mean and std leave them out",
    "budget": "how long the attack searched, beside what its paper gives it",
    "s an image": "seconds the attack took for an image, on this machine",
    "naive attacker": "does not know of the defence",
    "who knows the defence": "knows the defence and its strength, and answers it",
    "strength": "options of the defence: what it changes, and by how much",
    "labels read": "share of the labels of a batch that its gradient gives away",
    "rule": "how labels are read off the gradient of the last layer",
    "open, visible patch": "numbers of a patch that the equations leave open; 0: all of it leaks",
    "open, hidden patch": "the same for a patch that MJP hides",
    "MJP": "Masked Jigsaw Puzzle: some patches are shuffled and their positions hidden",
    "MJP, the attacker": "what the attacker knows of Masked Jigsaw Puzzle",
    "withheld": "gradients that the client does not send",
    "shared": "what the server receives",
    "frozen": "layers that are not trained, and so not shared",
    "not used by this attack": "what the server knows and this attack needs none of",
    "DP-SGD": "differentially private training: gradients clipped and noise added",
}
