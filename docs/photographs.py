"""Cut the two photographs that come with scikit-learn into a folder of small images, for the experiments in the docs.

    python docs/photographs.py DIR

DIR/train and DIR/val hold tiles of 160 × 160 pixels; those of val lie between those of train. Accuracy on them measures
how well a network knows these photographs, not how well it generalizes to others.
"""

import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images

SIDE, STEP = 160, 40

if __name__ == "__main__":
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        for split, start in (("train", 0), ("val", STEP // 2)):
            folder = Path(sys.argv[1]) / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for y in range(start, photograph.shape[0] - SIDE + 1, STEP):
                for x in range(start, photograph.shape[1] - SIDE + 1, STEP):
                    tile = photograph[y : y + SIDE, x : x + SIDE]
                    Image.fromarray(tile).save(folder / f"{y:03}_{x:03}.jpg", quality=95)
