"""The method: gated prompt experts in the middle of a frozen decoder. Importing this room enters it into PEFT.

A forward pass, in order:

1. `Engine` sits on the base model. Before a pass it makes a `ForwardContext` (attention/context.py), or finds that of
   the cache: which adapter acts, what its gate may read, who sees experts. It travels with the pass.
2. `MoPsLayer` stands in place of the injection layer and holds all parameters. It reads the gate (experts/gate.py) and
   lets the experts (experts/opened.py, of two kinds) put their columns into the context.
3. The attention of that layer and all later ones attends to these columns and the text (attention/kernels.py).

`MoPsModel` is what PEFT sees: adapters come and go. `states` is the frozen half of packed batches, `joining` rows that
join and leave a batch that decodes. The same, computed slowly by hand: tests/reference.
"""

from smartmops.adapter.config import MoPsConfig
from smartmops.adapter.registry import enter

from .layer import MoPsLayer
from .model import MoPsModel

enter("mops", MoPsConfig, MoPsModel)

__all__ = ["MoPsConfig", "MoPsLayer", "MoPsModel"]
