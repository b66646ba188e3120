"""What the leader of a replica gives its other ranks; each rank writes OUT/rank_N.pt.

python tests/helpers/dealt_program.py OUT
"""

import sys
from pathlib import Path

import torch

from nemo_care.ranks.process_groups import Layout, RankEnvironment, Ranks


def main() -> None:
    out = Path(sys.argv[1])
    ranks = Ranks(Layout(tensor=2), RankEnvironment.read())
    tensors = [torch.arange(n, dtype=torch.uint8).view(1, n) for n in (3, 5, 7, 2)]
    if not ranks.is_model_leader:
        tensors = [tensor.to("meta") for tensor in tensors]
    a, b, c, d = tensors
    dealt = ranks.dealt_by_leader([(0, [a]), (1, [b, c]), (1, []), (0, []), (1, [d])])
    told = ranks.from_leader(lambda: "everything", for_others=lambda text: text[:5])
    torch.save({"dealt": dealt, "told": told}, out / f"rank_{ranks.rank}.pt")
    ranks.close()


if __name__ == "__main__":
    main()
