"""Average the weights of two training rounds: master = (1 - share) * first + share * second, lower in loss than either.

python tools/nano/average.py --first ROUND1 --second ROUND2 --share 0.75 --out MEAN
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from model import Nano
from shape import CONFIG
from store import load_master, save_master


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--first", type=Path, required=True)
    parser.add_argument("--second", type=Path, required=True)
    parser.add_argument("--share", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    first, second = Nano(CONFIG), Nano(CONFIG)
    load_master(args.first, first)
    state = load_master(args.second, second)
    other = second.state_dict()
    mean = {
        k: torch.lerp(v, other[k], args.share) if v.is_floating_point() else v for k, v in first.state_dict().items()
    }
    first.load_state_dict(mean)
    args.out.mkdir(parents=True, exist_ok=True)
    save_master(args.out, first, state | {"averaged_share": args.share})


if __name__ == "__main__":
    main()
