"""English to German by the 2:4 network of models/translation-2of4, which has learned short sentences of Tatoeba.

pip install 'openwork[train]'
python translate.py "Tom is my friend." "Where are you?"
"""

import argparse
from pathlib import Path

import torch

from openwork.recipes.trained import load_run

MODEL = Path(__file__).parents[1] / "models" / "translation-2of4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sentences", nargs="+")
    parser.add_argument("--model", type=Path, default=MODEL)
    asked = parser.parse_args()

    net, _, config, info = load_run(asked.model)
    for sentence in asked.sentences:
        ids = torch.tensor([info.tokenizer.encode(sentence).ids])
        with torch.no_grad():
            made = net.generate(input_ids=ids, num_beams=config.beams, max_new_tokens=2 * ids.shape[1] + 10)
        print(f"{sentence}  ->  {info.tokenizer.decode(made[0].tolist()).strip()}")


if __name__ == "__main__":
    main()
