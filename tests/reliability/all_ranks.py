"""Two ranks on gloo, started once by test_ranks.py for all that is to be seen of them.

torchrun --nproc-per-node 2 all_ranks.py FOLDER {ddp,fsdp} MODULE ...: each one's main(FOLDER/MODULE, kind), which
writes what its rank found to FOLDER/MODULE/rankN.pt.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch.distributed as dist


def main() -> None:
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo")
    for name in sys.argv[3:]:
        (folder / name).mkdir(exist_ok=True)
        importlib.import_module(name).main(folder / name, kind)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
