"""Several processes that hold one model together, as ``mlx.launch`` starts them.

Each process is a rank; rank 0 reads what the user says, and answers. What the model computes goes
through MLX's group (`group`, `agreed`); what the ranks tell each other between its steps goes
through a connection of their own (`Ranks`), which also notices when one of them is lost.
"""

from .agreement import agreed, all_values, expect_same, group, same_run
from .team import Ranks, join

__all__ = ["Ranks", "agreed", "all_values", "expect_same", "group", "join", "same_run"]
